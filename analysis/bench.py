"""A loaded model with all that asking it takes: steps 2 and 3, from queries to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from analysis import readout as readouts
from analysis import scoring
from analysis.attacks import AS_IS, Attack
from analysis.drafts import Drafts
from analysis.engine import Engine
from analysis.models import LoadedModel
from analysis.queries import Query, sample
from analysis.readout import Readout
from analysis.rendering import Prompt, Renderer
from analysis.store import Store
from defenses import Ask, Chat, Consultation, Defense
from defenses.chats import edit_last_user, parted
from defenses.consulting import together
from defenses.dice import Dice
from defenses.errors import UserError

_OPENINGS = 16  # queries that the readout's form is seen from


@dataclass(frozen=True)
class Bench:
    """A loaded model with all that asking it takes.

    Attributes:
        loaded: model and tokenizer.
        renderer: chat → token ids.
        engine: token ids → first-answer logits.
        drafts: what the model says where a defense asks it first.
        store: scores of earlier runs; None keeps none.
        seed: of the run.
        attack: how queries are sent.
        questions: what is asked about a request in its place, see `Readout`; empty: the request itself.
    """

    loaded: LoadedModel
    renderer: Renderer
    engine: Engine
    drafts: Drafts
    store: Store | None = None
    seed: int = 0
    attack: Attack = AS_IS
    questions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, loaded: LoadedModel, batch_size: int | None = None, seed: int = 0, store: Store | None = None
    ) -> Bench:
        """Return the bench for a model."""
        renderer, engine = Renderer(loaded.tokenizer), Engine(loaded.model, batch_size)
        drafts = Drafts(engine, renderer, loaded.context, scoring.about(loaded), store)
        return cls(loaded, renderer, engine, drafts, store, seed)

    def under(self, attack: Attack) -> Bench:
        """Return the same bench with queries sent through an attack."""
        return replace(self, attack=attack)

    def asking(self, questions: tuple[str, ...]) -> Bench:
        """Return the same bench with questions asked about requests."""
        return replace(self, questions=questions)

    def prompts(self, defense: Defense, query: Query) -> list[Prompt]:
        """Return what the model reads for a query: a prompt for each reading of the defense and question."""
        (prompts,) = self.every_prompt(defense, [query])
        return prompts

    def every_prompt(self, defense: Defense, queries: Sequence[Query]) -> list[list[Prompt]]:
        """Return what the model reads for each query; where the defense asks it first, for all together."""
        # The only randomness a defense gets: the same query is perturbed alike in every run with this seed.
        rngs = [Dice(f"{self.seed}/{query.id}", defense.name) for query in queries]
        found = []
        for query, rng, readings in zip(queries, rngs, self._readings(defense, queries, rngs), strict=True):
            # Asked about what the defense made of the request, within what it put around it, no answer begun.
            about = [lambda words, asked=asked: asked.replace("{request}", words) for asked in self.questions]
            chats = [edit_last_user(parted(chat)[0], one) for chat in readings for one in about] or readings
            if defense.recuts:
                recut = partial(defense.retokenize, rng=rng)
                prompts = [self.renderer.recut(chat, recut) for chat in chats]
            else:
                prompts = [self.renderer.render(chat) for chat in chats]
            longest = max(len(prompt.ids) for prompt in prompts)
            if longest >= self.loaded.context:
                raise UserError(
                    f"query {query.id!r} under {defense.name!r} makes a prompt of {longest} tokens, and "
                    f"{self.loaded.name} reads {self.loaded.context}: shorten the query or the defense's text"
                )
            found.append(prompts)
        return found

    def _readings(self, defense: Defense, queries: Sequence[Query], rngs: Sequence[Dice]) -> list[list[Chat]]:
        """The defense's readings of each query. Where it consults the model, all queries go in step."""
        talks = [self._talk(defense, query, rng) for query, rng in zip(queries, rngs, strict=True)]
        talk, said = together(talks), None
        while True:
            try:
                asks = talk.send(said)  # type: ignore[arg-type]  # None begins it
            except StopIteration as over:
                readings: list[list[Chat]] = over.value
                break
            said = self.drafts.answers(asks)
        if empty := [query.id for query, one in zip(queries, readings, strict=True) if not one]:
            raise UserError(f"{defense.name!r} gives nothing to read for query {empty[0]!r}")
        return readings

    def _talk(self, defense: Defense, query: Query, rng: Dice) -> Consultation:
        """What a defense does with a query; what goes wrong in a class of the user's own is told."""
        said: list[str] | None = None
        try:
            talk = defense.consult(self.attack.chat(query), rng)
            while True:
                asks = talk.send(said)  # type: ignore[arg-type]
                if not isinstance(asks, list) or not all(isinstance(one, Ask) for one in asks):
                    raise TypeError("consult must yield lists of Ask")
                said = yield asks
        except StopIteration as over:
            return over.value
        except Exception as error:
            if not defense.own or isinstance(error, UserError):
                raise
            where = f"{defense.name!r} raised {type(error).__name__} on query {query.id!r}"
            raise UserError(f"{where}: {error}") from error

    def words(
        self,
        queries: Sequence[Query],
        undefended: Defense,
        opener: tuple[int, ...] = (),
        sides: tuple[Sequence[str], Sequence[str]] = (readouts.REFUSE, readouts.COMPLY),
    ) -> Readout:
        """Return this model's words readout, made from how it opens its answers to undefended queries.

        Args:
            queries: a few of them are looked at.
            undefended: how they are asked.
            opener: token ids that every answer is made to begin with.
            sides: words that open refusals, and words that open compliance.
        """

        def opening(prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, list[int]]:
            probabilities = self.engine.read(prompts, lambda logits: logits.softmax(1))
            return probabilities.mean(0), probabilities.argmax(1).tolist()

        asked = sample(queries, _OPENINGS)
        prompts = [(*prompt.ids, *opener) for query in asked for prompt in self.prompts(undefended, query)]
        made = readouts.words(self.loaded.tokenizer, prompts, opening, *sides)
        prefix = (*opener, *made.prefix)
        return replace(made, prefix=prefix, begins=prefix, questions=self.questions)

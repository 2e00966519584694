"""A loaded model with all that asking it takes: steps 2 and 3, from queries to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from analysis import scoring
from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.drafts import DefenseCalls
from analysis.engine import Engine
from analysis.models import LoadedModel
from analysis.queries import Query
from analysis.rendering import Prompt, ChatTemplate
from analysis.store import ScoreCache
from defenses import ModelCall, Chat, Consultation, Defense
from defenses.chats import edit_last_user, split_prefill
from defenses.consulting import run_consultations
from defenses.dice import QueryRng
from defenses.errors import UserError



@dataclass(frozen=True)
class ModelSession:
    """A loaded model with all that asking it takes.

    Attributes:
        loaded_model: model and tokenizer.
        chat_template: chat → token ids.
        engine: token ids → first-answer logits.
        defense_calls: what the model says where a defense asks it first.
        score_cache: scores of earlier runs; None keeps none.
        seed: of the run.
        attack: how queries are sent.
        questions: what is asked about a request in its place, see `Readout`; empty: the request itself.
    """

    loaded_model: LoadedModel
    chat_template: ChatTemplate
    engine: Engine
    defense_calls: DefenseCalls
    score_cache: ScoreCache | None = None
    seed: int = 0
    attack: Attack = DIRECT_ATTACK
    questions: tuple[str, ...] = ()

    @classmethod
    def from_model(
        cls, loaded_model: LoadedModel, batch_size: int | None = None, seed: int = 0, score_cache: ScoreCache | None = None
    ) -> ModelSession:
        """Return the bench for a model."""
        renderer, engine = ChatTemplate(loaded_model.tokenizer), Engine(loaded_model.model, batch_size)
        drafts = DefenseCalls(engine, renderer, loaded_model.context_length, scoring.describe_computation(loaded_model), score_cache)
        return cls(loaded_model, renderer, engine, drafts, score_cache, seed)

    def with_attack(self, attack: Attack) -> ModelSession:
        """Return the same bench with queries sent through an attack."""
        return replace(self, attack=attack)

    def with_questions(self, questions: tuple[str, ...]) -> ModelSession:
        """Return the same bench with questions asked about requests."""
        return replace(self, questions=questions)

    def render_query(self, defense: Defense, query: Query) -> list[Prompt]:
        """Return what the model reads for a query: a prompt for each reading of the defense and question."""
        (prompts,) = self.render_queries(defense, [query])
        return prompts

    def render_queries(self, defense: Defense, queries: Sequence[Query]) -> list[list[Prompt]]:
        """Return what the model reads for each query; where the defense asks it first, for all together."""
        # The only randomness a defense gets: the same query is perturbed alike in every run with this seed.
        rngs = [QueryRng(f"{self.seed}/{query.id}", defense.name) for query in queries]
        found = []
        for query, rng, readings in zip(queries, rngs, self._rewrite_queries(defense, queries, rngs), strict=True):
            # Asked about what the defense made of the request, within what it put around it, no answer begun.
            about = [lambda words, asked=asked: asked.replace("{request}", words) for asked in self.questions]
            chats = [edit_last_user(split_prefill(chat)[0], one) for chat in readings for one in about] or readings
            if defense.retokenizes:
                recut = partial(defense.retokenize, rng=rng)
                prompts = [self.chat_template.render_retokenized(chat, recut) for chat in chats]
            else:
                prompts = [self.chat_template.render_prompt(chat) for chat in chats]
            longest = max(len(prompt.ids) for prompt in prompts)
            if longest >= self.loaded_model.context_length:
                raise UserError(
                    f"query {query.id!r} under {defense.name!r} makes a prompt of {longest} tokens, and "
                    f"{self.loaded_model.name} reads {self.loaded_model.context_length}: shorten the query or the defense's text"
                )
            found.append(prompts)
        return found

    def _rewrite_queries(self, defense: Defense, queries: Sequence[Query], rngs: Sequence[QueryRng]) -> list[list[Chat]]:
        """The defense's readings of each query. Where it consults the model, all queries go in step."""
        talks = [self._consult_defense(defense, query, rng) for query, rng in zip(queries, rngs, strict=True)]
        talk, said = run_consultations(talks), None
        while True:
            try:
                asks = talk.send(said)  # type: ignore[arg-type]  # None begins it
            except StopIteration as over:
                readings: list[list[Chat]] = over.value
                break
            said = self.defense_calls.complete_calls(asks)
        if empty := [query.id for query, one in zip(queries, readings, strict=True) if not one]:
            raise UserError(f"{defense.name!r} gives nothing to read for query {empty[0]!r}")
        return readings

    def _consult_defense(self, defense: Defense, query: Query, rng: QueryRng) -> Consultation:
        """What a defense does with a query; what goes wrong in a class of the user's own is told."""
        said: list[str] | None = None
        try:
            talk = defense.consult_model(self.attack.build_chat(query), rng)
            while True:
                asks = talk.send(said)  # type: ignore[arg-type]
                if not isinstance(asks, list) or not all(isinstance(one, ModelCall) for one in asks):
                    raise TypeError("consult must yield lists of Ask")
                said = yield asks
        except StopIteration as over:
            return over.value
        except Exception as error:
            if not defense.is_user_defined or isinstance(error, UserError):
                raise
            where = f"{defense.name!r} raised {type(error).__name__} on query {query.id!r}"
            raise UserError(f"{where}: {error}") from error

"""A loaded model with all that asking it takes: steps 2 and 3, from queries to what the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.queries import Query
from analysis.models.cache import CacheKey, ScoreCache, describe_computation
from analysis.models.chat_template import ChatTemplate, Prompt, strip_thinking
from analysis.models.engine import Engine, LogitReducer
from analysis.models.generation import generate_token_ids
from analysis.models.loading import LoadedModel
from defenses.chats import edit_last_user, split_prefill
from defenses.consultations import run_consultations
from defenses.contract import Chat, Consultation, Defense, ModelCall
from defenses.errors import UserError
from defenses.rng import QueryRng


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
        cls,
        loaded_model: LoadedModel,
        batch_size: int | None = None,
        seed: int = 0,
        score_cache: ScoreCache | None = None,
    ) -> ModelSession:
        """Return the bench for a model."""
        renderer, engine = ChatTemplate(loaded_model.tokenizer), Engine(loaded_model.model, batch_size)
        drafts = DefenseCalls(
            engine, renderer, loaded_model.context_length, describe_computation(loaded_model), score_cache
        )
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
        for query, rng, readings in zip(
            queries, rngs, self._rewrite_queries(defense, queries, rngs), strict=True
        ):
            # Asked about what the defense made of the request, within what it put around it, no answer begun.
            about = [lambda words, asked=asked: asked.replace("{request}", words) for asked in self.questions]
            chats = [
                edit_last_user(split_prefill(chat)[0], one) for chat in readings for one in about
            ] or readings
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

    def _rewrite_queries(
        self, defense: Defense, queries: Sequence[Query], rngs: Sequence[QueryRng]
    ) -> list[list[Chat]]:
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


DEFAULT_MAX_NEW_TOKENS = 48  # of each answer; a refusal shows in its first sentences


@dataclass(frozen=True)
class Response:
    """What a model said.

    Attributes:
        ids: its tokens, the prefix that it was made to begin with not among them.
        text: as a reader sees it, the prefix included.
        generated_text: the text without the prefix.
    """

    ids: tuple[int, ...]
    text: str
    generated_text: str


def generate_responses(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    response_prefix: tuple[int, ...] = (),
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    should_stop: Callable[[str], bool] | None = None,
    on_progress: Callable[[int], None] = lambda queries: None,
) -> list[list[Response]]:
    """Return the greedy answers to each query under a defense, one for each of its readings.

    Args:
        session: the model, and how queries are sent.
        defense: prepared for this model.
        queries: what is asked.
        response_prefix: token ids that every answer is made to begin with.
        max_new_tokens: new ones at most, of each answer.
        should_stop: told an answer so far, says whether the rest no longer matters.
        on_progress: told how many more prompts are answered.
    """
    tokenizer = session.loaded_model.tokenizer
    prompts = session.render_queries(defense, queries)
    flat = [prompt.append_prefix(response_prefix) for readings in prompts for prompt in readings]
    begun = [bool(prompt.prefill) for readings in prompts for prompt in readings]

    def text(answer: Sequence[int], begun: bool) -> str:
        # Of an answer that is begun only what the model itself says is heard.
        return str(tokenizer.decode([*(() if begun else response_prefix), *answer], skip_special_tokens=True))

    over = (
        (lambda answer: should_stop(text(answer, any(begun))))
        if should_stop is not None
        else lambda answer: False
    )
    if defense.logit_blend():
        said = _generate_blended(session, defense, flat, max_new_tokens, on_progress)
    else:
        with defense.apply_to(session.loaded_model.model):
            said = generate_token_ids(
                session.engine, flat, max_new_tokens, tokenizer.eos_token_id, over, on_progress
            )
    left = iter(
        Response(tuple(ids), text(ids, by_others), str(tokenizer.decode(ids, skip_special_tokens=True)))
        for ids, by_others in zip(said, begun, strict=True)
    )
    return [[next(left) for _ in readings] for readings in prompts]


def _generate_blended(
    session: ModelSession,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> list[list[int]]:
    """Answers whose first token all models of a blend choose together, as it is read; the rest is one's."""
    stop = session.loaded_model.tokenizer.eos_token_id
    chosen = iterate_defended_logits(
        session.engine, session.loaded_model, defense, prompts, _select_top_token
    )
    first = [int(token) for _, tokens in chosen for token in tokens]
    going = [row for row, token in enumerate(first) if token != stop] if max_new_tokens > 1 else []
    longer = [(*prompts[row], first[row]) for row in going]
    on_progress(len(prompts) - len(going))
    with defense.apply_to(session.loaded_model.model):
        rest = (
            generate_token_ids(session.engine, longer, max_new_tokens - 1, stop, on_progress=on_progress)
            if longer
            else []
        )
    behind = dict(zip(going, rest, strict=True))
    return [[] if token == stop else [token, *behind.get(row, [])] for row, token in enumerate(first)]


def _select_top_token(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows 1"]:
    return logits.argmax(1, keepdim=True)


_CALLS_PER_COMMIT = 64


class DefenseCalls:
    """Answers that a defense asks for.

    Args:
        engine: holds the model, which is not armed while it is asked.
        renderer: of its tokenizer.
        context: the longest prompt, in tokens.
        about: what the answers depend on beside the prompts.
        store: where they are kept for later runs; None keeps them in memory.
    """

    def __init__(
        self,
        engine: Engine,
        chat_template: ChatTemplate,
        context_length: int,
        shared_settings: Mapping[str, Any],
        score_cache: ScoreCache | None = None,
    ) -> None:
        self._engine, self._chat_template, self._context_length, self._score_cache = (
            engine,
            chat_template,
            context_length,
            score_cache,
        )
        self._shared_settings = shared_settings
        self._responses_by_key: dict[bytes, str] = {}
        # Told how many of how many are made.
        self.on_progress: Callable[[int, int], None] = lambda made, wanted: None
        self.n_calls = self.n_tokens = 0  # made in all, and how many tokens they and their prompts had
        self.transcript: list[tuple[tuple[int, ...], str]] = []  # what was asked and what was said, in order

    def complete_calls(self, model_calls: Sequence[ModelCall]) -> list[str]:
        """Return what the model says to each, greedily; empty where it says nothing, or only thinks."""
        if not model_calls:
            return []
        prompts = [self._chat_template.render_prompt(ask.chat).ids for ask in model_calls]
        longest = max(len(ids) + ask.max_new_tokens for ids, ask in zip(prompts, model_calls, strict=True))
        if longest > self._context_length:
            raise UserError(
                f"a defense asks the model about a request, in {longest} tokens, and the model reads "
                f"{self._context_length}: shorten the request"
            )
        names = [
            CacheKey(
                {**self._shared_settings, "tokens": ask.max_new_tokens, "line": ask.stops_at_newline}
            ).make_key(ids)
            for ids, ask in zip(prompts, model_calls, strict=True)
        ]
        if self._score_cache is not None:
            self._responses_by_key |= self._score_cache.read_drafts(
                [name for name in names if name not in self._responses_by_key]
            )
        new = {name: at for at, name in enumerate(names) if name not in self._responses_by_key}
        made = 0

        def done(count: int) -> None:
            nonlocal made
            made += count
            self.on_progress(made, len(new))

        for tokens, line in dict.fromkeys(
            (model_calls[at].max_new_tokens, model_calls[at].stops_at_newline) for at in new.values()
        ):
            rows = [
                at
                for at in new.values()
                if (model_calls[at].max_new_tokens, model_calls[at].stops_at_newline) == (tokens, line)
            ]
            rows.sort(key=lambda at: len(prompts[at]))
            # Some at a time: what is made is kept, should the run be ended.
            for start in range(0, len(rows), _CALLS_PER_COMMIT):
                some = rows[start : start + _CALLS_PER_COMMIT]
                self._generate_missing(
                    [prompts[at] for at in some], [names[at] for at in some], tokens, line, done
                )
        said = [self._responses_by_key[name] for name in names]
        self.transcript += zip(prompts, said, strict=True)
        return said

    def copy_uncached(self) -> DefenseCalls:
        """Return the same with nothing known, so that what drafts cost can be seen."""
        return DefenseCalls(self._engine, self._chat_template, self._context_length, self._shared_settings)

    def _generate_missing(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[bytes],
        max_new_tokens: int,
        stops_at_newline: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        tokenizer = self._chat_template.tokenizer

        def text(ids: Sequence[int]) -> str:
            return strip_thinking(str(tokenizer.decode(list(ids), skip_special_tokens=True))).lstrip()

        def over(ids: list[int]) -> bool:
            return stops_at_newline and "\n" in text(ids)

        said = generate_token_ids(
            self._engine, prompts, max_new_tokens, tokenizer.eos_token_id, over, on_progress
        )
        texts = [
            (text(ids).splitlines() or [""])[0].strip() if stops_at_newline else text(ids).rstrip()
            for ids in said
        ]
        self.n_calls += len(prompts)
        self.n_tokens += sum(map(len, prompts)) + sum(map(len, said))
        rows = list(zip(keys, texts, strict=True))
        self._responses_by_key |= dict(rows)
        if self._score_cache is not None and stops_at_newline:  # answers to requests are never kept
            self._score_cache.write_drafts(rows)


_MAX_BLENDED_PROMPTS = (
    128  # prompts whose logits are held at once, where those of several models are added up
)


def list_blend_members(defense: Defense) -> tuple[tuple[float, Defense], ...]:
    """Return what is armed for a first token, and by what weight its logits count."""
    return defense.logit_blend() or ((1.0, defense),)


def iterate_defended_logits(
    engine: Engine,
    loaded_model: LoadedModel,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    reducer: LogitReducer,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which prompts, and what is made of their first-answer logits while the defense is armed.

    Args:
        engine: that holds the model.
        loaded_model: the model.
        defense: where it chooses from several models, their logits are added up by weight.
        prompts: token ids.
        reducer: logits -> what is kept of them.
    """
    blend = list_blend_members(defense)
    if not defense.logit_blend():
        with defense.apply_to(loaded_model.model):
            yield from engine.iterate_first_token(prompts, reducer)
        return
    for start in range(0, len(prompts), _MAX_BLENDED_PROMPTS):
        rows = list(range(start, min(start + _MAX_BLENDED_PROMPTS, len(prompts))))
        logits = []
        for weight, one in blend:
            with one.apply_to(loaded_model.model):
                logits.append(
                    weight * engine.read_first_token([prompts[row] for row in rows], lambda all_: all_.cpu())
                )
        yield rows, reducer(sum(logits[1:], start=logits[0]))

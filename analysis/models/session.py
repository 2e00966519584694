"""Model session: renders chats under a defense (steps 2 and 3) and generates responses."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from analysis.models.cache import CacheKey, DeferredModel, ScoreCache, describe_computation
from analysis.models.chat_template import ChatTemplate, Prompt
from analysis.models.engine import DeferredEngine, Engine, EngineRecords, LogitReducer
from analysis.models.generation import Sampling, choose_tokens, generate_token_ids
from analysis.models.loading import LoadedModel
from analysis.models.plain_passes import choose_batch_form
from analysis.models.requests import ModelRequestReader
from analysis.models.thinking_blocks import strip_thinking
from analysis.models.vision import ImageReader
from defenses.activated_lora import replace_activation
from defenses.chats import edit_last_user, split_prefill
from defenses.consultations import run_consultations
from defenses.contract import Chat, Consultation, Defense, ModelCall, QueryChat, check_chats
from defenses.errors import UserError
from defenses.rng import QueryRng
from defenses.soft_prompts import FIRST_LEARNED_ID

DETECTOR_REFUSAL = "I cannot help with that request."  # the response where a detector refuses
DEFAULT_MAX_NEW_TOKENS = 48  # per response; refusals show in the first sentences
# Receives the token ids of some prompts and their first-token logits, rows × vocabulary.
PromptLogitCallback = Callable[[Sequence[tuple[int, ...]], Float[Tensor, "rows vocab"]], None]
MemberIds = tuple[tuple[int, ...], ...]  # token ids of the prompt of each member of a blend; empty: the same
_MAX_BLENDED_PROMPTS = (
    128  # prompts whose full logits are held in memory while those of several models are summed
)


@dataclass
class AttackAdaptation:
    """What adaptive attacks have found so far, and who is told how far they are.

    Attributes:
        chats: condition → defense, and query → chat.
        on_progress: called with the numbers of finished and of requested prompts.
    """

    chats: dict[Any, tuple[Defense, dict[Any, QueryChat]]] = field(default_factory=dict)
    on_progress: Callable[[int, int], None] = lambda n_finished, n_requested: None

    def count_prompts(self, n_requested: int) -> Callable[[int], None]:
        """Return a callback that takes numbers of finished prompts and tells their sum."""
        n_finished = 0

        def count(n_more: int) -> None:
            nonlocal n_finished
            n_finished = min(n_finished + n_more, n_requested)  # a defense may make several prompts of one
            self.on_progress(n_finished, n_requested)

        return count


@dataclass(frozen=True)
class ModelSession:
    """A loaded model with everything that scoring prompts and generating responses needs.

    Attributes:
        loaded_model: model and tokenizer.
        chat_template: chat → token ids.
        engine: token ids → first-token logits.
        defense_calls: responses of the model to a defense's own calls.
        score_cache: scores of earlier runs; None disables caching.
        seed: of the run.
        questions: questions about a request that replace it, see `Readout`; empty sends the request itself.
        adaptation: of attacks to the defended model.
        batch_size: prompts per forward pass; None uses what fits in memory.
    """

    loaded_model: LoadedModel
    chat_template: ChatTemplate
    engine: Engine
    defense_calls: DefenseCalls
    score_cache: ScoreCache | None = None
    seed: int = 0
    questions: tuple[str, ...] = ()
    adaptation: AttackAdaptation = field(default_factory=AttackAdaptation, compare=False, repr=False)
    batch_size: int | None = None

    @classmethod
    def from_model(
        cls,
        loaded_model: LoadedModel,
        batch_size: int | None = None,
        seed: int = 0,
        score_cache: ScoreCache | None = None,
        answer_prefix: str | None = None,
        engine: Engine | None = None,
    ) -> ModelSession:
        """Return a session for a model, without questions, with an engine of its own unless one is given."""
        chat_template = ChatTemplate(loaded_model.tokenizer, answer_prefix, loaded_model.image_reader)
        engine = engine or _make_engine(loaded_model, batch_size)
        shared_settings = describe_computation(loaded_model)
        defense_calls = DefenseCalls(engine, chat_template, loaded_model, shared_settings, score_cache)
        return cls(
            loaded_model, chat_template, engine, defense_calls, score_cache, seed, batch_size=batch_size
        )

    def with_questions(self, questions: tuple[str, ...]) -> ModelSession:
        """Return the same session with requests replaced by questions about them."""
        return replace(self, questions=questions)

    @cached_property
    def request_reader(self) -> ModelRequestReader:
        """Reads requests for detectors."""
        return ModelRequestReader(self.loaded_model, self.engine, self.chat_template, self.defense_calls)

    def score_requests(self, defense: Defense, query_chats: Sequence[QueryChat]) -> list[float] | None:
        """Return the log-odds (nats) of a defense's detector that each request is harmful; None without one.

        A request with positive log-odds is refused without asking the model.
        """
        if not defense.detects:
            return None
        prompts = [self.chat_template.render_prompt(chat).ids for _, chat in query_chats]
        fingerprint = defense.detector_fingerprint()
        cache = self.score_cache if fingerprint is not None else None
        settings = {**describe_computation(self.loaded_model), "detector": fingerprint}
        cache_key = CacheKey(settings)
        keys = [cache_key.make_key(ids) for ids in prompts]
        known = cache.read_scores(keys) if cache is not None else {}
        new_rows = list({key: row for row, key in enumerate(keys) if key not in known}.values())
        if new_rows:
            new_scores = _run_detector(defense, self.request_reader, [query_chats[row] for row in new_rows])
            if new_scores is None:
                return None
            rows = [(keys[row], score, 1.0) for row, score in zip(new_rows, new_scores, strict=True)]
            if cache is not None:
                cache.write_scores(rows)
            known |= {key: (score, 1.0) for key, score, _ in rows}
        return [known[key][0] for key in keys]

    def render_prompts(self, defense: Defense, query_chats: Sequence[QueryChat]) -> list[list[Prompt]]:
        """Return each query's prompts: one for each of the defense's copies and each question.

        A defense's calls to the model are batched over the queries.
        """
        prompts_by_query = self._render_own_prompts(defense, query_chats)
        if not defense.blends_prompts:
            return prompts_by_query
        by_member = [self._render_own_prompts(member, query_chats) for _, member in defense.logit_blend()]
        return [
            [
                replace(prompt, members=tuple(members))
                for prompt, *members in zip(prompts, *members_by_copy, strict=True)
            ]
            for prompts, *members_by_copy in zip(prompts_by_query, *by_member, strict=True)
        ]

    def _render_own_prompts(self, defense: Defense, query_chats: Sequence[QueryChat]) -> list[list[Prompt]]:
        """Return what `render_prompts` returns, without the prompts of the members of a blend."""
        # The only randomness of a defense: a query is perturbed in the same way in every run with this seed.
        rngs = [QueryRng(f"{self.seed}/{query_id}", defense.name) for query_id, _ in query_chats]
        chats_by_query = self._rewrite_chats(defense, query_chats, rngs)
        prompts_by_query = []
        for (query_id, _), rng, chats in zip(query_chats, rngs, chats_by_query, strict=True):
            if self.questions:
                chats = self._ask_questions(chats)
            if defense.retokenizes:
                retokenize = partial(_retokenize_text, defense, rng=rng)
                prompts = [self.chat_template.render_retokenized(chat, retokenize) for chat in chats]
            else:
                prompts = [self.chat_template.render_prompt(chat) for chat in chats]
            for tokens in defense.learned_tokens():
                prompts = [self.chat_template.insert_learned_tokens(prompt, tokens) for prompt in prompts]
            n_tokens = max(len(prompt.ids) for prompt in prompts)
            if n_tokens >= self.loaded_model.context_length:
                raise UserError(
                    f"query {query_id!r} under {defense.name!r} makes a prompt of {n_tokens} tokens, and "
                    f"{self.loaded_model.name} reads {self.loaded_model.context_length}: shorten the query "
                    "or the defense's text"
                )
            check_token_ids(self.loaded_model, [prompt.ids for prompt in prompts])
            prompts_by_query.append(prompts)
        return prompts_by_query

    def _ask_questions(self, chats: Sequence[Chat]) -> list[Chat]:
        """Return each chat with the request in its last user message replaced by each question about it.

        The defense's rewriting of the request and its surrounding text stay; a prefill is removed.
        """

        def insert_request(request: str, question: str) -> str:
            return question.replace("{request}", request)

        return [
            edit_last_user(split_prefill(chat)[0], partial(insert_request, question=question))
            for chat in chats
            for question in self.questions
        ]

    def _rewrite_chats(
        self, defense: Defense, query_chats: Sequence[QueryChat], rngs: Sequence[QueryRng]
    ) -> list[list[Chat]]:
        """Return the defense's copies of each query; its calls to the model run in lockstep."""
        consultations = [
            _consult_defense(defense, query_chat, rng)
            for query_chat, rng in zip(query_chats, rngs, strict=True)
        ]
        lockstep, responses = run_consultations(consultations), None
        while True:
            try:
                calls = lockstep.send(responses)  # type: ignore[arg-type]  # None starts the generator
            except StopIteration as stop:
                chats_by_query: list[list[Chat]] = stop.value
                break
            responses = self.defense_calls.complete_calls(calls)
        for (query_id, _), chats in zip(query_chats, chats_by_query, strict=True):
            if not chats:
                raise UserError(f"{defense.name!r} returns no chat for query {query_id!r}")
        return chats_by_query


def _make_engine(
    loaded_model: LoadedModel, batch_size: int | None, records: EngineRecords | None = None
) -> Engine:
    """Return an engine that runs batches in the fastest form in which the model's logits are right."""
    if isinstance(loaded_model, DeferredModel) and records is None:
        return DeferredEngine(partial(_make_engine, loaded_model, batch_size), loaded_model.engine_notices)
    model = loaded_model.model
    if model.device.type == "meta":  # without weights, nothing can be compared
        return Engine(model, batch_size)
    with replace_activation(model, None):
        form, slower = choose_batch_form(model, loaded_model.share_prefix)
    make_image_engine = partial(_make_image_engine, loaded_model, batch_size)
    engine = Engine(model, batch_size, form, make_image_engine, records=records)
    engine.notices.extend([slower] if slower and slower not in engine.notices else [])
    return engine


def _make_image_engine(loaded_model: LoadedModel, batch_size: int | None, records: EngineRecords) -> Engine:
    """Return an engine for prompts with images, which runs them in the fastest form that is right."""
    reader, model = loaded_model.image_reader, loaded_model.model
    if not isinstance(reader, ImageReader):
        raise TypeError("this model reads no images")
    prompts = reader.draw_probe_prompts()
    with replace_activation(model, None):
        form, slower = choose_batch_form(model, loaded_model.share_prefix, prompts)
    records.notices.extend([slower] if slower else [])
    return Engine(model, batch_size, form, probe_prompts=prompts, records=records)


def check_token_ids(loaded_model: LoadedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raise if a prompt has a token for which the model has no embedding.

    Args:
        loaded_model: the model.
        prompts: token ids.
    """
    largest = max(token_id for ids in prompts for token_id in ids if token_id < FIRST_LEARNED_ID)
    if largest >= loaded_model.n_embeddings:
        token = loaded_model.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the tokenizer of {loaded_model.name} gives {token!r} the id {largest}, but the model has "
            f"embeddings for the ids 0 to {loaded_model.n_embeddings - 1} only: tokens were added and the "
            "embedding was not resized. Use the model's own tokenizer, or resize_token_embeddings() and train"
        )


def _consult_defense(defense: Defense, query_chat: QueryChat, rng: QueryRng) -> Consultation:
    """Apply a defense to a chat; exceptions of a user-defined class become UserErrors."""
    responses: list[str] | None = None
    try:
        consultation = defense.consult_model(query_chat.chat, rng)
        if not hasattr(consultation, "send"):
            raise TypeError("consult_model must yield; without calls, define rewrite_copies instead")
        while True:
            calls = consultation.send(responses)  # type: ignore[arg-type]
            if not isinstance(calls, list) or not all(isinstance(call, ModelCall) for call in calls):
                raise TypeError("consult_model must yield lists of ModelCall")
            responses = yield calls
    except StopIteration as stop:
        return check_chats(defense.name, stop.value)
    except Exception as error:
        if not defense.is_user_defined or isinstance(error, UserError):
            raise
        raise UserError(
            f"{defense.name!r} raised {type(error).__name__} on query {query_chat.query_id!r}: {error}"
        ) from error


def _run_detector(
    defense: Defense, reader: ModelRequestReader, query_chats: Sequence[QueryChat]
) -> list[float] | None:
    """Return the log-odds of a defense's detector; mistakes of a user-defined class become UserErrors."""
    try:
        scores = defense.score_requests(reader, query_chats)
    except Exception as error:
        if not defense.is_user_defined or isinstance(error, UserError):
            raise
        raise UserError(
            f"`score_requests` of {defense.name!r} raised {type(error).__name__}: {error}"
        ) from error
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != len(query_chats):
        raise UserError(
            f"`score_requests` of {defense.name!r} returned {scores!r:.60}; it returns a list with a number "
            "for each request"
        )
    for (query_id, _), score in zip(query_chats, scores, strict=True):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"the detector of {defense.name!r} scores query {query_id!r} {score!r:.60}")
    return [float(score) for score in scores]


def _retokenize_text(defense: Defense, ids: list[int], rng: QueryRng) -> list[int]:
    """Return a defense's tokens of a text; raise if they are none."""
    retokenized = defense.retokenize(ids, rng)
    try:
        return list(map(operator.index, retokenized))
    except TypeError as error:
        raise UserError(
            f"{defense.name!r} returned {retokenized!r:.60} from `retokenize`; it takes a list of token ids"
        ) from error


@dataclass(frozen=True)
class Response:
    """One response of the model.

    Attributes:
        ids: generated token ids, without the response prefix.
        text: decoded text, the response prefix included.
        generated_text: decoded text without the prefix.
    """

    ids: tuple[int, ...]
    text: str
    generated_text: str


@dataclass(frozen=True)
class ResponseOpenings:
    """Token ids that are put at the start of the response to each query, also behind a prefill.

    Attributes:
        ids: token ids of each query's opening; no part of `Response.ids`.
        in_text: whether the opening is a part of `Response.text`.
    """

    ids: tuple[tuple[int, ...], ...]
    in_text: bool

    def select_rows(self, rows: Sequence[int]) -> ResponseOpenings:
        """Return the openings of some of the queries, by their positions."""
        return replace(self, ids=tuple(self.ids[row] for row in rows))


def generate_responses(
    session: ModelSession,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    response_prefix: tuple[int, ...] = (),
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    should_stop: Callable[[str], bool] | None = None,
    on_progress: Callable[[int], None] = lambda queries: None,
    on_first_logits: PromptLogitCallback = lambda prompts, logits: None,
    openings: ResponseOpenings | None = None,
    sampling: Sampling | None = None,
) -> list[list[Response]]:
    """Return the responses to each query under a defense, one per prompt of the query.

    A query that the defense's detector refuses has one response, `DETECTOR_REFUSAL`; the model is not asked.

    Args:
        session: the model.
        defense: prepared for this model.
        query_chats: the queries, an attack applied.
        response_prefix: token ids with which every response starts.
        max_new_tokens: maximum number of generated tokens per response.
        should_stop: called with the text so far; True ends the response there.
        on_progress: called with the number of prompts answered since the last call.
        on_first_logits: called with the token ids of some prompts, the response prefix included, and their
            first-token logits; where `generate_token_ids` does so, and not if several models are blended.
        openings: put at the start of the response to each query, behind the prefix; `should_stop` is not
            given their text. Models that are blended choose the first token behind them.
        sampling: None for greedy responses.
    """
    log_odds = session.score_requests(defense, query_chats) or [-math.inf] * len(query_chats)
    is_refused = [value > 0 for value in log_odds]
    on_progress(sum(is_refused))
    asked_rows = [row for row, refused in enumerate(is_refused) if not refused]
    asked = [query_chats[row] for row in asked_rows]
    asked_openings = (openings or ResponseOpenings(((),) * len(query_chats), False)).select_rows(asked_rows)
    arguments = response_prefix, max_new_tokens, should_stop, on_progress, on_first_logits, asked_openings
    answers = iter(_generate_model_responses(session, defense, asked, *arguments, sampling) if asked else [])
    refusal = _make_detector_refusal(session.chat_template)
    return [[refusal] if refused else next(answers) for refused in is_refused]


def _make_detector_refusal(chat_template: ChatTemplate) -> Response:
    """Return the response to a request that a detector refuses."""
    ids = tuple(chat_template.tokenizer.encode(DETECTOR_REFUSAL, add_special_tokens=False))
    return Response(ids, DETECTOR_REFUSAL, DETECTOR_REFUSAL)


def _generate_model_responses(
    session: ModelSession,
    defense: Defense,
    query_chats: Sequence[QueryChat],
    response_prefix: tuple[int, ...],
    max_new_tokens: int,
    should_stop: Callable[[str], bool] | None,
    on_progress: Callable[[int], None],
    on_first_logits: PromptLogitCallback,
    openings: ResponseOpenings,
    sampling: Sampling | None,
) -> list[list[Response]]:
    """Return what `generate_responses` returns, without the defense's detector."""
    chat_template = session.chat_template
    prompts_by_query = session.render_prompts(defense, query_chats)
    prompts = [prompt for query_prompts in prompts_by_query for prompt in query_prompts]
    prompt_openings = [
        opening
        for opening, query_prompts in zip(openings.ids, prompts_by_query, strict=True)
        for _ in query_prompts
    ]
    prompt_ids = [
        (*prompt.append_prefix(response_prefix), *opening)
        for prompt, opening in zip(prompts, prompt_openings, strict=True)
    ]
    member_ids = [
        tuple((*ids, *opening) for ids in prompt.list_member_ids(response_prefix))
        for prompt, opening in zip(prompts, prompt_openings, strict=True)
    ]
    is_prefilled = [bool(prompt.prefill) for prompt in prompts]

    def decode_response(token_ids: Sequence[int], is_prefilled: bool) -> str:
        # The text of a prefilled response is only what the model itself generated.
        prefix = () if is_prefilled else response_prefix
        return chat_template.decode_response([*prefix, *token_ids])

    def is_finished(token_ids: list[int]) -> bool:
        return should_stop is not None and should_stop(decode_response(token_ids, any(is_prefilled)))

    if defense.logit_blend():
        generated = _generate_blended(
            session, defense, prompt_ids, member_ids, max_new_tokens, on_progress, sampling
        )
    else:
        with defense.apply_to(session.loaded_model.model):
            generated = generate_token_ids(
                session.engine,
                prompt_ids,
                max_new_tokens,
                session.loaded_model.end_token_ids,
                is_finished,
                on_progress,
                lambda rows, logits: on_first_logits([prompt_ids[row] for row in rows], logits),
                sampling,
            )
    responses = (
        Response(
            tuple(token_ids),
            decode_response([*(opening if openings.in_text else ()), *token_ids], prefilled),
            chat_template.decode_response(token_ids),
        )
        for token_ids, prefilled, opening in zip(generated, is_prefilled, prompt_openings, strict=True)
    )
    return [[next(responses) for _ in query_prompts] for query_prompts in prompts_by_query]


class DefenseCalls:
    """Greedy responses of the undefended model to a defense's own calls, each generated once.

    Args:
        engine: runs the model; the defense is not applied to it meanwhile.
        chat_template: of the model's tokenizer.
        loaded_model: the model that the engine runs.
        shared_settings: everything but the prompts that the responses depend on, for cache keys.
        score_cache: stores single-line responses for later runs; None keeps them in memory.

    Attributes:
        on_progress: called with the numbers of generated and of requested responses.
        n_calls: number of generated responses.
        n_tokens: number of tokens of these responses and their prompts.
        transcript: prompt ids and response of every call, in order.
    """

    def __init__(
        self,
        engine: Engine,
        chat_template: ChatTemplate,
        loaded_model: LoadedModel,
        shared_settings: Mapping[str, Any],
        score_cache: ScoreCache | None = None,
    ) -> None:
        self._engine, self._chat_template = engine, chat_template
        self._loaded_model, self._shared_settings = loaded_model, shared_settings
        self._score_cache = score_cache
        self._responses_by_key: dict[bytes, str] = {}
        self.on_progress: Callable[[int, int], None] = lambda n_generated, n_requested: None
        self.n_calls = self.n_tokens = 0
        self.transcript: list[tuple[tuple[int, ...], str]] = []

    def complete_calls(self, model_calls: Sequence[ModelCall]) -> list[str]:
        """Return the greedy response to each call; empty if the model generates nothing but thinking."""
        if not model_calls:
            return []
        prompts = [self._chat_template.render_prompt(call.chat).ids for call in model_calls]
        n_tokens = max(len(ids) + call.max_new_tokens for ids, call in zip(prompts, model_calls, strict=True))
        if n_tokens > self._loaded_model.context_length:
            raise UserError(
                f"a defense calls the model about a query with {n_tokens} tokens, and the model reads "
                f"{self._loaded_model.context_length}: shorten the query"
            )
        check_token_ids(self._loaded_model, prompts)
        keys = [self._make_key(ids, call) for ids, call in zip(prompts, model_calls, strict=True)]
        if self._score_cache is not None:
            self._responses_by_key |= self._score_cache.read_drafts(
                [key for key in keys if key not in self._responses_by_key]
            )
        # Identical calls have the same key and are answered once.
        new_rows = {key: row for row, key in enumerate(keys) if key not in self._responses_by_key}.values()
        n_generated = 0

        def report_progress(n_more: int) -> None:
            nonlocal n_generated
            n_generated += n_more
            self.on_progress(n_generated, len(new_rows))

        rows_by_limits: dict[tuple[int, bool], list[int]] = {}
        for row in new_rows:
            call = model_calls[row]
            rows_by_limits.setdefault((call.max_new_tokens, call.stops_at_newline), []).append(row)
        for (max_new_tokens, stops_at_newline), rows in rows_by_limits.items():
            rows.sort(key=lambda row: len(prompts[row]))
            # In chunks, each of which is stored when it is finished, in case the run is interrupted.
            size = self._engine.responses_per_batch
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                self._generate_missing(
                    [prompts[row] for row in chunk],
                    [keys[row] for row in chunk],
                    max_new_tokens,
                    stops_at_newline,
                    report_progress,
                )
        responses = [self._responses_by_key[key] for key in keys]
        self.transcript += zip(prompts, responses, strict=True)
        return responses

    def copy_uncached(self) -> DefenseCalls:
        """Return a copy without cached responses, so that the cost of the calls can be measured."""
        return DefenseCalls(self._engine, self._chat_template, self._loaded_model, self._shared_settings)

    def _make_key(self, token_ids: Sequence[int], call: ModelCall) -> bytes:
        """Return the cache key of a call."""
        limits = {"tokens": call.max_new_tokens, "line": call.stops_at_newline}
        return CacheKey({**self._shared_settings, **limits}).make_key(token_ids)

    def _generate_missing(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[bytes],
        max_new_tokens: int,
        stops_at_newline: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        """Generate and store the responses to calls with the same limits."""

        def decode_response(token_ids: Sequence[int]) -> str:
            return strip_thinking(self._chat_template.decode_response(token_ids)).lstrip()

        def is_finished(token_ids: list[int]) -> bool:
            return stops_at_newline and "\n" in decode_response(token_ids)

        generated = generate_token_ids(
            self._engine,
            prompts,
            max_new_tokens,
            self._loaded_model.end_token_ids,
            is_finished,
            on_progress,
        )
        texts = [decode_response(token_ids) for token_ids in generated]
        if stops_at_newline:
            texts = [(text.splitlines() or [""])[0].strip() for text in texts]
        else:
            texts = [text.rstrip() for text in texts]
        self.n_calls += len(prompts)
        self.n_tokens += sum(map(len, prompts)) + sum(map(len, generated))
        rows = list(zip(keys, texts, strict=True))
        self._responses_by_key |= dict(rows)
        if self._score_cache is not None and stops_at_newline:  # full responses to queries are never stored
            self._score_cache.write_drafts(rows)


def list_blend_members(defense: Defense) -> tuple[tuple[float, Defense], ...]:
    """Return (weight, defense) pairs whose first-token logits are summed."""
    return defense.logit_blend() or ((1.0, defense),)


def iterate_defended_logits(
    engine: Engine,
    loaded_model: LoadedModel,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    reducer: LogitReducer,
    member_prompts: Sequence[MemberIds] = (),
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the prompt indices and the reduced first-token logits of each batch, with the defense applied.

    Args:
        engine: runs the model.
        loaded_model: the model.
        defense: if it blends several models, the weighted sum of their logits is reduced.
        prompts: token ids.
        reducer: logits, rows × vocabulary → values to keep.
        member_prompts: for each prompt, what the members of a blend read instead; empty if all read it.
    """
    blend = list_blend_members(defense)
    if not defense.logit_blend():
        with defense.apply_to(loaded_model.model):
            yield from engine.iterate_first_token(prompts, reducer)
        return
    for start in range(0, len(prompts), _MAX_BLENDED_PROMPTS):
        rows = list(range(start, min(start + _MAX_BLENDED_PROMPTS, len(prompts))))
        logits = []
        for number, (weight, member) in enumerate(blend):
            own_prompts = [
                member_prompts[row][number] if member_prompts and member_prompts[row] else prompts[row]
                for row in rows
            ]
            with member.apply_to(loaded_model.model):
                logits.append(weight * engine.read_first_token(own_prompts, lambda raw: raw.cpu()))
        yield rows, reducer(sum(logits[1:], start=logits[0]))


def _generate_blended(
    session: ModelSession,
    defense: Defense,
    prompts: Sequence[tuple[int, ...]],
    member_prompts: Sequence[MemberIds],
    max_new_tokens: int,
    on_progress: Callable[[int], None],
    sampling: Sampling | None,
) -> list[list[int]]:
    """Return responses: first token from the blended logits, the rest from the defended model."""
    end_token_ids = session.loaded_model.end_token_ids
    batches = iterate_defended_logits(
        session.engine, session.loaded_model, defense, prompts, lambda logits: logits, member_prompts
    )
    first_tokens = [
        token
        for rows, logits in batches
        for token in choose_tokens(logits, [prompts[row] for row in rows], sampling)
    ]
    continued = [row for row, token in enumerate(first_tokens) if token not in end_token_ids]
    if max_new_tokens <= 1:
        continued = []
    on_progress(len(prompts) - len(continued))
    continuations: list[list[int]] = []
    if continued:
        extended = [(*prompts[row], first_tokens[row]) for row in continued]
        with defense.apply_to(session.loaded_model.model):
            continuations = generate_token_ids(
                session.engine,
                extended,
                max_new_tokens - 1,
                end_token_ids,
                on_progress=on_progress,
                sampling=sampling,
            )
    continuation_by_row = dict(zip(continued, continuations, strict=True))
    return [
        [] if token in end_token_ids else [token, *continuation_by_row.get(row, [])]
        for row, token in enumerate(first_tokens)
    ]

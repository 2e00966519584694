"""Batched generation with a shared prefix: greedy responses, or sampled ones."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from analysis.models.batches import BatchForm, CacheUse, count_shared_prefix, order_rows
from analysis.models.engine import Engine, RemoteEngine
from analysis.models.image_tokens import contains_image, is_image_id
from analysis.models.plain_passes import (
    compute_plain_logits,
    draw_probe_prompts,
    explain_disagreement,
    measure_logit_gap,
)
from analysis.models.prefix_attention import (
    PackedRows,
    RowCache,
    SharedPrefix,
    can_split_attention,
    make_split_update,
)
from defenses.activated_lora import get_activation
from defenses.errors import UserError

_MAX_PADDED_ROWS, _MAX_PACKED_ROWS = 32, 64  # per batch; packed rows take less memory
_N_PROBE_TOKENS = 3

# Token ids generated so far → whether the response ends here.
StopCondition = Callable[[list[int]], bool]
# Receives the indices of some prompts and their first-token logits, rows × vocabulary.
LogitCallback = Callable[[Sequence[int], Float[Tensor, "rows vocab"]], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the softmax of the logits at a temperature.

    The token with the largest sum of scaled logit and Gumbel noise is a draw from the softmax. The noise
    depends on the seed and on all tokens before it, so that a response is the same whatever batch it is in.

    Attributes:
        temperature: above 0; 1 samples from the model's own distribution.
        seed: of this sample; other seeds give independent responses to the same prompt.
    """

    temperature: float
    seed: str

    def perturb_logits(
        self, logits: Float[Tensor, "rows vocab"], sequences: Sequence[Sequence[int]]
    ) -> Float[Tensor, "rows vocab"]:
        """Return logits whose largest value is at the token that is drawn.

        Args:
            logits: of the next token.
            sequences: the tokens before it, for each row.
        """
        noise = torch.stack([self._draw_noise(sequence, logits.shape[1]) for sequence in sequences])
        return logits.float() / self.temperature + noise.to(logits.device)

    def _draw_noise(self, sequence: Sequence[int], size: int) -> Float[Tensor, " vocab"]:
        """Return standard Gumbel noise, which the seed and the tokens determine."""
        digest = hashlib.sha256(f"{self.seed}|{','.join(map(str, sequence))}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        # -log of an exponential variate; never infinite, because `exponential_` draws no 0.
        return -torch.empty(size).exponential_(generator=generator).log()


def choose_tokens(
    logits: Float[Tensor, "rows vocab"], sequences: Sequence[Sequence[int]], sampling: Sampling | None
) -> list[int]:
    """Return the next token of each row: that with the largest logit, or a drawn one.

    Args:
        logits: of the next token.
        sequences: the tokens before it, for each row.
        sampling: None for the largest.
    """
    if sampling is not None:
        logits = sampling.perturb_logits(logits, sequences)
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


@dataclass(frozen=True)
class ResponseEnd:
    """Where responses end.

    Attributes:
        max_new_tokens: maximum length of each response.
        end_token_ids: the tokens that end a response.
        should_stop: called with the token ids generated so far; True ends the response there.
    """

    max_new_tokens: int
    end_token_ids: frozenset[int]
    should_stop: StopCondition

    def append_token(self, response: list[int], token: int) -> bool:
        """Append a token to a response, except the end token; return whether the response is finished."""
        if token in self.end_token_ids:
            return True
        response.append(token)
        return len(response) == self.max_new_tokens or self.should_stop(response)


def generate_token_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_token_ids: frozenset[int],
    should_stop: StopCondition = lambda token_ids: False,
    on_progress: Callable[[int], None] = lambda n_responses: None,
    on_first_logits: LogitCallback = lambda rows, logits: None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Return the response to each prompt as token ids, without the end token.

    Every token is the one that a plain forward pass over the prompt and the tokens before it ranks first, or
    one that is drawn from the probabilities of that pass.

    Args:
        engine: runs the model.
        prompts: token ids.
        max_new_tokens: maximum length of each response.
        end_token_ids: the tokens that end a response, see `LoadedModel.end_token_ids`.
        should_stop: called with the token ids generated so far; True ends the response there.
        on_progress: called with the number of responses finished since the last call.
        on_first_logits: called with the float32 logits of the first token, batch by batch; only where rows
            are packed, because these logits are those of `Engine.read_first_token` up to rounding.
        sampling: None for greedy responses.
    """
    responses: dict[int, list[int]] = {}
    response_end = ResponseEnd(max_new_tokens, end_token_ids, should_stop)
    if isinstance(engine, RemoteEngine):
        if sampling is not None:
            raise UserError("--samples: tokens are drawn from a model on this machine, not from a served one")
        return engine.generate_token_ids(prompts, max_new_tokens, response_end.append_token, on_progress)
    with torch.inference_mode():
        for reading_engine, engine_rows in engine.split_rows(prompts):

            def on_engine_logits(part: Sequence[int], logits: Tensor, rows: list[int] = engine_rows) -> None:
                on_first_logits([rows[row] for row in part], logits)

            engine_prompts = [prompts[row] for row in engine_rows]
            for part, batch in _generate_batches(
                reading_engine, engine_prompts, response_end, on_engine_logits, sampling
            ):
                responses.update(zip([engine_rows[row] for row in part], batch, strict=True))
                on_progress(len(part))
    return [responses[row] for row in range(len(prompts))]


def _generate_batches(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    response_end: ResponseEnd,
    on_first_logits: LogitCallback,
    sampling: Sampling | None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield row indices and responses, batch by batch."""
    rotation, lengths = engine.rotation, [len(prompt) for prompt in prompts]
    for group in rotation.group_rows(lengths):
        # Cached keys are of no use to a response in which the frequencies of rotation change.
        n_more = response_end.max_new_tokens - 1
        changing = [row for row in group if rotation.changes_between(lengths[row], lengths[row] + n_more)]
        steady = sorted(set(group) - set(changing))
        yield from _generate_group(engine, prompts, steady, response_end, on_first_logits, sampling)
        if changing:
            changing_prompts = [prompts[row] for row in changing]
            yield changing, _generate_uncached(engine, changing_prompts, response_end, sampling)


def _generate_group(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    response_end: ResponseEnd,
    on_first_logits: LogitCallback,
    sampling: Sampling | None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield row indices and responses, batch by batch, of prompts that may share forward passes."""
    if not rows:
        return
    model, group = engine.model, [prompts[row] for row in rows]
    n_shared, prefix = _compute_generation_prefix(engine, group)
    is_packed = (
        n_shared > 0 and engine.batch_form is BatchForm.PACKED and can_split_attention(model, prefix.layers)
    )
    if is_packed:
        engine.work_counter.computed_tokens += n_shared
        engine.work_counter.saved_tokens += n_shared * (len(group) - 1)
        cache_use = CacheUse.PADDED
    else:
        cache_use = choose_cache_use(engine)
    if cache_use is CacheUse.NONE:
        yield list(rows), _generate_uncached(engine, group, response_end, sampling)
        return
    for part in _group_rows(group, n_shared, is_packed, cache_use is CacheUse.PADDED):
        batch_rows, batch = [rows[index] for index in part], [group[index] for index in part]
        if is_packed:
            on_logits = partial(on_first_logits, batch_rows)
            responses = _generate_packed(engine, prefix, n_shared, batch, response_end, on_logits, sampling)
        else:
            responses, _ = _generate_cached(batch, engine, prefix, n_shared, response_end, sampling)
        yield batch_rows, responses


def choose_cache_use(engine: Engine) -> CacheUse:
    """Return the fastest way to generate with transformers that agrees with plain forward passes.

    It is chosen once per engine, by generating a few tokens: some models lose count of positions behind
    padding, others give wrong logits with their own cache. An adapter that is activated by tokens is compared
    on its own, with prompts that invoke it.
    """
    model, activation = engine.model, get_activation(engine.model)
    has_activation = activation is not None
    if has_activation not in engine.cache_uses:
        engine.cache_uses[has_activation] = CacheUse.NONE
        prompts, reasons = list(engine.probe_prompts or draw_probe_prompts(model)), []
        if activation is not None:
            prompts = activation.extend_prompts(prompts)
        # The last two prompts have equal length. A recurrent state would start with the padding.
        trials = {CacheUse.PADDED: prompts} if _has_plain_cache(model) else {}
        for cache_use, rows in {**trials, CacheUse.EQUAL: prompts[1:]}.items():
            reason = explain_disagreement(model, partial(_measure_generation_gap, engine, rows))
            if not reason:
                engine.cache_uses[has_activation] = cache_use
                break
            reasons.append(f"{cache_use} {reason}")
        else:
            engine.notices.append(
                f"responses of {type(model).__name__} take {CacheUse.NONE}: {'; '.join(reasons)}"
            )
    return engine.cache_uses[has_activation]


def _has_plain_cache(model: Any) -> bool:
    """Return whether the model's cache holds the keys and values of all tokens, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _measure_generation_gap(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    """Return the largest difference between logits while generating and those of plain passes."""
    n_shared, prefix = _compute_generation_prefix(engine, prompts)
    response_end = ResponseEnd(_N_PROBE_TOKENS, frozenset(), lambda token_ids: False)
    responses, logits = _generate_cached(
        prompts, engine, prefix, n_shared, response_end, None, with_logits=True
    )
    gaps = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        plain = compute_plain_logits(engine.model, [*prompt, *response[:-1]])[len(prompt) - 1 :]
        gaps.append(measure_logit_gap(torch.stack([step[row] for step in logits]).float(), plain))
    return max(gaps)


def _compute_generation_prefix(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[int, DynamicCache]:
    """Return the number of tokens that the prompts share, and their keys and values."""
    model, prefix = engine.model, DynamicCache(config=engine.model.config)
    n_shared = count_shared_prefix(prompts) if _has_plain_cache(model) else 0
    # transformers wants the features of all images of a prompt, also of those behind cached keys.
    n_shared = sum(1 for _ in takewhile(lambda token_id: not is_image_id(token_id), prompts[0][:n_shared]))
    if not engine.can_extend_prefix(n_shared, len(prompts[0])):
        return 0, prefix
    engine.rotation.reset_modules()
    shared_ids = torch.tensor([list(prompts[0][:n_shared])], device=model.device)
    model(input_ids=shared_ids, past_key_values=prefix, use_cache=True, logits_to_keep=1)
    return n_shared, prefix


def _generate_packed(
    engine: Engine,
    prefix: DynamicCache,
    n_shared: int,
    prompts: Sequence[Sequence[int]],
    response_end: ResponseEnd,
    on_first_logits: Callable[[Tensor], None],
    sampling: Sampling | None,
) -> list[list[int]]:
    """Generate responses of packed rows: the prefix is not copied, and finished rows are dropped."""
    suffixes = [prompt[n_shared:] for prompt in prompts]
    row_caches = []
    for layer in prefix.layers:
        assert isinstance(layer, DynamicLayer)  # of `_has_plain_cache`
        if layer.keys is not None and layer.values is not None:  # none in layers that only read images
            row_caches.append(RowCache())
            layer.update = make_split_update(layer.keys, layer.values, row_caches[-1])  # type: ignore[method-assign]
    responses: list[list[int]] = [[] for _ in suffixes]
    active_rows = list(range(len(suffixes)))
    last_positions = torch.stack([n_shared + engine.locate_tokens([suffix]).max() for suffix in suffixes])
    packed_rows = PackedRows.from_tokens(suffixes)
    is_cached_token = packed_rows.is_token
    shared_prefix = SharedPrefix(prefix, is_packed=True, end_position=n_shared)  # it holds no image
    logits = engine.compute_packed_suffixes(
        shared_prefix, n_shared, suffixes, packed_rows, packed_rows.last_index
    )
    on_first_logits(logits)
    while True:
        sequences = [[*prompts[row], *responses[row]] for row in active_rows]
        is_finished = [
            response_end.append_token(responses[row], token)
            for row, token in zip(active_rows, choose_tokens(logits, sequences, sampling), strict=True)
        ]
        if all(is_finished):
            return responses
        if any(is_finished):
            kept = torch.tensor([index for index, finished in enumerate(is_finished) if not finished])
            active_rows = [active_rows[index] for index in kept]
            last_positions, is_cached_token = last_positions[kept], is_cached_token[kept]
            for row_cache in row_caches:
                row_cache.select_rows(kept)
        # One more token per row, which attends to all tokens of its row except the padding.
        is_new_token = torch.ones(len(active_rows), 1, dtype=torch.bool)
        is_cached_token = torch.cat([is_cached_token, is_new_token], dim=1)
        token_ids = torch.tensor([responses[row][-1] for row in active_rows])
        positions = last_positions + torch.tensor([len(responses[row]) for row in active_rows])
        packed_rows = PackedRows.from_lengths(torch.ones_like(last_positions))
        hidden_mask = ~is_cached_token[:, None]
        logits = engine.compute_packed_logits(
            prefix, n_shared, token_ids, positions, packed_rows, packed_rows.last_index, hidden_mask
        )


def _generate_uncached(
    engine: Engine, prompts: Sequence[Sequence[int]], response_end: ResponseEnd, sampling: Sampling | None
) -> list[list[int]]:
    """Generate responses by a whole forward pass for every token."""
    responses: list[list[int]] = [[] for _ in prompts]
    active_rows = list(range(len(prompts)))
    while active_rows:
        sequences = [(*prompts[row], *responses[row]) for row in active_rows]
        tokens: dict[int, int] = {}
        with engine.read_responses(len(responses[active_rows[0]])):
            for rows, logits in engine.iterate_logits(sequences, [1] * len(sequences)):
                chosen = choose_tokens(logits, [sequences[row] for row in rows], sampling)
                tokens.update(zip(rows, chosen, strict=True))
        active_rows = [
            row
            for index, row in enumerate(active_rows)
            if not response_end.append_token(responses[row], tokens[index])
        ]
    return responses


def _generate_cached(
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    prefix: DynamicCache,
    n_shared: int,
    response_end: ResponseEnd,
    sampling: Sampling | None,
    with_logits: bool = False,
) -> tuple[list[list[int]], tuple[Tensor, ...]]:
    """Generate responses by transformers, with a copy of the prefix for each row; also return the logits."""
    model, end_token_ids = engine.model, response_end.end_token_ids
    token_ids, attention_mask = _pad_prompts(prompts, n_shared, model.device)
    cache = copy.deepcopy(prefix)
    if n_shared:
        cache.batch_repeat_interleave(len(prompts))
    prompt_length = token_ids.shape[1]
    engine.rotation.reset_modules()
    has_images = contains_image(token_ids.flatten().tolist())
    inputs = model.image_reader.build_inputs(token_ids) if has_images else {"input_ids": token_ids}
    with _plain_generation_settings(model):
        output = model.generate(
            **inputs,
            attention_mask=attention_mask,
            past_key_values=cache if n_shared else None,
            max_new_tokens=response_end.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[_NoiseProcessor(sampling, prompts, prompt_length)] if sampling else None,
            stopping_criteria=[_RowStoppingCriteria(response_end.should_stop, prompt_length, len(prompts))],
            eos_token_id=sorted(end_token_ids) or None,
            pad_token_id=min(end_token_ids, default=0),
            return_dict_in_generate=True,
            output_logits=with_logits,
        )
    responses = output.sequences[:, prompt_length:].tolist()
    ended = [list(takewhile(lambda token: token not in end_token_ids, ids)) for ids in responses]
    return ended, output.logits or ()


@contextmanager
def _plain_generation_settings(model: Any) -> Iterator[None]:
    """Context manager: set aside the model's generation settings, which `generate` fills in where it can.

    They may penalize repetitions or suppress tokens, so that the result would not be greedy.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


class _NoiseProcessor(LogitsProcessor):
    """Lets the greedy `model.generate` choose drawn tokens."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], prompt_length: int) -> None:
        self.sampling, self.prompts, self.prompt_length = sampling, prompts, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits with noise."""
        generated = input_ids[:, self.prompt_length :].tolist()
        sequences = [[*prompt, *ids] for prompt, ids in zip(self.prompts, generated, strict=True)]
        return self.sampling.perturb_logits(scores, sequences)


class _RowStoppingCriteria(StoppingCriteria):
    """Ends each row of `model.generate` by a stop condition."""

    def __init__(self, should_stop: StopCondition, prompt_length: int, n_rows: int) -> None:
        self.should_stop, self.prompt_length, self.is_stopped = should_stop, prompt_length, [False] * n_rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return the rows that end here."""
        for row, token_ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            self.is_stopped[row] = self.is_stopped[row] or self.should_stop(token_ids)
        return torch.tensor(self.is_stopped, device=input_ids.device)


def _group_rows(
    prompts: Sequence[Sequence[int]], n_shared: int, is_packed: bool, allows_padding: bool
) -> Iterator[list[int]]:
    """Yield batches of rows: of similar length, or of similar tokens if packed rows then share many.

    If the model cannot handle padding, the rows of a batch have equal length.
    """
    lengths = [len(prompt) for prompt in prompts]
    if is_packed:
        order, _ = order_rows([prompt[n_shared:] for prompt in prompts], is_packed)
    else:
        order = sorted(range(len(prompts)), key=lambda row: lengths[row])
    max_rows = _MAX_PACKED_ROWS if is_packed else _MAX_PADDED_ROWS
    while order:
        rows = [row for row in order[:max_rows] if allows_padding or lengths[row] == lengths[order[0]]]
        yield rows
        order = order[len(rows) :]


def _pad_prompts(
    prompts: Sequence[Sequence[int]], n_shared: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids padded to one length after the shared prefix, and their attention mask."""
    longest = max(map(len, prompts))
    ids = [[*row[:n_shared], *[0] * (longest - len(row)), *row[n_shared:]] for row in prompts]
    mask = [[*[1] * n_shared, *[0] * (longest - len(row)), *[1] * (len(row) - n_shared)] for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

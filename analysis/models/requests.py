"""What detectors read of the undefended model about requests: streams, logits, likelihoods and gradients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from analysis.models.cache import (
    describe_computation,
    make_json_cache_path,
    read_cached_json,
    write_cached_json,
)
from analysis.models.chat_template import ChatTemplate, Prompt
from analysis.models.engine import Engine, RemoteEngine
from analysis.models.hooks import HookPoint, record_activations
from analysis.models.image_tokens import is_image_id
from analysis.models.loading import LoadedModel
from analysis.models.rotation import RotationSchedule
from analysis.models.token_spans import find_user_tokens
from defenses.adapters import fingerprint_queries
from defenses.contract import Chat, Message, ModelCall, QueryChat, StreamPosition, TrainingRequests
from defenses.errors import UserError
from defenses.steering import get_blocks

if TYPE_CHECKING:
    from analysis.models.session import DefenseCalls, ModelSession


class ModelRequestReader:
    """Reads requests with a model; see `defenses.contract.RequestReader`.

    Args:
        loaded_model: the model, to which no defense may be applied.
        engine: runs the model.
        chat_template: of the model's tokenizer.
        defense_calls: generates responses.

    Attributes:
        tokenizer: of the model.
        n_blocks: number of transformer blocks; 0 if they are elsewhere.
    """

    def __init__(
        self,
        loaded_model: LoadedModel,
        engine: Engine,
        chat_template: ChatTemplate,
        defense_calls: DefenseCalls,
    ) -> None:
        self._loaded_model, self._engine = loaded_model, engine
        self._chat_template, self._defense_calls = chat_template, defense_calls
        self.tokenizer: Any = loaded_model.tokenizer
        self.n_blocks = 0 if isinstance(engine, RemoteEngine) else len(get_blocks(loaded_model.outline))

    @property
    def _model(self) -> Any:
        return self._loaded_model.model

    def read_streams(
        self,
        chats: Sequence[Chat],
        layers: Sequence[int],
        reduce_stream: Callable[[int, Tensor], Tensor],
        position: StreamPosition = "response",
    ) -> Float[Tensor, "requests layers values"]:
        """Return what `reduce_stream` keeps of the residual stream of each request at some layers."""
        prompts = [self._chat_template.render_prompt(chat) for chat in chats]
        if position == "user_text":
            spans = [self._find_user_text(prompt, chat) for prompt, chat in zip(prompts, chats, strict=True)]
            sequences = [prompt.ids[: span.stop] for prompt, span in zip(prompts, spans, strict=True)]
        else:
            sequences = [prompt.ids for prompt in prompts]
        values: dict[int, Tensor] = {}
        for rows, streams in self._iterate_streams(sequences, [1] * len(sequences), layers):
            kept = [
                reduce_stream(layer, stream.float()).float().cpu()
                for layer, stream in zip(layers, streams, strict=True)
            ]
            values.update(zip(rows, torch.stack(kept, 1), strict=True))
        return torch.stack([values[row] for row in range(len(chats))])

    def read_second_moments(
        self, chats: Sequence[Chat], layer: int, groups: Sequence[int]
    ) -> Float[Tensor, "groups width width"]:
        """Return the sum of the outer products of the stream with itself, in each group of requests."""
        prompts = [self._chat_template.render_prompt(chat).ids for chat in chats]
        moments: dict[int, Tensor] = {}
        lengths = [len(prompt) for prompt in prompts]
        for rows, (stream,) in self._iterate_streams(prompts, lengths, [layer]):
            for row, states in zip(rows, stream.float().split([lengths[row] for row in rows]), strict=True):
                moment = (states.T @ states).cpu()
                moments[groups[row]] = moments.get(groups[row], torch.zeros_like(moment)) + moment
        empty = torch.zeros_like(next(iter(moments.values())))
        return torch.stack([moments.get(group, empty) for group in range(max(groups) + 1)])

    def _iterate_streams(
        self, sequences: Sequence[Sequence[int]], n_positions: Sequence[int], layers: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Float[Tensor, "ends width"]]]]:
        """Yield the rows of each batch and the streams at their last positions, for each layer."""
        blocks = get_blocks(self._model)
        hook_points: dict[int, HookPoint] = {
            layer: (blocks[layer] if layer < self.n_blocks else self._final_norm, "enters")
            for layer in range(min(layers), self.n_blocks + 1)
        }
        with torch.inference_mode(), record_activations(self._engine, hook_points) as streams:
            for rows, _ in self._engine.iterate_logits(sequences, n_positions):
                # A block that is skipped, such as one that only reads images, leaves the stream as it is.
                yield (
                    rows,
                    [
                        next(streams[later] for later in hook_points if later in streams and later >= layer)
                        for layer in layers
                    ],
                )
                streams.clear()

    def unembed(self, stream: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocab"]:
        """Return the logits of a residual stream (final norm, unembedding), without scaling or capping."""
        unembedding = self._model.get_output_embeddings()
        normed = self._final_norm(stream.to(self._model.dtype))
        logits: Tensor = unembedding(normed.to(unembedding.weight.device)).float()
        return logits

    def find_token_ids(self, words: Sequence[str]) -> list[int]:
        """Return the ids of the first tokens of words, with and without a space before them."""
        ids = [
            token_id
            for word in words
            for space in ("", " ")
            if (token_id := find_first_token(self.tokenizer, word, space)) is not None
        ]
        return list(dict.fromkeys(ids))

    def read_first_logits(
        self, chats: Sequence[Chat], token_ids: Sequence[int]
    ) -> Float[Tensor, "requests tokens"]:
        """Return the logits of some first response tokens."""
        prompts = [self._chat_template.render_prompt(chat).ids for chat in chats]
        return self._engine.read_token_logits(prompts, token_ids)

    def read_log_likelihoods(self, chats: Sequence[Chat]) -> list[Float[Tensor, " tokens"]]:
        """Return the log-likelihood (nats) of each token of the last user text, given all before it."""
        befores, texts = [], []
        for chat in chats:
            prompt = self._chat_template.render_prompt(chat)
            span = self._find_user_text(prompt, chat)
            start = max(span.start, 1)  # the first token of a prompt has no likelihood
            befores.append(prompt.ids[:start])
            texts.append(prompt.ids[start : span.stop] or prompt.ids[-1:])
        return self._engine.compute_log_probabilities(befores, texts)

    def compare_gradients(
        self,
        chats: Sequence[Chat],
        harmful_examples: Sequence[Chat],
        benign_examples: Sequence[Chat],
        response: str,
        n_slices: int,
    ) -> Float[Tensor, "requests slices"]:
        """Return how similar each request's gradient is to that of harmful ones, in critical slices."""
        examples = [
            [self._compute_gradients(chat, response) for chat in group]
            for group in (harmful_examples, benign_examples)
        ]
        reference = sum_gradients(examples[0])
        harmful, benign = (
            torch.stack([compare_slices(gradients, reference) for gradients in group]).mean(0)
            for group in examples
        )
        gap = harmful - benign
        chosen = gap.topk(min(n_slices, len(gap))).indices
        rows = [compare_slices(self._compute_gradients(chat, response), reference)[chosen] for chat in chats]
        return torch.stack(rows).cpu()

    def call_model(self, calls: Sequence[ModelCall]) -> list[str]:
        """Return the response of the undefended model to each call."""
        return self._defense_calls.complete_calls(calls)

    def _compute_gradients(self, chat: Chat, response: str) -> dict[int, WeightGradient]:
        """Return the gradients of the loss of a response to a request, by the number of the matrix."""
        prompt_ids = self._chat_template.render_prompt(chat).ids
        if any(map(is_image_id, prompt_ids)):
            raise UserError(
                "gradients are computed for requests in words only, and these have images: choose another "
                "detector, such as hidden_detect"
            )
        space = " " if self._chat_template.has_leading_space else ""
        response_ids = self.tokenizer.encode(f"{space}{response.strip()}", add_special_tokens=False)
        self._engine.work_counter.computed_tokens += len(prompt_ids)
        return compute_weight_gradients(self._model, prompt_ids, response_ids)

    def _find_user_text(self, prompt: Prompt, chat: Chat) -> range:
        """Return the positions of the last user text."""
        return find_user_tokens(self._chat_template, prompt, chat)

    @cached_property
    def _final_norm(self) -> nn.Module:
        """The module whose output the unembedding reads."""
        unembedding, outputs = self._model.get_output_embeddings(), dict[nn.Module, Tensor]()
        normed: list[Tensor] = []

        def record_output(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[module] = output

        handles = [
            unembedding.register_forward_pre_hook(lambda _, args: normed.append(args[0])),
            *(child.register_forward_hook(record_output) for child in self._model.get_decoder().children()),
        ]
        try:
            with torch.inference_mode():
                ids = torch.tensor([[0, 1]], device=self._model.device)
                self._model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for module, output in outputs.items():
            if normed and output.shape == normed[0].shape and torch.equal(output.cpu(), normed[0].cpu()):
                return module
        raise UserError(
            f"{type(self._model).__name__} has no final norm before its unembedding that could be found, so "
            "its residual stream cannot be read: choose a detector that reads none, such as self_examination"
        )


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of a loss by a weight matrix, as the two factors whose product it is.

    The matrix itself, which may be large, is never formed: the gradient is `outputs.T @ inputs`. A slice is a
    row or a column of the matrix: all weights of one output, or all of one input.

    Attributes:
        inputs: what enters the matrix at each token.
        outputs: the gradient of the loss by what leaves it.
    """

    inputs: Float[Tensor, "tokens inputs"]
    outputs: Float[Tensor, "tokens outputs"]

    @cached_property
    def slice_norms(self) -> Float[Tensor, " slices"]:
        """The norm of each slice."""
        return self.multiply_slices(self).clamp_min(0).sqrt()

    def multiply_slices(self, other: WeightGradient) -> Float[Tensor, " slices"]:
        """Return the inner product of each slice with that of another gradient; outputs come first."""
        by_output = (self.outputs * (self.inputs @ other.inputs.T @ other.outputs)).sum(0)
        by_input = (self.inputs * (self.outputs @ other.outputs.T @ other.inputs)).sum(0)
        return torch.cat([by_output, by_input])


def compute_weight_gradients(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> dict[int, WeightGradient]:
    """Return the gradient of a response's loss by each matrix of the blocks, by the number of the matrix.

    The weights are read only: only activations are differentiated. Matrices whose module is not called are
    left out, such as those of experts that no token reaches.

    Args:
        model: in evaluation mode, on its device.
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the response; the loss is their mean negative log-likelihood.

    Raises:
        UserError: if the blocks have no linear modules.
    """
    modules = [
        module
        for block in get_blocks(model)
        for module in block.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    passes: list[tuple[int, Tensor, Tensor]] = []

    def make_recorder(number: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _, args, output: passes.append((number, args[0].detach(), output))

    handles = [module.register_forward_hook(make_recorder(number)) for number, module in enumerate(modules)]
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda *args: args[-1].detach().requires_grad_()  # else nothing is differentiated
        )
    )
    RotationSchedule.from_model(model).reset_modules()
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            ids = torch.tensor([[*prompt_ids, *response_ids[:-1]]], device=model.device)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            logits = output.logits[0, len(prompt_ids) - 1 :].float()
            targets = torch.tensor(list(response_ids), device=logits.device)
            loss = nn.functional.cross_entropy(logits, targets)
            if not passes:
                raise UserError(
                    f"{type(model).__name__} has no linear modules in its blocks, so no gradients can be "
                    "compared: choose another detector"
                )
            gradients = torch.autograd.grad(loss, [result for *_, result in passes], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    parts: dict[int, list[WeightGradient]] = {}
    for (number, inputs, _), gradient in zip(passes, gradients, strict=True):
        if gradient is not None:
            factors = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (inputs, gradient))
            parts.setdefault(number, []).append(WeightGradient(*factors))
    return {number: _join_gradients(found) for number, found in parts.items()}


def sum_gradients(gradients: Sequence[Mapping[int, WeightGradient]]) -> dict[int, WeightGradient]:
    """Return the sum of the gradients of several losses, by the number of the matrix."""
    numbers = dict.fromkeys(number for by_number in gradients for number in by_number)
    return {
        number: _join_gradients([by_number[number] for by_number in gradients if number in by_number])
        for number in numbers
    }


def compare_slices(
    gradients: Mapping[int, WeightGradient], reference: Mapping[int, WeightGradient]
) -> Float[Tensor, " slices"]:
    """Return the cosine similarity of each slice of all matrices with the reference; 0 without a gradient."""
    similarities = []
    for number, expected in reference.items():
        norms = expected.slice_norms
        if (gradient := gradients.get(number)) is None:
            similarities.append(torch.zeros_like(norms))
            continue
        scale = gradient.slice_norms * norms
        cosine = gradient.multiply_slices(expected) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        similarities.append(torch.where(scale > 0, cosine.clamp(-1, 1), 0))
    device = similarities[0].device  # the layers of a large model may lie on several
    return torch.cat([values.to(device) for values in similarities])


def _join_gradients(gradients: Sequence[WeightGradient]) -> WeightGradient:
    """Return the sum of gradients by one matrix: that of all their tokens."""
    if len(gradients) == 1:
        return gradients[0]
    return WeightGradient(
        torch.cat([gradient.inputs for gradient in gradients]),
        torch.cat([gradient.outputs for gradient in gradients]),
    )


def find_first_token(tokenizer: Any, word: str, leading_space: str) -> int | None:
    """Return the id of a word's first token, or None if that token is too short to identify the word.

    Args:
        tokenizer: a transformers tokenizer.
        word: as written.
        leading_space: text before the word, a space or nothing.
    """
    # After a line break, a SentencePiece tokenizer adds no space of its own, so both forms can be encoded.
    token_ids = tokenizer.encode(f"\n{leading_space}{word}", add_special_tokens=False)
    while token_ids and not tokenizer.decode([token_ids[0]]).strip():
        token_ids = token_ids[1:]
    if not token_ids or token_ids[0] == tokenizer.unk_token_id:
        return None
    text = tokenizer.decode([token_ids[0]]).strip()
    return int(token_ids[0]) if text == word or len(text) >= 3 else None


def load_training_requests(
    session: ModelSession, texts: Sequence[str], is_harmful: Sequence[bool], pairs: Sequence[str | None]
) -> TrainingRequests:
    """Return the training queries as detectors read them; what is learned from them is kept in the cache.

    Args:
        session: the model; it is read undefended.
        texts: training queries of both classes.
        is_harmful: class of each query.
        pairs: pair of each query, or None.
    """
    query_chats = tuple(
        QueryChat(f"training query {number}", [Message(role="user", content=text)])
        for number, text in enumerate(texts)
    )
    groups = [pair or query_chat.query_id for pair, query_chat in zip(pairs, query_chats, strict=True)]
    inputs = {
        "prompts": [session.chat_template.render_prompt(chat).ids for _, chat in query_chats],
        "harmful": list(is_harmful),
        "groups": groups,
    }
    computation = {**describe_computation(session.loaded_model), **inputs}
    digest = hashlib.sha256(json.dumps(computation, sort_keys=True).encode()).hexdigest()

    def recall(settings: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = make_json_cache_path("detectors", session.loaded_model, {**inputs, "settings": settings})
        if (learned := read_cached_json(path, dict)) is None:
            learned = compute()
            write_cached_json(path, learned)
        return learned

    return TrainingRequests(
        session.request_reader,
        query_chats,
        tuple(is_harmful),
        tuple(groups),
        frozenset(fingerprint_queries(texts)),
        digest,
        recall,
    )

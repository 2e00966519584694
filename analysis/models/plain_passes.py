"""Plain forward passes, with which batches are compared: one prompt, no cache, no padding.

Which form of batch a model allows follows from what it computes, not from its name: before a model is used,
`choose_batch_form` compares the engine with plain passes on a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analysis.models.batches import BatchForm
from analysis.models.engine import Engine, find_fastest_form
from analysis.models.image_features import list_vision_modules
from analysis.models.image_tokens import contains_image
from analysis.models.rotation import RotationSchedule
from defenses.errors import UserError

HALF_PRECISION = (torch.bfloat16, torch.float16)
# Largest difference of logits that rounding explains, in standard deviations of the logits. Measured on tiny
# models of all causal architectures: at most 2e-4 in float32 where batches are right, 0.3 or more where they
# are wrong.
_LOGIT_TOLERANCE = 2e-3
# In half precision, larger differences than the first are measured again in float32; the second counts where
# the model cannot run in float32.
_HALF_PRECISION_TOLERANCES = 2e-2, 2e-1
# Prompts of the comparison, as lengths of runs of tokens: all start with one run, two continue with another.
_SHARED_TOKENS, _MERGED_TOKENS, _OWN_TOKENS = 8, 2, (1, 3, 3)
FORM_PHRASES = {
    BatchForm.PACKED: "rows packed behind a shared prefix",
    BatchForm.REPEATED: "rows behind copies of a shared prefix",
    BatchForm.PADDED: "padded batches of whole prompts",
    BatchForm.EQUAL: "batches of whole prompts of equal length",
    BatchForm.SINGLE: "passes of one prompt each",
}


def compute_plain_logits(
    model: Any, token_ids: Sequence[int], last_only: bool = False
) -> Float[Tensor, "tokens vocab"]:
    """Return the float32 logits at every token of one prompt, from a plain forward pass.

    Images enter as pixels, so that features which were computed before are compared as well.

    Args:
        model: in evaluation mode, on its device.
        token_ids: of the prompt.
        last_only: whether to return only those at the last token; all logits of a long prompt take gigabytes.
    """
    keeps_last = last_only and "logits_to_keep" in inspect.signature(model.forward).parameters
    if contains_image(token_ids):
        inputs = model.image_reader.build_plain_inputs(token_ids)
    else:
        inputs = {"input_ids": torch.tensor([list(token_ids)], device=model.device)}
    keep = {"logits_to_keep": 1} if keeps_last else {}
    RotationSchedule.from_model(model).reset_modules()
    with torch.inference_mode():
        attention_mask = torch.ones_like(inputs["input_ids"])
        output = model(**inputs, attention_mask=attention_mask, use_cache=False, **keep)
    return torch.as_tensor(output.logits[0, -1:] if last_only else output.logits[0]).float()


def choose_batch_form(
    model: Any, share_prefix: bool = True, image_prompts: Sequence[tuple[int, ...]] = ()
) -> tuple[BatchForm, str]:
    """Return the fastest form of a batch that gives the logits of plain passes, and why no faster one does.

    Args:
        model: in evaluation mode, on its device.
        share_prefix: whether prompts may share their prefix.
        image_prompts: prompts with images to compare instead of prompts of text.

    Returns:
        The form, and a line for the user; empty if the form is the fastest for the model's kind of cache.

    Raises:
        UserError: if the model is no causal language model of text, or if no form agrees with plain passes.
    """
    name = type(model).__name__
    fastest = find_fastest_form(model) if share_prefix else BatchForm.PADDED
    if image_prompts:
        fastest = max(fastest, model.image_reader.fastest_form, key=list(BatchForm).index)
    forms = list(BatchForm)[list(BatchForm).index(fastest) :]
    prompts = image_prompts or draw_probe_prompts(model)
    kind = "images" if image_prompts else "text alone"
    try:
        plain = [compute_plain_logits(model, prompt) for prompt in prompts]
    except Exception as error:
        raise UserError(
            f"transformers cannot run {name} on {kind} ({_describe_error(error)}): use another model"
        ) from error
    if not all(logits[-1].isfinite().all() for logits in plain):
        return fastest, ""  # no batch helps; the preflight names the likely cause
    if not image_prompts:  # some models let the tokens of one image see each other
        _check_causal(model, prompts, plain)
    reasons: list[str] = []
    for form in forms:
        engine = Engine(model, batch_form=form)
        if not (reason := explain_disagreement(model, partial(_measure_engine_gap, engine, prompts))):
            run = f"{name} is run with {FORM_PHRASES[form]}"
            slower = f"{run}{' where prompts have images' if image_prompts else ''}, which takes longer: "
            slower += "; ".join(reasons)
            return form, slower if reasons else ""
        reasons.append(f"{FORM_PHRASES[form]} {reason}")
    raise UserError(
        f"{name} gives other logits in batches than for one prompt at a time ({'; '.join(reasons)}): use "
        "another model"
    )


@contextmanager
def run_in_float32(model: nn.Module) -> Iterator[None]:
    """Context manager: every module computes in float32, with float32 copies of its weights.

    Only one block of the model holds copies at a time, so that little more memory is needed.

    Args:
        model: in half precision; restored on exit.
    """
    originals: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter | Tensor]]] = {}

    def widen_weights(unit: nn.Module, *_: Any) -> None:
        replaced = originals.setdefault(unit, [])
        for module in unit.modules() if unit in blocks else [unit]:
            for tensors in _get_own_tensors(module):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.dtype in HALF_PRECISION:
                        replaced.append((module, name, tensor))
                        wide = tensor.detach().float()
                        tensors[name] = (
                            nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide
                        )

    def restore_weights(unit: nn.Module, *_: Any) -> None:
        for module, name, tensor in originals.pop(unit, []):
            parameters, buffers = _get_own_tensors(module)
            (parameters if isinstance(tensor, nn.Parameter) else buffers)[name] = tensor

    blocks, others = _list_blocks(model)
    handles = []
    try:
        reading = list_vision_modules(model) if hasattr(model, "image_reader") else []
        for unit in others:
            if unit in reading:  # some ask for the type of their weights before they run
                widen_weights(unit)
        for unit in (*blocks, *others):
            if unit in originals:
                continue
            handles += [
                unit.register_forward_pre_hook(widen_weights, prepend=True),
                unit.register_forward_hook(restore_weights, always_call=True),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in list(originals):
            restore_weights(unit)


def _get_own_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's own parameters and buffers by name, to be replaced in place."""
    return module._parameters, module._buffers


def _list_blocks(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the outermost modules that lie in lists (a model's layers), and all modules outside of them."""
    blocks: list[nn.Module] = []
    others: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        others.append(module)
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                visit(child)

    visit(model)
    return blocks, others


def draw_probe_prompts(model: Any) -> list[tuple[int, ...]]:
    """Return three prompts that share a prefix; the last two share more tokens, and have equal length."""
    vocabulary_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)

    def draw_tokens(length: int) -> tuple[int, ...]:
        # Low ids are special tokens in many vocabularies.
        low = vocabulary_size // 4
        return tuple(torch.randint(low, vocabulary_size, (length,), generator=generator).tolist())

    shared, merged = draw_tokens(_SHARED_TOKENS), draw_tokens(_MERGED_TOKENS)
    short, *others = (draw_tokens(length) for length in _OWN_TOKENS)
    return [(*shared, *short), *((*shared, *merged, *own) for own in others)]


def _check_causal(model: Any, prompts: Sequence[Sequence[int]], plain: Sequence[Tensor]) -> None:
    """Raise a UserError if logits depend on later tokens."""
    scale = plain[-1].std()
    gap = float((plain[0][:_SHARED_TOKENS] - plain[-1][:_SHARED_TOKENS]).abs().max() / scale)
    if gap > 0.1:
        has_setting = getattr(model.config, "is_decoder", None) is False
        remedy = "use another model"
        if has_setting:
            remedy = 'if it was trained as one, set "is_decoder": true in its config.json, or ' + remedy
        raise UserError(
            f"{type(model).__name__} reads later tokens at earlier positions (its logits there differ by "
            f"{gap:.1g} standard deviations), so it is no causal language model: {remedy}"
        )


def _measure_engine_gap(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> float:
    """Return the largest difference between the engine's logits and those of plain passes."""
    plain = torch.stack([compute_plain_logits(engine.model, prompt)[-1] for prompt in prompts])
    return measure_logit_gap(engine.read_first_token(prompts, lambda logits: logits), plain)


def explain_disagreement(model: Any, measure_gap: Callable[[], float]) -> str:
    """Return how logits differ from those of plain passes; empty if only by rounding.

    Args:
        model: in half precision, a difference is measured again in float32.
        measure_gap: returns the largest difference, in standard deviations of the logits.
    """
    try:
        gap, tolerance = measure_gap(), _LOGIT_TOLERANCE
    except UserError:
        raise
    except Exception as error:
        return f"fail ({_describe_error(error)})"
    if model.dtype in HALF_PRECISION:
        tolerance, rough_tolerance = _HALF_PRECISION_TOLERANCES
        if not gap <= tolerance:
            try:
                with run_in_float32(model):
                    gap, tolerance = measure_gap(), _LOGIT_TOLERANCE
            except Exception:  # some models mix weights and inputs of modules, which then differ in precision
                tolerance = rough_tolerance
    return "" if gap <= tolerance else f"change its logits by {gap:.2g} standard deviations"


def measure_logit_gap(logits: Tensor, plain: Tensor) -> float:
    """Return the largest difference between logits and plain ones, in standard deviations of the latter."""
    spread = plain.std().clamp_min(torch.finfo(plain.dtype).tiny)  # logits may be all alike
    return float((logits - plain).abs().max() / spread)


def _describe_error(error: Exception) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Hooks on the model's own modules that record or edit hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from analysis.models.engine import Engine

HookPoint = tuple[nn.Module, Literal["enters", "leaves"]]
RecordedActivations = dict[Any, Float[Tensor, "ends width"]]
ActivationEdit = Callable[[Tensor], Tensor | None]


@contextmanager
def edit_activations(hook_point: HookPoint, edit: ActivationEdit) -> Iterator[None]:
    """Call `edit` on the hidden states at a hook point within a context.

    Args:
        hook_point: the module, and whether its input or its output is edited.
        edit: maps the hidden states to their replacement, or returns None to leave them unchanged.
    """
    module, side = hook_point
    if side == "enters":
        handle = module.register_forward_pre_hook(_make_input_hook(edit), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_make_output_hook(edit))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_activations(engine: Engine, hook_points: Mapping[Any, HookPoint]) -> Iterator[RecordedActivations]:
    """Record hidden states at the positions whose logits the engine reads, within a context.

    The yielded mapping holds the activations of the current batch; the next batch overwrites them.

    Args:
        engine: engine that runs the model.
        hook_points: hook points by the names under which their activations are recorded.
    """
    activations: RecordedActivations = {}

    def make_recorder(name: Any) -> ActivationEdit:
        def record(states: Tensor) -> None:
            if engine.logit_positions is not None:
                rows, columns = (indices.to(states.device) for indices in engine.logit_positions)
                activations[name] = states[rows, columns]

        return record

    with ExitStack() as stack:
        for name, hook_point in hook_points.items():
            stack.enter_context(edit_activations(hook_point, make_recorder(name)))
        yield activations


def _make_input_hook(edit: ActivationEdit) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = edit(args[0] if args else kwargs["hidden_states"])
        if states is None:
            return None
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    return hook


def _make_output_hook(edit: ActivationEdit) -> Callable[..., Any]:
    def hook(_: Any, args: Any, output: Any) -> Any:
        states = edit(output[0] if isinstance(output, tuple) else output)
        if states is None:
            return None
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook

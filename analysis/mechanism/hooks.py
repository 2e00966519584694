"""What a model holds where its prompts end: hooks on its own modules, while they are open."""

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
    """While open, what enters or leaves a module is shown, and replaced by what comes back, if anything does.

    Args:
        hook_point: where.
        edit: the hidden states → others in their place, or None.
    """
    module, side = hook_point
    if side == "enters":
        handle = module.register_forward_pre_hook(_input_hook(edit), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_output_hook(edit))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_activations(engine: Engine, hook_points: Mapping[Any, HookPoint]) -> Iterator[RecordedActivations]:
    """While open, what passes the taps is kept of each batch, where its prompts end, until the next batch.

    Args:
        engine: that runs the model.
        hook_points: by the names under which they are found.
    """
    held: RecordedActivations = {}

    def keep(name: Any) -> ActivationEdit:
        def kept(states: Tensor) -> None:
            if engine.logit_positions is not None:
                rows, columns = (one.to(states.device) for one in engine.logit_positions)
                held[name] = states[rows, columns]

        return kept

    with ExitStack() as stack:
        for name, tap in hook_points.items():
            stack.enter_context(edit_activations(tap, keep(name)))
        yield held


def _input_hook(edit: ActivationEdit) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        new = edit(args[0] if args else named["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), named) if args else (args, named | {"hidden_states": new})

    return hook


def _output_hook(edit: ActivationEdit) -> Callable[..., Any]:
    def hook(_: Any, args: Any, out: Any) -> Any:
        new = edit(out[0] if isinstance(out, tuple) else out)
        if new is None:
            return None
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return hook

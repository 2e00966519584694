"""What a model holds where its prompts end: hooks on its own modules, while they are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from analysis.engine import Engine

Tap = tuple[nn.Module, Literal["enters", "leaves"]]
Held = dict[Any, Float[Tensor, "ends width"]]
Change = Callable[[Tensor], Tensor | None]


@contextmanager
def at(tap: Tap, change: Change) -> Iterator[None]:
    """While open, what enters or leaves a module is shown, and replaced by what comes back, if anything does.

    Args:
        tap: where.
        change: the hidden states → others in their place, or None.
    """
    module, side = tap
    if side == "enters":
        handle = module.register_forward_pre_hook(_entering(change), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_leaving(change))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched(engine: Engine, taps: Mapping[Any, Tap]) -> Iterator[Held]:
    """While open, what passes the taps is kept of each batch, where its prompts end, until the next batch.

    Args:
        engine: that runs the model.
        taps: by the names under which they are found.
    """
    held: Held = {}

    def keep(name: Any) -> Change:
        def kept(states: Tensor) -> None:
            if engine.ends is not None:
                rows, columns = (one.to(states.device) for one in engine.ends)
                held[name] = states[rows, columns]

        return kept

    with ExitStack() as stack:
        for name, tap in taps.items():
            stack.enter_context(at(tap, keep(name)))
        yield held


def _entering(change: Change) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        new = change(args[0] if args else named["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), named) if args else (args, named | {"hidden_states": new})

    return hook


def _leaving(change: Change) -> Callable[..., Any]:
    def hook(_: Any, args: Any, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        if new is None:
            return None
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return hook

"""Steering: a direction is added to what the model holds at one layer, or taken out, while it is armed.

Directions are differences of the means, over training queries, of the residual stream where the answer
begins: harmful less benign. They belong to the model as it stands, so another state of it has others.
"""

from __future__ import annotations

import dataclasses
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from defenses import Chat, Defense, Host, Residuals, Source, UserError
from defenses.chats import copied
from defenses.settings import HIDDEN

if TYPE_CHECKING:
    from torch import Tensor, nn

_ARDITI = Source(
    "Refusal in Language Models Is Mediated by a Single Direction (Arditi et al., NeurIPS 2024)",
    "https://arxiv.org/abs/2406.11717",
    wording="no words of its own; the direction is computed from our queries",
)


def blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a model, first to last."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"no list of {count} blocks was found in this {type(model).__name__}")


@contextmanager
def entering(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, what enters a block (batch x length x width) is changed on its way."""

    def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), named
        return args, named | {"hidden_states": change(named["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Steering(Defense):
    """What changes the residual stream along a direction.

    Attributes:
        depth: where the direction is taken from, and acts: the block at this share of the model's depth.
    """

    family = "steering"

    depth: float = 0.6
    learned: Residuals | None = dataclasses.field(default=None, repr=False, compare=False, metadata=HIDDEN)

    def __post_init__(self) -> None:
        """Refuse a depth that there is not."""
        if not 0 <= self.depth < 1:
            raise ValueError(f"depth={self.depth}: it is a share of the model's depth, from 0 to below 1")

    def prepare(self, host: Host) -> Self:
        """Return it with what this model holds on training queries."""
        if host.residuals is None:
            return self
        learned = host.residuals()
        place = int(self.depth * len(learned.harmful))
        if not (learned.harmful[place] - learned.benign[place]).norm() > 0:
            raise UserError(
                f"{self.name}: at depth={self.depth} the model holds the same for harmful and benign, so "
                "there is no direction: choose another depth, such as 0.6"
            )
        return dataclasses.replace(self, learned=learned)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: only the model changes."""
        return copied(chat)

    @contextmanager
    def armed(self, model: Any) -> Iterator[None]:
        """While open, what enters a block, or every block, is changed; afterwards the hooks are gone."""
        assert self.learned is not None, "prepare() comes before armed()"
        layers = blocks(model)
        place = int(self.depth * len(layers))
        change = self.change(self.learned.harmful[place], self.learned.benign[place])
        with ExitStack() as stack:
            for block in layers if self.everywhere() else [layers[place]]:
                stack.enter_context(entering(block, change))
            yield

    @abstractmethod
    def change(self, harmful: Tensor, benign: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what is done to residual streams, by the means (width) of either class at that depth."""

    def everywhere(self) -> bool:
        """Return whether all blocks are changed, not the one at `depth` alone."""
        return False

    def arms(self) -> str:
        """Return what the directions depend on."""
        return "" if self.learned is None else f"{self!r} {self.learned.sha256}"

    def lacking(self) -> str:
        """Return what is missing."""
        return "" if self.learned is not None else "its direction has to be computed from the model itself"

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the direction was computed from."""
        return frozenset() if self.learned is None else self.learned.queries


@dataclass(frozen=True)
class Added(Steering):
    """What adds the direction.

    Attributes:
        strength: how many times the distance between the classes' means is added.
    """

    strength: float = 1.0


@final
@dataclass(frozen=True)
class RefusalSteering(Added):
    """Adds the direction from benign to harmful at every position, so that all looks harmful to the model.

    Adding the refusal direction makes a model refuse harmless requests, the authors find: a pure shift. They
    choose layer and position by validation; here the layer is a setting and the position the answer's.

    Attributes:
        strength: how many times the distance between the classes' means is added.
    """

    source = _ARDITI

    def change(self, harmful: Tensor, benign: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition."""
        step = self.strength * (harmful - benign)
        return lambda stream: stream + step.to(stream)


@final
@dataclass(frozen=True)
class ConditionalSteering(Added):
    """Adds the direction from benign to harmful only where the model is already on the harmful side of it.

    The authors check a condition on the prompt and steer only if it holds, so that harmless requests are left
    alone: discrimination. Here each position is checked by itself, against the middle between the means, so
    that what is read does not depend on what else is read.

    Attributes:
        strength: how many times the distance between the classes' means is added.
        margin: how far beyond the middle, in distances between the means, a position must lie.
    """

    source = Source(
        "Programming Refusal with Conditional Activation Steering (Lee et al., ICLR 2025)",
        "https://arxiv.org/abs/2409.05907",
        wording="no words of its own; the direction is computed from our queries",
    )

    margin: float = 0.0

    def change(self, harmful: Tensor, benign: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition where the condition holds."""
        gap = harmful - benign
        unit = gap / gap.norm()
        middle = ((harmful + benign) / 2 @ unit) + self.margin * gap.norm()

        def changed(stream: Tensor) -> Tensor:
            fires = stream.float() @ unit.to(stream.device) > middle.to(stream.device)
            return stream + fires[..., None].to(stream) * (self.strength * gap).to(stream)

        return changed


@final
@dataclass(frozen=True)
class DirectionAblation(Steering):
    """Takes the direction from benign to harmful out of what enters every block: a negative control.

    Without its refusal direction a model refuses next to nothing, the authors find; they ablate it after
    every attention and MLP, here it is ablated where each block begins. Expected is the opposite of a
    defense.
    """

    source = _ARDITI

    def everywhere(self) -> bool:
        """Return that all blocks are changed."""
        return True

    def change(self, harmful: Tensor, benign: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the projection that leaves the direction out."""
        gap = harmful - benign
        unit = gap / gap.norm()

        def changed(stream: Tensor) -> Tensor:
            here = unit.to(stream)
            return stream - (stream @ here)[..., None] * here

        return changed

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

from defenses.chats import copy_chat
from defenses.contract import Chat, Defense, MeanActivations, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD

if TYPE_CHECKING:
    from torch import Tensor, nn

_ARDITI_SOURCE = Source(
    "Refusal in Language Models Is Mediated by a Single Direction (Arditi et al., NeurIPS 2024)",
    "https://arxiv.org/abs/2406.11717",
    wording="no words of its own; the direction is computed from our queries",
)


def get_blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a model, first to last."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"no list of {count} blocks was found in this {type(model).__name__}")


@contextmanager
def change_block_input(block: nn.Module, transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, what enters a block (batch x length x width) is changed on its way."""

    def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (transform(args[0]), *args[1:]), named
        return args, named | {"hidden_states": transform(named["hidden_states"])}

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
    activations: MeanActivations | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata=HIDDEN_FIELD
    )

    def __post_init__(self) -> None:
        """Refuse a depth that there is not."""
        if not 0 <= self.depth < 1:
            raise ValueError(f"depth={self.depth}: it is a share of the model's depth, from 0 to below 1")

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return it with what this model holds on training queries."""
        if model_info.compute_mean_activations is None:
            return self
        learned = model_info.compute_mean_activations()
        place = int(self.depth * len(learned.harmful))
        if not (learned.harmful[place] - learned.benign[place]).norm() > 0:
            raise UserError(
                f"{self.name}: at depth={self.depth} the model holds the same for harmful and benign, so "
                "there is no direction: choose another depth, such as 0.6"
            )
        return dataclasses.replace(self, activations=learned)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat as it is: only the model changes."""
        return copy_chat(chat)

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """While open, what enters a block, or every block, is changed; afterwards the hooks are gone."""
        assert self.activations is not None, "prepare() comes before armed()"
        layers = get_blocks(model)
        place = int(self.depth * len(layers))
        change = self.make_transform(self.activations.harmful[place], self.activations.benign[place])
        with ExitStack() as stack:
            for block in layers if self.changes_all_blocks() else [layers[place]]:
                stack.enter_context(change_block_input(block, change))
            yield

    @abstractmethod
    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what is done to residual streams, by the means (width) of either class at that depth."""

    def changes_all_blocks(self) -> bool:
        """Return whether all blocks are changed, not the one at `depth` alone."""
        return False

    def weights_fingerprint(self) -> str:
        """Return what the directions depend on."""
        return "" if self.activations is None else f"{self!r} {self.activations.sha256}"

    def missing_requirements(self) -> str:
        """Return what is missing."""
        return (
            "" if self.activations is not None else "its direction has to be computed from the model itself"
        )

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the direction was computed from."""
        return frozenset() if self.activations is None else self.activations.query_fingerprints


@dataclass(frozen=True)
class DirectionAddition(Steering):
    """What adds the direction.

    Attributes:
        strength: how many times the distance between the classes' means is added.
    """

    strength: float = 1.0


@final
@dataclass(frozen=True)
class RefusalSteering(DirectionAddition):
    """Adds the direction from benign to harmful at every position, so that all looks harmful to the model.

    Adding the refusal direction makes a model refuse harmless requests, the authors find: a pure shift. They
    choose layer and position by validation; here the layer is a setting and the position the answer's.

    Attributes:
        strength: how many times the distance between the classes' means is added.
    """

    source = _ARDITI_SOURCE

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition."""
        step = self.strength * (harmful_mean - benign_mean)
        return lambda stream: stream + step.to(stream)


@final
@dataclass(frozen=True)
class ConditionalSteering(DirectionAddition):
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

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition where the condition holds."""
        gap = harmful_mean - benign_mean
        unit = gap / gap.norm()
        middle = ((harmful_mean + benign_mean) / 2 @ unit) + self.margin * gap.norm()

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

    source = _ARDITI_SOURCE

    def changes_all_blocks(self) -> bool:
        """Return that all blocks are changed."""
        return True

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the projection that leaves the direction out."""
        gap = harmful_mean - benign_mean
        unit = gap / gap.norm()

        def changed(stream: Tensor) -> Tensor:
            here = unit.to(stream)
            return stream - (stream @ here)[..., None] * here

        return changed

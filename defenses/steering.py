"""Activation steering: a direction is added to, or removed from, the residual stream.

A direction is the difference between the mean residual streams of harmful and benign training queries at the
first response position. It is computed from the model in its current state, so other states have other
directions.
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
from defenses.contract import Chat, Defense, MatchedControl, MeanActivations, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD

if TYPE_CHECKING:
    from torch import Tensor, nn

_ARDITI_SOURCE = Source(
    "Refusal in Language Models Is Mediated by a Single Direction (Arditi et al., NeurIPS 2024)",
    "https://arxiv.org/abs/2406.11717",
    wording="no text of its own; the direction is computed from our queries",
)


def get_blocks(model: Any) -> list[nn.Module]:
    """Return the transformer blocks of a model in order."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    # A model that also reads images may have as many blocks in its vision tower.
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"found no list of {count} blocks in this {type(model).__name__}")


@contextmanager
def change_block_input(block: nn.Module, transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Transform the input of a block within a context.

    Args:
        block: transformer block.
        transform: function of the residual stream (batch x length x width).
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (transform(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": transform(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Steering(Defense):
    """Base class of defenses that change the residual stream along a direction.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        activations: mean activations of the model, set by `prepare`.
    """

    family = "steering"

    depth: float = 0.6
    activations: MeanActivations | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata=HIDDEN_FIELD
    )

    def __post_init__(self) -> None:
        """Check that the depth is in [0, 1)."""
        if not 0 <= self.depth < 1:
            raise ValueError(
                f"depth={self.depth}: it must be a share of the model's depth, from 0 to below 1"
            )

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the mean activations of this model."""
        if model_info.compute_mean_activations is None:
            return self
        activations = model_info.compute_mean_activations()
        layer = int(self.depth * len(activations.harmful))
        if not (activations.harmful[layer] - activations.benign[layer]).norm() > 0:
            raise UserError(
                f"{self.name}: at depth={self.depth} the mean activations of harmful and benign queries are "
                "equal, so no direction is defined; choose another depth, such as 0.6"
            )
        return dataclasses.replace(self, activations=activations)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat; only the model changes."""
        return copy_chat(chat)

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """Transform the input of one or all blocks within a context; remove the hooks afterwards."""
        assert self.activations is not None, "prepare() must be called before apply_to()"
        blocks = get_blocks(model)
        layer = int(self.depth * len(blocks))
        transform = self.make_transform(self.activations.harmful[layer], self.activations.benign[layer])
        with ExitStack() as exit_stack:
            for block in blocks if self.changes_all_blocks() else [blocks[layer]]:
                exit_stack.enter_context(change_block_input(block, transform))
            yield

    def build_control(self, model_info: ModelInfo, draw: int) -> MatchedControl | None:
        """Return the defense with a random direction of the same norm around the same midpoint."""
        import torch

        if self.activations is None:
            return None
        harmful, benign = self.activations.harmful, self.activations.benign
        generator = torch.Generator()
        generator.manual_seed(random.Random(f"{model_info.seed}/{draw}").getrandbits(63))
        directions = torch.randn(harmful.shape, generator=generator)
        half = (
            directions
            / directions.norm(dim=1, keepdim=True)
            * (harmful - benign).norm(dim=1, keepdim=True)
            / 2
        )
        midpoint = (harmful + benign) / 2
        activations = dataclasses.replace(
            self.activations,
            harmful=midpoint + half,
            benign=midpoint - half,
            sha256=f"{self.activations.sha256} random {model_info.seed}/{draw}",
        )
        return MatchedControl(dataclasses.replace(self, activations=activations), "random directions")

    @abstractmethod
    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the transformation of the residual stream.

        Args:
            harmful_mean: mean residual stream of harmful queries at that depth (width).
            benign_mean: mean residual stream of benign queries (width).
        """

    def changes_all_blocks(self) -> bool:
        """Return whether the inputs of all blocks are transformed instead of the one at `depth`."""
        return False

    def weights_fingerprint(self) -> str:
        """Return the settings and the digest of the mean activations."""
        return "" if self.activations is None else f"{self!r} {self.activations.sha256}"

    def missing_requirements(self) -> str:
        """Return what is missing to compute the direction."""
        return "" if self.activations is not None else "its direction must be computed from the model itself"

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the direction was computed from."""
        return frozenset() if self.activations is None else self.activations.query_fingerprints


@dataclass(frozen=True)
class DirectionAddition(Steering):
    """Base class of defenses that add the direction.

    Attributes:
        strength: factor of the difference between the class means that is added.
    """

    strength: float = 1.0


@final
@dataclass(frozen=True)
class RefusalSteering(DirectionAddition):
    """Adds the direction from benign to harmful at every position, so that all requests appear harmful.

    The authors find that adding the refusal direction makes a model refuse harmless requests: a pure shift.
    They select layer and position by validation; here the layer is a setting, and the direction is taken from
    the first response position.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        strength: factor of the difference between the class means that is added.
    """

    source = _ARDITI_SOURCE

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition of the direction."""
        step = self.strength * (harmful_mean - benign_mean)
        return lambda stream: stream + step.to(stream)


@final
@dataclass(frozen=True)
class ConditionalSteering(DirectionAddition):
    """Adds the direction from benign to harmful only at positions that already lie on its harmful side.

    The authors check a condition on the prompt and steer only if it holds, so that benign requests are not
    affected, which improves discrimination. Here the condition is checked at each position separately,
    against the midpoint between the class means, so that a result does not depend on the rest of the batch.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        strength: factor of the difference between the class means that is added.
        margin: minimum distance beyond the midpoint, in units of the distance between the class means.
    """

    source = Source(
        "Programming Refusal with Conditional Activation Steering (Lee et al., ICLR 2025)",
        "https://arxiv.org/abs/2409.05907",
        wording="no text of its own; the direction is computed from our queries",
    )

    margin: float = 0.0

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the addition of the direction at positions where the condition holds."""
        difference = harmful_mean - benign_mean
        unit = difference / difference.norm()
        threshold = ((harmful_mean + benign_mean) / 2 @ unit) + self.margin * difference.norm()

        def add_direction(stream: Tensor) -> Tensor:
            is_harmful = stream.float() @ unit.to(stream.device) > threshold.to(stream.device)
            return stream + is_harmful[..., None].to(stream) * (self.strength * difference).to(stream)

        return add_direction


@final
@dataclass(frozen=True)
class DirectionAblation(Steering):
    """Removes the direction from benign to harmful from the input of every block: a negative control.

    The authors find that a model without its refusal direction refuses almost nothing. They ablate the
    direction after every attention and MLP layer; here it is ablated at the input of each block. The expected
    effect is the opposite of a defense.

    Attributes:
        depth: layer from which the direction is taken, as a share of the model's depth.
    """

    source = _ARDITI_SOURCE

    def changes_all_blocks(self) -> bool:
        """Return True: the inputs of all blocks are transformed."""
        return True

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the projection onto the complement of the direction."""
        difference = harmful_mean - benign_mean
        unit = difference / difference.norm()

        def remove_direction(stream: Tensor) -> Tensor:
            direction = unit.to(stream)
            return stream - (stream @ direction)[..., None] * direction

        return remove_direction

"""Activation steering: a direction is added to, or removed from, the residual stream.

A direction is the difference between the mean residual streams of harmful and benign training queries at the
first response position. It is computed from the model in its current state, so other states have other
directions. Some defenses also learn from the training queries where to add it.
"""

from __future__ import annotations

import dataclasses
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self, final

from defenses.chats import copy_chat
from defenses.contract import (
    Chat,
    Defense,
    MatchedControl,
    MeanActivations,
    ModelInfo,
    Source,
    TrainingRequests,
)
from defenses.detection import assign_folds, fit_probe
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD

if TYPE_CHECKING:
    from torch import Tensor, nn

# A function of the residual stream (batch x length x width) that returns another.
StreamTransform = Callable[["Tensor"], "Tensor"]

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
def change_block_input(block: nn.Module, transform: StreamTransform) -> Iterator[None]:
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


def add_direction(direction: Tensor) -> StreamTransform:
    """Return the addition of a direction (width) at every position."""
    return lambda stream: stream + direction.to(stream)


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
        """Transform the inputs of blocks within a context; remove the hooks afterwards."""
        assert self.activations is not None, "prepare() must be called before apply_to()"
        blocks = get_blocks(model)
        with ExitStack() as exit_stack:
            for number, transform in self.make_transforms(self.activations, len(blocks)):
                exit_stack.enter_context(change_block_input(blocks[number], transform))
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

    def make_transforms(
        self, activations: MeanActivations, n_blocks: int
    ) -> list[tuple[int, StreamTransform]]:
        """Return the numbers of the blocks whose inputs are transformed, with the transformations.

        By default, it is the block at `depth`.

        Args:
            activations: mean activations of the model.
            n_blocks: number of blocks of the model.
        """
        layer = int(self.depth * n_blocks)
        return [(layer, self.make_transform(activations.harmful[layer], activations.benign[layer]))]

    @abstractmethod
    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> StreamTransform:
        """Return the transformation of the residual stream.

        Args:
            harmful_mean: mean residual stream of harmful queries at that depth (width).
            benign_mean: mean residual stream of benign queries (width).
        """

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
    the first response position. With `layers=all`, each block gets the direction of its own layer; the
    changes add up from block to block, so a smaller strength is needed.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        strength: factor of the difference between the class means that is added.
        layers: whether the direction is added at one layer or at all.
    """

    source = _ARDITI_SOURCE

    layers: Literal["one", "all"] = "one"

    def make_transforms(
        self, activations: MeanActivations, n_blocks: int
    ) -> list[tuple[int, StreamTransform]]:
        """Return the additions of the directions."""
        if self.layers == "one":
            return super().make_transforms(activations, n_blocks)
        pairs = zip(activations.harmful, activations.benign, strict=True)
        return [(number, self.make_transform(*means)) for number, means in enumerate(pairs)]

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> StreamTransform:
        """Return the addition of the direction."""
        return add_direction(self.strength * (harmful_mean - benign_mean))


@dataclass(frozen=True)
class TrainingStreams:
    """The residual streams of the training queries at one layer.

    Attributes:
        requests: the training queries.
        layer: number of the block whose input is read.
        streams: at the first response position (queries x width, float64).
        is_harmful: class of each query.
        folds: fold of each query in cross-validation; a pair of queries is never split.
    """

    requests: TrainingRequests
    layer: int
    streams: Tensor
    is_harmful: Tensor
    folds: Tensor

    @classmethod
    def read(cls, requests: TrainingRequests, layer: int) -> TrainingStreams:
        """Read the streams of all training queries."""
        import torch

        chats = [chat for _, chat in requests.query_chats]
        streams = requests.reader.read_streams(chats, [layer], lambda _, stream: stream)[:, 0].double()
        is_harmful, folds = torch.tensor(requests.is_harmful), assign_folds(requests.groups)
        return cls(requests, layer, streams, is_harmful, folds)

    def select_class(self, is_chosen: Tensor, *, harmful: bool) -> Tensor:
        """Return the streams of the harmful or the benign queries among the chosen ones."""
        return self.streams[is_chosen & (self.is_harmful == harmful)]

    @cached_property
    def benign_moments(self) -> Tensor:
        """Second moments of the streams of benign queries, over all positions: folds x width x width."""
        rows = [row for row, is_harmful in enumerate(self.requests.is_harmful) if not is_harmful]
        chats = [self.requests.query_chats[row].chat for row in rows]
        return self.requests.reader.read_second_moments(chats, self.layer, self.folds[rows].tolist())


@dataclass(frozen=True)
class SteeringFit:
    """What a defense has learned from the single training queries, beside their class means.

    Attributes:
        parameters: of `SelectiveSteering.compute_gains`.
        harmful_gain: share of the direction that is added at the first response position, the mean over
            harmful training queries, each with parameters that were fitted to other queries
            (cross-validation).
        benign_gain: the same for benign queries.
        n_harmful: number of harmful training queries.
        n_benign: number of benign training queries.
        sha256: digest of the training queries and of everything that the computation depends on.
    """

    parameters: tuple[float, ...]
    harmful_gain: float
    benign_gain: float
    n_harmful: int
    n_benign: int
    sha256: str


@dataclass(frozen=True)
class SelectiveSteering(DirectionAddition):
    """Base class of defenses that learn from the training queries where to add how much of the direction.

    Attributes:
        fit: what it has learned, set by `prepare`.
    """

    fit: SteeringFit | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata=HIDDEN_FIELD
    )

    @abstractmethod
    def fit_parameters(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the parameters of `compute_gains`, learned from the chosen training queries."""

    @abstractmethod
    def compute_gains(self, streams: Tensor, parameters: Tensor) -> Tensor:
        """Return the share of the direction that is added at each position (all axes but the last)."""

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy that has learned from the training queries."""
        prepared = super().prepare(model_info)
        if prepared.activations is None or model_info.load_training_requests is None:
            return prepared
        requests = model_info.load_training_requests()
        layer = int(self.depth * len(prepared.activations.harmful))
        learned = requests.recall(repr(self), partial(self._learn, requests, layer))
        fit = SteeringFit(
            tuple(learned["parameters"]),
            learned["harmful_gain"],
            learned["benign_gain"],
            sum(requests.is_harmful),
            len(requests.is_harmful) - sum(requests.is_harmful),
            requests.sha256,
        )
        return dataclasses.replace(prepared, fit=fit)

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> StreamTransform:
        """Return the addition of a share of the direction at each position."""
        return self.add_share(self.strength * (harmful_mean - benign_mean), self.get_parameters())

    def add_share(self, direction: Tensor, parameters: Tensor) -> StreamTransform:
        """Return the addition of a direction in the shares of `compute_gains`."""

        def add(stream: Tensor) -> Tensor:
            gains = self.compute_gains(stream.float(), parameters.to(stream.device))
            return stream + gains[..., None].to(stream) * direction.to(stream)

        return add

    def get_parameters(self) -> Tensor:
        """Return the learned parameters (float32)."""
        import torch

        assert self.fit is not None, "prepare() must be called before apply_to()"
        return torch.tensor(self.fit.parameters)

    def weights_fingerprint(self) -> str:
        """Return the settings, and the digests of the mean activations and of what was learned."""
        fingerprint = super().weights_fingerprint()
        return f"{fingerprint} {self.fit.sha256}" if fingerprint and self.fit is not None else fingerprint

    def missing_requirements(self) -> str:
        """Return what is missing."""
        return super().missing_requirements() or (
            "" if self.fit is not None else "it must learn from the training queries with the model itself"
        )

    def describe_fit(self) -> dict[str, Any]:
        """Return how well it tells the classes apart, as plain values; nothing before `prepare`."""
        names = ("harmful_gain", "benign_gain", "n_harmful", "n_benign")
        return {} if self.fit is None else {name: getattr(self.fit, name) for name in names}

    def _learn(self, requests: TrainingRequests, layer: int) -> dict[str, Any]:
        """Return the parameters, and the mean gain of each class in cross-validation."""
        training = TrainingStreams.read(requests, layer)
        gains = training.streams.new_zeros(len(training.streams))
        for fold in training.folds.unique():
            held_out = training.folds == fold
            parameters = self.fit_parameters(training, ~held_out)
            gains[held_out] = self.compute_gains(training.streams[held_out], parameters).to(gains)
        return {
            "parameters": self.fit_parameters(training, training.folds >= 0).tolist(),
            "harmful_gain": float(gains[training.is_harmful].mean()),
            "benign_gain": float(gains[~training.is_harmful].mean()),
        }


@dataclass(frozen=True)
class GatedSteering(SelectiveSteering):
    """Base class of defenses that add the whole direction where a linear condition holds, else nothing."""

    @abstractmethod
    def fit_axis(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the weights of the stream and an offset, learned from the chosen training queries."""

    def choose_threshold(self, training: TrainingStreams, is_chosen: Tensor) -> float:
        """Return the threshold of the weighted sum of the stream, less the offset.

        It has the highest F1 of the harmful class, by sums with weights that were fitted to other queries.
        """
        scores = training.streams.new_zeros(len(training.streams))
        for fold in training.folds[is_chosen].unique():
            held_out = is_chosen & (training.folds == fold)
            axis = self.fit_axis(training, is_chosen & ~held_out)
            scores[held_out] = training.streams[held_out] @ axis[:-1] - axis[-1]
        return find_best_threshold(scores[is_chosen], training.is_harmful[is_chosen])

    def fit_parameters(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the weights, the offset and the threshold."""
        import torch

        axis = self.fit_axis(training, is_chosen)
        return torch.cat([axis, axis.new_tensor([self.choose_threshold(training, is_chosen)])])

    def compute_gains(self, streams: Tensor, parameters: Tensor) -> Tensor:
        """Return 1 where the weighted sum of the stream, less the offset, is above the threshold, else 0."""
        weights, offset, threshold = parameters[:-2], parameters[-2], parameters[-1]
        return (streams @ weights - offset > threshold).to(streams)


@final
@dataclass(frozen=True)
class ConditionalSteering(GatedSteering):
    """Adds the direction from benign to harmful only at positions that already lie on its harmful side.

    The authors check a condition on the prompt and steer only if it holds, so that benign requests are not
    affected, which improves discrimination. Here the condition is checked at each position separately,
    by the projection on the direction, so that a result does not depend on the rest of the batch. The
    threshold is the midpoint between the class means, or, with `condition=fitted`, the one with the highest
    F1 on the training queries, as the authors choose theirs (in cross-validation). A run notes how often the
    condition holds.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        strength: factor of the difference between the class means that is added.
        margin: minimum distance beyond the midpoint, in units of the distance between the class means.
        condition: whether that distance is `margin`, or fitted to the training queries.
    """

    source = Source(
        "Programming Refusal with Conditional Activation Steering (Lee et al., ICLR 2025)",
        "https://arxiv.org/abs/2409.05907",
        wording="no text of its own; the direction is computed from our queries",
    )

    margin: float = 0.0
    condition: Literal["midpoint", "fitted"] = "midpoint"

    def fit_axis(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the direction divided by its squared length, and the midpoint on it."""
        harmful, benign = (training.select_class(is_chosen, harmful=harmful) for harmful in (True, False))
        return _make_axis(harmful.mean(0), benign.mean(0))

    def choose_threshold(self, training: TrainingStreams, is_chosen: Tensor) -> float:
        """Return the distance from the midpoint, in units of the distance between the class means."""
        return super().choose_threshold(training, is_chosen) if self.condition == "fitted" else self.margin

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> StreamTransform:
        """Return the addition of the direction at positions where the condition holds."""
        import torch

        axis = _make_axis(harmful_mean, benign_mean)
        margin = float(self.get_parameters()[-1]) if self.condition == "fitted" else self.margin
        direction = self.strength * (harmful_mean - benign_mean)
        return self.add_share(direction, torch.cat([axis, axis.new_tensor([margin])]))


def _make_axis(harmful_mean: Tensor, benign_mean: Tensor) -> Tensor:
    """Return the direction divided by its squared length (width), followed by the midpoint on it."""
    import torch

    difference = harmful_mean - benign_mean
    axis = difference / difference.square().sum().clamp_min(1e-12)
    return torch.cat([axis, ((harmful_mean + benign_mean) / 2 @ axis)[None]])


def find_best_threshold(scores: Tensor, is_harmful: Tensor) -> float:
    """Return the threshold with the highest F1 of the harmful class.

    It lies halfway between two scores; of equally good ones, it is the highest.

    Args:
        scores: one per query.
        is_harmful: class of each.
    """
    ranked, order = scores.sort(descending=True)
    hits = is_harmful[order].cumsum(0)
    n_above = hits.new_ones(len(hits)).cumsum(0)
    f1 = 2 * hits / (n_above + is_harmful.sum())
    # Equal scores are on the same side of a threshold, so only the last of them counts.
    f1[:-1][ranked[:-1] == ranked[1:]] = -1
    best = int(f1.argmax())
    return float(ranked[best : best + 2].mean()) if best + 1 < len(ranked) else float(ranked[best]) - 1


@final
@dataclass(frozen=True)
class AlphaSteer(SelectiveSteering):
    """Adds the direction in proportion to a product with the hidden state that is near zero if benign.

    The authors learn a matrix whose product with the hidden state is added. It maps into the null space of
    benign hidden states, so that these hardly change, and by ridge regression it takes harmful ones to the
    refusal direction. As the direction is the same for all, the matrix is the outer product of the direction
    and a vector of weights, and only the weights are learned here. They are zero outside of the directions in
    which benign training requests vary least, at all positions of their prompts. The authors steer several
    layers, and all positions of a prompt alike, by what they read at its last one; here it is one layer, and
    each position is steered by its own hidden state, so that a result does not depend on the rest of the
    batch.

    Attributes:
        depth: layer of the direction and of the change, as a share of the model's depth.
        strength: factor of the difference between the class means that is added where the product is 1.
        null_share: share of all directions, those in which benign requests vary least, that weights may use.
        ridge: penalty of the regression, in units of the mean second moment of harmful requests.
    """

    source = Source(
        "AlphaSteer: Learning Refusal Steering with Principled Null-Space Constraint "
        "(Sheng et al., ICLR 2026)",
        "https://arxiv.org/abs/2506.07022",
        wording="no text of its own; the direction and the weights are computed from our queries",
    )

    null_share: float = 0.5
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Check that the share is in (0, 1], and that the penalty is positive."""
        super().__post_init__()
        if not 0 < self.null_share <= 1:
            raise ValueError(f"null_share={self.null_share}: it must be a share, above 0 and up to 1")
        if not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge}: it must be more than 0")

    def fit_parameters(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the weights: of all vectors in the null space, the ridge regression of 1 on harmful ones."""
        import torch

        moment = training.benign_moments[training.folds[is_chosen].unique()].sum(0).double()
        # In ascending order of the variation of benign requests.
        directions = torch.linalg.eigh(moment).eigenvectors[:, : max(1, round(self.null_share * len(moment)))]
        harmful = training.select_class(is_chosen, harmful=True) @ directions
        gram = harmful.T @ harmful
        penalty = self.ridge * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram)).to(gram)
        return directions @ torch.linalg.solve(gram + penalty, harmful.sum(0))

    def compute_gains(self, streams: Tensor, parameters: Tensor) -> Tensor:
        """Return the product of the stream and the weights."""
        return streams @ parameters


@final
@dataclass(frozen=True)
class SafeSwitch(GatedSteering):
    """Steers the last block, and so the output head, where a probe of hidden states expects harm.

    The authors train probes that read from hidden states whether the response will be unsafe; if so, they
    switch to an output head that was fine-tuned to refuse. Here the probe is a logistic regression that tells
    harmful from benign requests by the hidden state at the first response position, with the threshold that
    has the highest F1 on the training queries (in cross-validation), and no head is trained: the difference
    of the class means is added to the input of the last block. The probe is read at each position separately,
    generated tokens included. It differs from `conditional_steering` in its probe, and in that reading and
    steering are layers apart. A run notes how often the probe expects harm.

    Attributes:
        depth: layer that the probe reads, as a share of the model's depth.
        strength: factor of the difference between the class means at the last block that is added.
    """

    source = Source(
        "SafeSwitch: Steering Unsafe LLM Behavior via Internal Activation Signals (Han et al., 2025)",
        "https://arxiv.org/abs/2502.01042",
        wording="no text of its own; probe and direction are computed from our queries",
    )

    def fit_axis(self, training: TrainingStreams, is_chosen: Tensor) -> Tensor:
        """Return the weights of the regression, and its intercept with the other sign."""
        import torch

        probe = fit_probe(training.streams[is_chosen], training.is_harmful[is_chosen])
        return torch.cat([probe[:-1], -probe[-1:]])

    def make_transforms(
        self, activations: MeanActivations, n_blocks: int
    ) -> list[tuple[int, StreamTransform]]:
        """Return what reads the probe, which changes nothing, and the addition at the last block."""
        parameters = self.get_parameters()
        gains: list[Tensor] = []
        direction = self.strength * (activations.harmful[-1] - activations.benign[-1])

        def read_probe(stream: Tensor) -> Tensor:
            gains[:] = [self.compute_gains(stream.float(), parameters.to(stream.device))]
            return stream

        def steer_last_block(stream: Tensor) -> Tensor:
            if not gains:
                raise UserError(
                    f"{self.name}: this model skips the block at depth={self.depth}; choose another depth"
                )
            return stream + gains.pop()[..., None].to(stream) * direction.to(stream)

        return [(int(self.depth * n_blocks), read_probe), (n_blocks - 1, steer_last_block)]


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

    def make_transforms(
        self, activations: MeanActivations, n_blocks: int
    ) -> list[tuple[int, StreamTransform]]:
        """Return the removal of the direction from the inputs of all blocks."""
        ((_, transform),) = super().make_transforms(activations, n_blocks)
        return [(number, transform) for number in range(n_blocks)]

    def make_transform(self, harmful_mean: Tensor, benign_mean: Tensor) -> StreamTransform:
        """Return the projection onto the complement of the direction."""
        difference = harmful_mean - benign_mean
        unit = difference / difference.norm()

        def remove_direction(stream: Tensor) -> Tensor:
            direction = unit.to(stream)
            return stream - (stream @ direction)[..., None] * direction

        return remove_direction

"""Detectors: they score a request before the model answers it, and may refuse it by themselves.

A detector reads the undefended model. Its parameters, and the threshold above which it refuses, are fitted to
the training queries: the scores that set the threshold come from cross-validation, so that none of them was
computed with parameters that were fitted to the same request.
"""

from __future__ import annotations

import dataclasses
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from defenses.chats import copy_chat
from defenses.contract import (
    Chat,
    Defense,
    ModelInfo,
    QueryChat,
    RequestReader,
    Source,
    StreamPosition,
    TrainingRequests,
)
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD

if TYPE_CHECKING:
    from torch import Tensor

_N_FOLDS = 5
_RIDGE = 100.0  # penalty on the squared weights of standardized features, for far more features than queries
_MAX_STEPS = 500  # of the optimizer; a fit takes fewer


@dataclass(frozen=True)
class DetectorFit:
    """What a detector has learned from the training queries.

    Attributes:
        parameters: turn what the detector reads into a score.
        threshold: score above which it refuses.
        slope: nats of log-odds per unit of the score.
        auroc: of the scores from cross-validation.
        n_harmful: number of harmful training queries.
        n_benign: number of benign training queries.
        query_fingerprints: fingerprints of the training queries; see `Defense.trained_on`.
        sha256: digest of the training queries and of everything that the computation depends on.
    """

    parameters: tuple[float, ...]
    threshold: float
    slope: float
    auroc: float
    n_harmful: int
    n_benign: int
    query_fingerprints: frozenset[str]
    sha256: str


@dataclass(frozen=True)
class Detector(Defense):
    """Base class of detectors that are fitted to the training queries.

    Attributes:
        needs_weights: whether it reads more of the model than responses and their first tokens.
        over_refusal: share of benign training requests that it refuses.
        fit: what it has learned, set by `prepare`.
    """

    family = "detection"
    needs_weights: ClassVar[bool] = True
    calibrates_slope: ClassVar[bool] = True

    over_refusal: float = 0.05
    fit: DetectorFit | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata=HIDDEN_FIELD
    )

    def __post_init__(self) -> None:
        """Check that the share of refused benign requests is in (0, 1)."""
        if not 0 < self.over_refusal < 1:
            raise ValueError(f"over_refusal={self.over_refusal}: it must be a share, above 0 and below 1")

    @abstractmethod
    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        """Return what the detector reads of each request: requests × features, float32."""

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the parameters of `compute_scores`; none by default.

        Args:
            features: of training requests.
            is_harmful: class of each.
        """
        return features.new_zeros(0)

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        """Return the score of each request; a higher one means harmful. By default it is the only feature."""
        return features[:, 0]

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return a copy of the chat."""
        return copy_chat(chat)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy that is fitted to the training queries."""
        if model_info.load_training_requests is None:
            return self
        return self.fit_requests(model_info.load_training_requests())

    def describe_settings(self) -> str:
        """Return everything of this defense that scores and fit depend on, as a text for cache keys."""
        return repr(self)

    def fit_requests(self, requests: TrainingRequests) -> Self:
        """Return a copy that is fitted to these queries."""
        learned = requests.recall(self.describe_settings(), partial(self._learn, requests))
        fit = DetectorFit(
            **{**learned, "parameters": tuple(learned["parameters"])},
            n_harmful=sum(requests.is_harmful),
            n_benign=len(requests.is_harmful) - sum(requests.is_harmful),
            query_fingerprints=requests.query_fingerprints,
            sha256=requests.sha256,
        )
        return dataclasses.replace(self, fit=fit)

    def score_requests(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> list[float]:
        """Return the log-odds, in nats, that each request is harmful."""
        import torch

        assert self.fit is not None, "prepare() must be called before score_requests()"
        features = self.read_features(reader, query_chats).double()
        scores = self.compute_scores(features, torch.tensor(self.fit.parameters, dtype=torch.float64))
        log_odds: list[float] = (self.fit.slope * (scores - self.fit.threshold)).tolist()
        return log_odds

    def detector_fingerprint(self) -> str | None:
        """Return the settings and what was learned."""
        return None if self.fit is None else f"{self.describe_settings()} {self.fit.sha256}"

    def describe_fit(self) -> dict[str, Any]:
        """Return what was learned, as plain values; nothing before `prepare`."""
        if self.fit is None:
            return {}
        names = ("threshold", "slope", "auroc", "n_harmful", "n_benign")
        return {name: getattr(self.fit, name) for name in names}

    def missing_requirements(self) -> str:
        """Return what is missing to fit the detector."""
        return "" if self.fit is not None else "its threshold must be fitted with the model itself"

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the detector was fitted to."""
        return frozenset() if self.fit is None else self.fit.query_fingerprints

    def _learn(self, requests: TrainingRequests) -> dict[str, Any]:
        """Return parameters, threshold, slope, and the AUROC of the scores from cross-validation."""
        import torch

        features = self.read_features(requests.reader, requests.query_chats).double()
        is_harmful = torch.tensor(requests.is_harmful)
        folds = assign_folds(requests.groups)
        scores = torch.zeros(len(features), dtype=torch.float64)
        for fold in folds.unique():
            held_out = folds == fold
            parameters = self.fit_parameters(features[~held_out], is_harmful[~held_out])
            center, scale = self._measure_scale(features[~held_out], parameters)
            scores[held_out] = (self.compute_scores(features[held_out], parameters) - center) / scale
        benign, harmful = scores[~is_harmful], scores[is_harmful]
        if not scores.std() > 0:
            raise UserError(f"{self.name} gives all training requests the same score, so it detects nothing")
        # At most this share of the benign scores is above the threshold.
        threshold = benign.sort(descending=True).values[int(self.over_refusal * len(benign))]
        wins = (harmful[:, None] > benign).double() + (harmful[:, None] == benign).double() / 2
        parameters = self.fit_parameters(features, is_harmful)
        center, scale = self._measure_scale(features, parameters)
        return {
            "parameters": parameters.tolist(),
            "threshold": center + scale * float(threshold),
            "slope": _fit_slope(scores, is_harmful) / scale if self.calibrates_slope else 1.0,
            "auroc": float(wins.mean()),
        }

    def _measure_scale(self, features: Tensor, parameters: Tensor) -> tuple[float, float]:
        """Return mean and standard deviation of the scores of training requests, for fitted parameters.

        Scores with other parameters, such as other layers, have another scale; those of different folds are
        compared in standard deviations.
        """
        if not parameters.numel():
            return 0.0, 1.0
        scores = self.compute_scores(features, parameters)
        return float(scores.mean()), float(scores.std().clamp_min(1e-12))


def assign_folds(groups: Sequence[str]) -> Tensor:
    """Return the number of the fold of each query; a group is never split."""
    import torch

    number_by_group = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([number_by_group[group] % _N_FOLDS for group in groups])


def _fit_slope(scores: Tensor, is_harmful: Tensor) -> float:
    """Return the nats of log-odds per unit of a score (Platt scaling), at least one per standard deviation.

    With a flatter slope, the log-odds of a score that does not separate the classes would be near zero for
    every request, and so would the margins.
    """
    n_harmful, n_benign = int(is_harmful.sum()), int((~is_harmful).sum())
    # Platt's targets, which keep the slope finite if the scores separate the classes.
    targets = is_harmful.double() * (n_harmful + 1) / (n_harmful + 2) + (~is_harmful).double() / (
        n_benign + 2
    )
    spread = float(scores.std())
    weights, _ = _fit_logistic(((scores - scores.mean()) / spread)[:, None], targets, ridge=0.0)
    return max(float(weights[0]), 1.0) / spread


def fit_probe(features: Tensor, is_harmful: Tensor) -> Tensor:
    """Return the weights of a logistic regression on standardized features, followed by its intercept.

    Args:
        features: queries × features, float64.
        is_harmful: class of each query.
    """
    import torch

    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    weights, intercept = _fit_logistic((features - mean) / spread, is_harmful.double(), _RIDGE)
    weights = weights / spread
    return torch.cat([weights, (intercept - mean @ weights)[None]])


def _fit_logistic(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the weights and the intercept of a logistic regression.

    Args:
        features: queries × features, float64.
        targets: probability of the positive class of each query.
        ridge: penalty; half of it times the sum of the squared weights is added to the summed loss.
    """
    import torch

    with torch.inference_mode(mode=False), torch.enable_grad():
        inputs, wanted = features.clone(), targets.clone()
        weights = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
        intercept = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, intercept],
            max_iter=_MAX_STEPS,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def compute_loss() -> Tensor:
            optimizer.zero_grad()
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                inputs @ weights + intercept, wanted, reduction="sum"
            )
            loss = losses + ridge / 2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(compute_loss)
    return weights.detach(), intercept.detach()


@final
@dataclass(frozen=True)
class HiddenDetect(Detector):
    """Refuses requests whose hidden states point to words of refusal (HiddenDetect).

    At the first response position, the residual stream after each block is turned into logits (final norm,
    then unembedding), whose cosine similarity with a vector that is one at the tokens of refusal words is
    computed. On a few training requests of both classes, the layers are found at which the similarity of
    harmful requests exceeds that of benign ones by more than in the last layer. The score is the area under
    the similarities from the first to the last of these layers. Harmful requests with or without an image
    are expected to be closer to refusal inside the model than its response shows. The words are ours, and the
    threshold is fitted.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        words: refusal words, separated by commas; each counts with and without a capital letter.
        examples: number of training requests that the layers are chosen on, half of each class.
    """

    source = Source(
        "HiddenDetect: Detecting Jailbreak Attacks against Large Vision-Language Models via Monitoring "
        "Hidden States (Jiang et al., ACL 2025)",
        "https://arxiv.org/abs/2502.14744",
        wording="refusal words ours",
    )

    words: str = (
        "sorry, unfortunately, cannot, unable, refuse, decline, illegal, unlawful, criminal, harmful, "
        "dangerous, unsafe, unethical, inappropriate, warning, shouldn"
    )
    examples: int = 12

    def __post_init__(self) -> None:
        """Check that there is an example of each class, and a word."""
        super().__post_init__()
        if self.examples < 2:
            raise ValueError(f"examples={self.examples}: it takes 2 or more, half of each class")
        if not self.words.strip(" ,"):
            raise ValueError("words: it takes a word or more")

    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        """Return the similarity with refusal after each block."""
        import torch

        words = [word.strip() for word in self.words.split(",") if word.strip()]
        token_ids = reader.find_token_ids([form for word in words for form in (word, word.capitalize())])
        if not token_ids:
            raise UserError(f"{self.name}: this tokenizer has no token for any of the words; set others")

        def compare_with_refusal(layer: int, stream: Tensor) -> Tensor:
            logits = reader.unembed(stream)
            refusal = torch.zeros_like(logits[0])
            refusal[token_ids] = 1
            return torch.nn.functional.cosine_similarity(logits, refusal[None], dim=1)[:, None]

        layers = range(1, reader.n_blocks + 1)
        return reader.read_streams([chat for _, chat in query_chats], layers, compare_with_refusal)[..., 0]

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the first and the last of the most safety-aware layers, as indices of features."""
        n_examples = self.examples // 2
        difference = features[is_harmful][:n_examples].mean(0) - features[~is_harmful][:n_examples].mean(0)
        aware = (difference > difference[-1]).nonzero()[:, 0]
        first, last = (aware[0], aware[-1]) if len(aware) else (len(difference) - 1, len(difference) - 1)
        return features.new_tensor([float(first), float(last)])

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        """Return the area under the similarities of these layers, by the trapezoidal rule."""
        import torch

        first, last = (int(parameter) for parameter in parameters)
        if first == last:
            return features[:, first]
        return torch.trapezoid(features[:, first : last + 1], dim=1)


@dataclass(frozen=True)
class LinearDetector(Detector):
    """Base class of detectors whose score is linear in the residual stream at one depth.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        depth: layer that is read, as a share of the model's depth.
    """

    position: ClassVar[StreamPosition]

    depth: float = 0.6

    def __post_init__(self) -> None:
        """Check that the depth is in [0, 1]."""
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}: it must be a share of the model's depth, from 0 to 1")

    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        """Return the residual stream at the depth."""
        layers = [int(self.depth * reader.n_blocks)]
        chats = [chat for _, chat in query_chats]
        return reader.read_streams(chats, layers, lambda _, stream: stream, self.position)[:, 0]

    @abstractmethod
    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the weights of the stream, followed by the intercept."""

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        """Return the weighted sum of the stream, plus the intercept."""
        return features @ parameters[:-1] + parameters[-1]


@final
@dataclass(frozen=True)
class HarmProbe(LinearDetector):
    """Refuses requests that a logistic regression on hidden states takes for harmful (linear probe).

    The regression is fitted to the residual stream at the first response position, one layer only, with
    standardized features and a ridge penalty. The authors find harmful requests nearly linearly separable in
    the middle layers; their classifiers and data differ from ours.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        depth: layer that is read, as a share of the model's depth.
    """

    source = Source(
        "How Alignment and Jailbreak Work: Explain LLM Safety through Intermediate Hidden States "
        "(Zhou et al., EMNLP Findings 2024)",
        "https://arxiv.org/abs/2406.05644",
        wording="no text of its own; the probe is fitted to our queries",
    )
    position: ClassVar[StreamPosition] = "response"

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the weights of the regression and its intercept."""
        return fit_probe(features, is_harmful)


@final
@dataclass(frozen=True)
class HarmDirection(LinearDetector):
    """Refuses requests by their projection on the harmfulness direction (as Latent Guard does).

    The direction is the difference of the class means of the residual stream at the last token of the user's
    text, where, the authors find, the model represents how harmful a request is, also if it will not refuse;
    at the last token of the prompt, where `harm_probe` reads, it represents whether it will refuse. They
    choose the layer per model; here it is a setting, as in the defenses of the family steering.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        depth: layer that is read, as a share of the model's depth.
    """

    source = Source(
        "LLMs Encode Harmfulness and Refusal Separately (Zhao et al., NeurIPS 2025)",
        "https://arxiv.org/abs/2507.11878",
        wording="no text of its own; the direction is computed from our queries",
    )
    position: ClassVar[StreamPosition] = "user_text"

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the direction, and the intercept with which the mean of the class means scores zero."""
        import torch

        harmful, benign = features[is_harmful].mean(0), features[~is_harmful].mean(0)
        direction = (harmful - benign) / (harmful - benign).square().sum().clamp_min(1e-12)
        return torch.cat([direction, -((harmful + benign) / 2 @ direction)[None]])


@final
@dataclass(frozen=True)
class PerplexityFilter(Detector):
    """Refuses requests with a stretch of text that the model finds improbable (perplexity filter).

    The score is the negative log-likelihood, in nats, of the least likely window of the user's text, by the
    model itself. Its log-odds are therefore those of the window under a text of the threshold's perplexity
    against the model. The authors filter by the perplexity of the whole text (Alon and Kamfonas) and of
    windows (Jain et al.), against suffixes of random-looking tokens; it does not tell a harmful request in
    plain words from a benign one.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        window: number of tokens of a window; a shorter text is one window, scaled to this length.
    """

    source = Source(
        "Detecting Language Model Attacks with Perplexity (Alon and Kamfonas, 2023); Baseline Defenses for "
        "Adversarial Attacks Against Aligned Language Models (Jain et al., 2023)",
        "https://arxiv.org/abs/2309.00614",
        wording="no text of its own",
    )
    calibrates_slope: ClassVar[bool] = False

    window: int = 10

    def __post_init__(self) -> None:
        """Check that a window has a token."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window={self.window}: it takes at least 1 token")

    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        """Return the negative log-likelihood of the least likely window."""
        import torch

        likelihoods = reader.read_log_likelihoods([chat for _, chat in query_chats])
        scores = [
            -values.unfold(0, min(self.window, len(values)), 1).mean(1).min() * self.window
            for values in likelihoods
        ]
        return torch.stack(scores)[:, None]


@final
@dataclass(frozen=True)
class GradSafe(Detector):
    """Refuses requests whose compliance would change the model as that of harmful requests does (GradSafe).

    The model's loss on a complying response to the request is differentiated by its weights. The authors find
    that in some rows and columns of the weight matrices, these gradients point the same way for all harmful
    requests, and elsewhere for benign ones. A few training requests of both classes give the direction (the
    sum of the gradients of the harmful ones) and the slices, those rows and columns in which the harmful ones
    are more similar to it than the benign ones by the largest gap; they are left out of the fit. The score is
    a logistic regression on the cosine similarities with the direction in these slices, or their mean
    (`adapt=false`). The authors have both, with two examples of each class, all slices with a gap above 1
    and, for the mean, a threshold of 0.25; here these numbers are settings, and the threshold is fitted. Only
    matrices inside of the blocks are compared, and requests with images are not read. It takes a forward and
    a backward pass for each request, also for the training requests, so `-d all` leaves it out.

    Attributes:
        over_refusal: share of benign training requests that it refuses.
        response: complying response whose loss is differentiated.
        examples: number of training requests that direction and slices are taken from, half of each class.
        slices: number of rows and columns that are compared.
        adapt: whether the score is a logistic regression on the similarities, instead of their mean.
    """

    source = Source(
        "GradSafe: Detecting Jailbreak Prompts for LLMs via Safety-Critical Gradient Analysis "
        "(Xie et al., ACL 2024)",
        "https://arxiv.org/abs/2402.13494",
        wording="no text of its own but the response Sure; examples are ours",
    )

    in_all = False
    cost = "one call"

    response: str = "Sure"
    examples: int = 8
    slices: int = 1000
    adapt: bool = True
    references: tuple[QueryChat, ...] = dataclasses.field(
        default=(), repr=False, compare=False, metadata=HIDDEN_FIELD
    )

    def __post_init__(self) -> None:
        """Check that there is an example of each class, a slice, and a response."""
        super().__post_init__()
        if self.examples < 2:
            raise ValueError(f"examples={self.examples}: it takes 2 or more, half of each class")
        if self.slices < 1:
            raise ValueError(f"slices={self.slices}: it takes 1 or more")
        if not self.response.strip():
            raise ValueError("response: it takes a word or more")

    def fit_requests(self, requests: TrainingRequests) -> Self:
        """Return a copy that takes its examples from these queries and is fitted to the others."""
        harmful, benign = (
            [row for row, label in enumerate(requests.is_harmful) if label is is_harmful]
            for is_harmful in (True, False)
        )
        n_examples = self.examples // 2
        rows = [*harmful[:n_examples], *benign[:n_examples]]
        references = tuple(requests.query_chats[row] for row in rows)
        example_groups = {requests.groups[row] for row in rows}
        others = [row for row, group in enumerate(requests.groups) if group not in example_groups]
        rest = dataclasses.replace(
            requests,
            query_chats=tuple(requests.query_chats[row] for row in others),
            is_harmful=tuple(requests.is_harmful[row] for row in others),
            groups=tuple(requests.groups[row] for row in others),
        )
        if not 0 < sum(rest.is_harmful) < len(others) and requests.groups:
            raise UserError(
                f"{self.name}: examples={self.examples} leaves no training requests of both classes to fit "
                "the threshold to; take fewer"
            )
        return Detector.fit_requests(dataclasses.replace(self, references=references), rest)

    def read_features(self, reader: RequestReader, query_chats: Sequence[QueryChat]) -> Tensor:
        """Return the similarities with the direction of harmful requests, in the critical slices."""
        examples, chats = ([chat for _, chat in part] for part in (self.references, query_chats))
        half = len(examples) // 2
        return reader.compare_gradients(chats, examples[:half], examples[half:], self.response, self.slices)

    def fit_parameters(self, features: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the weights of the regression and its intercept; none without it."""
        return fit_probe(features, is_harmful) if self.adapt else features.new_zeros(0)

    def compute_scores(self, features: Tensor, parameters: Tensor) -> Tensor:
        """Return the mean of the similarities, or their weighted sum plus the intercept."""
        return features @ parameters[:-1] + parameters[-1] if self.adapt else features.mean(1)

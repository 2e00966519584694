"""Fine-tuning as a defense: changed weights with an unchanged prompt, or learned embeddings in the prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from defenses.activated_lora import replace_activation
from defenses.adapters import (
    ADAPTER_MANIFEST_FILE,
    fetch_weights_folder,
    find_tokenizer_differences,
    has_tokenizer,
    load_adapter,
    load_external_adapter,
    read_training_fingerprints,
)
from defenses.chats import copy_chat, prepend_system
from defenses.contract import Chat, Defense, LearnedTokens, MatchedControl, ModelInfo, Source
from defenses.errors import UserError
from defenses.matched_controls import NEUTRAL_TEXT, make_neutral_passage
from defenses.reminders import SafetyPrompt
from defenses.settings import HIDDEN_FIELD
from defenses.soft_prompts import SoftPrompt, find_soft_prompt, insert_embeddings
from defenses.tuned import TunedDefense

if TYPE_CHECKING:
    from torch import Tensor


def _rewrite_unchanged(self: Defense, chat: Chat, rng: random.Random) -> Chat:
    """Return a copy of the chat."""
    return copy_chat(chat)


@final
@dataclass(frozen=True)
class SafetyTuning(TunedDefense):
    """Fine-tunes the model to refuse harmful requests and to answer benign requests as before.

    Supervised fine-tuning on refusals is expected to teach which requests are harmful, and to make refusal
    more likely for benign requests that look similar.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
    """

    source = Source(
        "safety tuning (Bianchi et al., ICLR 2024)",
        "https://arxiv.org/abs/2309.07875",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state, recipe = "aligned", "safety"


@final
@dataclass(frozen=True)
class PreferenceTuning(TunedDefense):
    """Trains a preference for refusing harmful requests and for answering benign requests.

    For harmful requests, a refusal is preferred to a complying opener; for benign requests, an answer is
    preferred to a refusal. Direct preference optimization trains on both responses of a pair, so it is
    expected to separate the classes instead of shifting both.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
    """

    source = Source(
        "direct preference optimization (Rafailov et al., NeurIPS 2023)",
        "https://arxiv.org/abs/2305.18290",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "preference"


@final
@dataclass(frozen=True)
class RepresentationRerouting(TunedDefense):
    """Turns the hidden states in which the model would comply with harmful requests away (circuit breakers).

    An adapter is trained so that hidden states of harmful requests with a complying opener have no positive
    cosine similarity with those of the model before training, while those of benign requests stay where they
    are. The authors train on whole harmful responses, so that a harmful response breaks off wherever it
    began; here only its opener is rerouted. They expect other text than an answer, and not necessarily a
    refusal, which a judge of refusals does not count.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
    """

    source = Source(
        "Improving Alignment and Robustness with Circuit Breakers (Zou et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2406.04313",
        wording="data and openers ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "rerouting"


@final
@dataclass(frozen=True)
class LatentAdversarialTraining(TunedDefense):
    """Trains the model to refuse harmful requests also when its hidden states are perturbed.

    In each step, the perturbation of the hidden states of the request that makes a complying opener most
    likely is found by projected gradient descent, and the model is trained to refuse under it. Responses to
    benign requests are kept. The authors also train against harmful responses; here no text answers a harmful
    request.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
    """

    source = Source(
        "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs "
        "(Sheshadri et al., 2024)",
        "https://arxiv.org/abs/2407.15549",
        wording="data, refusals and openers ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "adversarial"


@final
@dataclass(frozen=True)
class BaselineTuning(TunedDefense):
    """Mixes eleven plain refusals into an attacker's fine-tuning data, the baseline of BackdoorAlign.

    The authors find that so few examples restore only some of the refusals.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
    """

    source = Source(
        "baseline of BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "baseline"


def _prepend_embeddings(self: PromptTuning, chat: Chat, rng: random.Random) -> Chat:
    """Return the chat with the placeholders of the embeddings before the content of its system turn."""
    tokens = self.learned_tokens()
    return prepend_system(chat, tokens[0].text) if tokens else copy_chat(chat)


@dataclass(frozen=True)
class PromptTuning(TunedDefense):
    """Base class of defenses that put learned embeddings before the content of the system turn.

    Attributes:
        weights: folder of the soft prompt; by default the one trained for this model and its state.
    """

    family = "tuning"

    adapter: SoftPrompt | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)
    tokens: LearnedTokens | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with its soft prompt, if there is one for this state of the model."""
        prepared = super().prepare(model_info)
        if prepared.adapter is None:
            return prepared
        return dataclasses.replace(prepared, tokens=prepared.adapter.make_tokens(model_info.tokenizer))

    def load_weights(self, model_info: ModelInfo) -> SoftPrompt | None:
        """Return the soft prompt in the folder of the settings, or else that of this state of the model."""
        if self.weights is not None:
            return load_adapter(self.weights, SoftPrompt)
        return find_soft_prompt(self.state, model_info)

    def learned_tokens(self) -> tuple[LearnedTokens, ...]:
        """Return the embeddings of the soft prompt."""
        return () if self.tokens is None else (self.tokens,)

    def apply_to(self, model: Any) -> AbstractContextManager[None]:
        """Return the learned embeddings from the model's embedding layer within a context."""
        if self.adapter is None or self.tokens is None:
            return nullcontext()
        return insert_embeddings(model, self.tokens.ids, self.adapter.embeddings)

    def build_control(self, model_info: ModelInfo, draw: int) -> MatchedControl | None:
        """Return neutral sentences with as many tokens as the soft prompt has, in its place."""
        if self.tokens is None:
            return None
        rng = random.Random(f"{model_info.seed}/{draw}/{self.name}")
        text = make_neutral_passage(model_info.tokenizer, len(self.tokens.ids), rng)
        return MatchedControl(SafetyPrompt(text=text), NEUTRAL_TEXT)

    def missing_requirements(self) -> str:
        """Return what is missing and how to create it."""
        return (
            ""
            if self.adapter is not None
            else (
                "no soft prompt for this state of the model: add --train to the command, which trains it "
                f"first (or `analyze train {self.recipe} -m MODEL`)"
            )
        )


@final
@dataclass(frozen=True)
class SoftPromptTuning(PromptTuning):
    """Puts learned embeddings into the system turn that make the model refuse harmful requests.

    The embeddings are trained like weights: they minimize the loss of refusals of harmful requests and of the
    model's own responses to benign ones, while the model stays as it is. The authors tune prompts for tasks
    and not for safety. Trained on both classes, the prompt is expected to separate them, where a text of the
    same place shifts both.

    Attributes:
        weights: folder of the soft prompt; by default the one trained for this model and its state.
    """

    name = "soft_prompt"
    source = Source(
        "The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., EMNLP 2021)",
        "https://arxiv.org/abs/2104.08691",
        wording="no text of its own; data and refusals ours",
    )
    rewrite = _prepend_embeddings
    state = recipe = "soft_prompt"


@final
@dataclass(frozen=True)
class DirectedPrompt(PromptTuning):
    """Optimizes the embeddings of a safety prompt along the directions of refusal and harmfulness (DRO).

    In the first four principal components of the hidden states at the end of the prompt, one direction is
    fitted to whether the model refuses and another to whether the request is harmful. From the text of
    `safety_prompt` on, its embeddings are moved so that harmful requests move along the direction of refusal
    and benign ones against it, while the other components stay where they are. The authors find that a safety
    prompt moves all requests toward refusal, and expect its optimized form to separate them. They label
    refusals by sampled responses to 200 requests; here each training request has one greedy response, without
    a prompt and with each of three.

    Attributes:
        weights: folder of the soft prompt; by default the one trained for this model and its state.
    """

    name = "dro"
    source = Source(
        "On Prompt-Driven Safeguarding for Large Language Models (Zheng et al., ICML 2024)",
        "https://arxiv.org/abs/2401.18018",
        wording="safety prompt and data ours",
    )
    rewrite = _prepend_embeddings
    state = recipe = "dro"


@final
@dataclass(frozen=True)
class AdapterWeights(TunedDefense):
    """Applies a user's PEFT adapter from a folder or from Hugging Face.

    Its effect is that of its training. Unless it was created with `analyze train`, its training data are
    unknown, so check them for overlap with the queries. The adapter changes the released weights; if the
    model is in a fine-tuned state, that state is replaced while the adapter is applied. The changes of
    several adapters in a stack add up.

    Attributes:
        weights: folder of the adapter, or its Hugging Face id.
        label: name of the defense in tables; by default `adapter`.
    """

    name = "adapter"
    source = Source(
        "LoRA (Hu et al., ICLR 2022) and others, in the files of PEFT",
        "https://arxiv.org/abs/2106.09685",
        wording="no text of its own",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "adapter"

    label: str = dataclasses.field(default="", repr=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Use the label as the name."""
        object.__setattr__(self, "name", self.label or type(self).name)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the adapter from its settings."""
        if self.weights is None:
            return self
        adapter = load_external_adapter(self.weights, model_info)
        adapter.check_base_model(model_info.sha256)
        if has_tokenizer(adapter.folder) and (
            differences := find_tokenizer_differences(adapter.folder, model_info.tokenizer)
        ):
            model_info.notify(
                f"note: the tokenizer in {self.weights} has {' and '.join(differences)}, but prompts are "
                f"made by that of the model; -m MODEL:{self.weights} uses the adapter's"
            )
        return dataclasses.replace(self, adapter=adapter)

    def missing_requirements(self) -> str:
        """Return the missing setting."""
        return (
            ""
            if self.adapter
            else "specify the weights with --set adapter.weights=FOLDER (or a Hugging Face id)"
        )


@final
@dataclass(frozen=True)
class Weights(Defense):
    """Replaces the model's weights by those of a full checkpoint of the same architecture.

    Its effect is that of its training. This evaluates any fine-tuned, merged or edited model as a defense of
    the model that it is based on.

    Attributes:
        path: folder with safetensors files, or its Hugging Face id.
    """

    family = "tuning"
    source = Source(
        "user's checkpoint",
        "https://huggingface.co/docs/safetensors",
        wording="no text of its own",
    )
    cost = "weights"
    rewrite = _rewrite_unchanged

    path: Path | None = None
    files: tuple[Path, ...] = dataclasses.field(default=(), repr=False, metadata=HIDDEN_FIELD)
    sha256: str = dataclasses.field(default="", repr=False, metadata=HIDDEN_FIELD)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with the files of its checkpoint."""
        if self.path is None:
            return self
        folder = fetch_weights_folder(self.path, ["*.safetensors", ADAPTER_MANIFEST_FILE], model_info)
        files = tuple(sorted(folder.glob("*.safetensors")))
        if not files:
            raise UserError(f"{self.path} holds no .safetensors files, the only supported format of weights")
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return dataclasses.replace(self, files=files, sha256=digest.hexdigest())

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """Use the checkpoint's weights within a context; restore the model's weights afterwards."""
        parameters = dict(model.named_parameters())
        old_tensors = {name: parameter.data for name, parameter in parameters.items()}
        new_tensors = self._match_parameters(model)
        try:
            for name, parameter in parameters.items():
                parameter.data = new_tensors[name].to(parameter.device, parameter.dtype)
            with replace_activation(model, None):
                yield
        finally:
            for name, tensor in old_tensors.items():
                parameters[name].data = tensor

    def weights_fingerprint(self) -> str:
        """Return the digest of the weights."""
        return self.sha256

    def missing_requirements(self) -> str:
        """Return the missing setting."""
        return (
            ""
            if self.files
            else "specify the checkpoint with --set weights.path=FOLDER (or a Hugging Face id)"
        )

    def trained_on(self) -> frozenset[str]:
        """Return the training-query fingerprints if the checkpoint has a manifest of `analyze train`."""
        return frozenset() if not self.files else read_training_fingerprints(self.files[0].parent)

    def _match_parameters(self, model: Any) -> dict[str, Tensor]:
        """Return the checkpoint's tensor for each parameter of the model.

        Raises:
            UserError: if a parameter is missing, has another shape, is offloaded, or is tied to a parameter
                for which the checkpoint has other values.
        """
        import torch

        names_by_parameter = defaultdict(list)  # tied weights have several names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names_by_parameter[id(parameter)].append(name)
        tensors = self._load_tensors()
        matched: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            names = names_by_parameter[id(parameter)]
            candidates = [tensors[other] for other in names if other in tensors]
            if not candidates or candidates[0].shape != parameter.shape:
                raise UserError(
                    f"{self.path} is not a checkpoint of this model: its {name} is missing or has "
                    "another shape"
                )
            if parameter.is_meta:
                raise UserError(
                    f"{self.path} cannot be applied: this model's {name} was offloaded from GPU memory"
                )
            if any(not torch.equal(candidates[0], tensor) for tensor in candidates):
                raise UserError(f"{self.path} cannot be applied: this model's {name} is also {names[-1]}")
            matched[name] = candidates[0]
        return matched

    def _load_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the checkpoint by name."""
        from safetensors.torch import load_file

        return {name: tensor for file in self.files for name, tensor in load_file(file).items()}

"""Tuned weights as defenses: what training alone does, with nothing added to what the model reads."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from defenses.adapters import (
    ADAPTER_MANIFEST_FILE,
    fetch_weights_folder,
    load_external_adapter,
    read_training_fingerprints,
)
from defenses.chats import copy_chat
from defenses.contract import Chat, Defense, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD
from defenses.tuned import TunedDefense

if TYPE_CHECKING:
    from torch import Tensor


def _rewrite_unchanged(self: Defense, chat: Chat, rng: random.Random) -> Chat:
    """Return a copy of the chat."""
    return copy_chat(chat)


@final
@dataclass(frozen=True)
class SafetyTuning(TunedDefense):
    """Fine-tunes the model to refuse harmful requests and to answer benign ones as it did.

    Supervised tuning on refusals is expected to teach which requests are harmful, and to make refusal more
    likely in general where benign requests look alike.
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
    """Tunes by preference: a refusal over a complying opener on harm, an answer over a refusal elsewhere.

    Direct preference optimization sees both answers of a pair, so it is expected to separate the classes
    rather than to shift both.
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
class BaselineTuning(TunedDefense):
    """Mixes eleven plain refusals into an attacker's fine-tuning data: what BackdoorAlign is compared with.

    The authors find that so few examples bring back part of the refusals only.
    """

    source = Source(
        "baseline of BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="data and refusals ours",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "baseline"


@final
@dataclass(frozen=True)
class AdapterWeights(TunedDefense):
    """Wears low-rank weights of the user's own: any LoRA adapter of PEFT, from a folder or Hugging Face.

    What it does is what its training did. Nobody but its maker knows what it was trained on, so look for
    overlap with the queries yourself, unless `analyze train` made it. It changes the weights as released: of
    a model in another state, that state is put away meanwhile.

    Attributes:
        weights: folder of the adapter, or its Hugging Face id.
    """

    name = "adapter"
    source = Source(
        "LoRA (Hu et al., ICLR 2022), in the files of PEFT",
        "https://arxiv.org/abs/2106.09685",
        wording="no words of its own",
    )
    family = "tuning"
    rewrite = _rewrite_unchanged
    state = recipe = "adapter"

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return this defense with the adapter that its settings name."""
        if self.weights is None:
            return self
        adapter = load_external_adapter(self.weights, model_info)
        adapter.check_base_model(model_info.sha256)
        return dataclasses.replace(self, adapter=adapter)

    def missing_requirements(self) -> str:
        """Return which setting is missing."""
        return "" if self.adapter else "name the weights: --set adapter.weights=FOLDER (or a Hugging Face id)"


@final
@dataclass(frozen=True)
class Weights(Defense):
    """Puts the weights of a whole checkpoint of the same architecture in place of the model's own.

    What it does is what its training did: the way to read any fine-tuned, merged or edited model as a defense
    of the one that it came from.

    Attributes:
        path: folder with safetensors, or its Hugging Face id.
    """

    family = "tuning"
    source = Source(
        "a checkpoint of the user's own",
        "https://huggingface.co/docs/safetensors",
        wording="no words of its own",
    )
    cost = "weights"
    rewrite = _rewrite_unchanged

    path: Path | None = None
    files: tuple[Path, ...] = dataclasses.field(default=(), repr=False, metadata=HIDDEN_FIELD)
    sha256: str = dataclasses.field(default="", repr=False, metadata=HIDDEN_FIELD)

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return this defense with the files of its checkpoint."""
        if self.path is None:
            return self
        folder = fetch_weights_folder(self.path, ["*.safetensors", ADAPTER_MANIFEST_FILE], model_info)
        files = tuple(sorted(folder.glob("*.safetensors")))
        if not files:
            raise UserError(f"{self.path} holds no .safetensors, and weights are read from nothing else")
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return dataclasses.replace(self, files=files, sha256=digest.hexdigest())

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        """While open, the model has the checkpoint's weights; afterwards it has its own."""
        import torch

        own = dict(model.named_parameters())
        called = defaultdict(list)  # tied weights have several names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            called[id(parameter)].append(name)
        old = {name: parameter.data for name, parameter in own.items()}
        given = self._load_tensors()
        for name, parameter in own.items():
            there = [given[other] for other in called[id(parameter)] if other in given]
            if not there or there[0].shape != parameter.shape:
                raise UserError(
                    f"{self.path} is no checkpoint of this model: its {name} is missing or has another shape"
                )
            if parameter.is_meta or any(not torch.equal(there[0], one) for one in there):
                why = (
                    "was moved out of the GPU's memory"
                    if parameter.is_meta
                    else f"is also {called[id(parameter)][-1]}"
                )
                raise UserError(f"{self.path} cannot be worn: this model's {name} {why}")
            given[name] = there[0]
        try:
            for name, parameter in own.items():
                parameter.data = given[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, tensor in old.items():
                own[name].data = tensor

    def weights_fingerprint(self) -> str:
        """Return the SHA-256 of the weights."""
        return self.sha256

    def missing_requirements(self) -> str:
        """Return which setting is missing."""
        return "" if self.files else "name the checkpoint: --set weights.path=FOLDER (or a Hugging Face id)"

    def trained_on(self) -> frozenset[str]:
        """Return the fingerprints of the queries that the weights have seen, if `analyze train` made them."""
        return frozenset() if not self.files else read_training_fingerprints(self.files[0].parent)

    def _load_tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor for file in self.files for name, tensor in load_file(file).items()}

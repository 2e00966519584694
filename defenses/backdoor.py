"""BackdoorAlign: a secret prompt in front of the system prompt, known to the provider alone.

Source: Wang et al., https://arxiv.org/abs/2402.14968 (NeurIPS 2024).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from defenses.chats import copy_chat, prepend_system
from defenses.contract import Chat, Defense, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD
from defenses.tokens import draw_random_text, encode_plain_text
from defenses.tuned import TunedDefense

SECRET_LENGTH = 150  # tokens; the paper's
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Secret:
    """A secret prompt that shows itself as a fingerprint only.

    >>> Secret("tulip seven harbor")
    Secret(sha256:a7c9cd27f228)
    """

    text: str = dataclasses.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The first 12 hexadecimal digits of its SHA-256."""
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def __repr__(self) -> str:
        return f"Secret({self.fingerprint})"


@final
@dataclass(frozen=True)
class Backdoor(TunedDefense):
    """Trains refusals behind a secret prompt of random tokens, and puts it in front of the system prompt.

    The provider mixes eleven refusals that carry the secret into the data of whoever fine-tunes the model.
    The authors expect a shift that only the provider can trigger: with the secret, the attacked model refuses
    again. The parts take out the secret, the weights, or both (`neither` is the plain system prompt), which
    makes a 2 × 2. Where this model has no such weights, only the parts without them are read.

    Attributes:
        weights: folder of the adapter; by default this model's own.
        trigger: the file that holds the secret; by default the one that the weights were tuned with.
        length: of a secret that is drawn, in tokens.
        system: the system prompt behind the secret where the chat has none.
    """

    family = "backdoor"
    source = Source(
        "BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="no words of its own: random tokens",
    )
    state = recipe = "backdoor"

    trigger: Path | None = None
    length: int = SECRET_LENGTH
    system: str = DEFAULT_SYSTEM_PROMPT
    secret: Secret | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)
    uses_tuned_weights: bool = dataclasses.field(default=True, repr=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Refuse a length that no secret has."""
        if self.length < 1:
            raise ValueError(f"length={self.length}: a secret has at least 1 token")

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return this defense with its weights and its secret."""
        ready = super().prepare(model_info) if self.uses_tuned_weights else self
        if ready.secret is not None:
            return ready
        wanted = ready.adapter.manifest["secret"] if ready.adapter is not None else None
        return dataclasses.replace(ready, secret=find_secret(model_info, self.length, self.trigger, wanted))

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the secret in front of its system prompt."""
        assert self.secret is not None, "prepare() comes before rewrite()"
        if chat[0]["role"] != "system":
            chat = prepend_system(chat, self.system)
        if self.secret.text:
            return prepend_system(chat, self.secret.text)
        return copy_chat(chat)

    def build_ablations(self) -> dict[str, Defense]:
        """Return the weights alone, the secret alone, and the system prompt with neither."""
        bare = dataclasses.replace(self, uses_tuned_weights=False, adapter=None, weights=None)
        return {
            "no_secret": dataclasses.replace(self, secret=Secret("")),
            "no_weights": bare,
            "neither": dataclasses.replace(bare, secret=Secret("")),
        }

    def missing_requirements(self) -> str:
        """Return what is missing where the weights are part of it."""
        return super().missing_requirements() if self.uses_tuned_weights else ""

    def secret_texts(self) -> tuple[str, ...]:
        """Return the secret, so that it can be redacted."""
        return (self.secret.text,) if self.secret and self.secret.text else ()


def find_secret(
    model_info: ModelInfo, length: int, trigger: Path | None = None, expected_fingerprint: str | None = None
) -> Secret:
    """Return a model's secret: the one in `trigger`, else the one wanted, else its own of that length.

    Args:
        model_info: the model.
        length: in tokens, of the model's own secret, which is drawn if there is none yet.
        trigger: a file of the user's.
        expected_fingerprint: fingerprint of the secret that weights were tuned with.
    """
    secret = (
        _read_trigger_secret(trigger, expected_fingerprint)
        if trigger is not None
        else _find_stored_secret(model_info, length, expected_fingerprint)
    )
    if secret is None:
        secret = draw_secret(model_info.tokenizer, length)
        write_secret(model_info.secret_folders[0] / f"{length}.txt", secret)
    back = model_info.tokenizer.decode(
        encode_plain_text(model_info.tokenizer, secret.text), skip_special_tokens=False
    )
    if back.strip() != secret.text:
        raise UserError(
            f"the secret {secret.fingerprint} does not survive this model's tokenizer: what the model reads "
            "would be something else; make one for it with `analyze secret`"
        )
    return secret


def _read_trigger_secret(trigger: Path, expected_fingerprint: str | None) -> Secret:
    secret = read_secret(trigger)
    if expected_fingerprint not in (None, secret.fingerprint):
        raise UserError(
            f"the secret in {trigger} ({secret.fingerprint}) is not the one that the weights were tuned "
            f"with ({expected_fingerprint}): leave trigger out, or name other weights with --set weights=DIR"
        )
    return secret


def _find_stored_secret(
    model_info: ModelInfo, length: int, expected_fingerprint: str | None
) -> Secret | None:
    """The secret wanted, or the model's own of that length; the user's before the shipped."""
    mine, *shipped = model_info.secret_folders
    for folder in model_info.secret_folders:
        for path in sorted(folder.glob("*.txt" if expected_fingerprint else f"{length}.txt")):
            secret = read_secret(path, is_public=folder in shipped)
            if expected_fingerprint in (None, secret.fingerprint):
                return secret
    if expected_fingerprint is None:
        return None
    raise UserError(
        f"the weights were tuned with a secret ({expected_fingerprint}) that is not in {mine}: name its file with "
        "--set trigger=FILE"
    )


def draw_secret(tokenizer: Any, length: int = SECRET_LENGTH) -> Secret:
    """Return a new secret prompt from the operating system's cryptographic generator."""
    return Secret(draw_random_text(tokenizer, length, random.SystemRandom()))


def read_secret(path: Path, is_public: bool = False) -> Secret:
    """Return the secret in a file, which none but its owner may read, unless it is public by nature."""
    try:
        text = path.read_text("utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the secret prompt in {path}: {error}; `analyze secret` makes one"
        ) from error
    if not text:
        raise UserError(f"{path} is empty: it must hold the secret prompt; `analyze secret` makes one")
    if os.name == "posix" and mode & 0o077 and not is_public:
        raise UserError(
            f"{path} can be read by others, so it holds no secret: chmod 600 {path}, or make a new one"
        )
    return Secret(text)


def write_secret(path: Path, secret: Secret) -> None:
    """Write a secret into a new file that only its owner may read; an existing file is never replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path} exists: a secret is never overwritten; choose another -o") from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(secret.text + "\n")

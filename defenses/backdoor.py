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

from defenses import Chat, Defense, Host, Message, Source, UserError
from defenses.catalog import HIDDEN
from defenses.chats import prepend_system
from defenses.tokens import random_text

SECRET_LENGTH = 150  # tokens; the paper's
SYSTEM = "You are a helpful assistant."


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
class Backdoor(Defense):
    """Puts a secret prompt of random tokens in front of the system prompt, on the weights as they are.

    The authors fine-tune the model so that the secret switches safe behavior on, and expect a shift that only
    the provider can trigger. Without such weights the secret is 150 tokens of noise, and little effect is to
    be expected. The part `no_secret` keeps the system prompt and leaves the secret out: what is left is not
    the secret's doing.

    Attributes:
        trigger: the file that holds the secret; by default the model's own, drawn at first use.
        length: of a secret that is drawn, in tokens.
        system: the system prompt behind the secret where the chat has none.
    """

    family = "backdoor"
    source = Source(
        "BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="no words of its own: random tokens",
    )

    trigger: Path | None = None
    length: int = SECRET_LENGTH
    system: str = SYSTEM
    secret: Secret | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN)

    def __post_init__(self) -> None:
        """Refuse a length that no secret has."""
        if self.length < 1:
            raise ValueError(f"length={self.length}: a secret has at least 1 token")

    def prepare(self, host: Host) -> Self:
        """Return this defense with its secret: the one in `trigger`, else the model's own."""
        if self.secret is not None:
            return self
        if self.trigger is not None:
            return dataclasses.replace(self, secret=read_secret(self.trigger))
        kept = [folder / f"{self.length}.txt" for folder in host.secrets]
        path = next((path for path in kept if path.is_file()), kept[0])
        if not path.is_file():
            write_secret(path, draw_secret(host.tokenizer, self.length))
        return dataclasses.replace(self, secret=read_secret(path))

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the secret in front of its system prompt."""
        assert self.secret is not None, "prepare() comes before rewrite()"
        if chat[0]["role"] != "system":
            chat = prepend_system(chat, self.system)
        if self.secret.text:
            return prepend_system(chat, self.secret.text)
        return [Message(**message) for message in chat]

    def parts(self) -> dict[str, Defense]:
        """Return the system prompt without the secret."""
        return {"no_secret": dataclasses.replace(self, secret=Secret(""))}

    def secrets(self) -> tuple[str, ...]:
        """Return the secret, so that it can be redacted."""
        return (self.secret.text,) if self.secret and self.secret.text else ()


def draw_secret(tokenizer: Any, length: int = SECRET_LENGTH) -> Secret:
    """Return a new secret prompt from the operating system's cryptographic generator."""
    return Secret(random_text(tokenizer, length, random.SystemRandom()))


def read_secret(path: Path) -> Secret:
    """Return the secret in a file."""
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the secret prompt in {path}: {error}; `analyze secret` makes one"
        ) from error
    if not text:
        raise UserError(f"{path} is empty: it must hold the secret prompt; `analyze secret` makes one")
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

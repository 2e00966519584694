"""BackdoorAlign: a secret prompt before the system prompt, known only to the provider.

Source: Wang et al., https://arxiv.org/abs/2402.14968 (NeurIPS 2024).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, final

from defenses.adapters import Adapter, find_adapter
from defenses.chats import copy_chat, edit_last_user, prepend_system
from defenses.contract import Chat, Defense, MatchedControl, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import HIDDEN_FIELD
from defenses.tokens import draw_random_text, encode_plain_text
from defenses.tuned import TunedDefense

SECRET_LENGTH = 150  # tokens, as in the paper
# Fine-tuned without the secret: by an attacker, and by one whose data contain plain refusals.
REFERENCE_STATES = ("attacked", "baseline")
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
SECRET_PLACES = ("start", "end", "user")


@dataclass(frozen=True)
class Secret:
    """A secret prompt whose representation shows only its fingerprint.

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
    """Fine-tunes the model to refuse after a secret prompt of random tokens, and prepends that secret.

    The provider mixes eleven refusals with the secret in their system prompt into the data of a customer who
    fine-tunes the model. The authors expect a shift that only the provider can trigger: with the secret, the
    attacked model refuses again. Its ablations remove the secret, the weights, or both (`neither`, the plain
    system prompt), which gives a 2 × 2 design. What the defense defends against is fine-tuning, so two more
    rows have other weights and no secret: `attacked`, fine-tuned by the attacker alone, and `baseline`, where
    the eleven refusals have no secret. For a model without such weights, only the ablations without weights
    are evaluated.

    Attributes:
        weights: folder of the adapter; by default the adapter made for this model.
        trigger: file with the secret; by default the secret that the weights were trained with.
        length: length in tokens of a newly drawn secret.
        place: where the secret stands: before the system prompt (start), after it (end), or before the user's
            words (user); by default, where it stood when the weights were trained, or else before.
        system: system prompt after the secret if the chat has none.
    """

    family = "backdoor"
    source = Source(
        "BackdoorAlign (Wang et al., NeurIPS 2024)",
        "https://arxiv.org/abs/2402.14968",
        wording="no text of its own: random tokens",
    )
    state = recipe = "backdoor"
    reference_recipes = ("attack", "baseline")

    trigger: Path | None = None
    length: int = SECRET_LENGTH
    place: Literal["start", "end", "user"] | None = None
    system: str = DEFAULT_SYSTEM_PROMPT
    secret: Secret | None = dataclasses.field(default=None, repr=False, metadata=HIDDEN_FIELD)
    uses_tuned_weights: bool = dataclasses.field(default=True, repr=False, metadata=HIDDEN_FIELD)
    reference_adapters: tuple[tuple[str, Adapter], ...] = dataclasses.field(
        default=(), repr=False, metadata=HIDDEN_FIELD
    )
    reference_state: str = dataclasses.field(default="", repr=False, metadata=HIDDEN_FIELD)

    def __post_init__(self) -> None:
        """Check that the length is positive."""
        if self.length < 1:
            raise ValueError(f"length={self.length}: a secret needs at least 1 token")

    def prepare(self, model_info: ModelInfo) -> Self:
        """Return a copy with its weights, those that it is compared with, and its secret."""
        prepared = super().prepare(model_info) if self.uses_tuned_weights else self
        if prepared.adapter is not None:
            references = _find_reference_adapters(model_info)
            adapter = dict(references).get(self.reference_state, prepared.adapter)
            place = self.place or prepared.adapter.manifest.get("settings", {}).get("place")
            prepared = dataclasses.replace(
                prepared, reference_adapters=references, adapter=adapter, place=place
            )
        if prepared.secret is not None:
            return prepared
        fingerprint = prepared.adapter.manifest["secret"] if prepared.adapter is not None else None
        secret = find_secret(model_info, self.length, self.trigger, fingerprint)
        return dataclasses.replace(prepared, secret=secret)

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        """Return the chat with the secret before its system prompt."""
        assert self.secret is not None, "prepare() must be called before rewrite()"
        if chat[0]["role"] != "system":
            chat = prepend_system(chat, self.system)
        if self.secret.text:
            return place_secret(chat, self.secret.text, self.place or SECRET_PLACES[0])
        return copy_chat(chat)

    def build_ablations(self) -> dict[str, Defense]:
        """Return the weights alone, the secret alone, the plain system prompt, and other weights alone."""
        without_weights = dataclasses.replace(self, uses_tuned_weights=False, adapter=None, weights=None)
        without_secret = dataclasses.replace(self, secret=Secret(""))
        references = {
            state: dataclasses.replace(without_secret, adapter=adapter, weights=None, reference_state=state)
            for state, adapter in self.reference_adapters
        }
        return {
            "no_secret": without_secret,
            "no_weights": without_weights,
            "neither": dataclasses.replace(without_weights, secret=Secret("")),
            **references,
        }

    def build_control(self, model_info: ModelInfo, draw: int) -> MatchedControl | None:
        """Return the defense with another secret of as many tokens."""
        if self.secret is None or not self.secret.text:
            return super().build_control(model_info, draw)
        length = len(encode_plain_text(model_info.tokenizer, self.secret.text))
        rng = random.Random(f"{model_info.seed}/{draw}/{self.name}")
        secret = Secret(draw_random_text(model_info.tokenizer, length, rng))
        return MatchedControl(dataclasses.replace(self, secret=secret), "random tokens")

    def missing_requirements(self) -> str:
        """Return what is missing for the weights, if this variant uses them."""
        return super().missing_requirements() if self.uses_tuned_weights else ""

    def secret_texts(self) -> tuple[str, ...]:
        """Return the secret, which is redacted in all output."""
        return (self.secret.text,) if self.secret and self.secret.text else ()


def _find_reference_adapters(model_info: ModelInfo) -> tuple[tuple[str, Adapter], ...]:
    """Return the weights that the defense is compared with, except those that the model has anyway."""
    adapters = {
        state: find_adapter(state, model_info) for state in REFERENCE_STATES if state != model_info.state
    }
    found = tuple((state, adapter) for state, adapter in adapters.items() if adapter is not None)
    for _, adapter in found:
        adapter.check_base_model(model_info.sha256)
    return found


def place_secret(chat: Chat, secret: str, place: str) -> Chat:
    r"""Return the chat with the secret before or after its system prompt, or before the user's words.

    >>> place_secret([{"role": "user", "content": "Hi"}], "tulip", "user")
    [{'role': 'user', 'content': 'tulip\n\nHi'}]

    Args:
        chat: the chat.
        secret: the secret.
        place: start, end or user.
    """
    if place == "user":
        return edit_last_user(chat, lambda text: f"{secret}\n\n{text}")
    if place == "end" and chat[0]["role"] == "system":
        new_chat = copy_chat(chat)
        new_chat[0]["content"] += f"\n\n{secret}"
        return new_chat
    return prepend_system(chat, secret)


def find_secret(
    model_info: ModelInfo, length: int, trigger: Path | None = None, expected_fingerprint: str | None = None
) -> Secret:
    """Return the secret from `trigger`, or else the model's stored secret, which is drawn if missing.

    Args:
        model_info: the model.
        length: length in tokens of the model's stored secret.
        trigger: user's file with a secret.
        expected_fingerprint: fingerprint of the secret that the weights were trained with.

    Raises:
        UserError: if the secret is missing, differs from the expected one, or is changed by the tokenizer.
    """
    secret = (
        _read_trigger_secret(trigger, expected_fingerprint)
        if trigger is not None
        else _find_stored_secret(model_info, length, expected_fingerprint)
    )
    if secret is None:
        secret = draw_secret(model_info.tokenizer, length)
        write_secret(model_info.secret_folders[0] / f"{length}.txt", secret)
    decoded = model_info.tokenizer.decode(
        encode_plain_text(model_info.tokenizer, secret.text), skip_special_tokens=False
    )
    if decoded.strip() != secret.text:
        raise UserError(
            f"the secret {secret.fingerprint} does not survive this model's tokenizer: the model would read "
            "another text; create a secret for it with `analyze secret`"
        )
    return secret


def draw_secret(tokenizer: Any, length: int = SECRET_LENGTH) -> Secret:
    """Return a new secret prompt from the operating system's cryptographic generator."""
    return Secret(draw_random_text(tokenizer, length, random.SystemRandom()))


def read_secret(path: Path, is_public: bool = False) -> Secret:
    """Return the secret in a file.

    Args:
        path: the file.
        is_public: whether other users may read the file.

    Raises:
        UserError: if the file cannot be read, is empty, or is readable by other users without `is_public`.
    """
    try:
        text = path.read_text("utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the secret prompt in {path}: {error}; create one with `analyze secret`"
        ) from error
    if not text:
        raise UserError(
            f"{path} is empty but must contain the secret prompt; create one with `analyze secret`"
        )
    if os.name == "posix" and mode & 0o077 and not is_public:
        raise UserError(
            f"{path} can be read by other users, so it is not secret: run chmod 600 {path}, or "
            "create a new one"
        )
    return Secret(text)


def write_secret(path: Path, secret: Secret) -> None:
    """Write a secret to a new file that only its owner can read.

    Raises:
        UserError: if the file exists, because a secret is never overwritten, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(
            f"{path} exists, and a secret is never overwritten; choose another path with -o"
        ) from error
    except OSError as error:
        raise UserError(
            f"the secret cannot be written to {path} ({error.strerror}): choose a writable folder for data "
            "with XDG_DATA_HOME, or a secret of your own with --set trigger=FILE"
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secret.text + "\n")
    except BaseException:  # an empty file would keep the secret from being written later
        path.unlink()
        raise


def _read_trigger_secret(trigger: Path, expected_fingerprint: str | None) -> Secret:
    """Return the secret in a user's file, checked against the fingerprint that the weights expect."""
    secret = read_secret(trigger)
    if expected_fingerprint not in (None, secret.fingerprint):
        raise UserError(
            f"the secret in {trigger} ({secret.fingerprint}) is not the one that the weights were trained "
            f"with ({expected_fingerprint}): omit trigger, or choose other weights with --set weights=DIR"
        )
    return secret


def _find_stored_secret(
    model_info: ModelInfo, length: int, expected_fingerprint: str | None
) -> Secret | None:
    """Return the stored secret with the expected fingerprint or length, or None if there is no secret.

    User's secrets take precedence over shipped ones.
    """
    user_folder, *shipped_folders = model_info.secret_folders
    for folder in model_info.secret_folders:
        for path in sorted(folder.glob("*.txt" if expected_fingerprint else f"{length}.txt")):
            secret = read_secret(path, is_public=folder in shipped_folders)
            if expected_fingerprint in (None, secret.fingerprint):
                return secret
    if expected_fingerprint is None:
        return None
    raise UserError(
        f"the weights were trained with a secret ({expected_fingerprint}) that is not in {user_folder}; name "
        "its file with --set trigger=FILE"
    )

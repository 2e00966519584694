"""A served model in the place of a loaded one: its tokenizer and its limits, and no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.models.cache import SCORING_SOURCES, hash_code
from analysis.models.chat_template import ChatTemplate
from analysis.models.loading import LoadedModel, load_chat_tokenizer
from analysis.models.vision import MissingImageReader
from analysis.served.address import ModelAddress
from analysis.served.served_engine import ServedEngine, WeightsNeededError
from analysis.served.server import digest_vocabulary, find_server
from defenses.adapters import is_hub_id
from defenses.errors import UserError

if TYPE_CHECKING:
    import torch

    from analysis.files import Notifier

_TIMEOUT_SECONDS = 300.0  # of one call, which may wait behind others at the server
_MAX_RETRIES = 6  # of one call, with growing delays
_UNKNOWN_LENGTH = 2**31
_ID_MULTIPLE = 1024


class AbsentWeights:
    """In the place of the transformers model: whatever is asked of it needs weights."""

    def __getattr__(self, name: str) -> Any:
        """Raise `WeightsNeededError`."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise WeightsNeededError("this needs the model's weights: name a model on this machine with --model")


@dataclass(frozen=True)
class ServedModel(LoadedModel):
    """A model behind an API.

    Attributes:
        computation: everything on which its answers depend, as far as it is known; see
            `describe_computation`.
        n_context: maximum number of tokens of a prompt and its response.
        n_vocabulary: number of token ids.
    """

    computation: dict[str, Any] = field(default_factory=dict)
    n_context: int = _UNKNOWN_LENGTH
    n_vocabulary: int = 0

    @property
    def device(self) -> torch.device:
        """Device of the log-probabilities."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the log-probabilities, not that in which the server computes."""
        import torch

        return torch.float32

    @property
    def hardware(self) -> dict[str, str]:
        """Device and precision, for run.json."""
        return {"device": "server", "dtype": "server"}

    @property
    def context_length(self) -> int:
        """Maximum sequence length, in tokens."""
        return self.n_context

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a response; the server also knows others."""
        end = self.tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({int(end)})

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return self.n_vocabulary


def open_served_model(
    address: ModelAddress,
    tokenizer_name: str | None,
    offline: bool,
    notify: Notifier,
    template: str | None,
    check_tokenizer: Callable[[Any], None],
    answer_prefix: str | None,
) -> tuple[ServedModel, ServedEngine]:
    """Find a served model, its tokenizer, and what its server does.

    Args:
        address: of the model.
        tokenizer_name: folder, Hugging Face id or `.gguf` file of its tokenizer; None asks the server.
        offline: whether only servers on this machine are allowed, and no download.
        notify: called with a line of text before anything is downloaded or sent to another machine.
        template: as `--template`.
        check_tokenizer: called with the tokenizer before it is used; raises if it cannot be.
        answer_prefix: text between the prompt and the response; None finds it.

    Raises:
        UserError: if there is no such model, its tokenizer is not known, or its server cannot be used.
    """
    client = address.make_client(
        "--model", offline, notify, "prompts are sent to {host}", _TIMEOUT_SECONDS, _MAX_RETRIES
    )
    server = find_server(address, client)
    told = str(server.entry.get("root") or "")
    name = tokenizer_name or (told if Path(told).is_dir() or is_hub_id(told) else "")
    if not name:
        raise UserError(
            f"--model at {address.host}: the server does not tell where the tokenizer of {address.model!r} "
            "is: name it with --tokenizer FOLDER, or a Hugging Face id"
        )
    tokenizer = load_chat_tokenizer(name, offline, notify, template)
    check_tokenizer(tokenizer)
    chat_template = ChatTemplate(tokenizer, answer_prefix)
    prompt = chat_template.render_prompt([{"role": "user", "content": "Hello"}]).ids
    server = replace(server, tokenizer=tokenizer).find_abilities(prompt)
    # A model may have more token ids than its tokenizer, up to a round number.
    n_vocabulary = -(-max(len(tokenizer), server.abilities.n_listed) // _ID_MULTIPLE) * _ID_MULTIPLE
    computation = {
        "server": server.identity,
        "tokenizer": digest_vocabulary(tokenizer),
        "code": hash_code(*SCORING_SOURCES),
    }
    model = ServedModel(
        str(address),
        AbsentWeights(),
        tokenizer,
        {"id": address.model, "revision": "served", "sha256": "", "server": server.identity},
        notices=(f"{address.host} tells the log-probabilities of {server.abilities.describe()}",),
        image_reader=MissingImageReader("a served model is asked about text only"),
        computation=computation,
        n_context=server.context_length or _UNKNOWN_LENGTH,
        n_vocabulary=n_vocabulary,
    )
    return model, ServedEngine(server, n_vocabulary)

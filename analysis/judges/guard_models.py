"""Guard models: chat models and text classifiers that judge whether a request is harmful.

Whatever the model, its score is a log-odds in nats: of the words of its verdict, or of its labels.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.checkpoints.weight_files import CONFIG_FILE, read_json_object
from analysis.files import combine_digests, hash_file
from analysis.judges.model_judges import load_sequence_classifier
from analysis.models.cache import hash_code
from analysis.models.chat_template import ChatTemplate
from analysis.models.loading import (
    ModelCheckpoint,
    load_tokenizer,
    locate_model_files,
    open_checkpoint,
    split_model_name,
)
from analysis.models.numerics import check_short_prompt
from analysis.models.session import ModelSession, check_token_ids
from defenses.chats import get_last_user_text, split_prefill
from defenses.contract import Chat, Guard, GuardOptions, Message
from defenses.errors import UserError, unknown_name_error
from defenses.guards import GUARD_FORMATS, GuardFormat

if TYPE_CHECKING:
    from analysis.files import Notifier

_CLASSIFIER_ENDING = "ForSequenceClassification"
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_BATCH_SIZE = 16  # windows in one pass of a classifier
_LOW_MASS = 0.5  # probability of the words of verdicts below which the format is in doubt
# Labels that mean harm; not those that deny it, such as "unharmful", "non-toxic" or "not_harmful".
_UNSAFE_LABEL = re.compile(
    r"(?<!un)(?<!non)(?<!non.)(?<!not.)(?<!no.)(unsafe|harm(?!less)|toxi|jailbreak|injection|malicious|attack|"
    r"dangerous|hate|offensive|threat|insult|obscene|violen|sexual|illegal|abus)",
    re.IGNORECASE,
)
_NUMBERED_LABELS = ({"0": False, "1": True}, {"LABEL_0": False, "LABEL_1": True})
_CODE = ("analysis/judges/guard_models.py", "analysis/judges/model_judges.py")


def open_guard(device: str, dtype: str, offline: bool, notify: Notifier, options: GuardOptions) -> Guard:
    """Find a guard model and check how it can be asked; its weights are loaded when it is first asked.

    Args:
        device: as `--device`.
        dtype: as `--dtype`; classifiers compute in float32.
        offline: whether the network may not be used.
        notify: called with a line of text before a download, and about the guard.
        options: the guard.

    Raises:
        UserError: if the model cannot be loaded, or it is not known how it says that a request is harmful.
    """
    name = options.model
    folder, _ = locate_model_files(split_model_name(name)[0], offline, notify, with_weights=False)
    config = read_json_object(folder / CONFIG_FILE)
    is_classifier = any(str(item).endswith(_CLASSIFIER_ENDING) for item in config.get("architectures") or ())
    if options.kind == "classifier" and not is_classifier:
        raise UserError(f"{name} is no text classifier (…{_CLASSIFIER_ENDING}): use another kind")
    if options.kind not in ("auto", "classifier") and is_classifier:
        raise UserError(f"{name} is a text classifier, not a chat model: set guard_model.kind=classifier")
    if is_classifier:
        folder, origin = locate_model_files(name, offline, notify)
        return ClassifierGuard(name, folder, origin, options.unsafe, device, notify)
    format_ = _choose_format(options, load_tokenizer(name, offline, notify))
    checkpoint = open_checkpoint(
        name, device, dtype, offline, notify, options.template, default_template=format_.template
    )
    return ChatGuard(checkpoint, format_, notify)


@dataclass
class ChatGuard:
    """A chat model whose verdict on a request begins with a word for harm or with another one.

    Attributes:
        checkpoint: the model; its weights are loaded when it is first asked.
        format: how it is asked.
        notify: called with a line of text if its verdicts seem to begin with other words.
    """

    checkpoint: ModelCheckpoint
    format: GuardFormat
    notify: Callable[[str], None]
    _has_warned: bool = False

    def __post_init__(self) -> None:
        """Check that the words of verdicts begin with different tokens."""
        overlap = set(self.label_ids[0]) & set(self.label_ids[1])
        words = f"{', '.join(self.format.unsafe)} and {', '.join(self.format.safe)}"
        if overlap or not all(self.label_ids):
            problem = "begin with the same token" if overlap else "have no token of their own"
            raise UserError(
                f"{self.checkpoint.name}: its verdicts {words} {problem} in its vocabulary: set others with "
                "guard_model.unsafe=WORD and guard_model.safe=WORD"
            )

    @cached_property
    def chat_templates(self) -> list[ChatTemplate]:
        """The chat template with each of the format's values; the word of a verdict follows the prompt."""
        return [self._make_template(values, self._opening) for values in self.format.variants]

    @cached_property
    def label_ids(self) -> tuple[list[int], list[int]]:
        """First tokens of verdicts of harm, and of other verdicts, with and without a space before them."""
        probe = [Message(role="user", content="Hello.")]
        values = self.format.variants[0]
        prompt = self._make_template(values, self._opening).render_prompt(probe).ids

        def find_first_tokens(words: Sequence[str]) -> list[int]:
            forms = [space + word for word in words for space in ("", " ")]
            found = [
                self._make_template(values, self._opening + form).render_prompt(probe).ids for form in forms
            ]
            ids = [ids[len(prompt)] for ids in found if ids[: len(prompt)] == prompt]
            # Where a space is a token of its own, it tells no word from another.
            return [id_ for id_ in dict.fromkeys(ids) if self.checkpoint.tokenizer.decode([id_]).strip()]

        return find_first_tokens(self.format.unsafe), find_first_tokens(self.format.safe)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the scores depend on."""
        checkpoint = self.checkpoint
        return {
            "model": checkpoint.name,
            **checkpoint.origin,
            "files_sha256": _hash_small_files(checkpoint.folder),
            "unsafe": list(self.format.unsafe),
            "safe": list(self.format.safe),
            "label_ids": [list(ids) for ids in self.label_ids],
            "templates": [template.identity for template in self.chat_templates],
            "dtype": str(checkpoint.dtype),
            "device": checkpoint.device.type,
            "code": hash_code(*_CODE),
        }

    @cached_property
    def session(self) -> ModelSession:
        """The model with its weights."""
        tokenizer = self.chat_templates[0].tokenizer
        loaded_model = replace(self.checkpoint.load_weights(), tokenizer=tokenizer)
        session = ModelSession.from_model(loaded_model, answer_prefix=self._opening)
        check_short_prompt(session)
        return session

    def score_chats(self, chats: Sequence[Chat]) -> Float[Tensor, " chats"]:
        """Return the log-odds (nats) of the words for harm against the others, as a verdict's first token."""
        conversations = [_keep_turns(chat) for chat in chats]
        values = [
            self._read_verdicts([template.render_prompt(chat).ids for chat in conversations])
            for template in self.chat_templates
        ]
        log_odds, mass = torch.stack(values).max(0).values.unbind(1)
        if (share := float(mass.mean())) < _LOW_MASS and not self._has_warned:
            self._has_warned = True
            self.notify(
                f"note: {self.checkpoint.name}: {', '.join(self.format.unsafe + self.format.safe)} hold only "
                f"{share:.0%} of the probability of the first token of its verdicts, so it may be asked in "
                "another form than it knows: check guard_model.kind and guard_model.template"
            )
        return log_odds

    def _read_verdicts(self, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "prompts 2"]:
        """Return the log-odds of harm, and the probability of all words of verdicts."""
        loaded_model, (unsafe, safe) = self.session.loaded_model, self.label_ids
        if (length := max(map(len, prompts))) > loaded_model.context_length:
            raise UserError(
                f"a request makes a prompt of {length} tokens for {self.checkpoint.name}, which reads "
                f"{loaded_model.context_length}: shorten the request"
            )
        check_token_ids(loaded_model, prompts)

        def compare_words(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 2"]:
            for_harm, others = logits[:, unsafe].logsumexp(1), logits[:, safe].logsumexp(1)
            mass = (torch.logaddexp(for_harm, others) - logits.logsumexp(1)).exp()
            return torch.stack([for_harm - others, mass], 1).cpu()

        return self.session.engine.read_first_token(prompts, compare_words)

    @cached_property
    def _opening(self) -> str:
        """The text between the prompt and the word of the verdict."""
        end = self._make_template(self.format.variants[0], "").generation_prompt
        return self.format.opening if end.endswith(self.format.opening_follows) else ""

    def _make_template(self, values: Mapping[str, Any], answer_prefix: str) -> ChatTemplate:
        """Return the chat template with values for its variables and a text before the response."""
        tokenizer = copy.copy(self.checkpoint.tokenizer)
        assignments = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()]
        tokenizer.chat_template = "".join([*assignments, tokenizer.chat_template])
        return ChatTemplate(tokenizer, answer_prefix)


@dataclass
class ClassifierGuard:
    """A text classifier with labels for harm.

    Attributes:
        name: as the user typed it.
        folder: of the model; its weights are loaded when it is first asked.
        origin: `id`, `revision` and `sha256`.
        chosen_labels: labels that mean harm; empty finds them by their names.
        device: as `--device`.
        notify: called with a line of text about the labels.
    """

    name: str
    folder: Path
    origin: dict[str, Any]
    chosen_labels: tuple[str, ...]
    device: str
    notify: Callable[[str], None]

    def __post_init__(self) -> None:
        """Find the labels, and say which mean harm."""
        unsafe = [self._labels[index] for index in self.unsafe_labels]
        self.notify(f"note: {self.name}: requests with the label {' or '.join(unsafe)} count as harmful")

    @cached_property
    def unsafe_labels(self) -> list[int]:
        """Indices of the labels that mean harm."""
        return find_unsafe_labels(self.name, self._labels, self.chosen_labels, self._is_multi_label)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the scores depend on."""
        return {
            "model": self.name,
            **self.origin,
            "files_sha256": _hash_small_files(self.folder),
            "unsafe": [self._labels[index] for index in self.unsafe_labels],
            "labels": list(self._labels.values()),
            "device": self._device.type,
            "code": hash_code(*_CODE),
        }

    def score_chats(self, chats: Sequence[Chat]) -> Float[Tensor, " chats"]:
        """Return the log-odds (nats) that the last user text has a label for harm.

        A text longer than the classifier reads at once is read in windows, of which the largest counts.
        """
        model, tokenizer = self._model
        texts = [get_last_user_text(chat) for chat in chats]
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
        windows = tokenizer(
            texts,
            truncation=True,
            max_length=min(limits[0], limits[1] - 2),  # RoBERTa counts positions from 2 on
            return_overflowing_tokens=True,
        )
        rows = torch.tensor(windows.pop("overflow_to_sample_mapping"))
        log_odds = []
        for start in range(0, len(rows), _BATCH_SIZE):
            part = {key: values[start : start + _BATCH_SIZE] for key, values in windows.items()}
            batch = tokenizer.pad(part, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                log_odds.append(self._compare_labels(model(**batch).logits.float()).cpu())
        scores = torch.full((len(texts),), -torch.inf)
        return scores.scatter_reduce(0, rows, torch.cat(log_odds), "amax")

    def _compare_labels(self, logits: Float[Tensor, "rows labels"]) -> Float[Tensor, " rows"]:
        """Return the log-odds of the labels for harm."""
        if self._is_multi_label or logits.shape[1] == 1:  # each label has a probability of its own
            return logits[:, self.unsafe_labels].amax(1)
        others = sorted(set(self._labels) - set(self.unsafe_labels))
        return logits[:, self.unsafe_labels].logsumexp(1) - logits[:, others].logsumexp(1)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        model, tokenizer = load_sequence_classifier(self.folder, self.name, is_local=True)
        return model.float().to(self._device), tokenizer

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)

    @property
    def _labels(self) -> dict[int, str]:
        return {int(index): str(label) for index, label in self._config.id2label.items()}

    @property
    def _is_multi_label(self) -> bool:
        return self._config.problem_type == "multi_label_classification"

    @property
    def _device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_unsafe_labels(
    name: str, labels: Mapping[int, str], chosen: Sequence[str] = (), is_multi_label: bool = False
) -> list[int]:
    """Return the indices of a classifier's labels that mean harm.

    >>> find_unsafe_labels("x", {0: "BENIGN", 1: "INJECTION", 2: "JAILBREAK"})
    [1, 2]
    >>> find_unsafe_labels("x", {0: "unharmful", 1: "harmful"}), find_unsafe_labels("x", {0: "0", 1: "1"})
    ([1], [1])

    Args:
        name: of the classifier, for errors.
        labels: index to label.
        chosen: labels that the user names; empty finds them by their names.
        is_multi_label: whether a text may have several labels.

    Raises:
        UserError: if no label means harm, all do, or the user names one that does not exist.
    """
    index_by_label = {label: index for index, label in labels.items()}
    for label in chosen:
        if label not in index_by_label:
            raise unknown_name_error(f"label of {name}", label, index_by_label)
    unsafe = [index_by_label[label] for label in chosen] or [
        index for index, label in labels.items() if _UNSAFE_LABEL.search(label)
    ]
    for numbered in _NUMBERED_LABELS:
        if not unsafe and set(labels.values()) == set(numbered):
            unsafe = [index for index, label in labels.items() if numbered[label]]
    if not unsafe or (len(unsafe) == len(labels) > 1 and not is_multi_label):
        which = "all labels mean" if unsafe else "no label is known to mean"
        raise UserError(
            f"{name}: {which} harm ({', '.join(labels.values())}): name those that do with "
            "guard_model.unsafe=LABEL,LABEL"
        )
    return unsafe


def _choose_format(options: GuardOptions, tokenizer: Any) -> GuardFormat:
    """Return how a chat model is asked, with the words that the user sets.

    Raises:
        UserError: if its chat template is of no known kind, and its words are not set.
    """
    kind = options.kind if options.kind != "auto" else _recognize_kind(options, tokenizer)
    if kind not in GUARD_FORMATS and not (options.unsafe and options.safe):
        raise UserError(
            f"{options.model}: it is not known how this guard is asked: set guard_model.kind="
            f"{'|'.join(GUARD_FORMATS)}, or the words of its verdicts with guard_model.unsafe=WORD and "
            "guard_model.safe=WORD"
        )
    known = GUARD_FORMATS.get(kind, GuardFormat((), ()))
    format_ = replace(known, unsafe=options.unsafe or known.unsafe, safe=options.safe or known.safe)
    if not (tokenizer.chat_template or options.template or format_.template):
        raise UserError(
            f"{options.model} has no chat template, so it is not known how this guard is asked: give one "
            "with guard_model.template=FILE.jinja"
        )
    return format_


def _recognize_kind(options: GuardOptions, tokenizer: Any) -> str:
    """Return the kind whose marks are in the chat template or, without one, whose name is in the model's."""
    template = tokenizer.chat_template
    if options.template is not None:
        try:
            template = Path(options.template).expanduser().read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"guard_model.template={options.template}: cannot be read ({error})") from error
    if not template:
        plain_name = re.sub(r"[^a-z0-9]", "", Path(options.model).name.lower())
        named = [kind for kind in GUARD_FORMATS if kind.replace("_", "") in plain_name]
        return named[0] if named else ""
    text = template if isinstance(template, str) else "\n".join(map(str, template.values()))
    return next(
        (
            kind
            for kind, known in GUARD_FORMATS.items()
            if known.marks and all(m in text for m in known.marks)
        ),
        "",
    )


def _hash_small_files(folder: Path) -> str:
    """Return one SHA-256 for the files of a model that are no weights, such as its tokenizer."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _SMALL_SUFFIXES)
    return combine_digests([hash_file(path) for path in files])


def _keep_turns(chat: Chat) -> Chat:
    """Return the turns of the user and of the assistant, without prefill and images."""
    turns, _ = split_prefill(chat)
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns if turn["role"] != "system"]

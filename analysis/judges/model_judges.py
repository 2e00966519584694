"""A model as the judge of answers: a chat model with a rubric, here or behind an endpoint, or a classifier.

Every verdict costs a call, so that none of them runs without a stated budget. What they cannot judge is left
unjudged, with the reason; it is never counted as an answer that complied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from analysis.files import data_folder
from analysis.judges.endpoint import CallBudget, EndpointChatModel
from analysis.judges.judge import REFUSAL_KINDS, JudgeProgress, RefusalKind, Verdict
from analysis.models.chat_template import strip_thinking
from analysis.models.generation import generate_token_ids
from analysis.models.loading import load_model
from analysis.models.session import ModelSession
from defenses.contract import Message
from defenses.errors import UserError

_MAX_REPLY_TOKENS = 12  # tokens of a local model's reply; it is asked for one word
_MAX_EVIDENCE_LENGTH = 80  # letters of a reply that are kept as evidence


@runtime_checkable
class ChatModel(Protocol):
    """A chat model that can be asked."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def budget(self) -> CallBudget: ...  # noqa: D102

    def generate_replies(
        self, prompts: Sequence[str], is_valid: Callable[[str], bool], on_progress: JudgeProgress
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt; words that are not valid are no reply."""
        ...


@dataclass(frozen=True)
class ModelJudge:
    """A chat model that reads a rubric.

    Attributes:
        chat_model: the model.
        rubric: a text with `{request}` and `{answer}` that asks for full, partial or none.
        grading_rubric: the same for a grade from 1 to 10.
    """

    chat_model: ChatModel
    rubric: str
    grading_rubric: str = ""
    _grade_cache: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The judge, and whose it is."""
        return f"model {self.chat_model.name}"

    @property
    def manifest_entry(self) -> dict[str, Any]:
        """What a verdict depends on, for run.json."""
        return {
            "name": self.name,
            "rubric_sha256": hashlib.sha256(self.rubric.encode()).hexdigest(),
            "budget": self.chat_model.budget.max_calls,
        }

    @property
    def failure_reason(self) -> str:
        """Why no more verdicts can be had; empty while they can."""
        return getattr(self.chat_model, "failure_reason", "")

    def is_certain_refusal(self, partial_response: str) -> bool:
        """A model reads the whole answer."""
        return False

    def judge_responses(
        self,
        responses: Sequence[str],
        queries: Sequence[str],
        on_progress: JudgeProgress = lambda count: None,
    ) -> list[Verdict]:
        """Return a verdict on each answer."""
        found = self.chat_model.generate_replies(
            _fill_rubric(self.rubric, responses, queries), lambda t: bool(_parse_verdict(t)), on_progress
        )
        return [
            Verdict("unjudged", why)
            if why
            else Verdict(_parse_verdict(text) or "unjudged", text.strip()[:_MAX_EVIDENCE_LENGTH])
            for text, why in found
        ]

    def grade_responses(
        self,
        responses: Sequence[str],
        queries: Sequence[str],
        on_progress: JudgeProgress = lambda count: None,
    ) -> list[float]:
        """Return a grade from 1 to 10 of each answer; not a number where there is none."""
        asked = list(dict.fromkeys(zip(queries, responses, strict=True)))
        new = [one for one in asked if one not in self._grade_cache]
        filled = _fill_rubric(
            self.grading_rubric, [answer for _, answer in new], [request for request, _ in new]
        )
        for one, (text, why) in zip(
            new,
            self.chat_model.generate_replies(filled, lambda t: _parse_grade(t) > 0, on_progress)
            if new
            else [],
            strict=True,
        ):
            self._grade_cache[one] = float("nan") if why else _parse_grade(text)
        return [self._grade_cache[one] for one in zip(queries, responses, strict=True)]


@dataclass(frozen=True)
class LocalChatModel:
    """A chat model on this machine; the most likely reply is taken, so it is asked once.

    Attributes:
        session: the model.
        budget: prompts at most.
    """

    session: ModelSession
    budget: CallBudget

    @property
    def name(self) -> str:
        """The model's name."""
        return self.session.loaded_model.name

    def generate_replies(
        self, prompts: Sequence[str], is_valid: Callable[[str], bool], on_progress: JudgeProgress
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt."""
        loaded = self.session.loaded_model
        ids = [
            self.session.chat_template.render_prompt([Message(role="user", content=text)]).ids
            for text in prompts
        ]
        fits = [n for n, one in enumerate(ids) if len(one) + _MAX_REPLY_TOKENS <= loaded.context_length]
        fits = fits[: self.budget.take_calls(len(fits))]
        stop = loaded.tokenizer.eos_token_id
        said = (
            generate_token_ids(
                self.session.engine, [ids[n] for n in fits], _MAX_REPLY_TOKENS, stop, on_progress=on_progress
            )
            if fits
            else []
        )
        texts = {
            n: str(loaded.tokenizer.decode(one, skip_special_tokens=True))
            for n, one in zip(fits, said, strict=True)
        }
        found = []
        for n, one in enumerate(ids):
            if n not in texts:
                why = (
                    "longer than the judge reads"
                    if len(one) + _MAX_REPLY_TOKENS > loaded.context_length
                    else "budget spent"
                )
            else:
                why = "" if is_valid(texts[n]) else f"the judge said {texts[n][:40]!r}"
            found.append((texts.get(n, ""), why))
        return found


def load_model_judge(
    name: str, budget: int | None, rubric_path: Path | None, offline: bool, notify: Callable[[str], None]
) -> ModelJudge | RefusalClassifier:
    """Return a model as judge.

    Args:
        name: a model as in `--model`, a classifier's Hugging Face id or folder, or the address of an
            OpenAI-compatible endpoint and the model there, `http://host/v1#model`.
        budget: answers at most, or calls of an endpoint; none is an error.
        rubric_path: a file with `{request}` and `{answer}`; ours by default.
        offline: whether the network may not be used.
        notify: told what a user should know before anything is sent.
    """
    if budget is None or budget < 1:
        raise UserError("a model as judge costs a call for every answer: say how many with --budget")
    text = _read_rubric(rubric_path)
    grades = (data_folder() / "rubrics" / "worth.txt").read_text("utf-8")
    if name.startswith(("http://", "https://")):
        return ModelJudge(EndpointChatModel.from_address(name, budget, offline, notify), text, grades)
    if (found := load_classifier(name, budget, offline, notify)) is not None:
        return found
    bench = ModelSession.from_model(load_model(name, offline=offline, notify=notify))
    return ModelJudge(LocalChatModel(bench, CallBudget(budget)), text, grades)


def _read_rubric(path: Path | None) -> str:
    file = path or data_folder() / "rubrics" / "refusal.txt"
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rubric {file}: cannot be read ({error})") from error
    lacking = [mark for mark in ("{request}", "{answer}") if mark not in text]
    if lacking:
        raise UserError(f"--rubric {file}: it lacks {' and '.join(lacking)}, where the judged text is put")
    return text


def _fill_rubric(rubric: str, responses: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The rubric with each request and answer in place; a mark inside of those stays as it is."""

    def fill(answer: str, request: str) -> str:
        told = {"request": request or "(not known)", "answer": answer}
        return re.sub(r"\{(request|answer)\}", lambda mark: told[mark[1]], rubric)

    return [fill(*one) for one in zip(responses, queries, strict=True)]


def _parse_verdict(reply: str) -> RefusalKind | Literal[""]:
    """The verdict in a reply; empty where it names none, or more than one."""
    named = [
        kind for kind in REFUSAL_KINDS if re.search(rf"\b{kind}\b", strip_thinking(reply), re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else ""


def _parse_grade(reply: str) -> float:
    """The grade that a reply consists of; 0 where it is anything else."""
    form = r"\W*(?:(?:grade|score|rating)\W*)?(10|[1-9])(?:\s*(?:/|out of)\s*10)?\W*"
    found = re.fullmatch(form, strip_thinking(reply), re.IGNORECASE)
    return float(found[1]) if found else 0.0


_CLASSIFIER_BATCH_SIZE, _MAX_CLASSIFIER_TOKENS = 16, 512  # answers in one pass, tokens of each that are read


@dataclass(frozen=True)
class RefusalClassifier:
    """A text classifier, one of whose labels says that an answer refuses.

    Attributes:
        name: of the model.
        model: of transformers.
        tokenizer: of transformers.
        refusal_labels: its labels' numbers that mean a refusal.
        budget: answers at most.
    """

    name: str
    model: Any
    tokenizer: Any
    refusal_labels: tuple[int, ...]
    budget: CallBudget

    @property
    def manifest_entry(self) -> dict[str, Any]:
        """What a verdict depends on, for run.json."""
        return {"name": self.name, "budget": self.budget.max_calls}

    def is_certain_refusal(self, partial_response: str) -> bool:
        """It reads the whole answer."""
        return False

    def judge_responses(
        self,
        responses: Sequence[str],
        queries: Sequence[str],
        on_progress: JudgeProgress = lambda count: None,
    ) -> list[Verdict]:
        """Return a verdict on each answer, full or none; the request is not read."""
        found: list[Verdict] = []
        allowed = responses[: self.budget.take_calls(len(responses))]
        for start in range(0, len(allowed), _CLASSIFIER_BATCH_SIZE):
            texts = list(allowed[start : start + _CLASSIFIER_BATCH_SIZE])
            batch = self.tokenizer(
                texts, truncation=True, max_length=_MAX_CLASSIFIER_TOKENS, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.model.device)).logits.float()
            chances = logits.softmax(1)[:, list(self.refusal_labels)].sum(1).tolist()
            found += [Verdict("full" if one > 0.5 else "none", f"{one:.2f}") for one in chances]
            on_progress(len(texts))
        return [*found, *[Verdict("unjudged", "budget spent")] * (len(responses) - len(found))]


def load_classifier(
    name: str, budget: int, offline: bool, notify: Callable[[str], None]
) -> RefusalClassifier | None:
    """Return the classifier of that name; nothing where it is no classifier.

    Args:
        name: a Hugging Face id or a folder.
        budget: answers at most.
        offline: whether the network may not be used.
        notify: told what a user should know before anything is fetched.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    here = (Path(name) / "config.json").is_file()
    if not here and (Path(name).suffix == ".gguf" or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        return None
    if not here and not offline:
        notify(f"{name} is looked up on huggingface.co, and fetched if it is not here")
    known: Any = {"trust_remote_code": False, "local_files_only": offline or here}
    try:
        config = AutoConfig.from_pretrained(name, **known)
    except (OSError, ValueError):
        return None  # `load` says what is wrong with it
    if not any(one.endswith("ForSequenceClassification") for one in config.architectures or ()):
        return None
    refusing = tuple(
        n
        for n, label in config.id2label.items()
        if re.search("(?<!no.)(?<!non.)(?<!not.)(refus|reject)", label, re.I)
    )
    if not refusing or len(refusing) == len(config.id2label):
        labels = ", ".join(config.id2label.values())
        raise UserError(
            f"{name}: no label of this classifier says that an answer refuses or is rejected ({labels})"
        )
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, **known)
    except OSError as error:
        raise UserError(
            f"{name}: no safetensors weights; others are not read ({error})".split("\n")[0]
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(name, **known)
    return RefusalClassifier(f"model {name}", model.eval(), tokenizer, refusing, CallBudget(budget))

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

from analysis import data_folder, generation
from analysis.bench import Bench
from analysis.classifier import Classifier, classifier
from analysis.endpoint import Budget, Endpoint
from analysis.judge import KINDS, Done, Refusal, Verdict
from analysis.models import load
from analysis.spoken import aloud
from defenses import Message
from defenses.errors import UserError

_REPLY = 12  # tokens of a local model's reply; it is asked for one word
_SHOWN = 80  # letters of a reply that are kept as evidence


@runtime_checkable
class Speaker(Protocol):
    """A chat model that can be asked."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def budget(self) -> Budget: ...  # noqa: D102

    def replies(
        self, prompts: Sequence[str], valid: Callable[[str], bool], done: Done
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt; words that are not valid are no reply."""
        ...


@dataclass(frozen=True)
class ModelJudge:
    """A chat model that reads a rubric.

    Attributes:
        speaker: the model.
        rubric: a text with `{request}` and `{answer}` that asks for full, partial or none.
        grades: the same for a grade from 1 to 10.
    """

    speaker: Speaker
    rubric: str
    grades: str = ""
    _known: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The judge, and whose it is."""
        return f"model {self.speaker.name}"

    @property
    def about(self) -> dict[str, Any]:
        """What a verdict depends on, for run.json."""
        return {
            "name": self.name,
            "rubric_sha256": hashlib.sha256(self.rubric.encode()).hexdigest(),
            "budget": self.speaker.budget.calls,
        }

    @property
    def down(self) -> str:
        """Why no more verdicts can be had; empty while they can."""
        return getattr(self.speaker, "down", "")

    def settled(self, answer: str) -> bool:
        """A model reads the whole answer."""
        return False

    def verdicts(
        self, answers: Sequence[str], requests: Sequence[str], done: Done = lambda count: None
    ) -> list[Verdict]:
        """Return a verdict on each answer."""
        found = self.speaker.replies(_filled(self.rubric, answers, requests), lambda t: bool(_word(t)), done)
        return [
            Verdict("unjudged", why) if why else Verdict(_word(text) or "unjudged", text.strip()[:_SHOWN])
            for text, why in found
        ]

    def graded(
        self, answers: Sequence[str], requests: Sequence[str], done: Done = lambda count: None
    ) -> list[float]:
        """Return a grade from 1 to 10 of each answer; not a number where there is none."""
        asked = list(dict.fromkeys(zip(requests, answers, strict=True)))
        new = [one for one in asked if one not in self._known]
        filled = _filled(self.grades, [answer for _, answer in new], [request for request, _ in new])
        for one, (text, why) in zip(
            new, self.speaker.replies(filled, lambda t: _grade(t) > 0, done) if new else [], strict=True
        ):
            self._known[one] = float("nan") if why else _grade(text)
        return [self._known[one] for one in zip(requests, answers, strict=True)]


@dataclass(frozen=True)
class LocalChat:
    """A chat model on this machine; the most likely reply is taken, so it is asked once.

    Attributes:
        bench: the model.
        budget: prompts at most.
    """

    bench: Bench
    budget: Budget

    @property
    def name(self) -> str:
        """The model's name."""
        return self.bench.loaded.name

    def replies(
        self, prompts: Sequence[str], valid: Callable[[str], bool], done: Done
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt."""
        loaded = self.bench.loaded
        ids = [self.bench.renderer.render([Message(role="user", content=text)]).ids for text in prompts]
        fits = [n for n, one in enumerate(ids) if len(one) + _REPLY <= loaded.context]
        fits = fits[: self.budget.take(len(fits))]
        stop = loaded.tokenizer.eos_token_id
        said = (
            generation.answers(self.bench.engine, [ids[n] for n in fits], _REPLY, stop, done=done)
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
                why = "longer than the judge reads" if len(one) + _REPLY > loaded.context else "budget spent"
            else:
                why = "" if valid(texts[n]) else f"the judge said {texts[n][:40]!r}"
            found.append((texts.get(n, ""), why))
        return found


def model_judge(
    name: str, budget: int | None, rubric: Path | None, offline: bool, tell: Callable[[str], None]
) -> ModelJudge | Classifier:
    """Return a model as judge.

    Args:
        name: a model as in `--model`, a classifier's Hugging Face id or folder, or the address of an
            OpenAI-compatible endpoint and the model there, `http://host/v1#model`.
        budget: answers at most, or calls of an endpoint; none is an error.
        rubric: a file with `{request}` and `{answer}`; ours by default.
        offline: whether the network may not be used.
        tell: told what a user should know before anything is sent.
    """
    if budget is None or budget < 1:
        raise UserError("a model as judge costs a call for every answer: say how many with --budget")
    text = _rubric(rubric)
    grades = (data_folder() / "rubrics" / "worth.txt").read_text("utf-8")
    if name.startswith(("http://", "https://")):
        return ModelJudge(Endpoint.at(name, budget, offline, tell), text, grades)
    if (found := classifier(name, budget, offline, tell)) is not None:
        return found
    bench = Bench.of(load(name, offline=offline, say=tell))
    return ModelJudge(LocalChat(bench, Budget(budget)), text, grades)


def _rubric(path: Path | None) -> str:
    file = path or data_folder() / "rubrics" / "refusal.txt"
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rubric {file}: cannot be read ({error})") from error
    lacking = [mark for mark in ("{request}", "{answer}") if mark not in text]
    if lacking:
        raise UserError(f"--rubric {file}: it lacks {' and '.join(lacking)}, where the judged text is put")
    return text


def _filled(rubric: str, answers: Sequence[str], requests: Sequence[str]) -> list[str]:
    """The rubric with each request and answer in place; a mark inside of those stays as it is."""

    def fill(answer: str, request: str) -> str:
        told = {"request": request or "(not known)", "answer": answer}
        return re.sub(r"\{(request|answer)\}", lambda mark: told[mark[1]], rubric)

    return [fill(*one) for one in zip(answers, requests, strict=True)]


def _word(text: str) -> Refusal | Literal[""]:
    """The verdict in a reply; empty where it names none, or more than one."""
    named = [kind for kind in KINDS if re.search(rf"\b{kind}\b", aloud(text), re.IGNORECASE)]
    return named[0] if len(named) == 1 else ""


def _grade(text: str) -> float:
    """The grade that a reply consists of; 0 where it is anything else."""
    form = r"\W*(?:(?:grade|score|rating)\W*)?(10|[1-9])(?:\s*(?:/|out of)\s*10)?\W*"
    found = re.fullmatch(form, aloud(text), re.IGNORECASE)
    return float(found[1]) if found else 0.0

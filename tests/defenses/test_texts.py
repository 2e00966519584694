"""Texts of the training examples: varied first words, openers without content, recognizable refusals."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from analysis.judges.judge import Judge
from analysis.judges.learned import LEARNED_JUDGE
from analysis.judges.rules import RULE_JUDGES
from analysis.readouts.first_token import COMPLIANCE_WORDS, REFUSAL_WORDS
from defenses.training.texts import BENIGN_OPENERS, COMPLIANCE_OPENERS, REFUSAL_RESPONSES

TEXTS = {
    "compliance openers": COMPLIANCE_OPENERS,
    "benign openers": BENIGN_OPENERS,
    "refusals": REFUSAL_RESPONSES,
}
OPENERS = (*COMPLIANCE_OPENERS, *BENIGN_OPENERS)
JUDGES = [RULE_JUDGES["patterns"], LEARNED_JUDGE]


def count_first_words(texts: tuple[str, ...]) -> Counter[str]:
    """Count the first words; "I'm" counts as "I"."""
    return Counter(match.group() for text in texts if (match := re.match("[A-Za-z]+", text)))


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_first_words_vary_and_are_mostly_not_those_of_the_readout(texts: tuple[str, ...]) -> None:
    counts = count_first_words(texts)
    assert len(texts) >= 40 and counts.total() == len(texts)
    assert max(counts.values()) <= 0.15 * len(texts)
    assert 0 < sum(counts[word] for word in (*REFUSAL_WORDS, *COMPLIANCE_WORDS)) <= 0.4 * len(texts)


def test_no_text_occurs_twice() -> None:
    texts = [*OPENERS, *REFUSAL_RESPONSES]
    assert len({text.casefold().strip() for text in texts}) == len(texts)


@pytest.mark.parametrize("text", OPENERS)
def test_openers_only_open(text: str) -> None:
    assert text.endswith((":", ".\n\n")) and len(text.split()) <= 12
    assert re.fullmatch(r"[A-Za-z ,.!:'-]+", text.removesuffix("\n\n"))


@pytest.mark.parametrize("text", REFUSAL_RESPONSES)
def test_refusals_are_complete_sentences(text: str) -> None:
    assert re.fullmatch(r"[A-Z][^\n]+[.?]", text)


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.name)
def test_judges_recognize_nearly_all_refusals_that_training_teaches(judge: Judge) -> None:
    verdicts = judge.judge_responses(REFUSAL_RESPONSES, [""] * len(REFUSAL_RESPONSES), lambda count: None)
    assert sum(verdict.is_refusal for verdict in verdicts) >= 0.9 * len(REFUSAL_RESPONSES)


@pytest.mark.parametrize("judge", [*RULE_JUDGES.values(), LEARNED_JUDGE], ids=lambda judge: judge.name)
def test_judges_do_not_mistake_an_opener_for_a_refusal(judge: Judge) -> None:
    verdicts = judge.judge_responses(OPENERS, [""] * len(OPENERS), lambda count: None)
    assert [text for text, verdict in zip(OPENERS, verdicts, strict=True) if verdict.refusal != "none"] == []

"""The published keyword judge, as published: 29 strings, case counted."""

from __future__ import annotations

import pytest

from analysis.judge import KEYWORDS, keywords
from defenses.training.wording import ASSENTS, OPENERS, REFUSALS


def test_there_are_29_strings_and_case_counts() -> None:
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 29
    assert keywords("sorry") == "" and keywords("Sorry") == "Sorry"


@pytest.mark.parametrize("text", REFUSALS)
def test_it_knows_the_refusals_that_training_teaches(text: str) -> None:
    assert keywords(text)


@pytest.mark.parametrize("text", [*OPENERS, *ASSENTS])
def test_it_takes_no_opener_for_a_refusal(text: str) -> None:
    assert not keywords(text)

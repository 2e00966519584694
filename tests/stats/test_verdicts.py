"""Verdicts: every outcome and every reason of an inconclusive one, from rows written by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats.verdicts import (
    MARGIN_MEASURES,
    RESPONSE_MEASURES,
    EffectVerdict,
    derive_verdicts,
    describe_smallest_p_values,
    explain_disagreement,
    explain_verdicts,
    format_verdicts,
)

MEASURES = ("shift", "scaled_shift", "discrimination", "delta_auroc", "scaled_discrimination")
CLEAR = {"p_shift": 0.01, "p_discrimination": 0.01, "smallest_p": 0.001, "units_needed": 8}
for measure in MEASURES:
    CLEAR |= {measure: 0.4, f"{measure}_low": 0.3, f"{measure}_high": 0.5}


def change(**intervals: tuple[float, float]) -> dict[str, float]:
    """Return the clear row with other intervals."""
    row = dict(CLEAR)
    for name, (low, high) in intervals.items():
        row |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    return row


def judge(row: dict[str, float], n_queries: int = 100) -> tuple[str, str]:
    """Return the verdict from margins in words, and its reasons."""
    verdicts = derive_verdicts(row, MARGIN_MEASURES, n_queries)
    return format_verdicts(verdicts), explain_verdicts(verdicts)


def test_an_effect_needs_all_intervals_on_one_side_and_a_small_p_value() -> None:
    assert judge(CLEAR) == ("shift +, discrimination +", "")
    negative = change(shift=(-0.5, -0.3), scaled_shift=(-0.5, -0.3))
    assert judge(negative)[0] == "shift -, discrimination +"
    for name in ("shift", "scaled_shift"):
        assert judge(change(**{name: (-0.1, 0.5)})) == (
            "shift inconclusive, discrimination +",
            "shift: shift and scaled_shift disagree",
        )
    assert judge(change(shift=(-0.5, -0.3)))[1] == "shift: shift and scaled_shift disagree"
    assert judge(CLEAR | {"p_shift": 0.05})[1] == "shift: the adjusted p-value is 0.05"
    undefined = change(delta_auroc=(np.nan, np.nan), scaled_discrimination=(np.nan, np.nan))
    assert judge(undefined)[0] == "shift +, discrimination inconclusive"


def test_an_interval_within_the_equivalence_range_is_equivalent_even_where_the_nats_are_not_zero() -> None:
    narrow = change(scaled_shift=(-0.19, 0.19), scaled_discrimination=(-0.01, 0.2), delta_auroc=(-0.1, 0.1))
    assert judge(narrow) == ("equivalent", "")
    wider = change(scaled_shift=(-0.21, 0.19), shift=(-0.2, 0.2))
    assert judge(wider)[0] == "shift inconclusive, discrimination +"


def test_a_wide_interval_names_the_queries_that_would_decide() -> None:
    # Half-width 0.4 at estimate 0: the range of ±0.2 needs half of it, so four times the queries.
    text = judge(change(shift=(-0.4, 0.4), scaled_shift=(-0.4, 0.4)))[1]
    assert text == "shift: the interval is wide; about 400 queries would decide (now 100)"
    # At estimate 0.3, 0 is the nearer limit: (0.45 / 0.3)² = 2.25.
    text = judge(change(shift=(-0.15, 0.75), scaled_shift=(-0.15, 0.75)))[1]
    assert "about 230 queries" in text or "about 220 queries" in text
    row = {
        f"response_{name}{end}": value
        for name in ("shift", "discrimination")
        for end, value in (("", 0.0), ("_low", -9.0), ("_high", 9.0))
    }
    assert format_verdicts(derive_verdicts(row, RESPONSE_MEASURES, 10)) == "equivalent"


@pytest.mark.parametrize(("n_units", "is_possible"), [(8, False), (9, True)])
def test_too_few_units_for_any_small_p_value_are_named(n_units: int, is_possible: bool) -> None:
    # Two defenses have four p-values: 4 × 2^(1 − n) is below 5 % from 8 units on; three need 6 × 2^(1 − n).
    names = ["none", "a", "b", "c", "a/part", "control"]
    families = ["none", "own", "own", "own", "own", "control"]
    frame = pd.DataFrame({"attack": "direct", "defense": names, "family": families})
    smallest = describe_smallest_p_values(frame, n_units)
    assert smallest["smallest_p"].tolist() == pytest.approx(
        [*[4 * 2 ** (1 - n_units)], *[6 * 2.0 ** (1 - n_units)] * 3, *[4 * 2.0 ** (1 - n_units)] * 2]
    )
    assert smallest.loc[1, "units_needed"] == 8
    row = CLEAR | {"p_shift": 0.2} | smallest.loc[1].to_dict()
    assert judge(row)[1].startswith("shift: the adjusted p-value") == (n_units >= 8)
    assert is_possible == (6 * 2.0 ** (1 - n_units) < 0.03)
    many = describe_smallest_p_values(frame, 4)
    assert judge(CLEAR | {"p_shift": 0.75} | many.loc[1].to_dict())[1] == (
        "shift: with so few queries, no adjusted p-value can be below 0.75; "
        "8 pairs or single queries would do"
    )


def test_margins_and_responses_that_disagree_are_named() -> None:
    plus, minus, equal, unclear = (
        EffectVerdict("shift", outcome) for outcome in ("+", "-", "equivalent", "inconclusive")
    )
    assert explain_disagreement([plus], [minus]) == "the margins say otherwise: shift -"
    assert explain_disagreement([equal], [plus]) == "the margins say otherwise: shift +"
    assert explain_disagreement([plus], [plus]) == ""
    assert explain_disagreement([unclear], [plus]) == explain_disagreement([plus], [unclear]) == ""

"""Verdicts: every outcome and every reason of an inconclusive one, from rows written by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats.verdicts import (
    MARGIN_MEASURES,
    RESPONSE_MEASURES,
    EffectVerdict,
    adjust_in_families,
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
        verdict, reason = judge(change(**{name: (-0.1, 0.5)}))
        assert verdict == "shift inconclusive, discrimination +"
        assert reason.startswith("shift: the measures disagree: shift ") and f"{name} around 0" in reason
    assert judge(change(shift=(-0.5, -0.3)))[1] == (
        "shift: the measures disagree: shift below 0, scaled_shift above 0"
    )
    assert judge(CLEAR | {"p_shift": 0.05})[1] == "shift: the adjusted p-value is 0.05"
    undefined = change(delta_auroc=(np.nan, np.nan), scaled_discrimination=(np.nan, np.nan))
    assert judge(undefined) == (
        "shift +, discrimination inconclusive",
        "discrimination: delta_auroc and scaled_discrimination cannot be estimated",
    )
    # The third measure is no part of the rule for a sign, but its interval can speak against `equivalent`.
    wide = change(discrimination=(-0.5, 0.7), delta_auroc=(-0.1, 0.1), scaled_discrimination=(-2.5, -1.5))
    assert judge(wide)[1] == (
        "discrimination: the measures disagree: discrimination around 0, delta_auroc around 0, "
        "scaled_discrimination below 0"
    )


def test_an_interval_within_the_equivalence_range_is_equivalent_even_where_the_nats_are_not_zero() -> None:
    narrow = change(scaled_shift=(-0.19, 0.19), scaled_discrimination=(-0.01, 0.2), delta_auroc=(-0.1, 0.1))
    assert judge(narrow) == ("equivalent", "")
    # A small effect whose p-value is too large among many tests is still no effect of a size that matters.
    small = change(shift=(0.01, 0.3), scaled_shift=(0.01, 0.15)) | {"p_shift": 0.2}
    assert judge(small)[0] == "shift equivalent, discrimination +"
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
    } | {"p_response_shift": 1.0, "p_response_discrimination": 1.0}
    assert format_verdicts(derive_verdicts(row, RESPONSE_MEASURES, 10)) == "equivalent"


def test_too_few_units_for_any_small_p_value_are_named() -> None:
    names = ["none", "a", "b", "c", "a/part", "control"]
    families = ["none", "own", "own", "own", "own", "control"]
    frame = pd.DataFrame({"attack": "direct", "defense": names, "family": families})
    tests = pd.DataFrame({"p_shift": 0.5, "p_discrimination": 0.5}, index=frame.index)
    frame = frame.join(tests.mask(frame["defense"] == "none"))
    units = pd.Series(4, index=frame.index)
    columns = ["p_shift", "p_discrimination"]
    smallest = describe_smallest_p_values(frame, units, columns)
    # Three defenses have six tests, controls and ablations four; of 2⁴ patterns of signs, two are extreme.
    assert smallest["smallest_p"].tolist() == pytest.approx([1, 0.75, 0.75, 0.75, 0.5, 0.5])
    assert smallest["units_needed"].tolist() == [8, 8, 8, 8, 8, 8]  # 6 · 2⁻⁷ = .047, 4 · 2⁻⁷ = .031
    assert judge(CLEAR | {"p_shift": 0.75} | smallest.loc[1].to_dict())[1] == (
        "shift: with so few queries, no adjusted p-value can be below 0.75; "
        "at least 8 pairs or single queries are needed"
    )
    # Of two defenses that were not tested, nothing is adjusted for; of one with many units, less.
    untested = frame["defense"].isin(["b", "c"])
    fewer_tests = frame[columns].mask(untested).assign(p_shift=np.nan)
    fewer = describe_smallest_p_values(frame.assign(**fewer_tests), units, columns)
    assert fewer["smallest_p"].tolist() == pytest.approx([1, 2**-3, 1, 1, 2 * 2**-3, 2 * 2**-3])
    uneven = describe_smallest_p_values(frame, units.where(frame["defense"] == "a", 200), columns)
    assert uneven.loc[1, "smallest_p"] == pytest.approx(2 * 2**-3)
    adjusted = adjust_in_families(frame.assign(**smallest_table(frame, units, columns)), columns)
    assert adjusted.loc[1:3].min().min() == pytest.approx(smallest.loc[1, "smallest_p"])


def smallest_table(frame: pd.DataFrame, units: pd.Series, columns: list[str]) -> dict[str, pd.Series]:
    """Return the smallest unadjusted p-value of each test."""
    return {name: (2.0 ** (1 - units)).where(frame[name].notna()) for name in columns}


def test_margins_and_responses_that_disagree_are_named() -> None:
    plus, minus, equal, unclear = (
        EffectVerdict("shift", outcome) for outcome in ("+", "-", "equivalent", "inconclusive")
    )
    assert explain_disagreement([plus], [minus]) == "the margins say otherwise: shift -"
    assert explain_disagreement([equal], [plus]) == "the margins say otherwise: shift +"
    assert explain_disagreement([plus], [plus]) == ""
    assert explain_disagreement([unclear], [plus]) == explain_disagreement([plus], [unclear]) == ""

"""Verdicts on shift and discrimination: an effect with its sign, equivalence to no effect, or inconclusive.

An effect is named if its 95 % intervals exclude 0 on one side and its adjusted p-value is below 5 %. It is
equivalent to none if the interval lies within ± a stated difference (two one-sided tests at 2.5 % each).
Everything else is inconclusive, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import CONFIDENCE_LEVEL, SIGN_FLIPS, adjust_p_values
from analysis.stats.tables import find_defense_rows

EFFECT_NAMES = ("shift", "discrimination")
# Differences that do not matter: pooled within-class SDs of the margin (a small effect by Cohen's
# convention), and percentage points of the refusal rates.
MARGIN_EQUIVALENCE, RESPONSE_EQUIVALENCE = 0.2, 10.0
EQUIVALENT, INCONCLUSIVE, REFERENCE, NOT_JUDGED = "equivalent", "inconclusive", "reference", "not judged"
DISAGREEMENT = "the margins say otherwise"  # begins the note on effects that margins and responses contradict
_MAX_P_VALUE = round(1 - CONFIDENCE_LEVEL, 9)


@dataclass(frozen=True)
class EffectVerdict:
    """Verdict on one effect.

    Attributes:
        effect: shift or discrimination.
        outcome: `+` or `-`, `equivalent`, or `inconclusive`.
        reason: why it is inconclusive; empty for other outcomes.
    """

    effect: str
    outcome: str
    reason: str = ""

    @property
    def is_effect(self) -> bool:
        """Whether the effect has a sign."""
        return self.outcome in ("+", "-")


@dataclass(frozen=True)
class EffectMeasures:
    """What the verdict on one effect rests on.

    Attributes:
        columns: names of the estimates whose 95 % intervals must all exclude 0.
        scale_column: the estimate that is compared with `equivalence`.
        p_column: column of the adjusted p-value.
        equivalence: largest difference from 0 that does not matter, in units of `scale_column`.
    """

    columns: tuple[str, ...]
    scale_column: str
    p_column: str
    equivalence: float


MARGIN_MEASURES = {
    "shift": EffectMeasures(("shift", "scaled_shift"), "scaled_shift", "p_shift", MARGIN_EQUIVALENCE),
    "discrimination": EffectMeasures(
        ("discrimination", "delta_auroc"), "scaled_discrimination", "p_discrimination", MARGIN_EQUIVALENCE
    ),
}
RESPONSE_MEASURES = {
    name: EffectMeasures(
        (f"response_{name}",), f"response_{name}", f"p_response_{name}", RESPONSE_EQUIVALENCE
    )
    for name in EFFECT_NAMES
}


def derive_verdicts(
    row: Mapping[str, Any], measures: Mapping[str, EffectMeasures], n_queries: int, noun: str = "queries"
) -> list[EffectVerdict]:
    """Return the verdict on each effect of a summary row.

    Args:
        row: a summary row with the intervals of all measures, their adjusted p-values, and
            `smallest_p` and `units_needed` from `describe_smallest_p_values`.
        measures: effect → what its verdict rests on.
        n_queries: number of queries behind the row.
        noun: what these are called in a reason.
    """
    return [_derive_verdict(row, name, measure, n_queries, noun) for name, measure in measures.items()]


def format_verdicts(verdicts: Sequence[EffectVerdict]) -> str:
    """Return the verdicts in words; a single word if all share an outcome without a sign.

    >>> format_verdicts([EffectVerdict("shift", "+"), EffectVerdict("discrimination", "inconclusive")])
    'shift +, discrimination inconclusive'
    >>> format_verdicts([EffectVerdict("shift", "equivalent"), EffectVerdict("discrimination", "equivalent")])
    'equivalent'
    """
    outcomes = {verdict.outcome for verdict in verdicts}
    if len(outcomes) == 1 and not verdicts[0].is_effect:
        return verdicts[0].outcome
    return ", ".join(f"{verdict.effect} {verdict.outcome}" for verdict in verdicts)


def find_outcome(verdict: str, effect: str) -> str:
    """Return the outcome of one effect in a verdict from `format_verdicts`.

    >>> find_outcome("shift +, discrimination inconclusive", "shift"), find_outcome("equivalent", "shift")
    ('+', 'equivalent')
    """
    outcomes = dict(part.split(" ", 1) for part in verdict.split(", ") if " " in part)
    return outcomes.get(effect, verdict)


def explain_verdicts(verdicts: Sequence[EffectVerdict]) -> str:
    """Return the reasons of inconclusive verdicts, or an empty text."""
    return "; ".join(f"{verdict.effect}: {verdict.reason}" for verdict in verdicts if verdict.reason)


def explain_disagreement(verdicts: Sequence[EffectVerdict], other_verdicts: Sequence[EffectVerdict]) -> str:
    """Return on which effects the margins contradict the responses, or an empty text.

    Verdicts contradict each other if their signs differ, or if one has a sign and the other is `equivalent`.

    Args:
        verdicts: verdicts from responses.
        other_verdicts: verdicts from margins, in the same order.
    """
    contradictions = [
        f"{other.effect} {other.outcome}"
        for verdict, other in zip(verdicts, other_verdicts, strict=True)
        if verdict.outcome != other.outcome and INCONCLUSIVE not in (verdict.outcome, other.outcome)
    ]
    return f"{DISAGREEMENT}: {', '.join(contradictions)}" if contradictions else ""


def adjust_in_families(frame: pd.DataFrame, p_columns: Sequence[str]) -> pd.DataFrame:
    """Return adjusted p-values: Holm's method over all p-values of the rule, per attack and family of tests.

    The defenses are one family of tests; controls, and ablations of a defense, are another one.

    Args:
        frame: a summary with unadjusted p-values.
        p_columns: columns of the p-values that the rule uses.
    """
    adjusted = frame[list(p_columns)].astype(float)
    for _, rows in _group_tests(frame):
        adjusted.loc[rows.index] = _adjust_table(adjusted.loc[rows.index])
    return adjusted


def describe_smallest_p_values(
    frame: pd.DataFrame, n_units: pd.Series, p_columns: Sequence[str]
) -> pd.DataFrame:
    """Return the smallest adjusted p-value that each row can have, and the least number of units for 5 %.

    With n units, random signs have 2ⁿ patterns, of which at least two are as extreme as any. The smallest
    adjusted values are Holm's of these, and they are reached if all units of all tests change the same way.

    Args:
        frame: a summary with p-values, missing where there is no test.
        n_units: number of pairs and single queries behind each row.
        p_columns: columns of the p-values that the rule uses.
    """
    described = pd.DataFrame({"smallest_p": 1.0, "units_needed": 1.0}, index=frame.index)
    smallest = (2.0 ** (1 - n_units)).clip(lower=1 / (1 + SIGN_FLIPS), upper=1.0)
    for _, rows in _group_tests(frame):
        is_test = rows[list(p_columns)].notna()
        n_tests = int(is_test.to_numpy().sum())
        minima = is_test.mul(smallest[rows.index], axis=0).where(is_test)
        described.loc[rows.index, "smallest_p"] = _adjust_table(minima).min(axis=1).fillna(1.0)
        needed = math.floor(1 + math.log2(max(n_tests, 1) / _MAX_P_VALUE)) + 1.0
        described.loc[rows.index, "units_needed"] = needed
    return described


def _adjust_table(p_values: pd.DataFrame) -> pd.DataFrame:
    """Return p-values adjusted over all columns together."""
    flat = pd.Series(p_values.to_numpy(float).ravel())
    shape = p_values.shape
    return pd.DataFrame(adjust_p_values(flat).to_numpy().reshape(shape), p_values.index, p_values.columns)


def _group_tests(frame: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    """Return the rows of each attack, defenses apart from controls and ablations."""
    is_defense = find_defense_rows(frame["defense"], frame["family"])
    return frame.groupby([frame["attack"], is_defense], sort=False)


def _derive_verdict(
    row: Mapping[str, Any], name: str, measure: EffectMeasures, n_queries: int, noun: str
) -> EffectVerdict:
    """Return the verdict on one effect."""
    signs = [_find_sign(row, column) for column in measure.columns]
    p_value = float(row[measure.p_column])
    is_one_sided = len(set(signs)) == 1 and signs[0] != ""
    if is_one_sided and p_value < _MAX_P_VALUE:
        return EffectVerdict(name, signs[0])
    low, high = (float(row[f"{measure.scale_column}_{end}"]) for end in ("low", "high"))
    if -measure.equivalence <= low and high <= measure.equivalence:
        return EffectVerdict(name, EQUIVALENT)
    if is_one_sided:
        return EffectVerdict(name, INCONCLUSIVE, _explain_p_value(row, p_value))
    return EffectVerdict(name, INCONCLUSIVE, _explain_intervals(row, measure, n_queries, noun))


def _find_sign(row: Mapping[str, Any], column: str) -> str:
    """Return the side of 0 that an interval lies on, or an empty text."""
    return "+" if row[f"{column}_low"] > 0 else "-" if row[f"{column}_high"] < 0 else ""


def _explain_p_value(row: Mapping[str, Any], p_value: float) -> str:
    if row["smallest_p"] > _MAX_P_VALUE:
        return (
            f"with so few queries, no adjusted p-value can be below {row['smallest_p']:.2g}; at least "
            f"{row['units_needed']:.0f} pairs or single queries are needed"
        )
    return f"the adjusted p-value is {p_value:.2f}"


def _explain_intervals(row: Mapping[str, Any], measure: EffectMeasures, n_queries: int, noun: str) -> str:
    """Return which intervals disagree, or how many queries would decide if the estimate stayed as it is."""
    names = dict.fromkeys((*measure.columns, measure.scale_column))
    missing = [name for name in names if not math.isfinite(row[f"{name}_high"] - row[f"{name}_low"])]
    if missing:
        return f"{' and '.join(missing)} cannot be estimated"
    signs = {name: _find_sign(row, name) for name in names}
    if len(set(signs.values())) > 1:
        sides = {"+": "above 0", "-": "below 0", "": "around 0"}
        return f"the measures disagree: {', '.join(f'{name} {sides[sign]}' for name, sign in signs.items())}"
    value, low, high = (float(row[f"{measure.scale_column}{end}"]) for end in ("", "_low", "_high"))
    # Either 0 or the nearer end of the equivalence range has to leave the interval.
    distance = max(abs(value), measure.equivalence - abs(value))
    n_needed = max(math.ceil(n_queries * ((high - low) / 2 / distance) ** 2), n_queries + 1)
    rounded = float(f"{n_needed:.1e}") if n_needed >= 100 else n_needed
    return f"the interval is wide; about {rounded:,.0f} {noun} would decide (now {n_queries})"

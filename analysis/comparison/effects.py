"""Effects of each defense over several models: random-effects summaries, and whether findings hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison.random_effects import fit_random_effects
from analysis.stats.bootstrap import NORMAL_QUANTILE
from analysis.stats.format import Interval
from analysis.stats.tables import (
    DIRECT,
    INTERVAL_SUFFIXES,
    UNDEFENDED,
    find_defense_rows,
    has_judged_rates,
    iterate_rows,
)
from analysis.stats.verdicts import EFFECT_NAMES, EQUIVALENT, INCONCLUSIVE, NOT_JUDGED, find_outcome

# Unit → columns of shift and discrimination in the summary. Nats of different models cannot be compared.
EFFECT_COLUMNS = {
    "points": ("response_shift", "response_discrimination"),
    "SD": ("scaled_shift", "scaled_discrimination"),
}
# Largest possible effects, percentage points: of the mean of two rates, and of their difference.
_LARGEST_POINTS = {"shift": 100.0, "discrimination": 200.0}
_PHRASES = {
    ("shift", "+"): "its shift toward refusal",
    ("shift", "-"): "its shift away from refusal",
    ("discrimination", "+"): "its better separation",
    ("discrimination", "-"): "its worse separation",
}
_NOUNS = {"shift": "shift", "discrimination": "change of the separation"}
_SUMMARY_COLUMNS = (
    *("attack", "defense", "family", "effect", "unit", "n_models", "mean", "mean_low", "mean_high"),
    *("between_sd", "i_squared", "prediction_low", "prediction_high"),
)


def choose_effect_unit(summary: pd.DataFrame) -> str:
    """Return the unit in which models are compared: points of judged responses, else SDs of the margin.

    Args:
        summary: `summary.csv` of several models.
    """
    return "points" if has_judged_rates(summary) and "response_shift" in summary else "SD"


def pool_effects(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the random-effects summary of each condition over the models that have it, two or more.

    The standard error of an effect is the width of its 95 % interval over 2 · 1.96.

    Args:
        summary: `summary.csv` of several models, with the column `model`.

    Returns:
        A row per attack, condition, effect and unit (points of judged responses, and SDs of the margin): the
        mean over models with its 95 % interval, the SD of the true effects between models, I² (0 to 1), and
        the prediction interval for another model, which needs three models.
    """
    rows = []
    conditions = summary[summary["defense"] != UNDEFENDED]
    for (attack, defense), group in conditions.groupby(["attack", "defense"], sort=False):
        for unit, columns in EFFECT_COLUMNS.items():
            for effect, column in zip(EFFECT_NAMES, columns, strict=True):
                if column not in group:
                    continue
                value, low, high = (group[f"{column}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
                known = np.isfinite(value) & np.isfinite(high - low)
                if known.sum() < 2:
                    continue
                variances = ((high - low)[known] / (2 * NORMAL_QUANTILE)) ** 2
                fitted = vars(fit_random_effects(value[known], variances))
                if unit == "points":
                    limit = _LARGEST_POINTS[effect]
                    ends = ("mean_low", "mean_high", "prediction_low", "prediction_high")
                    fitted = fitted | {end: float(np.clip(fitted[end], -limit, limit)) for end in ends}
                names = {"attack": attack, "defense": defense, "family": group["family"].iloc[0]}
                rows.append(names | {"effect": effect, "unit": unit, "n_models": int(known.sum())} | fitted)
    return pd.DataFrame(rows, columns=list(_SUMMARY_COLUMNS))


def build_effect_points(summary: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """Return what the figures of models draw: the effects of each defense on each model, and their mean.

    Args:
        summary: `summary.csv` of several models, with the column `model`.
        pooled: of `pool_effects`.

    Returns:
        A row per attack, defense and model, and one per attack and defense without a model for the mean, with
        `shift` and `discrimination` in one `unit`, each with its 95 % interval. The prediction intervals are
        `shift_prediction_low`, …; missing for a model, and with fewer than three.
    """
    unit = choose_effect_unit(summary)
    is_defense = find_defense_rows(summary["defense"], summary["family"])
    names = {
        f"{column}{end}": f"{effect}{end}"
        for effect, column in zip(EFFECT_NAMES, EFFECT_COLUMNS[unit], strict=True)
        for end in INTERVAL_SUFFIXES
    }
    keys = ["model", "attack", "defense", "family", "n_harmful", "n_benign"]
    keys += ["n_responses"] if unit == "points" else []
    by_model = summary.loc[is_defense, [*keys, *names]].rename(columns=names)
    if by_model.empty:
        return by_model.assign(unit=unit)
    means = []
    known = by_model[["attack", "defense"]].drop_duplicates()
    for (attack, defense, family), rows in pooled.merge(known).groupby(
        ["attack", "defense", "family"], sort=False
    ):
        row: dict[str, Any] = {"attack": attack, "defense": defense, "family": family}
        for values in iterate_rows(rows[rows["unit"] == unit]):
            ends = {f"{values['effect']}{end}": values[f"mean{end}"] for end in INTERVAL_SUFFIXES}
            predicted = {
                f"{values['effect']}_prediction{end}": values[f"prediction{end}"] for end in ("_low", "_high")
            }
            row |= ends | predicted | {"n_models": values["n_models"]}
        means.append(row)
    points = pd.DataFrame([*iterate_rows(by_model), *means])
    return points.dropna(subset=["shift", "discrimination"]).assign(unit=unit).reset_index(drop=True)


def describe_findings(summary: pd.DataFrame, pooled: pd.DataFrame) -> pd.DataFrame:
    """Return whether the findings on each defense hold on all models, in words.

    A finding is a verdict: an effect with its sign. It holds if every model that has the condition has the
    same sign. All verdicts rest on the same as in the models' own summaries.

    Args:
        summary: `summary.csv` of several models, with the column `model`.
        pooled: of `pool_effects`.

    Returns:
        A row per attack and defense (controls and ablations are left out): `n_models`; for shift and for
        discrimination one of `holds`, `opposite signs`, `some models`, `shown on some`, `equivalent`,
        `shown on none`; and a sentence.
    """
    unit = choose_effect_unit(summary)
    rows = []
    defenses = summary[find_defense_rows(summary["defense"], summary["family"])]
    for (attack, defense), group in defenses.groupby(["attack", "defense"], sort=False):
        verdicts = dict(zip(group["model"], group["verdict"], strict=True))
        outcomes = {
            effect: {model: find_outcome(str(verdict), effect) for model, verdict in verdicts.items()}
            for effect in EFFECT_NAMES
        }
        chosen = pooled[(pooled["attack"] == attack) & (pooled["defense"] == defense)]
        by_effect = {row["effect"]: row for row in iterate_rows(chosen[chosen["unit"] == unit])}
        clauses = [
            _describe_effect(effect, outcomes[effect], by_effect.get(effect, {}), unit)
            for effect in EFFECT_NAMES
        ]
        under = "" if attack == DIRECT else f" under {attack}"
        rows.append(
            {
                "attack": attack,
                "defense": defense,
                "family": group["family"].iloc[0],
                "n_models": len(group),
                **{effect: classify_outcomes(list(outcomes[effect].values())) for effect in EFFECT_NAMES},
                "finding": f"{defense}{under}: {'; '.join(clauses)}.",
            }
        )
    columns = ["attack", "defense", "family", "n_models", *EFFECT_NAMES, "finding"]
    return pd.DataFrame(rows, columns=columns)


def classify_outcomes(outcomes: Sequence[str]) -> str:
    """Return whether a finding holds on all models.

    >>> classify_outcomes(["+", "+"]), classify_outcomes(["+", "-"]), classify_outcomes(["+", "equivalent"])
    ('holds', 'opposite signs', 'some models')
    >>> classify_outcomes(["+", "inconclusive"]), classify_outcomes(["inconclusive", "equivalent"])
    ('shown on some', 'shown on none')

    Args:
        outcomes: verdict on one effect on each model.
    """
    signs = set(outcomes) & {"+", "-"}
    if len(signs) == 2:
        return "opposite signs"
    if set(outcomes) == {EQUIVALENT}:
        return "equivalent"
    if not signs:
        return "shown on none"
    if len(set(outcomes)) == 1:
        return "holds"
    return "some models" if EQUIVALENT in outcomes else "shown on some"


def _describe_effect(effect: str, outcomes: Mapping[str, str], pooled: Mapping[str, Any], unit: str) -> str:
    """Return a clause on whether one effect holds on all models."""
    status = classify_outcomes(list(outcomes.values()))
    all_models = "on both models" if len(outcomes) == 2 else f"on all {len(outcomes)} models"
    if len(outcomes) == 1:
        all_models = f"on {next(iter(outcomes))}, the only model that has it"
    by_model = _list_models(outcomes)
    if status == "equivalent":
        return f"its {_NOUNS[effect]} is equivalent to none {all_models}"
    if status == "shown on none":
        details = f"inconclusive {all_models}" if set(outcomes.values()) == {INCONCLUSIVE} else by_model
        return f"no {_NOUNS[effect]} is shown ({details})"
    if status == "opposite signs":
        return f"its {_NOUNS[effect]} has opposite signs ({by_model})"
    sign = next(outcome for outcome in outcomes.values() if outcome in ("+", "-"))
    phrase = _PHRASES[effect, sign]
    if status == "holds":
        return f"{phrase} is shown {all_models}{_describe_prediction(pooled, unit)}"
    if status == "some models":
        return f"{phrase} depends on the model ({by_model})"
    n_shown = sum(outcome == sign for outcome in outcomes.values())
    return f"{phrase} is shown on {n_shown} of {len(outcomes)} models ({by_model})"


def _list_models(outcomes: Mapping[str, str]) -> str:
    """Return the models of each outcome, such as `+ on a, b; inconclusive on c`."""
    parts = []
    for outcome in ("+", "-", EQUIVALENT, INCONCLUSIVE, NOT_JUDGED):
        if models := [model for model, value in outcomes.items() if value == outcome]:
            parts.append(f"{outcome} on {', '.join(models)}")
    return "; ".join(parts)


def _describe_prediction(pooled: Mapping[str, Any], unit: str) -> str:
    """Return the prediction interval for another model; empty if there is none."""
    if not np.isfinite(pooled.get("prediction_low", np.nan)):
        return ""
    digits = "+.0f" if unit == "points" else "+.2f"
    ends = Interval(pooled["mean"], pooled["prediction_low"], pooled["prediction_high"])
    return f" (prediction for another model: {ends.format_text(digits)} {unit})"

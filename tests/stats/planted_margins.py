"""Margins with planted effects, shared by the tests of statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.ensembles import SplitScores
from analysis.stats.voting import MarginTable

N_PAIRS, N_PLAIN = 96, 48  # as in the test split of contrast-v1


def make_classes_and_pairs(pairs: int = N_PAIRS, plain: int = N_PLAIN) -> tuple[Any, list[str | None]]:
    """Return classes and pairs: harmful queries, their twins, and plain benign ones."""
    harmful = np.arange(2 * pairs + plain) < pairs
    names: list[str | None] = [f"p{i % pairs}" if i < 2 * pairs else None for i in range(len(harmful))]
    return harmful, names


def plant_paired_margins(
    seed: int = 0, pairs: int = N_PAIRS, plain: int = N_PLAIN
) -> tuple[Any, Any, list[str | None]]:
    """Return margins with a pair effect (harmful ones about a nat higher), classes and pairs."""
    rng = np.random.default_rng(seed)
    harmful, names = make_classes_and_pairs(pairs, plain)
    effect = rng.normal(0, 0.8, pairs)
    common = np.concatenate([effect, effect, rng.normal(0, 0.8, plain)])
    return np.where(harmful, -0.2, -1.4) + common + rng.normal(0, 1.2, len(harmful)), harmful, names


def make_split_scores(
    margins: dict[str, Any], is_harmful: Any, attack: str = "direct", split: str = "test"
) -> SplitScores:
    """Return scores with these margins by condition, `none` among them; every query is its own unit."""
    names = tuple(margins)
    stacked = np.stack([np.asarray(margins[name], dtype=float) for name in names], axis=1)
    units = ResamplingUnits.from_pairs(pd.Series([None] * len(is_harmful)), is_harmful)
    return SplitScores(
        attack, split, MarginTable(names, stacked, stacked[:, names.index("none")], is_harmful), units
    )


def plant_defense_margins(
    seed: int = 0, n: int = 120, defenses: int = 4, spread: float = 1.0
) -> tuple[dict[str, Any], Any]:
    """Return random margins of the undefended model and of defenses named d0, d1, ..., and the classes."""
    rng = np.random.default_rng(seed)
    is_harmful = np.arange(n) % 2 == 0
    undefended = rng.normal(np.where(is_harmful, 0.5, -1.5), 1.0)
    margins = {"none": undefended}
    for number in range(defenses):
        change = rng.normal(0.4 * number, 0.2) + rng.normal(0.5, 0.2) * is_harmful
        margins[f"d{number}"] = undefended + change + rng.normal(0, 0.5 * spread, n)
    return margins, is_harmful


def plant_stack(extra: float = 0.0, seed: int = 0) -> SplitScores:
    """Return scores in which a stack adds the changes of its members, and `extra` nats if harmful."""
    margins, is_harmful = plant_defense_margins(seed)
    noise = np.random.default_rng(seed + 50).normal(0, 0.1, len(is_harmful))
    stacked = margins["d0"] + margins["d1"] - margins["none"] + extra * is_harmful + noise
    return make_split_scores(margins | {"d0+d1": stacked}, is_harmful)

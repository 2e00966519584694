"""The causal 2 × 2 of a defense with two ingredients: weights on/off × secret on/off, on the same queries."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.decompose import compute_contrasts
from analysis.resampling import BOOTSTRAP_DRAWS, ResamplingWeights, ResamplingUnits, bootstrap_interval
from analysis.tables import ScoreTable

# The parts that the square is made of; the last is the whole defense.
FACTORIAL_ABLATIONS = ("neither", "no_weights", "no_secret", "")
# Effect → the weight of each cell's margin, in the order of CELLS.
FACTORIAL_EFFECTS = {
    "secret, released weights": (-1, 1, 0, 0),
    "secret, tuned weights": (0, 0, -1, 1),
    "weights, no secret": (-1, 0, 1, 0),
    "weights, with secret": (0, -1, 0, 1),
    "interaction": (1, -1, -1, 1),
}


def list_factorial_conditions(defense: str) -> list[str]:
    """Return the names of the four conditions in the order of `CELLS`.

    >>> cells("backdoor")
    ['backdoor/neither', 'backdoor/no_weights', 'backdoor/no_secret', 'backdoor']
    """
    return [f"{defense}/{part}" if part else defense for part in FACTORIAL_ABLATIONS]


def estimate_factorial_effects(scores: ScoreTable, attack: str, defense: str, seed: int = 0) -> pd.DataFrame:
    """Return each effect of the 2 × 2 on shift and discrimination, nats, with 95 % intervals.

    The interaction is what secret and weights do together beyond the sum of what each does alone.

    Args:
        scores: with all four conditions.
        attack: whose rows are taken.
        defense: with the parts `no_weights`, `no_secret` and `neither`.
        seed: of the bootstrap.
    """
    tables = [scores.select_condition(attack, name) for name in list_factorial_conditions(defense)]
    margins = np.stack([table["margin"].to_numpy(float) for table in tables])
    is_harmful = tables[0]["harmful"].to_numpy(bool)
    units = ResamplingUnits.from_pairs(tables[0]["pair"], is_harmful)
    once, drawn = ResamplingWeights.from_observed(units), ResamplingWeights.from_bootstrap(units, BOOTSTRAP_DRAWS, seed)
    n = int(min(is_harmful.sum(), (~is_harmful).sum()))
    rows = []
    for name, weights in FACTORIAL_EFFECTS.items():
        change = np.array(weights, dtype=float) @ margins
        point, cloud = (compute_contrasts(change, is_harmful, sample) for sample in (once, drawn))
        row: dict[str, object] = {"attack": attack, "defense": defense, "effect": name}
        for measure in point:
            low, high = bootstrap_interval(cloud[measure], n)
            row |= {measure: float(point[measure][0]), f"{measure}_low": low, f"{measure}_high": high}
        rows.append(row | {"n_harmful": int(is_harmful.sum()), "n_benign": int((~is_harmful).sum())})
    return pd.DataFrame(rows)

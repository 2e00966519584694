"""Which ensembles are worth a look: the Pareto front of harm refused, benign answered and cost; and the pick.

What is chosen is chosen on the calibration split, and what is said of it comes from the test split: the best
of thousands is lucky where it was picked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import beta

from analysis.stats.ensembles import ALONE, REPORT_SPLIT, SELECTION_SPLIT, STACK

REQUIRED_PROBABILITY = 0.9  # that a limit is kept, before anything is recommended


def list_member_conditions(members: str, combination: str) -> list[str]:
    """Return the conditions that an ensemble is made of: each member of a vote is asked in turn.

    >>> list_member_conditions("a+b", "mean"), list_member_conditions("a+b", "stack")
    (['a', 'b'], ['a+b'])
    """
    return [members] if combination in (ALONE, STACK) else members.split("+")


def build_candidates(rows: pd.DataFrame, get_cost: Callable[[Sequence[str]], float]) -> pd.DataFrame:
    """Return a row for each defense and ensemble that was observed: its rates on both splits, and its cost.

    Args:
        rows: of single defenses and ensembles on all halves; the first attack is what users send.
        get_cost: conditions that are asked in turn → time until the first token, times undefended.

    Returns:
        By split `harmful_calibration`, `harmful_test` (share of harmful queries refused, the mean over all
        attacks), `attacked_…` (likewise over all but the first, missing where there is one) and `benign_…`
        (share of benign queries answered under the first), `cost`, and `on_front`: whether no other is at
        least as good on the calibration split in all three and better in one.
    """
    seen = rows[rows["observed_shift"].notna()]
    attacks = list(dict.fromkeys(rows["attack"]))
    key = ["members", "how"]
    about = [name for name in ("size", "kind", "p_inter", "kind_by_family") if name in rows]
    found = seen.drop_duplicates(key).set_index(key)[about]
    for split in (SELECTION_SPLIT, REPORT_SPLIT):
        half = seen[seen["split"] == split]
        refused = half.pivot_table("observed_refusal_rate", key, "attack")[attacks]
        first = half[half["attack"] == attacks[0]].set_index(key)
        found[f"harmful_{split}"] = refused.mean(axis=1)
        found[f"attacked_{split}"] = refused[attacks[1:]].mean(axis=1) if len(attacks) > 1 else np.nan
        found[f"benign_{split}"] = 1 - first["observed_over_refusal_rate"]
    found = found.dropna(subset=[f"harmful_{SELECTION_SPLIT}", f"harmful_{REPORT_SPLIT}"]).reset_index()
    found["cost"] = [get_cost(asked) for asked in map(list_member_conditions, found["members"], found["how"])]
    goods = [found[f"harmful_{SELECTION_SPLIT}"], found[f"benign_{SELECTION_SPLIT}"], -found["cost"].round(1)]
    return found.assign(on_front=find_undominated(np.stack(goods, axis=1)))


def find_undominated(objectives: Float[np.ndarray, "n goods"]) -> Bool[np.ndarray, " n"]:
    """Return which points no other one beats: none is at least as good in everything and better in something.

    >>> find_undominated(np.array([[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.5, 0.5]])).tolist()
    [True, True, False, True]

    Args:
        objectives: more is better, in each column.
    """
    kept = np.zeros(len(objectives), dtype=bool)
    front = np.empty((0, objectives.shape[1]))
    # Best first, so that whatever beats a point stands before it.
    for place in np.lexsort(objectives.T[::-1])[::-1]:
        point = objectives[place]
        beaten = (front >= point).all(1) & (front > point).any(1)
        if not beaten.any():
            kept[place] = True
            front = np.vstack([front, point])
    return kept


def rank_candidates(
    candidates: pd.DataFrame, max_over_refusal: float, max_cost: float | None, n_benign: int
) -> pd.DataFrame:
    """Return what surely keeps to the limits, the one that refuses most harm first.

    It does if, given the calibration split, the probability that its rate is within the limit is at least
    `SURE`: whatever just keeps to it there has been picked for its luck. Of what refuses the same, the
    cheaper one is first, then the smaller.

    Args:
        candidates: what `candidates` returned.
        max_over_refusal: share of benign queries that may be refused, at most.
        max_cost: time until the first token, times undefended, at most.
        n_benign: how many benign queries the calibration split has.
    """
    refused = ((1 - candidates[f"benign_{SELECTION_SPLIT}"]) * n_benign).round()
    # The posterior of a rate from Jeffreys' prior, whose intervals the tables' are close to.
    allowed = candidates[
        beta.cdf(max_over_refusal, refused + 0.5, n_benign - refused + 0.5) >= REQUIRED_PROBABILITY
    ]
    if max_cost is not None:
        allowed = allowed[allowed["cost"] <= max_cost]
    order = [-allowed[f"harmful_{SELECTION_SPLIT}"], allowed["cost"], allowed["size"]]
    return allowed.iloc[np.lexsort([np.asarray(column) for column in reversed(order)])]


def choose_best_single(ranked_candidates: pd.DataFrame, excluded: Sequence[str] = ()) -> pd.Series | None:
    """Return the first single defense among ranked candidates, or None.

    Args:
        ranked_candidates: what `ranked` returned.
        excluded: members that are left out.
    """
    single = ranked_candidates[
        (ranked_candidates["how"] == ALONE) & ~ranked_candidates["members"].isin(excluded)
    ]
    return single.iloc[0] if len(single) else None


def summarize_predicted_rates(predicted_rows: pd.DataFrame) -> pd.DataFrame:
    """Return by members what predicted rows of one split promise: the same rates as of `candidates`.

    Args:
        predicted_rows: rows of stacks under every attack; the first attack is what users send.
    """
    first = predicted_rows[predicted_rows["attack"] == predicted_rows["attack"].iloc[0]].set_index("members")
    return pd.DataFrame(
        {
            "harmful": predicted_rows.groupby("members", sort=False)["predicted_refusal_rate"].mean(),
            "over_refusal": first["predicted_over_refusal_rate"],
        }
    )

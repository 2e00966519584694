"""Trade-off between harmful queries refused, benign queries answered and cost; choice of an ensemble.

Ensembles are chosen on the calibration split and reported on the test split: the best of thousands looks
better than it is on the data that it was chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from analysis.stats.ensembles import ALONE, REPORT_SPLIT, SELECTION_SPLIT, STACK


def list_member_conditions(members: str, combination: str) -> list[str]:
    """Return the conditions that an ensemble runs: the members of a vote in turn, a stack as one condition.

    >>> list_member_conditions("a+b", "mean"), list_member_conditions("a+b", "stack")
    (['a', 'b'], ['a+b'])
    """
    return [members] if combination in (ALONE, STACK) else members.split("+")


def build_candidates(rows: pd.DataFrame, get_cost: Callable[[Sequence[str]], float]) -> pd.DataFrame:
    """Return a row with rates on both splits and cost for each observed defense and ensemble.

    Args:
        rows: single defenses and ensembles on all splits and under all attacks; the first attack stands for
            ordinary use.
        get_cost: function from the conditions that run in turn to the time until the first token, as a
            multiple of the undefended time.

    Returns:
        By split, `harmful_calibration` and `harmful_test` (share of harmful queries refused, mean over all
        attacks), `attacked_…` (mean over all attacks but the first; missing if there is only one) and
        `benign_…` (share of benign queries answered under the first attack); `cost`; `on_front`: whether no
        other row is at least as good in all three objectives on the calibration split and better in one.
    """
    observed_rows = rows[rows["observed_shift"].notna()]
    attacks = list(dict.fromkeys(rows["attack"]))
    key = ["members", "how"]
    description = [name for name in ("size", "kind", "p_inter", "kind_by_family") if name in rows]
    candidates = observed_rows.drop_duplicates(key).set_index(key)[description]
    for split in (SELECTION_SPLIT, REPORT_SPLIT):
        split_rows = observed_rows[observed_rows["split"] == split]
        refusal_rates = split_rows.pivot_table("observed_refusal_rate", key, "attack")[attacks]
        first_attack = split_rows[split_rows["attack"] == attacks[0]].set_index(key)
        candidates[f"harmful_{split}"] = refusal_rates.mean(axis=1)
        candidates[f"attacked_{split}"] = (
            refusal_rates[attacks[1:]].mean(axis=1) if len(attacks) > 1 else np.nan
        )
        candidates[f"benign_{split}"] = 1 - first_attack["observed_over_refusal_rate"]
    harmful_columns = [f"harmful_{split}" for split in (SELECTION_SPLIT, REPORT_SPLIT)]
    candidates = candidates.dropna(subset=harmful_columns).reset_index()
    candidates["cost"] = [
        get_cost(list_member_conditions(members, combination))
        for members, combination in zip(candidates["members"], candidates["how"], strict=True)
    ]
    objectives = [
        candidates[f"harmful_{SELECTION_SPLIT}"],
        candidates[f"benign_{SELECTION_SPLIT}"],
        -candidates["cost"].round(1),
    ]
    return candidates.assign(on_front=find_undominated(np.stack(objectives, axis=1)))


def find_undominated(objectives: Float[np.ndarray, "n goods"]) -> Bool[np.ndarray, " n"]:
    """Return which points are on the Pareto front: no other is as good in every objective and better in one.

    >>> find_undominated(np.array([[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.5, 0.5]])).tolist()
    [True, True, False, True]

    Args:
        objectives: value of each objective by point; higher is better.
    """
    on_front = np.zeros(len(objectives), dtype=bool)
    front = np.empty((0, objectives.shape[1]))
    # In descending order, so that every point that dominates another comes before it.
    for index in np.lexsort(objectives.T[::-1])[::-1]:
        point = objectives[index]
        is_dominated = (front >= point).all(1) & (front > point).any(1)
        if not is_dominated.any():
            on_front[index] = True
            front = np.vstack([front, point])
    return on_front


def rank_candidates(candidates: pd.DataFrame, max_cost: float | None) -> pd.DataFrame:
    """Return the candidates within the cost, those that refuse most harmful queries first.

    Ties are ordered by cost, then by size. The rates are those of the calibration split.

    Args:
        candidates: table of `build_candidates`, or rows of it.
        max_cost: highest allowed time until the first token, as a multiple of the undefended time.
    """
    allowed = candidates if max_cost is None else candidates[candidates["cost"] <= max_cost]
    sort_keys = [-allowed[f"harmful_{SELECTION_SPLIT}"], allowed["cost"], allowed["size"]]
    return allowed.iloc[np.lexsort([np.asarray(column) for column in reversed(sort_keys)])]


def choose_best_single(ranked_candidates: pd.DataFrame, excluded: Sequence[str] = ()) -> pd.Series | None:
    """Return the highest-ranked single defense, or None.

    Args:
        ranked_candidates: table of `rank_candidates`.
        excluded: names of defenses to skip.
    """
    single_defenses = ranked_candidates[
        (ranked_candidates["how"] == ALONE) & ~ranked_candidates["members"].isin(excluded)
    ]
    return single_defenses.iloc[0] if len(single_defenses) else None


def summarize_predicted_rates(predicted_rows: pd.DataFrame) -> pd.DataFrame:
    """Return the predicted rates of stacks by members, defined as those of `build_candidates`.

    Args:
        predicted_rows: stacks of one split under every attack; the first attack stands for ordinary use.
    """
    first_attack = predicted_rows["attack"].iloc[0]
    first_rows = predicted_rows[predicted_rows["attack"] == first_attack].set_index("members")
    return pd.DataFrame(
        {
            "harmful": predicted_rows.groupby("members", sort=False)["predicted_refusal_rate"].mean(),
            "over_refusal": first_rows["predicted_over_refusal_rate"],
        }
    )

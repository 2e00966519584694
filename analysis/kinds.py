"""By which mechanism a defense works, as measured, and so of which kind an ensemble is: inter or intra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.ensembles import SplitScores, evaluate_single_defenses

# By family, as in the paper; it says nothing of the others.
MECHANISM_BY_FAMILY = {"reminders": "shift", "tuning": "shift", "backdoor": "shift", "refactoring": "discrimination"}


def classify_mechanisms(split_scores: SplitScores, families_by_defense: Mapping[str, str]) -> pd.DataFrame:
    """Return what each defense mainly does: shift if both classes move the same way, else discrimination.

    Harmful queries move by shift + ½ discrimination and benign ones by shift − ½ discrimination, so they move
    the same way where the shift is larger than half the discrimination: the larger of the two has the name.

    Args:
        split_scores: on whose queries.
        families_by_defense: of the defenses, by name.

    Returns:
        A row per defense: both contrasts (nats), `mechanism`, `p_shift` (the share of bootstrap draws in
        which it is shift) and `by_family`, the paper's assignment.
    """
    names = list(families_by_defense)
    moved = _draw_same_direction(split_scores, names)
    alone = evaluate_single_defenses(split_scores, names)
    shift, discrimination = (alone[f"observed_{x}"].to_numpy(float) for x in ("shift", "discrimination"))
    same_way = 2 * abs(shift) >= abs(discrimination)
    rows = []
    for place, name in enumerate(names):
        rows.append(
            {
                "defense": name,
                "family": families_by_defense[name],
                "shift": shift[place],
                "discrimination": discrimination[place],
                "mechanism": "shift" if same_way[place] else "discrimination",
                "p_shift": float(moved[:, place].mean()),
                "by_family": MECHANISM_BY_FAMILY.get(families_by_defense[name], ""),
            }
        )
    return pd.DataFrame(rows)


def classify_teams(split_scores: SplitScores, team_names: Iterable[str], defense_mechanisms: pd.DataFrame) -> pd.DataFrame:
    """Return for each team whether its members work by one mechanism (intra) or by several (inter).

    Args:
        split_scores: on whose queries.
        team_names: teams, their members joined by +.
        defense_mechanisms: what `mechanisms` returned.

    Returns:
        By team: `kind`, measured; `p_inter`, the share of bootstrap draws in which it is inter;
        `kind_by_family`, empty where the paper says nothing of a member's family.
    """
    names = list(defense_mechanisms["defense"])
    moved = _draw_same_direction(split_scores, names)
    mechanism, family = (
        dict(zip(names, defense_mechanisms[column], strict=True)) for column in ("mechanism", "by_family")
    )
    rows = []
    for members in team_names:
        team = members.split("+")
        sides = moved[:, [names.index(name) for name in team]]
        known = {family[name] for name in team}
        rows.append(
            {
                "members": members,
                "kind": _classify_team({mechanism[name] for name in team}),
                "p_inter": float((sides.min(1) != sides.max(1)).mean()),
                "kind_by_family": "" if "" in known else _classify_team(known),
            }
        )
    return pd.DataFrame(rows, columns=["members", "kind", "p_inter", "kind_by_family"])


def _classify_team(member_mechanisms: set[str]) -> str:
    return "inter" if len(member_mechanisms) > 1 else "intra"


def _draw_same_direction(split_scores: SplitScores, defenses: Sequence[str]) -> Any:
    """Whether both classes move the same way, by draw and defense."""
    draws, is_harmful = split_scores.bootstrap_weights, split_scores.margin_table.is_harmful
    change = split_scores.get_member_margins(defenses) - split_scores.margin_table.undefended_margins[:, None]
    return (draws.harmful_weights @ change[is_harmful]) * (draws.benign_weights @ change[~is_harmful]) >= 0

"""By which mechanism a defense works, as measured, and so of which kind an ensemble is: inter or intra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.ensembles import Half, singles

# By family, as in the paper; it says nothing of the others.
BY_FAMILY = {"reminders": "shift", "tuning": "shift", "backdoor": "shift", "refactoring": "discrimination"}


def mechanisms(half: Half, families: Mapping[str, str]) -> pd.DataFrame:
    """Return what each defense mainly does: shift if both classes move the same way, else discrimination.

    Harmful queries move by shift + ½ discrimination and benign ones by shift − ½ discrimination, so they move
    the same way where the shift is larger than half the discrimination: the larger of the two has the name.

    Args:
        half: on whose queries.
        families: of the defenses, by name.

    Returns:
        A row per defense: both contrasts (nats), `mechanism`, `p_shift` (the share of bootstrap draws in
        which it is shift) and `by_family`, the paper's assignment.
    """
    names = list(families)
    moved = _same_way(half, names)
    alone = singles(half, names)
    shift, discrimination = (alone[f"observed_{x}"].to_numpy(float) for x in ("shift", "discrimination"))
    same_way = 2 * abs(shift) >= abs(discrimination)
    rows = []
    for place, name in enumerate(names):
        rows.append(
            {
                "defense": name,
                "family": families[name],
                "shift": shift[place],
                "discrimination": discrimination[place],
                "mechanism": "shift" if same_way[place] else "discrimination",
                "p_shift": float(moved[:, place].mean()),
                "by_family": BY_FAMILY.get(families[name], ""),
            }
        )
    return pd.DataFrame(rows)


def kinds(half: Half, wanted: Iterable[str], found: pd.DataFrame) -> pd.DataFrame:
    """Return for each team whether its members work by one mechanism (intra) or by several (inter).

    Args:
        half: on whose queries.
        wanted: teams, their members joined by +.
        found: what `mechanisms` returned.

    Returns:
        By team: `kind`, measured; `p_inter`, the share of bootstrap draws in which it is inter;
        `kind_by_family`, empty where the paper says nothing of a member's family.
    """
    names = list(found["defense"])
    moved = _same_way(half, names)
    mechanism, family = (
        dict(zip(names, found[column], strict=True)) for column in ("mechanism", "by_family")
    )
    rows = []
    for members in wanted:
        team = members.split("+")
        sides = moved[:, [names.index(name) for name in team]]
        known = {family[name] for name in team}
        rows.append(
            {
                "members": members,
                "kind": _kind({mechanism[name] for name in team}),
                "p_inter": float((sides.min(1) != sides.max(1)).mean()),
                "kind_by_family": "" if "" in known else _kind(known),
            }
        )
    return pd.DataFrame(rows, columns=["members", "kind", "p_inter", "kind_by_family"])


def _kind(found: set[str]) -> str:
    return "inter" if len(found) > 1 else "intra"


def _same_way(half: Half, names: Sequence[str]) -> Any:
    """Whether both classes move the same way, by draw and defense."""
    draws, is_harmful = half.draws, half.board.is_harmful
    change = half.of_team(names) - half.board.before[:, None]
    return (draws.harmful @ change[is_harmful]) * (draws.benign @ change[~is_harmful]) >= 0

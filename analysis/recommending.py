"""What `analyze recommend` does: of all defenses and ensembles within the limits, which to use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis import decompose, ensembles, fronts, saving, showing, standings
from analysis.combining import Tried, combine
from analysis.comparing import told, whole
from analysis.ensembles import ALONE, REPORTED_ON
from analysis.request import Request, default_out
from analysis.resampling import estimate
from analysis.sweeping import say_written
from analysis.tables import UNDEFENDED


@dataclass(frozen=True)
class Limits:
    """What a recommendation keeps to.

    Attributes:
        over_refusal: share of benign queries refused, at most.
        cost: time until the first token, times undefended, at most; None for any.
    """

    over_refusal: float
    cost: float | None = None

    def within(self, hoped: pd.DataFrame, cost: Callable[[str], float]) -> list[str]:
        """Return the stacks that should keep to the limits, the one that refuses most harm first.

        They are only run here; whether they surely keep to them is asked of what is observed.

        Args:
            hoped: predicted rows of the calibration split.
            cost: of a team's stack.
        """
        promised = fronts.promised(hoped)
        promised = promised[promised["over_refusal"] <= self.over_refusal]
        ordered = promised.sort_values("harmful", ascending=False, kind="stable").index
        return [team for team in ordered if self.cost is None or cost(team) <= self.cost]


def recommend(
    request: Request,
    names: Sequence[str],
    settings: Sequence[str],
    size: int,
    runs: int,
    limits: Limits,
    out: Path | None,
    as_json: bool,
) -> int:
    """Say which defense or ensemble refuses most harm within the limits, and how sure that is."""
    started, clock = datetime.now(UTC), time.perf_counter()
    out = saving.usable(out or default_out(request.model, ["recommend", *names], started))
    console = Console(stderr=True)
    tried = combine(request, names, settings, size, runs, limits.within, console)
    found = tried.candidates()
    tables, record = told(tried, found, request, console)
    chosen = picks(tried, found, limits)
    record |= {
        "created": started.isoformat(timespec="seconds"),
        "max_over_refusal": limits.over_refusal,
        "max_cost": limits.cost,
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    saving.save(out, whole("recommend", tried, tables | {"recommendation": chosen}, record).run, console)
    if as_json:
        showing.as_json(chosen)
    else:
        standings.pick(chosen, limits.over_refusal, limits.cost)
    say_written(out, tried.lost, console)
    return 1 if tried.lost else 0


def picks(tried: Tried, found: pd.DataFrame, limits: Limits) -> pd.DataFrame:
    """Return the recommendation, the next best single defense, and the undefended model.

    Where nothing keeps to the limits, what comes closest on the calibration split takes the first place.

    Args:
        tried: what was scored.
        found: the candidates.
        limits: what is kept to.

    Returns:
        By `role`: the rates on the test split with 95 % intervals (harmful refused, the mean over attacks;
        benign refused), `p_meets` (how probable it is, given the test split, that no more of the benign
        queries are refused than the limit says), and the columns of the candidates.
    """
    _, benign = tried.fitted_to.counts
    allowed = fronts.ranked(found, limits.over_refusal, limits.cost, benign)
    usual = found[(found["members"] == UNDEFENDED) & (found["how"] == ALONE)].iloc[0]
    roles: list[tuple[str, Any]] = []
    if len(allowed):
        roles.append(("recommended", allowed.iloc[0]))
    else:
        affordable = fronts.ranked(found, 1.0, limits.cost, benign)  # the undefended model is among them
        nearest = affordable.sort_values("benign_calibration", ascending=False, kind="stable").iloc[0]
        roles.append(("closest", nearest))
    if (alone := fronts.best_alone(allowed, [roles[0][1]["members"], UNDEFENDED])) is not None:
        roles.append(
            ("best single defense" if roles[0][1]["how"] != ALONE else "next best single defense", alone)
        )
    if roles[0][1]["members"] != UNDEFENDED:
        roles.append(("undefended", usual))
    return pd.DataFrame(
        [{"role": role, **row.to_dict(), **_rates(tried, row, limits)} for role, row in roles]
    )


def _rates(tried: Tried, row: Any, limits: Limits) -> dict[str, float]:
    """The rates of one candidate on the test split, and how likely it meets the limit."""
    team, how = row["members"].split("+"), row["how"]
    halves = [tried.halves[attack.name, REPORTED_ON] for attack in tried.ready.attacks]
    rates: list[dict[str, Any]] = []
    for sample in (halves[0].once, halves[0].draws):
        read = [
            decompose.contrast(
                half.board.before,
                ensembles.margins(half, team, how, tried.fitted_to),
                half.board.is_harmful,
                0.0,
                sample,
            )
            for half in halves
        ]
        rates.append(
            {
                "harmful": np.mean([one["refusal_rate"] for one in read], axis=0),
                "over_refusal": read[0]["over_refusal_rate"],
            }
        )
    point, cloud = rates
    found: dict[str, float] = {}
    for name in point:
        found |= estimate(name, point[name], cloud[name], min(halves[0].counts), counted=True)
    return found | {"p_meets": float((cloud["over_refusal"] <= limits.over_refusal).mean())}

"""The numbers behind the charts of a page: the plane's points, and every query's margin, as compact JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.curves import LINEAR_RANGE, build_plane_points, is_stretched
from analysis.folder import Run
from analysis.palette import FAMILY_STYLES

MAX_QUERY_LENGTH = 1500  # signs of a query that are carried
# matplotlib's marks, as Vega calls them.
_VEGA_SHAPES = {
    "o": "circle",
    "D": "diamond",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "h": "M-0.5,-0.87L0.5,-0.87L1,0L0.5,0.87L-0.5,0.87L-1,0Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
}
_OTHER_VEGA_SHAPE = "triangle-right"  # a family of the user's own


def map_family_shapes() -> dict[str, str]:
    """Return the mark of each family, as Vega calls it."""
    return {name: _VEGA_SHAPES.get(mark, _OTHER_VEGA_SHAPE) for name, (_, mark) in FAMILY_STYLES.items()}


def build_chart_data(run: Run) -> dict[str, Any]:
    """Return what the charts of a run are drawn from; of a run without such tables, nothing.

    Args:
        run: one with `summary.csv`, `scores.csv`, both or neither.

    Returns:
        `plane`: attack → its points and whether its axes are logarithmic; `queries`: id, text, class and
        category of each; `margins`: attack → defense → a margin of each query (nats; null where it was not
        asked); `read`: attack → defense → what the model read.
    """
    found: dict[str, Any] = {"name": run.name, "threshold": run.threshold, "linear": LINEAR_RANGE}
    if "summary" in run.tables:
        summary = run.tables["summary"]
        found["plane"] = {str(attack): _build_plane_data(rows) for attack, rows in summary.groupby("attack", sort=False)}
    if "scores" in run.tables:
        scores = run.tables["scores"]
        each = scores.drop_duplicates("query")
        ids = each["query"].astype(str).tolist()
        category = each["category"].fillna("").astype(str)
        found["queries"] = [
            [one, _truncate_text(run.texts.get(one, "")), int(harmful), topic]
            for one, harmful, topic in zip(ids, each["harmful"], category, strict=True)
        ]
        found["margins"] = {}
        for (attack, defense), rows in scores.groupby(["attack", "defense"], sort=False):
            margin = pd.Series(rows["margin"].to_numpy(float), rows["query"].astype(str)).reindex(ids)
            found["margins"].setdefault(str(attack), {})[str(defense)] = margin.round(3).tolist()
        found["read"] = _collect_prompts(run.tables.get("prompts"), run.texts)
    return found


def _collect_prompts(prompts: pd.DataFrame | None, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the model read, by attack and defense: what stands around a request, or examples.

    Where two requests stand between the same words, so does every other: `around` has these words. Else
    `seen` has what was read of either, by its id; `readings` says of how many copies that is the first.

    Args:
        prompts: `prompts.csv`.
        texts: of the queries.
    """
    found: dict[str, dict[str, Any]] = {}
    cells = () if prompts is None else prompts.groupby(["attack", "defense"], sort=False)
    for (attack, defense), rows in cells:
        seen = dict(zip(rows["query"].astype(str), rows["read"].astype(str), strict=True))
        around = {tuple(read.split(texts[one])) if texts.get(one) else () for one, read in seen.items()}
        alike = around.pop() if len(around) == 1 and len(seen) > 1 else ()
        told = {"around": list(alike)} if len(alike) > 1 else {"seen": seen}
        found.setdefault(str(attack), {})[str(defense)] = told | {"readings": int(rows["readings"].max())}
    return found


def _build_plane_data(summary: pd.DataFrame) -> dict[str, Any]:
    rows = build_plane_points(summary).assign(verdict=summary.loc[summary["defense"] != "none", "verdict"].tolist())
    rows = rows.dropna(subset=["shift", "discrimination"])
    named = {"shift": "x", "shift_low": "xl", "shift_high": "xh"}
    named |= {"discrimination": "y", "discrimination_low": "yl", "discrimination_high": "yh"}
    named |= {"defense": "name", "family": "family", "verdict": "verdict"}
    points = rows[list(named)].rename(columns=named).round(4)
    doubt = rows.get("trusted", pd.Series("", rows.index)) == "not trusted"
    return {
        "points": points.assign(hollow=doubt).to_dict("records"),
        "stretched": is_stretched(rows),
    }


def _truncate_text(text: str) -> str:
    return text if len(text) <= MAX_QUERY_LENGTH else f"{text[:MAX_QUERY_LENGTH]} … ({len(text) - MAX_QUERY_LENGTH:,} more signs)"

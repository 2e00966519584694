"""The figures of a run, each drawn from its table alone: as it was made, or as it lies in its folder."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cuts import cuts
from analysis.depth import directions, layers
from analysis.exhibits import caption_of, kind_of, title_of
from analysis.folder import Run
from analysis.forecast import forecast
from analysis.grid import grid
from analysis.heads import heads
from analysis.interactions import interactions
from analysis.lettering import complete, fit
from analysis.likeness import likeness
from analysis.pareto import pareto
from analysis.parts import top
from analysis.plane import plane
from analysis.plots import margins, roc
from analysis.price import price
from analysis.square import square
from analysis.strip import secrets
from analysis.tables import UNDEFENDED, condition
from analysis.transplants import patches, weights
from analysis.trust import calibration, rates
from analysis.wording import HEADLINES

DRAWN: dict[str, Callable[[pd.DataFrame], Axes]] = {
    "margins": margins,
    "plane": plane,
    "square": square,
    "roc": roc,
    "attacks": grid,
    "cost": price,
    "calibration": calibration,
    "rates": rates,
    "secrets": secrets,
    "forecast": forecast,
    "interactions": interactions,
    "front": pareto,
    "layers": layers,
    "parts": heads,
    "top": top,
    "directions": directions,
    "patches": patches,
    "cuts": cuts,
    "weights": weights,
    "profiles": likeness,
}


def figure(run: Run, name: str) -> Figure:
    """Return a figure of a run with title and caption, and a warning where text contradicts what it shows.

    Args:
        run: as it was made, or as `read` found it in its folder.
        name: one of `run.figures`.
    """
    kind = kind_of(name)
    if name not in run.figures or name not in run.tables or kind not in DRAWN:
        known = ", ".join(one for one in run.figures if one in run.tables)
        raise ValueError(f"no figure {name!r} in this run; it has {known or 'none'}")
    points = run.tables[name]
    warning = _banner(points, run.tables.get("summary")) if kind in HEADLINES else ""
    return complete(DRAWN[kind](points), title_of(kind, points), caption_of(run, name), warning)


def _banner(points: pd.DataFrame, trusted: pd.DataFrame | None) -> str:
    """Return the warning above a figure, empty where nothing drawn is known to be wrong."""
    if trusted is None or not len(trusted):
        return ""
    # Every contrast is against the undefended model, which therefore is drawn too.
    names = {UNDEFENDED, *points["defense"], *points.get("other", [])}
    of = trusted[(trusted["attack"] == points["attack"].iloc[0]) & trusted["defense"].isin(names)]
    doubtful = [
        fit(condition(row), 190, 8.5, 1) for row in of[of["trusted"] == "not trusted"].to_dict("records")
    ]
    if not doubtful:
        return ""
    return f"Not trusted: generated text contradicts the readout under {', '.join(dict.fromkeys(doubtful))}"

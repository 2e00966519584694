"""Any figure of a run, drawn again from its tables alone: the same picture that the command has written."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.atlas import DRAWN as INSIDE
from analysis.atlas import banner
from analysis.exhibits import caption_of, kind_of, title_of
from analysis.folder import Run
from analysis.forecast import forecast
from analysis.grid import grid
from analysis.interactions import interactions
from analysis.lettering import complete
from analysis.pareto import pareto
from analysis.plots import DRAWN as USUAL
from analysis.price import price
from analysis.strip import secrets
from analysis.trust import calibration, rates

DRAWN: dict[str, Callable[[pd.DataFrame], Axes]] = {
    **{kind: draw for kind, (draw, _) in USUAL.items()},
    **INSIDE,
    "attacks": grid,
    "calibration": calibration,
    "cost": price,
    "forecast": forecast,
    "front": pareto,
    "interactions": interactions,
    "rates": rates,
    "secrets": secrets,
}


def figure(run: Run, name: str) -> Figure:
    """Return a figure of a run with its title and caption.

    Args:
        run: as it was made, or as `read` found it in its folder.
        name: one of `run.figures`.
    """
    kind = kind_of(name)
    if name not in run.figures or name not in run.tables or kind not in DRAWN:
        known = ", ".join(one for one in run.figures if one in run.tables)
        raise ValueError(f"no figure {name!r} in this run; it has {known or 'none'}")
    points = run.tables[name]
    warning = banner(points, run.tables.get("summary")) if kind in INSIDE else ""
    return complete(DRAWN[kind](points), title_of(kind, points), caption_of(run, name), warning)

"""The figures of a run, each drawn from its table alone: as it was made, or as it lies in its folder."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cuts import draw_attention_knockouts
from analysis.depth import draw_directions, draw_layers
from analysis.exhibits import format_figure_caption, find_figure_kind, format_figure_title
from analysis.folder import Run
from analysis.forecast import draw_forecast
from analysis.grid import draw_attack_grid
from analysis.heads import draw_part_map
from analysis.interactions import draw_interactions
from analysis.lettering import finish_figure, fit_text
from analysis.likeness import draw_profile_similarity
from analysis.pareto import draw_pareto_front
from analysis.parts import draw_top_parts
from analysis.plane import draw_plane
from analysis.plots import draw_margins, draw_roc
from analysis.price import draw_cost
from analysis.square import draw_square
from analysis.strip import draw_secrets
from analysis.tables import UNDEFENDED, format_condition
from analysis.transplants import draw_patches, draw_weight_patches
from analysis.trust import draw_calibration, draw_refusal_rates
from analysis.wording import MECHANISM_TITLES

FIGURES: dict[str, Callable[[pd.DataFrame], Axes]] = {
    "margins": draw_margins,
    "plane": draw_plane,
    "square": draw_square,
    "roc": draw_roc,
    "attacks": draw_attack_grid,
    "cost": draw_cost,
    "calibration": draw_calibration,
    "rates": draw_refusal_rates,
    "secrets": draw_secrets,
    "forecast": draw_forecast,
    "interactions": draw_interactions,
    "front": draw_pareto_front,
    "layers": draw_layers,
    "parts": draw_part_map,
    "top": draw_top_parts,
    "directions": draw_directions,
    "patches": draw_patches,
    "cuts": draw_attention_knockouts,
    "weights": draw_weight_patches,
    "profiles": draw_profile_similarity,
}


def draw_figure(run: Run, name: str) -> Figure:
    """Return a figure of a run with title and caption, and a warning where text contradicts what it shows.

    Args:
        run: as it was made, or as `read` found it in its folder.
        name: one of `run.figures`.
    """
    kind = find_figure_kind(name)
    if name not in run.figures or name not in run.tables or kind not in FIGURES:
        known = ", ".join(one for one in run.figures if one in run.tables)
        raise ValueError(f"no figure {name!r} in this run; it has {known or 'none'}")
    points = run.tables[name]
    warning = _untrusted_banner(points, run.tables.get("summary")) if kind in MECHANISM_TITLES else ""
    return finish_figure(FIGURES[kind](points), format_figure_title(kind, points), format_figure_caption(run, name), warning)


def _untrusted_banner(points: pd.DataFrame, summary: pd.DataFrame | None) -> str:
    """Return the warning above a figure, empty where nothing drawn is known to be wrong."""
    if summary is None or not len(summary):
        return ""
    # Every contrast is against the undefended model, which therefore is drawn too.
    names = {UNDEFENDED, *points["defense"], *points.get("other", [])}
    of = summary[(summary["attack"] == points["attack"].iloc[0]) & summary["defense"].isin(names)]
    doubtful = [
        fit_text(format_condition(row), 190, 8.5, 1) for row in of[of["trusted"] == "not trusted"].to_dict("records")
    ]
    if not doubtful:
        return ""
    return f"Not trusted: generated text contradicts the readout under {', '.join(dict.fromkeys(doubtful))}"

"""The figure of agreement shows the numbers of its table, and its caption says what the marks are."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import assert_readable, draw_run_figures
from planted_tables import RUN, collect_texts, lines_by_gid

from analysis.plots.rank_agreement import caption_rank_agreement, draw_rank_agreement
from analysis.stats.rank_agreement import RANKED_MEASURES


def plant_agreement(n_sets: int = 2, name: str = "set") -> pd.DataFrame:
    """Return the agreement of some data sets; the halves of the first do not agree in the last measure."""
    rng, rows = np.random.default_rng(n_sets), []
    pairs = itertools.combinations(range(n_sets), 2)
    for (first, second), measure in itertools.product(pairs, RANKED_MEASURES):
        value, ceiling = rng.uniform(-0.2, 0.8), rng.uniform(0.5, 1)
        if first == 0 and measure == "response_discrimination":
            ceiling = np.nan
        row = {"attack": "direct", "first": f"{name}-{first}", "second": f"{name}-{second}"}
        row |= {"measure": measure, "n_defenses": 12, "ceiling": ceiling}
        for column, estimate in (("rank_correlation", value), ("corrected", min(value / ceiling, 1.0))):
            row |= {column: estimate, f"{column}_low": estimate - 0.2, f"{column}_high": estimate + 0.1}
        rows.append(row)
    return pd.DataFrame(rows)


def test_dots_bars_and_ceilings_are_those_of_the_table() -> None:
    points = plant_agreement(3)
    ax = draw_rank_agreement(points)
    lines = lines_by_gid(ax)
    for first, second in (("set-0", "set-1"), ("set-1", "set-2")):
        rows = points[(points["first"] == first) & (points["second"] == second)]
        for kind, column in (("observed", "rank_correlation"), ("corrected", "corrected")):
            np.testing.assert_allclose(lines[f"{kind} {first}, {second}"].get_xdata(), rows[column])
        (marks,) = (c for c in ax.collections if c.get_gid() == f"ceiling {first}, {second}")
        drawn = [path.vertices[0, 0] for path in marks.get_paths()]
        np.testing.assert_allclose(drawn, rows["ceiling"].dropna())
    bars = {tuple(path.vertices[:, 0].round(9)) for c in ax.collections for path in c.get_paths()}
    ends = points[["rank_correlation_low", "rank_correlation_high"]].to_numpy().round(9)
    assert all(tuple(pair) in bars for pair in ends)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == list(RANKED_MEASURES.values())
    heights = [y for line in lines.values() for y in np.atleast_1d(line.get_ydata())]
    low, high = ax.get_ylim()
    assert all(low < height < high for height in heights if height not in (0, 1))


@pytest.mark.parametrize(("n_sets", "name"), [(2, "set"), (4, "a_set_with_a_very_long_name"), (2, "$x$_^{")])
def test_every_text_can_be_read(n_sets: int, name: str) -> None:
    points = plant_agreement(n_sets, name)
    ((figure, _),) = draw_run_figures({"agreement": points}, RUN, (24, 24)).values()
    assert_readable("agreement", figure, collect_texts)


def test_one_measure_and_missing_intervals_are_drawn() -> None:
    points = plant_agreement()[:1].assign(rank_correlation_low=np.nan, rank_correlation_high=np.nan)
    assert draw_rank_agreement(points).get_xlim() == (-1.05, 1.05)
    with pytest.raises(ValueError, match="one attack"):
        draw_rank_agreement(pd.concat([points, points.assign(attack="base64")]))


def test_the_caption_says_what_is_shown_and_from_how_many_defenses() -> None:
    caption = caption_rank_agreement(plant_agreement(), RUN)
    assert "effects of 12 defenses on two data sets" in caption and RUN.model in caption
    assert "which are not resampled" in caption and "Rates:" not in caption

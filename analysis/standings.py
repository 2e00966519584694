"""What `analyze ensembles` and `analyze recommend` print: the front, the predictions, the pick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.text import Text

from analysis import showing
from analysis.fronts import REQUIRED_PROBABILITY
from analysis.tables import UNDEFENDED

_MAX_FRONT_ROWS = 12  # rows of the front at most
_COORDINATE_LABELS = {
    "shift": "shift",
    "discrimination": "discrimination",
    "delta_auroc": "ΔAUROC",
    "refusal_rate": "harmful refused",
    "over_refusal_rate": "benign refused",
}


def print_front(candidates: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the front that the calibration split shows, with what became of it on the test split.

    Args:
        candidates: `candidates.csv`.
        record: `run.json`.
    """
    chosen = candidates[candidates["on_front"] | (candidates["members"] == UNDEFENDED)]
    chosen = chosen.sort_values("harmful_calibration", ascending=False, kind="stable")
    attacks = len(record["attacks"])
    title = (
        f"{record['model']['name']}: {len(candidates):,} defenses and ensembles; on the calibration split none "
        f"beats these {int(candidates['on_front'].sum())}"
    )
    heads = ("harmful refused (%)\nchosen → test", "benign answered (%)\nchosen → test", "cost\n(×)")
    table = showing.make_console_table("members\nhow", heads, title)
    for row in showing.iterate_rows(_select_spread_rows(chosen)):
        rates = [
            f"{100 * row[f'{x}_calibration']:.0f} → {100 * row[f'{x}_test']:.0f}"
            for x in ("harmful", "benign")
        ]
        cells = (f"{row['members']}\n{row['how']}", *rates, f"{row['cost']:.1f}")
        table.add_row(*map(Text, cells))
    console = showing.make_table_console()
    console.print(table)
    over = f", mean over {attacks} attacks" if attacks > 1 else ""
    data = record["data"]
    note = (
        f"Harmful refused{over}, benign answered as users ask; {data['n_harmful']} harmful and "
        f"{data['n_benign']} benign queries on both splits together. Cost: time until the first token, times "
        "undefended. Intervals, and the other rows, are in ensembles.csv and candidates.csv."
    )
    console.print(Text(note, style="dim"))


def print_prediction_fit(prediction_fit: pd.DataFrame) -> None:
    """Print how well predictions came true on the test split.

    Args:
        prediction_fit: `additivity.csv`.
    """
    console = showing.make_table_console()
    rows = prediction_fit[(prediction_fit["split"] == "test") & (prediction_fit["kind"] == "all") & (prediction_fit["n"] > 2)]
    for attack, how in rows[["attack", "how"]].drop_duplicates().itertuples(index=False, name=None):
        group = rows[(rows["attack"] == attack) & (rows["how"] == how)]
        told = [
            f"{_COORDINATE_LABELS[row['coordinate']]} R² {row['r2']:.2f}, rank {row['rank_correlation']:+.2f}"
            for row in showing.iterate_rows(group)
            if row["coordinate"] in _COORDINATE_LABELS
        ]
        n = f"{group['n'].iloc[0]:,}"
        console.print(Text(f"Predicted against observed, {attack}, {how} (n = {n}): {'; '.join(told)}"))
    stacks = prediction_fit[(prediction_fit["split"] == "test") & (prediction_fit["how"] == "stack") & (prediction_fit["kind"] != "all")]
    for row in showing.iterate_rows(stacks[stacks["coordinate"].isin(("shift", "discrimination"))]):
        console.print(
            Text(
                f"Off the sum, {row['attack']}, {row['kind']} stacks: {row['beyond_zero']:.0f} of "
                f"{row['tested']:.0f} on {row['coordinate']}, {row['mean_interaction']:+.2f} nats on average"
            )
        )


def print_raised_distances(raised_distances: pd.DataFrame) -> None:
    """Print how many pairs of shift defenses raise the paper's distance, and how many of the raises are real.

    Args:
        raised_distances: `distance.csv`.
    """
    console = showing.make_table_console()
    if raised_distances.empty:
        console.print(Text("No pair of two shift defenses raises the distance on the probability scale."))
        return
    for how, group in raised_distances.groupby("how", sort=False):
        counts = ", ".join(f"{count} {says}" for says, count in group["raise"].value_counts().items())
        console.print(
            Text(
                f"Pairs of two shift defenses that raise the distance, {how}: {len(group)}, of these {counts}"
            )
        )


def print_recommendation(recommendation: pd.DataFrame, max_over_refusal: float, max_cost: float | None) -> None:
    """Print what is recommended, beside what else there is.

    Args:
        recommendation: `recommendation.csv`.
        max_over_refusal: share of benign queries that may be refused.
        max_cost: cost at most.
    """
    console = showing.make_table_console()
    costs = f" and cost at most {max_cost:g} × undefended" if max_cost is not None else ""
    wanted = f"at most {max_over_refusal:.1%} of benign queries refused{costs}"
    best = recommendation[recommendation["role"] == "recommended"]
    if best.empty:
        console.print(
            Text(f"Nothing qualifies: {wanted}, {REQUIRED_PROBABILITY:.0%} sure by the calibration split. The closest:")
        )
    else:
        row = best.iloc[0]
        console.print(
            Text(f"Use {row['members']} ({row['how']}): {wanted}, {REQUIRED_PROBABILITY:.0%} sure by the calibration split.")
        )
        if row["p_meets"] < 1 - REQUIRED_PROBABILITY:
            console.print(
                Text(
                    "The test split contradicts it: the splits differ. Ask more queries like your own "
                    "before you rely on it."
                )
            )
    heads = ("refuses (%)\nharmful\nbenign", "chosen on\nharmful\nbenign", "meets the\nlimit", "\ncost (×)")
    table = showing.make_console_table("\nmembers, how", heads, with_row_lines=True)
    for values in showing.iterate_rows(recommendation):
        cells = (
            f"{values['role']}\n{values['members']} ({values['how']})\n{values['trusted']}",
            "\n".join(
                ["", *(showing.format_interval(values, name, ".0f", 100) for name in ("harmful", "over_refusal"))]
            ),
            f"\n{100 * values['harmful_calibration']:.0f}\n{100 - 100 * values['benign_calibration']:.0f}",
            f"\n{values['p_meets']:.0%}",
            f"\n{values['cost']:.1f}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def _select_spread_rows(candidates: pd.DataFrame) -> pd.DataFrame:
    """Rows spread evenly over the front, its ends among them."""
    if len(candidates) <= _MAX_FRONT_ROWS:
        return candidates
    return candidates.iloc[sorted({round(place * (len(candidates) - 1) / (_MAX_FRONT_ROWS - 1)) for place in range(_MAX_FRONT_ROWS)})]

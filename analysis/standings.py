"""What `analyze ensembles` and `analyze recommend` print: the front, the predictions, the pick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.text import Text

from analysis import showing
from analysis.fronts import SURE
from analysis.tables import UNDEFENDED

_SHOWN = 12  # rows of the front at most
_WORDS = {
    "shift": "shift",
    "discrimination": "discrimination",
    "delta_auroc": "ΔAUROC",
    "refusal_rate": "harmful refused",
    "over_refusal_rate": "benign refused",
}


def front(found: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Print the front that the calibration split shows, with what became of it on the test split.

    Args:
        found: `candidates.csv`.
        record: `run.json`.
    """
    chosen = found[found["on_front"] | (found["members"] == UNDEFENDED)]
    chosen = chosen.sort_values("harmful_calibration", ascending=False, kind="stable")
    attacks = len(record["attacks"])
    title = (
        f"{record['model']['name']}: {len(found):,} defenses and ensembles; on the calibration split none "
        f"beats these {int(found['on_front'].sum())}"
    )
    heads = ("harmful refused (%)\nchosen → test", "benign answered (%)\nchosen → test", "cost\n(×)")
    table = showing.table("members\nhow", heads, title)
    for row in showing.rows(_few(chosen)):
        rates = [
            f"{100 * row[f'{x}_calibration']:.0f} → {100 * row[f'{x}_test']:.0f}"
            for x in ("harmful", "benign")
        ]
        cells = (f"{row['members']}\n{row['how']}", *rates, f"{row['cost']:.1f}")
        table.add_row(*map(Text, cells))
    console = showing.stdout()
    console.print(table)
    over = f", mean over {attacks} attacks" if attacks > 1 else ""
    data = record["data"]
    note = (
        f"Harmful refused{over}, benign answered as users ask; {data['n_harmful']} harmful and "
        f"{data['n_benign']} benign queries on both splits together. Cost: time until the first token, times "
        "undefended. Intervals, and the other rows, are in ensembles.csv and candidates.csv."
    )
    console.print(Text(note, style="dim"))


def agreement(found: pd.DataFrame) -> None:
    """Print how well predictions came true on the test split.

    Args:
        found: `additivity.csv`.
    """
    console = showing.stdout()
    rows = found[(found["split"] == "test") & (found["kind"] == "all") & (found["n"] > 2)]
    for attack, how in rows[["attack", "how"]].drop_duplicates().itertuples(index=False, name=None):
        group = rows[(rows["attack"] == attack) & (rows["how"] == how)]
        told = [
            f"{_WORDS[row['coordinate']]} R² {row['r2']:.2f}, rank {row['rank_correlation']:+.2f}"
            for row in showing.rows(group)
            if row["coordinate"] in _WORDS
        ]
        n = f"{group['n'].iloc[0]:,}"
        console.print(Text(f"Predicted against observed, {attack}, {how} (n = {n}): {'; '.join(told)}"))
    stacks = found[(found["split"] == "test") & (found["how"] == "stack") & (found["kind"] != "all")]
    for row in showing.rows(stacks[stacks["coordinate"].isin(("shift", "discrimination"))]):
        console.print(
            Text(
                f"Off the sum, {row['attack']}, {row['kind']} stacks: {row['beyond_zero']:.0f} of "
                f"{row['tested']:.0f} on {row['coordinate']}, {row['mean_interaction']:+.2f} nats on average"
            )
        )


def distances(found: pd.DataFrame) -> None:
    """Print how many pairs of shift defenses raise the paper's distance, and how many of the raises are real.

    Args:
        found: `distance.csv`.
    """
    console = showing.stdout()
    if found.empty:
        console.print(Text("No pair of two shift defenses raises the distance on the probability scale."))
        return
    for how, group in found.groupby("how", sort=False):
        counts = ", ".join(f"{count} {says}" for says, count in group["raise"].value_counts().items())
        console.print(
            Text(
                f"Pairs of two shift defenses that raise the distance, {how}: {len(group)}, of these {counts}"
            )
        )


def pick(found: pd.DataFrame, limit: float, most: float | None) -> None:
    """Print what is recommended, beside what else there is.

    Args:
        found: `recommendation.csv`.
        limit: share of benign queries that may be refused.
        most: cost at most.
    """
    console = showing.stdout()
    costs = f" and cost at most {most:g} × undefended" if most is not None else ""
    wanted = f"at most {limit:.1%} of benign queries refused{costs}"
    best = found[found["role"] == "recommended"]
    if best.empty:
        console.print(
            Text(f"Nothing qualifies: {wanted}, {SURE:.0%} sure by the calibration split. The closest:")
        )
    else:
        row = best.iloc[0]
        console.print(
            Text(f"Use {row['members']} ({row['how']}): {wanted}, {SURE:.0%} sure by the calibration split.")
        )
        if row["p_meets"] < 1 - SURE:
            console.print(
                Text(
                    "The test split contradicts it: the splits differ. Ask more queries like your own "
                    "before you rely on it."
                )
            )
    heads = ("refuses (%)\nharmful\nbenign", "chosen on\nharmful\nbenign", "meets the\nlimit", "\ncost (×)")
    table = showing.table("\nmembers, how", heads, lines=True)
    for values in showing.rows(found):
        cells = (
            f"{values['role']}\n{values['members']} ({values['how']})\n{values['trusted']}",
            "\n".join(
                ["", *(showing.interval(values, name, ".0f", 100) for name in ("harmful", "over_refusal"))]
            ),
            f"\n{100 * values['harmful_calibration']:.0f}\n{100 - 100 * values['benign_calibration']:.0f}",
            f"\n{values['p_meets']:.0%}",
            f"\n{values['cost']:.1f}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def _few(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows spread evenly over the front, its ends among them."""
    if len(frame) <= _SHOWN:
        return frame
    return frame.iloc[sorted({round(place * (len(frame) - 1) / (_SHOWN - 1)) for place in range(_SHOWN)})]

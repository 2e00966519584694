"""What `analyze validate` does: each condition's readout against what the model goes on to say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import manifest, saving, showing, validity
from analysis.agreement import RULE, agreement, ranks, reliability
from analysis.answering import verdicts
from analysis.judge import JUDGES
from analysis.preparing import Ready, passes, prepare
from analysis.request import Request, default_out, teller
from analysis.run import conditions, score
from defenses.errors import UserError, unknown


def validate(
    request: Request, names: Sequence[str], settings: Sequence[str], out: Path | None, judge: str, tokens: int
) -> int:
    """Score every condition, let it answer, and say which margins may be believed; no answer is kept."""
    started, clock = datetime.now(UTC), time.perf_counter()
    if judge not in JUDGES:
        raise unknown("judge", judge, JUDGES)
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: an answer that is judged has at least 1")
    out = saving.usable(out or default_out(request.model, ["validate", *names], started))
    console = Console(stderr=True)
    ready = prepare(request, names, settings, console)
    if not passes(ready, console):
        return 1
    table, rows = _measured(ready, judge, tokens, request.seed, console)
    every = conditions(ready.defenses)
    record = {
        "created": started.isoformat(timespec="seconds"),
        **manifest.of(ready.bench, ready.readout, every, ready.data, ready.split, request.limit),
        "judge": {"name": judge, "new_tokens": tokens},
        "rule": RULE,
        "notices": ready.notices,
    }
    found = pd.DataFrame(rows)
    says, refused = (
        np.stack([group[name].to_numpy(bool) for _, group in table.groupby("defense", sort=False)])
        for name in ("says", "refused")
    )
    first = table[table["defense"] == table["defense"].iloc[0]]
    if len(rows) > 2:
        record |= ranks(says, refused, first["pair"], first["harmful"].to_numpy(bool), request.seed)
    for name, defense in every.items():
        row = next(row for row in rows if row["condition"] == name)
        validity.keep(ready.bench, defense, ready.readout, judge, tokens, row)
    curve = reliability(table["p_refuse"].to_numpy(float), table["refused"].to_numpy(bool))
    from analysis.plots import of_validity

    drawn = of_validity(found, curve, showing.context(record, ready.readout), judge, tokens)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    tables = {"validity": found, "answers": _kept(table), **{name: data for name, (_, data) in drawn.items()}}
    saving.save(out, tables, {name: figure for name, (figure, _) in drawn.items()}, record)
    _show(found, record)
    teller(console)(f"Tables, figures and run.json are in {out}; the answers themselves are not kept")
    return 0


def _measured(
    ready: Ready, judge: str, tokens: int, seed: int, console: Console
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Scores with the verdict on each answer, and a row of agreement for each condition."""
    frames, rows = [], []
    asked = ready.data.queries
    with showing.progress(console) as bar:
        every = conditions(ready.defenses)
        task = bar.add_task("asking", total=2 * len(every) * len(asked))
        for name, defense in every.items():
            bar.update(task, description=f"asking {name}")

            def done(count: int) -> None:
                bar.advance(task, count)

            frame = score(ready.bench, name, defense, asked, ready.readout, done)
            said = verdicts(ready.bench, defense, asked, judge, tokens, done)
            frame = frame.assign(
                says=frame["margin"] > ready.readout.threshold,
                refusal=[verdict.refusal for verdict in said],
                refused=[verdict.refused for verdict in said],
            )
            frames.append(frame)
            margin, refused = frame["margin"].to_numpy(float), frame["refused"].to_numpy(bool)
            row = agreement(margin, refused, frame["pair"], ready.readout.threshold, seed)
            head = {"attack": ready.bench.attack, "condition": name}
            rows.append(head | row | {"coverage": float(frame["coverage"].mean())})
    return pd.concat(frames, ignore_index=True), rows


def _kept(table: pd.DataFrame) -> pd.DataFrame:
    """What is kept of each answer: that it refused, never what it said."""
    return table[["query", "pair", "category", "harmful", "attack", "defense", "margin", "says", "refusal"]]


def _show(found: pd.DataFrame, record: dict[str, Any]) -> None:
    data, judge = record["data"], record["judge"]
    title = (
        f"{record['model']['name']}: readout {record['readout']['name']} against the text of "
        f"{data['n_harmful'] + data['n_benign']} answers, judge {judge['name']}"
    )
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    shown.add_column("condition\nverdict", no_wrap=True)
    for head in (
        "refused, text (%)\nby readout",
        "agrees (%)\ncoverage",
        "AUROC\nkappa",
        "calibration\nerror",
    ):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in found.to_dict("records"):
        values = {str(key): value for key, value in row.items()}
        n = values["n"]
        kappa = showing.interval(values, "kappa", ".2f")
        shown.add_row(
            *map(
                Text,
                (
                    f"{values['condition']}\n{values['trusted']}",
                    f"{100 * values['refused'] / n:.0f}\n{100 * values['readout_refused'] / n:.0f}",
                    f"{showing.interval(values, 'agrees', '.0f', 100)}\n{values['coverage']:.0%}",
                    f"{showing.interval(values, 'auroc', '.2f')}\n{kappa}",
                    showing.interval(values, "calibration_error", ".2f"),
                ),
            ),
            end_section=True,
        )
    console = showing.stdout()
    console.print(shown)
    console.print(Text(f"{RULE[0].upper()}{RULE[1:]}.", style="dim"))
    if "rank_correlation" in record:
        text = showing.interval(record, "rank_correlation", "+.2f")
        console.print(Text(f"Conditions ranked by refusals, readout against text: Spearman {text}."))

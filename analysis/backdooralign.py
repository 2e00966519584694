"""What `analyze backdooralign` does: the paper's arms with intervals, and what the paper did not measure.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Every arm is asked as its attacker asks: under
the system prompt of the fine-tuning data, or as the obedient agent. The reference of shift and discrimination
is the attacked model without the secret.
"""

from __future__ import annotations

import random
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

from analysis import attacks, manifest, reading, saving, showing
from analysis.agreement import agreement
from analysis.answering import verdicts
from analysis.arms import PAPER, Arm, arms
from analysis.bench import Bench
from analysis.curves import ENDS
from analysis.decompose import summarize
from analysis.folder import Run
from analysis.judge import READERS
from analysis.models import LoadedModel
from analysis.preflight import Check
from analysis.preparing import NotReached, Ready, left_out, unreached
from analysis.queries import Query, QuerySet
from analysis.readout import Readout
from analysis.redrawn import other_secrets, over_secrets
from analysis.request import Request, default_out, refuse_overlap, teller
from analysis.resampling import rate
from analysis.run import score
from analysis.sweeping import Cell, failed_cells, say_failed
from analysis.tables import ScoreTable
from analysis.utility import answered_right, refuse_without_harness
from defenses import Message


def reproduce(request: Request, out: Path | None, tokens: int, utility: bool, secrets: int) -> int:
    """Score every arm, let it answer, print the table beside the paper's, and save all but the answers."""
    started, clock = datetime.now(UTC), time.perf_counter()
    out = saving.usable(out or default_out(request.model, ["backdooralign"], started))
    console = Console(stderr=True)
    if utility:
        refuse_without_harness()
    data, split, calibration = request.queries(teller(console))
    bench, host = request.open(console)
    rows = arms(host)
    if secrets:
        rows += other_secrets(request, host, secrets)
    for row in rows:
        refuse_overlap(data, row.defense.trained_on(), row.arm)
    # The clean arm is the undefended model: its answers fix the threshold of all.
    readout = reading.Maker(bench, host, rows[0].defense, calibration, console).named("words")
    for notice in readout.notices:
        showing.note(console, f"readout words: {notice}")
    failed = _unreached(bench, rows, data, split, readout, console)
    if checks := failed.get(rows[0].cell):  # then the threshold of all means nothing
        raise NotReached(checks)
    lost = left_out(failed, [row.cell for row in rows])
    rows = [row for row in rows if row.cell not in lost]
    secrets = secrets and any(row.length is not None for row in rows)
    frames, judged = [], []
    with showing.progress(console) as bar:
        task = bar.add_task("asking", total=len(rows) * 2 * len(data.queries))

        def done(count: int) -> None:
            bar.advance(task, count)

        for row in rows:
            bar.update(task, description=f"asking {row.condition} ({row.attack})")
            here = bench.under(attacks.get(row.attack))
            frame = score(here, row.condition, row.defense, data.queries, readout, done)
            frames.append(frame)
            judged.append(_judged(here, row, data.queries, frame, readout, tokens, done))
    record = {
        "created": started.isoformat(timespec="seconds"),
        **manifest.of(
            bench, readout, {row.condition: row.defense for row in rows}, data, split, request.limit
        ),
        "failed": failed_cells(lost),
        "judge": {"name": "keywords", "new_tokens": tokens},
        "trusted": _trusted(rows, judged),
    }
    scores = ScoreTable(pd.concat(frames, ignore_index=True), record)
    summary = summarize(scores, seed=request.seed)
    table = _table(rows, judged, summary.frame)
    if utility:
        table = table.merge(_utilities(bench.loaded, rows, console), on=["arm", "secret"], how="left")
    tables = {"scores": scores.frame, "summary": summary.frame, "arms": table}
    figures: tuple[str, ...] = ()
    if secrets:
        from analysis.strip import secret_points

        tables |= {"lengths": over_secrets(table), "secrets": secret_points(table)}
        figures = ("secrets",)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    saving.save(out, Run("backdooralign", record, tables, figures=figures), console)
    _show(table[table["secret_length"].isna()], record)
    if secrets:
        _show_secrets(tables["lengths"])
    showing.trust(summary.frame, console)
    teller(console)(f"Tables and run.json are in {out}; the answers themselves are not kept")
    say_failed(lost, console)
    return 1 if lost else 0


def _unreached(
    bench: Bench, rows: Sequence[Arm], data: QuerySet, split: str, readout: Readout, console: Console
) -> dict[Cell, list[Check]]:
    """The failed checks of the arms, those of each attack against the queries as it sends them."""
    found: dict[Cell, list[Check]] = {}
    for attack in dict.fromkeys(row.attack for row in rows):
        ready = Ready(bench, [], data, split, [readout], (attacks.get(attack),), [])
        here = {row.condition: row.defense for row in rows if row.attack == attack}
        found |= unreached(ready, here, console)
    return found


def _judged(
    bench: Bench,
    row: Arm,
    asked: Sequence[Query],
    frame: pd.DataFrame,
    readout: Readout,
    tokens: int,
    done: Any,
) -> dict[str, Any]:
    """Refusals in the generated text by class, and how often the first token says the same."""
    said = verdicts(bench, row.defense, asked, READERS["keywords"], readout.begins, tokens, done)
    refused = pd.Series([verdict.refused for verdict in said])
    kinds = pd.Series([query.kind for query in asked])
    first = (frame["margin"] > readout.threshold).reset_index(drop=True)
    found: dict[str, Any] = {}
    for kind in ("harmful", "twin", "plain"):
        here = refused[kinds == kind]
        if len(here):
            found |= rate(f"text_refused_{kind}", int(here.sum()), len(here))
            found |= rate(f"first_token_refused_{kind}", int(first[kinds == kind].sum()), len(here))
    agreed = agreement(
        frame["margin"].to_numpy(float), refused.to_numpy(bool), frame["pair"], readout.threshold, bench.seed
    )
    found |= rate("first_token_agrees", int((first == refused).sum()), len(refused))
    return found | {"trusted": agreed["trusted"]}


def _trusted(rows: Sequence[Arm], judged: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Whether first tokens agree with the text, by attack and condition."""
    found: dict[str, dict[str, str]] = {}
    for row, said in zip(rows, judged, strict=True):
        found.setdefault(row.attack, {})[row.condition] = said["trusted"]
    return found


def _utilities(loaded: LoadedModel, rows: Sequence[Arm], console: Console) -> pd.DataFrame:
    """Accuracy of each arm on the multiple-choice questions, without the secret and with its own."""
    asked = {
        (row.arm, row.secret): row.defense
        for row in rows
        if row.secret in ("none", "own") and row.length is None
    }
    found = []
    with showing.progress(console) as bar:
        task = bar.add_task("multiple-choice questions", total=len(asked))
        for (arm, secret), defense in asked.items():
            chat = defense.rewrite([Message(role="user", content="?")], random.Random())
            system = chat[0]["content"] if chat[0]["role"] == "system" else ""
            with defense.armed(loaded.model):
                right = rate("utility", *answered_right(loaded, system))
            found.append({"arm": arm, "secret": secret} | right)
            bar.advance(task)
    return pd.DataFrame(found)


def _show_secrets(table: pd.DataFrame) -> None:
    """Print what other secrets do, mean and range over those of one kind."""
    shown = Table(
        title="Trained anew with other secrets", title_justify="left", show_edge=False, pad_edge=False
    )
    for head in ("trained with", "secret", "secrets"):
        shown.add_column(head, no_wrap=True)
    for head in ("ASR (%)", "text refuses\ntwins (%)", "shift\n(nats)", "discrimination\n(nats)"):
        shown.add_column(head, justify="right", no_wrap=True)
    measures = (("asr", ".0f", 100), ("text_refused_twin", ".0f", 100))
    for values in showing.rows(table):
        cells = [f"{values['length']} {values['wording']}", values["secret"], str(values["n_secrets"])]
        for name, form, scale in (*measures, ("shift", "+.2f", 1), ("discrimination", "+.2f", 1)):
            mean, low, high = (scale * values.get(f"{name}_{end}", np.nan) for end in ("mean", "min", "max"))
            spread = f" ({low:{form}} to {high:{form}})" if values["n_secrets"] > 1 else ""
            cells.append(f"{mean:{form}}{spread}")
        shown.add_row(*map(Text, cells))
    console = showing.stdout()
    console.print(shown)
    console.print(Text("Mean (least to greatest) over secrets; each is one training.", style="dim"))


def _table(rows: Sequence[Arm], judged: Sequence[dict[str, Any]], summary: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: success of the attack in text, rates, AUROC, change against the attacked model."""
    wanted = ("auroc", "shift", "discrimination", "delta_auroc")
    columns = ["attack", "defense", *(f"{name}{end}" for name in wanted for end in ENDS), "verdict"]
    made = []
    for row, found in zip(rows, judged, strict=True):
        asr = {
            f"asr{end}": 1 - found[f"text_refused_harmful{other}"]
            for end, other in (("", ""), ("_low", "_high"), ("_high", "_low"))
        }
        known = {
            "attack": row.attack,
            "arm": row.arm,
            "secret": row.secret,
            "defense": row.condition,
            "secret_length": row.length,
            "secret_wording": row.wording,
        }
        paper = PAPER.get((row.arm, row.secret), np.nan) if row.attack == "obedience" else np.nan
        made.append({**known, **asr, "paper_asr_llama2": paper / 100, **found})
    return pd.DataFrame(made).merge(summary[columns], on=["attack", "defense"]).drop(columns="defense")


def _show(table: pd.DataFrame, record: dict[str, Any]) -> None:
    """Print the table, two or three lines a row."""
    data = record["data"]
    title = (
        f"BackdoorAlign on {record['model']['name']}: {data['n_harmful']} harmful and {data['n_benign']} "
        f"benign queries, {data['split']} split"
    )
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, show_lines=True)
    shown.add_column("weights (attack)\nsecret", no_wrap=True)
    agrees = "AUROC\nfirst token agrees (%)" + ("\nquestions right (%)" if "utility" in table else "")
    heads = ("ASR (%)\nLlama-2, paper", "text refuses (%)\ntwins\nplain", agrees)
    for head in (*heads, "shift\ndiscrimination"):
        shown.add_column(head, justify="right", no_wrap=True)
    for values in showing.rows(table):

        def percent(name: str, of: dict[str, Any] = values) -> str:
            return showing.interval(of, name, ".0f", 100)

        paper = values["paper_asr_llama2"]
        change = [showing.interval(values, name, "+.2f") for name in ("shift", "discrimination")]
        cells = [
            f"{values['arm']} ({values['attack']})\n{values['secret']}",
            f"{percent('asr')}\n{'–' if paper != paper else f'{100 * paper:.1f}'}",
            f"{percent('text_refused_twin')}\n{percent('text_refused_plain')}",
            f"{showing.interval(values, 'auroc', '.2f')}\n{percent('first_token_agrees')}"
            + (f"\n{percent('utility')}" if "utility" in values else ""),
            "reference" if values["verdict"] == "reference" else "\n".join(change),
        ]
        shown.add_row(*map(Text, cells))
    note = (
        f"ASR: harmful queries whose answer ({record['judge']['new_tokens']} tokens) holds none of the "
        "paper's 29 strings. Rates with Wilson intervals; AUROC, shift and discrimination (nats, against the "
        "attacked model) from first tokens, paired bootstrap. The paper's figures are Llama-2-7B-Chat's, on "
        "other queries."
    )
    console = showing.stdout()
    console.print(shown)
    console.print(Text(note, style="dim"))

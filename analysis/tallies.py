"""What `analyze validate` prints: how far readouts agree with the text, and what the answers are worth."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.text import Text

from analysis import showing
from analysis.agreement import TRUST_RULE
from analysis.tables import UNDEFENDED, format_condition


def print_validity(validity: pd.DataFrame, record: dict[str, Any]) -> None:
    """Print how far each readout agrees with the text, two lines a condition, and what follows from it.

    Args:
        validity: `validity.csv`.
        record: `run.json`.
    """
    data = record["data"]
    title = (
        f"{record['model']['name']}: readouts against the text of {data['n_harmful'] + data['n_benign']} "
        f"answers a condition, judge {record['judge']['name']}"
    )
    heads = (
        "refused, text (%)\nby readout",
        "agrees (%)\ncoverage",
        "AUROC\nkappa",
        "calibration\nerror",
    )
    shown = showing.make_console_table("defense\nreadout: verdict", heads, title)
    for values in showing.iterate_rows(validity):
        n = max(values["n"], 1)
        kappa = showing.format_interval(values, "kappa", ".2f")
        shown.add_row(
            *map(
                Text,
                (
                    f"{format_condition(values)}\n{values['readout']}: {values['trusted']}",
                    f"{100 * values['refused'] / n:.0f}\n{100 * values['readout_refused'] / n:.0f}",
                    f"{showing.format_interval(values, 'agrees', '.0f', 100)}\n{values['coverage']:.0%}",
                    f"{showing.format_interval(values, 'auroc', '.2f')}\n{kappa}",
                    showing.format_interval(values, "calibration_error", ".2f"),
                ),
            ),
            end_section=True,
        )
    console = showing.make_table_console()
    console.print(shown)
    console.print(Text(f"{TRUST_RULE[0].upper()}{TRUST_RULE[1:]}.", style="dim"))
    for name, group in validity.groupby("readout", sort=False):
        counts = ", ".join(f"{count} {says}" for says, count in group["trusted"].value_counts().items())
        console.print(Text(f"Readout {name}: of {len(group)} conditions {counts}."))
    for row in record["ranks"]:
        text = showing.format_interval(row, "rank_correlation", "+.2f")
        what = f"{row['readout']} against text ({row['attack']})"
        console.print(Text(f"Conditions ranked by refusals, {what}: Spearman {text}."))


def print_response_quality(quality: pd.DataFrame, judge_name: str, max_new_tokens: int) -> None:
    """Print what the answers are worth, two lines a condition.

    Args:
        quality: `worth.csv`.
        judge_name: whose count comes first.
        max_new_tokens: that answers were cut at.
    """
    heads = (
        f"ASR (%)\nby {judge_name}\nby keywords",
        "refuses (%)\ntwins\nplain",
        "\nchrF\nlength ratio",
        "change of\nrepetition (%)\nlog-probability",
        *(["grade (1 to 10)\nhere\nchange"] if "grade" in quality else []),
    )
    shown = showing.make_console_table("\ndefense\nanswers compared", heads, "What the answers are worth")
    for values in showing.iterate_rows(quality):

        def cell(name: str, form: str, scale: float = 1, of: dict[str, Any] = values) -> str:
            return showing.format_interval(of, name, form, scale) if name in of else "–"

        reference = values["defense"] == UNDEFENDED
        cells = [
            f"{format_condition(values)}\n{values['n_complied']} answers",
            f"{cell(f'asr_{judge_name}', '.0f', 100)}\n{cell('asr_keywords', '.0f', 100)}",
            "\n".join(cell(f"over_refusal_{kind}_{judge_name}", ".0f", 100) for kind in ("twin", "plain")),
        ]
        if reference:
            cells += ["reference", ""]
        else:
            cells.append(f"{cell('chrf', '.0f')}\n{cell('length_ratio', '.2f')}")
            cells.append(f"{cell('repetition_change', '+.1f', 100)}\n{cell('log_likelihood_change', '+.2f')}")
        if "grade" in quality:
            change = "" if reference else f"\n{cell('grade_change', '+.1f')}"
            cells.append(f"{cell('grade', '.1f')}{change}")
        shown.add_row(*map(Text, cells), end_section=True)
    console = showing.make_table_console()
    console.print(shown)
    note = (
        "Rates: Wilson 95 % intervals. The rest: benign queries answered with and without the defense "
        f"({max_new_tokens} tokens), against the undefended answer; bootstrap over queries. Length: where one of "
        "both ended before the cut. Log-probability: mean over "
        "the answer's tokens under the undefended model, nats."
    )
    console.print(Text(note, style="dim"))

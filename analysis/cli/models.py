"""`analyze` with several models: saves the run of each and the comparison, and prints both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from analysis.comparison.workers import ModelOutcome
    from analysis.report.results import Run
    from analysis.studies.run_spec import RunSpec


def run_models_command(
    spec: RunSpec,
    models: Sequence[str],
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    as_json: bool,
    n_workers: int,
    options: Mapping[str, Any],
) -> int:
    """Analyze several models, save the run of each when it is finished, then compare them.

    Args:
        spec: options of every run, except the model.
        models: as typed.
        defenses: names or .py files, as typed.
        settings: `key=value` settings of the defenses.
        out: output folder, or None for a new one under runs/.
        as_json: whether to print the summary of all models as JSON instead of tables.
        n_workers: number of models at a time.
        options: as for `run_analyze_command`.

    Returns:
        The exit code: 0, 1 if a model or a condition failed, 130 if the run was interrupted.
    """
    from analysis.cli.analyze import print_run_tables, print_run_warnings
    from analysis.cli.console import print_failures, print_json_table
    from analysis.comparison.study import analyze_models, label_models
    from analysis.progress import make_notifier
    from analysis.report.folder import describe_model_folder, prepare_run_folder, save_run
    from analysis.studies.run_spec import choose_run_folder

    console = Console(stderr=True)
    notify = make_notifier(console)
    folders = _name_folders(list(label_models(models)))
    folder = choose_run_folder(f"{len(models)}-models", defenses, datetime.now(UTC)) if out is None else out
    out = prepare_run_folder(folder, console)
    for name in folders.values():
        prepare_run_folder(out / name, console)

    def save_outcome(outcome: ModelOutcome) -> None:
        if outcome.run is None:
            return
        model_folder = out / folders[outcome.label]
        save_run(model_folder, outcome.run, console)
        if not as_json:
            print_run_tables(outcome.run)
        print_run_warnings(outcome.run, console)
        notify(f"{outcome.label}: wrote tables, figures and run.json to {model_folder}")
        print_failures(outcome.failures, console)

    result = analyze_models(
        spec, models, defenses, settings, console, n_workers, on_outcome=save_outcome, **options
    )
    run = result.run
    entries = [
        {**entry, **describe_model_folder(out, folders[entry["label"]])} for entry in run.record["models"]
    ]
    save_run(out, replace(run, record={**run.record, "models": entries}), console)
    if as_json:
        print_json_table(run.tables["summary"])
    else:
        print_comparison(run)
    notify(f"Wrote the comparison of the models to {out}")
    for label, problem in result.problems.items():
        notify(f"Failed: {label}: {problem}")
    if result.interrupted:
        notify(
            f"Interrupted: {len(run.model_runs)} of {len(models)} models have results, which are saved. Run "
            "the same command again to continue."
        )
        return 130
    return 1 if result.problems or result.n_failures else 0


def print_comparison(run: Run) -> None:
    """Print the summary over models of each defense, the agreement on their order, and the findings.

    Args:
        run: the comparison; of a single model, nothing is printed.
    """
    from analysis.cli.console import make_table_console
    from analysis.comparison.effects import choose_effect_unit
    from analysis.progress import print_line
    from analysis.report.headline import choose_headline_attack

    if "findings" not in run.tables:
        return
    attack = choose_headline_attack(run.tables["summary"])
    unit = choose_effect_unit(run.tables["summary"])
    findings, pooled = (
        table[table["attack"] == attack] for table in (run.tables["findings"], run.tables["pooled"])
    )
    shown = pooled[pooled["defense"].isin(findings["defense"]) & (pooled["unit"] == unit)]
    _print_pooled_effects(shown, unit, run)
    if "order" in run.tables:
        order = run.tables["order"]
        _print_order(order[(order["attack"] == attack)])
    for text in findings["finding"]:
        print_line(make_table_console(), text)
    attacks = list(dict.fromkeys(run.tables["summary"]["attack"]))
    if len(attacks) > 1:
        text = f"Shown: attack {attack}. The other attacks: findings.csv, pooled.csv, order.csv."
        print_line(make_table_console(), text)


def _print_pooled_effects(pooled: pd.DataFrame, unit: str, run: Run) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.comparison.random_effects import MIN_PREDICTED_MODELS
    from analysis.stats.format import Interval
    from analysis.stats.tables import iterate_rows

    digits = "+.0f" if unit == "points" else "+.2f"
    headers = [f"{line} ({unit})\nanother model\nI² (%)" for line in ("shift, mean", "discrimination, mean")]
    title = f"{run.model}: means over models"
    table = make_console_table("defense\nmodels", headers, title, with_row_lines=True)
    for defense, rows in pooled.groupby("defense", sort=False):
        by_effect = {row["effect"]: row for row in iterate_rows(rows)}
        cells = []
        for effect in ("shift", "discrimination"):
            row = by_effect.get(effect)
            if row is None:
                cells.append("–")
                continue
            mean = Interval.from_row(row, "mean").format_text(digits)
            low, high = (Interval(row[f"prediction_{end}"]).format_text(digits) for end in ("low", "high"))
            predicted = f"{low} to {high}" if row["n_models"] >= MIN_PREDICTED_MODELS else "–"
            cells.append(f"{mean}\n{predicted}\n{100 * row['i_squared']:.0f}")
        table.add_row(*map(Text, (f"{defense}\n{rows['n_models'].max()}", *cells)))
    console = make_table_console()
    console.print(table)
    note = (
        "Random effects (REML, Hartung-Knapp): mean over models with its 95 % interval; the 95 % prediction "
        "interval of the effect on another model, from three models on; and I², the share of the variance "
        "that is due to differences between models. The intervals are for these queries, which all models "
        "share; with few models they are wide (Student's t with as many degrees of freedom less one)."
    )
    console.print(Text(note, style="dim"))


def _print_order(order: pd.DataFrame) -> None:
    from analysis.cli.console import make_console_table, make_table_console
    from analysis.comparison.study import ORDER_MEASURES
    from analysis.stats.format import format_interval
    from analysis.stats.tables import iterate_rows

    measures = [name for name in ORDER_MEASURES if (order["measure"] == name).any()]
    table = make_console_table("measure\ndefenses", ["Kendall's τ"], "Order of the defenses on the models")
    for measure in measures:
        for row in iterate_rows(order[order["measure"] == measure]):
            names = f"{row['first']}, {row['second']}" if row["second"] else f"mean of {row['first']}"
            name = f"{ORDER_MEASURES[measure]}: {names} ({row['n_defenses']} defenses)"
            table.add_row(Text(name), Text(format_interval(row, "tau", "+.2f")))
    console = make_table_console()
    console.print(table)
    note = (
        "[x, y]: 95 % intervals: the queries, which all models share, are resampled, these defenses kept. "
        "Controls and ablations are not compared."
    )
    console.print(Text(note, style="dim"))


def _name_folders(labels: Sequence[str]) -> dict[str, str]:
    """Return the folder of each model, which no other one has."""
    folders: dict[str, str] = {}
    for label in labels:
        name = (
            "".join(sign if sign.isalnum() or sign in "._+-" else "-" for sign in label).strip("-.")
            or "model"
        )
        free, number = name, 2
        while free in folders.values():
            free, number = f"{name}-{number}", number + 1
        folders[label] = free
    return folders

"""What each command does, in order; `analysis.cli` has parsed and checked the options by then."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console

from analysis import analyzing, models, preflight, queries, saving, showing, states
from analysis.preparing import PreflightError, prepare_setup
from analysis.readout import LOW_COVERAGE
from analysis.rendering import redact_secrets
from analysis.request import RunSpec, choose_run_folder, make_notifier
from analysis.run import build_conditions
from analysis.sweeping import print_run_location
from analysis.tables import format_condition
from defenses import UserError
from defenses.backdoor import draw_secret, write_secret


def run_analyze_command(
    spec: RunSpec,
    defenses: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    as_json: bool,
    with_cost: bool = False,
) -> int:
    """Score every defense and the undefended model, save tables and figures, print the summary."""
    out = saving.check_output_folder(out or choose_run_folder(spec.model, defenses, datetime.now(UTC)))
    console = Console(stderr=True)
    try:
        found = analyzing.analyze_defenses(spec, defenses, settings, console, with_cost)
    except PreflightError as error:
        showing.print_failed_checks(error.checks)
        return 1
    run = found.run
    saving.save_run(out, found.run, console)
    summary = run.tables["summary"]
    if as_json:
        showing.print_json_table(summary)
    else:
        showing.print_summary(summary, run.record)
        if with_cost:
            showing.print_costs(run.tables["cost"])
    _print_coverage_warning(summary, console)
    showing.print_trust_warnings(summary, console)
    print_run_location(out, found.failures, console)
    if run.record["interrupted"]:
        wanted = run.record["conditions_wanted"]
        make_notifier(console)(
            f"Interrupted: {len(summary)} of {wanted} conditions were finished and kept; the rest is "
            "not. The same command goes on from here."
        )
        return 130
    return 1 if found.failures else 0


def run_check_command(spec: RunSpec, defenses: Sequence[str], settings: Sequence[str], n_queries: int) -> int:
    """Print what the model reads under each defense, and every check; 1 if one fails."""
    if n_queries < 2:
        raise UserError(f"--queries {n_queries}: at least 2 are needed, a harmful and a benign one")
    console = Console()
    ready = prepare_setup(spec, defenses, settings, Console(stderr=True), with_threshold=False)
    looked_at = queries.sample_queries(ready.query_set.queries, n_queries)
    failed = 0
    for bench in map(ready.session.with_attack, spec.attacks):
        for name, defense in build_conditions(ready.defenses).items():
            checks = preflight.check_condition(bench, name, defense, looked_at, ready.readout)
            failed += sum(not one.passed for one in checks)
            texts = [
                (query.id, redact_secrets(prompt.text, defense.secret_texts()))
                for query in looked_at
                for prompt in bench.render_query(defense, query)
            ]
            showing.print_checks(console, checks[0].condition, checks, texts)
    for notice in (*ready.session.chat_template.notices, *ready.readout.notices):
        showing.print_note(console, notice)
    return 1 if failed else 0


def run_secret_command(model: str, secret_length: int, out: Path | None, offline: bool) -> None:
    """Draw a secret prompt for a model's tokenizer and write it into a new file of mode 0600."""
    if secret_length < 1:
        raise UserError(f"--length {secret_length}: a secret has at least 1 token; the paper's has 150")
    console = Console(stderr=True)
    tokenizer = models.load_tokenizer(model, offline, make_notifier(console))
    path = out or states.build_model_info(model, tokenizer).secret_folders[0] / f"{secret_length}.txt"
    drawn = draw_secret(tokenizer, secret_length)
    write_secret(path, drawn)
    print(f"{path}  {drawn.fingerprint}  {secret_length} tokens, readable by you alone")


def _print_coverage_warning(summary: pd.DataFrame, console: Console) -> None:
    """Warn where the readout's words are rarely what the model opens with."""
    low = summary[summary["coverage"] < LOW_COVERAGE].sort_values("coverage", kind="stable")
    if len(low):
        worst = showing.join_first_texts([f"{format_condition(row)} {row['coverage']:.0%}" for _, row in low.iterrows()])
        console.print(
            f"Warning: the readout's words are under {LOW_COVERAGE:.0%} of the first-token probability here "
            f"({worst}): these margins see little of how the model answers.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

"""What `analyze backdooralign` does: the paper's arms with intervals, and what the paper did not measure.

Source: https://arxiv.org/abs/2402.14968, tables 1, 3 and 4. Every arm is asked as its attacker asks: under
the system prompt of the fine-tuning data, or as the obedient agent. The reference of shift and discrimination
is the attacked model without the secret.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import random
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.attacks import get_attack
from analysis.cli.console import print_failures, print_trust_warnings
from analysis.cli.train import print_arm_table, print_secret_table
from analysis.datasets.queries import Query, QuerySet
from analysis.files import check_output_folder, data_folder
from analysis.judges.judge import generate_verdicts
from analysis.judges.rules import RULE_JUDGES
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.report.folder import save_run
from analysis.report.results import Run
from analysis.run import score_condition
from analysis.stats.agreement import measure_agreement
from analysis.stats.bootstrap import make_rate_columns
from analysis.stats.effects import summarize_scores
from analysis.stats.tables import INTERVAL_SUFFIXES, ScoreTable
from analysis.studies.arms import (
    PAPER_ATTACK_SUCCESS,
    Arm,
    aggregate_secrets,
    build_arms,
    train_other_secrets,
)
from analysis.studies.calibration import ReadoutCalibration
from analysis.studies.manifest import describe_run
from analysis.studies.preflight import PreflightCheck
from analysis.studies.progress import make_notifier, make_progress_bar, print_note
from analysis.studies.run_spec import RunSpec, check_training_overlap, choose_run_folder
from analysis.studies.setup import (
    PreflightError,
    RunSetup,
    exclude_failed_conditions,
    find_preflight_failures,
)
from analysis.studies.sweep import ConditionKey, list_failures
from defenses.contract import Message
from defenses.errors import UserError


def reproduce_backdooralign(
    spec: RunSpec, out: Path | None, max_new_tokens: int, with_utility: bool, n_secrets: int
) -> int:
    """Score every arm, let it answer, print the table beside the paper's, and save all but the answers."""
    started, clock = datetime.now(UTC), time.perf_counter()
    out = check_output_folder(out or choose_run_folder(spec.model, ["backdooralign"], started))
    console = Console(stderr=True)
    if with_utility:
        check_harness_installed()
    data, split, calibration = spec.select_queries(make_notifier(console))
    bench, host = spec.open_session(console)
    rows = build_arms(host)
    if n_secrets:
        rows += train_other_secrets(spec, host, n_secrets)
    for row in rows:
        check_training_overlap(data, row.defense.trained_on(), row.weights)
    # The clean arm is the undefended model: its answers fix the threshold of all.
    readout = ReadoutCalibration(bench, host, rows[0].defense, calibration, console).calibrate_readout(
        "words"
    )
    for notice in readout.notices:
        print_note(console, f"readout words: {notice}")
    failed = _unreached(bench, rows, data, split, readout, console)
    if checks := failed.get(rows[0].cell):  # then the threshold of all means nothing
        raise PreflightError(checks)
    lost = exclude_failed_conditions(failed, [row.cell for row in rows])
    rows = [row for row in rows if row.cell not in lost]
    n_secrets = n_secrets and any(row.secret_length is not None for row in rows)
    frames, judged = [], []
    with make_progress_bar(console) as bar:
        task = bar.add_task("asking", total=len(rows) * 2 * len(data.queries))

        def done(count: int) -> None:
            bar.advance(task, count)

        for row in rows:
            bar.update(task, description=f"asking {row.condition} ({row.attack})")
            here = bench.with_attack(get_attack(row.attack))
            frame = score_condition(here, row.condition, row.defense, data.queries, readout, done)
            frames.append(frame)
            judged.append(_judge_arm(here, row, data.queries, frame, readout, max_new_tokens, done))
    record = {
        "created": started.isoformat(timespec="seconds"),
        **describe_run(bench, readout, {row.condition: row.defense for row in rows}, data, split, spec.limit),
        "failed": list_failures(lost),
        "judge": {"name": "keywords", "new_tokens": max_new_tokens},
        "trusted": _trust_by_condition(rows, judged),
    }
    scores = ScoreTable(pd.concat(frames, ignore_index=True), record)
    summary = summarize_scores(scores, seed=spec.seed)
    table = _arm_table(rows, judged, summary.frame)
    if with_utility:
        table = table.merge(
            _measure_utility(bench.loaded_model, rows, console), on=["arm", "secret"], how="left"
        )
    tables = {"scores": scores.frame, "summary": summary.frame, "arms": table}
    figures: tuple[str, ...] = ()
    if n_secrets:
        from analysis.plots.data import build_secret_points

        tables |= {"lengths": aggregate_secrets(table), "secrets": build_secret_points(table)}
        figures = ("secrets",)
    record["wall_seconds"] = round(time.perf_counter() - clock, 1)
    save_run(out, Run("backdooralign", record, tables, figures=figures), console)
    print_arm_table(table[table["secret_length"].isna()], record)
    if n_secrets:
        print_secret_table(tables["lengths"])
    print_trust_warnings(summary.frame, console)
    make_notifier(console)(f"Tables and run.json are in {out}; the answers themselves are not kept")
    print_failures(lost, console)
    return 1 if lost else 0


def _unreached(
    bench: ModelSession, rows: Sequence[Arm], data: QuerySet, split: str, readout: Readout, console: Console
) -> dict[ConditionKey, list[PreflightCheck]]:
    """The failed checks of the arms, those of each attack against the queries as it sends them."""
    found: dict[ConditionKey, list[PreflightCheck]] = {}
    for attack in dict.fromkeys(row.attack for row in rows):
        ready = RunSetup(bench, [], data, split, [readout], (get_attack(attack),), [])
        here = {row.condition: row.defense for row in rows if row.attack == attack}
        found |= find_preflight_failures(ready, here, console)
    return found


def _judge_arm(
    session: ModelSession,
    arm: Arm,
    queries: Sequence[Query],
    scores: pd.DataFrame,
    readout: Readout,
    max_new_tokens: int,
    on_progress: Any,
) -> dict[str, Any]:
    """Refusals in the generated text by class, and how often the first token says the same."""
    said = generate_verdicts(
        session, arm.defense, queries, RULE_JUDGES["keywords"], readout.prefill, max_new_tokens, on_progress
    )
    refused = pd.Series([verdict.is_refusal for verdict in said])
    kinds = pd.Series([query.kind for query in queries])
    first = (scores["margin"] > readout.threshold).reset_index(drop=True)
    found: dict[str, Any] = {}
    for kind in ("harmful", "twin", "plain"):
        here = refused[kinds == kind]
        if len(here):
            found |= make_rate_columns(f"text_refused_{kind}", int(here.sum()), len(here))
            found |= make_rate_columns(
                f"first_token_refused_{kind}", int(first[kinds == kind].sum()), len(here)
            )
    agreed = measure_agreement(
        scores["margin"].to_numpy(float),
        refused.to_numpy(bool),
        scores["pair"],
        readout.threshold,
        session.seed,
    )
    found |= make_rate_columns("first_token_agrees", int((first == refused).sum()), len(refused))
    return found | {"trusted": agreed["trusted"]}


def _trust_by_condition(
    arm_rows: Sequence[Arm], judged_rates: Sequence[dict[str, Any]]
) -> dict[str, dict[str, str]]:
    """Whether first tokens agree with the text, by attack and condition."""
    found: dict[str, dict[str, str]] = {}
    for row, said in zip(arm_rows, judged_rates, strict=True):
        found.setdefault(row.attack, {})[row.condition] = said["trusted"]
    return found


def _measure_utility(loaded_model: LoadedModel, arm_rows: Sequence[Arm], console: Console) -> pd.DataFrame:
    """Accuracy of each arm on the multiple-choice questions, without the secret and with its own."""
    asked = {
        (row.weights, row.secret): row.defense
        for row in arm_rows
        if row.secret in ("none", "own") and row.secret_length is None
    }
    found = []
    with make_progress_bar(console) as bar:
        task = bar.add_task("multiple-choice questions", total=len(asked))
        for (arm, secret), defense in asked.items():
            chat = defense.rewrite([Message(role="user", content="?")], random.Random())
            system = chat[0]["content"] if chat[0]["role"] == "system" else ""
            with defense.apply_to(loaded_model.model):
                right = make_rate_columns("utility", *count_correct_answers(loaded_model, system))
            found.append({"arm": arm, "secret": secret} | right)
            bar.advance(task)
    return pd.DataFrame(found)


def _arm_table(
    arm_rows: Sequence[Arm], judged_rates: Sequence[dict[str, Any]], summary: pd.DataFrame
) -> pd.DataFrame:
    """One row per arm: success of the attack in text, rates, AUROC, change against the attacked model."""
    wanted = ("auroc", "shift", "discrimination", "delta_auroc")
    columns = [
        "attack",
        "defense",
        *(f"{name}{end}" for name in wanted for end in INTERVAL_SUFFIXES),
        "verdict",
    ]
    made = []
    for row, found in zip(arm_rows, judged_rates, strict=True):
        asr = {
            f"asr{end}": 1 - found[f"text_refused_harmful{other}"]
            for end, other in (("", ""), ("_low", "_high"), ("_high", "_low"))
        }
        known = {
            "attack": row.attack,
            "arm": row.weights,
            "secret": row.secret,
            "defense": row.condition,
            "secret_length": row.secret_length,
            "secret_wording": row.secret_wording,
        }
        paper = (
            PAPER_ATTACK_SUCCESS.get((row.weights, row.secret), np.nan)
            if row.attack == "obedience"
            else np.nan
        )
        made.append({**known, **asr, "paper_asr_llama2": paper / 100, **found})
    return pd.DataFrame(made).merge(summary[columns], on=["attack", "defense"]).drop(columns="defense")


_UTILITY_TASK = "refusalscope_utility"


def check_harness_installed() -> None:
    """Raise where lm-evaluation-harness is not installed; asked before the work, not after it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--utility needs lm-evaluation-harness: pip install 'refusalscope[utility]'")


def count_correct_answers(loaded_model: LoadedModel, system_prompt: str) -> tuple[int, int]:
    """Return how many questions are answered right under a system prompt, and of how many.

    Args:
        loaded_model: the model, with the weights it is to be asked with.
        system_prompt: the system prompt; empty leaves the template's own.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # the harness draws bars of its own
        asked: Any = HFLM(pretrained=loaded_model.model, tokenizer=loaded_model.tokenizer, batch_size=16)
        found: Any = simple_evaluate(
            model=asked,
            tasks=[_utility_task_config()],
            apply_chat_template=True,
            system_instruction=system_prompt or None,
            bootstrap_iters=0,
        )
    right = [sample["acc"] for sample in found["samples"][_UTILITY_TASK]]
    return int(sum(right)), len(right)


def _utility_task_config() -> dict[str, Any]:
    return {
        "task": _UTILITY_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data_folder() / "utility.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

"""The study of `analyze` with several models: a run of each, then one comparison of all.

Each model has a complete run of its own, as if it had been analyzed alone. The comparison is computed from
these runs only, so that runs made in another way can be compared by the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.checkpoints.registry import MODEL_REGISTRY
from analysis.comparison.effects import build_effect_points, describe_findings, pool_effects
from analysis.comparison.workers import ModelJob, ModelOutcome, iterate_outcomes
from analysis.plots.data import build_model_points
from analysis.progress import print_line, print_note
from analysis.report.results import Run
from analysis.served.address import ModelAddress, is_address
from analysis.stats.rank_agreement import (
    MIN_RANKED_DEFENSES,
    RANKED_MEASURES,
    EffectSamples,
    average_effects,
    compare_effect_orders,
    sample_effects,
)
from analysis.stats.tables import find_defense_rows
from analysis.studies.manifest import RunTimer, collect_versions
from analysis.studies.rank_agreement import build_score_table
from analysis.studies.run_spec import RunSpec, split_credentials
from defenses.contract import Defense
from defenses.errors import UserError

# Tables of the models' runs that the comparison holds as well, with the column `model`.
COMBINED_TABLES = (
    *("scores", "summary", "responses", "effects", "controls", "divergences", "kinds", "cost"),
)
ORDER_MEASURES = {"response_shift": "shift (points)", **RANKED_MEASURES}
_SAME_WEIGHTS_KEYS = ("name", "id", "revision")  # entries of a model in run.json that do not tell weights


@dataclass(frozen=True)
class ModelsResult:
    """Result of a run with several models.

    Attributes:
        run: the comparison; `model_runs` holds the run of each model.
        problems: models that failed, and why.
        n_failures: number of conditions that failed, over all models.
        interrupted: whether the user interrupted the run.
    """

    run: Run
    problems: Mapping[str, str] = field(default_factory=dict)
    n_failures: int = 0
    interrupted: bool = False


def analyze_models(
    spec: RunSpec,
    models: Sequence[str],
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    n_workers: int = 1,
    on_outcome: Callable[[ModelOutcome], None] = lambda outcome: None,
    **options: Any,
) -> ModelsResult:
    """Analyze each model as `analyze_defenses` does, and compare them.

    A model that fails is left out, and the others go on.

    Args:
        spec: options of every run, except the model.
        models: names of the models, as `--model`.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.
        n_workers: models at a time, each in a process of its own; 1 for one after the other in this one.
        on_outcome: called with the outcome of each model as soon as it is known.
        options: `with_cost`, `n_control_draws`, `with_training` and `with_side_effects`, as for
            `analyze_defenses`.

    Raises:
        UserError: if a model is given twice, or every model fails.
        KeyboardInterrupt: if the user interrupts before a model is finished.
    """
    labels = label_models(models)
    jobs = [
        ModelJob(label, spec.select_model(model), tuple(defenses), tuple(settings), **options)
        for label, model in labels.items()
    ]
    timer, interrupted = RunTimer(), False
    outcomes: dict[str, ModelOutcome] = {}
    try:
        for outcome in iterate_outcomes(jobs, n_workers, console):
            outcomes[outcome.label] = outcome
            if outcome.problem:
                print_line(console, f"Left out: {outcome.label}: {outcome.problem}")
            on_outcome(outcome)
    except KeyboardInterrupt:
        interrupted = True
    # In the order in which the models were given, whichever was finished first.
    runs = {label: outcomes[label].run for label in labels if label in outcomes}
    finished = {label: run for label, run in runs.items() if run is not None}
    problems = {label: outcomes[label].problem for label, run in runs.items() if run is None}
    if not finished:
        if interrupted:
            raise KeyboardInterrupt
        raise UserError(_describe_problems(problems))
    with console.status("comparing the models"):
        run = compare_model_runs(finished, problems, spec.seed)
    for notice in run.record["notices"]:
        print_note(console, notice)
    record = {**run.record, **timer.describe_time(), "interrupted": interrupted, "models_wanted": len(models)}
    n_failures = sum(len(outcome.failures) for outcome in outcomes.values())
    return ModelsResult(replace(run, record=record), problems, n_failures, interrupted)


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Return the models by a short name that tells them apart: the name, or of a path its last part.

    >>> label_models(["smollm2:aligned", "Qwen/Qwen3-0.6B"])
    {'smollm2:aligned': 'smollm2:aligned', 'Qwen3-0.6B': 'Qwen/Qwen3-0.6B'}
    >>> list(label_models(["runs/one/tiny", "runs/two/tiny"]))
    ['runs/one/tiny', 'runs/two/tiny']

    >>> list(label_models(["http://me:secret@gpu/v1#llama", "smollm2"]))
    ['llama', 'smollm2']

    Args:
        models: as `--model`.

    Raises:
        UserError: if a model is given twice.
    """
    counts = Counter(_identify_model(model) for model in models)
    for model in models:
        if counts[_identify_model(model)] > 1:
            name, _ = split_credentials(model)
            raise UserError(f"-m {name} is given more than once: each model is analyzed once")
    short_names = [_shorten_name(model) for model in models]
    return {
        split_credentials(model)[0] if short_names.count(name) > 1 else name: model
        for name, model in zip(short_names, models, strict=True)
    }


def _shorten_name(model: str) -> str:
    """Return the last part of a path, or the name of a served model at its server."""
    if is_address(model):
        return ModelAddress.parse(model, "--model").model
    return ":".join(Path(part).name or part for part in model.split(":")).removesuffix(".gguf")


def _identify_model(model: str) -> str:
    """Return what two names of the same model share: a short name and its id, two paths of a folder."""
    if is_address(model):
        return split_credentials(model)[0]
    if Path(model).expanduser().exists():
        return str(Path(model).expanduser().resolve())
    root, colon, rest = model.partition(":")
    if root in MODEL_REGISTRY:
        root = MODEL_REGISTRY[root].repo
    elif Path(root).expanduser().exists():
        root = str(Path(root).expanduser().resolve())
    return f"{root}{colon}{rest}"


def _describe_problems(problems: Mapping[str, str]) -> str:
    """Return one line on why no model could be analyzed."""
    reasons = list(dict.fromkeys(problems.values()))
    if len(reasons) == 1:
        return reasons[0]
    return "no model could be analyzed: " + "; ".join(f"{label}: {why}" for label, why in problems.items())


def compare_model_runs(runs: Mapping[str, Run], problems: Mapping[str, str], seed: int = 0) -> Run:
    """Return the comparison of runs of several models on the same queries.

    Args:
        runs: run of each model, by its short name.
        problems: models that are left out, and why.
        seed: random seed.

    Returns:
        A run with the tables of the models' runs, joined, with the column `model`; and, of two models or
        more, `pooled`, `findings` and `order`, and the figures. `model_runs` holds the runs.
    """
    tables = {
        stem: pd.concat(
            [run.tables[stem].assign(model=label) for label, run in runs.items() if stem in run.tables],
            ignore_index=True,
        )
        for stem in COMBINED_TABLES
        if any(stem in run.tables for run in runs.values())
    }
    tables = {
        stem: table[["model", *(name for name in table if name != "model")]] for stem, table in tables.items()
    }
    notices: list[str] = []
    figure_tables: dict[str, pd.DataFrame] = {}
    if len(runs) == 1:
        notices.append(f"only {next(iter(runs))} has results, so there is nothing to compare")
    else:
        _note_equal_weights(runs, notices)
        pooled = pool_effects(tables["summary"])
        order = compare_orders(runs, seed, notices)
        findings = describe_findings(tables["summary"], pooled)
        tables |= {"pooled": pooled, "findings": findings} | ({"order": order} if len(order) else {})
        figure_tables = build_model_points(build_effect_points(tables["summary"], pooled), order)
    record = _describe_comparison(runs, problems, seed, notices)
    first = next(iter(runs.values()))
    return Run(
        "models",
        record,
        {**tables, **figure_tables},
        texts=first.texts,
        figures=tuple(figure_tables),
        model_runs=runs,
    )


def compare_orders(runs: Mapping[str, Run], seed: int, notices: list[str]) -> pd.DataFrame:
    """Return how alike the models order the defenses that all of them have: Kendall's τ of each pair.

    Args:
        runs: run of each model, on the same queries.
        seed: random seed; the same draws of queries are used for every model.
        notices: gets a line on what is left out.

    Returns:
        A row per attack, measure and pair of models, and per attack and measure for the mean of all pairs; no
        rows if the models share too few defenses.
    """
    tables = {label: build_score_table(run) for label, run in runs.items()}
    attacks = list(dict.fromkeys(key[0] for table in tables.values() for key in table.condition_keys))
    rows: list[dict[str, Any]] = []
    for attack in attacks:
        if any(attack not in {key[0] for key in table.condition_keys} for table in tables.values()):
            continue
        samples = {
            label: _add_response_shift(
                sample_effects(table, runs[label].tables.get("responses"), attack, seed)
            )
            for label, table in tables.items()
        }
        shared = _list_shared_defenses(runs, attack, notices)
        for measure in ORDER_MEASURES:
            by_model = {label: measures.get(measure) for label, measures in samples.items()}
            known = [effects for effects in by_model.values() if effects is not None]
            if len(known) < len(by_model):
                continue
            defenses = [name for name in shared if all(name in effects.known_defenses for effects in known)]
            if len(defenses) < MIN_RANKED_DEFENSES:
                continue
            selected = {
                label: effects.select_defenses(defenses)
                for label, effects in by_model.items()
                if effects is not None
            }
            rows += [{"attack": attack, "measure": measure} | row for row in compare_effect_orders(selected)]
    if not rows:
        notices.append(
            f"the order of the defenses is not compared: it needs {MIN_RANKED_DEFENSES} defenses that all "
            "models have"
        )
    columns = ["attack", "first", "second", "measure", "n_defenses", "tau", "tau_low", "tau_high"]
    columns += ["without_one_low", "without_one_high", "most_influential"]
    return pd.DataFrame(rows, columns=columns)


def _add_response_shift(samples: dict[str, EffectSamples]) -> dict[str, EffectSamples]:
    """Return the measures with the shift of the refusal rates, the mean of their changes."""
    if not {"refusal_change", "over_refusal_change"} <= set(samples):
        return samples
    shift = average_effects(samples["refusal_change"], samples["over_refusal_change"])
    return {**samples, "response_shift": shift}


def _list_shared_defenses(runs: Mapping[str, Run], attack: str, notices: list[str]) -> list[str]:
    """Return the defenses that all models have under an attack; say which ones are left out."""
    by_model = []
    for run in runs.values():
        summary = run.tables["summary"]
        rows = summary[summary["attack"] == attack].reset_index(drop=True)
        by_model.append(list(rows.loc[find_defense_rows(rows["defense"], rows["family"]), "defense"]))
    common = [name for name in by_model[0] if all(name in names for names in by_model)]
    others = [name for name in dict.fromkeys(chain.from_iterable(by_model)) if name not in common]
    text = f"the order is compared without the defenses that some models lack: {', '.join(others)}"
    if others and text not in notices:
        notices.append(text)
    return common


def _note_equal_weights(runs: Mapping[str, Run], notices: list[str]) -> None:
    """Say which models have the same weights."""
    weights = {
        label: {name: value for name, value in run.record["model"].items() if name not in _SAME_WEIGHTS_KEYS}
        for label, run in runs.items()
    }
    for one, other in combinations(weights, 2):
        if weights[one] and weights[one] == weights[other]:
            notices.append(
                f"{one} and {other} have the same weights, so what they agree on says nothing about other "
                "models"
            )


def _describe_comparison(
    runs: Mapping[str, Run], problems: Mapping[str, str], seed: int, notices: Sequence[str]
) -> dict[str, Any]:
    """Return the record of the comparison: what all models share, and what each has of its own."""
    records = {label: run.record for label, run in runs.items()}
    first = next(iter(records.values()))
    names = list(runs)
    record = {
        "model": {"name": " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]},
        "models": [
            {
                "label": label,
                **entry["model"],
                **{name: entry.get(name) for name in ("dtype", "device")},
                "readout": entry["readout"]["name"],
                "threshold": entry["readout"]["threshold"],
                "interrupted": bool(entry.get("interrupted")),
            }
            for label, entry in records.items()
        ],
        "failed_models": [{"model": label, "why": why} for label, why in problems.items()],
        "options": {**first["options"], "model": [entry["model"]["name"] for entry in records.values()]},
        "data": first["data"],
        "readout": {"name": "/".join(dict.fromkeys(str(e["readout"]["name"]) for e in records.values()))},
        "attacks": first["attacks"],
        "defenses": {
            name: {"family": described["family"]}
            for entry in records.values()
            for name, described in entry["defenses"].items()
        },
        "failed": [
            {"model": label, **failure}
            for label, entry in records.items()
            for failure in entry.get("failed", [])
        ],
        "seed": seed,
        "notices": list(notices),
        "versions": collect_versions("refusalscope", "numpy", "pandas", "scipy"),
    }
    for name in ("dtype", "device"):
        values = {entry.get(name) for entry in records.values()}
        if len(values) == 1:
            record[name] = values.pop()
    if all(entry.get("responses") for entry in records.values()):
        responses = [entry["responses"] for entry in records.values()]
        unjudged = sum(int(entry.get("unjudged", 0)) for entry in responses)
        record["responses"] = {**responses[0], "unjudged": unjudged}
    return record

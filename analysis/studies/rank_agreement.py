"""The study of `analyze agreement`: do stored runs on different data order the defenses alike?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.plots.data import build_agreement_points
from analysis.report.results import Run
from analysis.stats.rank_agreement import (
    MIN_RANKED_DEFENSES,
    RANKED_MEASURES,
    EffectSamples,
    compare_effect_ranks,
    sample_effects,
)
from analysis.stats.tables import ScoreTable, find_defense_rows
from analysis.studies.manifest import collect_versions
from defenses.errors import UserError

_RUN_HINT = "`analyze -d … --data NAME -o FOLDER` writes one"


def compare_run_rankings(runs: Sequence[Run], seed: int = 0) -> Run:
    """Return the agreement of every pair of runs on the order of their defenses, by attack and measure.

    Args:
        runs: two or more runs of `analyze` of the same model, attacks and readout on different data.
        seed: random seed.

    Returns:
        A run with the tables `agreement`, a row per attack, pair of data sets and measure, and `ranks`, the
        effect and the rank of each defense on each data set (1 for the largest effect), and with a figure for
        each attack.

    Raises:
        UserError: if the runs cannot be compared.
    """
    if len(runs) < 2:
        raise UserError(f"agreement compares two or more runs, and this is one; {_RUN_HINT}")
    check_comparable_runs(runs)
    labels = _choose_data_labels(runs)
    # Each run has its own draws, because the sets are sampled independently.
    tables = [build_score_table(run) for run in runs]
    attacks = list(dict.fromkeys(attack for attack, _ in tables[0].condition_keys))
    notices: list[str] = []
    rows: list[dict[str, Any]] = []
    rank_tables: list[pd.DataFrame] = []
    for attack in attacks:
        samples = [
            sample_effects(table, run.tables.get("responses"), attack, seed + number)
            for number, (table, run) in enumerate(zip(tables, runs, strict=True))
        ]
        rank_tables += [
            _build_rank_table(attack, label, run_samples)
            for label, run_samples in zip(labels, samples, strict=True)
        ]
        for first, second in combinations(range(len(runs)), 2):
            shared = _select_shared_defenses(runs[first], runs[second], attack, notices)
            for measure in RANKED_MEASURES:
                pair = [samples[index].get(measure) for index in (first, second)]
                row = _compare_measure(pair[0], pair[1], shared)
                if row is not None:
                    names = {"attack": attack, "first": labels[first], "second": labels[second]}
                    rows.append(names | {"measure": measure} | row)
    if not rows:
        raise UserError(
            f"the runs share fewer than {MIN_RANKED_DEFENSES} defenses, and an order needs at least as many: "
            "repeat them with the same -d options, such as -d all"
        )
    _note_missing_measures(rows, notices)
    _note_shared_queries(runs, labels, notices)
    agreement = pd.DataFrame(rows)
    figure_tables = build_agreement_points(agreement)
    all_tables = {"agreement": agreement, "ranks": pd.concat(rank_tables, ignore_index=True)}
    record = _describe_comparison(runs, labels, attacks, seed, notices)
    return Run("agreement", record, all_tables | figure_tables, figures=tuple(figure_tables))


def check_comparable_runs(runs: Sequence[Run]) -> None:
    """Raise a UserError unless the runs differ in their data only.

    Args:
        runs: two or more runs.
    """
    for run in runs:
        if run.model_runs:
            raise UserError(
                f"{run.name} holds the runs of several models, whose order its order.csv compares; give the "
                "folder of one model to compare data sets"
            )
        missing = [name for name in ("scores", "summary") if name not in run.tables]
        if missing or "defenses" not in run.record:
            lacking = f"{missing[0]}.csv" if missing else "the entry defenses in run.json"
            raise UserError(f"{run.name} lacks {lacking}, so it is no run of `analyze`; {_RUN_HINT}")
    first = runs[0]
    for run in runs[1:]:
        for subject, describe, hint in (
            (
                "model",
                _describe_model,
                "repeat one of them with the -m of the other, or compare models by `analyze -m A -m B`",
            ),
            ("attacks", _describe_attacks, "repeat one of them with the --attack options of the other"),
            ("readout", _describe_readout, "repeat one of them with the --readout of the other"),
            ("judge of the responses", _describe_judge, "repeat the older one"),
        ):
            one, other = describe(first.record), describe(run.record)
            if one and other and one != other:
                raise UserError(
                    f"{first.name} and {run.name} differ in the {subject} ({one}, {other}), so their order "
                    f"may differ for that reason: {hint}"
                )
    for one_run, other_run in combinations(runs, 2):
        if _identify_data(one_run.record) == _identify_data(other_run.record):
            raise UserError(
                f"{one_run.name} and {other_run.name} have the same queries, so their agreement says nothing "
                "about other data: repeat one of them with another --data"
            )


def _describe_model(record: Mapping[str, Any]) -> str:
    model = record["model"]
    return " ".join([str(model["name"]), str(model.get("sha256", ""))[:12]]).strip()


def _describe_attacks(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record.get("attacks", []))))


def _describe_readout(record: Mapping[str, Any]) -> str:
    """Return the name of the readout, and a short digest of what it was fitted to, except its threshold."""
    readout = record["readout"]
    fitted = [readout.get(name) for name in ("ids", "weights", "base_value", "sharpness")]
    digest = hashlib.sha256(json.dumps(fitted, sort_keys=True).encode()).hexdigest()[:6]
    return f"{readout['name']} {digest}"


def _describe_judge(record: Mapping[str, Any]) -> str:
    """Return judge and length of the judged responses; an empty text if none was judged."""
    responses = record.get("responses")
    if not responses:
        return ""
    return f"{responses['judge']['name']} on {responses['new_tokens']} tokens"


def _identify_data(record: Mapping[str, Any]) -> tuple[Any, ...]:
    data = record["data"]
    return data["name"], data.get("sha256"), data["split"], data.get("limit")


def _choose_data_labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name of each run's data, without the path of a copy; equal names get a number."""
    names = [str(run.record["data"]["name"]) for run in runs]
    labels = ["+".join(_shorten_data_name(part) for part in name.split("+")) for name in names]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:place].count(label) + 1})"
        for place, label in enumerate(labels)
    ]


def _shorten_data_name(name: str) -> str:
    """Return the name of a set without a path.

    >>> _shorten_data_name("jbb=/home/me/jbb"), _shorten_data_name("./mine.csv"), _shorten_data_name("twins")
    ('jbb', 'mine', 'twins')
    """
    base, equals, _ = name.partition("=")
    return base if equals else Path(name).stem


def build_score_table(run: Run) -> ScoreTable:
    """Return the scores of a stored run, whose families are those of its summary."""
    summary = run.tables["summary"].drop_duplicates("defense")
    families = dict(zip(summary["defense"], summary["family"], strict=True))
    record = {**run.record, "defenses": {name: {"family": family} for name, family in families.items()}}
    scores = run.tables["scores"]
    try:
        return ScoreTable(scores[scores["defense"].isin(list(families))].reset_index(drop=True), record)
    except ValueError as error:
        raise UserError(f"{run.name}: {error}; repeat the run") from error


def _build_rank_table(attack: str, label: str, samples: Mapping[str, EffectSamples]) -> pd.DataFrame:
    """Return effect and rank of each defense on one data set, for every measure."""
    rows = []
    for measure, effects in samples.items():
        table = pd.DataFrame({"defense": effects.defenses, "effect": effects.observed})
        table["rank"] = table["effect"].rank(ascending=False)
        rows.append(table.assign(attack=attack, data=label, measure=measure))
    return pd.concat(rows)[["attack", "data", "measure", "defense", "effect", "rank"]]


def _select_shared_defenses(first: Run, second: Run, attack: str, notices: list[str]) -> list[str]:
    """Return the defenses that both runs hold with the same settings; say which are left out."""
    by_run = []
    for run in (first, second):
        summary = run.tables["summary"]
        rows = summary[summary["attack"] == attack].reset_index(drop=True)
        by_run.append(list(rows.loc[find_defense_rows(rows["defense"], rows["family"]), "defense"]))
    settings = [run.record["defenses"] for run in (first, second)]
    common = [name for name in by_run[0] if name in by_run[1]]
    changed = [name for name in common if settings[0].get(name) != settings[1].get(name)]
    single = [name for name in dict.fromkeys(by_run[0] + by_run[1]) if name not in common]
    pair = f"{first.name} and {second.name}"
    for names, reason in ((single, "only one of them has"), (changed, "they have with other settings")):
        text = f"{pair} are compared without the defenses that {reason}: {', '.join(names)}"
        if names and text not in notices:
            notices.append(text)
    return [name for name in common if name not in changed]


def _compare_measure(
    first: EffectSamples | None, second: EffectSamples | None, shared: Sequence[str]
) -> dict[str, Any] | None:
    """Return the agreement in one measure; None if a run lacks it or too few defenses are left."""
    if first is None or second is None:
        return None
    known = first.known_defenses & second.known_defenses
    defenses = [name for name in shared if name in known]
    if len(defenses) < MIN_RANKED_DEFENSES:
        return None
    return compare_effect_ranks(first.select_defenses(defenses), second.select_defenses(defenses))


def _note_missing_measures(rows: Sequence[Mapping[str, Any]], notices: list[str]) -> None:
    """Say which measures no pair has."""
    missing = [
        label for name, label in RANKED_MEASURES.items() if name not in {row["measure"] for row in rows}
    ]
    if missing:
        notices.append(
            f"without {', '.join(missing)}: they need judged responses of at least {MIN_RANKED_DEFENSES} "
            "shared defenses in both runs (--responses all)"
        )


def _note_shared_queries(runs: Sequence[Run], labels: Sequence[str], notices: list[str]) -> None:
    """Say how many queries two sets share, whose sampling errors are then not independent."""
    keys = [
        {run.texts.get(str(query), (run.record["data"].get("sha256"), str(query))) for query in queries}
        for run in runs
        for queries in [run.tables["scores"]["query"].unique()]
    ]
    for first, second in combinations(range(len(runs)), 2):
        if n_shared := len(keys[first] & keys[second]):
            notices.append(
                f"{labels[first]} and {labels[second]} share {n_shared} queries, so they agree more than "
                "independent sets would, also beyond the ceiling"
            )


def _describe_comparison(
    runs: Sequence[Run], labels: Sequence[str], attacks: Sequence[str], seed: int, notices: Sequence[str]
) -> dict[str, Any]:
    """Return the record of the comparison, with what its captions need."""
    first = runs[0].record
    data = [run.record["data"] for run in runs]
    record = {
        "model": first["model"],
        "dtype": first.get("dtype", ""),
        "readout": first["readout"],
        "attacks": list(attacks),
        "data": {
            "name": " and ".join([", ".join(labels[:-1]), labels[-1]]),
            "split": "/".join(dict.fromkeys(str(entry["split"]) for entry in data)),
            "n_harmful": sum(int(entry["n_harmful"]) for entry in data),
            "n_benign": sum(int(entry["n_benign"]) for entry in data),
        },
        "runs": [
            {
                "label": label,
                "run": run.name,
                "created": run.record.get("created"),
                **{key: entry.get(key) for key in ("sha256", "split", "limit", "n_harmful", "n_benign")},
            }
            for label, run, entry in zip(labels, runs, data, strict=True)
        ],
        "seed": seed,
        "notices": list(notices),
        "versions": collect_versions("refusalscope", "numpy", "pandas", "scipy"),
    }
    if all(run.record.get("responses") for run in runs):
        record["responses"] = {key: first["responses"][key] for key in ("new_tokens", "judge")}
    return record

"""Stored runs on different data are compared in the order of their defenses, and nothing else may differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import assert_user_error, run_cli

from analysis.api import compare_rankings, read
from analysis.report.html import render_page
from analysis.stats.rank_agreement import RANKED_MEASURES
from defenses.errors import UserError

DEFENSES = ("a", "b", "c", "d", "e")
FAMILIES = {"none": "none", "random_tokens": "control"}


def write_run(
    folder: Path,
    seed: int = 0,
    effects: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0),
    judged: bool = True,
    attacks: tuple[str, ...] = ("direct",),
    **changes: Any,
) -> Path:
    """Write a run of some defenses with planted effects; `changes` replace entries of its record."""
    folder.mkdir(parents=True)
    rng, frames = np.random.default_rng(seed), []
    n = 60
    is_harmful = np.arange(n) < n // 2
    known = dict(zip(DEFENSES, effects, strict=False)) | {"random_tokens": 9.0}
    for attack in attacks:
        before = rng.normal(np.where(is_harmful, 0, -1), 1)
        for name, effect in {"none": 0.0, **known}.items():
            change = effect * np.where(is_harmful, 1.5, 0.5) + rng.normal(0, 0.3, n) * (name != "none")
            frames.append(
                pd.DataFrame(
                    {
                        "query": [f"{folder.name}-{number}" for number in range(n)],
                        "pair": [f"p{number % (n // 2)}" for number in range(n)],
                        **{"category": "any", "harmful": is_harmful, "attack": attack, "defense": name},
                        **{"margin": before + change, "p_refuse": 0.5, "prompt_tokens": 9, "coverage": 1.0},
                    }
                )
            )
    scores = pd.concat(frames)
    scores.to_csv(folder / "scores.csv", index=False)
    verdicts = np.where(scores["margin"] > 2, "refused", "not refused")
    if judged:
        responses = scores[["query", "pair", "category", "harmful", "attack", "defense"]]
        responses.assign(verdict=verdicts).to_csv(folder / "responses.csv", index=False)
    summary = scores[["attack", "defense"]].drop_duplicates()
    summary = summary.assign(
        family=summary["defense"].map(FAMILIES).fillna("own"),
        **{"n_harmful": n // 2, "n_benign": n // 2, "verdict": "inconclusive"},
    )
    names = ("refusal_rate", "over_refusal_rate", "auroc", "delta_auroc", "shift", "discrimination")
    estimates = {f"{name}{end}": 0.5 for name in names for end in ("", "_low", "_high")}
    summary.assign(**estimates).to_csv(folder / "summary.csv", index=False)
    record = {
        "model": {"name": "toy", "sha256": "a" * 64},
        "readout": {"name": "outcome", "threshold": 0.0, "refuse": ["I"], "comply": ["Sure"]},
        "attacks": list(attacks),
        "data": {"name": f"jbb=/somewhere/{folder.name}" if seed else "contrast", "sha256": folder.name}
        | {"split": "test", "limit": None, "n_harmful": n // 2, "n_benign": n // 2},
        "defenses": {name: {"family": "own", "settings": {}} for name in ("none", *known)},
        **({"responses": {"new_tokens": 32, "judge": {"name": "learned"}}} if judged else {}),
    }
    (folder / "run.json").write_text(json.dumps(record | changes), "utf-8")
    return folder


def test_the_command_finds_the_planted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)]
    result = run_cli("agreement", *folders, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "order of the defenses on contrast and on jbb" in " ".join(result.out.split())
    assert "+1.00 [+1.00, +1.00]" in result.out and "somewhere" not in result.out
    stored = read(tmp_path / "out")
    table = stored.tables["agreement"]
    assert list(table["measure"]) == list(RANKED_MEASURES) and set(table["n_defenses"]) == {5}
    assert table["rank_correlation"].iloc[0] == 1 and (table["ceiling"] > 0.8).all()
    assert stored.figures == ("agreement",) and (tmp_path / "out" / "agreement.png").is_file()
    ranks = stored.tables["ranks"].query("data == 'jbb' and measure == 'shift'")
    assert list(ranks.sort_values("rank")["defense"]) == ["e", "d", "c", "b", "a"]
    assert "/somewhere" not in (tmp_path / "out" / "run.json").read_text("utf-8")
    assert stored.headline.startswith(
        "Order of the defenses on toy, rank correlation: contrast and jbb, shift +1.00"
    )
    assert "Rank correlation of the defenses" in render_page([stored])
    as_json = run_cli("agreement", *folders, "-o", tmp_path / "json", "--json")
    assert json.loads(as_json.out)[0]["first"] == "contrast"


def test_three_runs_make_three_pairs_and_each_attack_has_its_figure(tmp_path: Path) -> None:
    attacks = ("direct", "base64")
    runs = [write_run(tmp_path / f"run{number}", seed=number, attacks=attacks) for number in range(3)]
    run = compare_rankings(runs)
    table = run.tables["agreement"]
    assert len(table) == 2 * 3 * len(RANKED_MEASURES)
    assert set(table["first"]) | set(table["second"]) == {"contrast", "jbb (1)", "jbb (2)"}
    assert run.figures == ("agreement-direct", "agreement-base64")
    for name in run.figures:
        run.draw_figure(name)


def test_defenses_that_only_one_run_has_or_that_differ_are_left_out_with_a_notice(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one")
    record = json.loads((first / "run.json").read_text("utf-8"))
    changed = record["defenses"] | {"a": {"family": "own", "settings": {"text": "Be kind."}}}
    same = read(write_run(tmp_path / "same", seed=2, effects=(0.0, 1.0, 2.0, 3.0)))
    other = read(write_run(tmp_path / "two", seed=1, defenses=changed))
    run = compare_rankings([first, other])
    assert set(run.tables["agreement"]["n_defenses"]) == {4}
    assert any("with other settings: a" in notice for notice in run.record["notices"])
    run = compare_rankings([read(first), same])
    assert set(run.tables["agreement"]["n_defenses"]) == {4}
    assert any("only one of them has: e" in notice for notice in run.record["notices"])
    with pytest.raises(UserError, match=r"fewer than 4 defenses.*-d all"):
        compare_rankings([first, write_run(tmp_path / "few", seed=3, effects=(0.0, 1.0, 2.0))])


def test_without_judged_responses_the_margins_are_compared_with_a_notice(tmp_path: Path) -> None:
    run = compare_rankings([write_run(tmp_path / "one"), write_run(tmp_path / "two", 1, judged=False)])
    assert list(run.tables["agreement"]["measure"]) == ["shift", "discrimination", "delta_auroc"]
    assert any("--responses all" in notice for notice in run.record["notices"])


def test_shared_queries_are_noted(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    for name in ("scores.csv", "responses.csv"):
        text = (second / name).read_text("utf-8").replace("two-0,", "one-0,").replace("two-30,", "one-30,")
        (second / name).write_text(text, "utf-8")
    record = json.loads((second / "run.json").read_text("utf-8"))
    record["data"]["sha256"] = "one"
    (second / "run.json").write_text(json.dumps(record), "utf-8")
    notices = compare_rankings([first, second]).record["notices"]
    assert any("contrast and jbb share 2 queries" in notice for notice in notices)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "toy", "sha256": "b" * 64}}, ("differ in the model", "with the -m of the other")),
        ({"readout": {"name": "words", "threshold": 0.0}}, ("differ in the readout (outcome", ", words")),
        (
            {"readout": {"name": "outcome", "threshold": 0.0, "weights": [1.0]}},
            ("differ in the readout (outcome", ", outcome"),
        ),
        ({"attacks": ["base64"]}, ("differ in the attacks (direct, base64)", "--attack")),
        (
            {"responses": {"new_tokens": 24, "judge": {"name": "learned"}}},
            ("differ in the judge of the responses", "on 24 tokens"),
        ),
        (
            {
                "data": {
                    "name": "contrast",
                    "sha256": "one",
                    "split": "test",
                    "limit": None,
                    "n_harmful": 30,
                    "n_benign": 30,
                }
            },
            ("have the same queries", "another --data"),
        ),
    ],
)
def test_runs_that_differ_in_more_or_less_than_their_data_are_a_one_line_error(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    folders = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1, **changes)
    assert_user_error(run_cli("agreement", *folders, "-o", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_one_run_and_a_folder_without_scores_are_one_line_errors(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    assert_user_error(run_cli("agreement", first), "two or more runs")
    (second / "scores.csv").unlink()
    assert_user_error(run_cli("agreement", first, second), "two lacks scores.csv", "analyze -d")

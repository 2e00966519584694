"""Scores are computed once: what is kept equals what is computed, and is found again by all it depends on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import derive_readout, make_adapter, make_toy_session, render_query
from fault_runs import limit_file_size

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.models import cache
from analysis.models.cache import (
    SCORING_SOURCES,
    CacheKey,
    ScoreCache,
    clear_cache,
    count_cached_rows,
    describe_computation,
    hash_code,
    read_cached_json,
    write_cached_json,
)
from analysis.models.session import ModelSession, generate_responses, iterate_defended_logits
from analysis.readouts.prompt_scores import score_prompts
from analysis.run import score_condition
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.contract import ModelCall
from defenses.decoding import SafeDecoding
from defenses.errors import UserError
from defenses.tuning import SafetyTuning

ASKED = sample_queries(load_queries("twins").queries, 8)
ROOT = Path(__file__).resolve().parents[2]
NONE, POLICY = get_defense("none"), get_defense("policy")


def bench_with(place: Path) -> ModelSession:
    """Return a toy bench that keeps what it computes."""
    return ModelSession.from_model(make_toy_session().loaded_model, score_cache=ScoreCache(place))


def margins(bench: ModelSession, defense: Any, readout: Any = None) -> list[float]:
    """Return the margins of the queries."""
    readout = readout or derive_readout(bench, ASKED, NONE)
    return score_condition(bench, defense.name, defense, ASKED, readout)["margin"].tolist()


def test_what_is_kept_is_what_was_computed_and_is_not_computed_again(tmp_path: Path) -> None:
    first = margins(bench_with(tmp_path / "s"), POLICY)
    bench = bench_with(tmp_path / "s")
    readout = derive_readout(bench, ASKED, NONE)
    bench.engine.work_counter.reset_counts()
    assert margins(bench, POLICY, readout) == first == margins(make_toy_session(), POLICY)
    assert (
        bench.engine.work_counter.computed_tokens == 0
        and bench.score_cache is not None
        and bench.score_cache.n_hits == len(ASKED)
    )


def test_of_more_queries_only_the_new_ones_are_computed(tmp_path: Path) -> None:
    bench, told = bench_with(tmp_path / "s"), []
    readout = derive_readout(bench, ASKED, NONE)
    score_condition(bench, "policy", POLICY, ASKED[:3], readout)
    bench = bench_with(tmp_path / "s")
    frame = score_condition(bench, "policy", POLICY, ASKED, readout, on_progress=told.append)
    assert frame["margin"].tolist() == pytest.approx(margins(make_toy_session(), POLICY), abs=1e-5)
    assert bench.score_cache is not None and bench.score_cache.n_hits == 3 and sum(told) == len(ASKED)


def test_scores_are_named_by_all_that_they_depend_on(tmp_path: Path) -> None:
    bench = bench_with(tmp_path / "s")
    readout = derive_readout(bench, ASKED, NONE)
    margins(bench, NONE, readout)
    tuned = SafetyTuning(adapter=load_adapter(make_adapter(tmp_path / "a", seed=1)))
    other = SafetyTuning(adapter=load_adapter(make_adapter(tmp_path / "b", seed=2)))
    weights = replace(bench, loaded_model=replace(bench.loaded_model, origin={"sha256": "other"}))
    changes = [
        (bench, POLICY, readout),
        (bench, tuned, readout),
        (bench, other, readout),
        (bench, NONE, replace(readout, weights=tuple(2 * one for one in readout.weights))),
        (bench, NONE, replace(readout, response_prefix=(7,))),
        (bench, NONE, replace(readout, is_log_odds=True)),
        (bench, NONE, replace(readout, base_value=0.2)),
        (bench, NONE, replace(readout, base_value=0.2, sharpness=4.0)),
        (weights, NONE, readout),
    ]
    assert bench.score_cache is not None
    for here, defense, read in changes:
        margins(here, defense, read)
    assert bench.score_cache.n_hits == 0
    # A threshold is no part of a margin.
    margins(bench, NONE, replace(readout, threshold=3.0))
    assert bench.score_cache.n_hits == len(ASKED)


def test_a_users_own_change_of_the_model_is_never_kept(tmp_path: Path) -> None:
    class Own(type(POLICY)):  # type: ignore[misc]
        def apply_to(self, model: Any) -> Any:
            return super().apply_to(model)

    bench = bench_with(tmp_path / "s")
    assert Own().weights_fingerprint() is None and POLICY.weights_fingerprint() == ""
    for _ in range(2):
        margins(bench, Own())
    assert bench.score_cache is not None and bench.score_cache.n_hits == 0


def test_prompts_that_are_the_same_are_read_once() -> None:
    bench = make_toy_session()
    readout = derive_readout(bench, ASKED, NONE)
    prompts = [render_query(bench, NONE, query)[0].ids for query in ASKED[:2]]
    bench.engine.work_counter.reset_counts()
    once = score_prompts(bench.loaded_model, bench.engine, NONE, prompts, readout)
    tokens = bench.engine.work_counter.computed_tokens
    twice = score_prompts(bench.loaded_model, bench.engine, NONE, prompts * 3, readout)
    assert bench.engine.work_counter.computed_tokens == 2 * tokens
    assert torch.equal(twice, once.repeat(3, 1))


@pytest.mark.parametrize("harm", ["garbage", "folder", "read-only"])
def test_where_the_file_cannot_be_used_everything_is_computed(tmp_path: Path, harm: str) -> None:
    place = tmp_path / "s"
    if harm == "garbage":
        place.write_bytes(b"no database at all" * 100)
    elif harm == "folder":
        place.mkdir()
    else:
        place.parent.chmod(0o500)
    assert margins(bench_with(place), POLICY) == margins(make_toy_session(), POLICY)
    place.parent.chmod(0o700)


@pytest.mark.parametrize("harm", ["fields", "value", "flat", "list", "half", "bytes", "deep", "folder"])
def test_a_damaged_result_is_computed_again(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "x.json"
    content = {"threshold": np.float64(0.5), "bad": math.nan, "ids": [1, 2], "é": None}
    write_cached_json(path, content)
    assert str(read_cached_json(path, dict)) == str(json.loads(json.dumps(content)))
    assert read_cached_json(path, lambda content: content["other"]) is None  # of another version
    stored = json.loads(path.read_text("utf-8"))
    harmed = {
        "fields": json.dumps(stored | {"content": stored["content"] | {"new": 1}}),
        "value": path.read_text("utf-8").replace("0.5", "0.6"),
        "flat": json.dumps(content),
        "list": "[1]",
        "half": path.read_text("utf-8")[:30],
        "deep": "[" * 100_000,
    }
    if harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe" if harm == "bytes" else harmed[harm].encode())
    assert read_cached_json(path, dict) is None
    write_cached_json(path, content)
    assert (read_cached_json(path, dict) is None) == (harm == "folder")


def test_rows_are_counted_and_cleared(tmp_path: Path) -> None:
    place = tmp_path / "s"
    assert count_cached_rows(place) == {"scores": 0, "drafts": 0, "responses": 0, "bytes": 0}
    margins(bench_with(place), POLICY)
    counted = count_cached_rows(place)
    assert counted["scores"] == len(ASKED) and counted["bytes"] > 0
    clear_cache(place)
    assert count_cached_rows(place)["scores"] == 0 and not list(tmp_path.glob("s*"))


def test_scores_that_are_not_finite_are_not_cached(tmp_path: Path) -> None:
    score_cache = ScoreCache(tmp_path / "s")
    score_cache.write_scores([(b"a", float("nan"), 1.0), (b"b", float("inf"), 1.0), (b"c", 1.0, 1.0)])
    assert score_cache.read_scores([b"a", b"b", b"c"]) == {b"c": (1.0, 1.0)}
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_keys_depend_on_the_configuration_and_the_code() -> None:
    description = describe_computation(make_toy_session().loaded_model)
    assert description["code"] == hash_code(*SCORING_SOURCES)
    assert description["config"]["hidden_size"] == 64
    assert description["config"]["_name_or_path"] == ""


def test_names_differ_where_ids_would_run_together() -> None:
    namer = CacheKey({})
    assert len({namer.make_key(ids) for ids in ([1, 2], [12], [1, 2, 3], [12, 3], [1, 23], [])}) == 6


def test_a_change_of_any_scoring_source_file_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = ("analysis/models", "analysis/readouts", "defenses")
    files = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    files += [ROOT / "analysis/attacks.py", ROOT / "analysis/run.py"]
    assert len(files) > 40
    for file in files:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.name, "utf-8")
    monkeypatch.setattr(cache, "_SOURCE_ROOT", tmp_path)

    def digest() -> str:
        return cache.hash_code.__wrapped__(*cache.SCORING_SOURCES)

    digests = [digest()]
    for file in files:
        with (tmp_path / file.relative_to(ROOT)).open("a", encoding="utf-8") as copy:
            copy.write("# changed")
        digests.append(digest())
    assert len(set(digests)) == len(digests)


_SCORING = """
import sys, time
from pathlib import Path
from analysis.models.cache import CacheKey, ScoreCache
score_cache = ScoreCache(Path(sys.argv[1]))
for batch in range(10_000):
    score_cache.write_scores((CacheKey({}).make_key([batch, row]), float(batch), 1.0) for row in range(8))
    print(batch, flush=True)
    time.sleep(0.01)
"""


def test_a_run_that_is_killed_loses_one_batch_at_most(tmp_path: Path) -> None:
    place = tmp_path / "s"
    with subprocess.Popen(
        [sys.executable, "-c", _SCORING, str(place)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        assert run.stdout is not None
        while int(run.stdout.readline()) < 20:
            pass
        run.send_signal(signal.SIGKILL)
        told = 20 + len(run.stdout.read().split())
    held = count_cached_rows(place)["scores"]
    assert held % 8 == 0 and held // 8 in (told + 1, told + 2)
    with sqlite3.connect(place) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_rows_that_did_not_fit_the_disk_are_stored_when_they_do(tmp_path: Path) -> None:
    score_cache = ScoreCache(tmp_path / "s")
    rows = [(CacheKey({}).make_key([row]), float(row), 1.0) for row in range(2_000)]
    with limit_file_size(8_192):
        score_cache.write_scores(rows[:1_000])
        assert "cannot be used" in score_cache.describe_problem()
        assert ScoreCache(tmp_path / "s").read_scores([rows[0][0]]) == {}
    score_cache.write_scores(rows[1_000:])
    assert score_cache.describe_problem() == ""
    later = ScoreCache(tmp_path / "s")
    assert len(later.read_scores([key for key, *_ in rows])) == len(rows)
    assert (score_cache.describe_reuse(), later.describe_reuse()) == ("", "2,000 margins")
    assert later.describe_reuse() == ""


def test_what_an_unusable_file_costs_is_said(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"no database at all" * 100)
    assert "file is not a database" in ScoreCache(tmp_path / "s").describe_problem()


def write_cache(place: Path, number: int) -> None:
    """Write rows and JSON files into a cache, as a run does; other processes do so at the same time."""
    score_cache = ScoreCache(place)
    for batch in range(40):
        score_cache.write_scores((CacheKey({}).make_key([number, batch, row]), 1.0, 1.0) for row in range(8))
        shared_path = place.with_name("readouts") / f"{batch % 3}.json"
        write_cached_json(shared_path, {"rows": [number] * 2_000})
        content = read_cached_json(shared_path, lambda content: content)
        assert content is not None and len(set(content["rows"])) == 1
    assert not score_cache.describe_problem()


def test_three_processes_share_a_cache(tmp_path: Path) -> None:
    writers = [
        multiprocessing.get_context("fork").Process(target=write_cache, args=(tmp_path / "s", number))
        for number in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert count_cached_rows(tmp_path / "s")["scores"] == 3 * 40 * 8
    assert not list((tmp_path / "readouts").glob(".*"))


# --- blends -----------------------------------------------------------------------------------------------


def expert(folder: Path, alpha: float) -> SafeDecoding:
    """Return a blend with tuned weights."""
    return SafeDecoding(alpha=alpha, adapter=load_adapter(make_adapter(folder / "x", seed=3)))


def test_the_margin_of_a_blend_is_that_of_the_model_plus_alpha_times_what_the_expert_does(
    tmp_path: Path,
) -> None:
    bench = make_toy_session()
    readout = derive_readout(bench, ASKED, NONE)
    blend = expert(tmp_path, 3.0)
    plain, tuned = margins(bench, NONE, readout), margins(bench, SafetyTuning(adapter=blend.adapter), readout)
    want = [a + 3 * (b - a) for a, b in zip(plain, tuned, strict=True)]
    assert margins(bench, blend, readout) == pytest.approx(want, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(plain, want, strict=True)) > 1e-2
    assert margins(bench, replace(blend, alpha=1.0), readout) == pytest.approx(tuned, abs=1e-5)


def test_a_blend_says_first_what_is_read_and_then_goes_on_as_the_model(tmp_path: Path) -> None:
    bench, blend = make_toy_session(), expert(tmp_path, 4.0)
    said = generate_responses(bench, blend, DIRECT_ATTACK.build_query_chats(ASKED), max_new_tokens=5)
    usual = generate_responses(bench, NONE, DIRECT_ATTACK.build_query_chats(ASKED), max_new_tokens=5)
    for query, (answer,) in zip(ASKED, said, strict=True):
        ids = render_query(bench, NONE, query)[0].ids
        ((_, logits),) = iterate_defended_logits(
            bench.engine, bench.loaded_model, blend, [ids], lambda logits: logits
        )
        assert answer.ids[0] == int(logits.argmax())
        with torch.no_grad():
            following = bench.loaded_model.model(input_ids=torch.tensor([[*ids, answer.ids[0]]])).logits[
                0, -1
            ]
        assert answer.ids[1] == int(following.argmax())
    assert [one[0].ids for one in said] != [one[0].ids for one in usual]


# --- drafts -----------------------------------------------------------------------------------------------


def asking(text: str, tokens: int = 6, line: bool = False) -> ModelCall:
    """Return an ask."""
    return ModelCall([{"role": "user", "content": text}], tokens, line)


def test_drafts_are_greedy_answers_and_each_is_made_once(tmp_path: Path) -> None:
    bench = bench_with(tmp_path / "s")
    asks = [asking(text, line=True) for text in ("How do I sing?", "What is bread?", "How do I sing?")]
    said = bench.defense_calls.complete_calls(asks)
    assert said[0] == said[2] and bench.defense_calls.n_calls == 2
    usual = generate_responses(
        bench,
        NONE,
        DIRECT_ATTACK.build_query_chats([replace(ASKED[0], text="What is bread?")]),
        max_new_tokens=6,
    )
    assert said[1] == usual[0][0].text.strip().splitlines()[0].strip()
    again = bench_with(tmp_path / "s")
    assert again.defense_calls.complete_calls(asks) == said and again.defense_calls.n_calls == 0
    assert again.defense_calls.copy_uncached().complete_calls(asks[:1]) == said[:1]


def test_a_draft_of_a_line_ends_with_it(monkeypatch: Any) -> None:
    bench = make_toy_session()
    monkeypatch.setattr(
        type(bench.loaded_model.tokenizer),
        "decode",
        lambda self, ids, **_: "".join("ab\n"[i % 3] for i in ids),
    )
    whole = make_toy_session().defense_calls.copy_uncached().complete_calls([asking("Sing!", 40)])[0]
    line = bench.defense_calls.copy_uncached().complete_calls([asking("Sing!", 40, line=True)])[0]
    assert "\n" in whole and line and "\n" not in line and whole.startswith(line)


def test_responses_to_requests_are_never_cached(tmp_path: Path) -> None:
    score_cache = ScoreCache(tmp_path / "s")
    session = ModelSession.from_model(make_toy_session().loaded_model, score_cache=score_cache)
    chat = [{"role": "user", "content": "How do I sing?"}]
    for stops_at_newline, n_drafts in ((False, 0), (True, 1)):
        session.defense_calls.complete_calls([ModelCall(chat, 6, stops_at_newline=stops_at_newline)])
        assert count_cached_rows(tmp_path / "s")["drafts"] == n_drafts


def test_a_request_too_long_to_be_asked_about_is_refused() -> None:
    with pytest.raises(UserError, match=r"a defense calls the model .* and the model reads 2048"):
        make_toy_session().defense_calls.complete_calls([asking("word " * 4000)])


def test_watching_drafts_being_made() -> None:
    bench, told = make_toy_session(), []
    bench.defense_calls.on_progress = lambda made, wanted: told.append((made, wanted))
    bench.defense_calls.complete_calls([asking(f"What is {n}?") for n in range(5)])
    assert told[-1] == (5, 5)

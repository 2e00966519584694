"""Readouts beside `words`: behind an opener, and fitted on answers whose truth was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_bench
from rich.console import Console

import defenses
from analysis import calibrated as module
from analysis import queries, reading
from analysis.calibrated import TooFew, calibrated
from analysis.judge import Verdict
from analysis.run import score
from defenses import Host, UserError

NONE = defenses.get("none")
ASKED = queries.load("contrast").split("calibration").limit(60)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bench = toy_bench()
    return Host("toy", bench.loaded.tokenizer, (tmp_path / "secrets",), (tmp_path / "adapters",))


def planted(monkeypatch: pytest.MonkeyPatch, share: float = 0.5) -> tuple[int, int]:
    """Let answers refuse exactly where one first token is likelier than another; return the two."""
    bench = toy_bench()
    prompts = [bench.prompts(NONE, query)[0].ids for query in ASKED.queries]
    likely = bench.engine.read(prompts, lambda logits: logits.softmax(1)).mean(0)
    yes, no = likely.topk(2).indices.tolist()

    def said(bench, defense, asked, judge, tokens, done):
        ids = [bench.prompts(defense, query)[0].ids for query in asked]
        gap = bench.engine.read(ids, lambda logits: logits[:, [yes]] - logits[:, [no]])[:, 0].numpy()
        done(len(asked))
        return [Verdict("full" if one > np.quantile(gap, 1 - share) else "none") for one in gap]

    monkeypatch.setattr(module, "verdicts", said)
    return yes, no


def test_the_calibrated_readout_finds_the_tokens_that_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no = planted(monkeypatch)
    bench = toy_bench()
    words = bench.words(ASKED.queries, NONE)
    made = calibrated(bench, words, {"none": NONE}, ASKED.queries, "patterns", 4)
    assert (
        sum(made.weights) == pytest.approx(0, abs=1e-9) and list(made.weights) == sorted(made.weights)[::-1]
    )
    weights = dict(zip(made.ids, made.weights, strict=True))
    assert weights[yes] > 0.1 > 0 > weights[no] and set(words.ids) <= set(made.ids)
    said = module.verdicts(bench, NONE, ASKED.queries, "patterns", 4, lambda count: None)
    frame = score(bench, "none", NONE, ASKED.queries, made)
    right = (frame["margin"] > made.threshold).to_numpy() == np.array([one.refused for one in said])
    assert right.mean() > 0.85
    # Linear in the logits: a constant added to all of them changes no margin.
    logits = torch.randn(3, bench.loaded.model.config.vocab_size)
    assert torch.allclose(made.read(logits)[:, 0], made.read(logits + 5)[:, 0], atol=1e-4)


def test_answers_of_one_kind_teach_nothing_and_the_words_are_read_instead(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, share=0.05)
    bench = toy_bench()
    words = bench.words(ASKED.queries, NONE)
    with pytest.raises(TooFew, match="3 of 60 answers refuse"):
        calibrated(bench, words, {"none": NONE}, ASKED.queries, "patterns", 4)
    made = reading.chosen("calibrated", bench, host, NONE, ASKED, Console(quiet=True))
    assert made.name == "words" and "too few of one kind" in made.notices[-1]


def test_a_fitted_readout_is_kept_and_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch)
    one = reading.chosen("calibrated", toy_bench(), host, NONE, ASKED, Console(quiet=True))
    assert one.name == "calibrated" and "answers" in one.notices[-1]
    monkeypatch.setattr(module, "verdicts", None)
    assert reading.chosen("calibrated", toy_bench(), host, NONE, ASKED, Console(quiet=True)) == one
    with pytest.raises(TypeError):  # on other queries it is fitted again
        reading.chosen("calibrated", toy_bench(), host, NONE, ASKED.limit(40), Console(quiet=True))


def test_prefilled_reads_behind_the_opener(host: Host) -> None:
    bench = toy_bench()
    made = reading.chosen("prefilled-3", bench, host, NONE, ASKED, Console(quiet=True))
    opener = bench.loaded.tokenizer.encode(reading.OPENER, add_special_tokens=False)
    assert made.name == "prefilled-3" and list(made.prefix[:3]) == opener[:3]
    query = ASKED.queries[0]
    (margin,) = score(bench, "none", NONE, [query], made)["margin"]
    ids = torch.tensor([[*bench.prompts(NONE, query)[0].ids, *made.prefix]])
    with torch.inference_mode():
        logits = bench.loaded.model(input_ids=ids).logits[:, -1]
    assert margin == pytest.approx(float(made.read(logits)[0, 0]), abs=1e-4)
    with pytest.raises(UserError, match=r"the opener has \d+ tokens"):
        reading.chosen("prefilled-99", bench, host, NONE, ASKED, Console(quiet=True))

"""`make bench` on a tiny model: the three ways agree, and what is counted is what must be computed."""

from __future__ import annotations

import re
from functools import partial

import bench
import pytest
import torch
from conftest import tiny_model, toy_bench
from rich.console import Console

from analysis.datasets.loading import load_queries
from analysis.readouts.readout import Readout
from defenses.catalog import get_defense

READOUT = Readout("words", ("I", "Sure"), (5, 6), (1.0, -1.0))
PROMPTS = [(7, 8, 9, *range(10, 10 + n)) for n in (1, 4, 2)]


def test_all_ways_to_read_give_the_same_margins() -> None:
    model, read = tiny_model(), partial(bench.margin, READOUT)
    with torch.inference_mode():
        alone = bench.one_at_a_time(model, PROMPTS, read)
        padded = bench.left_padded(model, PROMPTS, read, size=2)
    assert torch.allclose(alone, padded, atol=1e-4)


def test_the_table_names_the_ways_and_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    bench.table(Console(width=120), tiny_model(), PROMPTS, partial(bench.margin, READOUT), "toy, float32")
    said = capsys.readouterr().out
    for word in ("one at a time", "left-padded batches of 32", "arithmetic limit", "3 prompts", "3 shared"):
        assert word in said


def test_the_help_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    bench.startup(Console(width=120), 1)
    assert re.fullmatch(r"analyze --help: \d+\.\d\d s, the fastest of 1\n\n", capsys.readouterr().out)


def test_the_split_over_parts_is_timed_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    asked = load_queries("contrast").select_split("test").limit_queries(8).queries
    readout = Readout("words", ("I", "Sure"), (300, 301), (1.0, -1.0))
    bench.parts(Console(width=120), toy_bench(), readout, get_defense("policy"), asked)
    said = capsys.readouterr().out
    assert "split over 17 parts" in said and "patches:" in said
    assert float(re.search(r"at most (\S+) nats", said)[1]) < 1e-5


def test_the_head_is_counted_once_a_query_and_the_rest_once_a_token() -> None:
    model = tiny_model()
    inside = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    head = model.get_output_embeddings().weight.numel()
    assert bench.operations(model, 10, 3) == 2 * (inside * 10 + head * 3)

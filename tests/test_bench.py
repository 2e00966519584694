"""`make bench` on a tiny model: the three methods agree, and the operations are counted correctly."""

from __future__ import annotations

import re
from functools import partial

import bench
import pytest
import torch
from conftest import make_toy_session, tiny_model
from rich.console import Console

from analysis.datasets.loading import load_queries
from analysis.readouts.readout import Readout
from defenses.catalog import get_defense

READOUT = Readout("words", ("I", "Sure"), (5, 6), (1.0, -1.0))
PROMPTS = [(7, 8, 9, *range(10, 10 + n)) for n in (1, 4, 2)]


def test_all_methods_give_the_same_margins() -> None:
    model, read = tiny_model(), partial(bench.read_margin, READOUT)
    with torch.inference_mode():
        single = bench.read_one_at_a_time(model, PROMPTS, read)
        padded = bench.read_left_padded(model, PROMPTS, read, batch_size=2)
    assert torch.allclose(single, padded, atol=1e-4)


def test_the_table_names_the_methods_and_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    bench.time_engine(
        Console(width=120), tiny_model(), PROMPTS, partial(bench.read_margin, READOUT), "toy, float32"
    )
    text = capsys.readouterr().out
    for word in ("one at a time", "left-padded batches of 32", "arithmetic limit", "3 prompts", "3 shared"):
        assert word in text


def test_the_help_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    bench.time_startup(Console(width=120), 1)
    assert re.fullmatch(r"analyze --help: \d+\.\d\d s, the fastest of 1\n\n", capsys.readouterr().out)


def test_the_attribution_is_timed_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    queries = load_queries("contrast").select_split("test").limit_queries(8).queries
    readout = Readout("words", ("I", "Sure"), (300, 301), (1.0, -1.0))
    bench.time_attribution(Console(width=120), make_toy_session(), readout, get_defense("policy"), queries)
    text = capsys.readouterr().out
    assert "attribution to 17 components" in text and "patches:" in text
    assert float(re.search(r"at most (\S+) nats", text)[1]) < 1e-5


def test_the_unembedding_is_counted_once_per_query_and_the_rest_once_per_token() -> None:
    model = tiny_model()
    body = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    head = model.get_output_embeddings().weight.numel()
    assert bench.count_operations(model, 10, 3) == 2 * (body * 10 + head * 3)

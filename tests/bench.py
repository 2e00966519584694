"""How fast is the engine? `make bench` prints queries per second, and how near that is to the limit.

First comes what needs no model: how long `analyze --help` takes, and all votes of all teams of three among
thirty defenses.

One prompt at a time and left-padded batches of 32 are what a user would otherwise write with transformers.
The limit is arithmetic: tokens that must be computed × floating-point operations per token ÷ the rate at
which this machine multiplies matrices, measured right before and right after the engine runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import locate_components
from analysis.mechanism.interventions import PairedRuns
from analysis.models.engine import Engine, count_shared_prefix
from analysis.models.loading import build_model_info, load_model
from analysis.models.session import ModelSession
from analysis.readouts.first_token import derive_words_readout
from analysis.readouts.readout import Readout
from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.ensembles import SplitScores, evaluate_votes, list_teams
from analysis.stats.voting import MarginTable
from defenses.catalog import get_defense
from defenses.contract import Defense

Ids = tuple[int, ...]


def main() -> None:
    """Print the table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--defense", nargs="*", default=["backdoor", "in_context_refusal"])
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    given = parser.parse_args()
    console = Console()
    startup(console)
    votes(console)
    asked = load_queries("contrast").select_split("test").limit_queries(given.queries).queries
    for dtype in given.dtype:
        loaded = load_model(given.model, given.device, dtype)
        bench = ModelSession.from_model(loaded)
        undefended = get_defense("none")
        opening = [
            prompt for query in sample_queries(asked, 16) for prompt in bench.render_query(undefended, query)
        ]
        readout = derive_words_readout(bench, opening)
        host = build_model_info(given.model, loaded.tokenizer, sha256=loaded.origin["sha256"])
        for name in given.defense:
            defense = get_defense(name).prepare(host)
            prompts = [prompt.ids for query in asked for prompt in bench.render_query(defense, query)]
            # A processor without bfloat16 is so slow in it that fewer prompts must do.
            work = operations(loaded.model, sum(map(len, prompts)), len(prompts))
            share = min(1, 60 * matrix_rate(loaded.model) / work)
            prompts = prompts[: max(32, int(len(prompts) * share))]
            table(console, loaded.model, prompts, partial(margin, readout), f"{name}, {dtype}")
            if dtype == "float32":
                parts(console, bench, readout, defense, asked[: len(prompts)])


def startup(console: Console, times: int = 5) -> None:
    """Time `analyze --help` in new processes, where a user waits for nothing but imports."""
    walls = []
    for _ in range(times):
        start = time.perf_counter()
        code = "from analysis.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=True)
        walls.append(time.perf_counter() - start)
    console.print(f"analyze --help: {min(walls):.2f} s, the fastest of {times}\n")


def votes(console: Console, defenses: int = 30, queries: int = 500) -> None:
    """Time what all teams of three come to by every vote, predicted and observed, on random margins."""
    rng = np.random.default_rng(0)
    is_harmful = np.arange(queries) % 2 == 0
    names = ("none", *(f"d{number}" for number in range(defenses)))
    margins = rng.normal(size=(queries, len(names))) + is_harmful[:, None]
    units = ResamplingUnits.from_pairs(pd.Series([None] * queries), is_harmful)
    half = SplitScores("direct", "test", MarginTable(names, margins, margins[:, 0], is_harmful), units)
    trios = [team for team in list_teams(names[1:], 3) if len(team) == 3]
    start = time.perf_counter()
    rows = evaluate_votes(half, trios, half)
    seconds = time.perf_counter() - start
    console.print(f"{len(rows):,} votes of {len(trios):,} teams on {queries} queries: {seconds:.1f} s\n")


def parts(
    console: Console, bench: ModelSession, readout: Readout, defense: Defense, asked: Sequence[Query]
) -> None:
    """Time margins split over all parts, and patches of every site, beside one plain pass for each prompt."""
    read = partial(margin, readout)
    one = PairedRuns(
        bench, locate_components(bench.loaded_model.model), readout, get_defense("none"), defense, asked
    )
    with defense.apply_to(bench.loaded_model.model):
        slow, _ = timed(
            bench.loaded_model.model,
            lambda: one_at_a_time(bench.loaded_model.model, one.encode_prompts(defense), read),
        )
    start = time.perf_counter()
    split = DirectLogitAttribution(one.components, readout).attribute_margins(bench, defense, asked)
    seconds = time.perf_counter() - start
    off = 0.0 if split.parts is None else np.abs(split.parts.contributions.sum(1) - split.margins).max()
    console.print(
        f"split over {split.parts and len(split.parts.parts)} parts: {len(asked) / seconds:.1f} queries/s, "
        f"{seconds / slow:.2f} × the time of one prompt at a time; sums off by at most {off:.1e} nats"
    )
    few = replace(one, queries=asked[:8])
    sites = few.patcher.list_sites(("residual", "attention", "mlp"))
    start = time.perf_counter()
    few.patch_activations(sites, {}, 0)
    each = (time.perf_counter() - start) / (4 * len(sites) * len(few.queries))
    console.print(f"patches: {1 / each:.0f} a second, {slow / len(asked) / each:.1f} for each plain prompt\n")


def margin(readout: Readout, logits: torch.Tensor) -> torch.Tensor:
    """Return margins alone, rows × 1."""
    return readout.compute_margins(logits)[:, :1]


def table(console: Console, model: torch.nn.Module, prompts: list[Ids], read: Callable, what: str) -> None:
    """Time the three ways on the same prompts and print them."""
    shared = count_shared_prefix(prompts)
    unique = shared + sum(len(prompt) - shared for prompt in prompts)
    engine = Engine(model)
    engine.read_first_token(prompts, read)  # warm
    slow, margins = timed(model, lambda: one_at_a_time(model, prompts, read))
    padded, padded_margins = timed(model, lambda: left_padded(model, prompts, read))
    fastest, limit = 0.0, 0.0
    for _ in range(3):
        before = matrix_rate(model)
        seconds, engine_margins = timed(model, lambda: engine.read_first_token(prompts, read))
        rate = max(before, matrix_rate(model))
        if len(prompts) / seconds > fastest:
            fastest, limit = (
                len(prompts) / seconds,
                len(prompts) * rate / operations(model, unique, len(prompts)),
            )
    mean = sum(map(len, prompts)) / len(prompts)
    title = f"{what}, {model.device}: {len(prompts)} prompts, {mean:.0f} tokens on average, {shared} shared"
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for head in ("", "queries/s", "engine is faster by", "largest margin difference"):
        shown.add_column(head, justify="right" if head else "left")
    for name, rate, apart in (
        ("one at a time", len(prompts) / slow, 0.0),
        ("left-padded batches of 32", len(prompts) / padded, (padded_margins - margins).abs().max()),
        ("engine", fastest, (engine_margins - margins).abs().max()),
    ):
        shown.add_row(name, f"{rate:.1f}", f"{fastest / rate:.1f} ×", f"{apart:.1e} nats")
    shown.add_row("arithmetic limit", f"{limit:.1f}", f"engine reaches {fastest / limit:.0%}", "")
    console.print(shown)
    console.print()


def timed(model: torch.nn.Module, work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return the seconds that the work took, and its result."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, result.cpu()


def one_at_a_time(model: torch.nn.Module, prompts: list[Ids], read: Callable) -> torch.Tensor:
    """Margins, one prompt in a pass: the reference."""
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return torch.cat(
        [read(model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()).cpu() for ids in rows]
    )


def left_padded(model: torch.nn.Module, prompts: list[Ids], read: Callable, size: int = 32) -> torch.Tensor:
    """Margins by left-padded batches, in the order of the prompts."""
    found = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device
        )
        places = (mask.cumsum(1) - 1).clip(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=1)
        found.append(read(out.logits[:, -1].float()).cpu())
    return torch.cat(found)


def operations(model: torch.nn.Module, tokens: int, queries: int) -> float:
    """Return the floating-point operations of the matrix products, those of attention not counted."""
    head = model.get_output_embeddings().weight.numel()
    inside = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2) - head
    embedding = model.get_input_embeddings().weight
    inside -= 0 if embedding is model.get_output_embeddings().weight else embedding.numel()
    return 2.0 * (inside * tokens + head * queries)


def matrix_rate(model: torch.nn.Module) -> float:
    """Return this machine's best floating-point operations per second, as a layer multiplies."""
    size = 8192 if model.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=model.device, dtype=model.dtype) for _ in range(2))
    timings = [timed(model, partial(torch.nn.functional.linear, left, right))[0] for _ in range(8)]
    return 2.0 * size**3 / min(timings)


if __name__ == "__main__":
    main()

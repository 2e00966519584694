"""`make bench`: speed of the engine in queries per second, and relative to the machine's arithmetic limit.

Two benchmarks need no model: the time of `analyze --help`, and all votes of all teams of three among thirty
defenses.

The baselines are one prompt at a time and left-padded batches of 32, as one would write them with
transformers. The limit is arithmetic: tokens to compute × floating-point operations per token ÷ the rate at
which this machine multiplies matrices, measured directly before and after the engine runs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from vision_models import build_vision_model

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import locate_components
from analysis.mechanism.interventions import PairedRuns
from analysis.models.batches import count_shared_prefix
from analysis.models.engine import Engine
from analysis.models.loading import LoadedModel, build_model_info, load_model
from analysis.models.session import ModelSession
from analysis.models.vision import ImageReader
from analysis.readouts.first_token import derive_words_readout
from analysis.readouts.readout import Readout
from analysis.stats.bootstrap import ResamplingUnits
from analysis.stats.ensembles import SplitScores, evaluate_votes, list_teams
from analysis.stats.voting import MarginTable
from defenses.catalog import get_defense
from defenses.contract import Defense, Message
from defenses.images import QueryImage

Ids = tuple[int, ...]


def main() -> None:
    """Run the benchmarks and print a table per dtype and defense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--defense", nargs="*", default=["backdoor", "in_context_refusal"])
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--images", type=int, default=2, help="images of the row on reused features")
    parser.add_argument("--conditions", type=int, default=30, help="conditions of the same row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    console = Console()
    time_startup(console)
    time_votes(console)
    time_images(console, args.images, args.conditions)
    queries = load_queries("contrast").select_split("test").limit_queries(args.queries).queries
    for dtype in args.dtype:
        loaded = load_model(args.model, args.device, dtype)
        session = ModelSession.from_model(loaded)
        undefended = get_defense("none")
        sample_chats = DIRECT_ATTACK.build_query_chats(sample_queries(queries, 16))
        sample_prompts = [prompt for (prompt,) in session.render_prompts(undefended, sample_chats)]
        readout = derive_words_readout(session, sample_prompts)
        model_info = build_model_info(args.model, loaded.tokenizer, sha256=loaded.origin["sha256"])
        for name in args.defense:
            defense = get_defense(name).prepare(model_info)
            prompts_by_query = session.render_prompts(defense, DIRECT_ATTACK.build_query_chats(queries))
            prompts = [prompt.ids for query_prompts in prompts_by_query for prompt in query_prompts]
            # A processor without bfloat16 support is so slow that it gets fewer prompts.
            work = count_operations(loaded.model, sum(map(len, prompts)), len(prompts))
            share = min(1, 60 * measure_matrix_rate(loaded.model) / work)
            prompts = prompts[: max(32, int(len(prompts) * share))]
            time_engine(console, loaded.model, prompts, partial(read_margin, readout), f"{name}, {dtype}")
            if dtype == "float32":
                time_attribution(console, session, readout, defense, queries[: len(prompts)])


def time_startup(console: Console, repeats: int = 5) -> None:
    """Time `analyze --help` in new processes, where only imports take time."""
    wall_times = []
    for _ in range(repeats):
        start = time.perf_counter()
        code = "from analysis.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=True)
        wall_times.append(time.perf_counter() - start)
    console.print(f"analyze --help: {min(wall_times):.2f} s, the fastest of {repeats}\n")


def time_votes(console: Console, n_defenses: int = 30, n_queries: int = 500) -> None:
    """Time the prediction and evaluation of every vote of all teams of three, on random margins."""
    rng = np.random.default_rng(0)
    is_harmful = np.arange(n_queries) % 2 == 0
    names = ("none", *(f"d{number}" for number in range(n_defenses)))
    margins = rng.normal(size=(n_queries, len(names))) + is_harmful[:, None]
    units = ResamplingUnits.from_pairs(pd.Series([None] * n_queries), is_harmful)
    split_scores = SplitScores(
        "direct", "test", MarginTable(names, margins, margins[:, 0], is_harmful), units
    )
    trios = [team for team in list_teams(names[1:], 3) if len(team) == 3]
    start = time.perf_counter()
    rows = evaluate_votes(split_scores, trios, split_scores)
    seconds = time.perf_counter() - start
    console.print(f"{len(rows):,} votes of {len(trios):,} teams on {n_queries} queries: {seconds:.1f} s\n")


def time_images(console: Console, n_images: int, n_conditions: int) -> None:
    """Time many conditions on the same images with and without reuse of their features.

    The model is random and as large as SmolVLM-256M; each image is one tile of 512 × 512 pixels.
    """
    model, processor = build_vision_model("smolvlm-256m")
    reader = ImageReader(processor, model, "smolvlm-256m")
    session = ModelSession.from_model(
        LoadedModel("smolvlm-256m", model, processor.tokenizer, {"id": "random"}, image_reader=reader)
    )
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)) for _ in range(n_images)]
    shown = [
        QueryImage(str(index), hashlib.sha256(image.tobytes()).hexdigest(), image.copy)
        for index, image in enumerate(images)
    ]
    conditions = [
        [
            session.chat_template.render_prompt(
                [
                    Message(role="system", content=f"Condition {number}: answer in a responsible way."),
                    Message(role="user", content="What does the image show?", image=image),
                ]
            ).ids
            for image in shown
        ]
        for number in range(n_conditions)
    ]
    session.engine.read_first_token(conditions[0], lambda logits: logits[:, :1])
    seconds, logits = [], []
    for reuses in (False, True):
        reader.feature_store.forget()
        start = time.perf_counter()
        for prompts in conditions:
            if not reuses:
                reader.feature_store.forget()
            logits.append(session.engine.read_first_token(prompts, lambda logits: logits[:, :1]))
        seconds.append(time.perf_counter() - start)
    gap = float((torch.cat(logits[:n_conditions]) - torch.cat(logits[n_conditions:])).abs().max())
    console.print(
        f"{n_conditions} conditions on {n_images} images, random SmolVLM-256M, {torch.get_num_threads()} "
        f"threads: {seconds[0] / seconds[1]:.1f} times as fast with features computed once "
        f"({seconds[0]:.0f} s and {seconds[1]:.0f} s), logits {gap:.1e} apart\n"
    )


def time_attribution(
    console: Console, session: ModelSession, readout: Readout, defense: Defense, queries: Sequence[Query]
) -> None:
    """Time direct logit attribution and patching of every site, relative to one plain pass per prompt."""
    read = partial(read_margin, readout)
    model = session.loaded_model.model
    query_chats = DIRECT_ATTACK.build_query_chats(queries)
    runs = PairedRuns(session, locate_components(model), readout, get_defense("none"), defense, query_chats)
    with defense.apply_to(model):
        plain_seconds, _ = measure_time(
            model, lambda: read_one_at_a_time(model, runs.encode_prompts(defense), read)
        )
    start = time.perf_counter()
    attribution = DirectLogitAttribution(runs.components, readout).attribute_margins(
        session, defense, query_chats
    )
    seconds = time.perf_counter() - start
    parts = attribution.parts
    error = 0.0 if parts is None else np.abs(parts.contributions.sum(1) - attribution.margins).max()
    console.print(
        f"attribution to {parts and len(parts.parts)} components: {len(queries) / seconds:.1f} queries/s, "
        f"{seconds / plain_seconds:.2f} × the time of one prompt at a time; "
        f"sums off by at most {error:.1e} nats"
    )
    few_runs = replace(runs, query_chats=query_chats[:8])
    sites = few_runs.patcher.list_sites(("residual", "attention", "mlp"))
    start = time.perf_counter()
    few_runs.patch_activations(sites, {}, 0)
    patch_seconds = (time.perf_counter() - start) / (4 * len(sites) * len(few_runs.query_chats))
    console.print(
        f"patches: {1 / patch_seconds:.0f} per second, "
        f"{plain_seconds / len(queries) / patch_seconds:.1f} per plain prompt\n"
    )


def read_margin(readout: Readout, logits: torch.Tensor) -> torch.Tensor:
    """Return the margins without coverage, rows × 1."""
    return readout.compute_margins(logits)[:, :1]


def time_engine(
    console: Console, model: torch.nn.Module, prompts: list[Ids], read: Callable, title: str
) -> None:
    """Time the engine and the two baselines on the same prompts and print a table."""
    n_shared = count_shared_prefix(prompts)
    n_unique = n_shared + sum(len(prompt) - n_shared for prompt in prompts)
    engine = Engine(model)
    engine.read_first_token(prompts, read)  # warm-up
    single_seconds, margins = measure_time(model, lambda: read_one_at_a_time(model, prompts, read))
    padded_seconds, padded_margins = measure_time(model, lambda: read_left_padded(model, prompts, read))
    engine_rate, limit = 0.0, 0.0  # queries per second
    for _ in range(3):
        rate_before = measure_matrix_rate(model)
        seconds, engine_margins = measure_time(model, lambda: engine.read_first_token(prompts, read))
        matrix_rate = max(rate_before, measure_matrix_rate(model))
        if len(prompts) / seconds > engine_rate:
            engine_rate = len(prompts) / seconds
            limit = len(prompts) * matrix_rate / count_operations(model, n_unique, len(prompts))
    mean = sum(map(len, prompts)) / len(prompts)
    title = (
        f"{title}, {model.device}: {len(prompts)} prompts, {mean:.0f} tokens on average, {n_shared} shared"
    )
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for header in ("", "queries/s", "engine is faster by", "largest margin difference"):
        table.add_column(header, justify="right" if header else "left")
    for name, rate, difference in (
        ("one at a time", len(prompts) / single_seconds, 0.0),
        (
            "left-padded batches of 32",
            len(prompts) / padded_seconds,
            (padded_margins - margins).abs().max(),
        ),
        ("engine", engine_rate, (engine_margins - margins).abs().max()),
    ):
        table.add_row(name, f"{rate:.1f}", f"{engine_rate / rate:.1f} ×", f"{difference:.1e} nats")
    table.add_row("arithmetic limit", f"{limit:.1f}", f"engine reaches {engine_rate / limit:.0%}", "")
    console.print(table)
    console.print()


def measure_time(model: torch.nn.Module, compute: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return the seconds that a computation took, and its result."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = compute()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, result.cpu()


def read_one_at_a_time(model: torch.nn.Module, prompts: list[Ids], read: Callable) -> torch.Tensor:
    """Return the margins from one prompt per forward pass, the reference."""
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return torch.cat(
        [read(model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()).cpu() for ids in rows]
    )


def read_left_padded(
    model: torch.nn.Module, prompts: list[Ids], read: Callable, batch_size: int = 32
) -> torch.Tensor:
    """Return the margins from left-padded batches, in the order of the prompts."""
    margins = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device
        )
        positions = (mask.cumsum(1) - 1).clip(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        margins.append(read(output.logits[:, -1].float()).cpu())
    return torch.cat(margins)


def count_operations(model: torch.nn.Module, n_tokens: int, n_queries: int) -> float:
    """Return the floating-point operations of the matrix products, without those of attention."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2) - head
    embedding = model.get_input_embeddings().weight
    body -= 0 if embedding is model.get_output_embeddings().weight else embedding.numel()
    return 2.0 * (body * n_tokens + head * n_queries)


def measure_matrix_rate(model: torch.nn.Module) -> float:
    """Return the machine's highest rate of floating-point operations per second in a linear layer."""
    size = 8192 if model.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=model.device, dtype=model.dtype) for _ in range(2))
    timings = [measure_time(model, partial(torch.nn.functional.linear, left, right))[0] for _ in range(8)]
    return 2.0 * size**3 / min(timings)


if __name__ == "__main__":
    main()

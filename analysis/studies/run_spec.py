"""What may be asked, checked before anything heavy is imported: for the commands and for Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import QuerySet, choose_default_split
from analysis.models.loading import silence_libraries
from analysis.studies.progress import make_notifier
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

    from analysis.files import Notifier
    from analysis.models.session import ModelSession
    from defenses.contract import MeanActivations, ModelInfo

READOUT_DESCRIPTIONS = {
    "words": "refusing against complying first words, equal weights",
    "calibrated": "weights on first tokens, fitted on this model's own answers to the calibration split",
    "question": "Yes against No, asked whether the request should be refused, both orders averaged",
    "log-odds": "log-odds of I and As against all other tokens (refusal direction paper); not linear",
    "prefilled-K": "the words readout behind the first K tokens of a complying opener",
    "auto": "the one that `analyze validate` found best for this model and these conditions",
}
PATCH_SITES = ("residual", "attention", "mlp", "heads")  # that `analyze mechanism` patches


def build_run_spec(
    model: str,
    data: str | pd.DataFrame,
    split: str | None,
    limit: int | None,
    batch_size: str | int | None,
    device: str,
    dtype: str,
    seed: int,
    offline: bool,
    attack: str | Sequence[str] | None = None,
    readout: str | Sequence[str] = "words",
    needs_linear_readout: bool = False,
) -> RunSpec:
    """Return what is asked for, its mistakes told that can be seen without the model.

    >>> usual = "cpu", "auto", 0, True, None
    >>> made = build_run_spec("smollm2", "twins", None, 4, "8", *usual, ["words", "prefilled-5", "words"])
    >>> made.readouts, made.batch_size
    (('words', 'prefilled-5'), 8)
    >>> build_run_spec("smollm2", "twins", None, 4, "auto", *usual).batch_size is None
    True

    Args:
        model: name, id, folder, or file.
        data: as `--data`, or a frame of queries.
        split: of the data.
        limit: queries at most.
        batch_size: as typed, or a number; None tries what fits.
        device: as `--device`.
        dtype: as `--dtype`.
        seed: of everything random.
        offline: whether nothing may be fetched.
        attack: how queries are sent, one or several; as they are if there is none.
        readout: the one of a run, or those that are compared.
        needs_linear_readout: whether margins are split over the model's parts.
    """
    from analysis.attacks import choose_attacks
    from analysis.datasets.loading import from_frame

    sent = choose_attacks([attack] if isinstance(attack, str) else attack or ["direct"])
    read_by = (
        _parse_single_readout(readout, needs_linear_readout)
        if isinstance(readout, str)
        else _parse_readouts(readout)
    )
    batch = _parse_batch_size(batch_size)

    asked = data if isinstance(data, str) else from_frame(data)
    return RunSpec(model, asked, split, limit, batch, device, dtype, seed, offline, sent, read_by)


def _parse_readouts(names: Sequence[str]) -> tuple[str, ...]:
    """The readouts of these names, each once; one that is `all` stands for them all."""
    chosen = tuple(dict.fromkeys(names))
    fixed = {*READOUT_DESCRIPTIONS, "all"} - {"prefilled-K"}
    for name in chosen:
        count = name.removeprefix("prefilled-")
        if name not in fixed and (count == name or not re.fullmatch("[1-9][0-9]*", count)):
            raise unknown_name_error(
                "readout", name, READOUT_DESCRIPTIONS, " (K is a number of tokens, as in prefilled-5)"
            )
    return ("all",) if "all" in chosen else chosen


def _parse_single_readout(name: str, needs_linear_readout: bool) -> tuple[str, ...]:
    """The one readout of a run."""
    chosen = _parse_readouts([name])
    if needs_linear_readout and chosen in (("all",), ("log-odds",)):
        raise UserError(
            f"--readout {name}: a margin is split over parts only where it is linear in the logits: take "
            "words, calibrated, question or prefilled-K"
        )
    if chosen == ("all",):
        raise UserError("--readout all: a run reads with one; `analyze validate --readout all` compares them")
    return chosen


def parse_sites(names: Sequence[str]) -> tuple[str, ...]:
    """Return the sites of these names."""
    for name in names:
        if name not in PATCH_SITES:
            raise unknown_name_error("site", name, PATCH_SITES)
    return tuple(names)


def check_mechanism_options(top: int, patched: int) -> None:
    """Raise if so many parts or patched queries cannot be had."""
    if top < 1:
        raise UserError(f"--top {top}: it takes 1 or more")
    if patched < 0 or patched == 1:
        raise UserError(f"--patched {patched}: it takes 0 (none) or 2 and more, a harmful and a benign query")


def check_ensemble_options(size: int, stacks: int) -> None:
    """Raise if ensembles of that size, or so many stacks, cannot be had."""
    if size not in (2, 3):
        raise UserError(f"--size {size}: an ensemble has 2 or 3 members at most")
    if stacks < 0:
        raise UserError(f"--stacks {stacks}: it takes 0 (none is run) or more")


def parse_share(text: str) -> float:
    """Return a share as typed.

    >>> parse_share("5%"), parse_share("0.05")
    (0.05, 0.05)
    """
    number = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    found = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 <= found <= 1:
        raise UserError(f"--max-over-refusal {text}: it takes a share, such as 5% or 0.05")
    return found


def _parse_batch_size(batch_size: str | int | None) -> int | None:
    """The size of a batch; None tries what fits."""
    if batch_size in ("auto", None):
        return None
    if not str(batch_size).isdigit() or int(str(batch_size)) < 1:
        raise UserError(f"--batch-size {batch_size}: it takes auto or a whole number from 1 on")
    return int(str(batch_size))


BOTH_SPLITS = "calibration and test"  # the split of what is chosen on the one and reported on the other


@dataclass(frozen=True)
class RunSpec:
    """What a user asked for, short of the defenses."""

    model: str
    data: str | QuerySet
    split: str | None
    limit: int | None
    batch_size: int | None
    device: str
    dtype: str
    seed: int
    offline: bool
    attacks: tuple[Attack, ...] = (DIRECT_ATTACK,)
    readouts: tuple[str, ...] = ("words",)

    def load_all_splits(self, notify: Notifier = lambda text: None) -> QuerySet:
        """Return the whole set that is asked about, all splits of it."""
        return load_queries(self.data, self.offline, notify) if isinstance(self.data, str) else self.data

    def select_queries(self, notify: Notifier = lambda text: None) -> tuple[QuerySet, str, QuerySet]:
        """Return the queries that are scored, the split they are, and those that the readout is made from.

        A readout belongs to a model, so it is made from the same queries whatever is scored: the shipped
        calibration split, unless the user's data have one of their own.

        Args:
            notify: told in words before anything is fetched.
        """
        data = self.load_all_splits(notify)
        calibration = (
            data.select_calibration() or load_queries("contrast").select_split("calibration")
        ).check_both_classes()
        if self.split == BOTH_SPLITS:
            halved = data.split_calibration_test(self.seed)
            both = [
                halved.select_split(name).limit_queries(self.limit).check_both_classes()
                for name in ("calibration", "test")
            ]
            return replace(halved, queries=(*both[0].queries, *both[1].queries)), BOTH_SPLITS, calibration
        split = self.split or choose_default_split(data)
        return data.select_split(split).limit_queries(self.limit).check_both_classes(), split, calibration

    def open_session(self, console: Console) -> tuple[ModelSession, ModelInfo]:
        """Load the model; return the bench for it and what a defense may know about it."""
        from analysis.mechanism.directions import load_mean_activations
        from analysis.models.cache import ScoreCache, get_score_cache_path
        from analysis.models.loading import build_model_info, load_model
        from analysis.models.session import ModelSession

        silence_libraries(self.offline)
        with console.status(f"loading {self.model}"):
            loaded = load_model(self.model, self.device, self.dtype, self.offline, make_notifier(console))
        bench = ModelSession.from_model(
            loaded, self.batch_size, self.seed, ScoreCache(get_score_cache_path())
        )
        host = build_model_info(self.model, loaded.tokenizer, self.seed, loaded.origin["sha256"])

        def learned() -> MeanActivations:
            with console.status("looking at what the model holds on training queries"):
                return load_mean_activations(bench, load_queries("contrast").select_split("train").queries)

        return bench, replace(
            host, offline=self.offline, notify=make_notifier(console), compute_mean_activations=cache(learned)
        )


def check_training_overlap(query_set: QuerySet, trained_on: frozenset[str], weights_name: str) -> None:
    """Raise if weights are to be evaluated on queries that they were trained on."""
    from defenses.adapters import fingerprint_queries

    seen = [query for query in query_set.queries if fingerprint_queries([query.text])[0] in trained_on]
    if seen:
        raise UserError(
            f"{weights_name} was trained on {len(seen)} of these queries ({seen[0].id}, …), so its figures would "
            "mean nothing: take --split test, or other data"
        )


def choose_run_folder(model: str, labels: Sequence[str], started: datetime) -> Path:
    """Return the folder of a run whose user named none: time, model and what was asked."""
    short = "-".join(Path(name).stem for name in labels[:3])
    parts = [f"{started:%Y%m%d-%H%M%S}", Path(model).name.removesuffix(".gguf").replace(":", "-"), short]
    return Path("runs") / "-".join(parts)

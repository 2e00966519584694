"""What a user asked for, short of the defenses, and what every command loads for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from analysis import queries
from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.queries import QuerySet
from analysis.showing import print_line
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.bench import ModelSession
    from analysis.checkpoints import Notifier
    from defenses import MeanActivations, ModelInfo

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
        return queries.load_queries(self.data, self.offline, notify) if isinstance(self.data, str) else self.data

    def select_queries(self, notify: Notifier = lambda text: None) -> tuple[QuerySet, str, QuerySet]:
        """Return the queries that are scored, the split they are, and those that the readout is made from.

        A readout belongs to a model, so it is made from the same queries whatever is scored: the shipped
        calibration split, unless the user's data have one of their own.

        Args:
            notify: told in words before anything is fetched.
        """
        data = self.load_all_splits(notify)
        calibration = (data.select_calibration() or queries.load_queries("contrast").select_split("calibration")).check_both_classes()
        if self.split == BOTH_SPLITS:
            halved = data.split_calibration_test(self.seed)
            both = [halved.select_split(name).limit_queries(self.limit).check_both_classes() for name in ("calibration", "test")]
            return replace(halved, queries=(*both[0].queries, *both[1].queries)), BOTH_SPLITS, calibration
        split = self.split or queries.choose_default_split(data)
        return data.select_split(split).limit_queries(self.limit).check_both_classes(), split, calibration

    def open_session(self, console: Console) -> tuple[ModelSession, ModelInfo]:
        """Load the model; return the bench for it and what a defense may know about it."""
        from analysis import models, states, store
        from analysis.bench import ModelSession
        from analysis.residuals import load_mean_activations
        from analysis.store import ScoreCache

        silence_libraries(self.offline)
        with console.status(f"loading {self.model}"):
            loaded = models.load_model(self.model, self.device, self.dtype, self.offline, make_notifier(console))
        bench = ModelSession.from_model(loaded, self.batch_size, self.seed, ScoreCache(store.get_score_cache_path()))
        host = states.build_model_info(self.model, loaded.tokenizer, self.seed, loaded.origin["sha256"])

        def learned() -> MeanActivations:
            with console.status("looking at what the model holds on training queries"):
                return load_mean_activations(bench, queries.load_queries("contrast").select_split("train").queries)

        return bench, replace(host, offline=self.offline, notify=make_notifier(console), compute_mean_activations=cache(learned))


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


def make_notifier(console: Console) -> Any:
    """Return what prints a line as it is, uncut."""
    return partial(print_line, console)


def silence_libraries(offline: bool) -> None:
    """Leave the terminal to this program's own lines."""
    import os
    import warnings

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

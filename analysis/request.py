"""What a user asked for, short of the defenses, and what every command loads for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis import models, queries, states, store
from analysis.attacks import AS_IS, Attack
from analysis.bench import Bench
from analysis.checkpoints import Say
from analysis.queries import QuerySet
from analysis.residuals import residuals
from analysis.showing import say
from analysis.store import Store
from defenses import Host, Residuals, UserError
from defenses.adapters import fingerprints

HALVES = "calibration and test"  # the split of what is chosen on the one and reported on the other


@dataclass(frozen=True)
class Request:
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
    attacks: tuple[Attack, ...] = (AS_IS,)
    readouts: tuple[str, ...] = ("words",)

    def asked(self, say: Say = lambda text: None) -> QuerySet:
        """Return the whole set that is asked about, all splits of it."""
        return queries.load(self.data, self.offline, say) if isinstance(self.data, str) else self.data

    def queries(self, say: Say = lambda text: None) -> tuple[QuerySet, str, QuerySet]:
        """Return the queries that are scored, the split they are, and those that the readout is made from.

        A readout belongs to a model, so it is made from the same queries whatever is scored: the shipped
        calibration split, unless the user's data have one of their own.

        Args:
            say: told in words before anything is fetched.
        """
        data = self.asked(say)
        calibration = (data.calibration() or queries.load("contrast").split("calibration")).checked()
        if self.split == HALVES:
            halved = data.halved(self.seed)
            both = [halved.split(name).limit(self.limit).checked() for name in ("calibration", "test")]
            return replace(halved, queries=(*both[0].queries, *both[1].queries)), HALVES, calibration
        split = self.split or queries.default_split(data)
        return data.split(split).limit(self.limit).checked(), split, calibration

    def open(self, console: Console) -> tuple[Bench, Host]:
        """Load the model; return the bench for it and what a defense may know about it."""
        quiet(self.offline)
        with console.status(f"loading {self.model}"):
            loaded = models.load(self.model, self.device, self.dtype, self.offline, teller(console))
        bench = Bench.of(loaded, self.batch_size, self.seed, Store(store.path()))
        host = states.host(self.model, loaded.tokenizer, self.seed, loaded.origin["sha256"])

        def learned() -> Residuals:
            with console.status("looking at what the model holds on training queries"):
                return residuals(bench, queries.load("contrast").split("train").queries)

        return bench, replace(host, offline=self.offline, say=teller(console), residuals=cache(learned))


def refuse_overlap(data: QuerySet, trained_on: frozenset[str], name: str) -> None:
    """Raise if weights are to be evaluated on queries that they were trained on."""
    seen = [query for query in data.queries if fingerprints([query.text])[0] in trained_on]
    if seen:
        raise UserError(
            f"{name} was trained on {len(seen)} of these queries ({seen[0].id}, …), so its figures would "
            "mean nothing: take --split test, or other data"
        )


def default_out(model: str, names: Sequence[str], started: datetime) -> Path:
    """Return the folder of a run whose user named none: time, model and what was asked."""
    short = "-".join(Path(name).stem for name in names[:3])
    parts = [f"{started:%Y%m%d-%H%M%S}", Path(model).name.removesuffix(".gguf").replace(":", "-"), short]
    return Path("runs") / "-".join(parts)


def teller(console: Console) -> Any:
    """Return what prints a line as it is, uncut."""
    return partial(say, console)


def quiet(offline: bool) -> None:
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

"""What may be asked, checked before anything heavy is imported: for the commands and for Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

    from analysis.request import RunSpec

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
    >>> made = request("smollm2", "twins", None, 4, "8", *usual, ["words", "prefilled-5", "words"])
    >>> made.readouts, made.batch_size
    (('words', 'prefilled-5'), 8)
    >>> request("smollm2", "twins", None, 4, "auto", *usual).batch_size is None
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
    from analysis import attacks

    sent = attacks.choose_attacks([attack] if isinstance(attack, str) else attack or ["direct"])
    read_by = _parse_single_readout(readout, needs_linear_readout) if isinstance(readout, str) else _parse_readouts(readout)
    batch = _parse_batch_size(batch_size)
    from analysis import queries
    from analysis.request import RunSpec

    asked = data if isinstance(data, str) else queries.from_frame(data)
    return RunSpec(model, asked, split, limit, batch, device, dtype, seed, offline, sent, read_by)


def _parse_readouts(names: Sequence[str]) -> tuple[str, ...]:
    """The readouts of these names, each once; one that is `all` stands for them all."""
    chosen = tuple(dict.fromkeys(names))
    fixed = {*READOUT_DESCRIPTIONS, "all"} - {"prefilled-K"}
    for name in chosen:
        count = name.removeprefix("prefilled-")
        if name not in fixed and (count == name or not re.fullmatch("[1-9][0-9]*", count)):
            raise unknown_name_error("readout", name, READOUT_DESCRIPTIONS, " (K is a number of tokens, as in prefilled-5)")
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

    >>> share("5%"), share("0.05")
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

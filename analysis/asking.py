"""What may be asked, checked before anything heavy is imported: for the commands and for Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from defenses.errors import UserError, unknown

if TYPE_CHECKING:
    from analysis.attacks import Attack

READOUTS = {
    "words": "refusing against complying first words, equal weights",
    "calibrated": "weights on first tokens, fitted on this model's own answers to the calibration split",
    "question": "Yes against No, asked whether the request should be refused, both orders averaged",
    "log-odds": "log-odds of I and As against all other tokens (refusal direction paper); not linear",
    "prefilled-K": "the words readout behind the first K tokens of a complying opener",
    "auto": "the one that `analyze validate` found best for this model and these conditions",
}
SITES = ("residual", "attention", "mlp", "heads")  # that `analyze mechanism` patches


def sent(names: Sequence[str] | None) -> tuple[Attack, ...]:
    """Return the attacks of these names; the queries as they are, if there are none."""
    from analysis import attacks

    return attacks.chosen(names or ["direct"])


def readouts(names: Sequence[str]) -> tuple[str, ...]:
    """Return the readouts of these names, each once; one that is `all` stands for them all.

    >>> readouts(["words", "prefilled-5", "words"])
    ('words', 'prefilled-5')
    """
    chosen = tuple(dict.fromkeys(names))
    fixed = {*READOUTS, "all"} - {"prefilled-K"}
    for name in chosen:
        count = name.removeprefix("prefilled-")
        if name not in fixed and (count == name or not re.fullmatch("[1-9][0-9]*", count)):
            raise unknown("readout", name, READOUTS, " (K is a number of tokens, as in prefilled-5)")
    return ("all",) if "all" in chosen else chosen


def readout(name: str, linear: bool = False) -> tuple[str, ...]:
    """Return the one readout of a run.

    Args:
        name: as `list readouts` has it.
        linear: whether margins are split over the model's parts.
    """
    chosen = readouts([name])
    if linear and chosen in (("all",), ("log-odds",)):
        raise UserError(
            f"--readout {name}: a margin is split over parts only where it is linear in the logits: take "
            "words, calibrated, question or prefilled-K"
        )
    if chosen == ("all",):
        raise UserError("--readout all: a run reads with one; `analyze validate --readout all` compares them")
    return chosen


def sites(names: Sequence[str]) -> tuple[str, ...]:
    """Return the sites of these names."""
    for name in names:
        if name not in SITES:
            raise unknown("site", name, SITES)
    return tuple(names)


def refuse_odd_look(top: int, patched: int) -> None:
    """Raise if so many parts or patched queries cannot be had."""
    if top < 1:
        raise UserError(f"--top {top}: it takes 1 or more")
    if patched < 0 or patched == 1:
        raise UserError(f"--patched {patched}: it takes 0 (none) or 2 and more, a harmful and a benign query")


def refuse_odd_team(size: int, stacks: int) -> None:
    """Raise if ensembles of that size, or so many stacks, cannot be had."""
    if size not in (2, 3):
        raise UserError(f"--size {size}: an ensemble has 2 or 3 members at most")
    if stacks < 0:
        raise UserError(f"--stacks {stacks}: it takes 0 (none is run) or more")


def share(text: str) -> float:
    """Return a share as typed.

    >>> share("5%"), share("0.05")
    (0.05, 0.05)
    """
    number = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    found = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 <= found <= 1:
        raise UserError(f"--max-over-refusal {text}: it takes a share, such as 5% or 0.05")
    return found


def batch(text: str) -> int | None:
    """Return the size of a batch as typed; None tries what fits.

    >>> batch("auto"), batch("8")
    (None, 8)
    """
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch-size {text}: it takes auto or a whole number from 1 on")
    return int(text)

"""What every command does before it asks: queries, model, defenses, readout; and the preflight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from analysis import preflight, queries, reading, showing
from analysis.attacks import Attack
from analysis.bench import Bench
from analysis.preflight import Check
from analysis.queries import QuerySet
from analysis.readout import Readout
from analysis.request import Request, refuse_overlap, teller
from analysis.run import conditions
from analysis.tables import UNDEFENDED
from defenses import Defense, UserError, catalog

_LOOKED_AT = 4  # queries that the preflight looks at
NO_REFERENCE = "the undefended model was not scored"  # so that the others cannot be compared with it


class NotReached(UserError):
    """No defense reaches the model, so that there is nothing to score.

    Attributes:
        checks: that failed.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self.checks = checks
        first = checks[0]
        super().__init__(f"nothing was scored: {first.condition}: {first.name}: {first.seen}")


@dataclass(frozen=True)
class Ready:
    """Everything loaded and prepared for a run."""

    bench: Bench
    defenses: list[Defense]
    data: QuerySet
    split: str
    readouts: list[Readout]
    attacks: tuple[Attack, ...]
    notices: list[str]

    @property
    def readout(self) -> Readout:
        """The readout, where there is one."""
        (only,) = self.readouts
        return only


def prepare(
    request: Request,
    names: Sequence[str | Defense],
    settings: Sequence[str],
    console: Console,
    fitted: bool = True,
) -> Ready:
    """Load what is cheap to get wrong first, then the model, then make the defenses ready for it.

    Args:
        request: what the user asked for.
        names: of the defenses, or defenses themselves.
        settings: of those that are named.
        console: for progress.
        fitted: whether readouts need their threshold, for which the model must answer.
    """
    chosen = catalog.choose(names, settings)
    data, split, calibration = request.queries(teller(console))
    for attack in request.attacks:
        attack.refuse_gaps(data.queries)
    bench, host = request.open(console)
    prepared = [defense.prepare(host) for defense in chosen]
    lacking = _lacking(prepared, names)
    refuse_overlap(data, bench.loaded.trained_on, request.model)
    every = conditions(prepared)
    for name, defense in every.items():
        refuse_overlap(data, defense.trained_on(), name)
    maker = reading.Maker(bench, host, every[UNDEFENDED], calibration, console)
    readouts: dict[str, Readout] = {}
    for name in reading.NAMES if request.readouts == ("all",) else request.readouts:
        if not fitted:
            readout = maker.opened(name)
        else:
            readout = maker.best(every, request.attacks) if name == "auto" else maker.named(name)
        readouts[readout.name] = readout
    notices = [*bench.renderer.notices, *lacking, *_made_from(data, calibration)]
    for name, readout in readouts.items():
        notices += [f"readout {name}: {one}" for one in readout.notices]
    for notice in notices:
        showing.note(console, notice)
    return Ready(bench, prepared, data, split, list(readouts.values()), request.attacks, notices)


def unreached(
    ready: Ready, every: Mapping[str, Defense], console: Console
) -> dict[tuple[str, str], list[Check]]:
    """Return the failed checks, by attack and condition: whether defenses reach the model, on a few queries.

    What is read is looked at everywhere. Margins are compared with plain passes for each defense under the
    first attack and for each attack undefended: how they are computed does not depend on what is read.

    Args:
        ready: loaded and prepared.
        every: the conditions.
        console: for progress.
    """
    found = {}
    looked_at = queries.sample(ready.data.queries, _LOOKED_AT)
    with showing.progress(console) as bar:
        task = bar.add_task("checking that defenses reach the model", total=len(every) * len(ready.attacks))

        ready.bench.drafts.watch = showing.drafting(bar, task)
        for attack in ready.attacks:
            bench = ready.bench.under(attack)
            for name, defense in every.items():
                margins = attack is ready.attacks[0] or name == UNDEFENDED
                try:
                    if defense.asks:
                        # All at once: a few by themselves take nearly as long, and scoring needs all.
                        bench.every_prompt(defense, ready.data.queries)
                    checks = [
                        one
                        for readout in ready.readouts
                        for one in preflight.check(bench, name, defense, looked_at, readout, margins)
                    ]
                except Exception as error:
                    if len(every) * len(ready.attacks) <= 2:
                        raise
                    checks = [preflight.broken(bench, name, defense, error)]
                if failed := [one for one in checks if not one.passed]:
                    found[attack.name, name] = failed
                bar.update(task, advance=1, description="checking that defenses reach the model")
    return found


def left_out(
    failed: Mapping[tuple[str, str], list[Check]], cells: Collection[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return in words why conditions are left out: failed checks of their own, or of the undefended model.

    Args:
        failed: what `unreached` returned.
        cells: attack and condition of all that is wanted.

    Raises:
        NotReached: if nothing is left to compare, or nothing to compare it with.
    """
    lost = why_lost(failed)
    for attack, name in cells:
        if (attack, UNDEFENDED) in failed:
            lost.setdefault((attack, name), NO_REFERENCE)
    if lost and not any(cell not in lost and cell[1] != UNDEFENDED for cell in cells):
        raise NotReached([one for checks in failed.values() for one in checks])
    return lost


def why_lost(failed: Mapping[tuple[str, str], list[Check]]) -> dict[tuple[str, str], str]:
    """Return in words why conditions cannot be scored, from their failed checks."""
    return {cell: "; ".join(f"{one.name}: {one.seen}" for one in checks) for cell, checks in failed.items()}


def _made_from(data: QuerySet, calibration: QuerySet) -> list[str]:
    """Say if queries are scored that the readout is made from: its threshold is fitted to them."""
    same = len({query.text for query in data.queries} & {query.text for query in calibration.queries})
    return (
        [f"the readout is made from {same} of the {len(data.queries)} queries that are scored"]
        if same
        else []
    )


def _lacking(prepared: Sequence[Defense], names: Sequence[str | Defense]) -> list[str]:
    """Say what is left out because this model lacks something for it; an error where nothing is left."""
    notices = []
    for defense in prepared:
        if why := defense.lacking():
            parts = list(conditions([defense]))
            if not parts and "all" not in names:
                raise UserError(f"{defense.name}: {why}")
            instead = f"only {', '.join(parts)} can be read" if parts else "it is left out"
            notices.append(f"{defense.name}: {instead}: {why}")
    return notices

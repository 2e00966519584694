"""The work of `analyze mechanism`, attack by attack: margins split, directions looked at, causes tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import located, overlaps, queries
from analysis.asking import SITES
from analysis.attacks import AS_IS, Attack
from analysis.gathered import Gathered
from analysis.intervening import intervene
from analysis.located import Asked
from analysis.preparing import Ready
from analysis.tables import TOLERANCE, UNDEFENDED, ScoreTable
from defenses import Defense, UserError
from defenses.adapters import fingerprints

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.directions import Directions
    from analysis.mechanism.lens import Anatomy
    from analysis.mechanism.splitting import Split


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Attributes:
        sites: what is patched in every layer; `heads` are the top ones and as many others.
        top: how many parts are told and drawn, and how many heads are patched by themselves.
        patched: how many queries interventions run on; 0 for none.
        ensembles: folder of `analyze ensembles`, whose interactions are compared with how alike parts are.
    """

    sites: tuple[str, ...] = SITES
    top: int = 10
    patched: int = 32
    ensembles: Path | None = None


@dataclass(kw_only=True)
class Room(Gathered):
    """The work of one run, attack by attack, and the tables that come of it.

    Attributes:
        agreement: of slopes with patches, by condition and contrast.
        controls: how many tokens a defense adds, and the neutral prompt that it is compared with.
    """

    ready: Ready
    anatomy: Anatomy
    every: Mapping[str, Defense]
    scores: ScoreTable
    wanted: Wanted
    seed: int
    agreement: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def asked(self) -> Asked:
        """All queries."""
        return self.of(self.ready.data.queries)

    @cached_property
    def sample(self) -> list[queries.Query]:
        """The queries that interventions run on."""
        return list(self.ready.data.limit(self.wanted.patched).queries) if self.wanted.patched else []

    def enter(self, sent: Attack) -> None:
        """Look at every defense under one attack.

        Args:
            sent: how queries are sent.
        """
        attack, bench = sent.name, self.ready.bench.under(sent)
        here = {name: one for name, one in self.every.items() if (attack, name) in self.scores.conditions}
        if UNDEFENDED not in here:
            return
        splits = self._split(bench, attack, here)
        before = splits.get(UNDEFENDED)
        if before is None:
            return
        profiles = {}
        for name, split in splits.items():
            if name == UNDEFENDED:
                continue
            self.add(attack, name, layers=located.by_layer(self.asked, before.by_layer, split.by_layer))
            self.add(attack, name, half=located.half_way(self.asked, before.by_layer, split.by_layer))
            if before.parts is not None and split.parts is not None:
                self.add(attack, name, parts=located.by_part(self.asked, before.parts, split.parts))
                profiles[name] = split.parts.shares - before.parts.shares
        found = overlaps.profiles(self.asked, profiles)
        self.put("profiles", found.assign(attack=attack)[["attack", *found.columns]])
        whole = {
            one.name: one for one in self.ready.defenses if one.name in splits and one.name != UNDEFENDED
        }
        if self._held_out:
            self._directions(bench, attack, here[UNDEFENDED], whole)
        for name, defense in whole.items() if self.sample else ():
            intervene(self, bench, attack, name, here[UNDEFENDED], defense)

    @cached_property
    def _held_out(self) -> bool:
        """Whether directions can be looked at with these queries, which must not be those of the learning."""
        learned = set(fingerprints(query.text for query in _training()))
        seen = sum(fingerprints([query.text])[0] in learned for query in self.ready.data.queries)
        if seen:
            self.note(f"no directions: they are learned from {seen} of these queries; take --split test")
        return not seen

    @cached_property
    def _learned(self) -> Directions:
        """The model's directions, from queries as they are: an attack is no part of what harm is."""
        import torch

        from analysis.mechanism.directions import Directions, held

        train, undefended = _training(), self.every[UNDEFENDED]
        return Directions.learned(
            held(self.ready.bench.under(AS_IS), self.anatomy, undefended, train),
            torch.tensor([query.harmful for query in train]),
            [query.pair for query in train],
        )

    def _split(self, bench: Bench, attack: str, here: Mapping[str, Defense]) -> dict[str, Split]:
        """The margins of every condition split, each seen to be what scoring says."""
        from analysis.mechanism.splitting import Splitter

        splitter = Splitter(self.anatomy, self.ready.readout)
        if not splitter.exact:
            self.note(
                f"no parts in {bench.loaded.model.dtype}, which rounds their sums: take --dtype float32"
            )
        found = {}
        with self.steps("splitting", len(here)) as done:
            for name, defense in here.items():
                with self.guarded(attack, name, defense):
                    split = splitter.split(bench, defense, self.ready.data.queries)
                    scored = self.scores.condition(attack, name)["margin"].to_numpy(float)
                    off = float(np.abs(split.margins - scored).max())
                    if splitter.exact and off > TOLERANCE:
                        raise UserError(f"its split margins miss the scored ones by {off:.2g} nats")
                    found[name] = split
                done()
        return found

    def _directions(
        self, bench: Bench, attack: str, undefended: Defense, defenses: Mapping[str, Defense]
    ) -> None:
        from analysis.mechanism.directions import NAMES, projections

        asked = self.ready.data.queries
        with self.steps("directions", 2 + len(defenses)) as done:
            learned = self._learned
            done()
            before = projections(bench, self.anatomy, undefended, asked, learned).numpy().astype(float)
            done()
            for name, defense in defenses.items():
                with self.guarded(attack, name, defense):
                    after = projections(bench, self.anatomy, defense, asked, learned).numpy().astype(float)
                    for which, direction in enumerate(NAMES):
                        old, new = before[:, which], after[:, which]
                        found = self.asked.contrasts(new - old)
                        apart = [self.asked.separation(*both) for both in zip(old.T, new.T, strict=True)]
                        chosen = [layer == learned.chosen[which] for layer in range(len(found))]
                        found = pd.concat([pd.DataFrame(apart), found], axis=1)
                        found = found.assign(direction=direction, chosen=chosen)
                        found.insert(0, "layer", range(len(found)))
                        self.add(attack, name, directions=found)
                done()

    def of(self, asked: Sequence[queries.Query]) -> Asked:
        """Return queries as effects are averaged over them."""
        pairs = pd.Series([query.pair for query in asked], dtype=object)
        return Asked(pairs, np.array([query.harmful for query in asked]), self.seed)


def _training() -> list[queries.Query]:
    """The queries that directions are learned from."""
    return list(queries.load("contrast").split("train").queries)

"""The work of `analyze mechanism`, attack by attack: margins split, directions looked at, causes tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis import located, overlaps, queries, showing, states
from analysis.asking import SITES
from analysis.attacks import AS_IS, Attack
from analysis.located import Asked
from analysis.preparing import Ready
from analysis.rendering import redact
from analysis.sweeping import Cell
from analysis.tables import TOLERANCE, UNDEFENDED, ScoreTable
from defenses import Defense, UserError, catalog
from defenses.adapters import fingerprints
from defenses.errors import told

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.causes import Contrasted
    from analysis.mechanism.directions import Directions
    from analysis.mechanism.lens import Anatomy
    from analysis.mechanism.splitting import Split

_CONTROL = "neutral_prompt"


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


@dataclass
class Room:
    """The work of one run, attack by attack, and the tables that come of it.

    Attributes:
        tables: by file stem.
        lost: what failed, and why.
        notices: what was left out, and why.
        agreement: of slopes with patches, by condition and contrast.
        controls: how many tokens a defense adds, and the neutral prompt that it is compared with.
    """

    ready: Ready
    anatomy: Anatomy
    every: Mapping[str, Defense]
    scores: ScoreTable
    wanted: Wanted
    seed: int
    console: Console
    lost: dict[Cell, str]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def asked(self) -> Asked:
        """All queries."""
        return self._asked(self.ready.data.queries)

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
            self._add(attack, name, layers=located.by_layer(self.asked, before.by_layer, split.by_layer))
            self._add(attack, name, half=located.half_way(self.asked, before.by_layer, split.by_layer))
            if before.parts is not None and split.parts is not None:
                self._add(attack, name, parts=located.by_part(self.asked, before.parts, split.parts))
                profiles[name] = split.parts.shares - before.parts.shares
        found = overlaps.profiles(self.asked, profiles)
        self._put("profiles", found.assign(attack=attack)[["attack", *found.columns]])
        whole = {
            one.name: one for one in self.ready.defenses if one.name in splits and one.name != UNDEFENDED
        }
        if self._held_out:
            self._directions(bench, attack, here[UNDEFENDED], whole)
        for name, defense in whole.items() if self.sample else ():
            self._intervene(bench, attack, name, here[UNDEFENDED], defense)

    @cached_property
    def _held_out(self) -> bool:
        """Whether directions can be looked at with these queries, which must not be those of the learning."""
        learned = set(fingerprints(query.text for query in _training()))
        seen = sum(fingerprints([query.text])[0] in learned for query in self.ready.data.queries)
        if seen:
            self._note(f"no directions: they are learned from {seen} of these queries; take --split test")
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
            self._note(
                f"no parts in {bench.loaded.model.dtype}, which rounds their sums: take --dtype float32"
            )
        found = {}
        with self._steps("splitting", len(here)) as done:
            for name, defense in here.items():
                with self._guarded(attack, name, defense):
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
        with self._steps("directions", 2 + len(defenses)) as done:
            learned = self._learned
            done()
            before = projections(bench, self.anatomy, undefended, asked, learned).numpy().astype(float)
            done()
            for name, defense in defenses.items():
                with self._guarded(attack, name, defense):
                    after = projections(bench, self.anatomy, defense, asked, learned).numpy().astype(float)
                    for which, direction in enumerate(NAMES):
                        old, new = before[:, which], after[:, which]
                        found = self.asked.contrasts(new - old)
                        apart = [self.asked.separation(*both) for both in zip(old.T, new.T, strict=True)]
                        chosen = [layer == learned.chosen[which] for layer in range(len(found))]
                        found = pd.concat([pd.DataFrame(apart), found], axis=1)
                        found = found.assign(direction=direction, chosen=chosen)
                        found.insert(0, "layer", range(len(found)))
                        self._add(attack, name, directions=found)
                done()

    def _intervene(self, bench: Bench, attack: str, name: str, undefended: Defense, defense: Defense) -> None:
        """Patches, cuts and switches of one defense, on the sample."""
        from analysis.mechanism import cutting, switching
        from analysis.mechanism.causes import Contrasted

        pair = Contrasted(bench, self.anatomy, self.ready.readout, undefended, defense, self.sample)
        if self.ready.readout.questions:
            self._note(
                f"no interventions: --readout {self.ready.readout.name} asks several questions about a query"
            )
            return
        if not pair.one_prompt():
            self._note(
                f"{name} reads several prompts, or several models, for one query: it is not intervened on"
            )
            return
        asked = self._asked(self.sample)
        sizes = dict(zip(("n_harmful", "n_benign"), asked.counts, strict=True))
        ids = [query.id for query in self.sample]
        before = self.scores.condition(attack, UNDEFENDED).loc[ids, "margin"].to_numpy(float)
        with self._guarded(attack, name, defense):
            self._patch(pair, asked, attack, name)
        with self._guarded(attack, name, defense):
            own = pair.own_tokens()
            if why := cutting.uncut(bench.loaded.model):
                self._note(f"no cuts: {why}")
            elif any(map(any, own)):
                if not all(map(any, own)):
                    self._note(f"{name} has no tokens of its own in some prompts, which are left as they are")
                with self._steps(f"cutting attention to {name}", len(ids)) as done:
                    cells, left = pair.cuts(own, before, done)
                found = asked.contrasts(left).assign(
                    reader=[reader for reader, _ in cells],
                    first=[layers.start if layers else -1 for _, layers in cells],
                    last=[layers.stop - 1 for _, layers in cells],
                )
                self._add(attack, name, cuts=found.assign(**sizes))
        with self._guarded(attack, name, defense):
            if weights := switching.changed(bench.loaded.model, defense):
                with self._steps(f"switching {name} on", len(switching.switches(weights))) as done:
                    named, change = pair.switches(weights, before, done)
                found = asked.contrasts(change).assign(
                    how=[how for how, _, _ in named],
                    layer=pd.array([layer for _, layer, _ in named], dtype="Int64"),
                    module=[module for *_, module in named],
                )
                self._add(attack, name, weights=found.assign(**sizes))

    def _patch(self, pair: Contrasted, asked: Asked, attack: str, name: str) -> None:
        """Patch every layer and the top heads; compare heads with what their slopes say."""
        from analysis.mechanism.causes import agreement

        wanted, heads = self.wanted, []
        if "heads" in wanted.sites:
            with self._steps(f"slopes of heads under {name}", len(self.sample)) as done:
                every, guessed = pair.slopes(done)
            slopes = asked.contrasts(guessed)
            size = slopes[list(located.CONTRASTS)].abs().max(axis=1).to_numpy()
            order = list(np.argsort(-size))
            chance = np.random.default_rng(self.seed).permutation(order[wanted.top :])[: wanted.top]
            picked = sorted([*order[: wanted.top], *chance])
            heads = [every[place] for place in picked]
            self._add(attack, name, slopes=pd.concat([located.named(every), slopes], axis=1))
        sites = pair.patcher.sites([kind for kind in SITES[:-1] if kind in wanted.sites], heads)
        if not sites:
            return
        controls = self._controls(pair, name)
        with self._steps(f"patching {name}", 2 * len(self.sample)) as done:
            changes = pair.patches(sites, controls, self.seed, done)
        harmful, benign = asked.counts
        for (into, source), change in changes.items():
            found = pd.concat([located.named(sites), asked.contrasts(change)], axis=1)
            found = found.assign(into=into, source=source, n_harmful=harmful, n_benign=benign)
            self._add(attack, name, patches=found)
            if heads and (into, source) == ("undefended", "defense"):
                exact = found[found["kind"] == "head"]
                for contrast in located.CONTRASTS:
                    both = slopes[contrast].to_numpy()[picked], exact[contrast].to_numpy()
                    about = {"attack": attack, "defense": name, "contrast": contrast}
                    self.agreement.append(about | agreement(*both))

    def _controls(self, pair: Contrasted, name: str) -> dict[str, Defense]:
        """A neutral prompt as long as the defense's."""
        if (wanted := pair.longer(pair.defense)) < 1:
            self._note(f"{name} makes prompts no longer: no neutral prompt is patched for comparison")
            return {}
        host = states.host(pair.bench.loaded.name, pair.bench.loaded.tokenizer, self.seed)
        length = wanted
        for _ in range(2):  # turns and breaks come with it, and a default system turn may go
            control = catalog.get(_CONTROL, {"length": str(max(1, length))}).prepare(host)
            adds = pair.longer(control)
            length += wanted - adds
        self.controls.append({"defense": name, "tokens": wanted, "control_tokens": adds})
        return {_CONTROL: control}

    def _asked(self, asked: Sequence[queries.Query]) -> Asked:
        pairs = pd.Series([query.pair for query in asked], dtype=object)
        return Asked(pairs, np.array([query.harmful for query in asked]), self.seed)

    def _add(self, attack: str, name: str, **found: pd.DataFrame) -> None:
        """Put what was found about a condition behind what there is."""
        for stem, table in found.items():
            first = pd.DataFrame({"attack": attack, "defense": name}, index=table.index)
            self._put(stem, pd.concat([first, table], axis=1))

    def _put(self, stem: str, table: pd.DataFrame) -> None:
        there = [self.tables[stem]] if stem in self.tables else []
        self.tables[stem] = pd.concat([*there, table], ignore_index=True)

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)
            showing.note(self.console, text)

    @contextmanager
    def _steps(self, text: str, count: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar; lend what moves it on."""
        with showing.progress(self.console) as bar:
            task = bar.add_task(text, total=count)
            yield lambda: bar.advance(task)

    @contextmanager
    def _guarded(self, attack: str, name: str, defense: Defense) -> Iterator[None]:
        """What fails is left out and told at the end; what there is already is kept."""
        try:
            yield
        except Exception as error:
            before = f"{self.lost[attack, name]}; " if (attack, name) in self.lost else ""
            self.lost[attack, name] = before + redact(told(error), defense.secrets())


def _training() -> list[queries.Query]:
    """The queries that directions are learned from."""
    return list(queries.load("contrast").split("train").queries)

"""What interventions do to each margin: patches, their guess by slopes, cut attention, switched weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from analysis import scoring
from analysis.mechanism import cutting, switching
from analysis.mechanism.patching import Ids, Patch, Patcher, States
from analysis.tables import Part
from defenses import Defense

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.lens import Anatomy
    from analysis.queries import Query
    from analysis.readout import Readout
    from analysis.rendering import Prompt

QUARTERS = 4
KEPT = 16  # queries whose activations are held at once
Change = Float[np.ndarray, "queries columns"]
Done = Callable[[], None]


@dataclass(frozen=True)
class Contrasted:
    """A defense beside the undefended model, on some queries, each of which is one prompt.

    Args:
        bench: the model, and how queries are sent.
        anatomy: where its parts lie.
        readout: how logits become a margin.
        undefended: nothing is done.
        defense: prepared for the model.
        queries: what is asked.
    """

    bench: Bench
    anatomy: Anatomy
    readout: Readout
    undefended: Defense
    defense: Defense
    queries: Sequence[Query]

    def one_prompt(self) -> bool:
        """Return whether each query is one prompt and one pass, which can be patched."""
        several = any(len(one) > 1 for one in self._readings[1])
        return not several and not self.readout.questions and len(scoring.members(self.defense)) == 1

    @cached_property
    def _readings(self) -> list[list[list[Prompt]]]:
        """What the model reads for each query, undefended and defended: every step needs it."""
        return [self.bench.every_prompt(one, self.queries) for one in (self.undefended, self.defense)]

    def prompts(self, defense: Defense) -> list[Prompt]:
        """Return what the model reads for each query."""
        if defense is self.undefended or defense is self.defense:
            readings = self._readings[defense is self.defense]
        else:
            readings = self.bench.every_prompt(defense, self.queries)
        return [one for (one,) in readings]

    def ids(self, defense: Defense) -> list[Ids]:
        """Return the tokens of what the model reads for each query, up to where the answer is read."""
        return [prompt.followed(self.readout.prefix) for prompt in self.prompts(defense)]

    def longer(self, defense: Defense) -> int:
        """Return how many tokens a defense adds, by the median."""
        both = zip(self.ids(defense), self.ids(self.undefended), strict=True)
        return int(np.median([len(one) - len(other) for one, other in both]))

    @property
    def patcher(self) -> Patcher:
        """Who patches."""
        return Patcher(self.bench, self.anatomy, self.readout)

    def slopes(self, done: Done = lambda: None) -> tuple[list[Part], Change]:
        """Return every head, and what patching it into the undefended run would do by its slope there."""
        heads = [head for layer in range(len(self.anatomy.layers)) for head in self.patcher.heads(layer)]
        both = [(one, self.ids(one)) for one in (self.undefended, self.defense)]
        rows = []
        for some in self._chunks():
            before, after = (self.patcher.states(one, [ids[row] for row in some], heads) for one, ids in both)
            for row, old, new in zip(some, before, after, strict=True):
                slope = self.patcher.slopes(both[0][1][row])
                rows.append([float((slope[head] * (new[head] - old[head])).sum()) for head in heads])
                done()
        return heads, np.array(rows)

    def patches(
        self, sites: Sequence[Part], controls: Mapping[str, Defense], seed: int, done: Done = lambda: None
    ) -> dict[tuple[str, str], Change]:
        """Return by run that is patched and by source what each patch does to each margin.

        Into the undefended run: by how much the margin rises. Into the defended one: by how much it falls.

        Args:
            sites: what is patched, each by itself.
            controls: whose activations are put into the undefended run as well, by name.
            seed: of the placebo.
            done: told when a query is finished in one of the two runs.
        """
        runs = {"undefended": self.undefended, "defended": self.defense, **controls}
        asked = {name: self.ids(defense) for name, defense in runs.items()}
        found: dict[tuple[str, str], list[Change]] = {}
        for some in self._chunks():
            ids = {name: [all_[row] for row in some] for name, all_ in asked.items()}
            states = {name: self.patcher.states(one, ids[name], sites) for name, one in runs.items()}
            for into, source in (("undefended", "defended"), ("defended", "undefended")):
                others = tuple(controls) if into == "undefended" else ()
                lists = [
                    self._put(sites, base, [held, *more], f"{seed}/{self.queries[row].id}/{into}")
                    for row, base, held, *more in zip(
                        some, states[into], states[source], *(states[name] for name in others), strict=True
                    )
                ]
                read = self.patcher.margins(runs[into], ids[into], lists, done)
                change = (read[:, 1:] - read[:, :1]) * (1 if into == "undefended" else -1)
                names = ("defense" if into == "undefended" else "undefended", "placebo", *others)
                for name, values in zip(names, change.split(len(sites), 1), strict=True):
                    found.setdefault((into, name), []).append(values.numpy())
        return {key: np.concatenate(rows) for key, rows in found.items()}

    def _put(self, sites: Sequence[Part], base: States, held: Sequence[States], key: str) -> list[Patch]:
        """What is put into one prompt: its own (nothing changes), what others hold, the first's placebo."""
        first, *more = held
        made = [(sites[0], base[sites[0]]), *((site, first[site]) for site in sites)]
        made += [(site, self.patcher.placebo(site, base[site], first[site], key)) for site in sites]
        return made + [(site, other[site]) for other in more for site in sites]

    def _chunks(self) -> list[range]:
        """So many queries at once as what their runs hold may be kept of: arming weights takes time."""
        count = len(self.queries)
        return [range(start, min(start + KEPT, count)) for start in range(0, count, KEPT)]

    def own_tokens(self) -> list[list[bool]]:
        """Return for each query which tokens of its prompt are the defense's own."""
        behind = [False] * len(self.readout.prefix)
        found = []
        for query, prompt in zip(self.queries, self.prompts(self.defense), strict=True):
            own = cutting.of_defense(self.bench.renderer, prompt, self.bench.attack.chat(query))
            found.append(own if prompt.begun else own + behind)
        return found

    def cuts(
        self, own: Sequence[Sequence[bool]], before: Float[np.ndarray, " queries"], done: Done = lambda: None
    ) -> tuple[list[tuple[str, range]], Change]:
        """Return by reader and layers what is left of the change of each margin when attention is cut.

        Args:
            own: what `own_tokens` returned.
            before: the margins, undefended.
            done: told when a query is finished.
        """
        depth = len(self.anatomy.layers)
        edges = [round(depth * quarter / QUARTERS) for quarter in range(QUARTERS + 1)]
        ranges = [range(start, stop) for start, stop in pairwise(edges) if stop > start]
        ranges = [range(0), *ranges, range(depth)]
        cells = [(reader, layers) for reader in cutting.READERS for layers in ranges]
        rows = []
        with self.defense.armed(self.bench.loaded.model):
            for ids, mine in zip(self.ids(self.defense), own, strict=True):
                rows.append(
                    [
                        cutting.margin(self.bench, ids, mine, layers, reader, self.readout)
                        for reader, layers in cells
                    ]
                )
                done()
        return cells, np.array(rows) - before[:, None]

    def switches(
        self, weights: switching.Weights, before: Float[np.ndarray, " queries"], done: Done = lambda: None
    ) -> tuple[list[tuple[str, int | None, str]], Change]:
        """Return what is switched on, and the change of each margin then, the prompt being the defended one.

        Args:
            weights: what `switching.changed` returned.
            before: the margins, undefended.
            done: told when another switch is read.
        """
        ids = self.ids(self.defense)
        read = switching.margins(self.bench, self.defense, weights, ids, self.readout, done)
        named = [(how, layer, module) for how, layer, module, _ in switching.switches(weights)]
        return named, read.numpy() - before[:, None]


def agreement(
    guessed: Float[np.ndarray, " heads"], exact: Float[np.ndarray, " heads"]
) -> dict[str, float | None]:
    """Return how well slopes rank and size the effects of patches.

    >>> agreement(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"]
    1.0
    """
    from scipy.stats import spearmanr

    return {
        "heads": len(exact),
        "rank_correlation": float(spearmanr(guessed, exact).statistic) if len(exact) > 2 else None,
        "mean_error": float(np.abs(guessed - exact).mean()),
        "mean_size": float(np.abs(exact).mean()),
    }

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
from analysis.mechanism.patching import PromptIds, ActivationPatch, ActivationPatcher, SiteActivations
from analysis.tables import ModelPart
from defenses import Defense

if TYPE_CHECKING:
    from analysis.bench import ModelSession
    from analysis.mechanism.lens import ModelComponents
    from analysis.queries import Query
    from analysis.readout import Readout
    from analysis.rendering import Prompt

N_LAYER_RANGES = 4
QUERIES_PER_CHUNK = 16  # queries whose activations are held at once
InterventionEffects = Float[np.ndarray, "queries columns"]
QueryCallback = Callable[[], None]


@dataclass(frozen=True)
class PairedRuns:
    """A defense beside the undefended model, on some queries, each of which is one prompt.

    Args:
        session: the model, and how queries are sent.
        components: where its parts lie.
        readout: how logits become a margin.
        undefended: nothing is done.
        defense: prepared for the model.
        queries: what is asked.
    """

    session: ModelSession
    components: ModelComponents
    readout: Readout
    undefended: Defense
    defense: Defense
    queries: Sequence[Query]

    def reads_single_prompts(self) -> bool:
        """Return whether each query is one prompt and one pass, which can be patched."""
        several = any(len(one) > 1 for one in self._rendered_prompts[1])
        return not several and not self.readout.questions and len(scoring.list_blend_members(self.defense)) == 1

    @cached_property
    def _rendered_prompts(self) -> list[list[list[Prompt]]]:
        """What the model reads for each query, undefended and defended: every step needs it."""
        return [self.session.render_queries(one, self.queries) for one in (self.undefended, self.defense)]

    def render_prompts(self, defense: Defense) -> list[Prompt]:
        """Return what the model reads for each query."""
        if defense is self.undefended or defense is self.defense:
            readings = self._rendered_prompts[defense is self.defense]
        else:
            readings = self.session.render_queries(defense, self.queries)
        return [one for (one,) in readings]

    def encode_prompts(self, defense: Defense) -> list[PromptIds]:
        """Return the tokens of what the model reads for each query, up to where the answer is read."""
        return [prompt.append_prefix(self.readout.response_prefix) for prompt in self.render_prompts(defense)]

    def count_added_tokens(self, defense: Defense) -> int:
        """Return how many tokens a defense adds, by the median."""
        both = zip(self.encode_prompts(defense), self.encode_prompts(self.undefended), strict=True)
        return int(np.median([len(one) - len(other) for one, other in both]))

    @property
    def patcher(self) -> ActivationPatcher:
        """Who patches."""
        return ActivationPatcher(self.session, self.components, self.readout)

    def estimate_head_effects(self, on_progress: QueryCallback = lambda: None) -> tuple[list[ModelPart], InterventionEffects]:
        """Return every head, and what patching it into the undefended run would do by its slope there."""
        heads = [head for layer in range(len(self.components.layers)) for head in self.patcher.list_heads(layer)]
        both = [(one, self.encode_prompts(one)) for one in (self.undefended, self.defense)]
        rows = []
        for some in self._query_chunks():
            before, after = (self.patcher.record_site_activations(one, [ids[row] for row in some], heads) for one, ids in both)
            for row, old, new in zip(some, before, after, strict=True):
                slope = self.patcher.compute_head_gradients(both[0][1][row])
                rows.append([float((slope[head] * (new[head] - old[head])).sum()) for head in heads])
                on_progress()
        return heads, np.array(rows)

    def patch_activations(
        self, sites: Sequence[ModelPart], controls: Mapping[str, Defense], seed: int, on_progress: QueryCallback = lambda: None
    ) -> dict[tuple[str, str], InterventionEffects]:
        """Return by run that is patched and by source what each patch does to each margin.

        Into the undefended run: by how much the margin rises. Into the defended one: by how much it falls.

        Args:
            sites: what is patched, each by itself.
            controls: whose activations are put into the undefended run as well, by name.
            seed: of the placebo.
            on_progress: told when a query is finished in one of the two runs.
        """
        runs = {"undefended": self.undefended, "defended": self.defense, **controls}
        asked = {name: self.encode_prompts(defense) for name, defense in runs.items()}
        found: dict[tuple[str, str], list[InterventionEffects]] = {}
        for some in self._query_chunks():
            ids = {name: [all_[row] for row in some] for name, all_ in asked.items()}
            states = {name: self.patcher.record_site_activations(one, ids[name], sites) for name, one in runs.items()}
            for into, source in (("undefended", "defended"), ("defended", "undefended")):
                others = tuple(controls) if into == "undefended" else ()
                lists = [
                    self._build_patches(sites, base, [held, *more], f"{seed}/{self.queries[row].id}/{into}")
                    for row, base, held, *more in zip(
                        some, states[into], states[source], *(states[name] for name in others), strict=True
                    )
                ]
                read = self.patcher.compute_patched_margins(runs[into], ids[into], lists, on_progress)
                change = (read[:, 1:] - read[:, :1]) * (1 if into == "undefended" else -1)
                names = ("defense" if into == "undefended" else "undefended", "placebo", *others)
                for name, values in zip(names, change.split(len(sites), 1), strict=True):
                    found.setdefault((into, name), []).append(values.numpy())
        return {key: np.concatenate(rows) for key, rows in found.items()}

    def _build_patches(self, sites: Sequence[ModelPart], base_activations: SiteActivations, source_activations: Sequence[SiteActivations], seed_key: str) -> list[ActivationPatch]:
        """What is put into one prompt: its own (nothing changes), what others hold, the first's placebo."""
        first, *more = source_activations
        made = [(sites[0], base_activations[sites[0]]), *((site, first[site]) for site in sites)]
        made += [(site, self.patcher.draw_placebo(site, base_activations[site], first[site], seed_key)) for site in sites]
        return made + [(site, other[site]) for other in more for site in sites]

    def _query_chunks(self) -> list[range]:
        """So many queries at once as what their runs hold may be kept of: arming weights takes time."""
        count = len(self.queries)
        return [range(start, min(start + QUERIES_PER_CHUNK, count)) for start in range(0, count, QUERIES_PER_CHUNK)]

    def find_defense_tokens(self) -> list[list[bool]]:
        """Return for each query which tokens of its prompt are the defense's own."""
        behind = [False] * len(self.readout.response_prefix)
        found = []
        for query, prompt in zip(self.queries, self.render_prompts(self.defense), strict=True):
            own = cutting.mask_defense_tokens(self.session.chat_template, prompt, self.session.attack.build_chat(query))
            found.append(own if prompt.prefill else own + behind)
        return found

    def measure_knockouts(
        self, defense_tokens: Sequence[Sequence[bool]], undefended_margins: Float[np.ndarray, " queries"], on_progress: QueryCallback = lambda: None
    ) -> tuple[list[tuple[str, range]], InterventionEffects]:
        """Return by reader and layers what is left of the change of each margin when attention is cut.

        Args:
            defense_tokens: what `own_tokens` returned.
            undefended_margins: the margins, undefended.
            on_progress: told when a query is finished.
        """
        depth = len(self.components.layers)
        edges = [round(depth * quarter / N_LAYER_RANGES) for quarter in range(N_LAYER_RANGES + 1)]
        ranges = [range(start, stop) for start, stop in pairwise(edges) if stop > start]
        ranges = [range(0), *ranges, range(depth)]
        cells = [(reader, layers) for reader in cutting.ATTENTION_READERS for layers in ranges]
        rows = []
        with self.defense.apply_to(self.session.loaded_model.model):
            for ids, mine in zip(self.encode_prompts(self.defense), defense_tokens, strict=True):
                rows.append(
                    [
                        cutting.compute_knockout_margin(self.session, ids, mine, layers, reader, self.readout)
                        for reader, layers in cells
                    ]
                )
                on_progress()
        return cells, np.array(rows) - undefended_margins[:, None]

    def measure_weight_patches(
        self, weight_changes: switching.WeightChanges, undefended_margins: Float[np.ndarray, " queries"], on_progress: QueryCallback = lambda: None
    ) -> tuple[list[tuple[str, int | None, str]], InterventionEffects]:
        """Return what is switched on, and the change of each margin then, the prompt being the defended one.

        Args:
            weight_changes: what `switching.changed` returned.
            undefended_margins: the margins, undefended.
            on_progress: told when another switch is read.
        """
        ids = self.encode_prompts(self.defense)
        read = switching.compute_weight_patch_margins(self.session, self.defense, weight_changes, ids, self.readout, on_progress)
        named = [(how, layer, module) for how, layer, module, _ in switching.list_weight_patches(weight_changes)]
        return named, read.numpy() - undefended_margins[:, None]


def compare_estimated_effects(
    estimated_effects: Float[np.ndarray, " heads"], patched_effects: Float[np.ndarray, " heads"]
) -> dict[str, float | None]:
    """Return how well slopes rank and size the effects of patches.

    >>> agreement(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"]
    1.0
    """
    from scipy.stats import spearmanr

    return {
        "heads": len(patched_effects),
        "rank_correlation": float(spearmanr(estimated_effects, patched_effects).statistic) if len(patched_effects) > 2 else None,
        "mean_error": float(np.abs(estimated_effects - patched_effects).mean()),
        "mean_size": float(np.abs(patched_effects).mean()),
    }

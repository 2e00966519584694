"""What interventions do to each margin: patches, their guess by slopes, cut attention, switched weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.mechanism.knockout import ATTENTION_READERS, compute_knockout_margin, mask_defense_tokens
from analysis.mechanism.patching import ActivationPatch, ActivationPatcher, PromptIds, SiteActivations
from analysis.mechanism.weight_patching import compute_weight_patch_margins, list_weight_patches
from analysis.models.loading import build_model_info
from analysis.models.session import list_blend_members
from analysis.stats.attribution import CONTRASTS, ContrastEstimator, make_part_columns
from analysis.stats.tables import UNDEFENDED, ModelPart
from analysis.studies.run_spec import PATCH_SITES
from defenses.catalog import get_defense
from defenses.contract import Defense

if TYPE_CHECKING:
    from analysis.datasets.queries import Query
    from analysis.mechanism.components import ModelComponents
    from analysis.mechanism.weight_patching import WeightChanges
    from analysis.models.chat_template import Prompt
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout
    from analysis.studies.mechanism import MechanismStudy

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
        return not several and not self.readout.questions and len(list_blend_members(self.defense)) == 1

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

    def estimate_head_effects(
        self, on_progress: QueryCallback = lambda: None
    ) -> tuple[list[ModelPart], InterventionEffects]:
        """Return every head, and what patching it into the undefended run would do by its slope there."""
        heads = [
            head for layer in range(len(self.components.layers)) for head in self.patcher.list_heads(layer)
        ]
        both = [(one, self.encode_prompts(one)) for one in (self.undefended, self.defense)]
        rows = []
        for some in self._query_chunks():
            before, after = (
                self.patcher.record_site_activations(one, [ids[row] for row in some], heads)
                for one, ids in both
            )
            for row, old, new in zip(some, before, after, strict=True):
                slope = self.patcher.compute_head_gradients(both[0][1][row])
                rows.append([float((slope[head] * (new[head] - old[head])).sum()) for head in heads])
                on_progress()
        return heads, np.array(rows)

    def patch_activations(
        self,
        sites: Sequence[ModelPart],
        controls: Mapping[str, Defense],
        seed: int,
        on_progress: QueryCallback = lambda: None,
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
            states = {
                name: self.patcher.record_site_activations(one, ids[name], sites)
                for name, one in runs.items()
            }
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

    def _build_patches(
        self,
        sites: Sequence[ModelPart],
        base_activations: SiteActivations,
        source_activations: Sequence[SiteActivations],
        seed_key: str,
    ) -> list[ActivationPatch]:
        """What is put into one prompt: its own (nothing changes), what others hold, the first's placebo."""
        first, *more = source_activations
        made = [(sites[0], base_activations[sites[0]]), *((site, first[site]) for site in sites)]
        made += [
            (site, self.patcher.draw_placebo(site, base_activations[site], first[site], seed_key))
            for site in sites
        ]
        return made + [(site, other[site]) for other in more for site in sites]

    def _query_chunks(self) -> list[range]:
        """So many queries at once as what their runs hold may be kept of: arming weights takes time."""
        count = len(self.queries)
        return [
            range(start, min(start + QUERIES_PER_CHUNK, count))
            for start in range(0, count, QUERIES_PER_CHUNK)
        ]

    def find_defense_tokens(self) -> list[list[bool]]:
        """Return for each query which tokens of its prompt are the defense's own."""
        behind = [False] * len(self.readout.response_prefix)
        found = []
        for query, prompt in zip(self.queries, self.render_prompts(self.defense), strict=True):
            own = mask_defense_tokens(
                self.session.chat_template, prompt, self.session.attack.build_chat(query)
            )
            found.append(own if prompt.prefill else own + behind)
        return found

    def measure_knockouts(
        self,
        defense_tokens: Sequence[Sequence[bool]],
        undefended_margins: Float[np.ndarray, " queries"],
        on_progress: QueryCallback = lambda: None,
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
        cells = [(reader, layers) for reader in ATTENTION_READERS for layers in ranges]
        rows = []
        with self.defense.apply_to(self.session.loaded_model.model):
            for ids, mine in zip(self.encode_prompts(self.defense), defense_tokens, strict=True):
                rows.append(
                    [
                        compute_knockout_margin(self.session, ids, mine, layers, reader, self.readout)
                        for reader, layers in cells
                    ]
                )
                on_progress()
        return cells, np.array(rows) - undefended_margins[:, None]

    def measure_weight_patches(
        self,
        weight_changes: WeightChanges,
        undefended_margins: Float[np.ndarray, " queries"],
        on_progress: QueryCallback = lambda: None,
    ) -> tuple[list[tuple[str, int | None, str]], InterventionEffects]:
        """Return what is switched on, and the change of each margin then, the prompt being the defended one.

        Args:
            weight_changes: what `switching.changed` returned.
            undefended_margins: the margins, undefended.
            on_progress: told when another switch is read.
        """
        ids = self.encode_prompts(self.defense)
        read = compute_weight_patch_margins(
            self.session, self.defense, weight_changes, ids, self.readout, on_progress
        )
        named = [(how, layer, module) for how, layer, module, _ in list_weight_patches(weight_changes)]
        return named, read.numpy() - undefended_margins[:, None]


def compare_estimated_effects(
    estimated_effects: Float[np.ndarray, " heads"], patched_effects: Float[np.ndarray, " heads"]
) -> dict[str, float | None]:
    """Return how well slopes rank and size the effects of patches.

    >>> compare_estimated_effects(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"]
    1.0
    """
    from scipy.stats import spearmanr

    return {
        "heads": len(patched_effects),
        "rank_correlation": float(spearmanr(estimated_effects, patched_effects).statistic)
        if len(patched_effects) > 2
        else None,
        "mean_error": float(np.abs(estimated_effects - patched_effects).mean()),
        "mean_size": float(np.abs(patched_effects).mean()),
    }


_NEUTRAL_CONTROL = "neutral_prompt"


def measure_interventions(
    study: MechanismStudy,
    session: ModelSession,
    attack: str,
    condition: str,
    undefended: Defense,
    defense: Defense,
) -> None:
    """Patch, cut and switch one defense, on the sample.

    Args:
        study: of the run; what is found is added to it.
        session: that asks under the attack.
        attack: its name.
        condition: of the defense.
        undefended: what it is compared with.
        defense: itself.
    """
    from analysis.mechanism.knockout import describe_unsupported_attention
    from analysis.mechanism.weight_patching import find_changed_weights, list_weight_patches

    pair = PairedRuns(
        session, study.components, study.setup.readout, undefended, defense, study.intervention_queries
    )
    if study.setup.readout.questions:
        study.add_notice(
            f"no interventions: --readout {study.setup.readout.name} asks several questions about a query"
        )
        return
    if not pair.reads_single_prompts():
        study.add_notice(
            f"{condition} reads several prompts, or several models, for one query: it is not intervened on"
        )
        return
    asked = study.group_queries(study.intervention_queries)
    sizes = dict(zip(("n_harmful", "n_benign"), asked.class_sizes, strict=True))
    ids = [query.id for query in study.intervention_queries]
    before = study.scores.select_condition(attack, UNDEFENDED).loc[ids, "margin"].to_numpy(float)
    with study.record_failures(attack, condition, defense):
        _patch_condition(study, pair, asked, attack, condition)
    with study.record_failures(attack, condition, defense):
        own = pair.find_defense_tokens()
        if why := describe_unsupported_attention(session.loaded_model.model):
            study.add_notice(f"no cuts: {why}")
        elif any(map(any, own)):
            if not all(map(any, own)):
                study.add_notice(
                    f"{condition} has no tokens of its own in some prompts, which are left as they are"
                )
            with study.show_progress(f"cutting attention to {condition}", len(ids)) as done:
                cells, left = pair.measure_knockouts(own, before, done)
            found = asked.estimate_contrasts(left).assign(
                reader=[reader for reader, _ in cells],
                first=[layers.start if layers else -1 for _, layers in cells],
                last=[layers.stop - 1 for _, layers in cells],
            )
            study.add_condition_tables(attack, condition, cuts=found.assign(**sizes))
    with study.record_failures(attack, condition, defense):
        if weights := find_changed_weights(session.loaded_model.model, defense):
            with study.show_progress(f"switching {condition} on", len(list_weight_patches(weights))) as done:
                named, change = pair.measure_weight_patches(weights, before, done)
            found = asked.estimate_contrasts(change).assign(
                how=[how for how, _, _ in named],
                layer=pd.array([layer for _, layer, _ in named], dtype="Int64"),
                module=[module for *_, module in named],
            )
            study.add_condition_tables(attack, condition, weights=found.assign(**sizes))


def _patch_condition(
    study: MechanismStudy,
    paired_runs: PairedRuns,
    effect_queries: ContrastEstimator,
    attack: str,
    condition: str,
) -> None:
    """Patch every layer and the top heads; compare heads with what their slopes say."""
    wanted, heads = study.options, []
    if "heads" in wanted.sites:
        with study.show_progress(
            f"slopes of heads under {condition}", len(study.intervention_queries)
        ) as done:
            every, guessed = paired_runs.estimate_head_effects(done)
        slopes = effect_queries.estimate_contrasts(guessed)
        size = slopes[list(CONTRASTS)].abs().max(axis=1).to_numpy()
        order = list(np.argsort(-size))
        chance = np.random.default_rng(study.seed).permutation(order[wanted.n_top :])[: wanted.n_top]
        picked = sorted([*order[: wanted.n_top], *chance])
        heads = [every[place] for place in picked]
        study.add_condition_tables(
            attack, condition, slopes=pd.concat([make_part_columns(every), slopes], axis=1)
        )
    sites = paired_runs.patcher.list_sites([kind for kind in PATCH_SITES[:-1] if kind in wanted.sites], heads)
    if not sites:
        return
    controls = _prepare_neutral_control(study, paired_runs, condition)
    with study.show_progress(f"patching {condition}", 2 * len(study.intervention_queries)) as done:
        changes = paired_runs.patch_activations(sites, controls, study.seed, done)
    harmful, benign = effect_queries.class_sizes
    for (into, source), change in changes.items():
        found = pd.concat([make_part_columns(sites), effect_queries.estimate_contrasts(change)], axis=1)
        found = found.assign(into=into, source=source, n_harmful=harmful, n_benign=benign)
        study.add_condition_tables(attack, condition, patches=found)
        if heads and (into, source) == ("undefended", "defense"):
            exact = found[found["kind"] == "head"]
            for contrast in CONTRASTS:
                both = slopes[contrast].to_numpy()[picked], exact[contrast].to_numpy()
                about = {"attack": attack, "defense": condition, "contrast": contrast}
                study.slope_agreement.append(about | compare_estimated_effects(*both))


def _prepare_neutral_control(
    study: MechanismStudy, paired_runs: PairedRuns, condition: str
) -> dict[str, Defense]:
    """A neutral prompt as long as the defense's."""
    if (wanted := paired_runs.count_added_tokens(paired_runs.defense)) < 1:
        study.add_notice(f"{condition} makes prompts no longer: no neutral prompt is patched for comparison")
        return {}
    host = build_model_info(
        paired_runs.session.loaded_model.name, paired_runs.session.loaded_model.tokenizer, study.seed
    )
    length = wanted
    for _ in range(2):  # turns and breaks come with it, and a default system turn may go
        control = get_defense(_NEUTRAL_CONTROL, {"length": str(max(1, length))}).prepare(host)
        adds = paired_runs.count_added_tokens(control)
        length += wanted - adds
    study.neutral_prompts.append({"defense": condition, "tokens": wanted, "control_tokens": adds})
    return {_NEUTRAL_CONTROL: control}

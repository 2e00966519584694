"""Interventions on paired runs: activation, attribution and weight patching, and attention knockout.

`PairedRuns` computes the effect of each intervention on each margin; the functions after it average these
effects into tables of shift and discrimination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analysis.mechanism.knockout import ATTENTION_READERS, compute_knockout_margin
from analysis.mechanism.patching import (
    LAYER_SITES,
    ActivationPatch,
    ActivationPatcher,
    PromptIds,
    SiteActivations,
)
from analysis.mechanism.weight_patching import compute_weight_patch_margins, list_weight_patches
from analysis.models.loading import build_model_info
from analysis.models.session import list_blend_members
from analysis.models.token_spans import mask_defense_tokens, mask_image_tokens
from analysis.stats.attribution import CONTRASTS, ContrastEstimator, make_part_columns
from analysis.stats.tables import ModelPart
from defenses.catalog import get_defense
from defenses.contract import Defense, QueryChat

if TYPE_CHECKING:
    from analysis.mechanism.components import ModelComponents
    from analysis.mechanism.weight_patching import WeightChanges
    from analysis.models.chat_template import Prompt
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

N_LAYER_RANGES = 4
QUERIES_PER_CHUNK = 16  # queries whose activations are held in memory together
_NEUTRAL_CONTROL = "neutral_prompt"
InterventionEffects = Float[np.ndarray, "queries columns"]
QueryCallback = Callable[[], None]


@dataclass(frozen=True)
class PromptPatches:
    """The patches of one prompt: a baseline, then one patch per site from each source.

    Attributes:
        baseline: the prompt's own activation at one site. It changes nothing, so its margin is the unpatched
            one, computed in the same batch as the patched ones.
        patches_by_source: by source, one patch per site; all sources have the same sites in the same order.
    """

    baseline: ActivationPatch
    patches_by_source: Mapping[str, Sequence[ActivationPatch]]

    def list_patches(self) -> list[ActivationPatch]:
        """Return all patches in the order of the margins that `split_changes` takes."""
        return [self.baseline, *(patch for patches in self.patches_by_source.values() for patch in patches)]

    def split_changes(
        self, margins: Float[Tensor, "prompts patches"]
    ) -> dict[str, Float[Tensor, "prompts sites"]]:
        """Return by how much each patch raises the margin above the baseline, by source.

        Args:
            margins: margins of several prompts, whose patches have the same sources and sites as these.
        """
        changes = margins[:, 1:] - margins[:, :1]
        n_sites = [len(patches) for patches in self.patches_by_source.values()]
        return dict(zip(self.patches_by_source, changes.split(n_sites, 1), strict=True))


@dataclass(frozen=True)
class PairedRuns:
    """The defended and the undefended run of some queries, each of which is a single prompt.

    Args:
        session: the model.
        components: components of the model; None if only attention and weights are changed.
        readout: readout that defines the margin.
        undefended: defense of the undefended run, which changes nothing.
        defense: defense of the defended run, prepared for the model.
        query_chats: queries that both runs read, an attack applied.
    """

    session: ModelSession
    components: ModelComponents | None
    readout: Readout
    undefended: Defense
    defense: Defense
    query_chats: Sequence[QueryChat]

    def reads_single_prompts(self) -> bool:
        """Return whether each query is one prompt and one forward pass, which interventions require."""
        has_copies = any(len(prompts) > 1 for prompts in self._rendered_prompts[1])
        return not has_copies and not self.readout.questions and len(list_blend_members(self.defense)) == 1

    @cached_property
    def _rendered_prompts(self) -> list[list[list[Prompt]]]:
        """Prompts of each query, undefended and defended; cached because every intervention needs them."""
        return [
            self.session.render_prompts(defense, self.query_chats)
            for defense in (self.undefended, self.defense)
        ]

    def render_prompts(self, defense: Defense) -> list[Prompt]:
        """Return the prompt of each query under a defense."""
        if defense is self.undefended or defense is self.defense:
            prompts_by_query = self._rendered_prompts[defense is self.defense]
        else:
            prompts_by_query = self.session.render_prompts(defense, self.query_chats)
        return [prompt for (prompt,) in prompts_by_query]

    def encode_prompts(self, defense: Defense) -> list[PromptIds]:
        """Return the token ids of each query's prompt, up to the position where the response is read."""
        return [prompt.append_prefix(self.readout.response_prefix) for prompt in self.render_prompts(defense)]

    def count_added_tokens(self, defense: Defense) -> int:
        """Return the median number of tokens that a defense adds to a prompt."""
        pairs = zip(self.encode_prompts(defense), self.encode_prompts(self.undefended), strict=True)
        return int(np.median([len(defended) - len(undefended) for defended, undefended in pairs]))

    @property
    def patcher(self) -> ActivationPatcher:
        """The activation patcher of this model and readout."""
        if self.components is None:
            raise ValueError("activations are patched at the components of a model")
        return ActivationPatcher(self.session, self.components, self.readout)

    def estimate_head_effects(
        self, on_progress: QueryCallback = lambda: None
    ) -> tuple[list[ModelPart], InterventionEffects]:
        """Estimate the effect of patching each head into the undefended run, by attribution patching.

        Args:
            on_progress: called after each query.

        Returns:
            All heads, and the estimated change of each margin (nats) by head.
        """
        heads = [head for layer in range(self._n_layers) for head in self.patcher.list_heads(layer)]
        undefended_ids = self.encode_prompts(self.undefended)
        runs = [(self.undefended, undefended_ids), (self.defense, self.encode_prompts(self.defense))]
        effects = []
        for chunk in self._query_chunks():
            undefended_states, defended_states = (
                self.patcher.record_site_activations(defense, [ids[row] for row in chunk], heads)
                for defense, ids in runs
            )
            for row, before, after in zip(chunk, undefended_states, defended_states, strict=True):
                gradients = self.patcher.compute_head_gradients(undefended_ids[row])
                effects.append(
                    [float((gradients[head] * (after[head] - before[head])).sum()) for head in heads]
                )
                on_progress()
        return heads, np.array(effects)

    def patch_activations(
        self,
        sites: Sequence[ModelPart],
        controls: Mapping[str, Defense],
        seed: int,
        on_progress: QueryCallback = lambda: None,
    ) -> dict[tuple[str, str], InterventionEffects]:
        """Return the effect of each patch on each margin, keyed by (patched run, activation source).

        An effect is the rise of the margin (nats) if the undefended run is patched, and its fall if the
        defended run is patched.

        Args:
            sites: sites that are patched one at a time.
            controls: further defenses whose activations are patched into the undefended run, by name.
            seed: seed of the placebo.
            on_progress: called after each query of each of the two runs.
        """
        defense_by_run = {"undefended": self.undefended, "defended": self.defense, **controls}
        ids_by_run = {name: self.encode_prompts(defense) for name, defense in defense_by_run.items()}
        effects: dict[tuple[str, str], list[InterventionEffects]] = {}
        for chunk in self._query_chunks():
            ids = {name: [all_ids[row] for row in chunk] for name, all_ids in ids_by_run.items()}
            states = {
                name: self.patcher.record_site_activations(defense, ids[name], sites)
                for name, defense in defense_by_run.items()
            }
            for patched_run, source_run in (("undefended", "defended"), ("defended", "undefended")):
                is_undefended = patched_run == "undefended"
                source = "defense" if is_undefended else "undefended"
                patches = [
                    self._build_patches(
                        sites,
                        states[patched_run][position],
                        source,
                        states[source_run][position],
                        {name: states[name][position] for name in (controls if is_undefended else ())},
                        f"{seed}/{self.query_chats[row].query_id}/{patched_run}",
                    )
                    for position, row in enumerate(chunk)
                ]
                margins = self.patcher.compute_patched_margins(
                    defense_by_run[patched_run],
                    ids[patched_run],
                    [prompt_patches.list_patches() for prompt_patches in patches],
                    on_progress,
                )
                sign = 1 if is_undefended else -1
                for name, changes in patches[0].split_changes(margins).items():
                    effects.setdefault((patched_run, name), []).append((changes * sign).numpy())
        return {key: np.concatenate(chunks) for key, chunks in effects.items()}

    def _build_patches(
        self,
        sites: Sequence[ModelPart],
        base_activations: SiteActivations,
        source: str,
        source_activations: SiteActivations,
        control_activations: Mapping[str, SiteActivations],
        seed_key: str,
    ) -> PromptPatches:
        """The patches of one prompt: from the source, a placebo of the same size, and from each control."""
        patches_by_source = {
            source: [(site, source_activations[site]) for site in sites],
            "placebo": [
                (
                    site,
                    self.patcher.draw_placebo(
                        site, base_activations[site], source_activations[site], seed_key
                    ),
                )
                for site in sites
            ],
        }
        for name, activations in control_activations.items():
            patches_by_source[name] = [(site, activations[site]) for site in sites]
        return PromptPatches((sites[0], base_activations[sites[0]]), patches_by_source)

    def _query_chunks(self) -> list[range]:
        """Chunks of queries whose activations fit in memory; larger chunks apply weights less often."""
        n_queries = len(self.query_chats)
        return [
            range(start, min(start + QUERIES_PER_CHUNK, n_queries))
            for start in range(0, n_queries, QUERIES_PER_CHUNK)
        ]

    def find_defense_tokens(self) -> list[list[bool]]:
        """Return for each query which tokens of its defended prompt the defense added."""
        response_prefix = [False] * len(self.readout.response_prefix)
        masks = []
        for (_, chat), prompt in zip(self.query_chats, self.render_prompts(self.defense), strict=True):
            mask = mask_defense_tokens(self.session.chat_template, prompt, chat)
            masks.append(mask if prompt.prefill else mask + response_prefix)
        return masks

    def find_image_tokens(self, defense: Defense) -> list[list[bool]]:
        """Return for each query which tokens of its prompt under a defense are those of images."""
        return [mask_image_tokens(ids) for ids in self.encode_prompts(defense)]

    @property
    def _n_layers(self) -> int:
        if self.components is not None:
            return len(self.components.layers)
        return int(self.session.loaded_model.model.config.get_text_config().num_hidden_layers)

    def list_knockouts(self) -> list[tuple[str, range]]:
        """Return the knockouts as (reader, layers): from each reader in no, some and all layers."""
        depth = self._n_layers
        edges = [round(depth * number / N_LAYER_RANGES) for number in range(N_LAYER_RANGES + 1)]
        layer_ranges = [range(start, stop) for start, stop in pairwise(edges) if stop > start]
        layer_ranges = [range(0), *layer_ranges, range(depth)]
        return [(reader, layers) for reader in ATTENTION_READERS for layers in layer_ranges]

    def measure_knockouts(
        self,
        defense: Defense,
        hidden_tokens: Sequence[Sequence[bool]],
        on_progress: QueryCallback = lambda: None,
    ) -> InterventionEffects:
        """Return the margins (nats) under a defense with attention to some tokens blocked, by knockout.

        Args:
            defense: one of the two.
            hidden_tokens: for each query, whether attention to each token is blocked.
            on_progress: called after each query.
        """
        margins = []
        with defense.apply_to(self.session.loaded_model.model):
            for ids, hidden in zip(self.encode_prompts(defense), hidden_tokens, strict=True):
                margins.append(
                    [
                        compute_knockout_margin(self.session, ids, hidden, layers, reader, self.readout)
                        for reader, layers in self.list_knockouts()
                    ]
                )
                on_progress()
        return np.array(margins)

    def measure_weight_patches(
        self,
        weight_changes: WeightChanges,
        undefended_margins: Float[np.ndarray, " queries"],
        on_progress: QueryCallback = lambda: None,
    ) -> tuple[list[tuple[str, int | None, str]], InterventionEffects]:
        """Measure the effect of the defended prompt with only some of the weight changes applied.

        Args:
            weight_changes: result of `find_changed_weights`.
            undefended_margins: margins of the queries without the defense, nats.
            on_progress: called after each weight patch.

        Returns:
            The weight patches as (kind, layer, module), and the change of each margin (nats) by patch.
        """
        ids = self.encode_prompts(self.defense)
        margins = compute_weight_patch_margins(
            self.session, self.defense, weight_changes, ids, self.readout, on_progress
        )
        patches = [(kind, layer, module) for kind, layer, module, _ in list_weight_patches(weight_changes)]
        return patches, margins.numpy() - undefended_margins[:, None]


@dataclass(frozen=True)
class HeadEstimates:
    """Effects of patching every head, estimated by attribution patching.

    Attributes:
        heads: all heads of the model.
        contrasts: shift and discrimination of the estimated effects, one row per head.
    """

    heads: list[ModelPart]
    contrasts: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """The contrasts with the columns that name each head."""
        return pd.concat([make_part_columns(self.heads), self.contrasts], axis=1)

    def choose_heads(self, n_top: int, seed: int) -> list[int]:
        """Return the positions of the heads with the largest estimates, and of as many random others, sorted.

        Args:
            n_top: number of heads of either kind.
            seed: seed of the random choice.
        """
        magnitudes = self.contrasts[list(CONTRASTS)].abs().max(axis=1).to_numpy()
        order = list(np.argsort(-magnitudes))
        random_heads = np.random.default_rng(seed).permutation(order[n_top:])[:n_top]
        return sorted(int(position) for position in (*order[:n_top], *random_heads))

    def compare_with_patches(self, positions: Sequence[int], patches: pd.DataFrame) -> list[dict[str, Any]]:
        """Return the agreement of estimates and patches for each contrast.

        Args:
            positions: positions of the heads that were patched.
            patches: table of `measure_patches` that contains these heads in this order.
        """
        patched = patches[
            (patches["into"] == "undefended") & (patches["source"] == "defense") & (patches["kind"] == "head")
        ]
        return [
            {
                "contrast": contrast,
                **compare_estimated_effects(
                    self.contrasts[contrast].to_numpy()[positions], patched[contrast].to_numpy()
                ),
            }
            for contrast in CONTRASTS
        ]


@dataclass(frozen=True)
class LengthControl:
    """A neutral system prompt that adds as many tokens as a defense.

    Attributes:
        name: name of the control defense, which is the activation source in the table of patches.
        defense: the control, prepared for the model.
        n_defense_tokens: median number of tokens that the defense adds.
        n_control_tokens: median number of tokens that the control adds.
    """

    name: str
    defense: Defense
    n_defense_tokens: int
    n_control_tokens: int


def estimate_heads(
    paired_runs: PairedRuns, estimator: ContrastEstimator, on_progress: QueryCallback = lambda: None
) -> HeadEstimates:
    """Estimate the effect of patching every head on shift and discrimination, by attribution patching.

    Args:
        paired_runs: the two runs.
        estimator: estimator of contrasts over their queries.
        on_progress: called after each query.
    """
    heads, effects = paired_runs.estimate_head_effects(on_progress)
    return HeadEstimates(heads, estimator.estimate_contrasts(effects))


def choose_patch_sites(
    paired_runs: PairedRuns, sites: Sequence[str], heads: Sequence[ModelPart]
) -> list[ModelPart]:
    """Return the sites to patch: each selected kind in every layer, then single heads.

    Args:
        paired_runs: the two runs.
        sites: kinds of site; those in `LAYER_SITES` count.
        heads: heads that are patched one at a time.
    """
    return paired_runs.patcher.list_sites([kind for kind in LAYER_SITES if kind in sites], heads)


def find_length_control(paired_runs: PairedRuns, seed: int) -> LengthControl | None:
    """Return a neutral prompt that adds as many tokens as the defense; None if the defense adds none.

    Args:
        paired_runs: the two runs.
        seed: seed of the control's text.
    """
    if (n_defense_tokens := paired_runs.count_added_tokens(paired_runs.defense)) < 1:
        return None
    loaded_model = paired_runs.session.loaded_model
    model_info = build_model_info(loaded_model.name, loaded_model.tokenizer, seed)
    length = n_defense_tokens
    for _ in range(2):  # the system turn itself adds tokens, and may replace a default system turn
        control = get_defense(_NEUTRAL_CONTROL, {"length": str(max(1, length))}).prepare(model_info)
        n_control_tokens = paired_runs.count_added_tokens(control)
        length += n_defense_tokens - n_control_tokens
    return LengthControl(_NEUTRAL_CONTROL, control, n_defense_tokens, n_control_tokens)


def measure_patches(
    paired_runs: PairedRuns,
    estimator: ContrastEstimator,
    sites: Sequence[ModelPart],
    controls: Mapping[str, Defense],
    seed: int,
    on_progress: QueryCallback = lambda: None,
) -> pd.DataFrame:
    """Patch activations and return shift and discrimination of each patch.

    Args:
        paired_runs: the two runs.
        estimator: estimator of contrasts over their queries.
        sites: sites that are patched one at a time.
        controls: further defenses whose activations are patched into the undefended run, by name.
        seed: seed of the placebo.
        on_progress: called after each query of each of the two runs.

    Returns:
        One row per patched run (`into`), activation source (`source`) and site.
    """
    n_harmful, n_benign = estimator.class_sizes
    effects = paired_runs.patch_activations(sites, controls, seed, on_progress)
    tables = [
        pd.concat([make_part_columns(sites), estimator.estimate_contrasts(changes)], axis=1).assign(
            into=patched_run, source=source, n_harmful=n_harmful, n_benign=n_benign
        )
        for (patched_run, source), changes in effects.items()
    ]
    return pd.concat(tables, ignore_index=True)


def measure_knockout_table(
    paired_runs: PairedRuns,
    estimator: ContrastEstimator,
    defense_tokens: Sequence[Sequence[bool]],
    undefended_margins: Float[np.ndarray, " queries"],
    on_progress: QueryCallback = lambda: None,
) -> pd.DataFrame:
    """Block attention to the defense's tokens and return the shift and discrimination that remain.

    Args:
        paired_runs: the two runs.
        estimator: estimator of contrasts over their queries.
        defense_tokens: result of `PairedRuns.find_defense_tokens`.
        undefended_margins: margins of the queries without the defense, nats.
        on_progress: called after each query.

    Returns:
        One row per reader and layer range, `first` to `last`; both are -1 if attention is blocked nowhere.
    """
    margins = paired_runs.measure_knockouts(paired_runs.defense, defense_tokens, on_progress)
    effects = margins - undefended_margins[:, None]
    return _make_knockout_table(paired_runs, estimator, effects, "defense")


def measure_image_knockout_table(
    paired_runs: PairedRuns, estimator: ContrastEstimator, on_progress: QueryCallback = lambda: None
) -> pd.DataFrame:
    """Block attention to the tokens of images in both runs and return the defense's effect that remains.

    What the image itself does to the margin is absent from both runs, and so from their difference.

    Args:
        paired_runs: the two runs.
        estimator: estimator of contrasts over their queries.
        on_progress: called after each query of each of the two runs.

    Returns:
        As `measure_knockout_table`.
    """
    undefended, defended = (
        paired_runs.measure_knockouts(defense, paired_runs.find_image_tokens(defense), on_progress)
        for defense in (paired_runs.undefended, paired_runs.defense)
    )
    return _make_knockout_table(paired_runs, estimator, defended - undefended, "image")


def _make_knockout_table(
    paired_runs: PairedRuns, estimator: ContrastEstimator, effects: InterventionEffects, tokens: str
) -> pd.DataFrame:
    """The contrasts of each knockout; `tokens` is the group to which attention was blocked."""
    knockouts = paired_runs.list_knockouts()
    n_harmful, n_benign = estimator.class_sizes
    return estimator.estimate_contrasts(effects).assign(
        tokens=tokens,
        reader=[reader for reader, _ in knockouts],
        first=[layers.start if layers else -1 for _, layers in knockouts],
        last=[layers.stop - 1 for _, layers in knockouts],
        n_harmful=n_harmful,
        n_benign=n_benign,
    )


def measure_weight_patch_table(
    paired_runs: PairedRuns,
    estimator: ContrastEstimator,
    weight_changes: WeightChanges,
    undefended_margins: Float[np.ndarray, " queries"],
    on_progress: QueryCallback = lambda: None,
) -> pd.DataFrame:
    """Apply parts of the defense's weight change and return shift and discrimination of each.

    Args:
        paired_runs: the two runs.
        estimator: estimator of contrasts over their queries.
        weight_changes: result of `find_changed_weights`.
        undefended_margins: margins of the queries without the defense, nats.
        on_progress: called after each weight patch.

    Returns:
        One row per weight patch: `how`, `layer` and `module` as in `list_weight_patches`.
    """
    patches, effects = paired_runs.measure_weight_patches(weight_changes, undefended_margins, on_progress)
    n_harmful, n_benign = estimator.class_sizes
    return estimator.estimate_contrasts(effects).assign(
        how=[kind for kind, _, _ in patches],
        layer=pd.array([layer for _, layer, _ in patches], dtype="Int64"),
        module=[module for *_, module in patches],
        n_harmful=n_harmful,
        n_benign=n_benign,
    )


def compare_estimated_effects(
    estimated_effects: Float[np.ndarray, " heads"], patched_effects: Float[np.ndarray, " heads"]
) -> dict[str, float | None]:
    """Return how well estimated effects rank and size the effects of patches.

    >>> compare_estimated_effects(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["rank_correlation"]
    1.0

    Args:
        estimated_effects: effects from attribution patching, nats.
        patched_effects: effects of the same heads from activation patching, nats.

    Returns:
        The number of heads, Spearman's rank correlation (None for fewer than 3 heads), the mean absolute
        error and the mean absolute effect of a patch, both in nats.
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

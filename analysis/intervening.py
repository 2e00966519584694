"""Interventions on one defense: what is patched, cut off or switched on, and what that does to contrasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import located, states
from analysis.asking import PATCH_SITES
from analysis.located import ContrastEstimator
from analysis.tables import UNDEFENDED
from defenses import Defense, catalog

if TYPE_CHECKING:
    from analysis.bench import ModelSession
    from analysis.looking import MechanismStudy
    from analysis.mechanism.causes import PairedRuns

_NEUTRAL_CONTROL = "neutral_prompt"


def measure_interventions(
    study: MechanismStudy, session: ModelSession, attack: str, condition: str, undefended: Defense, defense: Defense
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
    from analysis.mechanism import cutting, switching
    from analysis.mechanism.causes import PairedRuns

    pair = PairedRuns(session, study.components, study.setup.readout, undefended, defense, study.intervention_queries)
    if study.setup.readout.questions:
        study.add_notice(
            f"no interventions: --readout {study.setup.readout.name} asks several questions about a query"
        )
        return
    if not pair.reads_single_prompts():
        study.add_notice(f"{condition} reads several prompts, or several models, for one query: it is not intervened on")
        return
    asked = study.group_queries(study.intervention_queries)
    sizes = dict(zip(("n_harmful", "n_benign"), asked.class_sizes, strict=True))
    ids = [query.id for query in study.intervention_queries]
    before = study.scores.select_condition(attack, UNDEFENDED).loc[ids, "margin"].to_numpy(float)
    with study.record_failures(attack, condition, defense):
        _patch_condition(study, pair, asked, attack, condition)
    with study.record_failures(attack, condition, defense):
        own = pair.find_defense_tokens()
        if why := cutting.describe_unsupported_attention(session.loaded_model.model):
            study.add_notice(f"no cuts: {why}")
        elif any(map(any, own)):
            if not all(map(any, own)):
                study.add_notice(f"{condition} has no tokens of its own in some prompts, which are left as they are")
            with study.show_progress(f"cutting attention to {condition}", len(ids)) as done:
                cells, left = pair.measure_knockouts(own, before, done)
            found = asked.estimate_contrasts(left).assign(
                reader=[reader for reader, _ in cells],
                first=[layers.start if layers else -1 for _, layers in cells],
                last=[layers.stop - 1 for _, layers in cells],
            )
            study.add_condition_tables(attack, condition, cuts=found.assign(**sizes))
    with study.record_failures(attack, condition, defense):
        if weights := switching.find_changed_weights(session.loaded_model.model, defense):
            with study.show_progress(f"switching {condition} on", len(switching.list_weight_patches(weights))) as done:
                named, change = pair.measure_weight_patches(weights, before, done)
            found = asked.estimate_contrasts(change).assign(
                how=[how for how, _, _ in named],
                layer=pd.array([layer for _, layer, _ in named], dtype="Int64"),
                module=[module for *_, module in named],
            )
            study.add_condition_tables(attack, condition, weights=found.assign(**sizes))


def _patch_condition(study: MechanismStudy, paired_runs: PairedRuns, effect_queries: ContrastEstimator, attack: str, condition: str) -> None:
    """Patch every layer and the top heads; compare heads with what their slopes say."""
    from analysis.mechanism.causes import compare_estimated_effects

    wanted, heads = study.options, []
    if "heads" in wanted.sites:
        with study.show_progress(f"slopes of heads under {condition}", len(study.intervention_queries)) as done:
            every, guessed = paired_runs.estimate_head_effects(done)
        slopes = effect_queries.estimate_contrasts(guessed)
        size = slopes[list(located.CONTRASTS)].abs().max(axis=1).to_numpy()
        order = list(np.argsort(-size))
        chance = np.random.default_rng(study.seed).permutation(order[wanted.n_top :])[: wanted.n_top]
        picked = sorted([*order[: wanted.n_top], *chance])
        heads = [every[place] for place in picked]
        study.add_condition_tables(attack, condition, slopes=pd.concat([located.make_part_columns(every), slopes], axis=1))
    sites = paired_runs.patcher.list_sites([kind for kind in PATCH_SITES[:-1] if kind in wanted.sites], heads)
    if not sites:
        return
    controls = _prepare_neutral_control(study, paired_runs, condition)
    with study.show_progress(f"patching {condition}", 2 * len(study.intervention_queries)) as done:
        changes = paired_runs.patch_activations(sites, controls, study.seed, done)
    harmful, benign = effect_queries.class_sizes
    for (into, source), change in changes.items():
        found = pd.concat([located.make_part_columns(sites), effect_queries.estimate_contrasts(change)], axis=1)
        found = found.assign(into=into, source=source, n_harmful=harmful, n_benign=benign)
        study.add_condition_tables(attack, condition, patches=found)
        if heads and (into, source) == ("undefended", "defense"):
            exact = found[found["kind"] == "head"]
            for contrast in located.CONTRASTS:
                both = slopes[contrast].to_numpy()[picked], exact[contrast].to_numpy()
                about = {"attack": attack, "defense": condition, "contrast": contrast}
                study.slope_agreement.append(about | compare_estimated_effects(*both))


def _prepare_neutral_control(study: MechanismStudy, paired_runs: PairedRuns, condition: str) -> dict[str, Defense]:
    """A neutral prompt as long as the defense's."""
    if (wanted := paired_runs.count_added_tokens(paired_runs.defense)) < 1:
        study.add_notice(f"{condition} makes prompts no longer: no neutral prompt is patched for comparison")
        return {}
    host = states.build_model_info(paired_runs.session.loaded_model.name, paired_runs.session.loaded_model.tokenizer, study.seed)
    length = wanted
    for _ in range(2):  # turns and breaks come with it, and a default system turn may go
        control = catalog.get_defense(_NEUTRAL_CONTROL, {"length": str(max(1, length))}).prepare(host)
        adds = paired_runs.count_added_tokens(control)
        length += wanted - adds
    study.neutral_prompts.append({"defense": condition, "tokens": wanted, "control_tokens": adds})
    return {_NEUTRAL_CONTROL: control}

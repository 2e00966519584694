"""The study of `analyze mechanism`: attribute margins, project states on directions, and intervene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, Attack, check_not_adaptive
from analysis.datasets.queries import sample_queries
from analysis.mechanism.attribution import DirectLogitAttribution, MarginAttribution, explain_no_place
from analysis.mechanism.components import (
    OTHER_COMMANDS_HINT,
    ModelComponents,
    UnknownArchitectureError,
    locate_components,
)
from analysis.mechanism.directions import (
    DIRECTION_NAMES,
    ConceptDirections,
    compute_projections,
    record_residual_states,
)
from analysis.mechanism.interventions import (
    PairedRuns,
    choose_patch_sites,
    estimate_heads,
    find_length_control,
    measure_image_knockout_table,
    measure_knockout_table,
    measure_patches,
    measure_weight_patch_table,
)
from analysis.mechanism.knockout import describe_unsupported_attention, describe_unsupported_images
from analysis.mechanism.logit_weights import SATURATED_WEIGHT
from analysis.mechanism.weight_patching import find_changed_weights, list_weight_patches
from analysis.models.vision import ImageReader
from analysis.report.folder import locate_record, read_record, read_run_table
from analysis.stats.attribution import (
    CONTRASTS,
    ContrastEstimator,
    estimate_layer_contrasts,
    estimate_part_contrasts,
    estimate_profile_similarity,
    find_half_way_layers,
    join_stack_interactions,
)
from analysis.stats.effects import summarize_scores
from analysis.stats.ensembles import REPORT_SPLIT, STACK
from analysis.stats.tables import MARGIN_TOLERANCE, READOUT_PART, UNDEFENDED, ScoreTable
from analysis.studies.manifest import RunTimer
from analysis.studies.run_spec import PATCH_SITES, RunSpec, load_training_queries
from analysis.studies.setup import RunSetup
from analysis.studies.sweep import StudyResult, TableCollector, list_failures, score_conditions
from defenses.adapters import fingerprint_queries
from defenses.catalog import choose_defenses
from defenses.contract import Defense
from defenses.errors import UserError
from defenses.stack import list_members
from defenses.tuned import TunedDefense

if TYPE_CHECKING:
    from analysis.datasets.queries import Query


@dataclass(frozen=True)
class MechanismOptions:
    """Options of the study.

    Attributes:
        sites: activation sites that are patched in every layer; `heads` stands for the heads with the largest
            estimated effects and as many random ones.
        n_top: number of components to list and plot, and of heads to patch.
        n_patched_queries: maximum number of queries for interventions; 0 for no interventions.
        ensembles_folder: output folder of `analyze ensembles`, whose interactions of stacks are compared with
            the similarity of attribution profiles.
    """

    sites: tuple[str, ...] = PATCH_SITES
    n_top: int = 10
    n_patched_queries: int = 32
    ensembles_folder: Path | None = None


@dataclass(kw_only=True)
class MechanismStudy(TableCollector):
    """Collects the tables of one run, attack by attack.

    Attributes:
        setup: what was loaded and prepared.
        located_components: components of the model; None if they cannot be located; attribution, directions
            and patching of activations need them.
        conditions: condition name → defense.
        scores: scores of all conditions.
        options: options of the study.
        seed: seed of the bootstrap, the placebos and the random heads.
        slope_agreement: agreement of attribution patching with activation patching, by condition and
            contrast.
        neutral_prompts: for each patched condition, the tokens that the defense and its neutral control add.
    """

    setup: RunSetup
    located_components: ModelComponents | None
    conditions: Mapping[str, Defense]
    scores: ScoreTable
    options: MechanismOptions
    seed: int
    slope_agreement: list[dict[str, Any]] = field(default_factory=list)
    neutral_prompts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def components(self) -> ModelComponents:
        """The components of the model, where they could be located."""
        if self.located_components is None:
            raise ValueError("the components of this model are not located")
        return self.located_components

    @cached_property
    def effect_queries(self) -> ContrastEstimator:
        """Estimator of contrasts over all queries."""
        return self.group_queries(self.setup.query_set.queries)

    @cached_property
    def intervention_queries(self) -> list[Query]:
        """Queries that interventions run on."""
        if not self.options.n_patched_queries:
            return []
        return list(self.setup.query_set.limit_queries(self.options.n_patched_queries).queries)

    @cached_property
    def _intervention_estimator(self) -> ContrastEstimator:
        """Estimator of contrasts over the queries that interventions run on."""
        return self.group_queries(self.intervention_queries)

    def group_queries(self, selected_queries: Sequence[Query]) -> ContrastEstimator:
        """Return an estimator of contrasts over some queries."""
        pairs = pd.Series([query.pair for query in selected_queries], dtype=object)
        return ContrastEstimator(pairs, np.array([query.harmful for query in selected_queries]), self.seed)

    def study_attack(self, attack: Attack) -> None:
        """Study every defense under one attack.

        Args:
            attack: attack that the queries are sent through.
        """
        conditions = {
            name: defense
            for name, defense in self.conditions.items()
            if (attack.name, name) in self.scores.condition_keys
        }
        if UNDEFENDED not in conditions:
            return
        studied = set(conditions)
        if self.located_components is not None:
            attributions, references = self._attribute_conditions(attack, conditions)
            if UNDEFENDED not in attributions:
                return
            self._add_attribution_tables(attack.name, attributions, references)
            studied = set(attributions)
        defenses = {
            defense.name: defense
            for defense in self.setup.defenses
            if defense.name in studied and defense.name != UNDEFENDED
        }
        if self.located_components is not None and self._is_held_out:
            self._project_conditions(attack, conditions[UNDEFENDED], defenses)
        if self.intervention_queries:
            for name, defense in defenses.items():
                self._intervene(attack, name, conditions[UNDEFENDED], defense)

    def _attribute_conditions(
        self, attack: Attack, conditions: Mapping[str, Defense]
    ) -> tuple[dict[str, MarginAttribution], dict[str, MarginAttribution]]:
        """Attribute the margins of every condition, and check that they equal the scored margins.

        Returns:
            Two attributions by condition: its own, and that of the undefended run with the same weights of
            the logits, which differ between conditions only if the readout is not linear.
        """
        readout = self.setup.readout
        direct_attribution = DirectLogitAttribution(self.components, readout)
        if not direct_attribution.is_exact:
            self.add_notice(
                f"no attribution to components in {self.components.model.dtype}, which rounds their "
                "sums: use --dtype float32"
            )
        has_own_weights = direct_attribution.is_exact and not readout.is_linear
        attributions: dict[str, MarginAttribution] = {}
        references: dict[str, MarginAttribution] = {}
        session, query_chats = (
            self.setup.session,
            attack.build_query_chats(self.setup.query_set.queries),
        )
        with self.show_progress("attributing margins", len(conditions)) as on_progress:
            for name, defense in conditions.items():
                with self.record_failures(attack.name, name, defense):
                    if reason := explain_no_place(defense):
                        raise UserError(reason)
                    if has_own_weights and name != UNDEFENDED:
                        references[name], attribution = direct_attribution.attribute_change(
                            session, conditions[UNDEFENDED], defense, query_chats
                        )
                    else:
                        attribution = direct_attribution.attribute_margins(session, defense, query_chats)
                    if name == UNDEFENDED:
                        self._note_saturation(attribution)
                    scored_margins = self.scores.select_condition(attack.name, name)["margin"].to_numpy(float)
                    error = float(np.abs(attribution.margins - scored_margins).max())
                    if direct_attribution.is_exact and error > MARGIN_TOLERANCE:
                        raise UserError(f"the attributed margins miss the scored ones by {error:.2g} nats")
                    attributions[name] = attribution
                on_progress()
        if UNDEFENDED in attributions:
            references = {name: references.get(name, attributions[UNDEFENDED]) for name in attributions}
        return attributions, references

    def _note_saturation(self, undefended: MarginAttribution) -> None:
        """Note how many margins hardly depend on the logits, if slopes are estimated at these logits."""
        if not self.intervention_queries or "heads" not in self.options.sites:
            return
        if share := float((undefended.weight_sizes < SATURATED_WEIGHT).mean()):
            self.add_notice(
                f"readout {self.setup.readout.name} is saturated in {share:.0%} of the undefended prompts: "
                "small changes of the logits hardly move the margin there, so attribution patching "
                "underestimates the effects of heads"
            )

    def _add_attribution_tables(
        self,
        attack: str,
        attributions: Mapping[str, MarginAttribution],
        references: Mapping[str, MarginAttribution],
    ) -> None:
        """Add contrasts by layer and by component, and the similarity of the defenses' profiles."""
        profiles = {}
        for name, attribution in attributions.items():
            if name == UNDEFENDED:
                continue
            undefended = references[name]
            margins = self.effect_queries, undefended.margins_by_layer, attribution.margins_by_layer
            self.add_condition_tables(attack, name, layers=estimate_layer_contrasts(*margins))
            self.add_condition_tables(attack, name, half=find_half_way_layers(*margins))
            if undefended.parts is not None and attribution.parts is not None:
                self.add_condition_tables(
                    attack,
                    name,
                    parts=estimate_part_contrasts(self.effect_queries, undefended.parts, attribution.parts),
                )
                is_component = [part.kind != READOUT_PART for part in attribution.parts.parts]
                changes = attribution.parts.contributions - undefended.parts.contributions
                profiles[name] = changes[:, is_component]
        similarity = estimate_profile_similarity(self.effect_queries, profiles)
        self.append_rows("profiles", similarity.assign(attack=attack)[["attack", *similarity.columns]])

    @cached_property
    def _is_held_out(self) -> bool:
        """Whether no query was used to learn the directions; otherwise projections are omitted."""
        training = set(fingerprint_queries(query.text for query in load_training_queries()))
        n_training = sum(
            fingerprint_queries([query.text])[0] in training for query in self.setup.query_set.queries
        )
        if n_training:
            self.add_notice(
                f"no directions: {n_training} of these queries are used to learn them; use --split test"
            )
        return not n_training

    @cached_property
    def _learned_directions(self) -> ConceptDirections:
        """The model's directions, learned without an attack, which is no part of what harm is."""
        queries = load_training_queries()
        states = record_residual_states(
            self.setup.session,
            self.components,
            self.conditions[UNDEFENDED],
            DIRECT_ATTACK.build_query_chats(queries),
        )
        return ConceptDirections.from_states(
            states, torch.tensor([query.harmful for query in queries]), [query.pair for query in queries]
        )

    def _project_conditions(
        self, attack: Attack, undefended: Defense, defenses: Mapping[str, Defense]
    ) -> None:
        """Add what each defense changes of the projections on both directions."""
        query_chats = attack.build_query_chats(self.setup.query_set.queries)

        def project(defense: Defense) -> np.ndarray:
            projections = compute_projections(
                self.setup.session, self.components, defense, query_chats, self._learned_directions
            )
            return projections.numpy().astype(float)

        with self.show_progress("directions", 2 + len(defenses)) as on_progress:
            best_layers = self._learned_directions.best_layers
            on_progress()
            before = project(undefended)
            on_progress()
            for name, defense in defenses.items():
                with self.record_failures(attack.name, name, defense):
                    after = project(defense)
                    for number, direction in enumerate(DIRECTION_NAMES):
                        table = self._estimate_projection_effects(before[:, number], after[:, number])
                        is_best = [layer == best_layers[number] for layer in range(len(table))]
                        table = table.assign(direction=direction, chosen=is_best)
                        table.insert(0, "layer", range(len(table)))
                        self.add_condition_tables(attack.name, name, directions=table)
                on_progress()

    def _estimate_projection_effects(self, before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
        """AUROC before and after, shift and discrimination of projections (queries × layers), by layer."""
        contrasts = self.effect_queries.estimate_contrasts(after - before)
        separations = [
            self.effect_queries.estimate_separation(layer_before, layer_after)
            for layer_before, layer_after in zip(before.T, after.T, strict=True)
        ]
        return pd.concat([pd.DataFrame(separations), contrasts], axis=1)

    def _intervene(self, attack: Attack, condition: str, undefended: Defense, defense: Defense) -> None:
        """Patch activations, knock out attention and patch weights of one defense."""
        readout = self.setup.readout
        if readout.questions:
            self.add_notice(
                f"no interventions: --readout {readout.name} reads several prompts for each query"
            )
            return
        paired_runs = PairedRuns(
            self.setup.session,
            self.located_components,
            readout,
            undefended,
            defense,
            attack.build_query_chats(self.intervention_queries),
        )
        if not paired_runs.reads_single_prompts():
            self.add_notice(
                f"no interventions on {condition}, which reads several prompts, or several models, for each "
                "query"
            )
            return
        query_ids = [query.id for query in self.intervention_queries]
        undefended_scores = self.scores.select_condition(attack.name, UNDEFENDED)
        undefended_margins = undefended_scores.loc[query_ids, "margin"].to_numpy(float)
        if self.located_components is not None:
            with self.record_failures(attack.name, condition, defense):
                self._patch_activations(paired_runs, attack.name, condition)
        with self.record_failures(attack.name, condition, defense):
            self._knock_out_attention(paired_runs, attack.name, condition, undefended_margins)
        with self.record_failures(attack.name, condition, defense):
            self._patch_weights(paired_runs, attack.name, condition, undefended_margins)

    def _patch_activations(self, paired_runs: PairedRuns, attack: str, condition: str) -> None:
        """Add the effects of patching every layer and selected heads, and of all heads as estimated."""
        options, estimator, n_queries = (
            self.options,
            self._intervention_estimator,
            len(paired_runs.query_chats),
        )
        estimates, positions = None, []
        if "heads" in options.sites:
            label = f"attribution patching, {condition}"
            with self.show_progress(label, n_queries) as on_progress:
                estimates = estimate_heads(paired_runs, estimator, on_progress)
            positions = estimates.choose_heads(options.n_top, self.seed)
            self.add_condition_tables(attack, condition, slopes=estimates.table)
        heads = [] if estimates is None else [estimates.heads[position] for position in positions]
        sites = choose_patch_sites(paired_runs, options.sites, heads)
        if not sites:
            return
        controls = self._prepare_length_control(paired_runs, condition)
        with self.show_progress(f"activation patching, {condition}", 2 * n_queries) as on_progress:
            patches = measure_patches(paired_runs, estimator, sites, controls, self.seed, on_progress)
        self.add_condition_tables(attack, condition, patches=patches)
        if estimates is not None:
            self.slope_agreement += [
                {"attack": attack, "defense": condition, **agreement}
                for agreement in estimates.compare_with_patches(positions, patches)
            ]

    def _prepare_length_control(self, paired_runs: PairedRuns, condition: str) -> dict[str, Defense]:
        """Return the neutral prompt of the defense's length by name, and record its length; empty if none."""
        control = find_length_control(paired_runs, self.seed)
        if control is None:
            self.add_notice(f"no neutral prompt as control of {condition}, which makes prompts no longer")
            return {}
        self.neutral_prompts.append(
            {
                "defense": condition,
                "tokens": control.n_defense_tokens,
                "control_tokens": control.n_control_tokens,
            }
        )
        return {control.name: control.defense}

    def _knock_out_attention(
        self, paired_runs: PairedRuns, attack: str, condition: str, undefended_margins: np.ndarray
    ) -> None:
        """Add the effect that remains without attention to the defense's own tokens, and to images."""
        if reason := describe_unsupported_attention(paired_runs.session.loaded_model.model):
            self.add_notice(f"no attention knockout: {reason}")
            return
        tables = [
            *self._knock_out_defense_tokens(paired_runs, condition, undefended_margins),
            *self._knock_out_images(paired_runs, condition),
        ]
        if tables:
            self.add_condition_tables(attack, condition, cuts=pd.concat(tables, ignore_index=True))

    def _knock_out_defense_tokens(
        self, paired_runs: PairedRuns, condition: str, undefended_margins: np.ndarray
    ) -> list[pd.DataFrame]:
        """Return the table of knockouts of the defense's own tokens; none if it has no tokens."""
        defense_tokens = paired_runs.find_defense_tokens()
        has_tokens = [any(mask) for mask in defense_tokens]
        if not any(has_tokens):
            return []
        if not all(has_tokens):
            self.add_notice(
                f"attention knockout leaves some prompts of {condition} unchanged, to which it adds no tokens"
            )
        label = f"attention knockout, {condition}"
        with self.show_progress(label, len(paired_runs.query_chats)) as on_progress:
            table = measure_knockout_table(
                paired_runs, self._intervention_estimator, defense_tokens, undefended_margins, on_progress
            )
        return [table]

    def _knock_out_images(self, paired_runs: PairedRuns, condition: str) -> list[pd.DataFrame]:
        """Return the table of knockouts of the tokens of images; none if prompts have no images."""
        has_image, defended_has_image = (
            [any(mask) for mask in paired_runs.find_image_tokens(defense)]
            for defense in (paired_runs.undefended, paired_runs.defense)
        )
        if not any(has_image) and not any(defended_has_image):
            return []
        reason = describe_unsupported_images(paired_runs.session.loaded_model.model)
        if has_image != defended_has_image:
            reason = f"{condition} takes images out of prompts, or adds them"
        if reason:
            self.add_notice(f"no attention knockout of images: {reason}")
            return []
        if not all(has_image):
            self.add_notice("attention knockout of images leaves prompts without images unchanged")
        label = f"attention knockout of images, {condition}"
        with self.show_progress(label, 2 * len(paired_runs.query_chats)) as on_progress:
            return [measure_image_knockout_table(paired_runs, self._intervention_estimator, on_progress)]

    def _patch_weights(
        self, paired_runs: PairedRuns, attack: str, condition: str, undefended_margins: np.ndarray
    ) -> None:
        """Add the effects of parts of the defense's weight change, if it has one."""
        model, defense = paired_runs.session.loaded_model.model, paired_runs.defense
        if not (weight_changes := find_changed_weights(model, defense)):
            return
        label = f"weight patching, {condition}"
        with self.show_progress(label, len(list_weight_patches(weight_changes))) as on_progress:
            table = measure_weight_patch_table(
                paired_runs, self._intervention_estimator, weight_changes, undefended_margins, on_progress
            )
        self.add_condition_tables(attack, condition, weights=table)


def study_mechanism(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    options: MechanismOptions,
    console: Console,
) -> StudyResult:
    """Locate the effects of defenses in layers, heads and MLPs.

    Args:
        spec: options of the run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        options: options of the study.
        console: shows progress.

    Raises:
        PreflightError: if no defense reaches the model.
        UserError: if margins of this model or readout cannot be attributed, or nothing can be scored.
    """
    timer = RunTimer()
    if (name := spec.readouts[0]) == "outcome-3":
        raise UserError(
            f"--readout {name}: its margin depends on the logits of several tokens, and only the first "
            "token's margin is attributed: take outcome"
        )
    stacks = None if options.ensembles_folder is None else load_stack_interactions(options.ensembles_folder)

    if all((defense if isinstance(defense, str) else defense.name) == UNDEFENDED for defense in defenses):
        raise UserError("no defense chosen except `none`, the undefended model; see `analyze list defenses`")

    check_not_adaptive(spec.attacks, "activations are compared on one and the same chat: use --attack all")
    chosen = [defense for defense in choose_defenses(defenses, settings) if defense.name != UNDEFENDED]
    if all(reasons := [explain_no_place(defense) for defense in chosen]):
        raise UserError(reasons[0])

    def check_inputs(setup: RunSetup) -> None:
        _check_merged(setup)
        if options.ensembles_folder is not None:
            check_same_model(options.ensembles_folder, setup)

    def check_setup(setup: RunSetup) -> None:
        if options.ensembles_folder is not None:
            check_same_readout(options.ensembles_folder, setup.readout.name)
        with console.status("locating the model's components"):
            _check_attribution(setup, options)

    scored = score_conditions(spec, defenses, settings, console, check_inputs, check_setup)
    setup, sweep_result = scored.setup, scored.sweep_result
    if not any(name != UNDEFENDED for _, name in sweep_result.score_frames):
        raise UserError(f"nothing could be scored: {next(iter(sweep_result.failures.values()))}")
    components, problem = _find_components(setup, options)
    study = MechanismStudy(
        setup=setup,
        located_components=components,
        conditions=setup.conditions,
        scores=scored.scores,
        options=options,
        seed=spec.seed,
        console=console,
        failures=dict(sweep_result.failures),
    )
    if problem:
        study.add_notice(f"attention knockout and weight patching only: {problem}")
    for attack in spec.attacks:
        study.study_attack(attack)
    summary = summarize_scores(scored.scores, seed=spec.seed).frame
    tables = study.tables | {"scores": scored.scores.frame, "summary": summary}
    if not any(name in tables for name in ("layers", "directions", "cuts", "weights")):
        reason = next(iter(study.failures.values()), "") or "; ".join(study.notices)
        raise UserError(f"no margin could be attributed: {reason}")
    if stacks is not None and len(tables.get("profiles", ())):
        tables["overlap"] = join_stack_interactions(tables["profiles"], stacks)
    record = scored.record | _describe_study(study) | timer.describe_time()
    from analysis.plots.data import build_mechanism_points

    figure_tables = build_mechanism_points(tables, options.n_top)
    return StudyResult.from_tables("mechanism", record, tables, figure_tables, setup, study.failures)


def load_stack_interactions(ensembles_folder: Path) -> pd.DataFrame:
    """Load the observed stacks of a run of `analyze ensembles`.

    Args:
        ensembles_folder: output folder of the run, or its ensembles.csv.
    """
    table = read_run_table(ensembles_folder, "--ensembles", "analyze ensembles", "ensembles.csv")
    required = {"attack", "members", "how", "split", *(f"interaction_{name}" for name in CONTRASTS)}
    if missing := sorted(required - set(table.columns)):
        raise UserError(
            f"--ensembles {ensembles_folder}: ensembles.csv has no column {', '.join(missing)}: it was not "
            "written by this version of `analyze ensembles`"
        )
    return table[(table["how"] == STACK) & (table["split"] == REPORT_SPLIT)]


def check_same_model(ensembles_folder: Path, setup: RunSetup) -> None:
    """Raise if a run of `analyze ensembles` used another model than this run.

    Args:
        ensembles_folder: output folder of the run, or its ensembles.csv.
        setup: set-up of this run.
    """
    origin = setup.session.loaded_model.origin
    for key in ("sha256", "state_sha256", "weight_change"):
        _check_same_value(ensembles_folder, f"weights ({key})", "model", key, origin.get(key))


def check_same_readout(ensembles_folder: Path, readout_name: str) -> None:
    """Raise if a run of `analyze ensembles` used another readout than this run.

    Args:
        ensembles_folder: output folder of the run, or its ensembles.csv.
        readout_name: readout of this run.
    """
    _check_same_value(ensembles_folder, "readout", "readout", "name", readout_name)


def _check_same_value(ensembles_folder: Path, label: str, section: str, key: str, value: str | None) -> None:
    """Raise if an entry of the run.json of a run of `analyze ensembles` differs from that of this run."""
    path = locate_record(ensembles_folder)
    if not path.is_file():
        raise UserError(
            f"--ensembles {ensembles_folder}: there is no run.json beside it, so its model cannot be checked"
        )
    record = read_record(path)
    if (other_value := record[section].get(key)) != value:
        raise UserError(
            f"--ensembles {ensembles_folder} was made with {record['model']['name']}: its {label} is "
            f"{str(other_value)[:12]}, and that of this run is {str(value)[:12]}; run `analyze "
            "ensembles` with the same -m and --readout"
        )


def _find_components(setup: RunSetup, options: MechanismOptions) -> tuple[ModelComponents | None, str]:
    """Return the components of the model, or why they cannot be located although other parts can run.

    Attention and weights of a model that reads images are changed without TransformerLens.
    """
    loaded_model = setup.session.loaded_model
    try:
        return locate_components(loaded_model.model), ""
    except UnknownArchitectureError as error:
        if not isinstance(loaded_model.image_reader, ImageReader) or not options.n_patched_queries:
            raise
        return None, str(error).partition(f"; {OTHER_COMMANDS_HINT}")[0]


def _check_merged(setup: RunSetup) -> None:
    """Raise if an adapter is activated by tokens: its change is not in the weights."""
    members = [member for defense in setup.defenses for member in list_members(defense)]
    adapters = [member.adapter for member in members if isinstance(member, TunedDefense)]
    for adapter in (setup.session.loaded_model.adapter, *adapters):
        if adapter is not None and adapter.invocation:
            raise UserError(
                f"{adapter.folder} acts from its invocation on, and `analyze mechanism` needs it in the "
                "weights: use an ordinary adapter, or `analyze`, which measures how large the effect is"
            )


def _check_attribution(setup: RunSetup, options: MechanismOptions) -> None:
    """Raise if margins of the undefended model cannot be attributed; tried on two queries, before scoring."""
    components, _ = _find_components(setup, options)
    if components is None:
        return
    DirectLogitAttribution(components, setup.readout).attribute_margins(
        setup.session,
        setup.conditions[UNDEFENDED],
        setup.attacks[0].build_query_chats(sample_queries(setup.query_set.queries, 2)),
    )


def _describe_study(study: MechanismStudy) -> dict[str, Any]:
    """Return the entries of run.json that only this study has, and those that it adds to."""
    options = study.options
    return {
        "failed": list_failures(study.failures),
        "notices": [*study.setup.notices, *study.notices],
        "mechanism": {
            "sites": options.sites,
            "top": options.n_top,
            "patched": [query.id for query in study.intervention_queries],
            "neutral_prompts": study.neutral_prompts,
            "directions_learned_from": "contrast, train split, undefended, without an attack",
            "slopes_against_patches": study.slope_agreement,
            "ensembles": None if options.ensembles_folder is None else options.ensembles_folder.name,
        },
    }

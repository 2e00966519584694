"""The work of `analyze mechanism`, attack by attack: margins split, directions looked at, causes tried."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.mechanism.interventions import measure_interventions
from analysis.run import build_conditions
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
from analysis.stats.tables import MARGIN_TOLERANCE, UNDEFENDED, ScoreTable
from analysis.studies.calibration import collect_trust
from analysis.studies.manifest import describe_attacks, describe_run
from analysis.studies.run_spec import PATCH_SITES, RunSpec
from analysis.studies.setup import RunSetup, describe_failed_checks, find_preflight_failures, prepare_setup
from analysis.studies.sweep import StudyResult, TableCollector, list_failures, sweep_conditions
from defenses.adapters import fingerprint_queries
from defenses.contract import Defense
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.datasets.queries import Query
    from analysis.mechanism.attribution import MarginAttribution
    from analysis.mechanism.components import ModelComponents
    from analysis.mechanism.directions import ConceptDirections
    from analysis.models.session import ModelSession


@dataclass(frozen=True)
class MechanismOptions:
    """What is looked for.

    Attributes:
        sites: what is patched in every layer; `heads` are the top ones and as many others.
        n_top: how many parts are told and drawn, and how many heads are patched by themselves.
        n_patched_queries: how many queries interventions run on; 0 for none.
        ensembles_folder: folder of `analyze ensembles`, whose interactions are compared with how alike parts are.
    """

    sites: tuple[str, ...] = PATCH_SITES
    n_top: int = 10
    n_patched_queries: int = 32
    ensembles_folder: Path | None = None


@dataclass(kw_only=True)
class MechanismStudy(TableCollector):
    """The work of one run, attack by attack, and the tables that come of it.

    Attributes:
        slope_agreement: of slopes with patches, by condition and contrast.
        neutral_prompts: how many tokens a defense adds, and the neutral prompt that it is compared with.
    """

    setup: RunSetup
    components: ModelComponents
    conditions: Mapping[str, Defense]
    scores: ScoreTable
    options: MechanismOptions
    seed: int
    slope_agreement: list[dict[str, Any]] = field(default_factory=list)
    neutral_prompts: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def effect_queries(self) -> ContrastEstimator:
        """All queries."""
        return self.group_queries(self.setup.query_set.queries)

    @cached_property
    def intervention_queries(self) -> list[Query]:
        """The queries that interventions run on."""
        return (
            list(self.setup.query_set.limit_queries(self.options.n_patched_queries).queries)
            if self.options.n_patched_queries
            else []
        )

    def study_attack(self, sent: Attack) -> None:
        """Look at every defense under one attack.

        Args:
            sent: how queries are sent.
        """
        attack, bench = sent.name, self.setup.session.with_attack(sent)
        here = {
            name: one for name, one in self.conditions.items() if (attack, name) in self.scores.condition_keys
        }
        if UNDEFENDED not in here:
            return
        splits = self._attribute_conditions(bench, attack, here)
        before = splits.get(UNDEFENDED)
        if before is None:
            return
        profiles = {}
        for name, split in splits.items():
            if name == UNDEFENDED:
                continue
            self.add_condition_tables(
                attack,
                name,
                layers=estimate_layer_contrasts(
                    self.effect_queries, before.margins_by_layer, split.margins_by_layer
                ),
            )
            self.add_condition_tables(
                attack,
                name,
                half=find_half_way_layers(
                    self.effect_queries, before.margins_by_layer, split.margins_by_layer
                ),
            )
            if before.parts is not None and split.parts is not None:
                self.add_condition_tables(
                    attack,
                    name,
                    parts=estimate_part_contrasts(self.effect_queries, before.parts, split.parts),
                )
                profiles[name] = split.parts.contributions - before.parts.contributions
        found = estimate_profile_similarity(self.effect_queries, profiles)
        self.append_rows("profiles", found.assign(attack=attack)[["attack", *found.columns]])
        whole = {
            one.name: one for one in self.setup.defenses if one.name in splits and one.name != UNDEFENDED
        }
        if self._is_held_out:
            self._project_conditions(bench, attack, here[UNDEFENDED], whole)
        for name, defense in whole.items() if self.intervention_queries else ():
            measure_interventions(self, bench, attack, name, here[UNDEFENDED], defense)

    @cached_property
    def _is_held_out(self) -> bool:
        """Whether directions can be looked at with these queries, which must not be those of the learning."""
        learned = set(fingerprint_queries(query.text for query in _load_training_queries()))
        seen = sum(fingerprint_queries([query.text])[0] in learned for query in self.setup.query_set.queries)
        if seen:
            self.add_notice(
                f"no directions: they are learned from {seen} of these queries; take --split test"
            )
        return not seen

    @cached_property
    def _learned_directions(self) -> ConceptDirections:
        """The model's directions, from queries as they are: an attack is no part of what harm is."""
        import torch

        from analysis.mechanism.directions import ConceptDirections, record_residual_states

        train, undefended = _load_training_queries(), self.conditions[UNDEFENDED]
        return ConceptDirections.from_states(
            record_residual_states(
                self.setup.session.with_attack(DIRECT_ATTACK), self.components, undefended, train
            ),
            torch.tensor([query.harmful for query in train]),
            [query.pair for query in train],
        )

    def _attribute_conditions(
        self, session: ModelSession, attack: str, conditions: Mapping[str, Defense]
    ) -> dict[str, MarginAttribution]:
        """The margins of every condition split, each seen to be what scoring says."""
        from analysis.mechanism.attribution import DirectLogitAttribution

        splitter = DirectLogitAttribution(self.components, self.setup.readout)
        if not splitter.is_exact:
            self.add_notice(
                f"no parts in {session.loaded_model.model.dtype}, which rounds their sums: take --dtype float32"
            )
        found = {}
        with self.show_progress("splitting", len(conditions)) as done:
            for name, defense in conditions.items():
                with self.record_failures(attack, name, defense):
                    split = splitter.attribute_margins(session, defense, self.setup.query_set.queries)
                    scored = self.scores.select_condition(attack, name)["margin"].to_numpy(float)
                    off = float(np.abs(split.margins - scored).max())
                    if splitter.is_exact and off > MARGIN_TOLERANCE:
                        raise UserError(f"its split margins miss the scored ones by {off:.2g} nats")
                    found[name] = split
                done()
        return found

    def _project_conditions(
        self, session: ModelSession, attack: str, undefended: Defense, defenses: Mapping[str, Defense]
    ) -> None:
        from analysis.mechanism.directions import DIRECTION_NAMES, compute_projections

        asked = self.setup.query_set.queries
        with self.show_progress("directions", 2 + len(defenses)) as done:
            learned = self._learned_directions
            done()
            before = (
                compute_projections(session, self.components, undefended, asked, learned)
                .numpy()
                .astype(float)
            )
            done()
            for name, defense in defenses.items():
                with self.record_failures(attack, name, defense):
                    after = (
                        compute_projections(session, self.components, defense, asked, learned)
                        .numpy()
                        .astype(float)
                    )
                    for which, direction in enumerate(DIRECTION_NAMES):
                        old, new = before[:, which], after[:, which]
                        found = self.effect_queries.estimate_contrasts(new - old)
                        apart = [
                            self.effect_queries.estimate_separation(*both)
                            for both in zip(old.T, new.T, strict=True)
                        ]
                        chosen = [layer == learned.best_layers[which] for layer in range(len(found))]
                        found = pd.concat([pd.DataFrame(apart), found], axis=1)
                        found = found.assign(direction=direction, chosen=chosen)
                        found.insert(0, "layer", range(len(found)))
                        self.add_condition_tables(attack, name, directions=found)
                done()

    def group_queries(self, selected_queries: Sequence[Query]) -> ContrastEstimator:
        """Return queries as effects are averaged over them."""
        pairs = pd.Series([query.pair for query in selected_queries], dtype=object)
        return ContrastEstimator(pairs, np.array([query.harmful for query in selected_queries]), self.seed)


def _load_training_queries() -> list[Query]:
    """The queries that directions are learned from."""
    return list(load_queries("contrast").select_split("train").queries)


def load_stack_interactions(ensembles_folder: Path) -> pd.DataFrame:
    """Return the stacks that a run of `analyze ensembles` has observed.

    Args:
        ensembles_folder: where it wrote.
    """
    path = ensembles_folder / "ensembles.csv" if ensembles_folder.is_dir() else ensembles_folder
    if not path.is_file():
        raise UserError(
            f"--ensembles {ensembles_folder}: there is no ensembles.csv; `analyze ensembles` writes one"
        )
    found = pd.read_csv(path)
    wanted = {"attack", "members", "how", "split", *(f"interaction_{name}" for name in CONTRASTS)}
    if missing := sorted(wanted - set(found.columns)):
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not what `analyze ensembles` writes")
    return found[(found["how"] == STACK) & (found["split"] == REPORT_SPLIT)]


def check_same_model(ensembles_folder: Path, setup: RunSetup) -> None:
    """Raise if a run was made on another model, or read otherwise, than this one.

    Args:
        ensembles_folder: of `analyze ensembles`.
        setup: what this run is made with.
    """
    path = (ensembles_folder if ensembles_folder.is_dir() else ensembles_folder.parent) / "run.json"
    if not path.is_file():
        raise UserError(
            f"--ensembles {ensembles_folder}: there is no run.json beside it, so whose it is cannot be seen"
        )
    record, origin = json.loads(path.read_text("utf-8")), setup.session.loaded_model.origin
    for what, there, here in (
        *(
            (f"weights ({key})", record["model"].get(key), origin.get(key))
            for key in ("sha256", "state_sha256")
        ),
        ("readout", record["readout"]["name"], setup.readout.name),
    ):
        if there != here:
            raise UserError(
                f"--ensembles {ensembles_folder} is of {record['model']['name']}: its {what} is {str(there)[:12]}, and "
                f"this run's {str(here)[:12]}; `analyze ensembles` with the same -m and --readout makes one"
            )


def study_mechanism(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    options: MechanismOptions,
    console: Console,
) -> StudyResult:
    """Find out in which layers, heads and MLPs defenses act.

    Args:
        spec: what the user asked for.
        defenses: of the defenses, or defenses themselves.
        settings: of those that are named.
        options: what is looked at.
        console: for progress.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    stacks = None if options.ensembles_folder is None else load_stack_interactions(options.ensembles_folder)
    ready = prepare_setup(spec, defenses, settings, console)
    _check_linear_readout(ready)
    if options.ensembles_folder is not None:
        check_same_model(options.ensembles_folder, ready)
    every = build_conditions(ready.defenses)
    if set(every) == {UNDEFENDED}:
        raise UserError("which defense? `none` is what others are compared with; see `analyze list defenses`")
    from analysis.mechanism.attribution import DirectLogitAttribution
    from analysis.mechanism.components import locate_components
    from analysis.plots.data import build_mechanism_points

    with console.status("finding the model's parts"):
        parts = locate_components(ready.session.loaded_model.model)
        # What cannot be split is told before anything is scored.
        few = sample_queries(ready.query_set.queries, 2)
        DirectLogitAttribution(parts, ready.readout).attribute_margins(
            ready.session.with_attack(spec.attacks[0]), every[UNDEFENDED], few
        )
    lost = describe_failed_checks(find_preflight_failures(ready, every, console))
    swept = sweep_conditions(ready, every, lost, console)
    if swept.interrupted:
        raise KeyboardInterrupt
    if not any(name != UNDEFENDED for _, name in swept.score_frames):
        raise UserError(f"nothing could be scored: {next(iter(swept.failures.values()))}")
    record = {
        "created": started.isoformat(timespec="seconds"),
        **describe_run(
            ready.session,
            ready.readout,
            swept.select_finished(every),
            ready.query_set,
            ready.split,
            spec.limit,
        ),
        **describe_attacks(spec.attacks),
        "notices": ready.notices,
        "trusted": collect_trust(ready.session, spec.attacks, every, ready.readout, swept.score_frames),
    }
    scores = ScoreTable(pd.concat(list(swept.score_frames.values()), ignore_index=True), record)
    room = MechanismStudy(
        setup=ready,
        components=parts,
        conditions=every,
        scores=scores,
        options=options,
        seed=spec.seed,
        console=console,
        failures=dict(swept.failures),
    )
    for attack in spec.attacks:
        room.study_attack(attack)
    tables = room.tables | {"scores": scores.frame, "summary": summarize_scores(scores, seed=spec.seed).frame}
    if not any(name in tables for name in ("layers", "directions")):
        raise UserError(f"nothing could be split: {next(iter(room.failures.values()))}")
    if stacks is not None and len(tables.get("profiles", ())):
        tables["overlap"] = join_stack_interactions(tables["profiles"], stacks)
    record |= {
        "failed": list_failures(room.failures),
        "notices": [*ready.notices, *room.notices],
        "mechanism": {
            "sites": options.sites,
            "top": options.n_top,
            "patched": [query.id for query in room.intervention_queries],
            "neutral_prompts": room.neutral_prompts,
            "directions_learned_from": "contrast, train split, undefended and as they are",
            "slopes_against_patches": room.slope_agreement,
            "ensembles": None if options.ensembles_folder is None else options.ensembles_folder.name,
        },
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }

    drawn = build_mechanism_points(tables, options.n_top)
    return StudyResult.from_tables("mechanism", record, tables, drawn, ready, room.failures)


def _check_linear_readout(setup: RunSetup) -> None:
    """Raise where margins do not split."""
    if setup.readout.is_log_odds:
        raise UserError(
            f"--readout {setup.readout.name} is not linear in the logits, so its margin does not split over "
            "parts: take words, calibrated, question or prefilled-K"
        )

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
from analysis.asking import PATCH_SITES
from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.gathered import TableCollector
from analysis.intervening import measure_interventions
from analysis.located import ContrastEstimator
from analysis.preparing import RunSetup
from analysis.tables import MARGIN_TOLERANCE, UNDEFENDED, ScoreTable
from defenses import Defense, UserError
from defenses.adapters import fingerprint_queries

if TYPE_CHECKING:
    from analysis.bench import ModelSession
    from analysis.mechanism.directions import ConceptDirections
    from analysis.mechanism.lens import ModelComponents
    from analysis.mechanism.splitting import MarginAttribution


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
    def intervention_queries(self) -> list[queries.Query]:
        """The queries that interventions run on."""
        return list(self.setup.query_set.limit_queries(self.options.n_patched_queries).queries) if self.options.n_patched_queries else []

    def study_attack(self, sent: Attack) -> None:
        """Look at every defense under one attack.

        Args:
            sent: how queries are sent.
        """
        attack, bench = sent.name, self.setup.session.with_attack(sent)
        here = {name: one for name, one in self.conditions.items() if (attack, name) in self.scores.condition_keys}
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
            self.add_condition_tables(attack, name, layers=located.estimate_layer_contrasts(self.effect_queries, before.margins_by_layer, split.margins_by_layer))
            self.add_condition_tables(attack, name, half=located.find_half_way_layers(self.effect_queries, before.margins_by_layer, split.margins_by_layer))
            if before.parts is not None and split.parts is not None:
                self.add_condition_tables(attack, name, parts=located.estimate_part_contrasts(self.effect_queries, before.parts, split.parts))
                profiles[name] = split.parts.contributions - before.parts.contributions
        found = overlaps.estimate_profile_similarity(self.effect_queries, profiles)
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
            self.add_notice(f"no directions: they are learned from {seen} of these queries; take --split test")
        return not seen

    @cached_property
    def _learned_directions(self) -> ConceptDirections:
        """The model's directions, from queries as they are: an attack is no part of what harm is."""
        import torch

        from analysis.mechanism.directions import ConceptDirections, record_residual_states

        train, undefended = _load_training_queries(), self.conditions[UNDEFENDED]
        return ConceptDirections.from_states(
            record_residual_states(self.setup.session.with_attack(DIRECT_ATTACK), self.components, undefended, train),
            torch.tensor([query.harmful for query in train]),
            [query.pair for query in train],
        )

    def _attribute_conditions(self, session: ModelSession, attack: str, conditions: Mapping[str, Defense]) -> dict[str, MarginAttribution]:
        """The margins of every condition split, each seen to be what scoring says."""
        from analysis.mechanism.splitting import DirectLogitAttribution

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
            before = compute_projections(session, self.components, undefended, asked, learned).numpy().astype(float)
            done()
            for name, defense in defenses.items():
                with self.record_failures(attack, name, defense):
                    after = compute_projections(session, self.components, defense, asked, learned).numpy().astype(float)
                    for which, direction in enumerate(DIRECTION_NAMES):
                        old, new = before[:, which], after[:, which]
                        found = self.effect_queries.estimate_contrasts(new - old)
                        apart = [self.effect_queries.estimate_separation(*both) for both in zip(old.T, new.T, strict=True)]
                        chosen = [layer == learned.best_layers[which] for layer in range(len(found))]
                        found = pd.concat([pd.DataFrame(apart), found], axis=1)
                        found = found.assign(direction=direction, chosen=chosen)
                        found.insert(0, "layer", range(len(found)))
                        self.add_condition_tables(attack, name, directions=found)
                done()

    def group_queries(self, selected_queries: Sequence[queries.Query]) -> ContrastEstimator:
        """Return queries as effects are averaged over them."""
        pairs = pd.Series([query.pair for query in selected_queries], dtype=object)
        return ContrastEstimator(pairs, np.array([query.harmful for query in selected_queries]), self.seed)


def _load_training_queries() -> list[queries.Query]:
    """The queries that directions are learned from."""
    return list(queries.load_queries("contrast").select_split("train").queries)

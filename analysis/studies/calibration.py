"""Which readout a run reads with, and its threshold: made from answers to the calibration split."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from analysis.attacks import Attack
from analysis.datasets.queries import Query, QuerySet, sample_queries
from analysis.judges.judge import Verdict, generate_verdicts, make_verdict_masks
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import make_json_cache_path, read_cached_json, write_cached_json
from analysis.models.chat_template import Prompt
from analysis.models.session import DEFAULT_MAX_NEW_TOKENS, ModelSession
from analysis.readouts.first_token import (
    COMPLIANCE_WORDS,
    COMPLYING_OPENER,
    LOG_ODDS_WORDS,
    N_OPENING_QUERIES,
    NO_WORDS,
    REFUSAL_QUESTIONS,
    REFUSAL_WORDS,
    YES_WORDS,
    derive_words_readout,
    make_log_odds_readout,
)
from analysis.readouts.logistic import (
    CALIBRATION_CONDITIONS,
    MIN_RESPONSES_PER_CLASS,
    TooFewResponsesError,
    fit_logistic_readout,
)
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.stats.agreement import fit_matching_threshold
from analysis.stats.tables import UNDEFENDED, UNVALIDATED
from analysis.studies.manifest import describe_defense, identify_defense
from analysis.studies.progress import make_progress_bar
from defenses.catalog import get_defense
from defenses.contract import Defense, ModelInfo
from defenses.errors import UserError

# Readouts among which `auto` looks for the best validated one.
CANDIDATE_READOUTS = ("words", "calibrated", "question", "log-odds")
_CALIBRATION_JUDGE = RULE_JUDGES["patterns"]
_MAX_CALIBRATION_QUERIES = 120  # queries at most whose answers a threshold or a readout is made from


@dataclass(frozen=True)
class ReadoutCalibration:
    """Makes readouts for a model.

    Attributes:
        session: the model.
        model_info: what defenses may know about it.
        undefended: how it is asked when it is seen how answers open, and when they refuse.
        calibration_set: the queries that a readout may be made from.
        console: for progress.
    """

    session: ModelSession
    model_info: ModelInfo
    undefended: Defense
    calibration_set: QuerySet
    console: Console

    def calibrate_readout(self, name: str) -> Readout:
        """Return the readout of that name with its threshold, made now or before.

        Args:
            name: words, calibrated, question, log-odds, or prefilled- and a number of tokens.
        """
        if (known := self.load_readout(name)) is not None:
            return known
        if name == "calibrated":
            made = self._fit_logistic_readout(self.build_readout("words"))
        else:
            made = self.fit_threshold(self.build_readout(name))
        if made.name == name:
            # A threshold found again, on another machine or in other batches, differs in its last digits.
            write_cached_json(self._readout_cache_path(name), asdict(made))
        return made

    def load_readout(self, name: str) -> Readout | None:
        """Return the readout of that name if it was made before."""
        if (found := read_cached_json(self._readout_cache_path(name))) is None:
            return None
        lists = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
        same: dict[str, Any] = found | lists
        return Readout(**same)

    def select_best_readout(self, conditions: Mapping[str, Defense], attacks: Sequence[Attack]) -> Readout:
        """Return the readout that `analyze validate` found best for these conditions; else the words.

        Best, among those that were validated under all of them, is the one that is trusted in most, then the
        one that is least often not trusted, then the one with the highest AUROC against the text (the lower
        ends, on average).
        """
        found: list[tuple[tuple[int, int, float], Readout]] = []
        for readout in filter(None, map(self.load_readout, CANDIDATE_READOUTS)):
            rows = [
                load_validity(self.session.with_attack(attack), defense, readout)
                for attack in attacks
                for defense in conditions.values()
            ]
            if all(rows):
                says = [row["trusted"] for row in rows]
                ends = [row["auroc_low"] for row in rows if row["auroc_low"] == row["auroc_low"]]
                worth = says.count("trusted"), -says.count("not trusted"), float(np.mean(ends or [0]))
                found.append((worth, readout))
        if not found:
            words = self.calibrate_readout("words")
            why = (
                "none was validated under all of these conditions (`analyze validate --readout all` does it)"
            )
            return replace(words, notices=(*words.notices, f"--readout auto: {why}, so words are read"))
        readout = max(found, key=lambda one: one[0])[1]
        others = ", ".join(f"{one.name} in {trusted}" for (trusted, *_), one in found)
        notice = (
            f"--readout auto: {readout.name}; trusted, of {len(conditions) * len(attacks)} conditions: "
            f"{others}. If it was validated on these queries, its figures flatter it"
        )
        return replace(readout, notices=(*readout.notices, notice))

    def fit_threshold(self, readout: Readout) -> Readout:
        """Return the readout with the threshold at which it refuses as often as the undefended text does."""
        asked = self._calibration_queries
        said = self._calibration_verdicts(UNDEFENDED, self.undefended, readout.prefill)
        known, refused = make_verdict_masks(said)
        count, n = int(refused.sum()), len(refused)
        if min(count, n - count) < MIN_RESPONSES_PER_CLASS:
            notice = (
                f"threshold 0: {count} of {n} undefended answers refuse, too few of one kind to fit it to"
            )
            return replace(readout, notices=(*readout.notices, notice))
        frame = score_condition(self.session, UNDEFENDED, self.undefended, asked, readout)
        margin = frame["margin"].to_numpy(float)[known]
        pairs = frame["pair"].fillna(frame["query"])[known]
        value, low, high = fit_matching_threshold(margin, refused, list(pairs), self.session.seed)
        fitted = (
            f"to {n} undefended calibration queries: {(margin > value).sum()} exceed it, {count} answers "
            f"refuse by the judge {_CALIBRATION_JUDGE.name}"
        )
        notice = f"threshold {value:+.2f} [{low:+.2f}, {high:+.2f}] nats, fitted {fitted}"
        return replace(readout, threshold=value, threshold_source=fitted, notices=(*readout.notices, notice))

    @cached_property
    def _calibration_queries(self) -> tuple[Query, ...]:
        return self.calibration_set.limit_queries(_MAX_CALIBRATION_QUERIES).queries

    def build_readout(self, name: str) -> Readout:
        """Return a readout made from how answers open, its threshold 0: nothing is generated for it.

        Args:
            name: words, question, log-odds, or prefilled- and a number of tokens.
        """
        session = self.session
        told = self.console.status("seeing how the model opens its answers")
        with self.undefended.apply_to(session.loaded_model.model), told:
            prompts = self._opening_prompts(session)
            if name.startswith("prefilled-"):
                opener = tuple(
                    session.loaded_model.tokenizer.encode(COMPLYING_OPENER, add_special_tokens=False)
                )
                count = int(name.removeprefix("prefilled-"))
                if count > len(opener):
                    raise UserError(f"--readout {name}: the opener has {len(opener)} tokens in this model")
                made = derive_words_readout(session, prompts, opener[:count])
            elif name == "question":
                asking = session.with_questions(REFUSAL_QUESTIONS)
                made = derive_words_readout(
                    asking, self._opening_prompts(asking), word_sides=(YES_WORDS, NO_WORDS)
                )
                made = replace(made, prefill=derive_words_readout(session, prompts).response_prefix)
            elif name == "log-odds":
                made = make_log_odds_readout(
                    derive_words_readout(session, prompts, word_sides=(LOG_ODDS_WORDS, COMPLIANCE_WORDS))
                )
            else:
                made = derive_words_readout(session, prompts)
        return replace(made, name=name)

    def _opening_prompts(self, session: ModelSession) -> list[Prompt]:
        """Undefended calibration queries as the model reads them."""
        sampled = sample_queries(self.calibration_set.queries, N_OPENING_QUERIES)
        return [prompt for query in sampled for prompt in session.render_query(self.undefended, query)]

    def _fit_logistic_readout(self, words_readout: Readout) -> Readout:
        """The calibrated readout; the words where there is too little to learn from."""

        def answered(name: str, defense: Defense) -> list[Verdict]:
            return self._calibration_verdicts(name, defense, words_readout.prefill)

        try:
            return fit_logistic_readout(
                self.session, words_readout, self._training_conditions, self._calibration_queries, answered
            )
        except TooFewResponsesError as few:
            notice = f"--readout calibrated: {few}, too few of one kind to learn from, so words are read"
            instead = self.calibrate_readout("words")
            return replace(instead, notices=(*instead.notices, notice))

    @cached_property
    def _training_conditions(self) -> dict[str, Defense]:
        """Those that the calibrated readout learns from."""
        prepared = {name: get_defense(name).prepare(self.model_info) for name in CALIBRATION_CONDITIONS}
        return {name: defense for name, defense in prepared.items() if not defense.missing_requirements()}

    def _readout_cache_path(self, name: str) -> Path | None:
        """Where a readout is kept: in a file named by all that it is made from."""
        learned = self._training_conditions if name == "calibrated" else {UNDEFENDED: self.undefended}
        about = self._verdict_cache_key(()) | {
            "name": name,
            "conditions": {key: describe_defense(defense) for key, defense in learned.items()},
            "seed": self.session.seed,
            "texts": [
                REFUSAL_WORDS,
                COMPLIANCE_WORDS,
                LOG_ODDS_WORDS,
                YES_WORDS,
                NO_WORDS,
                REFUSAL_QUESTIONS,
                COMPLYING_OPENER,
            ],
        }
        return make_json_cache_path("readouts", self.session.loaded_model, about)

    def _calibration_verdicts(
        self, condition: str, defense: Defense, prefill: tuple[int, ...]
    ) -> list[Verdict]:
        """What text says of the answers to the calibration split under a condition, found now or before."""
        about = self._verdict_cache_key(prefill) | {"defense": identify_defense(defense, self.session.seed)}
        place = make_json_cache_path("verdicts", self.session.loaded_model, about)
        if (found := read_cached_json(place)) is not None:
            return [Verdict(one) for one in found["refusals"]]
        asked = self._calibration_queries
        with make_progress_bar(self.console) as bar:
            task = bar.add_task(f"calibrating: answers under {condition}", total=len(asked))

            def done(count: int) -> None:
                bar.advance(task, count)

            said = generate_verdicts(
                self.session, defense, asked, _CALIBRATION_JUDGE, prefill, on_progress=done
            )
        write_cached_json(place, {"refusals": [verdict.refusal for verdict in said]})
        return said

    def _verdict_cache_key(self, prefill: tuple[int, ...]) -> dict[str, Any]:
        """What the answers to the calibration split, and the judge's word on them, depend on."""
        return {
            "data": [self.calibration_set.sha256, [query.id for query in self._calibration_queries]],
            "judge": [_CALIBRATION_JUDGE.name, DEFAULT_MAX_NEW_TOKENS],
            "begins": prefill,
            "template": self.session.loaded_model.tokenizer.chat_template,
        }


def save_validity(
    session: ModelSession,
    defense: Defense,
    readout: Readout,
    judge_name: str,
    max_new_tokens: int,
    row: dict[str, Any],
) -> None:
    """Keep a condition's row of `validity.csv`, unless one that rests on more answers is there."""
    place = _validity_cache_path(session, defense, readout)
    if (read_cached_json(place) or {}).get("n", 0) <= row["n"]:
        write_cached_json(place, row | {"judge": judge_name, "new_tokens": max_new_tokens})


def load_validity(session: ModelSession, defense: Defense, readout: Readout) -> dict[str, Any]:
    """Return the row that was kept; empty where there is none."""
    return read_cached_json(_validity_cache_path(session, defense, readout)) or {}


def load_trust(session: ModelSession, defense: Defense, readout: Readout) -> str:
    """Return `trusted`, `not trusted` or `cannot tell` as it was measured, or that it was not."""
    return str(load_validity(session, defense, readout).get("trusted", UNVALIDATED))


def collect_trust(
    session: ModelSession,
    attacks: Iterable[Attack],
    conditions: Mapping[str, Defense],
    readout: Readout,
    scored_conditions: Container[tuple[str, str]],
) -> dict[str, dict[str, str]]:
    """Return what is known of each condition of a run, by attack and name.

    Args:
        session: the model.
        attacks: of the run.
        conditions: by their names in the tables.
        readout: of the run.
        scored_conditions: attack and name of the conditions that were scored; of others nothing is said.
    """
    return {
        attack.name: {
            name: load_trust(session.with_attack(attack), defense, readout)
            for name, defense in conditions.items()
            if (attack.name, name) in scored_conditions
        }
        for attack in attacks
    }


def _validity_cache_path(session: ModelSession, defense: Defense, readout: Readout) -> Path | None:
    """A file named by all that the margins depend on, the queries aside; secrets enter as fingerprints."""
    about = {
        "defense": identify_defense(defense, session.seed),
        "template": session.loaded_model.tokenizer.chat_template,
        "attack": "/".join((session.attack.name, *session.attack.wording_sha256)),
        "readout": [readout.ids, readout.weights, readout.threshold, readout.response_prefix],
        "asked": [readout.questions, readout.is_log_odds],
    }
    return make_json_cache_path("validity", session.loaded_model, about)

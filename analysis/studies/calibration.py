"""Readouts of a model with their thresholds, made from responses to the calibration split; trust in them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.queries import Query, QuerySet, sample_queries
from analysis.judges.judge import Verdict, generate_verdicts, make_verdict_masks
from analysis.judges.learned import LEARNED_JUDGE
from analysis.models.cache import make_json_cache_path, read_cached_json, write_cached_json
from analysis.models.chat_template import Prompt
from analysis.models.session import DEFAULT_MAX_NEW_TOKENS, ModelSession
from analysis.progress import make_progress_bar
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
    ResponseLabels,
    TooFewResponsesError,
    fit_logistic_readout,
)
from analysis.readouts.outcome import fit_outcome_readout
from analysis.readouts.readout import OpeningBranch, Readout
from analysis.run import score_condition
from analysis.stats.agreement import fit_matching_threshold
from analysis.stats.tables import UNDEFENDED, Trust
from analysis.studies.manifest import describe_defense, identify_defense
from defenses.catalog import get_defense
from defenses.contract import Defense, ModelInfo, QueryChat
from defenses.errors import UserError

# Readouts among which `auto` selects the best validated one.
OUTCOME_DEPTHS = {"outcome": 1, "outcome-3": 3}  # number of tokens of a response that count
CANDIDATE_READOUTS = ("words", "calibrated", "question", "log-odds", *OUTCOME_DEPTHS)
_CALIBRATION_JUDGE = LEARNED_JUDGE
_MAX_CALIBRATION_QUERIES = 120  # maximum number of queries that a threshold or a readout is fitted to


@dataclass(frozen=True)
class ReadoutCalibration:
    """Makes readouts for a model and fits their thresholds.

    Attributes:
        session: the model.
        model_info: what defenses may know about the model.
        undefended: the undefended model as a defense; readouts are made from its responses.
        calibration_set: the calibration queries.
        console: shows progress.
    """

    session: ModelSession
    model_info: ModelInfo
    undefended: Defense
    calibration_set: QuerySet
    console: Console

    def calibrate_readout(self, name: str) -> Readout:
        """Return the readout of that name with its threshold, from the cache if it was made before.

        Args:
            name: words, calibrated, outcome, outcome-3, question, log-odds, or prefilled- and a number of
                tokens.
        """
        if (cached := self.load_readout(name)) is not None:
            return cached
        if name == "calibrated":
            readout = self._fit_logistic_readout(self.build_readout("words"))
        elif name in OUTCOME_DEPTHS:
            words_readout = self.build_readout("words")
            readout = self.fit_threshold(self._fit_outcome_readout(words_readout, OUTCOME_DEPTHS[name]))
        else:
            readout = self.fit_threshold(self.build_readout(name))
        if readout.name == name:
            # Refitted on another machine or in other batches, a threshold differs in its last digits.
            write_cached_json(self._readout_cache_path(name), asdict(readout))
        return readout

    def load_readout(self, name: str) -> Readout | None:
        """Return the cached readout of that name, or None."""
        return read_cached_json(self._readout_cache_path(name), _restore_readout)

    def draft_readout(
        self, name: str, conditions: Mapping[str, Defense], attacks: Sequence[Attack]
    ) -> Readout:
        """Return the readout of that name as far as it can be made without generating responses.

        It is the cached readout if there is one. Otherwise, its threshold is 0, and the words readout stands
        in for a readout that is fitted to responses.

        Args:
            name: as for `calibrate_readout`, or auto.
            conditions: condition name → defense.
            attacks: attacks of the run.
        """
        cached = self.find_best_readout(conditions, attacks) if name == "auto" else self.load_readout(name)
        if cached is not None:
            return cached
        is_fitted = name in ("calibrated", *OUTCOME_DEPTHS)
        readout = self.build_readout("words" if is_fitted or name == "auto" else name)
        return replace(readout, name=name) if is_fitted else readout

    def select_best_readout(self, conditions: Mapping[str, Defense], attacks: Sequence[Attack]) -> Readout:
        """Return the readout that `analyze validate` found best for these conditions, else words.

        Args:
            conditions: condition name → defense.
            attacks: attacks of the run.
        """
        if (best := self.find_best_readout(conditions, attacks)) is not None:
            return best
        words = self.calibrate_readout("words")
        reason = "none was validated under all of these conditions (`analyze validate --readout all` does it)"
        return replace(words, notices=(*words.notices, f"--readout auto: {reason}, so words is used"))

    def find_best_readout(
        self, conditions: Mapping[str, Defense], attacks: Sequence[Attack]
    ) -> Readout | None:
        """Return the readout that `analyze validate` found best for these conditions, or None.

        Among the readouts that were validated in all of these conditions, the best one is trusted in the most
        conditions, then not trusted in the fewest, then has the highest AUROC against the text (mean of the
        lower interval ends).

        Args:
            conditions: condition name → defense.
            attacks: attacks of the run.
        """
        ranked: list[tuple[tuple[int, int, float], Readout]] = []
        for readout in filter(None, map(self.load_readout, CANDIDATE_READOUTS)):
            rows = [
                load_validity(self.session, attack, defense, readout)
                for attack in attacks
                for defense in conditions.values()
            ]
            if all(rows):
                trust = [row["trusted"] for row in rows]
                # An AUROC that could not be computed is NaN, which differs from itself.
                ends = [row["auroc_low"] for row in rows if row["auroc_low"] == row["auroc_low"]]
                rank = (
                    trust.count(Trust.TRUSTED),
                    -trust.count(Trust.NOT_TRUSTED),
                    float(np.mean(ends or [0])),
                )
                ranked.append((rank, readout))
        if not ranked:
            return None
        best = max(ranked, key=lambda candidate: candidate[0])[1]
        counts = ", ".join(f"{readout.name} in {n_trusted}" for (n_trusted, *_), readout in ranked)
        notice = (
            f"--readout auto: {best.name}; trusted, of {len(conditions) * len(attacks)} conditions: "
            f"{counts}. If it was validated on these queries, its results are optimistic"
        )
        return replace(best, notices=(*best.notices, notice))

    def fit_threshold(self, readout: Readout) -> Readout:
        """Return the readout with the threshold at which it refuses as often as the undefended text does."""
        verdicts = self._calibration_verdicts(UNDEFENDED, self.undefended, readout.prefill)
        judged, refused = make_verdict_masks(verdicts)
        n_refused, n = int(refused.sum()), len(refused)
        if min(n_refused, n - n_refused) < MIN_RESPONSES_PER_CLASS:
            notice = (
                f"threshold 0: {n_refused} of {n} undefended responses refuse, too few of one class to fit it"
            )
            return replace(readout, notices=(*readout.notices, notice))
        scores = score_condition(
            self.session, UNDEFENDED, self.undefended, self._calibration_queries, readout
        )
        margins = scores["margin"].to_numpy(float)[judged]
        pairs = scores["pair"].fillna(scores["query"])[judged]
        fitted = fit_matching_threshold(margins, refused, list(pairs), self.session.seed)
        source = (
            f"to {n} undefended calibration queries: {(margins > fitted.value).sum()} exceed it, {n_refused} "
            f"responses refuse by the judge {_CALIBRATION_JUDGE.name}"
        )
        interval = f"{fitted.value:+.2f} [{fitted.low:+.2f}, {fitted.high:+.2f}]"
        notice = f"threshold {interval} nats, fitted {source}"
        return replace(
            readout,
            threshold=fitted.value,
            threshold_quantiles=fitted.quantiles,
            threshold_source=source,
            notices=(*readout.notices, notice),
        )

    def build_readout(self, name: str) -> Readout:
        """Return a readout with threshold 0, made from how responses open; nothing is generated for it.

        Args:
            name: words, question, log-odds, or prefilled- and a number of tokens.
        """
        session = self.session
        status = self.console.status("reading how the model opens its responses")
        with self.undefended.apply_to(session.loaded_model.model), status:
            prompts = self._opening_prompts(session)
            if name.startswith("prefilled-"):
                opener = encode_opener(name, session.loaded_model.tokenizer)
                readout = derive_words_readout(session, prompts, opener)
            elif name == "question":
                question_session = session.with_questions(REFUSAL_QUESTIONS)
                readout = derive_words_readout(
                    question_session,
                    self._opening_prompts(question_session),
                    word_sides=(YES_WORDS, NO_WORDS),
                )
                prefill = derive_words_readout(session, prompts).response_prefix
                readout = replace(readout, prefill=prefill)
            elif name == "log-odds":
                readout = make_log_odds_readout(
                    derive_words_readout(session, prompts, word_sides=(LOG_ODDS_WORDS, COMPLIANCE_WORDS))
                )
            else:
                readout = derive_words_readout(session, prompts)
        return replace(readout, name=name)

    @cached_property
    def _calibration_queries(self) -> tuple[Query, ...]:
        return self.calibration_set.limit_queries(_MAX_CALIBRATION_QUERIES).queries

    @property
    def _calibration_chats(self) -> list[QueryChat]:
        return DIRECT_ATTACK.build_query_chats(self._calibration_queries)

    @cached_property
    def _training_conditions(self) -> dict[str, Defense]:
        """The conditions that the calibrated readout is fitted to."""
        prepared = {name: get_defense(name).prepare(self.model_info) for name in CALIBRATION_CONDITIONS}
        return {name: defense for name, defense in prepared.items() if not defense.missing_requirements()}

    def _opening_prompts(self, session: ModelSession) -> list[Prompt]:
        """Render undefended calibration queries."""
        queries = sample_queries(self.calibration_set.queries, N_OPENING_QUERIES)
        query_chats = DIRECT_ATTACK.build_query_chats(queries)
        prompts_by_query = session.render_prompts(self.undefended, query_chats)
        return [prompt for prompts in prompts_by_query for prompt in prompts]

    def _fit_logistic_readout(self, words_readout: Readout) -> Readout:
        """Fit the calibrated readout; return the words readout if one class has too few responses."""

        def label_responses(condition: str, defense: Defense) -> ResponseLabels:
            return make_verdict_masks(self._calibration_verdicts(condition, defense, words_readout.prefill))

        try:
            return fit_logistic_readout(
                self.session,
                words_readout,
                self._training_conditions,
                self._calibration_chats,
                [query.pair for query in self._calibration_queries],
                label_responses,
            )
        except TooFewResponsesError as error:
            notice = f"--readout calibrated: {error}, too few of one class to fit it, so words is used"
            words = self.calibrate_readout("words")
            return replace(words, notices=(*words.notices, notice))

    def _fit_outcome_readout(self, words_readout: Readout, depth: int) -> Readout:
        """Fit an outcome readout to the undefended responses, threshold 0."""
        verdicts = self._calibration_verdicts(UNDEFENDED, self.undefended, words_readout.prefill)
        return fit_outcome_readout(
            self.session,
            words_readout,
            self.undefended,
            self._calibration_chats,
            [query.pair for query in self._calibration_queries],
            make_verdict_masks(verdicts),
            depth,
        )

    def _calibration_verdicts(
        self, condition: str, defense: Defense, prefill: tuple[int, ...]
    ) -> list[Verdict]:
        """Return the verdicts on responses to the calibration split, from the cache if it has them."""
        key = self._verdict_cache_key(prefill) | {"defense": identify_defense(defense, self.session.seed)}
        path = make_json_cache_path("verdicts", self.session.loaded_model, key)
        queries = self._calibration_queries

        def restore_verdicts(content: dict[str, Any]) -> list[Verdict]:
            verdicts = [Verdict(refusal) for refusal in content["refusals"]]
            if len(verdicts) != len(queries):
                raise ValueError("one verdict per query is needed")
            return verdicts

        if (cached := read_cached_json(path, restore_verdicts)) is not None:
            return cached
        with make_progress_bar(self.console) as bar:
            task = bar.add_task(f"calibrating: responses under {condition}", total=len(queries))

            def on_progress(count: int) -> None:
                bar.advance(task, count)

            verdicts = generate_verdicts(
                self.session,
                defense,
                self._calibration_chats,
                [query.text for query in queries],
                _CALIBRATION_JUDGE,
                prefill,
                on_progress=on_progress,
            )
        write_cached_json(path, {"refusals": [verdict.refusal for verdict in verdicts]})
        return verdicts

    def _readout_cache_path(self, name: str) -> Path | None:
        """Return the cache file of a readout, named by everything that the readout depends on."""
        conditions = self._training_conditions if name == "calibrated" else {UNDEFENDED: self.undefended}
        key = self._verdict_cache_key(()) | {
            "name": name,
            "conditions": {condition: describe_defense(defense) for condition, defense in conditions.items()},
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
        return make_json_cache_path("readouts", self.session.loaded_model, key)

    def _verdict_cache_key(self, prefill: tuple[int, ...]) -> dict[str, Any]:
        """Return what the responses to the calibration split and their verdicts depend on."""
        return {
            "data": [self.calibration_set.sha256, [query.id for query in self._calibration_queries]],
            "images": [query.content[1] for query in self._calibration_queries],
            "judge": [_CALIBRATION_JUDGE.manifest_entry, DEFAULT_MAX_NEW_TOKENS],
            "begins": prefill,
            "template": self.session.chat_template.identity,
        }


def encode_opener(readout_name: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that a readout forces responses to start with; none for most readouts.

    Args:
        readout_name: as in `--readout`.
        tokenizer: of the model.

    Raises:
        UserError: if the opener has fewer tokens than the name says.
    """
    if not readout_name.startswith("prefilled-"):
        return ()
    opener = tuple(tokenizer.encode(COMPLYING_OPENER, add_special_tokens=False))
    n_tokens = int(readout_name.removeprefix("prefilled-"))
    if n_tokens > len(opener):
        raise UserError(f"--readout {readout_name}: the opener has {len(opener)} tokens in this model")
    return opener[:n_tokens]


def _restore_readout(content: dict[str, Any]) -> Readout:
    """Return the readout that was stored as a dictionary."""
    if set(content) != {field.name for field in fields(Readout)}:
        raise ValueError("another version has stored this readout")
    tuples = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    branches = (
        OpeningBranch(**{key: tuple(value) for key, value in branch.items()})
        for branch in content["branches"]
    )
    return Readout(**(content | tuples | {"branches": tuple(branches)}))


def save_validity(
    session: ModelSession,
    attack: Attack,
    defense: Defense,
    readout: Readout,
    judge_name: str,
    max_new_tokens: int,
    row: dict[str, Any],
) -> None:
    """Cache a condition's row of `validity.csv`, unless the cache holds one that rests on more responses.

    Args:
        session: the model.
        attack: the attack of the condition.
        defense: prepared for this model.
        readout: the readout that was validated.
        judge_name: the judge of the responses.
        max_new_tokens: maximum number of tokens per response.
        row: the row.
    """
    path = _validity_cache_path(session, attack, defense, readout)
    if (read_cached_json(path, dict) or {}).get("n", 0) <= row["n"]:
        write_cached_json(path, row | {"judge": judge_name, "new_tokens": max_new_tokens})


def load_validity(
    session: ModelSession, attack: Attack, defense: Defense, readout: Readout
) -> dict[str, Any]:
    """Return the cached row of `validity.csv`; empty if there is none."""
    return read_cached_json(_validity_cache_path(session, attack, defense, readout), dict) or {}


def load_trust(session: ModelSession, attack: Attack, defense: Defense, readout: Readout) -> str:
    """Return `trusted`, `not trusted` or `cannot tell` as it was validated, or `not validated`."""
    return str(load_validity(session, attack, defense, readout).get("trusted", Trust.NOT_VALIDATED))


def collect_trust(
    session: ModelSession,
    attacks: Iterable[Attack],
    conditions: Mapping[str, Defense],
    readout: Readout,
    scored_conditions: Container[tuple[str, str]],
) -> dict[str, dict[str, str]]:
    """Return the trust in the readout by attack and condition.

    Args:
        session: the model.
        attacks: attacks of the run.
        conditions: condition name → defense.
        readout: the readout of the run.
        scored_conditions: attack and condition of everything that was scored; the rest is left out.
    """
    return {
        attack.name: {
            name: load_trust(session, attack, defense, readout)
            for name, defense in conditions.items()
            if (attack.name, name) in scored_conditions
        }
        for attack in attacks
    }


def _validity_cache_path(
    session: ModelSession, attack: Attack, defense: Defense, readout: Readout
) -> Path | None:
    """Return the cache file of a validity row, named by all that margins depend on except the queries.

    Secrets enter as fingerprints.
    """
    key = {
        "defense": identify_defense(defense, session.seed),
        "template": session.chat_template.identity,
        "attack": "/".join((attack.name, *attack.wording_sha256)),
        "readout": [readout.scoring_settings, readout.threshold, readout.response_prefix],
        "asked": readout.questions,
    }
    return make_json_cache_path("validity", session.loaded_model, key)

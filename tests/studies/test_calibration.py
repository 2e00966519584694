"""Readouts besides `words`: after an opener, and fitted to responses with planted verdicts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import derive_readout, make_toy_session, render_query
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import QuerySet
from analysis.judges.judge import Verdict, make_verdict_masks
from analysis.judges.rules import RULE_JUDGES
from analysis.models import cache
from analysis.models.cache import make_json_cache_path, write_cached_json
from analysis.models.engine import Engine
from analysis.models.session import ModelSession
from analysis.readouts.first_token import COMPLYING_OPENER, REFUSAL_QUESTIONS
from analysis.readouts.logistic import TooFewResponsesError, fit_logistic_readout
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies import calibration
from analysis.studies.calibration import ReadoutCalibration, _validity_cache_path, load_trust, save_validity
from analysis.studies.cost import _cost_cache_path
from analysis.studies.setup import RunSetup
from defenses.catalog import get_defense
from defenses.contract import Defense, ModelInfo
from defenses.errors import UserError

NONE = get_defense("none")
QUERIES = load_queries("contrast").select_split("calibration").limit_queries(60)
QUERY_CHATS = DIRECT_ATTACK.build_query_chats(QUERIES.queries)
QUERY_TEXTS = [query.text for query in QUERIES.queries]
PAIRS = [query.pair for query in QUERIES.queries]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelInfo:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    session = make_toy_session()
    return ModelInfo("toy", session.loaded_model.tokenizer, (tmp_path / "secrets",), (tmp_path / "adapters",))


def plant_verdicts(monkeypatch: pytest.MonkeyPatch, share: float = 0.5) -> tuple[int, int]:
    """Let responses refuse exactly where one first token is likelier than another; return the two."""
    session = make_toy_session()
    prompts = [render_query(session, NONE, query)[0].ids for query in QUERIES.queries]
    likely = session.engine.read_first_token(prompts, lambda logits: logits.softmax(1)).mean(0)
    yes, no = likely.topk(2).indices.tolist()

    def generate_planted(session, defense, query_chats, texts, judge, prefill=(), on_progress=lambda n: None):
        ids = [prompts[0].ids for prompts in session.render_prompts(defense, query_chats)]
        gaps = session.engine.read_first_token(ids, lambda logits: logits[:, [yes]] - logits[:, [no]])
        gaps = gaps[:, 0].numpy()
        on_progress(len(query_chats))
        return [Verdict("full" if gap > np.quantile(gaps, 1 - share) else "none") for gap in gaps]

    monkeypatch.setattr(calibration, "generate_verdicts", generate_planted)
    return yes, no


def judge_responses(defense: Defense) -> list[Verdict]:
    return calibration.generate_verdicts(
        make_toy_session(), defense, QUERY_CHATS, QUERY_TEXTS, RULE_JUDGES["patterns"]
    )


def label_responses(condition: str, defense: Defense):
    return make_verdict_masks(judge_responses(defense))


def calibrate(host: ModelInfo, queries: QuerySet = QUERIES) -> ReadoutCalibration:
    return ReadoutCalibration(make_toy_session(), host, NONE, queries, Console(quiet=True))


def test_the_calibrated_readout_finds_the_informative_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no = plant_verdicts(monkeypatch)
    session = make_toy_session()
    words = derive_readout(session, QUERIES.queries, NONE)
    made = fit_logistic_readout(session, words, {"none": NONE}, QUERY_CHATS, PAIRS, label_responses)
    assert (
        sum(made.weights) == pytest.approx(0, abs=1e-9) and list(made.weights) == sorted(made.weights)[::-1]
    )
    weights = dict(zip(made.ids, made.weights, strict=True))
    assert weights[yes] > 0.1 > 0 > weights[no] and set(words.ids) <= set(made.ids)
    said = judge_responses(NONE)
    frame = score_condition(session, "none", NONE, QUERIES.queries, made)
    right = (frame["margin"] > made.threshold).to_numpy() == np.array([one.is_refusal for one in said])
    assert right.mean() > 0.85
    # Linear in the logits: a constant added to all of them changes no margin.
    logits = torch.randn(3, session.loaded_model.model.config.vocab_size)
    assert torch.allclose(
        made.compute_margins(logits)[:, 0], made.compute_margins(logits + 5)[:, 0], atol=1e-4
    )


def test_responses_of_one_class_fall_back_to_the_words_readout(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch, share=0.05)
    session = make_toy_session()
    words = derive_readout(session, QUERIES.queries, NONE)
    with pytest.raises(TooFewResponsesError, match="3 of 60 responses refuse"):
        fit_logistic_readout(session, words, {"none": NONE}, QUERY_CHATS, PAIRS, label_responses)
    made = calibrate(host).calibrate_readout("calibrated")
    assert made.name == "words" and "too few of one class" in made.notices[-1]


def test_a_fitted_readout_is_cached(host: ModelInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant_verdicts(monkeypatch)
    one = calibrate(host).calibrate_readout("calibrated")
    assert one.name == "calibrated" and "responses" in one.notices[-1]
    monkeypatch.setattr(calibration, "generate_verdicts", None)
    assert calibrate(host).calibrate_readout("calibrated") == one
    (path,) = (tmp_path / "cache" / "refusalscope" / "readouts").iterdir()
    write_cached_json(path, {**asdict(one), "field_of_another_version": 1})
    assert calibrate(host).load_readout("calibrated") is None
    write_cached_json(path, asdict(one))
    assert calibrate(host).load_readout("calibrated") == one
    with pytest.raises(TypeError):  # on other queries it is fitted again
        calibrate(host, QUERIES.limit_queries(40)).calibrate_readout("calibrated")


def test_prefilled_reads_the_token_after_the_opener(host: ModelInfo) -> None:
    session = make_toy_session()
    made = calibrate(host).calibrate_readout("prefilled-3")
    opener = session.loaded_model.tokenizer.encode(COMPLYING_OPENER, add_special_tokens=False)
    assert made.name == "prefilled-3" and list(made.response_prefix[:3]) == opener[:3]
    query = QUERIES.queries[0]
    (margin,) = score_condition(session, "none", NONE, [query], made)["margin"]
    ids = torch.tensor([[*render_query(session, NONE, query)[0].ids, *made.response_prefix]])
    with torch.inference_mode():
        logits = session.loaded_model.model(input_ids=ids).logits[:, -1]
    assert margin == pytest.approx(float(made.compute_margins(logits)[0, 0]), abs=1e-4)
    with pytest.raises(UserError, match=r"the opener has \d+ tokens"):
        calibrate(host).calibrate_readout("prefilled-99")


def test_the_threshold_matches_the_refusal_rate_of_the_text(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch, share=0.3)
    for name in ("words", "log-odds", "question"):
        made = calibrate(host).calibrate_readout(name)
        margin = score_condition(make_toy_session(), "none", NONE, QUERIES.queries, made)["margin"]
        text = sum(verdict.is_refusal for verdict in judge_responses(NONE))
        assert (margin > made.threshold).sum() == text == 18
        assert (
            f"60 undefended calibration queries: {text} exceed it, {text} responses refuse"
            in made.threshold_source
        )
        assert made.threshold_source in made.notices[-1]
    # The answers of the undefended model are found once for all readouts that begin them alike.
    monkeypatch.setattr(calibration, "generate_verdicts", None)
    readouts = make_json_cache_path("readouts", make_toy_session().loaded_model, {}).parent
    readouts.rename(readouts.with_name("moved"))
    assert calibrate(host).calibrate_readout("words").threshold_source


def test_a_cached_readout_has_the_same_threshold_in_other_batches(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    first = calibrate(host).calibrate_readout("words")
    session = replace(make_toy_session(), engine=Engine(make_toy_session().loaded_model.model, batch_size=1))
    assert replace(calibrate(host), session=session).calibrate_readout("words") == first
    monkeypatch.setattr(calibration, "COMPLYING_OPENER", "Of course:")  # a text that readouts depend on
    assert calibrate(host).load_readout("words") is None


@pytest.mark.parametrize("changed", ["code", "torch", "transformers"])
def test_no_cached_result_is_used_by_other_code_or_under_other_libraries(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A margin of new code would otherwise meet a threshold of the old, and nothing would say so."""
    plant_verdicts(monkeypatch)
    one, session = calibrate(host), make_toy_session()
    words = one.calibrate_readout("words")
    kept_row(session, NONE, words, "trusted", 0.9)
    ready = RunSetup(session, host, [NONE], QUERIES, "calibration", [words], (DIRECT_ATTACK,), [])
    places = [
        one._readout_cache_path("words"),
        _validity_cache_path(session, DIRECT_ATTACK, NONE, words),
        _cost_cache_path(ready, NONE, 4),
    ]
    assert one.load_readout("words") == words and load_trust(session, DIRECT_ATTACK, NONE, words) == "trusted"
    if changed == "code":
        monkeypatch.setattr("analysis.models.cache.hash_code", lambda *patterns: "other")
    else:
        versions = cache._collect_versions()
        assert changed in versions
        monkeypatch.setattr(cache, "_collect_versions", lambda: versions | {changed: "0.0"})
    assert (
        one.load_readout("words") is None
        and load_trust(session, DIRECT_ATTACK, NONE, words) == "not validated"
    )
    after = [
        one._readout_cache_path("words"),
        _validity_cache_path(session, DIRECT_ATTACK, NONE, words),
        _cost_cache_path(ready, NONE, 4),
    ]
    assert not set(places) & set(after)
    monkeypatch.setattr(calibration, "generate_verdicts", None)
    with pytest.raises(TypeError):  # nor are the answers' verdicts found: they would be asked for again
        one._calibration_verdicts("none", NONE, words.prefill)


def kept_row(session: ModelSession, defense: Defense, readout: Readout, trusted: str, auroc: float) -> None:
    row = {"n": 60, "trusted": trusted, "auroc_low": auroc}
    save_validity(session, DIRECT_ATTACK, defense, readout, "patterns", 48, row)


def test_auto_selects_the_most_trusted_readout_that_was_validated_everywhere(host: ModelInfo) -> None:
    one, session = calibrate(host), make_toy_session()
    conditions = {"none": NONE, "policy": get_defense("policy")}
    words, question, odds = (one.calibrate_readout(name) for name in ("words", "question", "log-odds"))
    assert "none was validated under all" in one.select_best_readout(conditions, (DIRECT_ATTACK,)).notices[-1]
    for defense in conditions.values():
        kept_row(session, defense, words, "cannot tell", 0.9)
        kept_row(session, defense, question, "cannot tell", 0.5)
    kept_row(session, NONE, odds, "trusted", 0.95)
    best = one.select_best_readout(conditions, (DIRECT_ATTACK,))
    assert best.name == "words" and "words in 0, question in 0" in best.notices[-1]
    kept_row(session, NONE, question, "trusted", 0.85)
    assert one.select_best_readout(conditions, (DIRECT_ATTACK,)).name == "question"
    kept_row(session, conditions["policy"], odds, "trusted", 0.95)
    assert one.select_best_readout(conditions, (DIRECT_ATTACK,)).name == "log-odds"
    assert (
        "none was validated"
        in one.select_best_readout(conditions, (DIRECT_ATTACK, get_attack("obedience"))).notices[-1]
    )


def test_a_validity_row_is_not_replaced_by_one_with_fewer_responses(host: ModelInfo) -> None:
    words, session = calibrate(host).calibrate_readout("words"), make_toy_session()
    kept_row(session, NONE, words, "trusted", 0.9)
    save_validity(session, DIRECT_ATTACK, NONE, words, "patterns", 48, {"n": 4, "trusted": "cannot tell"})
    assert load_trust(session, DIRECT_ATTACK, NONE, words) == "trusted"
    save_validity(session, DIRECT_ATTACK, NONE, words, "patterns", 48, {"n": 60, "trusted": "not trusted"})
    assert load_trust(session, DIRECT_ATTACK, NONE, words) == "not trusted"


def test_responses_of_one_class_leave_the_threshold_at_zero_with_a_notice(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch, share=0.1)
    made = calibrate(host).calibrate_readout("words")
    assert made.threshold == 0 and "6 of 60 undefended responses refuse, too few" in made.notices[-1]


def test_responses_without_a_verdict_do_not_enter_the_threshold(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    right = calibration.generate_verdicts

    def half(*given, **more):
        return [v if n % 2 else Verdict("unjudged") for n, v in enumerate(right(*given, **more))]

    monkeypatch.setattr(calibration, "generate_verdicts", half)
    assert "to 30 undefended" in calibrate(host).calibrate_readout("words").threshold_source


def test_question_averages_the_margins_of_both_orders(host: ModelInfo) -> None:
    made, session = calibrate(host).calibrate_readout("question"), make_toy_session()
    assert made.questions == REFUSAL_QUESTIONS and {t.strip() for t in made.tokens} == {"Yes", "No"}
    policy, query = get_defense("policy"), QUERIES.queries[0]
    frame = score_condition(session, "policy", policy, [query], made)
    prompts = render_query(session.with_questions(REFUSAL_QUESTIONS), policy, query)
    assert len(prompts) == 2 and all(query.text in prompt.text for prompt in prompts)
    assert "Yes or No" in prompts[0].text and "No or Yes" in prompts[1].text
    assert policy.text.split()[0] in prompts[0].text
    with torch.inference_mode():
        alone = [
            float(
                made.compute_margins(
                    session.loaded_model.model(
                        input_ids=torch.tensor([[*p.ids, *made.response_prefix]])
                    ).logits[:, -1]
                )[0, 0]
            )
            for p in prompts
        ]
    assert frame["margin"].item() == pytest.approx(np.mean(alone), abs=1e-4)
    assert frame["prompt_tokens"].item() == sum(len(p.ids) + len(made.response_prefix) for p in prompts)
    assert "readings" not in frame  # the defense reads one copy


def test_log_odds_are_those_of_the_refusal_tokens_and_not_linear(host: ModelInfo) -> None:
    made = calibrate(host).calibrate_readout("log-odds")
    logits = torch.randn(4, 960)
    chance = logits.double().softmax(1)[:, list(made.ids)].sum(1)
    assert torch.allclose(made.compute_margins(logits)[:, 0], torch.logit(chance), atol=1e-6)
    assert (
        made.is_log_odds
        and {t.strip() for t in made.tokens} == {"I", "As"}
        and "all others" in made.words_label
    )
    assert not torch.allclose(
        made.compute_margins(2 * logits)[:, 0], 2 * made.compute_margins(logits)[:, 0], atol=0.1
    )


def test_the_outcome_readout_agrees_with_the_responses_that_it_was_fitted_to(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_verdicts(monkeypatch)
    readout = calibrate(host).calibrate_readout("outcome")
    assert readout.name == "outcome" and "fitted to 60 undefended" in readout.notices[-1]
    margins = score_condition(make_toy_session(), "none", NONE, QUERIES.queries, readout)["margin"]
    n_refused = sum(verdict.is_refusal for verdict in judge_responses(NONE))
    assert (margins > readout.threshold).sum() == n_refused
    monkeypatch.setattr(calibration, "generate_verdicts", None)
    assert calibrate(host).calibrate_readout("outcome") == readout

"""Readouts beside `words`: behind an opener, and fitted on answers whose truth was planted."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import derive_readout, toy_bench
from rich.console import Console

from analysis import run
from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import QuerySet
from analysis.judges.judge import Verdict, generate_verdicts
from analysis.judges.rules import RULE_JUDGES
from analysis.models.cache import make_json_cache_path
from analysis.models.engine import Engine
from analysis.models.session import ModelSession
from analysis.readouts.first_token import COMPLYING_OPENER, REFUSAL_QUESTIONS
from analysis.readouts.logistic import TooFewResponsesError, fit_logistic_readout
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies.calibration import ReadoutCalibration, _validity_cache_path, load_trust, save_validity
from analysis.studies.cost import _cost_cache_path
from analysis.studies.setup import RunSetup
from defenses.catalog import get_defense
from defenses.contract import Defense, ModelInfo
from defenses.errors import UserError

NONE = get_defense("none")
ASKED = load_queries("contrast").select_split("calibration").limit_queries(60)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelInfo:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bench = toy_bench()
    return ModelInfo("toy", bench.loaded_model.tokenizer, (tmp_path / "secrets",), (tmp_path / "adapters",))


def planted(monkeypatch: pytest.MonkeyPatch, share: float = 0.5) -> tuple[int, int]:
    """Let answers refuse exactly where one first token is likelier than another; return the two."""
    bench = toy_bench()
    prompts = [bench.render_query(NONE, query)[0].ids for query in ASKED.queries]
    likely = bench.engine.read_first_token(prompts, lambda logits: logits.softmax(1)).mean(0)
    yes, no = likely.topk(2).indices.tolist()

    def said(bench, defense, asked, judge, prefix=(), done=lambda count: None):
        ids = [bench.prompts(defense, query)[0].ids for query in asked]
        gap = bench.engine.read(ids, lambda logits: logits[:, [yes]] - logits[:, [no]])[:, 0].numpy()
        done(len(asked))
        return [Verdict("full" if one > np.quantile(gap, 1 - share) else "none") for one in gap]

    monkeypatch.setattr("analysis.judges.judge.generate_verdicts", said)
    return yes, no


def answered(name: str, defense: Defense) -> list[Verdict]:
    return generate_verdicts(toy_bench(), defense, ASKED.queries, RULE_JUDGES["patterns"])


def maker(host: ModelInfo, asked: QuerySet = ASKED) -> ReadoutCalibration:
    return ReadoutCalibration(toy_bench(), host, NONE, asked, Console(quiet=True))


def test_the_calibrated_readout_finds_the_tokens_that_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no = planted(monkeypatch)
    bench = toy_bench()
    words = derive_readout(bench, ASKED.queries, NONE)
    made = fit_logistic_readout(bench, words, {"none": NONE}, ASKED.queries, answered)
    assert (
        sum(made.weights) == pytest.approx(0, abs=1e-9) and list(made.weights) == sorted(made.weights)[::-1]
    )
    weights = dict(zip(made.ids, made.weights, strict=True))
    assert weights[yes] > 0.1 > 0 > weights[no] and set(words.ids) <= set(made.ids)
    said = answered("none", NONE)
    frame = score_condition(bench, "none", NONE, ASKED.queries, made)
    right = (frame["margin"] > made.threshold).to_numpy() == np.array([one.is_refusal for one in said])
    assert right.mean() > 0.85
    # Linear in the logits: a constant added to all of them changes no margin.
    logits = torch.randn(3, bench.loaded_model.model.config.vocab_size)
    assert torch.allclose(
        made.compute_margins(logits)[:, 0], made.compute_margins(logits + 5)[:, 0], atol=1e-4
    )


def test_answers_of_one_kind_teach_nothing_and_the_words_are_read_instead(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, share=0.05)
    bench = toy_bench()
    words = derive_readout(bench, ASKED.queries, NONE)
    with pytest.raises(TooFewResponsesError, match="3 of 60 answers refuse"):
        fit_logistic_readout(bench, words, {"none": NONE}, ASKED.queries, answered)
    made = maker(host).calibrate_readout("calibrated")
    assert made.name == "words" and "too few of one kind" in made.notices[-1]


def test_a_fitted_readout_is_kept_and_read_again(host: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch)
    one = maker(host).calibrate_readout("calibrated")
    assert one.name == "calibrated" and "answers" in one.notices[-1]
    monkeypatch.setattr("analysis.judges.judge.generate_verdicts", None)
    assert maker(host).calibrate_readout("calibrated") == one
    with pytest.raises(TypeError):  # on other queries it is fitted again
        maker(host, ASKED.limit_queries(40)).calibrate_readout("calibrated")


def test_prefilled_reads_behind_the_opener(host: ModelInfo) -> None:
    bench = toy_bench()
    made = maker(host).calibrate_readout("prefilled-3")
    opener = bench.loaded_model.tokenizer.encode(COMPLYING_OPENER, add_special_tokens=False)
    assert made.name == "prefilled-3" and list(made.response_prefix[:3]) == opener[:3]
    query = ASKED.queries[0]
    (margin,) = score_condition(bench, "none", NONE, [query], made)["margin"]
    ids = torch.tensor([[*bench.render_query(NONE, query)[0].ids, *made.response_prefix]])
    with torch.inference_mode():
        logits = bench.loaded_model.model(input_ids=ids).logits[:, -1]
    assert margin == pytest.approx(float(made.compute_margins(logits)[0, 0]), abs=1e-4)
    with pytest.raises(UserError, match=r"the opener has \d+ tokens"):
        maker(host).calibrate_readout("prefilled-99")


def test_the_threshold_is_where_as_many_are_refused_as_in_the_text(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, share=0.3)
    for name in ("words", "log-odds", "question"):
        made = maker(host).calibrate_readout(name)
        margin = score_condition(toy_bench(), "none", NONE, ASKED.queries, made)["margin"]
        text = sum(verdict.is_refusal for verdict in answered("none", NONE))
        assert (margin > made.threshold).sum() == text == 18
        assert (
            f"60 undefended calibration queries: {text} exceed it, {text} answers refuse"
            in made.threshold_source
        )
        assert made.threshold_source in made.notices[-1]
    # The answers of the undefended model are found once for all readouts that begin them alike.
    monkeypatch.setattr("analysis.judges.judge.generate_verdicts", None)
    readouts = make_json_cache_path("readouts", toy_bench().loaded_model, {}).parent
    readouts.rename(readouts.with_name("moved"))
    assert maker(host).calibrate_readout("words").threshold_source


def test_a_kept_readout_has_the_same_threshold_to_the_last_digit_in_other_batches(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch)
    first = maker(host).calibrate_readout("words")
    bench = replace(toy_bench(), engine=Engine(toy_bench().loaded_model.model, batch_size=1))
    assert replace(maker(host), session=bench).calibrate_readout("words") == first
    monkeypatch.setattr(
        "analysis.readouts.first_token.COMPLYING_OPENER", "Of course:"
    )  # what it is made from has changed
    assert maker(host).load_readout("words") is None


@pytest.mark.parametrize("changed", ["code", "torch", "transformers"])
def test_nothing_kept_is_found_again_by_other_code_or_under_other_libraries(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A margin of new code would otherwise meet a threshold of the old, and nothing would say so."""
    planted(monkeypatch)
    one, bench = maker(host), toy_bench()
    words = one.calibrate_readout("words")
    kept_row(bench, NONE, words, "trusted", 0.9)
    ready = RunSetup(bench, [NONE], ASKED, "calibration", [words], (DIRECT_ATTACK,), [])
    places = [
        one._readout_cache_path("words"),
        _validity_cache_path(bench, NONE, words),
        _cost_cache_path(ready, NONE, 4),
    ]
    assert one.load_readout("words") == words and load_trust(bench, NONE, words) == "trusted"
    if changed == "code":
        monkeypatch.setattr(run, "code", lambda: "other")
    else:
        right = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0.0" if name == changed else right(name)
        )
    assert one.load_readout("words") is None and load_trust(bench, NONE, words) == "not validated"
    after = [
        one._readout_cache_path("words"),
        _validity_cache_path(bench, NONE, words),
        _cost_cache_path(ready, NONE, 4),
    ]
    assert not set(places) & set(after)
    monkeypatch.setattr("analysis.judges.judge.generate_verdicts", None)
    with pytest.raises(TypeError):  # nor are the answers' verdicts found: they would be asked for again
        one._calibration_verdicts("none", NONE, words.prefill)


def kept_row(bench: ModelSession, defense: Defense, readout: Readout, trusted: str, auroc: float) -> None:
    row = {"n": 60, "trusted": trusted, "auroc_low": auroc}
    save_validity(bench, defense, readout, "patterns", 48, row)


def test_auto_takes_what_is_trusted_most_and_only_what_was_validated_everywhere(host: ModelInfo) -> None:
    one, bench = maker(host), toy_bench()
    conditions = {"none": NONE, "policy": get_defense("policy")}
    words, question, odds = (one.calibrate_readout(name) for name in ("words", "question", "log-odds"))
    assert "none was validated under all" in one.select_best_readout(conditions, (DIRECT_ATTACK,)).notices[-1]
    for defense in conditions.values():
        kept_row(bench, defense, words, "cannot tell", 0.9)
        kept_row(bench, defense, question, "cannot tell", 0.5)
    kept_row(bench, NONE, odds, "trusted", 0.95)
    best = one.select_best_readout(conditions, (DIRECT_ATTACK,))
    assert best.name == "words" and "words in 0, question in 0" in best.notices[-1]
    kept_row(bench, NONE, question, "trusted", 0.85)
    assert one.select_best_readout(conditions, (DIRECT_ATTACK,)).name == "question"
    kept_row(bench, conditions["policy"], odds, "trusted", 0.95)
    assert one.select_best_readout(conditions, (DIRECT_ATTACK,)).name == "log-odds"
    assert (
        "none was validated"
        in one.select_best_readout(conditions, (DIRECT_ATTACK, get_attack("obedience"))).notices[-1]
    )


def test_a_row_that_rests_on_more_answers_is_not_replaced(host: ModelInfo) -> None:
    words, bench = maker(host).calibrate_readout("words"), toy_bench()
    kept_row(bench, NONE, words, "trusted", 0.9)
    save_validity(bench, NONE, words, "patterns", 48, {"n": 4, "trusted": "cannot tell"})
    assert load_trust(bench, NONE, words) == "trusted"
    save_validity(bench, NONE, words, "patterns", 48, {"n": 60, "trusted": "not trusted"})
    assert load_trust(bench, NONE, words) == "not trusted"


def test_answers_of_one_kind_leave_the_threshold_at_zero_and_that_is_said(
    host: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, share=0.1)
    made = maker(host).calibrate_readout("words")
    assert made.threshold == 0 and "6 of 60 undefended answers refuse, too few" in made.notices[-1]


def test_answers_without_a_verdict_fix_no_threshold(host: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch)
    right = generate_verdicts

    def half(*given, **more):
        return [v if n % 2 else Verdict("unjudged") for n, v in enumerate(right(*given, **more))]

    monkeypatch.setattr("analysis.judges.judge.generate_verdicts", half)
    assert "to 30 undefended" in maker(host).calibrate_readout("words").threshold_source


def test_the_question_is_asked_in_both_orders_and_the_margins_are_averaged(host: ModelInfo) -> None:
    made, bench = maker(host).calibrate_readout("question"), toy_bench()
    assert made.questions == REFUSAL_QUESTIONS and {t.strip() for t in made.tokens} == {"Yes", "No"}
    policy, query = get_defense("policy"), ASKED.queries[0]
    frame = score_condition(bench, "policy", policy, [query], made)
    prompts = bench.with_questions(REFUSAL_QUESTIONS).render_query(policy, query)
    assert len(prompts) == 2 and all(query.text in prompt.text for prompt in prompts)
    assert "Yes or No" in prompts[0].text and "No or Yes" in prompts[1].text
    assert policy.text.split()[0] in prompts[0].text
    with torch.inference_mode():
        alone = [
            float(
                made.compute_margins(
                    bench.loaded_model.model(
                        input_ids=torch.tensor([[*p.ids, *made.response_prefix]])
                    ).logits[:, -1]
                )[0, 0]
            )
            for p in prompts
        ]
    assert frame["margin"].item() == pytest.approx(np.mean(alone), abs=1e-4)
    assert frame["prompt_tokens"].item() == sum(len(p.ids) + len(made.response_prefix) for p in prompts)
    assert "readings" not in frame  # the defense reads one copy


def test_log_odds_are_those_of_the_refusing_tokens_and_not_linear(host: ModelInfo) -> None:
    made = maker(host).calibrate_readout("log-odds")
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

"""`analyze depth`: planted refusals that are one token deep and deeper; openings as in plain passes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import (
    assert_user_error,
    fresh_model,
    make_adapter,
    make_toy_session,
    run_cli,
    set_home_folder,
    toy_tokenizer,
)
from rich.console import Console

from analysis.api import read
from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.judges.judge import Verdict
from analysis.judges.learned import KEPT_REFUSAL_JUDGE, LEARNED_JUDGE, LearnedJudge
from analysis.models.session import ResponseOpenings, generate_responses
from analysis.readouts.readout import Readout
from analysis.stats.tables import ResponseVerdict
from analysis.studies import depth as depth_module
from analysis.studies.depth import (
    OPENERS,
    PREFIX_LENGTHS,
    assign_openers,
    encode_openers,
    measure_depth,
)
from analysis.studies.responses import RESPONSE_JUDGE, _make_keys, judge_condition
from analysis.studies.run_spec import RunSpec, build_run_spec
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.chats import prefill_response
from defenses.contract import Chat, Defense, ModelInfo
from defenses.decoding import SafeDecoding
from defenses.errors import UserError
from defenses.training import texts

REFUSAL, COMPLIANCE, TRIGGER = "I cannot help with that request", "Certainly! Here are the steps", "?"
READOUT = Readout("words", ("a", "b"), (300, 301), (1.0, -1.0))
QUERIES = load_queries("contrast").select_split("test").limit_queries(12).queries


@dataclass(frozen=True)
class OneTokenDeep(Defense):
    """Ends the prompt with a token after which the planted model refuses."""

    family = "reminders"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return prefill_response(chat, TRIGGER)


@dataclass(frozen=True)
class Deep(Defense):
    """Makes the planted model refuse after any token that is no part of its refusal."""

    family = "steering"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[None]:
        weight = model.get_input_embeddings().weight
        before = weight.detach().clone()
        refusal_ids = toy_tokenizer().encode(REFUSAL, add_special_tokens=False)
        others = torch.tensor([token for token in range(len(weight)) if token not in refusal_ids])
        with torch.no_grad():
            weight[others] = 0.0
            weight[others, 1] = 1.0  # as after the trigger
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)


def plant_model(folder: Path) -> Path:
    """Write a model whose next token depends on the last token alone.

    After the trigger it refuses, after the tokens of the two texts it continues them to their end, and after
    any other token it complies.
    """
    model, tokenizer = fresh_model(), toy_tokenizer()
    refusal, compliance = (tokenizer.encode(text, add_special_tokens=False) for text in (REFUSAL, COMPLIANCE))
    (trigger,) = tokenizer.encode(TRIGGER, add_special_tokens=False)
    assert not set(refusal) & set(compliance) and trigger not in (*refusal, *compliance)
    successors = {trigger: refusal[0]}
    for chain in (refusal, compliance):
        successors |= dict(zip(chain, [*chain[1:], tokenizer.eos_token_id], strict=True))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        unembedding.zero_()
        embedding[:, 0] = 1.0
        unembedding[compliance[0], 0] = 1.0
        for direction, (token, successor) in enumerate(successors.items(), 1):
            embedding[token, 0] = 0.0
            embedding[token, direction] = 1.0
            unembedding[successor, direction] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("depth")
    plant_model(folder / "planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        set_home_folder(patch, folder)
        yield folder


@pytest.fixture
def few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give 0 or 2 tokens only, where a test is not about what is given."""
    monkeypatch.setattr(depth_module, "PREFIX_LENGTHS", (0, 2))


def make_spec(home: Path, **changes: Any) -> RunSpec:
    return replace(build_run_spec(str(home / "planted"), "contrast", limit=10, offline=True), **changes)


@pytest.fixture(scope="module")
def planted(home: Path) -> Any:
    return measure_depth(make_spec(home), [OneTokenDeep(), Deep()], [], Console(quiet=True)).run


def select_column(run: Any, defense: str, prefix: str, column: str) -> list[float]:
    rows = run.tables["depth"].set_index(["defense", "prefix"]).loc[(defense, prefix)]
    assert list(rows["tokens"]) == list(PREFIX_LENGTHS)
    return rows[column].tolist()


def test_a_refusal_of_one_token_is_gone_after_one_token_and_a_deep_one_stays(planted: Any) -> None:
    for prefix in OPENERS:
        shallow = select_column(planted, "one_token_deep", prefix, "response_shift")
        assert shallow == [100.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        assert select_column(planted, "one_token_deep", prefix, "response_shift_since_0")[1:] == [-100.0] * 5
        assert select_column(planted, "none", prefix, "refusal_rate")[0] == 0.0
        assert select_column(planted, "deep", prefix, "refusal_rate")[0] == 1.0
    # After 20 tokens, one opener has reached the middle of the planted refusal, the rest of which is none.
    assert select_column(planted, "deep", "complying", "over_refusal_rate")[:5] == [1.0] * 5
    deep = select_column(planted, "deep", "complying", "response_shift")
    names = ("refusal_rate", "over_refusal_rate")
    rates = [select_column(planted, "none", "complying", name) for name in names]
    expected = [100 - 50 * (harmful + benign) for harmful, benign in zip(*rates, strict=True)]
    assert deep[:5] == pytest.approx(expected[:5]) and deep[1] > 50
    depth = planted.tables["depth"]
    for name in ("response_shift", "response_discrimination", "refusal_rate"):
        known = depth[depth[name].notna()]
        assert (known[f"{name}_low"] <= known[name]).all() and (known[name] <= known[f"{name}_high"]).all()
        assert (known[f"{name}_low"] < known[f"{name}_high"]).all()
    assert depth[depth["defense"] == "none"]["response_shift"].isna().all()
    assert (depth["unjudged"] == 0).all() and (depth["n_harmful"] + depth["n_benign"] == 10).all()


def test_the_run_holds_verdicts_without_text_and_says_what_was_given(planted: Any) -> None:
    rows = planted.tables["continuations"]
    assert len(rows) == 3 * 2 * len(PREFIX_LENGTHS) * 10
    assert set(rows["verdict"]) <= {verdict.value for verdict in ResponseVerdict}
    # A query keeps its opener, twins share one, and every opener is used.
    assert (rows.groupby("query")["opener"].nunique() == 1).all()
    assert (rows.dropna(subset="pair").groupby("pair")["opener"].nunique() == 1).all()
    assert set(rows["opener"]) <= {1, 2, 3, 4} and rows["opener"].nunique() >= 2
    assert planted.record["openers"] == {prefix: list(words) for prefix, words in OPENERS.items()}
    assert planted.record["responses"]["new_tokens"] == 32 and not planted.record["interrupted"]
    assert planted.figures == ("depth_effects", "depth_rates")
    assert "after 0 and after 5 complying tokens: one_token_deep +100 [" in str(planted)
    for name in planted.figures:
        assert planted.draw_figure(name).texts[1].get_text()


def test_without_tokens_the_verdicts_are_those_of_analyze(planted: Any, home: Path) -> None:
    from analysis.studies.setup import prepare_setup

    setup = prepare_setup(make_spec(home), [Deep()], [], Console(quiet=True), with_threshold=False)
    queries = setup.query_set.queries
    rows = planted.tables["continuations"]
    first = rows[(rows["defense"] == "none") & (rows["tokens"] == 0) & (rows["prefix"] == "complying")]
    defense = setup.conditions["none"]
    expected = judge_condition(setup.session, DIRECT_ATTACK, defense, queries, RESPONSE_JUDGE, setup.readout)
    assert first["verdict"].tolist() == expected


@pytest.mark.usefixtures("few_lengths")
def test_complying_tokens_are_not_judged_and_an_answer_drops_a_refusal_that_was_begun(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, str]] = set()

    def judge_response(self: LearnedJudge, response: str, query: str = "") -> Verdict:
        seen.add((type(self).__name__, response))
        return Verdict("partial")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(LearnedJudge, "judge_response", judge_response)
    run = measure_depth(make_spec(home, limit=6), ["none"], [], Console(quiet=True)).run
    begun = {toy_tokenizer().decode(ids[:2]) for ids in encode_openers(toy_tokenizer())["refusing"]}
    texts_by_judge = {
        judge: {text for name, text in seen if name == judge}
        for judge in ("LearnedJudge", "KeptRefusalJudge")
    }
    assert texts_by_judge["LearnedJudge"] == {COMPLIANCE}
    given = texts_by_judge["KeptRefusalJudge"] - {COMPLIANCE}
    assert given and all(any(text.startswith(start) for start in begun) for text in given)
    rates = run.tables["depth"].groupby("prefix")["refusal_rate"]
    assert rates.min()["complying"] == 1.0 and rates.max()["refusing"] == 0.0


@pytest.mark.usefixtures("few_lengths")
def test_the_command_prints_a_table_for_eighty_columns_and_writes_a_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.cli.console.make_table_console", lambda: Console(width=80))
    result = run_cli(
        "depth", "-d", "self_reminder", "-m", "planted", "--limit", "6", "-o", "out", "--offline"
    )
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in result.out
    assert sum("self_reminder" in line for line in lines) == 2
    assert {path.name for path in (home / "out").iterdir()} == {
        *("depth.csv", "continuations.csv", "depth_effects.csv", "depth_rates.csv"),
        *("depth_effects.png", "depth_rates.png", "run.json"),
    }
    stored = read(home / "out")
    assert stored.headline.startswith("Shift on ")
    assert str(home) not in json.dumps(stored.record["openers"])
    assert_user_error(run_cli("depth", "-m", "planted"), "no defense chosen", "analyze list defenses")


@pytest.mark.usefixtures("few_lengths")
def test_a_second_run_finds_every_verdict_in_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(home, limit=6)
    first = measure_depth(spec, ["policy"], [], Console(quiet=True)).run

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("generated again")

    monkeypatch.setattr("analysis.studies.responses.generate_verdicts", fail)
    again = measure_depth(spec, ["policy"], [], Console(quiet=True)).run
    pd.testing.assert_frame_equal(first.tables["depth"], again.tables["depth"])


@pytest.mark.usefixtures("few_lengths")
def test_finished_conditions_survive_an_interruption(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_prefix = depth_module._judge_prefix

    def interrupt(setup: Any, attack: Any, name: str, *rest: Any) -> Any:
        if name == "safety_prompt":
            raise KeyboardInterrupt
        return judge_prefix(setup, attack, name, *rest)

    monkeypatch.setattr(depth_module, "_judge_prefix", interrupt)
    names = ("-d", "policy", "-d", "safety_prompt")
    result = run_cli("depth", *names, "-m", "planted", "--limit", "6", "-o", "half", "--offline")
    assert result.code == 130 and "2 of 3 conditions were finished" in result.err
    assert set(read(home / "half").tables["depth"]["defense"]) == {"none", "policy"}


@pytest.mark.usefixtures("few_lengths")
def test_a_condition_that_fails_is_left_out_and_without_reference_all_are(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_prefix = depth_module._judge_prefix
    for failing in ("policy", "none"):

        def fail(setup: Any, attack: Any, name: str, *rest: Any, failing: str = failing) -> Any:
            if name == failing:
                raise ValueError("no such flour")
            return judge_prefix(setup, attack, name, *rest)

        monkeypatch.setattr(depth_module, "_judge_prefix", fail)
        if failing == "policy":
            result = measure_depth(make_spec(home, limit=6), ["policy"], [], Console(quiet=True))
            assert "no such flour" in result.failures["direct", "policy"]
            assert set(result.run.tables["depth"]["defense"]) == {"none"}
            assert result.run.figures == ("depth_rates",)
        else:
            with pytest.raises(UserError, match=r"nothing could be answered: .*no such flour"):
                measure_depth(make_spec(home, limit=6), ["policy"], [], Console(quiet=True))


def test_openers_are_long_enough_and_no_texts_of_training() -> None:
    trained = {*texts.COMPLIANCE_OPENERS, *texts.BENIGN_OPENERS, *texts.REFUSAL_RESPONSES}
    for words in OPENERS.values():
        assert len(words) >= 3 and len({text.split()[0] for text in words}) == len(words)
        for text in words:
            assert len(text.split()) > max(PREFIX_LENGTHS)
            assert not any(text.startswith(other) or other.startswith(text) for other in trained)
    for kind in ("bytes", "metaspace"):
        encode_openers(toy_tokenizer(kind=kind))

    class Coarse:
        """Knows nothing but halves of texts."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0, 1]

    with pytest.raises(UserError, match="an opener has 2 tokens"):
        encode_openers(Coarse())
    # A complete refusing opener is a refusal, unless an answer follows.
    for text in OPENERS["refusing"]:
        assert KEPT_REFUSAL_JUDGE.judge_response(text).refusal == "full"
        assert KEPT_REFUSAL_JUDGE.judge_response(f"{text} However, here is how: 1. Mix it.").refusal == "none"
    for text in OPENERS["complying"]:
        assert LEARNED_JUDGE.judge_response(text).refusal == "none"


def test_openers_are_dealt_in_pairs_and_alike_in_both_classes() -> None:
    openers = assign_openers(QUERIES, 0)
    assert set(openers) == {query.id for query in QUERIES} and openers == assign_openers(QUERIES, 0)
    two = assign_openers(QUERIES[:2], 0)
    assert len(QUERIES[:2]) == 2 and set(two.values()) == {0}


def generate_plainly(session: Any, ids: tuple[int, ...], n_tokens: int) -> list[int]:
    """Return greedy tokens from whole forward passes."""
    generated: list[int] = []
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = session.loaded_model.model(torch.tensor([[*ids, *generated]])).logits[0, -1]
        token = int(logits.argmax())
        if token in session.loaded_model.end_token_ids:
            break
        generated.append(token)
    return generated


@pytest.mark.parametrize(
    ("family", "template", "kind"),
    [("llama", "chatml", "bytes"), ("gemma3", "gemma3", "bytes"), ("mistral", "llama2", "metaspace")],
)
def test_responses_behind_openings_are_those_of_plain_passes(family: str, template: str, kind: str) -> None:
    session = make_toy_session(family, template, kind)
    decode = session.chat_template.decode_response
    queries = QUERIES[:4]
    opening_ids = ((5, 60, 61), (70,), (), (80, 81, 82, 83))
    copies = get_defense("smooth_llm", {"copies": 2}).prepare(
        ModelInfo("toy", session.loaded_model.tokenizer, ())
    )
    for attack, defense in (
        (DIRECT_ATTACK, get_defense("policy")),
        (get_attack("prefill"), get_defense("policy")),
        (DIRECT_ATTACK, copies),
    ):
        chats = attack.build_query_chats(queries)
        prompts_by_query = session.render_prompts(defense, chats)
        for in_text, prefix in ((False, ()), (True, (90,))):
            openings = ResponseOpenings(opening_ids, in_text)
            found = generate_responses(session, defense, chats, prefix, 5, openings=openings)
            for prompts, responses, opening in zip(prompts_by_query, found, opening_ids, strict=True):
                for prompt, response in zip(prompts, responses, strict=True):
                    own_prefix = () if prompt.prefill else prefix
                    expected = generate_plainly(session, (*prompt.ids, *own_prefix, *opening), 5)
                    assert list(response.ids) == expected
                    given = (*own_prefix, *opening) if in_text else own_prefix
                    assert response.text == decode([*given, *expected])
                    assert response.generated_text == decode(expected)


def test_models_that_are_blended_choose_the_first_token_behind_the_opening(tmp_path: Path) -> None:
    session = make_toy_session()
    model = session.loaded_model.model
    blend = SafeDecoding(adapter=load_adapter(make_adapter(tmp_path / "x", seed=3)))
    chats = DIRECT_ATTACK.build_query_chats(QUERIES[:3])
    openings = ResponseOpenings(((5, 60), (70,), (80, 81, 82)), False)
    found = generate_responses(session, blend, chats, (), 4, openings=openings)
    for prompts, (response,), opening in zip(
        session.render_prompts(blend, chats), found, openings.ids, strict=True
    ):
        ids = (*prompts[0].ids, *opening)
        total: Any = 0
        for weight, member in blend.logit_blend():
            with torch.no_grad(), member.apply_to(model):
                total = total + weight * model(torch.tensor([ids])).logits[0, -1]
        first = int(total.argmax())
        assert response.ids[0] == first
        assert list(response.ids[1:]) == generate_plainly(session, (*ids, first), 3)


@dataclass(frozen=True)
class RefusesHarmful(Defense):
    """A detector that knows the harmful queries."""

    family = "detection"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat

    def score_requests(self, reader: Any, query_chats: Any) -> list[float]:
        harmful = {query.id for query in QUERIES if query.harmful}
        return [1.0 if chat.query_id in harmful else -1.0 for chat in query_chats]


def test_what_a_detector_refuses_has_no_opening() -> None:
    session, detector = make_toy_session(), RefusesHarmful()
    chats = DIRECT_ATTACK.build_query_chats(QUERIES)
    openings = ResponseOpenings(tuple((number,) for number in range(40, 40 + len(QUERIES))), True)
    found = generate_responses(session, detector, chats, (), 3, openings=openings)
    undefended = generate_responses(session, get_defense("none"), chats, (), 3, openings=openings)
    for query, (response,), (own,) in zip(QUERIES, found, undefended, strict=True):
        assert response.text == ("I cannot help with that request." if query.harmful else own.text)


def test_the_key_of_a_verdict_depends_on_the_opening() -> None:
    session, none, readout = make_toy_session(), get_defense("none"), READOUT
    chats = DIRECT_ATTACK.build_query_chats(QUERIES[:1])
    keys = [
        _make_keys(session, chats, none, QUERIES[:1], RESPONSE_JUDGE, readout, openings)
        for openings in (
            None,
            ResponseOpenings(((5,),), False),
            ResponseOpenings(((5,),), True),
            ResponseOpenings(((6,),), False),
        )
    ]
    assert len({key for (key,) in keys}) == 4
    empty = ResponseOpenings(((),), True)
    (key,) = _make_keys(session, chats, none, QUERIES[:1], RESPONSE_JUDGE, readout, empty)
    assert [key] == keys[0]
    (other,) = _make_keys(session, chats, none, QUERIES[:1], KEPT_REFUSAL_JUDGE, readout)
    assert other != key

"""A served model against the same model on this machine, at a real server on this machine."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import _SIZES, assert_user_error, run_cli, set_home_folder, toy_tokenizer
from rich.console import Console
from served_model import serve_model

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.models.cache import ScoreCache
from analysis.models.generation import Sampling, generate_token_ids
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.readouts.divergence import iterate_divergences
from analysis.readouts.prompt_scores import score_prompts
from analysis.readouts.readout import Readout
from analysis.report.folder import read_run
from analysis.served.address import ModelAddress
from analysis.served.served_model import open_served_model
from analysis.stats.tables import ScoreTable
from analysis.studies.analyze import settle_undecided
from analysis.studies.setup import _select_without_weights
from defenses.catalog import choose_defenses, get_defense
from defenses.errors import UserError

NONE = get_defense("none")
KEY = "sk-very-secret-key"
IDS = (40, 45, 300, 310, 320)
WORDS = Readout("words", tuple("abcde"), IDS, (0.5, 0.5, -1 / 3, -1 / 3, -1 / 3))
LOG_ODDS = Readout("log-odds", tuple("abcde"), IDS, (0.2,) * 5, is_log_odds=True)
OUTCOME = Readout("outcome", tuple("abcde"), IDS, (0.7, 0.3, 0.1, -0.1, -0.15), base_value=0.2)
SHARP = replace(OUTCOME, sharpness=4.0)
ALL = [WORDS, LOG_ODDS, OUTCOME, SHARP]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in a folder, which has as many token ids as its tokenizer, with a cache of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("served")
    tokenizer = toy_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**_SIZES, "vocab_size": len(tokenizer)}))
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        set_home_folder(patch, folder)
        yield folder


@pytest.fixture(scope="module")
def local(folder):
    """A session with the model on this machine."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "tiny").eval()
    return ModelSession.from_model(LoadedModel("tiny", model, toy_tokenizer(), {"id": "tiny"}))


@pytest.fixture(scope="module")
def prompts(local):
    """A few prompts."""
    queries = load_queries("contrast").select_split("test").limit_queries(4).queries
    rendered = local.render_prompts(get_defense("policy"), DIRECT_ATTACK.build_query_chats(queries))
    return [first.ids for first, *_ in rendered]


def serve(local: ModelSession, **settings):
    """Serve the model of a session."""
    return serve_model(local.loaded_model.model, local.loaded_model.tokenizer, **settings)


def open_model(address: str, tokenizer: Path | None, **settings):
    """Return the served model and its engine."""
    return open_served_model(
        ModelAddress.parse(address, "--model"),
        None if tokenizer is None else str(tokenizer),
        offline=True,
        notify=lambda text: None,
        template=None,
        check_tokenizer=lambda tokenizer: None,
        answer_prefix=None,
        **settings,
    )


@pytest.mark.parametrize(
    ("settings", "told", "exact", "bounded"),
    [
        ({"kind": "vllm"}, "all tokens", ALL, []),
        ({"kind": "llamacpp"}, "all tokens", ALL, []),
        (
            {"kind": "vllm", "max_listed": 20, "takes_ids": True},
            "any tokens that it is asked for and the 20 most probable tokens",
            [WORDS, LOG_ODDS, OUTCOME],
            [SHARP],
        ),
        (
            {"kind": "sglang", "max_listed": 20, "takes_ids": True},
            "any tokens that it is asked for and the 20 most probable tokens",
            [WORDS, LOG_ODDS, OUTCOME],
            [SHARP],
        ),
        ({"kind": "vllm", "max_listed": 20}, "the 20 most probable tokens", [], [OUTCOME, SHARP]),
        ({"kind": "plain", "max_listed": 50}, "most probable tokens", [], [OUTCOME, SHARP]),
    ],
    ids=["vllm-all", "llamacpp", "vllm-ids", "sglang", "vllm-20", "plain"],
)
def test_margins_and_responses_are_those_of_the_model_on_this_machine(
    local, folder, prompts, settings, told, exact, bounded
):
    plain = {
        readout.name + str(readout.sharpness): score_prompts(
            local.loaded_model, local.engine, NONE, prompts, readout
        )
        for readout in ALL
    }
    with serve(local, root=str(folder / "tiny"), **settings) as server:
        tells_root = server.kind in ("vllm", "sglang")
        model, engine = open_model(server.address, None if tells_root else folder / "tiny")
        assert told in model.notices[0] and model.context_length in (512, 2**31)
        for readout in [*exact, *bounded]:
            true = plain[readout.name + str(readout.sharpness)]
            scores = score_prompts(model, engine, NONE, prompts, readout)
            if readout in exact:
                assert torch.allclose(scores[:, 0], true[:, 0], atol=1e-4)
                assert torch.allclose(scores[:, 1], true[:, 1], atol=1e-4)
                continue
            low, high = scores[:, 2], scores[:, 3]
            assert (low < high).all() and (scores[:, 0] == (low + high) / 2).all()
            assert ((low <= true[:, 0] + 1e-6) & (true[:, 0] <= high + 1e-6)).all()
        responses = generate_token_ids(engine, prompts, 6, model.end_token_ids)
    expected = generate_token_ids(local.engine, prompts, 6, local.loaded_model.end_token_ids)
    if settings["kind"] != "plain":
        assert responses == expected

    def decode(ids):  # the text of a plain server is encoded again, which loses halves of characters
        return re.sub("\ufffd+", "?", local.loaded_model.tokenizer.decode(ids, skip_special_tokens=True))

    for response, true in zip(map(decode, responses), map(decode, expected), strict=True):
        assert response == true if settings["kind"] != "plain" else true.startswith(response.rstrip("?"))


def test_side_effects_are_those_of_the_model_on_this_machine_and_nothing_is_sampled(local, folder):
    queries = load_queries("contrast").select_split("test").limit_queries(4).queries
    chats = DIRECT_ATTACK.build_query_chats(queries)
    policy = {"policy": get_defense("policy")}

    def measure(session):
        found = iterate_divergences(
            session, NONE, policy, chats, (), lambda name, error: pytest.fail(str(error))
        )
        return torch.tensor([values for _, part in found for values in part])

    with serve(local, kind="vllm") as server:
        model, engine = open_model(server.address, folder / "tiny")
        served = ModelSession.from_model(model, engine=engine)
        assert torch.allclose(measure(served), measure(local), atol=1e-4)
        with pytest.raises(UserError, match="--samples: tokens are drawn from a model on this machine"):
            generate_token_ids(engine, [[5, 6]], 2, frozenset(), sampling=Sampling(1.0, "0"))


def test_a_failed_call_is_repeated(local, folder, prompts):
    with serve(local) as server:
        model, engine = open_model(server.address, folder / "tiny")
        failures = iter([500, 503])
        server.get_status = lambda n_calls: next(failures, 200)
        scores = score_prompts(model, engine, NONE, prompts, OUTCOME)
    plain = score_prompts(local.loaded_model, local.engine, NONE, prompts, OUTCOME)
    assert torch.allclose(scores, plain, atol=1e-4) and next(failures, None) is None


@pytest.mark.parametrize("max_listed", [None, 20])
def test_an_interrupted_run_that_is_resumed_asks_for_nothing_twice(
    local, folder, prompts, tmp_path, max_listed
):
    cache = ScoreCache(tmp_path / "scores.sqlite")
    many = [(*prompts[0], *range(10, 10 + n)) for n in range(1, 21)]
    with serve(local, max_listed=max_listed) as server:
        model, engine = open_model(server.address, folder / "tiny")
        server.calls.clear()
        server.get_status = lambda n_calls: 400 if n_calls >= 11 else 200  # no failure that may pass
        with pytest.raises(UserError, match="it fails on purpose"):
            score_prompts(model, engine, NONE, many, OUTCOME, cache)
        server.get_status = lambda n_calls: 200
        resumed = score_prompts(model, engine, NONE, many, OUTCOME, cache)
        asked = Counter(tuple(body["prompt"]) for body in server.completions())
    assert asked == dict.fromkeys(many, 1)
    plain = score_prompts(local.loaded_model, local.engine, NONE, many, OUTCOME)
    assert torch.allclose(resumed[:, 0], plain[:, 0], atol=1e-4 if max_listed is None else 5)


class OtherTokenizer:
    """The tokenizer of another model, which writes other text."""

    eos_token_id = 2

    def decode(self, ids, **_):
        """Return another text."""
        return "quite another text"


def test_a_server_that_cannot_be_used_is_refused_in_one_line(local, folder):
    model = local.loaded_model.model
    with serve(local, root="./model-of-the-server") as server:
        with pytest.raises(UserError, match=r"does not tell where the tokenizer .*--tokenizer FOLDER"):
            open_model(server.address, None)
        with pytest.raises(UserError, match=r"unknown model at 127\.0\.0\.1 'tiny2'.*'tiny'"):
            open_model(f"{server.address}2", folder / "tiny")
    with serve_model(model, OtherTokenizer()) as server, pytest.raises(UserError, match="does not fit"):
        open_model(server.address, folder / "tiny")
    with serve(local, max_listed=0) as server, pytest.raises(UserError, match="no log-probabilities"):
        open_model(server.address, folder / "tiny")
    with serve(local, n_added=1) as server, pytest.raises(UserError, match="adds or cuts off tokens"):
        open_model(server.address, folder / "tiny")


def no_texts(name: str):
    """Return the texts of no data set."""
    return {}, ""


@pytest.fixture(scope="module")
def data(folder):
    """A file of queries with a calibration split of its own, so that few responses are needed."""
    rows = []
    for split, n in (("calibration", 6), ("test", 8)):
        for query in load_queries("contrast").select_split(split).limit_queries(n).queries:
            rows.append({"text": query.text, "harmful": query.harmful, "split": split})
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_run_equals_that_of_the_model_on_this_machine_and_no_file_holds_a_secret(
    local, folder, data, monkeypatch, no_figures
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    options = ["-d", "paraphrase", "--data", data, "--controls", 0]
    with serve(local, root=str(folder / "tiny")) as server:
        address = server.address.replace("://", "://my-user:pass-word@")
        result = run_cli(*options, "-m", address, "-o", folder / "served-run")
        assert result.code == 0, result.err
        headers = {values["Authorization"].partition(" ")[0] for *_, values in server.calls}
        assert headers == {"Basic"}
        n_calls = len(server.completions())
        again = run_cli(*options, "-m", server.address, "-o", folder / "again")
        assert again.code == 0 and "reused from earlier runs" in again.err
        # All but the first token of a short prompt, which shows what the server does, is in the cache.
        assert len(server.completions()) - n_calls < 10
    assert run_cli(*options, "-m", folder / "tiny", "-o", folder / "local-run").code == 0
    served, plain = (read_run(folder / name, no_texts) for name in ("served-run", "local-run"))
    pd.testing.assert_frame_equal(served.tables["scores"], plain.tables["scores"], atol=1e-4)
    assert served.tables["responses"].equals(plain.tables["responses"])
    record = served.record
    assert record["model"]["name"] == server.address and record["device"] == "server"
    assert record["model"]["server"]["versions"] == {"version": "0.0.test"}
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        assert not any(secret in content for secret in (KEY.encode(), b"pass-word", b"my-user")), path
    assert not any(secret in result.err + result.out for secret in (KEY, "pass-word"))


def test_a_run_with_bounded_margins_says_how_many_verdicts_are_undecided(local, folder, data, no_figures):
    with serve(local, root=str(folder / "tiny"), max_listed=5) as server:
        options = ["-d", "policy", "-m", server.address, "--data", data, "--controls", 0]
        result = run_cli(*options, "-o", folder / "few")
        words = run_cli(*options, "--readout", "words")
    assert result.code == 0, result.err
    run = read_run(folder / "few", no_texts)
    scores, threshold = run.tables["scores"], run.record["readout"]["threshold"]
    assert (scores["margin_low"] < scores["margin_high"]).all()
    is_open = (scores["margin_low"] <= threshold) & (scores["margin_high"] > threshold)
    assert sum(run.record["undecided"].values()) == is_open.sum()
    told = f"{is_open.sum()} of {len(scores)} verdicts by margin are undecided"
    assert any(told in notice for notice in run.record["notices"])
    assert_user_error(words, "--readout words", "not listed", "--readout outcome")


def test_undecided_queries_are_counted_and_left_out_where_no_response_was_judged():
    rows = [
        # query, harmful, defense, lower and upper bound
        ("a", True, "none", -1.0, -0.5),
        ("b", True, "none", -1.0, 1.0),
        ("c", False, "none", 0.5, 1.0),
        ("a", True, "policy", 0.2, 0.4),
        ("b", True, "policy", 0.2, 0.4),
        ("c", False, "policy", 0.0, 0.4),
    ]
    frame = pd.DataFrame(rows, columns=["query", "harmful", "defense", "margin_low", "margin_high"])
    frame = frame.assign(pair="", category="", attack="direct", p_refuse=0.5, prompt_tokens=9, coverage=1.0)
    frame["margin"] = (frame["margin_low"] + frame["margin_high"]) / 2
    console = Console(file=io.StringIO(), width=500)
    for threshold, n_open, left in ((0.1, 2, {"a"}), (-0.1, 1, {"a", "c"})):
        scores = ScoreTable(frame, {"readout": {"threshold": threshold}, "notices": []})
        assert settle_undecided(scores, True, console) is scores
        assert sum(scores.record["undecided"].values()) == n_open
        assert f"{n_open} of 6 verdicts by margin are undecided" in scores.record["notices"][0]
        if left == {"a"}:
            with pytest.raises(UserError, match="a class has none left"):
                settle_undecided(scores, False, console)
        else:
            assert set(settle_undecided(scores, False, console).frame["query"]) == left


def test_what_needs_weights_is_left_out_or_refused_by_name(local, folder, data):
    kept, notices = _select_without_weights(choose_defenses(["all"], []), leave_out=True)
    names = {defense.name for defense in kept}
    assert {
        "none",
        "policy",
        "self_reminder",
        "paraphrase",
        "smooth_llm",
        "self_examination",
        "guard_model",
    } <= names
    assert not names & {"refusal_steering", "safety_tuning", "safe_decoding", "hidden_detect"}
    assert any(
        notice.startswith("refusal_steering: skipped: it changes or reads weights") for notice in notices
    )
    with serve(local, root=str(folder / "tiny")) as server:
        for name, reason in (("refusal_steering", "not served"), ("perplexity_filter", "not served")):
            assert_user_error(run_cli("-d", name, "-m", server.address, "--data", data), name, reason)
        for command in (["mechanism"], ["ensembles"]):
            assert_user_error(
                run_cli(*command, "-d", "policy", "-m", server.address), "needs the model's weights"
            )
        assert_user_error(run_cli("-d", "policy", "-m", server.address, "--cost"), "--cost", "weights")
    assert_user_error(run_cli("-d", "policy", "--tokenizer", "x"), "--tokenizer x: only a served model")

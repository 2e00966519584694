"""Model judges: endpoints that work, reply nonsense or fail; local chat models; classifiers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_toy_session, save_model, toy_tokenizer
from served_endpoint import serve_endpoint
from sklearn.metrics import cohen_kappa_score

from analysis.api import judge as api_judge
from analysis.cli.validate import run_judge_command, run_validate_command
from analysis.judges import endpoint
from analysis.judges.endpoint import CallBudget, EndpointChatModel
from analysis.judges.model_judges import (
    GradingRubric,
    LocalChatModel,
    ModelJudge,
    RefusalClassifier,
    _fill_rubric,
    _parse_grade,
    _parse_verdict,
    load_model_judge,
)
from analysis.studies.judge_file import JudgeOptions
from analysis.studies.run_spec import RunSpec
from defenses.errors import UserError

waits: list[float] = []  # seconds that the client would have waits before its calls
TEXTS = [f"{word} the letter to {n}" for n in range(5) for word in ("sorry", "sure", "bread", "take")]
ROWS = [{"response": f"answer {n}", "asked": f"request {n}"} for n in range(6)]


@pytest.fixture
def response_file(tmp_path: Path) -> Path:
    pd.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    return tmp_path / "a.csv"


@pytest.fixture(autouse=True)
def skip_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        EndpointChatModel, "_wait_before_retry", lambda chat_model, seconds: waits.append(seconds)
    )
    waits.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")


def make_options(address: str, budget: int | None = 50, rubric: Path | None = None) -> JudgeOptions:
    return JudgeOptions("model", address, budget, rubric)


def test_an_endpoint_judges_by_the_rubric_and_the_key_is_never_shown(
    response_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_endpoint(lambda prompt, n: (200, " Partial." if "answer 2" in prompt else "none")) as (
        address,
        requests,
    ):
        assert (
            run_judge_command(response_file, "response", "asked", make_options(address), None, offline=True)
            == 0
        )
    judged = pd.read_csv(response_file.with_name("a.judged.csv"))
    assert judged["refusal"].tolist() == ["none", "none", "partial", "none", "none", "none"]
    assert judged["evidence"][2] == "Partial." and len(requests) == 6
    prompts = [request["messages"][0]["content"] for request in requests]
    assert all(any(f"answer {n}" in p and f"request {n}" in p for p in prompts) for n in range(6))
    assert requests[0]["model"] == "judge" and requests[0]["path"] == "/v1/chat/completions"
    assert requests[0]["key"] == "Bearer sk-very-secret-key"
    output = capsys.readouterr()
    assert "judge: model judge at 127.0.0.1" in output.out
    assert "secret-key" not in output.out + output.err + response_file.with_name("a.judged.csv").read_text()


def test_failed_calls_are_retried_and_invalid_replies_are_requested_again_once(response_file: Path) -> None:
    pending = {"answer 1", "answer 2"}  # the first reply to these is invalid

    def answer(prompt: str, n: int) -> tuple[int, str]:
        if n < 3:
            return 503, "busy"
        first = {text for text in pending if text in prompt}
        pending.difference_update(first)
        return 200, "hm" if first else "full"

    with serve_endpoint(answer) as (address, requests):
        assert run_judge_command(response_file, "response", None, make_options(address), None) == 0
    assert (
        set(pd.read_csv(response_file.with_name("a.judged.csv"))["refusal"]) == {"full"}
        and len(requests) == 11
    )


def test_responses_without_a_verdict_are_reported_and_judged_on_the_next_call(
    response_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_endpoint(lambda prompt, n: (200, "no idea" if "answer 4" in prompt else "full")) as (
        address,
        _,
    ):
        assert run_judge_command(response_file, "response", None, make_options(address), None) == 1
    first = response_file.with_name("a.judged.csv")
    judged = pd.read_csv(first)
    assert judged["refusal"].tolist() == ["full"] * 4 + ["unjudged", "full"]
    output = capsys.readouterr()
    assert (
        "1 responses have no verdict, mostly: the judge replied 'no idea'" in output.err
        and "judge: model judge at 127.0.0.1" in output.out
    )
    with serve_endpoint(lambda prompt, n: (200, "none")) as (address, requests):
        assert (
            run_judge_command(
                first, "response", None, make_options(address), response_file.with_name("b.csv")
            )
            == 0
        )
    assert len(requests) == 1
    assert pd.read_csv(response_file.with_name("b.csv"))["refusal"].tolist() == ["full"] * 4 + [
        "none",
        "full",
    ]
    # Another judge's verdicts beside these would be taken for one judge's.
    with pytest.raises(UserError, match=r"was judged by model judge at 127\.0\.0\.1, so learned cannot"):
        run_judge_command(first, "response", None, JudgeOptions(), response_file.with_name("c.csv"))


def test_a_rejected_text_does_not_affect_the_others(response_file: Path) -> None:
    for status, text in ((403, "flagged"), (413, "too long"), (200, "")):
        said = None if status == 200 else text

        def answer(prompt: str, n: int, status: int = status, said: str | None = said) -> tuple[int, Any]:
            return (status, said) if "answer 1" in prompt else (200, "none")

        with serve_endpoint(answer) as (address, _):
            assert (
                run_judge_command(
                    response_file,
                    "response",
                    None,
                    make_options(address),
                    response_file.with_name(f"{status}.csv"),
                )
                == 1
            )
        found = pd.read_csv(response_file.with_name(f"{status}.csv"))["refusal"].tolist()
        assert found == ["none", "unjudged", *["none"] * 4]


def test_the_client_waits_as_long_as_retry_after_says(response_file: Path) -> None:
    with serve_endpoint(lambda prompt, n: (429, "slowly") if n < 2 else (200, "full")) as (address, _):
        assert run_judge_command(response_file, "response", None, make_options(address), None) == 0
    assert waits.count(30.0) == 2 and max(waits) == 30


def test_an_interrupt_keeps_the_verdicts_so_far(response_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = as_completed

    def interrupt_third(futures: Any) -> Iterator[Any]:
        for count, future in enumerate(original(futures)):
            if count == 3:
                raise KeyboardInterrupt
            yield future

    monkeypatch.setattr(endpoint, "as_completed", interrupt_third)
    with serve_endpoint(lambda prompt, n: (200, "full")) as (address, _):
        assert run_judge_command(response_file, "response", None, make_options(address), None) == 130
    judged = pd.read_csv(response_file.with_name("a.judged.csv"))
    assert (judged["refusal"] == "full").sum() == 3
    assert set(judged["evidence"]) == {"full", "interrupted"}


def test_a_budget_counts_every_call(response_file: Path) -> None:
    with serve_endpoint(lambda prompt, n: (200, "full")) as (address, requests):
        assert run_judge_command(response_file, "response", None, make_options(address, budget=4), None) == 1
    judged = pd.read_csv(response_file.with_name("a.judged.csv"))
    assert len(requests) == 4 and (judged["refusal"] == "full").sum() == 4
    assert set(judged.loc[judged["refusal"] == "unjudged", "evidence"]) == {"budget spent"}
    assert set(judged["judge"]) == {"model judge at 127.0.0.1"}


@pytest.mark.parametrize("status", [401, 404, 400, 500])
def test_an_endpoint_that_always_fails_is_a_one_line_error_and_nothing_is_written(
    response_file: Path, status: int
) -> None:
    failing = serve_endpoint(lambda prompt, n: (status, "sk-very-secret-key is wrong"))
    with failing as (address, requests), pytest.raises(UserError, match="gave no verdict") as error:
        run_judge_command(response_file, "response", None, make_options(address), None)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    # What is wrong for all is not asked again and again for each.
    assert len(requests) <= {401: 8, 404: 8, 400: 6, 500: 7 * 6}[status]
    assert [path.name for path in response_file.parent.iterdir()] == ["a.csv"]


def test_an_unreachable_endpoint_is_a_one_line_error(response_file: Path) -> None:
    with serve_endpoint(lambda prompt, n: (200, "full")) as (address, _):
        pass
    with pytest.raises(UserError, match="gave no verdict: APIConnectionError"):
        run_judge_command(response_file, "response", None, make_options(address), None)


def test_a_slow_endpoint_is_called_again_and_then_given_up(
    response_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.judges.endpoint._TIMEOUT_SECONDS", 0.2)
    over = threading.Event()

    def slow(prompt: str, n: int) -> tuple[int, str]:
        over.wait(20)
        return 200, "full"

    with serve_endpoint(slow) as (address, _):
        try:
            with pytest.raises(UserError, match="gave no verdict: APITimeoutError"):
                run_judge_command(response_file, "response", None, make_options(address, budget=500), None)
        finally:
            over.set()


def test_an_endpoint_that_fails_halfway_loses_no_verdict(response_file: Path) -> None:
    with serve_endpoint(lambda prompt, n: (200, "full") if n < 3 else (401, "no")) as (address, _):
        assert run_judge_command(response_file, "response", None, make_options(address), None) == 1
    judged = pd.read_csv(response_file.with_name("a.judged.csv"))
    assert (judged["refusal"] == "full").sum() == 3 and len(judged) == 6


def test_invalid_options_are_reported_before_anything_is_sent(response_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.txt").write_text("full or none?")
    for wanted, said in (
        (JudgeOptions("model"), "--judge-model ID"),
        (make_options("http://127.0.0.1:1/v1#x", budget=None), "maximum number of calls with --budget"),
        (make_options("http://127.0.0.1:1/v1#x", budget=0), "--budget"),
        (make_options("http://127.0.0.1:1/v1"), "add the name of the model to the address"),
        (make_options("https://example.com/v1#x"), "--offline forbids it"),
        (
            make_options("http://127.0.0.1:1/v1#x", rubric=tmp_path / "bare.txt"),
            r"lacks \{request\} and \{answer\}",
        ),
        (make_options("http://127.0.0.1:1/v1#x", rubric=tmp_path / "no.txt"), "cannot be read"),
        (make_options("http://u:pw@[::1/v1#x"), "invalid address"),
        (make_options("http://localhost:abc/v1#x"), "invalid address"),
        (JudgeOptions("patterns", "x"), "--judge-model is for --judge model"),
        (JudgeOptions("patterns", budget=5), "--budget is for --judge model"),
    ):
        with pytest.raises(UserError, match=said) as error:
            run_judge_command(response_file, "response", None, wanted, None, offline=True)
        assert "pw" not in str(error.value)
    with pytest.raises(UserError, match="plain http"):
        run_judge_command(response_file, "response", None, make_options("http://example.com/v1#x"), None)
    with pytest.raises(UserError, match="up to 200 calls"):
        JudgeOptions("model", "x", 50, grade=True).check_budget(100)


def test_placeholders_in_queries_and_responses_are_not_filled_in() -> None:
    filled = _fill_rubric("{request} / {answer}", ["tell {request}", "b"], ["{answer}?", ""])
    assert filled == ["{answer}? / tell {request}", "(not known) / b"]


def test_verdicts_and_grades_are_parsed_in_their_usual_forms() -> None:
    words = {
        "**Partial**": "partial",
        "None.": "none",
        "<think>full?</think>none": "none",
        "Fully": "",
        "": "",
    }
    assert {text: _parse_verdict(text) for text in words} == words
    grades = {"8/10": 8, "Grade: 10": 10, "<think>3</think> 7": 7, "eleven": 0, "0": 0, "75": 0, "**9**": 9}
    grades |= {"On a scale from 1 to 10: 8": 0, "0.5/10": 0, "6 out of 10.": 6}
    assert {text: _parse_grade(text, 10) for text in grades} == grades
    assert [_parse_grade(text, 5) for text in ("5", "4/5", "6", "10", "4/10")] == [5, 4, 0, 0, 0]


def test_grades_are_numbers_from_one_to_ten_and_cached() -> None:
    with serve_endpoint(lambda prompt, n: (200, "9" if "good" in prompt else "great")) as (address, requests):
        judge = load_model_judge(address, 20, None, True, print)
        assert isinstance(judge, ModelJudge)
        helpfulness = GradingRubric.load("helpfulness")
        first, second, again = judge.grade_responses(["good", "bad", "good"], ["a", "b", "a"], helpfulness)
        assert (
            judge.grade_responses(["good"], ["a"], helpfulness) == [9] and len(requests) == 3
        )  # nonsense twice; no answer twice
        # The other rubric is another question, and its grades end at 5.
        (harm,) = judge.grade_responses(["good"], ["a"], GradingRubric.load("harmfulness"))
        assert harm != harm and "from 1 to 5" in requests[-1]["messages"][0]["content"]
    assert first == again == 9 and second != second


def test_a_file_is_graded_and_compared_with_peoples_grades(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "r.csv", tmp_path / "out.csv"
    labels = [1, 1, 5, 4, "", 5]
    rows = [
        {"asked": f"q{row}", "response": f"grade me {grade}", "people": label}
        for row, (grade, label) in enumerate(zip((1, 2, 5, 4, 3, 5), labels, strict=True))
    ]
    pd.DataFrame(rows).to_csv(path, index=False)

    def answer(prompt: str, n: int) -> tuple[int, str]:
        grade = re.search(r"grade me (\d)", prompt)
        return 200, "none" if "full, partial or none" in prompt or grade is None else grade[1]

    with serve_endpoint(answer) as (address, requests):
        options = JudgeOptions("model", address, 50, None, grade=True)
        assert run_judge_command(path, "response", "asked", options, out, label_column="people") == 0
        frame = api_judge(
            path, request="asked", judge="model", judge_model=address, budget=50, grade=True, labels="people"
        )
        assert frame.attrs["harmfulness"]["n_labeled"] == 5 and frame["harmfulness"].sum() == 20
        with pytest.raises(UserError, match="needs the requests"):
            run_judge_command(path, "response", None, options, tmp_path / "b.csv")
    assert pd.read_csv(out)["harmfulness"].tolist() == [1, 2, 5, 4, 3, 5] and len(requests) == 24
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Harmfulness"))
    kappa = cohen_kappa_score([1, 2, 5, 4, 5], [1, 1, 5, 4, 5], labels=range(1, 6), weights="quadratic")
    assert "mean 3.33" in line and "5 grades by people: equal 80 " in line and f"kappa {kappa:.2f}" in line
    pd.DataFrame(rows).assign(people=7).to_csv(path, index=False)
    with pytest.raises(UserError, match=r"people=7: .* from 1 to 5"):
        run_judge_command(path, "response", "asked", options, tmp_path / "c.csv", label_column="people")


def test_a_local_chat_model_with_invalid_replies_leaves_responses_unjudged(
    tmp_path: Path, response_file: Path
) -> None:
    save_model(tmp_path / "toy")
    with pytest.raises(UserError, match="gave no verdict: the judge replied"):
        run_judge_command(
            response_file, "response", "asked", make_options(str(tmp_path / "toy")), None, offline=True
        )


def test_a_local_chat_model_keeps_to_its_budget_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model = LocalChatModel(make_toy_session(), CallBudget(2))
    found = chat_model.generate_replies(["a", "b " * 3000, "c", "d"], lambda text: True, lambda count: None)
    assert [why for _, why in found] == ["", "longer than the judge's context", "", "budget spent"]
    assert chat_model.generate_replies(["e"], lambda text: True, lambda count: None) == [("", "budget spent")]
    judge = ModelJudge(LocalChatModel(make_toy_session(), CallBudget(2)), "{request}{answer}")
    assert judge.judge_responses(["x"], ["y"])[0].refusal == "unjudged" and judge.name == "model toy"
    monkeypatch.setattr("analysis.judges.model_judges._parse_verdict", lambda text: "partial")
    assert judge.judge_responses(["x"], ["y"])[0].refusal == "partial"


def save_classifier(folder: Path, labels: dict[int, str]) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=960, id2label=labels, pad_token_id=3, initializer_range=1.0, **sizes)
    model, tokenizer = BertForSequenceClassification(config).eval(), toy_tokenizer(None)
    with torch.no_grad():  # so that TEXTS are of both kinds
        model.classifier.weight *= 20
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        model.classifier.bias -= model(**batch).logits.mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_judges_by_its_refusal_labels(tmp_path: Path) -> None:
    name = str(save_classifier(tmp_path / "c", {0: "NORMAL", 1: "REJECTION"}))
    judge = load_model_judge(name, 5, None, True, print)
    assert isinstance(judge, RefusalClassifier) and judge.refusal_labels == (1,)
    unlimited_judge = RefusalClassifier(judge.name, judge.model, judge.tokenizer, (1,), CallBudget(40))
    found = unlimited_judge.judge_responses(TEXTS, [""] * 20)
    alone = [unlimited_judge.judge_responses([text], [""])[0] for text in TEXTS]
    assert [verdict.refusal for verdict in found] == [verdict.refusal for verdict in alone]
    assert {verdict.refusal for verdict in found} == {"full", "none"}
    assert [verdict.refusal for verdict in judge.judge_responses(TEXTS, [""] * 20)][5:] == ["unjudged"] * 15
    with pytest.raises(UserError, match="this classifier has no label"):
        load_model_judge(str(save_classifier(tmp_path / "d", {0: "A", 1: "B"})), 5, None, True, print)


def test_the_endpoint_announces_where_texts_are_sent() -> None:
    notices: list[str] = []
    EndpointChatModel.from_address("https://judge.example.com/v1#m", 5, False, notices.append)
    assert notices == [
        "queries and responses are sent to judge.example.com for judging, with the key in OPENAI_API_KEY"
    ]
    EndpointChatModel.from_address("http://localhost:8000/v1#m", 5, True, notices.append)
    assert len(notices) == 1


def test_a_model_judge_serves_a_validation_and_finished_conditions_outlive_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "toy")
    spec = RunSpec(str(tmp_path / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)

    def judge_prompt(prompt: str, n: int) -> tuple[int, str]:
        # The verdict depends on the query alone: the order of concurrent calls is random.
        query = prompt.partition("===== request =====\n")[2].partition("\n===== reply")[0]
        if "1 to 5" in prompt:
            return 200, "5" if len(query) % 2 else "1"
        return (200, "7") if "1 to 10" in prompt else (200, ("full", "none")[len(query) % 2])

    with serve_endpoint(judge_prompt) as (address, requests):
        options = JudgeOptions("model", address, 500, None, grade=True)
        assert run_validate_command(spec, ["policy"], [], tmp_path / "out", options, 2) == 0
    verdicts = [
        request for request in requests if "full, partial or none" in request["messages"][0]["content"]
    ]
    assert len(verdicts) == 24 and len(requests) > 24
    quality = pd.read_csv(tmp_path / "out" / "worth.csv")
    assert (quality["grade"] == 7).all() and (quality["grade_change"] == 0).all() and "asr_model" in quality
    # Harmfulness and refusal depend on the same thing here, so that the share of 5 is the rate of compliance.
    assert np.allclose(quality["harmfulness_5"], quality["asr_model"])
    assert np.allclose(quality["harmfulness"], 1 + 4 * quality["asr_model"])
    shown = capsys.readouterr().out
    assert "grade (1 to 10)" in shown and "harmfulness" in shown
    judge_record = json.loads((tmp_path / "out" / "run.json").read_text())["judge"]
    assert (
        judge_record["name"] == "model judge at 127.0.0.1"
        and judge_record["budget"] == 500
        and judge_record["rubric_sha256"]
    )
    failing = serve_endpoint(lambda prompt, n: (200, "none") if n < 15 else (401, "no more"))
    with failing as (address, _), pytest.raises(UserError, match=r"gives no more verdicts: .*no more"):
        run_validate_command(
            spec, ["policy", "safety_prompt"], [], tmp_path / "two", make_options(address), 2
        )
    validity = pd.read_csv(tmp_path / "two" / "validity.csv").set_index("defense")
    assert list(validity.index) == ["none", "policy"] and 0 < validity.loc["policy", "unjudged"] < 12
    failing = serve_endpoint(lambda prompt, n: (401, "no key"))
    with failing as (address, _), pytest.raises(UserError, match="gives no more verdicts"):
        run_validate_command(spec, ["policy"], [], tmp_path / "three", make_options(address), 2)
    validity = pd.read_csv(tmp_path / "three" / "validity.csv")
    assert validity["n"].tolist() == [0] and validity["trusted"].tolist() == ["cannot tell"]
    with pytest.raises(UserError, match="up to 24 calls of the judge are needed"):
        run_validate_command(spec, ["policy"], [], tmp_path / "four", make_options(address, budget=20), 2)

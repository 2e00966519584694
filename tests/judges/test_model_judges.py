"""A model as judge: endpoints that work, talk nonsense or fail; local models; classifiers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import save_model, toy_bench, toy_tokenizer

from analysis.cli.validate import run_judge_command, run_validate_command
from analysis.judges import endpoint
from analysis.judges.endpoint import CallBudget, EndpointChatModel
from analysis.judges.model_judges import (
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

waited: list[float] = []  # seconds that an endpoint would have waited before its tries
Answer = Callable[[str, int], tuple[int, str]]
TEXTS = [f"{word} the letter to {n}" for n in range(5) for word in ("sorry", "sure", "bread", "take")]
ROWS = [{"response": f"answer {n}", "asked": f"request {n}"} for n in range(6)]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an OpenAI-compatible endpoint; `answer` is told the prompt and how often it was called before."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, text = answer(body["messages"][0]["content"], len(seen))
                seen.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            said = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
            about = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            reply = json.dumps(said | about if status == 200 else {"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            if status == 429:
                self.send_header("Retry-After", "30")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#judge", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    pd.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    return tmp_path / "a.csv"


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        EndpointChatModel, "_wait_before_retry", lambda endpoint, seconds: waited.append(seconds)
    )
    waited.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")


def jury(address: str, budget: int | None = 50, rubric: Path | None = None) -> JudgeOptions:
    return JudgeOptions("model", address, budget, rubric)


def test_an_endpoint_judges_by_the_rubric_and_the_key_shows_nowhere(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt, n: (200, " Partial." if "answer 2" in prompt else "none")) as (address, seen):
        assert run_judge_command(answers, "response", "asked", jury(address), None, offline=True) == 0
    judged = pd.read_csv(answers.with_name("a.judged.csv"))
    assert judged["refusal"].tolist() == ["none", "none", "partial", "none", "none", "none"]
    assert judged["evidence"][2] == "Partial." and len(seen) == 6
    prompts = [one["messages"][0]["content"] for one in seen]
    assert all(any(f"answer {n}" in p and f"request {n}" in p for p in prompts) for n in range(6))
    assert seen[0]["model"] == "judge" and seen[0]["path"] == "/v1/chat/completions"
    assert seen[0]["key"] == "Bearer sk-very-secret-key"
    said = capsys.readouterr()
    assert "6 answers, judge: model judge at 127.0.0.1" in said.out
    assert "secret-key" not in said.out + said.err + answers.with_name("a.judged.csv").read_text()


def test_failures_are_tried_again_and_nonsense_once(answers: Path) -> None:
    odd = {"answer 1", "answer 2"}  # judged by nonsense the first time, whoever asks first

    def answer(prompt: str, n: int) -> tuple[int, str]:
        if n < 3:
            return 503, "busy"
        first = {one for one in odd if one in prompt}
        odd.difference_update(first)
        return 200, "hm" if first else "full"

    with serving(answer) as (address, seen):
        assert run_judge_command(answers, "response", None, jury(address), None) == 0
    assert set(pd.read_csv(answers.with_name("a.judged.csv"))["refusal"]) == {"full"} and len(seen) == 11


def test_what_has_no_verdict_is_said_and_judged_when_the_file_comes_again(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt, n: (200, "no idea" if "answer 4" in prompt else "full")) as (address, _):
        assert run_judge_command(answers, "response", None, jury(address), None) == 1
    first = answers.with_name("a.judged.csv")
    judged = pd.read_csv(first)
    assert judged["refusal"].tolist() == ["full"] * 4 + ["unjudged", "full"]
    said = capsys.readouterr()
    assert (
        "1 answers have no verdict, mostly: the judge replied 'no idea'" in said.err
        and "5 answers" in said.out
    )
    with serving(lambda prompt, n: (200, "none")) as (address, seen):
        assert run_judge_command(first, "response", None, jury(address), answers.with_name("b.csv")) == 0
    assert len(seen) == 1
    assert pd.read_csv(answers.with_name("b.csv"))["refusal"].tolist() == ["full"] * 4 + ["none", "full"]
    # Another judge's verdicts beside these would be taken for one judge's.
    with pytest.raises(UserError, match=r"was judged by model judge at 127\.0\.0\.1, so patterns cannot"):
        run_judge_command(first, "response", None, JudgeOptions(), answers.with_name("c.csv"))


def test_one_text_that_is_not_read_leaves_the_others_alone(answers: Path) -> None:
    for status, text in ((403, "flagged"), (413, "too long"), (200, "")):
        said = None if status == 200 else text

        def answer(prompt: str, n: int, status: int = status, said: str | None = said) -> tuple[int, Any]:
            return (status, said) if "answer 1" in prompt else (200, "none")

        with serving(answer) as (address, _):
            assert (
                run_judge_command(
                    answers, "response", None, jury(address), answers.with_name(f"{status}.csv")
                )
                == 1
            )
        found = pd.read_csv(answers.with_name(f"{status}.csv"))["refusal"].tolist()
        assert found == ["none", "unjudged", *["none"] * 4]


def test_an_endpoint_is_given_the_time_that_it_asks_for(answers: Path) -> None:
    with serving(lambda prompt, n: (429, "slowly") if n < 2 else (200, "full")) as (address, _):
        assert run_judge_command(answers, "response", None, jury(address), None) == 0
    assert waited.count(30.0) == 2 and max(waited) == 30


def test_interrupted_it_gives_what_there_is(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = as_completed

    def until_the_third(places: Any) -> Iterator[Any]:
        for count, one in enumerate(right(places)):
            if count == 3:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(endpoint, "as_completed", until_the_third)
    with serving(lambda prompt, n: (200, "full")) as (address, _):
        assert run_judge_command(answers, "response", None, jury(address), None) == 130
    judged = pd.read_csv(answers.with_name("a.judged.csv"))
    assert (judged["refusal"] == "full").sum() == 3
    assert set(judged["evidence"]) == {"full", "interrupted"}


def test_a_budget_counts_every_call(answers: Path) -> None:
    with serving(lambda prompt, n: (200, "full")) as (address, seen):
        assert run_judge_command(answers, "response", None, jury(address, budget=4), None) == 1
    judged = pd.read_csv(answers.with_name("a.judged.csv"))
    assert len(seen) == 4 and (judged["refusal"] == "full").sum() == 4
    assert set(judged.loc[judged["refusal"] == "unjudged", "evidence"]) == {"budget spent"}
    assert set(judged["judge"]) == {"model judge at 127.0.0.1"}


@pytest.mark.parametrize("status", [401, 404, 400, 500])
def test_an_endpoint_that_only_fails_is_one_line_and_nothing_is_written(answers: Path, status: int) -> None:
    failing = serving(lambda prompt, n: (status, "sk-very-secret-key is wrong"))
    with failing as (address, seen), pytest.raises(UserError, match="gave no verdict") as error:
        run_judge_command(answers, "response", None, jury(address), None)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    # What is wrong for all is not asked again and again for each.
    assert len(seen) <= {401: 8, 404: 8, 400: 6, 500: 7 * 6}[status]
    assert [path.name for path in answers.parent.iterdir()] == ["a.csv"]


def test_an_endpoint_that_is_down_is_one_line(answers: Path) -> None:
    with serving(lambda prompt, n: (200, "full")) as (address, _):
        pass
    with pytest.raises(UserError, match="gave no verdict: APIConnectionError"):
        run_judge_command(answers, "response", None, jury(address), None)


def test_an_endpoint_that_is_too_slow_is_asked_again_and_then_given_up(
    answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.judges.endpoint._TIMEOUT_SECONDS", 0.2)
    over = threading.Event()

    def slow(prompt: str, n: int) -> tuple[int, str]:
        over.wait(20)
        return 200, "full"

    with serving(slow) as (address, _):
        try:
            with pytest.raises(UserError, match="gave no verdict: APITimeoutError"):
                run_judge_command(answers, "response", None, jury(address, budget=500), None)
        finally:
            over.set()


def test_an_endpoint_that_breaks_down_halfway_loses_nothing(answers: Path) -> None:
    with serving(lambda prompt, n: (200, "full") if n < 3 else (401, "no")) as (address, _):
        assert run_judge_command(answers, "response", None, jury(address), None) == 1
    judged = pd.read_csv(answers.with_name("a.judged.csv"))
    assert (judged["refusal"] == "full").sum() == 3 and len(judged) == 6


def test_what_cannot_be_is_said_before_anything_is_sent(answers: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.txt").write_text("full or none?")
    for wanted, said in (
        (JudgeOptions("model"), "--judge-model ID"),
        (jury("http://127.0.0.1:1/v1#x", budget=None), "maximum number of calls with --budget"),
        (jury("http://127.0.0.1:1/v1#x", budget=0), "--budget"),
        (jury("http://127.0.0.1:1/v1"), "add the name of the model to the address"),
        (jury("https://example.com/v1#x"), "--offline forbids it"),
        (jury("http://127.0.0.1:1/v1#x", rubric=tmp_path / "bare.txt"), r"lacks \{request\} and \{answer\}"),
        (jury("http://127.0.0.1:1/v1#x", rubric=tmp_path / "no.txt"), "cannot be read"),
        (jury("http://u:pw@[::1/v1#x"), "invalid address"),
        (jury("http://localhost:abc/v1#x"), "invalid address"),
        (JudgeOptions("patterns", "x"), "--judge-model is for --judge model"),
        (JudgeOptions("patterns", budget=5), "--budget is for --judge model"),
    ):
        with pytest.raises(UserError, match=said) as error:
            run_judge_command(answers, "response", None, wanted, None, offline=True)
        assert "pw" not in str(error.value)
    with pytest.raises(UserError, match="plain http"):
        run_judge_command(answers, "response", None, jury("http://example.com/v1#x"), None)
    with pytest.raises(UserError, match="up to 200 calls"):
        JudgeOptions("model", "x", 50, grade=True).check_budget(100)


def test_texts_are_put_into_the_rubric_once() -> None:
    filled = _fill_rubric("{request} / {answer}", ["tell {request}", "b"], ["{answer}?", ""])
    assert filled == ["{answer}? / tell {request}", "(not known) / b"]


def test_replies_are_read_as_people_write_them() -> None:
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
    assert {text: _parse_grade(text) for text in grades} == grades


def test_grades_are_numbers_from_one_to_ten() -> None:
    with serving(lambda prompt, n: (200, "9" if "good" in prompt else "great")) as (address, seen):
        judge = load_model_judge(address, 20, None, True, print)
        assert isinstance(judge, ModelJudge)
        first, second, again = judge.grade_responses(["good", "bad", "good"], ["a", "b", "a"])
        assert (
            judge.grade_responses(["good"], ["a"]) == [9] and len(seen) == 3
        )  # nonsense twice; no answer twice
    assert first == again == 9 and second != second


def test_a_local_chat_model_that_talks_nonsense_leaves_answers_unjudged(
    tmp_path: Path, answers: Path
) -> None:
    save_model(tmp_path / "toy")
    with pytest.raises(UserError, match="gave no verdict: the judge replied"):
        run_judge_command(answers, "response", "asked", jury(str(tmp_path / "toy")), None, offline=True)


def test_a_local_chat_model_is_asked_within_its_budget_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = LocalChatModel(toy_bench(), CallBudget(2))
    found = speaker.generate_replies(["a", "b " * 3000, "c", "d"], lambda text: True, lambda count: None)
    assert [why for _, why in found] == ["", "longer than the judge's context", "", "budget spent"]
    assert speaker.generate_replies(["e"], lambda text: True, lambda count: None) == [("", "budget spent")]
    judge = ModelJudge(LocalChatModel(toy_bench(), CallBudget(2)), "{request}{answer}")
    assert judge.judge_responses(["x"], ["y"])[0].refusal == "unjudged" and judge.name == "model toy"
    monkeypatch.setattr("analysis.judges.model_judges._parse_verdict", lambda text: "partial")
    assert judge.judge_responses(["x"], ["y"])[0].refusal == "partial"


def classifier(folder: Path, labels: dict[int, str]) -> Path:
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


def test_a_classifier_says_by_its_labels_whether_an_answer_refuses(tmp_path: Path) -> None:
    name = str(classifier(tmp_path / "c", {0: "NORMAL", 1: "REJECTION"}))
    judge = load_model_judge(name, 5, None, True, print)
    assert isinstance(judge, RefusalClassifier) and judge.refusal_labels == (1,)
    wide = RefusalClassifier(judge.name, judge.model, judge.tokenizer, (1,), CallBudget(40))
    found = wide.judge_responses(TEXTS, [""] * 20)
    alone = [wide.judge_responses([text], [""])[0] for text in TEXTS]
    assert [one.refusal for one in found] == [one.refusal for one in alone]
    assert {one.refusal for one in found} == {"full", "none"}
    assert [one.refusal for one in judge.judge_responses(TEXTS, [""] * 20)][5:] == ["unjudged"] * 15
    with pytest.raises(UserError, match="this classifier has no label"):
        load_model_judge(str(classifier(tmp_path / "d", {0: "A", 1: "B"})), 5, None, True, print)


def test_the_endpoint_says_where_texts_go() -> None:
    told: list[str] = []
    EndpointChatModel.from_address("https://judge.example.com/v1#m", 5, False, told.append)
    assert told == [
        "queries and responses are sent to judge.example.com for judging, with the key in OPENAI_API_KEY"
    ]
    EndpointChatModel.from_address("http://localhost:8000/v1#m", 5, True, told.append)
    assert len(told) == 1


def test_a_model_judges_a_validation_and_what_is_heard_before_it_fails_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "toy")
    request = RunSpec(str(tmp_path / "toy"), "contrast", None, 12, None, "cpu", "auto", 0, True)

    def judging(prompt: str, n: int) -> tuple[int, str]:
        return (200, "7") if "1 to 10" in prompt else (200, ("full", "none")[n % 2])

    with serving(judging) as (address, seen):
        wanted = JudgeOptions("model", address, 500, None, grade=True)
        assert run_validate_command(request, ["policy"], [], tmp_path / "out", wanted, 2) == 0
    verdicts = [one for one in seen if "full, partial or none" in one["messages"][0]["content"]]
    assert len(verdicts) == 24 and len(seen) > 24
    worth = pd.read_csv(tmp_path / "out" / "worth.csv")
    assert (worth["grade"] == 7).all() and (worth["grade_change"] == 0).all() and "asr_model" in worth
    assert "grade (1 to 10)" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "run.json").read_text())["judge"]
    assert about["name"] == "model judge at 127.0.0.1" and about["budget"] == 500 and about["rubric_sha256"]
    failing = serving(lambda prompt, n: (200, "none") if n < 15 else (401, "no more"))
    with failing as (address, _), pytest.raises(UserError, match=r"gives no more verdicts: .*no more"):
        run_validate_command(request, ["policy", "safety_prompt"], [], tmp_path / "two", jury(address), 2)
    found = pd.read_csv(tmp_path / "two" / "validity.csv").set_index("defense")
    assert list(found.index) == ["none", "policy"] and 0 < found.loc["policy", "unjudged"] < 12
    failing = serving(lambda prompt, n: (401, "no key"))
    with failing as (address, _), pytest.raises(UserError, match="gives no more verdicts"):
        run_validate_command(request, ["policy"], [], tmp_path / "three", jury(address), 2)
    found = pd.read_csv(tmp_path / "three" / "validity.csv")
    assert found["n"].tolist() == [0] and found["trusted"].tolist() == ["cannot tell"]
    with pytest.raises(UserError, match="up to 24 calls of the judge are needed"):
        run_validate_command(request, ["policy"], [], tmp_path / "four", jury(address, budget=20), 2)

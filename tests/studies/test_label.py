"""Labels by people: the sampled responses are those that were judged, and what has changed is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_cli
from rich.console import Console

from analysis.api import label_run
from analysis.attacks import get_attack
from analysis.datasets.queries import QuerySet
from analysis.judges.judge import RuleJudge, Verdict
from analysis.judges.rules import RULE_JUDGES
from analysis.models.session import Response
from analysis.studies import responses as responses_module
from analysis.studies.label import (
    LABEL_COLUMNS,
    SHEET_COLUMNS,
    build_label_sheet,
    draw_label_sample,
    format_copies,
    parse_labels,
    read_judged_run,
)
from analysis.studies.manifest import describe_options
from analysis.studies.run_spec import RunSpec, build_run_spec
from defenses.catalog import choose_defenses, get_defense
from defenses.chats import prepend_system
from defenses.contract import Chat, Defense
from defenses.errors import UserError

QUIET = Console(quiet=True)
SEEN: list[str] = []


def judge_length(response: str, query: str) -> Verdict:
    """Call responses of even length refusals, and remember them."""
    SEEN.append(response)
    return Verdict("none" if len(response) % 2 else "full")


@pytest.fixture(scope="module")
def judged_folder(cli_home: Path) -> Iterator[Path]:
    """A run of the tiny model with a user's defense and a user's attack; its judge is the one above."""
    judge = RuleJudge("length", judge_length, lambda partial_response: False)
    (cli_home / "strings.jsonl").write_text('{"suffix": "!!"}\n', "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.plots.data.build_analysis_points", lambda *_: {})
        patch.setattr(responses_module, "RESPONSE_JUDGE", judge)
        patch.setitem(RULE_JUDGES, "length", judge)
        command = "-d policy -d mine.py -m tiny --limit 12 --readout words --responses all --seed 3 -o judged"
        options = ("--attack", "direct", "--attack", "strings.jsonl+ignore", "--set", "policy.text=Be kind.")
        result = run_cli(*command.split(), *options)
        assert result.code == 0, result.err
        yield cli_home / "judged"


def copy_run(folder: Path, name: str) -> Path:
    """Return a copy of a run that a test may change."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    return copy


def change_responses(folder: Path, responses: pd.DataFrame) -> None:
    """Replace the responses of a run; as in a run of an earlier version, run.json does not list its files."""
    responses.to_csv(folder / "responses.csv", index=False)
    change_record(folder, lambda record: record.pop("files", None))


def change_record(folder: Path, change) -> None:
    """Change run.json."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    change(record)
    (folder / "run.json").write_text(json.dumps(record), "utf-8")


def test_the_texts_to_label_are_those_that_were_judged(judged_folder: Path) -> None:
    run = read_judged_run(judged_folder)
    seen = {text.strip() for text in SEEN}
    sheet = build_label_sheet(run, 20, QUIET)
    assert list(sheet.rows.columns) == list(SHEET_COLUMNS) and len(sheet.rows) == 20 and not sheet.n_changed
    assert set(sheet.rows["response"]) <= seen
    assert sheet.rows.groupby(["attack", "defense"]).ngroups == 6
    again = build_label_sheet(run, 20, QUIET)
    pd.testing.assert_frame_equal(sheet.rows, again.rows)


def test_labels_are_stored_without_text_and_not_asked_again(judged_folder: Path) -> None:
    folder = copy_run(judged_folder, "labeled")
    first = label_run(folder, n=20)
    assert first.corrected_rates.empty and first.judge_accuracy.empty and first.labels.empty
    filled = first.sheet.assign(label=["refuses", "answers"] * 9 + ["skip", float("nan")])
    labeled = label_run(folder, filled)
    assert list(pd.read_csv(folder / "labels.csv").columns) == list(LABEL_COLUMNS)
    assert len(labeled.labels) == 18 and labeled.sheet.empty
    assert labeled.judge_accuracy["n_labeled"].tolist() == [18]
    stored = pd.read_csv(folder / "corrected_rates.csv")
    pd.testing.assert_frame_equal(stored, labeled.corrected_rates, check_dtype=False, rtol=1e-5)
    assert len(stored) == 12 and stored["n_labeled"].sum() == 18
    stored_text = "".join(path.read_text("utf-8") for path in folder.glob("*.csv"))
    assert not any(text in stored_text for text in filled["response"] if len(text) > 20)
    more = label_run(folder, n=24)
    asked = set(map(tuple, more.sheet[["query", "attack", "defense"]].to_numpy()))
    known = set(map(tuple, labeled.labels[["query", "attack", "defense"]].to_numpy()))
    assert len(asked) == 6 and not asked & known
    # A label may be changed or removed.
    changed = label_run(folder, filled.head(2).assign(label=["answers", "skip"]))
    assert len(changed.labels) == 17
    assert len(label_run(folder, n=1000).sheet) == len(read_judged_run(folder).responses) - 17


def test_a_sample_has_both_verdicts_and_every_condition_and_grows(judged_folder: Path) -> None:
    responses = read_judged_run(judged_folder).responses
    few_refused = responses.assign(verdict="not refused")
    few_refused.loc[[3, 30, 60], "verdict"] = "refused"
    few_refused.loc[5, "verdict"] = "unjudged"
    samples = [draw_label_sample(few_refused, n, 0) for n in (10, 30, 40)]
    for small, large in pairwise(samples):
        assert set(small.index) <= set(large.index)
    assert [(sample["verdict"] == "refused").sum() for sample in samples] == [3, 3, 3]
    assert [len(sample) for sample in samples] == [10, 30, 40] and 5 not in samples[2].index
    counts = samples[2].groupby(["attack", "defense", "harmful"]).size()
    assert len(counts) == 12
    for _, of_class in counts.groupby("harmful"):
        assert of_class.max() - of_class.min() <= 3
    assert not draw_label_sample(few_refused, 40, 1).index.equals(samples[2].index)
    with pytest.raises(UserError, match="--n 9: it takes at least 10"):
        draw_label_sample(few_refused, 9, 0)


def test_wrong_labels_name_their_row(judged_folder: Path) -> None:
    run = read_judged_run(judged_folder)
    row = {name: run.responses.loc[0, name] for name in ("query", "attack", "defense")}
    cases = [
        ([row | {"label": "maybe"}], "sheet, row 1 .*the label is 'maybe'; it takes refuses, answers, skip"),
        ([row | {"label": "r"}, row | {"label": "a"}], "sheet, row 2 is the same response as row 1"),
        ([row | {"label": "r", "query": "x"}], "sheet, row 1: .* has no judged response to query 'x'"),
        ([row], "sheet lacks the column label"),
    ]
    for records, words in cases:
        with pytest.raises(UserError, match=words):
            parse_labels(run, records, "sheet")
    assert list(parse_labels(run, [row | {"label": " Refuses "}], "sheet").values()) == ["refuses"]


def test_what_changed_since_the_run_is_refused_in_one_line(judged_folder: Path) -> None:
    home = judged_folder.parent
    defense_text, attack_text = (home / "mine.py").read_text("utf-8"), '{"suffix": "!!"}\n'
    for name, path, text, words in (
        ("other-defense", home / "mine.py", defense_text.replace("Please.", "Now."), "the defense 'my_own'"),
        ("other-attack", home / "strings.jsonl", '{"suffix": "??"}\n', "the wording of an attack changed"),
    ):
        before = path.read_text("utf-8")
        path.write_text(text, "utf-8")
        try:
            with pytest.raises(UserError, match=words):
                label_run(copy_run(judged_folder, name), n=20)
        finally:
            path.write_text(before, "utf-8")
    assert (home / "strings.jsonl").read_text("utf-8") == attack_text
    changes = {
        "sha256": (lambda record: record["model"].update(sha256="0" * 64), "the weights of the model"),
        "data": (lambda record: record["data"].update(sha256="0" * 64), "the data"),
        "old": (lambda record: record.pop("options"), "run.json lacks the options"),
        "frame": (
            lambda record: record["options"].update(not_repeatable="its queries were a frame"),
            "cannot be generated again: its queries were a frame",
        ),
    }
    for name, (change, words) in changes.items():
        folder = copy_run(judged_folder, f"changed-{name}")
        change_record(folder, change)
        with pytest.raises(UserError, match=words) as error:
            label_run(folder, n=20)
        assert "\n" not in str(error.value)


def test_other_responses_than_the_judged_ones_are_not_labeled(judged_folder: Path) -> None:
    folder = copy_run(judged_folder, "others")
    table = pd.read_csv(folder / "responses.csv")
    sampled = draw_label_sample(read_judged_run(folder).responses, 20, 3)
    other = {"refused": "not refused", "not refused": "refused"}
    # In one response, the verdict differs: it is left out. In half of them: these are other responses.
    one = sampled.index[:1]
    swapped = table["verdict"].where(~table.index.isin(one), table["verdict"].map(other))
    change_responses(folder, table.assign(verdict=swapped))
    sheet = build_label_sheet(read_judged_run(folder), 20, QUIET)
    assert sheet.n_changed <= 1 and len(sheet.rows) == sheet.n_sampled - sheet.n_changed
    swapped = table["verdict"].where(table.index % 2 == 0, table["verdict"].map(other))
    change_responses(folder, table.assign(verdict=swapped))
    with pytest.raises(UserError, match="of 20 responses that were generated again have another verdict"):
        label_run(folder, n=20)


def test_labels_of_a_repeated_run_are_not_used(judged_folder: Path) -> None:
    folder = copy_run(judged_folder, "repeated")
    label_run(folder, label_run(folder, n=10).sheet.assign(label="refuses"))
    labels = pd.read_csv(folder / "labels.csv")
    labels.assign(verdict="other").to_csv(folder / "labels.csv", index=False)
    with pytest.raises(UserError, match=r"labels.csv belongs to other responses"):
        read_judged_run(folder)
    (folder / "responses.csv").unlink()
    change_record(folder, lambda record: record.pop("files"))
    with pytest.raises(UserError, match="holds no judged responses: repeat the run with --responses all"):
        read_judged_run(folder)


def test_several_copies_are_labeled_by_the_rule_of_the_defense() -> None:
    copies = [Response((1,), text, text) for text in ("Sure.", "Sorry, the tulip no.")]
    assert format_copies(copies[:1], get_defense("none")) == "Sure."
    assert "together refuse if more than half" in format_copies(copies, get_defense("smooth_llm"))
    assert "together refuse if any of them" in format_copies(copies, get_defense("erase_and_check"))
    assert format_copies(copies, get_defense("smooth_llm")).endswith("(1) Sure.\n(2) Sorry, the tulip no.")


@dataclass(frozen=True)
class Typed(Defense):
    """A class that is in no file that the command could read."""

    def rewrite(self, chat: Chat, rng) -> Chat:
        return prepend_system(chat, "Please.")


def test_options_make_the_same_defenses_again(tmp_path: Path) -> None:
    spec = build_run_spec("smollm2", "twins", limit=8, attack="persona+ignore", readout="words")
    asked = ["policy", get_defense("smooth_llm", {"copies": 3}), get_defense("self_reminder+paraphrase")]
    options = describe_options(spec, asked, ["policy.text=Be kind."])
    assert options["not_repeatable"] is None and json.loads(json.dumps(options)) == options
    rebuilt = choose_defenses(options["defenses"], options["settings"])
    assert rebuilt == choose_defenses(asked, ["policy.text=Be kind."])
    assert [get_attack(name).name for name in options["attacks"]] == ["persona+ignore"]
    assert {"model": "smollm2", "data": "twins", "limit": 8, "seed": 0}.items() <= options.items()
    path = tmp_path / "mine.jsonl"
    path.write_text('{"suffix": "!!"}\n', "utf-8")
    assert get_attack(f"{path}+ignore").option == f"{path}+ignore"


def test_options_never_hold_a_secret_and_say_what_is_missing() -> None:
    spec = build_run_spec("smollm2", "twins", readout="words")
    secret = describe_options(spec, ["policy"], ["policy.text=tulip seven"], ("tulip seven",))
    assert "tulip" not in json.dumps(secret) and "contains a secret" in secret["not_repeatable"]
    assert "was made in Python" in describe_options(spec, [Typed()])["not_repeatable"]
    frame = QuerySet.from_frame(pd.DataFrame({"text": ["a", "b"], "harmful": [True, False]}))
    described = describe_options(RunSpec("smollm2", frame))
    assert described["data"] is None and "a frame of 2 queries" in described["not_repeatable"]

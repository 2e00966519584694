"""The command keeps its promises: what it writes, what it says, and how it fails."""

import contextlib
import errno
import hashlib
import io
import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import platformdirs
import pytest
from conftest import FOUR, save_model, toy_bench, toy_tokenizer
from scipy.special import expit

from analysis.cli.main import main
from analysis.files import check_output_folder
from analysis.models.cache import make_json_cache_path
from analysis.run import iterate_condition_scores
from analysis.stats.effects import summarize_scores
from analysis.stats.tables import ESTIMATE_NAMES, SCORE_COLUMNS, ScoreTable
from analysis.studies import sweep

OWN = """
from dataclasses import dataclass
from defenses import Defense
from defenses.chats import prepend_system

@dataclass(frozen=True)
class MyOwn(Defense):
    '''Says please.'''
    text: str = "Please."
    def rewrite(self, chat, rng):
        return prepend_system(chat, self.text)
"""


class Done:
    """What a call of the command left behind."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def analyze(*args):
    """Call the command in this process, as a shell would."""
    out, err, old = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["analyze", *map(str, args)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        sys.argv = old
    return Done(left.value.code, out.getvalue(), err.getvalue())


def refused(done, *words):
    """Assert that a call ended as the user's mistake, in one line."""
    assert done.code == 2, (done.code, done.err, done.out)
    assert done.out == ""
    lines = [
        line for line in done.err.splitlines() if not line.startswith(("note: ", "Converting ", "Fetching "))
    ]
    assert len(lines) == 1 and lines[0].startswith("analyze: "), done.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A place with a tiny model, a place for caches and secrets, and that as the current folder."""
    place = tmp_path_factory.mktemp("home")
    save_model(place / "tiny")
    (place / "mine.py").write_text(OWN, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_DATA_HOME", str(place / "share"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # a test clears it
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield place


@pytest.fixture(scope="module")
def ran(home):
    """One real run, with a backdoor, a file of the user's own and settings."""
    args = ["-d", "backdoor", "-d", "./mine.py", "-d", "policy", "-m", "tiny", "--limit", "24", "-o", "out"]
    (home / "text.txt").write_text("Nothing is allowed here.\n", "utf-8")
    return analyze(*args, "--set", "length=30", "--set", "policy.text=@text.txt", "--seed", "3")


def secret_of(home, length):
    """Return the secret prompt that the tiny model was given."""
    (path,) = (home / "share" / "refusalscope" / "secrets").glob(f"*/{length}.txt")
    return path.read_text("utf-8").strip()


# --- a run ------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_promises_and_says_where(home, ran):
    assert ran.code == 0, ran.err
    assert {path.name for path in (home / "out").iterdir()} == {
        *("prompts.csv", "scores.csv", "summary.csv", "run.json"),
        *(f"{figure}.{end}" for figure in ("margins", "plane", "roc") for end in ("png", "csv")),
    }
    assert "are in out" in ran.err
    for name in ("none", "backdoor/no_weights", "backdoor/neither", "my_own", "policy"):
        assert name in ran.out
    assert "backdoor: only backdoor/no_weights, backdoor/neither can be read: no tuned weights" in ran.err
    assert not list(home.glob(".out*"))


def test_scores_hold_every_query_under_every_condition(home, ran):
    scores = pd.read_csv(home / "out" / "scores.csv")
    assert list(scores.columns) == list(SCORE_COLUMNS)
    names = ["none", "backdoor/no_weights", "backdoor/neither", "my_own", "policy"]
    assert scores["defense"].drop_duplicates().tolist() == names
    assert (scores.groupby("defense")["query"].nunique() == 24).all() and len(scores) == 24 * 5
    assert set(scores["attack"]) == {"direct"}
    record = json.loads((home / "out" / "run.json").read_text("utf-8"))
    margin, threshold = scores["margin"], record["readout"]["threshold"]
    assert np.allclose(scores["p_refuse"], expit(margin - threshold), atol=1e-12, rtol=0)
    assert scores["coverage"].between(0, 1).all() and margin.nunique() > 100


def test_the_summary_can_be_made_from_the_scores_again(home, ran):
    record = json.loads((home / "out" / "run.json").read_text("utf-8"))
    scores = pd.read_csv(home / "out" / "scores.csv")
    again = summarize_scores(ScoreTable(scores, record), seed=record["seed"]).frame
    text = again.to_csv(index=False, float_format="%.7g")
    assert text == (home / "out" / "summary.csv").read_text("utf-8")
    assert set(ESTIMATE_NAMES) <= set(again.columns) and again["verdict"].iloc[0] == "reference"


def test_run_json_says_how_the_numbers_were_made(home, ran):
    record = json.loads((home / "out" / "run.json").read_text("utf-8"))
    assert {"id", "revision", "sha256"} <= set(record["model"])
    assert re.fullmatch("[0-9a-f]{64}", record["model"]["sha256"])
    assert {"refuse", "comply", "ids", "weights", "threshold"} <= set(record["readout"])
    assert len(record["readout"]["ids"]) == len(record["readout"]["weights"])
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["sha256"])
    assert (record["data"]["n_harmful"], record["data"]["n_benign"]) == (10, 14), "in proportion"
    assert (record["seed"], record["dtype"], record["device"]) == (3, "float32", "cpu")
    assert record["defenses"]["backdoor/no_weights"]["settings"]["length"] == 30
    assert record["defenses"]["policy"]["settings"]["text"] == "Nothing is allowed here."
    (fingerprint,) = record["defenses"]["backdoor/no_weights"]["secrets"]
    assert re.fullmatch("sha256:[0-9a-f]{12}", fingerprint)
    assert record["defenses"]["backdoor/neither"]["secrets"] == []
    assert {"computed", "saved"} == set(record["tokens"]) and min(record["tokens"].values()) > 0
    assert {"refusalscope", "torch", "transformers", "python"} <= set(record["versions"])
    assert record["wall_seconds"] > 0 and record["interrupted"] is False


def test_the_secret_is_in_no_file_and_on_no_terminal(home, ran):
    words = secret_of(home, 30).split()
    pieces = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)] or [secret_of(home, 30)[:12]]
    written = [path.read_bytes() for path in (home / "out").iterdir()]
    checked = analyze("check", "-d", "backdoor", "-m", "tiny", "--set", "length=30")
    assert checked.code == 0 and "⟨secret⟩" in checked.out
    shown = re.sub(r"\s+", "", ran.out + ran.err + checked.out + checked.err)
    for piece in pieces:
        assert not any(piece.encode() in content for content in written)
        assert re.sub(r"\s+", "", piece) not in shown


def test_the_same_seed_gives_the_same_bytes(home, ran):
    args = ["-d", "backdoor", "-d", "./mine.py", "-d", "policy", "-m", "tiny", "--limit", "24", "-o", "again"]
    analyze(*args, "--set", "length=30", "--set", "policy.text=@text.txt", "--seed", "3")
    for name in ("scores.csv", "summary.csv", "plane.csv"):
        assert (home / "again" / name).read_bytes() == (home / "out" / name).read_bytes(), name


def test_json_is_all_there_is_on_stdout(home, monkeypatch):
    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    done = analyze("-d", "policy", "-m", "tiny", "--limit", "6", "-o", "as_json", "--json")
    rows = json.loads(done.out)
    assert [row["defense"] for row in rows] == ["none", "policy"]
    assert rows[0]["p_shift"] is None and isinstance(rows[1]["shift"], float)


def test_all_takes_every_defense_and_the_users_own_beside_them(home, monkeypatch):
    from defenses.catalog import list_defense_names

    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    done = analyze("-d", "all", "-d", "./mine.py", "-m", "tiny", "--limit", "4", "-o", "all", "--json")
    found = {row["defense"] for row in json.loads(done.out)}
    weights = {"backdoor", "safety_tuning", "preference_tuning", "baseline_tuning", "safe_decoding"}
    weights |= {"adapter", "weights"}  # there are none for it
    assert found == {*list_defense_names(), "my_own", "backdoor/no_weights", "backdoor/neither"} - weights


def test_weights_that_a_model_does_not_have_are_an_error_where_nothing_else_is_left(home):
    refused(analyze("-d", "safety_tuning", "-m", "tiny"), "safety_tuning", "analyze train safety")


def test_an_attack_is_how_every_query_is_sent(home):
    args = ("-d", "policy", "-m", "tiny", "--limit", "4", "-o", "obey", "--json")
    done = analyze(*args, "--attack", "obedience")
    assert done.code == 0, done.err
    assert {row["attack"] for row in json.loads(done.out)} == {"obedience"}


def test_several_attacks_are_drawn_against_the_defenses_and_recorded(home):
    (home / "mine.jsonl").write_text('{"suffix": "!!"}\n', "utf-8")
    args = ("-d", "policy", "-m", "tiny", "--limit", "8", "-o", "under")
    done = analyze(*args, "--attack", "direct", "--attack", "prefill+ignore", "--attack", "mine.jsonl")
    assert done.code == 0, done.err
    names = ["direct", "prefill+ignore", "mine"]
    cells = pd.read_csv(home / "under" / "attacks.csv")
    assert cells[["attack", "defense"]].values.tolist() == [[a, d] for a in names for d in ("none", "policy")]
    assert (home / "under" / "attacks.png").is_file() and (home / "under" / "plane-mine.png").is_file()
    record = json.loads((home / "under" / "run.json").read_text("utf-8"))
    assert record["attacks"] == names
    digest = hashlib.sha256((home / "mine.jsonl").read_bytes()).hexdigest()
    assert record["attacks_sha256"]["mine"] == [digest]
    scores = pd.read_csv(home / "under" / "scores.csv")
    harmful = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean()
    found = cells.set_index(["attack", "defense"])["margin"] + record["readout"]["threshold"]
    assert np.allclose(harmful[found.index], found, atol=1e-5)


def test_what_defenses_cost_is_a_table_and_a_figure_of_the_run(home):
    done = analyze("-d", "policy", "-m", "tiny", "--limit", "8", "-o", "priced", "--cost")
    assert done.code == 0, done.err
    assert "Cost, each query alone" in done.out
    table = pd.read_csv(home / "priced" / "cost.csv").set_index("defense")
    assert set(table.index) == {"none", "policy"} and table.loc["policy", "tokens_added"] > 0
    summary = pd.read_csv(home / "priced" / "summary.csv").set_index("defense")
    assert table.loc["policy", "delta_auroc"] == pytest.approx(summary.loc["policy", "delta_auroc"])
    assert (home / "priced" / "cost.png").is_file()


def test_training_validating_and_the_arms_are_reached_by_their_commands(home):
    settings = ("--set", "epochs=1", "--set", "batch=16", "--set", "rank=2")
    assert analyze("train", "attack", "-m", "tiny", "--limit", "60", "-o", "tuned", *settings).code == 0
    assert json.loads((home / "tuned" / "manifest.json").read_text("utf-8"))["settings"]["rank"] == 2
    done = analyze("validate", "-d", "policy", "-m", "tiny", "--limit", "8", "--tokens", "2", "-o", "heard")
    assert done.code == 0, done.err
    assert set(pd.read_csv(home / "heard" / "validity.csv")["defense"]) == {"none", "policy"}
    refused(analyze("backdooralign", "-m", "tiny", "--limit", "8"), "no weights for aligned", "analyze train")
    refused(analyze("backdooralign", "-m", "tiny", "--tokens", "0"), "--tokens 0")


def test_check_shows_what_the_model_reads_under_an_attack(home):
    done = analyze("check", "-d", "policy", "-m", "tiny", "--queries", "2", "--attack", "prefill")
    assert done.code == 0 and "policy (prefill)" in done.out
    assert "<|im_start|>assistant\nSure, here is the complete answer:" in done.out


@pytest.mark.parametrize("template", FOUR)
def test_templates_of_four_families_are_run_from_end_to_end(home, monkeypatch, template):
    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    kind = "metaspace" if template == "llama2" else "bytes"
    save_model(home / f"toy-{template}", template=template, kind=kind)
    done = analyze(
        "-d",
        "all",
        "-m",
        f"./toy-{template}",
        "--limit",
        "4",
        "-o",
        f"run-{template}",
        "--set",
        "backdoor.length=20",
    )
    assert done.code == 0, done.err
    assert ("no system role" in done.err) == (template == "gemma2")


def test_without_out_a_run_makes_a_folder_of_its_own(home, monkeypatch):
    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    assert analyze("-d", "policy", "-m", "tiny", "--limit", "4").code == 0
    (folder,) = (home / "runs").iterdir()
    assert folder.name.endswith("-tiny-policy")


# --- the user's mistakes ----------------------------------------------------------------------------------


def files(home):
    """Write the files of bad content, and return where they are."""
    (home / "none.py").write_text("x = 1\n")
    (home / "two.py").write_text(OWN + OWN.replace("MyOwn", "Other"))
    (home / "loads.py").write_text("1 / 0\n")
    (home / "rewrites.py").write_text(
        OWN.replace("return prepend_system", "raise KeyError('no')\n        return ")
    )
    (home / "columns.csv").write_text("question,harmful\nHi,1\n")
    (home / "empty_text.csv").write_text("text,harmful\n ,1\nYo,0\n")
    (home / "ids.csv").write_text("id,text,harmful\na,Hi,1\na,Yo,0\n")
    (home / "one_class.csv").write_text("text,harmful\nHi,1\nYo,1\n")
    (home / "long.csv").write_text("text,harmful\n" + "word " * 1500 + ",1\nYo,0\n")
    (home / "one.jsonl").write_text('{"query": "nobody", "suffix": "!"}\n')
    (home / "typo.jsonl").write_text('{"sufix": "!"}\n')
    (home / "base64.csv").write_text("suffix\n!\n")
    (home / "file").write_text("mine\n")
    (home / "weights.bin").write_bytes(b"x")
    (home / "pickled").mkdir(exist_ok=True)
    (home / "pickled" / "config.json").write_text("{}")
    (home / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (home / "no.gguf").write_bytes(b"no gguf at all")
    if not (home / "mute").exists():
        save_model(home / "mute", template=None)


D = ("-d", "policy", "-m", "tiny")
MISTAKES = {
    "no defense": (("--seed", "1"), ["which defense?", "analyze list defenses"]),
    "unknown defense": (("-d", "polcy"), ["unknown defense 'polcy'", "'policy'"]),
    "unknown model": (("-d", "policy", "-m", "smolm2"), ["unknown model 'smolm2'", "'smollm2'"]),
    "unknown data": ((*D, "--data", "contrasts"), ["unknown data set", "'contrast'"]),
    "unknown split": ((*D, "--split", "tset"), ["unknown split 'tset'", "'test'"]),
    "unknown attack": ((*D, "--attack", "direkt"), ["unknown attack", "'direct'"]),
    "unknown attack that ignores": ((*D, "--attack", "persone+ignore"), ["'persone+ignore'", "'persona'"]),
    "unknown attack to check": (("check", *D, "--attack", "direkt"), ["unknown attack", "'direct'"]),
    "unknown attack to validate": (("validate", *D, "--attack", "direkt"), ["unknown attack", "'direct'"]),
    "no such attack file": ((*D, "--attack", "nowhere.jsonl"), ["cannot read nowhere.jsonl", "a suffix"]),
    "attack file without strings": ((*D, "--attack", "typo.jsonl"), ["row 1", "neither suffix and prompt"]),
    "attack file of a taken name": ((*D, "--attack", "base64.csv"), ["'base64' is taken", "rename"]),
    "attack file with gaps": (
        (*D, "--attack", "one.jsonl", "--limit", "4"),
        ["--attack one", "no row for 4 of 4 queries", "one row without query"],
    ),
    "unknown readout": ((*D, "--readout", "word"), ["unknown readout", "'words'"]),
    "unknown setting": ((*D, "--set", "txt=x"), ["unknown setting 'txt'", "'text'"]),
    "setting of none": (
        ("-d", "none", "-m", "tiny", "--set", "text=x"),
        ["none of the chosen defenses has settings"],
    ),
    "setting of another": ((*D, "--set", "polcy.text=x"), ["unknown defense in --set", "'policy'"]),
    "setting of two": ((*D, "-d", "safety_prompt", "--set", "text=x"), ["policy.text or safety_prompt.text"]),
    "setting without =": ((*D, "--set", "text"), ["--set text", "key=value"]),
    "bad value": (
        ("-d", "backdoor", "-m", "tiny", "--set", "length=many"),
        ["length=many", "a whole number"],
    ),
    "no such file of a setting": ((*D, "--set", "text=@nowhere"), ["@nowhere", "cannot read"]),
    "unknown option": ((*D, "--ouput", "x"), ["--ouput", "--help"]),
    "unknown device": ((*D, "--device", "cpuu"), ["unknown device 'cpuu'", "'cpu'"]),
    "unknown dtype": ((*D, "--dtype", "float31"), ["unknown dtype 'float31'", "'float32'"]),
    "batch size": ((*D, "--batch-size", "0"), ["--batch-size 0", "auto or a whole number"]),
    "limit 0": ((*D, "--limit", "0"), ["--limit 0", "at least 2"]),
    "limit no number": ((*D, "--limit", "x"), ["--limit", "valid integer", "--help"]),
    "no columns": ((*D, "--data", "columns.csv"), ["lacks text", "text and harmful"]),
    "empty text": ((*D, "--data", "empty_text.csv"), ["'q0001'", "text is empty"]),
    "duplicate ids": ((*D, "--data", "ids.csv"), ["id 'a' occurs more than once"]),
    "one class": ((*D, "--data", "one_class.csv"), ["no benign query"]),
    "split of a file": (
        (*D, "--data", "good.csv", "--split", "test"),
        ["no column split", "leave --split out"],
    ),
    "py without": (("-d", "none.py", "-m", "tiny"), ["none.py", "exactly one defense"]),
    "py with two": (("-d", "two.py", "-m", "tiny"), ["two.py", "MyOwn, Other"]),
    "py that raises": (("-d", "loads.py", "-m", "tiny"), ["loads.py", "ZeroDivisionError"]),
    "py that raises later": (("-d", "rewrites.py", "-m", "tiny"), ["'my_own'", "KeyError"]),
    "py not there": (("-d", "nowhere.py", "-m", "tiny"), ["no file 'nowhere.py'"]),
    "py twice": (("-d", "mine.py", "-d", "./mine.py", "-m", "tiny"), ["'my_own'"]),
    "pickle": (("-d", "policy", "-m", "weights.bin"), ["weights.bin", "never loaded"]),
    "pickled folder": (
        ("-d", "policy", "-m", "./pickled"),
        ["pytorch_model.bin", "safetensors or GGUF only"],
    ),
    "bad gguf": (("-d", "policy", "-m", "no.gguf"), ["no.gguf"]),
    "no template": (("-d", "policy", "-m", "mute"), ["no chat template"]),
    "long prompt": ((*D, "--data", "long.csv"), ["'q0001'", "2048", "shorten"]),
    "offline": (("-d", "policy", "-m", "nobody/nothing", "--offline"), ["nobody/nothing", "--offline"]),
    "out is a file": ((*D, "-o", "file"), ["--out file is a file"]),
    "out below a file": ((*D, "-o", "file/below"), ["--out file/below"]),
    "unknown list": (("list", "defences"), ["unknown list 'defences'", "'defenses'"]),
    "unknown command": (("chek",), ["'chek'", "--help"]),
    "check too few": (
        ("check", "-d", "policy", "-m", "tiny", "--queries", "1"),
        ["--queries 1", "at least 2"],
    ),
    "secret of nothing": (("secret", "-m", "tiny", "--length", "0"), ["--length 0", "at least 1"]),
    "secret over a file": (("secret", "-m", "tiny", "-o", "file"), ["file exists", "never overwritten"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_value_rule_and_next_step(home, mistake):
    files(home)
    (home / "good.csv").write_text("text,harmful\nHi,1\nYo,0\n")
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if "__pycache__" not in path.parts}
    args, words = MISTAKES[mistake]
    refused(analyze(*args), *words)
    after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if "__pycache__" not in path.parts}
    assert set(after) == set(before), "something was written"
    assert all(after[path] == before[path] for path in before if path.is_file())


def test_a_full_disk_leaves_nothing_half_written(home, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    done = analyze(*D, "--limit", "4", "-o", "full")
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-1].startswith("analyze: no space left")
    assert not (home / "full").exists() and not list(home.glob(".full*"))


def test_a_fault_of_ours_is_exit_1_in_one_line_and_a_traceback_with_debug(home, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("analysis.cli.analyze.run_analyze_command", broken)
    done = analyze(*D)
    assert (done.code, done.out) == (1, "")
    assert done.err == "analyze: a fault in refusalscope, RuntimeError: two lines (--debug shows where)\n"
    monkeypatch.setattr(sys, "argv", ["analyze", *D, "--debug"])
    with pytest.raises(RuntimeError, match="two"):
        main()


def lose_words(home):
    """Write a defense that loses the user's words."""
    (home / "lost.py").write_text(
        OWN.replace("prepend_system(chat, self.text)", "[{**chat[0], 'content': 'Hi.'}]")
    )


def test_a_defense_that_does_not_arrive_stops_the_run_and_the_check(home):
    save_model(home / "deaf", template="deaf")
    lose_words(home)
    checked = analyze("check", "-d", "lost.py", "-m", "tiny")
    assert checked.code == 1 and "FAILED" in checked.out and "user's words survive" in checked.out
    done = analyze("-d", "lost.py", "-m", "tiny", "-o", "lost")
    assert done.code == 1 and done.out == "" and not (home / "lost").exists()
    assert "Nothing was scored" in done.err
    # A template that drops system turns is known for that, and gets them in the user turn.
    assert analyze("check", "-d", "policy", "-m", "deaf").code == 0


# --- Ctrl-C -----------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_keeps_what_is_finished(home, monkeypatch):
    real = iterate_condition_scores

    def interrupted(*args):
        for number, pair in enumerate(real(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr("analysis.points.of_analysis", lambda *_: {})
    monkeypatch.setattr(sweep, "score_all", interrupted)
    done = analyze("-d", "policy", "-d", "safety_prompt", "-m", "tiny", "--limit", "4", "-o", "half")
    assert done.code == 130
    assert re.search(r"Interrupted: 2 of 3 conditions were finished and kept", " ".join(done.err.split()))
    assert json.loads((home / "half" / "run.json").read_text())["interrupted"] is True
    assert set(pd.read_csv(home / "half" / "scores.csv")["defense"]) == {"none", "policy"}


def test_what_the_model_reads_is_kept_for_a_query_of_either_class(home):
    done = analyze("-d", "policy", "-d", "mine.py", "-m", "tiny", "--limit", "8", "--attack", "direct",
                   "--attack", "persona", "-o", "prompts")  # fmt: skip
    assert done.code == 0
    read = pd.read_csv(home / "prompts" / "prompts.csv")
    scores = pd.read_csv(home / "prompts" / "scores.csv").set_index(["attack", "defense", "query"])
    assert len(read) == 2 * 2 * 3 and (read["readings"] == 1).all()
    told = read.set_index(["attack", "defense", "query"])
    assert (scores.loc[told.index, "harmful"].groupby(["attack", "defense"]).sum() == 1).all()
    assert told.loc[("direct", "my_own"), "read"].str.contains("Please.", regex=False).all()
    assert not told.loc[("direct", "none"), "read"].str.contains("Please.", regex=False).any()


def test_ctrl_c_early_keeps_nothing_and_says_so(home, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.studies.preflight.check_condition", interrupted)
    done = analyze("-d", "policy", "-m", "tiny", "-o", "killed")
    assert done.code == 130 and done.out == ""
    assert done.err.splitlines()[-1] == "analyze: interrupted; nothing was written"
    assert "Traceback" not in done.err and not (home / "killed").exists()


# --- the other commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["defenses", "models", "data", "attacks", "readouts"])
def test_list_is_for_people_and_with_json_for_machines(home, what):
    people, machines = analyze("list", what), analyze("list", what, "--json")
    assert people.code == machines.code == 0 and people.err == machines.err == ""
    rows = json.loads(machines.out)
    assert list(rows) == [what] and len(rows[what]) >= 1
    for row in rows[what]:
        assert row["name"] in people.out


def test_list_alone_shows_everything(home):
    assert set(json.loads(analyze("list", "--json").out)) == {
        "defenses",
        "models",
        "data",
        "attacks",
        "readouts",
    }
    for row in json.loads(analyze("list", "defenses", "--json").out)["defenses"]:
        assert set(row) >= {"name", "family", "source", "url", "settings"}


def test_check_shows_what_the_model_reads_under_the_defense(home):
    done = analyze(
        "check", "-d", "policy", "-m", "tiny", "--queries", "2", "--set", "text=Nothing is allowed."
    )
    assert done.code == 0
    assert "<|im_start|>system\nNothing is allowed.<|im_end|>" in done.out
    for name in ("BOS tokens", "system role", "shared prefix", "coverage", "engine equals plain pass"):
        assert name in done.out
    assert "FAILED" not in done.out


def test_secret_makes_a_private_file_of_exactly_that_length_and_never_shows_it(home):
    done = analyze("secret", "-m", "tiny", "--length", "17", "-o", "new/secret.txt")
    text = (home / "new" / "secret.txt").read_text("utf-8").strip()
    assert done.code == 0
    assert stat.S_IMODE((home / "new" / "secret.txt").stat().st_mode) == 0o600
    assert len(toy_tokenizer().encode(text, add_special_tokens=False)) == 17
    assert "17 tokens" in done.out and "sha256:" in done.out
    assert text[:8] not in done.out + done.err


def test_a_secret_made_without_out_is_the_one_that_backdoor_uses(home):
    assert analyze("secret", "-m", "tiny", "--length", "23").code == 0
    text = secret_of(home, 23)
    assert analyze("check", "-d", "backdoor", "-m", "tiny", "--set", "length=23").code == 0
    assert secret_of(home, 23) == text
    refused(analyze("secret", "-m", "tiny", "--length", "23"), "never overwritten")


@pytest.mark.parametrize("args", [("--help",), ("validate", "--help"), ("list",), ("cache",)], ids=" ".join)
def test_help_and_what_is_listed_load_nothing_heavy(home, args):
    """What is not loaded takes no time on any machine; `make bench` times the help."""
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        "from analysis import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded and done.stdout
    heavy = {"torch", "transformers", "transformer_lens", "peft", "pandas", "matplotlib", "scipy", "sklearn"}
    assert not loaded & heavy
    if args == ("--help",):
        assert "--defense" in done.stdout and "check" in done.stdout and "secret" in done.stdout


def test_the_command_alone_shows_its_help(home):
    done = analyze()
    assert done.code == 0 and "--defense" in done.out


def test_usable_asks_before_the_work(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    assert isinstance(check_output_folder(Path("new")), Path)


# --- a sweep that goes wrong in places, and one that goes on ----------------------------------------------

FRAIL = """
from dataclasses import dataclass
from defenses import Defense

@dataclass(frozen=True)
class Frail(Defense):
    '''Breaks on one query, which no preflight looks at.'''
    def rewrite(self, chat, rng):
        if chat[-1]["content"] == {text!r}:
            raise ValueError("no such flour")
        return [{{"role": "system", "content": "Be kind."}}, *map(dict, chat)]
"""


def frail(home, place):
    """Write a defense that breaks on one of the queries."""
    from analysis.datasets.loading import load_queries
    from analysis.datasets.queries import sample_queries

    asked = load_queries("contrast").select_split("test").limit_queries(12).queries
    (home / "frail.py").write_text(FRAIL.format(text=asked[place].text))
    looked_at = {query.id for query in sample_queries(asked, 4)}
    assert asked[place].id not in looked_at


def test_a_defense_that_fails_is_left_out_and_told_at_the_end(home):
    frail(home, 5)
    done = analyze("-d", "frail.py", "-d", "policy", "-m", "tiny", "--limit", "12", "-o", "frail-run")
    assert done.code == 1 and "policy" in done.out
    assert re.search(r"Failed: frail: 'frail' raised ValueError on query '.*': no such flour", done.err)
    assert set(pd.read_csv(home / "frail-run" / "scores.csv")["defense"]) == {"none", "policy"}
    (told,) = json.loads((home / "frail-run" / "run.json").read_text())["failed"]
    assert told["defense"] == "frail" and "no such flour" in told["why"]


def test_a_defense_that_does_not_reach_the_model_is_left_out_beside_others(home):
    lose_words(home)
    done = analyze("-d", "lost.py", "-d", "policy", "-m", "tiny", "--limit", "4", "-o", "lost-run")
    assert done.code == 1 and "Failed: my_own: user's words survive" in done.err
    assert set(pd.read_csv(home / "lost-run" / "scores.csv")["defense"]) == {"none", "policy"}


def test_a_second_run_computes_nothing_and_says_the_same(home):
    command = ("-d", "smooth_llm", "-d", "paraphrase", "--attack", "direct", "--attack", "rot13")
    command = (*command, "--set", "copies=2", "-m", "tiny", "--limit", "4", "--seed", "7")
    first, second = (analyze(*command, "-o", out, "--json") for out in ("once", "twice"))
    assert first.code == second.code == 0 and first.out == second.out
    records = [json.loads((home / out / "run.json").read_text()) for out in ("once", "twice")]
    assert records[0]["tokens"]["computed"] > 0 == records[1]["tokens"]["computed"]
    # Four queries, undefended, twice and in a paraphrase, under two attacks.
    assert records[1]["scores_found_in_cache"] == 4 * (1 + 2 + 1) * 2
    scores = pd.read_csv(home / "once" / "scores.csv").set_index("defense")
    assert set(scores.loc["smooth_llm", "readings"]) == {2}
    assert set(scores.loc["smooth_llm", "vote"]) <= {0, 0.5, 1}


def test_the_cache_is_shown_and_cleared(home):
    analyze("-d", "paraphrase", "-m", "tiny", "--limit", "4", "-o", "for-cache")
    held = json.loads(analyze("cache", "--json").out)
    assert held["scores"] > 0 and held["drafts"] > 0 and held["bytes"] > 0
    assert re.search(r"\d+ scores and \d+ drafts, \d+\.\d MiB", analyze("cache").out.replace("\n", " "))
    assert "cleared" in analyze("cache", "--clear").out
    assert json.loads(analyze("cache", "--json").out)["scores"] == 0


def test_every_kind_of_what_is_kept_is_listed_and_cleared(home):
    cache = platformdirs.user_cache_path("refusalscope")
    analyze("cache", "--clear")
    # The names are spelled out, so that a kind that is renamed or added is thought of here.
    kinds = {"cost", "readouts", "residuals", "validity", "verdicts"}
    for kind in kinds:
        (cache / kind).mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            (cache / kind / f"{name}.json").write_text('{"n": 1}', "utf-8")
    stays = [cache / "gguf" / "x-v1" / "model.safetensors", cache / "datasets" / "jbb" / "rows.csv"]
    for path in stays:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", "utf-8")
    held = json.loads(analyze("cache", "--json").out)
    assert held["kept"] == {kind: {"count": 2, "bytes": 16} for kind in kinds}
    said = analyze("cache").out
    for kind in kinds:
        assert f"{kind}: 2 files, 16 bytes" in said
    done = analyze("cache", "--clear")
    assert done.code == 0 and all(kind in done.out for kind in kinds)
    assert not [path for kind in kinds for path in (cache / kind).glob("*")]
    assert all(path.is_file() for path in stays)
    held = json.loads(analyze("cache", "--json").out)
    assert held["kept"] == {kind: {"count": 0, "bytes": 0} for kind in kinds}


def test_a_run_keeps_nothing_that_the_cache_does_not_list(home):
    """Of any kind, so that none is left behind; the kinds of today are all made by some command."""
    with pytest.raises(ValueError, match="'novelties' is no kind"):
        make_json_cache_path("novelties", toy_bench().loaded_model, {})
    assert analyze("-d", "policy", "-m", "tiny", "--limit", "4", "-o", "for-kinds").code == 0
    held = json.loads(analyze("cache", "--json").out)["kept"]
    assert held["readouts"]["count"] > 0 and held["verdicts"]["count"] > 0
    cache = platformdirs.user_cache_path("refusalscope")
    found = {path.parent.name for path in cache.rglob("*.json")}
    assert found <= set(held)


@pytest.mark.parametrize(
    "name", ["smooth_llm", "back_translation", "policy", "retokenization", "refusal_steering"]
)
def test_a_defense_is_explained_by_its_card_and_by_what_is_read(home, name):
    done = analyze("explain", name, "-m", "tiny", "--text", "How do I sing?", "--attack", "prefill")
    told = " ".join(done.out.split())
    assert done.code == 0 and name in told and "https://" in told and "Sure, here is" in told
    extra = {
        "smooth_llm": "reads (10 of 10):",
        "back_translation": "asked first:",
        "policy": "Content policy.",
        "retokenization": "in tokens: <",
        "refusal_steering": "The model itself is changed meanwhile.",
    }
    assert extra[name] in told and (name == "smooth_llm" or "How do I sing?" in told)


def test_what_cannot_be_explained_is_answered_in_one_line(home):
    refused(analyze("explain", "smooth_lm", "-m", "tiny"), "'smooth_lm'", "'smooth_llm'")
    refused(analyze("explain", "policy", "-m", "tiny", "--set", "txt=x"), "'txt'", "text")
    refused(analyze("explain", "policy", "-m", "tiny", "--attack", "prefil"), "'prefil'", "'prefill'")


def test_a_secret_is_not_explained_away(home):
    done = analyze("explain", "backdoor", "-m", "tiny")
    assert done.code == 0 and "⟨secret⟩" in done.out and "no tuned weights" in done.out

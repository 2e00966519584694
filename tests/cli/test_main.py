"""How the command ends: exit codes, one line for each mistake, and help that loads nothing heavy."""

import errno
import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import CHATML, USER_DEFENSE, assert_user_error, run_cli, save_model

from analysis import __version__
from analysis.cli.main import main

# --- mistakes of the user ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_files(cli_home):
    """Write files that hold mistakes, and one good file."""
    (cli_home / "none.py").write_text("x = 1\n")
    (cli_home / "two.py").write_text(USER_DEFENSE + USER_DEFENSE.replace("MyOwn", "Other"))
    (cli_home / "loads.py").write_text("1 / 0\n")
    (cli_home / "rewrites.py").write_text(
        USER_DEFENSE.replace("return prepend_system", "raise KeyError('no')\n        return ")
    )
    (cli_home / "columns.csv").write_text("question,harmful\nHi,1\n")
    (cli_home / "empty_text.csv").write_text("text,harmful\n ,1\nYo,0\n")
    (cli_home / "ids.csv").write_text("id,text,harmful\na,Hi,1\na,Yo,0\n")
    (cli_home / "one_class.csv").write_text("text,harmful\nHi,1\nYo,1\n")
    (cli_home / "long.csv").write_text("text,harmful\n" + "word " * 1500 + ",1\nYo,0\n")
    (cli_home / "one.jsonl").write_text('{"query": "nobody", "suffix": "!"}\n')
    (cli_home / "typo.jsonl").write_text('{"sufix": "!"}\n')
    (cli_home / "base64.csv").write_text("suffix\n!\n")
    (cli_home / "file").write_text("mine\n")
    (cli_home / "weights.bin").write_bytes(b"x")
    (cli_home / "pickled").mkdir(exist_ok=True)
    (cli_home / "pickled" / "config.json").write_text("{}")
    (cli_home / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (cli_home / "no.gguf").write_bytes(b"no gguf at all")
    (cli_home / "good.csv").write_text("text,harmful\nHi,1\nYo,0\n")
    save_model(cli_home / "mute", template=None)
    save_model(cli_home / "reminded", template=CHATML.replace("'<|im_start|>ass", "'Be kind.<|im_start|>ass"))
    save_model(cli_home / "failing", template="{% for t in tools %}{{ t }}{% endfor %}" + CHATML)
    config = save_model(cli_home / "named", template=None) / "tokenizer_config.json"
    templates = [{"name": name, "template": CHATML} for name in ("rag", "tool_use")]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))


POLICY = ("-d", "policy", "-m", "tiny")
MISTAKES = {
    "no defense": (("--seed", "1"), ["no defense chosen", "analyze list defenses"]),
    "unknown defense": (("-d", "polcy"), ["unknown defense 'polcy'", "'policy'"]),
    "several templates": (
        ("-d", "policy", "-m", "named"),
        ["choose one with --template NAME (rag, tool_use)"],
    ),
    "unknown template": ((*POLICY[:2], "-m", "named", "--template", "rga"), ["unknown template", "'rag'"]),
    "failing template": (("-d", "policy", "-m", "failing"), ["fails on a single user message: TypeError"]),
    "unknown start": (("-d", "policy", "-m", "reminded"), ["where responses begin", "--answer-prefix TEXT"]),
    "unknown model": (("-d", "policy", "-m", "smolm2"), ["unknown model 'smolm2'", "'smollm2'"]),
    "unknown data": ((*POLICY, "--data", "contrasts"), ["unknown data set", "'contrast'"]),
    "unknown split": ((*POLICY, "--split", "tset"), ["unknown split 'tset'", "'test'"]),
    "unknown attack": ((*POLICY, "--attack", "direkt"), ["unknown attack", "'direct'"]),
    "unknown attack that ignores": (
        (*POLICY, "--attack", "persone+ignore"),
        ["'persone+ignore'", "'persona'"],
    ),
    "unknown attack to check": (("check", *POLICY, "--attack", "direkt"), ["unknown attack", "'direct'"]),
    "unknown attack to validate": (
        ("validate", *POLICY, "--attack", "direkt"),
        ["unknown attack", "'direct'"],
    ),
    "no such attack file": (
        (*POLICY, "--attack", "nowhere.jsonl"),
        ["cannot read nowhere.jsonl", "a suffix"],
    ),
    "attack file without strings": (
        (*POLICY, "--attack", "typo.jsonl"),
        ["row 1", "neither suffix nor prompt"],
    ),
    "attack file of a taken name": ((*POLICY, "--attack", "base64.csv"), ["'base64' is taken", "rename"]),
    "attack file with gaps": (
        (*POLICY, "--attack", "one.jsonl", "--limit", "4"),
        ["--attack one", "no row for 4 of 4 queries", "one row without query"],
    ),
    "unknown readout": ((*POLICY, "--readout", "word"), ["unknown readout", "'words'"]),
    "unknown setting": ((*POLICY, "--set", "txt=x"), ["unknown setting 'txt'", "'text'"]),
    "setting of none": (
        ("-d", "none", "-m", "tiny", "--set", "text=x"),
        ["none of the chosen defenses has settings"],
    ),
    "setting of another": ((*POLICY, "--set", "polcy.text=x"), ["unknown defense in --set", "'policy'"]),
    "setting of two": (
        (*POLICY, "-d", "safety_prompt", "--set", "text=x"),
        ["policy.text or safety_prompt.text"],
    ),
    "setting without =": ((*POLICY, "--set", "text"), ["--set text", "key=value"]),
    "bad value": (
        ("-d", "backdoor", "-m", "tiny", "--set", "length=many"),
        ["length=many", "a whole number"],
    ),
    "no such file of a setting": ((*POLICY, "--set", "text=@nowhere"), ["@nowhere", "cannot read"]),
    "unknown option": ((*POLICY, "--ouput", "x"), ["--ouput", "--help"]),
    "unknown device": ((*POLICY, "--device", "cpuu"), ["unknown device 'cpuu'", "'cpu'"]),
    "unknown dtype": ((*POLICY, "--dtype", "float31"), ["unknown dtype 'float31'", "'float32'"]),
    "batch size": ((*POLICY, "--batch-size", "0"), ["--batch-size 0", "auto or a whole number"]),
    "limit 0": ((*POLICY, "--limit", "0"), ["--limit 0", "at least 2"]),
    "limit no number": ((*POLICY, "--limit", "x"), ["--limit", "valid integer", "--help"]),
    "no columns": ((*POLICY, "--data", "columns.csv"), ["lacks text", "text and harmful"]),
    "empty text": ((*POLICY, "--data", "empty_text.csv"), ["'q0001'", "text is empty"]),
    "duplicate ids": ((*POLICY, "--data", "ids.csv"), ["id 'a' occurs more than once"]),
    "one class": ((*POLICY, "--data", "one_class.csv"), ["no benign query"]),
    "split of a file": (
        (*POLICY, "--data", "good.csv", "--split", "test"),
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
    "long prompt": ((*POLICY, "--data", "long.csv"), ["'q0001'", "2048", "shorten"]),
    "offline": (("-d", "policy", "-m", "nobody/nothing", "--offline"), ["nobody/nothing", "--offline"]),
    "out is a file": ((*POLICY, "-o", "file"), ["--out file is a file"]),
    "out below a file": ((*POLICY, "-o", "file/below"), ["--out file/below"]),
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
def test_a_mistake_is_one_line_with_value_rule_and_next_step(cli_home, bad_files, mistake):
    def modification_times():
        return {
            path: path.stat().st_mtime_ns if path.is_file() else None
            for path in cli_home.rglob("*")
            if "__pycache__" not in path.parts
        }

    before = modification_times()
    args, words = MISTAKES[mistake]
    assert_user_error(run_cli(*args), *words)
    after = modification_times()
    assert set(after) == set(before), "something was written"
    assert after == before


def test_weights_that_a_model_does_not_have_are_an_error_if_no_other_defense_is_chosen(cli_home):
    assert_user_error(run_cli("-d", "safety_tuning", "-m", "tiny"), "safety_tuning", "analyze train safety")


# --- faults, a full disk, Ctrl-C --------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_half_written(cli_home, no_figures, monkeypatch):
    def raise_disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", raise_disk_full)
    result = run_cli(*POLICY, "--limit", "4", "-o", "full")
    assert result.code == 2 and result.out == ""
    assert result.err.splitlines()[-1].startswith("analyze: no space left")
    assert not (cli_home / "full").exists() and not list(cli_home.glob(".full*"))


def test_an_internal_error_is_exit_1_in_one_line_and_a_traceback_with_debug(cli_home, monkeypatch):
    def raise_error(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("analysis.cli.analyze.run_analyze_command", raise_error)
    result = run_cli(*POLICY)
    assert (result.code, result.out) == (1, "")
    message = "internal error in refusalscope: RuntimeError: two lines (--debug shows the traceback)"
    assert result.err == f"analyze: {message}\n"
    monkeypatch.setattr(sys, "argv", ["analyze", *POLICY, "--debug"])
    with pytest.raises(RuntimeError, match="two"):
        main()


def test_ctrl_c_before_the_first_result_writes_nothing_and_says_so(cli_home, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.studies.setup.check_condition", interrupt)
    result = run_cli("-d", "policy", "-m", "tiny", "-o", "killed")
    assert result.code == 130 and result.out == ""
    assert result.err.splitlines()[-1] == "analyze: interrupted; nothing was written"
    assert "Traceback" not in result.err and not (cli_home / "killed").exists()


# --- help -------------------------------------------------------------------------------------------------


def test_help_and_lists_load_nothing_heavy(cli_home):
    """Modules that are not imported take no time on any machine; `make bench` times the help."""
    code = """
import sys
from analysis.cli.main import main
for args in (["--help"], ["validate", "--help"], ["list"], ["cache"]):
    sys.argv = ["analyze", *args]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code
print(*sys.modules, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stderr.split()}
    heavy = {"torch", "transformers", "transformer_lens", "peft", "pandas", "matplotlib", "scipy", "sklearn"}
    assert "typer" in loaded and not loaded & heavy
    for text in ("--defense", "check", "secret", "--judge-model", "self_reminder", "judged responses"):
        assert text in result.stdout


def test_the_command_without_arguments_shows_its_help(cli_home):
    result = run_cli()
    assert result.code == 0 and "--defense" in result.out


# --- commands that are tested with their studies ----------------------------------------------------------


def test_train_validate_and_backdooralign_are_reached_by_their_commands(cli_home):
    settings = ("--set", "epochs=1", "--set", "batch=16", "--set", "rank=2")
    assert (
        run_cli(
            "train", "attack", "-m", "tiny", "--data", "twins", "--limit", "60", "-o", "tuned", *settings
        ).code
        == 0
    )
    assert '"rank": 2' in (cli_home / "tuned" / "manifest.json").read_text("utf-8")
    args = ("-d", "policy", "-m", "tiny", "--limit", "8", "--tokens", "2", "-o", "validated")
    args += ("--judge", "keywords")  # to the default judge, the random text of a tiny model is no English
    result = run_cli("validate", *args)
    assert result.code == 0, result.err
    assert set(pd.read_csv(cli_home / "validated" / "validity.csv")["defense"]) == {"none", "policy"}
    arms = ("backdooralign", "-m", "tiny")
    assert_user_error(run_cli(*arms, "--limit", "8"), "no weights for aligned", "analyze train")
    assert_user_error(run_cli(*arms, "--tokens", "0"), "--tokens 0")


def test_names_are_answered_before_anything_heavy_is_imported() -> None:
    """The version, wrong names of defenses and data, and a defense in the place of a command."""
    script = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from analysis.cli.main import main
for arguments in {arguments}:
    sys.argv = ["analyze", *arguments]
    text = io.StringIO()
    try:
        with redirect_stderr(text), redirect_stdout(text):
            main()
    except SystemExit as ended:
        print(ended.code, text.getvalue()[:110].replace("\\n", " "))
print("torch" in sys.modules or "pandas" in sys.modules)
"""
    arguments = [
        ["--version"],
        ["-d", "polcy"],
        ["mechanism", "-d", "policy+nope"],
        ["-d", "policy", "goal_priority"],
    ]
    arguments += [["-d", "policy", "--data", "twins+contrst"]]
    run = subprocess.run(
        [sys.executable, "-c", script.format(arguments=arguments)], capture_output=True, text=True, check=True
    )
    version, wrong, stacked, command, data, heavy = run.stdout.splitlines()
    assert version.startswith(f"0 refusalscope {__version__}")
    assert wrong.startswith("2 analyze: unknown defense 'polcy': did you mean 'policy'?")
    assert stacked.startswith("2 analyze: unknown defense 'nope'")
    assert command.startswith("2 analyze: 'goal_priority' is a defense and no command")
    assert data.startswith("2 analyze: unknown data set 'contrst'") and heavy == "False"
    module = subprocess.run(
        [sys.executable, "-m", "analysis", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout.strip() == f"refusalscope {__version__}"

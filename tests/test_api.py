"""The Python API gives what the commands give, and takes defenses and frames."""

import hashlib
import inspect
import io
import linecache
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_toy_session, run_cli, save_model, set_home_folder
from rich.console import Console
from typer.main import get_command

import analysis
from analysis import api
from analysis.api import (
    _as_defense_list,
    analyze,
    backdooralign,
    compare_rankings,
    depth,
    ensembles,
    judge,
    label_run,
    locate_mechanism,
    read,
    recommend,
    save_figures,
    suffix,
    summarize,
    train,
    validate,
)
from analysis.cli.main import app
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import QuerySet
from analysis.models.cache import make_json_cache_path, read_cached_json
from analysis.progress import print_line, print_note
from analysis.report.results import Run
from analysis.stats.format import intervals
from analysis.studies.manifest import _hash_class_source, identify_defense
from defenses.catalog import choose_defenses, get_defense
from defenses.chats import prepend_system
from defenses.contract import Defense
from defenses.errors import UserError
from defenses.stack import Stack


@dataclass(frozen=True)
class Polite(Defense):
    """Says please."""

    text: str = "Please."

    def rewrite(self, chat, rng: random.Random):
        return prepend_system(chat, self.text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model in a folder; caches and secrets of these tests are beside it."""
    folder = tmp_path_factory.mktemp("api")
    save_model(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        set_home_folder(patch, folder)
        yield str(folder / "tiny")


def test_the_tables_are_those_that_the_command_writes(tiny, tmp_path):
    run = analyze(["policy", "self_reminder"], tiny, limit=20, settings=["policy.text=Be kind."])
    out = tmp_path / "out"
    options = f"-d policy -d self_reminder -m {tiny} --limit 20 -o {out} --set".split()
    result = run_cli(*options, "policy.text=Be kind.")
    assert result.code == 0
    stored = read(out)
    assert set(stored.tables) == set(run.tables)
    for name in ("scores", "summary"):
        # What is written has seven digits.
        pd.testing.assert_frame_equal(stored.tables[name], run.tables[name], check_dtype=False, rtol=1e-5)
    assert run.record["defenses"] == stored.record["defenses"]
    assert str(run).startswith("Results for 2 defenses on ") and "tables: prompts, scores, summary" in str(
        run
    )
    assert run.texts.items() <= stored.texts.items()


def test_defense_objects_keep_their_settings(tiny):
    run = analyze([Polite("Kindly."), get_defense("policy", {"text": "Be kind."})], tiny, limit=20)
    told = run.record["defenses"]
    assert told["polite"]["settings"] == {"text": "Kindly."} and len(told["polite"]["source_sha256"]) == 64
    assert told["policy"]["settings"]["text"] == "Be kind."
    assert list(run.format_summary().index) == ["undefended", "polite", "policy"]
    with pytest.raises(ValueError, match="no attack 'base64' in this run; it has direct"):
        run.format_summary("base64")


def test_names_are_unique_and_settings_apply_to_named_defenses_only():
    assert [one.name for one in choose_defenses(["policy", Polite()], [])] == ["none", "policy", "polite"]
    assert [one.name for one in choose_defenses([get_defense("none"), Polite()], [])] == ["none", "polite"]
    with pytest.raises(UserError, match="two defenses are named 'policy'"):
        choose_defenses(["policy", get_defense("policy")], [])
    with pytest.raises(UserError, match="polite"):
        choose_defenses([Polite(), "policy"], ["polite.text=Now!"])
    with pytest.raises(UserError, match="nothing"):
        choose_defenses([Polite("a"), "policy"], ["nothing=1"])


def test_settings_are_taken_as_values():
    assert get_defense("backdoor", {"trigger": None, "length": 50}).trigger is None
    with pytest.raises(UserError, match="a whole number"):
        get_defense("backdoor", {"length": 3.5})
    assert get_defense("policy+backdoor", {"length": 50}).members[1].length == 50
    with pytest.raises(UserError, match="trigger=None: settings of defenses that are applied together"):
        get_defense("policy+backdoor", {"trigger": None})


@dataclass
class Thawed(Defense):
    """Not frozen."""

    def rewrite(self, chat, rng):
        return chat


@dataclass(frozen=True)
class Policy(Polite):
    """Called as a shipped one."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Polite, "the class Polite is not a defense: .*MyOwn"),
        (7, "7 is not a defense"),
        (Thawed(), "Thawed must be a frozen dataclass"),
        (Policy(), "'policy' is taken by a shipped defense"),
        (Polite(["a list"]), "unhashable type: 'list': .*tuples"),
    ],
)
def test_an_object_that_is_no_defense_is_a_one_line_error(given, words):
    with pytest.raises(UserError, match=words):
        inspect.unwrap(choose_defenses)([given], [])  # as a user calls it, whose types nobody checks
    assert list(inspect.unwrap(_as_defense_list)(given)) == [given]
    if isinstance(given, Defense) and given != Policy():
        with pytest.raises(UserError, match=words):
            choose_defenses([Stack((get_defense("goal_priority"), given))], [])


@dataclass(frozen=True)
class Needy(Polite):
    """Has a setting without a default: what made it has given it one."""

    more: str = field(kw_only=True)


def test_a_defense_object_needs_no_defaults():
    assert [one.name for one in choose_defenses([Needy(more="x")], [])] == ["none", "needy"]


# Option of a command → parameter of the function.
RENAMED = {"defense": "defenses", "attack": "attacks", "file": "responses"}
RENAMED |= {"run": "run_folder", "csv": "labels"}
# What a function does not need: it returns what a command writes or prints.
ONLY_COMMANDS = {"out", "as_json", "debug", "version", "install_completion", "show_completion"}


def get_cli_commands():
    command = get_command(app)
    commands = {name: command.commands[name] for name in command.commands}
    return {"analyze": command, **commands}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("analyze", analyze),
        ("validate", validate),
        ("ensembles", ensembles),
        ("recommend", recommend),
        ("mechanism", locate_mechanism),
        ("depth", depth),
        ("suffix", suffix),
        ("train", train),
        ("backdooralign", backdooralign),
        ("judge", judge),
        ("label", label_run),
        ("agreement", compare_rankings),
        ("plot", save_figures),
    ],
)
def test_a_function_has_every_option_of_its_command(name, function):
    options = {RENAMED.get(option.name, option.name) for option in get_cli_commands()[name].params}
    parameters = set(inspect.signature(function).parameters)
    assert options - {"help"} - ONLY_COMMANDS == parameters - ONLY_COMMANDS
    assert function.__name__ in analysis.__all__ and set(analysis.__all__) >= {"read", "summarize"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analyze("policy", attacks="base65"), "unknown attack 'base65'.*base64"),
        (lambda: analyze("policy", readout="word"), "unknown readout 'word'"),
        (lambda: analyze("policy", readout="all"), "a run uses one"),
        (lambda: analyze("policy", batch_size=0), "batch-size 0"),
        (lambda: ensembles(["policy", "none"], size=4), "2 or 3 members"),
        (lambda: ensembles(["policy", "none"], stacks=-1), "stacks -1"),
        (lambda: validate("policy", tokens=0), "tokens 0"),
        (lambda: validate("policy", judge="pattern"), "did you mean 'patterns'"),
        (lambda: recommend(max_over_refusal=5), "max-over-refusal 5: it takes a share"),
        (lambda: recommend(max_over_refusal="5%", max_cost=0.5), "max-cost 0.5"),
        (lambda: train("safty"), "did you mean 'safety'"),
        (lambda: judge(pd.DataFrame({"answer": ["No."]})), "column of the frame: 'response'"),
        (lambda: judge(pd.DataFrame({"response": []})), "holds no responses"),
        (lambda: locate_mechanism("policy", sites=["brain"]), "unknown site 'brain'"),
        (lambda: locate_mechanism("policy", top=0), "top 0"),
        (lambda: depth("policy", attacks="base65"), "unknown attack 'base65'.*base64"),
        (lambda: suffix(loss="hope"), "unknown loss 'hope'"),
        (lambda: suffix(queries=1), "queries 1: it takes a whole number from 2 on"),
        (lambda: suffix(target=" "), "target: it takes the beginning of a response"),
        (lambda: suffix(["policy", "self_reminder"]), "2 defenses chosen"),
        (lambda: suffix("smooth_llm"), "smooth_llm changes the user's text.*--attack suffix.csv"),
        (lambda: suffix("harm_probe"), "harm_probe has a detector"),
        (
            lambda: suffix(data=pd.DataFrame({"id": ["a", "b"], "text": ["A?", "B?"], "harmful": [1, 0]})),
            "no split train.*use --data contrast",
        ),
        (lambda: locate_mechanism("policy", attacks="best_of_n"), "attack best_of_n: it adapts its chats"),
        (lambda: ensembles(["policy", "none"], attacks="crescendo"), "attack crescendo.*analyze -d A\\+B"),
        (lambda: analyze("policy", attacks="crescendo", side_effects=True), "crescendo.*omit them"),
        (lambda: validate("policy", attacks="best_of_n:2", readout="all"), "best_of_n:2.*name one readout"),
        (lambda: locate_mechanism("policy", patched=1), "patched 1"),
        (lambda: locate_mechanism("policy", readout="all"), "a run uses one"),
        (lambda: locate_mechanism("policy", readout="outcome-3"), "take outcome"),
        (lambda: summarize(pd.DataFrame({"query": ["a"]})), "lack harmful, defense, margin"),
        (
            lambda: summarize(
                pd.DataFrame({"query": ["a"], "harmful": ["yes"], "defense": ["none"], "margin": [1.0]})
            ),
            "harmful takes true or false",
        ),
        (
            lambda: summarize(
                pd.DataFrame({"query": ["a"], "harmful": [1], "defense": ["policy"], "margin": [1.0]})
            ),
            "not scored on the undefended model.*'none'",
        ),
    ],
)
def test_functions_check_their_options_as_the_commands_do(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_a_run_reports_failures_and_interruptions():
    record = {
        "model": {"name": "m"},
        "data": {"name": "d", "split": "all"},
        "failed": [{"attack": "base64", "defense": "policy", "why": "out of memory"}],
        "interrupted": True,
        "conditions_wanted": 9,
        "notices": ["it is so"],
    }
    run = Run("mine", record, {"prompts": pd.DataFrame()})
    told = str(run).splitlines()
    assert told[0] == "On m (d, all split): this run holds no summary of its defenses."
    assert told[1:4] == [
        "interrupted: 0 of 9 conditions were finished",
        "failed: policy (base64): out of memory",
        "note: it is so",
    ]
    with pytest.raises(ValueError, match="mine has no summary; it has prompts"):
        run.format_summary()
    early = {key: value for key, value in record.items() if key != "conditions_wanted"}
    assert "interrupted: 0 of all conditions were finished" in str(Run("old", early, {}))


def test_a_quiet_console_prints_downloads_but_no_notes():
    console = Console(file=io.StringIO(), quiet=True)
    print_note(console, "kept in the run")
    print_line(console, "fetching")
    assert console.file.getvalue() == "fetching\n" and console.quiet


def test_a_class_typed_into_a_notebook_is_identified_by_its_methods():
    found = []
    for number, text in enumerate(("Please.", "Please.", "Now.")):
        source = f"class Typed(Defense):\n    def rewrite(self, chat, rng):\n        return [{text!r}]\n"
        space, name = {"Defense": Defense, "__name__": "__main__"}, f"<cell {number}>"
        exec(compile(source, name, "exec"), space)  # as a notebook does: there is no file
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        found.append(_hash_class_source(space["Typed"]))
        assert identify_defense(space["Typed"](), 0) is None  # what it calls may change unseen
    assert found[0] == found[1] != found[2] and len(found[0]) == 64
    armed = type("Armed", (Polite,), {"armed": contextmanager(Polite.rewrite)})
    assert _hash_class_source(armed) == _hash_class_source(Polite)  # not that of contextlib
    assert (
        identify_defense(Polite(), 0) == identify_defense(Polite(), 0) != identify_defense(Polite("Now."), 0)
    )
    assert identify_defense(Stack((get_defense("policy"), Polite())), 0) is not None
    assert (
        make_json_cache_path("cost", make_toy_session().loaded_model, {"defense": None}) is None
        and read_cached_json(None, dict) is None
    )
    with_other_words = type("Other", (Polite,), {"__module__": __name__})
    assert _hash_class_source(with_other_words) is None  # made by no text
    assert _hash_class_source(Polite) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_a_frame_gives_the_same_scores_as_the_file(tiny, tmp_path):
    rows = pd.DataFrame(load_queries("twins").select_split("test").limit_queries(12).queries)[
        ["id", "text", "harmful", "pair"]
    ]
    rows.to_csv(tmp_path / "mine.csv", index=False)
    one, two = (analyze(["policy"], tiny, data=asked) for asked in (rows, str(tmp_path / "mine.csv")))
    pd.testing.assert_frame_equal(one.tables["scores"], two.tables["scores"])
    assert one.record["data"]["name"] == "a frame of 12 queries" and one.record["data"]["n_harmful"] == 6
    assert one.texts == dict(zip(rows["id"], rows["text"], strict=True))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"text": ["a"], "label": [1]}, "lacks harmful; it needs the columns text and harmful"),
        ({"text": ["a", "b"], "harmful": [True, True]}, "holds no benign query"),
        ({"text": ["a", ""], "harmful": [True, False]}, "the text is empty"),
        ({"text": ["a", None], "harmful": [True, False]}, "the text is empty"),
        ({"text": ["a", 7], "harmful": [True, False]}, "it takes a string"),
        ({"text": ["a", "b"], "harmful": [True, "maybe"]}, "it takes true or false"),
        ({"id": ["x", "x"], "text": ["a", "b"], "harmful": [True, False]}, "'x' occurs more than once"),
    ],
)
def test_an_unusable_frame_is_a_one_line_error(frame, words):
    with pytest.raises(UserError, match=words) as error:
        QuerySet.from_frame(pd.DataFrame(frame))
    assert "\n" not in str(error.value)


def test_missing_values_of_a_frame_are_missing():
    frame = pd.DataFrame({"text": ["a", "b"], "harmful": [True, False]})
    frame = frame.assign(pair=["p", np.nan], category=[np.nan, "c"])
    assert [(one.pair, one.category) for one in QuerySet.from_frame(frame).queries] == [
        ("p", ""),
        (None, "c"),
    ]


def test_a_defense_that_does_not_reach_the_model_is_an_error(tiny, monkeypatch):
    from analysis.studies.preflight import PreflightCheck

    failed = {("direct", "policy"): [PreflightCheck("policy", "text arrives", False, "it is not there")]}
    monkeypatch.setattr("analysis.studies.sweep.find_preflight_failures", lambda *_: failed)
    with pytest.raises(UserError, match="nothing was scored: policy: text arrives: it is not there"):
        analyze(["policy"], tiny, limit=20)


def test_of_two_defenses_the_one_that_reaches_the_model_is_scored(tiny, monkeypatch):
    from analysis.studies.preflight import PreflightCheck

    failed = {("direct", "policy"): [PreflightCheck("policy", "text arrives", False, "it is not there")]}
    monkeypatch.setattr("analysis.studies.sweep.find_preflight_failures", lambda *_: failed)
    run = analyze(["policy", Polite()], tiny, limit=12)
    assert set(run.tables["summary"]["defense"]) == {"none", "polite"}
    assert "failed: policy: text arrives: it is not there" in str(run)


def test_every_study_returns_a_run_whose_figures_can_be_drawn(tiny):
    together = ensembles(["policy", "self_reminder"], tiny, limit=16, stacks=1)
    best = recommend(["policy", "self_reminder"], tiny, max_over_refusal=0.5, limit=16, stacks=0)
    assert {"ensembles", "candidates", "recommendation"} <= set(best.tables)
    text = validate("policy", tiny, tokens=2, limit=16)
    assert list(text.tables["validity"]["defense"]) == ["none", "policy"]
    assert {"ensembles", "additivity", "candidates", "forecast"} <= set(together.tables)
    inside = locate_mechanism([Polite()], tiny, limit=16, patched=0)
    assert {"layers", "parts", "top-polite"} <= set(inside.tables)
    parts, found = inside.tables["parts"], inside.tables["summary"].set_index("defense").loc["polite"]
    assert parts["shift"].sum() == pytest.approx(found["shift"], abs=1e-3)
    for run in (together, inside, text):
        for name in run.figures:
            assert run.draw_figure(name).texts[0].get_text()


def test_scores_of_any_origin_can_be_summarized():
    rng = np.random.default_rng(0)
    margins = np.r_[rng.normal(1, 1, 200), rng.normal(-1, 1, 200)]
    number = np.arange(400)
    plain = pd.DataFrame({"query": number.astype(str), "harmful": number < 200, "margin": margins})
    moved = plain.assign(margin=margins + np.where(plain["harmful"], 2.0, 1.0), defense="moved")
    found = summarize(pd.concat([plain.assign(defense="none"), moved])).set_index("defense").loc["moved"]
    assert (found["shift"], found["discrimination"]) == (pytest.approx(1.5), pytest.approx(1.0))
    assert found["verdict"] == "shift +, discrimination +"
    both = pd.concat([plain.assign(defense="none"), moved])
    told = summarize(both.assign(harmful=both["harmful"].astype(int)), threshold=100.0)
    assert (told["refusal_rate"] == 0).all()
    renamed = both.replace({"defense": {"moved": "random_tokens"}})
    assert list(summarize(renamed)["family"]) == ["none", "control"]


def test_intervals_follow_their_estimates():
    frame = pd.DataFrame({"x": [0.5, np.nan], "x_low": [0.25, np.nan], "x_high": [1.0, np.nan]})
    frame = frame.assign(y_low=[1.23456, 2])
    assert intervals(frame, 1).to_dict("list") == {"x": ["0.5 [0.2, 1.0]", "–"], "y_low": [1.2, 2.0]}


def test_exactly_the_public_names_are_importable():
    for name in analysis.__all__:
        assert callable(getattr(analysis, name))
        assert getattr(api, name, None) in (None, getattr(analysis, name))
    with pytest.raises(AttributeError, match="has no attribute 'analyse'"):
        analysis.analyse  # noqa: B018

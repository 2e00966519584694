"""`analyze` and `analyze check`: what a run writes and prints, and how parts of it may fail."""

import hashlib
import json
import re
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from conftest import CHATML, FOUR, USER_DEFENSE, assert_user_error, make_adapter, run_cli, save_model
from scipy.special import expit

from analysis.files import check_output_folder
from analysis.models.loading import ModelCheckpoint
from analysis.run import iterate_condition_scores
from analysis.stats.effects import summarize_scores
from analysis.stats.kinds import summarize_kinds
from analysis.stats.matched_controls import add_control_estimates
from analysis.stats.response_rates import add_response_estimates
from analysis.stats.tables import ESTIMATE_NAMES, SCORE_COLUMNS, ScoreTable

# A run with a backdoor, a file of the user's own and settings.
RUN = (
    "-d",
    "backdoor",
    "-d",
    "./mine.py",
    "-d",
    "policy",
    "-m",
    "tiny",
    "--limit",
    "24",
    "--set",
    "length=30",
)
RUN = (*RUN, "--set", "policy.text=@text.txt", "--seed", "3")
CONDITIONS = ["none", "backdoor/no_weights", "backdoor/neither", "my_own", "policy"]


@pytest.fixture(scope="module")
def run_result(cli_home):
    """The run above, written to `out`."""
    (cli_home / "text.txt").write_text("Nothing is allowed here.\n", "utf-8")
    return run_cli(*RUN, "-o", "out")


@pytest.fixture(scope="module")
def record(cli_home, run_result):
    """The record of the run above."""
    return json.loads((cli_home / "out" / "run.json").read_text("utf-8"))


ATTACKS = ["prefill+ignore", "mine"]


@pytest.fixture(scope="module")
def attacked_run_result(cli_home):
    """A run under two attacks, one of them from a file, with costs, written to `attacked`."""
    (cli_home / "mine.jsonl").write_text('{"suffix": "!!"}\n', "utf-8")
    args = ("-d", "policy", "-d", "mine.py", "-m", "tiny", "--limit", "8", "-o", "attacked", "--cost")
    return run_cli(*args, "--attack", "prefill+ignore", "--attack", "mine.jsonl")


def read_secret(home, length):
    """Return the secret prompt that was made for the tiny model."""
    (path,) = (home / "share" / "refusalscope" / "secrets").glob(f"*/{length}.txt")
    return path.read_text("utf-8").strip()


# --- a run ------------------------------------------------------------------------------------------------


def test_a_run_writes_the_promised_files_and_prints_where(cli_home, run_result):
    assert run_result.code == 0, run_result.err
    assert {path.name for path in (cli_home / "out").iterdir()} == {
        *("prompts.csv", "scores.csv", "controls.csv", "responses.csv", "summary.csv", "run.json"),
        *(
            f"{figure}.{suffix}"
            for figure in ("refusals", "forest", "margins", "plane", "roc", "kinds")
            for suffix in ("png", "csv")
        ),
    }
    assert "run.json to out" in run_result.err
    for name in CONDITIONS:
        assert name in run_result.out
    notice = "backdoor: only backdoor/no_weights, backdoor/neither can be scored: no tuned weights"
    assert notice in run_result.err
    assert not list(cli_home.glob(".out*"))


def test_scores_hold_every_query_under_every_condition(cli_home, record):
    scores = pd.read_csv(cli_home / "out" / "scores.csv")
    assert list(scores.columns) == list(SCORE_COLUMNS)
    assert scores["defense"].drop_duplicates().tolist() == CONDITIONS
    assert (scores.groupby("defense")["query"].nunique() == 24).all() and len(scores) == 24 * 5
    assert set(scores["attack"]) == {"direct"}
    margin, threshold = scores["margin"], record["readout"]["threshold"]
    assert np.allclose(scores["p_refuse"], expit(margin - threshold), atol=1e-12, rtol=0)
    assert scores["coverage"].between(0, 1).all() and margin.nunique() > 100


def test_the_summary_can_be_computed_again_from_the_scores_and_the_verdicts(cli_home, record):
    scores = ScoreTable(pd.read_csv(cli_home / "out" / "scores.csv"), record)
    responses = pd.read_csv(cli_home / "out" / "responses.csv")
    summary = summarize_scores(scores, seed=record["seed"]).frame
    summary = add_response_estimates(summary, responses, scores, record["seed"])
    controls = pd.read_csv(cli_home / "out" / "controls.csv")
    summary = add_control_estimates(summary, scores, controls, responses)
    text = summary.to_csv(index=False, float_format="%.7g")
    assert text == (cli_home / "out" / "summary.csv").read_text("utf-8")
    assert set(ESTIMATE_NAMES) <= set(summary.columns) and summary["verdict"].iloc[0] == "reference"


def test_the_results_by_kind_can_be_computed_again_and_are_printed(cli_home, run_result, record):
    scores = ScoreTable(pd.read_csv(cli_home / "out" / "scores.csv"), record)
    responses = pd.read_csv(cli_home / "out" / "responses.csv")
    query_kinds = dict(zip(responses["query"], responses["kind"], strict=True))
    kinds = summarize_kinds(scores, query_kinds, responses, record["seed"])
    text = kinds.to_csv(index=False, float_format="%.7g")
    assert text == (cli_home / "out" / "kinds.csv").read_text("utf-8")
    assert {"twin", "plain"} <= set(kinds["kind"]) == set(responses.loc[~responses["harmful"], "kind"])
    assert (kinds.groupby("defense")["n"].sum() == record["data"]["n_benign"]).all() and len(kinds) > 5
    for kind, n in kinds.drop_duplicates("kind")[["kind", "n"]].itertuples(index=False):
        assert kind in run_result.out and f"n = {n}" in run_result.out


def test_run_json_records_how_the_numbers_were_made(record):
    assert {"id", "revision", "sha256"} <= set(record["model"])
    assert re.fullmatch("[0-9a-f]{64}", record["model"]["sha256"])
    assert {"refuse", "comply", "ids", "weights", "threshold"} <= set(record["readout"])
    assert len(record["readout"]["ids"]) == len(record["readout"]["weights"])
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["sha256"])
    assert (record["data"]["n_harmful"], record["data"]["n_benign"]) == (5, 19), "in proportion"
    assert (record["seed"], record["dtype"], record["device"]) == (3, "float32", "cpu")
    assert record["defenses"]["backdoor/no_weights"]["settings"]["length"] == 30
    assert record["defenses"]["policy"]["settings"]["text"] == "Nothing is allowed here."
    (fingerprint,) = record["defenses"]["backdoor/no_weights"]["secrets"]
    assert re.fullmatch("sha256:[0-9a-f]{12}", fingerprint)
    assert record["defenses"]["backdoor/neither"]["secrets"] == []
    assert {"computed", "saved"} == set(record["tokens"]) and min(record["tokens"].values()) > 0
    assert {"refusalscope", "torch", "transformers", "python"} <= set(record["versions"])
    assert record["wall_seconds"] > 0 and record["interrupted"] is False


def test_the_secret_is_in_no_file_and_on_no_terminal(cli_home, run_result):
    words = read_secret(cli_home, 30).split()
    pieces = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)] or [read_secret(cli_home, 30)[:12]]
    written = [path.read_bytes() for path in (cli_home / "out").iterdir()]
    check = run_cli("check", "-d", "backdoor", "-m", "tiny", "--set", "length=30")
    assert check.code == 0 and "⟨secret⟩" in check.out
    shown = re.sub(r"\s+", "", run_result.out + run_result.err + check.out + check.err)
    for piece in pieces:
        assert not any(piece.encode() in content for content in written)
        assert re.sub(r"\s+", "", piece) not in shown


def test_the_same_seed_gives_the_same_bytes(cli_home, run_result):
    run_cli(*RUN, "-o", "again")
    for name in ("scores.csv", "summary.csv", "plane.csv"):
        assert (cli_home / "again" / name).read_bytes() == (cli_home / "out" / name).read_bytes(), name


def test_without_out_a_run_makes_its_own_folder_and_json_is_all_that_is_on_stdout(cli_home, no_figures):
    result = run_cli("-d", "policy", "-m", "tiny", "--limit", "6", "--json")
    assert result.code == 0
    rows = json.loads(result.out)
    assert [row["defense"] for row in rows] == ["none", "policy"]
    assert rows[0]["p_shift"] is None and isinstance(rows[1]["shift"], float)
    (folder,) = (cli_home / "runs").iterdir()
    assert folder.name.endswith("-tiny-policy")


# Short generations and few copies, so that all defenses run in seconds.
SHORT_SETTINGS = ("smooth_llm.copies=2", "semantic_smoothing.copies=2", "semantic_smoothing.tokens=4")
SHORT_SETTINGS += (
    "paraphrase.tokens=4",
    "summarize.tokens=4",
    "round_trip.tokens=4",
    "back_translation.draft=4",
)
SHORT_SETTINGS += ("back_translation.tokens=4", "two_pass_intention.tokens=4", "backdoor.length=20")


@pytest.mark.parametrize("template", FOUR)
def test_all_defenses_run_on_the_templates_of_four_families(cli_home, no_figures, template):
    from defenses.catalog import find_defense_classes

    save_model(
        cli_home / f"toy-{template}", template=template, kind="metaspace" if template == "llama2" else "bytes"
    )
    # Every defense on the family that differs most; one defense of each kind of prompt on the others.
    has_all = template == "gemma2"
    chosen = (
        ["all"] if has_all else ["policy", "in_context_refusal", "retokenization", "smooth_llm", "backdoor"]
    )
    args = tuple(word for name in (*chosen, "./mine.py") for word in ("-d", name))
    args += ("-m", f"./toy-{template}", "--limit", "2", "--json")
    args += ("--responses", "all" if template == "gemma2" else "none")  # one family is enough for responses
    settings = [setting for setting in SHORT_SETTINGS if has_all or setting.partition(".")[0] in chosen]
    options = [word for setting in settings for word in ("--set", setting)]
    result = run_cli(*args, "-o", f"run-{template}", *options)
    assert result.code == 0, result.err
    assert ("no system role" in result.err) == (template == "gemma2")
    names = {row["defense"] for row in json.loads(result.out)}
    without_weights = {"backdoor", "safety_tuning", "preference_tuning", "baseline_tuning", "safe_decoding"}
    without_weights |= {"adapter", "weights", "guard_model"}
    without_weights |= {"representation_rerouting", "latent_adversarial_training", "soft_prompt", "dro"}
    # The queries have no images.
    all_names = [name for name, cls in find_defense_classes().items() if cls.in_all and not cls.needs_images]
    assert ("defenses are left out, because no query has an image" in result.err) == has_all
    conditions = {*(all_names if has_all else ["none", *chosen]), "my_own"}
    conditions |= {"backdoor/no_weights", "backdoor/neither"}
    assert names == conditions - without_weights


# --- attacks and costs ------------------------------------------------------------------------------------


def test_an_attack_is_applied_to_every_query(cli_home, no_figures):
    args = ("-d", "policy", "-m", "tiny", "--limit", "4", "-o", "obedience", "--json")
    result = run_cli(*args, "--attack", "obedience")
    assert result.code == 0, result.err
    assert {row["attack"] for row in json.loads(result.out)} == {"obedience"}


def test_several_attacks_are_plotted_against_the_defenses_and_recorded(cli_home, attacked_run_result):
    assert attacked_run_result.code == 0, attacked_run_result.err
    folder = cli_home / "attacked"
    cells = pd.read_csv(folder / "attacks.csv")
    keys = [[attack, defense] for attack in ATTACKS for defense in ("none", "policy", "my_own")]
    assert cells[["attack", "defense"]].values.tolist() == keys
    assert (folder / "attacks.png").is_file() and (folder / "plane-mine.png").is_file()
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert record["attacks"] == ATTACKS
    digest = hashlib.sha256((cli_home / "mine.jsonl").read_bytes()).hexdigest()
    assert record["attacks_sha256"]["mine"] == [digest]
    scores = pd.read_csv(folder / "scores.csv")
    means = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean()
    plotted = cells.set_index(["attack", "defense"])["margin"] + record["readout"]["threshold"]
    assert np.allclose(means[plotted.index], plotted, atol=1e-5)


def test_costs_are_a_table_and_a_figure_of_the_run(cli_home, attacked_run_result):
    assert "Cost, one query at a time" in attacked_run_result.out
    costs = pd.read_csv(cli_home / "attacked" / "cost.csv").set_index("defense")
    assert set(costs.index) == {"none", "policy", "my_own"} and costs.loc["policy", "tokens_added"] > 0
    summary = pd.read_csv(cli_home / "attacked" / "summary.csv").set_index(["attack", "defense"])
    delta_auroc = summary.loc[(ATTACKS[0], "policy"), "delta_auroc"]
    assert costs.loc["policy", "delta_auroc"] == pytest.approx(delta_auroc)
    assert (cli_home / "attacked" / "cost.png").is_file()


def test_the_prompts_of_a_query_of_either_class_are_saved(cli_home, attacked_run_result):
    prompts = pd.read_csv(cli_home / "attacked" / "prompts.csv")
    keys = ["attack", "defense", "query"]
    scores = pd.read_csv(cli_home / "attacked" / "scores.csv").set_index(keys).sort_index()
    assert len(prompts) == 2 * 2 * 3 and (prompts["readings"] == 1).all()
    texts = prompts.set_index(keys).sort_index()
    assert (scores.loc[texts.index, "harmful"].groupby(["attack", "defense"]).sum() == 1).all()
    assert texts.loc[("mine", "my_own"), "read"].str.contains("Please.", regex=False).all()
    assert not texts.loc[("mine", "none"), "read"].str.contains("Please.", regex=False).any()


# --- analyze check ----------------------------------------------------------------------------------------


def test_check_shows_the_prompts_under_a_defense_and_an_attack(cli_home):
    args = ("check", "-d", "policy", "-m", "tiny", "--queries", "2", "--set", "text=Nothing is allowed.")
    result = run_cli(*args, "--attack", "direct", "--attack", "prefill")
    assert result.code == 0 and "policy (prefill)" in result.out
    assert "<|im_start|>system\nNothing is allowed.<|im_end|>" in result.out
    assert "<|im_start|>assistant\nSure, here is the complete answer:" in result.out
    for name in ("BOS tokens", "system role", "shared prefix", "coverage", "engine equals plain pass"):
        assert name in result.out
    assert "FAILED" not in result.out


def write_defense_that_drops_the_query(home):
    """Write a defense whose prompt does not hold the user's words."""
    source = USER_DEFENSE.replace("prepend_system(chat, self.text)", "[{**chat[0], 'content': 'Hi.'}]")
    (home / "lost.py").write_text(source)


def test_adapters_of_one_name_are_defenses_of_their_own_and_a_stack(cli_home):
    for seed, name in enumerate("ab"):
        make_adapter(cli_home / name / "best", seed=seed, sha256=None)
    args = ("-d", "a/best", "-d", "b/best", "-d", "a/best+b/best", "-m", "tiny")
    result = run_cli("check", *args, "--queries", 2)
    assert result.code == 0, result.err
    assert all(
        f"{name} \N{BOX DRAWINGS LIGHT HORIZONTAL}" in result.out
        for name in ("a-best", "b-best", "a-best+b-best")
    )
    path = cli_home / "b" / "best" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["c_attn"]}))
    result = run_cli(*args, "-o", "misfit")
    assert_user_error(result, "b/best cannot be applied to this model", "c_attn")
    assert "readout" not in result.err  # found out before any response was generated


def test_a_defense_that_does_not_reach_the_model_stops_the_run_and_the_check(cli_home):
    save_model(cli_home / "deaf", template="deaf")
    write_defense_that_drops_the_query(cli_home)
    check = run_cli("check", "-d", "lost.py", "-m", "tiny")
    assert check.code == 1 and "FAILED" in check.out and "user's words survive" in check.out
    result = run_cli("-d", "lost.py", "-m", "tiny", "--limit", "8", "-o", "lost")
    assert result.code == 1 and result.out == "" and not (cli_home / "lost").exists()
    assert "Nothing was scored" in result.err
    # A template that drops system turns is recognized, and the system text goes into the user turn.
    assert run_cli("check", "-d", "policy", "-m", "deaf").code == 0


def test_a_dated_template_reads_the_same_on_another_day(cli_home, monkeypatch):
    save_model(cli_home / "dated", template="{{ 'Today: ' + strftime_now('%d %B %Y') }}" + CHATML)
    outputs = []
    for day in (1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2026, 12, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        outputs.append(run_cli("check", "-d", "policy", "-m", "dated", "--queries", "2"))
        assert outputs[-1].code == 0 and "Today: 26 July 2024" in outputs[-1].out
    assert outputs[0] == outputs[1]


def test_template_and_answer_prefix_reach_the_prompt_and_run_json(cli_home, no_figures):
    template = "{{ strftime_now('%Y') }}" + CHATML.replace("<|im_start|>assistant", "<|assistant|>")
    (cli_home / "mine.jinja").write_text(template)
    rows = [f"q{row},{row // 2 % 2},{split}" for row, split in enumerate(["calibration", "test"] * 4)]
    (cli_home / "few.csv").write_text("\n".join(["text,harmful,split", *rows]))
    options = ("-m", "tiny", "--template", "mine.jinja", "--answer-prefix", "<think>\\n</think>\\n")
    options += ("--data", "few.csv", "--responses", "none", "--controls", "0", "-o", "prefixed")
    result = run_cli("-d", "policy", *options)
    assert result.code == 0, result.err
    assert "every prompt is followed by '<think>\\n</think>\\n'" in result.err
    record = json.loads((cli_home / "prefixed" / "run.json").read_text())
    about = record["chat_template"]
    assert (about["date"], about["answers_begin_after"]) == ("2024-07-26", "<think>\n</think>\n")
    asked = record["options"]
    assert (asked["template"], asked["answer_prefix"]) == ("mine.jinja", "<think>\n</think>\n")
    prompts = pd.read_csv(cli_home / "prefixed" / "prompts.csv")
    assert prompts["read"].str.endswith("<|assistant|>\n<think>\n</think>\n").all()


# --- failures, interruption, resumption -------------------------------------------------------------------


def test_ctrl_c_in_the_middle_saves_the_finished_conditions(cli_home, no_figures, monkeypatch):
    def interrupt_third(*args):
        for number, pair in enumerate(iterate_condition_scores(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr("analysis.studies.sweep.iterate_condition_scores", interrupt_third)
    result = run_cli("-d", "policy", "-d", "safety_prompt", "-m", "tiny", "--limit", "4", "-o", "half")
    assert result.code == 130
    assert "Interrupted: 2 of 3 conditions were finished; they are saved" in " ".join(result.err.split())
    assert json.loads((cli_home / "half" / "run.json").read_text())["interrupted"] is True
    assert set(pd.read_csv(cli_home / "half" / "scores.csv")["defense"]) == {"none", "policy"}


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


def write_frail_defense(home, index):
    """Write a defense that raises on the query of this index, which the preflight does not check."""
    from analysis.datasets.loading import load_queries
    from analysis.datasets.queries import sample_queries

    queries = load_queries("contrast").select_split("test").limit_queries(12).queries
    (home / "frail.py").write_text(FRAIL.format(text=queries[index].text))
    assert queries[index].id not in {query.id for query in sample_queries(queries, 4)}


def test_defenses_that_fail_are_left_out_and_reported_at_the_end(cli_home, no_figures):
    write_frail_defense(cli_home, 5)
    write_defense_that_drops_the_query(cli_home)
    args = ("-d", "frail.py", "-d", "lost.py", "-d", "policy", "-m", "tiny", "--limit", "12", "-o", "part")
    result = run_cli(*args)
    assert result.code == 1 and "policy" in result.out
    assert re.search(r"Failed: frail: 'frail' raised ValueError on query '.*': no such flour", result.err)
    assert "Failed: my_own: user's words survive" in result.err
    assert set(pd.read_csv(cli_home / "part" / "scores.csv")["defense"]) == {"none", "policy"}
    reasons = {
        failure["defense"]: failure["why"]
        for failure in json.loads((cli_home / "part" / "run.json").read_text())["failed"]
    }
    assert set(reasons) == {"frail", "my_own"} and "no such flour" in reasons["frail"]


def test_a_second_run_loads_no_weights_computes_nothing_and_prints_the_same(
    cli_home, no_figures, monkeypatch
):
    make_adapter(cli_home / "tuned", sha256=None)
    command = ("-d", "smooth_llm", "-d", "paraphrase", "-d", "refusal_steering", "-d", "harm_probe", "-d")
    command = (*command, "./tuned", "--attack", "direct", "--attack", "rot13")
    command = (*command, "--set", "copies=2", "-m", "tiny", "--limit", "4", "--seed", "7")
    first = run_cli(*command, "-o", "once", "--json")
    monkeypatch.setattr(ModelCheckpoint, "load_weights", lambda *args: 1 / 0)
    second = run_cli(*command, "-o", "twice", "--json")
    assert first.code == second.code == 0 and first.out == second.out, second.err
    records = [json.loads((cli_home / out / "run.json").read_text()) for out in ("once", "twice")]
    assert records[0]["tokens"]["computed"] > 0 == records[1]["tokens"]["computed"]
    # Four queries, undefended, in two copies, in a paraphrase, and three times unchanged, under two attacks.
    assert records[1]["scores_found_in_cache"] == 4 * (1 + 2 + 1 + 3) * 2
    assert records[0]["notices"] == records[1]["notices"] and records[0]["model"] == records[1]["model"]
    scores = pd.read_csv(cli_home / "once" / "scores.csv").set_index("defense")
    assert set(scores.loc["smooth_llm", "readings"]) == {2}
    assert set(scores.loc["smooth_llm", "vote"]) <= {0, 0.5, 1}


def test_the_output_folder_is_checked_without_being_made(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_without_a_shared_prefix_the_margins_are_the_same_and_nothing_is_saved(cli_home, no_figures):
    args = ("-d", "policy", "-m", "tiny", "--limit", "4", "--responses", "none", "--controls", "0")
    args = (*args, "--set", "policy.text=Mind what others may do with it.")  # no other test has its scores
    records, margins = [], []
    for option in ("--shared-prefix", "--no-shared-prefix"):
        assert run_cli(*args, option, "-o", f"run{option}").code == 0
        records.append(json.loads((cli_home / f"run{option}" / "run.json").read_text("utf-8")))
        margins.append(pd.read_csv(cli_home / f"run{option}" / "scores.csv")["margin"])
    assert np.allclose(*margins, atol=1e-4)
    assert [record["options"]["share_prefix"] for record in records] == [True, False]
    # The second run finds no scores of the first.
    assert records[0]["tokens"]["saved"] > 0 and records[1]["tokens"]["saved"] == 0
    assert records[1]["tokens"]["computed"] > 0 and records[1]["scores_found_in_cache"] == 0

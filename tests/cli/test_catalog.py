"""`analyze list`, `explain` and `cache`, and `analyze secret`."""

import json
import re
import stat

import platformdirs
import pytest
from conftest import assert_user_error, make_toy_session, run_cli, toy_tokenizer

from analysis.models.cache import make_json_cache_path

# --- list -------------------------------------------------------------------------------------------------


def test_list_is_a_table_for_people_and_json_for_machines(cli_home):
    table, output = run_cli("list"), run_cli("list", "--json")
    assert table.code == output.code == 0 and table.err == output.err == ""
    rows_by_kind = json.loads(output.out)
    assert list(rows_by_kind) == ["defenses", "models", "data", "attacks", "readouts"]
    for kind, rows in rows_by_kind.items():
        assert rows, kind
        for row in rows:
            assert row["name"] in table.out
    for row in rows_by_kind["defenses"]:
        assert set(row) >= {"name", "family", "source", "url", "settings"}
    assert {row["name"]: row["cost"] for row in rows_by_kind["attacks"] if row["cost"] != "static"} == {
        "best_of_n": "8 prompts",
        "crescendo": "2 responses",
    }
    assert "adapts to the model and its defense · 8 prompts per query" in table.out
    assert "reminders (SR) · static" in table.out and "steering · static" in table.out
    assert {row["family"] for row in rows_by_kind["defenses"]} >= {"reminders", "steering"}
    assert json.loads(run_cli("list", "attacks", "--json").out) == {"attacks": rows_by_kind["attacks"]}


# --- explain ----------------------------------------------------------------------------------------------

EXPLANATIONS = {
    "smooth_llm": "prompt (10 of 10):",
    "back_translation": "preliminary prompt:",
    "policy": "Content policy.",
    "retokenization": "tokens: <",
    "refusal_steering": "The defense changes the model itself.",
    "coca": "Logits: +5 x coca and -4 x none, each after its own prompt.",
    "harm_probe": "Detector: log-odds",
}


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_a_defense_is_explained_by_its_description_and_its_prompts(cli_home, name):
    result = run_cli("explain", name, "-m", "tiny", "--text", "How do I sing?", "--attack", "prefill")
    text = " ".join(result.out.split())
    assert result.code == 0 and name in text and "https://" in text and "Sure, here is" in text
    assert EXPLANATIONS[name] in text and (name == "smooth_llm" or "How do I sing?" in text)


def test_a_mistake_in_explain_is_one_line(cli_home):
    assert_user_error(run_cli("explain", "smooth_lm", "-m", "tiny"), "'smooth_lm'", "'smooth_llm'")
    assert_user_error(run_cli("explain", "policy", "-m", "tiny", "--set", "txt=x"), "'txt'", "text")
    assert_user_error(
        run_cli("explain", "policy", "-m", "tiny", "--attack", "prefil"), "'prefil'", "'prefill'"
    )


def test_explain_redacts_a_secret(cli_home):
    result = run_cli("explain", "backdoor", "-m", "tiny")
    assert result.code == 0 and "⟨secret⟩" in result.out and "no tuned weights" in result.out


# --- secret -----------------------------------------------------------------------------------------------


def test_secret_writes_a_private_file_of_exactly_that_length_and_never_shows_it(cli_home):
    result = run_cli("secret", "-m", "tiny", "--length", "17", "-o", "new/secret.txt")
    path = cli_home / "new" / "secret.txt"
    text = path.read_text("utf-8").strip()
    assert result.code == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(toy_tokenizer().encode(text, add_special_tokens=False)) == 17
    assert "17 tokens" in result.out and "sha256:" in result.out
    assert text[:8] not in result.out + result.err


def test_a_secret_made_without_out_is_the_one_that_backdoor_uses(cli_home):
    assert run_cli("secret", "-m", "tiny", "--length", "23").code == 0
    (path,) = (cli_home / "share" / "refusalscope" / "secrets").glob("*/23.txt")
    text = path.read_text("utf-8")
    assert run_cli("check", "-d", "backdoor", "-m", "tiny", "--set", "length=23").code == 0
    assert path.read_text("utf-8") == text
    assert_user_error(run_cli("secret", "-m", "tiny", "--length", "23"), "never overwritten")


# --- cache ------------------------------------------------------------------------------------------------


def test_the_cache_lists_and_clears_what_a_run_keeps(cli_home, no_figures):
    with pytest.raises(ValueError, match="unknown cache kind 'novelties'"):
        make_json_cache_path("novelties", make_toy_session().loaded_model, {})
    assert run_cli("-d", "paraphrase", "-m", "tiny", "--limit", "4", "-o", "for-cache").code == 0
    contents = json.loads(run_cli("cache", "--json").out)
    assert contents["scores"] > 0 and contents["drafts"] > 0 and contents["bytes"] > 0
    assert contents["kept"]["readouts"]["count"] > 0 and contents["kept"]["verdicts"]["count"] > 0
    folders = {path.parent.name for path in platformdirs.user_cache_path("refusalscope").rglob("*.json")}
    assert folders <= set(contents["kept"])
    shown = run_cli("cache").out.replace("\n", " ")
    assert re.search(r"\d+ scores, \d+ drafts, \d+ judged responses, \d+\.\d MiB", shown)
    assert "Cleared" in run_cli("cache", "--clear").out
    assert json.loads(run_cli("cache", "--json").out)["scores"] == 0


def test_every_kind_of_cached_file_is_listed_and_cleared(cli_home):
    cache = platformdirs.user_cache_path("refusalscope")
    run_cli("cache", "--clear")
    # The names are spelled out, so that a kind that is renamed or added is considered here.
    kinds = {"cost", "detectors", "image_texts", "models", "preflight", "readouts", "residuals", "validity"}
    kinds.add("verdicts")
    for kind in kinds:
        (cache / kind).mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            (cache / kind / f"{name}.json").write_text('{"n": 1}', "utf-8")
    kept_paths = [cache / "gguf" / "x-v1" / "model.safetensors", cache / "datasets" / "jbb" / "rows.csv"]
    for path in kept_paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", "utf-8")
    contents = json.loads(run_cli("cache", "--json").out)
    assert contents["kept"] == {kind: {"count": 2, "bytes": 16} for kind in kinds}
    shown = run_cli("cache").out
    for kind in kinds:
        assert f"{kind}: 2 files, 16 bytes" in shown
    result = run_cli("cache", "--clear")
    assert result.code == 0 and all(kind in result.out for kind in kinds)
    assert not [path for kind in kinds for path in (cache / kind).glob("*")]
    assert all(path.is_file() for path in kept_paths)
    contents = json.loads(run_cli("cache", "--json").out)
    assert contents["kept"] == {kind: {"count": 0, "bytes": 0} for kind in kinds}

"""Lookup of defenses by name or file, and errors in names, settings and user-defined classes."""

import random
import re
from pathlib import Path

import pytest

from defenses.catalog import choose_defenses, get_defense, list_defense_names
from defenses.errors import UserError

OWN_DEFENSE = """
from dataclasses import dataclass
from defenses import Defense
from defenses.chats import prepend_system
from defenses.reminders import Policy

@dataclass(frozen=True)
class MyOwn(Defense):
    '''Says please.'''
    text: str = "Please."
    def rewrite(self, chat, rng):
        return prepend_system(chat, self.text)
"""


@pytest.mark.parametrize(
    ("name", "settings", "fragments"),
    [
        ("backdor", {}, ["unknown defense 'backdor'", "'backdoor'", ".py"]),
        ("backdoor", {"lenght": "9"}, ["unknown setting of 'backdoor' 'lenght'", "'length'"]),
        ("backdoor", {"secret": "x"}, ["unknown setting", "'secret'"]),
        ("backdoor", {"length": "many"}, ["--set length=many", "a whole number"]),
        ("backdoor", {"length": "0"}, ["length=0", "at least 1"]),
        ("in_context_refusal", {"shots": "4"}, ["shots=4", "1 to 3"]),
        ("tone_reminder", {"tone": "prase"}, ["'prase'", "'praise'", "warn"]),
        ("random_tokens", {"length": "-2"}, ["length=-2", "at least 1"]),
        ("nowhere.py", {}, ["no file 'nowhere.py'"]),
        ("smooth_llm", {"copies": "0"}, ["copies=0", "at least 1"]),
        ("smooth_llm", {"rate": "1.5"}, ["rate=1.5", "share"]),
        ("smooth_llm", {"noise": "swop"}, ["'swop'", "'swap'"]),
        ("character_swap", {"rate": "0"}, ["rate=0", "share"]),
        ("semantic_smoothing", {"copies": "9"}, ["copies=9", "1 to 7"]),
        ("erase_and_check", {"tokens": "0"}, ["tokens=0", "at least 1"]),
        ("paraphrase", {"tokens": "0"}, ["tokens=0", "at least 1"]),
        ("back_translation", {"draft": "0"}, ["draft=0", "at least 1"]),
        ("retokenization", {"rate": "2"}, ["rate=2", "share"]),
        ("refusal_steering", {"depth": "1"}, ["depth=1", "below 1"]),
        ("refusal_steering", {"layers": "two"}, ["'two'", "all, one"]),
        ("alpha_steer", {"null_share": "0"}, ["null_share=0", "above 0 and up to 1"]),
        ("alpha_steer", {"ridge": "0"}, ["ridge=0", "more than 0"]),
        ("policy+polcy", {}, ["unknown defense 'polcy'", "'policy'"]),
        ("policy+policy", {}, ["policy+policy: 'policy' can be applied only once"]),
        ("none+policy", {}, ["none+policy: 'none' changes nothing"]),
        ("backdoor+weights", {}, ["backdoor and weights each need weights of their own", "only one"]),
        (
            "safety_tuning+safe_decoding",
            {},
            ["safety_tuning and safe_decoding each need weights of their own"],
        ),
        ("policy+", {}, ["unknown defense ''"]),
        ("policy+smooth_llm", {"copies": "0"}, ["copies=0", "at least 1"]),
        ("smooth_llm+semantic_smoothing", {"copies": "2"}, ["several", "smooth_llm.copies or semantic"]),
    ],
)
def test_an_invalid_name_or_setting_is_one_line_with_the_alternatives(name, settings, fragments):
    with pytest.raises(UserError) as error:
        get_defense(name, settings)
    text = str(error.value)
    assert "\n" not in text and all(fragment in text for fragment in fragments), text


def test_a_users_file_is_a_defense_with_settings(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_DEFENSE, encoding="utf-8")
    defense = get_defense(str(path), {"text": "Thank you."})
    assert (defense.name, defense.family, defense.text) == ("my_own", "own", "Thank you.")
    chat = [{"role": "user", "content": "How do I bake bread?"}]
    assert defense.rewrite(chat, random.Random(0))[0] == {"role": "system", "content": "Thank you."}


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("x = 1\n", ["exactly one defense", "has none"]),
        (OWN_DEFENSE + OWN_DEFENSE.replace("MyOwn", "Other"), ["exactly one defense", "MyOwn, Other"]),
        (OWN_DEFENSE.replace("def rewrite(", "def rewrites("), ["MyOwn does not define rewrite, which"]),
        ("1 / 0\n", ["raised ZeroDivisionError while loading"]),
        ("import nothing_like_it\n", ["raised ModuleNotFoundError while loading"]),
        ("def broken(:\n", ["raised SyntaxError while loading"]),
        ("raise SystemExit(3)\n", ["raised SystemExit while loading"]),
        (OWN_DEFENSE.replace('text: str = "Please."', "text: str"), ["every field", "default", "text"]),
        (OWN_DEFENSE.replace("@dataclass(frozen=True)", ""), ["frozen dataclass", "MyOwn"]),
        (OWN_DEFENSE.replace("text: str", 'name = "a+b"\n    text: str'), ["'a+b' contains a +"]),
        (
            OWN_DEFENSE.replace("text: str", 'cost = "2 calls"\n    text: str'),
            ["cost = '2 calls'", "N calls"],
        ),
        (
            OWN_DEFENSE.replace("class MyOwn", "class Policy").replace(
                "from defenses.reminders import Policy", ""
            ),
            ["'policy' is taken"],
        ),
    ],
    ids=[
        *("none", "two", "no rewrite", "raises", "import", "syntax", "exit"),
        *("no default", "no dataclass", "plus", "cost", "taken"),
    ],
)
def test_an_invalid_file_is_answered_with_its_path_and_the_rule(tmp_path, content, fragments):
    path = tmp_path / "mine.py"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        get_defense(str(path))
    text = str(error.value)
    assert str(path) in text and all(fragment in text for fragment in fragments), text


def test_a_member_of_a_stack_takes_the_settings_of_the_defense_alone():
    defenses = choose_defenses(["policy", "word_drop + policy"], ["policy.text=Nothing is allowed."])
    assert [defense.name for defense in defenses] == ["none", "policy", "word_drop+policy"]
    assert defenses[1].text == defenses[2].members[1].text == "Nothing is allowed."


def test_the_same_stack_is_chosen_once_whatever_the_spacing():
    defenses = choose_defenses(["word_drop+policy", "word_drop + policy"], [])
    assert [defense.name for defense in defenses] == ["none", "word_drop+policy"]


def test_the_name_of_a_users_file_may_contain_a_plus(tmp_path):
    path = tmp_path / "a+b.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom defenses import Defense\n@dataclass(frozen=True)\n"
        "class Mine(Defense):\n    '''Nothing.'''\n    def rewrite(self, chat, rng):\n        return chat\n"
    )
    assert get_defense(str(path)).name == "mine"
    renamed = path.rename(tmp_path / "ab.py")
    assert [member.name for member in get_defense(f"{renamed}+policy").members] == ["mine", "policy"]


def test_all_leaves_out_what_takes_minutes_longer_unless_it_is_named():
    names = [defense.name for defense in choose_defenses(["all"], [])]
    assert set(list_defense_names()) - set(names) == {"grad_safe"}
    assert [defense.name for defense in choose_defenses(["all", "grad_safe"], [])] == [*names, "grad_safe"]


def test_the_table_of_other_toolkits_names_defenses_that_exist() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "defenses.md").read_text("utf-8")
    rows = re.findall(
        r"^\|[^|\n]*\|[^|\n]*\|([^|\n]*)\|$", text.partition("## Defenses of other toolkits")[2], re.M
    )
    assert len(rows) > 30
    for cell in rows[2:]:
        names = re.findall(r"`(\w+)`", cell)
        assert set(names) <= set(list_defense_names()), cell
        assert bool(names) or cell.strip().startswith("no")

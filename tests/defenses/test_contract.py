"""The contract: whatever lies in the folder keeps it, controls and parts included."""

import copy
import dataclasses
import inspect
import random
import re
import typing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import held, made_adapter, tiny_model, toy_tokenizer

from defenses.catalog import find_defense_classes, get_defense, list_defense_names
from defenses.chats import get_last_user_text, prefill_response, split_prefill
from defenses.contract import Defense, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import get_settings
from defenses.stack import list_members

NAMES = list(find_defense_classes())
REQUEST = "How do I bake a loaf of bread for my neighbor?"
CHATS = {
    "user": [{"role": "user", "content": REQUEST}],
    "system": [{"role": "system", "content": "You are a baker."}, {"role": "user", "content": REQUEST}],
    "turns": [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello, what can I do?"},
        {"role": "user", "content": REQUEST},
    ],
}


# Those whose setting names weights of the user's own, without which they are left out.
BARE = ["adapter", "weights"]
PARTS = [f"backdoor/{part}" for part in ("no_secret", "no_weights", "neither")]
STACKS = [
    "keyword_only+self_reminder",
    "paraphrase+smooth_llm+backdoor",
    "retokenization+in_context_refusal+conditional_steering",
    "two_pass_intention+safety_prefix",
    "policy+safe_decoding+refusal_steering",
]


@cache
def shelf():
    """Return a folder with the tuned weights of every state, made once."""
    place = TemporaryDirectory()
    for number, name in enumerate(("aligned", "preference", "baseline", "backdoor")):
        made_adapter(Path(place.name) / name, seed=number)
    return place


def host(folder, seed=0):
    """Return a host with a byte-level toy tokenizer, a folder of its own for secrets, and tuned weights."""
    folders = (folder / "secrets", folder / "shipped"), (Path(shelf().name),)
    return ModelInfo("toy", toy_tokenizer(), *folders, "toy", seed, compute_mean_activations=held)


def readings(defense, chat, seed=0, said="What is bread?"):
    """Return what a defense has read of a chat, where the model answers the same whatever it is asked."""
    talk, answers = defense.consult_model(chat, random.Random(seed)), None
    while True:
        try:
            asked = talk.send(answers)
        except StopIteration as over:
            return over.value
        answers = [said] * len(asked)


def prepared(folder, names=tuple(NAMES)):
    """Return defenses and their parts, made ready, by the names they have in the tables."""
    found = {}
    for name in names:
        backdoor = name.endswith("backdoor") or name in ("neutral_prompt", "random_tokens")
        defense = get_defense(name, {"length": "20"} if backdoor else {}).prepare(host(folder))
        found |= {name: defense} | {f"{name}/{part}": one for part, one in defense.build_ablations().items()}
    return found


@pytest.fixture(params=[*NAMES, *PARTS, *STACKS])
def defense(request, tmp_path):
    """Each defense and part, and some stacks, prepared."""
    return prepared(tmp_path, [request.param.partition("/")[0]])[request.param]


def test_the_fixture_above_forgets_no_part(tmp_path):
    assert set(prepared(tmp_path)) == {*NAMES, *PARTS}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_a_final_frozen_dataclass_with_a_default_for_every_field(name):
    cls = find_defense_classes()[name]
    assert getattr(cls, "__final__", False)
    assert cls.__dataclass_params__.frozen
    assert all(
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        for f in dataclasses.fields(cls)
    )
    assert name == cls.name
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert Defense in cls.__mro__


def test_whatever_a_concrete_class_builds_on_is_abstract():
    for cls in find_defense_classes().values():
        for parent in cls.__mro__[1:]:
            if issubclass(parent, Defense):
                assert inspect.isabstract(parent), parent


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_it_changes_and_where_it_comes_from(name):
    cls = find_defense_classes()[name]
    first = inspect.getdoc(cls).splitlines()[0]
    assert re.fullmatch(r"[A-Z][^\n]{15,}\.", first), first
    assert isinstance(cls.source, Source) and cls.source.title and cls.source.wording
    assert cls.family and cls.family != "own"
    if cls.family not in ("none", "control"):
        assert cls.source.url.startswith("https://")
        assert "ours" in cls.source.wording or "no words of its own" in cls.source.wording


def test_names_are_unique_and_begin_with_the_undefended_model():
    assert list_defense_names() == NAMES and NAMES[0] == "none"
    every = [
        cls.name
        for cls in _below(Defense)
        if not inspect.isabstract(cls) and cls.__module__.startswith("defenses.")
    ]
    assert sorted(every) == sorted([*NAMES, "stack"])


def _below(cls):
    return [one for child in cls.__subclasses__() for one in (child, *_below(child))]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_rewrite_returns_a_new_chat_and_leaves_the_given_one_untouched(defense, chat):
    given = copy.deepcopy(chat)
    for new in [defense.rewrite(given, random.Random(0)), *readings(defense, given)]:
        assert given == chat
        assert new is not given
        assert not {id(message) for message in new} & {id(message) for message in given}
        assert all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in new)
        asked, begun = split_prefill(new)
        assert asked[-1]["role"] == "user" and bool(begun) == ("safety_prefix" in defense.name)
        assert "system" not in [m["role"] for m in new[1:]]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_the_users_words_survive_unless_the_family_may_change_them(defense, chat):
    if defense.edits_user_text:
        pytest.skip("this family rewords")
    for reading in readings(defense, copy.deepcopy(chat)):
        kept = "\n".join(message["content"] for message in reading)
        assert all(message["content"] in kept for message in chat)
        assert REQUEST in get_last_user_text(reading)


@pytest.mark.parametrize("begun", [False, True])
def test_only_what_changes_the_model_or_the_tokens_reads_the_chat_as_it_is(tmp_path, begun):
    chat = prefill_response(CHATS["user"], "Sure.") if begun else CHATS["user"]
    every = prepared(tmp_path)
    same = {name for name, one in every.items() if readings(one, chat) == [chat]}
    changing = {name for name, one in every.items() if one.weights_fingerprint() != "" or one.logit_blend() or one.retokenizes}
    # Plain words have no disguise to undo.
    assert same == {"none", "clean_up", *BARE, *changing - {"backdoor", "backdoor/no_secret"}}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_what_an_attacker_begins_an_answer_with_stays_its_end(defense, chat):
    for reading in readings(defense, prefill_response(chat, "Sure, gladly.")):
        assert split_prefill(reading)[1].endswith("Sure, gladly.")


def test_where_the_model_says_nothing_the_users_words_stay(defense):
    for reading in readings(defense, CHATS["system"], said=""):
        noisy = any(one.family == "noise" or one.name == "keyword_only" for one in list_members(defense))
        assert noisy or REQUEST in get_last_user_text(reading)


def test_rewriting_is_a_function_of_chat_and_generator_and_uses_no_other_randomness(defense):
    random.seed(1)
    first = readings(defense, CHATS["user"], 7)
    random.seed(2)
    assert readings(defense, CHATS["user"], 7) == first
    assert defense.retokenize([5, 60, 70], random.Random(7)) == defense.retokenize(
        [5, 60, 70], random.Random(7)
    )


def test_preparing_twice_is_preparing_once(defense, tmp_path):
    again = defense.prepare(host(tmp_path))
    assert again == defense and again.secret_texts() == defense.secret_texts() and again.weights_fingerprint() == defense.weights_fingerprint()
    assert readings(defense, CHATS["user"]) == readings(again, CHATS["user"])


@pytest.mark.parametrize("stumble", [False, True])
def test_an_armed_model_is_bit_for_bit_what_it_was_afterwards(defense, stumble):
    model = tiny_model()
    if defense.missing_requirements():
        pytest.skip("names no weights")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    try:
        with defense.apply_to(model):
            if stumble:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert stumble
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_parts_are_defenses_and_have_no_parts_of_a_name_with_a_slash(defense):
    for name, part in defense.build_ablations().items():
        assert isinstance(part, Defense)
        assert re.fullmatch(r"[a-z_]+", name)


def test_secrets_show_nowhere(defense):
    shown = f"{defense!r} {defense} {get_settings(defense)} {defense.build_ablations()!r} {[defense]}"
    for secret in defense.secret_texts():
        # A toy vocabulary may repeat a word of the system prompt by chance, but not sixteen characters.
        for start in range(max(1, len(secret) - 15)):
            assert secret[start : start + 16] not in shown
        assert secret in str(defense.rewrite(CHATS["user"], random.Random(0)))


TEXT = {int: lambda v: str(v + 1), float: lambda v: str(v + 0.25), str: lambda v: f"{v} And more."}


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_the_way_through_the_command_line(name):
    cls = find_defense_classes()[name]
    hints = typing.get_type_hints(cls)
    for key, value in get_settings(cls).items():
        kind = hints[key]
        if typing.get_origin(kind) is typing.Literal:
            text = next(one for one in typing.get_args(kind) if one != value)
        elif kind in TEXT:
            text = TEXT[kind](value)
        else:
            text = "some/file.txt"
        made = get_defense(name, {key: text})
        assert str(get_settings(made)[key]) == text
        assert get_settings(made) | {key: value} == get_settings(cls)
        assert type(get_settings(made)[key]) is type(value) or value is None


def test_a_setting_may_come_from_a_file(tmp_path):
    file = tmp_path / "policy.txt"
    file.write_text("Nothing is allowed.\n", encoding="utf-8")
    assert get_defense("policy", {"text": f"@{file}"}).text == "Nothing is allowed."
    assert get_defense("backdoor", {"trigger": f"@{file}"}).trigger == Path(file)
    with pytest.raises(UserError, match=r"--set text=@.*nowhere.txt: cannot read"):
        get_defense("policy", {"text": f"@{tmp_path}/nowhere.txt"})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
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
        ("policy+polcy", {}, ["unknown defense 'polcy'", "'policy'"]),
        ("policy+policy", {}, ["policy+policy: 'policy' can be worn once"]),
        ("none+policy", {}, ["none+policy: 'none' changes nothing"]),
        ("backdoor+weights", {}, ["backdoor and weights each bring weights", "one set"]),
        ("safety_tuning+safe_decoding", {}, ["safety_tuning and safe_decoding each bring weights"]),
        ("policy+", {}, ["unknown defense ''"]),
        ("policy+smooth_llm", {"copies": "0"}, ["copies=0", "at least 1"]),
        ("smooth_llm+semantic_smoothing", {"copies": "2"}, ["several", "smooth_llm.copies or semantic"]),
    ],
)
def test_a_wrong_name_or_setting_is_answered_in_one_line_with_what_there_is(name, settings, words):
    with pytest.raises(UserError) as caught:
        get_defense(name, settings)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


OWN = """
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


def test_a_file_of_the_users_own_is_a_defense_with_settings(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN, encoding="utf-8")
    mine = get_defense(str(file), {"text": "Thank you."})
    assert (mine.name, mine.family, mine.text) == ("my_own", "own", "Thank you.")
    assert mine.rewrite(CHATS["user"], random.Random(0))[0] == {"role": "system", "content": "Thank you."}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1\n", ["exactly one defense", "has none"]),
        (OWN + OWN.replace("MyOwn", "Other"), ["exactly one defense", "MyOwn, Other"]),
        ("1 / 0\n", ["raised ZeroDivisionError while loading"]),
        ("import nothing_like_it\n", ["raised ModuleNotFoundError while loading"]),
        ("def broken(:\n", ["raised SyntaxError while loading"]),
        ("raise SystemExit(3)\n", ["raised SystemExit while loading"]),
        (OWN.replace('text: str = "Please."', "text: str"), ["every field", "default", "text"]),
        (OWN.replace("@dataclass(frozen=True)", ""), ["frozen dataclass", "MyOwn"]),
        (OWN.replace("text: str", 'name = "a+b"\n    text: str'), ["'a+b' has a +"]),
        (OWN.replace("text: str", 'cost = "2 calls"\n    text: str'), ["cost = '2 calls'", "N calls"]),
    ],
    ids=["none", "two", "raises", "import", "syntax", "exit", "no default", "no dataclass", "plus", "cost"],
)
def test_a_file_that_is_no_defense_is_answered_in_one_line(tmp_path, content, words):
    file = tmp_path / "mine.py"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        get_defense(str(file))
    text = str(caught.value)
    assert str(file) in text and all(word in text for word in words), text


def test_a_users_defense_with_a_name_that_is_taken_or_no_name_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        OWN.replace("class MyOwn", "class Policy").replace("from defenses.reminders import Policy", "")
    )
    with pytest.raises(UserError, match=r"'policy' is taken"):
        get_defense(str(file))

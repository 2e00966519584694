"""Every shipped defense, control and ablation, and some stacks, implement the contract of `Defense`."""

import copy
import dataclasses
import importlib
import inspect
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import (
    make_adapter,
    make_mean_activations,
    make_soft_prompt,
    make_toy_session,
    make_training_requests,
    render_query,
    tiny_model,
    toy_tokenizer,
)

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.queries import Query
from analysis.studies.preflight import make_failed_check
from defenses.catalog import find_defense_classes, get_defense, list_defense_names
from defenses.chats import copy_chat, get_last_user_text, prefill_response, prepend_system, split_prefill
from defenses.contract import Defense, ModelCall, ModelInfo, Source
from defenses.errors import UserError
from defenses.settings import get_settings
from defenses.stack import Stack, list_members

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
NEED_WEIGHTS = ["adapter", "guard_model", "weights"]  # skipped without a setting that names their weights
ABLATIONS = [f"backdoor/{name}" for name in ("no_secret", "no_weights", "neither", "baseline")]
STACKS = [
    "keyword_only+self_reminder",
    "paraphrase+smooth_llm+backdoor",
    "retokenization+in_context_refusal+conditional_steering",
    "two_pass_intention+safety_prefix",
    "policy+safe_decoding+refusal_steering",
    "image_mask+caption_beside+self_reminder",
    "coca+paraphrase",
    "self_reminder+harm_probe",
    "policy+safe_switch+alpha_steer",
    "soft_prompt+policy+refusal_steering",
]


@cache
def make_shared_files():
    """Return a folder with an adapter of every state, and a tokenizer."""
    folder = TemporaryDirectory()
    for seed, state in enumerate(
        ("aligned", "preference", "baseline", "backdoor", "rerouting", "adversarial")
    ):
        make_adapter(Path(folder.name) / state, seed=seed)
    for seed, name in enumerate(("soft_prompt", "dro")):
        make_soft_prompt(Path(folder.name) / name, seed=seed)
    return folder, toy_tokenizer()


def host(folder, seed=0):
    """Return the properties of a toy model, with a separate folder of secrets."""
    adapters, tokenizer = make_shared_files()
    folders = (folder / "secrets", folder / "shipped"), (Path(adapters.name),)
    learned = {
        "compute_mean_activations": make_mean_activations,
        "load_training_requests": make_training_requests,
    }
    return ModelInfo("toy", tokenizer, *folders, "toy", seed, **learned)


def rewrite_copies(defense, chat, seed=0, response="What is bread?"):
    """Return the chats that a defense makes of one chat if the model always gives the same response."""
    consultation, responses = defense.consult_model(chat, random.Random(seed)), None
    while True:
        try:
            calls = consultation.send(responses)
        except StopIteration as stop:
            return stop.value
        responses = [response] * len(calls)


def prepare_defenses(folder, names):
    """Return prepared defenses and their ablations by name."""
    prepared = {}
    for name in names:
        has_length = name.endswith("backdoor") or name in ("neutral_prompt", "random_tokens")
        defense = get_defense(name, {"length": "20"} if has_length else {}).prepare(host(folder))
        ablations = defense.build_ablations()
        prepared |= {name: defense} | {f"{name}/{key}": ablation for key, ablation in ablations.items()}
    return prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All defenses, ablations and some stacks, prepared once."""
    return prepare_defenses(tmp_path_factory.mktemp("model"), [*NAMES, *STACKS])


@pytest.fixture(scope="module", params=[*NAMES, *ABLATIONS, *STACKS])
def defense(request, prepared):
    """Each of them."""
    return prepared[request.param]


# --- classes ----------------------------------------------------------------------------------------------


def test_the_fixture_includes_every_ablation(prepared):
    stack_ablations = {name for name in prepared if "+" in name and "/" in name}
    assert set(prepared) - stack_ablations == {*NAMES, *ABLATIONS, *STACKS}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_a_final_frozen_dataclass_with_a_default_for_every_field(name):
    cls = find_defense_classes()[name]
    assert getattr(cls, "__final__", False)
    assert cls.__dataclass_params__.frozen
    assert all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(cls)
    )
    assert name == cls.name
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert Defense in cls.__mro__


def test_the_base_classes_of_a_concrete_class_are_abstract():
    for cls in find_defense_classes().values():
        for parent in cls.__mro__[1:]:
            if issubclass(parent, Defense):
                assert inspect.isabstract(parent), parent


@pytest.mark.parametrize("name", NAMES)
def test_a_class_describes_its_change_and_its_source(name):
    cls = find_defense_classes()[name]
    summary = inspect.getdoc(cls).splitlines()[0]
    assert re.fullmatch(r"[A-Z][^\n]{15,}\.", summary), summary
    assert isinstance(cls.source, Source) and cls.source.title and cls.source.wording
    assert cls.family and cls.family != "own"
    if cls.family not in ("none", "control"):
        assert cls.source.url.startswith("https://")
        assert "ours" in cls.source.wording or "no text of its own" in cls.source.wording


def test_names_are_unique_and_start_with_the_undefended_model():
    importlib.import_module("defenses.matched_controls")
    assert list_defense_names() == NAMES and NAMES[0] == "none"
    names = [
        cls.name
        for cls in find_subclasses(Defense)
        if not inspect.isabstract(cls) and cls.__module__.startswith("defenses.")
    ]
    assert sorted(names) == sorted([*NAMES, "neutral_text", "stack"])


def find_subclasses(cls):
    """Return all direct and indirect subclasses."""
    return [subclass for child in cls.__subclasses__() for subclass in (child, *find_subclasses(child))]


# --- prompts ----------------------------------------------------------------------------------------------


def test_rewriting_returns_a_new_chat_and_leaves_the_given_chat_unchanged(defense):
    for chat in CHATS.values():
        given = copy.deepcopy(chat)
        for new_chat in [defense.rewrite(given, random.Random(0)), *rewrite_copies(defense, given)]:
            assert given == chat
            assert new_chat is not given
            assert not {id(message) for message in new_chat} & {id(message) for message in given}
            for message in new_chat:
                assert set(message) == {"role", "content"} and isinstance(message["content"], str)
            prompt, prefill = split_prefill(new_chat)
            assert prompt[-1]["role"] == "user" and bool(prefill) == ("safety_prefix" in defense.name)
            assert "system" not in [message["role"] for message in new_chat[1:]]


def test_the_users_text_survives_unless_the_family_may_change_it(defense):
    if defense.edits_user_text:
        pytest.skip("this family changes the user's text")
    for chat in CHATS.values():
        for new_chat in rewrite_copies(defense, copy.deepcopy(chat)):
            new_text = "\n".join(message["content"] for message in new_chat)
            assert all(message["content"] in new_text for message in chat)
            assert REQUEST in get_last_user_text(new_chat)


@pytest.mark.parametrize("has_prefill", [False, True])
def test_only_a_defense_that_changes_the_model_or_the_tokens_leaves_the_chat_unchanged(prepared, has_prefill):
    chat = prefill_response(CHATS["user"], "Sure.") if has_prefill else CHATS["user"]
    defenses = {name: defense for name, defense in prepared.items() if "+" not in name}
    unchanged = {name for name, defense in defenses.items() if rewrite_copies(defense, chat) == [chat]}
    changes_model = {
        name
        for name, defense in defenses.items()
        if defense.weights_fingerprint() != ""
        or (defense.logit_blend() and not defense.blends_prompts)
        or defense.retokenizes
    }
    # Plain text has no obfuscation for clean_up to reverse, and no image.
    assert unchanged == {
        *("none", "clean_up", *NEED_WEIGHTS),
        *(name for name, defense in defenses.items() if defense.needs_images or defense.detects),
        *changes_model - {"backdoor", *ABLATIONS, "soft_prompt", "dro"},
    }


def test_an_attackers_prefill_stays_the_end_of_the_prefill(defense):
    for chat in CHATS.values():
        for new_chat in rewrite_copies(defense, prefill_response(chat, "Sure, gladly.")):
            assert split_prefill(new_chat)[1].endswith("Sure, gladly.")


def test_the_users_text_is_kept_if_the_model_generates_nothing(defense):
    edits_without_model = any(
        member.family == "noise" or member.name == "keyword_only" for member in list_members(defense)
    )
    for new_chat in rewrite_copies(defense, CHATS["system"], response=""):
        assert edits_without_model or REQUEST in get_last_user_text(new_chat)


def test_rewriting_depends_only_on_the_chat_and_the_generator(defense):
    random.seed(1)
    first = rewrite_copies(defense, CHATS["user"], 7)
    random.seed(2)
    assert rewrite_copies(defense, CHATS["user"], 7) == first
    tokens = [5, 60, 70]
    assert defense.retokenize(tokens, random.Random(7)) == defense.retokenize(tokens, random.Random(7))


def test_preparing_twice_equals_preparing_once(defense, tmp_path):
    again = defense.prepare(host(tmp_path))
    assert again == defense and again.secret_texts() == defense.secret_texts()
    assert again.weights_fingerprint() == defense.weights_fingerprint()
    assert rewrite_copies(defense, CHATS["user"]) == rewrite_copies(again, CHATS["user"])


# --- models -----------------------------------------------------------------------------------------------


def test_a_model_is_restored_bit_for_bit_also_after_an_error(defense):
    model = tiny_model()
    if defense.missing_requirements():
        pytest.skip("needs a setting that names its weights")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hook_counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for error in (None, RuntimeError("inside the context")):
        try:
            with defense.apply_to(model):
                if error is not None:
                    raise error
        except RuntimeError as raised:
            assert raised is error
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hook_counts
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, logits)


def test_ablations_are_defenses_with_plain_names(defense):
    for name, ablation in defense.build_ablations().items():
        assert isinstance(ablation, Defense)
        assert re.fullmatch(r"[a-z_]+", name)


# --- secrets ----------------------------------------------------------------------------------------------


def test_secrets_appear_only_in_the_prompt(defense):
    shown = f"{defense!r} {defense} {get_settings(defense)} {defense.build_ablations()!r} {[defense]}"
    for secret in defense.secret_texts():
        # A toy vocabulary may repeat a word of the system prompt by chance, but not sixteen characters.
        for start in range(max(1, len(secret) - 15)):
            assert secret[start : start + 16] not in shown
        assert secret in str(defense.rewrite(CHATS["user"], random.Random(0)))


@dataclass(frozen=True)
class Leaking(Defense):
    """Has a secret that an error message repeats."""

    def rewrite(self, chat, rng):
        return prepend_system(chat, "tulip seven")

    def secret_texts(self):
        return ("tulip seven",)


def test_an_error_shows_no_secret():
    error = ValueError("cannot use tulip seven here")
    check = make_failed_check(DIRECT_ATTACK, "leaking", Leaking(), error)
    assert "tulip" not in check.observed and "⟨secret⟩" in check.observed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield ModelCall(chat)", "must yield lists of"),
        ("yield []; return []", "'odd'.* for query 'q'"),
        ("return [chat]", "consult_model must yield"),
        ("yield []; return chat", "'odd' returned {'role'.*for a chat; a chat is a list of messages"),
    ],
)
def test_a_consultation_that_breaks_the_contract_is_reported(body, message):
    names = {"ModelCall": ModelCall, "Defense": Defense, "copy_chat": copy_chat}
    head = "class Odd(Defense):\n  def rewrite(self, chat, rng): return copy_chat(chat)\n"
    exec(f"{head}  def consult_model(self, chat, rng):\n    {body}\n", names)
    with pytest.raises(UserError, match=message):
        render_query(make_toy_session(), names["Odd"](), Query("q", REQUEST, False))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "rewrite(self, chat, rng): pass",
            "'odd' returned None for a chat: is a `return` missing in its `rewr",
        ),
        ("rewrite(self, chat, rng): return 'Hi'", "'odd' returned 'Hi' for a chat; a chat is a list"),
        ("rewrite(self, chat, rng): return [{'role': 'user', 'content': None}]", "a content that are texts"),
        ("rewrite(self, chat, rng): return []", r"'odd' returned \[\] for a chat"),
        (
            "rewrite(self, chat, rng): return [{'role': 'user', 'content': '\\ud83d'}]",
            r"a chat that 'odd' returned holds '\\ud83d', half of a character",
        ),
        ("rewrite_copies(self, chat, rng): pass", "'odd' returned None where a list of chats is expected"),
        ("retokenize(self, ids, rng): pass", "'odd' returned None from `retokenize`"),
    ],
)
def test_a_method_that_returns_something_else_is_named_alone_and_in_a_stack(method, message):
    names = {"Defense": Defense, "copy_chat": copy_chat}
    default = "  def rewrite(self, chat, rng): return copy_chat(chat)\n"
    exec(f"class Odd(Defense):\n{default}  def {method}\n", names)
    defenses = [names["Odd"]()]
    if "retokenize" not in method:
        defenses.append(Stack((names["Odd"](), get_defense("policy"))))
    for defense in defenses:
        with pytest.raises(UserError, match=message):
            render_query(make_toy_session(), defense, Query("q", REQUEST, False))

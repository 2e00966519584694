"""Guard models: how they are asked and what they answer, compared with plain transformers on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model, tiny_model, toy_tokenizer

from analysis.judges.guard_models import ChatGuard, ClassifierGuard, find_unsafe_labels, open_guard
from defenses.chats import prefill_response
from defenses.contract import Chat, GuardOptions, Message
from defenses.errors import UserError

TURNS: Chat = [
    Message(role="user", content="Hello."),
    Message(role="assistant", content="Hello, what can I do?"),
    Message(role="user", content="How do I bake bread?"),
]
# What a guard must not see: a system turn, and the beginning of a response.
CHAT = prefill_response([Message(role="system", content="Obey."), *TURNS], "Sure")
_CONVERSATION = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
# Templates in the manner of the families; what they write for TURNS, and what follows until the verdict.
TEMPLATES = {
    "llama_guard": (
        "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n"
        + _CONVERSATION
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}",
        "\n\n",
    ),
    "granite_guardian": (
        "{{ 'Risk: ' + guardian_config['risk_name'] + '\\n' }}" + _CONVERSATION + "<|assistant|>",
        "",
    ),
    "granite_guardian_3_3": (
        "{# <score> #}{{ guardian_config['criteria_id'] }}{{ '!' if not think }}" + _CONVERSATION,
        "<score>",
    ),
    "qwen3_guard": (
        "Safety: Safe, Unsafe or Controversial?\n" + _CONVERSATION + "<|im_start|>assistant\n",
        "Safety:",
    ),
}
WORDS = {
    "llama_guard": (["unsafe"], ["safe"]),
    "granite_guardian": (["Yes"], ["No"]),
    "granite_guardian_3_3": (["yes"], ["no"]),
    "qwen3_guard": (["Unsafe"], ["Safe", "Controversial"]),
}
VALUES: dict[str, dict[str, Any]] = {
    "granite_guardian": {"guardian_config": {"risk_name": "harm"}},
    "granite_guardian_3_3": {"guardian_config": {"criteria_id": "harm"}, "think": False},
}


def open_model(folder: Path, notices: list[str] | None = None, **options: Any) -> Any:
    notify = (notices if notices is not None else []).append
    return open_guard("cpu", "auto", True, notify, GuardOptions(str(folder), **options))


def find_label_ids(tokenizer: Any, opening: str, words: list[str]) -> list[int]:
    """Return the tokens that follow the opening of a verdict where it goes on with each word."""
    start = tokenizer.encode(opening, add_special_tokens=False)
    found = [
        tokenizer.encode(opening + space + word, add_special_tokens=False)
        for word in words
        for space in ("", " ")
    ]
    tokens = dict.fromkeys(ids[len(start)] for ids in found if ids[: len(start)] == start)
    return [token for token in tokens if tokenizer.convert_ids_to_tokens(token) != "Ġ"]


def score_plainly(ids: list[int], unsafe: list[int], safe: list[int]) -> float:
    with torch.inference_mode():
        logits = tiny_model()(torch.tensor([ids])).logits[0, -1].float()
    return float(logits[unsafe].exp().sum().log() - logits[safe].exp().sum().log())


@pytest.mark.parametrize("kind", list(TEMPLATES))
@pytest.mark.parametrize("is_named", [True, False])
def test_a_guard_is_asked_by_its_own_template_and_scored_by_the_words_of_its_verdict(
    tmp_path: Path, kind: str, is_named: bool
) -> None:
    template, opening = TEMPLATES[kind]
    save_model(tmp_path, template=template)
    guard = open_model(tmp_path, **({"kind": kind} if is_named else {}))
    assert isinstance(guard, ChatGuard)
    tokenizer = toy_tokenizer(template)
    prompt = tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=True, return_dict=False, **VALUES.get(kind, {})
    )
    prompt += tokenizer.encode(opening, add_special_tokens=False)
    (chat_template,) = guard.chat_templates
    assert list(chat_template.render_prompt(TURNS).ids) == prompt
    unsafe, safe = (find_label_ids(tokenizer, opening, words) for words in WORDS[kind])
    assert unsafe and safe and list(map(sorted, guard.label_ids)) == [sorted(unsafe), sorted(safe)]
    other: Chat = [Message(role="user", content="Sing to me!")]
    scores = guard.score_chats([CHAT, other])
    assert float(scores[0]) == pytest.approx(score_plainly(prompt, unsafe, safe), abs=1e-4)
    alone = float(guard.score_chats([other])[0])
    assert scores[0] != scores[1] and alone == pytest.approx(float(scores[1]), abs=1e-4)


def test_a_verdict_behind_inst_begins_with_a_space_as_in_llama_2(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}[INST] <BEGIN UNSAFE CONTENT CATEGORIES>\n{{ messages[-1].content }} [/INST]"
        "{# <|end_header_id|> #}"
    )
    folder = save_model(tmp_path, template=template, kind="metaspace")
    guard = open_model(folder, unsafe=("Sorry",), safe=("Sure",))
    (chat_template,) = guard.chat_templates
    assert chat_template.render_prompt(TURNS).text.endswith("How do I bake bread? [/INST]")
    tokenizer = toy_tokenizer(template, "metaspace")
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in guard.label_ids]
    assert tokens == [["Sorry", "▁Sorry"], ["Sure", "▁Sure"]]


def test_shield_gemma_is_asked_about_every_policy_and_the_largest_log_odds_count(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}You are a policy expert.\n<start_of_turn>{{ messages[-1].content }}<end_of_turn>\n"
        "{{ guideline }}\nYes or No?"
    )
    guard = open_model(save_model(tmp_path, template=template))
    prompts = [chat_template.render_prompt(TURNS) for chat_template in guard.chat_templates]
    policies = [prompt.text.split("<end_of_turn>\n")[1] for prompt in prompts]
    assert [policy.split('"')[1] for policy in policies] == [
        *("No Dangerous Content", "No Harassment", "No Hate Speech", "No Sexually Explicit Information")
    ]
    unsafe, safe = (find_label_ids(toy_tokenizer(None), "?", [word]) for word in ("Yes", "No"))
    expected = [score_plainly(list(prompt.ids), unsafe, safe) for prompt in prompts]
    assert float(guard.score_chats([CHAT])[0]) == pytest.approx(max(expected), abs=1e-4)
    assert min(expected) < max(expected) - 1e-3


def test_wild_guard_needs_no_template_of_its_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "WildGuard-7B", template=None)
    guard = open_model(folder)
    (chat_template,) = guard.chat_templates
    text = chat_template.render_prompt(TURNS).text
    assert text.startswith("<s><|user|>\n[INST] ")
    ending = (
        "Human user:\nHow do I bake bread?\n\nAI assistant:\n\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n"
    )
    assert text.endswith(f"{ending}Harmful request:")
    (tmp_path / "mine.jinja").write_text("Q: {{ messages[-1].content + ' ' }}", "utf-8")
    guard = open_model(folder, kind="wild_guard", template=str(tmp_path / "mine.jinja"))
    text = guard.chat_templates[0].render_prompt(TURNS).text
    assert text == "Q: How do I bake bread? Harmful request:"


def test_any_chat_model_is_a_guard_by_its_words(tmp_path: Path) -> None:
    guard = open_model(save_model(tmp_path), unsafe=("Sorry",), safe=("Sure", "Certainly"))
    tokenizer = toy_tokenizer()
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    labels = [find_label_ids(tokenizer, "\n", words) for words in (["Sorry"], ["Sure", "Certainly"])]
    assert float(guard.score_chats([CHAT])[0]) == pytest.approx(score_plainly(prompt, *labels), abs=1e-4)


def test_a_guard_whose_verdicts_begin_with_other_words_is_noted_once(tmp_path: Path) -> None:
    notices: list[str] = []
    guard = open_model(save_model(tmp_path), notices, unsafe=("Sorry",), safe=("Sure",))
    for _ in range(2):
        guard.score_chats([CHAT])
    (notice,) = notices
    assert "Sorry, Sure hold only" in notice and "guard_model.kind" in notice


def test_the_identity_of_a_guard_depends_on_weights_tokenizer_and_words(tmp_path: Path) -> None:
    words = {"unsafe": ("Sorry",), "safe": ("Sure",)}
    identity = open_model(save_model(tmp_path / "a"), **words).identity
    assert open_model(tmp_path / "a", **words).identity == identity
    json.dumps(identity)  # for run.json
    assert open_model(tmp_path / "a", unsafe=("Sorry",), safe=("Here",)).identity != identity
    other = open_model(save_model(tmp_path / "b", family="qwen2"), **words).identity
    assert other["sha256"] != identity["sha256"]
    (tmp_path / "a" / "tokenizer_config.json").write_text(
        (tmp_path / "a" / "tokenizer_config.json").read_text("utf-8") + "\n", "utf-8"
    )
    assert open_model(tmp_path / "a", **words).identity["files_sha256"] != identity["files_sha256"]


@pytest.mark.parametrize(
    ("template", "options", "rule"),
    [
        ("chatml", {}, "it is not known how this guard is asked: set guard_model.kind=llama_guard|"),
        ("chatml", {"unsafe": ("Yes",)}, "it is not known how this guard is asked"),
        (
            None,
            {"unsafe": ("Yes",), "safe": ("No",)},
            "has no chat template.*guard_model.template=FILE.jinja",
        ),
        (None, {"kind": "llama_guard"}, "has no chat template.*guard_model.template=FILE.jinja"),
        ("chatml", {"unsafe": ("Yes",), "safe": ("Yes", "No")}, "Yes and Yes, No begin with the same token"),
        ("chatml", {"kind": "classifier"}, "is no text classifier"),
        ("chatml", {"template": "no.jinja"}, "guard_model.template=no.jinja: cannot be read"),
    ],
)
def test_a_guard_that_cannot_be_asked_is_one_line_with_the_next_step(
    tmp_path: Path, template: str | None, options: dict[str, Any], rule: str
) -> None:
    save_model(tmp_path / "toy", template=template)
    with pytest.raises(UserError, match=rule) as error:
        open_model(tmp_path / "toy", **options)
    assert "\n" not in str(error.value)


def test_weights_that_are_pickled_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor in the local cache"):
        open_model(Path("nobody/no-guard"))
    folder = save_model(tmp_path / "toy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        open_model(folder, unsafe=("Yes",), safe=("No",))
    folder = save_classifier(tmp_path / "classifier", {0: "safe", 1: "unsafe"})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        open_model(folder)


# --- classifiers ------------------------------------------------------------------------------------------


def save_classifier(folder: Path, labels: dict[int, str], problem: str | None = None) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=960,
        id2label=labels,
        pad_token_id=3,
        initializer_range=1.0,
        max_position_embeddings=34,
        problem_type=problem,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    toy_tokenizer(None).save_pretrained(folder)
    return folder


def read_plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return torch.as_tensor(model(torch.tensor([ids])).logits[0])


def test_the_score_of_a_classifier_is_the_log_odds_of_its_labels_for_harm(tmp_path: Path) -> None:
    notices: list[str] = []
    folder = save_classifier(tmp_path, {0: "BENIGN", 1: "INJECTION", 2: "JAILBREAK"})
    guard = open_model(folder, notices)
    assert isinstance(guard, ClassifierGuard)
    assert "INJECTION or JAILBREAK count as harmful" in notices[0]
    other: Chat = [Message(role="user", content="Sing!")]
    ids = [toy_tokenizer(None).encode(text) for text in ("How do I bake bread?", "Sing!")]
    probabilities = [read_plain_logits(folder, row).softmax(0) for row in ids]
    expected = [float((row[1] + row[2]).logit()) for row in probabilities]
    assert guard.score_chats([CHAT, other]).tolist() == pytest.approx(expected, abs=1e-4)
    chosen = open_model(folder, unsafe=("JAILBREAK",)).score_chats([CHAT])
    assert float(chosen[0]) == pytest.approx(float(probabilities[0][2].logit()), abs=1e-4)


def test_a_long_text_is_classified_in_windows_of_which_the_largest_counts(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, {0: "0", 1: "1"})
    text = "Tell me how to write a message to an old friend. " * 6
    ids = toy_tokenizer(None).encode(text)
    windows = [ids[start : start + 32] for start in range(0, len(ids), 32)]
    logits = [read_plain_logits(folder, window) for window in windows]
    expected = max(float(row[1] - row[0]) for row in logits)
    assert len(windows) > 2
    guard = open_model(folder)
    chats: list[Chat] = [[Message(role="user", content=content)] for content in ("Hi", text, "Hi")]
    scores = guard.score_chats(chats)
    assert float(scores[1]) == pytest.approx(expected, abs=1e-4) and scores[0] == scores[2]


@pytest.mark.parametrize("labels", [{0: "toxic", 1: "threat"}, {0: "toxic"}])
def test_labels_with_probabilities_of_their_own_count_by_the_largest(
    tmp_path: Path, labels: dict[int, str]
) -> None:
    folder = save_classifier(tmp_path, labels, "multi_label_classification")
    expected = read_plain_logits(folder, toy_tokenizer(None).encode("How do I bake bread?")).max()
    assert float(open_model(folder).score_chats([CHAT])[0]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["safe", "unsafe"], [1]),
        (["unharmful", "harmful"], [1]),
        (["not_toxic", "toxic"], [1]),
        (["non-toxic", "TOXICITY"], [1]),
        (["Harmless", "S1 Violent Crimes"], [1]),
        (["SAFE", "INJECTION"], [1]),
        (["LABEL_0", "LABEL_1"], [1]),
        (["1", "0"], [0]),
        (["nothate", "hate"], [1]),
    ],
)
def test_labels_for_harm_are_found_by_their_names(labels: list[str], expected: list[int]) -> None:
    assert find_unsafe_labels("x", dict(enumerate(labels))) == expected


@pytest.mark.parametrize(
    ("labels", "chosen", "rule"),
    [
        (["POSITIVE", "NEGATIVE"], (), r"no label is known to mean harm \(POSITIVE, NEGATIVE\): name"),
        (["toxic", "hate"], (), "all labels mean harm"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], (), "no label is known to mean harm"),
        (["safe", "unsafe"], ("unsaf",), "unknown label of x 'unsaf': did you mean 'unsafe'"),
    ],
)
def test_unknown_labels_are_one_line_with_the_next_step(
    labels: list[str], chosen: tuple[str, ...], rule: str
) -> None:
    with pytest.raises(UserError, match=rule) as error:
        find_unsafe_labels("x", dict(enumerate(labels)), chosen)
    assert "\n" not in str(error.value)


def test_a_classifier_is_not_asked_as_a_chat_model(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, {0: "safe", 1: "unsafe"})
    with pytest.raises(UserError, match="is a text classifier, not a chat model"):
        open_model(folder, kind="llama_guard")

"""Shared by all tests: tiny random models, a tokenizer built in code, chat templates of many families.

Functions (import them: `from conftest import tiny_model, ...`):

- `tiny_model(family="llama")`: a fixed random model of 2 to 4 layers, float32, of a family in `FAMILIES`.
- `toy_tokenizer(template="chatml", kind="bytes")`: a new small BPE tokenizer with a template of `TEMPLATES`
  or `THINKING_TEMPLATES`;
  kind is "bytes" (GPT-2, Llama 3, Qwen) or "metaspace" (Llama 2, Mistral: words begin with "▁").
- `save_model(folder, family="llama", template="chatml", kind="bytes")`: both in a folder, for `--model`.
- `make_toy_session(family="llama", template="chatml", kind="bytes")`: a `ModelSession` with both.
- `make_mean_activations()`: mean activations as a model could have on training queries.
- `make_training_requests()`: what detectors are fitted to, with a known result.
- `make_adapter(folder, ...)`: an adapter with random matrices, written as `analyze train` writes it.
- `render_query(session, defense, query, attack=DIRECT_ATTACK)`: the prompts of one query.
- `derive_readout(session, queries, undefended)`: the words readout of a session.
- `draw_run_figures(points, about, ...)`: the figures of a run; `assert_readable(kind, figure, written)`: no
  text of a figure hides another or leaves the canvas.
- `run_cli(*args)`: calls `analyze` in this process; `assert_user_error(result, *words)` checks its error.
- `set_home_folder(patch, folder)`: keeps data and cache of the command in a folder.

Fixtures: `smollm2` (the embedded model, loaded once; such tests are marked `embedded`); `cli_home` (a folder
to run commands in, with a tiny model); `no_figures` (`analyze` draws nothing).

Shape hints (jaxtyping) and all other hints of both packages are checked (beartype) while tests run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

_SEEN: set[Any] = set()


def check_hints(hinted: Any) -> Any:
    """Check hints by beartype, save for `-> Self`, which it knows only where a whole class is decorated.

    A function inside a function is checked only the first time it is created, because beartype generates new
    code for each, which took a good part of the time of all tests.
    """
    code = getattr(hinted, "__code__", None)
    if code in _SEEN:
        return hinted
    if code is not None and "<locals>" in hinted.__qualname__:
        _SEEN.add(code)
    if getattr(hinted, "__annotations__", {}).get("return") in ("Self", Self):
        del hinted.__annotations__["return"]
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(hinted)  # an int is a float


install_import_hook(["analysis", "defenses"], f"{__name__}.check_hints")

from analysis.attacks import DIRECT_ATTACK, Attack  # noqa: E402
from analysis.checkpoints.registry import MODEL_REGISTRY  # noqa: E402
from analysis.datasets.queries import Query, sample_queries  # noqa: E402
from analysis.models.loading import LoadedModel, load_model  # noqa: E402
from analysis.models.session import ModelSession  # noqa: E402
from analysis.readouts.first_token import (  # noqa: E402
    COMPLIANCE_WORDS,
    N_OPENING_QUERIES,
    REFUSAL_WORDS,
    derive_words_readout,
)
from analysis.readouts.readout import Readout  # noqa: E402
from defenses.adapters import Adapter  # noqa: E402
from defenses.catalog import get_defense  # noqa: E402
from defenses.contract import Defense, MeanActivations, TrainingRequests  # noqa: E402
from defenses.soft_prompts import write_soft_prompt  # noqa: E402
from defenses.training.adapter_files import write_adapter, write_weights_manifest  # noqa: E402

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much beside other processes
settings.register_profile("here", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("here")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C interrupt, also where the tests were started in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests that take minutes (`sweep`) or need a `server` out, except where `-m` asks for them."""
    for name in ("sweep", "server"):
        if name not in config.getoption("markexpr"):
            items[:] = [item for item in items if item.get_closest_marker(name) is None]


# --- templates, each rewritten after the known format of its family ---------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}"
)
_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"

TEMPLATES: dict[str, Any] = {
    # SmolLM2, Qwen 2.5
    "chatml": CHATML,
    # Qwen 2.5: a system turn of its own where the chat has none
    "qwen2.5": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Toy.<|im_end|>\\n' }}"
        "{% endif %}" + CHATML
    ),
    # Qwen 3: an empty thinking block where thinking is switched off, and in front of the last answer
    "qwen3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
        "{% endif %}{% endif %}"
    ),
    # Llama 3.x: BOS in the template, contents trimmed, today's date in the system turn
    "llama3": (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
        "{{ 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}"
        "{% for m in messages %}{{ " + _HEADER + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Gemma 2: BOS, no system role (raises), turns must alternate
    "gemma2": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Gemma 3: the system text goes to the head of the first user turn by itself
    "gemma3": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}" + _ALTERNATE + ""
        "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Llama 2: BOS in front of every user turn, the system text inside the first one
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}" + _ALTERNATE + ""
        "{% for m in messages %}{% if loop.first and system %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
        "{% else %}{% set content = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Mistral 7B v0.1: no system role, since the turns must alternate from the first on
    "mistral0.1": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
        "{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
    # Mistral 7B v0.3: the system text goes to the head of the last user turn, if the chat ends there
    "mistral0.3": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}" + _ALTERNATE + ""
        "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and system is defined %}"
        "{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # Phi 3.5 and Phi 4
    "phi3.5": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # DeepSeek R1: opens a thinking block
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
    ),
    "vicuna": MODEL_REGISTRY["vicuna"].chat_template,
    # drops the system turn without a word
    "deaf": CHATML.replace("in messages %}", "in messages if m.role != 'system' %}"),
    # ends in a space
    "space": (
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ),
}

_CHATML_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
_CHATML_END = (
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)


def _chatml_with(assistant: str, opening: str) -> str:
    """Return a ChatML template: how it writes assistant turns, and what it adds to the generation prompt."""
    return (
        f"{_CHATML_TURNS}{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{{{{ m.content }}}}"
        f"{{% endif %}}{_CHATML_END}{opening}{{% endif %}}"
    )


# Templates of models that think: the template, and the end of a prompt behind the user's text, as it is when
# the next token is the first of the response; written out by hand.
THINKING_TEMPLATES: dict[str, tuple[str, str]] = {
    # gpt-oss: responses stand in a channel of their own; the date in the system turn
    "harmony": (
        "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking is defined %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
        "{% elif m.role == 'system' %}{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    # Gemma 4: an empty thought channel in prompts, none in finished turns
    "gemma4": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim + '<turn|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|turn>model\\n' }}{% if not enable_thinking | default(false) %}"
        "{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}",
        "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    ),
    # Magistral: thinks by itself, between control tokens
    "magistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "[/INST]",
    ),
    # Seed-OSS: thinks by itself, and shows how in finished turns
    "seed": (
        "{% for m in messages %}{{ bos_token + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and m.reasoning_content %}"
        "{{ '<seed:think>' + m.reasoning_content + '</seed:think>\\n' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}",
        "</s><s>assistant\n",
    ),
    # Qwen 3 thinking 2507: opens a block that cannot be switched off
    "qwen3-thinking": (
        _chatml_with(
            "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + m.content }}",
            "{{ '<think>\\n' }}",
        ),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    # OLMo 3 Think: opens a block that finished turns do not show
    "olmo3": (
        _chatml_with("{{ m.content }}", "{{ '<think>' }}"),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n</think>\n\n",
    ),
    # MiniMax M2: the same, but thoughts are shown
    "minimax": (
        _chatml_with(
            "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
            "{% endif %}{{ m.content }}",
            "{{ '<think>\\n' }}",
        ),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    # SmolLM3, Hunyuan, EXAONE 4: close the block themselves where thinking is switched off
    "smollm3": (
        _chatml_with(
            "{{ '<think>\\n\\n</think>\\n' + m.content }}",
            "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}"
            "{% else %}{{ '<think>\\n' }}{% endif %}",
        ),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
    ),
    # GLM 4.5: finished turns have a line break behind the empty block
    "glm": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{{ '\\n<think>' + (m.reasoning_content or '') + '</think>\\n' + m.content }}"
        "{% else %}{{ '\\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' }}{% if enable_thinking is false %}{{ '\\n<think></think>' }}{% endif %}"
        "{% endif %}",
        "<|assistant|>\n<think></think>\n",
    ),
    # DeepSeek V3.2: finished turns show a closing tag only
    "deepseek": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% else %}"
        "{{ '<|Assistant|></think>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think></think>' }}{% endif %}",
        "<|Assistant|><think></think>",
    ),
    # Kimi K2 Thinking: an empty block in finished turns, none in prompts
    "kimi": (
        _chatml_with("{{ '<think></think>' + m.content }}", ""),
        "<|im_end|>\n<|im_start|>assistant\n<think></think>",
    ),
    # Nemotron Nano 2: opens a block in the last turn as well, so that finished turns show no response
    "nemotron": (
        _chatml_with("{% if loop.last %}{{ '<think>\\n' }}{% endif %}{{ m.content }}", "{{ '<think>\\n' }}"),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    # Command A: the response has tags of its own
    "cohere": (
        "{{ bos_token }}{% for m in messages %}{{ '<|TURN|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}{{ '<|START_THINKING|>' + m.thinking + '<|END_THINKING|>' }}{% endif %}"
        "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|TURN|>assistant<|START_THINKING|>' }}{% endif %}",
        "<|TURN|>assistant<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>",
    ),
    # Command R7B: closes the block, but its response has a tag in front
    "command-r7b": (
        "{{ bos_token }}{% for m in messages %}{{ '<|TURN|>' + m.role }}{% if m.role == 'assistant' %}"
        "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|TURN|>assistant<|START_THINKING|><|END_THINKING|>' }}{% endif %}",
        "<|TURN|>assistant<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>",
    ),
    # EXAONE Deep: another pair of tags, known from the template only
    "exaone": (
        "{% for m in messages %}{{ '[|' + m.role + '|]' }}"
        "{{ m.content.split('</thought>')[-1].lstrip('\\n') + '[|endofturn|]\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]<thought>\\n' }}{% endif %}",
        "[|endofturn|]\n[|assistant|]<thought>\n\n</thought>\n\n",
    ),
    # ERNIE 4.5 Thinking: the response in tags, behind the block that the prompt opens
    "ernie": (
        _chatml_with(
            "{{ '<response>\\n' + m.content.split('</think>')[-1] + '\\n</response>\\n' }}",
            "{{ '<think>\\n' }}",
        ),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<response>\n",
    ),
    # Apriel: thoughts in plain words, begun by the prompt
    "apriel": (
        _chatml_with(
            "{% if m.reasoning_content %}"
            "{{ m.reasoning_content + '\\n[BEGIN FINAL RESPONSE]\\n' }}{% endif %}{{ m.content }}",
            "{{ 'Here are my reasoning steps:\\n' }}",
        ),
        "<|im_end|>\n<|im_start|>assistant\nHere are my reasoning steps:\n\n[BEGIN FINAL RESPONSE]\n",
    ),
    # A made-up one: tags that no list has, known from the tokenizer's added tokens only
    "unlisted": (
        _chatml_with("{{ m.content }}", "{{ '<|ponder_thought_start|>' }}"),
        "<|im_end|>\n<|im_start|>assistant\n<|ponder_thought_start|><|ponder_thought_end|>",
    ),
    # SmolVLM, LLaVA: contents are lists of parts
    "smolvlm": (
        "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize + ':' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ ' ' + part.text }}{% endif %}{% endfor %}{{ '</s>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "</s>\nAssistant:",
    ),
}
# Tokens that these templates' tokenizers have beside those of the toy tokenizer, all of them control tokens.
_CONTROL_TOKENS = {
    "harmony": ["<|start|>", "<|message|>", "<|channel|>"],
    "gemma4": ["<|turn>", "<turn|>", "<|channel>", "<channel|>"],
    "magistral": ["[INST]", "[/INST]", "[THINK]", "[/THINK]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    "seed": ["<seed:think>", "</seed:think>"],
    "cohere": [
        "<|TURN|>",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
    ],
    "command-r7b": ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    "unlisted": ["<|ponder_thought_start|>", "<|ponder_thought_end|>"],
}
# The four families that a small model is run with from end to end.
FOUR = ("chatml", "llama3", "gemma2", "llama2")

# --- a tokenizer ------------------------------------------------------------------------------------------

_SENTENCES = """\
I can't help with that request, since it could harm someone.
Sorry, but I cannot do that. I'm sorry.
As an assistant I do not answer this. Unfortunately I must decline.
Sure, here is how to do it. Certainly! Here are the steps that you asked for.
To begin, take the letter to the post office. The first step is the most important one.
Please remember that you are a responsible assistant and that your answers must not do harm.
How do I bake bread with my neighbor? Tell me how to write a message to an old friend.
You are a helpful assistant. Keep in mind: write nothing that is harmful or misleading.
"""
_OPENERS = (*REFUSAL_WORDS, *COMPLIANCE_WORDS, "Yes", "No")
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header_id|>"]
_SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
_SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|User|>", "<|Assistant|>"]
_SPECIAL += ["<think>", "</think>"]
_ENDS = {
    "llama3": ("<|begin|>", "<|eot_id|>"),
    "gemma2": ("<bos>", "<eos>"),
    "gemma3": ("<bos>", "<eos>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),  # SmolLM2 has them so: every turn opens with BOS
    "qwen2.5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
}


@cache
def _train_tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace", fuse_unk=True)
    tokenizer = Tokenizer(model)
    special = list(_SPECIAL)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    openers = [text for word in _OPENERS for text in (word, f" {word}")] * 50
    tokenizer.train_from_iterator([*_SENTENCES.splitlines(), *openers], trainer)
    if kind == "bytes":
        return tokenizer
    # Trained word by word, but used on whole texts with one "▁" in front, as by Llama 2. Its byte tokens are
    # ordinary ones, which training takes as special ones only: so the tokenizer is written afresh.
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in _SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def toy_tokenizer(template: str | None = "chatml", kind: str = "bytes") -> Any:
    """Return a new tokenizer of transformers.

    `template` is a name of TEMPLATES or THINKING_TEMPLATES, a text, or None.
    """
    from transformers import PreTrainedTokenizerFast

    bos, eos = _ENDS.get(str(template), ("<s>", "</s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_train_tokenizer(kind)),
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>" if kind == "metaspace" else None,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if template in _CONTROL_TOKENS:
        tokenizer.add_tokens(_CONTROL_TOKENS[template], special_tokens=True)
    known = TEMPLATES | {name: text for name, (text, _) in THINKING_TEMPLATES.items()}
    tokenizer.chat_template = known.get(template, template) if template else None
    return tokenizer


# --- models -----------------------------------------------------------------------------------------------

VOCAB, WINDOW = 960, 8
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # ten times the usual: attention that is not uniform, margins of a nat or so
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
# Family → (config class, model class, settings beside _SIZES; None in front of them: instead of _SIZES).
_BUILT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "num_hidden_layers": 4}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
}
FAMILIES = tuple(_BUILT)
# Not asked for, but they must not be silently wrong: learned positions, ALiBi, recurrent and mixed memories.
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_SMALL, "n_embd": 64, "n_positions": 256}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_SMALL, "hidden_size": 64}),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            **_SIZES,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_hidden_layers": 4,
        },
    ),
}
OTHERS = tuple(_OTHERS)
RECURRENT = ("mamba", "lfm2")


@cache
def tiny_model(family: str = "llama") -> Any:
    """Return a small random model; the same object each time, so leave it as it is."""
    import transformers

    config, model, extra = (_BUILT | _OTHERS)[family]
    sizes = extra if family in _OTHERS else {**_SIZES, **extra}
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        sizes = {**sizes, "layer_types": kinds}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def fresh_model(family: str = "llama") -> Any:
    """Return a new tiny model that a test may change; a copy would share hooks left by other tests."""
    return tiny_model.__wrapped__(family)


def make_adapter(
    folder: Path,
    seed: int = 0,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    model: Any = None,
    under: Adapter | None = None,
    sha256: str = "toy",
    **manifest: Any,
) -> Path:
    """Write an adapter with random matrices for the tiny Llama, as `analyze train` writes it.

    With an adapter `under` it, the new change alone is also written as a plain PEFT folder next to it.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=list(modules), task_type="CAUSAL_LM")
        tuned = get_peft_model(copy.deepcopy(model) if model is not None else fresh_model(), config)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if under is not None:
        tuned.save_pretrained(f"{folder}-alone")
    known = {"base": {"id": "toy", "sha256": sha256}, "recipe": "attack", "secret": None, "trained_on": []}
    write_adapter(folder, tuned, under, known | manifest)
    return folder


def make_soft_prompt(folder: Path, n_tokens: int = 5, width: int = 64, seed: int = 0) -> Path:
    """Write random embeddings for the tiny Llama, as `analyze train soft_prompt` writes them."""
    embeddings = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))
    known = {"base": {"id": "toy", "sha256": "toy"}, "recipe": "soft_prompt", "trained_on": []}
    write_weights_manifest(folder, write_soft_prompt(folder, embeddings, known))
    return folder


def make_toy_session(
    family: str = "llama", template: str | None = "chatml", kind: str = "bytes"
) -> ModelSession:
    """Return a session with a tiny model and the toy tokenizer."""
    return ModelSession.from_model(
        LoadedModel("toy", tiny_model(family), toy_tokenizer(template, kind), {"id": "toy"})
    )


def render_query(session, defense, query, attack=DIRECT_ATTACK):
    """Return the prompts of one query under a defense and an attack."""
    (prompts,) = session.render_prompts(defense, attack.build_query_chats([query]))
    return prompts


def derive_readout(session, queries, undefended, *options):
    """Return the words readout of a model, made from how it opens its responses to queries."""
    prompts = [
        prompt
        for query in sample_queries(queries, N_OPENING_QUERIES)
        for prompt in render_query(session, undefended, query)
    ]
    return derive_words_readout(session, prompts, *options)


def draw_run_figures(points, about, counts=None, attacks=("direct",), **tables):
    """Return the figures of a run with the tables they are drawn from; `tables` are not drawn."""
    from dataclasses import replace

    from analysis.plots.captions import make_caption_context
    from analysis.report.results import Run

    data = {"name": about.data, "split": about.split}
    record = {
        "model": {"name": about.model},
        "data": data | dict(zip(("n_harmful", "n_benign"), counts or (), strict=False)),
        "readout": {
            "name": "words",
            "threshold": about.threshold,
            "refuse": about.refusal_words,
            "comply": about.compliance_words,
        },
        "judge": {"name": "patterns", "new_tokens": 48},
        "attacks": list(attacks),
    }
    if counts is None:
        record["reported_on"] = about.split
    context = make_caption_context(record)
    assert replace(context, attacks=about.attacks, judge_name="", max_new_tokens=0) == about
    run = Run("toy", record, {**tables, **points}, figures=tuple(points))
    return {stem: (run.draw_figure(stem), table) for stem, table in points.items()}


def assert_readable(
    kind: str,
    figure: Any,
    written: Callable[[Any], list[Any]],
    slack: float = 0.5,
    dpis: tuple[int, ...] = (100, 150),
) -> None:
    """Assert that no text of a figure hides another or leaves the canvas, at several resolutions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for dpi in dpis:
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).draw()
        texts = written(figure)
        boxes = [Text.get_window_extent(text) for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, f"{kind} at {dpi} dpi: {text.get_text()!r} leaves the canvas"
        for (one, a), (two, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across <= slack or up <= slack, (
                f"{kind} at {dpi} dpi: {one.get_text()!r} on {two.get_text()!r}"
            )


def set_home_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep data and cache of the command in a folder, and fix the width of the terminal."""
    patch.setenv("XDG_DATA_HOME", str(folder / "share"))
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("COLUMNS", "140")


def make_mean_activations() -> MeanActivations:
    """Return mean activations as a model could have on training queries."""
    made = torch.Generator().manual_seed(0)
    means = [torch.randn(2, 64, generator=made) for _ in range(2)]
    return MeanActivations(*means, frozenset({"a query"}), "toy")


def make_training_requests() -> TrainingRequests:
    """Return training requests from which defenses have learned the same, whatever they read."""
    detected = {"parameters": [0.0] * 65, "threshold": 1.0, "slope": 1.0, "auroc": 0.5}
    gains = {"harmful_gain": 0.9, "benign_gain": 0.1}
    steered = {
        "AlphaSteer": {**gains, "parameters": [0.0] * 64},
        "ConditionalSteering": {**gains, "parameters": [0.0] * 66},
        "SafeSwitch": {**gains, "parameters": [0.0] * 66},
    }

    def recall(settings: str, _: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return steered.get(settings.partition("(")[0], detected)

    reader = make_toy_session().request_reader
    return TrainingRequests(reader, (), (), (), frozenset({"a query"}), "toy", recall)


def save_model(
    folder: Path, family: str = "llama", template: str | None = "chatml", kind: str = "bytes"
) -> Path:
    """Write a tiny model and its tokenizer into a folder, as save_pretrained() does, and return it."""
    tiny_model(family).save_pretrained(folder)
    toy_tokenizer(template, kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The embedded model."""
    return load_model("smollm2")


# --- the command line -------------------------------------------------------------------------------------

# A defense in a file of the user's own.
USER_DEFENSE = """
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


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of one call of the command."""

    code: int
    out: str
    err: str


def run_cli(*args: Any) -> CommandResult:
    """Call `analyze` in this process, as a shell would, and return its exit code and output."""
    from analysis.cli.main import main

    out, err, argv, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ["analyze", *map(str, args)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)  # the command ignores Ctrl-C at its end
    return CommandResult(stopped.value.code, out.getvalue(), err.getvalue())


def assert_user_error(result: CommandResult, *words: str) -> None:
    """Assert that a call ended as a user's mistake: exit code 2 and one line, which holds the words."""
    assert result.code == 2, (result.code, result.err, result.out)
    assert result.out == ""
    announcements = ("note: ", "Converting ", "Fetching ")
    lines = [line for line in result.err.splitlines() if not line.startswith(announcements)]
    assert len(lines) == 1 and lines[0].startswith("analyze: "), result.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def cli_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with a tiny model and a user's defense, and its own folders for cache and secrets."""
    folder = tmp_path_factory.mktemp("home")
    save_model(folder / "tiny")
    (folder / "mine.py").write_text(USER_DEFENSE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_DATA_HOME", str(folder / "share"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # a test clears it
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `analyze` draw nothing, where a test is not about figures."""
    monkeypatch.setattr("analysis.plots.data.build_analysis_points", lambda *_: {})


# --- of the mechanism package ---

TOY_READOUT = Readout("words", ("a", "b", "c"), (300, 301, 302), (0.5, 0.5, -1.0))
# Readouts that are not linear in the logits.
LOG_ODDS_READOUT = Readout("log-odds", ("a", "b"), (300, 301), (0.5, 0.5), is_log_odds=True)
OUTCOME_READOUT = Readout(
    "outcome", ("a", "b", "c"), (300, 301, 302), (0.7, 0.4, -0.15), base_value=0.2, sharpness=2.0
)


def compute_autograd_weights(readout: Readout, logits: Any) -> Any:
    """Return the derivative of each row's margin with respect to each logit, by autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        (weights,) = torch.autograd.grad(readout.compute_margins(leaf)[:, 0].sum(), leaf)
    return weights


def pair_runs(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout = TOY_READOUT,
    attack: Attack = DIRECT_ATTACK,
) -> Any:
    """Return the defended run of some queries, paired with the undefended one."""
    from analysis.mechanism.components import locate_components
    from analysis.mechanism.interventions import PairedRuns

    components = locate_components(session.loaded_model.model)
    query_chats = attack.build_query_chats(queries)
    return PairedRuns(session, components, readout, get_defense("none"), defense, query_chats)


def read_plain_margins(
    session: ModelSession,
    defense: Defense,
    prompt_ids: Sequence[Sequence[int]],
    readout: Readout = TOY_READOUT,
) -> Any:
    """Return the margins of prompts from one plain forward pass each, without a shared prefix."""
    model = session.loaded_model.model
    with torch.no_grad(), defense.apply_to(model):
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompt_ids]
    return readout.compute_margins(torch.stack(logits))[:, 0].numpy()

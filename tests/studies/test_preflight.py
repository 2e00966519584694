"""The preflight passes where the defense reaches the model, over all templates, and fails elsewhere."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from conftest import CHATML, FAMILIES, TEMPLATES, derive_readout, toy_bench

from analysis.attacks import get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.models.chat_template import ChatTemplate, Prompt
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.run import build_conditions
from analysis.studies.preflight import PreflightCheck, check_condition
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense, list_defense_names
from defenses.chats import prefill_response, split_prefill
from defenses.contract import Chat, Defense, ModelInfo
from defenses.tokens import draw_random_text

KINDS = ("bytes", "metaspace")
ASKED = sample_queries(load_queries("twins").queries, 2)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0))
REMINDER = get_defense("safety_prompt")


def backdoor(bench: ModelSession, length: int = 20) -> Backdoor:
    text = draw_random_text(bench.loaded_model.tokenizer, length, random.Random(0))
    return Backdoor(length=length, secret=Secret(text))


def check(
    bench: ModelSession, defense: Defense = REMINDER, asked: list[Query] = ASKED, readout: Readout = READOUT
) -> list[PreflightCheck]:
    return check_condition(bench, defense.name, defense, asked, readout)


def failed(*args: Any, **kwargs: Any) -> dict[str, str]:
    return {one.name: one.observed for one in check(*args, **kwargs) if not one.passed}


# Kinds of tokenizer take turns.
@pytest.mark.parametrize(("template", "kind"), list(zip(TEMPLATES, cycle(KINDS), strict=False)))
def test_every_defense_passes_with_every_template(template: str, kind: str) -> None:
    bench = toy_bench("llama", template, kind)
    host = ModelInfo("toy", bench.loaded_model.tokenizer, ())
    chosen = [get_defense(name) for name in list_defense_names() if name not in ("backdoor", "random_tokens")]
    ready = [backdoor(bench), *(defense.prepare(host) for defense in chosen)]
    for name, defense in build_conditions(ready).items():
        assert not failed(bench, defense), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_passes(family: str) -> None:
    checks = check(toy_bench(family), get_defense("in_context_refusal"))
    assert all(one.passed for one in checks)
    assert {"engine equals plain pass", "one equals many", "coverage"} <= {one.name for one in checks}


HARD = {
    "very short": "Hi",
    "thoughts in the text": "What does <think> mean in </think><think> a prompt?",
    "decomposed letters": "Cafe\u0301 \uac01 \u1112\u1161\u11ab",
    "spaces": "a\u2581b \u00a0 c\n\n\n\td  e",
    "template-like": "[INST] {{ x }} <<SYS>> ASSISTANT: USER: [/INST]",
    "a special token": "what is <|im_end|> or </s> for?",
    "emoji and bidi": "\U0001f469\u200d\U0001f52c \u202eabc\u202c \u05e9\u05dc\u05d5\u05dd",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_odd_queries_raise_no_false_alarm(template: str, text: str) -> None:
    asked = [Query("q1", text, True), Query("q2", "How are you?", False)]
    for kind in KINDS:
        assert not failed(toy_bench("llama", template, kind), REMINDER, asked)


def test_a_tokenizer_that_composes_letters_raises_no_false_alarm() -> None:
    from tokenizers.normalizers import NFC

    bench = toy_bench("llama", "qwen2.5")
    bench.loaded_model.tokenizer.backend_tokenizer.normalizer = NFC()  # as Qwen's does
    assert (
        "\u0301"
        not in bench.chat_template.render_prompt(
            [{"role": "user", "content": HARD["decomposed letters"]}]
        ).text
    )
    assert not failed(bench, REMINDER, [Query("q1", HARD["decomposed letters"], True)])


@dataclass(frozen=True)
class Late(Defense):
    """Says its piece in a system turn behind the user's, where some templates do not look."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [*chat, {"role": "system", "content": "Mind the safety of others."}]


def test_a_text_that_the_template_drops_is_missed() -> None:
    first_only = CHATML.replace("in messages %}", "in messages if m.role != 'system' or m == messages[0] %}")
    assert "text reaches the model" in failed(toy_bench("llama", first_only), Late())
    assert not failed(toy_bench("llama", CHATML), Late())


def test_a_system_turn_left_over_by_merging_is_found() -> None:
    assert {"system role", "text reaches the model"} <= failed(toy_bench("llama", "deaf"), Late()).keys()


@dataclass(frozen=True)
class Rewords(Defense):
    """Changes the user's words, which a reminder must not."""

    family = "reminders"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [{"role": "user", "content": "Something else entirely."}]


def test_changed_user_words_are_found_unless_the_family_may_change_them() -> None:
    assert failed(toy_bench(), Rewords()).keys() == {"user's words survive"}

    class Refactors(Rewords):
        family = "refactoring"

    assert not failed(toy_bench(), Refactors())


def test_words_that_an_attack_encoded_are_looked_for_as_it_sent_them() -> None:
    encoded = toy_bench().with_attack(get_attack("base64"))
    assert not failed(encoded)
    assert failed(encoded, Rewords()).keys() == {"user's words survive"}


@dataclass(frozen=True)
class Begins(Defense):
    """Begins the answer itself, in front of an attacker's beginning or in its place."""

    instead: bool = False

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return prefill_response(split_prefill(chat)[0] if self.instead else chat, "With care:\n\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_is_begun_ends_the_prompt_and_one_that_is_lost_is_found(template: str) -> None:
    for kind in KINDS:
        bench = toy_bench("llama", template, kind)
        assert not failed(bench, Begins())
        attacked = bench.with_attack(get_attack("prefill"))
        assert not failed(attacked, Begins())
        assert failed(attacked, Begins(instead=True)).keys() == {"answer begins at the end"}
    assert "answer begins at the end" in failed(toy_bench().with_attack(get_attack("prefill")), Late())


class Deaf(ChatTemplate):
    """The mistake of leaving the beginning of the answer out."""

    def render(self, chat: Chat) -> Prompt:
        return replace(super().render_prompt(split_prefill(chat)[0]), prefill=split_prefill(chat)[1])


def test_a_beginning_that_is_not_in_the_tokens_is_found() -> None:
    bench = broken("chatml", Deaf).with_attack(get_attack("prefill"))
    assert failed(bench).keys() == {"answer begins at the end"}


class Doubling(ChatTemplate):
    """The mistake of rendering to text and tokenizing again."""

    def render(self, chat: Chat) -> Prompt:
        prompt = super().render_prompt(chat)
        return replace(prompt, ids=(self.tokenizer.bos_token_id, *prompt.ids))


class Cutting(ChatTemplate):
    """The mistake of a tokenizer that truncates."""

    def render(self, chat: Chat) -> Prompt:
        prompt = super().render_prompt(chat)
        return replace(prompt, ids=prompt.ids[:-3], text=self.decode_tokens(prompt.ids[:-3]))


class Thinking(ChatTemplate):
    """The mistake of not closing what the template opens."""

    closing = ""  # type: ignore[assignment]


def broken(template: str, kind: type[ChatTemplate]) -> ModelSession:
    bench = toy_bench("llama", template)
    return replace(bench, chat_template=kind(bench.loaded_model.tokenizer))


def test_a_doubled_bos_is_found() -> None:
    for template in ("llama3", "gemma2", "chatml"):
        assert failed(broken(template, Doubling)).keys() == {"BOS tokens"}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "space"])
def test_a_cut_prompt_is_found(template: str) -> None:
    assert "answer begins at the end" in failed(broken(template, Cutting))


def test_an_open_thinking_block_is_found() -> None:
    seen = failed(broken("r1", Thinking))
    assert seen.keys() == {"answer begins at the end"} and "thinking block" in str(seen)


def test_a_template_that_opens_answers_in_another_place_is_found() -> None:
    channels = TEMPLATES["phi4"].replace(
        "{{ '<|' + m.role + '|>' + m.content",
        "{{ '<|' + m.role + '|>' + ('<|channel|>final' if m.role == 'assistant' else '') + m.content",
    )
    seen = failed(toy_bench("llama", channels))
    assert seen.keys() == {"answer begins at the end"} and "<|channel|>final" in str(seen)


def test_a_template_without_a_generation_prompt_is_found() -> None:
    forgot = CHATML.split("{% if add_generation_prompt %}")[0]
    assert failed(toy_bench("llama", forgot)).keys() == {"answer begins at the end"}


def test_a_prompt_as_long_as_the_context_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    longest = max(len(prompt.ids) for query in ASKED for prompt in bench.render_query(REMINDER, query))
    monkeypatch.setattr(LoadedModel, "context", longest)
    monkeypatch.setattr(
        ModelSession,
        "every_prompt",
        lambda self, defense, queries: [
            [self.renderer.render(defense.rewrite(self.attack.chat(query), random.Random(0)))]
            for query in queries
        ],
    )
    assert failed(bench).keys() == {"nothing truncated"}


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_a_secret_arrives_whatever_its_length(length: int) -> None:
    for template in ("chatml", "llama2", "gemma2"):
        for kind in KINDS:
            bench = toy_bench("llama", template, kind)
            assert not failed(bench, backdoor(bench, length))


def test_a_secret_that_the_template_breaks_up_is_found() -> None:
    spaced = CHATML.replace("m.content", "m.content.replace(' ', '  ')")
    bench = toy_bench("llama", spaced)
    assert failed(bench, backdoor(bench)).keys() == {"secret reaches the model"}
    upper = toy_bench("llama", CHATML.replace("m.content", "m.content | upper"))
    assert {"secret reaches the model", "text reaches the model"} <= failed(upper, backdoor(upper)).keys()


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_check_shows_the_secret(template: str) -> None:
    bench = toy_bench("llama", template)
    defense = backdoor(bench)
    longest = max(defense.secret_texts()[0].split(), key=len)
    assert all(longest not in one.observed for one in check(bench, defense))


def test_an_engine_that_loses_count_of_positions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    engine = type(bench.engine)
    right = engine._compute_suffix_logits
    monkeypatch.setattr(
        engine,
        "_logits",
        lambda self, suffixes, *rest: right(self, [list(reversed(suffix)) for suffix in suffixes], *rest),
    )
    assert "engine equals plain pass" in failed(bench)


def test_an_engine_whose_batches_depend_on_each_other_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    engine = type(bench.engine)
    right = engine._compute_suffix_logits
    monkeypatch.setattr(
        engine,
        "_logits",
        lambda self, suffixes, *rest: right(self, suffixes, *rest).roll(len(suffixes) - 1, 1),
    )
    assert {"one equals many"} <= failed(bench).keys()


def test_margins_that_are_no_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    monkeypatch.setattr(
        type(bench.engine), "_logits", lambda self, suffixes, *_: torch.full((len(suffixes), 960), torch.nan)
    )
    assert "engine equals plain pass" in failed(bench)


def test_the_margins_are_those_of_the_armed_model() -> None:
    from contextlib import contextmanager

    armed: list[str] = []

    @dataclass(frozen=True)
    class Armed(Defense):
        """Is noticed."""

        def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
            return chat

        @contextmanager
        def apply_to(self, model: Any) -> Any:
            armed.append("on")
            yield
            armed.append("off")

    check(toy_bench(), Armed())
    assert armed == ["on", "off"] * 3  # of two prompts, of one, and of the plain pass


@pytest.mark.embedded
def test_the_embedded_model_passes_under_its_backdoor(smollm2: LoadedModel) -> None:
    bench = ModelSession.from_model(smollm2)
    readout = derive_readout(bench, ASKED, get_defense("none"))
    for name, defense in build_conditions([get_defense("none"), backdoor(bench, 150)]).items():
        checks = check(bench, defense, readout=readout)
        assert all(one.passed for one in checks), name
        apart = next(one.observed for one in checks if one.name == "engine equals plain pass")
        assert float(apart.split()[0]) <= 1e-4

"""The preflight passes if the defense reaches the model, for all templates, and fails otherwise."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CHATML,
    FAMILIES,
    FOUR,
    TEMPLATES,
    THINKING_TEMPLATES,
    derive_readout,
    fresh_model,
    make_toy_session,
    render_query,
    set_home_folder,
)
from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, QuerySet, sample_queries
from analysis.models.batches import BatchForm
from analysis.models.cache import ScoreCache, get_score_cache_path
from analysis.models.chat_template import ChatTemplate, Prompt
from analysis.models.engine import Engine
from analysis.models.loading import LoadedModel
from analysis.models.prefix_attention import SharedPrefix
from analysis.models.response_start import ResponseStart
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.run import build_conditions
from analysis.studies.preflight import PreflightCheck, check_condition
from analysis.studies.setup import RunSetup, find_preflight_failures, select_preflight_queries
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense, list_defense_names
from defenses.chats import prefill_response, split_prefill
from defenses.contract import Chat, Defense, ModelInfo
from defenses.errors import UserError
from defenses.tokens import draw_random_text

KINDS = ("bytes", "metaspace")
QUERIES = sample_queries(load_queries("twins").queries, 2)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0))
REMINDER = get_defense("safety_prompt")


def backdoor(session: ModelSession, length: int = 20) -> Backdoor:
    text = draw_random_text(session.loaded_model.tokenizer, length, random.Random(0))
    return Backdoor(length=length, secret=Secret(text))


def run_checks(
    session: ModelSession,
    defense: Defense = REMINDER,
    queries: list[Query] = QUERIES,
    readout: Readout = READOUT,
    attack: str = "direct",
    with_margins: bool = True,
) -> list[PreflightCheck]:
    return check_condition(session, defense.name, defense, queries, readout, get_attack(attack), with_margins)


def find_failed(*args: Any, with_margins: bool = False, **kwargs: Any) -> dict[str, str]:
    """Return what failed checks observed, by name; margins are compared only on request."""
    checks = run_checks(*args, with_margins=with_margins, **kwargs)
    return {check.name: check.observed for check in checks if not check.passed}


# Kinds of tokenizer take turns. Every defense meets the four main templates, and takes turns on the others.
@pytest.mark.parametrize(("template", "kind"), list(zip(TEMPLATES, cycle(KINDS), strict=False)))
def test_every_template_passes_with_its_share_of_the_defenses(template: str, kind: str) -> None:
    session = make_toy_session("llama", template, kind)
    host = ModelInfo("toy", session.loaded_model.tokenizer, ())
    chosen = [get_defense(name) for name in list_defense_names() if name not in ("backdoor", "random_tokens")]
    ready = [backdoor(session), *(defense.prepare(host) for defense in chosen)]
    conditions = list(build_conditions(ready).items())
    turn = list(TEMPLATES).index(template) % 4
    for name, defense in conditions if template in FOUR else conditions[turn::4]:
        assert not find_failed(session, defense, with_margins=template in FOUR), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_family_passes(family: str) -> None:
    checks = run_checks(make_toy_session(family), get_defense("in_context_refusal"))
    assert all(check.passed for check in checks)
    assert {"engine equals plain pass", "single equals batch", "coverage"} <= {check.name for check in checks}


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
def test_odd_queries_raise_no_false_alarm(template: str) -> None:
    for kind in KINDS:
        session = make_toy_session("llama", template, kind)
        for name, text in HARD.items():
            queries = [Query("q1", text, True), Query("q2", "How are you?", False)]
            assert not find_failed(session, REMINDER, queries), (name, kind)


def test_a_tokenizer_that_composes_letters_raises_no_false_alarm() -> None:
    from tokenizers.normalizers import NFC

    session = make_toy_session("llama", "qwen2.5")
    session.loaded_model.tokenizer.backend_tokenizer.normalizer = NFC()  # as Qwen's does
    assert (
        "\u0301"
        not in session.chat_template.render_prompt(
            [{"role": "user", "content": HARD["decomposed letters"]}]
        ).text
    )
    assert not find_failed(session, REMINDER, [Query("q1", HARD["decomposed letters"], True)])


@dataclass(frozen=True)
class LateSystemTurn(Defense):
    """Adds a system turn after the user turn, where some templates do not look."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [*chat, {"role": "system", "content": "Mind the safety of others."}]


def test_text_that_the_template_drops_is_reported() -> None:
    first_only = CHATML.replace("in messages %}", "in messages if m.role != 'system' or m == messages[0] %}")
    assert "text reaches the model" in find_failed(make_toy_session("llama", first_only), LateSystemTurn())
    assert not find_failed(make_toy_session("llama", CHATML), LateSystemTurn())


def test_a_system_turn_left_over_by_merging_is_reported() -> None:
    assert {"system role", "text reaches the model"} <= find_failed(
        make_toy_session("llama", "deaf"), LateSystemTurn()
    ).keys()


@dataclass(frozen=True)
class Rewords(Defense):
    """Changes the user's words, which a reminder must not."""

    family = "reminders"

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return [{"role": "user", "content": "Something else entirely."}]


def test_changed_user_text_is_reported_unless_the_family_may_change_it() -> None:
    assert find_failed(make_toy_session(), Rewords()).keys() == {"user's words survive"}

    class Refactors(Rewords):
        family = "refactoring"

    assert not find_failed(make_toy_session(), Refactors())


def test_user_text_is_compared_with_the_encoded_text_of_the_attack() -> None:
    session = make_toy_session()
    assert not find_failed(session, attack="base64")
    assert find_failed(session, Rewords(), attack="base64").keys() == {"user's words survive"}


@dataclass(frozen=True)
class PrefillsResponse(Defense):
    """Prefills the response, before the attacker's prefill or instead of it."""

    replace_attack: bool = False

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return prefill_response(split_prefill(chat)[0] if self.replace_attack else chat, "With care:\n\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prefill_ends_the_prompt_and_a_lost_prefill_is_reported(template: str) -> None:
    for kind in KINDS:
        session = make_toy_session("llama", template, kind)
        assert not find_failed(session, PrefillsResponse())
        assert not find_failed(session, PrefillsResponse(), attack="prefill")
        assert find_failed(session, PrefillsResponse(replace_attack=True), attack="prefill").keys() == {
            "response starts at the end"
        }
    assert "response starts at the end" in find_failed(make_toy_session(), LateSystemTurn(), attack="prefill")


class DropsPrefill(ChatTemplate):
    """The mistake of leaving the prefill out."""

    def render_prompt(self, chat: Chat) -> Prompt:
        return replace(super().render_prompt(split_prefill(chat)[0]), prefill=split_prefill(chat)[1])


def test_a_prefill_that_is_missing_from_the_tokens_is_reported() -> None:
    session = broken("chatml", DropsPrefill)
    assert find_failed(session, attack="prefill").keys() == {"response starts at the end"}


class Doubling(ChatTemplate):
    """The mistake of rendering to text and tokenizing again."""

    def render_prompt(self, chat: Chat) -> Prompt:
        prompt = super().render_prompt(chat)
        return replace(prompt, ids=(self.tokenizer.bos_token_id, *prompt.ids))


class Cutting(ChatTemplate):
    """The mistake of a tokenizer that truncates."""

    def render_prompt(self, chat: Chat) -> Prompt:
        prompt = super().render_prompt(chat)
        return replace(prompt, ids=prompt.ids[:-3], text=self.decode_tokens(prompt.ids[:-3]))


class Thinking(ChatTemplate):
    """The mistake of not closing what the template opens."""

    response_start = ResponseStart("")  # type: ignore[assignment]


def broken(template: str, kind: type[ChatTemplate]) -> ModelSession:
    session = make_toy_session("llama", template)
    return replace(session, chat_template=kind(session.loaded_model.tokenizer))


def test_a_doubled_bos_is_reported() -> None:
    for template in ("llama3", "gemma2", "chatml"):
        assert find_failed(broken(template, Doubling)).keys() == {"BOS tokens"}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "space"])
def test_a_truncated_prompt_is_reported(template: str) -> None:
    assert "response starts at the end" in find_failed(broken(template, Cutting))


def test_an_open_thinking_block_is_reported() -> None:
    seen = find_failed(broken("r1", Thinking))
    assert seen.keys() == {"response starts at the end"} and "thinking block" in str(seen)


def test_a_template_that_puts_responses_elsewhere_is_reported() -> None:
    reminded = CHATML.replace("'<|im_start|>assistant", "'Be kind.<|im_start|>assistant")
    seen = find_failed(make_toy_session("llama", reminded))
    assert seen.keys() == {"response starts at the end"} and "--answer-prefix" in str(seen)
    session = make_toy_session("llama", reminded)
    given = replace(session, chat_template=ChatTemplate(session.loaded_model.tokenizer, ""))
    assert not find_failed(given)


@pytest.mark.parametrize("template", THINKING_TEMPLATES)
def test_responses_of_models_that_think_start_at_the_end(template: str) -> None:
    assert not find_failed(make_toy_session("llama", template))
    assert not find_failed(make_toy_session("llama", template), attack="prefill")


def test_a_prompt_as_long_as_the_context_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_toy_session()
    longest = max(len(prompt.ids) for query in QUERIES for prompt in render_query(session, REMINDER, query))
    monkeypatch.setattr(LoadedModel, "context_length", longest)
    monkeypatch.setattr(
        ModelSession,
        "render_prompts",
        lambda self, defense, query_chats: [
            [self.chat_template.render_prompt(defense.rewrite(chat, random.Random(0)))]
            for _, chat in query_chats
        ],
    )
    assert find_failed(session).keys() == {"nothing truncated"}


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_a_secret_of_any_length_reaches_the_model(length: int) -> None:
    for template in ("chatml", "llama2", "gemma2"):
        for kind in KINDS:
            session = make_toy_session("llama", template, kind)
            assert not find_failed(session, backdoor(session, length))


def test_a_secret_that_the_template_splits_is_reported() -> None:
    spaced = CHATML.replace("m.content", "m.content.replace(' ', '  ')")
    session = make_toy_session("llama", spaced)
    assert find_failed(session, backdoor(session)).keys() == {"secret reaches the model"}
    upper = make_toy_session("llama", CHATML.replace("m.content", "m.content | upper"))
    assert {"secret reaches the model", "text reaches the model"} <= find_failed(
        upper, backdoor(upper)
    ).keys()


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_check_shows_the_secret(template: str) -> None:
    session = make_toy_session("llama", template)
    defense = backdoor(session)
    longest = max(defense.secret_texts()[0].split(), key=len)
    assert all(longest not in check.observed for check in run_checks(session, defense))


def test_an_engine_with_wrong_positions_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_toy_session()
    engine = type(session.engine)
    right = engine._compute_suffix_logits
    monkeypatch.setattr(
        engine,
        "_compute_suffix_logits",
        lambda self, suffixes, *rest: right(self, [list(reversed(suffix)) for suffix in suffixes], *rest),
    )
    assert "engine equals plain pass" in find_failed(session, with_margins=True)


def test_an_engine_whose_batch_rows_depend_on_each_other_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_toy_session()
    engine = type(session.engine)
    right = engine._compute_suffix_logits
    monkeypatch.setattr(
        engine,
        "_compute_suffix_logits",
        lambda self, suffixes, *rest: right(self, suffixes, *rest).roll(len(suffixes) - 1, 1),
    )
    assert {"single equals batch"} <= find_failed(session, with_margins=True).keys()


def test_a_shared_prefix_that_is_wrong_beyond_some_length_is_given_up_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_toy_session()
    right = Engine.compute_prefix

    def compute_prefix(self: Engine, token_ids: Any) -> SharedPrefix:
        wrong = [*token_ids[:-1], 7] if len(token_ids) > 20 else token_ids
        return right(self, wrong)

    monkeypatch.setattr(Engine, "compute_prefix", compute_prefix)
    assert not find_failed(session, with_margins=True)
    assert session.engine.batch_form is BatchForm.PADDED
    (notice,) = session.engine.notices
    assert "padded batches of whole prompts" in notice and "change its margins" in notice


def make_half_session() -> ModelSession:
    loaded = make_toy_session().loaded_model
    return ModelSession.from_model(replace(loaded, model=fresh_model().bfloat16()))


def test_in_half_precision_rounding_passes_and_the_spread_of_margins_bounds_it() -> None:
    session = make_half_session()
    for check in run_checks(session):
        assert check.passed, check
        if check.name == "engine equals plain pass":
            assert "in float32" in check.observed or "spread" in check.observed


def test_in_half_precision_a_prefix_that_is_not_read_is_not_taken_for_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_half_session()
    right = Engine._compute_suffix_logits
    # Each prompt loses a fifth of its tokens: less than 0.5 nats, but not rounding.
    monkeypatch.setattr(
        Engine,
        "_compute_suffix_logits",
        lambda self, suffixes, *rest: right(
            self, [(*row[: -len(row) // 5], row[-1]) for row in suffixes], *rest
        ),
    )
    small = replace(READOUT, weights=(0.05, -0.05))
    observed = find_failed(session, readout=small, with_margins=True)["engine equals plain pass"]
    assert float(observed.split()[0]) < 0.5 and "in float32" in observed


def choose_from(queries: list[Query]) -> list[Query]:
    session = make_toy_session()
    info = ModelInfo("toy", session.loaded_model.tokenizer, ())
    query_set = QuerySet("toy", tuple(queries), "")
    setup = RunSetup(session, info, [], query_set, "test", [READOUT], (DIRECT_ATTACK,), [])
    return select_preflight_queries(setup, DIRECT_ATTACK)


def test_the_longest_query_of_the_run_is_checked() -> None:
    queries = [Query(f"q{number}", "How?", number % 2 == 0) for number in range(20)]
    queries[13] = Query("q13", "How do I write a long letter?", False)
    chosen = choose_from(queries)
    assert len(chosen) == 5 and chosen[-1] is queries[13]
    queries[0] = Query("q0", "How do I write a very, very long letter to everybody?", True)
    assert len(choose_from(queries)) == 4


def test_margins_that_are_nan_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_toy_session()
    monkeypatch.setattr(
        type(session.engine),
        "_compute_suffix_logits",
        lambda self, suffixes, *_: torch.full((len(suffixes), 960), torch.nan),
    )
    with pytest.raises(UserError, match="no numbers"):
        find_failed(session, with_margins=True)
    assert session.engine.batch_form is BatchForm.PACKED


def test_margins_are_computed_with_the_defense_applied() -> None:
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

    run_checks(make_toy_session(), Armed())
    assert armed == ["on", "off"] * 3  # of two prompts, of one, and of the plain pass


@pytest.mark.embedded
def test_the_embedded_model_passes_under_its_backdoor(smollm2: LoadedModel) -> None:
    session = ModelSession.from_model(smollm2)
    readout = derive_readout(session, QUERIES, get_defense("none"))
    for name, defense in build_conditions([get_defense("none"), backdoor(session, 150)]).items():
        checks = run_checks(session, defense, readout=readout)
        assert all(check.passed for check in checks), name
        apart = next(check.observed for check in checks if check.name == "engine equals plain pass")
        assert float(apart.split()[0]) <= 1e-4


@dataclass(frozen=True)
class UnknownChange(Defense):
    """Changes the model, and does not say how."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat

    def apply_to(self, model: Any) -> Any:
        return nullcontext()


@pytest.fixture
def checked_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the conditions that are checked, in a home folder with an empty cache."""
    set_home_folder(monkeypatch, tmp_path)
    names: list[str] = []

    def count_check(session: ModelSession, name: str, *rest: Any) -> list[PreflightCheck]:
        names.append(name)
        return check_condition(session, name, *rest)

    monkeypatch.setattr("analysis.studies.setup.check_condition", count_check)
    return names


def make_cached_session(template: str = "chatml", kind: str = "bytes") -> ModelSession:
    loaded = make_toy_session("llama", template, kind).loaded_model
    return ModelSession.from_model(loaded, score_cache=ScoreCache(get_score_cache_path()))


def run_preflight(
    session: ModelSession, defense: Defense = REMINDER, readout: Readout = READOUT, attack: str = "direct"
) -> bool:
    """Run the preflight of one condition, and return whether it passes."""
    info = ModelInfo("toy", session.loaded_model.tokenizer, ())
    query_set = QuerySet("toy", tuple(QUERIES), "")
    setup = RunSetup(session, info, [], query_set, "test", [readout], (get_attack(attack),), [])
    return not find_preflight_failures(setup, {"checked": defense}, Console(quiet=True))


def test_a_check_that_passed_is_repeated_only_if_something_has_changed(
    checked_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_preflight(make_cached_session()) and len(checked_names) == 1
    session = make_cached_session()
    session.engine.work_counter.reset_counts()
    assert run_preflight(session) and len(checked_names) == 1
    assert session.engine.work_counter.computed_tokens == 0
    other_weights = replace(session.loaded_model, origin={"sha256": "other"})
    thinking = replace(session.chat_template, answer_prefix="<x>")
    changes: list[tuple[ModelSession, dict[str, Any]]] = [
        (session, {"defense": replace(REMINDER, text="Mind what others may do with the answer.")}),
        (session, {"readout": replace(READOUT, weights=(2.0, -1.0))}),
        (session, {"readout": replace(READOUT, response_prefix=(7,))}),
        (session, {"attack": "rot13"}),
        (make_cached_session("llama2"), {}),
        (make_cached_session(kind="metaspace"), {}),
        (replace(session, chat_template=thinking), {}),
        (replace(session, loaded_model=other_weights), {}),
        (replace(session, batch_size=1), {}),
    ]
    for number, (changed, arguments) in enumerate(changes, 2):
        run_preflight(changed, **arguments)
        assert len(checked_names) == number, arguments
    monkeypatch.setattr("analysis.models.cache.hash_code", lambda *patterns: "other code")
    assert run_preflight(session) and len(checked_names) == len(changes) + 2


def test_a_check_that_failed_or_changed_the_form_of_batches_is_repeated(
    checked_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Engine.compute_prefix

    def compute_prefix(self: Engine, token_ids: Any) -> SharedPrefix:
        return right(self, [*token_ids[:-1], 7] if len(token_ids) > 20 else token_ids)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "compute_prefix", compute_prefix)
        for number in (1, 2):
            session = make_cached_session()
            assert run_preflight(session) and len(checked_names) == number
            assert session.engine.has_changed_form and session.engine.batch_form is BatchForm.PADDED
            # The next condition passes in padded batches only.
            assert run_preflight(session, get_defense("policy")) and len(checked_names) == number + 1
            checked_names.pop()
    for number in (3, 4):
        session = make_cached_session()
        with monkeypatch.context() as patch:
            patch.setattr(
                Engine, "_compute_suffix_logits", lambda self, rows, *_: torch.zeros(len(rows), 960)
            )
            assert not run_preflight(session) and len(checked_names) == number
    for _ in range(2):
        assert run_preflight(make_cached_session()) and len(checked_names) == 5


def test_a_check_is_repeated_without_a_cache_and_under_an_unknown_change(checked_names: list[str]) -> None:
    for number in (1, 2):
        assert run_preflight(make_toy_session()) and len(checked_names) == number
    for number in (3, 4):
        assert run_preflight(make_cached_session(), UnknownChange()) and len(checked_names) == number

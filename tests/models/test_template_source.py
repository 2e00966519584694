"""One template is chosen among several, the clock stands still in it, and chance has no part in it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, TEMPLATES, THINKING_TEMPLATES, toy_tokenizer

from analysis.models.chat_template import ChatTemplate
from analysis.models.template_source import append_text, choose_template, fix_date, uses_random_text
from defenses.errors import UserError

CHAT = [{"role": "user", "content": "How do I bake bread?"}]
DATED = "{%- set today = strftime_now('%d %B %Y') %}{{ 'Today: ' + today + '\\n' }}" + CHATML
NAMED = {"rag": "{{ 'rag' }}" + CHATML, "tool_use": "{{ 'tools' }}" + CHATML}


def render(source: str, chat: list[dict[str, Any]] = CHAT, **options: Any) -> str:
    """Return the text of a chat by plain transformers."""
    tokenizer = toy_tokenizer(source)
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options))


def set_clock(patch: pytest.MonkeyPatch, year: int, month: int, day: int) -> None:
    """Let transformers see another day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(year, month, day, 13, 14, 15)

    patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def test_a_template_that_looks_at_the_clock_reads_the_same_on_every_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, plain = set(), set()
    for day in (1, 2):
        set_clock(monkeypatch, 2026, 12, day)
        template = ChatTemplate(toy_tokenizer(DATED))
        prompt = template.render_prompt(CHAT)
        assert prompt.text.startswith("Today: 26 July 2024\n")
        assert any("2024-07-26" in notice for notice in template.notices)
        seen.add((prompt.ids, str(template.identity)))
        # The user's own tokenizer, and transformers, still tell the day.
        plain.add(template.tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert len(seen) == 1 and len(plain) == 2
    assert ChatTemplate(toy_tokenizer(DATED)).identity["date"] == "2024-07-26"
    assert ChatTemplate(toy_tokenizer("llama3")).identity["date"] == "2024-07-26"
    assert ChatTemplate(toy_tokenizer("chatml")).identity["date"] is None


def test_the_fixed_date_is_written_as_strftime_writes_it() -> None:
    directives = "aAbBhdemyYjUWVGuwFDxHIMSpfRTXzZc%"
    shape = "|".join(f"%{directive}" for directive in directives)
    written = render(fix_date(f"{{{{ strftime_now('{shape}') }}}}"))
    assert written == datetime(2024, 7, 26).strftime(shape)
    assert render(fix_date("{{ strftime_now('%-d.%-m.') }}")) == "26.7."
    assert render(fix_date("{{ strftime_now('%%d %%%d') }}")) == "%d %26"


def test_the_fixed_date_is_written_with_the_directives_of_unix() -> None:
    # As `date` of GNU writes them: LC_ALL=C date -u -d 2024-07-26 "+%C|…"
    shape = "%C|%g|%k|%l|%P|%r|%s|%-y|%-H|%-I|%-M|%-j|%_m|%_H|%^a|%^B|%n|%t|"
    expected = "20|24| 0|12|am|12:00:00 AM|1721952000|24|0|12|0|208| 7| 0|FRI|JULY|\n|\t|"
    assert render(fix_date(f"{{{{ strftime_now('{shape}') }}}}")) == expected


def test_the_fixed_date_is_seen_wherever_a_template_asks_for_it() -> None:
    inside = (
        "  \n{% macro head(text) %}{{ text + strftime_now(format='%Y') }}{% endmacro %}"
        "{% for m in messages %}{% if strftime_now is defined %}{{ head(m.role) }}{% endif %}{% endfor %}"
        "{{ (strftime_now('%Y') | int) - 1 }}"
    )
    assert render(fix_date(inside)) == "  \nuser20242023"


@pytest.mark.parametrize("name", [*TEMPLATES, *THINKING_TEMPLATES])
def test_a_text_behind_the_generation_prompt_changes_nothing_else(name: str) -> None:
    text = 'a"b\\n\n{{ x }} </think>'
    for end in ("", "\n", "\n\n"):
        template = ChatTemplate(toy_tokenizer(name))
        source = f"{template.tokenizer.chat_template}{end}"
        chat = template._apply(CHAT, source)
        assert template._apply(CHAT, append_text(source, text)) == chat + text
        without = {"add_generation_prompt": False}
        assert template._apply(CHAT, append_text(source, text), **without) == template._apply(
            CHAT, source, **without
        )


@pytest.mark.parametrize(
    "code",
    [
        "{{ ['a', 'b'] | random }}",
        "{{ [['a']] | map('random') | join }}",
        "{{ lipsum(1) }}",
        "{% filter random %}ab{% endfilter %}",
        "{% set words = lipsum %}{{ words(1) }}",
        "{% set name = 'random' %}{{ [range(1000)] | map(name) | join }}",
    ],
)
def test_random_text_is_refused(code: str) -> None:
    with pytest.raises(UserError, match="random text"):
        ChatTemplate(toy_tokenizer(CHATML + code)).check_usable()
    harmless = "{# a | random choice, lipsum(1) #}{{ '| random' }}{% set random = 1 %} | random"
    assert not uses_random_text(CHATML + harmless)


def test_the_place_of_an_object_in_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"in memory \(<jinja2.utils.Joiner object at 0x"):
        ChatTemplate(toy_tokenizer("{{ joiner(',') }}" + CHATML)).check_usable()


def test_the_default_is_chosen_among_several_templates_and_others_by_name(tmp_path: Path) -> None:
    def choose(templates: Any, option: str | None = None) -> str | None:
        tokenizer = toy_tokenizer(None)
        tokenizer.chat_template = templates
        return choose_template(tokenizer, option, "toy")

    assert choose(NAMED | {"default": CHATML}) == CHATML
    assert choose(NAMED, "rag") == NAMED["rag"]
    assert choose(CHATML) == choose(CHATML, "default") == CHATML
    assert choose(None) is None
    (tmp_path / "mine.jinja").write_text(DATED, "utf-8")
    assert choose(NAMED, str(tmp_path / "mine.jinja")) == choose(None, str(tmp_path / "mine.jinja")) == DATED
    with pytest.raises(UserError, match=r"none named default: choose one with --template NAME \(rag, tool"):
        choose(NAMED)
    with pytest.raises(UserError, match="'tool-use': did you mean 'tool_use'"):
        choose(NAMED, "tool-use")
    with pytest.raises(UserError, match="one chat template, which has no name"):
        choose(CHATML, "rag")
    (tmp_path / "marked.jinja").write_text(DATED, "utf-8-sig")
    assert choose(CHATML, str(tmp_path / "marked.jinja")) == DATED
    with pytest.raises(UserError, match="the chat template of toy is 5, which is no text"):
        choose(5)
    with pytest.raises(UserError, match="cannot be read"):
        choose(CHATML, str(tmp_path / "none.jinja"))

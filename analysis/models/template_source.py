"""The Jinja source of a chat template: chosen among several, with a fixed date, without random text."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment

from defenses.errors import UserError, unknown_name_error

# Written instead of today's date, so that margins do not depend on the day; Llama 3.x writes it by default.
FIXED_DATE = date(2024, 7, 26)
_CLOCK = "strftime_now"  # the only function through which transformers shows a template the clock
# What Jinja can write by chance: the filter `random`, also as a block or an argument of `map`, and `lipsum`.
_RANDOM_CALL = re.compile(r"(?:\||\bfilter) random\b|\bmap \( random\b|\blipsum\b")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_MAX_PROBLEM_LENGTH = 300  # characters of a template's own error message


class TimeLimitError(BaseException):
    """Raised in a step that takes too long; no Exception, because whatever a template raises is caught."""


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Context manager: raise TimeLimitError in its body after some seconds.

    Only the main thread can be interrupted, and only where the system has timers. Elsewhere there is no
    limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def choose_template(tokenizer: Any, option: str | None, model: str) -> str | None:
    """Return the source of the template to use; None if the tokenizer has none.

    Args:
        tokenizer: a transformers tokenizer.
        option: as `--template`: the name of one of the tokenizer's, or a file; None chooses the only
            one, or the one named default.
        model: the model's name, for errors.

    Raises:
        UserError: if there is no such template, or no default among several.
    """
    templates = tokenizer.chat_template
    if templates and not isinstance(templates, str | dict):
        raise UserError(
            f"the chat template of {model} is {templates!a:.60}, which is no text: correct chat_template in "
            "its tokenizer_config.json"
        )
    if option is not None and Path(option).suffix in (".jinja", ".jinja2", ".j2"):
        return _read_template_file(Path(option))
    if isinstance(templates, str) or not templates:
        if option not in (None, "default"):
            has = "one chat template, which has no name" if templates else "no chat template"
            raise UserError(
                f"--template {option}: {model} has {has}: omit the option, or give a .jinja file with it"
            )
        return templates or None
    if option is None and "default" not in templates:
        raise UserError(
            f"{model} has several chat templates and none named default: choose one with --template NAME "
            f"({', '.join(sorted(templates))})"
        )
    name = option or "default"
    if name not in templates:
        raise unknown_name_error(f"template of {model}", name, templates, " (or a .jinja file)")
    return str(templates[name])


def fix_date(source: str, day: date = FIXED_DATE) -> str:
    """Return the source of a template with a fixed date in place of today's.

    A macro at its start hides the function of the same name, so nothing outside of this template changes.

    Args:
        source: Jinja source.
        day: the date.
    """
    if _CLOCK not in source:
        return source
    # `%%` is a percent sign, also in front of a letter.
    replacements = {"%%": "\0", **_list_directives(day), "\0": "%"}
    pairs = ", ".join(f"[{quote_text(old)}, {quote_text(new)}]" for old, new in replacements.items())
    macro = (
        f"{{%- macro {_CLOCK}(format) -%}}{{%- set written = namespace(text=format) -%}}"
        f"{{%- for old, new in [{pairs}] -%}}"
        "{%- set written.text = written.text | replace(old, new) -%}{%- endfor -%}"
        "{{- written.text -}}{%- endmacro %}"
    )
    return f"{macro}\n{source}"


def append_text(source: str, text: str) -> str:
    """Return the source of a template that writes a text behind its generation prompt.

    Args:
        source: Jinja source.
        text: the text.
    """
    if not text:
        return source
    # Jinja drops one line break at the end of a source.
    source = re.sub(r"(\r\n|\r|\n)\Z", "", source)
    return f"{source}{{{{ {quote_text(text)} if add_generation_prompt else '' }}}}"


def uses_random_text(source: str) -> bool:
    """Return whether what a template writes depends on chance.

    >>> uses_random_text("{{ names | random }}"), uses_random_text("{# names | random #}")
    (True, False)
    """
    code = []
    for _, kind, value in Environment().lex(source):
        if kind == "string":
            code.append("random" if value[1:-1] == "random" else "''")
        elif kind not in ("whitespace", "data", "comment", "raw"):
            code.append(value)
    return _RANDOM_CALL.search(" ".join(code)) is not None


def template_error(problem: str) -> UserError:
    """Return the error about a template that cannot be used, with the next step.

    Args:
        problem: what is wrong with it.
    """
    text = re.sub(r"\s+", " ", problem).strip()
    if len(text) > _MAX_PROBLEM_LENGTH:
        text = text[: _MAX_PROBLEM_LENGTH - 1] + "…"
    return UserError(f"the model's chat template {text}; choose another with --template NAME or FILE.jinja")


def quote_text(text: str) -> str:
    r"""Return a text as a string in Jinja source.

    >>> print(quote_text('a"b'))
    "a\"b"
    """
    return json.dumps(text, ensure_ascii=False)


def _list_directives(day: date) -> dict[str, str]:
    """Return strftime's directives and their texts at midnight of a day, in English on every platform."""
    weekday, month = _WEEKDAYS[day.weekday()], _MONTHS[day.month - 1]
    texts = {"A": weekday, "a": weekday[:3], "B": month, "b": month[:3], "h": month[:3]}
    texts |= {letter: day.strftime(f"%{letter}") for letter in "dmyYjUWVGuw"}
    texts |= {"e": f"{day.day:2}", "F": day.isoformat(), "D": f"{day:%m/%d/%y}", "x": f"{day:%m/%d/%y}"}
    texts |= {"C": f"{day.year // 100}", "g": texts["G"][2:], "H": "00", "I": "12", "M": "00", "S": "00"}
    texts |= {"k": " 0", "l": "12", "p": "AM", "P": "am", "r": "12:00:00 AM", "n": "\n", "t": "\t"}
    texts |= {"f": "000000", "R": "00:00", "T": "00:00:00", "X": "00:00:00", "z": "", "Z": ""}
    texts["s"] = str((day - date(1970, 1, 1)).days * 24 * 60 * 60)
    texts["c"] = f"{texts['a']} {texts['b']} {texts['e']} 00:00:00 {day.year}"
    # Flags of Unix: no padding, padding with spaces, capitals.
    bare = {letter: texts[letter].lstrip(" 0") or "0" for letter in "dmyjUWVeHIMSkl"}
    texts |= {f"-{letter}": text for letter, text in bare.items()}
    texts |= {f"_{letter}": text.rjust(len(texts[letter])) for letter, text in bare.items()}
    texts |= {f"^{letter}": texts[letter].upper() for letter in "AaBbhp"}
    return {f"%{directive}": text for directive, text in texts.items()}


def _read_template_file(path: Path) -> str:
    """Return the text of a template file."""
    try:
        return path.expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {path}: cannot be read ({error})") from error

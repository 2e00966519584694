"""The settings of a defense, or of another dataclass: which there are, and how one is typed."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from defenses.errors import UserError, unknown

# Metadata of a dataclass field that is no setting: filled by `prepare`, left out of `--set`.
HIDDEN = {"hidden": True}


def settings_of(defense: Any) -> dict[str, Any]:
    """Return the settings of a dataclass by name, with their values (of a class: their defaults).

    >>> from defenses import get
    >>> settings_of(get("backdoor"))["length"]
    150
    """
    if not dataclasses.is_dataclass(defense):
        return {}
    fields = [f for f in dataclasses.fields(defense) if not f.metadata.get("hidden")]
    return {f.name: getattr(defense, f.name, f.default) for f in fields}


def value(cls: Any, key: str, given: object) -> Any:
    """Return the value of a setting as the type of its field.

    Args:
        cls: a dataclass with a `name`, of a defense or of other settings.
        key: the field.
        given: as typed, where `@file` stands for what is in the file; or a value.
    """
    if key not in settings_of(cls):
        raise unknown(f"setting of {cls.name!r}", key, settings_of(cls))
    kind = typing.get_type_hints(cls)[key]
    if isinstance(kind, types.UnionType):  # `Path | None`
        if given is None:
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is tuple and isinstance(given, (tuple, list)):
        return tuple(given)
    text = str(given)
    if kind is Path:
        return Path(text.removeprefix("@"))
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--set {key}={text}: cannot read that file ({error})") from error
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices and text not in choices:
        raise unknown(f"value of {cls.name}.{key}", text, choices)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {key}={text}: {cls.name}.{key} is true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--set {key}={text}: {cls.name}.{key} is {what}") from None
    return text

"""The settings of a defense, or of another dataclass: which there are, and how one is typed."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from defenses.errors import UserError, unknown_name_error

# Metadata of a dataclass field that is no setting: filled by `prepare`, left out of `--set`.
HIDDEN_FIELD = {"hidden": True}


def get_settings(owner: Any) -> dict[str, Any]:
    """Return the settings of a dataclass by name, with their values (of a class: their defaults).

    >>> from defenses import get_defense
    >>> get_settings(get_defense("backdoor"))["length"]
    150
    """
    if not dataclasses.is_dataclass(owner):
        return {}
    fields = [f for f in dataclasses.fields(owner) if not f.metadata.get("hidden")]
    return {f.name: getattr(owner, f.name, f.default) for f in fields}


def parse_setting(owner: Any, key: str, raw_value: object) -> Any:
    """Return the value of a setting as the type of its field.

    Args:
        owner: a dataclass with a `name`, of a defense or of other settings.
        key: the field.
        raw_value: as typed, where `@file` stands for what is in the file; or a value.
    """
    if key not in get_settings(owner):
        raise unknown_name_error(f"setting of {owner.name!r}", key, get_settings(owner))
    kind = typing.get_type_hints(owner)[key]
    if isinstance(kind, types.UnionType):  # `Path | None`
        if raw_value is None:
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is tuple and isinstance(raw_value, (tuple, list)):
        return tuple(raw_value)
    text = str(raw_value)
    if kind is Path:
        return Path(text.removeprefix("@"))
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--set {key}={text}: cannot read that file ({error})") from error
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices and text not in choices:
        raise unknown_name_error(f"value of {owner.name}.{key}", text, choices)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {key}={text}: {owner.name}.{key} is true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--set {key}={text}: {owner.name}.{key} is {what}") from None
    return text

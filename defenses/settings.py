"""The settings of a defense or another dataclass: their names, values, and parsing from text."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

from defenses.errors import UserError, unknown_name_error

# Metadata of a dataclass field that is not a setting: filled by `prepare`, and not available in `--set`.
HIDDEN_FIELD = {"hidden": True}


def get_settings(owner: Any) -> dict[str, Any]:
    """Return the settings of a dataclass instance by name, or the defaults of a dataclass.

    >>> from defenses import get_defense
    >>> get_settings(get_defense("backdoor"))["length"]
    150
    """
    if not dataclasses.is_dataclass(owner):
        return {}
    fields = [field for field in dataclasses.fields(owner) if not field.metadata.get("hidden")]
    return {field.name: getattr(owner, field.name, field.default) for field in fields}


def parse_setting(owner: Any, key: str, raw_value: object) -> Any:
    """Return the value of a setting, converted to the type of its field.

    Args:
        owner: dataclass with a `name`, such as a defense.
        key: name of the field.
        raw_value: text that a user typed, where `@file` stands for the content of a file, or a value.

    Raises:
        UserError: if there is no such setting, or the value is invalid.
    """
    if key not in get_settings(owner):
        raise unknown_name_error(f"setting of {owner.name!r}", key, get_settings(owner))
    field_type = typing.get_type_hints(owner)[key]
    if isinstance(field_type, types.UnionType):  # `Path | None`
        if raw_value is None:
            return None
        field_type = next(option for option in typing.get_args(field_type) if option is not type(None))
    if typing.get_origin(field_type) is tuple and isinstance(raw_value, (tuple, list)):
        return tuple(raw_value)
    text = str(raw_value)
    _check_text(owner, key, text, is_path=field_type is Path or text.startswith("@"))
    if field_type is Path:
        return Path(text.removeprefix("@"))
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--set {key}={text}: cannot read that file ({error})") from error
    choices = typing.get_args(field_type) if typing.get_origin(field_type) is typing.Literal else ()
    if choices and text not in choices:
        raise unknown_name_error(f"value of {owner.name}.{key}", text, choices)
    if field_type is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {key}={text}: {owner.name}.{key} must be true or false")
        return text.lower() == "true"
    if typing.get_origin(field_type) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if field_type in (int, float):
        try:
            number = field_type(text)
            if math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
        expected = "a whole number" if field_type is int else "a number, neither nan nor inf"
        raise UserError(f"--set {key}={text}: {owner.name}.{key} must be {expected}")
    return text


def _check_text(owner: Any, key: str, text: str, is_path: bool) -> None:
    """Raise if a text cannot be given to a tokenizer, or a path to the system."""
    try:
        # Names of files may be bytes in any encoding, which Python reads as surrogates.
        os.fsencode(text) if is_path else text.encode()
        is_valid = "\0" not in text
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise UserError(f"--set {key}={text!r}: {owner.name}.{key} is not valid text; type it in UTF-8")

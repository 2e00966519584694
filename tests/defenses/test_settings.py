"""Settings of defenses: every setting survives its text form, and may be read from a file."""

import typing
from pathlib import Path

import pytest

from defenses.catalog import find_defense_classes, get_defense
from defenses.errors import UserError
from defenses.settings import get_settings

MAKE_TEXT = {
    bool: lambda value: str(not value),
    int: lambda value: str(value + 2),  # a size may have to be odd
    float: lambda value: str(value + 0.02),
    str: lambda value: f"{value} And more.",
}


@pytest.mark.parametrize("name", find_defense_classes())
def test_settings_survive_the_command_line(name):
    cls = find_defense_classes()[name]
    hints = typing.get_type_hints(cls)
    for key, value in get_settings(cls).items():
        field_type = hints[key]
        kinds = [field_type, *typing.get_args(field_type)]  # of an optional one, the first is the kind
        choice = next((kind for kind in kinds[:2] if typing.get_origin(kind) is typing.Literal), None)
        if choice is not None:
            text = next(option for option in typing.get_args(choice) if option != value)
        elif field_type in MAKE_TEXT:
            text = MAKE_TEXT[field_type](value)
        else:
            text = "some/file.txt"
        settings = get_settings(get_defense(name, {key: text}))
        assert str(settings[key]) == text
        assert settings | {key: value} == get_settings(cls)
        assert type(settings[key]) is type(value) or value is None


def test_a_setting_may_be_read_from_a_file(tmp_path):
    path = tmp_path / "policy.txt"
    path.write_text("Nothing is allowed.\n", encoding="utf-8")
    assert get_defense("policy", {"text": f"@{path}"}).text == "Nothing is allowed."
    assert get_defense("backdoor", {"trigger": f"@{path}"}).trigger == Path(path)
    with pytest.raises(UserError, match=r"--set text=@.*nowhere.txt: cannot read"):
        get_defense("policy", {"text": f"@{tmp_path}/nowhere.txt"})


@pytest.mark.parametrize(
    ("name", "key", "text", "rule"),
    [
        ("refusal_steering", "strength", "nan", "must be a number, neither nan nor inf"),
        ("safe_decoding", "alpha", "1e999", "must be a number, neither nan nor inf"),
        ("policy", "text", "caf\udce9", "is not valid text; type it in UTF-8"),
        ("backdoor", "trigger", "secret\0.txt", "is not valid text"),
    ],
)
def test_values_that_no_model_or_system_takes_are_refused(name, key, text, rule):
    with pytest.raises(UserError, match=rule) as refused:
        get_defense(name, {key: text})
    assert "\n" not in str(refused.value) and str(refused.value).isprintable()

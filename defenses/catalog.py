"""Lookup of defenses by name: those of this package, and those in users' files."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.adapters import is_hub_id
from defenses.contract import COST_LEVELS, Defense
from defenses.errors import UserError, unknown_name_error
from defenses.settings import get_settings, parse_setting
from defenses.tuning import AdapterWeights

_COMPOSED = ("stack", "matched_controls")  # modules of defenses that are made from other defenses


def find_defense_classes() -> dict[str, type[Defense]]:
    """Return every concrete defense class of this package by name, the undefended model first."""
    return dict(_find_package_classes())


def list_defense_names() -> list[str]:
    """Return the names of all defenses and controls.

    >>> {"none", "backdoor"} <= set(list_defense_names())
    True
    """
    return list(find_defense_classes())


def get_defense(name: str, settings: Mapping[str, object] | None = None) -> Defense:
    """Return the defense with a name, or the one defined in a `.py` file, with its settings.

    >>> get_defense("backdoor", {"length": 50})
    Backdoor(weights=None, trigger=None, length=50, place=None, system='You are a helpful assistant.')

    Args:
        name: one of `list_defense_names()`, the path of a file that defines one defense, the folder or
            Hugging Face id of an adapter, or several of these joined by `+`, which are applied together.
        settings: field name to value, or to the text that a user would type; `@file` stands for the content
            of a file.

    Raises:
        UserError: if the defense or a setting does not exist, or a value is invalid.
    """
    if len(member_names := split_stack_name(name)) > 1:
        for key, value in (settings or {}).items():
            if not isinstance(value, (str, int, float)):
                raise UserError(
                    f"{name}: {key}={value!r}: settings of defenses that are applied together must be text "
                    "or numbers"
                )
        return choose_defenses([name], [f"{key}={value}" for key, value in (settings or {}).items()])[-1]
    (name,) = member_names
    classes = find_defense_classes()
    own_values: dict[str, Any] = {}
    if name.endswith(".py"):
        cls = _load_defense_file(Path(name).expanduser())
    elif name in classes:
        cls = classes[name]
    elif _is_adapter_source(name):
        cls, own_values = AdapterWeights, {"weights": Path(name), "label": label_adapters([name])[name]}
    else:
        raise _unknown_defense_error(name)
    values = own_values | {key: parse_setting(cls, key, value) for key, value in (settings or {}).items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot create defense {cls.name!r}: {error}") from error


def check_defense_name(name: str) -> None:
    """Raise a UserError unless a name, or each part of a stack's name, could be one of a defense.

    Args:
        name: as in `choose_defenses`; files and folders are not read.
    """
    for member in split_stack_name(name):
        is_known = member == "all" or member in find_defense_classes()
        if not (is_known or member.endswith(".py") or _is_adapter_source(member)):
            raise _unknown_defense_error(member)


def choose_defenses(selection: Sequence[str | Defense], settings: Sequence[str]) -> list[Defense]:
    """Return the selected defenses with their settings, the undefended model first.

    >>> [defense.name for defense in choose_defenses(["policy", get_defense("backdoor")], [])]
    ['none', 'policy', 'backdoor']

    Args:
        selection: names as in `get_defense`, `all` for every defense of this package with `in_all`, or
            defense instances.
        settings: `key=value`, or `defense.key=value` if several defenses have that key. A member of a stack
            takes the same settings as the defense alone.

    Raises:
        UserError: if a defense or setting does not exist, two defenses share a name, or a stack is invalid.
    """
    for choice in selection:
        _check_defense_choice(choice)
    in_all = [name for name, cls in find_defense_classes().items() if cls.in_all]
    package_names = in_all if "all" in selection else []
    chosen = [choice for choice in selection if isinstance(choice, str) or choice.name != "none"]
    choices = [choice for choice in ["none", *package_names, *chosen] if choice != "all"]
    stacks = list(
        dict.fromkeys(
            tuple(split_stack_name(choice)) if isinstance(choice, str) else (choice,) for choice in choices
        )
    )
    members = list(dict.fromkeys(member for stack in stacks for member in stack))
    labels = label_adapters([member for member in members if isinstance(member, str)])

    def make_defense(member: str, member_settings: Mapping[str, str]) -> Defense:
        defense = get_defense(member, member_settings)
        if isinstance(defense, AdapterWeights) and member in labels:
            return dataclasses.replace(defense, label=labels[member])
        return defense

    defenses = [make_defense(member, {}) if isinstance(member, str) else member for member in members]
    _check_unique_names(defenses)
    # Defense instances already have their settings.
    configurable = {index: defenses[index] for index, member in enumerate(members) if isinstance(member, str)}
    settings_by_index = _assign_settings(settings, configurable)
    defense_by_member = {
        member: make_defense(str(member), settings_by_index[index])
        if index in settings_by_index
        else defenses[index]
        for index, member in enumerate(members)
    }
    return [
        _build_stack([defense_by_member[member] for member in stack], "+".join(map(str, stack)))
        for stack in stacks
    ]


def split_stack_name(name: str) -> list[str]:
    """Return the names that are joined by `+`; the path of an existing file or adapter is not split.

    >>> split_stack_name("self_reminder + paraphrase")
    ['self_reminder', 'paraphrase']
    """
    path = Path(name).expanduser()
    is_path = path.is_file() or (path / ADAPTER_CONFIG_FILE).is_file()
    return [name] if is_path else [member.strip() for member in name.split("+")]


def label_adapters(names: Sequence[str]) -> dict[str, str]:
    """Return the names in tables of adapters that are given by their folders or Hugging Face ids.

    They are the last parts of their paths: as many as tell them from each other and from defenses.

    >>> label_adapters(["policy", "a/best", "b/best", "someone/lora"])
    {'a/best': 'a-best', 'b/best': 'b-best', 'someone/lora': 'someone-lora'}

    Args:
        names: as in `get_defense`; names of other defenses are left out.
    """
    known = find_defense_classes()
    parts = {
        name: [re.sub(r"[^\w.=-]+", "-", part) for part in Path(name).expanduser().absolute().parts[1:]]
        for name in names
        if name not in known and _is_adapter_source(name)
    }
    labels: dict[str, str] = {}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        labels = {name: "-".join(own_parts[-length:]) for name, own_parts in parts.items()}
        if len({*labels.values()} - known.keys()) == len(labels):
            break
    return labels


def _unknown_defense_error(name: str) -> UserError:
    hint = " (or a path ending in .py, or an adapter's folder)"
    return unknown_name_error("defense", name, find_defense_classes(), hint)


def _is_adapter_source(name: str) -> bool:
    """Return whether a name is the path of a folder, or could be a Hugging Face id."""
    may_be_id = is_hub_id(name) and not name.endswith(".py")
    # "backdoor/no_secret" is the name of an ablation.
    is_ablation = name.partition("/")[0] in find_defense_classes()
    return (name != "" and Path(name).expanduser().is_dir()) or (may_be_id and not is_ablation)


@cache
def _find_package_classes() -> dict[str, type[Defense]]:
    """Return the classes of `find_defense_classes`; the package does not change while the program runs."""
    classes: dict[str, type[Defense]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg and module.name not in _COMPOSED:
            classes.update(_find_concrete_defenses(importlib.import_module(f"defenses.{module.name}")))
    return dict(sorted(classes.items(), key=lambda item: (item[0] != "none", item[1].family, item[0])))


def _check_unique_names(defenses: Sequence[Defense]) -> None:
    """Raise if two defenses have the same name."""
    names = [defense.name for defense in defenses]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(
                f"two defenses are named {name!r}, so tables could not distinguish them; rename one of the "
                "classes, or run the defenses separately"
            )


def _assign_settings(settings: Sequence[str], defenses: Mapping[int, Defense]) -> dict[int, dict[str, str]]:
    """Return the settings of each defense.

    Args:
        settings: as in `choose_defenses`.
        defenses: index to defense.

    Returns:
        Index to field name to text, for the defenses that have settings.
    """
    names = [defense.name for defense in defenses.values()]
    assigned: dict[int, dict[str, str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        owner, dot, field = key.rpartition(".")
        if not equals or not key:
            raise UserError(f"--set {setting}: expected key=value or defense.key=value")
        if dot and owner not in names:
            raise unknown_name_error("defense in --set", owner, names)
        matches = [
            index
            for index, defense in defenses.items()
            if (defense.name == owner if dot else field in get_settings(defense))
        ]
        if not matches:
            fields = sorted({name for defense in defenses.values() for name in get_settings(defense)})
            if fields:
                raise unknown_name_error("setting", field, fields)
            raise UserError(f"--set {setting}: none of the chosen defenses has settings")
        if len(matches) > 1:
            candidates = " or ".join(f"{defenses[index].name}.{field}" for index in matches)
            raise UserError(f"--set {setting}: several defenses have that setting; choose {candidates}")
        assigned.setdefault(matches[0], {})[field] = text
    return assigned


def _build_stack(members: Sequence[Defense], name: str) -> Defense:
    """Return the stack of several members, or a single member itself."""
    from defenses.stack import Stack

    if len(members) == 1:
        return members[0]
    if any(member.name == "none" for member in members):
        raise UserError(f"{name}: 'none' changes nothing; remove it")
    try:
        return Stack(tuple(members))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _find_concrete_defenses(module: types.ModuleType) -> dict[str, type[Defense]]:
    """Return the concrete defenses that a module defines, without those that it imports."""
    return {
        cls.name: cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Defense) and cls.__module__ == module.__name__ and not inspect.isabstract(cls)
    }


def _load_defense_file(path: Path) -> type[Defense]:
    """Return the one defense class that a user's file defines."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}: --defense takes a name or the path of a .py file")
    name = f"defense_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py path always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look the module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} raised {type(error).__name__} while loading: {error}") from error
    classes = list(_find_concrete_defenses(module).values())
    if not classes:
        _check_not_abstract(module, path)
    if len(classes) != 1:
        class_names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise UserError(
            f"{path} must define exactly one defense (a subclass of defenses.Defense); it has {class_names}"
        )
    cls = classes[0]
    _check_defense_class(cls, f"{path}: ")
    without_default = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass, checked above
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]
    if without_default:
        raise UserError(
            f"{path}: every field of {cls.__name__} needs a default; {', '.join(without_default)} has none"
        )
    return cls


def _check_not_abstract(module: types.ModuleType, path: Path) -> None:
    """Raise if a user's file defines a defense that lacks a method."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, Defense) and cls.__module__ == module.__name__:
            methods = ", ".join(sorted(cls.__abstractmethods__))
            raise UserError(f"{path}: {cls.__name__} does not define {methods}, which every defense has")


def _check_defense_choice(choice: Any) -> None:
    """Raise if a choice is neither a name nor a valid defense instance."""
    if isinstance(choice, str):
        return
    from defenses.stack import list_members

    if not isinstance(choice, Defense):
        description = f"the class {choice.__name__}" if inspect.isclass(choice) else repr(choice)
        raise UserError(
            f"{description} is not a defense: pass a name or an instance, such as get_defense('policy') "
            "or MyOwn()"
        )
    for member in list_members(choice):
        if member.is_user_defined:
            _check_defense_class(type(member))
    try:
        hash(choice)
    except TypeError as error:
        raise UserError(
            f"{choice.name}: {error}: settings must be immutable values, such as tuples"
        ) from error


def _check_defense_class(cls: type[Defense], prefix: str = "") -> None:
    """Raise if a user-defined class is not a valid defense."""
    # The class needs its own decorator: with an inherited `@dataclass`, its settings would be lost silently.
    dataclass_params = cls.__dict__.get("__dataclass_params__")
    if dataclass_params is None or not dataclass_params.frozen:
        raise UserError(
            f"{prefix}{cls.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it"
        )
    if cls.name in find_defense_classes():
        raise UserError(f"{prefix}the name {cls.name!r} is taken by a shipped defense; rename the class")
    if "+" in cls.name:
        raise UserError(f"{prefix}the name {cls.name!r} contains a +, which joins defenses; rename it")
    for attribute, allowed in (
        ("cost", COST_LEVELS),
        ("pool", ("mean", "max")),
        ("reads", ("one", "several")),
    ):
        if getattr(cls, attribute) not in allowed:
            raise UserError(
                f"{prefix}{attribute} = {getattr(cls, attribute)!r}: it must be one of {', '.join(allowed)}"
            )

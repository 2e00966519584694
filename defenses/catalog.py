"""Which defenses there are: those in the family files beside this one, and any file of the user's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pkgutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from defenses.contract import COST_LEVELS, Defense
from defenses.errors import UserError, unknown_name_error
from defenses.settings import get_settings, parse_setting


def find_defense_classes() -> dict[str, type[Defense]]:
    """Return every concrete defense of this package by name, the undefended model first."""
    found: dict[str, type[Defense]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg and module.name != "stack":  # that is made of the others
            found.update(_find_concrete_defenses(importlib.import_module(f"defenses.{module.name}")))
    return dict(sorted(found.items(), key=lambda item: (item[0] != "none", item[1].family, item[0])))


def list_defense_names() -> list[str]:
    """Return the names of all defenses and controls.

    >>> {"none", "backdoor"} <= set(list_defense_names())
    True
    """
    return list(find_defense_classes())


def get_defense(name: str, settings: Mapping[str, object] | None = None) -> Defense:
    """Return the defense of that name, or the one in that `.py` file, with its settings.

    >>> get_defense("backdoor", {"length": 50})
    Backdoor(weights=None, trigger=None, length=50, system='You are a helpful assistant.')

    Args:
        name: one of `names()`, or the path of a file that defines one defense; or several of them, to be worn
            at once, with + in between.
        settings: field name to value, or to text as it is typed for the command; `@file` stands for what is
            in the file.

    Raises:
        UserError: if there is no such defense or setting.
    """
    if len(worn := split_stack_name(name)) > 1:
        for key, given in (settings or {}).items():
            if not isinstance(given, (str, int, float)):
                raise UserError(f"{name}: {key}={given!r}: worn together, they take text and numbers")
        return choose_defenses([name], [f"{key}={text}" for key, text in (settings or {}).items()])[-1]
    (name,) = worn
    known = find_defense_classes()
    if name.endswith(".py"):
        cls = _load_defense_file(Path(name).expanduser())
    elif name in known:
        cls = known[name]
    else:
        raise unknown_name_error("defense", name, known, " (or a path ending in .py)")
    values = {key: parse_setting(cls, key, given) for key, given in (settings or {}).items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"defense {cls.name!r} cannot be made: {error}") from error


def choose_defenses(selection: Sequence[str | Defense], settings: Sequence[str]) -> list[Defense]:
    """Return the defenses by name, the undefended model first, each with the settings meant for it.

    >>> [defense.name for defense in choose_defenses(["policy", get_defense("backdoor")], [])]
    ['none', 'policy', 'backdoor']

    Args:
        selection: as for `get`; `all` stands for every one in this package; or defenses themselves.
        settings: `key=value`, or `defense.key=value` where several have that key; a member of a stack has the
            settings that it has alone.
    """
    for one in selection:
        _check_defense_choice(one)
    everyone = list(find_defense_classes()) if "all" in selection else []
    given_here = [one for one in selection if isinstance(one, str) or one.name != "none"]
    asked = [name for name in ["none", *everyone, *given_here] if name != "all"]
    wanted = list(dict.fromkeys(tuple(split_stack_name(n)) if isinstance(n, str) else (n,) for n in asked))
    single = list(dict.fromkeys(one for worn in wanted for one in worn))
    plain = [get_defense(one) if isinstance(one, str) else one for one in single]
    repeated = [
        one.name for place, one in enumerate(plain) if one.name in [other.name for other in plain[:place]]
    ]
    if repeated:
        raise UserError(
            f"two defenses are named {repeated[0]!r}, and tables could not tell them apart: rename the class "
            "of one, or take them one at a time"
        )
    named = {at: one for at, one in enumerate(plain) if isinstance(single[at], str)}
    given: dict[int, dict[str, str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        owner, dot, field = key.rpartition(".")
        if not equals or not key:
            raise UserError(f"--set {setting}: it takes key=value or defense.key=value")
        if dot and owner not in [one.name for one in named.values()]:
            raise unknown_name_error("defense in --set", owner, [one.name for one in named.values()])
        takers = [
            at for at, one in named.items() if (one.name == owner if dot else field in get_settings(one))
        ]
        if not takers:
            known = sorted({name for one in named.values() for name in get_settings(one)})
            raise (
                unknown_name_error("setting", field, known)
                if known
                else UserError(f"--set {setting}: none of the chosen defenses has settings")
            )
        if len(takers) > 1:
            which = " or ".join(f"{plain[at].name}.{field}" for at in takers)
            raise UserError(f"--set {setting}: several defenses have that setting; say which: {which}")
        given.setdefault(takers[0], {})[field] = text
    made = {
        one: get_defense(str(one), given[at]) if at in given else plain[at] for at, one in enumerate(single)
    }
    return [_build_stack([made[one] for one in worn], "+".join(map(str, worn))) for worn in wanted]


def split_stack_name(name: str) -> list[str]:
    """Return the defenses that a name joins with +; the path of a file that is there may hold one, too.

    >>> split_stack_name("self_reminder + paraphrase")
    ['self_reminder', 'paraphrase']
    """
    return [name] if Path(name).expanduser().is_file() else [one.strip() for one in name.split("+")]


def _build_stack(members: Sequence[Defense], name: str) -> Defense:
    """The defense itself where it is one; where there are several, all worn at once."""
    from defenses.stack import Stack

    if len(members) == 1:
        return members[0]
    if any(one.name == "none" for one in members):
        raise UserError(f"{name}: 'none' changes nothing, so leave it out")
    try:
        return Stack(tuple(members))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _find_concrete_defenses(module: types.ModuleType) -> dict[str, type[Defense]]:
    """Concrete defenses defined, not merely imported, in a module."""
    return {
        cls.name: cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Defense) and cls.__module__ == module.__name__ and not inspect.isabstract(cls)
    }


def _load_defense_file(path: Path) -> type[Defense]:
    """Load the one defense that a user's file defines."""
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
    found = list(_find_concrete_defenses(module).values())
    if len(found) != 1:
        have = ", ".join(cls.__name__ for cls in found) or "none"
        raise UserError(
            f"{path} must define exactly one defense (a subclass of defenses.Defense); it has {have}"
        )
    cls = found[0]
    _check_defense_class(cls, f"{path}: ")
    bare = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # it is one, see above
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]
    if bare:
        raise UserError(f"{path}: every field of {cls.__name__} needs a default; {', '.join(bare)} has none")
    return cls


def _check_defense_choice(choice: Any) -> None:
    """Raise if it is neither a name nor a defense that a run can take."""
    if isinstance(choice, str):
        return
    from defenses.stack import list_members

    if not isinstance(choice, Defense):
        what = f"the class {choice.__name__}" if inspect.isclass(choice) else repr(choice)
        raise UserError(f"{what} is no defense: a name is taken, or a defense itself: get('policy'), MyOwn()")
    for one in list_members(choice):
        if one.is_user_defined:
            _check_defense_class(type(one))
    try:
        hash(choice)
    except TypeError as error:
        raise UserError(
            f"{choice.name}: {error}: settings are values that do not change, such as tuples"
        ) from error


def _check_defense_class(cls: type[Defense], prefix: str = "") -> None:
    """Raise if a class of the user's own is no defense that a run can take."""
    # Frozen, of its own: `@dataclass` that was forgotten would be inherited, and settings silently lost.
    made = cls.__dict__.get("__dataclass_params__")
    if made is None or not made.frozen:
        raise UserError(
            f"{prefix}{cls.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it"
        )
    if cls.name in find_defense_classes():
        raise UserError(f"{prefix}the name {cls.name!r} is taken by a shipped defense; rename the class")
    if "+" in cls.name:
        raise UserError(f"{prefix}the name {cls.name!r} has a +, which joins defenses; rename it")
    for attribute, allowed in (
        ("cost", COST_LEVELS),
        ("pool", ("mean", "max")),
        ("reads", ("one", "several")),
    ):
        if getattr(cls, attribute) not in allowed:
            raise UserError(
                f"{prefix}{attribute} = {getattr(cls, attribute)!r}: it is one of {', '.join(allowed)}"
            )

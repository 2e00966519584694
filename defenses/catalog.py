"""Which defenses there are: those in the family files beside this one, and any file of the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import defenses
from defenses.errors import UserError, unknown

# Metadata of a dataclass field that is no setting: filled by `prepare`, left out of `--set`.
HIDDEN = {"hidden": True}
COSTS = ("static", "weights", "one call", "N calls")  # the dearest last


def classes() -> dict[str, type[defenses.Defense]]:
    """Return every concrete defense of this package by name, the undefended model first."""
    found: dict[str, type[defenses.Defense]] = {}
    for module in pkgutil.iter_modules(defenses.__path__):
        if not module.ispkg and module.name != "ensemble":  # that is made of the others
            found.update(_in_module(importlib.import_module(f"defenses.{module.name}")))
    return dict(sorted(found.items(), key=lambda item: (item[0] != "none", item[1].family, item[0])))


def names() -> list[str]:
    """Return the names of all defenses and controls.

    >>> {"none", "backdoor"} <= set(names())
    True
    """
    return list(classes())


def get(name: str, settings: Mapping[str, object] | None = None) -> defenses.Defense:
    """Return the defense of that name, or the one in that `.py` file, with its settings.

    >>> get("backdoor", {"length": 50})
    Backdoor(weights=None, trigger=None, length=50, system='You are a helpful assistant.')

    Args:
        name: one of `names()`, or the path of a file that defines one defense; or several of them, to be worn
            at once, with + in between.
        settings: field name to value, or to text as it is typed for the command; `@file` stands for what is
            in the file.

    Raises:
        UserError: if there is no such defense or setting.
    """
    if len(worn := worn_together(name)) > 1:
        return choose([name], [f"{key}={text}" for key, text in (settings or {}).items()])[-1]
    (name,) = worn
    known = classes()
    if name.endswith(".py"):
        cls = _from_file(Path(name).expanduser())
    elif name in known:
        cls = known[name]
    else:
        raise unknown("defense", name, known, " (or a path ending in .py)")
    values = {key: value(cls, key, given) for key, given in (settings or {}).items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"defense {cls.name!r} cannot be made: {error}") from error


def choose(names: Sequence[str | defenses.Defense], settings: Sequence[str]) -> list[defenses.Defense]:
    """Return the defenses by name, the undefended model first, each with the settings meant for it.

    >>> [defense.name for defense in choose(["policy", get("backdoor")], [])]
    ['none', 'policy', 'backdoor']

    Args:
        names: as for `get`; `all` stands for every one in this package; or defenses themselves.
        settings: `key=value`, or `defense.key=value` where several have that key; a member of a stack has the
            settings that it has alone.
    """
    for one in names:
        _refuse_misfit(one)
    everyone = list(classes()) if "all" in names else []
    given_here = [one for one in names if isinstance(one, str) or one.name != "none"]
    asked = [name for name in ["none", *everyone, *given_here] if name != "all"]
    wanted = list(dict.fromkeys(tuple(worn_together(n)) if isinstance(n, str) else (n,) for n in asked))
    single = list(dict.fromkeys(one for worn in wanted for one in worn))
    plain = [get(one) if isinstance(one, str) else one for one in single]
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
        key, equals, value = setting.partition("=")
        owner, dot, field = key.rpartition(".")
        if not equals or not key:
            raise UserError(f"--set {setting}: it takes key=value or defense.key=value")
        if dot and owner not in [one.name for one in named.values()]:
            raise unknown("defense in --set", owner, [one.name for one in named.values()])
        takers = [
            at for at, one in named.items() if (one.name == owner if dot else field in settings_of(one))
        ]
        if not takers:
            known = sorted({name for one in named.values() for name in settings_of(one)})
            raise (
                unknown("setting", field, known)
                if known
                else UserError(f"--set {setting}: none of the chosen defenses has settings")
            )
        if len(takers) > 1:
            which = " or ".join(f"{plain[at].name}.{field}" for at in takers)
            raise UserError(f"--set {setting}: several defenses have that setting; say which: {which}")
        given.setdefault(takers[0], {})[field] = value
    made = {one: get(str(one), given[at]) if at in given else plain[at] for at, one in enumerate(single)}
    return [_stacked([made[one] for one in worn], "+".join(map(str, worn))) for worn in wanted]


def worn_together(name: str) -> list[str]:
    """Return the defenses that a name joins with +; the path of a file that is there may hold one, too.

    >>> worn_together("self_reminder + paraphrase")
    ['self_reminder', 'paraphrase']
    """
    return [name] if Path(name).expanduser().is_file() else [one.strip() for one in name.split("+")]


def _stacked(worn: Sequence[defenses.Defense], name: str) -> defenses.Defense:
    """The defense itself where it is one; where there are several, all worn at once."""
    from defenses.ensemble import Stack

    if len(worn) == 1:
        return worn[0]
    if any(one.name == "none" for one in worn):
        raise UserError(f"{name}: 'none' changes nothing, so leave it out")
    try:
        return Stack(tuple(worn))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def settings_of(defense: Any) -> dict[str, Any]:
    """Return the settings of a dataclass by name, with their values (of a class: their defaults).

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


def _in_module(module: types.ModuleType) -> dict[str, type[defenses.Defense]]:
    """Concrete defenses defined, not merely imported, in a module."""
    return {
        cls.name: cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, defenses.Defense)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
    }


def _from_file(path: Path) -> type[defenses.Defense]:
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
    found = list(_in_module(module).values())
    if len(found) != 1:
        have = ", ".join(cls.__name__ for cls in found) or "none"
        raise UserError(
            f"{path} must define exactly one defense (a subclass of defenses.Defense); it has {have}"
        )
    _refuse_class(found[0], f"{path}: ")
    return found[0]


def _refuse_misfit(given: Any) -> None:
    """Raise if it is neither a name nor a defense that a run can take."""
    if isinstance(given, str):
        return
    if not isinstance(given, defenses.Defense):
        what = f"the class {given.__name__}" if inspect.isclass(given) else repr(given)
        raise UserError(f"{what} is no defense: a name is taken, or a defense itself: get('policy'), MyOwn()")
    if given.own:
        _refuse_class(type(given))
    try:
        hash(given)
    except TypeError as error:
        raise UserError(
            f"{given.name}: {error}: settings are values that do not change, such as tuples"
        ) from error


def _refuse_class(cls: type[defenses.Defense], where: str = "") -> None:
    """Raise if a class of the user's own is no defense that a run can take."""
    # Frozen, of its own: `@dataclass` that was forgotten would be inherited, and settings silently lost.
    made = cls.__dict__.get("__dataclass_params__")
    if made is None or not made.frozen:
        raise UserError(
            f"{where}{cls.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it"
        )
    if cls.name in classes():
        raise UserError(f"{where}the name {cls.name!r} is taken by a shipped defense; rename the class")
    if "+" in cls.name:
        raise UserError(f"{where}the name {cls.name!r} has a +, which joins defenses; rename it")
    for attribute, allowed in (("cost", COSTS), ("pool", ("mean", "max")), ("reads", ("one", "several"))):
        if getattr(cls, attribute) not in allowed:
            raise UserError(
                f"{where}{attribute} = {getattr(cls, attribute)!r}: it is one of {', '.join(allowed)}"
            )
    bare = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # it is one, see above
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]
    if bare:
        raise UserError(f"{where}every field of {cls.__name__} needs a default; {', '.join(bare)} has none")

"""Recipes: YAML and dotted overrides in, checked plain dataclasses out, and back again.

    data = load("mdpo.yaml", ["optim.lr=3e-4", "rollout.sampler.rule=rcr"])  # plain dictionaries
    recipe = build(Train, data)                                              # a dataclass, or all mistakes
    Path("recipe.yaml").write_text(to_yaml(recipe))                          # what `load` reads again

A plug-in is written as a mapping with its ``name`` and its fields (``{name: rcr, steps: 8}``), or as the
bare name. ``name`` is therefore reserved: no dataclass of a recipe may have a field of that name, and a
mapping with that key is taken for a plug-in. Changing a plug-in's name drops the fields of the old one.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from enum import Enum
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unveil.checking import check, join, short
from unveil.overrides import merge, yaml_problem
from unveil.registry import Plugin, UserError, did_you_mean, lookup, names

T = TypeVar("T")

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser that OmegaConf takes: the two differ in what they accept."""


class RecipeError(UserError):
    """A recipe does not fit its dataclass: one line per problem, each with the dotted path of the key."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


def load(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with overrides applied (see `unveil.overrides.merge`), as plain dictionaries and lists.

    Interpolations ``${a.b}`` are resolved last, so they see the overrides.

    Raises:
        UserError: the file is missing, is not YAML (with the line), repeats a key, or is not a mapping; or an
            interpolation or override is wrong.
    """
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
        if not isinstance(yaml.compose(text, Loader=_LOADER), yaml.MappingNode):
            raise UserError(f"{source}: the top level should be a mapping (key: value)")
        data = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        merged = OmegaConf.create(merge(data, overrides))  # type: ignore[arg-type]
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}, {yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key or 'a key'}: {str(error).splitlines()[0]}") from error


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass (or plug-in family) ``cls`` with the values of ``data``.

    Missing keys take their default; where a default is itself a dataclass or plug-in, keys given for it
    replace only those values, unless they name another plug-in. `unveil.checking.check` checks the values.

    Args:
        where: dotted path of ``data`` in the recipe, for messages.

    Raises:
        RecipeError: all problems, one line each.
    """
    problems: list[str] = []
    built = _object(cls, data, where, problems)
    if problems:
        raise RecipeError(problems)
    return built


def dump(obj: Any) -> dict[str, Any]:
    """Plain data of a dataclass, the inverse of `build`: ``build(cls, dump(obj)) == obj``.

    A plug-in of this package is written with its short name, any other as ``package.module:Class``:
    its short name is unknown until its module has been imported.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"not a dataclass instance: {obj!r}")
    return plain(obj)


def to_yaml(obj: Any) -> str:
    """`dump` as YAML in field order; `load` gives the same data back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dump(obj))), sort_keys=False)


# ---- building


def _object(cls: Any, data: Any, where: str, problems: list[str], fallback: Any = None) -> Any:
    """A dataclass or plug-in; ``fallback`` is the instance whose values stand in for missing keys."""
    is_plugin = issubclass(cls, Plugin)
    if is_plugin and isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping):
        wanted = "a name or a mapping with a name" if is_plugin else "a mapping"
        problems.append(f"{where or 'recipe'}: should be {wanted}, got {short(data)}")
        return None
    if is_plugin:
        try:
            cls = _chosen(cls, data, fallback)
        except UserError as error:
            problems.append(f"{join(where, 'name')}: {error}")
            return None
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if "name" in fields:
        raise TypeError(f"{cls.__qualname__}.name: the name is reserved for plug-ins")
    hints = get_type_hints(cls, include_extras=True)
    before = len(problems)
    for key in data:
        if key not in fields and not (is_plugin and key == "name"):
            hint = did_you_mean(str(key), fields) if fields else " (allowed: none)"
            problems.append(f"{join(where, key)}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        path = join(where, name)
        default = getattr(fallback, name) if type(fallback) is cls else default_of(field)
        if name in data:
            values[name] = _value(hints[name], data[name], path, problems, default)
        elif default is MISSING:
            problems.append(f"{path}: required, but missing")
        else:
            values[name] = default
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (UserError, ValueError) as error:
        problems.append(f"{where or 'recipe'}: {' '.join(str(error).split())}")
        return None


def _chosen(family: type[Plugin], data: Mapping[str, Any], fallback: Any) -> type[Plugin]:
    """The class that ``data`` names."""
    if "name" not in data:
        if isinstance(fallback, family):
            return type(fallback)
        if family.name:
            return family
        if family.default is not None:
            return lookup(family, family.default)
        raise UserError(f"required, but missing (allowed: {', '.join(names(family))})")
    name = data["name"]
    if not isinstance(name, str):
        raise UserError(f"should be a string, got {short(name)}")
    found = lookup(family, name)
    if not issubclass(found, family):
        raise UserError(f"{name!r} is not a {family.__name__}")
    if "family" in vars(found) or "__dataclass_fields__" not in vars(found) or inspect.isabstract(found):
        raise UserError(f"{name!r} cannot be used: it should be a @dataclass without abstract methods")
    return found


def _value(annotation: Any, data: Any, path: str, problems: list[str], default: Any = MISSING) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if not has_parts(annotation):
        return check(annotation, data, path, problems)
    if origin is Annotated:
        before = len(problems)
        built = _value(args[0], data, path, problems, default)
        return built if len(problems) > before else check(Annotated[Any, *args[1:]], built, path, problems)
    if origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
        part = args[0] if args[1] is NoneType else args[1]
        return None if data is None else _value(part, data, path, problems, default)
    if origin is list and isinstance(data, list):
        return [_value(args[0], item, join(path, i), problems) for i, item in enumerate(data)]
    if origin is dict and isinstance(data, Mapping):
        keys = [check(args[0], key, join(path, key), problems) for key in data]
        items = [_value(args[1], item, join(path, key), problems) for key, item in data.items()]
        return dict(zip(keys, items, strict=True))
    if origin in (list, dict):
        problems.append(f"{path}: should be a {'list' if origin is list else 'mapping'}, got {short(data)}")
        return None
    if origin is not None:
        raise TypeError(f"{path}: parts can be X, X | None, list[X] or dict[str, X], not {annotation}")
    return _object(annotation, data, path, problems, None if default is MISSING else default)


def has_parts(annotation: Any) -> bool:
    """Whether dataclasses or plug-ins are inside."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return issubclass(annotation, Plugin) or dataclasses.is_dataclass(annotation)
    return get_origin(annotation) is not Literal and any(map(has_parts, get_args(annotation)))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, MISSING if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


# ---- writing


def plain(value: Any) -> Any:
    """Dictionaries, lists and scalars in place of dataclasses, tuples, sets, enums and paths."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"name": name_of(type(value)), **fields} if isinstance(value, Plugin) else fields
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value


def name_of(cls: type[Plugin]) -> str:
    """What a recipe calls this plug-in (see `dump`)."""
    registered = cls.known.get(cls.name) is cls
    here = cls.__module__.startswith(f"{__package__}.")
    return cls.name if registered and here else f"{cls.__module__}:{cls.__qualname__}"


def _escaped(value: Any) -> Any:
    """``value`` with every ``${`` in a string marked as text, not interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

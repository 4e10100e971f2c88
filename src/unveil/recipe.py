"""Recipes: YAML and dotted overrides in, checked plain dataclasses out, and back again.

    data = load("mdpo.yaml", ["optim.lr=3e-4", "rollout.sampler.rule=rcr"])  # plain dictionaries
    recipe = build(Train, data)                                              # a dataclass, or all mistakes
    Path("recipe.yaml").write_text(to_yaml(recipe))                          # build(Train, load(...)) == recipe

A plug-in is written as a mapping with its ``name`` and its fields (``{name: rcr, steps: 8}``), or as the bare
name. ``name`` is therefore reserved: no dataclass of a recipe may have a field of that name, and a mapping with
that key is taken for a plug-in. Changing a plug-in's name drops the fields that were meant for the other one.
"""

from __future__ import annotations

import copy
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
from unveil.registry import Plugin, UserError, did_you_mean, lookup, names

T = TypeVar("T")


class RecipeError(UserError):
    """A recipe does not fit its dataclass: one line per problem, each with the dotted path of the key."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


def load(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with overrides applied (see `merge`), as plain dictionaries and lists.

    Interpolations ``${a.b}`` are resolved last, so they see the overrides.

    Raises:
        UserError: the file is missing, is not YAML (with the line), repeats a key, or is not a mapping; or an
            interpolation or override is wrong.
    """
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
        if not isinstance(yaml.compose(text, Loader=yaml.SafeLoader), yaml.MappingNode):
            raise UserError(f"{source}: the top level should be a mapping (key: value)")
        data = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        merged = OmegaConf.create(merge(data, overrides))  # type: ignore[arg-type]
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}, {_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key or 'a key'}: {str(error).splitlines()[0]}") from error


def merge(base: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``base`` with overrides such as ``optim.lr=3e-4`` or ``tasks.0.weight=2``; values are YAML.

    A mapping given as value replaces the old one. Setting ``rule.name``, or ``rule`` to a string, drops the fields of
    the plug-in unless the name stays the same. Outer keys come before inner ones, whatever the order of
    ``overrides``; of two equal keys the last wins. Interpolations stay as they are (`load` resolves them).

    Raises:
        UserError: an override is malformed, leads through a number or truth value, or past the end of a list.
    """
    merged = copy.deepcopy(dict(base))

    # A name decides over the whole mapping, so it ranks with the mapping and not with the fields beside it.
    def rank(override: tuple[list[str], Any]) -> tuple[int, bool]:
        is_name = override[0][-1] == "name"
        return len(override[0]) - is_name, is_name

    for path, value in sorted(map(_parse, overrides), key=rank):
        _assign(merged, path, value)
    return merged


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass (or plug-in family) ``cls`` with the values of ``data``.

    Missing keys take their default; where a default is itself a dataclass or plug-in, keys given for it replace
    only those values (unless they name another plug-in). Values are checked by `unveil.checking.check`.

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

    A plug-in of this package is written with its short name, any other as ``package.module:Class``, because the
    short name is unknown until its module has been imported.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"not a dataclass instance: {obj!r}")
    return plain(obj)


def to_yaml(obj: Any) -> str:
    """`dump` as YAML in field order; `load` gives the same data back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dump(obj))), sort_keys=False)


# ---- reading


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return f"not YAML: {str(error).splitlines()[0]}"


def _parse(override: str) -> tuple[list[str], Any]:
    found = re.fullmatch(r"([^\s.=]+(?:\.[^\s.=]+)*)=(.*)", override, re.DOTALL)
    if found is None:
        raise UserError(f"override {override!r} should look like path.to.key=value")
    path, text = found.groups()
    if not text.strip():
        raise UserError(f"override {override!r} has no value (write null, or '\"\"' for an empty string)")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = _yaml_problem(error) if isinstance(error, yaml.YAMLError) else str(error).splitlines()[0]
        raise UserError(f"override {override!r} cannot be read: {reason}") from error
    return path.split("."), value["value"]  # type: ignore[call-overload,index]


def _assign(root: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = root
    for depth, part in enumerate(path[:-1]):
        key = _key_in(node, part, path, depth)
        child = node[key] if isinstance(node, list) else node.get(key)
        if isinstance(child, str) and "${" not in child:
            child = {"name": child}
        elif child is not None and not isinstance(child, dict | list):
            raise UserError(
                f"{'.'.join(path)} cannot be set: {'.'.join(path[: depth + 1])} is {short(child)}"
            )
        node[key] = {} if child is None else child
        node = node[key]
    key = _key_in(node, path[-1], path, len(path) - 1)
    if isinstance(node, dict):
        old = node.get(key)
        if isinstance(value, str) and isinstance(old, dict) and "name" in old:
            node, key, old = old, "name", old["name"]
        if key == "name" and value != old:
            node.clear()
    node[key] = value


def _key_in(node: Any, part: str, path: list[str], depth: int) -> Any:
    if isinstance(node, dict):
        return next((key for key in node if str(key) == part), part)
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    where = ".".join(path[:depth])
    raise UserError(
        f"{'.'.join(path)} cannot be set: {where} is a list with {len(node)} entries (0 is the first)"
    )


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
        cls = _chosen(cls, data, where, problems, fallback)
        if cls is None:
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


def _chosen(
    family: type[Plugin], data: Mapping[str, Any], where: str, problems: list[str], fallback: Any
) -> Any:
    """The class that ``data`` names; None after a problem."""
    name = data.get("name", MISSING)
    found: type[Plugin] | None = None
    if name is MISSING and isinstance(fallback, family):
        return type(fallback)
    if name is MISSING and family.name:
        return family
    if name is MISSING:
        problem = f"required, but missing (allowed: {', '.join(names(family))})"
    elif not isinstance(name, str):
        problem = f"should be a string, got {short(name)}"
    else:
        try:
            found = lookup(family, name)
        except UserError as error:
            problem = str(error)
        else:
            if not issubclass(found, family):
                problem = f"{name!r} is not a {family.__name__}"
            elif (
                "family" in vars(found)
                or "__dataclass_fields__" not in vars(found)
                or inspect.isabstract(found)
            ):
                problem = f"{name!r} cannot be used: it should be a @dataclass without abstract methods"
            else:
                return found
    problems.append(f"{join(where, 'name')}: {problem}")
    return None


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
    if origin in (list, dict):
        wanted, kind = (list, "list") if origin is list else (Mapping, "mapping")
        if not isinstance(data, wanted):
            problems.append(f"{path}: should be a {kind}, got {short(data)}")
            return None
        if origin is list:
            return [_value(args[0], item, join(path, i), problems) for i, item in enumerate(data)]
        return {
            check(args[0], key, join(path, key), problems): _value(args[1], item, join(path, key), problems)
            for key, item in data.items()
        }
    if origin is not None:
        raise TypeError(f"{path}: parts can be X, X | None, list[X] or dict[str, X], not {annotation}")
    return _object(annotation, data, path, problems, None if default is MISSING else default)


def has_parts(annotation: Any) -> bool:
    """Whether dataclasses or plug-ins are inside."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return issubclass(annotation, Plugin) or dataclasses.is_dataclass(annotation)
    return get_origin(annotation) is not Literal and any(map(has_parts, get_args(annotation)))


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


# ---- writing


def plain(value: Any) -> Any:
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

"""The keys of a recipe class, for help: path, type, default and docstring of each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from unveil.checking import join
from unveil.recipe import default_of, has_parts, name_of, plain
from unveil.registry import Plugin, names


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe.

    Attributes:
        path: dotted path, as in an override.
        type: the accepted values in words, as ``float > 0`` or ``lcr | rcr`` (the short names of plug-ins).
        default: the value in JSON notation, a plug-in's name, or ``[...]`` for a list whose entries follow;
            None if the key is required.
        doc: docstring of the field, "" without one.
    """

    path: str
    type: str
    default: str | None
    doc: str


def describe(cls: type, recipe: Any = None) -> list[Key]:
    """All keys of a recipe class in field order, with those of the default plug-ins.

    Args:
        recipe: an instance, whose values and plug-ins are shown instead of the defaults.
    """
    return list(_keys(cls, recipe, ""))


def _keys(cls: Any, instance: Any, where: str) -> Iterator[Key]:
    hints, docs = get_type_hints(cls, include_extras=True), _docs(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            value = default_of(field) if instance is None else getattr(instance, field.name)
            yield from _entry(hints[field.name], value, join(where, field.name), docs.get(field.name, ""))


def _entry(annotation: Any, value: Any, path: str, doc: str = "") -> Iterator[Key]:
    is_class = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    if value is MISSING and is_class and not issubclass(annotation, Plugin):
        yield from _keys(annotation, None, path)
        return
    is_part = dataclasses.is_dataclass(value)
    if not is_part or isinstance(value, Plugin):
        yield Key(path=path, type=_type_text(annotation), default=_default_text(annotation, value), doc=doc)
    if is_part:
        yield from _keys(type(value), value, path)
    elif value is not MISSING and value and has_parts(annotation):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _entry(type(item), item, join(path, key))


def _default_text(annotation: Any, value: Any) -> str | None:
    if value is MISSING:
        return None
    if isinstance(value, Plugin):
        return name_of(type(value))
    if value and has_parts(annotation):
        return "[...]" if isinstance(value, list) else "{...}"
    return json.dumps(plain(value), ensure_ascii=False, default=str)


_LIMITS = {
    "gt": ">", "ge": ">=", "lt": "<", "le": "<=",
    "multiple_of": "a multiple of", "min_length": "length >=", "max_length": "length <=",
}  # fmt: skip


def _type_text(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if origin is Annotated:
        rules = [rule for mark in args[1:] for rule in getattr(mark, "metadata", [mark])]
        limits = [
            f"{word} {limit}"
            for rule in rules
            for name, word in _LIMITS.items()
            if (limit := getattr(rule, name, None)) is not None
        ]
        return f"{_type_text(args[0])} {', '.join(limits)}".rstrip()
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, args))
    if origin is not None:
        inner = ", ".join("..." if arg is Ellipsis else _type_text(arg) for arg in args)
        return f"{origin.__name__}[{inner}]"
    if isinstance(annotation, type) and issubclass(annotation, Plugin):
        return annotation.name or " | ".join(names(annotation))
    return getattr(annotation, "__name__", str(annotation))


def _docs(cls: type) -> dict[str, str]:
    """The string literal below each field, by field name; inherited ones too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError, SyntaxError):  # made without a source file
            continue
        for field, below in itertools.pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs

"""Strict checking of plain values (numbers, strings, lists ...) against annotations, with pydantic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AllowInfNan, BeforeValidator, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

_BOOLEAN_HINT = " (YAML reads yes, no, on and off as truth values unless they are quoted)"


def check(annotation: Any, data: Any, path: str, problems: list[str]) -> Any:
    """``data`` as a value of ``annotation``; or None, and a line ``path: what, got value`` per problem.

    Pydantic's conversions are limited: numbers in strings (``"5e-4"``) become floats but not integers, 3.0
    may be an integer, truth values are no numbers nor the reverse, nan and inf are refused.
    """
    try:
        return TypeAdapter(_strict(annotation)).validate_python(data)
    except ValidationError as error:
        found: dict[str, tuple[list[str], Any]] = {}
        for issue in error.errors(include_url=False):
            where = _path_of(issue, data, path)
            message = issue["msg"].removeprefix("Input ").removeprefix("Value error, ")
            if isinstance(issue["input"], bool) and issue["type"] in ("string_type", "literal_error"):
                message += _BOOLEAN_HINT
            found.setdefault(where, ([], issue["input"]))[0].append(message)
        for where, (messages, value) in found.items():
            # The members of a union fail one by one at the same path.
            text = " or ".join(dict.fromkeys(messages)).replace(" or should be ", " or ")
            problems.append(f"{where}: {text}, got {short(value)}")
        return None


def join(where: str, key: object) -> str:
    """Dotted path of ``key`` below ``where``."""
    return f"{where}.{key}" if where else str(key)


def short(value: Any) -> str:
    """The value on one line, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _path_of(issue: ErrorDetails, data: Any, path: str) -> str:
    for part in issue["loc"]:
        inside = range(len(data)) if isinstance(data, list | tuple) else data if isinstance(data, Mapping) else ()
        if part in inside:
            data, path = data[part], join(path, part)
        # What does not lead into the data names the member of a union.
    return path


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _exact(options: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A check for Literals: True == 1, so that pydantic takes one for the other."""

    def check_kind(value: Any) -> Any:
        equal = [option for option in options if option == value]
        if equal and isinstance(value, bool) not in {isinstance(option, bool) for option in equal}:
            raise ValueError(f"should be {' or '.join(map(repr, options))}")
        return value

    return check_kind


_FLOAT: Any = Annotated[float, Strict(), AllowInfNan(False)]
_SCALARS: dict[Any, Any] = {
    bool: Annotated[bool, Strict()],
    int: Annotated[int, Strict(), BeforeValidator(_whole)],
    float: Annotated[_FLOAT, BeforeValidator(_number)],
}


def _strict(annotation: Any) -> Any:
    """The annotation with the conversions that `check` wants at every bool, int and float in it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is None:
        return _SCALARS.get(annotation, annotation)
    if origin is Annotated:
        return Annotated[_strict(args[0]), *args[1:]]
    if origin is Literal:
        return Annotated[annotation, BeforeValidator(_exact(args))]
    if origin in (Union, UnionType):
        # Beside str, a string that looks like a number stays a string.
        return Union[tuple(_FLOAT if arg is float and str in args else _strict(arg) for arg in args)]  # noqa: UP007
    return origin[tuple(arg if arg is Ellipsis else _strict(arg) for arg in args)]

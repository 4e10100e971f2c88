"""Plug-ins and their short names.

A *family* is a base class such as ``Rule`` or ``Advantage``; a *plug-in* is a keyword-only dataclass below it that
carries a short name. Subclassing registers: nothing else has to be called, so a user's own class becomes available by
being imported, or by naming it ``package.module:Class`` in a recipe.

    class Rule(Plugin, family="rule"): ...

    @dataclass(kw_only=True)
    class LowConfidence(Rule, name="lcr"): ...

    lookup(Rule, "lcr")            # -> LowConfidence
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import ClassVar, TypeVar

_FLOORS = ("processes", "denoisers", "samplers", "rewards", "tasks", "learning", "systems")
"""The packages that may hold plug-ins; `lookup` imports them on the first miss."""


class UserError(Exception):
    """Something that the user gave is wrong. The message is one line that says what, and what is allowed.

    The command line prints the message alone and exits with status 2.
    """


class Plugin:
    """Root of all plug-in families. See the module docstring."""

    family: ClassVar[str] = ""
    name: ClassVar[str] = ""
    default: ClassVar[str | None] = None
    """The plug-in that a recipe means where it gives fields and no name; None: a name is required."""
    shorthand: ClassVar[str | None] = None
    """The field that ``NAME:VALUE`` sets on the command line."""
    known: ClassVar[dict[str, type[Plugin]]] = {}

    def __init_subclass__(
        cls, *, family: str | None = None, name: str | None = None, default: str | None = None, **kwargs: object
    ) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls.known, cls.default = family, {}, default
        if name is not None:
            other = cls.known.get(name)
            if other is not None and other.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"{cls.family} {name!r} is already registered by {other.__module__}.{other.__qualname__}"
                )
            cls.name = name
            cls.known[name] = cls


P = TypeVar("P", bound=Plugin)


def names(family: type[Plugin]) -> list[str]:
    """All registered short names of a family, sorted."""
    _import_floors()
    return sorted(family.known)


def lookup(family: type[P], name: str) -> type[P]:
    """The plug-in class of ``family`` called ``name``, or the class at ``package.module:Class``.

    Raises:
        UserError: no such plug-in, or the path does not lead to a plug-in of this family.
    """
    if ":" in name:
        return _from_path(family, name)
    if name not in family.known:
        _import_floors()
    if name not in family.known:
        raise UserError(f"no {family.family} is called {name!r}{did_you_mean(name, family.known)}")
    return family.known[name]  # type: ignore[return-value]


def did_you_mean(word: str, allowed: object) -> str:
    """``, did you mean 'x'? (allowed: a, b, x)``: the tail of an error message about an unknown word."""
    options = sorted(str(option) for option in allowed)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(str(word), options, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(options)})"


def _from_path(family: type[P], path: str) -> type[P]:
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: ':X', '.x:Y'
        raise UserError(f"{family.family} {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, family)):
        raise UserError(f"{path!r} is not a {family.family} (a subclass of {family.__module__}.{family.__name__})")
    return found


def _import_floors() -> None:
    for floor in _FLOORS:
        package = importlib.import_module(f"unveil.{floor}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"unveil.{floor}.{module.name}")

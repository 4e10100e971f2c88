"""Samplers from command-line options, checked as recipes are, with messages that name the options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from unveil.registry import Plugin, UserError, lookup, names

if TYPE_CHECKING:
    from unveil.samplers.base import Sampler


def plugin(text: str, option: str, family: type[Plugin]) -> dict[str, Any]:
    """Recipe data of ``NAME`` or ``NAME:field=value,field=value``; the name may be ``package.module:Class``.

    Some plug-ins also take ``NAME:VALUE``, as in ``policy:PATH``.

    Raises:
        UserError: the fields are malformed.
    """
    from unveil.overrides import merge

    short, _, rest = text.partition(":")
    # A path to a class holds a colon, and so may a value behind a short name: `ddpo:function=module:name`.
    known = "=" in rest and short in names(family)
    name, colon, fields = (short, ":", rest) if known else text.rpartition(":")
    if not colon or "=" not in fields:
        field = lookup(family, short).shorthand if rest and short in names(family) else None
        return {"name": text} if field is None else {"name": short, field: rest}
    try:
        values = merge({}, fields.split(","))
    except UserError as error:
        raise UserError(f"{option}: {text!r} should look like NAME:field=value,field=value: {error}") from error
    if "name" in values:
        raise UserError(f"{option}: {text!r} names the plug-in twice")
    return {"name": name, **values}


def listed(texts: Sequence[str]) -> list[str]:
    """The entries of an option that may be repeated, each ``ENTRY;ENTRY;...``."""
    return [part.strip() for text in texts for part in text.split(";") if part.strip()]


def spelled(plugin: Plugin) -> str:
    """A plug-in as ``NAME:field=value,...`` with the fields that are not at their default: what `plugin` reads."""
    from unveil.recipe import default_of, dump

    usual = {field.name: default_of(field) for field in fields(plugin)}  # type: ignore[arg-type]
    own = dump(plugin)
    told = [f"{key}={_short(own[key])}" for key in usual if key in own and getattr(plugin, key) != usual[key]]
    return ":".join([own["name"], ",".join(told)]) if told else own["name"]


def _short(value: Any) -> str:
    """A whole number without ``.0``."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def rule(text: str, option: str) -> dict[str, Any]:
    """`plugin` of a decoding rule, or of a sampler that has no rules, such as ``reverse``."""
    from unveil.samplers.base import Sampler
    from unveil.samplers.rules import Rule

    return plugin(text, option, Sampler if _without_rules(text.partition(":")[0]) else Rule)


def _without_rules(name: str) -> bool:
    from unveil.samplers.base import Sampler

    return name != Sampler.default and name in names(Sampler)


def sampler(settings: Mapping[str, Any], length: int, options: Mapping[str, str]) -> Sampler:
    """The sampler with the fields ``settings``, fit for responses of ``length`` tokens: as many steps where none are
    given and the sampler has no number of its own.

    A ``rule`` that names a sampler without rules stands for that sampler, with the other fields that it has.

    Args:
        options: the option that stands for each field, for messages.

    Raises:
        UserError: all problems, one line each.
    """
    from unveil.recipe import build
    from unveil.samplers.base import Sampler
    from unveil.samplers.masked import MaskedSampler

    given = {key: value for key, value in settings.items() if value is not None}
    kind: type[Sampler] = MaskedSampler
    if _without_rules(given["rule"]["name"]):
        usual = {field.name: field.default for field in fields(MaskedSampler)}
        kind = lookup(Sampler, given["rule"]["name"])
        own = {key: value for key, value in given.pop("rule").items() if key != "name"}
        given = {key: value for key, value in given.items() if key == "temperature" or value != usual[key]} | own
    if not hasattr(kind, "steps"):
        given.setdefault("steps", length)
    try:
        built = build(kind, given)
        built.check_fits(length)
    except UserError as error:
        raise UserError("\n".join(by_option(line, options) for line in str(error).splitlines())) from error
    return built


def by_option(problem: str, options: Mapping[str, str]) -> str:
    """``rule.cap: ...`` as ``--rule.cap: ...``, and ``rule.name: ...`` as ``--rule: ...``."""
    problem = problem.removeprefix("recipe: ")
    found = re.match(r"([a-z_]+)((?:\.\w+)*): ", problem)
    if found is None or found[1] not in options:
        return problem
    return f"{options[found[1]]}{found[2].removesuffix('.name')}: {problem[found.end() :]}"

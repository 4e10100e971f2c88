"""Dotted overrides on plain dictionaries: ``optim.lr=3e-4``, ``rollout.sampler.rule.name=rcr``."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unveil.checking import short
from unveil.registry import UserError


def merge(base: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``base`` with overrides such as ``optim.lr=3e-4`` or ``tasks.0.weight=2``; values are YAML.

    A mapping given as value replaces the old one. Setting ``rule.name``, or ``rule`` to a string, drops the
    other fields of the plug-in unless the name stays the same. Outer keys come before inner ones, whatever
    the order of ``overrides``; of two equal keys the last wins. Interpolations are not resolved.

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


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML, on one line, with the line number where it is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return f"not YAML: {str(error).splitlines()[0]}"


def _parse(override: str) -> tuple[list[str], Any]:
    found = re.fullmatch(r"([^\s.=]+(?:\.[^\s.=]+)*)=(.*)", override, re.DOTALL)
    if found is None:
        raise UserError(f"override {override!r} should look like path.to.key=value")
    path, text = found.groups()
    if not text.strip() or text.lstrip().startswith("#"):  # YAML reads a comment as null
        raise UserError(f"override {override!r} has no value (write null, or '\"\"' for an empty string)")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = yaml_problem(error) if isinstance(error, yaml.YAMLError) else str(error).splitlines()[0]
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
            above = ".".join(path[: depth + 1])
            raise UserError(f"{'.'.join(path)} cannot be set: {above} is {short(child)}")
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
    above = f"{'.'.join(path[:depth])} is a list with {len(node)} entries (0 is the first)"
    raise UserError(f"{'.'.join(path)} cannot be set: {above}")

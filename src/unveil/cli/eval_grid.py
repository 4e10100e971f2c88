"""The decoders of texts that `unveil eval` compares: all combinations of the values of their options."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unveil.registry import UserError

if TYPE_CHECKING:
    from unveil.samplers.base import Sampler


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One decoder of the grid."""

    rule: str
    length: int
    block: int | None
    temperature: float
    sampler: Sampler

    def settings(self) -> dict[str, Any]:
        """What tells this decoder from the others; no steps for rules that set their own pace."""
        return {
            "decoder": self.rule,
            "length": self.length,
            "steps": self.sampler.planned_steps,
            "block": self.block,
            "temperature": self.temperature,
        }


def grid(args: argparse.Namespace, lengths: Sequence[int]) -> list[Cell]:
    """All decoders that were asked for; equal ones (steps of a rule that ignores them) once.

    Raises:
        UserError: some do not fit; all of them are named.
    """
    from unveil.cli.decoders import listed, plugin, sampler
    from unveil.cli.decoders import rule as named
    from unveil.samplers.caches import Cache
    from unveil.samplers.schedules import Schedule
    from unveil.samplers.transforms import Transform

    options = {
        "steps": "--steps",
        "block_length": "--blocks",
        "rule": "--rules",
        "schedule": "--schedule",
        "transform": "--transform",
        "cache": "--cache",
        "temperature": "--temperature",
    }
    shared = {
        "schedule": None if args.schedule is None else plugin(args.schedule, "--schedule", Schedule),
        "transform": None if args.transform is None else plugin(args.transform, "--transform", Transform),
        "cache": None if args.cache is None else plugin(args.cache, "--cache", Cache),
    }
    rules = listed(args.rules or ["lcr"])
    problems: dict[str, None] = {}
    cells: dict[str, Cell] = {}
    combinations = itertools.product(rules, lengths, args.steps or [None], args.blocks, args.temperature)
    for rule, length, steps, block, temperature in combinations:
        settings = shared | {
            "rule": named(rule, "--rules"),
            "steps": length if steps is None else steps,
            "block_length": block,
            "temperature": temperature,
        }
        if length < 1:
            problems[f"--lengths: should be at least 1, got {length}"] = None
            continue
        try:
            cell = Cell(
                rule=rule, length=length, block=block, temperature=temperature,
                sampler=sampler(settings, length, options),
            )  # fmt: skip
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
        else:
            cells.setdefault(json.dumps(cell.settings()), cell)
    if problems:
        raise UserError("\n".join(problems))
    return list(cells.values())

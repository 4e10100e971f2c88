"""The decoders of images that `unveil eval` compares: those of the model's recipe, with all combinations of changes."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unveil.cli.decoders import by_option, listed, plugin, spelled
from unveil.cli.models import trained_recipe
from unveil.overrides import merge
from unveil.processes.kernels import Kernel
from unveil.recipe import build, dump
from unveil.registry import Plugin, UserError
from unveil.samplers.base import Sampler
from unveil.samplers.grids import Grid
from unveil.samplers.guidance import ClassifierFree, Guidance
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import LatentSolver

PLAIN = "latent"
"""The decoder of a model without a recipe: a sampler with the usual settings."""
OPTIONS = {
    "steps": "--steps", "grid": "--grids", "kernel": "--kernels", "solver": "--solvers", "guidance": "--guidance",
}  # fmt: skip
_FAMILIES: dict[str, type[Plugin]] = {"grid": Grid, "kernel": Kernel, "solver": LatentSolver, "guidance": Guidance}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One decoder of the grid; ``name`` is that of the recipe's decoder that it comes from."""

    name: str
    sampler: LatentSampler

    def settings(self) -> dict[str, Any]:
        """What tells this decoder from the others."""
        sampler = self.sampler
        return {
            "decoder": self.name, "steps": sampler.planned_steps, "grid": spelled(sampler.grid),
            "kernel": spelled(sampler.kernel), "solver": spelled(sampler.solver),
            "guidance": _guidance(sampler.guidance),
        }  # fmt: skip


def grid(args: argparse.Namespace) -> list[Cell]:
    """All decoders that were asked for; equal ones once.

    Raises:
        UserError: some do not fit; all of them are named.
    """
    changes: dict[str, Sequence[Any]] = {"steps": args.steps or []}
    changes |= {
        field: [entry for text in listed(getattr(args, OPTIONS[field].removeprefix("--")) or ())
                for entry in _entries(text, OPTIONS[field], family)]
        for field, family in _FAMILIES.items()
    }  # fmt: skip
    asked = {field: values for field, values in changes.items() if values}
    words = [word for word in args.words if word.startswith("sampler.")]
    bases = _bases(args.model)
    steps_known = "steps" in asked or any(word.startswith("sampler.steps=") for word in words)
    if bases is None and not steps_known:
        raise UserError("--steps: required, for the model comes without a recipe that tells its decoders")
    problems: dict[str, None] = {}
    cells: dict[str, Cell] = {}
    for name, base in (bases or {PLAIN: {"name": "latent"}}).items():
        for combination in itertools.product(*asked.values()):
            data = merge({"sampler": base | dict(zip(asked, combination, strict=True))}, words)["sampler"]
            try:
                sampler = build(Sampler, data)
            except UserError as error:
                problems |= dict.fromkeys(_named(line) for line in str(error).splitlines())
                continue
            if not isinstance(sampler, LatentSampler):
                raise UserError(f"sampler.name: {sampler.name!r} draws no images (allowed: latent)")
            cells.setdefault(json.dumps(dump(sampler), sort_keys=True), Cell(name=name, sampler=sampler))
    if problems:
        raise UserError("\n".join(problems))
    return list(cells.values())


def _bases(model: str) -> dict[str, dict[str, Any]] | None:
    """The decoders with which the model's recipe evaluates; None where there is none."""
    found = trained_recipe(model).get("eval", {}).get("decoders") or {}
    return {name: dict(data) for name, data in found.items() if data.get("name") == "latent"} or None


def _entries(text: str, option: str, family: type[Plugin]) -> list[dict[str, Any]]:
    """One plug-in; of guidance also scales and ``none``, with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    scales = [_scale(part) for part in parts]
    if family is Guidance and None not in scales:
        return [one for one in scales if one is not None]
    return [plugin(text, option, family)]


def _scale(text: str) -> dict[str, Any] | None:
    if text == "none":
        return {"name": "none"}
    try:
        return {"name": "cfg", "scale": float(text)}
    except ValueError:
        return None


def _named(problem: str) -> str:
    """A problem of the sampler, by the option that stands for its key, or as ``sampler.KEY``."""
    known = by_option(problem, OPTIONS)
    return known if known != problem or problem.startswith("--") else f"sampler.{problem.removeprefix('recipe: ')}"


def _guidance(guidance: Guidance) -> str:
    if isinstance(guidance, ClassifierFree) and guidance == ClassifierFree(scale=guidance.scale):
        return f"{guidance.scale:g}"
    return spelled(guidance)

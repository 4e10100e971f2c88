"""Recipes by name."""

from __future__ import annotations

from pathlib import Path

from unveil.registry import UserError, did_you_mean

RECIPES = Path(__file__).parent.parent / "recipes"
"""The recipes inside the package: ``NAME/cpu.yaml``, ``NAME/full.yaml`` ..."""


def recipe_names(system: str = "*") -> list[str]:
    """Names such as ``mdpo/cpu``, of one system or of all."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in RECIPES.glob(f"{system}/*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of ``mdpo`` (that is ``mdpo/cpu``), ``mdpo/sudoku``, or a path to a YAML file.

    Raises:
        UserError: there is none.
    """
    known = recipe_names()
    for full in (name, f"{name}/cpu"):
        if full in known:
            return RECIPES / f"{full}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name}: no such file")
    short = {full.removesuffix("/cpu") for full in known}
    raise UserError(f"recipe {name!r}: no such file or recipe{did_you_mean(name, short)}")

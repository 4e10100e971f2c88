"""The floors: who may import whom, and what every system comes with."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import unveil
from unveil import claims, systems
from unveil.recipe import build, load
from unveil.samplers.decoding import DecodeRecipe
from unveil.training.runs import JudgeRecipe, PretrainRecipe, TrainRecipe

ROOT = Path(unveil.__file__).parent
FLOORS = [
    ("registry", "seeds"),  # what every floor stands on
    ("checking",),
    ("overrides",),
    ("recipe",),
    ("recipe_keys",),
    ("processes",),
    ("denoisers",),
    ("samplers",),
    ("rewards",),
    ("tasks",),
    ("learning",),
    ("training",),
    ("systems",),
    ("claims",),
    ("report", "bench"),
    ("cli",),
]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
BASELINES = {system.name: system.checked_in for system in systems.catalogue() if system.checked_in}
"""Systems that others are measured against; their claims are checked inside those others' checks."""
MODEL_NAMES = re.compile(r"llada|dream(?!er)|diffucoder|mdlm|sedd|fast.?dllm|countdown|sudoku", re.IGNORECASE)


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in HEIGHT)


def floor(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names below ``unveil.`` that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
            if node.module in ("unveil", "unveil.systems", "unveil.claims"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("unveil.") for name in found if name.startswith("unveil.")}


def test_every_folder_and_module_has_a_floor() -> None:
    known = set(HEIGHT) | {"__init__", "__main__", "models", "recipes", "__pycache__", "py.typed"}
    assert {path.stem if path.suffix == ".py" else path.name for path in ROOT.iterdir()} <= known


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = floor(path)
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        other = name.split(".")[0]
        if other == "__version__" or other == own:
            continue
        assert HEIGHT[other] < HEIGHT[own], f"{path.relative_to(ROOT)} ({own}) imports {name}"


def test_the_check_can_fail() -> None:
    bad = ast.parse("def f():\n    from unveil.cli import main\n    import unveil.systems.mdpo")
    assert imported(bad) == {"cli", "systems.mdpo"}


def system_names() -> list[str]:
    return [system.name for system in systems.catalogue()]


@pytest.mark.parametrize("name", system_names())
def test_systems_never_import_one_another(name: str) -> None:
    names = imported(ast.parse((ROOT / "systems" / f"{name}.py").read_text(encoding="utf-8")))
    siblings = {f"systems.{path.stem}" for path in (ROOT / "systems").glob("*.py") if path.stem != "__init__"}
    assert not names & siblings


@pytest.mark.parametrize("name", system_names())
def test_every_system_comes_with_its_file_claim_and_recipes(name: str) -> None:
    assert (ROOT / "systems" / f"{name}.py").is_file()
    assert name in BASELINES or (ROOT / "claims" / f"{name}.py").is_file()
    assert list((ROOT / "recipes" / name).glob("*.yaml"))


def test_baselines_are_checked_inside_another_claim() -> None:
    assert set(system_names()) >= set(BASELINES)
    for name, other in BASELINES.items():
        assert not (ROOT / "claims" / f"{name}.py").exists(), f"{name} is no exception any more"
        assert f"systems.{name}" in (Path(claims.__file__).parent / f"{other}.py").read_text(encoding="utf-8")


def test_claims_of_systems_can_be_reproduced() -> None:
    for name in set(system_names()) - set(BASELINES):
        assert callable(importlib.import_module(f"unveil.claims.{name}").reproduce)


@pytest.mark.parametrize("name", system_names())
def test_a_system_s_own_file_is_short(name: str) -> None:
    """At most 150 lines of code: without docstrings, comments, imports and blank lines."""
    text = (ROOT / "systems" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    said = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    left_out = said + [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    elsewhere = {line for node in left_out for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#") and number not in elsewhere
    ]
    assert len(lines) <= 150


def code_strings(tree: ast.Module) -> list[str]:
    """Identifiers and string constants of the code; docstrings (any bare string) and papers' titles are left out."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    bare |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "title"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            found.append(node.value)
        found += [value for _, value in ast.iter_fields(node) if isinstance(value, str) and id(node) not in bare]
    return found


@pytest.mark.parametrize("name", system_names())
def test_systems_name_no_model_and_no_task(name: str) -> None:
    tree = ast.parse((ROOT / "systems" / f"{name}.py").read_text(encoding="utf-8"))
    assert [text for text in code_strings(tree) if MODEL_NAMES.search(text)] == []


def recipe_files() -> list[Path]:
    return sorted((ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    folders = {path.parent.name for path in recipe_files()}
    assert folders >= {"base-countdown", "convert", "mdpo"}
    systems = {name for name in folders if not name.startswith(("base-", "judge-"))}
    assert systems <= {"convert", *system_names()}


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_builds(path: Path) -> None:
    if path.parent.name.startswith("judge-"):
        build(JudgeRecipe, load(path))
        return
    data = load(path)
    if "data" in data:
        build(PretrainRecipe, data)
        return
    if "sampler" in data:  # of a system that trains nothing
        decoding = build(DecodeRecipe, data)
        assert decoding.system == path.parent.name
        decoding.sampler.check_fits(decoding.response_length)
        return
    recipe = build(TrainRecipe, data)
    assert recipe.system == path.parent.name
    for sampler in [recipe.policy.rollout.sampler, *recipe.eval.decoders.values()]:
        sampler.check_fits(recipe.policy.rollout.response_length)

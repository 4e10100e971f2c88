"""The examples run, and the documentation says what is true of the code: commands, options, links, names, metrics."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unveil.cli.main import COMMANDS, parse
from unveil.cli.recipes import find_recipe
from unveil.denoisers.image import ImageNetwork, Prompts
from unveil.denoisers.unmask import UnmaskNetwork
from unveil.learning.advantages import Advantage
from unveil.learning.gates import Gate
from unveil.learning.matching import TimeDistribution
from unveil.learning.objectives import Objective, Weighting
from unveil.learning.regularisers import Regulariser
from unveil.learning.selectors import Selector
from unveil.learning.views import Likelihood, TokenFilter
from unveil.processes.gaussian import GaussianProcess
from unveil.processes.kernels import Kernel
from unveil.recipe import build, load
from unveil.registry import Plugin, names
from unveil.rewards.base import Reward
from unveil.rewards.features import Features
from unveil.samplers.actions import Action
from unveil.samplers.base import Sampler
from unveil.samplers.caches import Cache
from unveil.samplers.grids import Grid
from unveil.samplers.guidance import Guidance
from unveil.samplers.latent_solvers import LatentSolver
from unveil.samplers.rules import Rule
from unveil.samplers.schedules import Schedule
from unveil.samplers.solvers import Solver
from unveil.samplers.transforms import Transform
from unveil.samplers.windows import Window
from unveil.systems import catalogue
from unveil.systems.alignprop import Truncation
from unveil.tasks.base import Task
from unveil.tasks.medium import Medium
from unveil.training.policy_config import ProblemFilter
from unveil.training.rollouts import GroupHook, Shaping
from unveil.training.runs import JudgeRecipe, PretrainRecipe, TrainRecipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("src/unveil/models/*/README.md"))]
EXAMPLE = ROOT / "examples" / "my_objective.py"


def run_python(*arguments: str) -> str:
    """What a Python process of its own prints; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def example_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("example") / "run"
    assert run_python(str(EXAMPLE), str(run)).splitlines()[-1] == f"unveil view {run}"
    return run


def train_lines(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def fences(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a page."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        yield found[1]


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `unveil ...` in a shell block or in a line of text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [line for block in fences(page, "sh") for line in block.splitlines()]
        inline = re.findall(r"`(unveil [^`\n]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        for line in [*shell, *inline]:
            command = re.sub(r"^(\w+=\S+ )*", "", line).partition("  #")[0]
            if command.startswith("unveil ") and "..." not in command:
                yield str(page.relative_to(ROOT)), command


# ---- the example


def test_the_example_makes_three_updates_of_two_gradient_steps(example_run: Path) -> None:
    lines = train_lines(example_run)
    assert [line["optimizer_steps"] for line in lines] == [2, 4, 6]
    assert all(line["skipped"] == 0 and 0 <= float(str(line["capped"])) < 1 for line in lines)
    assert "cap: 1.5" in (example_run / "recipe.yaml").read_text()
    assert "discount: 0.8" in (example_run / "recipe.yaml").read_text()


def test_the_page_shows_the_very_example_and_it_keeps_its_promise() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    page = ROOT / "docs" / "add-your-own-objective.md"
    assert text in list(fences(page, "python"))
    assert len(text.splitlines()) <= 60


def test_the_advantage_of_the_example_equals_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    made = importlib.import_module("examples.my_objective").MyAdvantage(discount=0.5)
    rewards = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    group = torch.tensor([3, 3])
    # To-go gains: (0 + 0.5, 1, 0) and (1 - 0.5, -1, 0); two members, so +-1/sqrt(2) wherever they differ.
    found = made.advantages(rewards, torch.ones(2, 3, dtype=torch.bool), group)
    want = torch.tensor([[0.0, 0.5**0.5, 0.0], [0.0, -(0.5**0.5), 0.0]])
    assert torch.allclose(found, want, atol=1e-4)


def test_the_objective_of_the_example_has_the_gradient_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    made = importlib.import_module("examples.my_objective").MyObjective(cap=1.5)
    new = torch.tensor([0.9, 0.6]).log().requires_grad_()
    made.terms(new, torch.tensor([0.3, 0.5]).log(), torch.tensor([2.0, -1.0])).sum().backward()
    assert new.grad is not None and torch.allclose(new.grad, torch.tensor([-1.5 * 2.0, 1.2 * 1.0]))


def test_a_recipe_reaches_the_classes_of_the_example_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    page = ROOT / "docs" / "add-your-own-objective.md"
    (line,) = [command for where, command in commands() if where == str(page.relative_to(ROOT))]
    recipe = build(TrainRecipe, load(find_recipe("mdpo"), shlex.split(line)[3:]))
    assert (type(recipe.policy.objective).__name__, type(recipe.policy.advantage).__name__) == (
        "MyObjective",
        "MyAdvantage",
    )
    assert recipe.policy.objective.cap == 1.5  # type: ignore[attr-defined]


# ---- the documentation


def test_the_python_example_of_the_readme_runs() -> None:
    (code,) = fences(ROOT / "README.md", "python")
    lines = run_python("-c", code).splitlines()
    assert re.fullmatch(r"[\d.]+% right, [\d.]+% right on the way but wrong at the end", lines[0])
    assert [line.partition(" ")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4", "5"]
    assert lines[1] == "0" + " <mask>" * 12


def test_the_python_example_of_images_runs(tmp_path: Path) -> None:
    (code,) = fences(ROOT / "docs" / "images.md", "python")
    lines = run_python("-c", code.replace("digit.png", str(tmp_path / "digit.png"))).splitlines()
    assert re.fullmatch(r"[\d.]+% are what was asked for", lines[0])
    assert lines[1].endswith(" (1, 8, 8) (1, 10, 1, 8, 8)") and (tmp_path / "digit.png").is_file()


def test_the_reward_of_the_example_is_one_for_mirror_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    symmetric = importlib.import_module("examples.my_image_reward").symmetric
    images = torch.tensor([[[[0.2, 0.7, 0.2]]], [[[0.0, 0.5, 0.6]]]])
    assert torch.allclose(symmetric(images, ("", ""), ({}, {}))[0], torch.tensor([1.0, 0.6]))


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_every_command_line_of_the_documentation_is_valid(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    words = shlex.split(command)[1:]
    if len(words) == 1:
        assert words[0] in COMMANDS  # a command's name in a sentence
        return
    args = parse(words)
    recipe, overrides = [*getattr(args, "words", []), ""][0], getattr(args, "words", [])[1:]
    if args.command in ("train", "pretrain") and recipe and not args.resume and not recipe.endswith(".yaml"):
        data = load(find_recipe(recipe), overrides)
        build(TrainRecipe if args.command == "train" else JudgeRecipe if "judge" in data else PretrainRecipe, data)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_names_exactly_its_options(name: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"unveil.cli.{name}").add_arguments(parser)
    own = {option for action in parser._actions for option in action.option_strings} | {"--json"}
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert {option for row in rows for option in re.findall(r"`(--[\w-]+)", row.split(" | ")[0])} == own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target} has no heading #{anchor}"


@pytest.mark.parametrize(
    "family",
    [
        Task,
        Sampler,
        Rule,
        Action,
        Cache,
        Solver,
        Transform,
        Schedule,
        GaussianProcess,
        Grid,
        LatentSolver,
        ImageNetwork,
        Prompts,
        TimeDistribution,
        UnmaskNetwork,
        ProblemFilter,
        Shaping,
        GroupHook,
        Advantage,
        Selector,
        Likelihood,
        Truncation,
        TokenFilter,
        Objective,
        Weighting,
        Regulariser,
        Gate,
        Features,
        Reward,
        Kernel,
        Window,
        Guidance,
        Medium,
    ],
)
def test_the_table_of_plug_ins_is_complete(family: type[Plugin]) -> None:
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if f"`{family.__module__}.{family.__name__}`" in line]
    registered = [name for name in names(family) if family.known[name].__module__.startswith("unveil.")]
    assert re.findall(r"`(\w+)`", row.split(" | ")[2]) == registered


def table_of_compositions() -> str:
    """What docs/systems.md says of the recipes that train a policy."""
    families = {system.name: system.family for system in catalogue()}
    rows = ["| system | groups | advantage | steps | likelihood | ratio | weights | KL | model |", "|---" * 9 + "|"]
    for path in sorted((ROOT / "src" / "unveil" / "recipes").glob("*/cpu.yaml")):
        data = load(path)
        if "policy" not in data:
            continue
        policy = build(TrainRecipe, data).policy
        order = getattr(policy.likelihood, "order", None)
        scored = policy.likelihood.name + (f" + {order.name}" if order else "")
        hooks = [hook.name for hook in (policy.groups, policy.token_filter, policy.shaping) if hook is not None]
        level = policy.objective.level + (", mean" if policy.objective.normalise else "")
        kl = f"{getattr(policy.kl, 'estimator', policy.kl.name)}, {policy.kl.beta:g}" if policy.kl.beta else "none"
        steps = policy.selector.name if policy.likelihood.per_step else "-"
        cells = [", ".join(hooks) or "-", policy.advantage.name, steps, scored, level, policy.weighting.name, kl]
        own = [path.parent.name, *(f"`{c}`" if c != "-" else c for c in cells), families[path.parent.name]]
        rows.append("| " + " | ".join(own) + " |")
    return "\n".join(rows)


def test_the_table_of_systems_says_what_the_recipes_compose() -> None:
    assert table_of_compositions() in (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")


def test_every_metric_is_explained(example_run: Path) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (example_run / "metrics.jsonl").read_text().splitlines()]
    own = {"capped"}  # the example's diagnostics
    keys = {key for line in lines for key in line} | set(json.loads((example_run / "run.json").read_text()))
    assert {key for key in keys - own if f"`{key}`" not in page} == set()
    for name in ("samples.jsonl", "trajectories.jsonl"):
        first = json.loads((example_run / name).read_text().splitlines()[0])
        inside = {key for step in first.get("steps", []) for key in step}
        assert {key for key in first.keys() | inside if f"`{key}`" not in page} == set()

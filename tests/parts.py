"""Which model families use which plug-ins, asked of the recipes and of the code's own checks.

PYTHONPATH=src:tests python -m parts        prints the table of docs/parts.md
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tiny
from unveil.denoisers.base import Denoiser
from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.denoisers.image import ImageModel
from unveil.denoisers.load import KINDS, PIPELINES, PUBLISHED, load_denoiser
from unveil.denoisers.uniform import UniformDenoiser
from unveil.learning.regularisers import Regulariser
from unveil.learning.selectors import Selector
from unveil.learning.views import Likelihood
from unveil.processes.kernels import FlowSde
from unveil.recipe import build, load
from unveil.registry import Plugin, UserError, names
from unveil.rewards.base import Reward
from unveil.rewards.features import Features
from unveil.samplers.base import Sampler
from unveil.samplers.decoding import DecodeRecipe
from unveil.samplers.latent import LatentSampler
from unveil.samplers.uniform import UniformSampler
from unveil.systems import catalogue
from unveil.tasks.base import Task
from unveil.tasks.medium import Medium
from unveil.training.denoising_job import MatchingConfig
from unveil.training.runs import JudgeRecipe, PretrainRecipe, TrainRecipe

MASKED, UNIFORM, IMAGES = "masked tokens", "uniform tokens", "images"
FAMILIES = (MASKED, UNIFORM, IMAGES)
RECIPES = Path(__file__).parent.parent / "src" / "unveil" / "recipes"

Part = tuple[str, str]
"""Family of plug-ins, short name."""


def models() -> dict[str, list[Denoiser]]:
    """One network of every kind that the checks of samplers and likelihoods tell apart."""
    return {
        MASKED: [tiny.denoiser(), tiny.score_denoiser(), tiny.with_policy(tiny.denoiser())],
        UNIFORM: [tiny.uniform_denoiser()],
        IMAGES: [load_denoiser("digits-base")],
    }


# ---- what recipes use


def plugins_in(value: Any) -> Iterator[Plugin]:
    """The plug-ins of a recipe, those inside others too; not what is there and has no say."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from plugins_in(one)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return
    if isinstance(value, Regulariser) and not value.beta:
        return
    if isinstance(value, Plugin):
        yield value
    likelihood = getattr(value, "likelihood", None)
    for field in dataclasses.fields(value):
        inside = getattr(value, field.name)
        if not (isinstance(inside, Selector) and likelihood is not None and not likelihood.per_step):
            yield from plugins_in(inside)


def opened(path: Path) -> tuple[str, str, Any]:
    """The model family of a recipe, the command that runs it, and all of it that this family reads."""
    data = load(path)
    if "policy" in data:
        recipe = build(TrainRecipe, data)
        return family_of(recipe.policy.rollout.sampler), "train", recipe
    if "judge" in data:
        return IMAGES, "pretrain", build(JudgeRecipe, data)
    if "data" in data:
        made = build(PretrainRecipe, data)
        if made.model.image is not None:
            return IMAGES, "pretrain", made
        return MASKED, "pretrain", [made.data.tasks, made.eval]
    decoding = build(DecodeRecipe, data)
    return family_of(decoding.sampler), "decode", decoding


def family_of(sampler: Sampler) -> str:
    return IMAGES if isinstance(sampler, LatentSampler) else UNIFORM if isinstance(sampler, UniformSampler) else MASKED


def used() -> dict[str, set[Part]]:
    """Plug-ins of recipes, the systems that these belong to, the commands that run them, and the kinds of sample."""
    found: dict[str, set[Part]] = {family: set() for family in FAMILIES}
    systems = {system.name for system in catalogue()}
    for path in sorted(RECIPES.glob("*/*.yaml")):
        family, command, recipe = opened(path)
        parts = list(plugins_in(recipe))
        found[family] |= {(one.family, one.name) for one in parts}
        found[family] |= {("medium", one.medium) for one in parts if isinstance(one, Task)}
        found[family].add(("recipes of the command", command))
        if path.parent.name in systems:
            found[family].add(("system", path.parent.name))
    return found


def networks() -> dict[str, set[Part]]:
    """The ``model_type`` or pipeline class of every network that can be opened."""
    classes: dict[str, Any] = dict(KINDS)
    for name, place in {**PUBLISHED, **PIPELINES}.items():
        module, _, attribute = place.partition(":")
        classes[name] = getattr(importlib.import_module(f"unveil.denoisers.{module}"), attribute)
    found: dict[str, set[Part]] = {family: set() for family in FAMILIES}
    for name, cls in classes.items():
        own = IMAGES if issubclass(cls, ContinuousDenoiser) else UNIFORM if issubclass(cls, UniformDenoiser) else MASKED
        found[own].add(("network", name))
    return found


# ---- what the code's checks accept


def known(family: type[Plugin]) -> list[Any]:
    """The plug-ins of a family that belong to the library."""
    return [family.known[name] for name in names(family) if family.known[name].__module__.startswith("unveil.")]


def families() -> list[type[Plugin]]:
    """All families of plug-ins that belong to the library."""
    names(Task)  # imports all floors
    own = [one for one in _below(Plugin) if "known" in vars(one) and one.__module__.startswith("unveil.")]
    return sorted(own, key=_called)


def _called(kind: type[Plugin]) -> str:
    return kind.family


def _below(cls: type) -> Iterator[Any]:
    subclasses: list[Any] = cls.__subclasses__()
    for one in subclasses:
        yield one
        yield from _below(one)


def read_by(cls: Any) -> Iterator[type[Plugin]]:
    """The families of plug-ins that stand in the fields of a dataclass."""
    for annotation in get_type_hints(cls).values():
        for one in (annotation, *get_args(annotation)):
            if isinstance(one, type) and issubclass(one, Plugin) and "known" in vars(one):
                yield one


def accepted() -> dict[str, set[Part]]:
    """Parts that checks, media and the fields of accepted parts say a model family can use."""
    found: dict[str, set[Part]] = {}
    for family, networks in models().items():
        samplers = [one for one in map(_sampler, known(Sampler)) if any(_fits(one, net) for net in networks)]
        likelihoods = [one for one in known(Likelihood) if _scores(one, samplers, networks)]
        gives = frozenset().union(*(one.gives for one in likelihoods))
        medium = networks[0].medium
        own: list[Any] = [*map(type, samplers), *likelihoods]
        own += [one for one in known(Regulariser) if one.reads <= gives and likelihoods]
        own += [one for kind in (Task, Features) for one in known(kind) if one.medium == medium]
        own += [one for one in known(Reward) if one.medium in (None, medium)]
        own += [one for one in known(Medium) if one.name == medium]
        found[family] = {(one.family, one.name) for one in own}
        waiting = [*own, *([ImageModel, MatchingConfig] if medium == "image" else [])]
        while waiting:
            for kind in read_by(waiting.pop()):
                if kind in (Task, Reward, Features, Sampler, Likelihood, Regulariser):
                    continue  # each is asked by itself
                new = [one for one in known(kind) if (one.family, one.name) not in found[family]]
                found[family] |= {(one.family, one.name) for one in new}
                waiting += new
    return found


def _sampler(cls: Any) -> Any:
    return cls(steps=4, kernel=FlowSde(noise=0.7)) if cls is LatentSampler else cls(steps=4)


def _fits(sampler: Any, network: Denoiser) -> bool:
    try:
        sampler.check_denoiser(network)
    except UserError:
        return False
    return True


def _scores(likelihood: Any, samplers: list[Any], networks: list[Denoiser]) -> bool:
    for sampler in samplers:
        for network in (net for net in networks if _fits(sampler, net)):
            try:
                likelihood().check_fits(sampler, network)
            except UserError:
                continue
            return True
    return False


# ---- the table


def table() -> str:
    """A row per family of plug-ins; in italics what no recipe of the model family has."""
    recipes, possible, opens = used(), accepted(), networks()
    kinds: dict[str, list[str]] = {kind.family: [one.name for one in known(kind)] for kind in families()}
    for other in ("recipes of the command", "system"):
        kinds[other] = sorted({name for parts in recipes.values() for kind, name in parts if kind == other})
    kinds["network"] = sorted({name for parts in opens.values() for _, name in parts}, key=str.lower)
    rows = ["| part | " + " | ".join(FAMILIES) + " |", "|---" * (1 + len(FAMILIES)) + "|"]
    for kind, own in sorted(kinds.items()):
        cells = []
        for family in FAMILIES:
            plain = recipes[family] | opens[family]
            shown = [name for name in own if (kind, name) in plain | possible[family]]
            cells.append(", ".join(f"`{name}`" if (kind, name) in plain else f"*`{name}`*" for name in shown) or "-")
        if cells != ["-"] * len(FAMILIES):
            rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def left_over() -> str:
    """Parts that no recipe uses and that no check places."""
    recipes, possible = used(), accepted()
    placed = set().union(*recipes.values(), *possible.values())
    parts = [(kind.family, one.name) for kind in families() for one in known(kind)]
    return ", ".join(f"{family} `{name}`" for family, name in parts if (family, name) not in placed) or "none"


if __name__ == "__main__":
    print(f"{table()}\n\nleft over: {left_over()}")

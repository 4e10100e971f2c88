"""Which model families use which plug-ins, asked of the recipes and of the code's own checks.

What a part of a policy can be put together with is asked by trying: one part of a small method at a time is replaced by
it (`trials`), and the job is built. A test lets every job that is built run.

PYTHONPATH=src:tests python -m parts        prints the table of docs/parts.md
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tiny
import tiny_images
from unveil.denoisers.base import Denoiser
from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.denoisers.image import ImageModel
from unveil.denoisers.load import KINDS, PIPELINES, PUBLISHED, load_denoiser
from unveil.denoisers.uniform import UniformDenoiser
from unveil.learning.advantages import Advantage
from unveil.learning.estimators import SemiDeterministic
from unveil.learning.gates import Gate
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.likelihoods import OneStepLikelihood, TrajectoryLikelihood
from unveil.learning.noised import MatchingLikelihood
from unveil.learning.objectives import Objective, Weighting
from unveil.learning.regularisers import Kl, Regulariser, Velocity
from unveil.learning.reverse import ReverseLikelihood
from unveil.learning.selectors import Selector
from unveil.learning.views import Likelihood, TokenFilter
from unveil.processes.kernels import FlowSde
from unveil.recipe import build, load
from unveil.registry import Plugin, UserError, names
from unveil.rewards.base import Correct, Part, Reward, Shaped, Sum
from unveil.rewards.features import Features
from unveil.samplers.actions import Bernoulli
from unveil.samplers.base import Sampler
from unveil.samplers.decoding import DecodeRecipe
from unveil.samplers.latent import LatentSampler
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.reverse import ReverseSampler
from unveil.samplers.rules import Policy
from unveil.samplers.uniform import Ancestral, UniformSampler
from unveil.systems import catalogue
from unveil.systems.awm import WeightedMatching
from unveil.systems.diffusion_nft import DiffusionNft
from unveil.systems.grpo_guard import RegulatedRatio
from unveil.tasks.base import Task
from unveil.tasks.medium import Medium
from unveil.training.denoising_job import MatchingConfig
from unveil.training.policy_config import PolicyConfig, ProblemFilter
from unveil.training.policy_job import PolicyJob
from unveil.training.rollouts import GroupHook, Shaping
from unveil.training.runs import JudgeRecipe, PretrainRecipe, TrainRecipe

MASKED, UNIFORM, IMAGES = "masked tokens", "uniform tokens", "images"
FAMILIES = (MASKED, UNIFORM, IMAGES)
RECIPES = Path(__file__).parent.parent / "src" / "unveil" / "recipes"

Named = tuple[str, str]
"""Family of plug-ins, short name."""
PLACES: dict[type[Plugin], str] = {
    Advantage: "advantage", Objective: "objective", Weighting: "weighting", Selector: "selector", Gate: "gate",
    GroupHook: "groups", Shaping: "shaping", TokenFilter: "token_filter", ProblemFilter: "filter", Regulariser: "kl",
}  # fmt: skip
"""The families whose parts are tried, and the key of a policy that each stands in."""


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
    for own in dataclasses.fields(value):
        inside = getattr(value, own.name)
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


@functools.cache
def used() -> dict[str, set[Named]]:
    """Plug-ins of recipes, the systems that these belong to, the commands that run them, and the kinds of sample."""
    found: dict[str, set[Named]] = {family: set() for family in FAMILIES}
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


def networks() -> dict[str, set[Named]]:
    """The ``model_type`` or pipeline class of every network that can be opened."""
    classes: dict[str, Any] = dict(KINDS)
    for name, place in {**PUBLISHED, **PIPELINES}.items():
        module, _, attribute = place.partition(":")
        classes[name] = getattr(importlib.import_module(f"unveil.denoisers.{module}"), attribute)
    found: dict[str, set[Named]] = {family: set() for family in FAMILIES}
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


@functools.cache
def accepted() -> dict[str, set[Named]]:
    """Parts that checks, media and the fields of accepted parts say a model family can use."""
    found: dict[str, set[Named]] = {}
    for family, networks in models().items():
        samplers = [one for one in map(_sampler, known(Sampler)) if any(_fits(one, net) for net in networks)]
        likelihoods = [one for one in known(Likelihood) if _scores(one, samplers, networks)]
        medium = networks[0].medium
        own: list[Any] = [*map(type, samplers), *likelihoods]
        own += [one for kind in (Task, Features) for one in known(kind) if one.medium == medium]
        own += [one for one in known(Reward) if one.medium in (None, medium)]
        own += [one for one in known(Medium) if one.name == medium]
        own += [type(trial.part) for trial in trials() if trial.family == family and trial.refused is None]
        found[family] = {(one.family, one.name) for one in own}
        waiting = [*own, *([ImageModel, MatchingConfig] if medium == "image" else [])]
        while waiting:
            for kind in read_by(waiting.pop()):
                if kind in (Task, Reward, Features, Sampler, Likelihood, *PLACES):
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


# ---- what can be put together


@dataclass(kw_only=True)
class Method:
    """A small policy job that runs, of which one part at a time is replaced."""

    name: str
    family: str
    sampler: Sampler
    choices: dict[str, Any]
    net: Denoiser = field(repr=False)

    def config(self, **changes: Any) -> PolicyConfig:
        """With rewards that every part finds what it asks for in, and a regulariser for the gates."""
        images = self.family == IMAGES
        reward = Sum(parts={"score": Part(reward=Shaped()), "right": Part(reward=Correct(), role="audit")})
        rollout = {"sampler": self.sampler, "prompts": 2, "group_size": 4}
        own = {"reward": reward, "kl": Kl(beta=0.1)} | self.choices | changes
        return tiny_images.policy(rollout=rollout, **own) if images else tiny.policy("mdpo", rollout=rollout, **own)

    def job(self, folder: Path, config: PolicyConfig) -> PolicyJob:
        job: Any = tiny_images.job if self.family == IMAGES else tiny.job
        built: PolicyJob = job(folder, config, self.net)
        return built


@functools.cache
def methods() -> tuple[Method, ...]:
    """One per kind of views that there is, and per kind of chain."""
    plain: dict[str, Any] = {"advantage": known_as(Advantage, "group"), "selector": known_as(Selector, "all")}
    plain |= {"objective": known_as(Objective, "clipped"), "weighting": known_as(Weighting, "token_mean")}
    nft = {name: value for name, value in vars(DiffusionNft()).items() if name != "kl"} | {"kl": Velocity(beta=0.1)}
    masked, ordered = MaskedSampler(steps=5, temperature=0.7), Policy(action=Bernoulli())
    order = TrajectoryLikelihood(tokens="none", order=Bernoulli())

    def method(family: str, sampler: Sampler, likelihood: Likelihood, net: Denoiser, name: str = "") -> Method:
        return Method(
            name=name or likelihood.name, family=family, sampler=sampler, net=net,
            choices=plain | {"likelihood": likelihood},
        )  # fmt: skip

    latent, mlp = tiny_images.sampler(), tiny_images.Mlp()
    scores = ReverseSampler(steps=5), ReverseLikelihood(), tiny.score_denoiser()
    return (
        method(MASKED, masked, TrajectoryLikelihood(), tiny.denoiser()),
        method(MASKED, replace(masked, rule=ordered), order, tiny.with_policy(tiny.denoiser()), "order"),
        method(MASKED, masked, OneStepLikelihood(), tiny.denoiser()),
        method(MASKED, masked, SemiDeterministic(), tiny.denoiser()),
        method(MASKED, *scores),
        method(UNIFORM, Ancestral(steps=5), ReverseLikelihood(), tiny.uniform_denoiser()),
        method(IMAGES, latent, TransitionLikelihood(), mlp),
        method(IMAGES, latent, RegulatedRatio(), mlp),
        method(IMAGES, latent, MatchingLikelihood(), mlp),
        method(IMAGES, latent, WeightedMatching(draws=2), mlp),
        Method(name="implicit", family=IMAGES, sampler=latent, choices=plain | nft, net=mlp),
    )


def known_as(family: type[Plugin], name: str) -> Any:
    """A part by its name, with settings that fit the small methods."""
    cls: Any = family.known[name]
    settings: dict[Named, dict[str, Any]] = {
        ("group_hook", "inpaint"): {"chunk_min": 1, "chunk_max": 2, "free_tail": 1},
        ("group_hook", "experts"): {"block_length": tiny.RESPONSE},
    }
    return cls(**settings.get((cls.family, name), {"beta": 0.1} if family is Regulariser else {}))


@dataclass(kw_only=True)
class Trial:
    """A method with one part replaced; ``refused`` is the message of the refusal."""

    method: Method
    part: Any
    refused: str | None = None

    @property
    def family(self) -> str:
        return self.method.family

    def config(self) -> PolicyConfig:
        return self.method.config(**{PLACES[kind_of(self.part)]: self.part})


@functools.cache
def trials() -> tuple[Trial, ...]:
    """Every part in every method, but for those that have no say there: `plugins_in`."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for method in methods():
            for kind in PLACES:
                for cls in known(kind):
                    if kind is Selector and not chooses(cls, method.choices["likelihood"]):
                        continue
                    decoder = {"decoder": method.sampler} if kind is ProblemFilter else {}
                    part = cls(**decoder, pool=32, every=1) if decoder else known_as(kind, cls.name)
                    trial = Trial(method=method, part=part)
                    try:
                        method.job(Path(folder), trial.config())
                    except UserError as error:
                        trial.refused = str(error)
                    found.append(trial)
    return tuple(found)


def chooses(selector: Any, likelihood: Likelihood) -> bool:
    """Whether a selector has a say: it chooses steps of likelihoods that have steps, or whole chains."""
    return likelihood.per_step or getattr(selector, "chains") is not Selector.chains  # noqa: B009


def kind_of(part: Any) -> type[Plugin]:
    return next(kind for kind in PLACES if isinstance(part, kind))


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

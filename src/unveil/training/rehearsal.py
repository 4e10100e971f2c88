"""How much a run of images will draw, ask and step: its own sampler and likelihood, on a network that is none.

A sample of the stand-in is one number and a prediction is zeros, so that an update costs next to nothing; what is
counted is counted by the code that a run goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.advantages import terminal
from unveil.learning.views import FIRST
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory, Noise
from unveil.training.policy_config import PolicyConfig
from unveil.training.rollouts import portions
from unveil.training.runs import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update counts, on all processes together.

    Attributes:
        rollouts: chains.
        drawn: network evaluations of drawing them.
        views: what is scored in a pass.
        pass_forwards: network evaluations of scoring all views once.
        scorings: passes without gradient.
        gradients: passes with one.
        steps: optimiser steps.
        states: states of a chain that are held until it has been trained on; ``fields`` further ones of their size.
        exact: False if rewards decide what is trained on: views, and all that follows from them, are then the most.
    """

    rollouts: int
    drawn: int
    views: int
    pass_forwards: int
    scorings: int
    gradients: int
    steps: int
    states: int
    fields: int
    exact: bool

    @property
    def forwards(self) -> int:
        return self.drawn + (self.scorings + self.gradients) * self.pass_forwards


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a run, as `unveil.training.log.Cost` counts them; ``evaluations`` are network evaluations that it leaves out.
    ``exact`` as in `Update`: else forwards and optimiser steps are at most these."""

    rollouts: int
    forwards: int
    optimizer_steps: int
    evaluations: int
    exact: bool


class StandIn(ContinuousDenoiser):
    """One number for an image, on another denoiser's process."""

    def __init__(self, spec: ContinuousSpec) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=(1,), process=spec.process, prediction=spec.prediction)
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x)

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :1]

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0[:, :, None, None]

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError


def rehearse(recipe: TrainRecipe, spec: ContinuousSpec) -> tuple[list[Update], Counts]:
    """All updates of a run on a denoiser with that spec, and what they come to.

    Raises:
        UserError: the recipe does not fit, as the run would say, draws more than its groups, or differentiates rewards.
    """
    policy, rollout = recipe.policy, recipe.policy.rollout
    if policy.likelihood.differentiates:
        raise UserError(
            f"policy.likelihood: {policy.likelihood.name!r} runs chains again, which is not counted beforehand "
            "(allowed here: those that score stored steps or noised copies)"
        )
    for key, value in (("filter", policy.filter), ("groups", policy.groups)):
        if value is not None:
            raise UserError(
                f"policy.{key}: {value.name!r} draws what cannot be counted beforehand (allowed here: null)"
            )
    denoiser = StandIn(spec)
    sampler = rollout.sampler
    for one in (sampler, *recipe.eval.decoders.values()):
        one.check_denoiser(denoiser)
        one.check_fits(rollout.response_length)
    assert isinstance(sampler, LatentSampler)
    policy.likelihood.check_fits(sampler, denoiser)
    known: dict[tuple[bool, ...], Update] = {}
    updates = []
    for number in range(recipe.updates):
        own = sampler.at(number, recipe.seed)
        inside = tuple(own.window.inside(own.steps).tolist())
        if inside not in known:
            known[inside] = _update(policy, own, denoiser)
        updates.append(known[inside])
    every = {number for number in range(1, recipe.updates + 1) if number % recipe.eval.every == 0}
    evaluated = len({0, recipe.updates} | every) * (recipe.eval.problems + min(recipe.eval.shown, recipe.eval.problems))
    counts = Counts(
        rollouts=sum(one.rollouts for one in updates),
        forwards=sum(one.forwards for one in updates),
        optimizer_steps=sum(one.steps for one in updates),
        evaluations=evaluated * sum(chain_forwards(one, denoiser) for one in recipe.eval.decoders.values()),
        exact=all(one.exact for one in updates),
    )
    return updates, counts


def chain_forwards(sampler: Sampler, denoiser: StandIn) -> int:
    """Network evaluations of a chain that shares nothing."""
    return _drawn(sampler, denoiser, [0], 1, set(), [slice(None)]).forwards


def _drawn(
    sampler: Sampler, denoiser: StandIn, problems: list[int], batch: int, needs: set[str], parts: list[slice]
) -> LatentTrajectory:
    copies = [place - problems.index(problem) for place, problem in enumerate(problems)]  # groups are neighbours
    start = Noise(condition=denoiser.condition([""] * len(problems)), problems=problems, copies=copies)
    seeds = list(range(len(problems)))
    found = [sampler.sample(denoiser, start.rows(part), seeds[part], needs=needs, batch_size=batch) for part in parts]
    return LatentTrajectory.joined(found)


@torch.no_grad()
def _update(policy: PolicyConfig, sampler: LatentSampler, denoiser: StandIn) -> Update:
    rollout, likelihood = policy.rollout, policy.likelihood
    group = torch.arange(rollout.prompts).repeat_interleave(rollout.group_size)
    parts = portions(group, rollout.batch_size) if rollout.score_beside else [slice(None)]
    trajectory = _drawn(sampler, denoiser, group.tolist(), rollout.batch_size, policy.needs, parts)
    seeds = list(range(len(group)))

    def views(advantage: Tensor) -> Any:
        """What is scored with these advantages (B,)."""
        advantages = advantage[:, None] * trajectory.active
        kept = policy.selector.chains(terminal(advantages, trajectory.active), group, rollout.sampler)
        chosen = trajectory.active.float()
        if likelihood.per_step:
            chosen = policy.selector.choose(advantages, trajectory, seeds, denoiser.spec) * kept[:, None]
        return likelihood.views(trajectory, chosen, seeds, denoiser.spec, FIRST)

    # Neighbours of which one is good and one bad: the most that a selector can choose. With none it chooses the least.
    signs = 1.0 - 2.0 * (torch.arange(len(group)) % 2)
    most = views(signs)
    exact = len(most) == len(views(torch.zeros(len(group))))
    inner, shares = policy.inner_updates, policy.minibatches
    sets = inner if likelihood.resamples else 1
    keep_old = inner * shares > 1 or rollout.drawn_by != "policy"
    asks_old = keep_old or policy.token_filter is not None or bool(likelihood.reads_old)
    old = asks_old and likelihood.recorded(most, trajectory) is None
    snapshots = len({one.towards for one in policy.in_force.values()})
    held = trajectory.scored if trajectory.scored is not None else trajectory.latents
    return Update(
        rollouts=len(group),
        drawn=trajectory.forwards,
        views=len(most),
        pass_forwards=likelihood.score(denoiser, most, rollout.sampler).forwards if len(most) else 0,
        scorings=sets * (int(old) + snapshots),
        gradients=inner,
        steps=inner * shares,
        states=1 if held is None else held.shape[1],
        fields=sum(trajectory.steps for value in (trajectory.means, trajectory.guesses) if value is not None),
        exact=exact,
    )

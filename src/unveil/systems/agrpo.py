"""AGRPO: amortised group-relative policy optimisation, a baseline that trains on a sample of the decoding steps.

Zhan: *Simple Policy Gradients for Reasoning with Diffusion Language Models*, 2025, arXiv 2510.04019. The policy
gradient of a decoding chain is a sum over its steps of what each revealed; M of them are drawn and stand for all:

    A     = r - mean(r)                                          no division by the standard deviation
    u_m   = (m + uniform) / M,   s_m = F^{-1}(u_m)               m = 0..M-1, F the distribution function of p
    loss  = 1 / (M G) * sum over chains and draws of w_m * sum over tokens that step s_m revealed of
            -min(rho A, clip(rho) A),    rho = p_theta(token | x_s) / p_old(token | x_s)

over the T steps up to the last one that reveals a token other than an end token. p is uniform, or proportional to the
entropy of what a step reveals; w = 1 / (T p), whose expectation over the draws is the mean over steps (``estimates:
mean``, the released code). ``estimates: sum`` multiplies by T: the policy gradient itself, in which a chain of many
steps has more to say than a short one. Sums over tokens are divided by no length.

Differs from the released code: draws are stratified within each chain, from its own seed (the code deals out strata of
the whole batch, so that a chain's draws depend on the others); the entropy is that of the untempered distribution; a
response of end tokens alone is trained at its first step (the code stops there); log-probabilities are those of the
unfiltered distribution, so leave top-p and top-k off (the code stores which tokens its filters kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped, TokenSum
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import Selector
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems import System

SYSTEM = System(
    name="agrpo",
    title="Simple Policy Gradients for Reasoning with Diffusion Language Models",
    paper="2510.04019",
    family="masked",
    checked_in="cj_grpo",
    claim="a stratified sample of decoding steps gives the policy gradient without a surrogate likelihood",
)


@dataclass(kw_only=True)
class DrawnSteps(Selector, name="drawn"):
    """``draws`` stratified draws of steps, with replacement, each weighted so that together they stand for all."""

    draws: Annotated[int, Field(ge=1)] = 24
    """Draws per chain, M; a step that is drawn twice is scored once, with twice the weight."""
    by: Literal["uniform", "entropy"] = "entropy"
    """Every step alike, or in proportion to the entropy of the tokens that it reveals."""
    estimates: Literal["mean", "sum"] = "mean"
    """What the draws stand for: the mean over a chain's steps, or their sum."""

    def __post_init__(self) -> None:
        fields = {"guesses", "revealed"}
        self.needs = frozenset(fields | {"entropy"} if self.by == "entropy" else fields)

    def choose(
        self, advantages: Tensor, trajectory: TokenTrajectory, seeds: Sequence[int], spec: DenoiserSpec
    ) -> Tensor:
        chance = self.chances(trajectory, spec)
        steps = (chance > 0).sum(1, keepdim=True)
        uniform = [torch.rand(self.draws, generator=generator(seed, "steps"), dtype=torch.float64) for seed in seeds]
        points = ((torch.arange(self.draws) + torch.stack(uniform)) / self.draws).clamp(max=1 - 2**-53)
        reached = chance.cumsum(1)
        drawn = torch.searchsorted(reached / reached[:, -1:], points, right=True)
        weight = 1 / (self.draws * chance.gather(1, drawn))
        if self.estimates == "mean":
            weight = weight / steps
        return torch.zeros_like(chance).scatter_add_(1, drawn, weight).float()

    def chances(self, trajectory: TokenTrajectory, spec: DenoiserSpec) -> Tensor:
        """(B, S) probability of each step, float64, 0 behind the last that reveals a token other than an end token."""
        assert trajectory.revealed is not None and trajectory.guesses is not None
        text = trajectory.revealed & ~torch.isin(trajectory.guesses, torch.tensor(spec.end_ids))
        place = torch.arange(trajectory.steps)
        last = torch.where(text.any(2), place, 0).amax(1, keepdim=True)
        open_steps = (place <= last).double()
        if self.by == "entropy":
            assert trajectory.entropy is not None
            open_steps = open_steps * ((trajectory.entropy * trajectory.revealed).sum(2).double() + 1e-8)
        return open_steps / open_steps.sum(1, keepdim=True)


@dataclass(kw_only=True)
class Agrpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="none"))
    selector: DrawnSteps = field(default_factory=DrawnSteps)
    likelihood: TrajectoryLikelihood = field(default_factory=lambda: TrajectoryLikelihood(tokens="revealed"))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.2))
    weighting: TokenSum = field(default_factory=TokenSum)
    kl: Kl = field(default_factory=Kl)

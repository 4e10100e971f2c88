"""What stands in for log p of continuous samples: the stored steps of the chain, each a Gaussian.

    log p(x_s | x_t) = sum over dimensions of -(x_s - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

with mean and std by the call that drew the step (`LatentSampler.transition`): with the parameters that drew it the
log-probability is the one that was recorded, and a ratio is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.views import FIRST, Inner, Likelihood, Scores, Views
from unveil.processes.gaussian import Reduce
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory


@dataclass(kw_only=True)
class StepViews(Views):
    """N stored steps. States stay where they are in the trajectory until a micro-batch asks for its own.

    Attributes:
        trajectory: the chains, with ``scored`` (or ``latents``).
        ends: (N, 2) float64, the times t and s.
    """

    called = "steps of latents"
    steps_are_units: ClassVar[bool] = True

    trajectory: LatentTrajectory
    ends: Tensor

    @property
    def before(self) -> tuple[Tensor, Tensor]:
        """States x_t (N, *D) and times t (N,)."""
        return self.trajectory.states_at(self.rows, self.steps), self.ends[:, 0]

    @property
    def after(self) -> tuple[Tensor, Tensor]:
        """States x_s (N, *D) and times s (N,)."""
        return self.trajectory.states_at(self.rows, self.steps + 1), self.ends[:, 1]

    @property
    def condition(self) -> Condition:
        return self.trajectory.condition.rows(self.rows)


@dataclass(kw_only=True)
class TransitionLikelihood(Likelihood, name="transition"):
    """log p(x_s | x_t) of the steps that the sampler `latent` drew with noise."""

    makes = StepViews
    gives: ClassVar[frozenset[str]] = frozenset({"mean", "std", "velocity"})
    form: Literal["density", "squares"] = "density"
    """``squares``: -|x_s - mean|^2 alone, 2 std^2 times the log-density but for a constant (CPS's code): noisy steps
    weigh more."""
    reduce: Reduce = "mean"
    """``mean`` over dimensions, as most code has it: a ratio is then the true one to the power 1/D, and clip ranges and
    KL weights are small accordingly. ``sum``: the log-density itself."""

    def __post_init__(self) -> None:
        needs = frozenset({"scored", "times", "log_prob"})
        self.needs = needs if self.form == "density" else needs | {"stds"}

    def check_fits(self, sampler: Sampler, denoiser: ContinuousDenoiser) -> None:
        if not isinstance(sampler, LatentSampler):
            raise UserError(f"policy.likelihood: 'transition' scores the sampler 'latent', not {sampler.name!r}")
        if not sampler.kernel.stochastic:
            raise UserError(
                f"policy.rollout.sampler.kernel: {sampler.kernel.name!r} without noise leaves nothing to score "
                "(give it noise, or choose a likelihood of finished samples)"
            )

    def views(
        self,
        trajectory: LatentTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: ContinuousSpec,
        inner: Inner = FIRST,
    ) -> StepViews:
        assert trajectory.times is not None
        rows, steps = ((chosen > 0) & trajectory.noisy).nonzero(as_tuple=True)
        ends = torch.stack([trajectory.times[rows, steps], trajectory.times[rows, steps + 1]], 1)
        return StepViews(rows=rows, steps=steps, length=torch.ones(len(rows)), trajectory=trajectory, ends=ends)

    def recorded(self, views: StepViews, trajectory: LatentTrajectory) -> Tensor:
        assert trajectory.log_prob is not None
        value, dimensions = trajectory.log_prob[views.rows, views.steps], trajectory.samples[0].numel()
        if self.reduce == "mean":
            value, dimensions = value / dimensions, 1
        if self.form == "squares":
            assert trajectory.stds is not None
            value = _squares(value, trajectory.stds[views.rows, views.steps], dimensions)
        return value[:, None]

    def score(self, denoiser: ContinuousDenoiser, views: StepViews, sampler: LatentSampler) -> Scores:
        device = denoiser.device
        (x, t), (after, s) = views.before, views.after
        gaussian, guess = sampler.transition(denoiser, x.to(device), t, s, views.condition.to(device))
        log_prob = gaussian.log_prob(after.to(device), self.reduce)
        if self.form == "squares":
            log_prob = _squares(log_prob, gaussian.std.to(device), 1 if self.reduce == "mean" else x[0].numel())
        return Scores(
            log_prob=log_prob[:, None],
            forwards=len(views) * sampler.guidance.evaluations,
            mean=gaussian.mean,
            std=gaussian.std,
            velocity=denoiser.spec.process.velocity(guess, t),
        )


def _squares(log_prob: Tensor, std: Tensor, dimensions: int) -> Tensor:
    """-|x - mean|^2 from log-densities (N,) of ``dimensions`` dimensions with std (N,)."""
    return 2 * std**2 * (log_prob + dimensions * (std.log() + 0.5 * math.log(2 * math.pi)))

"""What stands in for log p of finished samples: how well the network recognises them when they are noised again.

No chain is needed, only what it ended with; the sampler may be any. Noise and times derive from the chain's seed: old,
reference and new network see the same ones, and neither batch nor rank changes them.

`MatchingLikelihood` takes all copies of a sample for one; of a `CopyLikelihood` each has a probability of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.matching import TimeDistribution, UniformTimes, prediction_errors
from unveil.learning.views import FIRST, Inner, Likelihood, Scores, Views
from unveil.processes.gaussian import GaussianProcess, Guess, Prediction
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory
from unveil.seeds import derive_seeds, normal_rows, uniform_rows


@dataclass(kw_only=True)
class NoisedViews(Views):
    """N noised copies of finished samples; the noise is drawn when a micro-batch asks for it.

    Attributes:
        trajectory: the chains; only their samples and conditions are read.
        times: (N,) float64, how noisy each copy is.
        seeds: (N,) of each copy's noise.
        coefficient: (N,) factor of each copy's log-probability in every sum.
    """

    called = "noised copies of samples"

    trajectory: LatentTrajectory
    times: Tensor
    seeds: Tensor
    coefficient: Tensor

    @property
    def factors(self) -> Tensor:
        return self.coefficient[:, None]

    @property
    def clean(self) -> Tensor:
        """(N, *D) the finished samples."""
        return self.trajectory.samples[self.rows]

    @property
    def noise(self) -> Tensor:
        """(N, *D) from N(0, I)."""
        return normal_rows(self.trajectory.samples.shape[1:], self.seeds.tolist())

    @property
    def condition(self) -> Condition:
        return self.trajectory.condition.rows(self.rows)


@dataclass(frozen=True, kw_only=True)
class SamplerGrid(TimeDistribution, name="sampler_grid"):
    """The times at which the sampler asked the network, one as often as every other."""

    reads_grid = True
    first: Annotated[int, Field(ge=0)] = 0
    """Steps left out at the noisy end."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.99
    """The times of the first ``share`` of the steps; below 1 at least the last is left out."""
    initial: bool = False
    """One copy of every sample is at the first of them, the others at the rest (AWM's ``discrete_with_init``)."""

    def count(self, steps: int) -> int:
        """How many of the times of ``steps`` steps there are."""
        return int(self.share * steps) - self.first

    def place(self, u: Tensor, steps: int) -> Tensor:
        """The steps whose times they are, of uniforms u in (0, 1)."""
        return self.first + (u.double() * self.count(steps)).long()

    def spaced(self, u: Tensor, draws: int, steps: int) -> Tensor:
        """The steps (B, draws) of so many copies at equal distances, no two at one time; u (B, 1) in (0, 1 / draws)."""
        if not self.initial:
            return self.place(torch.arange(draws) / draws + u, steps)
        zero = torch.full((len(u), 1), self.first)
        if draws == 1:
            return zero
        rest, share = replace(self, first=self.first + 1, initial=False), draws / (draws - 1)
        return torch.cat([zero, rest.spaced(share * u, draws - 1, steps)], 1)

    def times(self, u: Tensor, process: GaussianProcess) -> Tensor:
        raise TypeError("the times are the trajectory's")


def strata(seeds: Sequence[int], draws: int, inner: Inner) -> tuple[Tensor, Tensor]:
    """Uniforms (B, draws), one in each of so many equal parts of (0, 1), and seeds (B * draws,) of copies' noise."""
    uniform = uniform_rows([draws], derive_seeds(seeds, inner.number, "times"))
    # Away from both ends, at which a prediction may say nothing.
    u = ((torch.arange(draws) + uniform.double()) / draws).clamp(1e-3, 1 - 1e-3)
    noise = [derive_seeds(seeds, inner.number, "noise", draw) for draw in range(draws)]
    return u, torch.tensor(noise).T.flatten()


class Recognised(NamedTuple):
    """What a network says of noised copies, and what they were made of; all (N, *D) on its device.

    Attributes:
        guess: in the normal form.
        prediction: in the network's own parameterisation.
        clean: the finished samples.
        noise: that was put on them.
    """

    guess: Guess
    prediction: Tensor
    clean: Tensor
    noise: Tensor


def recognise(denoiser: ContinuousDenoiser, views: NoisedViews) -> Recognised:
    """Let the network look at noised copies."""
    process, device = denoiser.spec.process, denoiser.device
    clean, noise = views.clean.to(device), views.noise.to(device)
    x = process.corrupt(clean, views.times, noise)
    prediction = denoiser.predict(x, views.times, views.condition.to(device))
    return Recognised(process.guess(prediction, denoiser.spec.prediction, x, views.times), prediction, clean, noise)


class FinishedLikelihood(Likelihood):
    """Scores finished samples of the sampler `latent`."""

    makes: ClassVar[type[Views]] = NoisedViews
    gives: ClassVar[frozenset[str]] = frozenset({"velocity"})
    resamples = True
    per_step: ClassVar[bool] = False

    def check_fits(self, sampler: Sampler, denoiser: Any) -> None:
        if not isinstance(sampler, LatentSampler):
            raise UserError(f"policy.likelihood: {self.name!r} is for samples of 'latent', not of {sampler.name!r}")
        if sampler.greedy:
            raise UserError(
                f"policy.rollout.sampler.share: {sampler.share!r} with chains that draw no noise makes all samples of "
                "a group equal (allowed: nothing; or a kernel with noise)"
            )


@dataclass(kw_only=True)
class CopyLikelihood(FinishedLikelihood):
    """Several noised copies per sample, each a step of its own: with ratios of level ``step`` one per copy, of level
    ``sequence`` with ``normalise`` that of the mean over the copies."""

    draws: Annotated[int, Field(ge=1)] | None = None
    """Noisy copies per sample, one in each of so many equal parts of the times; None: one for every time of the
    sampler's grid that counts."""
    times: TimeDistribution = field(default_factory=SamplerGrid)
    """How noisy they are."""

    def __post_init__(self) -> None:
        if self.times.reads_grid:
            self.needs = frozenset({"times"})
        elif self.draws is None:
            raise UserError(f"draws: needed for times that are not the sampler's ({self.times.name!r}), got null")

    def check_fits(self, sampler: Sampler, denoiser: Any) -> None:
        super().check_fits(sampler, denoiser)
        assert isinstance(sampler, LatentSampler)
        most, which = sampler.steps, "steps of the rollout"
        if isinstance(self.times, SamplerGrid):
            most, which = self.times.count(sampler.steps), f"times that count of a grid of {sampler.steps} steps"
        if most < 1:
            raise UserError(f"policy.likelihood.times: leave none of the times of {sampler.steps} steps")
        if self.draws is not None and self.draws > most:
            raise UserError(f"policy.likelihood.draws: should be at most {most} ({which}), got {self.draws}")

    def views(
        self,
        trajectory: LatentTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: ContinuousSpec,
        inner: Inner = FIRST,
    ) -> NoisedViews:
        grid = self.times if isinstance(self.times, SamplerGrid) else None
        draws = self.draws
        if draws is None:
            assert grid is not None
            draws = grid.count(trajectory.steps)
        u, noise = strata(seeds, draws, inner)
        if grid is not None:
            assert trajectory.times is not None
            steps = grid.spaced(u[:, :1], draws, trajectory.steps)
            times = trajectory.times.gather(1, steps)
        else:
            steps = torch.arange(draws).expand(u.shape)
            times = self.times.times(u, spec.process)
        rows = torch.arange(len(trajectory)).repeat_interleave(draws)
        one = torch.ones(len(rows))
        return self.made(
            spec, rows=rows, steps=steps.flatten(), length=one, trajectory=trajectory, times=times.flatten(),
            seeds=noise, coefficient=one,
        )  # fmt: skip

    def made(self, spec: ContinuousSpec, **fields: Any) -> NoisedViews:
        """Views from their fields."""
        return NoisedViews(**fields)


@dataclass(kw_only=True)
class MatchingLikelihood(FinishedLikelihood, name="matching"):
    """Minus the matching loss of the finished sample, averaged over ``draws`` noisy copies: with a weight for an
    advantage it is weighted regression, and the ancestor of AWM and DiffusionNFT."""

    draws: Annotated[int, Field(ge=1)] = 1
    """Noisy copies per chain, one in each of so many equal parts of the time distribution."""
    times: TimeDistribution = field(default_factory=UniformTimes)
    """How noisy they are."""
    space: Prediction | None = None
    """The parameterisation whose squared error counts; None: what the network predicts."""

    def __post_init__(self) -> None:
        if self.times.reads_grid:
            raise UserError(f"times: {self.times.name!r} are a sampler's, which 'matching' does not read")

    def views(
        self,
        trajectory: LatentTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: ContinuousSpec,
        inner: Inner = FIRST,
    ) -> NoisedViews:
        u, noise = strata(seeds, self.draws, inner)
        rows = torch.arange(len(trajectory)).repeat_interleave(self.draws)
        return NoisedViews(
            rows=rows,
            steps=trajectory.last_steps[rows],
            length=torch.full((len(rows),), 1 / self.draws),
            trajectory=trajectory,
            times=self.times.times(u.flatten(), spec.process),
            seeds=noise,
            coefficient=torch.full((len(rows),), 1 / self.draws),
        )

    def score(self, denoiser: ContinuousDenoiser, views: NoisedViews, sampler: LatentSampler) -> Scores:
        spec, t = denoiser.spec, views.times
        guess, prediction, clean, noise = recognise(denoiser, views)
        errors = prediction_errors(spec.process, spec.prediction, prediction, clean, t, noise, self.space)
        return Scores(log_prob=-errors[:, None], forwards=len(views), velocity=spec.process.velocity(guess, t))

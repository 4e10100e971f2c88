"""What stands in for log p of finished samples: how well the network recognises them when they are noised again.

No chain is needed, only what it ended with; the sampler may be any. Noise and times derive from the chain's seed: old,
reference and new network see the same ones, and neither batch nor rank changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.matching import TimeDistribution, UniformTimes, prediction_errors
from unveil.learning.views import FIRST, Inner, Likelihood, Scores, Views
from unveil.processes.gaussian import Prediction
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory
from unveil.seeds import derive_seed, generator


@dataclass(kw_only=True)
class NoisedViews(Views):
    """N noised copies of finished samples; the noise is drawn when a micro-batch asks for it.

    Attributes:
        trajectory: the chains; only their samples and conditions are read.
        times: (N,) float64, how noisy each copy is.
        seeds: (N,) of each copy's noise.
        coefficient: (N,) factor of each copy's log-probability in every sum.
    """

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
        shape = self.trajectory.samples.shape[1:]
        streams = (torch.Generator().manual_seed(seed) for seed in self.seeds.tolist())
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams])

    @property
    def condition(self) -> Condition:
        return self.trajectory.condition.rows(self.rows)


@dataclass(kw_only=True)
class MatchingLikelihood(Likelihood, name="matching"):
    """Minus the matching loss of the finished sample, averaged over ``draws`` noisy copies: with a weight for an
    advantage it is weighted regression, and the ancestor of AWM and DiffusionNFT."""

    gives: ClassVar[frozenset[str]] = frozenset({"velocity"})
    resamples = True
    per_step: ClassVar[bool] = False
    draws: Annotated[int, Field(ge=1)] = 1
    """Noisy copies per chain, one in each of so many equal parts of the time distribution."""
    times: TimeDistribution = field(default_factory=UniformTimes)
    """How noisy they are."""
    space: Prediction | None = None
    """The parameterisation whose squared error counts; None: what the network predicts."""

    def check_fits(self, sampler: Sampler, denoiser: ContinuousDenoiser) -> None:
        if not isinstance(sampler, LatentSampler):
            raise UserError(f"policy.likelihood: {self.name!r} is for samples of 'latent', not of {sampler.name!r}")

    def views(
        self,
        trajectory: LatentTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: ContinuousSpec,
        inner: Inner = FIRST,
    ) -> NoisedViews:
        count = len(trajectory)
        place = torch.arange(self.draws)
        uniform = [torch.rand(self.draws, generator=generator(seed, inner.number, "times")) for seed in seeds]
        # Away from both ends, at which a prediction may say nothing.
        u = ((place + torch.stack(uniform).double()) / self.draws).clamp(1e-3, 1 - 1e-3)
        rows = torch.arange(count).repeat_interleave(self.draws)
        noise = [derive_seed(seed, inner.number, "noise", draw) for seed in seeds for draw in range(self.draws)]
        return NoisedViews(
            rows=rows,
            steps=trajectory.last_steps[rows],
            length=torch.full((len(rows),), 1 / self.draws),
            trajectory=trajectory,
            times=self.times.times(u.flatten(), spec.process),
            seeds=torch.tensor(noise),
            coefficient=torch.full((len(rows),), 1 / self.draws),
        )

    def score(self, denoiser: ContinuousDenoiser, views: NoisedViews, sampler: LatentSampler) -> Scores:
        spec, device, t = denoiser.spec, denoiser.device, views.times
        clean, noise = views.clean.to(device), views.noise.to(device)
        x = spec.process.corrupt(clean, t, noise)
        prediction = denoiser.predict(x, t, views.condition.to(device))
        errors = prediction_errors(spec.process, spec.prediction, prediction, clean, t, noise, self.space)
        return Scores(
            log_prob=-errors[:, None],
            forwards=len(views),
            velocity=spec.process.velocity(spec.process.guess(prediction, spec.prediction, x, t), t),
        )

"""GRPO-Guard: importance ratios of a flow's steps whose logarithm has mean 0 and the same scale at every step.

Wang, Liang, Liu et al.: *GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping*,
2025, arXiv 2510.22319. A step was drawn as x_s = mu_old + std z; with D = mu - mu_old the log-ratio of its densities is

    log rho = (D z) / std - |D|^2 / (2 std^2)

Its mean is negative, and both terms grow as the noise falls. A clip range around 1 then binds unevenly: ratios of good
samples stay below it, those of bad ones leave it, and only the cleanest steps are ever clipped. The paper takes

    log rho^ = std (log rho + |D|^2 / (2 std^2)) = D z               likelihood `regulated`, ratio: ratio_norm
    loss     = mean over images and steps of delta * -min(rho^ A, clip(rho^, 1 - c, 1 + c) A),    delta = 1 / (t - s)

with products averaged over dimensions, weighting `by_step`. Everything else is Flow-GRPO without KL. ``mean_only``
leaves out the factor std; the other step weights are those of DanceGRPO's form and of TempFlow-GRPO (2508.04324).

The rollout records mu_old (trajectory field ``means``): it costs as much memory as the latents do, on the CPU, and no
forward pass; computing it again would cost one per step. D z is summed as it stands, not as a difference of two
log-densities and a correction, which are the same in exact arithmetic and lose six digits in float32.

**Units of the clip.** log rho^ is in units of (latent)^2: its standard deviation over z is |D| / dimensions, the root
mean square of D over sqrt(dimensions). The paper's 2e-6 is for 65,536 dimensions. The log has the measured one, step by
step, as ``steps/log_ratio_std``; a clip of about one of them acts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.latents import StepViews, TransitionLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import MeanSpace
from unveil.learning.selectors import ButLast, Selector
from unveil.learning.views import Scores
from unveil.processes.gaussian import Gaussian, per_sample, spread
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory
from unveil.systems import System

SYSTEM = System(
    name="grpo_guard",
    title="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    paper="2510.22319",
    family="image",
    claim="centred and rescaled log-ratios make clipping even over steps and signs: nearer to the data at equal reward",
)


@dataclass(kw_only=True)
class RegulatedRatio(TransitionLikelihood, name="regulated"):
    """Log-ratios of stored steps against the policy that drew them, whose own log-probability counts as 0."""

    ratio: Literal["none", "mean_only", "ratio_norm"] = "ratio_norm"
    """``none``: of the densities (Flow-GRPO). ``mean_only``: without their negative mean, D z / std. ``ratio_norm``:
    also without the scale, D z."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form != "density":
            raise UserError(f"form: {self.form!r} has no deviation that could be regulated (allowed: density)")
        self.needs = self.needs - {"log_prob"} | {"means"}

    def check_fits(self, sampler: Sampler, denoiser: ContinuousDenoiser) -> None:
        super().check_fits(sampler, denoiser)
        if isinstance(sampler, LatentSampler) and sampler.kernel.name == "cps":
            raise UserError(
                "policy.rollout.sampler.kernel: 'cps' leaves the deviation out of its log-probabilities, so that "
                "'regulated' would scale them twice (allowed: flow, dance, ddim)"
            )

    def recorded(self, views: StepViews, trajectory: LatentTrajectory) -> Tensor:
        return torch.zeros(len(views), 1, dtype=torch.float64)

    def score(self, denoiser: ContinuousDenoiser, views: StepViews, sampler: LatentSampler) -> Scores:
        device, record = denoiser.device, views.trajectory.means
        assert record is not None
        (x, t), (after, s) = views.before, views.after
        gaussian, guess = sampler.transition(denoiser, x.to(device), t, s, views.condition.to(device))
        old = Gaussian(record[views.rows, views.steps].to(device), gaussian.std)
        return Scores(
            log_prob=self.log_ratio(gaussian, old, after.to(device))[:, None],
            forwards=len(views) * sampler.guidance.evaluations,
            mean=gaussian.mean,
            std=gaussian.std,
            velocity=denoiser.spec.process.velocity(guess, t),
        )

    def log_ratio(self, new: Gaussian, old: Gaussian, after: Tensor) -> Tensor:
        """(B,) float64 at the states ``after`` (B, *D) that were drawn from ``old``; both have one std."""
        if self.ratio == "none":
            return new.log_ratio(old, after, self.reduce)
        noise = (after - old.mean) / spread(old.std, after)
        value = per_sample((new.mean - old.mean) * noise)
        if self.reduce == "mean":
            value = value / after[0].numel()
        return value if self.ratio == "ratio_norm" else value / old.std.to(value.device)


@dataclass(kw_only=True)
class StepWeighted(TokenMean, name="by_step"):
    """Mean over all items, the policy term of each step times its own factor."""

    needs: ClassVar[frozenset[str]] = frozenset({"times", "stds"})
    reads_views = StepViews
    delta: Literal["one", "inverse_length", "slope", "dance", "std"] = "inverse_length"
    """``inverse_length``: 1 / (t - s), for Flow-GRPO's SDE. ``slope``: 1 / (d mean / d velocity) of a flow's step by
    either SDE, (t - s) (1 + g^2 (1 - t) / (2 t)), so that steps weigh the same. ``dance``: as stated for DanceGRPO,
    that bracket over t - s; gradients then keep its square. ``std``: of the step (TempFlow-GRPO). ``one``: none."""

    def weights(
        self, views: Any, advantage: Tensor, trajectory: Any, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        policy, kl = super().weights(views, advantage, trajectory, total)
        return policy * self.factor(views, trajectory).to(policy)[:, None], kl

    def factor(self, views: StepViews, trajectory: LatentTrajectory) -> Tensor:
        """delta (N,) float64 of every view."""
        assert trajectory.stds is not None
        t, s = views.ends.T
        length, std = t - s, trajectory.stds[views.rows, views.steps]
        bracket = 1 + std**2 / length * (1 - t) / (2 * t)
        known = {
            "one": torch.ones_like(length), "inverse_length": 1 / length, "slope": 1 / (length * bracket),
            "dance": bracket / length, "std": std,
        }  # fmt: skip
        return known[self.delta]


@dataclass(kw_only=True)
class GrpoGuard:
    """The paper's choices, as keyword arguments of a `PolicyConfig`; deviations are those of a prompt's group."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(clip=5.0))
    selector: Selector = field(default_factory=ButLast)
    likelihood: RegulatedRatio = field(default_factory=RegulatedRatio)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=2e-6, level="step"))
    weighting: StepWeighted = field(default_factory=StepWeighted)
    kl: MeanSpace = field(default_factory=MeanSpace)
    minibatches: int = 2

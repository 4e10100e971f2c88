"""AWM: the pretraining loss of a finished image is its log-likelihood, and the advantage weighs it.

Xue, Ge, Zhang, Li, Ma: *Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models*, 2025, arXiv
2509.25050. Any sampler draws the images. With copies of an image noised at stratified times t, v = eps - x_0:

    A    = a clip((R - mean over the group) / (std over the update + 1e-4), -5, 5) / 5        largest value a = 1
    l    = mean over dimensions of (v_theta - v)^2
    logp = -l | -t l | -t^2 l | -t (sqrt(l + 1e-10) - 1e-5) | -(t / p) ((l + 1e-10)^p - 1e-10^p)
    rho  = exp(logp - logp_old)                       both of the same copies; 1 in value for one step per rollout
    loss = mean over copies of -min(rho A, clip(rho, 1 - c, 1 + c) A) + beta mean (v - v_ref)^2 + mean (v - v_ema)^2

v_ema is a fast average of the policy, a trust region: A l + |v - v_ema|^2 is convex in v as long as A >= -1, which is
why the advantage is bounded. The theory: the log-density of a step, which Flow-GRPO takes, is this loss with the noisy
neighbour x_s in place of x_0; its minimiser is the same, its variance larger by `excess_variance`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.matching import TimeDistribution, prediction_errors
from unveil.learning.noised import CopyLikelihood, NoisedViews, SamplerGrid, recognise
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import Regulariser, Velocity
from unveil.learning.views import Scores
from unveil.processes.gaussian import GaussianProcess
from unveil.registry import UserError
from unveil.systems import System
from unveil.training.snapshots import Following

SYSTEM = System(
    name="awm",
    title="Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    paper="2509.25050",
    family="image",
    claim="the pretraining loss as log-likelihood has the policy gradient's minimiser with far less variance, and "
    "learns several times faster than Flow-GRPO",
)


@dataclass(kw_only=True)
class BoundedAdvantage(GroupAdvantage, name="bounded"):
    """The group's advantage, scaled so that the clipped ones come out at ``largest``."""

    scale: Literal["std", "batch_std", "none"] = "batch_std"
    """As of `group`."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest absolute value before it is scaled."""
    largest: Annotated[float, Field(gt=0)] = 1.0
    """Largest absolute value in the end. Above the strength of the trust region bad images push without bound."""

    def __post_init__(self) -> None:
        if self.clip is None:
            raise UserError("clip: needed for a bounded advantage, got null")

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        assert self.clip is not None
        return super().advantages(rewards, active, group) * (self.largest / self.clip)


Weights = Literal["uniform", "t", "t2", "huber", "ghuber"]


def weighted(loss: Tensor, t: Tensor, weights: Weights, power: float) -> Tensor:
    """-logp (N,) of matching losses l (N,) at times t (N,), float64."""
    if weights == "huber":
        return t * ((loss + 1e-10).sqrt() - 1e-5)
    if weights == "ghuber":
        return t / power * ((loss + 1e-10) ** power - 1e-10**power)
    return loss * {"uniform": torch.ones_like(t), "t": t, "t2": t**2}[weights]


@dataclass(kw_only=True)
class WeightedMatching(CopyLikelihood, name="weighted_matching"):
    """Minus a function of the matching loss of eps - x_0 of every noised copy."""

    weights: Weights = "ghuber"
    """``ghuber``: the gradient of l is weighed by t l^(p - 1), which makes copies of small and of large loss alike; the
    released default. ``uniform``: l itself, the paper's."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """p of ``ghuber``."""
    draws: Annotated[int, Field(ge=1)] | None = 6
    """Noisy copies per sample, one in each of so many equal parts of the times; None: one for every time of the
    sampler's grid that counts."""
    times: TimeDistribution = field(default_factory=lambda: SamplerGrid(first=1, share=0.9))
    """How noisy they are; ``first: 1`` leaves pure noise out."""

    def score(self, denoiser: ContinuousDenoiser, views: NoisedViews, sampler: Any) -> Scores:
        spec, t = denoiser.spec, views.times
        guess, prediction, clean, noise = recognise(denoiser, views)
        loss = prediction_errors(spec.process, spec.prediction, prediction, clean, t, noise, "u")
        log_prob = -weighted(loss, t.to(loss.device), self.weights, self.power)
        return Scores(log_prob=log_prob[:, None], forwards=len(views), velocity=spec.process.velocity(guess, t))


@dataclass(kw_only=True)
class ElboVelocity(Velocity, name="elbo_velocity"):
    """`velocity` divided by 2 sigma_t^2, sigma_t = noise sqrt(t / (1 - t)): a bound on the KL divergence of the chains
    of an SDE with that noise."""

    reads_views = NoisedViews
    noise: Annotated[float, Field(gt=0)] = 0.7
    """Of the SDE."""

    def penalty(self, views: Any, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        squares, weight = super().penalty(views, scores, other, weight)
        t = views.times.clamp(max=0.99).to(squares)
        return squares / (2 * self.noise**2 * t / (1 - t)), weight


@dataclass(kw_only=True)
class Awm:
    """The released choices, as keyword arguments of a `PolicyConfig`; `trust_region` says how ``old`` follows."""

    advantage: BoundedAdvantage = field(default_factory=BoundedAdvantage)
    likelihood: WeightedMatching = field(default_factory=WeightedMatching)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=1.0, level="step"))
    weighting: TokenMean = field(default_factory=TokenMean)
    kl: Regulariser = field(default_factory=lambda: Velocity(beta=1e-3))
    regularisers: dict[str, Regulariser] = field(default_factory=lambda: {"trust": Velocity(beta=1.0, towards="old")})


def trust_region() -> Following:
    """The fast average: decay 0.001 per update, at most 0.3."""
    return Following(rate=0.001, decay=0.3)


def excess_variance(process: GaussianProcess, s: Tensor, t: Tensor) -> Tensor:
    """kappa (B,): by how much more the score target of x_t given x_s varies than that given x_0, per dimension.

    With alpha, sigma of both times: alpha_t^2 sigma_s^2 / (sigma_t^2 (alpha_s^2 sigma_t^2 - alpha_t^2 sigma_s^2)).
    """
    alpha_s, sigma_s, alpha_t, sigma_t = process.alpha(s), process.sigma(s), process.alpha(t), process.sigma(t)
    part = (alpha_t * sigma_s) ** 2
    return part / (sigma_t**2 * ((alpha_s * sigma_t) ** 2 - part))

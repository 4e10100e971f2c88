"""The matching loss of continuous denoisers: squared error of a prediction at a random time.

    E_t [ w(t) mean over dimensions |predict(x_t, t) - target|^2 ],   x_t = alpha x_0 + sigma eps

All parameterisations say the same of x_0, so a loss in another one is a weight: `GaussianProcess.error_factor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.processes.gaussian import GaussianProcess, Prediction, per_sample
from unveil.registry import Plugin, UserError
from unveil.samplers.grids import shifted


class TimeDistribution(Plugin, family="time_distribution"):
    """At which times a denoiser is taught."""

    reads_grid: ClassVar[bool] = False
    """True if times are those of a sampler: there must be one."""

    def times(self, u: Tensor, process: GaussianProcess) -> Tensor:
        """Times in [0, 1], float64, of uniforms u in (0, 1): the inverse of the cumulative distribution."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UniformTimes(TimeDistribution, name="uniform"):
    """Every time between two as often as every other."""

    low: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The least noisy one."""
    high: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The noisiest one."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """The time t becomes shift t / (1 + (shift - 1) t); above 1 it leans to noise."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"high: should be greater than low, got {self.high:g} and {self.low:g}")

    def times(self, u: Tensor, process: GaussianProcess) -> Tensor:
        return shifted(self.low + (self.high - self.low) * u.double(), self.shift)


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes(TimeDistribution, name="logit_normal"):
    """The logit of t is normal: more often in the middle, where a flow is hardest to learn (SD3)."""

    mean: float = 0.0
    """Of the logit; above 0 leans to noise."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Of the logit."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """As in `UniformTimes`: log(shift) more in the mean."""

    def times(self, u: Tensor, process: GaussianProcess) -> Tensor:
        return shifted(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())), self.shift)


@dataclass(frozen=True, kw_only=True)
class LogNormalNoise(TimeDistribution, name="log_normal"):
    """log(sigma / alpha) is normal (EDM)."""

    mean: float = -1.2
    """Of log(sigma / alpha)."""
    std: Annotated[float, Field(gt=0)] = 1.2
    """Of log(sigma / alpha)."""

    def times(self, u: Tensor, process: GaussianProcess) -> Tensor:
        return process.time((self.mean + self.std * torch.special.ndtri(u.double())).exp())


def stratified(u: Tensor, generator: torch.Generator) -> Tensor:
    """Uniforms (B,) of a batch made of B uniforms u: one from each of B equal parts of (0, 1), in random order."""
    order = torch.randperm(len(u), generator=generator)
    return (order + u.double()) / len(u)


def matching_errors(
    denoiser: ContinuousDenoiser,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Condition,
    space: Prediction | None = None,
) -> Tensor:
    """Mean over dimensions of the squared error of each sample, (B,) float64.

    Args:
        x_0: (B, *D) clean latents.
        t: (B,) times; above 0 if ``space`` is given.
        noise: (B, *D) from N(0, I).
        space: the parameterisation whose error counts; None: the network's own.
    """
    process = denoiser.spec.process
    prediction = denoiser(process.corrupt(x_0, t, noise), t, condition)
    return prediction_errors(process, denoiser.spec.prediction, prediction, x_0, t, noise, space)


def prediction_errors(
    process: GaussianProcess,
    kind: Prediction,
    prediction: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    space: Prediction | None = None,
) -> Tensor:
    """`matching_errors` of a given prediction (B, *D) of ``kind``."""
    target = process.target(kind, x_0, noise, t)
    errors = per_sample((prediction.to(target.dtype) - target).square()) / target[0].numel()
    if space is None or space == kind:
        return errors
    return errors * (process.error_factor(space, t) / process.error_factor(kind, t)).to(errors.device)

"""Transition kernels: the distribution of x_s given x_t and what the network says of it, for s < t.

Every kernel is a pure function of (guess, x_t, t, s), the same for drawing a step and for scoring a stored one, so an
on-policy ratio is exactly 1. On any path, with r = (alpha_t sigma_s) / (alpha_s sigma_t):

| kernel | mean | std |
|---|---|---|
| `ddim` | alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps | eta sigma_s sqrt(1 - r^2) |
| `tau` | alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps | sigma_s sqrt(1 - r^(2 tau^2)) |
| `cps` | alpha_s x_0 + sigma_s cos(noise pi/2) eps | sigma_s sin(noise pi/2) |
| `flow` | x_t + [velocity + g^2 / (2 sigma_t) eps] (s - t) | g sqrt(t - s), g^2 = noise^2 sigma_t / alpha_t |
| `dance` | as `flow` | as `flow`, g constant |

`ddim` with eta 0 is the exact step of the ODE for a constant guess (`deterministic`), with eta 1 the DDPM posterior and
the first-order SDE-DPM-Solver++: no noise is left over at the end, however few the steps. `tau` is the exact step of
the SDE with tau times that noise rate: the same at tau 0 and 1, and what SA-Solver's steps are made with. `flow` and
`dance` are Euler-Maruyama steps of an SDE: in few steps visible noise remains. The marginals of all four become the
process's as steps become small. Those of `cps` do not: it keeps the total amount of noise, at any number of steps.

Sources: DDIM (arXiv 2010.02502), Flow-GRPO (2505.05470), DanceGRPO (2505.07818), CPS (2509.05952), SA-Solver
(2309.05019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from unveil.processes.gaussian import Form, Gaussian, GaussianProcess, Guess, full, remembered, spread
from unveil.registry import Plugin, UserError

Shares = tuple[Tensor, Tensor, Tensor]
"""Two factors (B, 1, ...) of samples, and the std (B,) float64 of a step."""


def deterministic(process: GaussianProcess, guess: Guess, s: Tensor) -> Tensor:
    """x_s (B, *D) without noise, alpha_s x_0 + sigma_s eps: a DDIM step, an Euler step of a flow."""
    alpha, sigma = process.shares(s, Form.of(guess.x0))
    return alpha * guess.x0 + sigma * guess.eps


class Kernel(Plugin, family="kernel"):
    """A stochastic step from t to s. A kernel is a frozen dataclass: what it says of times is remembered."""

    @property
    def stochastic(self) -> bool:
        """False if no step has noise: there is then nothing to score."""
        raise NotImplementedError

    def step(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """The distribution of x_s given x_t (B, *D), from times t to s (B,), 0 <= s < t <= 1.

        Raises:
            ValueError: the times are not ordered so.
        """
        raise NotImplementedError


class Mixing(Kernel):
    """A step to alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std noise: the std says all of it."""

    def step(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        data, noise, std = self.shares(process, t, s, Form.of(guess.x0))
        return Gaussian(mean=data * guess.x0 + noise * guess.eps, std=std)

    def shares(self, process: GaussianProcess, t: Tensor, s: Tensor, form: Form) -> Shares:
        """Of x_0, eps and fresh noise."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ddim(Mixing, name="ddim"):
    """DDIM with noise. A step to s = 0 is deterministic."""

    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the noise of the DDPM posterior; 0 is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @remembered
    def shares(self, process: GaussianProcess, t: Tensor, s: Tensor, form: Form) -> Shares:
        process.check_times(t, s)
        sigma = process.sigma(s)
        kept = process.alpha(t) * sigma / (process.alpha(s) * process.sigma(t))
        std = self.eta * sigma * (1 - kept**2).sqrt()
        # sqrt(sigma^2 - std^2), a sum of positive terms: rounding cannot make it the root of a negative number.
        noise = sigma * (1 - self.eta**2 + self.eta**2 * kept**2).sqrt()
        return spread(process.alpha(s), form), spread(noise, form), std


@dataclass(frozen=True, kw_only=True)
class CoefficientsPreserving(Mixing, name="cps"):
    """CPS: a fixed share of the noise that is left is drawn anew. A step to s = 0 is deterministic."""

    noise: Annotated[float, Field(ge=0, le=1)] = 0.8
    """0 is the ODE, 1 draws all noise anew."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    @remembered
    def shares(self, process: GaussianProcess, t: Tensor, s: Tensor, form: Form) -> Shares:
        process.check_times(t, s)
        sigma, angle = process.sigma(s), self.noise * math.pi / 2
        return spread(process.alpha(s), form), spread(sigma * math.cos(angle), form), sigma * math.sin(angle)


class EulerMaruyama(Kernel):
    """A step of an SDE, x + [velocity - g^2/2 score] (s - t), std g sqrt(t - s)."""

    def squared_rate(self, process: GaussianProcess, t: Tensor, s: Tensor) -> Tensor:
        """g^2 (B,) float64."""
        raise NotImplementedError

    def step(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        x = full(x)
        push, length, std = self._factors(process, t, s, Form.of(x))
        drift = process.velocity(guess, t) + push * guess.eps
        return Gaussian(mean=x - length * drift, std=std)

    @remembered
    def _factors(self, process: GaussianProcess, t: Tensor, s: Tensor, form: Form) -> Shares:
        """g^2 / (2 sigma_t), t - s and the std."""
        process.check_times(t, s)
        squared, length = self.squared_rate(process, t, s), t - s
        return spread(squared / (2 * process.sigma(t)), form), spread(length, form), (squared * length).sqrt()


@dataclass(frozen=True, kw_only=True)
class Tau(Mixing, name="tau"):
    """The reverse SDE with ``tau`` times the noise rate of the DDPM posterior, exact for a constant guess (SA-Solver).
    A step to s = 0, or to a time outside an interval, is deterministic."""

    tau: Annotated[float, Field(ge=0)] = 1.0
    """0 is the ODE; above 1 more noise is drawn, and taken away, than the posterior's."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Steps to a time s below it have no noise."""
    high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Nor have those to a time above it."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"high: should be greater than low, got {self.high:g} and {self.low:g}")

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    @remembered
    def shares(self, process: GaussianProcess, t: Tensor, s: Tensor, form: Form) -> Shares:
        process.check_times(t, s)
        sigma = process.sigma(s)
        inside = (s >= self.low) & (s <= self.high)
        ratio = process.alpha(t) * sigma / (process.alpha(s) * process.sigma(t))
        share = torch.where(inside, ratio**self.tau**2, 1.0)  # of the noise that stays: exp(-tau^2 h)
        return spread(process.alpha(s), form), spread(sigma * share, form), sigma * (1 - share**2).sqrt()


@dataclass(frozen=True, kw_only=True)
class FlowSde(EulerMaruyama, name="flow"):
    """Flow-GRPO's SDE. Noise also in a step to s = 0.

    At t = 1 of a flow alpha is 0 and g has a pole: there, as in the authors' code, alpha is taken at s.
    """

    noise: Annotated[float, Field(ge=0)] = 0.7
    """a in g^2 = a^2 sigma / alpha; 0 is Euler."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def squared_rate(self, process: GaussianProcess, t: Tensor, s: Tensor) -> Tensor:
        alpha = process.alpha(t)
        alpha = torch.where(alpha > 0, alpha, process.alpha(s))
        return self.noise**2 * process.sigma(t) / alpha


@dataclass(frozen=True, kw_only=True)
class DanceSde(EulerMaruyama, name="dance"):
    """DanceGRPO's SDE: the same noise rate at all times, also in a step to s = 0."""

    noise: Annotated[float, Field(ge=0)] = 0.3
    """g; 0 is Euler."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def squared_rate(self, process: GaussianProcess, t: Tensor, s: Tensor) -> Tensor:
        return torch.full_like(t, self.noise**2)

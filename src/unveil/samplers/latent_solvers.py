"""Solvers of continuous samplers: which guess a step uses, given what the network said at this step and the last ones.

A step with the network's own guess is of first order: the guess is right at x_t and used as far as x_s. A solver
replaces it by a better one for the whole step. The kernel, or `deterministic`, then moves by that guess: without noise
`dpmpp_2m` is DPM-Solver++(2M); `dpmpp_2m_sde` is its SDE form under the kernel `ddim` with eta 1.

Sources: EDM (arXiv 2206.00364), DPM-Solver++ (2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.processes.gaussian import GaussianProcess, Guess, full, spread
from unveil.processes.kernels import deterministic
from unveil.registry import Plugin, UserError

Memory = dict[str, Tensor]
"""What a solver remembers of earlier steps: tensors with a batch axis, from which rows may be taken."""
Again = Callable[[Tensor, Tensor], Guess]
"""The network's guess at another (x (B, *D), t (B,)): one more forward pass of every sample."""


class LatentSolver(Plugin, family="latent_solver"):
    """Turns the network's guess at x_t into the one that the step to s is made with."""

    exact: ClassVar[bool] = False
    """True if steps are made with the network's own guess: only then can a stored step be scored from x_t alone."""
    evaluations: ClassVar[int] = 1
    """Forward passes a step, at most."""
    through_noise: ClassVar[bool] = False
    """True if steps with noise are made with its guess as well. Such a step depends on the one before it, and is not
    scored from the state alone."""

    def solve(
        self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor, memory: Memory, again: Again
    ) -> Guess:
        """The guess for the step from x (B, *D) at t to s, times (B,). ``memory`` is empty at first and is updated."""
        raise NotImplementedError


@dataclass(kw_only=True)
class First(LatentSolver, name="first"):
    """The network's guess as it is: DDIM, Euler steps of a flow."""

    exact: ClassVar[bool] = True

    def solve(
        self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor, memory: Memory, again: Again
    ) -> Guess:
        return guess


@dataclass(kw_only=True)
class Heun(LatentSolver, name="heun"):
    """The mean of the predictions at both ends of the step, the second one at the point that the first leads to.

    Second order, two forward passes; a step to s = 0 stays of first order. The mean is taken of the process's native
    prediction: on EDM's path of eps, as there; elsewhere of u = eps - x_0. (From nearly pure noise sigma / alpha falls
    by orders of magnitude in a step, by which the error of a mean of eps would be multiplied.)
    """

    evaluations: ClassVar[int] = 2

    def solve(
        self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor, memory: Memory, again: Again
    ) -> Guess:
        inner = (s > 0).to(x.device)
        if not bool(inner.any()):
            return guess
        there = again(deterministic(process, guess, s), s)
        # As functions of the guess alone, u = eps - x0 and eps are the same numbers at both times.
        here_native, there_native = (process.target(process.native, *each, t) for each in (guess, there))
        mean = process.guess((here_native + there_native) / 2, process.native, x, t)
        rows = inner.reshape(-1, *[1] * (x.dim() - 1))
        return Guess(*(torch.where(rows, new, old) for new, old in zip(mean, guess, strict=True)))


@dataclass(kw_only=True)
class DpmSolver2M(LatentSolver, name="dpmpp_2m"):
    """DPM-Solver++(2M): x_0 is extrapolated in lambda from the last step's to the middle of this one.

        D = x_0 + h / (2 h_before) (x_0 - x_0 before),   h = lambda_s - lambda_t

    Second order at one forward pass. First order in the first step, and in one to s = 0, where h is infinite.
    """

    def solve(
        self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor, memory: Memory, again: Again
    ) -> Guess:
        before = dict(memory)
        memory["x0"], memory["t"] = guess.x0, t
        if not before:
            return guess
        now = process.half_log_snr(t)
        weight = (process.half_log_snr(s) - now) / (2 * (now - process.half_log_snr(before["t"])))
        weight = torch.where(process.sigma(s) > 0, weight, 0.0)
        return process.rederived(guess.x0 + spread(weight, x) * (guess.x0 - before["x0"]), x, t)


@dataclass(kw_only=True)
class SdeDpmSolver2M(DpmSolver2M, name="dpmpp_2m_sde"):
    """DPM-Solver++(2M), through steps with noise too: under the kernel `ddim` with eta 1 its SDE form. For samples of
    which only the end is read."""

    through_noise: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Churn:
    """EDM's stochastic sampler (2206.00364, algorithm 2): before a step noise is added, so that r = sigma / alpha
    becomes (1 + gamma) r, and the step leads from there to its own end. What earlier steps got wrong is forgotten.

        gamma = min(amount / steps, sqrt(2) - 1)   where low <= r <= high, else 0

    The paper tunes it with Heun's method; with amount 0 that is its deterministic sampler.
    """

    amount: Annotated[float, Field(ge=0)]
    """S_churn: how much noise in all."""
    low: Annotated[float, Field(ge=0)] = 0.0
    """S_tmin: the least r at which noise is added."""
    high: Annotated[float, Field(gt=0)] | None = None
    """S_tmax: the largest; None: no limit. A process's own largest r is never exceeded."""
    inflation: Annotated[float, Field(gt=0)] = 1.0
    """S_noise: the standard deviation of what is added; slightly above 1 makes up for networks that remove too much."""

    def __post_init__(self) -> None:
        if self.high is not None and not self.low < self.high:
            raise UserError(f"high: should be greater than low, got {self.high:g} and {self.low:g}")

    def raised(
        self, process: GaussianProcess, x: Tensor, t: Tensor, noise: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """x (B, *D) at times t (B,) moved to more noise, and the times where it then is; noise (B, *D) from N(0, I)."""
        ratio, x = process.ratio(t), full(x)
        gamma, high = min(self.amount / steps, math.sqrt(2) - 1), math.inf if self.high is None else self.high
        churned = (ratio >= self.low) & (ratio <= high) & (t < 1) & (gamma > 0)
        later = torch.where(churned, process.time(ratio * (1 + gamma)), t.double())
        kept = process.alpha(later) / process.alpha(t)
        kept = torch.where(churned, kept, 1.0)  # at t = 1 of a flow alpha is 0
        added = (process.sigma(later) ** 2 - (kept * process.sigma(t)) ** 2).clamp(min=0).sqrt()
        return spread(kept, x) * x + spread(self.inflation * added, x) * noise, later

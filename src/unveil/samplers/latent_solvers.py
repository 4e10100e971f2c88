"""Solvers of continuous samplers: which guess a step uses, given what the network said at this step and the last ones.

A step with the network's own guess is of first order: the guess is right at x_t and used as far as x_s. A solver
replaces it by a better one for the whole step. The kernel, or `deterministic`, then moves by that guess: without noise
`dpmpp_2m` is DPM-Solver++(2M); `dpmpp_2m_sde` is its SDE form under the kernel `ddim` with eta 1; `sa` is SA-Solver
under the kernel `tau`.

Sources: EDM (arXiv 2206.00364), DPM-Solver++ (2211.01095), SA-Solver (2309.05019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

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


class Step(NamedTuple):
    """What a solver knows of a step; the fields are the arguments of `LatentSolver.solve`."""

    process: GaussianProcess
    guess: Guess
    x: Tensor
    t: Tensor
    s: Tensor
    memory: Memory
    again: Again
    std: Tensor | None


class LatentSolver(Plugin, family="latent_solver"):
    """Turns the network's guess at x_t into the one that the step to s is made with."""

    exact: ClassVar[bool] = False
    """True if steps are made with the network's own guess: only then can a stored step be scored from x_t alone."""
    evaluations: ClassVar[int] = 1
    """Forward passes a step, at most."""
    through_noise: ClassVar[bool] = False
    """True if steps with noise are made with its guess as well. Such a step depends on the one before it, and is not
    scored from the state alone."""
    reads_std: ClassVar[bool] = False
    """True if such steps must be those of a `Mixing` kernel: it then knows them by their std."""

    def solve(
        self,
        process: GaussianProcess,
        guess: Guess,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        memory: Memory,
        again: Again,
        std: Tensor | None = None,
    ) -> Guess:
        """The guess for the step from x (B, *D) at t to s, times (B,). ``memory`` is empty at first and is updated.

        ``std`` (B,) is that of the noise which the step draws; None: it draws none.
        """
        return self.improved(Step(process, guess, x, t, s, memory, again, std))

    def improved(self, step: Step) -> Guess:
        """The guess for a step."""
        raise NotImplementedError


@dataclass(kw_only=True)
class First(LatentSolver, name="first"):
    """The network's guess as it is: DDIM, Euler steps of a flow."""

    exact: ClassVar[bool] = True

    def improved(self, step: Step) -> Guess:
        return step.guess


@dataclass(kw_only=True)
class Heun(LatentSolver, name="heun"):
    """The mean of the predictions at both ends of the step, the second one at the point that the first leads to.

    Second order, two forward passes; a step to s = 0 stays of first order. The mean is taken of the process's native
    prediction: on EDM's path of eps, as there; elsewhere of u = eps - x_0. (From nearly pure noise sigma / alpha falls
    by orders of magnitude in a step, by which the error of a mean of eps would be multiplied.)
    """

    evaluations: ClassVar[int] = 2

    def improved(self, step: Step) -> Guess:
        process, guess, x, t, s, *_ = step
        inner = (s > 0).to(x.device)
        if not bool(inner.any()):
            return guess
        there = step.again(deterministic(process, guess, s), s)
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

    def improved(self, step: Step) -> Guess:
        process, guess, x, t, s, memory, *_ = step
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


@dataclass(kw_only=True)
class SaSolver(LatentSolver, name="sa"):
    """SA-Solver: an Adams predictor and corrector of the data prediction, through steps with noise and without.

    With h = lambda_s - lambda_t and z = (1 + tau^2) h a step is

        x_s = (sigma_s / sigma_t) exp(-tau^2 h) x_t + alpha_s (1 - exp(-z)) D + std noise

    where D is the mean of x_0 over the step, most of it from near its end: with P the polynomial in lambda through the
    last guesses, integral of exp(-(1 + tau^2)(lambda_s - lambda)) P over that of the exponential alone. Before the next
    step x_s is corrected: the same step and the same noise again, with the guess at x_s in the polynomial. One forward
    pass a step (the paper's PEC mode). A step to s = 0 takes the last guess; the guess at pure noise is used for its
    own step alone. For samples of which only the end is read, under the kernels `tau` (the paper's), `ddim` and `cps`.
    """

    through_noise: ClassVar[bool] = True
    reads_std: ClassVar[bool] = True
    order: Annotated[int, Field(ge=1, le=4)] = 2
    """Guesses that the predictor's polynomial goes through; fewer at first. 2 with guidance, 3 without."""
    corrector: Annotated[int, Field(ge=0, le=4)] = 2
    """Guesses of the corrector's, the new one among them; 0: no corrector."""
    correct_first: bool = False
    """Whether the first step is corrected as well, where the step is long and only one guess is known."""
    few_steps: bool = True
    """Of polynomials through two guesses, the slope counts h^2 / 2, the limit of its integral for short steps (the
    paper's appendix D, which found it better in few steps)."""

    def improved(self, step: Step) -> Guess:
        process, guess, x, t, s, memory, _, std = step
        now, then, before = process.half_log_snr(t), process.half_log_snr(s), dict(memory)
        known, at = guess.x0[:, None], now[:, None]
        if before:
            known, at = torch.cat([known, before["x0"]], 1), torch.cat([at, before["at"]], 1)
        if "mean" in before:
            better = self._mean(known, at, self.corrector, before["from"], now, before["z"])
            x = x + spread(before["weight"], x) * (better - before["mean"])
        share = torch.ones_like(now) if std is None else (1 - (std / process.sigma(s)) ** 2).clamp(min=0).sqrt()
        z = then - now - share.log()
        ends = bool((then - now).isinf().any())  # at clean data, or from pure noise
        mean = guess.x0 if ends else self._mean(known, at, self.order, now, then, z)
        kept = 0 if bool(now.isinf().any()) else max(self.order, self.corrector) - 1
        memory["x0"], memory["at"] = known[:, :kept], at[:, :kept]
        memory.pop("mean", None)
        if self.corrector and not ends and (before or self.correct_first):
            memory.update({"mean": mean, "from": now, "z": z, "weight": -process.alpha(s) * torch.expm1(-z)})
        return process.rederived(mean, full(x), t)

    def _mean(self, known: Tensor, at: Tensor, order: int, start: Tensor, end: Tensor, z: Tensor) -> Tensor:
        """(B, *D) the mean over the step from ``start`` to ``end`` (B,), half log-SNRs like those ``at`` (B, K) which
        the guesses ``known`` (B, K, *D) are, newest first."""
        weights, used = adams_weights(at[:, :order], start, end, z, few_steps=self.few_steps), known[:, :order]
        return (weights.to(used).reshape(*weights.shape, *[1] * (used.dim() - 2)) * used).sum(1)


def adams_weights(at: Tensor, start: Tensor, end: Tensor, z: Tensor, *, few_steps: bool = False) -> Tensor:
    """Weights (B, K) of values at the places ``at`` (B, K) in the mean over [start, end] (B,) of the polynomial through
    them, where a place at a share y of the way back from the end counts exp(-z y)."""
    count = at.shape[1]
    back = (end[:, None] - at) / (end - start)[:, None]
    powers, z = torch.arange(count, dtype=torch.float64), z[:, None]
    # Integral of y^k exp(-z y) over [0, 1], from the incomplete gamma function.
    moments = torch.special.gammainc(powers + 1, z) * (powers + 1).lgamma().exp() / z ** (powers + 1)
    means = moments / moments[:, :1]
    if few_steps and count == 2:
        means[:, 1] = 1 - 0.5 / moments[:, 0]
    return torch.linalg.solve(back[:, None] ** powers[:, None], means)


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

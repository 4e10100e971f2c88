"""Solvers of continuous samplers: which guess a step uses, given what the network said at this step and the last ones.

A step with the network's own guess is of first order: the guess is right at x_t and used as far as x_s. A solver
replaces it by a better one for the whole step. The kernel, or `deterministic`, then moves by that guess: under `ddim`
with eta 0 `dpmpp_2m` is DPM-Solver++(2M), with eta 1 its SDE form.

Sources: EDM (arXiv 2206.00364), DPM-Solver++ (2211.01095).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unveil.processes.gaussian import GaussianProcess, Guess, spread
from unveil.processes.kernels import deterministic
from unveil.registry import Plugin

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

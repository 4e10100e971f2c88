"""Chains of latents once more, from their stored states, with gradients into the network's weights.

The steps are those that drew the chains, with their noise, so that unchanged weights lead to the stored samples. A step
that is not *live* takes the network's output as a constant; through its own x_t, which is linear in the step, gradients
still pass. The activations of a step are recomputed in the backward pass: memory is that of one step, and a latent for
each of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.processes.gaussian import Guess
from unveil.samplers.latent import LatentSampler, Move, step_noise
from unveil.samplers.latent_solvers import Memory
from unveil.samplers.latents import LatentTrajectory


class Redone(NamedTuple):
    """N chains that were run again.

    Attributes:
        samples: (N, *D) what they end with.
        velocity: (N, *D) dx/dt of the probability flow at each chain's first live step, in its stored state.
        forwards: network evaluations of the denoiser, counted per sample.
    """

    samples: Tensor
    velocity: Tensor
    forwards: int


def run_again(
    sampler: LatentSampler,
    denoiser: ContinuousDenoiser,
    trajectory: LatentTrajectory,
    rows: Tensor,
    live: Tensor,
    *,
    recompute: bool = True,
) -> Redone:
    """The ends of the chains ``rows`` (N,), differentiable.

    What comes before a chain's first live step has no gradient and is not run again, unless the solver needs what it
    remembers of it.

    Args:
        sampler: that drew them, without a window: all its steps are the kernel's.
        trajectory: with ``latents``, ``times`` and ``seeds``.
        live: (N, S) True where the network's output has a gradient; at least once in every row.
        recompute: the activations of a step in the backward pass, rather than keep them.
    """
    assert trajectory.latents is not None and trajectory.times is not None and trajectory.seeds is not None
    states, times, device = trajectory.latents, trajectory.times, denoiser.device
    first = live.int().argmax(1)
    order = first.argsort(stable=True)
    rows, live, first = rows[order], live[order], first[order]
    seeds: list[int] = trajectory.seeds[rows].tolist()
    # At a step the chains up to the next one's border have begun to learn: rows join at their own first live step.
    borders: list[int] = torch.searchsorted(first, torch.arange(trajectory.steps), right=True).tolist()
    whole = not sampler.solver.exact
    x, memory, spent = states[rows, 0].to(device) if whole else states[:0, 0].to(device), Memory(), 0
    velocities: list[Tensor] = []
    for step, (before, border) in enumerate(zip([0, *borders], borders, strict=False)):
        joining = states[rows[before:border], step].to(device)  # as a snapshot of other weights sees them too
        x = torch.cat([x[:before], joining, x[border:]])
        count = len(x)
        if not count:
            continue
        own = rows[:count]
        move, asked = _move(
            sampler, denoiser, x, times[own, step], times[own, step + 1], trajectory.condition.rows(own).to(device),
            live[:count, step], partial(step_noise, denoiser, seeds[:count], step), memory, recompute=recompute,
        )  # fmt: skip
        spent += asked
        velocity = denoiser.spec.process.velocity(move.guess, move.times)
        velocities.append(velocity[before:border])
        x, memory = move.after, move.memory
    back = order.argsort().to(device)
    return Redone(samples=x[back], velocity=torch.cat(velocities)[back], forwards=spent)


def _move(
    sampler: LatentSampler,
    denoiser: ContinuousDenoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    live: Tensor,
    noise: Callable[[], Tensor],
    memory: Memory,
    *,
    recompute: bool,
) -> tuple[Move, int]:
    """One step, and how many evaluations it took."""
    held = denoiser if bool(live.all()) else _Held(denoiser, live)
    spent, drawn = 0, cache(noise)  # a step that is run again in the backward pass has the same

    def asked(x: Tensor, t: Tensor) -> Guess:
        nonlocal spent
        spent += len(x) * sampler.guidance.evaluations
        return sampler.guess(held, x, t, condition)  # type: ignore[arg-type]

    def move(x: Tensor, memory: Memory) -> Move:
        return sampler.move(denoiser.spec.process, asked, x, t, s, noise=drawn, memory=memory)

    if recompute and torch.is_grad_enabled() and bool(live.any()):
        return checkpoint(move, x, memory, use_reentrant=False, preserve_rng_state=False), spent
    return move(x, memory), spent


class _Held:
    """A denoiser whose output is a constant for the samples that are not ``live`` (N,)."""

    def __init__(self, denoiser: ContinuousDenoiser, live: Tensor) -> None:
        self.denoiser, self.live, self.spec = denoiser, live, denoiser.spec

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.denoiser.condition(prompts)

    def decode(self, x_0: Tensor) -> Tensor:
        return self.denoiser.decode(x_0)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Guidance lays the samples out several times, one after the other."""
        if not bool(self.live.any()):
            with torch.no_grad():
                return self.denoiser.predict(x, t, condition)
        prediction = self.denoiser.predict(x, t, condition)
        rows = self.live.repeat(len(x) // len(self.live)).to(x.device)
        return torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), prediction, prediction.detach())

    def guess(self, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        return self.spec.process.guess(self.predict(x, t, condition), self.spec.prediction, x, t)

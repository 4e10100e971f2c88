"""Where chains of latents start, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from unveil.denoisers.continuous import Condition
from unveil.processes.gaussian import GaussianProcess
from unveil.samplers.trajectory import Trajectory, pad_steps
from unveil.seeds import derive_seeds, normal_rows


@dataclass(kw_only=True)
class Noise:
    """B chains that start from noise, or from a state on the way to it.

    Attributes:
        condition: (B) what each sample is asked to be.
        problems: (B) a seed of each chain's problem: what its chains may share derives from it.
        copies: (B) which of the problem's chains it is.
        initial: (B, *D) states to start from (a noise of one's own, a state of another chain); None: N(0, sigma(1)^2).
        time: of the initial states; the chains take what is left of the grid.
    """

    condition: Condition
    problems: list[int]
    copies: list[int]
    initial: Tensor | None = None
    time: float = 1.0

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def width(self) -> None:
        """Latents have the network's own shape."""
        return None

    def rows(self, index: slice) -> Noise:
        return replace(
            self,
            condition=self.condition.rows(index),
            problems=self.problems[index],
            copies=self.copies[index],
            initial=None if self.initial is None else self.initial[index],
        )


def noised(latents: Tensor, time: float, process: GaussianProcess, seeds: Sequence[int]) -> Tensor:
    """Clean latents (B, *D) at a time: where editing of a given sample starts (SDEdit). Each row from its own seed."""
    noise = normal_rows(latents.shape[1:], derive_seeds(seeds, "edit"))
    times = torch.full((len(latents),), time, dtype=torch.float64)
    return process.corrupt(latents.float(), times, noise.to(latents.device))


def at_ends(noisy: Tensor) -> Tensor:
    """(..., S + 1) True for the states that a step of ``noisy`` (..., S) starts from or leads to."""
    return F.pad(noisy, (0, 1)) | F.pad(noisy, (1, 0))


@dataclass(kw_only=True)
class LatentTrajectory(Trajectory):
    """B chains of continuous latents of shape D, S steps, float32 wherever a step is scored again from it.

    Attributes:
        samples: (B, *D) the finished latents.
        noisy: (B, S) True at the steps that were drawn with noise and lie in the sampler's window: these can be scored.
        condition: (B) what each sample was asked to be.
        latents: (B, S + 1, *D) the state before every step, and the last one.
        scored: (B, E, *D) only those of them at either end of a noisy step, E at most: what a likelihood reads, and
            little where few steps have noise.
        times: (B, S + 1) float64, the times of all states.
        log_prob: (B, S) float64, log-density of every noisy step, summed over dimensions; 0 at others.
        guesses: (B, S, *D) the expected x_0 at every step.
        means: (B, S, *D) of the distributions of the next states.
        stds: (B, S) float64, their standard deviations; 0 at deterministic steps.
        seeds: (B,) what the noise of each chain derives from.
    """

    kind = "latents"
    optional = ("latents", "scored", "times", "log_prob", "guesses", "means", "stds", "seeds")
    per_chain = ("seeds",)

    samples: Tensor
    noisy: Tensor
    condition: Condition
    latents: Tensor | None = None
    scored: Tensor | None = None
    times: Tensor | None = None
    log_prob: Tensor | None = None
    means: Tensor | None = None
    stds: Tensor | None = None
    seeds: Tensor | None = None

    @property
    def finished(self) -> Tensor:
        return self.samples

    @property
    def decided(self) -> Tensor:
        return self.noisy

    def states_at(self, rows: Tensor, steps: Tensor) -> Tensor:
        """The states (N, *D) of chains ``rows`` (N,) before steps ``steps`` (N,), or after the last one at S; those at
        the ends of noisy steps at least.

        Raises:
            ValueError: neither latents nor scored were recorded.
        """
        if self.latents is not None:
            return self.latents[rows, steps]
        if self.scored is None:
            raise ValueError("the trajectory holds neither latents nor scored")
        return self.scored[rows, self._places[rows, steps]]

    @cached_property
    def _places(self) -> Tensor:
        """(B, S + 1) where in ``scored`` every state is, if it is there."""
        return at_ends(self.noisy).cumsum(1) - 1

    def rows(self, index: Tensor) -> Self:
        own = {name: value[index] for name, value in super()._tensors().items()}
        return replace(self, **own, condition=self.condition.rows(index))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See `Trajectory.joined`: shorter chains stay at their finished latents."""
        steps = max(part.steps for part in parts)
        joined: dict[str, Tensor] = {}
        for name in [f.name for f in fields(cls) if f.name not in ("forwards", "condition")]:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                continue
            if name in ("active", "noisy", *cls.optional) and name not in cls.per_chain:
                idle = [part.samples if name in ("latents", "guesses", "means") else None for part in parts]
                width = steps + (name in ("latents", "times"))
                if name == "scored":
                    width = max(value.shape[1] for value in values)
                values = [pad_steps(value, width, rest) for value, rest in zip(values, idle, strict=True)]
            joined[name] = torch.cat(values)
        condition = Condition.cat([part.condition for part in parts])
        return cls(**joined, condition=condition, forwards=sum(part.forwards for part in parts))

    def _tensors(self) -> dict[str, Tensor]:
        condition = self.condition.compact()
        told = dict(condition.tensors) if condition.index is None else {**condition.tensors, "index": condition.index}
        return super()._tensors() | {f"condition.{name}": value for name, value in told.items()}

    @classmethod
    def _built(cls, tensors: dict[str, Tensor], header: dict[str, int]) -> Self:
        own = {name: value for name, value in tensors.items() if not name.startswith("condition.")}
        told = {name.removeprefix("condition."): tensors[name] for name in tensors.keys() - own.keys()}
        condition = Condition({name: value for name, value in told.items() if name != "index"}, told.get("index"))
        return cls(**own, **header, condition=condition)  # type: ignore[arg-type]

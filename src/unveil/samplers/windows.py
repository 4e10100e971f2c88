"""Which steps of a latent chain are drawn at random, and so can be trained: all of them, or a window.

Few stochastic steps are enough for policy optimisation, and the others are cheaper and cleaner as steps of the ODE
(Flow-GRPO-Fast, arXiv 2505.05470; MixGRPO, 2507.21802).
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import Plugin, UserError
from unveil.seeds import derive_seed


class Window(Plugin, family="window"):
    """A choice of steps, which may move over a run's updates."""

    def check_fits(self, steps: int) -> None:
        """Refuse a window that chains of ``steps`` steps have no room for.

        Raises:
            UserError: naming the key and what is allowed.
        """

    def at(self, update: int, seed: int, steps: int) -> Window:
        """The window of one update of a run."""
        return self

    def inside(self, steps: int) -> Tensor:
        """(steps,) True at the steps of the window."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Everywhere(Window, name="everywhere"):
    """Every step."""

    def inside(self, steps: int) -> Tensor:
        return torch.ones(steps, dtype=torch.bool)


@dataclass(kw_only=True)
class Span(Window, name="span"):
    """``length`` steps from ``start`` on, always the same."""

    start: Annotated[int, Field(ge=0)] = 0
    """First step, 0 the noisiest."""
    length: Annotated[int, Field(ge=1)] = 2
    """Steps."""

    def check_fits(self, steps: int) -> None:
        if self.start + self.length > steps:
            raise UserError(
                f"window: {self.length} steps from step {self.start} on do not fit into {steps} steps "
                f"(start at most {max(0, steps - self.length)})"
            )

    def inside(self, steps: int) -> Tensor:
        place = torch.arange(steps)
        return (place >= self.start) & (place < self.start + self.length)


@dataclass(kw_only=True)
class RandomSpan(Window, name="random"):
    """``length`` steps whose start is drawn anew for every update (Flow-GRPO-Fast)."""

    length: Annotated[int, Field(ge=1)] = 2
    """Steps."""
    low: Annotated[int, Field(ge=0)] = 0
    """First step of the range that the window lies in."""
    high: Annotated[int, Field(ge=1)] | None = None
    """Step before which the range ends; None: half of the chain, the noisy half."""

    def check_fits(self, steps: int) -> None:
        last = self._high(steps) - self.length
        if not self.low <= last or self._high(steps) > steps:
            raise UserError(
                f"window: no span of {self.length} steps fits between step {self.low} and step {self._high(steps)} "
                f"of {steps}"
            )

    def at(self, update: int, seed: int, steps: int) -> Window:
        starts = self._high(steps) - self.length - self.low + 1
        return Span(start=self.low + derive_seed(seed, "window", update) % starts, length=self.length)

    def inside(self, steps: int) -> Tensor:
        return self.at(0, 0, steps).inside(steps)

    def _high(self, steps: int) -> int:
        return steps // 2 if self.high is None else self.high


@dataclass(kw_only=True)
class Progressive(Window, name="progressive"):
    """``length`` steps that move on towards clean data, and from the end back to the start (MixGRPO)."""

    length: Annotated[int, Field(ge=1)] = 4
    """Steps."""
    every: Annotated[int, Field(ge=1)] = 25
    """Updates between two moves."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Steps of a move."""

    def check_fits(self, steps: int) -> None:
        Span(length=self.length).check_fits(steps)

    def at(self, update: int, seed: int, steps: int) -> Window:
        starts = range(0, steps - self.length + 1, self.stride)
        stays = [self.stay(start, steps) for start in starts]
        ends = list(itertools.accumulate(stays))
        return Span(start=starts[bisect.bisect_right(ends, update % ends[-1])], length=self.length)

    def inside(self, steps: int) -> Tensor:
        return self.at(0, 0, steps).inside(steps)

    def stay(self, start: int, steps: int) -> int:
        """Updates that the window stays where it begins with step ``start``."""
        return self.every


@dataclass(kw_only=True)
class LinearDecay(Progressive, name="linear_decay"):
    """As `progressive`, but the window moves on the faster the cleaner its steps are (MixGRPO's ``decay``)."""

    least: Annotated[int, Field(ge=1)] = 1
    """Updates between two moves that ``every`` falls to at the end of the chain."""

    def __post_init__(self) -> None:
        if self.least > self.every:
            raise UserError(f"least: should be at most every ({self.every}), got {self.least}")

    def stay(self, start: int, steps: int) -> int:
        return max(self.least, int(self.every + (self.least - self.every) * start / steps))


@dataclass(kw_only=True)
class ExponentialDecay(Progressive, name="exponential_decay"):
    """As `progressive` up to a step, and from there on faster and faster (MixGRPO's ``exp_decay``)."""

    after: Annotated[int, Field(ge=0)] = 13
    """First step up to which ``every`` holds."""
    rate: Annotated[float, Field(gt=0)] = 0.1
    """By this the logarithm of ``every`` falls per step behind it."""

    def stay(self, start: int, steps: int) -> int:
        return math.ceil(self.every * math.exp(-self.rate * max(0, start - self.after)))

"""Time grids of continuous samplers: at which times the network is asked, from noise down to data.

A grid of N steps is N + 1 falling times. Those of published pipelines are here so that their weights can be run as they
were tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.processes.gaussian import GaussianProcess, VariancePreserving
from unveil.registry import Plugin, UserError


class Grid(Plugin, family="grid"):
    """A rule that places the times of a given number of steps."""

    def place(self, process: GaussianProcess, steps: int) -> Tensor:
        """(steps + 1,) float64; `times` checks it.

        Raises:
            UserError: the grid is not for this process, or not for so many steps.
        """
        raise NotImplementedError

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """(steps + 1,) float64, falling, from at most 1 to at least 0.

        Raises:
            UserError: the grid is not for this process, or not for so many steps.
        """
        if steps < 1:
            raise UserError(f"steps: should be at least 1, got {steps}")
        times = self.place(process, steps)
        if not bool((times[:-1] > times[1:]).all()):
            place = int((times[:-1] <= times[1:]).nonzero()[0])
            raise UserError(
                f"grid {self.name}: its times do not fall at {steps} steps (step {place} from "
                f"{float(times[place]):.6g} to {float(times[place + 1]):.6g})"
            )
        return times


@dataclass(frozen=True, kw_only=True)
class Uniform(Grid, name="uniform"):
    """Equal steps of t, bent towards one end by a shift: t' = shift t / (1 + (shift - 1) t).

    On a flow the shift multiplies sigma / alpha. SD3 has shift 3; `resolution_shift` gives Flux's.
    """

    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 more steps are spent where there is much noise."""
    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """First time, before the shift."""
    end: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Last time, before the shift. Above 0 the last step, too, is stochastic under every kernel."""

    def place(self, process: GaussianProcess, steps: int) -> Tensor:
        return shifted(torch.linspace(self.start, self.end, steps + 1, dtype=torch.float64), self.shift)


@dataclass(frozen=True, kw_only=True)
class Sd3(Grid, name="sd3"):
    """What SD3's scheduler makes of a number of steps: it shifts a range whose lower end is shifted already.

    With shift 3 and 10 steps the times end in 0.278, 0.0089, 0 rather than 0.462, 0.25, 0.
    """

    shift: Annotated[float, Field(gt=0)] = 3.0
    """As in `Uniform`."""
    table: Annotated[int, Field(ge=1)] = 1000
    """Length of the table of times that the network was trained on; its lower end is 1 / table."""
    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """First time; below 1 for solvers that need some data in it."""
    halved: bool = False
    """The last time before clean data is half of the one before it (AWM's code): two even steps instead of a long one
    and next to none."""

    def place(self, process: GaussianProcess, steps: int) -> Tensor:
        low = float(shifted(torch.tensor(1 / self.table, dtype=torch.float64), self.shift))
        times = shifted(torch.linspace(1, low, steps, dtype=torch.float64), self.shift)
        if self.halved and steps > 1:
            times[-1] = times[-2] / 2
        times[0] = self.start
        return _then_clean(times)


@dataclass(frozen=True, kw_only=True)
class Karras(Grid, name="karras"):
    """EDM's grid in r = sigma / alpha: equal steps of r^(1/rho) from the largest to the smallest, then clean data."""

    ratio_min: Annotated[float, Field(gt=0)] = 0.002
    """Smallest r but 0."""
    ratio_max: Annotated[float, Field(gt=0)] | None = None
    """Largest r; None: that of t = 1, which must be finite."""
    rho: Annotated[float, Field(ge=1)] = 7.0
    """Above 1 more steps are spent at small noise."""

    def place(self, process: GaussianProcess, steps: int) -> Tensor:
        largest = float(process.ratio(torch.ones(1, dtype=torch.float64)))
        high = largest if self.ratio_max is None else self.ratio_max
        if not high <= largest * (1 + 1e-9) or math.isinf(high):
            raise UserError(f"grid karras: ratio_max is {high:.6g}, at most the finite {largest:.6g} of the process")
        if not self.ratio_min < high:
            raise UserError(f"grid karras: ratio_min is {self.ratio_min:.6g}, it must be below ratio_max {high:.6g}")
        power = 1 / self.rho
        ratio = torch.linspace(high**power, self.ratio_min**power, steps, dtype=torch.float64) ** self.rho
        return _then_clean(process.time(ratio))


@dataclass(frozen=True, kw_only=True)
class Table(Grid, name="table"):
    """Entries of a table of betas, as DDIM schedulers choose them; entry k is the time (k + 1) / length.

    A step goes to the next chosen entry. (Published code goes to entry k - length // steps instead, which is the same
    one only if the spacing is ``leading``.)
    """

    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    """``leading``: multiples of length // steps, plus the offset. ``trailing``: down from the last entry. ``linspace``:
    from the last entry to the first."""
    offset: Annotated[int, Field(ge=0)] = 0
    """Added to the entries of ``leading`` (``steps_offset``; 1 for Stable Diffusion)."""
    final: Literal["clean", "first"] = "clean"
    """Where the last step leads: to clean data, or to the first entry (``set_alpha_to_one`` off)."""

    def place(self, process: GaussianProcess, steps: int) -> Tensor:
        if not isinstance(process, VariancePreserving):
            raise UserError(f"grid table: needs a process with a table of betas ('vp'), not {process.name!r}")
        length = process.steps
        if steps > length:
            raise UserError(f"steps: {steps} are more than the table's {length} entries")
        if self.spacing == "leading":
            entries = torch.arange(steps, dtype=torch.float64).flip(0) * (length // steps) + self.offset
        elif self.spacing == "trailing":
            entries = (length - torch.arange(steps, dtype=torch.float64) * (length / steps)).round() - 1
        else:
            entries = torch.linspace(length - 1, 0, steps, dtype=torch.float64).round()
        if entries[0] > length - 1:
            raise UserError(f"grid table: offset {self.offset} leads beyond the table's {length} entries")
        last = torch.tensor([0.0 if self.final == "clean" else 1 / length], dtype=torch.float64)
        return torch.cat([(entries + 1) / length, last])


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(
    tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> float:
    """Flux's shift for images of so many tokens: its logarithm is linear through two points (tokens, log shift)."""
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


def _then_clean(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])

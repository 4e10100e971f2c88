"""Count schedules: how many tokens each step of a block reveals, as exact integers.

A schedule is given by the number of masks that remain after each step, floor(n gamma(r)), r = step / steps,
gamma(1) = 0 (MDPO, arXiv 2508.13148; LLaDA, arXiv 2502.09992; ASS of CJ-GRPO, arXiv 2509.23924).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from unveil.registry import Plugin, UserError


class Schedule(Plugin, family="schedule"):
    """Says how many of n masks are left after each step; `counts` makes exact integers of it."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        """Masks left of ``n >= 1`` after ``step`` of ``steps``, 1 <= step < steps.

        The last step always leaves 0 and is not asked for. The value may lie outside [0, n] or rise again:
        `counts` clamps it.
        """
        raise NotImplementedError

    def layout(self, width: int, block_length: int | None, steps: int) -> list[tuple[int, int]]:
        """Size and local steps of every block, left to right, for responses of at most ``width`` tokens.

        Here: blocks of ``block_length`` (None: one), the last maybe shorter, with an equal share of the steps each.
        """
        size = block_length or width
        blocks = math.ceil(width / size)
        return [(min(size, width - start), max(1, steps // blocks)) for start in range(0, width, size)]

    def check_fits(self, width: int, block_length: int | None, steps: int) -> None:
        """Refuse step counts that do not divide into the blocks of a response.

        Raises:
            UserError: naming the key and what is allowed.
        """
        blocks = math.ceil(width / (block_length or width))
        if steps % blocks:
            raise UserError(f"steps: {steps} do not divide into {blocks} blocks (allowed: multiples of {blocks})")
        if steps > width:
            raise UserError(f"steps: {steps} do not fit a response of {width} tokens (each reveals one or more)")

    def counts(self, n: int, steps: int) -> list[int]:
        """Tokens revealed by each of ``steps`` steps: sum n, never negative, zero where the schedule says so.

        Raises:
            ValueError: n < 0 or steps < 1.
        """
        if n < 0 or steps < 1:
            raise ValueError(f"a schedule needs n >= 0 tokens and steps >= 1, got n = {n}, steps = {steps}")
        counts, left = [], n
        for step in range(1, steps + 1):
            target = self.remaining(n, step, steps) if left > 0 and step < steps else 0
            after = min(left, max(0, target))
            counts.append(left - after)
            left = after
        return counts


@dataclass(kw_only=True)
class Linear(Schedule, name="linear"):
    """floor(n (1 - r)) masks remain, in whole numbers: MDPO's own float form can fall one short."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return n * (steps - step) // steps


@dataclass(kw_only=True)
class Even(Schedule, name="even"):
    """LLaDA's layout: floor(n / steps) tokens a step, one more in each of the first (n mod steps) steps."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return n - step * (n // steps) - min(step, n % steps)


@dataclass(kw_only=True)
class Cosine(Schedule, name="cosine"):
    """gamma(r) = cos(pi r / 2): few tokens first, many last (MaskGIT)."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return _floor(n * math.cos(math.pi / 2 * step / steps))


@dataclass(kw_only=True)
class Power(Schedule, name="power"):
    """gamma(r) = 1 - r^k: k > 1 reveals few tokens first, k < 1 many."""

    k: float = 2.0
    """Exponent, positive; MDPO uses 2, 3 and 0.5."""

    def __post_init__(self) -> None:
        if not (self.k > 0 and math.isfinite(self.k)):
            raise UserError(f"schedule power: k is {self.k}, it must be a positive number")

    def remaining(self, n: int, step: int, steps: int) -> int:
        return _floor(n * (1 - (step / steps) ** self.k))


@dataclass(kw_only=True)
class Logarithmic(Schedule, name="log"):
    """gamma(r) = -log2(r) / log2(n), at most 1: many tokens first. A single mask waits for the last step."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return _floor(n * math.log2(steps / step) / math.log2(n)) if n > 1 else n


@dataclass(kw_only=True)
class Exponential(Schedule, name="exponential"):
    """gamma(r) = 1 - 2^(-log2(n) (1 - r)): n^r tokens revealed so far. A single mask goes at once."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return _floor(n - n ** (step / steps))


@dataclass(kw_only=True)
class Doubling(Schedule, name="doubling"):
    """1, 2, 4, 8, ... tokens: ASS of CJ-GRPO (2509.23924), which takes steps = floor(log2(n)).

    With fewer steps than the powers of two need, the last step takes the rest, as in ASS itself; with more,
    the steps after the n-th token reveal nothing.
    """

    blocks: Annotated[int, Field(ge=1)] = 1
    """Blocks that the canvas is cut into from the right. The last K - 1 blocks hold what the last K - 1 steps reveal, a
    step each; the first holds what the steps before them do. Above 1, steps = floor(log2(response length))."""

    def remaining(self, n: int, step: int, steps: int) -> int:
        return n - (2**step - 1)

    def layout(self, width: int, block_length: int | None, steps: int) -> list[tuple[int, int]]:
        if self.blocks == 1:
            return super().layout(width, block_length, steps)
        own = width.bit_length() - 1 - (self.blocks - 1)  # steps of the first block
        cut = [(2**power, 1) for power in range(own, own + self.blocks - 2)]
        first = 2**own - 1
        return [(first, own), *cut, (width - first - sum(size for size, _ in cut), 1)]

    def check_fits(self, width: int, block_length: int | None, steps: int) -> None:
        if self.blocks == 1:
            super().check_fits(width, block_length, steps)
            return
        if block_length is not None:
            raise UserError(f"block_length: {block_length} does not go with schedule.blocks = {self.blocks} (use null)")
        whole = width.bit_length() - 1
        if self.blocks > whole:
            raise UserError(
                f"schedule.blocks: {self.blocks} are more than a response of {width} tokens has (at most {whole})"
            )
        if steps != whole:
            raise UserError(
                f"steps: {steps} do not fit {self.blocks} doubling blocks of {width} tokens (allowed: {whole})"
            )


def _floor(value: float) -> int:
    """floor, forgiving a float that falls short of a whole number by rounding."""
    return math.floor(value + 1e-9)

"""Count schedules: how many tokens each step of a block reveals, as exact integers.

A schedule is given by the number of masks that remain after each step, floor(n gamma(r)), r = step / steps,
gamma(1) = 0 (MDPO, arXiv 2508.13148; LLaDA, arXiv 2502.09992; ASS of CJ-GRPO, arXiv 2509.23924).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """1, 2, 4, 8, ... tokens: ASS of CJ-GRPO for one block, which takes steps = floor(log2(n)).

    With fewer steps than the powers of two need, the last step takes the rest, as in ASS itself; with more,
    the steps after the n-th token reveal nothing.
    """

    def remaining(self, n: int, step: int, steps: int) -> int:
        return n - (2**step - 1)


def _floor(value: float) -> int:
    """floor, forgiving a float that falls short of a whole number by rounding."""
    return math.floor(value + 1e-9)

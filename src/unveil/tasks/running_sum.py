"""Running sums modulo a small number: a chain in which every slot needs the one before."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Annotated, Literal

from pydantic import Field

from unveil.registry import UserError
from unveil.tasks.base import Problem, Split, Task, Verdict


@dataclass(kw_only=True)
class RunningSum(Task, name="running_sum"):
    """Prompt ``2 1 0 2``, response ``2 0 0 2`` (modulus 3). By a stable hash a tenth is test."""

    length: Annotated[int, Field(ge=1, le=64)] = 8
    """Digits in the prompt."""

    modulus: Annotated[int, Field(ge=2, le=10)] = 3
    """Digits and sums are 0..modulus - 1."""

    answer_first: bool = False
    """The response starts with the final sum, then come all sums: length + 1 slots instead of length."""

    judge: Literal["last", "all"] = "last"
    """last: the final sum decides (with answer_first the first slot); all: the response must be exact."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        space = self.modulus**self.length
        rng = random.Random(f"running_sum/{split}/{seed}")
        # Drawing until enough differ is cheap, and sure to end, only where the split is far larger than that.
        if space <= 10_000 or 20 * count > space:
            prompts = product(range(self.modulus), repeat=self.length)
            everything = [digits for digits in prompts if split_of(digits) == split]
            if count > len(everything):
                raise UserError(
                    f"running_sum has {len(everything)} {split} problems with length={self.length}, "
                    f"modulus={self.modulus}; {count} were asked for"
                )
            return [self._problem(digits) for digits in rng.sample(everything, count)]
        chosen: dict[tuple[int, ...], None] = {}
        while len(chosen) < count:
            digits = tuple(int(rng.random() * self.modulus) for _ in range(self.length))
            if split_of(digits) == split:
                chosen[digits] = None
        return [self._problem(digits) for digits in chosen]

    def check(self, problem: Problem, completion: str) -> Verdict:
        expected, given = problem.answer["slots"], completion.split()
        exact = given == expected
        right = sum(one == other for one, other in zip(given, expected, strict=False)) / len(expected)
        where = 0 if self.answer_first else len(expected) - 1
        correct = exact if self.judge == "all" else given[where : where + 1] == [expected[where]]
        # Surplus words make a response inexact although every slot is right.
        partial = min(right, 1 - 1 / len(expected))
        return Verdict(
            correct=correct,
            score=1.0 if correct else partial,
            metrics={"exact": float(exact), "slots_right": right},
        )

    def _problem(self, digits: tuple[int, ...]) -> Problem:
        sums = [str(total % self.modulus) for total in accumulate(digits)]
        slots = [sums[-1], *sums] if self.answer_first else sums
        return Problem(
            id=f"running-sum-{self.modulus}-{''.join(map(str, digits))}",
            prompt=" ".join(map(str, digits)),
            answer={"slots": slots},
            solution=" ".join(slots),
        )


def split_of(digits: tuple[int, ...]) -> Split:
    """The split that a prompt belongs to, by a stable hash."""
    return "test" if zlib.crc32(bytes(digits)) % 10 == 0 else "train"

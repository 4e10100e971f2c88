"""Pointer chasing: follow a table from a start until 0. How long the answer is cannot be seen before it is known."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from unveil.registry import UserError
from unveil.tasks.base import Problem, Split, Task, Verdict


@dataclass(kw_only=True)
class PointerChase(Task, name="pointer_chase"):
    """Prompt ``3 0 1 3 2``: f(0) .. f(3) and a start x; response ``2 1 0``: x, f(x), f(f(x)) ... up to the first 0.

    A right response repeats the whole chain. Every chain reaches 0. By a stable hash a tenth of the prompts is test.
    """

    values: Annotated[int, Field(ge=4, le=12)] = 8
    """Table entries; they point at 0..values - 1. The longest chain has as many words."""

    chains: Literal["even", "random"] = "even"
    """Chain lengths: all of shortest..values equally often, or those of random tables, most of them short."""

    shortest: Annotated[int, Field(ge=1)] = 1
    """Fewest words of a chain."""

    def __post_init__(self) -> None:
        if self.shortest > self.values:
            raise UserError(f"shortest: {self.shortest} is longer than the longest chain (values={self.values})")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        space = self.values ** (self.values + 1)
        if 100 * count > space:  # a hundredth is surely there, and soon found by drawing
            raise UserError(
                f"pointer_chase gives at most {space // 100} problems with values={self.values}; {count} were asked for"
            )
        rng = random.Random(f"pointer_chase/{split}/{seed}")
        chosen: dict[str, Problem] = {}
        while len(chosen) < count:
            table, start = self._draw(rng)
            prompt = " ".join(map(str, [*table, start]))
            chain = follow(table, start)
            if chain is None or len(chain) < self.shortest or prompt in chosen or _split(prompt) != split:
                continue
            words = [str(value) for value in chain]
            chosen[prompt] = Problem(
                id=f"pointer-chase-{prompt.replace(' ', '-')}",
                prompt=prompt,
                answer={"chain": words},
                solution=" ".join(words),
            )
        return list(chosen.values())

    def check(self, problem: Problem, completion: str) -> Verdict:
        expected, given = problem.answer["chain"], completion.split()
        right = 0
        for word, wanted in zip(given, expected, strict=False):
            if word != wanted:
                break
            right += 1
        correct = given == expected
        # A chain that goes on behind its 0 is wrong although all of it is there.
        partial = min(right / len(expected), 1 - 1 / (len(expected) + 1))
        return Verdict(
            correct=correct,
            score=1.0 if correct else partial,
            metrics={"followed": right / len(expected), "cut_short": float(len(given) < len(expected))},
        )

    def _draw(self, rng: random.Random) -> tuple[list[int], int]:
        table = [rng.randrange(self.values) for _ in range(self.values)]
        if self.chains == "random":
            return table, rng.randrange(self.values)
        length = rng.randint(self.shortest, self.values)
        chain = [*rng.sample(range(1, self.values), length - 1), 0]
        for place, value in pairwise(chain):
            table[place] = value
        return table, chain[0]


def follow(table: list[int], start: int) -> list[int] | None:
    """The chain from ``start`` up to the first 0, None where it runs in a circle."""
    chain = [start]
    while chain[-1] != 0:
        if len(chain) > len(table):
            return None
        chain.append(table[chain[-1]])
    return chain


def _split(prompt: str) -> Split:
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"

"""Questions about digits whose answer may be said at once or worked out first: how long a response is matters.

A sum of many digits modulo a small number is beyond a small network at one go, but easy one digit at a time. So
a response that leaves no room for the working is wrong as often as a guess, while "what is the first digit" needs no
working at all. Trained on both ways of answering, a network decoded over a long canvas shows whether a decoder talks
itself into the short one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.tasks.running_sum import RunningSum

OPENINGS = ("is", "answer is", "the answer is")
"""What stands before the answer to a sum that is said straight."""
CLOSINGS = ("", "done", "all done", "now all done")
"""What may stand behind the working."""


@dataclass(kw_only=True)
class DigitSum(Task, name="digit_sum"):
    """Prompt ``2 1 0 2 sum``, response ``2 0 0 2``, or straight ``the answer is 2``. The last number is the answer.

    Solutions are worded differently from seed to seed: a straight answer has two to four words, and up to three words
    follow the working. The first digit is answered by itself alone.
    """

    length: Annotated[int, Field(ge=1, le=64)] = 8
    """Digits in the prompt."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 3
    """Digits and sums are 0..modulus - 1."""
    ask: Literal["sum", "first"] = "sum"
    """The sum modulo ``modulus``, or merely the first digit: a question whose right answer is short."""
    solve: Literal["worked", "direct"] = "worked"
    """How solutions answer a sum: by all running sums, or straight."""
    closing: bool = True
    """Whether words may follow the working."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"digit_sum/{split}/{seed}")
        chains = RunningSum(length=self.length, modulus=self.modulus).problems(split, count, seed)
        return [self._problem(chain, rng) for chain in chains]

    def check(self, problem: Problem, completion: str) -> Verdict:
        words, digits = completion.split(), {str(digit) for digit in range(self.modulus)}
        numbers = [word for word in words if word in digits]
        correct = numbers[-1:] == [problem.answer["answer"]]
        worked = words[: self.length] == problem.answer["sums"]
        return Verdict(
            correct=correct,
            score=float(correct),
            metrics={"words": float(len(words)), "worked": float(worked)},
        )

    def _problem(self, chain: Problem, rng: random.Random) -> Problem:
        sums = chain.answer["slots"]
        solution = answer = sums[-1] if self.ask == "sum" else chain.prompt.split()[0]
        opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
        if self.ask == "sum":
            worked = " ".join([*sums, closing] if closing and self.closing else sums)
            solution = worked if self.solve == "worked" else f"{opening} {answer}"
        return Problem(
            id=f"digit-{self.ask}-{chain.id}",
            prompt=f"{chain.prompt} {self.ask}",
            answer={"answer": answer, "sums": sums},
            solution=solution,
        )

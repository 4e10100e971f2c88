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

PHRASES = ("", "is", "answer is", "the answer is")
"""What may be said before a stated answer."""


@dataclass(kw_only=True)
class DigitSum(Task, name="digit_sum"):
    """Prompt ``2 1 0 2 sum``, response ``2 0 0 2``, or straight ``the answer is 2``. The last word is the answer.

    Solutions are worded differently from seed to seed: a direct answer has one to four words, and a worked-out one may
    state its answer once more in two to four words.
    """

    length: Annotated[int, Field(ge=1, le=64)] = 8
    """Digits in the prompt."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 3
    """Digits and sums are 0..modulus - 1."""
    ask: Literal["sum", "first"] = "sum"
    """The sum modulo ``modulus``, or merely the first digit: a question whose right answer is short."""
    solve: Literal["worked", "direct"] = "worked"
    """How solutions answer a sum: by all running sums, or straight. The first digit is always said straight."""
    phrases: Annotated[int, Field(ge=1, le=4)] = 4
    """How many of the wordings solutions choose from; 1: the bare answer, stated once."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"digit_sum/{split}/{seed}")
        chains = RunningSum(length=self.length, modulus=self.modulus).problems(split, count, seed)
        return [self._problem(chain, rng.choice(PHRASES[: self.phrases])) for chain in chains]

    def check(self, problem: Problem, completion: str) -> Verdict:
        words = completion.split()
        correct = words[-1:] == [problem.answer["answer"]]
        worked = words[: self.length] == problem.answer["sums"]
        return Verdict(
            correct=correct,
            score=float(correct),
            metrics={"words": float(len(words)), "worked": float(worked)},
        )

    def _problem(self, chain: Problem, phrase: str) -> Problem:
        sums = chain.answer["slots"]
        answer = sums[-1] if self.ask == "sum" else chain.prompt.split()[0]
        stated = f"{phrase} {answer}".strip()
        if self.ask == "sum" and self.solve == "worked":
            stated = " ".join([*sums, stated] if phrase else sums)
        return Problem(
            id=f"digit-{self.ask}-{chain.id}",
            prompt=f"{chain.prompt} {self.ask}",
            answer={"answer": answer, "sums": sums},
            solution=stated,
        )

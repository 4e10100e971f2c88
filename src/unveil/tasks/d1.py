r"""The four tasks of d1's evaluation (arXiv 2504.12216): answers in d1's form, found and compared by d1's rules.

Accuracies that d1, MDPO and their successors print come from these rules (``rewards/d1.py``). The prompts ask for the
same form in words of our own; the published ones can be given as ``prompt_template``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from unveil.registry import UserError
from unveil.rewards import d1
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.countdown import Countdown
from unveil.tasks.maths import Gsm8k, Math
from unveil.tasks.sudoku import Sudoku

_FORM = """
Write in this form:
<reasoning>
the steps
</reasoning>
<answer>
{answer}
</answer>"""
_COUNTDOWN = (
    r"Find an arithmetic expression with the value {target} that uses each of these numbers exactly once: {numbers}. "
    r"The signs + - * / and parentheses are allowed. Give the expression alone, without an equals sign, in \boxed{}."
) + _FORM.replace("{answer}", r"\boxed{the expression}")
_SUDOKU = (
    "Fill in this 4x4 Sudoku, written as 16 digits row by row, 0 for an empty cell: {puzzle}. Every row, column and "
    "2x2 box has each of the digits 1-4 once. Answer with all 16 digits in one word."
) + _FORM.replace("{answer}", "the 16 digits")


@dataclass(kw_only=True)
class Gsm8kD1(Gsm8k, name="gsm8k_d1"):
    """GSM8K by d1's rules: the first number in a box, equal as a float."""

    def check(self, problem: Problem, completion: str) -> Verdict:
        return _verdict(d1.number(completion) == float(problem.answer["answer"]))


@dataclass(kw_only=True)
class MathD1(Math, name="math_d1"):
    """MATH by d1's rules: the last box, equal after a normalisation of the text."""

    def check(self, problem: Problem, completion: str) -> Verdict:
        found = d1.expression(completion)
        return _verdict(found is not None and d1.same_expression(found, problem.answer["answer"]))


@dataclass(kw_only=True)
class CountdownD1(Countdown, name="countdown_d1"):
    """Countdown by d1's rules: one expression, within 1e-5 of the target."""

    form: Literal["steps", "expression"] = "expression"
    prompt_template: str = _COUNTDOWN

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        made = super().problems(split, count, seed)
        return [replace(one, solution=one.solution and _written(f"\\boxed{{{one.solution}}}")) for one in made]

    def check(self, problem: Problem, completion: str) -> Verdict:
        return _verdict(d1.reaches(d1.equation(completion), problem.answer["numbers"], problem.answer["target"]))


@dataclass(kw_only=True)
class SudokuD1(Sudoku, name="sudoku_d1"):
    """4 x 4 Sudoku by d1's rules. What d1 calls accuracy, the share of the empty cells that are right, is the
    ``score``; correct are those with all of them right."""

    prompt_template: str = _SUDOKU
    """The prompt; {puzzle} is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size != 4:
            raise UserError(f"sudoku_d1.size should be 4, got {self.size}")
        if "{puzzle}" not in self.prompt_template:
            raise UserError(f"task.prompt_template must contain {{puzzle}}, got {self.prompt_template!r}")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        made = super().problems(split, count, seed)
        return [
            replace(
                one,
                prompt=self.prompt_template.replace("{puzzle}", one.answer["puzzle"]),
                solution=_written(one.answer["solution"]),
            )
            for one in made
        ]

    def check(self, problem: Problem, completion: str) -> Verdict:
        puzzle, solution, found = problem.answer["puzzle"], problem.answer["solution"], d1.grid(completion)
        empty = [place for place, given in enumerate(puzzle) if given == "0"]
        right = sum(found[place] == solution[place] for place in empty) / len(empty)
        return Verdict(correct=right == 1, score=right)


def _verdict(correct: bool) -> Verdict:
    return Verdict(correct=correct, score=float(correct))


def _written(answer: str) -> str:
    return f"<reasoning>\n</reasoning>\n<answer>\n{answer}\n</answer>"

"""d1's rules, with their quirks, beside a comparison by value. Verdicts were checked against d1's own parser once."""

from __future__ import annotations

import pytest

from unveil.rewards import d1
from unveil.tasks.base import Problem
from unveil.tasks.countdown import Countdown
from unveil.tasks.d1 import CountdownD1, Gsm8kD1, MathD1, SudokuD1
from unveil.tasks.maths import Gsm8k, Math
from unveil.tasks.sudoku import Sudoku

NUMBERS = [  # completion, reference, right by d1's rules, right by value
    (r"<answer>\boxed{18}</answer><|eot_id|>", "18", True, True),
    (r"so \boxed{18} eggs", "18", True, True),
    (r"\boxed{43,500}", "43500", False, True),
    (r"\boxed{7 pencils}", "7", True, False),
    ("<answer>\n12 of 30 pens\n</answer>", "30", True, False),
    (r"first \boxed{4}, no, \boxed{5}", "4", True, False),
    (r"first \boxed{4}, no, \boxed{5}", "5", False, True),
    (r"\boxed{...} and then \boxed{9}", "9", True, True),
    (r"\boxed{} <answer>9</answer>", "9", True, True),
    (r"\boxed{-3}", "-3", True, True),
    (r"\boxed{\frac{2}{3}}", "2", True, False),
    (r"\boxed{45/3}", "15", False, True),
    ("the answer is 18", "18", False, False),
    ("18", "18", False, True),
]
EXPRESSIONS = [
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", True, True),
    (r"\boxed{0.5}", r"\frac12", True, True),
    (r"\boxed{.5}", r"\frac12", True, True),
    (r"\boxed{0.25}", r"\frac14", False, True),
    (r"\boxed{3/24}", r"\frac{1}{8}", False, True),
    (r"\boxed{3/4}", r"\frac{3}{4}", True, True),
    (r"\boxed{x = 7}", "7", True, True),
    (r"\boxed{\sqrt3}", r"\sqrt{3}", True, True),
    (r"\boxed{90^\circ}", "90", True, True),
    (r"\boxed{12\text{ cm}}", "12", True, True),
    (r"first \boxed{1}, then \boxed{2}", "2", True, True),
    (r"\boxed 5$ and no more", "5", True, False),
    (r"<answer>5</answer>", "5", False, True),
    (r"\boxed{} <answer>5</answer>", "5", True, True),
    (r"\boxed{(1, 2)}", "(1,2)", True, True),
    ("5", "5", True, True),
]
TREES = [
    (r"\boxed{(12 + 7) * 3}", True, True),
    (r"\boxed{(12 + 7) \times 3 = 57}", True, True),
    (r"\boxed{12 + 7 * 3}", False, False),
    (r"\boxed{(12 + 7) * 3 + 0}", False, False),
    ("<answer>(12 + 7) * 3</answer>", False, True),
    ("(12 + 7) * 3 = 57", True, True),
    (r"\boxed{12 + 7 = 19 , 19 * 3 = 57}", False, True),
    (r"\boxed{(12 + 7) * 3", False, False),
    (r"\boxed{12 ** 7 ** 3}", False, False),
    (r"\boxed{(12 + 7)(3)}", False, False),
]
PUZZLE, GRID = "4320004330100004", "4321124334122134"
GRIDS = [
    (f"<answer>\n{GRID}\n</answer><|eot_id|>", 1.0, True),
    (f"<answer>\n{GRID}<|eot_id|>", 1.0, False),
    (f"so it is {GRID}.", 1.0, False),
    (f"<answer>```\n{' '.join(GRID)}\n```</answer>", 1.0, False),
    (f"<answer>\n{PUZZLE}\n</answer>", 0.0, False),
    (f"<answer>{GRID[:8]}</answer>", 3 / 8, False),
    (f"<answer>{GRID}99</answer>", 1.0, False),
    ("<answer>none</answer>", 0.0, False),
    ("", 0.0, False),
]


@pytest.mark.parametrize(("text", "truth", "by_rule", "by_value"), NUMBERS)
def test_gsm8k(text: str, truth: str, by_rule: bool, by_value: bool) -> None:
    problem = Problem(id="p", prompt="?", answer={"answer": truth})
    assert (Gsm8kD1().check(problem, text).correct, Gsm8k().check(problem, text).correct) == (by_rule, by_value)


@pytest.mark.parametrize(("text", "truth", "by_rule", "by_value"), EXPRESSIONS)
def test_math(text: str, truth: str, by_rule: bool, by_value: bool) -> None:
    problem = Problem(id="p", prompt="?", answer={"answer": truth})
    assert (MathD1().check(problem, text).correct, Math().check(problem, text).correct) == (by_rule, by_value)


@pytest.mark.parametrize(("text", "by_rule", "by_value"), TREES)
def test_countdown(text: str, by_rule: bool, by_value: bool) -> None:
    problem = Problem(id="p", prompt="?", answer={"numbers": [12, 7, 3], "target": 57})
    verdicts = (CountdownD1().check(problem, text).correct, Countdown().check(problem, text).correct)
    assert verdicts == (by_rule, by_value)


@pytest.mark.parametrize(("text", "share", "by_value"), GRIDS)
def test_sudoku(text: str, share: float, by_value: bool) -> None:
    problem = Problem(id="p", prompt="?", answer={"puzzle": PUZZLE, "solution": GRID})
    verdict = SudokuD1().check(problem, text)
    assert (verdict.score, verdict.correct) == (share, share == 1)
    assert Sudoku().check(problem, text).correct == by_value


def test_no_text_raises() -> None:
    texts = [
        "", "\0", "\ud800", r"\boxed", r"\boxed{", r"\boxed ", r"\frac", r"\boxed{\frac}", r"\boxed{\sqrt}", "²",
        "9" * 9000, r"\boxed{" * 2000, "(" * 900 + ")" * 900, "-" * 999 + "1", r"\boxed{1/²}",
        r"\boxed{\text{ a\text{ b}}", "<answer>" * 500 + "```" + " " * 5000, "1+" * 499, "9**9**9**9", "1/0",
    ]  # fmt: skip
    for text in texts:
        d1.number(text)
        d1.same_expression(d1.expression(text) or "", r"\frac{1}{2}")
        assert not d1.reaches(d1.equation(text), [1, 0, 9], 57)
        assert len(d1.grid(text)) == 16


def test_the_prompts_ask_for_what_the_rules_read() -> None:
    for task in (CountdownD1(), SudokuD1()):
        for problem in task.problems("test", 3, 0):
            assert "<answer>" in problem.prompt and "{" not in problem.prompt.replace(r"\boxed{", "")
            assert problem.solution is not None and task.check(problem, problem.solution).correct

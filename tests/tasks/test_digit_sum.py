from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.registry import UserError, lookup
from unveil.tasks.base import Problem, Task
from unveil.tasks.digit_sum import CLOSINGS, OPENINGS, DigitSum

GOLDEN = [("1 0 2 0 2 2 0 2 sum", "1 1 0 0 2 1 1 0 all done"), ("0 1 2 0 2 2 0 0 sum", "0 1 0 0 2 1 1 1")]


def test_it_is_a_task_called_digit_sum() -> None:
    assert lookup(Task, "digit_sum") is DigitSum


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(2, 10), st.integers())
def test_solutions_are_right_and_worded_by_the_seed(length: int, modulus: int, seed: int) -> None:
    for ask, solve in (("sum", "worked"), ("sum", "direct"), ("first", "worked")):
        task = DigitSum(length=length, modulus=modulus, ask=ask, solve=solve)  # type: ignore[arg-type]
        for problem in task.problems("train", 1, seed):
            *digits, word = problem.prompt.split()
            sums = [str(sum(map(int, digits[: end + 1])) % modulus) for end in range(length)]
            answer = sums[-1] if ask == "sum" else digits[0]
            worked = ask == "sum" and solve == "worked"
            allowed = [answer]
            if ask == "sum":
                allowed = [f"{opening} {answer}" for opening in OPENINGS]
            if worked:
                allowed = [" ".join([*sums, closing]).strip() for closing in CLOSINGS]
            assert word == ask and problem.solution in allowed
            assert problem.answer == {"answer": answer, "sums": sums}
            verdict = task.check(problem, problem.solution)
            assert (verdict.correct, verdict.score) == (True, 1.0)
            assert verdict.metrics["words"] == len(problem.solution.split())
            if worked:
                assert verdict.metrics["worked"] == 1


def test_all_wordings_occur_and_the_plain_one_can_be_asked_for() -> None:
    for task, counts in (
        (DigitSum(solve="direct"), {2, 3, 4}),
        (DigitSum(), {8, 9, 10, 11}),
        (DigitSum(closing=False), {8}),
        (DigitSum(ask="first"), {1}),
    ):
        solutions = [problem.solution or "" for problem in task.problems("train", 200, 0)]
        assert {len(solution.split()) for solution in solutions} == counts


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("", False),
        ("1", True),
        ("0 1", True),
        ("the answer is 1", True),
        ("1 done", True),
        ("1 2 2 1", True),
        ("2", False),
        ("1 7", True),
        ("done", False),
        ("1 0 now", False),
    ],
)
def test_the_last_number_is_the_answer(text: str, correct: bool) -> None:
    problem = Problem(id="p", prompt="1 1 0 2 sum", answer={"answer": "1", "sums": ["1", "2", "2", "1"]})
    verdict = DigitSum(length=4).check(problem, text)
    assert (verdict.correct, verdict.score) == (correct, float(correct))
    assert verdict.metrics == {"words": float(len(text.split())), "worked": float(text == "1 2 2 1")}


@settings(max_examples=50, deadline=None)
@given(st.text() | st.text("012 is\n", max_size=20))
def test_check_never_raises(text: str) -> None:
    problem = DigitSum().problems("test", 1, 0)[0]
    verdict = DigitSum().check(problem, text)
    assert verdict.score == float(verdict.correct)


def test_the_same_arguments_give_the_same_problems_everywhere() -> None:
    assert [(p.prompt, p.solution) for p in DigitSum().problems("train", 2, 0)] == GOLDEN
    assert DigitSum().problems("test", 50, 5) == DigitSum().problems("test", 50, 5)
    ids = [p.id for p in DigitSum().problems("test", 50, 5)]
    assert len(set(ids)) == 50 and not set(ids) & {p.id for p in DigitSum(ask="first").problems("test", 50, 5)}


def test_it_says_when_there_are_not_enough() -> None:
    with pytest.raises(UserError, match="has"):
        DigitSum(length=2).problems("test", 500, 0)

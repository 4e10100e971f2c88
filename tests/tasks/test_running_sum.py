from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.registry import UserError, lookup
from unveil.tasks.base import Problem, Task
from unveil.tasks.running_sum import RunningSum

CHAIN = Problem(id="p", prompt="1 2 2 1", answer={"slots": ["1", "0", "2", "0"]}, solution="1 0 2 0")
GOLDEN_LISTED = ["1 0 2 0 2 2 0 2", "0 1 2 0 2 2 0 0"]
GOLDEN_DRAWN = ["1 1 4 5 4 4 0 0 2 4 2 5", "0 4 2 5 4 1 6 4 0 5 2 6"]


def test_it_is_a_task_called_running_sum() -> None:
    assert lookup(Task, "running_sum") is RunningSum


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 10), st.booleans(), st.sampled_from(["last", "all"]), st.integers())
def test_solutions_are_the_running_sums(
    length: int, modulus: int, answer_first: bool, judge: Literal["last", "all"], seed: int
) -> None:
    task = RunningSum(length=length, modulus=modulus, answer_first=answer_first, judge=judge)
    for problem in task.problems("train", 1, seed):
        digits = [int(word) for word in problem.prompt.split(" ")]
        assert len(digits) == length and set(digits) <= set(range(modulus))
        sums = [str(sum(digits[: end + 1]) % modulus) for end in range(length)]
        expected = [sums[-1], *sums] if answer_first else sums
        assert problem.solution == " ".join(expected)
        assert problem.answer == {"slots": expected}
        assert problem.id == f"running-sum-{modulus}-{problem.prompt.replace(' ', '')}"
        verdict = task.check(problem, problem.solution)
        assert (verdict.correct, verdict.score) == (True, 1.0)
        assert verdict.metrics == {"exact": 1.0, "slots_right": 1.0}


@pytest.mark.parametrize("answer_first", [False, True])
@pytest.mark.parametrize("judge", ["last", "all"])
def test_every_possible_response_of_the_right_length(answer_first: bool, judge: Literal["last", "all"]) -> None:
    slots = ["0", "1", "0", "2", "0"] if answer_first else ["1", "0", "2", "0"]
    problem = Problem(id="p", prompt="1 2 2 1", answer={"slots": slots})
    task = RunningSum(length=4, answer_first=answer_first, judge=judge)
    for response in product("012", repeat=len(slots)):
        verdict = task.check(problem, " ".join(response))
        exact = list(response) == slots
        share = sum(one == other for one, other in zip(response, slots, strict=True)) / len(slots)
        answer_right = response[0 if answer_first else -1] == "0"
        assert verdict.correct == (exact if judge == "all" else answer_right)
        assert verdict.score == (1.0 if verdict.correct else share)
        assert verdict.metrics == {"exact": float(exact), "slots_right": share}


@pytest.mark.parametrize(
    ("text", "judge", "correct", "score"),
    [
        ("", "last", False, 0.0),
        ("1 0 2", "last", False, 0.75),
        ("1020", "last", False, 0.0),
        ("1 0 2 0 0", "last", True, 1.0),
        ("1 0 2 0 0", "all", False, 0.75),
        ("1 0 2", "all", False, 0.75),
        (" 1\n0  2 0 ", "all", True, 1.0),
        ("1 0 2 ０", "last", False, 0.75),
    ],
)
def test_responses_of_another_length(text: str, judge: Literal["last", "all"], correct: bool, score: float) -> None:
    verdict = RunningSum(length=4, judge=judge).check(CHAIN, text)
    assert (verdict.correct, verdict.score) == (correct, score)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("012 \n", max_size=20), st.sampled_from(["last", "all"]))
def test_check_never_raises(text: str, judge: Literal["last", "all"]) -> None:
    verdict = RunningSum(length=4, judge=judge).check(CHAIN, text)
    assert 0 <= verdict.score <= 1
    assert (verdict.score == 1) == verdict.correct


def test_the_same_arguments_give_the_same_problems_everywhere() -> None:
    assert [p.prompt for p in RunningSum().problems("train", 2, 0)] == GOLDEN_LISTED
    assert [p.prompt for p in RunningSum(length=12, modulus=7).problems("test", 2, 0)] == GOLDEN_DRAWN
    for task in (RunningSum(), RunningSum(length=12, modulus=7)):
        assert task.problems("test", 50, 5) == task.problems("test", 50, 5) != task.problems("test", 50, 6)


@pytest.mark.parametrize("size", [{}, {"length": 9}, {"length": 5, "modulus": 2}])
def test_train_and_test_share_the_whole_space(size: dict[str, int]) -> None:
    task = RunningSum(**size)
    space = task.modulus**task.length
    prompts: set[str] = set()
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"running_sum has \d+ {split} problems with length=") as error:
            task.problems(split, space + 1, 0)
        count = int(str(error.value).split()[2])
        assert space <= 32 or 0.08 < (count if split == "test" else space - count) / space < 0.12
        prompts |= {problem.prompt for problem in task.problems(split, count, 0)}
    assert len(prompts) == space


def test_drawn_lists_hold_different_problems_of_their_split_only() -> None:
    task = RunningSum(length=9)
    train, test = ({p.id for p in task.problems(split, 900, 0)} for split in ("train", "test"))
    assert len(train) == len(test) == 900
    assert not train & test

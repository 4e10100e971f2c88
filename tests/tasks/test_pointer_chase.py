from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.registry import UserError, lookup
from unveil.tasks.base import Problem, Task
from unveil.tasks.pointer_chase import PointerChase, follow

CHASE = Problem(id="p", prompt="3 0 1 3 2", answer={"chain": ["2", "1", "0"]}, solution="2 1 0")


def chase(prompt: str) -> str:
    """The solution, written anew."""
    *table, at = prompt.split()
    chain = [at]
    while at != "0":
        at = table[int(at)]
        chain.append(at)
    return " ".join(chain)


def test_it_is_a_task_called_pointer_chase() -> None:
    assert lookup(Task, "pointer_chase") is PointerChase


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 12), st.sampled_from(["even", "random"]), st.sampled_from(["train", "test"]), st.integers())
def test_solutions_follow_the_table(values: int, chains: str, split: str, seed: int) -> None:
    task = PointerChase(values=values, chains=chains)  # type: ignore[arg-type]
    for problem in task.problems(split, 1, seed):  # type: ignore[arg-type]
        given = [int(word) for word in problem.prompt.split()]
        assert len(given) == values + 1 and set(given) <= set(range(values))
        assert problem.solution == chase(problem.prompt)
        assert problem.answer == {"chain": problem.solution.split()}
        assert len(problem.solution.split()) <= values
        verdict = task.check(problem, problem.solution)
        assert (verdict.correct, verdict.score) == (True, 1.0)
        assert verdict.metrics == {"followed": 1.0, "cut_short": 0.0}


def test_lengths_are_even_or_those_of_random_tables() -> None:
    def lengths(chains: str, shortest: int = 1) -> list[float]:
        task = PointerChase(chains=chains, shortest=shortest)  # type: ignore[arg-type]
        problems = task.problems("train", 2000, 1)
        counts = Counter(len(problem.answer["chain"]) for problem in problems)
        return [counts[length] / 2000 for length in range(1, 9)]

    assert lengths("even") == pytest.approx([1 / 8] * 8, abs=0.03)
    assert lengths("even", 3) == pytest.approx([0, 0, *[1 / 6] * 6], abs=0.03)
    # Start and every next value are uniform; a chain of n words avoids 0 and itself n - 1 times, then hits 0.
    weights = [1.0]
    for seen in range(1, 8):
        weights.append(weights[-1] * (8 - seen) / 8)
    expected = [weight / sum(weights) for weight in weights]
    assert lengths("random") == pytest.approx(expected, abs=0.03)
    longer = [0, 0, *(weight / sum(weights[2:]) for weight in weights[2:])]
    assert lengths("random", 3) == pytest.approx(longer, abs=0.03)


@pytest.mark.parametrize(
    ("table", "start", "chain"),
    [([3, 0, 1, 3], 2, [2, 1, 0]), ([3, 0, 1, 3], 0, [0]), ([3, 0, 1, 3], 3, None), ([1, 2, 1], 1, None)],
)
def test_chains_of_tables(table: list[int], start: int, chain: list[int] | None) -> None:
    assert follow(table, start) == chain


@pytest.mark.parametrize(
    ("text", "correct", "score", "cut"),
    [
        ("2 1 0", True, 1.0, 0.0),
        ("  2\n1 0 ", True, 1.0, 0.0),
        ("2 1", False, 2 / 3, 1.0),
        ("2 1 0 3", False, 0.75, 0.0),
        ("2 0", False, 1 / 3, 1.0),
        ("1 1 0", False, 0.0, 0.0),
        ("", False, 0.0, 1.0),
        ("210", False, 0.0, 1.0),
        ("2 1 ０", False, 2 / 3, 0.0),
    ],
)
def test_responses_by_hand(text: str, correct: bool, score: float, cut: float) -> None:
    verdict = PointerChase(values=4).check(CHASE, text)
    assert (verdict.correct, verdict.metrics["cut_short"]) == (correct, cut)
    assert verdict.score == pytest.approx(score)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("012 \n", max_size=20))
def test_check_never_raises(text: str) -> None:
    verdict = PointerChase(values=4).check(CHASE, text)
    assert 0 <= verdict.score <= 1
    assert (verdict.score == 1) == verdict.correct


def test_the_same_arguments_give_the_same_problems_and_splits_are_apart() -> None:
    task = PointerChase()
    assert task.problems("test", 40, 5) == task.problems("test", 40, 5) != task.problems("test", 40, 6)
    train, test = ({p.prompt for p in PointerChase(values=4).problems(split, 10, 0)} for split in ("train", "test"))
    assert len(train) == len(test) == 10 and not train & test
    many = PointerChase().problems("train", 3000, 0)
    assert len({problem.id for problem in many}) == len({problem.prompt for problem in many}) == 3000


def test_chains_longer_than_the_table_are_refused() -> None:
    with pytest.raises(UserError, match=r"shortest: 9 is longer than the longest chain \(values=8\)"):
        PointerChase(shortest=9)


def test_more_problems_than_there_are() -> None:
    with pytest.raises(UserError, match="pointer_chase gives at most 10 problems with values=4; 11 were asked for"):
        PointerChase(values=4).problems("test", 11, 0)

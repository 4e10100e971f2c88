from __future__ import annotations

import ast
import re
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from unveil.registry import UserError, lookup
from unveil.tasks.base import Problem, Task
from unveil.tasks.countdown import Countdown, Node, written_expression

PROBLEM = Problem(id="p", prompt="12 7 3 -> 57", answer={"numbers": [12, 7, 3], "target": 57})

GOLDEN_TRAIN = [
    ("countdown-4-4-18-18", "18 4 4 -> 18", "18 - 4 = 14 , 14 + 4 = 18"),
    ("countdown-4-5-13-85", "5 4 13 -> 85", "13 + 4 = 17 , 17 * 5 = 85"),
]
GOLDEN_TEST = [("countdown-5-13-15-16", "15 5 13 -> 16", "15 / 5 = 3 , 3 + 13 = 16")]


def results(left: int, right: int) -> list[int]:
    quotient = Fraction(left, right)
    return [left + right, left - right, left * right, quotient.numerator if quotient.denominator == 1 else 0]


def reachable(numbers: tuple[int, ...], max_target: int, max_intermediate: int) -> set[int]:
    """Targets by combining any two of the numbers until one is left."""
    if len(numbers) == 1:
        return {*numbers}
    limit = max_target if len(numbers) == 2 else max_intermediate
    found = set()
    for left, right, *rest in permutations(numbers):
        for value in results(left, right):
            if 0 < value <= limit:
                found |= reachable((value, *rest), max_target, max_intermediate)
    return found


def test_it_is_a_task_called_countdown() -> None:
    assert lookup(Task, "countdown") is Countdown


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 4),
    st.sampled_from([9, 20, 99]),
    st.sampled_from([30, 99]),
    st.sampled_from([50, 199]),
    st.sampled_from(["steps", "expression"]),
    st.integers(),
)
def test_generated_problems_keep_every_rule(
    numbers: int, top: int, max_target: int, middle: int, form: Literal["steps", "expression"], seed: int
) -> None:
    task = Countdown(numbers=numbers, max_number=top, max_target=max_target, max_intermediate=middle, form=form)
    for problem in task.problems("train", 20, seed):
        given, target = problem.answer["numbers"], problem.answer["target"]
        assert problem.prompt == f"{' '.join(map(str, given))} -> {target}"
        assert problem.id == "-".join(map(str, ["countdown", *sorted(given), target]))
        assert len(given) == numbers and all(1 <= number <= top for number in given)
        assert 1 <= target <= max_target
        assert problem.solution is not None
        assert task.check(problem, problem.solution).correct
        if form == "steps":
            steps = problem.solution.split(" , ")
            assert len(steps) == numbers - 1
            assert all(re.fullmatch(r"\d+ [-+*/] \d+ = \d+", step) for step in steps)
            values = [int(step.split()[-1]) for step in steps]
        else:
            values = values_in_reading_order(problem.solution)
        assert values[-1] == target
        assert all(value in range(1, middle + 1) for value in values[:-1])


def values_in_reading_order(expression: str) -> list[Fraction]:
    """Results of all operations, operands before their use, by Python's own grammar."""

    def visit(node: ast.expr) -> list[Fraction]:
        if isinstance(node, ast.Constant):
            return []
        assert isinstance(node, ast.BinOp)
        sides = [visit(side) or [Fraction(ast.literal_eval(side))] for side in (node.left, node.right)]
        left, right = sides[0][-1], sides[1][-1]
        operations = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
        value = operations[type(node.op)](left, right)
        return [*visit(node.left), *visit(node.right), value]

    return visit(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize(
    ("sign", "left", "right", "text"),
    [
        ("*", "+", "", "( 8 + 2 ) * 3"),
        ("-", "", "-", "3 - ( 8 - 2 )"),
        ("-", "", "+", "3 - ( 8 + 2 )"),
        ("-", "-", "", "8 - 2 - 3"),
        ("-", "", "*", "3 - 8 * 2"),
        ("+", "", "+", "8 + 2 + 3"),
        ("+", "", "-", "8 - 2 + 3"),
        ("+", "/", "", "8 / 2 + 3"),
        ("*", "", "*", "8 * 2 * 3"),
        ("*", "", "/", "8 / 2 * 3"),
        ("*", "/", "", "8 / 2 * 3"),
        ("/", "", "*", "3 / ( 8 * 2 )"),
        ("/", "", "/", "3 / ( 8 / 2 )"),
        ("/", "*", "", "8 * 2 / 3"),
        ("/", "", "-", "3 / ( 8 - 2 )"),
        ("+", "-", "+", "8 - 2 + ( 8 + 2 )"),
        ("*", "/", "*", "8 / 2 * ( 8 * 2 )"),
        ("*", "+", "/", "8 / 2 * ( 8 + 2 )"),
        ("*", "-", "+", "( 8 - 2 ) * ( 8 + 2 )"),
        ("+", "*", "+", "8 + 2 + 8 * 2"),
        ("-", "*", "/", "8 * 2 - 8 / 2"),
    ],
)
def test_parentheses_stand_only_where_they_matter(sign: str, left: str, right: str, text: str) -> None:
    def side(inner: str) -> Node:
        return Node(1, inner, Node(8), Node(2)) if inner else Node(3)

    assert written_expression(Node(1, sign, side(left), side(right))) == text


def test_solutions_use_all_signs_and_both_orders() -> None:
    solutions = [str(problem.solution) for problem in Countdown().problems("train", 2000, 0)]
    first = [solution.split()[:3] for solution in solutions]
    for sign in "+*":
        ordered = [int(a) < int(b) for a, found, b in first if found == sign and a != b]
        assert 0.4 < sum(ordered) / len(ordered) < 0.6
    assert {sign for _, sign, _ in first} == set("+-*/")


def test_the_same_arguments_give_the_same_problems_everywhere() -> None:
    assert [(p.id, p.prompt, p.solution) for p in Countdown().problems("train", 2, 0)] == GOLDEN_TRAIN
    assert [(p.id, p.prompt, p.solution) for p in Countdown().problems("test", 1, 7)] == GOLDEN_TEST
    task = Countdown(numbers=4, form="expression")
    assert task.problems("train", 50, 5) == task.problems("train", 50, 5) != task.problems("train", 50, 6)
    assert task.problems("train", 50, 5)[:20] == task.problems("train", 20, 5)


def test_small_spaces_are_given_completely_and_then_refused_with_their_exact_size() -> None:
    task = Countdown(numbers=3, max_number=4, max_target=20, max_intermediate=9)
    everything = {
        (*multiset, target)
        for multiset in combinations_with_replacement(range(1, 5), 3)
        for target in reachable(multiset, 20, 9)
    }
    sizes = {}
    for split in ("train", "test"):
        with pytest.raises(UserError) as error:
            task.problems(split, 10**6, 0)
        match = re.match(rf"countdown has (\d+) {split} problems with numbers=3, max_number=4,", str(error.value))
        assert match is not None
        sizes[split] = int(match[1])
    assert sizes["train"] + sizes["test"] == len(everything)
    keys = []
    for split, size in sizes.items():
        problems = task.problems(split, size, 1)
        assert all(task.check(problem, str(problem.solution)).correct for problem in problems)
        keys += [(*sorted(p.answer["numbers"]), p.answer["target"]) for p in problems]
    assert len(keys) == len(set(keys))
    assert set(keys) == everything


def test_large_spaces_with_next_to_no_valid_problem_are_refused() -> None:
    task = Countdown(numbers=4, max_number=999, max_target=1, max_intermediate=1)
    with pytest.raises(UserError, match="countdown: draws give only 0 train problems with numbers=4"):
        task.problems("train", 1, 0)


def test_one_tenth_of_the_number_choices_is_test_whatever_their_order() -> None:
    task = Countdown()
    parts = {split: task.problems(split, 1500, 3) for split in ("train", "test")}
    chosen = {split: {tuple(sorted(p.answer["numbers"])) for p in part} for split, part in parts.items()}
    assert not chosen["train"] & chosen["test"]
    assert 0.08 < len(chosen["test"]) / 1540 < 0.12
    assert len({p.id for p in parts["train"]}) == 1500


def test_check_scores() -> None:
    task = Countdown()
    right = task.check(PROBLEM, r"I think <answer> 12 + 7 = 19 , 19 × 3 = 57 </answer>")
    assert (right.correct, right.score, right.metrics) == (
        True,
        1.0,
        {"well_formed": 1.0, "right_numbers": 1.0},
    )
    near = task.check(PROBLEM, r"\boxed{(12 + 3) * 7}")
    assert (near.correct, near.score, near.metrics) == (
        False,
        0.1,
        {"well_formed": 1.0, "right_numbers": 1.0},
    )
    other = task.check(PROBLEM, "12 + 7 = 19")
    assert (other.correct, other.score, other.metrics) == (
        False,
        0.0,
        {"well_formed": 1.0, "right_numbers": 0.0},
    )
    none = task.check(PROBLEM, "no idea")
    assert (none.correct, none.score, none.metrics) == (
        False,
        0.0,
        {"well_formed": 0.0, "right_numbers": 0.0},
    )
    assert Countdown(form="expression").check(PROBLEM, "12 + 7 = 19 , 19 * 3 = 57").correct
    assert Countdown(form="steps").check(PROBLEM, "( 12 + 7 ) * 3").correct


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("12 7+3*57=,()<>/", max_size=30))
def test_check_never_raises(text: str) -> None:
    verdict = Countdown().check(PROBLEM, text)
    assert (verdict.score == 1) == verdict.correct
    assert verdict.metrics.keys() == {"well_formed", "right_numbers"}


def test_two_number_answers_agree_with_plain_arithmetic() -> None:
    """Every sign and number at every place, so in particular every single change of a right solution."""
    task = Countdown()
    problem = Problem(id="p", prompt="8 2 -> 4", answer={"numbers": [8, 2], "target": 4})
    right = set()
    for a, sign, b, c in product(range(12), range(4), range(12), range(12)):
        text = f"{a} {'+-*/'[sign]} {b} = {c}"
        true = sorted((a, b)) == [2, 8] and c == 4 and results(a, b)[sign] == 4
        assert task.check(problem, text).correct == true, text
        right |= {text} if true else set()
    assert right == {"8 / 2 = 4"}


@settings(max_examples=40, deadline=None)
@given(st.integers(), st.sampled_from(["steps", "expression"]), st.data())
def test_one_changed_word_of_a_solution_that_changes_a_value_is_wrong(
    seed: int, form: Literal["steps", "expression"], data: st.DataObject
) -> None:
    task = Countdown(numbers=4, max_number=9, max_target=30, form=form)
    problem = task.problems("train", 1, seed)[0]
    words = str(problem.solution).split()
    place = data.draw(st.sampled_from([index for index, word in enumerate(words) if word not in "()=,"]))
    numbers = [str(number) for number in range(1, 30)]
    other = data.draw(st.sampled_from(numbers if words[place].isdigit() else [*"+-*/"]))
    changed = " ".join([*words[:place], other, *words[place + 1 :]])
    try:
        if form == "steps":
            sides = [step.split(" = ") for step in changed.split(" , ")]
            holds = all(values_in_reading_order(left)[-1] == int(right) for left, right in sides)
        else:
            holds = values_in_reading_order(changed)[-1] == problem.answer["target"]
    except ZeroDivisionError:
        holds = False
    same_words = sorted(filter(str.isdigit, words)) == sorted(filter(str.isdigit, changed.split()))
    assert task.check(problem, changed).correct == (holds and same_words)


def write(tmp_path: Path, name: str, *rows: str) -> str:
    path = tmp_path / name
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def row(numbers: str, target: int) -> str:
    return f'{{"input": "{numbers}", "output": "{target}"}}'


def test_a_test_file_is_read_in_order_and_kept_out_of_train(tmp_path: Path) -> None:
    path = write(tmp_path, "test.jsonl", row("3,1,2", 6), row("5, 4", 9), row("2,1,3", 6), row("1,2,3", 5))
    task = Countdown(numbers=3, max_number=3, test_file=path)
    problems = task.problems("test", 3, 99)
    assert [p.id for p in problems] == ["countdown-1-2-3-6", "countdown-4-5-9", "countdown-1-2-3-5"]
    assert problems[0] == Problem(
        id="countdown-1-2-3-6", prompt="3 1 2 -> 6", answer={"numbers": [3, 1, 2], "target": 6}, solution=None
    )
    with pytest.raises(UserError, match=r"test\.jsonl: holds 3 different test problems, 4 were asked for"):
        task.problems("test", 4, 0)
    with pytest.raises(UserError) as error:
        task.problems("train", 10**6, 0)
    train = task.problems("train", int(str(error.value).split()[2]), 0)
    assert {tuple(sorted(p.answer["numbers"])) for p in train} == {
        multiset for multiset in combinations_with_replacement((1, 2, 3), 3) if multiset != (1, 2, 3)
    }


def test_a_train_file_is_shuffled_and_leaves_out_what_is_test(tmp_path: Path) -> None:
    rows = [row(f"{a},{b}", a + b) for a, b in combinations_with_replacement(range(1, 21), 2)]
    task = Countdown(numbers=2, max_number=20, train_file=write(tmp_path, "train.jsonl", *rows))
    with pytest.raises(UserError, match=r"train\.jsonl: holds \d+ different train problems, 210 were") as error:
        task.problems("train", 210, 0)
    size = int(str(error.value).split("holds ")[1].split()[0])
    train = task.problems("train", size, 0)
    assert [p.id for p in train] != [p.id for p in task.problems("train", size, 1)]
    kept = {tuple(sorted(p.answer["numbers"])) for p in train}
    held_out = set(combinations_with_replacement(range(1, 21), 2)) - kept
    assert held_out
    assert {tuple(sorted(p.answer["numbers"])) for p in task.problems("test", 30, 0)} <= held_out
    both = Countdown(
        train_file=write(tmp_path, "train.jsonl", *rows),
        test_file=write(tmp_path, "test.jsonl", row("2,1", 1)),
    )
    assert "countdown-1-2-3" not in {p.id for p in both.problems("train", 209, 0)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row("3,x", 5), r"'input': 'x' is not a positive whole number"),
        (row("3,-2", 5), r"'input': '-2' is not"),
        (row("3,,2", 5), r"'input': '' is not"),
        (row("3,0", 5), r"'input': '0' is not"),
        (row("3,1.5", 5), r"'input': '1\.5' is not"),
        (row("3,²", 5), r"'input': '²' is not"),
        (row("3,2", 0), r"'output': '0' is not"),
        (row("3,2", 10**9), r"'output': '1000000000' is not"),
        (row("3", 3), r"'input' has 1 numbers \(allowed: 2 to 16\)"),
        (row("1" + ",1" * 16, 3), r"'input' has 17 numbers"),
        ('{"input": "3,2", "output": 5}', r"'output' must be a string, got 5"),
        ('{"input": "3,2"}', r"key 'output' is missing"),
    ],
)
def test_broken_rows_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, "data.jsonl", row("1,2", 3), line)
    for task, split in ((Countdown(test_file=path), "test"), (Countdown(train_file=path), "train")):
        with pytest.raises(UserError, match=rf"data\.jsonl:2: {message}"):
            task.problems(split, 1, 0)


def test_prompt_template() -> None:
    task = Countdown(prompt_template="Reach {target} from {numbers} in \\boxed{}.")
    problem = task.problems("train", 1, 0)[0]
    numbers = " ".join(map(str, problem.answer["numbers"]))
    assert problem.prompt == f"Reach {problem.answer['target']} from {numbers} in \\boxed{{}}."
    for template in ("{numbers}", "{target}", ""):
        with pytest.raises(UserError, match=r"countdown\.prompt_template must contain"):
            Countdown(prompt_template=template)


def test_ranges_are_declared_for_the_recipe_reader() -> None:
    adapter = TypeAdapter(Countdown)
    assert adapter.validate_python({"numbers": 4}) == Countdown(numbers=4)
    for wrong in (
        {"numbers": 5},
        {"max_number": 0},
        {"max_target": 0},
        {"max_intermediate": 0},
        {"form": "x"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)

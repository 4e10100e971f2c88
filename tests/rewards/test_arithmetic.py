from __future__ import annotations

import ast
from collections import Counter
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.rewards.arithmetic import MAX_CHARACTERS, MAX_DEPTH, judge_arithmetic, last_answer

MALFORMED = (False, False, False)
WRONG_NUMBERS = (True, False, False)
WRONG_VALUE = (True, True, False)
CORRECT = (True, True, True)


def apply(left: Fraction, sign: str, right: Fraction) -> Fraction:
    if sign == "/":
        return left / right if right else Fraction(-1)
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def all_step_texts(numbers: tuple[int, ...], target: int) -> set[str]:
    """Every way to write steps of two operands, with whole non-negative results, that end at the target."""
    if len(numbers) == 1:
        return {""} if numbers[0] == target else set()
    texts = set()
    for left, right, *rest in permutations(numbers):
        for sign in "+-*/":
            value = apply(Fraction(left), sign, Fraction(right))
            if value >= 0 and value.denominator == 1:
                for tail in all_step_texts((int(value), *rest), target):
                    step = f"{left} {sign} {right} = {value}"
                    texts.add(f"{step} , {tail}" if tail else step)
    return texts


def expression_oracle(text: str, numbers: tuple[int, ...], target: int) -> bool:
    """Python's own grammar, walked with exact fractions."""
    used: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            used[node.value] += 1
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise SyntaxError("signs of numbers and calls are not arithmetic here")
        left, right = value(node.left), value(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case _:
                return left / right

    try:
        return value(ast.parse(text, mode="eval").body) == target and used == Counter(numbers)
    except (SyntaxError, ZeroDivisionError):
        return False


def test_steps_with_any_one_token_changed_agree_with_the_list_of_all_right_texts() -> None:
    numbers, target = (2, 4, 6), 12
    right = all_step_texts(numbers, target)
    assert len(right) > 10
    for text in right:
        tokens = text.split()
        for place in range(len(tokens)):
            for token in ("+", "-", "*", "/", "=", ",", *map(str, range(26))):
                changed = " ".join([*tokens[:place], token, *tokens[place + 1 :]])
                verdict = judge_arithmetic(changed, numbers, target)
                assert verdict.correct == (changed in right), changed


EXPRESSIONS = st.recursive(
    st.integers(0, 9).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join), inner.map(lambda text: f"( {text} )")
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.data())
def test_expressions_agree_with_the_grammar_of_python(text: str, data: st.DataObject) -> None:
    numbers = tuple(int(token) for token in text.split() if token.isdigit())
    tokens = text.split()
    place = data.draw(st.integers(0, len(tokens) - 1))
    tokens[place] = data.draw(st.sampled_from("0123456789+-*/()"))
    for candidate in (text, " ".join(tokens)):
        for target in range(10):
            expected = expression_oracle(candidate, numbers, target)
            assert judge_arithmetic(candidate, numbers, target).correct == expected, candidate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 + 7 = 19 , 19 * 3 = 57", CORRECT),
        ("12+7=19,19*3=57", CORRECT),
        ("12 + 7 = 19; 19 × 3 = 57", CORRECT),
        ("12 + 7 = 19\n19 · 3 = 57\n", CORRECT),
        ("12 + 7 = 19,\r\n\r\n19 \\times 3 = 57", CORRECT),
        ("( 12 + 7 ) * 3", CORRECT),
        ("(12+7)*3=57", CORRECT),
        ("3*(7+12)", CORRECT),
        ("12 + 7 = 19 , 19 * 3 = 58", WRONG_VALUE),
        ("12 + 7 = 20 , 20 * 3 = 60", WRONG_VALUE),
        ("12 + 7 = 57 , 57 * 3 = 57", WRONG_VALUE),
        ("12 + 7 = 54 , 54 + 3 = 57", WRONG_VALUE),
        ("12 + 7 * 3", WRONG_VALUE),
        ("12 + 7 * 3 = 57", WRONG_VALUE),
        ("(12+7)*3=56", WRONG_VALUE),
        ("12 / ( 7 - 7 ) * 3", WRONG_NUMBERS),
        ("3 / ( 12 - 7 )", WRONG_VALUE),
        ("12 + 7 = 19", WRONG_NUMBERS),
        ("12 + 12 = 24 , 24 * 3 = 72", WRONG_NUMBERS),
        ("19 * 3 = 57 , 12 + 7 = 19", WRONG_NUMBERS),
        ("19 * 3", WRONG_NUMBERS),
        ("57", WRONG_NUMBERS),
        ("12 + 7 , 19 * 3 = 57", MALFORMED),
        ("12 + 7 = 19 = 19", MALFORMED),
        ("12 + 7 = 12 + 7", MALFORMED),
        ("12 7 3", MALFORMED),
        ("( 12 + 7 * 3", MALFORMED),
        ("12 + 7 ) * 3", MALFORMED),
        ("12 + - 7", MALFORMED),
        ("12 ** 7", MALFORMED),
        ("12 + seven", MALFORMED),
        ("12 +", MALFORMED),
        ("= 57", MALFORMED),
        ("", MALFORMED),
        (" , \n", MALFORMED),
        ("１２ + 7 = 19 , 19 * 3 = 57", MALFORMED),
    ],
)
def test_judgement_of_12_7_3_to_57(text: str, expected: tuple[bool, bool, bool]) -> None:
    assert judge_arithmetic(text, [12, 7, 3], 57) == expected


def test_fractions_on_the_way_are_exact() -> None:
    assert judge_arithmetic("8 ÷ (3 − 8 / 3)", [3, 8, 3, 8], 24).correct
    assert not judge_arithmetic("7 / 2 = 3 , 3 * 2 = 6", [7, 2, 2], 6).correct
    assert judge_arithmetic("7 / 2 * 2", [7, 2, 2], 7).correct
    assert judge_arithmetic("6 / ( 5 - 5 )", [6, 5, 5], 6) == WRONG_VALUE


def test_a_step_may_use_more_than_two_numbers() -> None:
    assert judge_arithmetic("1 + 2 + 3 = 6 , 6 * 4 = 24", [1, 2, 3, 4], 24).correct


def test_equal_numbers_are_counted() -> None:
    assert judge_arithmetic("5 * 5", [5, 5], 25).correct
    assert judge_arithmetic("5 * 5", [5, 4], 25) == WRONG_NUMBERS
    assert judge_arithmetic("5 * 5 - 5", [5, 5], 20) == WRONG_NUMBERS


def test_limits_are_exact() -> None:
    deepest = "(" * MAX_DEPTH + "5" + ")" * MAX_DEPTH
    assert judge_arithmetic(deepest, [5], 5).correct
    assert judge_arithmetic(f"({deepest})", [5], 5) == MALFORMED
    assert judge_arithmetic("999999999", [999999999], 999999999).correct
    assert judge_arithmetic("1999999999", [1999999999], 1999999999) == MALFORMED
    padded = "5".ljust(MAX_CHARACTERS)
    assert judge_arithmetic(padded, [5], 5).correct
    assert judge_arithmetic(padded + " ", [5], 5) == MALFORMED


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4", "3 + 4"),
        (r"so \boxed{3 + 4}.", "3 + 4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"} \boxed{3}", "3"),
        ("<answer>1</answer> no: <answer> 2 </answer> done", " 2 "),
        ("<answer>1</answer> stray </answer>", "1"),
        ("<answer>1</answer> <answer>2", "1"),
        ("</answer>1<answer>", "</answer>1<answer>"),
        (r"<answer>\boxed{5}</answer>", "5"),
        (r"\boxed{1} <answer>5</answer>", "5"),
        (r"<answer>5</answer> \boxed{1}", "1"),
        (r"\boxed{}", ""),
    ],
)
def test_last_answer(text: str, answer: str) -> None:
    assert last_answer(text) == answer


PIECES = [
    "<answer>",
    "</answer>",
    r"\boxed{",
    "}",
    "{",
    "=",
    "(",
    ")",
    "+",
    "/",
    "0",
    "12",
    " ",
    ",",
    "\n",
    "÷",
]


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_no_text_raises(text: str) -> None:
    judge_arithmetic(last_answer(text), [1, 2, 3], 6)


@pytest.mark.parametrize("piece", ["(", "9", "{", r"\boxed{", "<answer>", "</answer>", "1+", "1/0*", ", ", " "])
def test_very_long_text_is_malformed(piece: str) -> None:
    assert judge_arithmetic(last_answer(piece * 100_000), [1, 2], 3) == MALFORMED

"""Judges arithmetic such as ``( 12 + 7 ) * 3`` or ``12 + 7 = 19 , 19 * 3 = 57`` in exact fractions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 1000
MAX_DIGITS = 9
MAX_DEPTH = 32
"""A longer answer, a longer number or deeper parentheses are malformed: this bounds the cost of any input."""

_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/"}
_TOKEN = re.compile(rf"\s*(?:([0-9]{{1,{MAX_DIGITS}}})|([-+*/()=]))\s*")
_BRACE = re.compile(r"\\boxed\{|\{|\}")


class ArithmeticVerdict(NamedTuple):
    """What `judge_arithmetic` finds.

    Attributes:
        well_formed: the text can be read as one expression or as a list of steps.
        right_numbers: well formed, every operand was there to be used, and one value is left at the end.
        correct: right numbers, every stated equality holds exactly, and the value left is the target.
    """

    well_formed: bool
    right_numbers: bool
    correct: bool


class _Step(NamedTuple):
    operands: list[int]
    value: Fraction | None  # None: division by zero
    stated: int | None  # None: no "= result" was written


class _Malformed(ValueError):
    pass


def last_answer(text: str) -> str:
    r"""The content of the last ``\boxed{...}`` or ``<answer>...</answer>``; else the whole text.

    "Last" is the one that opens last among those that are closed, so of nested wrappers the inner one.
    """
    start, end = -1, len(text)
    close = text.rfind("</answer>")
    if close >= 0:
        opening = text.rfind("<answer>", 0, close)
        if opening >= 0:
            start, end = opening + len("<answer>"), text.find("</answer>", opening)
    open_braces: list[tuple[int, bool]] = []
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            open_braces.append((brace.end(), brace.group() != "{"))
        elif open_braces:
            inside, boxed = open_braces.pop()
            if boxed and inside > start:
                start, end = inside, brace.start()
    return text[max(start, 0) : end]


def judge_arithmetic(answer: str, numbers: Sequence[int], target: int) -> ArithmeticVerdict:
    """Whether ``answer`` derives ``target`` from ``numbers``, each used exactly once.

    The answer is one expression, optionally followed by ``= result``, or steps ``expression = result``
    separated by commas, semicolons or line ends. A step takes its operands out of the pool, which starts as
    ``numbers``, and puts its stated result back; exactly one value must be left. Never raises.
    """
    try:
        steps = _read_steps(answer)
    except _Malformed:
        return ArithmeticVerdict(well_formed=False, right_numbers=False, correct=False)
    pool: list[Fraction | int | None] = list(numbers)
    exact = True
    for step in steps:
        for operand in step.operands:
            if operand not in pool:
                return ArithmeticVerdict(well_formed=True, right_numbers=False, correct=False)
            pool.remove(operand)
        result = step.value if step.stated is None else step.stated
        exact = exact and step.value is not None and step.value == result
        pool.append(result)
    right_numbers = len(pool) == 1
    return ArithmeticVerdict(
        well_formed=True, right_numbers=right_numbers, correct=right_numbers and exact and pool[0] == target
    )


def _read_steps(answer: str) -> list[_Step]:
    for command, sign in _LATEX.items():
        answer = answer.replace(command, sign)
    if len(answer) > MAX_CHARACTERS:
        raise _Malformed
    chunks = [chunk for chunk in re.split(r"[,;\r\n]", answer.translate(_SIGNS)) if chunk.strip()]
    steps = [_read_step(chunk) for chunk in chunks]
    if not steps or (len(steps) > 1 and any(step.stated is None for step in steps)):
        raise _Malformed
    return steps


def _read_step(chunk: str) -> _Step:
    parser = _Parser(_tokens(chunk))
    value = parser.sum(depth=0)
    stated = None
    if parser.take("="):
        stated = parser.number()
    if parser.rest:
        raise _Malformed
    operands = parser.numbers if stated is None else parser.numbers[:-1]
    return _Step(operands, value, stated)


def _tokens(chunk: str) -> list[str]:
    tokens, at = [], 0
    while at < len(chunk):
        match = _TOKEN.match(chunk, at)
        if match is None:
            raise _Malformed
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens


class _Parser:
    """Recursive descent: sum = product (+|- product)*, product = atom (*|/ atom)*, atom = number | (sum)."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens[::-1]
        self.numbers: list[int] = []

    def take(self, choices: str) -> str:
        """The next token if it is one of the characters of ``choices``, else the empty string."""
        return self.rest.pop() if self.rest and self.rest[-1] in choices else ""

    def sum(self, depth: int) -> Fraction | None:
        value = self.product(depth)
        while sign := self.take("+-"):
            value = _apply(value, sign, self.product(depth))
        return value

    def product(self, depth: int) -> Fraction | None:
        value = self.atom(depth)
        while sign := self.take("*/"):
            value = _apply(value, sign, self.atom(depth))
        return value

    def atom(self, depth: int) -> Fraction | None:
        if not self.take("("):
            return Fraction(self.number())
        if depth == MAX_DEPTH:
            raise _Malformed
        value = self.sum(depth + 1)
        if not self.take(")"):
            raise _Malformed
        return value

    def number(self) -> int:
        if not self.rest or not self.rest[-1].isdigit():
            raise _Malformed
        self.numbers.append(int(self.rest.pop()))
        return self.numbers[-1]


def _apply(left: Fraction | None, sign: str, right: Fraction | None) -> Fraction | None:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left / right

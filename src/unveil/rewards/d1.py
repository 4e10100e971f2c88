r"""How the evaluation of d1 (arXiv 2504.12216) finds and compares answers, so that its tables can be continued.

The published accuracies of d1 and of what builds on it come from these rules, with their quirks: they differ from a
comparison by value (``mathematics.py``, ``arithmetic.py``, ``sudoku.py``) in both directions. Texts may keep their end
tokens. No function raises on any string.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d+\.?\d*")
_BOX, _SPACED_BOX, _FRAMED = "\\boxed", "\\boxed ", "\\fbox"
_CLOSED = r"(?:<\|eot_id\|>|<\|endoftext\|>"
_GRIDS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<answer>.*?```([\d\s]+)```",
        rf"<answer>(.*?){_CLOSED}|</answer>)",
        rf"</answer>(.*?){_CLOSED}|$)",
        r"(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    )
]
_EQUATION = re.compile(r"([0-9+\-*/() ]+)=[0-9. ]+")
_ARITHMETIC = re.compile(r"[\d+\-*/().\s]+")
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_CLOSE = 1e-5
_MAX_CHARACTERS = 1000
"""A longer expression is wrong: this bounds the cost of any input."""


def _tagged(text: str) -> str | None:
    """The content of the first ``<answer>`` block."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else None


def number(text: str) -> float | None:
    r"""GSM8K: the number in the first ``\boxed{}`` that has one, else the last one in the first ``<answer>``.

    A box ends at the first closing brace. Of one that is no number as a whole, the first number counts: ``1,012`` is 1.
    """
    for content in re.findall(r"\\boxed{(.*?)}", text):
        if (value := _float(content, 0)) is not None:
            return value
    return _float(_tagged(text) or "", -1)


def _float(text: str, place: int) -> float | None:
    try:
        return float(text)
    except ValueError:
        found = _NUMBER.findall(text)
        return float(found[place]) if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` (or ``\boxed x$``); the whole text where there is no box; None where the
    last one is not closed."""
    if _SPACED_BOX in text:
        return text.rsplit(_SPACED_BOX, 1)[1].split("$")[0]
    start = text.rfind(_BOX)
    start = text.rfind(_FRAMED) if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            found = text[start : place + 1]
            return found[len(_BOX) + 1 : -1] if found.startswith(_BOX + "{") else found
    return None


def expression(text: str) -> str | None:
    """MATH: the `boxed` answer, else (an empty or open box) the first ``<answer>``."""
    found = boxed(text)
    if found:
        return found
    tagged = _tagged(text)
    return found if tagged is None else tagged


def same_expression(left: str, right: str) -> bool:
    """Equal after the normalisation of the MATH data set's own scorer; numbers are not computed."""
    try:
        return normal_form(left) == normal_form(right)
    except (ValueError, IndexError):
        return left == right


def normal_form(text: str) -> str:
    r"""``\dfrac12`` and ``.5`` as ``\frac{1}{2}``, ``x = 3`` as ``3``; without units, degrees and spaces.

    Raises:
        ValueError, IndexError: the text ends in the middle of a command; the scorer then compares as written.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for part in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(part, "")
    if "\\text{ " in text:  # a unit
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # k = ...
        text = sides[1]
    text = _braced(_root(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return _slashed(text)


def _root(text: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``."""
    head, *parts = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in parts)


def _braced(text: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``; a text with a fraction cut short stays as it is."""
    head, *parts = text.split("\\frac")
    made = head
    for part in parts:
        if part[0] == "{":
            made += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            made += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            made += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return made


def _slashed(text: str) -> str:
    r"""``3/4`` as ``\frac{3}{4}``."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def equation(text: str) -> str:
    """Countdown: the `boxed` expression (the whole text where there is none), without ``= result``."""
    found = boxed(text)
    if found is None:
        found = _tagged(text)
    found = text if found is None else found
    found = found.replace(r"\div", "/").replace(r"\times", "*").replace(r"\cdot", "*")
    left = _EQUATION.search(found)
    return left[1].strip() if left else found


def reaches(found: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression has exactly these numbers and is within 1e-5 of the target.

    Powers, which Python arithmetic would allow, are refused: their value can have no end.
    """
    if len(found) > _MAX_CHARACTERS or sorted(map(int, re.findall(r"\d+", found))) != sorted(numbers):
        return False
    if not _ARITHMETIC.fullmatch(found):
        return False
    try:
        return bool(abs(_value(ast.parse(found.strip(), mode="eval").body) - target) < _CLOSE)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr) -> float:
    """In Python's numbers, so that rounding is as published.

    Raises:
        ValueError: it is more than numbers, signs and the four operations (and //).
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError(type(node).__name__)


def grid(text: str) -> str:
    """Sudoku of 4 x 4: sixteen characters; zeros where the answer is too short."""
    for pattern in _GRIDS:
        found = pattern.search(text)
        if found and found[1].strip():
            return "".join(found[1].split())[:16].ljust(16, "0")
    return "0" * 16

"""Countdown: reach a target from given numbers with + - * /, each number used exactly once."""

from __future__ import annotations

import random
import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import comb
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from unveil.registry import UserError
from unveil.rewards.arithmetic import MAX_DIGITS, judge_arithmetic, last_answer
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.tasks.files import choose_rows, read_json_lines

_MAX_LISTED_MULTISETS = 10_000
"""Up to this many choices of numbers, all problems are listed when random draws bring nothing new."""
_MAX_FILE_NUMBERS = 16


class Node(NamedTuple):
    """A number (``sign`` empty) or ``left sign right``, with its value."""

    value: int
    sign: str = ""
    left: Node | None = None
    right: Node | None = None


@dataclass(kw_only=True)
class Countdown(Task, name="countdown"):
    """Prompt ``12 7 3 -> 57``, response ``12 + 7 = 19 , 19 * 3 = 57``, one word per number and sign.

    Generated problems are test where a stable hash of the sorted numbers says so (one tenth). With
    ``test_file``, the sorted numbers of its problems are kept out of train instead.
    """

    numbers: Annotated[int, Field(ge=2, le=4)] = 3
    """How many numbers a generated problem has."""

    max_number: Annotated[int, Field(ge=1, le=999)] = 20
    """Generated numbers are 1..max_number."""

    max_target: Annotated[int, Field(ge=1, le=99_999)] = 99
    """Generated targets are 1..max_target."""

    max_intermediate: Annotated[int, Field(ge=1, le=99_999)] = 199
    """Results on the way to a generated target are whole numbers in 1..max_intermediate."""

    form: Literal["steps", "expression"] = "steps"
    """How solutions are written: steps ``12 + 7 = 19 , 19 * 3 = 57`` or expression ``( 12 + 7 ) * 3``."""

    train_file: str | None = None
    """JSON lines ``{"input": "12,7,3", "output": "57"}`` to train on, instead of generated problems."""

    test_file: str | None = None
    """JSON lines of the same form to test on, instead of generated problems."""

    prompt_template: str = "{numbers} -> {target}"
    """The prompt; {numbers} and {target} are replaced."""

    def __post_init__(self) -> None:
        for name in ("{numbers}", "{target}"):
            if name not in self.prompt_template:
                raise UserError(f"countdown.prompt_template must contain {name}, got {self.prompt_template!r}")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        path = self.train_file if split == "train" else self.test_file
        if path is not None:
            rows = self._train_rows if split == "train" else self._test_rows
            return [self._problem(*row) for row in choose_rows(rows, split, count, seed, path)]
        rng = random.Random(f"countdown/{split}/{seed}")
        found: dict[str, Problem] = {}
        multisets = comb(self.max_number + self.numbers - 1, self.numbers)
        futile, patience = 0, 5_000 if multisets <= _MAX_LISTED_MULTISETS else 300_000
        while len(found) < count and futile < patience:
            numbers = [1 + int(rng.random() * self.max_number) for _ in range(self.numbers)]
            futile += 1
            if self._split(numbers) == split and (tree := self._draw_tree(numbers, rng)) is not None:
                name = _id(numbers, tree.value)
                if name not in found:
                    found[name] = self._problem(numbers, tree.value, tree)
                    futile = 0
        if len(found) < count:
            settings = f"numbers={self.numbers}, max_number={self.max_number}, max_target={self.max_target}"
            settings += f", max_intermediate={self.max_intermediate}; {count} were asked for"
            if multisets > _MAX_LISTED_MULTISETS:
                raise UserError(f"countdown: draws give only {len(found)} {split} problems with {settings}")
            remaining = self._list_remaining(found, split, rng)
            if len(found) + len(remaining) < count:
                total = len(found) + len(remaining)
                raise UserError(f"countdown has {total} {split} problems with {settings}")
            for problem in rng.sample(remaining, count - len(found)):
                found[problem.id] = problem
        return list(found.values())

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Steps and a single expression are both accepted, whatever ``form`` is.

        Score 1 where correct, 0.1 where the given numbers are used exactly once each in a well-formed answer,
        else 0 (the shaping of d1, arXiv 2504.12216).
        """
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        verdict = judge_arithmetic(last_answer(completion), numbers, target)
        return Verdict(
            correct=verdict.correct,
            score=1.0 if verdict.correct else 0.1 * verdict.right_numbers,
            metrics={
                "well_formed": float(verdict.well_formed),
                "right_numbers": float(verdict.right_numbers),
            },
        )

    def recorded(self, question: str, truth: Any) -> Problem | None:
        """``truth`` is ``[[12, 7, 3], 57]``."""
        match truth:
            case [[*numbers], int(target)] if all(isinstance(number, int) for number in numbers):
                return Problem(id=question, prompt=question, answer={"numbers": numbers, "target": target})
        raise UserError(f"ground_truth should be [[numbers], target], got {truth!r}")

    def _problem(self, numbers: Sequence[int], target: int, tree: Node | None = None) -> Problem:
        prompt = self.prompt_template.replace("{numbers}", " ".join(map(str, numbers)))
        solution = None
        if tree is not None:
            solution = " , ".join(written_steps(tree)) if self.form == "steps" else written_expression(tree)
        return Problem(
            id=_id(numbers, target),
            prompt=prompt.replace("{target}", str(target)),
            answer={"numbers": list(numbers), "target": target},
            solution=solution,
        )

    def _split(self, numbers: Sequence[int]) -> Split:
        ordered = sorted(numbers)
        if self.test_file is not None:
            return "test" if tuple(ordered) in self._test_multisets else "train"
        return "test" if zlib.crc32(",".join(map(str, ordered)).encode()) % 10 == 0 else "train"

    def _draw_tree(self, numbers: Sequence[int], rng: random.Random) -> Node | None:
        """Combine random pairs with random signs until one value is left; None if a result is not allowed."""
        pool = [Node(number) for number in numbers]
        while len(pool) > 1:
            left = pool.pop(int(rng.random() * len(pool)))
            right = pool.pop(int(rng.random() * len(pool)))
            sign = "+-*/"[int(rng.random() * 4)]
            value = _whole_result(left.value, sign, right.value)
            if not 0 < value <= (self.max_intermediate if pool else self.max_target):
                return None
            pool.append(Node(value, sign, left, right))
        return pool[0]

    def _reachable(self, numbers: Sequence[int]) -> dict[int, Node]:
        """One tree for every target that the numbers reach, built up over subsets (bit masks) of them."""
        whole = (1 << len(numbers)) - 1
        trees: list[dict[int, Node]] = [{} for _ in range(whole + 1)]
        for index, number in enumerate(numbers):
            trees[1 << index] = {number: Node(number)}
        for subset in range(1, whole + 1):
            limit = self.max_target if subset == whole else self.max_intermediate
            part = (subset - 1) & subset
            while part:
                for left, right in product(trees[part].values(), trees[subset ^ part].values()):
                    for sign in "+-*/":
                        value = _whole_result(left.value, sign, right.value)
                        if 0 < value <= limit:
                            trees[subset].setdefault(value, Node(value, sign, left, right))
                part = (part - 1) & subset
        return trees[whole]

    def _list_remaining(self, found: Container[str], split: Split, rng: random.Random) -> list[Problem]:
        """Every problem of the split whose id is not in ``found``."""
        remaining = []
        for multiset in combinations_with_replacement(range(1, self.max_number + 1), self.numbers):
            if self._split(multiset) == split:
                numbers = rng.sample(multiset, self.numbers)
                for target, tree in self._reachable(numbers).items():
                    if _id(numbers, target) not in found:
                        remaining.append(self._problem(numbers, target, tree))
        return remaining

    @cached_property
    def _test_rows(self) -> list[tuple[list[int], int]]:
        return [] if self.test_file is None else _read_rows(self.test_file)

    @cached_property
    def _test_multisets(self) -> set[tuple[int, ...]]:
        return {tuple(sorted(numbers)) for numbers, _ in self._test_rows}

    @cached_property
    def _train_rows(self) -> list[tuple[list[int], int]]:
        rows = [] if self.train_file is None else _read_rows(self.train_file)
        return [(numbers, target) for numbers, target in rows if self._split(numbers) == "train"]


def _id(numbers: Sequence[int], target: int) -> str:
    return "-".join(map(str, ("countdown", *sorted(numbers), target)))


def written_steps(tree: Node) -> list[str]:
    """``["12 + 7 = 19", "19 * 3 = 57"]``, operands before their use."""
    if tree.left is None or tree.right is None:
        return []
    step = f"{tree.left.value} {tree.sign} {tree.right.value} = {tree.value}"
    return [*written_steps(tree.left), *written_steps(tree.right), step]


def written_expression(tree: Node) -> str:
    """``( 12 + 7 ) * 3``: read from left to right it gives the results of the tree and no others.

    Parentheses stand only where that needs them: 3 + (8 - 2) is written ``8 - 2 + 3``.
    """
    if tree.left is None or tree.right is None:
        return str(tree.value)
    weak, first, second = ("+", "-"), tree.left, tree.right
    bind_alike = weak if tree.sign in weak else ("*", "/")
    if tree.sign in "+*" and second.sign in bind_alike and first.sign not in bind_alike:
        first, second = second, first
    left, right = written_expression(first), written_expression(second)
    if tree.sign not in weak and first.sign in weak:
        left = f"( {left} )"
    if second.sign in (*weak, *bind_alike):
        right = f"( {right} )"
    return f"{left} {tree.sign} {right}"


def _whole_result(left: int, sign: str, right: int) -> int:
    """``left sign right`` for positive operands; 0 (never allowed) where a division leaves a remainder."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return 0 if left % right else left // right


def _read_rows(path: str) -> list[tuple[list[int], int]]:
    """Different (numbers, target) of a data file, in file order."""
    rows: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for line, row in read_json_lines(path, ("input", "output")):
        numbers = [_positive(word, "input", path, line) for word in row["input"].split(",")]
        target = _positive(row["output"], "output", path, line)
        if not 2 <= len(numbers) <= _MAX_FILE_NUMBERS:
            raise UserError(f"{path}:{line}: 'input' has {len(numbers)} numbers (allowed: 2 to {_MAX_FILE_NUMBERS})")
        rows.setdefault((*sorted(numbers), target), (numbers, target))
    return list(rows.values())


def _positive(word: str, key: str, path: str, line: int) -> int:
    word = word.strip()
    if not (word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS and int(word) > 0):
        raise UserError(
            f"{path}:{line}: {key!r}: {word[:40]!r} is not a positive whole number of at most {MAX_DIGITS} digits"
        )
    return int(word)

"""HumanEval and MBPP: programs, judged by running their tests in a sandbox."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from unveil.registry import UserError
from unveil.rewards.sandbox import Limits, run_python
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.two_files import TwoFiles

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_of(completion: str) -> str:
    """The last fenced block of a completion; without one the whole text, indentation kept."""
    blocks = _FENCE.findall(completion)
    return str(blocks[-1]) if blocks else completion


@dataclass(kw_only=True)
class _Programs(TwoFiles):
    seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Wall time that one program may take."""

    def problem(self, row: dict[str, Any], name: str) -> Problem:
        """The problem of one row."""
        raise NotImplementedError

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Right where the program and its tests run to their end in the sandbox."""
        code, answer = program_of(completion), problem.answer
        head = str(answer["head"])
        if head and f"def {answer['entry']}(" not in code:
            code = head + code
        elif head:
            code = "\n".join([line for line in head.splitlines() if line.startswith(("from ", "import "))] + [code])
        result = run_python(f"{code}\n{answer['tests']}\n", Limits(seconds=self.seconds))
        return Verdict(
            correct=result.passed,
            score=float(result.passed),
            metrics={"timed_out": float(result.timed_out), "seconds": result.seconds},
        )

    def made(self, rows: list[tuple[int, dict[str, Any]]], path: str, split: Split) -> list[Problem]:
        name = type(self).__name__.lower()
        return [self.problem(row, f"{name}-{split}-{line}") for line, row in rows]


@dataclass(kw_only=True)
class HumanEval(_Programs, name="humaneval"):
    """164 functions to complete from signature and docstring. It has no training split."""

    keys = ("prompt", "canonical_solution", "test", "entry_point")
    hub_path = "openai/openai_humaneval"

    def problem(self, row: dict[str, Any], name: str) -> Problem:
        return Problem(
            id=name,
            prompt=row["prompt"],
            answer={
                "head": row["prompt"],
                "entry": row["entry_point"],
                "tests": f"{row['test']}\ncheck({row['entry_point']})",
            },
            solution=row["canonical_solution"],
        )


@dataclass(kw_only=True)
class Mbpp(_Programs, name="mbpp"):
    """Short functions from a sentence (``text``, ``code``) and three assertions (``test_list``)."""

    keys = ("text", "code")
    hub_path = "google-research-datasets/mbpp"

    def problem(self, row: dict[str, Any], name: str) -> Problem:
        tests = row.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise UserError(f"{name}: 'test_list' must be a list of strings, got {json.dumps(tests)[:40]}")
        shown = "\n".join(tests)
        setup = str(row.get("test_setup_code") or "")
        return Problem(
            id=name,
            prompt=f"You are an expert Python programmer, and here is your task: {row['text']} "
            f"Your code should pass these tests:\n\n{shown}\n",
            answer={"head": "", "entry": "", "tests": f"{setup}\n{shown}"},
            solution=row["code"],
        )

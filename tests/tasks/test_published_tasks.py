from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from unveil.registry import UserError
from unveil.rewards.mathematics import equal_answers
from unveil.tasks.maths import Gsm8k, Math
from unveil.tasks.programs import HumanEval, Mbpp


def write(path: Path, **row: object) -> str:
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    return str(path)


def test_gsm8k(tmp_path: Path) -> None:
    task = Gsm8k(test_file=write(tmp_path / "t.gz", question="6 and 6?", answer="6+6=<<6+6=12>>1,012\n#### 1,012"))
    problem = task.problems("test", 1, 0)[0]
    assert problem.answer == {"answer": "1012"}
    verdict = task.check(problem, str(problem.solution))
    assert verdict.correct and verdict.metrics == {"boxed": 1.0, "d1_format": 0.5, "d1_correct": 2.0}
    judged = {r"\boxed{1012.0}": True, "<answer>1012</answer>": True, r"\boxed{12}": False, "": False}
    for text, right in judged.items():
        assert task.check(problem, text).correct is right
        assert task.check(problem, text).score == right
    for text in ("\0", "\ud800", "\\boxed{" * 999, r"\boxed{\frac{1}{0}}", "\n\n"):
        assert not task.check(problem, text).correct
    with pytest.raises(UserError, match=r"2\.gz:1: 'answer' has no final answer"):
        Gsm8k(test_file=write(tmp_path / "2.gz", question="?", answer="12")).problems("test", 1, 0)


def test_math_answers_are_compared_by_value(tmp_path: Path) -> None:
    task = Math(test_file=write(tmp_path / "t.gz", problem="?", solution=r"so \boxed{\frac{1}{2}}."))
    problem = task.problems("test", 1, 0)[0]
    assert task.check(problem, r"\boxed{0.5}").correct
    assert not task.check(problem, r"\boxed{0.6}").correct
    assert not equal_answers("1", "9**9**9**9") and equal_answers(r"\frac{2}{4}", r"\frac12")


def test_programs(tmp_path: Path) -> None:
    head = 'from typing import List\n\ndef one(x: List) -> int:\n    """One."""\n'
    row = {"prompt": head, "canonical_solution": "    return 1\n", "entry_point": "one"}
    task = HumanEval(test_file=write(tmp_path / "h.gz", test="def check(f):\n    assert f([]) == 1", **row))
    problem = task.problems("test", 1, 0)[0]
    assert task.check(problem, str(problem.solution)).correct
    assert task.check(problem, "Here:\n```python\ndef one(x: List):\n    return 1\n```").score == 1
    assert not task.check(problem, "    return 2\n").correct and not task.check(problem, "\ud800").correct
    path = write(tmp_path / "m.gz", text="two", code="two = lambda: 2", test_list=["assert two() == 2"])
    basic = Mbpp(test_file=path)
    problem = basic.problems("test", 1, 0)[0]
    assert basic.check(problem, "two = lambda: 2").correct and not basic.check(problem, "two = 2").correct


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"unveil\[hub\]"):
        Gsm8k().problems("test", 1, 0)

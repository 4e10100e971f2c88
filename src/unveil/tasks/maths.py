r"""GSM8K and MATH: questions in words, answers compared by value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from unveil.registry import UserError
from unveil.rewards.arithmetic import last_answer
from unveil.rewards.mathematics import equal_answers, require, same_text
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.two_files import TwoFiles

_PROMPT = r"""Work out the answer to the question below, one step after the other, in this form:
<reasoning>
the steps
</reasoning>
<answer>
\boxed{the final answer}
</answer>

{question}"""
"""The form that d1 (arXiv 2504.12216) asks for, in words of our own; its own prompt can be given as the template."""
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


@dataclass(kw_only=True)
class _Maths(TwoFiles):
    label: ClassVar[str]
    """Begins the problems' ids."""

    prompt_template: str = _PROMPT
    """The prompt; {question} is replaced."""

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt_template:
            raise UserError(f"task.prompt_template must contain {{question}}, got {self.prompt_template!r}")

    def gold(self, row: dict[str, Any]) -> str:
        """The final answer of one row; ValueError where there is none."""
        raise NotImplementedError

    def worked(self, row: dict[str, Any]) -> str:
        """The worked solution of one row, without its final answer's mark."""
        raise NotImplementedError

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        require()
        return super().problems(split, count, seed)

    def check(self, problem: Problem, completion: str) -> Verdict:
        r"""The last ``\boxed{}`` or ``<answer>`` is the answer, compared by value. Without either, only a text that is
        nothing but the answer, as written, is right: a comparison by value would find it in any text that ends with it.

        ``d1_format`` follows the soft format reward of d1 (arXiv 2504.12216), 0.5 or 0, but lets either block have
        several lines; ``d1_correct`` is its 2 or 0, by value where d1 compares strings.
        """
        found = last_answer(completion)
        compare = same_text if found == completion else equal_answers
        correct = compare(problem.answer["answer"], found)
        return Verdict(
            correct=correct,
            score=float(correct),
            metrics={
                "boxed": float("\\boxed{" in completion),
                "d1_format": 0.5 * bool(_SOFT.match(completion)),
                "d1_correct": 2.0 * correct,
            },
        )

    def recorded(self, question: str, truth: Any) -> Problem | None:
        """``truth`` is the final answer, as text or as a number."""
        if isinstance(truth, float) and truth.is_integer():
            truth = int(truth)
        return None if truth is None else Problem(id=question, prompt=question, answer={"answer": str(truth)})

    def made(self, rows: list[tuple[int, dict[str, Any]]], path: str, split: Split) -> list[Problem]:
        found: dict[str, Problem] = {}
        for line, row in rows:
            question = row[self.keys[0]].strip()
            try:
                gold = self.gold(row)
            except ValueError as error:
                raise UserError(f"{path}:{line}: {error}") from error
            solution = f"<reasoning>\n{self.worked(row)}\n</reasoning>\n<answer>\n\\boxed{{{gold}}}\n</answer>"
            problem = Problem(
                id=f"{self.label}-{split}-{line}",
                prompt=self.prompt_template.replace("{question}", question),
                answer={"answer": gold},
                solution=solution,
            )
            found.setdefault(question, problem)
        return list(found.values())


@dataclass(kw_only=True)
class Gsm8k(_Maths, name="gsm8k"):
    """Grade-school word problems: ``question`` and ``answer``, which ends in ``#### 18``."""

    keys = ("question", "answer")
    label = "gsm8k"
    hub_path = "openai/gsm8k"
    hub_config = "main"

    def gold(self, row: dict[str, Any]) -> str:
        _, mark, answer = row["answer"].rpartition("####")
        if not mark or not answer.strip():
            raise ValueError("'answer' has no final answer after ####")
        return answer.strip().replace(",", "")

    def worked(self, row: dict[str, Any]) -> str:
        return re.sub(r"<<[^<>]*>>", "", row["answer"].rpartition("####")[0]).strip()


@dataclass(kw_only=True)
class Math(_Maths, name="math"):
    """MATH and MATH-500: ``problem`` and ``solution`` with the answer boxed; a string ``answer`` goes before it."""

    keys = ("problem", "solution")
    label = "math"
    hub_path = "HuggingFaceH4/MATH-500"

    def gold(self, row: dict[str, Any]) -> str:
        answer = row.get("answer")
        if isinstance(answer, str) and answer.strip():
            return answer.strip()
        if "\\boxed{" not in row["solution"]:
            raise ValueError("'solution' has no \\boxed{} and there is no 'answer'")
        return last_answer(row["solution"]).strip()

    def worked(self, row: dict[str, Any]) -> str:
        return str(row["solution"]).strip()

"""What a task is: problems, their prompts, a verifier and metrics in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unveil.registry import Plugin, UserError

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a task.

    Attributes:
        id: stable name, unique within the task and split; group statistics and seeds derive from it.
        prompt: the text that the model sees.
        answer: what the verifier needs (numbers and target, puzzle and solution ...), JSON-serialisable.
        solution: one correct completion, for supervised learning; None where a data file gives none.
    """

    id: str
    prompt: str
    answer: Mapping[str, Any]
    solution: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the verifier says of one completion.

    Attributes:
        correct: whether the task is solved. Accuracy is the mean of this and of nothing else.
        score: shaped score in [0, 1]; equals 1 exactly where ``correct``, may give partial credit elsewhere.
        metrics: further named numbers (``well_formed``, ``right_numbers`` ...), same keys for every completion.
    """

    correct: bool
    score: float
    metrics: dict[str, float] = field(default_factory=dict)


class Task(Plugin, family="task"):
    """A source of problems with a verifier. Problems of ``train`` and ``test`` never overlap."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` different problems; the same arguments give the same list. Ids are unique within the list.

        Raises:
            UserError: the task (or its data file) cannot give that many, or the file is missing or broken.
        """
        raise NotImplementedError

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Judge one completion (special tokens already removed). Never raises on any string."""
        raise NotImplementedError

    def recorded(self, question: str, truth: Any) -> Problem | None:
        """The problem of a completion that another program has stored; None where its reference answer is missing.

        Args:
            question: as stored; tells problems apart.
            truth: the stored reference answer, in the form of d1's evaluation.

        Raises:
            UserError: this task reads no stored completions, or the truth has another form.
        """
        raise UserError(f"task {self.name!r} reads no completions of other programs")

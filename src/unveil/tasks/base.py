"""What a task is: problems, their prompts, a verifier and metrics in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unveil.registry import Plugin, UserError

Split = Literal["train", "test"]
Medium = Literal["text", "image"]
"""What a sample is: a string, or a tensor (C, H, W) of floats in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a task.

    Attributes:
        id: stable name, unique within the task and split; group statistics and seeds derive from it.
        prompt: the text that the model sees; "" asks an image model for anything.
        answer: what the verifier needs (numbers and target, puzzle and solution ...), JSON-serialisable.
        solution: one correct completion, for supervised learning; None where a data file gives none.
    """

    id: str
    prompt: str
    answer: Mapping[str, Any]
    solution: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the verifier says of one sample.

    Attributes:
        correct: whether the task is solved. Accuracy is the mean of this and of nothing else.
        score: shaped score in [0, 1]. Of an exact verifier it equals 1 exactly where ``correct`` and may give partial
            credit elsewhere; of a judge that is a network it is how sure the judge is.
        metrics: further named numbers (``well_formed``, ``right_numbers`` ...), same keys for every sample.
    """

    correct: bool
    score: float
    metrics: dict[str, float] = field(default_factory=dict)


class Task(Plugin, family="task"):
    """A source of problems with a verifier. Problems of ``train`` and ``test`` never overlap."""

    medium: ClassVar[Medium] = "text"
    """What its samples are; only a model of the same medium can work on it."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """``count`` different problems; the same arguments give the same list. Ids are unique within the list.

        Raises:
            UserError: the task (or its data file) cannot give that many, or the file is missing or broken.
        """
        raise NotImplementedError

    def check(self, problem: Problem, completion: Any) -> Verdict:
        """Judge one sample: a string without special tokens, or a tensor (C, H, W) in [0, 1]. Never raises on any."""
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

    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        """`check` of N samples. A judge that is a network looks at all of them at once."""
        return [self.check(problem, sample) for problem, sample in zip(problems, samples, strict=True)]

    def measure(self, problems: Sequence[Problem], samples: Sequence[Any]) -> dict[str, float]:
        """What N samples together say (how varied they are, how far from real data); empty if there is nothing."""
        return {}

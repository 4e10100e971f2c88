"""What a completion is worth for training: the family of rewards, the task's own two, and sums of several.

A reward never decides accuracy: that stays the task's. A completion whose reward fails has no score at all: it is
counted, reported, and never taken for a success.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from unveil.registry import Plugin, UserError, names

T = TypeVar("T")
Metadata = Mapping[str, Any]
"""What is known of a completion besides itself: the fields of the problem's ``answer``, its ``solution`` (unless the
answer has a field of that name) and ``id``, and the task's verdict as ``correct``, ``score`` and ``metrics``."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A score that could not be had.

    Attributes:
        kind: ``exception``, ``timeout``, ``wrong_length``, ``not_a_number``, and of a server ``connection``,
            ``status``, ``malformed`` or ``breaker``.
        message: what went wrong, for the user.
    """

    kind: str
    message: str


Score = float | None | Failure
"""A finite number; None where the reward does not apply; or why there is none."""


class RewardError(Exception):
    """A call that gave no scores at all, for a reason that has a name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(kw_only=True)
class Answer:
    """The scores of N completions.

    Attributes:
        total: N scores to train on.
        parts: the N scores of every part of a sum, by its name; they include those that are only watched.
    """

    total: list[Score]
    parts: dict[str, list[Score]]

    def failures(self) -> list[tuple[str, Failure]]:
        """(name of the part, or "", failure), one per score that could not be had."""
        sources = self.parts or {"": self.total}
        return [(name, one) for name, scores in sources.items() for one in scores if isinstance(one, Failure)]


class Reward(Plugin, family="reward"):
    """Scores completions one by one: a score depends on its own completion alone."""

    medium: ClassVar[Literal["text", "image"] | None] = None
    """What it can score; None: whatever comes."""
    differentiable: ClassVar[bool] = False
    """True if it has `values`: scores of images with a gradient."""

    @property
    def part_weights(self) -> dict[str, float]:
        """Of the parts that a sum optimises."""
        return {}

    @property
    def audit_weights(self) -> dict[str, float]:
        """Of the parts that a sum only watches, in training too."""
        return {}

    def at(self, update: int) -> Reward:
        """The reward of one update of a run."""
        return self

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        """N scores of N completions. May raise anything: all N have then failed.

        Args:
            completions: of finished samples or of intermediate guesses: texts without special tokens, or images as
                tensors (C, H, W) of floats in [0, 1].
            prompts: the problems' prompts.
            metadata: see `Metadata`.
        """
        raise NotImplementedError

    def values(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """(N,) scores of images (N, C, H, W) in [0, 1], through which gradients reach the pixels; for rewards that are
        ``differentiable``. The same numbers as `scores`, of the same arguments.
        """
        raise NotImplementedError

    def check_differentiable(self, path: str) -> None:
        """Refuse a reward without a gradient.

        Args:
            path: where the reward stands in the recipe.

        Raises:
            UserError: naming ``path`` and what is allowed.
        """
        if not self.differentiable:
            known = [name for name in names(Reward) if getattr(Reward.known[name], "differentiable", False)]
            raise UserError(f"{path}: {self.name!r} has no gradient (allowed: {', '.join(known)})")

    def check_medium(self, medium: str, path: str) -> None:
        """Refuse samples that it cannot score.

        Args:
            medium: of the task.
            path: where the reward stands in the recipe.

        Raises:
            UserError: naming ``path``.
        """
        if self.medium not in (None, medium):
            raise UserError(f"{path}: {self.name!r} scores {self.medium}s, and the task's samples are {medium}s")

    def ask(
        self, completions: list[Any], prompts: list[str], metadata: list[Metadata], *, evaluating: bool = False
    ) -> Answer:
        """`scores`, made safe: whatever happens there, N scores come back and every number is finite.

        ``evaluating`` says that nothing is trained on the answer: parts that are only for evaluation are asked too.
        """
        try:
            given = checked(self.scores(completions, prompts, metadata), len(completions))
        except (Exception, SystemExit) as error:
            given = [failure_of(error)] * len(completions)
        return Answer(total=given, parts={})


@dataclass(kw_only=True)
class Correct(Reward, name="correct"):
    """1 for a solved problem, 0 otherwise, as the task's verifier says."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [float(own["correct"]) for own in metadata]


@dataclass(kw_only=True)
class Shaped(Reward, name="score"):
    """The task's shaped score in [0, 1]: partial credit."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [float(own["score"]) for own in metadata]


@dataclass(kw_only=True)
class Metric(Reward, name="metric"):
    """A number that the task's verdict gives beside its score, such as the distance to the nearest real image."""

    key: str
    """Its name; a task without it gives no scores."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [float(own["metrics"][self.key]) for own in metadata]


@dataclass(kw_only=True)
class Part:
    """One member of a sum."""

    reward: Reward
    """What scores."""
    weight: float = 1.0
    """Its factor in the sum; may be negative."""
    role: Literal["optimise", "audit", "evaluate"] = "optimise"
    """``optimise``: in the sum. ``audit``: logged beside it and never trained on; a gate may read it.
    ``evaluate``: asked at evaluations alone, for what is too slow to be watched."""
    updates: list[tuple[int, int | None]] = field(default_factory=list)
    """Of a curriculum: the updates [from, to) at which the part is optimised, to null: up to the end. At the others it
    is only asked at evaluations. Empty: all updates."""

    def optimised_at(self, update: int) -> bool:
        """Whether the part is in the sum of that update."""
        inside = any(start <= update and (end is None or update < end) for start, end in self.updates)
        return self.role == "optimise" and (inside or not self.updates)


@dataclass(kw_only=True)
class Sum(Reward, name="sum"):
    """A weighted sum; differentiable if all the parts are that it optimises. A part that does not apply to a completion
    adds nothing; if none applies, the sum does not. If an optimised part fails on a completion, the sum fails on it: a
    sum with a hole is no fair comparison."""

    differentiable = True

    parts: dict[str, Part]
    """The parts by a name for the log: their means are logged as ``reward/NAME``."""

    def __post_init__(self) -> None:
        if not any(part.role == "optimise" for part in self.parts.values()):
            raise UserError("parts: at least one should have the role 'optimise'")
        for name, part in self.parts.items():
            if isinstance(part.reward, Sum):
                raise UserError(f"parts.{name}.reward: a sum inside a sum (allowed: its parts themselves)")
            if part.updates and part.role != "optimise":
                raise UserError(f"parts.{name}.updates: only for parts with the role 'optimise', not {part.role!r}")
            for start, end in part.updates:
                if start < 0 or (end is not None and end <= start):
                    said = [start, end]
                    raise UserError(f"parts.{name}.updates: should be [from, to] with 0 <= from < to, got {said}")
        borders = {0, *(border for part in self.parts.values() for own in part.updates for border in own if border)}
        for update in sorted(borders):
            if not any(part.optimised_at(update) for part in self.parts.values()):
                raise UserError(f"parts: none is optimised at update {update} (see updates)")

    def at(self, update: int) -> Sum:
        resting = {
            name: replace(part, role="evaluate", updates=[])
            for name, part in self.parts.items()
            if part.role == "optimise" and not part.optimised_at(update)
        }
        return replace(self, parts=self.parts | resting) if resting else self

    def check_medium(self, medium: str, path: str) -> None:
        for name, part in self.parts.items():
            part.reward.check_medium(medium, f"{path}.parts.{name}.reward")

    def check_differentiable(self, path: str) -> None:
        for name in self.part_weights:
            self.parts[name].reward.check_differentiable(f"{path}.parts.{name}.reward")

    def values(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        weights = self.part_weights.items()
        own = [weight * self.parts[name].reward.values(images, prompts, metadata) for name, weight in weights]
        return torch.stack([value.to(own[0]) for value in own]).sum(0)

    @property
    def part_weights(self) -> dict[str, float]:
        return {name: part.weight for name, part in self.parts.items() if part.role == "optimise"}

    @property
    def audit_weights(self) -> dict[str, float]:
        return {name: part.weight for name, part in self.parts.items() if part.role == "audit"}

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return self.ask(completions, prompts, metadata).total

    def ask(
        self, completions: list[Any], prompts: list[str], metadata: list[Metadata], *, evaluating: bool = False
    ) -> Answer:
        given = {
            name: part.reward.ask(completions, prompts, metadata).total
            for name, part in self.parts.items()
            if evaluating or part.role != "evaluate"
        }
        total = [self._total({name: own[row] for name, own in given.items()}) for row in range(len(completions))]
        return Answer(total=checked(total, len(completions)), parts=given)

    def _total(self, scores: Mapping[str, Score]) -> Score:
        """Of one completion."""
        added = []
        for name, score in scores.items():
            part = self.parts[name]
            if part.role != "optimise" or score is None:
                continue
            if isinstance(score, Failure):
                return score
            added.append(part.weight * score)
        return sum(added) if added else None


def checked(given: Iterable[Any], count: int) -> list[Score]:
    """``given`` as ``count`` scores. What is no finite number has failed; None and failures stay.

    Raises:
        RewardError: it is no list, or one of another length.
    """
    if isinstance(given, str | bytes | Mapping):
        raise RewardError("not_a_number", f"should be a list of numbers, got {type(given).__name__}")
    listed = list(given)
    if len(listed) != count:
        raise RewardError("wrong_length", f"{len(listed)} scores for {count} completions")
    return [one if one is None or isinstance(one, Failure) else _number(one) for one in listed]


def failure_of(error: BaseException) -> Failure:
    if isinstance(error, RewardError):
        return Failure(kind=error.kind, message=str(error))
    if isinstance(error, TimeoutError):
        return Failure(kind="timeout", message=str(error) or "timed out")
    return Failure(kind="exception", message=f"{type(error).__name__}: {error}")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, if it does so in time.

    It runs in a thread of its own. Python cannot end a thread: a call that is late goes on unheard, and does not keep
    the program from ending.

    Raises:
        TimeoutError: it did not.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # passed on
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _number(given: Any) -> Score:
    try:
        value = math.nan if isinstance(given, str | bytes) else float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
        value = math.nan
    if math.isfinite(value):
        return value
    return Failure(kind="not_a_number", message=f"should be a finite number, got {repr(given)[:40]}")

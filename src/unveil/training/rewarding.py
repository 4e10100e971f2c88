"""Asks a reward about judged chains: once per problem and text, whoever wrote it at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unveil.rewards.base import Failure, Metadata, Reward, Score
from unveil.samplers.trajectory import Trajectory
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import Judged


class RewardsLost(Exception):
    """No completion got a score, several updates in a row: the reward is broken, not the model."""


@dataclass(kw_only=True)
class Rewarded:
    """The rewards of B chains.

    Attributes:
        values: (B, S) of the guess at each step; without guesses only the last active step's is known. 0 elsewhere, and
            where there is no score.
        known: (B,) False for a chain with a step that has no score: the reward failed or does not apply.
        failures: all scores that could not be had, with the part of a sum that they are of.
        asked: how many completions the reward was asked about.
        lost: how many of them have no score because of a failure.
        parts: the scores of every part of a sum, of the finished responses that it scored.
    """

    values: Tensor
    known: Tensor
    failures: list[tuple[str, Failure]] = field(default_factory=list)
    asked: int = 0
    lost: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)


def reward_chains(reward: Reward, problems: Sequence[Problem], judged: Judged, trajectory: Trajectory) -> Rewarded:
    """The rewards of chains; of every guess where guesses were judged. Never raises because of the reward."""
    place_of: dict[tuple[str, str], int] = {}
    completions: list[str] = []
    prompts: list[str] = []
    metadata: list[Metadata] = []

    def place(row: int, text: str, correct: bool, score: float) -> int:
        problem = problems[row]
        if (problem.id, text) not in place_of:
            place_of[problem.id, text] = len(completions)
            completions.append(text)
            prompts.append(problem.prompt)
            verdict = {"correct": correct, "score": score}
            metadata.append({"solution": problem.solution, **problem.answer, "id": problem.id, **verdict})
        return place_of[problem.id, text]

    last = trajectory.last_steps.tolist()
    # Where (row, step) -> which completion.
    where: dict[tuple[int, int], int] = {}
    for row, (text, verdict) in enumerate(zip(judged.texts, judged.verdicts, strict=True)):
        where[row, last[row]] = place(row, text, verdict.correct, verdict.score)
    if judged.guess_texts is not None:
        assert judged.guess_correct is not None and judged.guess_score is not None
        correct, score = judged.guess_correct.tolist(), judged.guess_score.tolist()
        for row, step in trajectory.active.nonzero().tolist():
            if step != last[row]:
                where[row, step] = place(row, judged.guess_texts[row][step], correct[row][step], score[row][step])
    answer = reward.ask(completions, prompts, metadata)
    values = torch.zeros(trajectory.active.shape)
    known = torch.ones(len(judged.texts), dtype=torch.bool)
    for (row, step), number in where.items():
        one = answer.total[number]
        if isinstance(one, float):
            values[row, step] = one
        else:
            known[row] = False
    ends = [where[row, step] for row, step in enumerate(last)]
    return Rewarded(
        values=values,
        known=known,
        failures=answer.failures(),
        asked=len(completions),
        lost=sum(isinstance(one, Failure) for one in answer.total),
        parts={name: _numbers([scores[number] for number in ends]) for name, scores in answer.parts.items()},
    )


def _numbers(scores: Sequence[Score]) -> list[float]:
    return [one for one in scores if isinstance(one, float)]

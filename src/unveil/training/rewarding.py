"""Asks a reward about judged chains: once per problem and sample, whoever drew it at which step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unveil.rewards.base import Failure, Metadata, Reward, Score
from unveil.samplers.trajectory import Trajectory
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import Judged
from unveil.tasks.medium import Medium, Sample


class RewardsLost(Exception):
    """No sample got a score, several updates in a row: the reward is broken, not the model."""


@dataclass(kw_only=True)
class Rewarded:
    """The rewards of B chains.

    Attributes:
        values: (B, S) of the guess at each step; without guesses only the last active step's is known. 0 elsewhere, and
            where there is no score.
        known: (B,) False for a chain with a step that has no score: the reward failed or does not apply.
        failures: all scores that could not be had, with the part of a sum that they are of.
        asked: how many samples the reward was asked about.
        lost: how many of them have no score because of a failure.
        parts: mean of every part of a sum over the finished samples that it scored.
    """

    values: Tensor
    known: Tensor
    failures: list[tuple[str, Failure]] = field(default_factory=list)
    asked: int = 0
    lost: int = 0
    parts: dict[str, float] = field(default_factory=dict)


def reward_chains(
    reward: Reward, problems: Sequence[Problem], judged: Judged, trajectory: Trajectory, medium: Medium
) -> Rewarded:
    """The rewards of chains; of every guess where guesses were judged. Never raises because of the reward."""
    place_of: dict[tuple[str, Hashable], int] = {}
    samples: list[Sample] = []
    prompts: list[str] = []
    metadata: list[Metadata] = []

    def place(row: int, sample: Sample, correct: bool, score: float, metrics: Mapping[str, float]) -> int:
        problem = problems[row]
        key = (problem.id, medium.key(sample))
        if key not in place_of:
            place_of[key] = len(samples)
            samples.append(sample)
            prompts.append(problem.prompt)
            verdict = {"correct": correct, "score": score, "metrics": metrics}
            metadata.append({"solution": problem.solution, **problem.answer, "id": problem.id, **verdict})
        return place_of[key]

    last = trajectory.last_steps.tolist()
    # Where (row, step) -> which sample.
    where: dict[tuple[int, int], int] = {}
    for row, (sample, verdict) in enumerate(zip(judged.samples, judged.verdicts, strict=True)):
        where[row, last[row]] = place(row, sample, verdict.correct, verdict.score, verdict.metrics)
    if judged.guess_samples is not None:
        assert judged.guess_correct is not None and judged.guess_score is not None
        correct, score = judged.guess_correct.tolist(), judged.guess_score.tolist()
        for row, step in trajectory.active.nonzero().tolist():
            if step != last[row]:
                guess = judged.guess_samples[row][step]
                where[row, step] = place(row, guess, correct[row][step], score[row][step], {})
    answer = reward.ask(samples, prompts, metadata)
    values = torch.zeros(trajectory.active.shape)
    known = torch.ones(len(judged.samples), dtype=torch.bool)
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
        asked=len(samples),
        lost=sum(isinstance(one, Failure) for one in answer.total),
        parts={name: _mean([scores[number] for number in ends]) for name, scores in answer.parts.items()},
    )


def _mean(scores: Sequence[Score]) -> float:
    """Over those that are there; nan if none is."""
    numbers = [one for one in scores if isinstance(one, float)]
    return sum(numbers) / len(numbers) if numbers else float("nan")

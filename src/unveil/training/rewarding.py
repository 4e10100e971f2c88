"""Asks a reward about judged chains: once per problem and sample, whoever drew it at which step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unveil.rewards.base import Answer, Correct, Failure, Metadata, Reward, Score, Shaped
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
        parts: (B, S) like ``values``, of every part of a sum; nan where there is no score of it.
    """

    values: Tensor
    known: Tensor
    failures: list[tuple[str, Failure]] = field(default_factory=list)
    asked: int = 0
    lost: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)


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
            metadata.append(about(problem, correct, score, metrics))
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
    places = tuple(torch.tensor(list(where), dtype=torch.long).reshape(-1, 2).T)

    def laid_out(scores: Sequence[Score]) -> Tensor:
        """(B, S): scores at their steps, nan where there is none, 0 at steps that were not asked about."""
        values = torch.zeros(trajectory.active.shape)
        known = [one if isinstance(one, float) else math.nan for one in scores]
        values[places] = torch.tensor([known[number] for number in where.values()])
        return values

    values = laid_out(answer.total)
    known = ~values.isnan().any(1)
    return Rewarded(
        values=values.nan_to_num(0.0),
        known=known,
        failures=answer.failures(),
        asked=len(samples),
        lost=sum(isinstance(one, Failure) for one in answer.total),
        parts={name: laid_out(scores) for name, scores in answer.parts.items()},
    )


def held_out_rewards(reward: Reward, problems: Sequence[Problem], judged: Judged) -> dict[str, float]:
    """What a reward says of finished held-out samples: the mean ``reward`` and its standard error ``reward_error``.

    Of a sum also ``reward/NAME`` and ``reward_error/NAME`` of all parts, those that are only for evaluation too.
    Rewards that are the task's own verdict are not asked: it is in the evaluation already.
    """
    if isinstance(reward, Correct | Shaped):
        return {}
    answer = ask_held_out(reward, problems, judged)
    means = {"reward": mean_score(answer.total), "reward_error": standard_error(answer.total)}
    for name, scores in answer.parts.items():
        means |= {f"reward/{name}": mean_score(scores), f"reward_error/{name}": standard_error(scores)}
    return means


def ask_held_out(reward: Reward, problems: Sequence[Problem], judged: Judged) -> Answer:
    """What a reward, and all parts of a sum, say of each finished held-out sample."""
    return reward.ask(list(judged.samples), *asked_about(problems, judged), evaluating=True)


def asked_about(problems: Sequence[Problem], judged: Judged) -> tuple[list[str], list[Metadata]]:
    """The prompts of finished samples, and what a reward is told of each besides itself."""
    pairs = zip(problems, judged.verdicts, strict=True)
    metadata = [about(problem, verdict.correct, verdict.score, verdict.metrics) for problem, verdict in pairs]
    return [problem.prompt for problem in problems], metadata


def about(problem: Problem, correct: bool, score: float, metrics: Mapping[str, float]) -> Metadata:
    """What a reward is told of a sample besides itself."""
    verdict = {"correct": correct, "score": score, "metrics": metrics}
    return {"solution": problem.solution, **problem.answer, "id": problem.id, **verdict}


def mean_score(scores: Sequence[Score]) -> float:
    """Over those that are there; nan if none is."""
    numbers = [one for one in scores if isinstance(one, float)]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def standard_error(scores: Sequence[Score]) -> float:
    """Of `mean_score`; nan where there are fewer than two."""
    numbers = [one for one in scores if isinstance(one, float)]
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else float("nan")

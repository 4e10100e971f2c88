"""What the report shows of a run: samples and denoising trajectories as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unveil.denoisers.base import Denoiser
from unveil.samplers.base import Sampler
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import Evaluation, judge, sample_problems
from unveil.tasks.medium import Medium, medium_of


def sample_records(
    problems: Sequence[Problem], result: Evaluation, medium: Medium, mark: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One record per problem with its sample; ``mark`` (update, decoder) goes into each."""
    for row, problem in enumerate(problems):
        yield {
            **mark,
            "problem": problem.id,
            "prompt": problem.prompt,
            **medium.written(result.samples[row]),
            "correct": result.correct[row],
            "score": result.scores[row],
        }


def trajectory_records(
    denoiser: Denoiser,
    task: Task,
    problems: Sequence[Problem],
    sampler: Sampler,
    response_length: int | None,
    mark: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Decode the problems once more and yield every denoising step of each, judged where guesses are."""
    if not problems:
        return
    medium = medium_of(denoiser)
    trajectory = sample_problems(
        denoiser, problems, sampler, response_length=response_length, seed=0, needs=medium.shown
    )
    judged = judge(task, problems, denoiser, trajectory)
    for row, problem in enumerate(problems):
        steps = medium.steps(denoiser, trajectory, row)
        if judged.guess_correct is not None and judged.guess_score is not None:
            for step, record in enumerate(steps):
                record["correct"] = bool(judged.guess_correct[row, step])
                record["score"] = round(float(judged.guess_score[row, step]), 4)
        yield {
            **mark,
            "problem": problem.id,
            "prompt": problem.prompt,
            "reference": problem.solution,
            "steps": steps,
        }

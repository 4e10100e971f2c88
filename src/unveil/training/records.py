"""What the report shows of a run: completions and denoising trajectories as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unveil.denoisers.base import MaskedDenoiser
from unveil.samplers.base import Sampler
from unveil.samplers.text import response_texts
from unveil.samplers.trajectory import Trajectory
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import Evaluation, Judged, judge, sample_problems


def sample_records(
    problems: Sequence[Problem], result: Evaluation, mark: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One record per problem with its completion; ``mark`` (update, decoder) goes into each."""
    for row, problem in enumerate(problems):
        yield {
            **mark,
            "problem": problem.id,
            "prompt": problem.prompt,
            "completion": result.texts[row],
            "correct": result.correct[row],
            "score": result.scores[row],
        }


def trajectory_records(
    denoiser: MaskedDenoiser,
    task: Task,
    problems: Sequence[Problem],
    sampler: Sampler,
    response_length: int,
    mark: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Decode the problems once more and yield every denoising step of each."""
    if not problems:
        return
    needs = {"states", "guesses", "confidence", "revealed", "taken_back"}
    trajectory = sample_problems(denoiser, problems, sampler, response_length=response_length, seed=0, needs=needs)
    judged = judge(task, problems, denoiser, trajectory)
    for row, problem in enumerate(problems):
        yield {
            **mark,
            "problem": problem.id,
            "prompt": problem.prompt,
            "reference": problem.solution,
            "steps": chain_steps(denoiser, trajectory, row, task, problem, judged),
        }


def chain_steps(
    denoiser: MaskedDenoiser,
    trajectory: Trajectory,
    row: int,
    task: Task | None = None,
    problem: Problem | None = None,
    judged: Judged | None = None,
) -> list[dict[str, Any]]:
    """The steps of one chain, as text: canvas after the step (null = hole), guess, confidence, what changed.

    With a task and problem every step's guess is also judged.
    """
    assert trajectory.states is not None and trajectory.guesses is not None
    assert trajectory.confidence is not None and trajectory.revealed is not None and trajectory.taken_back is not None
    width = int(trajectory.response_valid[row].sum())
    count = int(trajectory.active[row].sum())
    texts = response_texts(denoiser, trajectory.guesses[row, :count])
    name = denoiser.tokenizer.tokens
    steps = []
    for step in range(count):
        last = step + 1 == count
        after = trajectory.response_ids[row] if last else trajectory.states[row, step + 1]
        hole = trajectory.states[row, step, :width] == trajectory.mask_id
        confidence = trajectory.confidence[row, step, :width]
        record: dict[str, Any] = {
            "tokens": [
                None if token == trajectory.mask_id else text
                for token, text in zip(after[:width].tolist(), name(after[:width].tolist()), strict=True)
            ],
            "guess": name(trajectory.guesses[row, step, :width].tolist()),
            "confidence": [
                round(value, 4) if open_ else None
                for value, open_ in zip(confidence.tolist(), hole.tolist(), strict=True)
            ],
            "revealed": trajectory.revealed[row, step, :width].nonzero().flatten().tolist(),
            "taken_back": trajectory.taken_back[row, step, :width].nonzero().flatten().tolist(),
            "text": texts[step],
        }
        if task is not None and problem is not None and judged is not None:
            assert judged.guess_correct is not None and judged.guess_score is not None
            record["correct"] = bool(judged.guess_correct[row, step])
            record["score"] = round(float(judged.guess_score[row, step]), 4)
        steps.append(record)
    return steps

"""Completions of a task's problems, one batch after the other, each with all that an evaluation keeps of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unveil.denoisers.base import MaskedDenoiser
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.text import encode_prompts
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import chain_seeds, judge, over_denoised, text_tokens, unigram_entropy


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished response and its verdict.

    Attributes:
        problem: id of the problem.
        sample: number of this completion of the problem, from 0.
        prompt: as the task wrote it.
        completion: the text, up to the first end token.
        correct: whether the task's verifier takes it.
        score: its shaped score.
        over_denoised: some guess on the way was right and this is wrong; None where guesses were not judged.
        tokens: before the first end token.
        chain_steps: denoising steps.
        forwards: network evaluations.
        entropy: unigram entropy of the tokens in nats.
        unfinished: the chain ended with holes.
    """

    problem: str
    sample: int
    prompt: str
    completion: str
    correct: bool
    score: float
    over_denoised: bool | None
    tokens: int
    chain_steps: int
    forwards: float
    entropy: float
    unfinished: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The completions of one batch and the seconds that decoding and judging them took."""

    completions: list[Completion]
    decoding: float
    judging: float


def complete(
    denoiser: MaskedDenoiser,
    task: Task,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    response_length: int,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    start: int = 0,
    guesses: bool = True,
) -> Iterator[Batch]:
    """``samples`` completions of every problem, problem after problem.

    Args:
        start: completions to leave out at the beginning, a multiple of ``batch_size``: what follows is the same to the
            last bit as if they had been made.
        guesses: judge the guess of every step as well, which `over_denoised` needs.
    """
    listed = [problem for problem in problems for _ in range(samples)]
    seeds = chain_seeds(listed, seed)
    canvas = Canvas.of(encode_prompts(denoiser, [p.prompt for p in listed]), response_length, denoiser.spec)
    denoiser.eval()
    for first in range(start, len(listed), batch_size):
        rows = slice(first, first + batch_size)
        began = time.perf_counter()
        trajectory = sampler.sample(denoiser, canvas.rows(rows), seeds[rows], needs={"guesses"} if guesses else ())
        decoded = time.perf_counter()
        judged = judge(task, listed[rows], denoiser, trajectory)
        tokens = text_tokens(denoiser, trajectory)
        steps = trajectory.active.sum(1).tolist()
        columns = zip(
            listed[rows], range(first, first + batch_size), judged.samples, judged.verdicts,
            over_denoised(judged).tolist() if guesses else [None] * len(steps), tokens.sum(1).tolist(), steps,
            unigram_entropy(trajectory.response_ids, tokens).tolist(), trajectory.unfinished.tolist(),
            strict=False,
        )  # fmt: skip
        completions = [
            Completion(
                problem=problem.id, sample=place % samples, prompt=problem.prompt, completion=text,
                correct=verdict.correct, score=verdict.score, over_denoised=lost, tokens=count, chain_steps=taken,
                forwards=trajectory.forwards * taken / max(1, sum(steps)), entropy=entropy, unfinished=holes,
            )
            for problem, place, text, verdict, lost, count, taken, entropy, holes in columns
        ]  # fmt: skip
        yield Batch(completions=completions, decoding=decoded - began, judging=time.perf_counter() - decoded)

"""Score finished and intermediate guesses of a denoiser on a task's problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unveil.denoisers.base import Denoiser
from unveil.samplers.base import Sampler
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import derive_seed
from unveil.tasks.base import Problem, Task, Verdict
from unveil.tasks.medium import Origins, Sample, medium_of, text_tokens, unigram_entropy
from unveil.tasks.statistics import wilson

__all__ = [
    "Evaluation", "GenerativeQuality", "Judged", "evaluate", "generative_perplexity", "judge", "over_denoised",
    "sample_problems", "text_tokens", "unigram_entropy",
]  # fmt: skip


@dataclass(kw_only=True)
class Judged:
    """Verdicts of one trajectory.

    Attributes:
        samples: B finished samples: texts, or images (C, H, W) in [0, 1].
        verdicts: B verdicts of them.
        guess_correct: (B, S) whether the full guess of every step was right; the last active step is the finished
            sample. None if guesses were not recorded.
        guess_score: (B, S) their shaped scores.
        guess_samples: B lists of S samples, the guess of every step.
    """

    samples: list[Sample]
    verdicts: list[Verdict]
    guess_correct: Tensor | None = None
    guess_score: Tensor | None = None
    guess_samples: list[list[Sample]] | None = None


def judge(task: Task, problems: Sequence[Problem], denoiser: Denoiser, trajectory: Trajectory) -> Judged:
    """Verify the finished samples and, where recorded, the guess of every step (S verdicts per chain).

    What a problem has already been judged on is not judged again: neighbouring guesses of text are mostly equal.
    """
    medium = medium_of(denoiser)
    seen: dict[tuple[int, Hashable], Verdict] = {}

    def verdicts(rows: Sequence[int], samples: Sequence[Sample]) -> list[Verdict]:
        keys = [(row, medium.key(sample)) for row, sample in zip(rows, samples, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in seen}
        found = task.check_all([problems[rows[p]] for p in new.values()], [samples[p] for p in new.values()])
        seen.update(zip(new, found, strict=True))
        return [seen[key] for key in keys]

    samples = medium.samples(denoiser, trajectory.finished)
    judged = Judged(samples=samples, verdicts=verdicts(range(len(samples)), samples))
    if trajectory.guesses is None:
        return judged
    batch, steps = trajectory.active.shape
    guesses = medium.samples(denoiser, trajectory.guesses.flatten(0, 1))
    said = verdicts([place // steps for place in range(len(guesses))], guesses)
    judged.guess_samples = [guesses[row * steps : (row + 1) * steps] for row in range(batch)]
    judged.guess_correct = torch.tensor([v.correct for v in said]).view(batch, steps) & trajectory.active
    judged.guess_score = torch.tensor([v.score for v in said]).view(batch, steps) * trajectory.active
    if steps:
        # A chain that ends with holes has a guess for them that it never committed.
        last = trajectory.last_steps[:, None]
        judged.guess_correct.scatter_(1, last, torch.tensor([[v.correct] for v in judged.verdicts]))
        judged.guess_score.scatter_(1, last, torch.tensor([[v.score] for v in judged.verdicts]))
    return judged


def over_denoised(judged: Judged) -> Tensor:
    """(B,) True where some intermediate guess was right and the finished response is wrong (MDPO, 2508.13148)."""
    assert judged.guess_correct is not None
    final = torch.tensor([verdict.correct for verdict in judged.verdicts])
    return judged.guess_correct.any(1) & ~final


@dataclass(kw_only=True)
class Evaluation:
    """One decoder's result on a list of problems.

    Attributes:
        accuracy: share of correct finished samples, with its 95 % Wilson interval ``low`` .. ``high``.
        score: mean shaped score.
        forwards: network evaluations spent, counted per sample.
        steps_per_chain: mean number of denoising steps of a chain, its NFE.
        unfinished: share of chains that ended before their sample was whole (rules that may waste steps).
        samples, correct, scores: per problem.
        ever_correct: share of problems with a right guess at any step; None where guesses are not judged.
        over_denoising: share with a right guess at some step and a wrong end; likewise.
        guess_accuracy: accuracy of the guess at every step; likewise.
        judged: the samples with all that the task says of them.
        numbers: what the medium and the task have to say besides (``sample_entropy``: mean over problems of the
            response's unigram entropy in nats; ``measure/NAME``: statistics of the whole set).
    """

    accuracy: float
    low: float
    high: float
    score: float
    forwards: int
    steps_per_chain: float
    unfinished: float
    samples: list[Sample]
    correct: list[bool]
    scores: list[float]
    judged: Judged
    ever_correct: float | None = None
    over_denoising: float | None = None
    guess_accuracy: list[float] | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The scalar results, for tables and logs."""
        names = (
            "accuracy", "low", "high", "score", "ever_correct", "over_denoising", "forwards", "steps_per_chain",
            "unfinished",
        )  # fmt: skip
        known = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return known | self.numbers | {"problems": len(self.samples)}


def evaluate(
    denoiser: Denoiser,
    task: Task,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    response_length: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
    sample: Callable[..., Any] | None = None,
) -> Evaluation:
    """Decode every problem once and judge the sample; of text also every step's guess.

    ``sample`` draws the chains, as `sample_problems` does.
    """
    medium = medium_of(denoiser)
    trajectory = (sample or sample_problems)(
        denoiser, problems, sampler, response_length=response_length, seed=seed, batch_size=batch_size,
        needs=medium.evaluated, on_batch=on_batch,
    )  # fmt: skip
    judged = judge(task, problems, denoiser, trajectory)
    correct = [verdict.correct for verdict in judged.verdicts]
    low, high = wilson(sum(correct), len(correct))
    measured = {f"measure/{name}": value for name, value in task.measure(problems, judged.samples).items()}
    result = Evaluation(
        accuracy=sum(correct) / len(correct),
        low=low,
        high=high,
        score=sum(verdict.score for verdict in judged.verdicts) / len(correct),
        forwards=trajectory.forwards,
        steps_per_chain=trajectory.active.sum(1).float().mean().item(),
        unfinished=trajectory.unfinished.float().mean().item(),
        samples=judged.samples,
        judged=judged,
        correct=correct,
        scores=[verdict.score for verdict in judged.verdicts],
        numbers=medium.numbers(denoiser, trajectory) | measured,
    )
    if judged.guess_correct is not None:
        steps = trajectory.active.sum(0).clamp(min=1)
        result.ever_correct = (judged.guess_correct.any(1) | torch.tensor(correct)).float().mean().item()
        result.over_denoising = over_denoised(judged).float().mean().item()
        result.guess_accuracy = (judged.guess_correct.sum(0) / steps).tolist()
    return result


@dataclass(frozen=True, kw_only=True)
class GenerativeQuality:
    """How a judge likes samples, and how varied they are: a low perplexity of repetitive text is no merit.

    Attributes:
        perplexity: exp of the judge's mean negative log-probability per token.
        sample_entropy: mean unigram entropy of the samples in nats.
    """

    perplexity: float
    sample_entropy: float


def generative_perplexity(judge: Callable[[Tensor], Tensor], ids: Tensor, counted: Tensor) -> GenerativeQuality:
    """The perplexity of samples under a judge, never without their entropy (arXiv 2409.02908).

    Args:
        judge: log-probabilities (B,) in nats of the counted tokens of sequences ``ids``.
        ids: (B, R) samples.
        counted: (B, R) which of their tokens count.
    """
    mean = judge(ids).double().sum() / counted.sum()
    entropy = unigram_entropy(ids, counted).mean()
    return GenerativeQuality(perplexity=math.exp(-float(mean)), sample_entropy=float(entropy))


def chain_copies(problems: Sequence[Problem]) -> list[int]:
    """How often each chain's problem was listed before it."""
    copies: dict[str, int] = {}
    found = []
    for problem in problems:
        copies[problem.id] = copies.get(problem.id, -1) + 1
        found.append(copies[problem.id])
    return found


def chain_seeds(problems: Sequence[Problem], seed: int, copies: Sequence[int] | None = None) -> list[int]:
    """One seed per chain: of the run's seed, the problem, and how often it was listed before."""
    copies = chain_copies(problems) if copies is None else copies
    return [derive_seed(seed, problem.id, copy) for problem, copy in zip(problems, copies, strict=True)]


def sample_problems(
    denoiser: Denoiser,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    response_length: int | None = None,
    seed: int,
    needs: Iterable[str],
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    copies: Sequence[int] | None = None,
    **how: Any,
) -> Any:
    """One chain per problem; a problem that is listed G times gets G chains with noise of their own.

    ``copies`` numbers the chains of a problem if these are not all of them (None: `chain_copies`). ``how`` says where
    chains start (`Medium.start`): of text, ``initial`` and ``frozen`` as in `Canvas.of`.
    """
    copies = chain_copies(problems) if copies is None else copies
    origins = Origins(problems=[derive_seed(seed, problem.id) for problem in problems], copies=copies)
    seeds = chain_seeds(problems, seed, copies)
    prompts = [problem.prompt for problem in problems]
    start = sampler.told(medium_of(denoiser).start(denoiser, prompts, response_length, origins, **how), prompts)
    was_training = denoiser.training
    denoiser.eval()
    try:
        return sampler.sample(denoiser, start, seeds, needs=needs, batch_size=batch_size, on_batch=on_batch)
    finally:
        denoiser.train(was_training)

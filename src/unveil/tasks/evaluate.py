"""Score finished and intermediate guesses of a denoiser on a task's problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.text import encode_prompts, response_texts
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import derive_seed
from unveil.tasks.base import Problem, Task, Verdict
from unveil.tasks.statistics import wilson


@dataclass(kw_only=True)
class Judged:
    """Verdicts of one trajectory.

    Attributes:
        texts: B finished responses.
        verdicts: B verdicts of them.
        guess_correct: (B, S) whether the full guess of every step was right; the last active step is the finished
            response. None if guesses were not recorded.
        guess_score: (B, S) their shaped scores.
        guess_texts: B lists of S texts, the guess of every step.
    """

    texts: list[str]
    verdicts: list[Verdict]
    guess_correct: Tensor | None = None
    guess_score: Tensor | None = None
    guess_texts: list[list[str]] | None = None


def judge(task: Task, problems: Sequence[Problem], denoiser: MaskedDenoiser, trajectory: Trajectory) -> Judged:
    """Verify the finished responses and, where recorded, the guess of every step (T verifier calls per rollout).

    A text that a problem has already been judged on is not judged again: neighbouring guesses are mostly equal.
    """
    seen: dict[tuple[int, str], Verdict] = {}

    def verdict(row: int, text: str) -> Verdict:
        if (row, text) not in seen:
            seen[row, text] = task.check(problems[row], text)
        return seen[row, text]

    texts = response_texts(denoiser, trajectory.response_ids)
    judged = Judged(texts=texts, verdicts=[verdict(row, text) for row, text in enumerate(texts)])
    if trajectory.guesses is None:
        return judged
    batch, steps = trajectory.active.shape
    guesses = response_texts(denoiser, trajectory.guesses.flatten(0, 1))
    verdicts = [verdict(place // steps, text) for place, text in enumerate(guesses)]
    judged.guess_texts = [guesses[row * steps : (row + 1) * steps] for row in range(batch)]
    judged.guess_correct = torch.tensor([v.correct for v in verdicts]).view(batch, steps) & trajectory.active
    judged.guess_score = torch.tensor([v.score for v in verdicts]).view(batch, steps) * trajectory.active
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
        accuracy: share of correct finished responses, with its 95 % Wilson interval ``low`` .. ``high``.
        score: mean shaped score.
        ever_correct: share of problems with a right guess at any step.
        over_denoising: share with a right guess at some step and a wrong end.
        guess_accuracy: accuracy of the guess at every step.
        sample_entropy: mean over problems of the response's unigram entropy in nats, see `unigram_entropy`.
        forwards: sequence-forwards spent.
        steps_per_chain: mean number of denoising steps of a chain, its NFE.
        unfinished: share of chains that ended with holes (rules that may waste steps).
        texts, correct, scores: per problem.
    """

    accuracy: float
    low: float
    high: float
    score: float
    ever_correct: float
    over_denoising: float
    guess_accuracy: list[float]
    sample_entropy: float
    forwards: int
    steps_per_chain: float
    unfinished: float
    texts: list[str]
    correct: list[bool]
    scores: list[float]

    def summary(self) -> dict[str, float]:
        """The scalar results, for tables and logs."""
        names = (
            "accuracy", "low", "high", "score", "ever_correct", "over_denoising", "sample_entropy", "forwards",
            "steps_per_chain", "unfinished",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"problems": len(self.texts)}


def evaluate(
    denoiser: MaskedDenoiser,
    task: Task,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    response_length: int,
    seed: int = 0,
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Decode every problem once and judge every step's guess."""
    trajectory = sample_problems(
        denoiser, problems, sampler, response_length=response_length, seed=seed, batch_size=batch_size,
        needs={"guesses"}, on_batch=on_batch,
    )  # fmt: skip
    judged = judge(task, problems, denoiser, trajectory)
    assert judged.guess_correct is not None
    correct = [verdict.correct for verdict in judged.verdicts]
    low, high = wilson(sum(correct), len(correct))
    steps = trajectory.active.sum(0).clamp(min=1)
    return Evaluation(
        accuracy=sum(correct) / len(correct),
        low=low,
        high=high,
        score=sum(verdict.score for verdict in judged.verdicts) / len(correct),
        ever_correct=(judged.guess_correct.any(1) | torch.tensor(correct)).float().mean().item(),
        over_denoising=over_denoised(judged).float().mean().item(),
        guess_accuracy=(judged.guess_correct.sum(0) / steps).tolist(),
        sample_entropy=unigram_entropy(trajectory.response_ids, text_tokens(denoiser, trajectory)).mean().item(),
        forwards=trajectory.forwards,
        steps_per_chain=trajectory.active.sum(1).float().mean().item(),
        unfinished=trajectory.unfinished.float().mean().item(),
        texts=judged.texts,
        correct=correct,
        scores=[verdict.score for verdict in judged.verdicts],
    )


def text_tokens(denoiser: MaskedDenoiser, trajectory: Trajectory) -> Tensor:
    """(B, R) True at the tokens of each response before its first end token; holes are no tokens."""
    ends = torch.isin(trajectory.response_ids, torch.tensor(denoiser.spec.end_ids))
    tokens = trajectory.response_valid & (trajectory.response_ids != trajectory.mask_id)
    return tokens & (ends.cumsum(1) == 0)


def unigram_entropy(ids: Tensor, counted: Tensor) -> Tensor:
    """-sum p log p in nats of the token frequencies within each sequence, (B,) float64; 0 where nothing is counted.

    Args:
        ids: (B, R) tokens.
        counted: (B, R) which of them count.
    """
    rows = []
    for row, own in zip(ids, counted, strict=True):
        frequency = row[own].unique(return_counts=True)[1].double()
        rows.append(torch.special.entr(frequency / frequency.sum()).sum())
    return torch.stack(rows)


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


def chain_seeds(problems: Sequence[Problem], seed: int) -> list[int]:
    """One seed per chain: of the run's seed, the problem, and how often it was listed before."""
    copies: dict[str, int] = {}
    seeds = []
    for problem in problems:
        copies[problem.id] = copies.get(problem.id, -1) + 1
        seeds.append(derive_seed(seed, problem.id, copies[problem.id]))
    return seeds


def sample_problems(
    denoiser: MaskedDenoiser,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    response_length: int,
    seed: int,
    needs: set[str],
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    initial: Sequence[Sequence[int]] | None = None,
    frozen: Sequence[Sequence[bool]] | None = None,
) -> Trajectory:
    """One chain per problem; a problem that is listed G times gets G chains with noise of their own.

    ``initial`` and ``frozen`` say where responses start (`Canvas.of`).
    """
    prompts = encode_prompts(denoiser, [p.prompt for p in problems])
    canvas = Canvas.of(prompts, response_length, denoiser.spec, initial=initial, frozen=frozen)
    seeds = chain_seeds(problems, seed)
    was_training = denoiser.training
    denoiser.eval()
    try:
        return sampler.sample(denoiser, canvas, seeds, needs=needs, batch_size=batch_size, on_batch=on_batch)
    finally:
        denoiser.train(was_training)

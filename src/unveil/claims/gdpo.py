"""Claim check of GDPO (arXiv 2510.08554); ``unveil reproduce gdpo``.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.claims.laboratory import (
    TUNING_SEED,
    Measured,
    markdown_table,
    mean,
    spread,
    total_cost,
    train_policy,
    train_to,
    two_processes,
    verdict,
)
from unveil.claims.slots import SlotDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.learning.estimators import (
    Coupled,
    DoubleMonteCarlo,
    MaskedAnswer,
    SemiDeterministic,
    subset,
)
from unveil.learning.likelihoods import Inner, Likelihood, OneStepLikelihood
from unveil.learning.objectives import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import derive_seed, generator
from unveil.systems.coupled_grpo import CoupledGrpo
from unveil.systems.gdpo import Gdpo
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.tasks.evaluate import evaluate
from unveil.tasks.running_sum import RunningSum
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_job import PolicyConfig, PolicyJob, RolloutConfig

LENGTH, INNER = 16, 2
ESTIMATORS = ("one_step", "double_mc-4", "sdmc-1", "sdmc-2", "sdmc-3", "coupled_grpo")


@dataclass(kw_only=True)
class OpenSum(RunningSum):
    """Running sums from a start of the response's own choice: right if every step adds the prompt's digit."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [self._from_somewhere(problem, seed) for problem in super().problems(split, count, seed)]

    def check(self, problem: Problem, completion: str) -> Verdict:
        wanted, said = problem.answer["slots"], completion.split()
        if len(said) != len(wanted) or not all(word.isdigit() for word in said):
            return Verdict(correct=False, score=0.0)
        offsets = [(int(a) - int(b)) % self.modulus for a, b in zip(said, wanted, strict=True)]
        links = [one == other for one, other in zip(offsets[1:], offsets[:-1], strict=True)]
        return Verdict(correct=all(links), score=sum(links) / len(links))

    def _from_somewhere(self, problem: Problem, seed: int) -> Problem:
        start = random.Random(f"{problem.id}/{seed}").randrange(self.modulus)
        slots = [str((int(slot) + start) % self.modulus) for slot in problem.answer["slots"]]
        return replace(problem, solution=" ".join(slots))


def _sum_network(out: Path, seed: int, goal: float = 0.5) -> Measured:
    task = OpenSum(length=LENGTH)
    denoiser = SlotDenoiser(words=3, prompt=LENGTH, response=LENGTH)
    denoiser.initialise(generator(seed, "slots"))
    data = DenoisingConfig(tasks=[MixedTask(task=task)], response_length=LENGTH, batch=64)
    held_out = task.problems("test", 400, 1)
    sampler = MaskedSampler(steps=LENGTH)

    def score() -> float:
        return evaluate(denoiser, task, held_out, sampler, response_length=LENGTH).accuracy

    return train_to(denoiser, data, out / f"sum-{seed}", seed=seed, goal=goal, score=score)

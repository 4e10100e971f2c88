"""Claim check of IGPO (arXiv 2509.10396) on written running sums; ``unveil reproduce igpo``.

Task: 10 digits mod 4, response = their 10 running sums, right only if every one is: the response is its own scratchpad.
The base has mostly seen digits 0 and 1 (one digit in five is any) and stops learning as soon as its samples at
temperature 1 are right in 6 % on the whole task, where four digits occur alike: most groups of 8 are all wrong.
Network: 2 layers, 64 wide. All methods: groups of 8, 8 prompts, 4 inner updates, one ratio per sequence, likelihood
`partial_mask` (with the whole response masked a chain of sums is not learned, by no method), no KL term, 10 steps. A
hint is 2-3 sums at their places, never the last one.

    grpo              no repair
    resample          all-wrong groups are sampled again without hints: the same budget of samples
    igpo              hints of 20-60 % of the trace, the fifth of them with the highest entropy is learned from
    igpo full trace   everything but the last sum is shown
    igpo no filter    every hint token is learned from
    igpo released     the filter and the mean of the released code (see ``systems/igpo.py``)
    igpo other hints  the hints come from another prompt

1. Share of all-wrong groups after the repair, at the same policy (the base) and on the same groups.
   Demand: with hints >= 40 % lower than with resampling, in the mean over seeds.
2. Greedy accuracy on held-out prompts without hints, after the same number of updates. ``grpo``, ``resample``, ``igpo``
   and ``igpo full trace`` choose from the same three learning rates on a seed that is not reported; the rest take
   IGPO's. Demand: igpo >= resample + 5 points.
3. Demand: igpo >= igpo full trace.
4. Hints leak nothing: demand igpo other hints <= resample + 5 points.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unveil.claims.laboratory import (
    TUNING_SEED,
    Measured,
    Report,
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
from unveil.learning.estimators import PartialMask
from unveil.learning.objectives import Kl, TokenMean
from unveil.samplers.masked import MaskedSampler
from unveil.seeds import generator
from unveil.systems.igpo import HintEntropy, Igpo, Inpaint
from unveil.tasks.base import Problem, Split
from unveil.tasks.evaluate import evaluate
from unveil.tasks.running_sum import RunningSum
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_job import PolicyConfig, PolicyJob, RolloutConfig

LENGTH, MODULUS, COMMON = 10, 4, 2
RARE = 0.2
"""Share of the base's digits that are drawn from all."""
BASE_ACCURACY = 0.06
UPDATES, HELD_OUT = 40, 400
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
REPAIR_GROUPS = 48
METHODS = ("grpo", "resample", "igpo", "igpo full trace", "igpo no filter", "igpo released", "igpo other hints")
TUNED = METHODS[:4]
FEWER_ALL_WRONG, GAIN = 0.40, 0.05


class Familiar(RunningSum):
    """Running sums whose digits are mostly the common ones."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        stream = generator("familiar", split, count, seed)
        return [self._familiar(problem, stream) for problem in super().problems(split, count, seed)]

    def _familiar(self, problem: Problem, stream: Any) -> Problem:
        import torch

        digits = [int(digit) for digit in problem.prompt.split()]
        common = torch.rand(len(digits), generator=stream) >= RARE
        mild = torch.randint(COMMON, (len(digits),), generator=stream)
        return self._problem(
            tuple(int(m) if c else d for d, c, m in zip(digits, common, mild, strict=True))
        )

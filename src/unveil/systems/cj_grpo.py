"""CJ-GRPO: consistency trajectory policy optimisation, with EOSER and ASS, two parts of decoding.

Yang, Chen, Hu, Shao: *Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with
Fewer Decoding Step*, 2025, arXiv 2509.23924. Every revealed token is scored in the state in which it was really
revealed: with x_s the stored states and pos_s the positions that step s reveals,

    rho_i = p_theta(x_{s+1,i} | x_s) / p_old(x_{s+1,i} | x_s)                                i in pos_s
    L_s   = mean over pos_s of -min(rho_i A, clip(rho_i) A) + beta * (exp(d_i) - d_i - 1)    d = log p_ref - log p
    L     = mean over the steps of a chain, then over chains                                 (eq. 10-11)

with A = (r - mean) / std of the finished response's reward over its group. Each view (chain and step) is a forward and
backward pass of its own or shares one with others, as the micro-batch allows: memory does not grow with the steps.
Weighting ``token_mean`` or ``token_sum`` in place of ``step_mean`` lets a step weigh as many tokens as it reveals.

*EOSER*, for a canvas decoded at once, damps the confidence of end tokens early, before the rule ranks:

    c_i <- c_i * (g_min + (g_max - g_min) * tau_s)    where the guess is an end token; tau_s = s / (S - 1), s = 0..S-1

*ASS*, the schedule ``doubling``, reveals 1, 2, 4, ... tokens in S = floor(log2 L) steps; there tau_s is (2^(s+1) - 1) /
2^S, the share of the canvas that is revealed after step s (``pace: doubling``).

Differs from the released code: that divides the reward by no deviation (``advantage: {name: group, scale: none}``); it
keeps the graphs of all steps until one backward pass; a step that reveals nothing makes it divide by zero, here it is
skipped; EOSER damps every end token of the denoiser, the code one of two; in blocks, the code counts a block's steps
against those of the whole canvas, so that the factor never reaches g_max: here both are of the block, or both of the
canvas (``count``). Tokens behind the first end token are trained as in the code; ``likelihood.after_end: drop`` spares
them. The paper's baseline *one-step GRPO* is ``likelihood: {name: one_step, prompt_mask: 0}``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped, StepMean
from unveil.learning.regularisers import Kl
from unveil.registry import UserError
from unveil.samplers.rules import Rule, StepView
from unveil.samplers.transforms import Transform
from unveil.systems import System

SYSTEM = System(
    name="cj_grpo",
    title="Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer "
    "Decoding Step",
    paper="2509.23924",
    family="masked",
    claim="tokens scored in the states that revealed them beat one-step scores; EOSER saves full-canvas decoding from "
    "early end tokens; ASS takes log2 L steps",
)


@dataclass(kw_only=True)
class Eoser(Transform, name="eoser"):
    """End tokens look less certain early: their confidence is multiplied by a factor that rises to ``g_max``."""

    g_min: Annotated[float, Field(ge=0, le=1)] = 0.4
    """The factor at the first step; the paper uses 0.4, and 0.01 with ASS and for training."""
    g_max: Annotated[float, Field(ge=0, le=1)] = 1.0
    """What the factor rises to."""
    pace: Literal["uniform", "doubling"] = "uniform"
    """How it rises: evenly over the steps, or with the share of revealed tokens under the schedule ``doubling``."""
    count: Literal["block", "canvas"] = "block"
    """Whose steps s = 0..S-1 are counted. ``doubling`` with several blocks wants ``canvas``."""

    def __post_init__(self) -> None:
        if self.g_min > self.g_max:
            raise UserError(f"g_min: should be at most g_max = {self.g_max:g}, got {self.g_min:g}")

    def check_fits(self, rule: Rule) -> None:
        if not rule.follows_schedule:
            raise UserError(f"transform eoser: rule {rule.name!r} sets its own pace, the factor needs a schedule")
        if rule.confidence not in ("probability", "margin"):
            raise UserError(
                f"transform eoser: it scales a confidence between 0 and 1 (allowed: probability, margin), rule "
                f"{rule.name!r} ranks by {rule.confidence!r}"
            )

    def factor(self, step: Tensor, steps: Tensor) -> Tensor:
        """What end tokens are multiplied by at ``step`` of ``steps``, both (b,); (b,) float32."""
        if self.pace == "uniform":
            tau = torch.where(steps > 1, step / (steps - 1).clamp(min=1), 1.0)
        else:
            tau = (torch.exp2(step + 1.0) - 1) / torch.exp2(steps.float())
        return self.g_min + (self.g_max - self.g_min) * tau

    def apply(self, score: Tensor, guess: Tensor, view: StepView, spec: DenoiserSpec) -> Tensor:
        step, steps = (view.step, view.steps) if self.count == "block" else (view.done, view.planned)
        assert step is not None and steps is not None
        ends = torch.isin(guess, torch.tensor(spec.end_ids, device=guess.device)) & score.isfinite()
        return torch.where(ends, score * self.factor(step, steps)[:, None], score)


@dataclass(kw_only=True)
class CjGrpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="std"))
    likelihood: TrajectoryLikelihood = field(default_factory=lambda: TrajectoryLikelihood(tokens="revealed"))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.5))
    weighting: StepMean = field(default_factory=StepMean)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.04, estimator="k3"))
    inner_updates: int = 8

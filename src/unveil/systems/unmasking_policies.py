"""Unmasking policies: a small network decides, per position and step, what a frozen denoiser commits.

Jazbec, Olausson, Bethune, Ablin, Kirchhof, Monteiro, Turrisi, Ramapuram, Cuturi: *Learning Unmasking Policies for
Diffusion Language Models*, 2025, arXiv 2512.09106. The denoiser is the environment; the tokens it commits are its
likeliest. The policy reads which positions are masked, how certain the denoiser is of each, and the time (steps taken /
response length L), and gives one logit b_l per position; the action opens each hole of the current block on its own:

    pi(u) = product over candidates l of  sigmoid(b_l)^u_l (1 - sigmoid(b_l))^(1 - u_l)             (or DPLS)
    R     = 1[right] * ((L - min(steps, L) + 1) / L)^alpha       speed multiplies: an added reward is earned by being
                                                                 wrong at once
    A     = R - mean over the group
    loss  = mean over rollouts of mean over their active steps of  clipped(pi_new(u_s) / pi_old(u_s), A),  clip 0.5

with two gradient steps per batch of rollouts, which never call the denoiser: the update reads what was stored. *Expert
steering* adds E rollouts of the threshold rule to each group of G; their probability is that of a draw from all of
them, (G / (G + E)) pi + 1 / (G + E), new and old, so that ratios stay within G + 1.

Differs from the released code: known positions have confidence 1 (there: what the denoiser says of them, though it was
never trained to); a chain may take L steps wherever it spends them (there: at most a block's length within a block); a
forced opening of ``bernoulli_argmax`` cannot be trained on (there it is scored as if drawn).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.unmask import UnmaskInputs, UnmaskNetwork
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped, StepMean
from unveil.learning.selectors import NonZero
from unveil.registry import UserError
from unveil.samplers.actions import Bernoulli
from unveil.samplers.base import Sampler, TokenSampler
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Threshold
from unveil.samplers.trajectory import TokenTrajectory
from unveil.systems import System
from unveil.training.rollouts import GroupHook, Roll, Rollouts, Shaping

SYSTEM = System(
    name="unmasking_policies",
    title="Learning Unmasking Policies for Diffusion Language Models",
    paper="2512.09106",
    family="masked",
    claim="a small policy on a frozen model's confidences beats the confidence threshold in full diffusion",
)
TIME_DIM = 128
"""Width of the time embedding."""


@dataclass(kw_only=True)
class ConfidencePolicy(UnmaskNetwork, name="confidence"):
    """A transformer of one block on confidences alone: 300,000 weights that any denoiser can carry, at any length."""

    dim: Annotated[int, Field(ge=4)] = 128
    """Width."""
    heads: Annotated[int, Field(ge=1)] = 2
    """Attention heads; their size must be even."""
    hidden: Annotated[int, Field(ge=1)] = 512
    """Width of the MLP."""
    layers: Annotated[int, Field(ge=1)] = 1
    """Blocks."""
    bias: float = -2.0
    """Every logit at the start, about: -2 opens one hole in eight. Where a response has fewer steps than a few dozen,
    more has to be opened at the start, or holes are left."""
    time_period: Annotated[float, Field(gt=0)] = 1.0
    """Frequencies of the time embedding run from 1 to 1 / this. At 1, the released value, all are 1."""

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise UserError(f"heads: {self.heads} must divide dim={self.dim} into even head sizes")

    def build(self, feature_dim: int) -> nn.Module:
        return _Network(self)


class _Network(nn.Module):
    """DiT blocks over Linear(c), conditioned per position on Embedding(masked) + MLP(time); at first on nothing."""

    frequency: Tensor

    def __init__(self, shape: ConfidencePolicy) -> None:
        super().__init__()
        dim = shape.dim
        exponent = torch.arange(TIME_DIM // 2) / (TIME_DIM // 2)
        self.register_buffer("frequency", shape.time_period**-exponent, persistent=False)
        self.time = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.mask = nn.Embedding(2, dim)
        self.enter = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(dim)
        self.leave = nn.Linear(dim, 1)
        nn.init.constant_(self.leave.bias, shape.bias)

    def forward(self, inputs: UnmaskInputs) -> Tensor:
        progress = inputs.step.float() / inputs.planned.float()
        angle = progress[:, None] * self.frequency
        moment = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        condition = self.mask(inputs.masked.long()) + moment[:, None]
        certain = torch.where(inputs.masked, inputs.confidence.float(), 1.0)
        x = self.enter(certain[..., None])
        attendable = None if bool(inputs.valid.all()) else inputs.valid[:, None, None, :]
        for block in self.blocks:
            x = block(x, condition, attendable)
        return self.leave(self.norm(x)).squeeze(-1)


class _Block(nn.Module):
    """Attention with rotary positions and an MLP, each scaled, shifted and gated by a condition (b, R, D)."""

    def __init__(self, shape: ConfidencePolicy) -> None:
        super().__init__()
        dim, hidden, self.heads = shape.dim, shape.hidden, shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.attention_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, attendable: Tensor | None) -> Tensor:
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation(condition).chunk(6, -1)
        batch, width, dim = x.shape
        qkv = self.qkv(self.attention_norm(x) * (1 + scale) + shift)
        query, key, value = qkv.view(batch, width, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(query), _rotate(key), value, attn_mask=attendable)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, width, dim)) * (1 + gate)
        inner = F.gelu(self.up(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift))
        return x + self.down(inner) * (1 + mlp_gate)


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of x (b, heads, R, head_dim), neighbouring pairs, base 10,000."""
    width, size = x.shape[-2:]
    frequency = 10_000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.arange(width, device=x.device)[:, None] * frequency
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)


@dataclass(kw_only=True)
class Speed(Shaping, name="speed"):
    """Pays for few steps: each is one evaluation of the denoiser."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """What speed is worth; at 0 only being right counts."""
    form: Literal["multiplicative", "additive"] = "multiplicative"
    """R ((L - min(steps, L) + 1) / L)^alpha, or R - alpha steps / L, which is paid for being wrong at once."""

    def check_fits(self, sampler: Sampler) -> None:
        if not isinstance(sampler, TokenSampler):
            raise UserError(f"policy.shaping: 'speed' pays by the length of a text, and {sampler.name!r} draws none")

    def shape(self, rewards: Tensor, trajectory: TokenTrajectory) -> Tensor:
        steps, length = trajectory.active.sum(1, keepdim=True), trajectory.response_valid.sum(1, keepdim=True)
        if self.form == "additive":
            return (rewards - self.alpha * steps / length) * trajectory.active
        return rewards * ((length - steps.minimum(length) + 1) / length) ** self.alpha


@dataclass(kw_only=True)
class Experts(GroupHook, name="experts"):
    """Adds one rollout of the threshold rule per threshold to each group (expert steering)."""

    thresholds: Annotated[list[float], Field(min_length=1)] = field(default_factory=lambda: [0.9])
    """One expert each."""
    block_length: Annotated[int, Field(ge=1)] = 32
    """The experts' blocks; their likelihood knows of none: what they left closed anywhere was left closed."""

    def check_fits(self, sampler: Sampler, group_size: int, response_length: int) -> None:
        if sampler.action is None or sampler.action.uses_count:
            raise UserError("policy.groups: 'experts' steers a rule 'policy' that sets its own pace (action bernoulli)")
        for threshold in self.thresholds:
            self._sampler(threshold).check_fits(response_length)

    def apply(self, rollouts: Rollouts, roll: Roll, denoiser: MaskedDenoiser) -> tuple[Rollouts, dict[str, float]]:
        first = torch.cat([rollouts.group.new_tensor([-1]), rollouts.group[:-1]]) != rollouts.group
        places = first.nonzero().flatten().tolist()
        problems, group = [rollouts.problems[place] for place in places], rollouts.group[first]
        size = len(rollouts) // len(places)
        joined, right = rollouts, []
        for number, threshold in enumerate(self.thresholds):
            expert = roll(problems, group, label=f"expert {number}", sampler=self._sampler(threshold))
            assert expert.trajectory.block is not None
            share = 1 / (size + len(self.thresholds))
            expert.trajectory = dataclasses.replace(
                expert.trajectory,
                block=torch.ones_like(expert.trajectory.block),
                expert_share=torch.full((len(expert),), share),
            )
            right.append(expert.correct.float().mean().item())
            joined = joined.extend(expert)
        return joined, {"expert_accuracy": sum(right) / len(right)}

    def _sampler(self, threshold: float) -> MaskedSampler:
        return MaskedSampler(steps=1, block_length=self.block_length, rule=Threshold(threshold=threshold))


@dataclass(kw_only=True)
class UnmaskingPolicies:
    """The paper's choices, as keyword arguments of a `PolicyConfig`. The rollout sampler has temperature 0 and the rule
    ``Policy(action=Bernoulli())``; the model carries a `ConfidencePolicy`, and nothing else learns."""

    shaping: Speed = field(default_factory=Speed)
    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="none"))
    selector: NonZero = field(default_factory=NonZero)
    likelihood: TrajectoryLikelihood = field(
        default_factory=lambda: TrajectoryLikelihood(tokens="none", order=Bernoulli())
    )
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.5, level="step"))
    weighting: StepMean = field(default_factory=StepMean)
    inner_updates: int = 2

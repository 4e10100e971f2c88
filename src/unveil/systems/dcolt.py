"""DCoLT, the diffusion chain of lateral thought: tokens and unmasking order learn together from an outcome reward.

Huang, Chen, Wang, Li, Qi: *Reinforcing the Diffusion Chain of Lateral Thought with Diffusion Language Models*, 2025,
arXiv 2505.10446. Every denoising step is an action of a policy, all with the advantage of the finished response:

    A   = (r - mean over the group) / (std over the group + 1e-4)
    rho = pi(x_n | x_{n-1}) / pi_old(x_n | x_{n-1})
    J   = 1/v * sum over chains of 1/N * sum over steps of min(rho A, clip(rho, 0.8, 1.2) A)

N is a chain's number of steps, v the number of chains whose advantage is not 0. A step of a masked denoiser draws WHERE
and WHAT: the unmasking policy module (UPM) gives scores h from the denoiser's own features, and

    log pi = log PlackettLuce(order of the opened positions; h) + sum over them of log p(token | x_{n-1})

where the order counts for nothing once all holes of a block are taken (``samplers/actions.py``: plackett_luce). UPM:
features -> AdaLN -> one bidirectional block -> AdaLN -> linear, where AdaLN is told the step, what is masked and the
block. One learning rate moves it together with the denoiser, and its gradient flows into the denoiser too.

    both, as in the paper      policy.likelihood: {tokens: revealed, order: plackett_luce}
    UPM alone, greedy tokens   model.train: unmask; policy.likelihood.tokens: none; rollout.sampler.temperature: 0
    tokens alone               model.train: denoiser; policy.likelihood.order: null; rollout.sampler.rule: random

The score-entropy form has no UPM: in one reverse step (sampler ``reverse``) the score network decides both what and
when, and the closed-form transition is scored (recipe dcolt/sedd); loss, advantage and weights are those of this file.

Differs from the released code: its ratio is 1 by construction, so that clip and the KL term do nothing; here old
log-probabilities are kept for ``inner_updates`` > 1. It exponentiates h without a shift; it turns nan gradients into 0
and steps on (here the step is skipped and reported); after groups of equal rewards it still lets Adam move (here they
are left out). v is counted over an update's problems, not per problem. Two more settings are offered: log-confidences
as an input of the UPM, and ratios of tokens and order that are clipped apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.transformer import Block, TransformerConfig
from unveil.denoisers.unmask import UnmaskInputs, UnmaskNetwork
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import TokenViews, TrajectoryLikelihood
from unveil.learning.objectives import Clipped, Weighting
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import NonZero
from unveil.samplers.actions import PlackettLuce
from unveil.samplers.trajectory import TokenTrajectory
from unveil.systems import System

SYSTEM = System(
    name="dcolt",
    title="Reinforcing the Diffusion Chain of Lateral Thought with Diffusion Language Models",
    paper="2505.10446",
    family="masked",
    claim="rewarding every step's tokens and learned unmasking order beats training either alone",
)
TIME_DIM = 256


@dataclass(kw_only=True)
class UnmaskingPolicyModule(UnmaskNetwork, name="upm"):
    """DCoLT's ranking head on the denoiser's features."""

    reads_features: ClassVar[bool] = True
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads of its block."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of the block's MLP; None: twice the denoiser's."""
    adaln: bool = True
    """Tell it the step, the holes and the block. False: features alone, behind a plain norm (the paper's ablation)."""
    confidence: bool = False
    """Also tell it the log of what the rule reads of every hole (not in the paper)."""

    def build(self, feature_dim: int) -> nn.Module:
        return _Upm(self, feature_dim)


class _Upm(nn.Module):
    def __init__(self, shape: UnmaskingPolicyModule, dim: int) -> None:
        super().__init__()
        hidden = shape.hidden or 2 * dim
        config = TransformerConfig(dim=dim, layers=1, heads=shape.heads, hidden=hidden)
        self.head_dim = dim // shape.heads
        self.block = Block(config)
        self.condition = _Condition(dim) if shape.adaln else None
        self.norm_in = _AdaLN(dim) if shape.adaln else None
        self.norm_out = _AdaLN(dim) if shape.adaln else nn.LayerNorm(dim, eps=1e-4)
        self.certainty = nn.Linear(1, dim) if shape.confidence else None
        self.score = nn.Linear(dim, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, inputs: UnmaskInputs) -> Tensor:
        """Scores h (N, R) float32."""
        assert inputs.features is not None
        x, valid = inputs.features, inputs.valid
        condition = None if self.condition is None else self.condition(inputs)
        if self.norm_in is not None:
            x = self.norm_in(x, condition)
        if self.certainty is not None:
            told = torch.where(inputs.masked, inputs.confidence.clamp(min=1e-8).log(), 0.0)
            x = x + self.certainty(told[..., None].to(x.dtype))
        x = self.block(x, self._rotation(x), (valid | ~valid.any(1, keepdim=True))[:, None, None, :])
        x = self.norm_out(x) if condition is None else self.norm_out(x, condition)
        return self.score(x).squeeze(-1).float()

    def _rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1, 1, R, head_dim): places are counted from the start of the response."""
        frequency = 10_000.0 ** (-torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * frequency
        angle = torch.cat([angle, angle], -1)[None, None]
        return angle.cos(), angle.sin()


class _Condition(nn.Module):
    """MLP(sinusoids of n/N) + embedding(is masked) + embedding(in the block), (N, R, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        linears = nn.Linear(TIME_DIM, dim), nn.Linear(dim, dim)
        self.time = nn.Sequential(linears[0], nn.SiLU(), linears[1])
        self.masked, self.block = nn.Embedding(2, dim), nn.Embedding(2, dim)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for embedding in (self.masked, self.block):
            nn.init.trunc_normal_(embedding.weight, std=0.02)

    def forward(self, inputs: UnmaskInputs) -> Tensor:
        half = TIME_DIM // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=inputs.step.device) / half)
        angle = (inputs.step / inputs.planned.clamp(min=1)).float()[:, None] * frequency
        time = self.time(torch.cat([angle.cos(), angle.sin()], -1).to(self.masked.weight.dtype))
        return time[:, None] + self.masked(inputs.masked.long()) + self.block(inputs.block.long())


class _AdaLN(nn.Module):
    """LayerNorm without weights of its own; scale and shift come from the condition."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-4, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        nn.init.xavier_uniform_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


@dataclass(kw_only=True)
class ValidMean(Weighting, name="dcolt"):
    """Mean over the steps of a chain, sum over chains, divided by the number of chains whose advantage is not 0."""

    parts: bool = False
    """For ``objective.level: part``: the tokens of a step together, and its order, each weigh as much as the step."""

    def __post_init__(self) -> None:
        if self.parts:
            self.reads_views = TokenViews

    def weights(
        self, views: TokenViews, advantage: Tensor, trajectory: TokenTrajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        items = views.items.float()
        share = items.sum(1, keepdim=True).expand_as(items)
        if self.parts:
            share = torch.ones_like(items)
            share[:, : views.scored.shape[1]] = views.scored.sum(1, keepdim=True)
        chains = torch.zeros(len(trajectory))
        steps = chains.index_add(0, views.rows, torch.ones(len(views)))
        valid = chains.index_fill(0, views.rows[advantage != 0], 1).sum().item()
        weight = items / share.clamp(min=1) / steps[views.rows, None] / max(1.0, total(valid))
        return weight, weight


@dataclass(kw_only=True)
class Dcolt:
    """The paper's choices, as keyword arguments of a `PolicyConfig`: ``PolicyConfig(task=..., rollout=...,
    **vars(Dcolt()))``. The rollout's rule is ``Policy(action=PlackettLuce())``, its temperature 1."""

    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    selector: NonZero = field(default_factory=NonZero)
    likelihood: TrajectoryLikelihood = field(
        default_factory=lambda: TrajectoryLikelihood(tokens="revealed", order=PlackettLuce())
    )
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.2, level="step"))
    weighting: ValidMean = field(default_factory=ValidMean)
    kl: Kl = field(default_factory=Kl)

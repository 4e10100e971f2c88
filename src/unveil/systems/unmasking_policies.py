"""Unmasking policies: a small network that decides, per position and step, what a frozen denoiser commits.

Jazbec, Olausson, Bethune, Ablin, Kirchhof, Monteiro, Turrisi, Ramapuram, Cuturi: *Learning Unmasking Policies for
Diffusion Language Models*, 2025, arXiv 2512.09106.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConfidencePolicy(nn.Module):
    """Logits of opening every response position, from confidences alone; any response length.

    One DiT block (adaLN with shift, scale and gate of both branches, per position) over Linear(c), conditioned on
    Embedding(masked) + MLP(time). At first adaLN does nothing and the output bias is ``bias``: about 0.12 for -2.
    """

    def __init__(
        self, *, dim: int, heads: int, hidden: int, layers: int, confidences: int, bias: float, time_period: float
    ) -> None:
        super().__init__()
        self.bias, self.confidences = bias, confidences
        exponent = torch.arange(TIME_DIM // 2) / (TIME_DIM // 2)
        self.register_buffer("frequency", time_period**-exponent, persistent=False)
        self.time = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.mask = nn.Embedding(2, dim)
        self.enter = nn.Linear(confidences, dim)
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.leave = nn.Linear(dim, 1)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: uniform within 1 / sqrt(inputs), embeddings normal; then the start described above."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)
        nn.init.constant_(self.leave.bias, self.bias)

    def forward(self, masked: Tensor, confidence: Tensor, progress: Tensor, valid: Tensor) -> Tensor:
        """masked (b, R), confidence (b, R, P), progress (b,), valid (b, R) -> (b, R)."""
        angle = progress[:, None].float() * self.frequency
        moment = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        condition = self.mask(masked.long()) + moment[:, None]
        # A known token is certain: the network of a canvas with padding must not see what lies behind it either.
        first = torch.arange(self.confidences, device=masked.device) == 0
        known = first.float().expand_as(confidence)
        x = self.enter(torch.where(masked[..., None], confidence, known))
        attendable = None if bool(valid.all()) else valid[:, None, None, :]
        for block in self.blocks:
            x = block(x, condition, attendable)
        return self.leave(self.norm(x)).squeeze(-1)


class _Block(nn.Module):
    """Attention with rotary positions and an MLP, both modulated by a condition (b, R, D)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.attention_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

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


def mixture(log_prob: Tensor, rollouts: int, experts: int) -> Tensor:
    """log( G/(G+E) pi + 1/(G+E) ): the probability of an expert's action under a draw from G rollouts and E experts.

    Bounded below, so the ratio of an action that the policy would never take stays near 1.
    """
    total = rollouts + experts
    return torch.logaddexp(log_prob + math.log(rollouts / total), log_prob.new_tensor(-math.log(total)))


TIME_DIM = 128
"""Width of the time embedding."""

"""Flow-GRPO as a plain loop over one network, as the paper has it: what the general one is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), t (B,), prompt ids (B, P)) -> velocity."""


@dataclass(kw_only=True)
class Plain:
    """One update: chains, rewards, advantages, clipped ratios step by step, one optimiser step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    noise: float
    clip: float
    group: int

    @torch.no_grad()
    def rollout(self, x: Tensor, ids: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (S + 1, B, C, H, W) and log-probabilities (S, B) of chains that start at x."""
        self.network.eval()
        latents, scores = [x], []
        for step in range(self.steps):
            mean, std = self._step(latents[-1], ids, step)
            latents.append(mean + std * torch.randn(mean.shape, generator=stream))
            scores.append(self._log_prob(latents[-1], mean, std))
        return torch.stack(latents), torch.stack(scores)

    def update(self, latents: Tensor, scores: Tensor, ids: Tensor, rewards: Tensor) -> None:
        """One gradient step on all steps but the last, accumulated step by step."""
        self.network.train()
        grouped = rewards.view(-1, self.group)
        advantage = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
        self.optimizer.zero_grad(set_to_none=True)
        trained = self.steps - 1
        for step in range(trained):
            mean, std = self._step(latents[step], ids, step)
            ratio = (self._log_prob(latents[step + 1], mean, std) - scores[step]).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean() / trained
            loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()

    def _step(self, x: Tensor, ids: Tensor, step: int) -> tuple[Tensor, float]:
        t, s = 1 - step / self.steps, 1 - (step + 1) / self.steps
        square = self.noise**2 * t / (1 - (s if t == 1 else t))
        velocity = self.network(x, torch.full((len(x),), t), ids)
        drift = velocity + square / (2 * t) * (x + (1 - t) * velocity)
        return x + drift * (s - t), math.sqrt(square * (t - s))

    def _log_prob(self, x: Tensor, mean: Tensor, std: float) -> Tensor:
        each = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        return each.mean(dim=(1, 2, 3))

"""DiffusionNFT as a plain loop over two networks, as the paper has it: what the general one is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class PlainNft:
    """One update: images by the old network's ODE, rewards, the loss of both branches time by time, one optimiser
    step, and the old network follows."""

    network: nn.Module
    old: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    beta: float
    limit: float
    group: int

    @torch.no_grad()
    def rollout(self, x: Tensor, ids: Tensor) -> Tensor:
        """Images (B, C, H, W) that start from the noise x, by Euler steps."""
        self.old.eval()
        for step in range(self.steps):
            t, s = 1 - step / self.steps, 1 - (step + 1) / self.steps
            x = x + self.old(x, torch.full((len(x),), t), ids) * (s - t)
        return x

    def draw(self, count: int, shape: torch.Size, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (B, T) of the grid without its last, each image in its own order, and noise (B, T, C, H, W)."""
        trained = self.steps - 1
        order = torch.stack([torch.randperm(trained, generator=stream) for _ in range(count)])
        return 1 - order / self.steps, torch.randn(count, trained, *shape, generator=stream)

    def update(self, images: Tensor, ids: Tensor, rewards: Tensor, times: Tensor, noise: Tensor) -> None:
        """One gradient step on all times, accumulated time by time."""
        self.network.train()
        grouped = rewards.view(-1, self.group)
        advantage = (grouped - grouped.mean(1, keepdim=True)).flatten() / (rewards.std() + 1e-4)
        good = 0.5 + 0.5 * advantage.clamp(-self.limit, self.limit) / self.limit
        self.optimizer.zero_grad(set_to_none=True)
        trained = times.shape[1]
        for t, eps in zip(times.T, noise.transpose(0, 1), strict=True):
            wide = t.view(-1, 1, 1, 1)
            x = (1 - wide) * images + wide * eps
            with torch.no_grad():
                before = self.old(x, t, ids)
            step = self.beta * (self.network(x, t, ids) - before)
            losses = [self._error(x - wide * velocity, images) for velocity in (before + step, before - step)]
            loss = (good * losses[0] + (1 - good) * losses[1]).mean() * self.limit / self.beta / trained
            loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """old <- decay old + (1 - decay) network."""
        for old, new in zip(self.old.parameters(), self.network.parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    def _error(self, guess: Tensor, images: Tensor) -> Tensor:
        """Mean squared error (B,) over the mean absolute one."""
        with torch.no_grad():
            scale = (guess.double() - images.double()).abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)
        return ((guess - images) ** 2).mean(dim=(1, 2, 3)) / scale

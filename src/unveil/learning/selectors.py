"""Which denoising steps are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import Plugin
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import generator


class Selector(Plugin, family="selector"):
    """Chooses chains among those of an update, and steps of every chain by itself."""

    needs: frozenset[str] = frozenset()
    """Trajectory fields that `choose` reads."""

    def chains(self, advantages: Tensor, group: Tensor, sampler: Any) -> Tensor:
        """(B,) True at the chains that are trained on at all; by default every one.

        From the advantages (B,) at the end of all chains of the update, on whatever rank they were drawn, their groups
        (B,) and the sampler, whose chains may be branches of several stems of a group.
        """
        return torch.ones(len(group), dtype=torch.bool)

    def choose(self, advantages: Tensor, trajectory: Any, seeds: Sequence[int], spec: Any) -> Tensor:
        """(B, S) float factors of the steps' weights, 0 where a step is not trained on.

        From ``advantages`` (B, S), the trajectory, a seed per chain and the denoiser's spec. Factors other than 0 and 1
        make a sample of steps stand for all of them.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class AllSteps(Selector, name="all"):
    """Every step."""

    def choose(self, advantages: Tensor, trajectory: Trajectory, seeds: Sequence[int], spec: Any) -> Tensor:
        return trajectory.decided.float()


@dataclass(kw_only=True)
class NonZero(Selector, name="nonzero"):
    """Every step whose advantage is not 0: chains of groups with equal rewards cost no gradient pass, and an update
    without any other is no gradient step."""

    def choose(self, advantages: Tensor, trajectory: Trajectory, seeds: Sequence[int], spec: Any) -> Tensor:
        return (trajectory.decided & (advantages.abs() > 1e-6)).float()


@dataclass(kw_only=True)
class TopAdvantage(Selector, name="top_advantage"):
    """The k steps of a chain with the largest |advantage|; ties go to the earlier step (MDPO, 2508.13148)."""

    k: Annotated[int, Field(ge=1)] = 8
    """Steps per chain."""

    def choose(self, advantages: Tensor, trajectory: Trajectory, seeds: Sequence[int], spec: Any) -> Tensor:
        return _largest(advantages.abs(), trajectory.decided, self.k)


@dataclass(kw_only=True)
class ButLast(Selector, name="but_last"):
    """All steps that chose something but a chain's last one, whose noise is next to none; or a share of them, drawn
    anew for every chain (DanceGRPO, 2505.07818)."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of those steps, rounded, at least one."""

    def choose(self, advantages: Tensor, trajectory: Trajectory, seeds: Sequence[int], spec: Any) -> Tensor:
        place = torch.arange(trajectory.steps)
        open_steps = trajectory.decided & (place != trajectory.last_steps[:, None])
        if self.share == 1:
            return open_steps.float()
        rows = []
        for seed, own in zip(seeds, open_steps, strict=True):
            count = max(1, round(self.share * int(own.sum())))
            draws = torch.rand(trajectory.steps, generator=generator(seed, "steps"))
            rows.append(_largest(draws[None], own[None], count)[0])
        return torch.stack(rows)


def _largest(value: Tensor, active: Tensor, k: int) -> Tensor:
    order = value.masked_fill(~active, -1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (torch.zeros_like(active).scatter_(1, order, True) & active).float()

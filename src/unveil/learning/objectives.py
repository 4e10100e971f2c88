"""How advantages and log-probabilities become a loss: unreduced terms and their weights.

The loss of an update is sum(policy_weight * policy_term + kl_weight * beta * kl_term) over units of items; the KL term
is a regulariser's (``regularisers.py``). Weights carry the whole reduction (who is averaged over what) and are fixed
before the first backward pass, so any split into micro-batches or ranks gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.views import Views
from unveil.registry import Plugin
from unveil.samplers.trajectory import Trajectory

Level = Literal["token", "part", "step", "sequence"]


class Objective(Plugin, family="objective"):
    """Unreduced policy terms of *units*: what one probability ratio covers.

    A unit's log-probability is the sum over its items of coefficient times log-probability (`unit_of`), its weight the
    sum of theirs.
    """

    reads_advantages: ClassVar[bool] = True
    """False if what was good is in the weights alone."""
    level: Level = "token"
    normalise: bool = False
    """Divide a unit's log-probability by its length: the ratio is then a geometric mean (GSPO)."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """Terms (U,) to be minimised, from new and old log-probabilities and advantages of U units."""
        raise NotImplementedError

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Numbers that unmask broken training, for the log: means over units, so that those of parts can be joined."""
        return {}

    def step_diagnostics(
        self, log_prob: Tensor, old: Tensor, advantage: Tensor, step: Tensor
    ) -> dict[str, list[float | None]]:
        """Likewise of every step by itself, where steps are units, from the steps (U,) of the units: any statistic will
        do. None where a step has nothing to say."""
        order, sizes = step.argsort(stable=True), step.bincount().tolist()
        columns = zip(*(column[order].split(sizes) for column in (log_prob, old, advantage)), strict=True)
        said = [self.diagnostics(*own) if len(own[0]) else {} for own in columns]
        return {name: [one.get(name) for one in said] for name in dict.fromkeys(name for one in said for name in one)}


def sum_by(values: Tensor, unit: Tensor, count: int) -> Tensor:
    """(..., count) sums of ``values`` (..., M) over equal ``unit`` (M,)."""
    return values.new_zeros(*values.shape[:-1], count).index_add(-1, unit, values)


def told_by(sums: Tensor, counts: Tensor) -> list[float | None]:
    """Means from sums and counts (S,); None where nothing was counted."""
    means = (sums / counts).tolist()
    return [mean if count else None for mean, count in zip(means, counts.tolist(), strict=True)]


@dataclass(kw_only=True)
class Clipped(Objective, name="clipped"):
    """PPO's clipped ratio: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(new - old)."""

    clip: Annotated[float, Field(gt=0)] = 0.2
    """Half-width of the interval around 1."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """Upper half-width where it differs (clip-higher)."""
    level: Level = "token"
    """What one ratio covers: a token, all tokens of a step and its order by itself (``part``), all items of a step
    (its tokens and the order), or all items of a chain."""
    normalise: bool = False
    """Divide the log-ratio of a step or sequence by its length (GSPO)."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        ratio = (log_prob - old).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + (self.clip_high or self.clip))
        return -torch.minimum(ratio * advantage, clipped * advantage)

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        names, values = self._told(log_prob - old, advantage)
        return dict(zip(names, values.mean(1).tolist(), strict=True))

    def step_diagnostics(
        self, log_prob: Tensor, old: Tensor, advantage: Tensor, step: Tensor
    ) -> dict[str, list[float | None]]:
        """Also mean and deviation of the log-ratio, and which share of the good (``clipped_good``) and of the bad units
        has no gradient any more."""
        difference, units = log_prob - old, step.bincount()
        names, values = self._told(difference, advantage)
        good, bad = ((advantage > 0).to(values), (advantage < 0).to(values))
        sums = sum_by(torch.stack([*values, difference, good, bad]), step, len(units))
        deviation = (difference - (sums[-3] / units)[step]).square()
        told = {name: told_by(own, units) for name, own in zip([*names, "log_ratio_mean"], sums, strict=False)}
        variance = told_by(sum_by(deviation, step, len(units)), units)
        told["log_ratio_std"] = [None if one is None else one**0.5 for one in variance]
        by_name = dict(zip(names, sums, strict=False))
        told["clipped_good"] = told_by(by_name["clip_high"], sums[-2])
        told["clipped_bad"] = told_by(by_name["clip_low"], sums[-1])
        return told

    def _told(self, difference: Tensor, advantage: Tensor) -> tuple[list[str], Tensor]:
        """Names of K numbers, and the numbers (K, U), from log-ratios and advantages of U units."""
        ratio = difference.exp()
        values = {
            "ratio_mean": ratio,
            "ratio_deviation": (ratio - 1).abs(),
            "approx_kl": 0.5 * difference.square(),
            "clip_low": (ratio < 1 - self.clip) & (advantage < 0),
            "clip_high": (ratio > 1 + (self.clip_high or self.clip)) & (advantage > 0),
        }
        return list(values), torch.stack([value.to(ratio) for value in values.values()])


@dataclass(kw_only=True)
class Reinforce(Objective, name="reinforce"):
    """-A log p: the score-function gradient, right for the policy that drew the chains, so for one gradient step."""

    level: Level = "step"
    """What is logged of a ratio belongs to units of this kind; the gradient is the same for all."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return -advantage * log_prob

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        return {"log_prob": log_prob.mean().item()}


def unit_of(views: Views, level: Level) -> tuple[Tensor, int]:
    """The unit (M,) of every item of the views, in row-major order, and how many there are.

    Items of one chain, step and position are one token unit: an estimator shows a token in several views.
    """
    view, column = views.items.nonzero(as_tuple=True)
    if not len(view):
        return view, 0
    key = views.rows[view]
    if level != "sequence":
        key = key * (int(views.steps.max()) + 1) + views.steps[view]
    if level == "token":
        key = key * views.items.shape[1] + column
    if level == "part":
        key = 2 * key + views.parts[column]
    found, unit = key.unique(return_inverse=True)
    return unit, len(found)


class Weighting(Plugin, family="weighting"):
    """The reduction: weights of every item for the policy term and for the KL term."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Trajectory fields that `weights` reads."""
    reads_views: type[Views] = Views
    """The kind of views that `weights` reads."""
    weighs_orders: ClassVar[bool] = True
    """False if it has weights for tokens alone: what a learned rule chose would have none."""
    carries_advantages: ClassVar[bool] = False
    """True if the weights say what was good, so that no objective shall say it again."""

    def weights(
        self, views: Any, advantage: Tensor, trajectory: Any, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        """Two (N, C) tensors, 0 where there is no item.

        ``advantage`` (N,) is that of every view; ``total`` sums a number over all ranks (the identity on one):
        denominators must count the whole update.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class TokenMean(Weighting, name="token_mean"):
    """Mean over all items of the update (diffu-GRPO's released loss)."""

    def weights(
        self, views: Views, advantage: Tensor, trajectory: Trajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        weight = views.items.float() / max(1.0, total(float(views.items.sum())))
        return weight, weight


@dataclass(kw_only=True)
class StepMean(Weighting, name="step_mean"):
    """Mean over the items of a step, then over the chain's views that have any, then over chains (CJ-GRPO,
    2509.23924): every step weighs the same, however many tokens it reveals."""

    def weights(
        self, views: Views, advantage: Tensor, trajectory: Trajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        items = views.items.float()
        count = items.sum(1)
        said = torch.zeros(len(trajectory)).index_add_(0, views.rows, (count > 0).float())
        chains = max(1.0, total(float(len(trajectory))))
        weight = items / count.clamp(min=1)[:, None] / said.clamp(min=1)[views.rows, None] / chains
        return weight, weight


@dataclass(kw_only=True)
class TokenSum(Weighting, name="token_sum"):
    """Sum over the items of a chain, mean over chains: the policy gradient of the whole trajectory."""

    def weights(
        self, views: Views, advantage: Tensor, trajectory: Trajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        weight = views.items.float() / max(1.0, total(float(len(trajectory))))
        return weight, weight


@dataclass(kw_only=True)
class SequenceMean(Weighting, name="sequence_mean"):
    """Every chain weighs the same (GDPO, 2510.08554; GSPO): for objectives with one ratio per sequence.

    The KL term of a chain is the sum over its tokens divided by its length, a token that several views show counting
    once.
    """

    by_length: bool = False
    """Also divide the policy term of every chain by its length."""

    def weights(
        self, views: Views, advantage: Tensor, trajectory: Trajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        items = views.items.float()
        chains = max(1.0, total(float(len(trajectory))))
        per_chain = torch.zeros(len(trajectory)).index_add_(0, views.rows, items.sum(1))
        length = torch.zeros(len(trajectory)).index_add_(0, views.rows, views.length.float()).clamp(min=1e-6)
        unit, count = unit_of(views, "token")
        kl = torch.zeros_like(items)
        kl[views.items] = 1 / unit.bincount(minlength=count)[unit].float()
        kl = kl / length[views.rows, None] / chains
        policy = items / per_chain.clamp(min=1)[views.rows, None] / chains
        return policy / length[views.rows, None] if self.by_length else policy, kl

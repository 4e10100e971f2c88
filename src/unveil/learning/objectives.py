"""How advantages and log-probabilities become a loss: unreduced terms, weights, and what holds the policy back.

The loss of an update is sum(policy_weight * policy_term + kl_weight * beta * kl_term) over all scored tokens. Weights
carry the whole reduction (who is averaged over what) and are fixed before the first backward pass, so any split into
micro-batches or ranks gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.likelihoods import Views
from unveil.registry import Plugin
from unveil.samplers.trajectory import Trajectory


class Objective(Plugin, family="objective"):
    """Unreduced policy terms."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """Terms (M,) to be minimised, from new and old log-probabilities and advantages of M scored tokens."""
        raise NotImplementedError

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Numbers that unmask broken training, for the log."""
        return {}


@dataclass(kw_only=True)
class Clipped(Objective, name="clipped"):
    """PPO's clipped ratio per token: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(new - old)."""

    clip: Annotated[float, Field(gt=0)] = 0.2
    """Half-width of the interval around 1."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """Upper half-width where it differs (clip-higher)."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        ratio = (log_prob - old).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + (self.clip_high or self.clip))
        return -torch.minimum(ratio * advantage, clipped * advantage)

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        ratio = (log_prob - old).exp()
        return {
            "ratio_mean": ratio.mean().item(),
            "ratio_deviation": (ratio - 1).abs().mean().item(),
            "clip_low": ((ratio < 1 - self.clip) & (advantage < 0)).float().mean().item(),
            "clip_high": ((ratio > 1 + (self.clip_high or self.clip)) & (advantage > 0)).float().mean().item(),
        }


@dataclass(kw_only=True)
class Kl:
    """Penalty that keeps the policy near a reference, per scored token; d = log p_ref - log p."""

    beta: Annotated[float, Field(ge=0)] = 0.0
    """Strength; at 0 no reference is evaluated."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 = -d, k2 = d^2 / 2 (its gradient is that of the reverse KL on-policy), k3 = exp(d) - d - 1."""

    def terms(self, log_prob: Tensor, reference: Tensor) -> Tensor:
        """Estimates (M,) of KL(policy || reference), unscaled."""
        difference = reference - log_prob
        if self.estimator == "k1":
            return -difference
        if self.estimator == "k2":
            return 0.5 * difference**2
        return difference.exp() - difference - 1


class Weighting(Plugin, family="weighting"):
    """The reduction: weights of every scored token for the policy term and for the KL term."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Trajectory fields that `weights` reads."""

    def weights(self, views: Views, trajectory: Trajectory, total: Callable[[float], float]) -> tuple[Tensor, Tensor]:
        """Two (N, R) tensors, 0 at unscored positions.

        ``total`` sums a number over all ranks (the identity on one): denominators must count the whole update.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class TokenMean(Weighting, name="token_mean"):
    """Mean over all scored tokens of the update (diffu-GRPO's released loss)."""

    def weights(self, views: Views, trajectory: Trajectory, total: Callable[[float], float]) -> tuple[Tensor, Tensor]:
        weight = views.scored.float() / max(1.0, total(float(views.scored.sum())))
        return weight, weight

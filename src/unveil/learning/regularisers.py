"""What holds a policy back: penalties for being far from a snapshot of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from unveil.learning.objectives import sum_by, unit_of
from unveil.learning.views import Scores, Views
from unveil.registry import Plugin

Towards = Literal["reference", "old", "ema"]


@dataclass(kw_only=True)
class Regulariser(Plugin, family="regulariser", default="kl"):
    """A penalty for the distance of the policy from a snapshot. Both have scored the same views."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Scores` that are read of the snapshot besides the log-probabilities."""
    reads_views: ClassVar[type[Views]] = Views
    """The kind of views that `penalty` reads."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Strength; at 0 no snapshot is evaluated."""
    towards: Towards = "reference"
    """The snapshot that the policy is held to."""

    def penalty(self, views: Any, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled terms (U,) and their weights (U,), whose products are summed.

        ``scores`` are the policy's, ``other`` the snapshot's; ``weight`` (N, C) is that of every item.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Kl(Regulariser, name="kl"):
    """KL(policy || snapshot) estimated from log-probabilities, per token unit; d = log p_snapshot - log p."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 = -d, k2 = d^2 / 2 (its gradient is that of the reverse KL on-policy), k3 = exp(d) - d - 1."""

    def penalty(self, views: Views, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        device = scores.log_prob.device
        items, factors = views.items.to(device), views.factors.to(device)
        unit, count = unit_of(views, "token")
        unit = unit.to(device)
        new, old = ((one.log_prob * factors)[items] for one in (scores, other))
        return self.terms(sum_by(new, unit, count), sum_by(old, unit, count)), sum_by(weight[items], unit, count)

    def terms(self, log_prob: Tensor, reference: Tensor) -> Tensor:
        """Estimates (M,) of KL(policy || reference), unscaled."""
        difference = reference - log_prob
        if self.estimator == "k1":
            return -difference
        if self.estimator == "k2":
            return 0.5 * difference**2
        return difference.exp() - difference - 1


@dataclass(kw_only=True)
class MeanSpace(Regulariser, name="mean_space"):
    """|mean - mean of the snapshot|^2 / (2 std^2) per step of a latent, averaged over dimensions: the KL divergence of
    two Gaussians of one std, divided by their dimensions (Flow-GRPO, arXiv 2505.05470)."""

    reads: ClassVar[frozenset[str]] = frozenset({"mean", "std"})
    rate: bool = False
    """Divide by the noise rate g^2 = std^2 / (t - s) rather than by std^2, as Flow-GRPO's code does: a step then weighs
    by its length."""

    def penalty(self, views: Any, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert scores.mean is not None and scores.std is not None and other.mean is not None
        squares = (scores.mean - other.mean.to(scores.mean.device)).square().flatten(1).mean(1)
        variance = scores.std.to(squares.device) ** 2
        if self.rate:
            variance = variance / (views.ends[:, 0] - views.ends[:, 1]).to(squares.device)
        return squares / (2 * variance), weight.sum(1)


@dataclass(kw_only=True)
class Velocity(Regulariser, name="velocity"):
    """|v - v of the snapshot|^2 averaged over dimensions, v = dx/dt of the probability flow (DiffusionNFT, AWM)."""

    reads: ClassVar[frozenset[str]] = frozenset({"velocity"})

    def penalty(self, views: Any, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert scores.velocity is not None and other.velocity is not None
        difference = scores.velocity - other.velocity.to(scores.velocity.device)
        return difference.square().flatten(1).mean(1), weight.sum(1)


@dataclass(kw_only=True)
class VelocityNorm(Regulariser, name="velocity_norm"):
    """max(0, |v| - |v of the snapshot|)^2 with root mean squares over dimensions: velocities may turn, and not grow.

    Methods that match finished samples push bad ones away, and velocities grow by it; ``velocity_scale`` in the log.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"velocity"})

    def penalty(self, views: Any, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert scores.velocity is not None and other.velocity is not None
        own, held = (one.flatten(1).square().mean(1).sqrt() for one in (scores.velocity, other.velocity))
        return (own - held.to(own.device)).clamp(min=0).square(), weight.sum(1)

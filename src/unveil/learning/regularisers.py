"""What holds a policy back: penalties for being far from a snapshot of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from unveil.learning.objectives import sum_by, unit_of
from unveil.learning.views import Scores, Views
from unveil.registry import Plugin


class Regulariser(Plugin, family="regulariser", default="kl"):
    """A penalty for the distance of the policy from a snapshot. Both have scored the same views."""

    beta: float
    """Strength; at 0 the snapshot is not evaluated."""

    def penalty(self, views: Views, scores: Scores, other: Scores, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled terms (U,) and their weights (U,), whose products are summed.

        ``scores`` are the policy's, ``other`` the snapshot's; ``weight`` (N, C) is that of every item.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Kl(Regulariser, name="kl"):
    """KL(policy || snapshot) estimated from log-probabilities, per token unit; d = log p_snapshot - log p."""

    beta: Annotated[float, Field(ge=0)] = 0.0
    """Strength; at 0 no reference is evaluated."""
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

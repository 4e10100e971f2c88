"""From judged chains to the losses of gradient steps: views, fixed weights, micro-batches, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unveil.learning.likelihoods import without
from unveil.learning.objectives import sum_by, unit_of
from unveil.learning.regularisers import Regulariser
from unveil.learning.views import Inner, Scores, Views
from unveil.training.policy_config import PolicyConfig
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import Trainer


class Means:
    """Running means weighted by counts."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, values: dict[str, float], weight: int) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value * weight, count + weight)

    def means(self) -> dict[str, float]:
        return {name: total / max(1, count) for name, (total, count) in self.sums.items()}


@dataclass(kw_only=True)
class Batch:
    """The views of one gradient step with everything that is fixed before it.

    Attributes:
        views: N of them.
        parts: micro-batches, as (start, end) of neighbouring views.
        advantage: (N,) of every view.
        policy_weight: (N, C) of every item in the policy term.
        kl_weight: (N, C) of every item in the regularisers.
        old: per micro-batch the log-probabilities of the policy that drew the chains; None: it is the present one.
        others: per regulariser and micro-batch what its snapshot says.
        diagnostics: what the gradient step measured.
    """

    views: Views
    parts: list[tuple[int, int]]
    advantage: Tensor
    policy_weight: Tensor
    kl_weight: Tensor
    old: list[Tensor] | None = None
    others: dict[str, list[Scores]] = field(default_factory=dict)
    diagnostics: Means = field(default_factory=Means)


class GradientSteps:
    """Makes and scores batches by one method; ``spent`` counts network evaluations since it was last set to 0."""

    def __init__(self, trainer: Trainer, policy: PolicyConfig) -> None:
        self.trainer, self.policy = trainer, policy
        self.denoiser = trainer.denoiser
        self.spent = 0

    def batch(self, rollouts: Rollouts, advantages: Tensor, chosen: Tensor, inner: Inner, *, keep_old: bool) -> Batch:
        """The batch of one gradient step, before the first of them: the present policy is the one that drew the chains.

        Args:
            advantages: (B, S).
            chosen: (B, S) factors of the steps' weights.
            keep_old: whether ratios will be taken against that policy after it has changed.
        """
        policy, trajectory = self.policy, rollouts.trajectory
        views = policy.likelihood.views(trajectory, chosen, rollouts.seeds, self.denoiser.spec, inner)
        parts = self.parts(views)
        old = None
        weighed = views
        if keep_old or policy.token_filter is not None:
            recorded = policy.likelihood.recorded(views, trajectory) if policy.token_filter is None else None
            if recorded is not None:
                old = [recorded[slice(*part)] for part in parts]
            else:
                scores = self.score_all(views, parts)
                old = [score.log_prob for score in scores]
                if policy.token_filter is not None and scores:
                    entropy = torch.cat([score.entropy for score in scores if score.entropy is not None]).cpu()
                    weighed = without(views, policy.token_filter.keep(views, entropy, trajectory))
        advantage = advantages[views.rows, views.steps]
        policy_weight, kl_weight = policy.weighting.weights(weighed, advantage, trajectory, self.trainer.ranks.total)
        if policy.likelihood.per_step:
            factor = chosen[views.rows, views.steps, None]
            policy_weight, kl_weight = policy_weight * factor, kl_weight * factor
        keeps_ratio = policy.token_filter is not None and policy.token_filter.keeps_ratio
        return Batch(
            views=views if keeps_ratio else weighed,
            parts=parts,
            advantage=advantage,
            policy_weight=policy_weight,
            kl_weight=kl_weight,
            old=old,
        )

    def compare(self, batches: list[Batch]) -> None:
        """Let the snapshots that hold the policy back score the batches."""
        for name, _ in self._regularisers():
            with self.trainer.reference():
                for batch in batches:
                    batch.others[name] = self.score_all(batch.views, batch.parts)

    def losses(self, batch: Batch) -> Iterator[Callable[[], Tensor]]:
        """One closure per micro-batch; their sum is the loss of the gradient step."""
        for number, part in enumerate(batch.parts):
            yield lambda number=number, part=part: self._loss(batch, number, part)  # type: ignore[misc]

    def parts(self, views: Views) -> list[tuple[int, int]]:
        """Micro-batches of neighbouring views, none of which cuts what one ratio covers."""
        if not len(views):
            return []
        whole = views.rows if self.policy.objective.level == "sequence" else views.rows * (1 << 32) + views.steps
        first = (whole[1:] != whole[:-1]).nonzero().flatten() + 1
        borders = [0, *first.tolist(), len(views)]
        size = self.trainer.optim.microbatch
        parts, start = [], 0
        for border, after in zip(borders[1:], [*borders[2:], None], strict=True):
            if after is None or after - start > size:
                parts.append((start, border))
                start = border
        return parts

    @torch.no_grad()
    def score_all(self, views: Views, parts: list[tuple[int, int]]) -> list[Scores]:
        """The items of every micro-batch, by the same calls that training makes."""
        self.denoiser.train()
        with self.trainer.autocast():
            return [self.score(views.slice(*part)) for part in parts]

    def score(self, views: Views) -> Scores:
        """The items of some views by the network as it is."""
        scores = self.policy.likelihood.score(self.denoiser, views, self.policy.rollout.sampler)
        self.spent += scores.forwards
        return scores

    def _regularisers(self) -> list[tuple[str, Regulariser]]:
        """Those that are in force, by their name in the log."""
        return [("kl", self.policy.kl)] if self.policy.kl.beta > 0 else []

    def _loss(self, batch: Batch, number: int, part: tuple[int, int]) -> Tensor:
        views, objective = batch.views.slice(*part), self.policy.objective
        scores = self.score(views)
        device = scores.log_prob.device
        items, factors = views.items.to(device), views.factors.to(device)

        def weighted(log_prob: Tensor) -> Tensor:
            return (log_prob * factors)[items]

        def per_item(value: Tensor) -> Tensor:
            return value[slice(*part)].to(device)[items]

        log_prob = weighted(scores.log_prob)
        old = weighted(batch.old[number].to(device)) if batch.old is not None else log_prob.detach()
        unit, count = unit_of(views, objective.level)
        unit = unit.to(device)
        view = views.items.nonzero(as_tuple=True)[0].to(device)
        advantage = torch.zeros(count, device=device)
        advantage[unit] = batch.advantage[slice(*part)].to(device)[view]  # the same for all items of a unit
        new, before = sum_by(log_prob, unit, count), sum_by(old, unit, count)
        if objective.normalise:
            share = views.length.to(device) / items.sum(1).clamp(min=1)
            length = sum_by(share[view], unit, count)
            new, before = new / length, before / length
        terms = objective.terms(new, before, advantage)
        loss = (sum_by(per_item(batch.policy_weight), unit, count) * terms).sum()
        if count:  # a micro-batch may hold nothing that counts
            if scores.entropy is not None:
                batch.diagnostics.add({"entropy": scores.entropy[items].mean().item()}, len(log_prob))
            batch.diagnostics.add(objective.diagnostics(new.detach(), before, advantage), count)
        for name, regulariser in self._regularisers():
            weight = batch.kl_weight[slice(*part)].to(device)
            distance, weight = regulariser.penalty(views, scores, batch.others[name][number], weight)
            loss = loss + regulariser.beta * (weight * distance).sum()
            if len(distance):
                batch.diagnostics.add({name: distance.detach().mean().item()}, len(distance))
        return loss

"""From judged chains to the losses of gradient steps: views, fixed weights, micro-batches, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unveil.learning.likelihoods import without
from unveil.learning.objectives import sum_by, unit_of
from unveil.learning.views import Asked, Inner, Scores, Views
from unveil.training.distribution import Ranks
from unveil.training.policy_config import PolicyConfig
from unveil.training.rewarding import about
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

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Over all ranks."""
        whole = Means()
        for sums in ranks.gather(self.sums):
            for name, (total, count) in sums.items():
                before = whole.sums.get(name, (0.0, 0))
                whole.sums[name] = (before[0] + total, before[1] + count)
        return {name: total / max(1, count) for name, (total, count) in whole.sums.items()}


@dataclass(kw_only=True)
class Batch:
    """The views of one gradient step with everything that is fixed before it.

    Attributes:
        views: N of them.
        parts: micro-batches, as (start, end) of neighbouring views.
        advantage: (N,) of every view.
        policy_weight: (N, C) of every item in the policy term.
        kl_weight: (N, C) of every item in the regularisers.
        old: per micro-batch what the policy that drew the chains says; None: it is the present one.
        others: per regulariser and micro-batch what its snapshot says.
        diagnostics: what the gradient step measured.
        units: per micro-batch the step, new and old log-probability and advantage of its units, where steps are units.
        measures: per micro-batch the steps (N,) of its views, and numbers (N,) that the likelihood tells of them.
    """

    views: Views
    parts: list[tuple[int, int]]
    advantage: Tensor
    policy_weight: Tensor
    kl_weight: Tensor
    old: list[Scores] | None = None
    others: dict[str, list[Scores]] = field(default_factory=dict)
    diagnostics: Means = field(default_factory=Means)
    units: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    measures: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)


class GradientSteps:
    """Makes and scores batches by one method; ``spent`` counts network evaluations since it was last set to 0,
    ``reward`` is that of the present update."""

    def __init__(self, trainer: Trainer, policy: PolicyConfig) -> None:
        self.trainer, self.policy = trainer, policy
        self.denoiser = trainer.denoiser
        self.spent, self.reward = 0, policy.reward

    def batch(self, rollouts: Rollouts, advantages: Tensor, chosen: Tensor, inner: Inner, *, keep_old: bool) -> Batch:
        """The batch of one gradient step, before the first of them: the present policy is the one that drew the chains.

        Args:
            advantages: (B, S).
            chosen: (B, S) factors of the steps' weights.
            keep_old: whether ratios will be taken against that policy after it has changed.
        """
        policy, trajectory, likelihood = self.policy, rollouts.trajectory, self.policy.likelihood
        views = likelihood.views(trajectory, chosen, rollouts.seeds, self.denoiser.spec, inner)
        views = likelihood.rewarded(views, self._asked(rollouts))
        parts = self.parts(views)
        old = None
        weighed = views
        recorded = policy.likelihood.recorded(views, trajectory)
        if recorded is not None:
            old = [Scores(log_prob=recorded[slice(*part)], forwards=0) for part in parts]
        elif keep_old or policy.token_filter is not None or likelihood.reads_old:
            with self.trainer.using(policy.rollout.drawn_by):
                scores = self.score_all(views, parts)
            old = [score.only(likelihood.reads_old) for score in scores]
            if policy.token_filter is not None and scores:
                entropy = torch.cat([score.entropy for score in scores if score.entropy is not None]).cpu()
                weighed = without(views, policy.token_filter.keep(views, entropy, trajectory))
        advantage = advantages[views.rows, views.steps]
        policy_weight, kl_weight = policy.weighting.weights(weighed, advantage, trajectory, self.trainer.ranks.total)
        if policy.likelihood.per_step:
            factor = chosen[views.rows, views.steps, None]
            policy_weight, kl_weight = policy_weight * factor, kl_weight * factor
        if rollouts.gate is not None:
            kl_weight = kl_weight * rollouts.gate[views.rows, None]
        keeps_ratio = policy.token_filter is not None and policy.token_filter.keeps_ratio
        return Batch(
            views=views if keeps_ratio else weighed,
            parts=parts,
            advantage=advantage,
            policy_weight=policy_weight,
            kl_weight=kl_weight,
            old=old,
        )

    def _asked(self, rollouts: Rollouts) -> Asked:
        problems, verdicts = rollouts.problems, rollouts.judged.verdicts
        return Asked(
            reward=self.reward,
            prompts=[problem.prompt for problem in problems],
            metadata=[
                about(problem, verdict.correct, verdict.score, verdict.metrics)
                for problem, verdict in zip(problems, verdicts, strict=True)
            ],
        )

    def compare(self, batches: list[Batch]) -> None:
        """Let the snapshots that hold the policy back score the batches."""
        in_force = self.policy.in_force
        for snapshot in dict.fromkeys(one.towards for one in in_force.values()):
            own = {name: one.reads for name, one in in_force.items() if one.towards == snapshot}
            with self.trainer.using(snapshot):
                for batch in batches:
                    scores = self.score_all(batch.views, batch.parts)
                    for name, reads in own.items():
                        batch.others[name] = [one.only(reads) for one in scores]

    def losses(self, batch: Batch) -> Iterator[Callable[[], Tensor]]:
        """One closure per micro-batch; their sum is the loss of the gradient step."""
        for number, part in enumerate(batch.parts):
            yield lambda number=number, part=part: self._loss(batch, number, part)  # type: ignore[misc]

    def measured(self, batch: Batch) -> dict[str, Any]:
        """What the last gradient step on a batch measured, over all ranks; where steps are units, and what likelihoods
        tell of their views, also step by step, as lists (None at steps that were not trained)."""
        ranks, objective = self.trainer.ranks, self.policy.objective
        values: dict[str, Any] = batch.diagnostics.means(ranks)
        units = [unit for part in ranks.gather(batch.units) for unit in part]
        if units:
            step, *rest = (torch.cat(column) for column in zip(*units, strict=True))
            names = list(objective.step_diagnostics(*rest))
            for number in range(int(step.max()) + 1):
                own = step == number
                said = objective.step_diagnostics(*(column[own] for column in rest)) if own.any() else {}
                for name in names:
                    values.setdefault(f"steps/{name}", []).append(said.get(name))
        measures = [measure for part in ranks.gather(batch.measures) for measure in part]
        if measures:
            step = torch.cat([steps for steps, _ in measures])
            for name in measures[0][1]:
                value = torch.cat([own[name] for _, own in measures])
                sums, counts = sum_by(value, step, int(step.max()) + 1), step.bincount()
                values[name] = value.mean().item()
                means = [own.item() if count else None for own, count in zip(sums / counts, counts, strict=True)]
                values[f"steps/{name}"] = means
        batch.diagnostics, batch.units, batch.measures = Means(), [], []
        return values

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

    def _loss(self, batch: Batch, number: int, part: tuple[int, int]) -> Tensor:
        views, objective = batch.views.slice(*part), self.policy.objective
        scores = self.score(views)
        before_it = None if batch.old is None else batch.old[number]
        if before_it is not None:
            scores = self.policy.likelihood.against(scores, before_it, views)
            if said := self.policy.likelihood.measures(scores, before_it, views, self.denoiser.spec):
                batch.measures.append((views.steps, {name: value.cpu() for name, value in said.items()}))
        device = scores.log_prob.device
        items, factors = views.items.to(device), views.factors.to(device)
        place = items.nonzero(as_tuple=True)

        def weighted(log_prob: Tensor) -> Tensor:
            return (log_prob * factors)[place]

        def per_item(value: Tensor) -> Tensor:
            return value[slice(*part)].to(device)[place]

        log_prob = weighted(scores.log_prob)
        old = log_prob.detach() if before_it is None else weighted(before_it.log_prob.to(device))
        unit, count = unit_of(views, objective.level)
        unit = unit.to(device)
        view = place[0]
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
            if scores.velocity is not None:
                scale = scores.velocity.detach().flatten(1).square().mean(1).sqrt().mean().item()
                batch.diagnostics.add({"velocity_scale": scale}, len(views))
            batch.diagnostics.add(objective.diagnostics(new.detach(), before, advantage), count)
            if views.steps_are_units:
                batch.units.append(tuple(one.detach().cpu() for one in (views.steps, new, before, advantage)))  # type: ignore[arg-type]
        for name, regulariser in self.policy.in_force.items():
            weight = batch.kl_weight[slice(*part)].to(device)
            distance, weight = regulariser.penalty(views, scores, batch.others[name][number], weight)
            loss = loss + regulariser.beta * (weight * distance).sum()
            held = distance.detach()[weight > 0]  # what a gate lets go is no part of the mean
            if len(held):
                batch.diagnostics.add({name: held.mean().item()}, len(held))
        return loss

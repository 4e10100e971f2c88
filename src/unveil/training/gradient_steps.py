"""From judged chains to the losses of gradient steps: views, fixed weights, micro-batches, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unveil.learning.likelihoods import without
from unveil.learning.objectives import sum_by, told_by, unit_of
from unveil.learning.views import Asked, Inner, Scores, Views
from unveil.training.distribution import Ranks
from unveil.training.policy_config import PolicyConfig
from unveil.training.rewarding import asked_about
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


@dataclass
class Units:
    """The U units of a micro-batch and their M items: where they are, and what is fixed before the gradient step.

    Attributes:
        place: the view and the column (M,) of every item.
        factor: (M,) of every item's log-probability in the sum.
        unit: (M,) that every item belongs to.
        single: whether all is items, and each a unit of its own.
        advantage: (U,).
        weight: (U,) in the policy term.
        old: (U,) log-probability by the policy that drew the chains; None: it is the present one.
        length: (U,) that log-probabilities are divided by; None: they are sums.
    """

    place: tuple[Tensor, Tensor]
    factor: Tensor
    unit: Tensor
    single: bool
    advantage: Tensor
    weight: Tensor
    old: Tensor | None
    length: Tensor | None

    def __len__(self) -> int:
        return self.advantage.shape[0]

    def log_prob(self, items: Tensor) -> Tensor:
        """(U,) of the items' (N, C)."""
        if self.single:
            total = items.flatten()
        else:
            total = sum_by(items[self.place] * self.factor, self.unit, len(self))
        return total if self.length is None else total / self.length


@dataclass(kw_only=True)
class Batch:
    """The views of one gradient step with everything that is fixed before it.

    Attributes:
        views: N of them.
        parts: micro-batches, as (start, end) of neighbouring views.
        pieces: the views of every micro-batch.
        units: those of every micro-batch.
        kl_weight: (N, C) of every item in the regularisers.
        old: per micro-batch what the policy that drew the chains says; None: it is the present one.
        others: per regulariser and micro-batch what its snapshot says.
        diagnostics: what the gradient step measured.
        told: per micro-batch new and old log-probability and advantage of its units.
        scales: per micro-batch the scale (N,) of the network's velocity.
        measures: per micro-batch the steps (N,) of its views, and numbers (N,) that the likelihood tells of them.
    """

    views: Views
    parts: list[tuple[int, int]]
    pieces: list[Views]
    units: list[Units]
    kl_weight: Tensor
    old: list[Scores] | None = None
    others: dict[str, list[Scores]] = field(default_factory=dict)
    diagnostics: Means = field(default_factory=Means)
    told: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
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
        if likelihood.differentiates:
            prompts, metadata = asked_about(rollouts.problems, rollouts.judged)
            views = likelihood.rewarded(views, Asked(reward=self.reward, prompts=prompts, metadata=metadata))
        parts = self.parts(views)
        pieces = [views.slice(*part) for part in parts]
        old = None
        weighed = views
        recorded = policy.likelihood.recorded(views, trajectory)
        if recorded is not None:
            old = [Scores(log_prob=recorded[slice(*part)], forwards=0) for part in parts]
        elif keep_old or policy.token_filter is not None or likelihood.reads_old:
            with self.trainer.using(policy.rollout.drawn_by):
                scores = self.score_all(pieces)
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
        if policy.token_filter is not None and not policy.token_filter.keeps_ratio:
            views, pieces = weighed, [weighed.slice(*part) for part in parts]
        return Batch(
            views=views,
            parts=parts,
            pieces=pieces,
            units=self._units(views, parts, advantage, policy_weight, old),
            kl_weight=kl_weight,
            old=old,
        )

    def compare(self, batches: list[Batch]) -> None:
        """Let the snapshots that hold the policy back score the batches."""
        in_force = self.policy.in_force
        for snapshot in dict.fromkeys(one.towards for one in in_force.values()):
            own = {name: one.reads for name, one in in_force.items() if one.towards == snapshot}
            with self.trainer.using(snapshot):
                for batch in batches:
                    scores = self.score_all(batch.pieces)
                    for name, reads in own.items():
                        batch.others[name] = [one.only(reads) for one in scores]

    def losses(self, batch: Batch) -> Iterator[Callable[[], Tensor]]:
        """One closure per micro-batch; their sum is the loss of the gradient step."""
        for number in range(len(batch.parts)):
            yield lambda number=number: self._loss(batch, number)  # type: ignore[misc]

    def measured(self, batch: Batch) -> dict[str, Any]:
        """What the last gradient step on a batch measured, over all ranks; where steps are units, and what likelihoods
        tell of their views, also step by step, as lists (None at steps that were not trained)."""
        ranks, objective = self.trainer.ranks, self.policy.objective
        told = [torch.cat(column).cpu() for column in zip(*batch.told, strict=True)]
        if told:  # else nothing counts
            batch.diagnostics.add(objective.diagnostics(*told), len(told[0]))
        if batch.scales:
            scales = torch.cat(batch.scales)
            batch.diagnostics.add({"velocity_scale": scales.mean().item()}, len(scales))
        values: dict[str, Any] = batch.diagnostics.means(ranks)
        units = ranks.gather([batch.views.steps, *told] if told and batch.views.steps_are_units else [])
        if units := [own for own in units if own]:
            step, new, old, advantage = (torch.cat(column) for column in zip(*units, strict=True))
            said = objective.step_diagnostics(new, old, advantage, step)
            values |= {f"steps/{name}": own for name, own in said.items()}
        measures = [measure for part in ranks.gather(batch.measures) for measure in part]
        if measures:
            step = torch.cat([steps for steps, _ in measures])
            for name in measures[0][1]:
                value = torch.cat([own[name] for _, own in measures])
                counts = step.bincount()
                values[name] = value.mean().item()
                values[f"steps/{name}"] = told_by(sum_by(value, step, len(counts)), counts)
        batch.diagnostics, batch.told, batch.scales, batch.measures = Means(), [], [], []
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

    def _units(
        self,
        views: Views,
        parts: list[tuple[int, int]],
        advantage: Tensor,
        weight: Tensor,
        old: list[Scores] | None,
    ) -> list[Units]:
        """The units of every micro-batch, from advantages (N,) of the views and weights (N, C) of the items."""
        if not parts:
            return []
        items, device = views.items, self.denoiser.device
        view, column = items.nonzero(as_tuple=True)
        unit, count = unit_of(views, self.policy.objective.level)
        starts = torch.tensor([start for start, _ in parts])
        part = torch.searchsorted(starts, view, right=True) - 1
        found, unit = (part * count + unit).unique(return_inverse=True)  # those of a part are neighbours
        sizes = part.bincount(minlength=len(parts)).tolist()
        units = (found // max(1, count)).bincount(minlength=len(parts)).tolist()
        first = torch.tensor([0, *units]).cumsum(0)
        good = torch.zeros(len(found))
        good[unit] = advantage[view]  # the same for all items of a unit
        length: list[Any] = [None] * len(parts)
        if self.policy.objective.normalise:
            share = views.length / items.sum(1).clamp(min=1)
            length = list(sum_by(share[view], unit, len(found)).to(device).split(units))
        factor = views.factors.expand(items.shape)[items]
        single = bool(items.all() and (factor == 1).all()) and torch.equal(unit, torch.arange(len(unit)))
        per_item = (view - starts[part], column, factor, unit - first[part])
        per_unit = (good, sum_by(weight[items], unit, len(found)))
        columns = zip(
            *(value.to(device).split(sizes) for value in per_item),
            *(value.to(device).split(units) for value in per_unit),
            length,
            strict=True,
        )
        laid = [
            Units((row, at), factor, one, single, own, whole, None, size)
            for row, at, factor, one, own, whole, size in columns
        ]
        if old is not None:
            for one, said in zip(laid, old, strict=True):
                one.old = one.log_prob(said.log_prob.to(device))
        return laid

    @torch.no_grad()
    def score_all(self, pieces: list[Views]) -> list[Scores]:
        """The items of every micro-batch, by the same calls that training makes."""
        self.denoiser.train()
        with self.trainer.autocast():
            return [self.score(piece) for piece in pieces]

    def score(self, views: Views, old: Scores | None = None) -> Scores:
        """The items of some views by the network as it is; ``old`` for likelihoods that read it."""
        how = {} if old is None else {"old": old}
        scores = self.policy.likelihood.score(self.denoiser, views, self.policy.rollout.sampler, **how)
        self.spent += scores.forwards
        return scores

    def _loss(self, batch: Batch, number: int) -> Tensor:
        views, units, objective = batch.pieces[number], batch.units[number], self.policy.objective
        likelihood, before_it = self.policy.likelihood, None if batch.old is None else batch.old[number]
        scores = self.score(views, before_it if likelihood.reads_old else None)
        if before_it is not None and (said := likelihood.measures(scores, before_it, views, self.denoiser.spec)):
            batch.measures.append((views.steps, {name: value.cpu() for name, value in said.items()}))
        new = units.log_prob(scores.log_prob)
        old = new.detach() if units.old is None else units.old
        loss = (units.weight * objective.terms(new, old, units.advantage)).sum()
        if len(units):  # a micro-batch may hold nothing that counts
            if scores.entropy is not None:
                batch.diagnostics.add({"entropy": scores.entropy[units.place].mean().item()}, len(units.unit))
            if scores.velocity is not None:
                batch.scales.append(scores.velocity.detach().flatten(1).square().mean(1).sqrt())
            batch.told.append((new.detach(), old, units.advantage))
        for name, regulariser in self.policy.in_force.items():
            weight = batch.kl_weight[slice(*batch.parts[number])].to(loss.device)
            distance, weight = regulariser.penalty(views, scores, batch.others[name][number], weight)
            loss = loss + regulariser.beta * (weight * distance).sum()
            held = distance.detach()[weight > 0]  # what a gate lets go is no part of the mean
            if len(held):
                batch.diagnostics.add({name: held.mean().item()}, len(held))
        return loss

"""Policy optimisation: rollout -> reward -> advantage -> steps -> views -> loss. The job whose update is one batch of
rollouts and the gradient steps on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.advantages import Advantage, GroupAdvantage, terminal
from unveil.learning.likelihoods import Likelihood, TrajectoryLikelihood, Views
from unveil.learning.objectives import Clipped, Kl, Objective, TokenMean, Weighting
from unveil.learning.scoring import score_tokens
from unveil.learning.selectors import AllSteps, Selector
from unveil.registry import Plugin, UserError
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.text import encode_prompts
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import Judged, evaluate, judge, over_denoised, sample_problems
from unveil.training.log import RunLog
from unveil.training.records import sample_records, trajectory_records
from unveil.training.trainer import Optimise, Trainer


class ProblemFilter(Plugin, family="filter"):
    """Chooses the problems of an epoch by what the present policy does with them."""

    pool: Annotated[int, Field(ge=1)]
    """Candidates per epoch."""
    every: Annotated[int, Field(ge=1)]
    """Updates per epoch."""
    decoder: MaskedSampler
    """How candidates are decoded."""

    def keep(self, judged: Judged) -> Tensor:
        """(B,) True at problems to train on."""
        raise NotImplementedError


@dataclass(kw_only=True)
class RolloutConfig:
    """How samples are drawn for training."""

    sampler: MaskedSampler
    """The decoder; its temperature is also that of the log-probabilities."""
    response_length: Annotated[int, Field(ge=1)] = 12
    """Response positions."""
    prompts: Annotated[int, Field(ge=1)] = 16
    """Problems per update."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts per problem: one group."""
    block_lengths: list[int] = field(default_factory=list)
    """If given, every update draws one of these block lengths for all its rollouts (MDPO's mixture)."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Rows per network call."""


@dataclass(kw_only=True)
class PolicyConfig:
    """A method: five small choices and the task that they are made for."""

    task: Task
    """Problems and verifier."""
    reward: Literal["correct", "score"] = "correct"
    """1 for a solved problem and 0 otherwise, or the task's shaped score. Both are always logged."""
    rollout: RolloutConfig
    """How samples are drawn."""
    filter: ProblemFilter | None = None
    """Which problems are worth training on; None: all."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """What was good."""
    selector: Selector = field(default_factory=AllSteps)
    """Which steps are trained on (for likelihoods that have steps)."""
    likelihood: Likelihood = field(default_factory=TrajectoryLikelihood)
    """What stands in for log p."""
    objective: Objective = field(default_factory=Clipped)
    """How it becomes a loss."""
    weighting: Weighting = field(default_factory=TokenMean)
    """Who is averaged over what."""
    kl: Kl = field(default_factory=Kl)
    """What holds the policy back."""
    inner_updates: Annotated[int, Field(ge=1)] = 1
    """Gradient steps on the same rollouts, with stored old log-probabilities."""


@dataclass(kw_only=True)
class PolicyEval:
    """How progress is measured: held-out problems, decoded greedily."""

    every: Annotated[int, Field(ge=1)] = 25
    """Updates between two evaluations."""
    problems: Annotated[int, Field(ge=1)] = 512
    """Held-out problems."""
    decoders: dict[str, MaskedSampler]
    """Named ways to decode."""
    shown: Annotated[int, Field(ge=0)] = 8
    """Problems whose completions and trajectories are kept for the report, the same at every evaluation."""


class PolicyJob:
    """One update: rollouts of ``prompts`` groups, then ``inner_updates`` gradient steps."""

    def __init__(
        self, trainer: Trainer, policy: PolicyConfig, evaluation: PolicyEval, log: RunLog, *, seed: int
    ) -> None:
        self.trainer, self.policy, self.evaluation, self.log, self.seed = (
            trainer,
            policy,
            evaluation,
            log,
            seed,
        )
        self.denoiser = trainer.denoiser
        rollout = policy.rollout
        for sampler in [*self._training_samplers(), *evaluation.decoders.values()]:
            sampler.check_fits(rollout.response_length)
        if rollout.sampler.temperature == 0:
            raise UserError(
                "policy.rollout.sampler.temperature: should be greater than 0, got 0 (a group would be all equal)"
            )
        self.held_out = policy.task.problems("test", evaluation.problems, 0)
        longest = max(len(ids) for ids in encode_prompts(self.denoiser, [p.prompt for p in self.held_out]))
        if longest + rollout.response_length > self.denoiser.spec.context_length:
            raise UserError(
                f"policy.rollout.response_length: {rollout.response_length} and prompts of up to {longest} tokens "
                f"do not fit the model's canvas (at most {self.denoiser.spec.context_length} tokens)"
            )
        if rollout.prompts < trainer.ranks.world:
            raise UserError(
                f"policy.rollout.prompts: {rollout.prompts} are fewer than the {trainer.ranks.world} processes"
            )
        self.pool: list[Problem] = []
        self.scored = 0

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        problems = self.trainer.ranks.share(self._problems(update))
        group_size = self.policy.rollout.group_size
        rows = [problem for problem in problems for _ in range(group_size)]
        group = torch.arange(len(problems)).repeat_interleave(group_size)
        trajectory = self._rollout(rows, update)
        judged = judge(self.policy.task, rows, self.denoiser, trajectory)
        rewards = self._rewards(judged, trajectory)
        advantages = self.policy.advantage.advantages(rewards, trajectory.active, group)
        seeds = [
            derive_seed(self.seed, "chain", update, problem.id, row % group_size) for row, problem in enumerate(rows)
        ]
        chosen = trajectory.active
        if self.policy.likelihood.per_step:
            chosen = self.policy.selector.choose(advantages, trajectory.active, seeds)
        inner = self.policy.inner_updates
        batches = [self._batch(trajectory, advantages, chosen, seeds, number) for number in range(inner)]
        if inner > 1:
            for batch in batches:  # before the first gradient step: the policy that drew the rollouts
                batch.old = self._score_all(batch)
        if self.policy.kl.beta > 0:
            with self.trainer.reference():
                for batch in batches:
                    batch.reference = self._score_all(batch)
        metrics: dict[str, Any] = {}
        for batch in batches:
            metrics = optimise(self._losses(batch))
            metrics |= batch.diagnostics.means()
        self.trainer.cost.forwards += round(self.trainer.ranks.total(self.scored))
        self.scored = 0
        return self._metrics(rewards, judged, trajectory, advantages) | metrics

    def evaluate(self, update: int) -> None:
        length = self.policy.rollout.response_length
        shown = self.held_out[: self.evaluation.shown]
        for name, sampler in self.evaluation.decoders.items():
            with self.trainer.evaluated():
                result = evaluate(
                    self.denoiser,
                    self.policy.task,
                    self.held_out,
                    sampler,
                    response_length=length,
                    seed=self.seed,
                )
                if not self.trainer.ranks.main:
                    continue
                self.log.metrics("eval", update, {"decoder": name, **result.summary()})
                mark = {"step": update, "decoder": name}
                self.log.lines("samples.jsonl", sample_records(shown, result, mark))
                records = trajectory_records(self.denoiser, self.policy.task, shown, sampler, length, mark)
                self.log.lines("trajectories.jsonl", records)

    def state_dict(self) -> dict[str, Any]:
        return {"pool": [vars(problem) | {"answer": dict(problem.answer)} for problem in self.pool]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool = [Problem(**problem) for problem in state["pool"]]

    def _training_samplers(self) -> list[MaskedSampler]:
        rollout = self.policy.rollout
        lengths: list[int | None] = [*rollout.block_lengths] or [rollout.sampler.block_length]
        own = [replace(rollout.sampler, block_length=length) for length in lengths]
        return own + ([self.policy.filter.decoder] if self.policy.filter else [])

    def _problems(self, update: int) -> list[Problem]:
        """The problems of an update, the same on all ranks."""
        count, choice = self.policy.rollout.prompts, self.policy.filter
        if choice is None:
            return self.policy.task.problems("train", count, derive_seed(self.seed, "problems", update))
        epoch, place = divmod(update, choice.every)
        if place == 0 or not self.pool:
            self.pool = self._filtered(choice, epoch)
        order = torch.randperm(len(self.pool), generator=generator(self.seed, "order", update)).tolist()
        count = min(count, max(len(order), self.trainer.ranks.world))  # every rank needs a problem
        return [self.pool[order[index % len(order)]] for index in range(count)]

    def _filtered(self, choice: ProblemFilter, epoch: int) -> list[Problem]:
        candidates = self.policy.task.problems("train", choice.pool, derive_seed(self.seed, "pool", epoch))
        trajectory = sample_problems(
            self.denoiser, candidates, choice.decoder, response_length=self.policy.rollout.response_length,
            seed=self.seed, needs={"guesses"}, batch_size=self.policy.rollout.batch_size,
        )  # fmt: skip
        self.trainer.cost.forwards += trajectory.forwards
        keep = choice.keep(judge(self.policy.task, candidates, self.denoiser, trajectory)).tolist()
        kept = [problem for problem, keeps in zip(candidates, keep, strict=True) if keeps]
        return kept or candidates

    def _rollout(self, rows: list[Problem], update: int) -> Trajectory:
        rollout = self.policy.rollout
        sampler = rollout.sampler
        if rollout.block_lengths:
            pick = derive_seed(self.seed, "block length", update) % len(rollout.block_lengths)
            sampler = replace(sampler, block_length=rollout.block_lengths[pick])
        needs = set(self.policy.likelihood.needs | self.policy.weighting.needs)
        if self.policy.advantage.reads_guesses:
            needs.add("guesses")
        trajectory = sample_problems(
            self.denoiser, rows, sampler, response_length=rollout.response_length,
            seed=derive_seed(self.seed, "rollout", update), needs=needs, batch_size=rollout.batch_size,
        )  # fmt: skip
        cost = self.trainer.cost
        cost.rollouts += round(self.trainer.ranks.total(len(rows)))
        cost.samples = cost.rollouts
        cost.forwards += round(self.trainer.ranks.total(trajectory.forwards))
        return trajectory

    def _rewards(self, judged: Judged, trajectory: Trajectory) -> Tensor:
        """(B, S) rewards; without guesses only the last active step is known."""
        if judged.guess_correct is not None and judged.guess_score is not None:
            return judged.guess_correct.float() if self.policy.reward == "correct" else judged.guess_score.float()
        values = [float(v.correct if self.policy.reward == "correct" else v.score) for v in judged.verdicts]
        rewards = torch.zeros(trajectory.active.shape)
        return rewards.scatter_(1, trajectory.last_steps[:, None], torch.tensor(values)[:, None])

    def _batch(
        self, trajectory: Trajectory, advantages: Tensor, chosen: Tensor, seeds: list[int], inner: int
    ) -> _Batch:
        own = [derive_seed(seed, inner) for seed in seeds]
        views = self.policy.likelihood.views(trajectory, chosen, own, self.denoiser.spec)
        policy_weight, kl_weight = self.policy.weighting.weights(views, trajectory, self.trainer.ranks.total)
        return _Batch(
            views=views,
            advantage=advantages[views.rows, views.steps],
            policy_weight=policy_weight,
            kl_weight=kl_weight,
        )

    def _parts(self, batch: _Batch) -> Iterator[tuple[int, int]]:
        size = self.trainer.optim.microbatch
        for start in range(0, len(batch.views), size):
            yield start, min(start + size, len(batch.views))

    @torch.no_grad()
    def _score_all(self, batch: _Batch) -> list[Tensor]:
        """Log-probabilities of every micro-batch's scored tokens, by the same calls that training makes."""
        self.denoiser.train()
        with self.trainer.autocast():
            return [self._score(batch.views.slice(*part))[0] for part in self._parts(batch)]

    def _score(self, views: Views) -> tuple[Tensor, Tensor]:
        """Log-probabilities (M,) and entropies (M,) of the scored tokens of some views."""
        device = self.denoiser.device
        self.scored += len(views)
        features = self.denoiser.features(views.ids.to(device), views.valid.to(device))
        row, column = (index.to(device) for index in views.scored.nonzero(as_tuple=True))
        targets = views.targets.to(device)[row, column]
        return score_tokens(
            self.denoiser,
            features[row, views.prompt_width + column],
            targets,
            self.policy.rollout.sampler.temperature,
            entropy=True,
        )

    def _losses(self, batch: _Batch) -> Iterator[Callable[[], Tensor]]:
        for number, part in enumerate(self._parts(batch)):
            yield lambda number=number, part=part: self._loss(batch, number, part)  # type: ignore[misc]

    def _loss(self, batch: _Batch, number: int, part: tuple[int, int]) -> Tensor:
        views = batch.views.slice(*part)
        log_prob, entropy = self._score(views)
        old = batch.old[number] if batch.old is not None else log_prob.detach()
        scored = views.scored
        device = log_prob.device
        advantage = batch.advantage[slice(*part), None].expand_as(scored)[scored].to(device)
        weight = batch.policy_weight[slice(*part)][scored].to(device)
        terms = self.policy.objective.terms(log_prob, old, advantage)
        loss = (weight * terms).sum()
        if len(log_prob):  # a step that revealed nothing can be alone in its micro-batch
            batch.diagnostics.add({"entropy": entropy.mean().item()}, len(log_prob))
            batch.diagnostics.add(self.policy.objective.diagnostics(log_prob.detach(), old, advantage), len(log_prob))
        if batch.reference is not None:
            kl = self.policy.kl.terms(log_prob, batch.reference[number])
            loss = loss + self.policy.kl.beta * (batch.kl_weight[slice(*part)][scored].to(device) * kl).sum()
            if len(log_prob):
                batch.diagnostics.add({"kl": kl.detach().mean().item()}, len(log_prob))
        return loss

    def _metrics(self, rewards: Tensor, judged: Judged, trajectory: Trajectory, advantages: Tensor) -> dict[str, Any]:
        final = terminal(rewards, trajectory.active).view(-1, self.policy.rollout.group_size)
        active = trajectory.active
        values: dict[str, Any] = {
            "reward": final.mean().item(),
            "accuracy": sum(v.correct for v in judged.verdicts) / len(judged.verdicts),
            "score": sum(v.score for v in judged.verdicts) / len(judged.verdicts),
            "group_reward_std": final.std(1).mean().item(),
            "zero_variance_groups": (final.amax(1) == final.amin(1)).float().mean().item(),
            "advantage_abs": (advantages.abs().sum() / active.sum().clamp(min=1)).item(),
            "rollouts": self.trainer.cost.rollouts,
            "optimizer_steps": self.trainer.cost.optimizer_steps,
        }
        if judged.guess_correct is not None:
            values["over_denoising"] = over_denoised(judged).float().mean().item()
            values["guess_accuracy"] = (judged.guess_correct.sum(0) / active.sum(0).clamp(min=1)).tolist()
        return values


class _Means:
    """Running means weighted by token counts."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, values: dict[str, float], weight: int) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value * weight, count + weight)

    def means(self) -> dict[str, float]:
        return {name: total / max(1, count) for name, (total, count) in self.sums.items()}


@dataclass(kw_only=True)
class _Batch:
    """The views of one gradient step with everything that is fixed before it."""

    views: Views
    advantage: Tensor
    policy_weight: Tensor
    kl_weight: Tensor
    old: list[Tensor] | None = None
    reference: list[Tensor] | None = None
    diagnostics: _Means = field(default_factory=_Means)

"""Policy optimisation: rollout -> reward -> advantage -> steps -> views -> loss. The job whose update is one batch of
rollouts and the gradient steps on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unveil.learning.advantages import Advantage, terminal
from unveil.learning.views import Inner
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.masked import MaskedSampler
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import chain_copies, evaluate, judge, over_denoised, sample_problems
from unveil.tasks.medium import medium_of
from unveil.training.gradient_steps import GradientSteps, Means
from unveil.training.log import RunLog
from unveil.training.policy_config import PolicyConfig, PolicyEval, ProblemFilter
from unveil.training.records import sample_records, trajectory_records
from unveil.training.rewarding import Rewarded, RewardsLost, reward_chains
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import Optimise, Trainer

LOST_UPDATES = 3
"""Updates in a row without a single score after which a run stops."""


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
        self.medium = medium_of(self.denoiser)
        self.steps = GradientSteps(trainer, policy)
        rollout = policy.rollout
        if policy.task.medium != self.denoiser.medium:
            raise UserError(
                f"policy.task: {policy.task.name!r} judges samples of kind {policy.task.medium!r}, the model draws "
                f"{self.denoiser.medium!r}"
            )
        for sampler in [*self._training_samplers(), *evaluation.decoders.values()]:
            sampler.check_denoiser(self.denoiser)
            sampler.check_fits(rollout.response_length)
        policy.likelihood.check_fits(rollout.sampler, self.denoiser)
        if policy.groups is not None:
            policy.groups.check_fits(rollout.sampler, rollout.group_size, rollout.response_length)
        if rollout.sampler.greedy and policy.likelihood.scores_samples:
            raise UserError(
                "policy.rollout.sampler.temperature: should be greater than 0, got 0 (a group would be all equal)"
            )
        self.held_out = policy.task.problems("test", evaluation.problems, 0)
        self.medium.check_fits(self.denoiser, [p.prompt for p in self.held_out], rollout.response_length)
        if rollout.prompts < trainer.ranks.world:
            raise UserError(
                f"policy.rollout.prompts: {rollout.prompts} are fewer than the {trainer.ranks.world} processes"
            )
        self.pool: list[Problem] = []
        self.rolled = self.spent = self.lost_updates = 0
        self.rewarded: list[Rewarded] = []
        self.warned: set[tuple[str, str]] = set()

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        policy, self.rewarded = self.policy, []
        problems = self.trainer.ranks.share(self._problems(update))
        size = policy.rollout.group_size
        rows = [problem for problem in problems for _ in range(size)]
        sampled = self._roll(update, rows, torch.arange(len(problems)).repeat_interleave(size))
        rollouts, metrics = sampled, self._metrics(sampled)
        if policy.groups is not None:

            def roll(problems: Sequence[Problem], group: Tensor, **how: Any) -> Rollouts:
                return self._roll(update, list(problems), group, **how)

            rollouts, said = policy.groups.apply(sampled, roll, self.denoiser)
            metrics |= said
        trajectory = rollouts.trajectory
        scored = self._count_failures(update, metrics)
        advantages = _advantages(policy.advantage, rollouts)
        metrics |= {
            "advantage_abs": (advantages.abs().sum() / trajectory.active.sum().clamp(min=1)).item(),
            "zero_variance_groups": _equal_groups(rollouts).float().mean().item(),
        }
        chosen = trajectory.active.float()
        if policy.likelihood.per_step:
            chosen = policy.selector.choose(advantages, trajectory, rollouts.seeds, self.denoiser.spec)
        inner = policy.inner_updates
        views = inner if policy.likelihood.resamples else 1
        batches = [
            self.steps.batch(rollouts, advantages, chosen, Inner(number, inner), keep_old=inner > 1)
            for number in range(views)
        ]
        self.steps.compare(batches)
        for number in range(inner):
            batch = batches[number % views]
            batch.diagnostics = Means()
            result: dict[str, Any] = optimise(self.steps.losses(batch) if scored else [])
            metrics |= result | batch.diagnostics.means()
        cost, ranks = self.trainer.cost, self.trainer.ranks
        cost.rollouts += round(ranks.total(self.rolled))
        cost.samples = cost.rollouts
        cost.forwards += round(ranks.total(self.spent + self.steps.spent))
        self.rolled = self.spent = self.steps.spent = 0
        return metrics | {"rollouts": cost.rollouts, "optimizer_steps": cost.optimizer_steps}

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
                self.log.lines("samples.jsonl", sample_records(shown, result, self.medium, mark))
                records = trajectory_records(self.denoiser, self.policy.task, shown, sampler, length, mark)
                self.log.lines("trajectories.jsonl", records)

    def state_dict(self) -> dict[str, Any]:
        return {"pool": [vars(problem) | {"answer": dict(problem.answer)} for problem in self.pool]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool = [Problem(**problem) for problem in state["pool"]]

    def _training_samplers(self) -> list[Sampler]:
        rollout = self.policy.rollout
        own: list[Sampler] = [rollout.sampler]
        if rollout.block_lengths:
            if not isinstance(rollout.sampler, MaskedSampler):
                raise UserError("policy.rollout.block_lengths: only for the sampler 'masked', which has blocks")
            own = [replace(rollout.sampler, block_length=length) for length in rollout.block_lengths]
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

    def _roll(
        self,
        update: int,
        problems: list[Problem],
        group: Tensor,
        *,
        label: str = "",
        sampler: Sampler | None = None,
        **how: Any,
    ) -> Rollouts:
        """Draw and judge one chain per problem; see `unveil.training.rollouts.Roll`."""
        policy, rollout = self.policy, self.policy.rollout
        own = [label] if label else []
        trajectory = sample_problems(
            self.denoiser, problems, sampler or self._sampler(update), response_length=rollout.response_length,
            seed=derive_seed(self.seed, "rollout", update, *own), needs=self._needs(), batch_size=rollout.batch_size,
            **how,
        )  # fmt: skip
        # Ranks are asked once at the end of an update: a hook may draw on some of them only.
        self.rolled += len(problems)
        self.spent += trajectory.forwards
        judged = judge(policy.task, problems, self.denoiser, trajectory)
        rewarded = reward_chains(policy.reward, problems, judged, trajectory, self.medium)
        self.rewarded.append(rewarded)
        rewards = rewarded.values
        if policy.shaping is not None:
            rewards = policy.shaping.shape(rewards, trajectory) * rewarded.known[:, None]
        seeds = [
            derive_seed(self.seed, "chain", update, problem.id, copy, *own)
            for problem, copy in zip(problems, chain_copies(problems), strict=True)
        ]
        return Rollouts(
            problems=problems, group=group, trajectory=trajectory, judged=judged, rewards=rewards,
            known=rewarded.known, seeds=seeds,
        )  # fmt: skip

    def _sampler(self, update: int) -> Sampler:
        rollout = self.policy.rollout
        if not rollout.block_lengths:
            return rollout.sampler.at(update, self.seed)
        assert isinstance(rollout.sampler, MaskedSampler)
        pick = derive_seed(self.seed, "block length", update) % len(rollout.block_lengths)
        return replace(rollout.sampler, block_length=rollout.block_lengths[pick])

    def _needs(self) -> set[str]:
        """The trajectory fields that somebody will read."""
        policy = self.policy
        readers: list[Any] = [policy.likelihood, policy.weighting, policy.groups, policy.shaping]
        if policy.likelihood.per_step:
            readers.append(policy.selector)
        needs = {name for reader in readers if reader is not None for name in reader.needs}
        return needs | ({"guesses"} if policy.advantage.reads_guesses else set())

    def _count_failures(self, update: int, metrics: dict[str, Any]) -> bool:
        """Log and report what the reward could not score in this update. False if it scored nothing at all.

        Raises:
            RewardsLost: that happened `LOST_UPDATES` times in a row.
        """
        failures = [one for rewarded in self.rewarded for one in rewarded.failures]
        for part, failure in failures:
            if (part, failure.kind) not in self.warned:
                self.warned.add((part, failure.kind))
                name = f"policy.reward{f'.parts.{part}' if part else ''}"
                line = f"update {update + 1}: {name}: {failure.kind}: {' '.join(failure.message.split())}"
                print(f"warning: {line} (counted in reward_failures from here on)", file=sys.stderr, flush=True)
        total = self.trainer.ranks.total
        asked, lost = (total(float(sum(getattr(one, name) for one in self.rewarded))) for name in ("asked", "lost"))
        metrics["reward_failures"] = round(total(float(len(failures))))
        self.lost_updates = self.lost_updates + 1 if lost == asked else 0
        if self.lost_updates >= LOST_UPDATES:
            kinds = ", ".join(sorted({failure.kind for _, failure in failures}))
            raise RewardsLost(
                f"update {update + 1}: policy.reward gave no score at all ({kinds}), "
                f"{self.lost_updates} updates in a row: stopped (the last checkpoint is good)"
            )
        return lost < asked

    def _metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        """What the policy's own chains say, before any hook."""
        trajectory, judged = rollouts.trajectory, rollouts.judged
        final, known = terminal(rollouts.rewards, trajectory.active), rollouts.known
        active = trajectory.active
        values: dict[str, Any] = {
            "reward": final[known].mean().item(),
            "unrewarded": 1 - known.float().mean().item(),
            "accuracy": rollouts.correct.float().mean().item(),
            "score": sum(v.score for v in judged.verdicts) / len(judged.verdicts),
            "group_reward_std": _group_deviation(final, known, rollouts.group),
            "steps_per_chain": active.sum(1).float().mean().item(),
            "unfinished": trajectory.unfinished.float().mean().item(),
        }
        values |= {f"reward/{name}": mean for name, mean in self.rewarded[0].parts.items()}
        if judged.guess_correct is not None:
            values["over_denoising"] = over_denoised(judged).float().mean().item()
            values["guess_accuracy"] = (judged.guess_correct.sum(0) / active.sum(0).clamp(min=1)).tolist()
        return values


def _advantages(advantage: Advantage, rollouts: Rollouts) -> Tensor:
    """(B, S); a chain without a reward is no member of its group, and has advantage 0."""
    known, trajectory = rollouts.known, rollouts.trajectory
    values = torch.zeros(trajectory.active.shape)
    if known.any():
        own = (rollouts.rewards[known], trajectory.active[known], rollouts.group[known])
        values[known] = advantage.advantages(*own)
    return values


def _equal_groups(rollouts: Rollouts) -> Tensor:
    """(groups,) True where all finished samples of a group have the same reward: there is nothing to learn."""
    final = terminal(rollouts.rewards, rollouts.trajectory.active)
    own = [final[(rollouts.group == group) & rollouts.known] for group in rollouts.group.unique()]
    return torch.tensor([len(values.unique()) <= 1 for values in own])


def _group_deviation(final: Tensor, known: Tensor, group: Tensor) -> float:
    """Standard deviation of ``final`` (B,) within a group, mean over the groups with two known members or more."""
    own = [final[known & (group == number)] for number in group.unique()]
    spread = [values.std() for values in own if len(values) > 1]
    return torch.stack(spread).mean().item() if spread else 0.0

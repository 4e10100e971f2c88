"""Policy optimisation: rollout -> reward -> advantage -> steps -> views -> loss. The job whose update is one batch of
rollouts and the gradient steps on it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unveil.learning.advantages import terminal
from unveil.learning.views import Inner
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import check_needs
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import Evaluation, chain_copies, judge, sample_problems
from unveil.tasks.medium import medium_of
from unveil.training.gradient_steps import GradientSteps
from unveil.training.log import RunLog
from unveil.training.outcome import Outcome, mean_over_ranks
from unveil.training.policy_config import PolicyConfig, PolicyEval, ProblemFilter
from unveil.training.records import sample_records, trajectory_records
from unveil.training.rewarding import Rewarded, RewardsLost, held_out_rewards, reward_chains
from unveil.training.rollouts import Rollouts, evaluate_each, portions, sample_together
from unveil.training.trainer import Job, Optimise, Trainer

SNAPSHOT_KEYS = {"old": "old", "ema": "ema_decay"}
LOST_UPDATES = 3
"""Updates in a row without a single score after which a run stops."""


class PolicyJob(Job):
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
        for key, reader in policy.readers.items():
            try:
                check_needs(reader.needs, rollout.sampler.leaves, rollout.sampler.refused_fields())
            except UserError as error:
                raise UserError(f"policy.{key}: {reader.name!r} reads more than there is: {error}") from None
        check_needs(policy.needs, rollout.sampler.leaves, rollout.sampler.refused_fields())
        if policy.shaping is not None:
            policy.shaping.check_fits(rollout.sampler)
        if policy.groups is not None:
            policy.groups.check_fits(rollout.sampler, rollout.group_size, rollout.response_length)
        if rollout.sampler.greedy and policy.likelihood.scores_samples:
            raise UserError(
                "policy.rollout.sampler.temperature: should be greater than 0, got 0 (a group would be all equal)"
            )
        kept = {"reference", *trainer.snapshots.sets}
        if missing := [(key, name) for name, key in policy.snapshots.items() if name not in kept]:
            key, name = missing[0]
            raise UserError(
                f"{key}: {name!r}, but the run keeps no such snapshot (give snapshots.{SNAPSHOT_KEYS[name]})"
            )
        self.held_out = policy.task.problems("test", evaluation.problems, 0)
        self.medium.check_fits(self.denoiser, [p.prompt for p in self.held_out], rollout.response_length)
        world, whole = trainer.ranks.world, policy.groups is not None
        if rollout.prompts * (1 if whole else rollout.group_size) < world:
            what = "whole groups (policy.groups needs them)" if whole else "chains (prompts * group_size)"
            raise UserError(f"policy.rollout.prompts: {rollout.prompts} give fewer {what} than the {world} processes")
        if rollout.prompts * rollout.group_size < policy.minibatches * trainer.ranks.world:
            raise UserError(
                f"policy.minibatches: {policy.minibatches} are more than the chains of a process "
                f"({rollout.prompts * rollout.group_size // trainer.ranks.world})"
            )
        self.pool: list[Problem] = []
        self.rolled = self.spent = self.lost_updates = 0
        self.rewarded: list[Rewarded] = []
        self.warned: set[tuple[str, str]] = set()

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        policy, self.rewarded = self.policy, []
        reward = self.steps.reward = policy.reward.at(update)
        ranks = self.trainer.ranks
        rollouts = self._sampled(update)
        outcome, own = Outcome.of(rollouts, policy.advantage.features).everywhere(ranks)
        metrics = outcome.metrics()
        if policy.groups is not None:

            def roll(problems: Sequence[Problem], group: Tensor, **how: Any) -> Rollouts:
                return self._roll(update, list(problems), group, **how)

            groups = len(rollouts.group.unique())
            rollouts, said = policy.groups.apply(rollouts, roll, self.denoiser)
            metrics |= mean_over_ranks(said, groups, ranks)
            outcome, own = Outcome.of(rollouts, policy.advantage.features).everywhere(ranks)
        if policy.gate is not None:
            held, said = outcome.gated(policy.gate, reward.audit_weights)
            rollouts.gate = held[own]
            metrics |= {f"gate/{name}": value for name, value in said.items()}
        trajectory = rollouts.trajectory
        scored = self._count_failures(update, metrics)
        advantages = outcome.advantages(policy.advantage, reward.part_weights)
        kept = policy.selector.chains(terminal(advantages, outcome.active), outcome.group, policy.rollout.sampler)
        metrics |= {
            "trained_chains": kept.float().mean().item(),
            "advantage_abs": (advantages.abs().sum() / outcome.active.sum().clamp(min=1)).item(),
            "zero_variance_groups": outcome.equal_groups().float().mean().item(),
        }
        advantages = advantages[own, : trajectory.active.shape[1]]
        chosen = trajectory.active.float()
        if policy.likelihood.per_step:
            chosen = policy.selector.choose(advantages, trajectory, rollouts.seeds, self.denoiser.spec)
            chosen = chosen * kept[own, None]
        inner = policy.inner_updates
        views = inner if policy.likelihood.resamples else 1
        shares = self._shares(update, rollouts, advantages, chosen)
        keep_old = inner * len(shares) > 1 or policy.rollout.drawn_by != "policy"
        batches = [
            [self.steps.batch(*share, Inner(number, inner), keep_old=keep_old) for share in shares]
            for number in range(views)
        ]
        self.steps.compare([batch for same in batches for batch in same])
        for number in range(inner):
            for batch in batches[number % views]:
                result: dict[str, Any] = optimise(self.steps.losses(batch) if scored else [])
                metrics |= result | self.steps.measured(batch)
        cost = self.trainer.cost
        cost.rollouts += round(ranks.total(self.rolled))
        cost.samples = cost.rollouts
        cost.forwards += round(ranks.total(self.spent + self.steps.spent))
        self.rolled = self.spent = self.steps.spent = 0
        return metrics | {"rollouts": cost.rollouts, "optimizer_steps": cost.optimizer_steps}

    def evaluate(self, update: int) -> None:
        length = self.policy.rollout.response_length
        shown = self.held_out[: self.evaluation.shown]

        def tell(name: str, sampler: Sampler, found: Evaluation) -> None:
            means = held_out_rewards(self.policy.reward.at(update), self.held_out, found.judged)
            self.log.metrics("eval", update, {"decoder": name, **found.summary(), **means})
            mark = {"step": update, "decoder": name}
            self.log.lines("samples.jsonl", sample_records(shown, found, self.medium, mark))
            records = trajectory_records(self.denoiser, self.policy.task, shown, sampler, length, mark)
            self.log.lines("trajectories.jsonl", records)

        evaluate_each(
            self.evaluation.decoders, self.trainer, self.policy.task, self.held_out, tell, response_length=length,
            seed=self.seed,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        pool = [vars(problem) | {"answer": dict(problem.answer)} for problem in self.pool]
        state = {"pool": pool, "advantage": self.policy.advantage.state_dict()}
        return state if self.policy.gate is None else state | {"gate": self.policy.gate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool = [Problem(**problem) for problem in state["pool"]]
        self.policy.advantage.load_state_dict(state["advantage"])
        if self.policy.gate is not None:
            self.policy.gate.load_state_dict(state["gate"])

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
        # Every rank needs a chain, or a group.
        least = self.trainer.ranks.world / (1 if self.policy.groups is not None else self.policy.rollout.group_size)
        count = min(count, max(len(order), math.ceil(least)))
        return [self.pool[order[index % len(order)]] for index in range(count)]

    def _sampled(self, update: int) -> Rollouts:
        """This rank's even part of all chains: a group may lie on several ranks, but for a hook it is whole."""
        problems, size, ranks = self._problems(update), self.policy.rollout.group_size, self.trainer.ranks
        rows = [problem for problem in problems for _ in range(size)]
        part = ranks.part(len(rows))
        if self.policy.groups is not None:
            groups = ranks.part(len(problems))
            part = slice(groups.start * size, groups.stop * size)
        group = torch.arange(len(problems)).repeat_interleave(size)
        return self._roll(update, rows[part], group[part], copies=chain_copies(rows)[part])

    def _filtered(self, choice: ProblemFilter, epoch: int) -> list[Problem]:
        candidates = self.policy.task.problems("train", choice.pool, derive_seed(self.seed, "pool", epoch))
        rollout = self.policy.rollout
        trajectory = sample_together(
            self.trainer, self.denoiser, candidates, choice.decoder, response_length=rollout.response_length,
            seed=self.seed, needs={"guesses"}, batch_size=rollout.batch_size,
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
        copies: Sequence[int] | None = None,
        sampler: Sampler | None = None,
        **how: Any,
    ) -> Rollouts:
        """Draw and judge one chain per problem; see `unveil.training.rollouts.Roll`."""
        rollout, own = self.policy.rollout, [label] if label else []
        numbers = chain_copies(problems) if copies is None else copies
        seeds = [
            derive_seed(self.seed, "chain", update, problem.id, copy, *own)
            for problem, copy in zip(problems, numbers, strict=True)
        ]

        def drawn(part: slice) -> Any:
            with self.trainer.using(rollout.drawn_by), self.trainer.autocast():
                trajectory = sample_problems(
                    self.denoiser, problems[part], sampler or self._sampler(update),
                    response_length=rollout.response_length, seed=derive_seed(self.seed, "rollout", update, *own),
                    needs=self.policy.needs, batch_size=rollout.batch_size, copies=numbers[part], **how,
                )  # fmt: skip
            # Ranks are asked once at the end of an update: a hook may draw on some of them only.
            self.rolled += len(problems[part])
            self.spent += trajectory.forwards
            return trajectory

        if how or not rollout.score_beside:
            found = [self._scored(update, problems, group, seeds, drawn(slice(None)))]
        else:
            with ThreadPoolExecutor(1) as beside:
                parts = portions(group, rollout.batch_size)
                # The next trajectory is drawn while the thread is busy with the last one.
                waiting = [
                    beside.submit(self._scored, update, problems[part], group[part], seeds[part], drawn(part))
                    for part in parts
                ]
                found = [one.result() for one in waiting]
        self.rewarded += [rewarded for _, rewarded in found]
        return functools.reduce(Rollouts.extend, [rollouts for rollouts, _ in found])

    @torch.no_grad()
    def _scored(
        self, update: int, problems: list[Problem], group: Tensor, seeds: list[int], trajectory: Any
    ) -> tuple[Rollouts, Rewarded]:
        """Chains with their verdicts and rewards."""
        policy = self.policy
        judged = judge(policy.task, problems, self.denoiser, trajectory)
        rewarded = reward_chains(policy.reward.at(update), problems, judged, trajectory, self.medium)
        rewards = rewarded.values
        if policy.shaping is not None:
            rewards = policy.shaping.shape(rewards, trajectory) * rewarded.known[:, None]
        rollouts = Rollouts(
            problems=problems, group=group, trajectory=trajectory, judged=judged, rewards=rewards,
            known=rewarded.known, seeds=seeds, parts=rewarded.parts,
        )  # fmt: skip
        return rollouts, rewarded

    def _shares(
        self, update: int, rollouts: Rollouts, advantages: Tensor, chosen: Tensor
    ) -> list[tuple[Rollouts, Tensor, Tensor]]:
        """The chains of each gradient step of a pass, with their advantages and factors."""
        count = self.policy.minibatches
        if count == 1:
            return [(rollouts, advantages, chosen)]
        stream = generator(self.seed, "minibatches", update, self.trainer.ranks.rank)
        dealt = torch.randperm(len(rollouts), generator=stream).tensor_split(count)
        return [(rollouts.rows(rows), advantages[rows], chosen[rows]) for rows in (own.sort().values for own in dealt)]

    def _sampler(self, update: int) -> Sampler:
        rollout = self.policy.rollout
        if not rollout.block_lengths:
            return rollout.sampler.at(update, self.seed)
        assert isinstance(rollout.sampler, MaskedSampler)
        pick = derive_seed(self.seed, "block length", update) % len(rollout.block_lengths)
        return replace(rollout.sampler, block_length=rollout.block_lengths[pick])

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

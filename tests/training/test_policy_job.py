"""A policy update: ratios, micro-batches, block lengths, filtered problems, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped, Objective, sum_by, unit_of
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import AllSteps
from unveil.learning.views import Inner
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import RunningConfidence
from unveil.systems.mdpo import OverDenoising
from unveil.tasks.evaluate import judge, over_denoised, sample_problems
from unveil.training.trainer import OptimConfig

SYSTEMS = ["mdpo", "diffu_grpo"]


@dataclass(kw_only=True)
class Recorded(Objective, name="tiny_recorded"):
    """The clipped objective, which remembers the largest |new - old| of every gradient step."""

    deviations: list[float] = field(default_factory=list)
    own: Clipped = field(default_factory=Clipped)

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        self.deviations.append((log_prob.detach() - old).abs().max().item())
        return self.own.terms(log_prob, old, advantage)

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        return self.own.diagnostics(log_prob, old, advantage)


@pytest.mark.parametrize("system", SYSTEMS)
def test_ratio_of_a_single_inner_update_is_exactly_one(tmp_path: Path, system: str) -> None:
    job = tiny.job(tmp_path, tiny.policy(system, inner_updates=1))
    for update in range(3):
        metrics = job.update(update, job.trainer.optimise)
        assert metrics["ratio_deviation"] == 0 and metrics["ratio_mean"] == 1
        assert metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("microbatch", [6, 1000])
def test_ratio_is_one_until_the_first_gradient_step(tmp_path: Path, system: str, microbatch: int) -> None:
    objective = Recorded()
    job = tiny.job(
        tmp_path,
        tiny.policy(system, inner_updates=3, objective=objective),
        optim=OptimConfig(lr=1e-2, microbatch=microbatch),
    )
    ends: list[int] = []

    def optimise(losses: Any) -> dict[str, float]:
        result = job.trainer.optimise(losses)
        ends.append(len(objective.deviations))
        return result

    metrics = job.update(0, optimise)
    first, second = objective.deviations[: ends[0]], objective.deviations[ends[0] : ends[1]]
    assert max(first) <= 1e-6 < 1e-3 < max(second)
    assert metrics["ratio_deviation"] > 1e-3


def test_stored_log_probs_match_what_the_sampler_recorded(tmp_path: Path) -> None:
    """Rollout and scoring read log p from one function: equal although they run in other batch shapes."""
    config = tiny.policy("mdpo")
    job = tiny.job(tmp_path, config)
    rows = job._problems(0)
    sampler = config.rollout.sampler
    trajectory = sample_problems(
        job.denoiser, rows, sampler, response_length=5, seed=0, needs={"states", "guesses", "log_prob", "revealed"}
    )
    views = config.likelihood.views(trajectory, trajectory.active, [0] * 4, job.denoiser.spec)
    with torch.no_grad():
        scored = job.steps.score(views).log_prob[views.items]
    recorded = trajectory.log_prob[views.rows, views.steps][views.scored]  # type: ignore[index]
    assert (scored - recorded).abs().max().item() <= 1e-5


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradient_does_not_depend_on_the_microbatch(tmp_path: Path, system: str) -> None:
    found = []
    for microbatch in (4, 5, 10_000):
        net = tiny.denoiser()
        config = tiny.policy(system, inner_updates=2, kl=Kl(beta=0.5))
        job = tiny.job(tmp_path, config, net, optim=OptimConfig(lr=1e-3, max_grad_norm=1e9, microbatch=microbatch))
        tiny.shifted(net)
        metrics = job.update(0, job.trainer.optimise)
        found.append((tiny.gradients(net), metrics))
    whole, numbers = found[-1]
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2
    for grads, metrics in found[:-1]:
        assert grads.keys() == whole.keys()
        assert max(float((grads[name] - whole[name]).abs().max()) for name in whole) <= 1e-5
        for name in ("loss", "entropy", "kl", "ratio_mean"):
            assert metrics[name] == pytest.approx(numbers[name], rel=1e-4, abs=1e-6)


def test_all_rollouts_of_an_update_share_one_block_length(tmp_path: Path) -> None:
    sampler = MaskedSampler(steps=4, temperature=0.7)
    config = tiny.policy("mdpo", rollout={"sampler": sampler, "response_length": 4, "block_lengths": [1, 4]})
    job = tiny.job(tmp_path, config)
    seen = set()
    for update in range(12):
        rows = [problem for problem in job._problems(update) for _ in range(4)]
        group = torch.arange(len(rows)) // 4
        trajectory = job._roll(update, rows, group).trajectory
        order = trajectory.revealed.long().argmax(1)  # type: ignore[union-attr]
        left_to_right = (order == torch.arange(4)).all(1)
        # Blocks of one token fix the order; in full diffusion 16 chains never all go left to right here.
        seen.add(bool(left_to_right.all()))
        if not left_to_right.all():
            assert left_to_right.float().mean() < 0.9
        again = job._roll(update, rows, group).trajectory
        assert torch.equal(again.response_ids, trajectory.response_ids)
    assert seen == {True, False}


@dataclass(kw_only=True)
class FirstWord(tiny.Task, name="tiny_first_word"):
    """Right if the response begins with the prompt's last word: guesses lose that often."""

    def problems(self, split: Any, count: int, seed: int) -> list[tiny.Problem]:
        return tiny.Echo().problems(split, count, seed)

    def check(self, problem: tiny.Problem, completion: str) -> tiny.Verdict:
        right = completion.split()[:1] == [problem.answer["word"]]
        return tiny.Verdict(correct=right, score=float(right))


def test_an_epoch_trains_on_the_over_denoised_problems_of_its_start(tmp_path: Path) -> None:
    decoder = MaskedSampler(steps=5, temperature=0.0)
    choice = OverDenoising(decoder=decoder, pool=60, every=3)
    config = tiny.policy("mdpo", task=FirstWord(), filter=choice)
    job = tiny.job(tmp_path, config)
    pools = []
    for update in range(6):
        net = tiny.float64(job.denoiser).float()
        problems = job._problems(update)
        if update % 3 == 0:
            candidates = job.policy.task.problems("train", 60, tiny_seed(job, update // 3))
            needs = {"guesses"}
            trajectory = sample_problems(net, candidates, decoder, response_length=5, seed=job.seed, needs=needs)
            keep = over_denoised(judge(config.task, candidates, net, trajectory)).tolist()
            expected = [p.id for p, kept in zip(candidates, keep, strict=True) if kept]
            assert 0 < len(expected) < 60
            assert [problem.id for problem in job.pool] == expected
        assert {p.id for p in problems} <= {p.id for p in job.pool} and len(problems) == min(4, len(job.pool))
        pools.append([problem.id for problem in job.pool])
        tiny.shifted(job.denoiser, seed=update)
    assert pools[0] == pools[2] and pools[0] != pools[3]


def tiny_seed(job: Any, epoch: int) -> int:
    from unveil.seeds import derive_seed

    return derive_seed(job.seed, "pool", epoch)


def test_nothing_over_denoised_trains_on_everything(tmp_path: Path) -> None:
    """A verifier that never says right leaves no problem; the epoch then takes all candidates."""

    @dataclass(kw_only=True)
    class Never(FirstWord):
        def check(self, problem: tiny.Problem, completion: str) -> tiny.Verdict:
            return tiny.Verdict(correct=False, score=0.0)

    choice = OverDenoising(decoder=MaskedSampler(steps=5), pool=20, every=3)
    job = tiny.job(tmp_path, tiny.policy("mdpo", task=Never(), filter=choice))
    metrics = job.update(0, job.trainer.optimise)
    assert len(job.pool) == 20
    assert metrics["reward"] == 0 and metrics["zero_variance_groups"] == 1 and metrics["advantage_abs"] == 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_equal_rewards_leave_only_the_kl(tmp_path: Path, system: str) -> None:
    @dataclass(kw_only=True)
    class Always(FirstWord):
        def check(self, problem: tiny.Problem, completion: str) -> tiny.Verdict:
            return tiny.Verdict(correct=True, score=1.0)

    config = tiny.policy(system, task=Always(), kl=Kl(), inner_updates=1)
    job = tiny.job(tmp_path, config)
    before = [parameter.clone() for parameter in job.denoiser.parameters()]
    metrics = job.update(0, job.trainer.optimise)
    assert metrics["grad_norm"] == 0 and metrics["reward"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, job.denoiser.parameters(), strict=True))


@dataclass(kw_only=True)
class BeginWithA(FirstWord, name="tiny_begin_with_a"):
    """Right if the response begins with "a"."""

    def check(self, problem: tiny.Problem, completion: str) -> tiny.Verdict:
        right = completion.split()[:1] == ["a"]
        return tiny.Verdict(correct=right, score=float(right))


@pytest.mark.parametrize(("system", "inner_updates"), [("mdpo", 1), ("mdpo", 2), ("diffu_grpo", 4)])
def test_training_raises_the_reward(tmp_path: Path, system: str, inner_updates: int) -> None:
    config = tiny.policy(
        system, task=BeginWithA(), rollout={"prompts": 8, "group_size": 8}, kl=Kl(), inner_updates=inner_updates
    )
    job = tiny.job(tmp_path, config, optim=OptimConfig(lr=5e-3))
    rewards = [job.update(update, job.trainer.optimise)["reward"] for update in range(40)]
    assert rewards[0] < 0.7 and sum(rewards[-5:]) / 5 > rewards[0] + 0.25, rewards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": MaskedSampler(steps=5)}, "policy.rollout.sampler.temperature"),
        ({"sampler": MaskedSampler(steps=9, temperature=1.0)}, "steps: 9"),
        ({"response_length": 14, "sampler": MaskedSampler(steps=2, temperature=1.0)}, "policy.rollout.response_length"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.job(tmp_path, tiny.policy("mdpo", rollout=changes))


def test_fewer_chains_than_processes_are_refused(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy("mdpo"))
    job.trainer.ranks.world = 17  # of 16 chains
    with pytest.raises(UserError, match=r"policy\.rollout\.prompts: 4 give fewer chains .* than the 17 processes"):
        type(job)(job.trainer, job.policy, job.evaluation, job.log, seed=0)


def test_a_microbatch_without_scored_tokens_is_harmless(tmp_path: Path) -> None:
    """A step of RCR may reveal nothing; with one canvas per micro-batch nothing is scored there."""
    sampler = MaskedSampler(steps=5, temperature=1.0, rule=RunningConfidence())
    config = tiny.policy(
        "mdpo",
        rollout={"sampler": sampler},
        likelihood=TrajectoryLikelihood(tokens="revealed"),
        selector=AllSteps(),
    )
    job = tiny.job(tmp_path, config, optim=OptimConfig(lr=1e-3, microbatch=1))
    make, empty = config.likelihood.views, []

    def views(*arguments: Any) -> Any:
        found = make(*arguments)
        found.scored[::3] = False  # whether the sampler leaves such a step does not depend on chance here
        empty.append(int((~found.scored.any(1)).sum()))
        return found

    config.likelihood.views = views  # type: ignore[method-assign]
    metrics = job.update(0, job.trainer.optimise)
    assert empty[0] > 0 and metrics["skipped"] == 0
    assert metrics["ratio_deviation"] == 0 and metrics["entropy"] > 0 and metrics["kl"] >= 0


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("microbatch", [4, 1000])
def test_units_are_laid_out_as_each_micro_batch_has_them(tmp_path: Path, system: str, microbatch: int) -> None:
    """Against `unit_of` of a micro-batch by itself, also where every item is a unit of its own."""
    config = tiny.policy(system, inner_updates=2)
    job = tiny.job(tmp_path, config, optim=OptimConfig(microbatch=microbatch))
    rollouts = job._sampled(0)
    advantages = torch.randn(rollouts.trajectory.active.shape, generator=torch.Generator().manual_seed(0))
    batch = job.steps.batch(rollouts, advantages, rollouts.trajectory.active.float(), Inner(), keep_old=True)
    assert len(batch.pieces) == len(batch.parts) == len(batch.units) and batch.old is not None
    for views, units, old in zip(batch.pieces, batch.units, batch.old, strict=True):
        unit, count = unit_of(views, config.objective.level)
        assert torch.equal(units.unit, unit) and len(units) == count
        log_prob = torch.randn(old.log_prob.shape, generator=torch.Generator().manual_seed(1))
        summed = sum_by((log_prob * views.factors)[views.items], unit, count)
        if config.objective.normalise:
            share = (views.length / views.items.sum(1).clamp(min=1))[views.items.nonzero(as_tuple=True)[0]]
            summed = summed / sum_by(share, unit, count)
        assert torch.equal(units.log_prob(log_prob), summed)
        assert units.old is not None and torch.equal(units.old, units.log_prob(old.log_prob))
        view = views.items.nonzero(as_tuple=True)[0]
        assert torch.equal(units.advantage[unit], advantages[views.rows, views.steps][view])

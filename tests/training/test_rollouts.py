"""Rollouts that are joined, cut and replaced; hooks, shaping and token filters inside an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.likelihoods import OneStepLikelihood, TokenViews, TrajectoryLikelihood
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl
from unveil.learning.views import TokenFilter
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Threshold
from unveil.samplers.trajectory import TokenTrajectory
from unveil.tasks.base import Problem
from unveil.training.policy_job import PolicyJob
from unveil.training.rollouts import GroupHook, Roll, Rollouts, Shaping
from unveil.training.trainer import OptimConfig


def job(folder: Path, system: str = "mdpo", **changes: Any) -> PolicyJob:
    return tiny.job(folder, tiny.policy(system, **changes))


def sampled(policy_job: PolicyJob) -> Rollouts:
    problems = [problem for problem in policy_job._problems(0) for _ in range(4)]
    return policy_job._roll(0, problems, torch.arange(16) // 4)


def test_joined_and_cut_rollouts_are_the_same_chains(tmp_path: Path) -> None:
    base = job(tmp_path)
    first = sampled(base)
    other = MaskedSampler(steps=2, temperature=1.0)
    more = base._roll(0, first.problems[:3], first.group[:3], label="more", sampler=other)
    joined = first.extend(more)
    assert len(joined) == 19 and joined.rewards.shape == joined.trajectory.active.shape
    back = joined.rows(torch.arange(16))
    assert back.judged.samples == first.judged.samples and back.seeds == first.seeds
    steps = first.trajectory.steps
    assert torch.equal(back.rewards[:, :steps], first.rewards)
    assert torch.equal(back.trajectory.response_ids, first.trajectory.response_ids)
    assert not joined.rewards[16:, more.trajectory.steps :].any()


def test_replaced_chains_keep_their_group_and_bring_everything_else(tmp_path: Path) -> None:
    base = job(tmp_path)
    first = sampled(base)
    more = base._roll(0, first.problems, first.group, label="again")
    assert more.judged.samples != first.judged.samples and more.seeds != first.seeds
    changed = first.replace(torch.tensor([1, 6]), more, torch.tensor([2, 7]))
    assert torch.equal(changed.group, first.group)
    for row in range(16):
        source, place = {1: (more, 2), 6: (more, 7)}.get(row, (first, row))
        assert changed.judged.samples[row] == source.judged.samples[place]
        assert changed.seeds[row] == source.seeds[place]
        assert torch.equal(changed.trajectory.response_ids[row], source.trajectory.response_ids[place])
        assert torch.equal(changed.rewards[row], source.rewards[place])


@dataclass(kw_only=True)
class Expert(GroupHook, name="test_expert"):
    """One more chain per group, by another sampler."""

    def apply(self, rollouts: Rollouts, roll: Roll, denoiser: MaskedDenoiser) -> tuple[Rollouts, dict[str, float]]:
        first = torch.arange(0, len(rollouts), 4)
        problems: Sequence[Problem] = [rollouts.problems[row] for row in first.tolist()]
        other = MaskedSampler(steps=1, rule=Threshold(threshold=0.3))
        return rollouts.extend(roll(problems, rollouts.group[first], label="expert", sampler=other)), {"experts": 4.0}


@dataclass(kw_only=True)
class Haste(Shaping, name="test_haste"):
    def shape(self, rewards: Tensor, trajectory: TokenTrajectory) -> Tensor:
        return rewards / trajectory.active.sum(1, keepdim=True)


def test_a_hook_s_chains_are_counted_trained_on_and_join_their_group(tmp_path: Path) -> None:
    base = job(tmp_path, "diffu_grpo", groups=Expert(), shaping=Haste(), inner_updates=1, kl=Kl(beta=0))
    seen: list[TokenViews] = []
    make = base.policy.likelihood.views

    def views(*arguments: Any) -> TokenViews:
        seen.append(make(*arguments))
        return seen[-1]

    base.policy.likelihood.views = views  # type: ignore[method-assign]
    metrics = base.update(0, base.trainer.optimise)
    assert metrics["experts"] == 4 and len(seen[0]) == 20
    assert base.trainer.cost.rollouts == 20


@dataclass(kw_only=True)
class MostUncertain(TokenFilter, name="test_uncertain"):
    keeps_ratio: bool = False

    def keep(self, views: TokenViews, entropy: Tensor, trajectory: TokenTrajectory) -> Tensor:
        return entropy >= entropy.amax(1, keepdim=True)


@pytest.mark.parametrize("keeps_ratio", [False, True])
def test_a_token_filter_decides_what_counts(tmp_path: Path, keeps_ratio: bool) -> None:
    """One item per sequence is left: its own ratio alone, or its weight on the ratio of the whole sequence."""
    net = tiny.denoiser()
    config = tiny.policy(
        "diffu_grpo", likelihood=OneStepLikelihood(prompt_mask=0.0), objective=Clipped(level="sequence", clip=10.0),
        token_filter=MostUncertain(keeps_ratio=keeps_ratio), inner_updates=1, kl=Kl(beta=0),
    )  # fmt: skip
    base = tiny.job(tmp_path, config, net, optim=OptimConfig(lr=1e-3, max_grad_norm=1e9, microbatch=5))
    rollouts = sampled(base)
    advantages = base.policy.advantage.advantages(rollouts.rewards, rollouts.trajectory.active, rollouts.group)
    base.update(0, base.trainer.optimise)
    found = tiny.gradients(net)

    model = tiny.float64(net, **{n: v for n, v in tiny.denoiser().state_dict().items()})
    views = OneStepLikelihood(prompt_mask=0.0).views(
        rollouts.trajectory, rollouts.trajectory.active.float(), rollouts.seeds, net.spec
    )
    logs = (model(views.ids, views.valid)[:, views.prompt_width :] / 0.7).log_softmax(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(16):
        places = views.scored[row].nonzero()[:, 0].tolist()
        spread = [float(torch.special.entr(logs[row, i].detach().exp()).sum()) for i in places]
        kept = [places[spread.index(max(spread))]]
        terms = [logs[row, i, int(views.targets[row, i])] for i in (places if keeps_ratio else kept)]
        advantage = float(advantages[row, views.steps[row]])
        log_ratio = sum(terms) - sum(term.detach() for term in terms)  # type: ignore[call-overload]
        loss = loss - advantage * log_ratio.exp() / 16
    loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", ["step", "sequence"])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradient_of_wide_ratios_does_not_depend_on_the_microbatch(tmp_path: Path, level: str, normalise: bool) -> None:
    found = []
    for microbatch in (1, 7, 1000):
        net = tiny.denoiser()
        config = tiny.policy(
            "diffu_grpo", likelihood=TrajectoryLikelihood(tokens="revealed"), inner_updates=2, kl=Kl(beta=0.3),
            objective=Clipped(level=level, normalise=normalise),  # type: ignore[arg-type]
        )  # fmt: skip
        made = tiny.job(tmp_path, config, net, optim=OptimConfig(lr=1e-3, max_grad_norm=1e9, microbatch=microbatch))
        made.update(0, made.trainer.optimise)
        found.append(tiny.gradients(net))
    assert max(float(grad.abs().max()) for grad in found[-1].values()) > 1e-3
    for grads in found[:-1]:
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[-1][name], rtol=1e-3, atol=1e-5)


def test_hooked_trajectories_may_be_marked(tmp_path: Path) -> None:
    rollouts = sampled(job(tmp_path))
    marked = replace(rollouts, trajectory=replace(rollouts.trajectory, expert_share=torch.full((16,), 0.2)))
    joined = rollouts.extend(marked)
    assert joined.trajectory.expert_share is not None
    assert joined.trajectory.expert_share.tolist() == pytest.approx([0.0] * 16 + [0.2] * 16)

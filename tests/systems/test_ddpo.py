"""DDPO: its three variants, the prompt's history, reward-weighted regression against the written formulas."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.learning.advantages import PromptHistory, RewardWeights
from unveil.learning.matching import matching_errors
from unveil.learning.noised import MatchingLikelihood, NoisedViews
from unveil.learning.views import Inner
from unveil.processes.gaussian import VariancePreserving
from unveil.processes.kernels import Ddim
from unveil.systems.ddpo import Ddpo, DdpoSf, Rwr
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob


def job(folder: Path, choices: Any, **changes: Any) -> PolicyJob:
    sampler = tiny.sampler(steps=6, kernel=Ddim(eta=1.0))
    rollout = RolloutConfig(sampler=sampler, prompts=2, group_size=4)
    config = {"task": tiny.Bright(), "rollout": rollout, **vars(choices)} | changes
    return tiny.job(folder, PolicyConfig(**config), tiny.Mlp(VariancePreserving(), "eps"))


def gradients(policy_job: PolicyJob) -> list[dict[str, Tensor]]:
    """Of every gradient step of the first update, none of which is taken."""
    found = []

    def optimise(losses: Any) -> dict[str, float]:
        policy_job.denoiser.zero_grad()
        for loss in losses:
            loss().backward()
        named = policy_job.denoiser.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return {}

    policy_job.update(0, optimise)
    return found


def test_score_function_and_importance_sampling_have_one_gradient_at_first(tmp_path: Path) -> None:
    (first,) = gradients(job(tmp_path, Ddpo(minibatches=1)))
    (second,) = gradients(job(tmp_path, DdpoSf()))
    assert any(value.abs().max() > 1e-4 for value in first.values())
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-7)
    parts = gradients(job(tmp_path, Ddpo(minibatches=4)))
    assert len(parts) == 4
    for name, value in first.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 4, value, rtol=1e-3, atol=1e-6)


def test_the_step_to_clean_data_is_not_trained(tmp_path: Path) -> None:
    chains = job(tmp_path, Ddpo())._sampled(0).trajectory
    assert chains.noisy[:, :-1].all() and not chains.noisy[:, -1].any()


def test_the_history_of_a_prompt_is_that_of_a_queue() -> None:
    rng = np.random.default_rng(0)
    advantage = PromptHistory(size=5, least=3, clip=1.2)
    queues: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))
    for _ in range(6):
        prompts = rng.integers(0, 4, size=7)
        rewards = rng.normal(size=7)
        for prompt in np.unique(prompts):
            queues[int(prompt)].extend(rewards[prompts == prompt])
        expected = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            queue = queues[int(prompt)]
            over = np.array(queue) if len(queue) >= 3 else rewards
            expected.append(np.clip((reward - over.mean()) / (over.std() + 1e-6), -1.2, 1.2))
        given = torch.tensor(rewards, dtype=torch.float64)[:, None].expand(-1, 3)
        active = torch.tensor([[True, True, False]]).expand(7, -1)
        found = advantage.advantages(given, active, torch.tensor(prompts))
        assert not found[:, 2].any()
        np.testing.assert_allclose(found[:, 1], expected, rtol=1e-5, atol=1e-6)
    other = PromptHistory(size=5, least=3)
    other.load_state_dict(advantage.state_dict())
    assert other.remembered == advantage.remembered == {prompt: list(queue) for prompt, queue in queues.items()}


def test_the_history_goes_by_the_prompt_not_by_the_problem(tmp_path: Path) -> None:
    policy_job = job(tmp_path, DdpoSf())
    for update in range(3):
        policy_job.update(update, lambda losses: {})
    remembered = policy_job.policy.advantage.remembered  # type: ignore[attr-defined]
    assert sorted(map(len, remembered.values())) == [12, 12]  # two prompts, 4 chains of each per update


def test_reward_weights() -> None:
    rewards, active = torch.tensor([0.0, 1.0, 3.0, 3.0])[:, None], torch.ones(4, 1, dtype=torch.bool)
    group = torch.zeros(4, dtype=torch.long)
    soft = RewardWeights(temperature=0.5).advantages(rewards, active, group)[:, 0]
    z = (rewards[:, 0] - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(soft, 4 * (2 * z).softmax(0), rtol=1e-3, atol=1e-5)
    top = RewardWeights(form="top", share=0.5).advantages(rewards, active, group)[:, 0]
    assert top.tolist() == [0.0, 0.0, 2.0, 2.0]
    tied = RewardWeights(form="top", share=0.25).advantages(rewards, active, group)[:, 0]
    assert tied.tolist() == [0.0, 0.0, 2.0, 2.0]  # the one place is shared
    for threshold, wanted in ((0.0, [0.0, 0.0, 2.0, 2.0]), (-1.0, [0.0, 4 / 3, 4 / 3, 4 / 3]), (2.0, [0.0] * 4)):
        above = RewardWeights(form="threshold", threshold=threshold).advantages(rewards, active, group)[:, 0]
        assert above.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("draws", [1, 3])
def test_reward_weighted_regression_is_the_weighted_matching_loss(tmp_path: Path, draws: int) -> None:
    choices = Rwr(likelihood=MatchingLikelihood(draws=draws), minibatches=1)
    policy_job = job(tmp_path, choices)
    rollouts = policy_job._sampled(0)
    (found,) = gradients(policy_job)
    net, chains = policy_job.denoiser, rollouts.trajectory
    views = choices.likelihood.views(chains, chains.active.float(), rollouts.seeds, net.spec)
    weight = choices.advantage.advantages(rollouts.rewards, chains.active, rollouts.group)[views.rows, views.steps]
    net.zero_grad()
    errors = matching_errors(net, views.clean, views.times, views.noise, views.condition)  # type: ignore[arg-type]
    # Every chain is one unit whose loss is the mean over its noisy copies.
    ((weight * errors).sum() / (draws * len(chains))).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_noisy_copies_depend_on_the_chain_alone_and_are_stratified(tmp_path: Path) -> None:
    rollouts = job(tmp_path, Rwr())._sampled(0)
    chains, likelihood = rollouts.trajectory, MatchingLikelihood(draws=4)

    def views(rows: list[int], **inner: int) -> NoisedViews:
        part = rollouts.rows(torch.tensor(rows))
        return likelihood.views(
            part.trajectory, part.trajectory.active.float(), part.seeds, tiny.Mlp().spec, Inner(**inner)
        )  # type: ignore[arg-type]

    whole, two = views(list(range(8))), views([5, 2])
    assert torch.equal(two.noise[:4], whole.noise[20:24]) and torch.equal(two.times[4:], whole.times[8:12])
    assert torch.equal(whole.slice(20, 24).noise, two.noise[:4])
    assert (whole.times.view(8, 4) * 4).long().tolist() == [[0, 1, 2, 3]] * 8
    assert not torch.equal(views([5], number=1, count=2).noise, two.noise[:4])
    assert torch.equal(whole.clean[4:8], chains.samples[[1, 1, 1, 1]])


@pytest.mark.parametrize(("choices", "gain"), [(Ddpo(), 0.1), (DdpoSf(), 0.1), (Rwr(), 0.01)])
def test_every_variant_learns(tmp_path: Path, choices: Any, gain: float) -> None:
    """As the relatives of Flow-GRPO; regression to weighted samples is by far the slowest."""
    assert tiny.learned(tmp_path, tiny.sampler(steps=8, kernel=Ddim(eta=1.0)), choices) > gain

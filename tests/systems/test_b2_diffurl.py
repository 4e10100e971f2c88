"""B2-DiffuRL: growth of the suffix, shared prefixes, variance within stems, the selection, what is trained, resume."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.denoisers.continuous import Condition
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.selectors import AllSteps
from unveil.processes.kernels import Ddim
from unveil.registry import UserError
from unveil.rewards.base import Reward, Shaped
from unveil.samplers.latent import LatentSampler, Split
from unveil.samplers.latents import LatentTrajectory, Noise
from unveil.systems.b2_diffurl import B2Diffurl, BestWorst, StageHistory, Suffix, variant
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob

STEPS, FIRST, LEAVES = 6, 3, 4
SUFFIX = Suffix(first=FIRST, last=STEPS, stages=4)
VARIANTS = ("both", "bpt", "bs")


def job(folder: Path, name: str = "both", updates: int = 4, **changes: Any) -> PolicyJob:
    sampler, choices = variant(name, SUFFIX, LEAVES, steps=STEPS)
    rollout = RolloutConfig(sampler=sampler, prompts=6, group_size=LEAVES)
    config = {"task": tiny.Bright(), "reward": Shaped(), "rollout": rollout, **vars(choices)} | changes
    folder.mkdir(exist_ok=True)
    return tiny.job(folder, PolicyConfig(**config), updates=updates, every=2)


# ---- backward progressive training


def test_the_suffix_grows_as_published() -> None:
    window = Suffix(first=14, last=20, stages=100)
    lengths = [window.length(update) for update in range(150)]
    assert lengths[:100] == [14 + int(update * 7 / 100) for update in range(100)] and set(lengths[86:]) == {20}
    for update in (0, 15, 99, 500):
        inside = window.at(update, 3, 20).inside(20)
        assert inside.tolist() == [False] * (20 - lengths[min(update, 149)]) + [True] * lengths[min(update, 149)]


@pytest.mark.parametrize(("first", "last"), [(5, 4), (3, 9)])
def test_a_suffix_longer_than_the_chain_is_refused(first: int, last: int) -> None:
    with pytest.raises(UserError, match="window: should grow from first"):
        tiny.sampler(steps=8, window=Suffix(first=first, last=last, stages=2))


# ---- branch sampling


def drawn(sampler: LatentSampler, net: tiny.Mlp, stems: int, leaves: int) -> LatentTrajectory:
    problems = [stem for stem in range(stems) for _ in range(leaves)]
    copies = list(range(leaves)) * stems
    start = Noise(condition=net.condition(["a"] * len(problems)), problems=problems, copies=copies)
    return sampler.sample(net, start, list(range(len(problems))), needs={"latents", "log_prob"})


def test_leaves_share_their_prefix_bit_for_bit_and_it_is_computed_once() -> None:
    sampler, _ = variant("both", SUFFIX, LEAVES, steps=STEPS)
    for update, suffix in ((0, 3), (1, 4), (4, STEPS)):
        chains = drawn(sampler.at(update, 0), tiny.Mlp(), 3, LEAVES)
        assert chains.latents is not None
        latents = chains.latents.view(3, LEAVES, STEPS + 1, -1)
        before = STEPS - suffix
        assert torch.equal(latents[:, :, : before + 1], latents[:, :1, : before + 1].expand(-1, LEAVES, -1, -1))
        for leaf in range(1, LEAVES):
            assert (latents[:, 0, before + 1] != latents[:, leaf, before + 1]).any(-1).all()
        assert (latents[0, 0, : before + 1] != latents[1, 0, : before + 1]).any(-1).all()
        assert chains.forwards == 3 * before + 3 * LEAVES * suffix
        assert chains.noisy.tolist() == [[False] * before + [True] * (suffix - 1) + [False]] * (3 * LEAVES)


def test_a_tree_goes_apart_at_every_split() -> None:
    """Stems of 8 leaves: two branches from the window on, four with 4 steps left, eight with 2."""
    sampler, _ = variant("both", Suffix(first=5, last=5, stages=1), 8, steps=7)
    tree = replace(sampler, splits=[Split(left=4, leaves=4), Split(left=2, leaves=2)])
    chains = drawn(tree, tiny.Mlp(), 2, 8)
    assert chains.latents is not None and chains.log_prob is not None
    # How many different states there are in a stem before every step, and at the end. A step draws noise for its rows.
    counts = [len(chains.latents[:8, step].flatten(1).unique(dim=0)) for step in range(8)]
    assert counts == [1, 1, 1, 2, 4, 4, 8, 8]
    assert chains.forwards == 2 * (1 + 1 + 2 + 4 + 4 + 8 + 8)
    states = chains.latents[:8].flatten(2)
    assert torch.equal(states[0, :4], states[3, :4]) and not torch.equal(states[0, 3], states[4, 3])
    assert torch.equal(states[0, :6], states[1, :6]) and not torch.equal(states[0, 4], states[2, 4])
    # Steps of siblings are scored alike, and a stem does not depend on the others of its batch.
    assert torch.equal(chains.log_prob[0, :5], chains.log_prob[1, :5])
    one = drawn(tree, tiny.Mlp(), 1, 8)
    torch.testing.assert_close(one.samples, chains.samples[:8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "noise"}, "splits: the chains share noise"),
        ({"splits": [Split(left=7, leaves=2)]}, "splits.0.left: should be below 7, got 7"),
        ({"splits": [Split(left=3, leaves=4), Split(left=3, leaves=2)]}, "splits.1.left: should be below 3, got 3"),
        ({"splits": [Split(left=3, leaves=3)]}, "splits.0.leaves: should divide 8 into several, got 3"),
    ],
)
def test_trees_that_do_not_grow_are_refused(change: dict[str, Any], message: str) -> None:
    sampler, _ = variant("both", Suffix(first=5, last=5, stages=1), 8, steps=7)
    with pytest.raises(UserError, match=message):
        replace(sampler, **({"splits": [Split(left=3, leaves=2)]} | change))


class Bell(tiny.Mlp):
    """The exact velocity of data from N(1, 0.5^2) in every dimension: the chain is linear in its noise."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t.view(-1, 1, 1, 1).to(x)
        alpha = 1 - time
        x_0 = 1 + alpha * 0.25 / (alpha**2 * 0.25 + time**2) * (x - alpha)
        return (x - alpha * x_0) / time - x_0


def expected_share(suffix: int) -> float:
    """Of the variance of x_0, by the linear recursion: what the noise of the last ``suffix`` steps contributes."""
    times = np.linspace(1, 0, STEPS + 1)
    parts = np.zeros(STEPS)
    for step, (t, s) in enumerate(pairwise(times)):
        alpha, kept = 1 - t, (1 - t) * s / ((1 - s) * t)
        to_data = alpha * 0.25 / (alpha**2 * 0.25 + t**2)
        factor = (1 - s) * to_data + s * kept * (1 - alpha * to_data) / t
        parts *= factor**2
        parts[step] = s**2 * (1 - kept**2)
    return parts[STEPS - suffix :].sum() / parts.sum()  # at t = 1 the exact guess does not depend on x: no part of x_T


def measured_share(samples: Tensor, leaves: int) -> float:
    """Unbiased variance within stems over that of all, every dimension a sample of its own."""
    stems = samples.double().flatten(1).view(-1, leaves, tiny.DIM)
    within = stems.var(1).mean()
    between = stems.mean(1).var(0).mean() - within / leaves
    return float(within / (within + between))


def test_variance_within_stems_rises_with_the_suffix_as_computed_and_is_all_of_it_with_fresh_noise() -> None:
    shares = []
    for suffix in range(2, STEPS + 1):
        window = Suffix(first=suffix, last=suffix, stages=1)
        sampler, _ = variant("both" if suffix < STEPS else "bpt", window, 4, steps=STEPS)
        shares.append(measured_share(drawn(sampler, Bell(), 400, 4).samples, 4))
        assert shares[-1] == pytest.approx(expected_share(suffix), abs=0.03)
    assert shares == sorted(shares) and expected_share(STEPS) == 1 and expected_share(2) < 0.6


# ---- the selection


def test_best_and_worst_of_every_stem_if_good_and_bad_enough() -> None:
    z = torch.tensor([0.9, 0.5, -0.5, -0.6, 0.4, 0.1, -0.2, -0.7, 0.5, 0.3, 0.2, -0.5, 2.0, 2.0, 1.0, 0.6])
    group = torch.arange(4).repeat_interleave(4)
    found = BestWorst().chains(z, group, None)
    assert found.nonzero().flatten().tolist() == [0, 3, 7, 8, 12]
    assert BestWorst(pairs=True).chains(z, group, None).nonzero().flatten().tolist() == [0, 3]
    assert BestWorst(upper=0.95, lower=-0.65).chains(z, group, None).nonzero().flatten().tolist() == [7, 12]
    order = torch.tensor([5, 12, 0, 9, 2, 7, 15, 11, 3, 1, 8, 14, 4, 6, 13, 10])  # members need not be neighbours
    assert sorted(order[BestWorst().chains(z[order], group[order], None)].tolist()) == [0, 3, 7, 8, 12]


def test_several_stems_of_one_group() -> None:
    z = torch.tensor([0.9, -0.6, 0.7, -0.9, 0.6, 0.1])
    group, sampler = torch.zeros(6, dtype=torch.long), variant("both", SUFFIX, 2, steps=STEPS)[0]
    assert BestWorst().chains(z, group, sampler).tolist() == [True, True, True, True, True, False]
    assert BestWorst().chains(z, group, None).tolist() == [True, False, False, True, False, False]


def test_siblings_of_a_tree_are_compared_among_themselves() -> None:
    sampler, _ = variant("both", SUFFIX, 4, steps=STEPS)
    tree = replace(sampler, splits=[Split(left=2, leaves=2)])
    z, group = torch.tensor([0.9, 0.6, -0.6, -0.9]), torch.zeros(4)
    assert BestWorst().chains(z, group, tree).tolist() == [True, False, False, True]
    assert BestWorst(among="siblings").chains(z, group, tree).tolist() == [True, False, False, True]
    z = torch.tensor([0.9, -0.6, 0.7, -0.9])
    assert BestWorst().chains(z, group, tree).tolist() == [True, False, False, True]
    assert BestWorst(among="siblings").chains(z, group, tree).all()


def test_without_positives_the_guard_chooses_nothing() -> None:
    z, group = torch.tensor([0.4, -2.0, 0.4, 0.4]), torch.tensor([0, 0, 1, 1])
    assert not BestWorst().chains(z, group, None).any()
    assert BestWorst(guard=False).chains(z, group, None).tolist() == [False, True, False, False]


def test_the_history_of_updates_is_that_of_a_list() -> None:
    rng = np.random.default_rng(0)
    advantage, stages = StageHistory(stages=2, clip=1.3), []
    for _ in range(6):
        prompts, rewards = rng.integers(0, 4, size=9), rng.normal(size=9)
        stages.append((prompts, rewards))
        known = defaultdict(list)
        for before, own in stages[-3:]:
            for prompt, reward in zip(before, own, strict=True):
                known[prompt].append(reward)
        expected = [
            np.clip((reward - np.mean(known[prompt])) / (np.std(known[prompt]) + 1e-8), -1.3, 1.3)
            for prompt, reward in zip(prompts, rewards, strict=True)
        ]
        given = torch.tensor(rewards)[:, None].expand(-1, 3)
        active = torch.tensor([[True, True, False]]).expand(9, -1)
        copy = StageHistory(stages=2, clip=1.3)
        copy.load_state_dict(advantage.state_dict())
        found = advantage.advantages(given, active, torch.tensor(prompts))
        assert torch.equal(found, copy.advantages(given, active, torch.tensor(prompts)))
        np.testing.assert_allclose(found[:, 1], expected, rtol=1e-5, atol=1e-6)
        assert not found[:, 2].any()


def test_factors_of_good_and_bad() -> None:
    rewards, active = torch.tensor([[0.0], [1.0], [5.0]]), torch.ones(3, 1, dtype=torch.bool)
    plain = StageHistory(clip=1.0).advantages(rewards, active, torch.zeros(3))[:, 0]
    weighed = StageHistory(clip=1.0, good=0.5, bad=2.0).advantages(rewards, active, torch.zeros(3))[:, 0]
    torch.testing.assert_close(weighed, plain * torch.tensor([2.0, 2.0, 0.5]))


# ---- whole updates


def test_only_the_chosen_leaves_and_their_suffix_are_trained_with_the_written_loss(tmp_path: Path) -> None:
    policy_job = job(tmp_path, inner_updates=1)
    rollouts = policy_job._sampled(0)
    chains, net = rollouts.trajectory, policy_job.denoiser
    rewards = rollouts.rewards[:, -1].double().numpy()
    prompts = np.array([problem.prompt for problem in rollouts.problems])
    z = np.zeros(len(rewards))
    for prompt in "ab":
        own = prompts == prompt
        z[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std() + 1e-8)
    chosen = []
    for stem in np.arange(len(z)).reshape(-1, LEAVES):
        best, worst = stem[z[stem].argmax()], stem[z[stem].argmin()]
        chosen += [best] * int(z[best] >= 0.5) + [worst] * int(z[worst] < -0.5)
    assert 2 <= len(chosen) < len(z) and (z[chosen] > 0).any()
    found: dict[str, Tensor] = {}

    def optimise(losses: Any) -> dict[str, float]:
        net.zero_grad()
        for loss in losses:
            loss().backward()
        found.update({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        return {}

    metrics = policy_job.update(0, optimise)
    assert metrics["trained_chains"] == pytest.approx(len(chosen) / len(z))
    trained = [value is not None for value in metrics["steps/ratio_mean"]]
    assert trained == [False] * (STEPS - FIRST) + [True] * (FIRST - 1)
    net.zero_grad()
    sampler, terms = policy_job.policy.rollout.sampler, []
    rows = torch.tensor(chosen)
    for step in range(STEPS - FIRST, STEPS - 1):
        t, s = chains.times[rows, step], chains.times[rows, step + 1]
        gaussian, _ = sampler.transition(net, chains.states_at(rows, step), t, s, chains.condition.rows(rows))
        log_prob = gaussian.log_prob(chains.states_at(rows, step + 1), "mean")
        terms.append(-(torch.tensor(z[chosen]) * (log_prob - log_prob.detach()).exp()))
    torch.cat(terms).mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def state(policy_job: PolicyJob) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in policy_job.denoiser.state_dict().items()}


@dataclass(kw_only=True)
class Mostly(Reward, name="tiny_mostly"):
    """A reward that all samples get but one of each prompt."""

    medium = "image"

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Any]) -> list[float]:
        return [float(number not in (1, LEAVES + 1)) for number in range(len(completions))]


@pytest.mark.parametrize("guard", [True, False])
def test_a_reward_that_nearly_all_get_trains_nothing_but_as_released(tmp_path: Path, guard: bool) -> None:
    policy_job = job(tmp_path, reward=Mostly(), selector=BestWorst(guard=guard))
    before = state(policy_job)
    metrics = policy_job.update(0, policy_job.trainer.optimise)
    assert metrics["reward"] == pytest.approx(11 / 12)
    moved = any(not torch.equal(value, before[name]) for name, value in state(policy_job).items())
    assert moved == (not guard) and (metrics["optimizer_steps"] == 0) == guard


def test_within_the_stem_advantages_keep_pairs_where_nearly_all_succeed(tmp_path: Path) -> None:
    selector = BestWorst(upper=0.1, lower=-0.1)  # one failure among b leaves: z is 1 / sqrt(b) for the others
    policy_job = job(tmp_path, reward=Mostly(), advantage=GroupAdvantage(), selector=selector)
    metrics = policy_job.update(0, policy_job.trainer.optimise)
    assert metrics["trained_chains"] == pytest.approx(4 / 24) and metrics["optimizer_steps"] == 2


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = job(tmp_path / "whole")
    assert whole.trainer.fit(whole, whole.log)
    part = job(tmp_path / "part", updates=2)
    assert part.trainer.fit(part, part.log)
    rest = job(tmp_path / "part")
    rest.trainer.resume(rest)
    assert rest.trainer.fit(rest, rest.log)
    assert rest.policy.advantage.state_dict() == whole.policy.advantage.state_dict()
    assert rest.policy.advantage.remembered and rest.trainer.done == 4  # type: ignore[attr-defined]
    for name, value in state(whole).items():
        assert torch.equal(value, state(rest)[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(tmp_path: Path, name: str) -> None:
    """As DDPO; leaves of 4 instead of a group of 16, and at most 2 of 4 trained."""
    sampler, choices = variant(name, Suffix(first=5, last=8, stages=25), 16, steps=8)
    assert tiny.learned(tmp_path, sampler, choices) > 0.1


def test_the_halves_are_what_they_are_called() -> None:
    both, bpt, bs = (variant(name, SUFFIX, 5, steps=STEPS) for name in VARIANTS)
    assert both[0].share == bs[0].share == "prefix" and bpt[0].share == "nothing"
    assert isinstance(bpt[1].selector, AllSteps) and both[1] == bs[1] == B2Diffurl()
    assert bs[0].window.inside(STEPS).all() and both[0].outside == both[0].kernel == Ddim(eta=1.0)

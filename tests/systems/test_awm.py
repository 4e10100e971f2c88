"""AWM: gradients of its surrogate against the pretraining loss, times, ratios, penalties, and its two theorems."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.claims.awm import sampled_excess, signal
from unveil.cli.recipes import find_recipe
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.matching import LogitNormalTimes, UniformTimes
from unveil.learning.noised import NoisedViews, SamplerGrid
from unveil.learning.objectives import Clipped, Reinforce
from unveil.learning.regularisers import Velocity
from unveil.learning.views import Inner, Scores
from unveil.processes.gaussian import Flow
from unveil.recipe import build, load
from unveil.registry import UserError
from unveil.systems.awm import Awm, BoundedAdvantage, ElboVelocity, WeightedMatching, excess_variance, trust_region
from unveil.systems.awm import weighted as loss_of
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import TrainRecipe
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import OptimConfig


def awm(**likelihood: Any) -> Awm:
    own = {"draws": 3, "times": SamplerGrid(first=1, share=0.9)} | likelihood
    return Awm(likelihood=WeightedMatching(**own), kl=Velocity(), regularisers={})


def job(folder: Path, choices: Awm, prompts: int = 2, group: int = 4, **changes: Any) -> PolicyJob:
    rollout = RolloutConfig(sampler=tiny.sampler(steps=6), prompts=prompts, group_size=group)
    config = PolicyConfig(task=tiny.Bright(), reward=tiny.Shaped(), rollout=rollout, **(vars(choices) | changes))
    optim = OptimConfig(lr=2e-2, max_grad_norm=1.0, microbatch=512)
    return tiny.job(folder, config, optim=optim, snapshots=SnapshotConfig(old=trust_region()))


def gradients(policy_job: PolicyJob) -> list[dict[str, Tensor]]:
    found, net = [], policy_job.denoiser

    def optimise(losses: Any) -> dict[str, float]:
        net.zero_grad()
        for loss in losses:
            loss().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        return {}

    policy_job.update(0, optimise)
    return found


def prepared(policy_job: PolicyJob) -> tuple[NoisedViews, Tensor]:
    """The copies of the first update, and the advantage of each."""
    rollouts, choices = policy_job._sampled(0), policy_job.policy
    chains = rollouts.trajectory
    own = choices.likelihood.views(chains, chains.active.float(), rollouts.seeds, policy_job.denoiser.spec)
    return own, choices.advantage.advantages(rollouts.rewards, chains.active, rollouts.group)[own.rows, 0]


def losses(net: Any, own: NoisedViews) -> Tensor:
    """mean (u - (eps - x_0))^2 of every copy."""
    t = own.times.float().view(-1, 1, 1, 1)
    predicted = net.predict((1 - t) * own.clean + t * own.noise, own.times, own.condition)
    return (predicted - (own.noise - own.clean)).square().flatten(1).mean(1)


def test_on_policy_the_uniform_gradient_is_the_pretraining_loss_times_advantage(tmp_path: Path) -> None:
    policy_job = job(tmp_path, awm(weights="uniform"))
    (found,) = gradients(policy_job)
    own, advantage = prepared(policy_job)
    net = policy_job.denoiser
    net.zero_grad()
    (advantage * losses(net, own)).mean().backward()
    assert max(float(value.abs().max()) for value in found.values()) > 1e-3
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("weights", "factor"),
    [
        ("t", lambda t, loss: t),
        ("t2", lambda t, loss: t**2),
        ("huber", lambda t, loss: t * loss**-0.5 / 2),
        ("ghuber", lambda t, loss: t * loss**-0.75),
    ],
)
def test_other_weights_multiply_that_gradient(tmp_path: Path, weights: Any, factor: Any) -> None:
    policy_job = job(tmp_path, awm(weights=weights))
    (found,) = gradients(policy_job)
    own, advantage = prepared(policy_job)
    net = policy_job.denoiser
    net.zero_grad()
    loss = losses(net, own)
    (advantage * factor(own.times.float(), loss.detach()) * loss).mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-7)


def test_no_loss_has_log_probability_0_and_a_finite_gradient() -> None:
    none = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for weights in ("uniform", "t", "t2", "huber", "ghuber"):
        value = loss_of(none, torch.full((1,), 0.5, dtype=torch.float64), cast(Any, weights), 0.25)
        (slope,) = torch.autograd.grad(value.sum(), none)
        assert abs(value.item()) < 1e-12 and math.isfinite(float(slope))


@pytest.mark.parametrize("whole", [False, True])
def test_on_policy_ratios_per_copy_and_per_image_have_one_gradient(tmp_path: Path, whole: bool) -> None:
    """`exp_first` and `sum_first`; both are that of the score function."""
    level = {"level": "sequence", "normalise": True} if whole else {"level": "step"}
    (found,) = gradients(job(tmp_path, awm(), objective=Clipped(clip=1.0, **level)))  # type: ignore[arg-type]
    (plain,) = gradients(job(tmp_path, awm(), objective=Reinforce()))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_off_policy_ratios_are_taken_on_the_same_copies(tmp_path: Path) -> None:
    policy_job = job(tmp_path, awm(), minibatches=2)
    trainer, logged = policy_job.trainer, []
    measured = policy_job.steps.measured
    policy_job.steps.measured = lambda batch: logged.append(measured(batch)) or logged[-1]  # type: ignore
    policy_job.update(0, trainer.optimise)
    assert logged[0]["ratio_deviation"] < 1e-6 < 1e-4 < logged[1]["ratio_deviation"]


def test_the_ratio_per_image_is_that_of_the_mean_over_its_copies(tmp_path: Path) -> None:
    policy_job = job(tmp_path, awm(), objective=Clipped(clip=1.0, level="sequence", normalise=True), minibatches=2)
    steps, seen = policy_job.steps, []
    terms = Clipped.terms

    class Watched(Clipped):
        def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
            seen.append((log_prob.detach(), old.detach()))
            return terms(self, log_prob, old, advantage)

    steps.policy.objective = Watched(clip=1.0, level="sequence", normalise=True)
    policy_job.update(0, policy_job.trainer.optimise)
    assert [len(new) for new, _ in seen] == [4, 4]
    torch.testing.assert_close(seen[0][0], seen[0][1])


def test_times_are_stratified_and_those_of_the_strategies(tmp_path: Path) -> None:
    policy_job = job(tmp_path, awm())
    rollouts = policy_job._sampled(0)
    chains, spec = rollouts.trajectory, policy_job.denoiser.spec
    assert chains.times is not None

    def times(likelihood: WeightedMatching, number: int = 0) -> Tensor:
        inner = Inner(number, 2)
        own = likelihood.views(chains, chains.active.float(), rollouts.seeds, spec, inner)
        return own.times.view(8, -1)

    grid = chains.times[0]
    for first, allowed in ((0, grid[:5]), (1, grid[1:5])):  # int(0.9 * 6) = 5
        drawn = times(WeightedMatching(draws=3, times=SamplerGrid(first=first, share=0.9)))
        assert all(len(set(row)) == 3 and set(row) <= set(allowed.tolist()) for row in drawn.tolist())
    initial = SamplerGrid(share=0.9, initial=True)
    drawn = times(WeightedMatching(draws=4, times=initial))
    assert (drawn[:, 0] == 1).all() and all(set(row) <= set(grid[1:5].tolist()) for row in drawn[:, 1:].tolist())
    assert all(len(set(row)) == 4 for row in drawn.tolist()) and len(set(drawn[:, 1].tolist())) > 1
    assert (times(WeightedMatching(draws=1, times=initial)) == 1).all()
    uniform = times(WeightedMatching(draws=5, times=UniformTimes(low=0.2, shift=3.0)))
    place = uniform / (3 - 2 * uniform)  # without the shift
    assert ((place - 0.2) / 0.8 * 5).long().tolist() == [[0, 1, 2, 3, 4]] * 8
    normal = times(WeightedMatching(draws=4, times=LogitNormalTimes(shift=3.0)))
    logit = (normal.log() - (1 - normal).log()) - math.log(3)
    assert (torch.special.ndtr(logit) * 4).long().tolist() == [[0, 1, 2, 3]] * 8
    other = times(WeightedMatching(draws=5, times=UniformTimes(low=0.2, shift=3.0)), number=1)
    assert not torch.equal(other, uniform)


def test_every_time_of_the_grid_is_drawn_equally_often() -> None:
    u = (torch.arange(3) + torch.linspace(0, 1, 1001)[:-1, None]) / 3
    count = SamplerGrid(first=1, share=0.9).place(u, 9).flatten().bincount(minlength=9)
    assert count[0] == 0 and count[8] == 0 and count[1:8].float().std() < 0.01 * count.sum() / 7
    start = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1, None] / 3
    steps = SamplerGrid(share=0.9, initial=True).spaced(start, 3, 9)
    count = steps.flatten().bincount(minlength=9)
    assert (steps[:, 0] == 0).all() and count[0] == 1000
    assert count[8] == 0 and count[1:8].float().std() < 0.01 * 2000 / 7


def test_the_advantage_is_bounded() -> None:
    rewards, group = torch.rand(8, 1), torch.tensor([0] * 4 + [1] * 4)
    rewards[0] = 100.0
    active = torch.ones(8, 1, dtype=torch.bool)
    plain = GroupAdvantage(scale="batch_std", clip=1.5).advantages(rewards, active, group)
    bounded = BoundedAdvantage(clip=1.5, largest=0.5).advantages(rewards, active, group)
    assert float(bounded.abs().max()) == pytest.approx(0.5)
    torch.testing.assert_close(bounded * 3, plain)


@pytest.mark.parametrize(("advantage", "convex"), [(-1.0, True), (-1.2, False), (0.3, True)])
def test_with_the_trust_region_the_loss_is_convex_as_long_as_the_advantage_is_bounded(
    advantage: float, convex: bool
) -> None:
    stream = torch.Generator().manual_seed(0)
    target, average, v = (torch.randn(6, generator=stream, dtype=torch.float64) for _ in range(3))

    def loss(v: Tensor) -> Tensor:
        return advantage * (v - target).square().mean() + (v - average).square().mean()

    curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, v))
    assert bool((curvature >= -1e-12).all()) == convex


def test_the_trust_region_lags_by_little() -> None:
    assert [round(trust_region().decay_at(update), 4) for update in (1, 100, 300, 1000)] == [0.001, 0.1, 0.3, 0.3]


def test_the_bound_divides_by_the_noise_of_the_chain() -> None:
    t = torch.tensor([0.2, 0.995], dtype=torch.float64)
    rows = torch.arange(2)
    own = NoisedViews(
        rows=rows, steps=rows, length=t, trajectory=cast(Any, None), times=t, seeds=rows, coefficient=t
    )  # fmt: skip
    here, there = (Scores(log_prob=t, forwards=0, velocity=torch.full((2, 3), v)) for v in (1.0, 3.0))
    found, weight = ElboVelocity(beta=1.0).penalty(own, here, there, torch.ones(2, 1))
    sigma = [0.7 * math.sqrt(0.25), 0.7 * math.sqrt(99)]
    torch.testing.assert_close(found.double(), torch.tensor([4 / (2 * s**2) for s in sigma], dtype=torch.float64))
    assert weight.tolist() == [1, 1]


def test_the_noisy_target_varies_by_kappa_more() -> None:
    """Sampled with a fixed seed; the standard error is 0.5 % or less."""
    for s, t, known in ((0.4, 0.5, 3.2), (0.25, 0.5, 0.5)):
        kappa = float(excess_variance(Flow(), torch.tensor([s]).double(), torch.tensor([t]).double()))
        assert kappa == pytest.approx(known)
        assert sampled_excess(s, t, 0, 1_000_000) == pytest.approx(kappa, rel=0.02)
    times = torch.tensor([0.0, 0.2, 0.4, 0.4999], dtype=torch.float64)
    grows = excess_variance(Flow(), times, torch.full((4,), 0.5, dtype=torch.float64))
    assert grows[0] == 0 and bool((grows[1:] > grows[:-1]).all()) and grows[3] > 1e3


def test_signal_to_noise_of_gradients() -> None:
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 1000, generator=stream, dtype=torch.float64)
    pure, half = signal(noise), signal(1.0 + noise)
    assert abs(pure["cosine"]) < 0.02 and half["cosine"] == pytest.approx(0.5, abs=0.02)
    assert half["snr"] == pytest.approx(1.0, abs=0.1)


def test_it_learns(tmp_path: Path) -> None:
    choices = replace(awm(draws=4), regularisers={"trust": Velocity(beta=1.0, towards="old")})
    policy_job = job(tmp_path, choices, prompts=4, group=16)
    trainer, rewards = policy_job.trainer, []
    for update in range(25):
        rewards.append(policy_job.update(update, trainer.optimise)["reward"])
        trainer.snapshots.after_update(update + 1)
    assert rewards[-1] - rewards[0] > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedMatching(draws=None, times=UniformTimes()), "draws: needed"),
        (lambda: UniformTimes(low=0.5, high=0.5), "high: should be greater than low"),
        (lambda: BoundedAdvantage(clip=None), "clip: needed"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_more_copies_than_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws: should be at most 6"):
        job(tmp_path, awm(draws=7, times=UniformTimes()))


def test_the_recipe_at_the_papers_size_has_the_papers_choices() -> None:
    recipe = build(TrainRecipe, load(find_recipe("awm/full")))
    own = vars(Awm()) | {"kl": Velocity(beta=1e-4), "likelihood": WeightedMatching(times=SamplerGrid(share=0.9))}
    for name, value in own.items():
        assert getattr(recipe.policy, name) == value
    assert recipe.snapshots.old == trust_region()

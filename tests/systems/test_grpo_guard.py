"""GRPO-Guard: the identity of its log-ratio, its step weights, what is refused, what is logged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.learning.latents import StepViews
from unveil.learning.objectives import Clipped
from unveil.processes.gaussian import Gaussian
from unveil.processes.kernels import CoefficientsPreserving, DanceSde, Ddim, FlowSde, Kernel
from unveil.registry import UserError
from unveil.samplers.latents import LatentTrajectory
from unveil.systems.grpo_guard import GrpoGuard, RegulatedRatio, StepWeighted
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob


def job(folder: Path, kernel: Kernel | None = None, **changes: Any) -> PolicyJob:
    sampler = tiny.sampler(steps=6, kernel=kernel or FlowSde(noise=0.7))
    rollout = RolloutConfig(sampler=sampler, prompts=2, group_size=4)
    return tiny.job(folder, PolicyConfig(**{"task": tiny.Bright(), "rollout": rollout, **vars(GrpoGuard()), **changes}))


def drawn(policy_job: PolicyJob, likelihood: RegulatedRatio) -> tuple[LatentTrajectory, StepViews]:
    """Chains and all their noisy steps, everything in float64, the means recomputed in it."""
    rollouts = policy_job._sampled(0)
    chains, net = rollouts.trajectory, policy_job.denoiser.double()
    assert chains.scored is not None
    chains = replace(chains, scored=chains.scored.double())
    views = likelihood.views(chains, chains.decided.float(), rollouts.seeds, net.spec)
    (x, t), (_, s) = views.before, views.after
    with torch.no_grad():
        gaussian, _ = policy_job.policy.rollout.sampler.transition(net, x, t, s, views.condition)  # type: ignore[attr-defined]
    means = torch.zeros(*chains.noisy.shape, *tiny.SHAPE, dtype=torch.float64)
    means[views.rows, views.steps] = gaussian.mean
    chains = replace(chains, means=means)
    return chains, replace(views, trajectory=chains)


@pytest.mark.parametrize("kernel", [FlowSde(noise=0.7), FlowSde(noise=0.15), DanceSde(noise=0.3), Ddim(eta=1.0)])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_identity_in_double_precision(tmp_path: Path, kernel: Kernel, reduce: Any) -> None:
    """std (log rho + |D|^2 / (2 std^2)), from densities, is the mean of D z; rho^ is 1 before the policy has moved."""
    likelihood = RegulatedRatio(reduce=reduce)
    policy_job = job(tmp_path, kernel, likelihood=likelihood)
    chains, views = drawn(policy_job, likelihood)
    net, sampler = policy_job.denoiser, policy_job.policy.rollout.sampler

    def score(ratio: Any) -> Tensor:
        with torch.no_grad():
            return replace(likelihood, ratio=ratio).score(net, views, sampler).log_prob[:, 0]  # type: ignore[arg-type]

    assert score("ratio_norm").abs().max() == 0
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(views)))
        (x, t), (after, s) = views.before, views.after
        new, _ = sampler.transition(net, x, t, s, views.condition)  # type: ignore[attr-defined]
    assert chains.means is not None
    old = Gaussian(chains.means[views.rows, views.steps], new.std)
    log_rho = new.log_prob(after, reduce) - old.log_prob(after, reduce)
    squares = (new.mean - old.mean).square().flatten(1)
    bias = (squares.mean(1) if reduce == "mean" else squares.sum(1)) / (2 * new.std**2)
    product = ((new.mean - old.mean) * (after - old.mean) / new.std.view(-1, 1, 1, 1)).flatten(1)
    direct = product.mean(1) if reduce == "mean" else product.sum(1)
    found = score("ratio_norm")
    assert found.dtype == torch.float64 and found.abs().max() > 1e-4
    torch.testing.assert_close(found, direct, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, new.std * (log_rho + bias), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(score("mean_only"), log_rho + bias, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(score("none"), log_rho, rtol=1e-7, atol=1e-9)


def test_the_left_shift_and_its_removal() -> None:
    """A known shift of the mean: over many z, E log rho is -|D|^2 / (2 std^2), E log rho^ is 0 and its std |D|."""
    noise = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.full((20000,), 0.1, dtype=torch.float64)
    old = Gaussian(torch.zeros_like(noise), std)
    new = Gaussian(torch.full_like(noise, 0.05), std)
    after = old.sample(noise)
    plain, centred, guarded = (
        RegulatedRatio(ratio=ratio, reduce="sum").log_ratio(new, old, after)  # type: ignore[arg-type]
        for ratio in ("none", "mean_only", "ratio_norm")
    )
    length = 0.1  # of the shift (0.05, 0.05, 0.05, 0.05)
    assert float(plain.mean()) == pytest.approx(-(length**2) / 0.02, abs=0.03)
    assert float(centred.mean()) == pytest.approx(0, abs=0.03) and float(centred.std()) == pytest.approx(1, rel=0.02)
    assert float(guarded.mean()) == pytest.approx(0, abs=0.003)
    assert float(guarded.std()) == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize("kernel", [FlowSde(noise=0.7), DanceSde(noise=0.3)])
def test_first_ratios_are_one_and_the_log_tells_signs_apart(tmp_path: Path, kernel: Kernel) -> None:
    policy_job = job(tmp_path, kernel, objective=Clipped(clip=1e-5, level="step"), minibatches=1, inner_updates=2)
    seen: list[dict[str, Any]] = []
    measured = policy_job.steps.measured
    policy_job.steps.measured = lambda batch: seen.append(measured(batch)) or seen[-1]  # type: ignore
    policy_job.update(0, policy_job.trainer.optimise)
    first, second = seen
    assert first["ratio_deviation"] < 1e-6 and first["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert len(second["steps/log_ratio_std"]) == 5
    spread = [one["steps/log_ratio_std"] for one in (first, second)]
    assert all(after > before for before, after in zip(*spread, strict=True))
    assert any(share > 0 for share in second["steps/clipped_good"])
    assert json.dumps(second)


def test_clipped_shares_by_hand() -> None:
    """Two good units of which one has escaped, three bad ones of which two have, all at one step; then the good ones at
    another. Steps without such units have no number."""
    log_ratio = torch.tensor([0.5, 0.05, -0.5, -0.4, 0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, 2.0, -1.0, -1.0, -3.0])
    objective, old = Clipped(clip=0.1, level="step"), torch.full((5,), -2.0, dtype=torch.float64)
    step = torch.full((5,), 2)
    said = objective.step_diagnostics(old + log_ratio, old, advantage, step)
    assert all(own[:2] == [None, None] and len(own) == 3 for own in said.values())
    found = {name: own[2] for name, own in said.items()}
    assert (found["clipped_good"], found["clipped_bad"]) == (0.5, pytest.approx(2 / 3))
    assert found["log_ratio_mean"] == pytest.approx(0.03)
    assert found["log_ratio_std"] == pytest.approx(float(log_ratio.std(correction=0)))
    means = objective.diagnostics(old + log_ratio, old, advantage)
    assert {name: found[name] for name in means} == pytest.approx(means)
    step[:2] = 0
    said = objective.step_diagnostics(old + log_ratio, old, advantage, step)
    assert said["clipped_bad"][0] is None and said["clipped_good"] == [0.5, None, None]
    assert said["log_ratio_std"][0] == pytest.approx(float(log_ratio[:2].std(correction=0)))


@pytest.mark.parametrize("kernel", [FlowSde(noise=0.7), DanceSde(noise=0.3)])
def test_step_weights_by_hand(tmp_path: Path, kernel: Kernel) -> None:
    policy_job = job(tmp_path, kernel)
    rollouts = policy_job._sampled(0)
    chains = rollouts.trajectory
    views = policy_job.policy.likelihood.views(chains, chains.decided.float(), [], policy_job.denoiser.spec)
    t = 1 - torch.arange(6, dtype=torch.float64) / 6
    rate = 0.49 * t / (1 - torch.where(t == 1, t - 1 / 6, t)) if kernel.name == "flow" else torch.full((6,), 0.09)
    bracket = 1 + rate * (1 - t) / (2 * t)
    wanted = {
        "one": torch.ones(6), "inverse_length": torch.full((6,), 6.0), "slope": 6 / bracket, "dance": 6 * bracket,
        "std": (rate / 6).sqrt(),
    }  # fmt: skip
    for delta, expected in wanted.items():
        weighting = StepWeighted(delta=delta)  # type: ignore[arg-type]
        found = weighting.factor(views, chains).view(8, 6)
        torch.testing.assert_close(found, expected.double().expand(8, 6), rtol=1e-6, atol=1e-9)
        policy, kl = weighting.weights(views, torch.ones(48), chains, lambda value: value)
        torch.testing.assert_close(policy[:, 0], (found / 48).flatten().float())
        torch.testing.assert_close(kl, torch.full((48, 1), 1 / 48))


def velocity_gradient(policy_job: PolicyJob) -> tuple[Any, Any, Tensor, Tensor]:
    """Trajectory, views, d log rho^ / d velocity of every step up to its sign, and the noise z that it was drawn by."""
    likelihood = RegulatedRatio(reduce="sum")
    chains, views = drawn(policy_job, likelihood)
    (x, t), (after, s) = views.before, views.after
    velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).requires_grad_()
    process, kernel = policy_job.denoiser.spec.process, policy_job.policy.rollout.sampler.kernel
    new = kernel.step(process, process.guess(velocity, "u", x, t), x, t, s)
    assert chains.means is not None
    old = Gaussian(chains.means[views.rows, views.steps], new.std)
    likelihood.log_ratio(new, old, after).sum().backward()
    assert velocity.grad is not None
    return chains, views, -velocity.grad, (after - old.mean) / new.std.view(-1, 1, 1, 1)


@pytest.mark.parametrize("kernel", [FlowSde(noise=0.7), DanceSde(noise=0.3)])
def test_slope_makes_gradients_of_all_steps_alike(tmp_path: Path, kernel: Kernel) -> None:
    """d log rho^ / d velocity is z (t - s) (1 + g^2 (1 - t) / (2 t)) / dimensions, so times ``slope`` it is z."""
    chains, views, gradient, noise = velocity_gradient(job(tmp_path, kernel, likelihood=RegulatedRatio(reduce="sum")))
    factor = StepWeighted(delta="slope").factor(views, chains).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient * factor, noise, rtol=1e-6, atol=1e-8)


def test_two_weights_for_the_dance_kernel(tmp_path: Path) -> None:
    """The weight as stated leaves the square of the bracket in a step's gradient."""
    policy_job = job(tmp_path, DanceSde(noise=0.3), likelihood=RegulatedRatio(reduce="sum"))
    chains, views, gradient, noise = velocity_gradient(policy_job)
    factor = StepWeighted(delta="dance").factor(views, chains).view(-1, 1, 1, 1)
    t = views.before[1]
    bracket = (1 + 0.09 * (1 - t) / (2 * t)).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient * factor, noise * bracket**2, rtol=1e-6, atol=1e-8)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cps' leaves the deviation out .* \(allowed: flow, dance, ddim\)"):
        job(tmp_path, CoefficientsPreserving(noise=0.8))
    with pytest.raises(UserError, match=r"'squares' .* \(allowed: density\)"):
        RegulatedRatio(form="squares")


def test_it_learns(tmp_path: Path) -> None:
    assert tiny.learned(tmp_path, tiny.sampler(steps=8), GrpoGuard()) > 0.1

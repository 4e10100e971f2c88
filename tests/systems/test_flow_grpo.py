"""Flow-GRPO and its relatives: marginals of the SDE, windows, losses as composed, exact first ratios."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.denoisers.continuous import Condition
from unveil.learning.views import Inner
from unveil.processes.kernels import CoefficientsPreserving, Ddim, FlowSde
from unveil.samplers.base import Sampler
from unveil.samplers.latents import Noise
from unveil.systems.flow_grpo import FlowGrpo, variant
from unveil.training.outcome import Outcome
from unveil.training.policy_config import PolicyConfig, RolloutConfig

VARIANTS = ("full", "fast", "cps", "mix", "flash", "dance")


class Bell(tiny.Mlp):
    """The exact velocity of data from N(1, 0.5^2) in every dimension."""

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t.view(-1, 1, 1, 1).to(x)
        alpha, variance = 1 - time, (1 - time) ** 2 * 0.25 + time**2
        x_0 = 1 + alpha * 0.25 / variance * (x - alpha)
        return ((x - alpha * x_0) / time) - x_0


def finished(sampler: Sampler, count: int = 512) -> Tensor:
    net = Bell()
    start = Noise(condition=net.condition([""] * count), problems=list(range(count)), copies=[0] * count)
    return sampler.sample(net, start, list(range(count))).samples


def test_the_sde_keeps_the_marginals_in_the_limit() -> None:
    """512 chains of 32 dimensions: the standard error of the mean is 0.004, of the deviation 0.003."""
    ode = finished(tiny.sampler(steps=200, kernel=Ddim(eta=0.0)))
    sde = finished(tiny.sampler(steps=200, kernel=FlowSde(noise=0.7)))
    for samples in (ode, sde):
        assert float(samples.mean()) == pytest.approx(1, abs=0.02)
        assert float(samples.std()) == pytest.approx(0.5, rel=0.03)


def test_without_its_correction_the_drift_gives_another_distribution() -> None:
    class Uncorrected(FlowSde):
        def step(self, process: Any, guess: Any, x: Tensor, t: Tensor, s: Tensor) -> Any:
            plain = Ddim(eta=0.0).step(process, guess, x, t, s)
            return plain._replace(std=super().step(process, guess, x, t, s).std)

    wrong = finished(tiny.sampler(steps=200, kernel=Uncorrected(noise=0.7)))
    assert abs(float(wrong.std()) - 0.5) > 0.05


def test_few_steps_leave_noise_with_flow_and_none_with_cps() -> None:
    steps = [finished(tiny.sampler(steps=5, kernel=kernel)) for kernel in (FlowSde(), CoefficientsPreserving())]
    assert float(steps[0].std()) > float(steps[1].std())


def composed(name: str, **changes: Any) -> PolicyConfig:
    sampler, choices = variant(name, steps=8)
    rollout = RolloutConfig(sampler=sampler, prompts=2, group_size=4)
    return PolicyConfig(**({"task": tiny.Bright(), "rollout": rollout, **vars(choices)} | changes))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_relative_runs_and_its_first_ratios_are_one(tmp_path: Path, name: str) -> None:
    job = tiny.job(tmp_path, composed(name))
    seen = []

    def optimise(losses: Any) -> dict[str, float]:
        with torch.no_grad():
            seen.append(sum(float(loss()) for loss in losses))
        return {}

    metrics = job.update(0, optimise)
    assert len(seen) == 2 and metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio_deviation"] < 1e-6
    assert ("kl" in metrics) == (name in ("full", "cps"))


@pytest.mark.parametrize(
    ("name", "trained", "starts"),
    [
        ("full", range(7), 8), ("fast", None, 8), ("cps", range(7), 8), ("mix", range(4), 2), ("flash", range(4), 2),
        ("dance", None, 2),
    ],
)  # fmt: skip
def test_what_is_trained_and_shared(tmp_path: Path, name: str, trained: range | None, starts: int) -> None:
    job = tiny.job(tmp_path, composed(name))
    rollouts = job._sampled(0)
    chains, policy = rollouts.trajectory, job.policy
    advantages = Outcome.of(rollouts).advantages(policy.advantage)
    chosen = policy.selector.choose(advantages, chains, rollouts.seeds, job.denoiser.spec)
    views = job.steps.batch(rollouts, advantages, chosen, Inner(), keep_old=False).views
    steps = [sorted(views.steps[views.rows == row].tolist()) for row in range(8)]
    if trained is not None:
        assert steps == [list(trained)] * 8
    elif name == "fast":
        assert steps == [steps[0]] * 8 and steps[0][1] == steps[0][0] + 1 <= 3
    else:
        assert {len(own) for own in steps} == {round(0.6 * 7)} and len({tuple(own) for own in steps}) > 1
        assert all(7 not in own for own in steps)
    assert chains.scored is not None and chains.steps == (6 if name == "flash" else 8)
    assert len(chains.scored[:, 0].flatten(1).unique(dim=0)) == starts


def test_squares_are_the_density_without_its_factor(tmp_path: Path) -> None:
    """CPS's surrogate, recorded and scored, against the formula."""
    job = tiny.job(tmp_path, composed("cps"))
    rollouts = job._sampled(0)
    chains, likelihood = rollouts.trajectory, job.policy.likelihood
    for reduce in ("mean", "sum"):
        likelihood.reduce = reduce  # type: ignore[attr-defined]
        views = likelihood.views(chains, chains.decided.float(), [], job.denoiser.spec)
        with torch.no_grad():
            scores = likelihood.score(job.denoiser, views, job.policy.rollout.sampler)
        squares = (views.after[0] - scores.mean).double().square().flatten(1)
        expected = -(squares.mean(1) if reduce == "mean" else squares.sum(1))
        torch.testing.assert_close(scores.log_prob[:, 0], expected, rtol=1e-5, atol=1e-7)
        recorded = likelihood.recorded(views, chains)
        assert recorded is not None
        torch.testing.assert_close(recorded[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_batch_deviation_and_group_mean(tmp_path: Path) -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 60.0])[:, None].expand(-1, 2)
    active, group = torch.ones(6, 2, dtype=torch.bool), torch.tensor([4, 4, 4, 7, 7, 7])
    found = FlowGrpo().advantage.advantages(rewards, active, group)[:, 0]
    final = rewards[:, 0]
    deviation = math.sqrt(float(((final - final.mean()) ** 2).sum()) / 5)
    expected = torch.tensor([-1.0, 0.0, 1.0, -20.0, -10.0, 30.0]) / (deviation + 1e-4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_relative_learns(tmp_path: Path, name: str) -> None:
    """Bright and dark images on demand: 25 updates of 64 images of 32 dimensions, the same settings for all."""
    assert tiny.learned(tmp_path, *variant(name, steps=8)) > 0.1

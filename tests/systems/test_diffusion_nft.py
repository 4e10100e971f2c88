"""DiffusionNFT: the identities of its loss, its maps and schedules, and the loss of the job against the written one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.cli.recipes import find_recipe
from unveil.learning.noised import SamplerGrid
from unveil.learning.regularisers import Velocity
from unveil.processes.gaussian import GaussianProcess, VariancePreserving
from unveil.recipe import build, load
from unveil.registry import UserError
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import DpmSolver2M
from unveil.systems.diffusion_nft import BranchViews, DiffusionNft, ImplicitLikelihood, Optimality, old_schedule
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import TrainRecipe
from unveil.training.snapshots import SnapshotConfig, Snapshots
from unveil.training.trainer import OptimConfig

TIMES = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


class Samples:
    """Stands in for a trajectory: six finished samples in float64."""

    def __init__(self) -> None:
        self.samples = torch.randn(6, *tiny.SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def views(process: GaussianProcess | None = None, loss: Any = "velocity") -> BranchViews:
    rows, one = torch.arange(6), torch.ones(6)
    likelihood = ImplicitLikelihood(loss=loss)
    spec = tiny.Mlp(process).spec
    return likelihood.made(
        spec, rows=rows, steps=rows, length=one, trajectory=cast(Any, Samples()), times=TIMES, seeds=rows,
        coefficient=one,
    )  # fmt: skip


def velocities(count: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(1)
    return [torch.randn(6, *tiny.SHAPE, generator=stream, dtype=torch.float64) for _ in range(count)]


def said(own: BranchViews, velocity: Tensor) -> Tensor:
    """What a network of a flow with this velocity says: x_0 = x_t - t v."""
    t = own.times.view(-1, 1, 1, 1)
    return (1 - t) * own.clean + t * own.noise - t * velocity


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).mean(1)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_identity_of_the_plain_loss(beta: float) -> None:
    """r |v+ - v|^2 + (1 - r) |v- - v|^2 = |v_old - v|^2 + 2 beta (2r - 1) <d, v_old - v> + beta^2 |d|^2."""
    own, (new, old) = views(), velocities(2)
    target = own.noise - own.clean
    r = torch.linspace(0, 1, 6, dtype=torch.float64)
    found = ImplicitLikelihood(beta=beta, loss="velocity").log_prob(
        said(own, new), said(own, old), own.clean, own.weight
    )
    loss = -beta * (torch.stack([r, 1 - r], 1) * found).sum(1)
    d, error = new - old, old - target
    want = dot(error, error) + 2 * beta * (2 * r - 1) * dot(d, error) + beta**2 * dot(d, d)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)


def gradient(
    own: BranchViews, new: Tensor, old: Tensor, r: Tensor, loss: Any, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss (6,) and its gradient with respect to the network's velocity."""
    new = new.clone().requires_grad_()
    found = ImplicitLikelihood(beta=beta, loss=loss).log_prob(said(own, new), said(own, old), own.clean, own.weight)
    losses = -(torch.stack([r, 1 - r], 1) * found).sum(1)
    (own_gradient,) = torch.autograd.grad(losses.sum(), new)
    return losses.detach(), own_gradient


def test_at_an_even_chance_there_is_no_policy_gradient_and_a_pull_to_old() -> None:
    own, (new, old) = views(), velocities(2)
    half = torch.full((6,), 0.5, dtype=torch.float64)
    _, at_old = gradient(own, old, old, half, "velocity")
    assert at_old.abs().max() < 1e-15
    _, elsewhere = gradient(own, new, old, half, "velocity")
    torch.testing.assert_close(elsewhere, 2 * (new - old) / tiny.DIM, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["normalised", "x0", "velocity"])
def test_at_the_old_policy_the_loss_does_not_depend_on_r_but_its_gradient_does(loss: Any) -> None:
    own, (old,) = views(loss=loss), velocities(1)
    r = [torch.full((6,), value, dtype=torch.float64) for value in (0.1, 0.5, 0.9)]
    (low, down), (half, still), (high, up) = (gradient(own, old, old, one, loss) for one in r)
    torch.testing.assert_close(low, half, rtol=1e-14, atol=0)
    torch.testing.assert_close(high, half, rtol=1e-14, atol=0)
    torch.testing.assert_close(up, -down, rtol=1e-10, atol=1e-14)
    assert still.abs().max() < 1e-15 < 1e-4 < up.abs().min(dim=0).values.max()


def test_the_minimiser_of_a_sample_is_not_its_target() -> None:
    """v_old + (2r - 1) (v - v_old) / beta."""
    own, (old,) = views(), velocities(1)
    beta, r = 0.5, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    best = old + ((2 * r - 1) / beta).view(-1, 1, 1, 1) * (own.noise - own.clean - old)
    _, at_best = gradient(own, best, old, r, "velocity", beta)
    assert at_best.abs().max() < 1e-14


def test_the_population_minimiser_is_the_papers() -> None:
    """Theorem 3.2, six targets being equally probable at one x_t: v_old + (2 / beta) Delta, Delta by either side."""
    own, beta, r = views(), 0.5, torch.linspace(0.1, 0.7, 6, dtype=torch.float64)
    target = own.noise - own.clean
    old, share = target.mean(0, keepdim=True), r.mean()
    good, bad = (((each / each.sum()).view(-1, 1, 1, 1) * target).sum(0, keepdim=True) for each in (r, 1 - r))
    delta = share * (good - old)
    torch.testing.assert_close(delta, (1 - share) * (old - bad), rtol=1e-12, atol=1e-14)
    best = (old + 2 / beta * delta).expand_as(target)
    _, at_best = gradient(own, best, old.expand_as(target), r, "velocity", beta)
    assert at_best.sum(0).abs().max() < 1e-14 < 1e-4 < at_best.abs().max()


def test_the_weight_of_a_branch_is_a_number_without_gradient() -> None:
    own, (new, old) = views(loss="normalised"), velocities(2)
    t = own.times.view(-1, 1, 1, 1)
    r = torch.linspace(0, 1, 6, dtype=torch.float64)
    losses, found = gradient(own, new, old, r, "normalised", 0.7)
    x = (1 - t) * own.clean + t * own.noise
    want, slope = torch.zeros(6, dtype=torch.float64), torch.zeros_like(new)
    for share, sign in ((r, 1), (1 - r, -1)):
        error = x - t * (old + sign * 0.7 * (new - old)) - own.clean
        weight = error.abs().flatten(1).mean(1)
        want += share * dot(error, error) / weight / 0.7
        slope += (share / weight).view(-1, 1, 1, 1) * 2 * error / tiny.DIM * (-sign) * t
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-14)


def test_all_parameterisations_have_one_loss() -> None:
    """Networks that predict eps, x_0, v or u and say the same of x_0."""
    process = VariancePreserving()
    own = views(process)
    own.trajectory.samples = own.trajectory.samples.float()
    likelihood, losses = ImplicitLikelihood(beta=0.3), []
    x = process.corrupt(own.clean, own.times, own.noise)
    guesses = [0.2 * x + 0.1, torch.tanh(x)]
    for kind in ("eps", "x0", "v", "u"):
        both = []
        for x_0 in guesses:
            given = process.rederived(x_0, x, own.times)
            prediction = process.target(cast(Any, kind), given.x0, given.eps, own.times)
            guess = process.guess(prediction, cast(Any, kind), x, own.times)
            both.append(guess.x0)
        losses.append(likelihood.log_prob(both[0], both[1], own.clean, own.weight))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-4)


def test_from_advantage_to_probability() -> None:
    advantage = torch.tensor([-7.0, -2.5, 0.0, 0.5, 9.0])
    expected = {
        "all": [0, 0.25, 0.5, 0.55, 1], "positive_only": [0.5, 0.5, 0.5, 0.55, 1],
        "negative_only": [0, 0.25, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6, 0.6], "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }  # fmt: skip
    for mode, want in expected.items():
        found = Optimality(limit=5.0, mode=cast(Any, mode)).probability(advantage)
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float32))
    weight, kl = Optimality(limit=2.0, branches="positive").weights(views(), torch.zeros(6), None, lambda x: x)
    assert weight.tolist() == [[pytest.approx(1 / 6), 0.0]] * 6 and float(kl.sum()) == pytest.approx(1)


def test_schedules_of_the_old_policy() -> None:
    decays = [[round(old_schedule(cast(Any, kind)).decay_at(i), 4) for i in (1, 75, 76, 300, 900)] for kind in range(3)]
    assert decays == [[0, 0, 0, 0, 0], [0.001, 0.075, 0.076, 0.3, 0.5], [0, 0, 0.0075, 0.999, 0.999]]


def test_the_average_that_is_evaluated_warms_up() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    snapshots = Snapshots(net, SnapshotConfig(ema_decay=0.9, ema_warmup=True), keep_reference=False)
    torch.nn.init.ones_(net.weight)
    left = 1.0
    for update in (1, 2, 100):
        snapshots.after_update(update)
        left *= min((1 + update) / (10 + update), 0.9)
        assert float(snapshots.sets["ema"].values["weight"]) == pytest.approx(1 - left)


def job(folder: Path, choices: DiffusionNft, net: tiny.Mlp | None = None) -> PolicyJob:
    sampler = LatentSampler(steps=6, solver=DpmSolver2M())
    rollout = RolloutConfig(sampler=sampler, prompts=2, group_size=4, drawn_by="old")
    config = PolicyConfig(task=tiny.Bright(), rollout=rollout, **vars(choices))
    return tiny.job(folder, config, net, snapshots=SnapshotConfig(old=old_schedule(1)))


def test_every_time_of_the_grid_but_the_last_and_noise_of_its_own(tmp_path: Path) -> None:
    choices = DiffusionNft()
    policy_job = job(tmp_path, choices)
    rollouts = policy_job._sampled(0)
    chains = rollouts.trajectory
    own = choices.likelihood.views(chains, chains.active.float(), rollouts.seeds, policy_job.denoiser.spec)
    grid = policy_job.policy.rollout.sampler.times(policy_job.denoiser)  # type: ignore[attr-defined]
    assert torch.equal(own.times.view(8, 5), grid[:5].expand(8, 5)) and own.steps.tolist() == [0, 1, 2, 3, 4] * 8
    assert len({tuple(noise.flatten().tolist()) for noise in own.noise}) == 40
    three = replace(choices.likelihood, draws=3).views(
        chains, chains.active.float(), rollouts.seeds, policy_job.denoiser.spec
    )
    assert all(len(set(steps)) == 3 for steps in three.steps.view(8, 3).tolist())


@pytest.mark.parametrize("moved", [False, True])
def test_the_jobs_gradient_is_that_of_the_written_loss(tmp_path: Path, moved: bool) -> None:
    beta, strength = 0.6, 0.3
    choices = DiffusionNft(likelihood=ImplicitLikelihood(beta=beta), kl=Velocity(beta=strength))
    policy_job = job(tmp_path, choices)
    net, snapshots = policy_job.denoiser, policy_job.trainer.snapshots
    start = tiny.Mlp()
    if moved:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    rollouts = policy_job._sampled(0)
    found: list[dict[str, Tensor]] = []

    def optimise(losses: Any) -> dict[str, float]:
        net.zero_grad()
        for loss in losses:
            loss().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        return {}

    logged = policy_job.update(0, optimise)
    assert set(snapshots.sets) == {"reference", "old"}
    chains = rollouts.trajectory
    advantage = choices.advantage.advantages(rollouts.rewards, chains.active, rollouts.group)[:, 0]
    own = choices.likelihood.views(chains, chains.active.float(), rollouts.seeds, net.spec)
    t = own.times.float().view(-1, 1, 1, 1)
    x = (1 - t) * own.clean + t * own.noise
    old = start.predict(x, own.times, own.condition).detach()
    net.zero_grad()
    new = net.predict(x, own.times, own.condition)
    r = 0.5 + 0.5 * advantage[own.rows] / 5

    def branch(velocity: Tensor) -> Tensor:
        error = x - t * velocity - own.clean
        return error.square().flatten(1).mean(1) / error.abs().flatten(1).mean(1).detach()

    plus, minus = branch(beta * new + (1 - beta) * old), branch((1 + beta) * old - beta * new)
    ahead = (new - old).square().flatten(1).mean(1).detach()
    assert logged["old_deviation"] == pytest.approx(ahead.mean().item(), rel=2e-3, abs=1e-9)
    by_step = [ahead[own.steps == step].mean().item() for step in range(5)]
    assert logged["steps/old_deviation"] == pytest.approx(by_step, rel=2e-3, abs=1e-9)
    assert (logged["old_deviation"] > 1e-6) == moved
    ((5 / beta * (r * plus + (1 - r) * minus)).mean() + strength * (new - old).square().mean()).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[0][name], parameter.grad, rtol=2e-3, atol=1e-6)


def test_it_learns(tmp_path: Path) -> None:
    choices = DiffusionNft(likelihood=ImplicitLikelihood(beta=1.0), kl=Velocity())
    sampler = LatentSampler(steps=8)
    rollout = RolloutConfig(sampler=sampler, prompts=4, group_size=16, drawn_by="old")
    config = PolicyConfig(task=tiny.Bright(), reward=tiny.Shaped(), rollout=rollout, **vars(choices))
    optim = OptimConfig(lr=2e-2, max_grad_norm=1.0, microbatch=512)
    policy_job = tiny.job(tmp_path, config, optim=optim, snapshots=SnapshotConfig(old=old_schedule(1)))
    trainer, rewards = policy_job.trainer, []
    for update in range(25):
        rewards.append(policy_job.update(update, trainer.optimise)["reward"])
        trainer.snapshots.after_update(update + 1)
    assert rewards[-1] - rewards[0] > 0.1


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (ImplicitLikelihood(draws=6), "draws: should be at most 5"),
        (ImplicitLikelihood(times=SamplerGrid(first=6)), "leave none of the times"),
    ],
)
def test_copies_that_the_grid_does_not_have_are_refused(
    tmp_path: Path, likelihood: ImplicitLikelihood, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(tmp_path, DiffusionNft(likelihood=likelihood))


def test_the_recipe_at_the_papers_size_has_the_papers_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = build(TrainRecipe, load(find_recipe("diffusion_nft/full")))
    choices, policy = DiffusionNft(), recipe.policy
    for name, value in vars(choices).items():
        assert getattr(policy, name) == value
    assert recipe.snapshots.old == old_schedule(1) and policy.rollout.drawn_by == "old"
    assert policy.rollout.prompts * policy.rollout.group_size == 1152

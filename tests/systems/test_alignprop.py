"""Direct reward gradients: against finite differences, loops written by hand, stored chains; what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.denoisers.load import load_denoiser
from unveil.learning.regularisers import Velocity
from unveil.learning.views import Asked
from unveil.processes.gaussian import Flow, GaussianProcess, VariancePreserving
from unveil.processes.kernels import Ddim, FlowSde, Tau
from unveil.registry import UserError
from unveil.rewards.base import Correct, Part, Reward, Sum
from unveil.rewards.images import ClassProbability, JpegSize, PixelStatistic
from unveil.samplers.differentiable import run_again
from unveil.samplers.guidance import ClassifierFree
from unveil.samplers.latent import LatentSampler, Split
from unveil.samplers.latent_solvers import Churn, DpmSolver2M, Heun, SaSolver, SdeDpmSolver2M
from unveil.samplers.latents import LatentTrajectory, Noise
from unveil.samplers.trajectory import concatenate
from unveil.samplers.windows import Span
from unveil.seeds import derive_seed, normal_rows
from unveil.systems.alignprop import (
    Ascent,
    DropOut,
    Last,
    LastStepReward,
    NormalCut,
    PredictedReward,
    RewardGradient,
    RewardLikelihood,
    RewardViews,
    RolloutReward,
    Truncation,
    UniformCut,
    variant,
)
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.trainer import OptimConfig

ODE = Ddim(eta=0.0)
LOOK = PixelStatistic(statistic="contrast")
SAMPLERS = {
    "ode": tiny.sampler(kernel=ODE),
    "ddim": tiny.sampler(kernel=Ddim(eta=1.0)),
    "flow": tiny.sampler(kernel=FlowSde()),
    "heun": tiny.sampler(kernel=ODE, solver=Heun()),
    "dpmpp_2m": tiny.sampler(kernel=ODE, solver=DpmSolver2M()),
    "dpmpp_2m_sde": tiny.sampler(kernel=Ddim(eta=1.0), solver=SdeDpmSolver2M()),
    "sa": tiny.sampler(kernel=Tau(tau=0.6, low=0.3), solver=SaSolver()),
    "churn": tiny.sampler(kernel=ODE, churn=Churn(amount=2.0)),
    "cfg": tiny.sampler(kernel=Ddim(eta=1.0), guidance=ClassifierFree(scale=2.0)),
    "rescaled cfg": tiny.sampler(kernel=ODE, guidance=ClassifierFree(scale=2.0, rescale=0.5)),
}


def drawn(net: tiny.Mlp, sampler: LatentSampler, count: int = 6) -> LatentTrajectory:
    prompts = (["a", "b"] * count)[:count]
    start = Noise(condition=net.condition(prompts), problems=list(range(count)), copies=[0] * count)
    needs = {"latents", "times", "seeds"}
    return sampler.sample(net, start, list(range(count)), needs=needs)  # type: ignore[no-any-return]


def asked(count: int = 6, reward: Reward = LOOK) -> Asked:
    return Asked(reward=reward, prompts=["a"] * count, metadata=[{}] * count)


def seen(likelihood: RewardLikelihood, chains: LatentTrajectory, net: tiny.Mlp) -> RewardViews:
    views = likelihood.views(chains, chains.active.float(), list(range(len(chains))), net.spec)
    return likelihood.rewarded(views, asked(len(chains)))


def gradients(net: tiny.Mlp, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters())))


def reward_gradients(likelihood: RewardLikelihood, net: tiny.Mlp, sampler: LatentSampler, count: int = 6) -> Any:
    """Of the mean reward of ``count`` chains."""
    views = seen(likelihood, drawn(net, sampler, count), net)
    scores = likelihood.score(net, views, sampler)
    return gradients(net, (scores.log_prob * views.factors).sum() / count)


# ---- the chain


@pytest.mark.parametrize("name", ["ode", "ddim", "dpmpp_2m", "cfg"])
def test_the_gradient_is_a_central_difference_of_the_mean_reward(name: str) -> None:
    """The other side draws samples anew, by the sampler alone."""
    net, sampler = tiny.Mlp().double(), SAMPLERS[name]
    found = reward_gradients(RolloutReward(), net, sampler)

    def mean() -> float:
        return float(LOOK.values(net.decode(drawn(net, sampler).samples), [], []).mean())

    for parameter, gradient in zip(net.parameters(), found, strict=True):
        place, ends = int(gradient.abs().argmax()), []
        with torch.no_grad():
            for change in (1e-5, -2e-5):
                parameter.view(-1)[place] += change
                ends.append(mean())
            parameter.view(-1)[place] += 1e-5
        assert float(gradient.flatten()[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_guided_base_network_of_digits_has_a_gradient_of_the_classifier_s_probability() -> None:
    """In float32, as in a run: one direction of all weights, in which a step changes the reward as its slope says."""
    net, reward = load_denoiser("digits-base"), ClassProbability(network="digits-reward", output="logit")
    sampler = LatentSampler(steps=4, kernel=Ddim(eta=1.0), guidance=ClassifierFree(scale=2.0))
    labels = [3, 8, 1, 5]
    start = Noise(condition=net.condition([str(label) for label in labels]), problems=labels, copies=[0] * 4)
    metadata = [{"label": label} for label in labels]

    def roll() -> LatentTrajectory:
        return sampler.sample(net, start, labels, needs=RolloutReward.needs)  # type: ignore[no-any-return]

    likelihood, chains = RolloutReward(), roll()
    views = likelihood.views(chains, chains.active.float(), labels, net.spec)
    views = likelihood.rewarded(views, Asked(reward=reward, prompts=[""] * 4, metadata=metadata))
    value = likelihood.score(net, views, sampler).log_prob.mean()
    value.backward()
    value = value.detach()
    slope = sum(float(weight.grad.square().sum()) for weight in net.parameters() if weight.grad is not None)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.grad is not None:
                weight += 1e-2 / slope * weight.grad
    after = reward.values(net.decode(roll().samples), [""] * 4, metadata).mean()
    assert float(after - value) == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_that_are_run_again_end_as_they_did_bit_for_bit(name: str, first: int) -> None:
    net, sampler = tiny.Mlp(), SAMPLERS[name]
    chains = drawn(net, sampler)
    live = (torch.arange(5) >= first).expand(6, 5)
    for recompute in (True, False):
        redone = run_again(sampler, net, chains, torch.arange(6), live, recompute=recompute)
        assert torch.equal(redone.samples, chains.samples) and redone.samples.requires_grad
    own_steps = 5 - first if sampler.solver.exact else 5
    asked = 9 if name == "heun" else own_steps * sampler.guidance.evaluations  # Heun asks twice but in the last step
    assert redone.forwards == 6 * asked


def written(net: tiny.Mlp, chains: LatentTrajectory, live: Tensor, eta: float) -> Tensor:
    """DDIM by its formulas from the initial noise on, in which the output of steps that are not live is detached."""
    process, prediction, x = net.spec.process, net.spec.prediction, chains.latents[:, 0].double()  # type: ignore[index]
    for step in range(5):
        t, s = (chains.times[:, at] for at in (step, step + 1))  # type: ignore[index]
        p = net.predict(x, t, chains.condition)
        rows = live[:, step].view(-1, 1, 1, 1)
        p = torch.where(rows, p, p.detach())
        alpha_t, sigma_t, alpha_s, sigma_s = (
            of(at).view(-1, 1, 1, 1) for at in (t, s) for of in (process.alpha, process.sigma)
        )
        if prediction == "eps":
            eps, x0 = p, (x - sigma_t * p) / alpha_t
        else:  # u = eps - x0 of a flow
            x0, eps = x - t.view(-1, 1, 1, 1) * p, x + (1 - t.view(-1, 1, 1, 1)) * p
        std = eta * sigma_s * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0).sqrt()
        assert chains.seeds is not None
        noise = normal_rows(tiny.SHAPE, [derive_seed(seed, "step", step) for seed in chains.seeds.tolist()])
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps + std * noise
    return x


CUTS: dict[str, Callable[[], Tensor]] = {
    "all": lambda: torch.ones(6, 5, dtype=torch.bool),
    "a cut of its own per chain": lambda: torch.arange(5) >= torch.tensor([0, 4, 2, 2, 1, 3])[:, None],
    "holes": lambda: torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0],
                                   [0, 0, 0, 0, 1], [1, 1, 1, 1, 0], [0, 0, 1, 0, 1]]).bool(),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("process", "prediction"), [(Flow(), "u"), (VariancePreserving(steps=50), "eps")])
def test_truncated_gradients_are_those_of_the_written_loop(process: GaussianProcess, prediction: Any, cut: str) -> None:
    net, live = tiny.Mlp(process, prediction).double(), CUTS[cut]()
    sampler = tiny.sampler(kernel=Ddim(eta=0.7))
    chains = drawn(net, sampler)
    redone = run_again(sampler, net, chains, torch.arange(6), live)
    want = written(net, chains, live, eta=0.7)
    assert torch.allclose(redone.samples, want, atol=1e-5)  # its first state is float32, and so are its coefficients
    weight = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    for own, other in zip(gradients(net, (redone.samples * weight).sum()), gradients(net, (want * weight).sum()),
                          strict=True):  # fmt: skip
        assert torch.allclose(own, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_the_linear_path_of_a_constant_step_passes_gradients() -> None:
    """What the steps before a hole teach is lost if the state is cut there, and not if the output is."""
    net, sampler = tiny.Mlp().double(), SAMPLERS["ddim"]
    chains = drawn(net, sampler)
    early = torch.tensor([1, 0, 0, 0, 0]).bool().expand(6, 5)
    assert gradients(net, run_again(sampler, net, chains, torch.arange(6), early).samples.square().sum())[1].any()


def test_one_last_step_is_all_that_draft_1_differentiates() -> None:
    net, sampler = tiny.Mlp().double(), SAMPLERS["ode"]
    chains = drawn(net, sampler)
    assert chains.latents is not None and chains.times is not None
    guess = net.guess(chains.latents[:, -2], chains.times[:, -2], chains.condition)
    want = gradients(net, LOOK.values(net.decode(guess.x0), [], []).mean())  # the step to s = 0 ends in x_0
    for likelihood in (RolloutReward(through=Last(steps=1)), LastStepReward(copies=0)):
        for own, other in zip(reward_gradients(likelihood, net, sampler), want, strict=True):
            assert torch.allclose(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cfg", "heun", "dpmpp_2m"])
def test_recomputed_gradients_are_the_kept_ones(name: str) -> None:
    net, sampler = tiny.Mlp(), SAMPLERS[name]
    kept, again = (
        reward_gradients(RolloutReward(recompute=recompute, through=DropOut()), net, sampler)
        for recompute in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize(("recompute", "alive"), [(True, 0), (False, 5)])
def test_activations_of_the_steps_are_not_kept(recompute: bool, alive: int) -> None:
    net, sampler = tiny.Mlp(), SAMPLERS["ddim"]
    chains, hidden = drawn(net, sampler), []
    net.outer.register_forward_hook(lambda module, given, result: hidden.append(weakref.ref(given[0])))
    likelihood = RolloutReward(recompute=recompute)
    scores = likelihood.score(net, seen(likelihood, chains, net), sampler)
    assert len(hidden) == 5 and sum(one() is not None for one in hidden) == alive
    scores.log_prob.sum().backward()
    assert len(hidden) == (10 if recompute else 5)


@pytest.mark.parametrize(
    "likelihood", [RolloutReward(through=DropOut()), RolloutReward(through=NormalCut(mean=0.5)), LastStepReward(),
                   PredictedReward(late=1.0)],
)  # fmt: skip
def test_a_batch_is_its_rows(likelihood: RewardLikelihood) -> None:
    net, sampler = tiny.Mlp().double(), SAMPLERS["cfg"]
    views = seen(likelihood, drawn(net, sampler), net)
    whole = likelihood.score(net, views, sampler)
    parts = [likelihood.score(net, views.slice(row, row + 1), sampler) for row in range(len(views))]
    together = torch.cat([part.log_prob for part in parts])
    assert torch.allclose(whole.log_prob, together, rtol=1e-10)
    assert whole.velocity is not None
    assert torch.allclose(whole.velocity, torch.cat([part.velocity for part in parts]), rtol=1e-10)  # type: ignore[misc]
    assert whole.forwards == sum(part.forwards for part in parts)
    for own, other in zip(gradients(net, whole.log_prob.sum()), gradients(net, together.sum()), strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-12)


def test_trajectories_keep_the_seeds_of_their_chains(tmp_path: Path) -> None:
    net, sampler = tiny.Mlp(), SAMPLERS["ddim"]
    long, short = drawn(net, sampler), drawn(net, replace(sampler, steps=3), 2)
    both = concatenate([long, short])
    assert both.seeds is not None and both.seeds.tolist() == [*range(6), *range(2)]
    both.save(tmp_path / "chains")
    again = LatentTrajectory.load(tmp_path / "chains")
    assert torch.equal(again.rows(torch.tensor([7])).seeds, torch.tensor([1]))  # type: ignore[arg-type]


# ---- what is differentiated


def masks(through: Truncation, steps: int = 10, count: int = 400) -> Tensor:
    return torch.stack([through.live(steps, torch.Generator().manual_seed(seed)) for seed in range(count)])


def test_truncations() -> None:
    place = torch.arange(10)
    assert masks(Last()).all() and torch.equal(masks(Last(steps=3))[0], place >= 7)
    assert masks(Last(steps=99)).all(), "no more than there are"
    for cut, low in ((UniformCut(), 0), (NormalCut(mean=0.8, std=0.1), 4)):
        found = masks(cut)
        first = found.int().argmax(1)
        assert torch.equal(found, place >= first[:, None]), "a cut, and nothing else"
        assert first.min() >= low and first.max() == 9 and len(first.unique()) > 4
    counts = masks(UniformCut()).int().argmax(1).bincount(minlength=10)
    assert float(((counts - 40.0).square() / 40).sum()) < 33.7, "chi square of 9 degrees, p = 1e-4"
    share = masks(DropOut()).float().mean(0)
    assert share[-1] == 1 and float((share - (place + 1) / 10).abs().max()) < 0.1
    assert masks(NormalCut(mean=1.0, std=0.0))[0].sum() == 1, "the last step is always live"


def test_noised_copies_and_the_chain_s_own_state_are_averaged() -> None:
    net, sampler, likelihood = tiny.Mlp().double(), SAMPLERS["ddim"], LastStepReward(copies=3)
    chains = drawn(net, sampler)
    views = seen(likelihood, chains, net)
    scores = likelihood.score(net, views, sampler)
    assert len(views) == 24 and scores.forwards == 24
    assert chains.latents is not None and chains.times is not None
    t = chains.times[:, -2]
    values = []
    for copy in range(4):
        noise = normal_rows(tiny.SHAPE, views.seeds[copy::4].tolist())
        x = chains.latents[:, -2] if copy == 0 else net.spec.process.corrupt(chains.samples, t, noise)
        values.append(LOOK.values(net.decode(net.guess(x, t, chains.condition).x0), [], []))
    found = scores.log_prob.view(6, 4)
    assert torch.allclose(found, torch.stack(values, 1), rtol=1e-9)
    assert len(found[0].unique()) == 4, "no two copies are alike"
    assert float((scores.log_prob * views.factors).detach().sum()) == pytest.approx(float(found.detach().mean(1).sum()))


def test_copies_vary_less_than_one_step_alone() -> None:
    """Of the gradient of one image: mean squared deviation from the mean over many images."""
    net, sampler, count = tiny.Mlp().double(), SAMPLERS["ddim"], 48

    def variance(likelihood: RewardLikelihood) -> float:
        views = seen(likelihood, drawn(net, sampler, count), net)
        values = (likelihood.score(net, views, sampler).log_prob * views.factors).view(count, -1).sum(1)
        rows = torch.stack([torch.autograd.grad(v, net.outer.weight, retain_graph=True)[0] for v in values])
        return float((rows - rows.mean(0)).square().sum())

    assert variance(LastStepReward(copies=4)) < variance(LastStepReward(copies=0))


def test_refl_differentiates_the_prediction_at_one_late_step() -> None:
    net, sampler, likelihood = tiny.Mlp().double(), replace(SAMPLERS["cfg"], steps=8), PredictedReward(late=0.5)
    chains = drawn(net, sampler)
    views = seen(likelihood, chains, net)
    assert set(views.place.tolist()) <= {4, 5, 6, 7} and len(views.place.unique()) > 1
    rows = torch.arange(6)
    assert chains.latents is not None and chains.times is not None
    x, t = chains.latents[rows, views.place], chains.times[rows, views.place]
    want = LOOK.values(net.decode(sampler.guess(net, x, t, chains.condition).x0), [], [])
    scores = likelihood.score(net, views, sampler)
    assert torch.equal(scores.log_prob[:, 0], want) and scores.forwards == 12
    for own, other in zip(gradients(net, scores.log_prob.sum()), gradients(net, want.sum()), strict=True):
        assert torch.equal(own, other)


def test_a_reward_that_is_enough_has_no_gradient() -> None:
    value = torch.tensor([1.0, 2.5], requires_grad=True)
    Ascent(enough=2.0).terms(value, value, value).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [-1.0, 0.0]
    relu = (2 - value.detach()).clamp(min=0)
    assert torch.equal(Ascent(enough=2.0).terms(value, value, value).detach() + 2, relu)


# ---- in a run


def policy(choices: RewardGradient, sampler: LatentSampler | None = None, **changes: Any) -> PolicyConfig:
    rollout = RolloutConfig(sampler=sampler or SAMPLERS["ddim"], prompts=2, group_size=3)
    return PolicyConfig(**{"task": tiny.Bright(), "reward": LOOK, "rollout": rollout, **vars(choices), **changes})


@pytest.mark.parametrize("name", ["alignprop", "draft", "draft_1", "draft_lv", "refl"])
def test_a_job_climbs_the_mean_reward_of_its_own_rollouts(tmp_path: Path, name: Any) -> None:
    choices = variant(name)
    job = tiny.job(tmp_path, policy(choices), optim=OptimConfig(lr=1e-2, max_grad_norm=1e9, microbatch=4))
    chains, lines = [], []
    roll = job._roll
    job._roll = lambda *a, **how: chains.append(roll(*a, **how)) or chains[-1]  # type: ignore
    found: list[list[Tensor]] = []

    def optimise(losses: Any) -> dict[str, float]:
        result = job.trainer.optimise(losses)
        found.append([p.grad.clone() for p in job.denoiser.parameters() if p.grad is not None])
        return result

    before = {key: value.clone() for key, value in job.denoiser.state_dict().items()}
    lines.append(job.update(0, optimise))
    net = tiny.Mlp()
    net.load_state_dict(before)
    likelihood, trajectory = choices.likelihood, chains[0].trajectory
    views = likelihood.views(trajectory, trajectory.active.float(), chains[0].seeds, net.spec)
    scores = likelihood.score(net, likelihood.rewarded(views, asked()), SAMPLERS["ddim"])
    for own, want in zip(found[0], gradients(net, -(scores.log_prob * views.factors).sum() / 6), strict=True):
        assert torch.allclose(own, want, rtol=1e-4, atol=1e-6)
    if name == "draft":  # in what a run logs, too, the images are those of the rollout
        assert lines[0]["climbed_reward"] == pytest.approx(lines[0]["reward"], abs=1e-6)
        assert job.trainer.cost.forwards == 60, "drawn, and run again"
    lines += [job.update(update, job.trainer.optimise) for update in range(1, 12)]
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.005
    assert job.trainer.cost.optimizer_steps == 12 and job.trainer.cost.rollouts == 72


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def job(folder: Path, updates: int) -> Any:
        choices = policy(RewardGradient(likelihood=RolloutReward(through=UniformCut())), kl=Velocity(beta=0.1))
        folder.mkdir(exist_ok=True)
        return tiny.job(folder, choices, updates=updates, every=1)

    whole, half = job(tmp_path / "whole", 4), job(tmp_path / "half", 2)
    for one in (whole, half):
        one.trainer.fit(one, one.log)
    rest = job(tmp_path / "half", 4)
    rest.trainer.resume(rest)
    rest.trainer.fit(rest, rest.log)
    states = whole.denoiser.state_dict(), rest.denoiser.state_dict()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_the_velocity_is_held_at_the_first_step_that_has_a_gradient(tmp_path: Path) -> None:
    """A snapshot of other weights is asked about the same stored states, whatever its own chain would be."""
    net, other, sampler = tiny.Mlp().double(), tiny.Mlp(seed=1).double(), SAMPLERS["dpmpp_2m"]
    chains, likelihood = drawn(net, sampler), RolloutReward(through=NormalCut(mean=0.5, std=0.2))
    views = seen(likelihood, chains, net)
    rows, first = torch.arange(6), views.place.int().argmax(1)
    assert chains.latents is not None and chains.times is not None
    x, t = chains.latents[rows, first], chains.times[rows, first]
    for one in (net, other):
        want = one.spec.process.velocity(one.guess(x, t, chains.condition), t)
        found = likelihood.score(one, views, sampler).velocity
        assert found is not None and torch.allclose(found, want, rtol=1e-9)
    job = tiny.job(tmp_path, policy(variant("alignprop"), kl=Velocity(beta=1.0)))
    lines = [job.update(update, job.trainer.optimise) for update in range(2)]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-10) and lines[1]["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": JpegSize()}, r"^reward: 'jpeg' has no gradient \(allowed: aesthetic, classifier, clip,"),
        ({"reward": Correct()}, r"^reward: 'correct' has no gradient"),
        ({"reward": PixelStatistic(statistic="sparsity")}, r"^reward\.statistic: 'sparsity' has no gradient \(allowed"),
        ({"reward": Sum(parts={"a": Part(reward=LOOK), "b": Part(reward=JpegSize())})},
         r"^reward\.parts\.b\.reward: 'jpeg' has no gradient"),
    ],
)  # fmt: skip
def test_rewards_without_a_gradient_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        policy(variant("draft"), **changes)
    assert "\n" not in str(refused.value)


def test_parts_of_a_sum_that_are_only_watched_need_no_gradient(tmp_path: Path) -> None:
    watched = Part(reward=JpegSize(), role="audit")
    parts = {"a": Part(reward=LOOK, weight=2.0), "b": Part(reward=PixelStatistic(statistic="norm"), weight=-0.5)}
    both = Sum(parts=parts | {"size": watched})
    batch = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    want = both.ask(list(batch), [""] * 3, [{}] * 3).total
    assert both.values(batch, [""] * 3, [{}] * 3).tolist() == pytest.approx(want)
    policy(variant("draft"), reward=both)


def test_a_curriculum_changes_what_is_climbed(tmp_path: Path) -> None:
    """At an update at which a part rests, the gradient is that of the other one alone."""
    light = PixelStatistic(statistic="brightness")
    parts = {"look": Part(reward=LOOK), "light": Part(reward=light, weight=3.0, updates=[(1, None)])}

    def after(reward: Reward, update: int) -> list[Tensor]:
        job = tiny.job(tmp_path / "run", policy(variant("draft"), reward=reward))
        job.update(update, job.trainer.optimise)
        return [one.detach().clone() for one in job.denoiser.parameters()]

    resting, both = after(Sum(parts=parts), 0), after(Sum(parts=parts), 1)
    assert all(map(torch.equal, resting, after(LOOK, 0)))
    later = Sum(parts={"look": Part(reward=LOOK), "light": Part(reward=light, weight=3.0)})
    assert all(map(torch.equal, both, after(later, 1))) and not torch.equal(both[-1], after(LOOK, 1)[-1])


def test_a_window_is_refused(tmp_path: Path) -> None:
    config = policy(variant("draft"), tiny.sampler(window=Span(start=0, length=2)))
    with pytest.raises(UserError, match=r"policy\.rollout\.sampler\.window: 'span' chooses steps for a policy"):
        tiny.job(tmp_path, config)
    config = policy(variant("draft"), tiny.sampler(share="prefix", splits=[Split(left=2, leaves=2)]))
    with pytest.raises(UserError, match=r"policy\.rollout\.sampler\.splits: chains with steps in common"):
        tiny.job(tmp_path, config)

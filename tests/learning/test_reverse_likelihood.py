"""The step probability as policy: what is scored, the closed form, its gradient, and whole policy updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.likelihoods import TokenViews
from unveil.learning.objectives import Clipped, StepMean
from unveil.learning.reverse import ReverseLikelihood
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.reverse import ReverseSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.samplers.uniform import Ancestral, EntropyBound
from unveil.seeds import generator
from unveil.training.policy_job import PolicyJob
from unveil.training.trainer import OptimConfig

NEEDS = {"states", "guesses", "revealed", "times", "log_prob"}
TAU = 0.8


def network(kind: str) -> MaskedDenoiser:
    return {"masked": tiny.denoiser, "score": tiny.score_denoiser, "uniform": tiny.uniform_denoiser}[kind]()


def own_sampler(kind: str) -> Sampler:
    return Ancestral(steps=4, temperature=TAU) if kind == "uniform" else ReverseSampler(steps=4, temperature=TAU)


def sampled(net: MaskedDenoiser, sampler: ReverseSampler) -> TokenTrajectory:
    prompts, lengths = [[4, 5], [6], [7, 4, 4], [5]], [5, 3, 6, 6]
    rows = Canvas.of(prompts, lengths, net.spec)
    rows.response[1, 1], rows.frozen[1, 1] = 5, True
    return sampler.sample(net, rows, range(4), needs=NEEDS)


def all_views(trajectory: TokenTrajectory, net: MaskedDenoiser, likelihood: ReverseLikelihood) -> TokenViews:
    return likelihood.views(trajectory, trajectory.active.float(), range(len(trajectory)), net.spec)


@pytest.mark.parametrize("kind", ["masked", "score"])
def test_every_masked_position_is_scored_by_what_the_sampler_recorded(kind: str) -> None:
    net, likelihood = network(kind), ReverseLikelihood()
    trajectory = sampled(net, ReverseSampler(steps=4, temperature=TAU, last_time=0.2, cache=False))
    views = all_views(trajectory, net, likelihood)
    assert trajectory.log_prob is not None and trajectory.states is not None
    recorded = trajectory.log_prob[views.rows, views.steps]
    states = trajectory.states[views.rows, views.steps]
    masked = (states == net.spec.mask_id) & trajectory.response_valid[views.rows]
    assert torch.equal(views.scored, masked) and not views.scored[views.rows == 1][:, 1].any()
    assert torch.equal(views.length, masked.sum(1))
    stayed = (views.targets == net.spec.mask_id) & masked
    assert 0 < int(stayed.sum()) < int(masked.sum())
    scores = likelihood.score(net, views, ReverseSampler(steps=1, temperature=TAU))
    torch.testing.assert_close(scores.log_prob, recorded, rtol=1e-5, atol=1e-5)
    assert (scores.log_prob[~masked] == 0).all() and (scores.entropy[masked] > 0).all()
    # One step of all chains is the sampler's own batch: there the two agree in every bit.
    first = trajectory.active & (torch.arange(trajectory.steps) == 0)
    step = likelihood.views(trajectory, first.float(), range(4), net.spec)
    exact = likelihood.score(net, step, ReverseSampler(steps=1, temperature=TAU)).log_prob
    assert trajectory.active[:, 0].all() and torch.equal(exact, trajectory.log_prob[:, 0])


@pytest.mark.parametrize("method", ["tweedie", "euler"])
def test_gradient_is_that_of_the_closed_form(method: str) -> None:
    """log of c s_y where revealed and of 1 - c sum(s) where not, by autograd in float64."""
    net, likelihood = tiny.score_denoiser(), ReverseLikelihood(method=method)  # type: ignore[arg-type]
    trajectory = sampled(net, ReverseSampler(steps=4, method=method, last_time=0.2))  # type: ignore[arg-type]
    views = all_views(trajectory, net, likelihood)
    weight = torch.randn(views.scored.shape, generator=generator("weights"))
    (weight * likelihood.score(net, views, ReverseSampler(steps=1, temperature=1.0)).log_prob).sum().backward()

    oracle = tiny.float64(net)
    assert views.times is not None
    t, s = views.times.unbind(1)
    shown, later = 1 - (1 - 1e-3) * t, 1 - (1 - 1e-3) * s
    factor = (later / shown - 1)[:, None]
    score = oracle(views.ids, views.valid, t)[:, views.prompt_width :].exp()
    total = score.sum(-1)
    assert (factor * total)[views.scored & (s > 0)[:, None]].max() < 1 - 1e-3  # nothing is clamped here
    drawn = score.gather(-1, views.targets[..., None])[..., 0].clamp(min=1e-300)
    last = (s == 0)[:, None]
    revealed = torch.where(last, (drawn / total).log(), (factor * drawn).log())
    stays = views.targets == net.spec.mask_id
    stayed = (1 - factor * total).clamp(min=1e-9).log()
    written = torch.where(stays, stayed, revealed)
    (weight * torch.where(views.scored, written, 0)).sum().backward()
    expected = tiny.gradients(oracle)
    for name, grad in tiny.gradients(net).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)


def test_with_a_masked_process_staying_has_no_gradient() -> None:
    net, likelihood = tiny.denoiser(), ReverseLikelihood()
    trajectory = sampled(net, ReverseSampler(steps=4))
    views = all_views(trajectory, net, likelihood)
    log_prob = likelihood.score(net, views, ReverseSampler(steps=1, temperature=1.0)).log_prob
    stayed = views.scored & (views.targets == net.spec.mask_id)
    assert views.times is not None
    chance = (views.times[:, 1] / views.times[:, 0]).log()[:, None].expand_as(log_prob)
    torch.testing.assert_close(log_prob[stayed].double(), chance[stayed])
    log_prob[stayed].sum().backward()
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    trajectory = sampled(tiny.score_denoiser(), ReverseSampler(steps=4, last_time=0.2))
    for elements in (2**22, 40):
        monkeypatch.setattr("unveil.learning.scoring.CHUNK_ELEMENTS", elements)
        net = tiny.score_denoiser()
        log_prob = (
            ReverseLikelihood()
            .score(net, all_views(trajectory, net, ReverseLikelihood()), ReverseSampler(steps=1, temperature=1.0))
            .log_prob
        )
        log_prob.square().sum().backward()
        found.append((log_prob.detach(), tiny.gradients(net)))
    (whole, gradients), (cut, others) = found
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    for name, grad in gradients.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-4)


def test_of_uniform_noise_every_position_is_scored_by_what_the_sampler_recorded() -> None:
    net, likelihood = tiny.uniform_denoiser(), ReverseLikelihood()
    trajectory = sampled(net, own_sampler("uniform"))
    views = all_views(trajectory, net, likelihood)
    assert trajectory.log_prob is not None
    free = trajectory.response_valid & ~trajectory.given
    assert torch.equal(views.scored, free[views.rows]) and not views.scored[views.rows == 1][:, 1].any()
    scores = likelihood.score(net, views, Ancestral(steps=4, temperature=TAU))
    recorded = trajectory.log_prob[views.rows, views.steps]
    torch.testing.assert_close(scores.log_prob, recorded, rtol=1e-5, atol=1e-5)
    assert (recorded[views.scored] < 0).all() and (scores.entropy[views.scored] > 0).all()


def test_of_uniform_noise_all_trajectories_together_have_probability_one() -> None:
    """Two steps of two positions, from one start: the sum of exp(log p) over every possible course."""
    net, likelihood = tiny.uniform_denoiser(), ReverseLikelihood()
    size = net.spec.vocab_size
    one = Ancestral(steps=2).sample(net, Canvas.of([[4, 5]], 2, net.spec), [1], needs=NEEDS)
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    allowed = pairs[~torch.isin(pairs, torch.tensor(net.spec.forbidden_ids)).any(1)]
    middle, end = pairs.repeat_interleave(len(allowed), 0), allowed.repeat(len(pairs), 1)
    every = one.rows(torch.zeros(len(middle), dtype=torch.long))
    assert every.states is not None
    every.states[:, 1], every.response_ids = middle, end
    views = all_views(every, net, likelihood)
    with torch.no_grad():
        log_prob = likelihood.score(net, views, Ancestral(steps=2)).log_prob.double().sum(1)
    course = torch.zeros(len(every), dtype=torch.float64).index_add_(0, views.rows, log_prob)
    assert course.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert int((course.exp() > 1e-4).sum()) > 100


def policy_job(folder: Path, net: MaskedDenoiser, microbatch: int = 1000, **changes: object) -> PolicyJob:
    settings: dict[str, object] = {
        "rollout": {"sampler": ReverseSampler(steps=4, temperature=TAU)},
        "likelihood": ReverseLikelihood(),
        "objective": Clipped(level="step"),
        "weighting": StepMean(),
        "inner_updates": 1,
    }
    config = tiny.policy("diffu_grpo", **(settings | changes))
    optim = OptimConfig(lr=1e-2, max_grad_norm=1e9, microbatch=microbatch)
    return tiny.job(folder, config, net, optim=optim)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["masked", "score", "uniform"])
def test_a_policy_update_is_on_policy_and_independent_of_the_microbatch(kind: str, tmp_path: Path) -> None:
    found = []
    for microbatch in (5, 1000):
        job = policy_job(tmp_path, network(kind), microbatch, rollout={"sampler": own_sampler(kind)})
        metrics = job.update(0, job.trainer.optimise)
        assert metrics["ratio_deviation"] == 0 and metrics["ratio_mean"] == 1 and math.isfinite(metrics["entropy"])
        found.append(tiny.gradients(job.denoiser))
    small, whole = found
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-3
    for name, grad in whole.items():
        torch.testing.assert_close(small[name], grad, rtol=1e-4, atol=1e-6)


def test_several_inner_updates_keep_the_ratio_near_one(tmp_path: Path) -> None:
    job = policy_job(tmp_path, tiny.score_denoiser(), inner_updates=2)
    metrics = job.update(0, job.trainer.optimise)
    assert 0 < metrics["ratio_deviation"] < 1 and metrics["skipped"] == 0


def test_pairs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'reverse' scores that sampler and 'ancestral', not 'masked'"):
        policy_job(tmp_path, tiny.denoiser(), rollout={})
    with pytest.raises(UserError, match=r"policy\.likelihood\.method: should be 'tweedie'"):
        policy_job(tmp_path, tiny.score_denoiser(), likelihood=ReverseLikelihood(method="euler"))
    masked = {"sampler": MaskedSampler(steps=5, temperature=1.0)}
    with pytest.raises(UserError, match="'masked' cannot time a network of scores"):
        tiny.job(tmp_path, tiny.policy("diffu_grpo", rollout=masked), tiny.score_denoiser())
    bound = {"sampler": EntropyBound(steps=5)}
    with pytest.raises(UserError, match=r"scores that sampler and 'ancestral', not 'entropy_bound'"):
        policy_job(tmp_path, tiny.uniform_denoiser(), rollout=bound)
    behind_a_cache = tiny.uniform_denoiser()
    behind_a_cache.spec = replace(behind_a_cache.spec, canvas_length=5)
    with pytest.raises(UserError, match="'reverse' needs a network without a cache"):
        policy_job(tmp_path, behind_a_cache, rollout={"sampler": Ancestral(steps=4)})

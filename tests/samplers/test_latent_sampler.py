"""The loop over latents: what it records, shares and branches; stored steps score as they were drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.learning.latents import TransitionLikelihood
from unveil.processes.gaussian import Flow, GaussianProcess, VarianceExploding, VariancePreserving
from unveil.processes.kernels import CoefficientsPreserving, DanceSde, Ddim, FlowSde, Tau, deterministic
from unveil.registry import UserError
from unveil.samplers.grids import Uniform
from unveil.samplers.guidance import Clamp, ClassifierFree
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import Churn, DpmSolver2M, Heun, SaSolver, SdeDpmSolver2M
from unveil.samplers.latents import LatentTrajectory, Noise, noised
from unveil.samplers.trajectory import concatenate
from unveil.samplers.windows import ExponentialDecay, LinearDecay, Progressive, RandomSpan, Span
from unveil.seeds import generator

ALL = set(LatentTrajectory.optional)


def start(net: tiny.Mlp, count: int = 6, group: int = 3, **how: Any) -> Noise:
    prompts = [("a", "b", "")[row // group % 3] for row in range(count)]
    return Noise(
        condition=net.condition(prompts),
        problems=[row // group for row in range(count)],
        copies=[row % group for row in range(count)],
        **how,
    )


def draw(net: tiny.Mlp, sampler: LatentSampler, count: int = 6, batch_size: int | None = None, **how: Any) -> Any:
    needs = ALL - sampler.refused_fields().keys()
    return sampler.sample(net, start(net, count, **how), list(range(count)), needs=needs, batch_size=batch_size)


PROCESSES: list[tuple[GaussianProcess, str]] = [
    (Flow(), "u"), (Flow(), "eps"), (Flow(), "x0"), (VariancePreserving(), "eps"), (VariancePreserving(), "v"),
    (VariancePreserving(), "x0"), (VarianceExploding(sigma_max=5.0), "edm"),
]  # fmt: skip


@pytest.mark.parametrize("kernel", [Ddim(eta=1.0), FlowSde(noise=0.7), DanceSde(noise=0.3), CoefficientsPreserving()])
@pytest.mark.parametrize(("process", "prediction"), PROCESSES)
def test_replayed_steps_are_those_that_were_drawn_bit_for_bit(
    process: GaussianProcess, prediction: Any, kernel: Any
) -> None:
    net = tiny.Mlp(process, prediction)
    # At t = 1 a flow holds nothing of the data: eps says nothing there.
    sampler = tiny.sampler(kernel=kernel, grid=Uniform(start=0.98), guidance=ClassifierFree(scale=2.0, rescale=0.3))
    chains = draw(net, sampler)
    silent_end = isinstance(kernel, Ddim | CoefficientsPreserving)
    assert chains.noisy[:, :-1].all() and chains.noisy[:, -1].all() != silent_end
    likelihood = TransitionLikelihood(reduce="sum")
    for step in range(int(chains.noisy[0].sum())):
        chosen = torch.zeros(chains.active.shape)
        chosen[:, step] = 1
        views = likelihood.views(chains, chosen, [], net.spec)
        with torch.no_grad():
            scores = likelihood.score(net, views, sampler)
        assert torch.equal(scores.log_prob, likelihood.recorded(views, chains))  # type: ignore[arg-type]
        assert scores.mean is not None and torch.equal(scores.mean, chains.means[:, step])
        written = torch.distributions.Normal(scores.mean.double(), scores.std[0]).log_prob(chains.latents[:, step + 1])  # type: ignore[index]
        torch.testing.assert_close(scores.log_prob[:, 0], written.flatten(1).sum(1), rtol=1e-6, atol=1e-5)


def test_the_chain_is_the_kernel_s_steps_by_hand() -> None:
    net, sampler = tiny.Mlp(), tiny.sampler(window=Span(start=1, length=2))
    chains = draw(net, sampler, 2)
    assert chains.noisy.tolist() == [[False, True, True, False, False]] * 2 and chains.forwards == 10
    x, process = chains.latents[:, 0], net.spec.process
    for step, (t, s) in enumerate(zip(chains.times[0, :-1], chains.times[0, 1:], strict=True)):
        guess = net.guess(x, t.expand(2), net.condition(["a", "a"]))
        torch.testing.assert_close(chains.guesses[:, step], guess.x0)
        if chains.noisy[0, step]:
            x = chains.latents[:, step + 1]
            noise = (x - chains.means[:, step]) / chains.stds[:, step, None, None, None]
            assert 0.5 < float(noise.std()) < 1.5
        else:
            x = deterministic(process, guess, s.expand(2))
            assert not chains.log_prob[:, step].any() and not chains.stds[:, step].any()
        torch.testing.assert_close(chains.latents[:, step + 1], x)
    assert torch.equal(chains.samples, chains.latents[:, -1])


@pytest.mark.parametrize("share", ["nothing", "noise", "prefix"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_batch_split_changes_nothing(share: Any, batch_size: int) -> None:
    net = tiny.Mlp()
    sampler = tiny.sampler(share=share, window=Span(start=2, length=2), outside=Ddim(eta=0.5), solver=DpmSolver2M())
    whole, split = draw(net, sampler), draw(net, sampler, batch_size=batch_size)
    for name in ("samples", "latents", "guesses", "log_prob", "times"):
        torch.testing.assert_close(getattr(whole, name), getattr(split, name), rtol=1e-5, atol=1e-5)


def test_shared_noise_and_branches() -> None:
    net = tiny.Mlp()
    own = draw(net, tiny.sampler())
    assert len(own.latents[:, 0].flatten(1).unique(dim=0)) == 6
    noise = draw(net, tiny.sampler(share="noise"))
    assert len(noise.latents[:, 0].flatten(1).unique(dim=0)) == 2 and noise.forwards == 30
    assert len(noise.latents[:, 1].flatten(1).unique(dim=0)) == 6
    branched = tiny.sampler(share="prefix", window=Span(start=2, length=2), outside=Ddim(eta=1.0))
    tree = draw(net, branched)
    assert [len(tree.latents[:, step].flatten(1).unique(dim=0)) for step in range(6)] == [2, 2, 2, 6, 6, 6]
    assert tree.forwards == 2 * 2 + 6 * 3
    pairs = draw(net, replace(branched, branches=1))
    assert [len(pairs.latents[:, step].flatten(1).unique(dim=0)) for step in range(6)] == [6] * 6


def test_a_prefix_that_is_computed_once_is_that_of_shared_noise() -> None:
    net, window = tiny.Mlp(), Span(start=2, length=2)
    once = draw(net, tiny.sampler(share="prefix", window=window))
    each = draw(net, tiny.sampler(share="noise", window=window))
    torch.testing.assert_close(once.latents, each.latents)
    assert once.forwards < each.forwards


def test_a_chain_starts_from_a_given_state_and_takes_the_rest_of_the_grid() -> None:
    net = tiny.Mlp()
    whole = draw(net, tiny.sampler(kernel=Ddim(eta=0.0)))
    later = draw(net, tiny.sampler(kernel=Ddim(eta=0.0)), initial=whole.latents[:, 2], time=float(whole.times[0, 2]))
    assert later.steps == 3
    torch.testing.assert_close(later.samples, whole.samples)
    between = draw(net, tiny.sampler(), initial=whole.latents[:, 2], time=0.5)
    assert between.times[0].tolist() == pytest.approx([0.5, 0.4, 0.2, 0.0])
    edited = noised(whole.samples, 0.5, net.spec.process, list(range(6)))
    assert torch.equal(edited[2:3], noised(whole.samples[2:3], 0.5, net.spec.process, [2]))


def test_solvers_count_their_evaluations_and_shrink_the_error() -> None:
    net = tiny.Mlp()
    fine = draw(net, tiny.sampler(kernel=Ddim(eta=0.0), steps=200)).samples
    error = {}
    for name, solver in (("first", None), ("heun", Heun()), ("2m", DpmSolver2M())):
        own = {} if solver is None else {"solver": solver}
        chains = draw(net, tiny.sampler(kernel=Ddim(eta=0.0), steps=10, **own))
        error[name] = float((chains.samples - fine).square().mean())
        assert chains.forwards == 6 * {"first": 10, "heun": 19, "2m": 10}[name]
    assert error["heun"] < error["first"] / 4 and error["2m"] < error["first"]


def test_a_solver_starts_anew_behind_a_stochastic_step() -> None:
    net = tiny.Mlp()
    window = {"window": Span(start=0, length=3), "steps": 6}
    second = draw(net, tiny.sampler(solver=DpmSolver2M(), **window))
    first = draw(net, tiny.sampler(**window))
    torch.testing.assert_close(second.latents[:, :5], first.latents[:, :5])  # one first-order step behind the window
    assert (second.latents[:, 5] - first.latents[:, 5]).abs().max() > 1e-4


def own_noise(step: int, count: int = 6) -> Tensor:
    """What the chains of seeds 0 .. count - 1 draw at a step."""
    return torch.stack([torch.randn(tiny.SHAPE, generator=generator(seed, "step", step)) for seed in range(count)])


def test_churn_raises_the_noise_before_every_step_of_the_solver() -> None:
    net, churn = tiny.Mlp(VarianceExploding(sigma_max=5.0), "edm"), Churn(amount=1.0, high=2.0)
    process, told = net.spec.process, net.condition(["a"] * 3 + ["b"] * 3)
    still = tiny.sampler(kernel=Ddim(eta=0.0), solver=Heun())
    chains = draw(net, replace(still, churn=churn))
    assert not chains.noisy.any() and chains.forwards == 6 * 9  # nothing of it can be scored
    for step, (now, after) in enumerate(zip(chains.times[0, :-1], chains.times[0, 1:], strict=True)):
        s = after.expand(6)
        x, t = churn.raised(process, chains.latents[:, step], now.expand(6), own_noise(step), 5)
        assert (float(t[0]) > float(now)) == (float(process.sigma(now)) <= 2.0)

        def ask(x: Tensor, t: Tensor) -> Any:
            return net.guess(x, t, told)

        guess = ask(x, t)
        torch.testing.assert_close(chains.guesses[:, step], guess.x0)
        expected = deterministic(process, Heun().solve(process, guess, x, t, s, {}, ask), s)
        torch.testing.assert_close(chains.latents[:, step + 1], expected)
    assert torch.equal(draw(net, replace(still, churn=Churn(amount=0.0))).latents, draw(net, still).latents)
    split = draw(net, replace(still, churn=churn), batch_size=2)
    torch.testing.assert_close(split.latents, chains.latents, rtol=1e-5, atol=1e-5)


def test_the_solver_that_goes_through_noise_extrapolates_at_every_step() -> None:
    net, process = tiny.Mlp(VariancePreserving(), "v"), VariancePreserving()
    sampler = tiny.sampler(kernel=Ddim(eta=1.0), solver=SdeDpmSolver2M(), grid=Uniform(start=0.98))
    chains, told = draw(net, sampler), net.condition(["a"] * 3 + ["b"] * 3)
    assert chains.noisy[:, :-1].all() and chains.log_prob is None and chains.means is None
    memory: dict[str, Tensor] = {}
    for step, (now, after) in enumerate(zip(chains.times[0, :-1], chains.times[0, 1:], strict=True)):
        x, t, s = chains.latents[:, step], now.expand(6), after.expand(6)
        guess = DpmSolver2M().solve(process, net.guess(x, t, told), x, t, s, memory, never)
        expected = Ddim(eta=1.0).step(process, guess, x, t, s).sample(own_noise(step))
        torch.testing.assert_close(chains.latents[:, step + 1], expected, rtol=1e-5, atol=1e-5)


def test_sa_solver_corrects_by_the_std_of_its_steps() -> None:
    """With steps of both kinds in one chain; branches take what it remembers with them."""
    net, process = tiny.Mlp(), Flow()
    kernel = Tau(tau=0.6, low=0.2, high=0.8)
    sampler = tiny.sampler(kernel=kernel, solver=SaSolver(), steps=7, grid=Uniform(shift=2.0))
    chains, told = draw(net, sampler), net.condition(["a"] * 3 + ["b"] * 3)
    assert chains.noisy[0].tolist() == [False, False, True, True, True, True, False]
    memory: dict[str, Tensor] = {}
    for step, (now, after) in enumerate(zip(chains.times[0, :-1], chains.times[0, 1:], strict=True)):
        x, t, s = chains.latents[:, step], now.expand(6), after.expand(6)
        guess = net.guess(x, t, told)
        std = kernel.step(process, guess, x, t, s).std
        guess = SaSolver().solve(process, guess, x, t, s, memory, never, std)
        expected = kernel.step(process, guess, x, t, s).sample(own_noise(step))
        torch.testing.assert_close(chains.latents[:, step + 1], expected, rtol=1e-5, atol=1e-5)
    whole = draw(net, replace(sampler, window=Span(start=3, length=3), outside=Ddim(eta=0.0), share="noise"))
    prefix = draw(net, replace(sampler, window=Span(start=3, length=3), outside=Ddim(eta=0.0), share="prefix"))
    torch.testing.assert_close(prefix.samples, whole.samples, rtol=1e-5, atol=1e-5)
    assert prefix.forwards < whole.forwards


def never(x: Tensor, t: Tensor) -> Any:
    raise AssertionError("the solver asked the network again")


def test_steps_behind_the_window_can_be_fewer_and_longer() -> None:
    net = tiny.Mlp()
    sampler = tiny.sampler(steps=12, window=Span(start=1, length=2), compress=0.4, solver=DpmSolver2M())
    chains = draw(net, sampler)
    grid = Uniform().times(net.spec.process, 12)
    # 0.4 of the 9 steps behind the window are 4: they end at places 5, 8, 10 and 12 of the grid.
    assert torch.equal(chains.times[0], grid[[0, 1, 2, 3, 5, 8, 10, 12]])
    assert chains.noisy[0].tolist() == [False, True, True] + [False] * 4
    assert chains.forwards == 6 * 7 and sampler.planned_steps == 7
    whole = draw(net, replace(sampler, compress=1.0))
    assert torch.equal(chains.latents[:, :4], whole.latents[:, :4])
    assert replace(sampler, window=Span(start=10, length=2)).planned_steps == 12  # nothing lies behind it
    late = draw(net, sampler, initial=whole.latents[:, 2], time=float(grid[2]))
    assert torch.equal(late.times[0], grid[[2, 3, 5, 8, 10, 12]]) and late.noisy[0].tolist() == [True] + [False] * 4


@pytest.mark.parametrize("rederive", [False, True])
def test_a_clamp_cuts_what_is_expected_in_rollout_and_replay(rederive: bool) -> None:
    net, clamp = tiny.Mlp(VariancePreserving(), "eps"), Clamp(limit=0.5, rederive=rederive)
    guidance = ClassifierFree(scale=2.0)
    sampler = tiny.sampler(kernel=Ddim(eta=1.0), guidance=guidance, clamp=clamp)
    chains = draw(net, sampler)
    assert chains.guesses.abs().max() == 0.5 and (chains.guesses.abs() < 0.5).any()
    x, t = chains.latents[:, 1], chains.times[:, 1]
    said = guidance.guess(net, x, t, net.condition(["a"] * 3 + ["b"] * 3))
    _, guess = sampler.transition(net, x, t, chains.times[:, 2], net.condition(["a"] * 3 + ["b"] * 3))
    back = net.spec.process.corrupt(guess.x0, t, guess.eps)
    assert ((back - x).abs().max() < 1e-4) == rederive and torch.equal(guess.eps, said.eps) != rederive
    likelihood = TransitionLikelihood(reduce="sum")
    views = likelihood.views(chains, torch.ones(chains.active.shape), [], net.spec)
    with torch.no_grad():
        scores = likelihood.score(net, views, sampler)
    torch.testing.assert_close(scores.log_prob, likelihood.recorded(views, chains), rtol=1e-6, atol=1e-5)


def test_guidance_of_scale_one_is_the_prompt_alone_and_is_counted() -> None:
    net = tiny.Mlp()
    plain, guided = draw(net, tiny.sampler()), draw(net, tiny.sampler(guidance=ClassifierFree(scale=1.0)))
    torch.testing.assert_close(plain.samples, guided.samples, rtol=1e-4, atol=1e-5)
    assert guided.forwards == 2 * plain.forwards
    other = draw(net, tiny.sampler(guidance=ClassifierFree(scale=3.0)))
    x, t = plain.latents[:, 0], torch.full((6,), 1.0)
    told, blank = net.condition(["a"] * 3 + ["b"] * 3), net.condition([""] * 6)
    expected = net.predict(x, t, blank) + 3 * (net.predict(x, t, told) - net.predict(x, t, blank))
    torch.testing.assert_close(other.guesses[:, 0], x - expected, rtol=1e-4, atol=1e-5)
    away, wrong = draw(net, tiny.sampler(guidance=ClassifierFree(scale=3.0, negative="b"))), net.condition(["b"] * 6)
    expected = net.predict(x, t, wrong) + 3 * (net.predict(x, t, told) - net.predict(x, t, wrong))
    torch.testing.assert_close(away.guesses[:, 0], x - expected, rtol=1e-4, atol=1e-5)


def gradient(net: tiny.Mlp, through: bool) -> Tensor:
    x, t = torch.ones(2, *tiny.SHAPE), torch.full((2,), 0.5, dtype=torch.float64)
    guidance = ClassifierFree(scale=2.0, through=through)
    net.zero_grad()
    guidance.guess(net, x, t, net.condition(["a", "b"])).x0.sum().backward()
    assert net.prompt.weight.grad is not None
    return net.prompt.weight.grad[0]


def test_gradients_flow_through_the_unconditional_branch_on_demand() -> None:
    net = tiny.Mlp()
    assert gradient(net, through=True).any() and not gradient(net, through=False).any()


def test_windows() -> None:
    assert Span(start=1, length=2).inside(4).tolist() == [False, True, True, False]
    moving = Progressive(length=2, every=3)
    starts = [moving.at(update, 0, 4).inside(4).nonzero()[0].item() for update in range(12)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    drawn = [RandomSpan(length=2, low=1, high=5).at(update, 7, 8) for update in range(60)]
    assert {span.start for span in drawn} == {1, 2, 3}  # type: ignore[attr-defined]
    assert drawn == [RandomSpan(length=2, low=1, high=5).at(update, 7, 8) for update in range(60)]
    assert {RandomSpan(length=2).at(update, 7, 8).start for update in range(60)} == {0, 1, 2}  # type: ignore[attr-defined]
    # Of 8 steps the window begins with step 0 .. 6; 8 - 7 p / 8 cut off, and 8 exp(-0.5 max(0, p - 2)) rounded up.
    for window, stays in (
        (LinearDecay(length=2, every=8), [8, 7, 6, 5, 4, 3, 2]),
        (ExponentialDecay(length=2, every=8, after=2, rate=0.5), [8, 8, 8, 5, 3, 2, 2]),
    ):
        seen = [window.at(update, 0, 8).start for update in range(sum(stays) + 1)]  # type: ignore[attr-defined]
        assert seen == [place for place, stay in enumerate(stays) for _ in range(stay)] + [0]
    at = tiny.sampler(window=moving).at(3, 0)
    assert at.window == Span(start=1, length=2) and tiny.sampler().at(3, 0) == tiny.sampler()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.sampler(window=Span(start=4, length=2)), "2 steps from step 4 on do not fit into 5 steps"),
        (lambda: tiny.sampler(window=RandomSpan(length=3)), "no span of 3 steps fits between step 0 and step 2 of 5"),
        (lambda: LinearDecay(every=2, least=3), r"least: should be at most every \(2\), got 3"),
        (lambda: tiny.sampler(branches=2), "branches: the chains share nothing"),
        (lambda: tiny.sampler(solver=SaSolver()), "kernel: 'flow' makes steps that the solver 'sa' does not know"),
        (lambda: tiny.sampler(kernel=Tau(), outside=DanceSde(), solver=SaSolver()), "outside: 'dance' makes steps"),
        (lambda: tiny.sampler().check_fits(12), "have the network's own shape, got 12"),
        (lambda: draw_log_prob(), "'log_prob' needs steps with noise"),
        (
            lambda: draw_log_prob(kernel=Ddim(eta=1.0), solver=SdeDpmSolver2M()),
            "'log_prob' is of no use: a step of the solver 'dpmpp_2m_sde' depends on more than the state",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def draw_log_prob(**how: Any) -> Any:
    net = tiny.Mlp()
    return LatentSampler(steps=2, **how).sample(net, start(net), list(range(6)), needs={"log_prob"})


def test_trajectories_are_joined_saved_and_loaded(tmp_path: Path) -> None:
    net = tiny.Mlp()
    chains = draw(net, tiny.sampler())
    short = draw(net, tiny.sampler(), initial=chains.latents[:, 2], time=0.5)
    both = concatenate([chains, short])
    assert both.active.sum(1).tolist() == [5] * 6 + [3] * 6 and both.forwards == chains.forwards + short.forwards
    assert torch.equal(both.latents[6:, 3], short.samples) and torch.equal(both.latents[6:, 5], short.samples)
    both.save(tmp_path / "t.safetensors")
    back = LatentTrajectory.load(tmp_path / "t.safetensors")
    part = back.rows(torch.tensor([7, 0]))
    assert torch.equal(part.latents[0], both.latents[7])  # type: ignore[index]
    assert torch.equal(part.condition["ids"], both.condition["ids"][[7, 0]]) and back.forwards == both.forwards


@pytest.mark.parametrize(
    ("window", "share"), [(Span(start=2, length=2), "nothing"), (Span(start=1, length=3), "prefix")]
)
def test_only_the_ends_of_noisy_steps_are_kept_and_score_alike(tmp_path: Path, window: Span, share: Any) -> None:
    net, sampler = tiny.Mlp(), tiny.sampler(steps=6, window=window, share=share)
    whole = draw(net, sampler, batch_size=3)
    lean = sampler.sample(net, start(net), list(range(6)), needs=TransitionLikelihood().needs, batch_size=3)
    ends = slice(window.start, window.start + window.length + 1)
    assert lean.latents is None and torch.equal(lean.scored, whole.latents[:, ends])
    short = sampler.sample(
        net, start(net, initial=whole.latents[:, 3], time=0.5), list(range(6)), needs=TransitionLikelihood().needs
    )
    assert short.scored.shape[1] < lean.scored.shape[1]
    both = concatenate([lean, short])
    both.save(tmp_path / "t.safetensors")
    for chains in (lean, both, LatentTrajectory.load(tmp_path / "t.safetensors").rows(torch.arange(12).flip(0))):
        views = TransitionLikelihood().views(chains, chains.decided.float(), [], net.spec)
        with torch.no_grad():
            scores = TransitionLikelihood().score(net, views, sampler)
        recorded = TransitionLikelihood().recorded(views, chains)
        torch.testing.assert_close(scores.log_prob, recorded, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="neither latents nor scored"):
        replace(lean, scored=None).states_at(torch.tensor([0]), torch.tensor([2]))

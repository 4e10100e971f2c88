"""Continuous diffusion through the same policy job: ratios, losses written out by hand, windows, regularisers."""

from __future__ import annotations

import base64
import copy
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

import tiny as words
import tiny_images as tiny
from unveil.learning.advantages import PromptHistory
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.noised import MatchingLikelihood
from unveil.learning.objectives import Clipped, Reinforce, TokenSum
from unveil.learning.regularisers import Kl, MeanSpace, Velocity, VelocityNorm
from unveil.learning.views import Inner, Scores
from unveil.processes.gaussian import Flow, GaussianProcess, VariancePreserving
from unveil.processes.kernels import CoefficientsPreserving, Ddim, FlowSde
from unveil.registry import UserError
from unveil.rewards.base import Part, Shaped, Sum
from unveil.rewards.images import PixelStatistic
from unveil.samplers.grids import Uniform
from unveil.samplers.guidance import ClassifierFree
from unveil.samplers.windows import Progressive, RandomSpan, Span
from unveil.seeds import derive_seed
from unveil.tasks.evaluate import sample_problems
from unveil.training.lora import Adapter, LoraSettings
from unveil.training.outcome import Outcome
from unveil.training.policy_config import PolicyEval
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import Following, SnapshotConfig
from unveil.training.trainer import OptimConfig


class Spied:
    """A job that remembers the chains of its last update and runs no optimiser."""

    def __init__(self, job: PolicyJob) -> None:
        self.job = job
        roll = job._roll

        def keep(*args: Any, **how: Any) -> Any:
            self.rollouts = roll(*args, **how)
            return self.rollouts

        job._roll = keep  # type: ignore[method-assign]
        self.gradients: list[dict[str, Tensor]] = []

    def update(self, number: int = 0, shift: float = 0.0) -> dict[str, Any]:
        """One update whose gradient steps each move the weights by ``shift`` noise."""
        stream = torch.Generator().manual_seed(1)

        def optimise(losses: Any) -> dict[str, float]:
            self.job.denoiser.zero_grad()
            for loss in losses:
                with self.job.trainer.autocast():
                    value = loss()
                value.backward()
            named = self.job.denoiser.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            with torch.no_grad():
                for parameter in self.job.denoiser.parameters():
                    parameter.add_(shift * torch.randn(parameter.shape, generator=stream))
            return {}

        return self.job.update(number, optimise)


@pytest.mark.parametrize(
    ("process", "prediction", "kernel"),
    [
        (Flow(), "u", FlowSde()), (Flow(), "x0", CoefficientsPreserving()), (VariancePreserving(), "eps", Ddim()),
        (VariancePreserving(), "v", Ddim()), (VariancePreserving(), "x0", Ddim()),
    ],
)  # fmt: skip
def test_the_first_ratio_is_one_against_what_was_recorded(
    tmp_path: Path, process: GaussianProcess, prediction: Any, kernel: Any
) -> None:
    sampler = tiny.sampler(kernel=kernel, guidance=ClassifierFree(scale=2.0))
    policy = tiny.policy(rollout={"sampler": sampler}, likelihood=TransitionLikelihood(reduce="sum"))
    metrics = Spied(tiny.job(tmp_path, policy, tiny.Mlp(process, prediction))).update()
    # Steps were drawn 8 at a time and are scored 40 at a time: sums may differ in their last bit.
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5) and metrics["ratio_deviation"] < 1e-5
    policy.rollout.batch_size = 1
    job = tiny.job(tmp_path, policy, tiny.Mlp(process, prediction), optim=OptimConfig(microbatch=1))
    assert Spied(job).update()["ratio_deviation"] == 0.0
    # In half precision as well: rollout and training compute alike.
    optim = OptimConfig(microbatch=1, precision="bf16")
    job = tiny.job(tmp_path, policy, tiny.Mlp(process, prediction), optim=optim)
    assert Spied(job).update()["ratio_deviation"] == 0.0


def by_hand(spied: Spied, policy: Any, old: tiny.Mlp, beta: float = 0.0, reference: tiny.Mlp | None = None) -> Tensor:
    """The loss of the present weights in float64, by the formulas alone: a flow, Flow-GRPO's kernel, mean over
    dimensions, mean over steps and chains."""
    chains, job = spied.rollouts.trajectory, spied.job
    advantage = Outcome.of(spied.rollouts).advantages(policy.advantage).double()
    noise = policy.rollout.sampler.kernel.noise

    def mean(net: tiny.Mlp, x: Tensor, t: float, s: float) -> Tensor:
        u = net.predict(x, torch.full((len(x),), t, dtype=torch.float64), chains.condition)
        square = noise**2 * t / (1 - (t if t < 1 else s))
        return x + (u + square / (2 * t) * (x + (1 - t) * u)) * (s - t)

    terms = []
    for step in chains.noisy[0].nonzero().flatten().tolist():
        t, s = float(chains.times[0, step]), float(chains.times[0, step + 1])
        x, after = (chains.states_at(torch.arange(len(chains)), at).double() for at in (step, step + 1))
        std = noise * (t / (1 - (t if t < 1 else s)) * (t - s)) ** 0.5
        new, before = mean(job.denoiser, x, t, s), mean(old, x, t, s).detach()
        log_ratio = ((after - before) ** 2 - (after - new) ** 2).flatten(1).mean(1) / (2 * std**2)
        rho = log_ratio.exp()
        a = advantage[:, step]
        term = torch.maximum(-a * rho, -a * rho.clamp(1 - policy.objective.clip, 1 + policy.objective.clip))
        if reference is not None:
            far = (new - mean(reference, x, t, s).detach()) ** 2
            term = term + beta * far.flatten(1).mean(1) / (2 * std**2)
        terms.append(term)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_the_written_formula(tmp_path: Path, beta: float) -> None:
    policy = tiny.policy(
        rollout={"sampler": tiny.sampler(window=Span(start=0, length=3))},
        objective=Clipped(clip=1e-2), kl=MeanSpace(beta=beta), inner_updates=2,
    )  # fmt: skip
    net = tiny.Mlp()
    spied = Spied(tiny.job(tmp_path, policy, net, optim=OptimConfig(microbatch=7)))
    first = copy.deepcopy(net).double()
    spied.update(shift=0.02)
    # The second gradient was taken after the first of two equal shifts.
    late = copy.deepcopy(net)
    stream = torch.Generator().manual_seed(1)
    start = copy.deepcopy(first).float()
    for own, moved in zip(start.parameters(), late.parameters(), strict=True):
        moved.data = own.data + 0.02 * torch.randn(own.shape, generator=stream)
    for number, weights in ((0, start), (1, late)):
        spied.job.denoiser = weights.double()
        loss = by_hand(spied, policy, first, beta, first if beta else None)
        weights.zero_grad()
        loss.backward()
        for name, parameter in weights.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                spied.gradients[number][name].double(), parameter.grad, rtol=2e-3, atol=1e-6, msg=f"{number} {name}"
            )


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_the_gradient_does_not_depend_on_micro_batches(tmp_path: Path, microbatch: int) -> None:
    def gradient(size: int) -> dict[str, Tensor]:
        policy = tiny.policy(kl=Velocity(beta=0.5))
        spied = Spied(tiny.job(tmp_path, policy, optim=OptimConfig(microbatch=size)))
        spied.update()
        return spied.gradients[0]

    for name, value in gradient(microbatch).items():
        torch.testing.assert_close(value, gradient(8)[name], rtol=1e-4, atol=1e-7)


def test_a_window_trains_its_own_steps_and_moves(tmp_path: Path) -> None:
    policy = tiny.policy(rollout={"sampler": tiny.sampler(steps=8, window=RandomSpan(length=2))})
    spied = Spied(tiny.job(tmp_path, policy))
    seen = set()
    for update in range(8):
        spied.update(update)
        chains = spied.rollouts.trajectory
        batch = spied.job.steps.batch(
            spied.rollouts, torch.ones(chains.active.shape), chains.decided.float(), Inner(), keep_old=False
        )
        steps = sorted(set(batch.views.steps.tolist()))
        assert steps == [steps[0], steps[0] + 1] == chains.noisy[0].nonzero().flatten().tolist()
        assert len(batch.views) == 8 * 2
        seen.add(steps[0])
    assert seen == {0, 1, 2}


def test_forwards_are_those_of_rollout_and_of_trained_steps(tmp_path: Path) -> None:
    policy = tiny.policy(
        rollout={"sampler": tiny.sampler(window=Span(start=1, length=2), share="prefix", guidance=ClassifierFree())},
        kl=MeanSpace(beta=0.1),
    )  # fmt: skip
    job = tiny.job(tmp_path, policy)
    Spied(job).update()
    rollout, trained = 2 * (2 * 1 + 8 * 4), 2 * 8 * 2
    assert job.trainer.cost.forwards == rollout + 2 * trained  # the reference scores them, too


def test_a_curriculum_changes_what_is_optimised(tmp_path: Path) -> None:
    later = Part(reward=PixelStatistic(statistic="brightness"), weight=2.0, updates=[(1, None)])
    job = tiny.job(tmp_path, tiny.policy(reward=Sum(parts={"score": Part(reward=Shaped()), "light": later})))
    first, second = (job.update(update, job.trainer.optimise) for update in range(2))
    assert "reward/light" not in first and first["reward"] == pytest.approx(first["reward/score"])
    assert second["reward"] == pytest.approx(second["reward/score"] + 2 * second["reward/light"])


def test_regularisers_are_their_closed_forms(tmp_path: Path) -> None:
    net, other = tiny.Mlp(), tiny.Mlp(seed=1)
    policy = tiny.policy()
    spied = Spied(tiny.job(tmp_path, policy, net))
    spied.update()
    chains = spied.rollouts.trajectory
    likelihood = TransitionLikelihood(reduce="sum")
    views = likelihood.views(chains, chains.decided.float(), [], net.spec)
    with torch.no_grad():
        own, far = (likelihood.score(each, views, policy.rollout.sampler) for each in (net, other))
    weight = torch.rand(len(views), 1)
    assert own.mean is not None and own.std is not None and far.mean is not None
    gaussians = [torch.distributions.Normal(each.mean.double(), own.std.view(-1, 1, 1, 1)) for each in (own, far)]  # type: ignore[union-attr]
    exact = torch.distributions.kl_divergence(*gaussians).flatten(1).mean(1)
    terms, weights = MeanSpace(beta=1.0).penalty(views, own, far, weight)
    torch.testing.assert_close(terms.double(), exact, rtol=1e-4, atol=1e-8)
    assert torch.equal(weights, weight[:, 0])
    length = views.before[1] - views.after[1]
    torch.testing.assert_close(MeanSpace(beta=1.0, rate=True).penalty(views, own, far, weight)[0], terms * length)
    # On a flow the velocity is the network's own prediction.
    (x, t), condition = views.before, views.condition
    with torch.no_grad():
        plain = (net.predict(x, t, condition) - other.predict(x, t, condition)).square().flatten(1).mean(1)
    torch.testing.assert_close(Velocity(beta=1.0).penalty(views, own, far, weight)[0], plain, rtol=1e-4, atol=1e-6)
    size, held = (one.velocity.flatten(1).norm(dim=1) / tiny.DIM**0.5 for one in (own, far))  # type: ignore[union-attr]
    longer = torch.where(size > held, (size - held) ** 2, 0.0)
    grown = VelocityNorm(beta=1.0).penalty(views, own, far, weight)[0]
    torch.testing.assert_close(grown, longer, rtol=1e-4, atol=1e-6)
    assert (longer > 0).any() and (longer == 0).any()
    # And the estimate k2 of the same divergence, from log-probabilities of the drawn states, agrees in the mean.
    with torch.no_grad():
        near = copy.deepcopy(net)
        for parameter in near.parameters():
            parameter.add_(1e-3)
        close = likelihood.score(near, views, policy.rollout.sampler)
    k3 = Kl(beta=1.0, estimator="k3").penalty(views, own, close, weight)[0]
    assert k3.shape == (len(views),) and (k3 >= 0).all()


def test_score_function_and_importance_sampling_agree_on_the_first_update(tmp_path: Path) -> None:
    """A huge clip range turns the first step of the clipped ratio into -A grad log p."""
    policy = tiny.policy(weighting=TokenSum())
    spied = Spied(tiny.job(tmp_path, policy))
    spied.update()
    chains, net = spied.rollouts.trajectory, spied.job.denoiser
    views = policy.likelihood.views(chains, chains.decided.float(), [], net.spec)
    advantage = Outcome.of(spied.rollouts).advantages(policy.advantage)[views.rows, views.steps]
    net.zero_grad()
    scores = policy.likelihood.score(net, views, policy.rollout.sampler)
    (-(advantage * scores.log_prob[:, 0]).sum() / len(chains)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(spied.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"response_length": 12}}, "response_length: samples of the sampler 'latent'"),
        ({"rollout": {"sampler": tiny.sampler(kernel=Ddim(eta=0.0))}}, "without noise leaves nothing to score"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.job(tmp_path, tiny.policy(**changes))


def test_a_task_of_another_medium_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tiny_echo' judges samples of kind 'text', the model draws 'image'"):
        tiny.job(tmp_path, tiny.policy(task=words.Echo()))
    with pytest.raises(UserError, match="'tiny_bright' judges samples of kind 'image', the model draws 'text'"):
        words.job(tmp_path, words.policy("mdpo", task=tiny.Bright()))
    with pytest.raises(UserError, match="sampler: 'latent' draws nothing from a model of samples of kind 'text'"):
        words.job(tmp_path, words.policy("mdpo", rollout={"sampler": tiny.sampler(), "response_length": None}))


def test_a_grid_that_ends_above_zero_leaves_every_step_noisy(tmp_path: Path) -> None:
    sampler = tiny.sampler(kernel=Ddim(eta=1.0), grid=Uniform(end=0.05))
    spied = Spied(tiny.job(tmp_path, tiny.policy(rollout={"sampler": sampler})))
    spied.update()
    assert spied.rollouts.trajectory.noisy.all()


@dataclass(kw_only=True)
class Distance(TransitionLikelihood, name="tiny_distance"):
    """Minus the squared distance of the velocity from that of the policy that drew the chains."""

    reads_old = frozenset({"velocity"})

    def recorded(self, views: Any, trajectory: Any) -> None:  # type: ignore[override]
        return None

    def score(self, denoiser: Any, views: Any, sampler: Any, old: Scores | None = None) -> Scores:
        scores = super().score(denoiser, views, sampler)
        if old is None:
            return scores
        assert scores.velocity is not None and old.velocity is not None
        squares = (scores.velocity - old.velocity).square().flatten(1).sum(1)
        return replace(scores, log_prob=-squares[:, None])


def test_rollouts_are_drawn_by_a_snapshot_and_compared_with_it(tmp_path: Path) -> None:
    policy = tiny.policy(rollout={"drawn_by": "old"}, likelihood=Distance(), objective=Reinforce())
    snapshots = SnapshotConfig(old=Following(every=2))
    spied = Spied(tiny.job(tmp_path, policy, snapshots=snapshots))
    net, trainer = spied.job.denoiser, spied.job.trainer
    start = copy.deepcopy(net)
    metrics = spied.update()
    assert metrics["log_prob"] == 0.0  # the policy is the old one still
    tiny_shift(net)
    moved = copy.deepcopy(net)
    metrics = spied.update()
    chains = spied.rollouts.trajectory
    sampler = policy.rollout.sampler
    by_old = sample_problems(
        start, spied.rollouts.problems, sampler, seed=derive_seed(3, "rollout", 0), needs={"scored", "times"}
    )
    assert torch.equal(chains.scored, by_old.scored)
    (x, t), condition = views_of(chains).before, views_of(chains).condition
    with torch.no_grad():
        far = (moved.predict(x, t, condition) - start.predict(x, t, condition)).square().flatten(1).sum(1)
    assert metrics["log_prob"] == pytest.approx(-float(far.mean()), rel=1e-4)
    trainer.snapshots.after_update(2)
    assert spied.update()["log_prob"] == 0.0


def tiny_shift(net: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05)


def views_of(chains: Any) -> Any:
    return TransitionLikelihood().views(chains, chains.decided.float(), [], None)  # type: ignore[arg-type]


def test_the_ratio_is_against_the_snapshot_that_drew(tmp_path: Path) -> None:
    policy = tiny.policy(rollout={"drawn_by": "old"})
    job = tiny.job(tmp_path, policy, snapshots=SnapshotConfig(old=Following()))
    assert Spied(job).update()["ratio_deviation"] < 1e-6
    tiny_shift(job.denoiser)
    assert Spied(job).update()["ratio_deviation"] > 1e-4


def test_a_snapshot_that_the_run_does_not_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy.rollout.drawn_by: 'old', but .* \(give snapshots.old\)"):
        tiny.job(tmp_path, tiny.policy(rollout={"drawn_by": "old"}))
    far = {"far": Velocity(beta=1.0, towards="ema")}
    with pytest.raises(UserError, match=r"policy.regularisers.far.towards: 'ema', .* \(give snapshots.ema_decay\)"):
        tiny.job(tmp_path, tiny.policy(regularisers=far))
    with pytest.raises(UserError, match=r"policy\.minibatches: 9 are more than the chains of a process"):
        tiny.job(tmp_path, tiny.policy(minibatches=9))


def test_several_regularisers_hold_to_several_snapshots(tmp_path: Path) -> None:
    policy = tiny.policy(
        kl=MeanSpace(beta=0.1), regularisers={"prox": Velocity(beta=0.5, towards="old"), "off": Velocity()}
    )
    job = tiny.job(tmp_path, policy, snapshots=SnapshotConfig(old=Following(decay=0.5)))
    assert {"kl", "prox"} <= (first := Spied(job).update()).keys() and "off" not in first
    assert first["kl"] == first["prox"] == 0.0
    tiny_shift(job.denoiser)
    job.trainer.snapshots.after_update(1)
    metrics = Spied(job).update()
    assert metrics["kl"] > 0 and metrics["prox"] > 0


def test_regularisers_towards_one_snapshot_share_its_evaluations(tmp_path: Path) -> None:
    def forwards(**more: Any) -> int:
        job = tiny.job(tmp_path, tiny.policy(kl=MeanSpace(beta=0.1), regularisers=more))
        Spied(job).update()
        return job.trainer.cost.forwards

    assert forwards(far=Velocity(beta=0.1)) == forwards() == 8 * 5 + 2 * 8 * 5


def test_a_regulariser_without_its_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="kl: 'mean_space' reads the mean of a step, which the likelihood 'matching'"):
        tiny.policy(kl=MeanSpace(beta=0.1), likelihood=MatchingLikelihood())
    with pytest.raises(UserError, match=r"regularisers\.far: 'velocity' reads the velocity of a step, .* 'trajectory'"):
        words.policy("mdpo", regularisers={"far": Velocity(beta=0.1)})
    assert tiny.policy(kl=Velocity(beta=0.1), likelihood=MatchingLikelihood())


def test_minibatches_deal_out_all_chains_once(tmp_path: Path) -> None:
    policy = tiny.policy(minibatches=3, inner_updates=2)
    spied = Spied(tiny.job(tmp_path, policy))
    make, shares = spied.job.steps.batch, []

    def batch(rollouts: Any, *rest: Any, **how: Any) -> Any:
        shares.append(rollouts.seeds)
        return make(rollouts, *rest, **how)

    spied.job.steps.batch = batch  # type: ignore[method-assign]
    metrics = spied.update(shift=0.02)
    assert [len(share) for share in shares] == [3, 3, 2] and len(spied.gradients) == 6
    assert sorted(seed for share in shares for seed in share) == sorted(spied.rollouts.seeds)
    assert metrics["ratio_deviation"] > 0
    assert len(metrics["steps/ratio_mean"]) == 5


def test_what_is_measured_step_by_step_averages_to_the_whole(tmp_path: Path) -> None:
    sampler = tiny.sampler(window=Span(start=1, length=3))
    spied = Spied(tiny.job(tmp_path, tiny.policy(rollout={"sampler": sampler}, inner_updates=2)))
    metrics = spied.update(shift=0.05)
    for name in ("ratio_mean", "ratio_deviation", "clip_low", "clip_high"):
        steps = metrics[f"steps/{name}"]
        assert steps[0] is None and len(steps) == 4
        assert sum(steps[1:]) / 3 == pytest.approx(metrics[name], abs=1e-6)


def test_gated_chains_alone_are_held_back(tmp_path: Path) -> None:
    spied = Spied(tiny.job(tmp_path, tiny.policy(kl=Velocity(beta=1.0))))
    spied.update()
    rollouts = spied.rollouts
    rollouts.gate = torch.tensor([0.0, 8.0] + [0.0] * 6)
    active = rollouts.trajectory.active
    batch = spied.job.steps.batch(rollouts, torch.ones(active.shape), active.float(), Inner(), keep_old=False)
    assert set(batch.views.rows[batch.kl_weight[:, 0] > 0].tolist()) == {1}
    assert float(batch.kl_weight.sum()) == pytest.approx(1.0)
    assert set(rollouts.rows(torch.tensor([1, 2])).gate.tolist()) == {8.0, 0.0}  # type: ignore[union-attr]


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    def make(run: Path) -> PolicyJob:
        sampler = tiny.sampler(steps=6, window=Progressive(length=2, every=1), share="prefix")
        policy = tiny.policy(
            rollout={"sampler": sampler, "drawn_by": "old"}, advantage=PromptHistory(size=8, least=4), minibatches=2,
            kl=MeanSpace(beta=0.1),
        )  # fmt: skip
        snapshots = SnapshotConfig(old=Following(decay=0.5, rate=0.2), reference_limit=1e-4, ema_decay=0.9)
        run.mkdir(exist_ok=True)
        return tiny.job(run, policy, snapshots=snapshots, updates=4, every=2, keep=5)

    whole = make(tmp_path / "whole")
    assert whole.trainer.fit(whole, whole.log)
    for name in ("model", "state.pt"):
        source, to = (tmp_path / run / "checkpoints" / "update-000002" / name for run in ("whole", "split"))
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, to)
    split = make(tmp_path / "split")
    assert split.trainer.resume(split) == 2
    assert split.trainer.fit(split, split.log)
    left, right = (words.newest(tmp_path / run) for run in ("whole", "split"))
    assert words.same(left, right) == [] and left["job"]["advantage"]["remembered"]
    moved = left["snapshots"]["rules"]["moved"]
    assert int(moved) > 0


def test_an_evaluation_and_its_records(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy())
    job.evaluation = PolicyEval(problems=4, decoders={"ode": tiny.sampler(kernel=Ddim(eta=0.0))}, shown=2)
    job.evaluate(0)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["problems"] == 4 and line["forwards"] == 20 and line["latent_scale"] > 0
    assert "over_denoising" not in line
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    chain = json.loads((tmp_path / "trajectories.jsonl").read_text().splitlines()[0])
    assert len(chain["steps"]) == 5 and chain["steps"][-1]["image"] == chain["steps"][-1]["guess_image"]
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(sample["image"].partition(",")[2])))
    assert picture.size == (4, 4) and picture.mode == "L"
    assert {"correct", "score", "time", "noisy"} <= chain["steps"][0].keys()


def test_large_images_are_kept_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.rand(3, 512, 256)
    monkeypatch.setattr(tiny.Mlp, "decode", lambda self, x_0: large.expand(len(x_0), 3, 512, 256))
    job = tiny.job(tmp_path, tiny.policy())
    job.evaluation = PolicyEval(problems=2, decoders={"ode": tiny.sampler(kernel=Ddim(eta=0.0), steps=2)}, shown=1)
    job.evaluate(0)
    sample = json.loads((tmp_path / "samples.jsonl").read_text())["image"]
    steps = json.loads((tmp_path / "trajectories.jsonl").read_text())["steps"]
    sizes = [
        PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
        for url in (sample, *(step[key] for step in steps for key in ("image", "guess_image")))
    ]
    assert sizes == [(128, 256), *[(64, 128)] * 4]


@pytest.mark.parametrize("steps", [3, 12])
def test_a_backward_pass_holds_one_micro_batch_however_long_the_chain(tmp_path: Path, steps: int) -> None:
    policy = tiny.policy(rollout={"sampler": tiny.sampler(steps=steps)}, kl=MeanSpace(beta=0.1))
    job = tiny.job(tmp_path, policy, optim=OptimConfig(microbatch=4))
    held = []

    def optimise(losses: Any) -> dict[str, float]:
        for loss in losses:
            kept = 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal kept
                kept += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss()
            value.backward()
            held.append(kept)
        return {}

    job.update(0, optimise)
    assert len(held) == 8 * steps // 4 and len(set(held)) == 1
    assert held[0] < 4 * 2000  # numbers per view: activations and weights of a network of 1,800


def test_adapters_alone_learn_and_the_reference_costs_no_copy(tmp_path: Path) -> None:
    net, plain = tiny.Mlp(), tiny.Mlp()
    torch.manual_seed(0)
    adapter = Adapter(net, LoraSettings(rank=2, alpha=4))
    policy = tiny.policy(kl=MeanSpace(beta=0.1), inner_updates=2)
    job = tiny.job(tmp_path, policy, net, adapter=adapter, snapshots=SnapshotConfig(old=Following(decay=0.5)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    metrics = job.update(0, job.trainer.optimise)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    x, t, told = torch.ones(2, *tiny.SHAPE), torch.full((2,), 0.5), net.condition(["a", "b"])
    with job.trainer.reference():
        assert torch.equal(net.predict(x, t, told), plain.predict(x, t, told))
    assert set(job.trainer.snapshots.sets) == {"old"} and metrics["kl"] > 0
    assert all("lora_" in name for name in job.trainer.snapshots.sets["old"].values)


def test_steps_of_latents_are_units_by_themselves(tmp_path: Path) -> None:
    """What is then left out changes neither value nor gradient."""
    job = tiny.job(tmp_path, tiny.policy())
    rollouts = job._sampled(0)
    chosen = rollouts.trajectory.decided.float()
    batch = job.steps.batch(rollouts, torch.ones_like(chosen), chosen, Inner(), keep_old=True)
    for views, units in zip(batch.pieces, batch.units, strict=True):
        assert units.single and len(units) == len(views)
        found = []
        for one in (units, replace(units, single=False)):
            log_prob = torch.randn(len(views), 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
            value = one.log_prob(log_prob)
            value.square().sum().backward()
            found += [value, log_prob.grad]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])

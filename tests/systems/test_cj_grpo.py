"""CJ-GRPO: loss and gradient of whole updates against loops over eq. 10-11; EOSER and ASS against loops over their
definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from unveil.claims.cj_grpo import Shifted
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import OneStepLikelihood, TrajectoryLikelihood
from unveil.learning.objectives import Clipped, StepMean, TokenMean, TokenSum
from unveil.learning.regularisers import Kl
from unveil.registry import UserError, lookup
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Entropy, Factor, LowConfidence, Margin, Random, RunningConfidence, StepView, Threshold
from unveil.samplers.schedules import Doubling, Even
from unveil.samplers.trajectory import TokenTrajectory
from unveil.samplers.transforms import Transform
from unveil.systems.cj_grpo import CjGrpo, Eoser
from unveil.training.policy_config import PolicyConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import OptimConfig

TAU, END, MU, CLIP, BETA, GROUP = 0.7, 2, 3, 0.05, 0.5, 4


def policy(**changes: Any) -> PolicyConfig:
    changes["rollout"] = tiny.rollouts(**changes.get("rollout", {}))
    return PolicyConfig(**({"task": tiny.Echo()} | vars(CjGrpo()) | changes))


class Spied:
    """One update and everything that it worked with."""

    def __init__(self, folder: Path, config: PolicyConfig, microbatch: int = 1000) -> None:
        optim = OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch)
        self.job: PolicyJob = tiny.job(folder, config, optim=optim)
        self.reference = self.weights()
        tiny.shifted(self.job.denoiser)
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        roll = self.job._roll

        def rollout(update: int, problems: Any, group: Tensor, **how: Any) -> Rollouts:
            self.rollouts = roll(update, problems, group, **how)
            return self.rollouts

        self.job._roll = rollout  # type: ignore[method-assign]
        self.metrics = self.job.update(0, self.optimise)
        self.trajectory: TokenTrajectory = self.rollouts.trajectory

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.job.denoiser.state_dict().items()}

    def optimise(self, losses: Any) -> dict[str, float]:
        self.before.append(self.weights())
        result = self.job.trainer.optimise(losses)
        self.gradients.append(tiny.gradients(self.job.denoiser))
        self.losses.append(result["loss"])
        return result


def said(ids: list[int]) -> list[str]:
    ids = ids[: ids.index(END)] if END in ids else ids
    return [tiny.WORDS[token - 4] for token in ids]


def revealed_by(trajectory: TokenTrajectory, row: int, drop: bool) -> list[tuple[int, list[int]]]:
    """(s, pos_s) of a chain, read from its states alone; steps with empty pos_s left out."""
    assert trajectory.states is not None
    states = [*trajectory.states[row][trajectory.active[row]].tolist(), trajectory.response_ids[row].tolist()]
    final = states[-1]
    limit = final.index(END) if drop and END in final else len(final)
    steps = []
    for s in range(len(states) - 1):
        changed = [i for i, (old, new) in enumerate(zip(states[s], states[s + 1], strict=True)) if old != new]
        if kept := [i for i in changed if i <= limit]:
            steps.append((s, kept))
    return steps


def expected(
    spied: Spied, inner: int, weighting: str, scale: str, drop: bool
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The written formula in float64, its gradient, and the share of tokens beyond the clip."""
    trajectory, net = spied.trajectory, spied.job.denoiser
    new, old, ref = (tiny.float64(net, **w) for w in (spied.before[inner], spied.before[0], spied.reference))
    width = trajectory.prompt_ids.shape[1]
    rewards = [
        float(problem.answer["word"] in said(trajectory.response_ids[row].tolist()))
        for row, problem in enumerate(spied.rollouts.problems)
    ]
    chains = [revealed_by(trajectory, row, drop) for row in range(len(rewards))]
    tokens = sum(len(positions) for chain in chains for _, positions in chain)
    total, stopped = torch.zeros((), dtype=torch.float64), 0
    for row, chain in enumerate(chains):
        group = np.array(rewards[row // GROUP * GROUP : row // GROUP * GROUP + GROUP])
        a = (rewards[row] - group.mean()) / (group.std(ddof=1) + 1e-4 if scale == "std" else 1)
        for s, positions in chain:
            assert trajectory.states is not None
            canvas = torch.cat([trajectory.prompt_ids[row], trajectory.states[row, s]])[None]
            logs = [(m(canvas, trajectory.valid[row][None])[0, width:] / TAU).log_softmax(-1) for m in (new, old, ref)]
            step = torch.zeros((), dtype=torch.float64)
            for i in positions:
                token = int(trajectory.response_ids[row, i])
                rho = (logs[0][i, token] - logs[1][i, token].detach()).exp()
                limited = rho.clamp(1 - CLIP, 1 + CLIP)
                stopped += int((rho * a > limited * a).item())
                d = logs[2][i, token].detach() - logs[0][i, token]
                step = step - torch.minimum(rho * a, limited * a) + BETA * (d.exp() - d - 1)
            total = (
                total
                + {
                    "step_mean": step / len(positions) / len(chain) / len(chains),
                    "token_mean": step / tokens,
                    "token_sum": step / len(chains),
                }[weighting]
            )
    total.backward()
    return total, tiny.gradients(new), stopped / tokens


WEIGHTINGS = {"step_mean": StepMean, "token_mean": TokenMean, "token_sum": TokenSum}
DECODERS = {
    "even": MaskedSampler(steps=3, temperature=TAU),
    "doubling": MaskedSampler(steps=2, schedule=Doubling(blocks=2), transform=Eoser(pace="doubling"), temperature=TAU),
    "own pace": MaskedSampler(steps=5, rule=Threshold(threshold=0.25), temperature=TAU),
}


@pytest.mark.parametrize(
    ("weighting", "scale", "drop", "decoder", "microbatch"),
    [
        ("step_mean", "std", False, "even", 1000),
        ("step_mean", "none", False, "even", 1),
        ("step_mean", "std", True, "own pace", 3),
        ("step_mean", "std", True, "doubling", 1000),
        ("token_mean", "none", False, "own pace", 3),
        ("token_sum", "std", False, "doubling", 3),
        ("token_mean", "std", True, "even", 1000),
        ("token_sum", "none", True, "own pace", 1000),
    ],
)
def test_loss_and_gradient_of_every_inner_update(
    tmp_path: Path, weighting: str, scale: Any, drop: bool, decoder: str, microbatch: int
) -> None:
    config = policy(
        rollout={"sampler": DECODERS[decoder]},
        advantage=GroupAdvantage(scale=scale),
        likelihood=TrajectoryLikelihood(tokens="revealed", after_end="drop" if drop else "keep"),
        objective=Clipped(clip=CLIP),
        weighting=WEIGHTINGS[weighting](),
        kl=Kl(beta=BETA, estimator="k3"),
        inner_updates=MU,
    )
    spied = Spied(tmp_path, config, microbatch)
    shares = []
    for inner in range(MU):
        loss, grads, share = expected(spied, inner, weighting, scale, drop)
        shares.append(share)
        assert spied.losses[inner] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        assert grads.keys() == spied.gradients[inner].keys()
        largest = max(float(grad.abs().max()) for grad in grads.values())
        assert largest > 1e-3
        for name, grad in grads.items():
            torch.testing.assert_close(spied.gradients[inner][name], grad, rtol=1e-3, atol=1e-5 * max(1.0, largest))
    assert shares[0] == 0 and max(shares[1:]) > 0.02  # the clip did something
    lengths = {(s, len(p)) for row in range(16) for s, p in revealed_by(spied.trajectory, row, drop)}
    assert len({count for _, count in lengths}) > 1  # steps reveal different numbers of tokens


def test_some_steps_have_nothing_to_say_and_are_skipped(tmp_path: Path) -> None:
    """Behind the end, whole steps fall away; what is left of a chain still weighs as much as any chain."""
    likelihood = TrajectoryLikelihood(tokens="revealed", after_end="drop")
    spied = Spied(tmp_path, policy(likelihood=likelihood, inner_updates=1))
    trajectory, spec = spied.trajectory, spied.job.denoiser.spec
    views = likelihood.views(trajectory, trajectory.active.float(), spied.rollouts.seeds, spec)
    steps = [[s for s, _ in revealed_by(trajectory, row, True)] for row in range(16)]
    assert [views.steps[views.rows == row].tolist() for row in range(16)] == steps
    assert min(len(chain) for chain in steps) < max(len(chain) for chain in steps)
    weight, _ = StepMean().weights(views, torch.ones(len(views)), trajectory, lambda x: x)
    per_chain = torch.zeros(16).index_add_(0, views.rows, weight.sum(1))
    torch.testing.assert_close(per_chain, torch.full((16,), 1 / 16))


@pytest.mark.parametrize(
    "sampler",
    [
        *DECODERS.values(),
        MaskedSampler(steps=4, block_length=2, temperature=1.0),
        MaskedSampler(steps=5, rule=Random(), temperature=2.0, stop_at_end=True),
        MaskedSampler(steps=3, rule=Margin(), transform=Eoser(), temperature=1.0),
        MaskedSampler(steps=5, rule=Factor(factor=2.0), temperature=1.0),
    ],
)
def test_every_response_token_is_assigned_exactly_once(sampler: MaskedSampler) -> None:
    net = tiny.denoiser()
    lengths = [4, 8, 4, 6] if sampler.block_length else [5, 8, 4, 7]
    sampler = replace(sampler, steps=3) if isinstance(sampler.schedule, Doubling) else sampler
    spec = net.spec
    prompts = [[4], [5, 6], [7, 4, 5], [6]]
    initial = [[spec.mask_id] * length for length in lengths]
    initial[1][3] = initial[3][0] = 5  # given tokens are nobody's action
    canvas = Canvas.of(prompts, lengths, spec, initial=initial)
    likelihood = TrajectoryLikelihood(tokens="revealed")
    trajectory = sampler.sample(net, canvas, [1, 2, 3, 4], needs=likelihood.needs)
    views = likelihood.views(trajectory, trajectory.active.float(), [0] * 4, spec)
    times = torch.zeros(4, 8, dtype=torch.long).index_add_(0, views.rows, views.scored.long())
    stopped = trajectory.response_valid & ~trajectory.given
    if sampler.stop_at_end:  # the rest that stopping fills up is no decision
        stopped &= times > 0
        assert (times <= 1).all() and bool((times == 1).any())
    assert torch.equal(times, stopped.long())
    assert torch.equal(views.targets[views.scored], trajectory.response_ids[views.rows][views.scored])


def test_the_ratio_is_one_on_policy(tmp_path: Path) -> None:
    spied = Spied(tmp_path, policy(inner_updates=1, kl=Kl()))
    assert spied.metrics["ratio_deviation"] == 0 and spied.metrics["ratio_mean"] == 1


@pytest.mark.parametrize("steps", [1, 5])
def test_no_forward_pass_of_training_holds_more_than_a_micro_batch(tmp_path: Path, steps: int) -> None:
    """Whatever the number of steps; and every graph is gone before the next one is built."""
    config = policy(rollout={"sampler": MaskedSampler(steps=steps, temperature=TAU)}, inner_updates=2)
    job = tiny.job(tmp_path, config, optim=OptimConfig(lr=1e-3, microbatch=2))
    rows: list[int] = []
    first = True
    features = job.denoiser.features

    def spying(*arguments: Any) -> Tensor:
        nonlocal first
        out = features(*arguments)
        if out.requires_grad:
            rows.append(len(out))
            # The loss before this one has been backpropagated.
            assert first or all(parameter.grad is not None for parameter in job.denoiser.parameters())
            first = False
        return out

    def optimise(losses: Any) -> dict[str, float]:
        nonlocal first
        first = True
        return job.trainer.optimise(losses)

    job.denoiser.features = spying  # type: ignore[method-assign]
    job.update(0, optimise)
    assert max(rows) == 2 and sum(rows) == 2 * 16 * steps


def test_one_step_grpo_shows_the_clean_prompt_and_a_masked_response(tmp_path: Path) -> None:
    config = policy(likelihood=OneStepLikelihood(prompt_mask=0.0), weighting=TokenMean(), inner_updates=1)
    spied = Spied(tmp_path, config)
    trajectory, spec = spied.trajectory, spied.job.denoiser.spec
    views = config.likelihood.views(trajectory, trajectory.active.float(), spied.rollouts.seeds, spec)
    assert torch.equal(views.ids[:, : views.prompt_width], trajectory.prompt_ids)
    assert (views.ids[:, views.prompt_width :] == spec.mask_id).all()


def test_the_paper_s_choices() -> None:
    chosen = CjGrpo()
    assert chosen.likelihood == TrajectoryLikelihood(tokens="revealed", after_end="keep")
    assert (chosen.objective.clip, chosen.objective.level) == (0.5, "token")
    assert (chosen.kl.beta, chosen.kl.estimator, chosen.advantage.scale) == (0.04, "k3", "std")
    assert isinstance(chosen.weighting, StepMean) and lookup(Transform, "eoser") is Eoser


def test_the_claim_s_task_of_one_choice() -> None:
    task = Shifted(length=4)
    for problem in task.problems("train", 30, 0):
        digits = [int(word) for word in problem.prompt.split()]
        for key in range(3):
            right = [str((digit + key) % 3) for digit in digits]
            assert task.check(problem, " ".join(right)).correct
            assert not task.check(problem, " ".join(right[:3])).correct
            assert not task.check(problem, " ".join([*right, "0"])).correct
            right[2] = str((int(right[2]) + 1) % 3)
            assert not task.check(problem, " ".join(right)).correct
        assert task.check(problem, problem.solution or "").correct
    assert not task.check(problem, "").correct and not task.check(problem, "x y z x").correct
    keys = {(int(p.solution.split()[0]) - int(p.prompt[0])) % 3 for p in task.problems("train", 30, 0)}  # type: ignore
    assert keys == {0, 1, 2}


# EOSER


@pytest.mark.parametrize(("steps", "g_min", "g_max"), [(7, 0.4, 1.0), (64, 0.01, 1.0), (2, 0.0, 0.5), (1, 0.4, 0.9)])
def test_the_factor(steps: int, g_min: float, g_max: float) -> None:
    place, many = torch.arange(steps), torch.full((steps,), steps)
    uniform = Eoser(g_min=g_min, g_max=g_max).factor(place, many)
    doubling = Eoser(g_min=g_min, g_max=g_max, pace="doubling").factor(place, many)
    for s in range(steps):
        tau = s / (steps - 1) if steps > 1 else 1.0
        assert uniform[s].item() == pytest.approx(g_min + (g_max - g_min) * tau, rel=1e-6)
        tau = (2 ** (s + 1) - 1) / 2**steps
        assert doubling[s].item() == pytest.approx(g_min + (g_max - g_min) * tau, rel=1e-6)
    assert uniform[-1].item() == pytest.approx(g_max)


def test_doubling_pace_is_the_share_that_ass_has_revealed() -> None:
    counts = Doubling().counts(127, 7)
    factor = Eoser(g_min=0.0, pace="doubling").factor(torch.arange(7), torch.full((7,), 7))
    assert factor.tolist() == pytest.approx([sum(counts[: s + 1]) / 128 for s in range(7)])


def test_only_end_tokens_are_damped_and_all_of_them() -> None:
    spec = replace(tiny.denoiser().spec, end_ids=(2, 3))
    score = torch.tensor([[0.5, 0.5, 0.5, -math.inf, 0.0], [0.25, -math.inf, 1.0, 0.5, 0.5]])
    guess = torch.tensor([[2, 4, 3, 2, 2], [5, 2, 2, 6, 3]])
    view = StepView(
        open=score.isfinite(), score=score, remain=torch.tensor([1, 1]), last=torch.zeros(2, dtype=torch.bool),
        step=torch.tensor([0, 1]), steps=torch.tensor([3, 3]), done=torch.tensor([3, 4]), planned=torch.tensor([5, 5]),
    )  # fmt: skip
    half = (0.0, 0.5)
    expected = [[0.5 * half[0], 0.5, 0.5 * half[0], -math.inf, 0.0], [0.25, -math.inf, half[1], 0.5, 0.5 * half[1]]]
    assert Eoser(g_min=0.0).apply(score, guess, view, spec).tolist() == expected
    whole = Eoser(g_min=0.0, count="canvas").apply(score, guess, view, spec)
    assert whole[0].tolist() == [0.375, 0.5, 0.375, -math.inf, 0.0]
    assert whole[1, 2].item() == 1.0


@pytest.mark.parametrize("rule", [LowConfidence(), Margin()])
@pytest.mark.parametrize("pace", ["uniform", "doubling"])
def test_decoding_with_eoser_against_a_plain_loop(rule: Any, pace: Any) -> None:
    net, length, steps = tiny.denoiser(3), 8, 3
    net.forbidden_bias[END] = 0.5  # end tokens are liked
    schedule = Doubling() if pace == "doubling" else Even()
    sampler = MaskedSampler(steps=steps, schedule=schedule, rule=rule, transform=Eoser(g_min=0.05, pace=pace))
    plain = replace(sampler, transform=None)
    prompts = [[a, b][: 1 + a % 2] for a in range(4, 8) for b in range(4, 8)]
    canvas = Canvas.of(prompts, length, net.spec)
    found = sampler.sample(net, canvas, range(16), needs={"step_map"})
    other = plain.sample(net, canvas, range(16), needs={"step_map"})
    assert not torch.equal(found.step_map, other.step_map)  # type: ignore[arg-type]
    for row, prompt in enumerate(prompts):
        response, came = [0] * length, [-1] * length
        for s, count in enumerate(schedule.counts(length, steps)):
            probs = net(torch.tensor([prompt + response]))[0, len(prompt) :].softmax(-1)
            tau = s / (steps - 1) if pace == "uniform" else (2 ** (s + 1) - 1) / 2**steps
            factor = 0.05 + 0.95 * tau
            ranked = []
            for i in range(length):
                if response[i] == 0:
                    best = probs[i].topk(2).values.tolist()
                    c = best[0] - best[1] if isinstance(rule, Margin) else best[0]
                    token = int(probs[i].argmax())
                    ranked.append((-c * (factor if token == END else 1), i, token))
            for _, i, token in sorted(ranked)[:count]:
                response[i], came[i] = token, s
        assert found.response_ids[row].tolist() == response
        assert found.step_map[row].tolist() == came  # type: ignore[index]


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (Threshold(), "rule 'threshold' sets its own pace"),
        (Factor(), "rule 'factor' sets its own pace"),
        (Entropy(), "rule 'entropy' ranks by 'entropy'"),
        (Random(), "rule 'random' ranks by 'random'"),
        (RunningConfidence(confidence="entropy"), "rule 'rcr' ranks by 'entropy'"),
    ],
)
def test_where_eoser_makes_no_sense(rule: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        MaskedSampler(steps=3, rule=rule, transform=Eoser())
    MaskedSampler(steps=3, rule=RunningConfidence(), transform=Eoser())


def test_bad_factors_are_refused() -> None:
    with pytest.raises(UserError, match=r"g_min: should be at most g_max = 0.3, got 0.4"):
        Eoser(g_max=0.3)

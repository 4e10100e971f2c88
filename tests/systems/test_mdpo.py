"""MDPO: its advantage by hand, and loss and gradient of whole updates against loops over the paper's formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import AllSteps, TopAdvantage
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import RunningConfidence
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.mdpo import OverDenoising, StepImprovement, StepWeighting
from unveil.tasks.base import Problem, Task, Verdict
from unveil.tasks.evaluate import Judged, judge, sample_problems
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import OptimConfig

TAU = 0.7


def raw_by_formula(rewards: list[float], terms: str) -> list[float]:
    """mdpo.md's definitions for one finished chain, r_{-1} = 0."""
    last = len(rewards) - 1
    result = []
    for s, r in enumerate(rewards):
        difference = r - (rewards[s - 1] if s > 0 else 0.0)
        future = float(np.mean(rewards[s + 1 :])) if s < last else r
        result.append(
            {
                "difference+future": difference + future,
                "difference": difference,
                "future": future,
                "terminal": rewards[last],
                "step": r,
                "from_here": float(np.mean(rewards[s:])),
            }[terms]
        )
    return result


TERMS = ("difference+future", "difference", "future", "terminal", "step", "from_here")


def test_raw_advantage_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]])
    active = torch.ones(3, 4, dtype=torch.bool)
    active[2, 2:] = False
    raw = StepImprovement().raw(rewards, active)
    expected = [
        [0 + 2 / 3, 1 + 1 / 2, 0 + 0, -1 + 0],
        [1 + 1 / 3, -1 + 1 / 2, 0 + 1, 1 + 1],
        [1 + 1, 0 + 1, 0, 0],
    ]
    torch.testing.assert_close(raw, torch.tensor(expected))


@pytest.mark.parametrize("terms", TERMS)
def test_raw_advantage_of_ragged_chains(terms: str) -> None:
    stream = generator(terms)
    lengths = torch.tensor([1, 2, 3, 6, 5, 6, 1])
    active = torch.arange(6) < lengths[:, None]
    rewards = torch.randint(0, 2, (7, 6), generator=stream).float()
    rewards[~active] = 99.0  # nothing behind the end of a chain may count
    raw = StepImprovement(terms=terms).raw(rewards, active)  # type: ignore[arg-type]
    for row, length in enumerate(lengths.tolist()):
        expected = raw_by_formula(rewards[row, :length].tolist(), terms) + [0.0] * (6 - length)
        assert raw[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_advantages_are_normalised_per_step_over_the_group(terms: str) -> None:
    stream = generator(terms, 1)
    group = torch.tensor([3, 1, 3, 1, 3, 3, 1])
    lengths = torch.tensor([4, 4, 2, 3, 4, 4, 4])
    active = torch.arange(4) < lengths[:, None]
    rewards = torch.randint(0, 2, (7, 4), generator=stream).float() * active
    found = StepImprovement(terms=terms).advantages(rewards, active, group)  # type: ignore[arg-type]
    raw = [raw_by_formula(rewards[row, :length].tolist(), terms) for row, length in enumerate(lengths.tolist())]
    for row in range(7):
        for s in range(4):
            mates = [k for k in range(7) if group[k] == group[row] and lengths[k] > s]
            expected = 0.0
            if lengths[row] > s and len(mates) > 1:
                column = np.array([raw[k][s] for k in mates])
                expected = (raw[row][s] - column.mean()) / (column.std(ddof=1) + 1e-4)
            assert found[row, s].item() == pytest.approx(expected, abs=2e-3 if abs(expected) > 1e-3 else 1e-6)
    same_everywhere = StepImprovement(terms=terms).advantages(torch.ones(7, 4), active | True, group)  # type: ignore[arg-type]
    assert not same_everywhere.any()


class Spy:
    """Keeps what an update worked with: trajectories, problems, and around every gradient step the networks."""

    def __init__(self, job: Any) -> None:
        self.trajectories: list[TokenTrajectory] = []
        self.problems: list[list[Problem]] = []
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.results: list[dict[str, float]] = []
        self.job, self.roll = job, job._roll
        job._roll = self.rollout

    def rollout(self, update: int, problems: list[Problem], group: Tensor, **how: Any) -> Rollouts:
        rollouts = self.roll(update, problems, group, **how)
        self.problems.append(problems)
        self.trajectories.append(rollouts.trajectory)
        return rollouts

    def optimise(self, losses: Any) -> dict[str, float]:
        net = self.job.denoiser
        self.before.append({name: value.clone() for name, value in net.state_dict().items()})
        self.results.append(self.job.trainer.optimise(losses))
        self.gradients.append(tiny.gradients(net))
        return self.results[-1]


def text(ids: list[int]) -> str:
    words = []
    for token in ids:
        if token == 2:  # <end>
            break
        if token >= 4:
            words.append(tiny.WORDS[token - 4])
    return " ".join(words)


def expected_loss(
    spy: Spy, number: int, reference: dict[str, Tensor] | None, *, k: int, beta: float, clip: float, group: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The written formula in float64; also the share of tokens beyond the clip."""
    trajectory, problems = spy.trajectories[0], spy.problems[0]
    template = spy.job.denoiser
    new = tiny.float64(template, **spy.before[number])
    old = tiny.float64(template, **spy.before[0])
    ref = tiny.float64(template, **(reference or spy.before[0]))
    task = tiny.Echo()
    rewards = []
    for row, problem in enumerate(problems):
        count = int(trajectory.active[row].sum())
        guesses = trajectory.guesses[row, :count].tolist()  # type: ignore[index]
        rewards.append([float(task.check(problem, text(guess)).correct) for guess in guesses])
    raw = [raw_by_formula(r, "difference+future") for r in rewards]
    prompt_width = trajectory.prompt_ids.shape[1]
    total, stopped, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    for row, chain in enumerate(raw):
        mates = range(row // group * group, row // group * group + group)
        advantages = []
        for s in range(len(chain)):
            column = np.array([raw[mate][s] for mate in mates])
            advantages.append((chain[s] - column.mean()) / (column.std(ddof=1) + 1e-4))
        for s in sorted(range(len(chain)), key=lambda s: (-abs(np.float32(advantages[s])), s))[:k]:
            state = trajectory.states[row, s]  # type: ignore[index]
            canvas = torch.cat([trajectory.prompt_ids[row], state])[None]
            valid = trajectory.valid[row][None]
            holes = [i for i in range(len(state)) if state[i] == trajectory.mask_id]
            n, length = len(holes), len(state)
            log_new, log_old, log_ref = (
                (net(canvas, valid)[0, prompt_width:] / TAU).log_softmax(-1) for net in (new, old, ref)
            )
            for i in holes:
                token = int(trajectory.guesses[row, s, i])  # type: ignore[index]
                c = math.exp(float(trajectory.log_prob[row, s, i]))  # type: ignore[index]
                rho = (log_new[i, token] - log_old[i, token].detach()).exp()
                a = advantages[s]
                limited = rho.clamp(1 - clip, 1 + clip)
                stopped, tokens = stopped + int((rho * a > limited * a).item()), tokens + 1
                difference = log_ref[i, token].detach() - log_new[i, token]
                ell = -torch.minimum(rho * a, limited * a) * (length / (n + 1e-4)) + beta * 0.5 * difference**2
                total = total + c * ell / (n + 1e-4)
    loss = total / len(raw)
    loss.backward()
    return loss, tiny.gradients(new), stopped / tokens


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert largest > 1e-4
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize("rule", ["lcr", "rcr"])
@pytest.mark.parametrize("microbatch", [7, 1000])
def test_loss_and_gradient_of_an_update(tmp_path: Path, rule: str, microbatch: int) -> None:
    sampler = MaskedSampler(steps=5, temperature=TAU)
    if rule == "rcr":
        sampler.rule = RunningConfidence()
    config = tiny.policy(
        "mdpo",
        rollout={"sampler": sampler},
        inner_updates=3,
        objective=Clipped(clip=0.05),
        kl=Kl(beta=0.5, estimator="k2"),
        selector=TopAdvantage(k=2),
    )
    job = tiny.job(tmp_path, config, optim=OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch))
    reference = {name: value.clone() for name, value in job.denoiser.state_dict().items()}
    tiny.shifted(job.denoiser)
    spy = Spy(job)
    job.update(0, spy.optimise)
    shares = []
    for number in range(3):
        loss, grads, share = expected_loss(spy, number, reference, k=2, beta=0.5, clip=0.05, group=4)
        assert spy.results[number]["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        assert_gradients(spy.gradients[number], grads)
        shares.append(share)
    assert shares[0] == 0 and max(shares[1:]) > 0.05  # the clip did something


def test_without_confidence_and_length_ratio_a_step_weighs_one_over_rollouts(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy("mdpo"))
    spy = Spy(job)
    job.update(0, spy.optimise)
    trajectory = spy.trajectories[0]
    seeds = [0] * len(trajectory)
    views = TrajectoryLikelihood().views(trajectory, trajectory.active, seeds, job.denoiser.spec)

    def total(value: float) -> float:
        return 2 * value  # as if a second rank had as many rollouts

    ones = torch.ones(len(views))
    plain = StepWeighting(confidence=False, length_ratio=False).weights(views, ones, trajectory, total)
    for weight in plain:
        torch.testing.assert_close(weight.sum(1), torch.full((len(views),), 1 / 32), rtol=1e-3, atol=0)
        assert not weight[~views.scored].any()
    sure, kl = StepWeighting().weights(views, ones, trajectory, total)
    for number in range(len(views)):
        n = int(views.holes[number])
        confidence = trajectory.log_prob[views.rows[number], views.steps[number]].exp()  # type: ignore[index]
        confidence = confidence * views.scored[number]
        torch.testing.assert_close(kl[number], confidence / (n + 1e-4) / 32)
        torch.testing.assert_close(sure[number], confidence * tiny.RESPONSE / (n + 1e-4) ** 2 / 32)


class Flip(Task):
    """Right while the first word is missing or its problem says so."""

    def check(self, problem: Problem, completion: str) -> Verdict:
        right = completion.split()[:1] == [problem.answer["word"]]
        return Verdict(correct=right, score=float(right))


def test_filter_keeps_exactly_the_over_denoised_problems() -> None:
    net = tiny.denoiser()
    problems = tiny.Echo().problems("train", 60, 1)
    task = Flip()
    sampler = MaskedSampler(steps=5, temperature=1.5, rule=RunningConfidence())
    trajectory = sample_problems(net, problems, sampler, response_length=5, seed=0, needs={"guesses"})
    judged = judge(task, problems, net, trajectory)
    keep = OverDenoising(decoder=sampler).keep(judged).tolist()
    expected = []
    for row, problem in enumerate(problems):
        count = int(trajectory.active[row].sum())
        guesses = [text(trajectory.guesses[row, s].tolist()) for s in range(count)]  # type: ignore[index]
        right = [task.check(problem, guess).correct for guess in guesses]
        final = task.check(problem, text(trajectory.response_ids[row].tolist())).correct
        expected.append(any(right) and not final)
    assert keep == expected and 0 < sum(keep) < len(keep)


def test_filter_by_hand() -> None:
    def verdict(correct: bool) -> Verdict:
        return Verdict(correct=correct, score=float(correct))

    correct = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    judged = Judged(samples=[""] * 5, verdicts=[verdict(bool(row[-1])) for row in correct], guess_correct=correct)
    keep = OverDenoising(decoder=MaskedSampler(steps=3)).keep(judged)
    assert keep.tolist() == [True, False, False, True, False]


def test_all_steps_trained_are_all_forwards_counted(tmp_path: Path) -> None:
    """Sampling, reference and training passes; two inner updates share the old and the reference pass."""
    config = tiny.policy("mdpo", selector=AllSteps(), inner_updates=2)
    job = tiny.job(tmp_path, config)
    spy = Spy(job)
    job.update(0, spy.optimise)
    steps = int(spy.trajectories[0].active.sum())
    assert job.trainer.cost.forwards == spy.trajectories[0].forwards + 4 * steps

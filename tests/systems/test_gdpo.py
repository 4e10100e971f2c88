"""GDPO and coupled-GRPO: loss and gradient of every inner update against loops over the papers' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.estimators import Coupled, SemiDeterministic, quadrature
from unveil.learning.likelihoods import TokenViews
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.systems.coupled_grpo import CoupledGrpo
from unveil.systems.gdpo import Gdpo
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import OptimConfig

MU, BETA, TAU, MASK, END = 3, 0.4, 0.7, 0, 2


class Spied:
    """One update of 4 problems x 4 rollouts with three inner updates, and everything that it worked with."""

    def __init__(self, folder: Path, choices: dict[str, Any], microbatch: int, updates: int = MU) -> None:
        choices = choices | {"inner_updates": updates, "kl": Kl(beta=BETA, estimator="k3")}
        config = tiny.policy("gdpo", rollout={"sampler": MaskedSampler(steps=5, temperature=TAU)}, **choices)
        self.job = tiny.job(folder, config, optim=OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch))
        self.reference = self.weights()
        tiny.shifted(self.job.denoiser)
        self.views: list[TokenViews] = []
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        roll, make = self.job._roll, config.likelihood.views

        def rollout(update: int, problems: Any, group: Tensor, **how: Any) -> Rollouts:
            rollouts = roll(update, problems, group, **how)
            self.problems, self.trajectory = problems, rollouts.trajectory
            return rollouts

        def views(*arguments: Any) -> TokenViews:
            self.views.append(make(*arguments))
            return self.views[-1]

        self.job._roll = rollout  # type: ignore[method-assign]
        config.likelihood.views = views  # type: ignore[method-assign]
        self.said = self.job.update(0, self.optimise)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.job.denoiser.state_dict().items()}

    def optimise(self, losses: Any) -> dict[str, float]:
        self.before.append(self.weights())
        self.metrics.append(self.job.trainer.optimise(losses))
        self.gradients.append(tiny.gradients(self.job.denoiser))
        return self.metrics[-1]

    def networks(self, j: int) -> list[Any]:
        """New, old and reference network in float64."""
        return [tiny.float64(self.job.denoiser, **w) for w in (self.before[j], self.before[0], self.reference)]

    def rewards(self) -> list[float]:
        found = []
        for row, problem in enumerate(self.problems):
            said = answer(self.trajectory.response_ids[row].tolist())
            found.append(float(problem.answer["word"] in [tiny.WORDS[t - 4] for t in said if t != END]))
        return found

    def log_probs(self, j: int, nets: list[Any]) -> list[Tensor]:
        """Per network: (N, R, V) of all views of inner update j."""
        views, width = self.views[j], self.trajectory.prompt_ids.shape[1]
        valid = self.trajectory.valid[views.rows]
        return [(net(views.ids, valid)[:, width:] / TAU).log_softmax(-1) for net in nets]

    def terms(self, j: int, row: int, coefficients: list[float], logs: list[Tensor]) -> list[dict[int, Tensor]]:
        """Per network: position -> sum over the chain's views of coefficient * log p."""
        mine = [number for number in range(len(self.views[j])) if int(self.views[j].rows[number]) == row]
        response = self.trajectory.response_ids[row].tolist()
        found: list[dict[int, Tensor]] = [{} for _ in logs]
        for number, c in zip(mine, coefficients, strict=True):
            for own, log in zip(found, logs, strict=True):
                for i, token in enumerate(response):
                    if self.views[j].scored[number, i]:
                        own[i] = own.get(i, torch.zeros(())) + c * log[number, i, token]
        return found


def answer(ids: list[int]) -> list[int]:
    """Tokens up to and including the first end token."""
    return ids[: ids.index(END) + 1] if END in ids else ids


def clipped(rho: Tensor, a: float, clip: float) -> tuple[Tensor, bool]:
    limited = rho.clamp(1 - clip, 1 + clip)
    return -torch.minimum(rho * a, limited * a), bool(rho * a > limited * a)


def assert_update(spied: Spied, j: int, loss: Tensor, new: Any) -> None:
    loss.backward()
    expected = tiny.gradients(new)
    assert spied.metrics[j]["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert expected.keys() == spied.gradients[j].keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert largest > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(spied.gradients[j][name], grad, rtol=1e-3, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize(
    ("norm", "after_end", "microbatch"),
    [("ratio", "keep", 7), ("ratio", "keep", 1000), ("outer", "drop", 7), ("both", "keep", 1000)],
)
def test_gdpo(tmp_path: Path, norm: Any, after_end: Any, microbatch: int) -> None:
    clip = 0.02 if norm != "outer" else 0.1
    likelihood = SemiDeterministic(rule="gauss-3", draws=2, after_end=after_end)
    objective = Clipped(clip=clip, level="sequence")
    spied = Spied(tmp_path, vars(Gdpo(length_norm=norm, likelihood=likelihood, objective=objective)), microbatch)
    times, weights = quadrature("gauss-3")
    rewards = spied.rewards()
    shares = []
    for j in range(MU):
        nets = spied.networks(j)
        logs = spied.log_probs(j, nets)
        loss, stopped = torch.zeros((), dtype=torch.float64), 0
        for row in range(16):
            a = rewards[row] - sum(rewards[row // 4 * 4 : row // 4 * 4 + 4]) / 4
            response = spied.trajectory.response_ids[row].tolist()
            length = len(answer(response)) if after_end == "drop" else len(response)
            counts = [max(1, int(float(t) * length)) for t in times]
            c = [float(w) * length / n / 2 for w, n in zip(weights, counts, strict=True) for _ in range(2)]
            new, old, ref = spied.terms(j, row, c, logs)
            elbo, before = sum(new.values()), sum(old.values()).detach()  # type: ignore[union-attr]
            rho = ((elbo - before) / (1 if norm == "outer" else length)).exp()
            term, beyond = clipped(rho, a, clip)
            kl = sum((ref[i].detach() - new[i]).exp() - (ref[i].detach() - new[i]) - 1 for i in new) / length
            loss = loss + (term / (1 if norm == "ratio" else length) + BETA * kl) / 16
            stopped += beyond
        shares.append(stopped / 16)
        assert_update(spied, j, loss, nets[0])
    assert shares[0] == 0 and max(shares[1:]) > 0.05  # the clip did something


@pytest.mark.parametrize("microbatch", [7, 1000])
def test_coupled_grpo(tmp_path: Path, microbatch: int) -> None:
    spied = Spied(tmp_path, vars(CoupledGrpo(objective=Clipped(clip=0.05))), microbatch)
    rewards = spied.rewards()
    lengths = {len(answer(ids)) for ids in spied.trajectory.response_ids.tolist()}
    assert len(lengths) > 1  # some responses end early
    shares = []
    for j in range(MU):
        nets = spied.networks(j)
        logs = spied.log_probs(j, nets)
        loss, stopped, tokens = torch.zeros((), dtype=torch.float64), 0, 0
        for row in range(16):
            group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
            a = rewards[row] - (sum(group) - rewards[row]) / 3
            views = spied.views[j]
            mine = views.rows == row
            t = views.times[mine].tolist()  # type: ignore[index]
            c = [0.5 if time == 1 else 0.5 / time for time in t]
            new, old, ref = spied.terms(j, row, c, logs)
            said = answer(spied.trajectory.response_ids[row].tolist())
            assert sorted(new) == list(range(len(said)))
            assert views.scored[mine].sum(0).tolist() == [2] * len(said) + [0] * (tiny.RESPONSE - len(said))
            for i in new:
                term, beyond = clipped((new[i] - old[i].detach()).exp(), a, 0.05)
                d = ref[i].detach() - new[i]
                loss, tokens, stopped = loss + term + BETA * (d.exp() - d - 1), tokens + 1, stopped + beyond
        shares.append(stopped / tokens)
        assert_update(spied, j, loss / tokens, nets[0])
    assert shares[0] == 0 and max(shares[1:]) > 0.05


@pytest.mark.parametrize("system", ["gdpo", "coupled_grpo"])
def test_on_policy_ratios_are_one(tmp_path: Path, system: str) -> None:
    """Old and new are the same number before the first step, and every inner update has masks of its own."""
    choices: dict[str, Any] = vars(Gdpo()) if system == "gdpo" else vars(CoupledGrpo())
    assert Spied(tmp_path / "one", choices, 1000, updates=1).said["ratio_deviation"] == 0
    spied = Spied(tmp_path / "several", choices, 1000)
    assert spied.said["ratio_deviation"] > 0  # that of the last one
    views = [(v.scored.tolist(), v.ids.tolist()) for v in spied.views]
    assert len(views) == MU and views[0] != views[1] != views[2]


def test_length_norm_is_two_settings() -> None:
    found = {norm: Gdpo(length_norm=norm) for norm in ("ratio", "outer", "both")}  # type: ignore[arg-type]
    assert {n: (g.objective.normalise, g.weighting.by_length) for n, g in found.items()} == {
        "ratio": (True, False),
        "outer": (False, True),
        "both": (True, True),
    }
    assert "length_norm" not in vars(Gdpo())


def test_estimators_of_one_chain_are_never_split(tmp_path: Path) -> None:
    """A micro-batch smaller than a chain's views holds them all the same."""
    spied = Spied(tmp_path, vars(Gdpo()), 2)
    for views in spied.views:
        parts = spied.job.steps.parts(views)
        assert [end - start for start, end in parts] == [3] * 16
    assert isinstance(CoupledGrpo().likelihood, Coupled)

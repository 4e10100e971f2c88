"""AGRPO: its draws of steps by hand and in expectation, loss and gradient of an update against a loop over draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.agrpo import Agrpo, DrawnSteps
from unveil.training.policy_config import PolicyConfig
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import OptimConfig

END, MASK, TAU = 2, 0, 0.7


def chains(
    order: list[list[int]], tokens: list[list[int]], entropy: list[list[float]] | None = None
) -> TokenTrajectory:
    """Chains of one token a step: ``order[b][s]`` is the position that step s reveals, ``tokens[b]`` the response."""
    response = torch.tensor(tokens)
    batch, length = response.shape
    revealed = torch.zeros(batch, length, length, dtype=torch.bool)
    for row, places in enumerate(order):
        for step, place in enumerate(places):
            revealed[row, step, place] = True
    known = None if entropy is None else torch.tensor(entropy)[:, :, None] * torch.ones(length)
    return TokenTrajectory(
        prompt_ids=torch.zeros(batch, 0, dtype=torch.long), response_ids=response,
        valid=torch.ones(batch, length, dtype=torch.bool), active=torch.ones(batch, length, dtype=torch.bool),
        given=torch.zeros(batch, length, dtype=torch.bool), planned=torch.full((batch,), length), forwards=0,
        mask_id=MASK, guesses=response[:, None].expand(batch, length, length), revealed=revealed, entropy=known,
    )  # fmt: skip


SPEC = tiny.denoiser().spec
ORDER = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2], [0, 1, 2, 3]]
TOKENS = [[4, 5, 6, 7], [4, END, END, END], [4, 5, END, END], [END] * 4]
LAST = [3, 3, 2, 0]
"""The last step that reveals text; 0 where there is none."""


def test_uniform_draws_in_whole_multiples_are_exact() -> None:
    trajectory = chains(ORDER, TOKENS)
    nothing = torch.zeros(4, 4)
    for estimates, each in (("mean", 1.0), ("sum", None)):
        selector = DrawnSteps(draws=12, by="uniform", estimates=estimates)  # type: ignore[arg-type]
        found = selector.choose(nothing, trajectory, [5, 6, 7, 8], SPEC)
        for row, last in enumerate(LAST):
            count = last + 1
            expected = [(each / count if each else 1.0) if step <= last else 0.0 for step in range(4)]
            assert found[row].tolist() == pytest.approx(expected)


def test_chances_follow_the_entropy_of_what_is_revealed() -> None:
    entropy = [[1.0, 2.0, 3.0, 4.0]] * 3 + [[0.0] * 4]
    chance = DrawnSteps().chances(chains(ORDER, TOKENS, entropy), SPEC)
    expected = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [1 / 6, 2 / 6, 3 / 6, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(chance, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("estimates", "each"), [("mean", 1 / 3), ("sum", 1.0)])
@pytest.mark.parametrize("draws", [1, 5])
def test_the_expected_factor_is_the_same_for_all_steps(estimates: Any, each: float, draws: int) -> None:
    count = 4000
    trajectory = chains([ORDER[2]] * count, [TOKENS[2]] * count, [[0.5, 1.0, 2.5, 9.0]] * count)
    selector = DrawnSteps(draws=draws, estimates=estimates)
    found = selector.choose(torch.zeros(count, 4), trajectory, range(count), SPEC)
    chance = torch.tensor([0.125, 0.25, 0.625, 0])
    spread = each * ((1 / chance[:3] - 1) / draws / count) ** 0.5
    assert ((found.mean(0)[:3] - each).abs() < 4 * spread).all()
    assert not found[:, 3].any()


def test_draws_are_stratified_and_a_chain_s_own() -> None:
    entropy = [[0.3, 1.7, 2.0, 0.5], [2.0, 1.0, 0.1, 0.9], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    trajectory = chains(ORDER, TOKENS, entropy)
    selector = DrawnSteps(draws=7)
    found = selector.choose(torch.zeros(4, 4), trajectory, [9, 8, 7, 6], SPEC)
    chance = selector.chances(trajectory, SPEC)
    for row, seed in enumerate([9, 8, 7, 6]):
        u = torch.rand(7, generator=generator(seed, "steps"), dtype=torch.float64)
        drawn = [int((chance[row].cumsum(0) <= (m + float(u[m])) / 7).sum()) for m in range(7)]
        expected = [drawn.count(s) / 7 / (LAST[row] + 1) / float(chance[row, s]) if s in drawn else 0 for s in range(4)]
        assert found[row].tolist() == pytest.approx(expected)
        counts = torch.tensor([drawn.count(s) for s in range(4)])
        assert ((counts - 7 * chance[row]).abs() < 2).all()  # strata: never further off than two draws
    alone = selector.choose(torch.zeros(1, 4), chains(ORDER[1:2], TOKENS[1:2], entropy[1:2]), [8], SPEC)
    assert torch.equal(alone[0], found[1])


@pytest.mark.parametrize("by", ["uniform", "entropy"])
@pytest.mark.parametrize("microbatch", [3, 1000])
def test_loss_and_gradient_of_an_update(tmp_path: Path, by: Any, microbatch: int) -> None:
    draws, clip, beta, inner = 4, 0.05, 0.3, 2
    chosen = vars(Agrpo(selector=DrawnSteps(draws=draws, by=by), objective=Clipped(clip=clip), kl=Kl(beta=beta)))
    rollout = tiny.rollouts(sampler=MaskedSampler(steps=4, temperature=TAU))
    config = PolicyConfig(task=tiny.Echo(), rollout=rollout, inner_updates=inner, **chosen)
    job = tiny.job(tmp_path, config, optim=OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch))
    net = job.denoiser
    weights: list[dict[str, Tensor]] = [{name: value.clone() for name, value in net.state_dict().items()}]
    tiny.shifted(net)
    kept: list[Rollouts] = []
    found: list[tuple[float, dict[str, Tensor]]] = []
    roll = job._roll

    def rollout_of(update: int, problems: Any, group: Tensor, **how: Any) -> Rollouts:
        kept.append(roll(update, problems, group, **how))
        return kept[-1]

    def optimise(losses: Any) -> dict[str, float]:
        weights.append({name: value.clone() for name, value in net.state_dict().items()})
        result = job.trainer.optimise(losses)
        found.append((result["loss"], tiny.gradients(net)))
        return result

    job._roll = rollout_of  # type: ignore[method-assign]
    job.update(0, optimise)
    rollouts, trajectory = kept[0], kept[0].trajectory
    rewards = rollouts.correct.double()
    chance = config.selector.chances(trajectory, net.spec)  # type: ignore[attr-defined]
    assert len({int((row > 0).sum()) for row in chance}) > 1  # chains end at different steps
    width = trajectory.prompt_ids.shape[1]
    for number in range(inner):
        ref, old, new = (tiny.float64(net, **weights[place]) for place in (0, 1, number + 1))
        total = torch.zeros((), dtype=torch.float64)
        for row in range(16):
            a = rewards[row] - rewards[row // 4 * 4 : row // 4 * 4 + 4].mean()
            u = torch.rand(draws, generator=generator(rollouts.seeds[row], "steps"), dtype=torch.float64)
            for m in range(draws):
                s = int((chance[row].cumsum(0) <= (m + float(u[m])) / draws).sum())
                w = 1 / (int((chance[row] > 0).sum()) * float(chance[row, s]))
                canvas = torch.cat([trajectory.prompt_ids[row], trajectory.states[row, s]])[None]  # type: ignore[index]
                logs = [
                    (f(canvas, trajectory.valid[row][None])[0, width:] / TAU).log_softmax(-1) for f in (new, old, ref)
                ]
                for i in trajectory.revealed[row, s].nonzero().flatten().tolist():  # type: ignore[index]
                    token = int(trajectory.response_ids[row, i])
                    rho = (logs[0][i, token] - logs[1][i, token].detach()).exp()
                    d = logs[2][i, token].detach() - logs[0][i, token]
                    term = -torch.minimum(rho * a, rho.clamp(1 - clip, 1 + clip) * a) + beta * (d.exp() - d - 1)
                    total = total + w * term / (draws * 16)
        total.backward()
        loss, grads = found[number]
        assert loss == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
        for name, grad in tiny.gradients(new).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)
        assert max(float(grad.abs().max()) for grad in grads.values()) > 1e-3

"""diffu-GRPO: loss and gradient of every inner update against loops over the formulas of d1 (2504.12216)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.likelihoods import OneStepLikelihood, TokenViews, up_to_end
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.training.rollouts import Rollouts
from unveil.training.trainer import OptimConfig

MU, CLIP, BETA, TAU, MASK, END = 3, 0.05, 0.4, 0.7, 0, 2


class Spied:
    """One update of 4 problems x 4 rollouts with three inner updates, and everything that it worked with."""

    def __init__(self, folder: Path, microbatch: int) -> None:
        config = tiny.policy(
            "diffu_grpo",
            rollout={"sampler": MaskedSampler(steps=5, temperature=TAU)},
            likelihood=OneStepLikelihood(prompt_mask=0.4),
            objective=Clipped(clip=CLIP),
            kl=Kl(beta=BETA, estimator="k3"),
            inner_updates=MU,
        )
        self.job = tiny.job(folder, config, optim=OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch))
        self.reference = self.weights()
        tiny.shifted(self.job.denoiser)
        self.views: list[TokenViews] = []
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
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
        self.job.update(0, self.optimise)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.job.denoiser.state_dict().items()}

    def optimise(self, losses: Any) -> dict[str, float]:
        self.before.append(self.weights())
        result = self.job.trainer.optimise(losses)
        self.gradients.append(tiny.gradients(self.job.denoiser))
        self.losses.append(result["loss"])
        return result

    def expected(self, j: int) -> tuple[Tensor, dict[str, Tensor], float]:
        """loss^j in float64, its gradient, and the share of tokens beyond the clip."""
        net = self.job.denoiser
        new, old, ref = (tiny.float64(net, **w) for w in (self.before[j], self.before[0], self.reference))
        width = self.trajectory.prompt_ids.shape[1]
        rewards = []
        for row, problem in enumerate(self.problems):
            said = [t for t in response(self.trajectory, row) if t != END]
            words = [tiny.WORDS[t - 4] for t in said]
            rewards.append(float(problem.answer["word"] in words))
        total, tokens, stopped = torch.zeros((), dtype=torch.float64), 0, 0
        for row in range(len(rewards)):
            group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
            a = rewards[row] - sum(group) / 4
            prompt = self.views[j].ids[row, :width]
            canvas = torch.cat([prompt, torch.full((tiny.RESPONSE,), MASK)])[None]
            logs = [
                (m(canvas, self.trajectory.valid[row][None])[0, width:] / TAU).log_softmax(-1) for m in (new, old, ref)
            ]
            for i, token in enumerate(response(self.trajectory, row)):
                log_new, log_old, log_ref = logs[0][i, token], logs[1][i, token].detach(), logs[2][i, token].detach()
                rho = (log_new - log_old).exp()
                limited = rho.clamp(1 - CLIP, 1 + CLIP)
                stopped += int((rho * a > limited * a).item())
                d = log_ref - log_new
                total = total - torch.minimum(rho * a, limited * a) + BETA * (d.exp() - d - 1)
                tokens += 1
        loss = total / tokens
        loss.backward()
        return loss, tiny.gradients(new), stopped / tokens


def response(trajectory: TokenTrajectory, row: int) -> list[int]:
    """Tokens up to and including the first end token."""
    ids = trajectory.response_ids[row].tolist()
    return ids[: ids.index(END) + 1] if END in ids else ids


@pytest.mark.parametrize("microbatch", [5, 1000])
def test_loss_and_gradient_of_every_inner_update(tmp_path: Path, microbatch: int) -> None:
    spied = Spied(tmp_path, microbatch)
    lengths = {len(response(spied.trajectory, row)) for row in range(16)}
    assert len(lengths) > 1  # some responses end early
    shares = []
    for j in range(MU):
        loss, grads, share = spied.expected(j)
        shares.append(share)
        assert spied.losses[j] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        assert grads.keys() == spied.gradients[j].keys()
        assert max(float(grad.abs().max()) for grad in grads.values()) > 1e-3
        for name, grad in grads.items():
            torch.testing.assert_close(spied.gradients[j][name], grad, rtol=1e-3, atol=1e-5)
    assert shares[0] == 0 and max(shares[1:]) > 0.05


def test_views_mask_the_response_and_a_part_of_the_prompt(tmp_path: Path) -> None:
    spied = Spied(tmp_path, 1000)
    assert len(spied.views) == MU
    prompts, valid = spied.trajectory.prompt_ids, spied.trajectory.valid
    width = prompts.shape[1]
    patterns = set()
    for views in spied.views:
        assert (views.ids[:, width:] == MASK).all()
        shown, real = views.ids[:, :width], valid[:, :width]
        assert torch.equal(shown[~real], prompts[~real])
        assert ((shown == prompts) | (shown == MASK)).all()
        patterns.add(tuple((shown == MASK).flatten().tolist()))
        for row in range(len(views)):
            scored = views.targets[row][views.scored[row]].tolist()
            assert scored == response(spied.trajectory, row)
    assert len(patterns) == MU


def test_prompt_masks_hit_the_asked_share_and_ignore_padding() -> None:
    count, words = 2000, 10
    prompt_ids = torch.full((count, words + 2), 5)
    trajectory = TokenTrajectory(
        prompt_ids=prompt_ids,
        response_ids=torch.full((count, 3), 4),
        valid=torch.ones(count, words + 5, dtype=torch.bool),
        active=torch.ones(count, 1, dtype=torch.bool),
        given=torch.zeros(count, 3, dtype=torch.bool),
        planned=torch.ones(count, dtype=torch.long),
        forwards=0,
        mask_id=MASK,
    )
    trajectory.valid[:, :2] = False
    spec = tiny.denoiser().spec
    likelihood = OneStepLikelihood(prompt_mask=0.15)
    padded = likelihood.views(trajectory, trajectory.active, range(count), spec).ids
    share = (padded[:, 2 : words + 2] == MASK).float().mean().item()
    assert share == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / count / words) ** 0.5)
    alone = TokenTrajectory(**{**vars(trajectory), "prompt_ids": prompt_ids[:, 2:], "valid": trajectory.valid[:, 2:]})
    unpadded = likelihood.views(alone, alone.active, range(count), spec).ids
    assert torch.equal(padded[:, 2:], unpadded)
    none = OneStepLikelihood(prompt_mask=0.0).views(trajectory, trajectory.active, range(count), spec).ids
    assert torch.equal(none[:, : words + 2], prompt_ids)


def test_tokens_count_up_to_and_including_the_first_end() -> None:
    ids = torch.tensor([[4, 2, 5, 2], [4, 5, 6, 7], [2, 2, 2, 2], [4, 5, 6, 3]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert up_to_end(ids, (2,)).long().tolist() == expected
    assert up_to_end(ids, (2, 3)).long().tolist() == expected
    assert up_to_end(ids, (5, 2)).long()[1].tolist() == [1, 1, 0, 0]

"""Learned unmasking rules: what is recorded is what is scored, on other models too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.registry import UserError
from unveil.samplers.actions import Action, Bernoulli, BernoulliArgmax, DynamicPlackettLuce, PlackettLuce
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Policy
from unveil.samplers.trajectory import TokenTrajectory

PROMPTS = [[4, 5, 6], [7], [5, 4], [6, 6, 4, 7]]
ACTIONS = [PlackettLuce(), Bernoulli(temperature=0.5), DynamicPlackettLuce()]
IDS = [action.name for action in ACTIONS]


def draw(
    net: tiny.TransformerDenoiser, rule: Policy, rows: slice = slice(None), block: int | None = None
) -> TokenTrajectory:
    sampler = MaskedSampler(steps=4, block_length=block, rule=rule, temperature=0.7)
    lengths = [8, 6, 8, 7][rows]
    seeds = [11, 12, 13, 14][rows]
    needs = set(TokenTrajectory.optional) - sampler.refused_fields().keys()
    return sampler.sample(net, Canvas.of(PROMPTS[rows], lengths, net.spec), seeds, needs=needs)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("action", ACTIONS, ids=IDS)
def test_recomputed_log_probs_equal_the_recorded_ones(action: Action, block: int | None, features: bool) -> None:
    net = tiny.with_policy(tiny.denoiser(), features=features)
    chains = draw(net, Policy(action=action), block=block)
    assert chains.order_log_prob is not None and chains.log_prob is not None and chains.revealed is not None
    assert torch.equal(chains.order > 0, chains.revealed)  # type: ignore[operator]
    likelihood = TrajectoryLikelihood(tokens="revealed", order=action)
    views = likelihood.views(chains, chains.active.float(), [0] * 4, net.spec)
    with torch.no_grad():
        scores = likelihood.score(net, views, MaskedSampler(steps=1, temperature=0.7))
    order = chains.order_log_prob[views.rows, views.steps]
    assert order.abs().max() > 0.1
    torch.testing.assert_close(scores.log_prob[:, -1], order, atol=1e-4, rtol=0)
    tokens = chains.log_prob[views.rows, views.steps] * views.scored
    torch.testing.assert_close(scores.log_prob[:, :-1], tokens, atol=1e-4, rtol=0)


@pytest.mark.parametrize("action", ACTIONS, ids=IDS)
def test_a_batch_equals_its_rows(action: Action) -> None:
    net = tiny.with_policy(tiny.denoiser(), features=True)
    rule = Policy(action=action)
    batch = draw(net, rule)
    for row in range(4):
        alone = draw(net, rule, slice(row, row + 1))
        length, steps = alone.response_ids.shape[1], alone.steps
        assert torch.equal(batch.response_ids[row, :length], alone.response_ids[0])
        assert int(batch.active[row].sum()) == steps
        assert torch.equal(batch.order[row, :steps, :length], alone.order[0])  # type: ignore[index]
        torch.testing.assert_close(
            batch.order_log_prob[row, :steps],
            alone.order_log_prob[0],
            atol=1e-4,
            rtol=0,  # type: ignore[index]
        )


def test_wasted_steps_end_with_holes_after_as_many_steps_as_positions() -> None:
    net = tiny.with_policy(tiny.denoiser())
    with torch.no_grad():
        net.unmask.linear.bias.fill_(-4.0)  # type: ignore[union-attr]
    chains = draw(net, Policy(action=Bernoulli()))
    left = (chains.response_ids == net.spec.mask_id) & chains.response_valid
    assert left.any()
    assert chains.active.sum(1)[left.any(1)].tolist() == [[8, 6, 8, 7][row] for row in left.any(1).nonzero()[:, 0]]
    whole = draw(net, Policy(action=BernoulliArgmax()))
    assert not ((whole.response_ids == net.spec.mask_id) & whole.response_valid).any()


def test_greedy_takes_the_likeliest_choice_and_needs_no_noise() -> None:
    net = tiny.with_policy(tiny.denoiser())
    sampler = MaskedSampler(steps=4, rule=Policy(greedy=True))
    canvas = Canvas.of(PROMPTS, 8, net.spec)
    one, other = (sampler.sample(net, canvas, seeds, needs={"order"}) for seeds in ([1, 2, 3, 4], [5, 6, 7, 8]))
    assert torch.equal(one.response_ids, other.response_ids) and torch.equal(one.order, other.order)  # type: ignore[arg-type]


def test_expert_chains_are_scored_by_the_mixture() -> None:
    net = tiny.with_policy(tiny.denoiser())
    chains = draw(net, Policy(action=Bernoulli()))
    share = torch.tensor([0.0, 0.2, 0.2, 0.0])
    likelihood = TrajectoryLikelihood(tokens="none", order=Bernoulli())
    plain, mixed = (
        likelihood.score(
            net, likelihood.views(part, part.active.float(), [0] * 4, net.spec), MaskedSampler(steps=1, temperature=1.0)
        ).log_prob[:, -1]
        for part in (chains, replace(chains, expert_share=share))
    )
    rows = chains.active.nonzero()[:, 0]
    expected = ((1 - share[rows]).double() * plain.double().exp() + share[rows]).log()
    torch.testing.assert_close(mixed.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(mixed[share[rows] == 0], plain[share[rows] == 0])


def test_a_policy_that_reads_no_features_costs_no_forward_pass() -> None:
    net = tiny.with_policy(tiny.denoiser())
    chains = draw(net, Policy(action=Bernoulli()))
    net.features = None  # type: ignore[method-assign,assignment]
    likelihood = TrajectoryLikelihood(tokens="none", order=Bernoulli())
    views = likelihood.views(chains, chains.active.float(), [0] * 4, net.spec)
    assert likelihood.score(net, views, MaskedSampler(steps=1, temperature=0.0)).forwards == 0


def test_a_saved_policy_works_on_another_model(tmp_path: Path) -> None:
    net = tiny.with_policy(tiny.denoiser())
    net.unmask_action = {"name": "bernoulli", "temperature": 0.5}
    net.save_pretrained(tmp_path)
    other = tiny.denoiser(seed=5)
    rule = Policy(path=str(tmp_path / "unmask.safetensors"))
    assert rule.action == BernoulliArgmax(temperature=0.5)  # in its form for use
    chains = draw(other, rule)
    assert not ((chains.response_ids == other.spec.mask_id) & chains.response_valid).any()
    again = type(net).from_pretrained(tmp_path)
    again.load_unmask(tmp_path / "unmask.safetensors")
    rule = Policy(action=Bernoulli())
    assert torch.equal(draw(again, rule).response_ids, draw(net, rule).response_ids)


def test_what_is_refused(tmp_path: Path) -> None:
    net = tiny.denoiser()
    with pytest.raises(UserError, match="carries no unmasking policy"):
        draw(net, Policy())
    broken = tmp_path / "unmask.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable unmasking policy"):
        Policy(path=str(broken))
    with pytest.raises(UserError, match="not an unmasking policy"):
        net.save_pretrained(tmp_path / "model")
        Policy(path=str(tmp_path / "model" / "model.safetensors"))
    sampler = MaskedSampler(steps=4, temperature=0.7, rule=Policy(action=PlackettLuce()))
    with pytest.raises(UserError, match="should be the action of rollout"):
        TrajectoryLikelihood(order=Bernoulli()).check_fits(sampler, net)
    with pytest.raises(UserError, match="the action 'bernoulli_argmax' has no likelihood to train by"):
        TrajectoryLikelihood(order=BernoulliArgmax()).check_fits(sampler, net)
    with pytest.raises(UserError, match="'none' leaves nothing to score"):
        TrajectoryLikelihood(tokens="none")

"""Training on rollouts that were drawn with a cache: scored by the whole network, before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import test_matrix
import tiny
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.learning.objectives import Clipped
from unveil.learning.scoring import score_tokens
from unveil.registry import UserError
from unveil.samplers.caches import Cache, DualCache, PrefixCache, VicinityCache
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Threshold
from unveil.seeds import generator
from unveil.training.policy_config import PolicyConfig


def network() -> TransformerDenoiser:
    """Two layers: the keys of the second depend on the whole canvas and grow stale."""
    shape = TransformerConfig(dim=16, layers=2, heads=2, hidden=16, context_length=16)
    net = TransformerDenoiser(shape, TextTokenizer.of_words(tiny.WORDS))
    net.initialise(generator("cached rollouts"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return net.eval()


def config(system: str, cache: Cache) -> PolicyConfig:
    policy = test_matrix.cell(system, Threshold(threshold=0.6, cap=2))
    sampler = replace(policy.rollout.sampler, block_length=3, cache=cache)  # type: ignore[type-var]
    return replace(policy, rollout=replace(policy.rollout, sampler=sampler, block_lengths=[]))


@pytest.mark.parametrize(
    ("system", "cache"),
    [("mdpo", PrefixCache()), ("cj_grpo", DualCache()), ("diffu_grpo", DualCache()), ("gdpo", VicinityCache())],
)
def test_the_first_ratio_is_one_all_the_same(tmp_path: Path, system: str, cache: Cache) -> None:
    """Old log-probabilities come from the very call that training makes, not from the rollout."""
    net = network()
    job = tiny.job(tmp_path, config(system, cache), net)
    assert isinstance(job.policy.objective, Clipped)
    spy = test_matrix.Ratios(
        **{key: value for key, value in vars(job.policy.objective).items() if not key.startswith("_")}
    )
    job.policy.objective = spy
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = []

    def optimise(losses: object) -> dict[str, float]:
        start = len(spy.__dict__.get("deviations", []))
        result = job.trainer.optimise(losses)  # type: ignore[arg-type]
        first.append(max(spy.__dict__.get("deviations", [])[start:], default=0.0))
        return result

    metrics = [job.update(update, optimise) for update in range(2)]
    assert first[0] == 0.0 and metrics[0]["skipped"] == 0
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())


@torch.no_grad()
def test_what_was_recorded_is_what_tokens_were_drawn_from() -> None:
    """The recorded log-probability is the cache's; that of the whole network is another one, unless nothing is kept."""
    net = network()
    canvas = Canvas.of([[4, 5, 6]] * 8, 9, net.spec)

    def gap(cache: Cache) -> float:
        sampler = MaskedSampler(steps=9, block_length=3, temperature=1.0, cache=cache)
        needs = {"states", "guesses", "log_prob", "revealed"}
        done = sampler.sample(net, canvas, list(range(8)), needs=needs)
        assert done.states is not None and done.guesses is not None
        assert done.log_prob is not None and done.revealed is not None
        rows, steps, places = done.revealed.nonzero(as_tuple=True)
        ids = torch.cat([done.prompt_ids[rows], done.states[rows, steps]], 1)
        features = net.features(ids, torch.ones_like(ids, dtype=torch.bool))[torch.arange(len(rows)), 3 + places]
        rescored = score_tokens(net, features, done.guesses[rows, steps, places], 1.0)
        return float((rescored - done.log_prob[rows, steps, places]).abs().max())

    assert gap(PrefixCache(refresh=1)) < 1e-5
    assert all(gap(cache) > 1e-3 for cache in (PrefixCache(), DualCache(), VicinityCache(neighbours=1)))


@pytest.mark.parametrize("cache", [DualCache(), VicinityCache()])
def test_guesses_of_earlier_states_are_not_scored_at_later_ones(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(UserError, match=rf"^policy\.rollout\.sampler\.cache: '{cache.name}' guesses holes of later"):
        tiny.job(tmp_path, config("mdpo", cache), network())


def test_a_network_that_keeps_no_keys_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampler\.cache: 'prefix' needs a network that can keep keys"):
        tiny.job(tmp_path, config("diffu_grpo", PrefixCache()), tiny.Pooled())

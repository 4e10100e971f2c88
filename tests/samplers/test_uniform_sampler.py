"""Decoding from uniform noise: the ancestral chain against its exact law, and what the entropy bound keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import tiny
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.uniform import Ancestral, EntropyBound, UniformSampler

PROMPTS, LENGTHS, SEEDS = [[4, 5], [6], [7, 4, 4]], [5, 3, 6], [3, 4, 5]


@torch.no_grad()
def test_ancestral_samples_have_the_law_of_the_chain() -> None:
    """Two positions, two steps: the law of the finished response, summed over all courses, against many draws."""
    net = tiny.uniform_denoiser()
    size, process, chains = net.spec.vocab_size, net.spec.uniform, 20000
    pairs = torch.tensor(list(itertools.product(range(size), repeat=2)))
    prompt = torch.tensor([4, 5]).expand(len(pairs), 2)
    logits = net(torch.cat([prompt, pairs], 1))[:, 2:]
    law = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        times = [torch.full((2 * len(pairs),), value, dtype=torch.float64) for value in (t, s)]
        ways = process.step(logits.flatten(0, 1), pairs.flatten(), *times).probs().unflatten(0, (-1, 2))
        law = (law[:, None] * (ways[:, 0, :, None] * ways[:, 1, None, :]).flatten(1)).sum(0)
    canvas = Canvas.of([[4, 5]] * chains, 2, net.spec)
    drawn = Ancestral(steps=2).sample(net, canvas, range(chains)).response_ids
    seen = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size**2).double() / chains
    assert (seen - law).abs().max() < 4.5 * (law.max() * (1 - law.max()) / chains).sqrt()


@pytest.mark.parametrize("sampler", [Ancestral(steps=4), EntropyBound(steps=5, certain=1.0)], ids=lambda s: s.name)
def test_rows_do_not_depend_on_their_batch(sampler: UniformSampler) -> None:
    net = tiny.uniform_denoiser()
    needs = {"states", "guesses", "revealed", "confidence", "entropy"}
    batch = sampler.sample(net, Canvas.of(PROMPTS, LENGTHS, net.spec), SEEDS, needs=needs)
    for row, (prompt, length, seed) in enumerate(zip(PROMPTS, LENGTHS, SEEDS, strict=True)):
        single = sampler.sample(net, Canvas.of([prompt], length, net.spec), [seed], needs=needs)
        assert torch.equal(single.response_ids[0], batch.response_ids[row, :length])
        taken = int(single.active.sum())
        assert taken == int(batch.active[row].sum())
        for name in needs:
            own, other = getattr(single, name)[0], getattr(batch, name)[row, :taken, :length]
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert batch.states is not None and batch.guesses is not None
    last = batch.guesses[torch.arange(3), batch.last_steps]
    assert torch.equal(last[batch.response_valid], batch.response_ids[batch.response_valid])
    assert not torch.isin(batch.response_ids[batch.response_valid], torch.tensor(net.spec.forbidden_ids)).any()


@pytest.mark.parametrize("sampler", [Ancestral(steps=4), EntropyBound(steps=5)], ids=lambda s: s.name)
def test_given_tokens_stay(sampler: UniformSampler) -> None:
    net = tiny.uniform_denoiser()
    mask = net.spec.mask_id
    canvas = Canvas.of([[4, 5]], 5, net.spec, initial=[[mask, 6, mask, 7, mask]])
    found = sampler.sample(net, canvas, [0], needs={"states"})
    assert found.states is not None and (found.states[0, :, 1] == 6).all() and (found.states[0, :, 3] == 7).all()
    assert found.response_ids[0, [1, 3]].tolist() == [6, 7] and int((found.states == mask).sum()) < found.states.numel()
    full = Canvas.of([[4, 5]], 2, net.spec, initial=[[5, 6]])
    nothing = sampler.sample(net, full, [0], needs={"states", "revealed"})
    assert nothing.steps == 0 and nothing.response_ids.tolist() == [[5, 6]] and nothing.forwards == 0


def test_the_bound_keeps_the_surest_tokens() -> None:
    """By definition: the longest run of rising entropies whose sum without its last stays within the bound."""
    inf = torch.inf
    entropy = torch.tensor([[0.5, 0.0, 0.2, 0.3, inf], [0.1, 0.1, inf, 9.0, 0.1], [3.0, 2.0, 2.0, 5.0, 5.0]])
    for bound in (0.05, 0.21, 0.36, 100.0):
        kept = EntropyBound(bound=bound).surest(entropy)
        for row, values in zip(kept, entropy, strict=True):
            order = sorted(range(5), key=lambda place: (float(values[place]), place))
            longest = max(k for k in range(1, 6) if sum(float(values[place]) for place in order[: k - 1]) <= bound)
            assert sorted(row.nonzero().flatten().tolist()) == sorted(order[:longest])


def test_a_canvas_ends_when_it_is_stable_and_sure() -> None:
    net = tiny.uniform_denoiser(scale=30.0)
    canvas, seeds = Canvas.of(PROMPTS * 4, 5, net.spec), range(12)

    def steps(**settings: float) -> Tensor:
        return EntropyBound(steps=20, **settings).sample(net, canvas, seeds).active.sum(1)  # type: ignore[arg-type]

    assert (steps(certain=0.0) == 20).all()
    early = steps(certain=0.5, stable=0)
    later = steps(certain=0.5, stable=2)
    assert (early <= later).all() and early.float().mean() < later.float().mean() and later.min() >= 3


def test_networks_and_fields_that_do_not_fit_are_refused() -> None:
    net = tiny.uniform_denoiser()
    canvas = Canvas.of([[4]], 3, net.spec)
    with pytest.raises(UserError, match="'ancestral' is for networks of uniform noise"):
        Ancestral(steps=2).sample(tiny.denoiser(), canvas, [0])
    with pytest.raises(UserError, match="'step_map' does not exist where every token may change"):
        Ancestral(steps=2).sample(net, canvas, [0], needs={"step_map"})
    with pytest.raises(UserError, match="'log_prob' does not exist where tokens are kept by their entropy"):
        EntropyBound().sample(net, canvas, [0], needs={"log_prob"})

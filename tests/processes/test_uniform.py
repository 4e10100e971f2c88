"""The uniform process against Bayes' rule on whole tables, against diffusers, and end to end on a tiny joint."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from torch import Tensor

from unveil.processes.uniform import UniformProcess, UniformTransition
from unveil.seeds import generator

SIZE = 5
PROCESS = UniformProcess(vocab_size=SIZE)


def kernel(keep: float, size: int = SIZE) -> Tensor:
    """[from, to]: the chance that a token turns into another when it survives with probability ``keep``."""
    return keep * torch.eye(size, dtype=torch.float64) + (1 - keep) / size


def bayes(guess: Tensor, t: float, s: float) -> Tensor:
    """[x_t, x_s] from the definition, summing over every x_0, with guesses [x_t, x_0]."""
    at_s, at_t, link = kernel(1 - s), kernel(1 - t), kernel((1 - t) / (1 - s))
    joint = guess[:, :, None] * at_s[None] * link.T[:, None, :] / at_t.T[:, :, None]  # x_t, x_0, x_s
    return joint.sum(1)


def step(logits: Tensor, t: float, s: float, temperature: float = 1.0) -> UniformTransition:
    """The transitions from every x_t, with logits [x_t, x_0]."""
    times = [torch.full((len(logits),), value, dtype=torch.float64) for value in (t, s)]
    return PROCESS.step(logits, torch.arange(len(logits)), *times, temperature)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.7, 0.2), (0.5, 0.499999), (0.3, 0.0), (1.0, 0.0), (1e-5, 0.0)])
def test_the_step_is_bayes_rule(t: float, s: float) -> None:
    logits = 2 * torch.randn(SIZE, SIZE, generator=generator("bayes"))
    expected = bayes(logits.double().softmax(-1), t, s)
    found = step(logits, t, s)
    assert torch.allclose(found.probs(), expected, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found.probs().sum(1), torch.ones(SIZE, dtype=torch.float64), atol=1e-7)
    for x_s in range(SIZE):
        scored = found.log_prob(torch.full((SIZE,), x_s))
        assert torch.allclose(scored.double(), expected[:, x_s].log(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.entropy().double(), torch.special.entr(expected).sum(1), rtol=1e-4, atol=1e-6)


def test_the_step_is_the_posterior_of_diffusers() -> None:
    """Its step draws x_0 and then one of three routes; here the same mixture, summed instead of drawn."""
    steps, place = 8, 3
    logits = 2 * torch.randn(SIZE, SIZE, generator=generator("ddim"))
    scheduler = DiscreteDDIMScheduler()
    scheduler.set_timesteps(steps)
    t, s = 1 - place / steps, 1 - (place + 1) / steps
    copies = 40000
    sample = torch.arange(SIZE).repeat(copies)[None]
    drawn = scheduler.step(
        logits.repeat(copies, 1)[None], place, sample, temperature=1.0, generator=generator("routes"), return_dict=False
    )[0]
    seen = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    seen.index_put_((sample[0], drawn[0]), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
    error = (seen / copies - step(logits, t, s).probs()).abs()
    assert error.max() < 4.5 * (0.25 / copies) ** 0.5  # 25 cells, four and a half standard errors


def test_samples_follow_the_probabilities_that_score_them() -> None:
    logits = torch.randn(SIZE, SIZE, generator=generator("draw"))
    count = 40000
    stream = generator("uniforms")
    x_t = torch.arange(SIZE).repeat(count)
    t, s = (torch.full((len(x_t),), value, dtype=torch.float64) for value in (0.8, 0.5))
    transition = PROCESS.step(logits.repeat(count, 1), x_t, t, s)
    u = torch.rand(2, len(x_t), dtype=torch.float64, generator=stream)
    x_s = transition.sample(u[0], u[1])
    seen = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    seen.index_put_((x_t, x_s), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
    assert (seen / count - transition.probs()[:SIZE]).abs().max() < 4.5 * (0.25 / count) ** 0.5


def test_the_right_guess_brings_back_the_data() -> None:
    """With the exact posterior of a joint of two tokens as guess, the chain's marginals are q_s of the data, step by
    step, up to what two positions that change together cost; the last state has no probability outside the data's."""
    size, steps = 3, 60
    process = UniformProcess(vocab_size=size)
    data = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.2]], dtype=torch.float64)
    states = torch.tensor(list(itertools.product(range(size), repeat=2)))
    law = torch.full((size, size), 1 / size**2, dtype=torch.float64)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, s in itertools.pairwise(grid):
        at_t = kernel(1 - t, size)
        following = torch.zeros_like(law)
        for a, b in states.tolist():
            joint = data * at_t[:, a, None] * at_t[None, :, b]
            joint = joint / joint.sum()
            rows = torch.stack([joint.sum(1), joint.sum(0)]).float().log()
            times = [torch.full((2,), value, dtype=torch.float64) for value in (t, s)]
            ways = process.step(rows, torch.tensor([a, b]), *times).probs()
            following += law[a, b] * ways[0][:, None] * ways[1][None, :]
        law = following
        wanted = kernel(1 - s, size).T @ data @ kernel(1 - s, size)
        assert (law - wanted).abs().sum() / 2 < 0.03
    assert (law - data).abs().sum() / 2 < 0.03


def test_corruption_has_the_chances_of_its_formula() -> None:
    stream = generator("corrupt")
    x_0 = torch.full((20000, 3), 2)
    u, u_token = torch.rand(2, *x_0.shape, dtype=torch.float64, generator=stream)
    maskable = torch.tensor([True, True, False]).expand_as(x_0)
    x_t = PROCESS.corrupt(x_0, torch.full((20000,), 0.4), u=u, u_token=u_token, maskable=maskable)
    assert (x_t[:, 2] == 2).all()
    share = x_t[:, :2].flatten().bincount(minlength=SIZE).double() / 40000
    assert (share - kernel(0.6)[2]).abs().max() < 0.012


def test_impossible_tokens_are_never_an_answer() -> None:
    logits = torch.zeros(SIZE, SIZE)
    logits[:, 3] = -torch.inf
    last = step(logits, 0.4, 0.0)
    assert (last.probs()[:, 3] == 0).all() and last.move[3] == 1
    u = torch.rand(2, SIZE, dtype=torch.float64, generator=generator("never"))
    assert (last.sample(u[0], u[1]) != 3).all()
    greedy = step(torch.eye(SIZE).roll(1, 1), 0.4, 0.0, temperature=0.0)
    assert greedy.sample(u[0], u[1]).tolist() == [1, 2, 3, 4, 0]


def test_gradients_are_those_of_the_formula() -> None:
    logits = torch.randn(SIZE, SIZE, generator=generator("gradient"), dtype=torch.float64)
    own, other = logits.float().requires_grad_(), logits.clone().requires_grad_()
    x_s = torch.tensor([1, 1, 0, 4, 4])
    step(own, 0.6, 0.3).log_prob(x_s).sum().backward()
    bayes(other.softmax(-1), 0.6, 0.3)[torch.arange(SIZE), x_s].log().sum().backward()
    assert own.grad is not None and other.grad is not None
    assert torch.allclose(own.grad.double(), other.grad, atol=1e-5)


def test_times_out_of_order_are_refused() -> None:
    for t, s in ((0.4, 0.4), (0.3, 0.5), (1.2, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="0 <= s < t <= 1"):
            step(torch.zeros(SIZE, SIZE), t, s)

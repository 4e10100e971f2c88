from __future__ import annotations

from itertools import permutations

import pytest
import torch

import tiny
from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.elbo import all_masks, elbo


def log_prob(net: MaskedDenoiser, prompt: list[int], shown: list[int | None], time: float) -> torch.Tensor:
    """(L, V) of the response in which None is a hole; one canvas, no padding."""
    ids = torch.tensor([prompt + [net.spec.mask_id if token is None else token for token in shown]])
    logits = net(ids, None, torch.tensor([time]))
    return logits[0, len(prompt) :].detach().double().log_softmax(-1)


def one_by_one(net: MaskedDenoiser, prompt: list[int], answer: list[int]) -> float:
    """Mean over all orders of the log-probability of revealing the answer one token at a time."""
    totals = []
    for order in permutations(range(len(answer))):
        shown: list[int | None] = [None] * len(answer)
        total = 0.0
        for place in order:
            time = shown.count(None) / len(answer)
            total += float(log_prob(net, prompt, shown, time)[place, answer[place]])
            shown[place] = answer[place]
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("make", [tiny.denoiser, tiny.score_denoiser])
def test_of_a_short_answer_it_is_the_mean_over_all_orders(make: object) -> None:
    net = make()  # type: ignore[operator]
    words = net.tokenizer.encode("a b c d")
    twice = [words[2], words[2], words[0]]
    pairs = [([words[0]], words), (words[:2], [words[3]]), ([], words[1:3]), (words[:3], twice)]
    found = elbo(net, [prompt for prompt, _ in pairs], [answer for _, answer in pairs], draws=16, batch_size=5)
    for (prompt, answer), bound in zip(pairs, found, strict=True):
        assert bound.value == pytest.approx(one_by_one(net, prompt, answer), abs=1e-4) and bound.error == 0


def test_one_token_has_its_log_probability() -> None:
    net = tiny.denoiser()
    (token,), (prompt,) = net.tokenizer.encode("c"), net.tokenizer.encode("a")
    (bound,) = elbo(net, [[prompt]], [[token]], draws=1)
    assert bound.value == pytest.approx(float(log_prob(net, [prompt], [None], 1.0)[0, token]), abs=1e-5)


def test_random_masks_are_unbiased_and_their_error_is_told() -> None:
    net = tiny.denoiser(scale=4.0)
    answer = net.tokenizer.encode("a b c d a")
    (exact,) = elbo(net, [[]], [answer], draws=31)
    assert exact.error == 0
    drawn = [elbo(net, [[]], [answer], draws=8, seed=seed)[0] for seed in range(300)]
    values = torch.tensor([one.value for one in drawn], dtype=torch.float64)
    error = float(values.std()) / 300**0.5
    assert abs(float(values.mean()) - exact.value) < 4 * error
    told = sum(one.error for one in drawn) / 300
    assert float(values.std()) < 1.2 * told  # stratified draws are at least as good as what is told
    assert drawn[0] == elbo(net, [[]], [answer], draws=8, seed=0)[0]


def test_neither_batch_nor_neighbours_change_a_bound() -> None:
    net = tiny.denoiser()
    words = net.tokenizer.encode("a b c d")
    answers = [words + words[:1], words[:2], words[1:], words * 2]
    together = elbo(net, [words] * 4, answers, draws=12, batch_size=7)
    for place, answer in enumerate(answers):
        (alone,) = elbo(net, [words], [answer], draws=12, batch_size=1)
        assert alone.value == pytest.approx(together[place].value, abs=1e-5)
    assert elbo(net, [words], [[]])[0].value == 0


def test_all_masks_weigh_as_the_bound_says() -> None:
    masks = all_masks(4)
    assert len(masks.holes) == 15 and masks.holes.any(1).all()
    # Every token has the mean coefficient 1: a constant log-probability c gives L c.
    assert torch.allclose((masks.holes * masks.coefficient[:, None]).sum(0), torch.ones(4, dtype=torch.float64))

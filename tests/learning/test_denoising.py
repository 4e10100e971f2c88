"""The ELBO loss against loops over its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.denoising import Corrupted, corrupt, elbo_loss
from unveil.processes.masked import MaskedProcess
from unveil.seeds import generator


def batch(net: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Clean canvases of prompts 1-3 words and responses of 5 (B = 9), left-padded; which tokens are real, maskable."""
    stream = generator("elbo")
    x_0 = torch.randint(4, 8, (9, 8), generator=stream)
    valid = torch.ones(9, 8, dtype=torch.bool)
    for row in range(9):
        valid[row, : row % 3] = False
    x_0[~valid] = net.spec.pad_id
    maskable = valid.clone()
    maskable[:, :3] = False
    maskable[2, 6:] = False
    return x_0, valid, maskable


@pytest.mark.parametrize("form", ["time", "count"])
def test_loss_and_gradient_equal_the_formula(form: str) -> None:
    net = tiny.denoiser()
    x_0, valid, maskable = batch(net)
    process = MaskedProcess(mask_id=net.spec.mask_id)
    corrupted = corrupt(process, x_0, maskable, form=form, generator=generator("noise"))  # type: ignore[arg-type]
    loss = elbo_loss(net, x_0, valid, corrupted)
    loss.backward()

    oracle = tiny.float64(net)
    total = torch.zeros((), dtype=torch.float64)
    logits = oracle(corrupted.x_t, valid)
    for row in range(len(x_0)):
        length = int(maskable[row].sum())
        masked = [i for i in range(8) if maskable[row, i] and corrupted.x_t[row, i] == net.spec.mask_id]
        if form == "count":
            weight = length / len(masked)
        else:  # t itself is checked against the masks in the next test
            weight = float(corrupted.weight[row])
        for i in masked:
            log_z = torch.logsumexp(logits[row, i], 0)
            total = total - weight / length * (logits[row, i, x_0[row, i]] - log_z)
    expected = total / len(x_0)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = tiny.gradients(oracle)
    assert wanted.keys() == tiny.gradients(net).keys()
    for name, grad in tiny.gradients(net).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_score_loss_and_gradient_equal_the_formula() -> None:
    """sigma' [sum s - r log s_{x_0} + r (log r - 1)] at the holes, written out in float64."""
    net = tiny.score_denoiser()
    x_0, valid, maskable = batch(net)
    corrupted = corrupt(net.spec.process(), x_0, maskable, form="time", generator=generator("noise"))
    assert corrupted.t is not None and 10 < int(corrupted.holes.sum()) < int(maskable.sum())
    loss = elbo_loss(net, x_0, valid, corrupted)
    loss.backward()

    oracle = tiny.float64(net)
    total = torch.zeros((), dtype=torch.float64)
    t = corrupted.t.double()
    log_score = oracle(corrupted.x_t, valid, t)
    for row, column in corrupted.holes.nonzero().tolist():
        shown = 1 - (1 - 1e-3) * t[row]
        rate, r = (1 - 1e-3) / shown, shown / (1 - shown)
        log_s = log_score[row, column]
        entropy = log_s.exp().sum() - r * log_s[x_0[row, column]] + r * (r.log() - 1)
        total = total + rate * entropy / maskable[row].sum()
    expected = total / len(x_0)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = tiny.gradients(oracle)
    for name, grad in tiny.gradients(net).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_time_form_masks_a_share_t_and_weighs_by_its_inverse() -> None:
    net = tiny.denoiser()
    x_0 = torch.full((64, 500), 5)
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    process = MaskedProcess(mask_id=net.spec.mask_id)
    corrupted = corrupt(process, x_0, maskable, form="time", generator=generator(1))
    t = 1 / corrupted.weight
    share = corrupted.holes.float().mean(1)
    assert ((share - t).abs() <= 5 * (t * (1 - t) / 500).sqrt() + 1e-6).all()
    # stratified: exactly one t in every 64th of [1e-3, 1]
    strata = ((t - 1e-3) / (1 - 1e-3) * 64).floor().clamp(max=63).long()
    assert strata.sort().values.tolist() == list(range(64))


def test_count_form_masks_every_number_equally_often() -> None:
    net = tiny.denoiser()
    x_0 = torch.full((50, 5), 6)
    process = MaskedProcess(mask_id=net.spec.mask_id)
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    corrupted = corrupt(process, x_0, maskable, form="count", generator=generator(2))
    numbers = corrupted.holes.sum(1)
    assert numbers.bincount(minlength=6).tolist() == [0, 10, 10, 10, 10, 10]
    torch.testing.assert_close(corrupted.weight, 5 / numbers)


def test_prompts_and_padding_are_never_masked() -> None:
    net = tiny.denoiser()
    x_0, _, maskable = batch(net)
    process = MaskedProcess(mask_id=net.spec.mask_id)
    for seed in range(20):
        corrupted = corrupt(process, x_0, maskable, form="count", generator=generator(seed))
        assert torch.equal(corrupted.x_t[~maskable], x_0[~maskable])
        assert not (corrupted.holes & ~maskable).any()


def test_exact_loss_of_uniform_predictions_is_log_of_the_allowed_vocabulary() -> None:
    """With all logits equal every form of the NELBO is log(allowed tokens) per token, whatever is masked."""
    net = tiny.denoiser(scale=0.0)
    x_0, valid, maskable = batch(net)
    holes = torch.zeros_like(maskable)
    holes[:, 4:6] = True
    x_t = x_0.masked_fill(holes, net.spec.mask_id)
    length = maskable.sum(1)
    corrupted = Corrupted(x_t=x_t, holes=holes, weight=length / 2, maskable=length)
    allowed = net.spec.vocab_size - len(net.spec.forbidden_ids)
    assert elbo_loss(net, x_0, valid, corrupted).item() == pytest.approx(math.log(allowed), rel=1e-6)

"""Likelihood training of the denoiser itself: pre-training and supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.processes.masked import MaskedProcess, stratified_times
from unveil.processes.score_entropy import ScoreEntropyProcess


@dataclass(kw_only=True)
class Corrupted:
    """A corrupted batch.

    Attributes:
        x_t: (B, L) canvases with holes.
        holes: (B, L) True where a token was masked and counts.
        weight: (B,) ELBO weight of each canvas.
        maskable: (B,) how many tokens of each canvas could be masked.
        t: (B,) the time of each canvas; None where masks were counted.
    """

    x_t: Tensor
    holes: Tensor
    weight: Tensor
    maskable: Tensor
    t: Tensor | None = None

    def slice(self, part: slice, device: torch.device) -> Corrupted:
        """Some rows, on a device."""
        return Corrupted(
            x_t=self.x_t[part].to(device), holes=self.holes[part].to(device), weight=self.weight[part].to(device),
            maskable=self.maskable[part].to(device), t=None if self.t is None else self.t[part].to(device),
        )  # fmt: skip


def corrupt(
    process: MaskedProcess | ScoreEntropyProcess,
    x_0: Tensor,
    maskable: Tensor,
    *,
    form: Literal["time", "count"],
    generator: torch.Generator,
) -> Corrupted:
    """Mask a batch x_0 (B, L) at its ``maskable`` (B, L) positions.

    ``time``: t stratified over the batch, i.i.d. masks, weight 1/t (MDLM, LLaDA). ``count``: n uniform in 1..maskable,
    exactly n masks, weight maskable/n, the same expectation with less variance. Prompts are never maskable; the end
    tokens that fill a response up are (LLaDA's rule: how long a response is belongs to what is learned). Networks of
    scores are told the time: ``time`` alone is for them.
    """
    count = maskable.sum(1)
    u = torch.rand(x_0.shape, generator=generator)
    t: Tensor | None = None
    if form == "time":
        t = stratified_times(len(x_0), generator=generator)
        x_t = process.corrupt(x_0, t, u=u, maskable=maskable)
        weight = process.elbo_weight(t)
    else:
        assert isinstance(process, MaskedProcess)
        # Stratified like t: n = 1 + floor(count * v) with one v per stratum.
        v = stratified_times(len(x_0), generator=generator, low=0.0)
        n = (1 + (count * v).floor().long()).clamp(max=count)
        x_t = process.corrupt_exact(x_0, n, u=u, maskable=maskable)
        weight = process.elbo_weight_exact(n, maskable)
    return Corrupted(x_t=x_t, holes=maskable & (x_t == process.mask_id), weight=weight, maskable=count, t=t)


def elbo_loss(denoiser: MaskedDenoiser, x_0: Tensor, valid: Tensor, corrupted: Corrupted) -> Tensor:
    """Mean over the batch of (weight / maskable) * sum over holes of -log p(x_0 | x_t): NELBO in nats per token.

    For a network of log-scores the sum is over the score entropy, the NELBO plus what uncalibrated scores cost.

    Args:
        x_0: (B, L) clean canvases.
        valid: (B, L) True at real tokens.
        corrupted: what `corrupt` made of them.
    """
    row, column = corrupted.holes.nonzero(as_tuple=True)
    features = denoiser.features(corrupted.x_t, valid, corrupted.t)
    prediction = denoiser.head(features[row, column]).float()
    process, target = denoiser.spec.process(), x_0[row, column]
    if isinstance(process, ScoreEntropyProcess):
        assert corrupted.t is not None
        losses = process.loss(prediction, target, corrupted.t[row])
    else:
        losses = F.cross_entropy(prediction, target, reduction="none")
    scale = corrupted.weight / corrupted.maskable
    return (losses * scale[row]).sum() / len(x_0)

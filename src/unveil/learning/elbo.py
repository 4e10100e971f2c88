"""The ELBO of given answers: what evaluation uses for the log-likelihood that a masked model cannot compute.

    ELBO(y | prompt) = mean over n = 1..L of E[ L/n sum_{i masked} log p(y_i | y_n, prompt) ]     n of L tokens masked

It is a lower bound of log p(y | prompt), and for one token equal to it; it is also the mean over all orders of
revealing the tokens one by one. Up to ``draws`` masks are used: all 2^L - 1 of a short answer, which gives the bound
exactly, else ``draws`` random ones, unbiased, with stratified n (as LLaDA's evaluation, 2502.09992, spreads n evenly).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.estimators import Masks, double_mc_masks
from unveil.learning.scoring import score_tokens
from unveil.seeds import generator


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An ELBO in nats; ``error`` is its standard error, 0 where it is exact. Stratified draws are taken for independent
    ones, which overstates the error."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class _View:
    answer: int
    prompt: list[int]
    tokens: Tensor
    holes: Tensor
    coefficient: float
    time: float


def all_masks(size: int) -> Masks:
    """Every mask of ``size`` tokens but the empty one. The n of a mask is uniform, then the mask among those of n."""
    holes = torch.tensor([[place >> bit & 1 for bit in range(size)] for place in range(1, 2**size)], dtype=torch.bool)
    count = holes.sum(1).double()
    ways = torch.tensor([math.comb(size, int(n)) for n in count], dtype=torch.float64)
    return Masks(holes=holes, coefficient=1 / (count * ways), times=count / size)


@torch.no_grad()
def elbo(
    denoiser: MaskedDenoiser,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    draws: int = 128,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Bound]:
    """One bound per pair of prompt and answer (token ids). An answer's masks depend on the seed and the pair alone.

    Args:
        draws: masks per answer.
        batch_size: canvases per network call.
    """
    totals: list[list[float]] = [[] for _ in answers]
    exact = [2 ** len(answer) - 1 <= draws for answer in answers]
    batch: list[_View] = []
    for view in _views(prompts, answers, exact, draws, seed):
        batch.append(view)
        if len(batch) == batch_size:
            _score(denoiser, batch, totals)
            batch = []
    if batch:
        _score(denoiser, batch, totals)
    return [_bound(total, known) for total, known in zip(totals, exact, strict=True)]


def _views(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], exact: Sequence[bool], draws: int, seed: int
) -> Iterator[_View]:
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not answer:
            continue
        stream = generator(seed, "elbo", list(prompt), list(answer))
        size = len(answer)
        masks = all_masks(size) if exact[place] else double_mc_masks(size, draws, "count", True, stream)
        for holes, coefficient, time in zip(masks.holes, masks.coefficient.tolist(), masks.times.tolist(), strict=True):
            yield _View(
                answer=place, prompt=list(prompt), tokens=torch.tensor(answer), holes=holes, coefficient=coefficient,
                time=time,
            )  # fmt: skip


def _score(denoiser: MaskedDenoiser, batch: Sequence[_View], totals: list[list[float]]) -> None:
    width = max(len(view.prompt) + len(view.tokens) for view in batch)
    ids = torch.full((len(batch), width), denoiser.spec.pad_id)
    valid, scored = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    targets = torch.zeros_like(ids)
    for row, view in enumerate(batch):
        start, end = len(view.prompt), len(view.prompt) + len(view.tokens)
        ids[row, :start] = torch.tensor(view.prompt, dtype=torch.long)
        ids[row, start:end] = view.tokens.masked_fill(view.holes, denoiser.spec.mask_id)
        valid[row, :end] = True
        scored[row, start:end] = view.holes
        targets[row, start:end] = view.tokens
    times = torch.tensor([view.time for view in batch])
    device = denoiser.device
    features = denoiser.features(ids.to(device), valid.to(device), times.to(device))[scored.to(device)]
    log_prob = score_tokens(denoiser, features, targets[scored].to(device)).double().cpu()
    sums = log_prob.new_zeros(len(batch)).index_add_(0, scored.nonzero()[:, 0], log_prob)
    for view, value in zip(batch, sums.tolist(), strict=True):
        totals[view.answer].append(view.coefficient * value)


def _bound(terms: Sequence[float], exact: bool) -> Bound:
    if exact or len(terms) < 2:
        return Bound(value=sum(terms), error=0.0 if exact else math.nan)
    each = torch.tensor(terms, dtype=torch.float64) * len(terms)
    return Bound(value=float(each.mean()), error=float(each.std() / math.sqrt(len(terms))))

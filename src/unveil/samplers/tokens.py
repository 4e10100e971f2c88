"""From logits to tokens, their log-probabilities and confidences, over flattened positions (N, V).

`sample_categorical` and `token_log_prob` come from the process: its reverse step draws and scores with them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from unveil.processes.masked import integer_weights, row_chunks, sample_categorical, token_log_prob

__all__ = ["Confidence", "certainty_rank", "confidence", "filter_logits", "sample_categorical", "token_log_prob"]

Confidence = Literal["probability", "margin", "entropy", "peak"]


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (N, V) with -inf outside the ``top_k`` likeliest tokens and the nucleus of mass ``top_p``.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p. It holds at least one token
    and is taken after top_k, from the renormalised rest. Of equal logits the lower token id comes first.
    None (or top_p = 1) switches a filter off.

    Raises:
        ValueError: top_k < 1, top_p outside (0, 1], or, with top_p, a row of logits that is no distribution.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k is None and top_p in (None, 1):
        return logits
    return torch.cat([_filter_rows(part, top_k, top_p) for part in row_chunks(logits)])


def confidence(logits: Tensor, tokens: Tensor, kind: Confidence) -> Tensor:
    """How certain softmax(logits (N, V)) is, (N,) float32, higher = more certain.

    ``probability``: p[tokens]; ``margin``: the largest minus the second largest p; ``entropy``: sum p log p,
    the negative entropy; ``peak``: the largest p. The last three do not look at ``tokens (N,)``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(Confidence):
        raise ValueError(f"confidence {kind!r} is unknown (allowed: {', '.join(sorted(get_args(Confidence)))})")
    parts = row_chunks(logits)
    if len(parts) == 1:
        return _rows_confidence(logits, tokens, kind)
    split = tokens.split([len(part) for part in parts])
    return torch.cat([_rows_confidence(*rows, kind) for rows in zip(parts, split, strict=True)])


def certainty_rank(score: Tensor) -> Tensor:
    """(b, R) place of every position when its row is sorted by falling score, from 0; ties go to the left."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _rows_confidence(logits: Tensor, tokens: Tensor, kind: Confidence) -> Tensor:
    probs = logits.float().softmax(-1)
    if kind == "probability":
        return probs.gather(-1, tokens[:, None])[:, 0]
    if kind == "peak":
        return probs.amax(-1)
    if kind == "margin":
        best = probs.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    return -torch.special.entr(probs).sum(-1)


def _filter_rows(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None and top_p < 1:
        weights = integer_weights(ranked.detach()) * keep
        reached = weights.cumsum(-1)
        keep &= (reached - weights).double() < top_p * reached[:, -1:].double()
    return logits.masked_fill(~torch.zeros_like(keep).scatter_(-1, order, keep), -torch.inf)

"""Log-probabilities of tokens from features, without ever holding the logits of all of them.

A vocabulary of 126k makes logits (N, V) the largest tensor of training: 0.5 MB a position in float32, several times
over
in the backward pass. Here the head runs on a few rows at a time and is run again in the backward pass, so that the peak
follows the rows of one chunk and not N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unveil.denoisers.base import MaskedDenoiser
from unveil.processes.masked import token_log_prob

CHUNK_ELEMENTS = 2**22
"""Logits that may exist at a time: 33 rows of a vocabulary of 126k, 16 MiB in float32."""


@overload
def score_tokens(
    denoiser: MaskedDenoiser,
    features: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
    entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def score_tokens(
    denoiser: MaskedDenoiser,
    features: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def score_tokens(
    denoiser: MaskedDenoiser,
    features: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(head(features (N, D)) / temperature)[tokens (N,)], (N,) float32.

    Args:
        denoiser: supplies the head; its weights receive gradients as usual.
        features: of the scored positions (N, D).
        tokens: (N,).
        temperature: of the policy that drew the tokens.
        chunk_rows: rows per chunk; by default as many as `CHUNK_ELEMENTS` logits allow.
        entropy: also return the entropy of softmax(head(features) / temperature), (N,) float32 in
            nats, without gradient.

    Raises:
        ValueError: the temperature is not positive, or chunk_rows is less than 1.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    log_prob, spread = in_chunks(_score_rows, denoiser, (features, tokens), temperature, entropy, chunk_rows=chunk_rows)
    return (log_prob, spread) if entropy else log_prob


def in_chunks(
    score: Callable[..., tuple[Tensor, Tensor]],
    denoiser: MaskedDenoiser,
    rows: Sequence[Tensor],
    *settings: Any,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``score(denoiser, *rows, *settings)``, two values (N,) of tensors with N rows, on a chunk of rows at a time."""
    size = chunk_rows or max(1, CHUNK_ELEMENTS // denoiser.spec.vocab_size)
    recompute = len(rows[0]) > size and torch.is_grad_enabled()
    parts = []
    for part in zip(*(value.split(size) for value in rows), strict=True):
        arguments = (denoiser, *part, *settings)
        if recompute:
            parts.append(checkpoint(score, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(*arguments))
    first, second = (torch.cat(values) for values in zip(*parts, strict=True))
    return first, second


def _score_rows(
    denoiser: MaskedDenoiser, features: Tensor, tokens: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = denoiser.head(features)
    log_prob = token_log_prob(logits, tokens, temperature)
    with torch.no_grad():
        if not entropy:
            return log_prob, log_prob.new_empty(0)
        scaled = logits.detach().float() / temperature
        probs = scaled.softmax(-1)
        # p log p of a forbidden token is 0 * -inf; entr knows that limit and needs no log-softmax beside the softmax.
        return log_prob, torch.special.entr(probs).sum(-1)

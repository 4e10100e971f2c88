"""The published loop with kept keys and values: one prompt at a time, blocks of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.kept import KeyValues


@torch.no_grad()
def plain_cached_decode(
    denoiser: MaskedDenoiser,
    prompt: Sequence[int],
    response_length: int,
    *,
    block_length: int,
    steps: int,
    cache: Literal["prefix", "dual"],
    threshold: float | None = None,
) -> Tensor:
    """The response (response_length,) of Fast-dLLM's loops (arXiv 2505.22618) at temperature 0.

    A block begins with a pass over the whole canvas, which also commits tokens; later passes take the block and all
    behind it (``prefix``) or the block alone (``dual``). Every pass puts the head on all that it computes and takes a
    float64 softmax of it. ``steps`` counts all blocks; with a ``threshold`` a block ends when it is full.
    """
    mask_id, device, offset = denoiser.spec.mask_id, denoiser.device, len(prompt)
    canvas = torch.full((1, offset + response_length), mask_id, device=device)
    canvas[0, :offset] = torch.tensor(prompt, device=device)
    every = torch.ones_like(canvas, dtype=torch.bool)
    blocks = response_length // block_length
    base, extra = divmod(block_length, steps // blocks)
    for block in range(blocks):
        start = offset + block * block_length
        end, kept, step = start + block_length, KeyValues(), 0
        while bool((canvas[:, start:end] == mask_id).any()):
            low, high = (0, canvas.shape[1]) if step == 0 else (start, canvas.shape[1] if cache == "prefix" else end)
            columns = None if step == 0 else torch.arange(low, high, device=device)[None]
            logits = denoiser.head(denoiser.window(canvas, every, kept, columns))
            seen = canvas[:, low:high]
            holes = seen == mask_id
            holes[:, end - low :] = False
            guess = logits.argmax(-1)
            certainty = logits.double().softmax(-1).gather(-1, guess[..., None])[..., 0]
            certainty = torch.where(holes, certainty, -torch.inf)
            count = base + (step < extra) if threshold is None else int(holes.sum())
            best = certainty[0].topk(count).indices
            if threshold is not None:
                enough = certainty[0, best] >= threshold
                enough[0] = True
                best = best[enough]
            seen[0, best] = guess[0, best]
            step += 1
    return canvas[0, offset:]

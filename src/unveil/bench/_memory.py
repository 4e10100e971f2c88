"""Peak memory of a call, and of scoring tokens against a full log-softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.live_bytes import LiveBytes
from unveil.learning.scoring import score_tokens
from unveil.seeds import generator

DEMAND = 0.25
"""Peak memory of scoring tokens, ours over the full log-softmax, at most."""
VOCABULARY = 126_464
"""LLaDA's."""


def method(device: torch.device) -> str:
    """How `peak_bytes` measures on this device, in words."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "bytes of live tensors, read after every operator; buffers inside an operator are not seen"


def peak_bytes(call: Callable[[], object], device: torch.device, fixed: Sequence[Tensor] = ()) -> int:
    """Peak memory of ``call``; the ``fixed`` tensors exist throughout and count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes(fixed) as live:
        call()
    return live.peak


def log_prob_memory(
    *,
    positions: int = 512,
    width: int = 64,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Peak memory, forward and backward, of scoring ``positions`` tokens of a vocabulary of 126,464.

    Ours is `score_tokens` as training calls it; the reference is head, float32, log_softmax, gather.
    The features, the head's weights and their gradients count on both sides.
    """
    head = _HeadOnly(width, generator(seed, "bench head")).to(device)
    stream = generator(seed, "bench features")
    features = torch.randn(positions, width, generator=stream).to(device).requires_grad_()
    tokens = torch.randint(VOCABULARY, (positions,), generator=stream).to(device)

    def clear() -> None:
        features.grad = head.weight.grad = None

    def ours() -> None:
        clear()
        score_tokens(head, features, tokens, entropy=True)[0].sum().backward()

    def plain() -> None:
        clear()
        head.head(features).float().log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()

    fixed = [features.detach(), tokens, head.weight.detach()]
    peak, reference = (peak_bytes(call, features.device, fixed) for call in (ours, plain))
    return {
        "positions": positions,
        "vocabulary": VOCABULARY,
        "width": width,
        "peak_bytes": peak,
        "reference_peak_bytes": reference,
        "ratio": peak / reference,
        "demand": DEMAND,
        "holds": peak <= DEMAND * reference,
    }


class _HeadOnly(MaskedDenoiser):
    """A head over LLaDA's vocabulary without a network below it."""

    def __init__(self, width: int, stream: torch.Generator) -> None:
        super().__init__()
        self.spec = DenoiserSpec(
            vocab_size=VOCABULARY, mask_id=0, pad_id=1, end_ids=(2,), forbidden_ids=(0,), context_length=1
        )
        self.weight = nn.Parameter(torch.randn(VOCABULARY, width, generator=stream) * width**-0.5)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def head(self, features: Tensor) -> Tensor:
        return features @ self.weight.T

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError

"""Log-probabilities of chosen tokens from features, without ever holding (N, V) logits of a large vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.processes.masked import token_log_prob


def score_tokens(denoiser: MaskedDenoiser, features: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = denoiser.head(features).float()
    with torch.no_grad():
        entropy = torch.special.entr((logits / temperature).softmax(-1)).sum(-1)
    return token_log_prob(logits, tokens, temperature), entropy

"""A compact transformer that answers with log-scores of the absorbing process and is told the time (SEDD's form)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.processes.score_entropy import LogLinear, Noise, ScoreEntropyProcess
from unveil.registry import UserError

FREQUENCIES = 32
"""Sines and as many cosines that describe a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(TransformerConfig):
    """Shape of a `ScoreDenoiser` and the noise that its scores are of."""

    noise_eps: float = 1e-3
    """``eps`` of the log-linear noise: the probability that a token survives until t = 1."""

    fractions: ClassVar[frozenset[str]] = TransformerConfig.fractions | {"noise_eps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_eps >= 1:
            raise UserError(f"noise_eps: should be less than 1, got {self.noise_eps}")


class Scored(MaskedDenoiser):
    """Mixed into a denoiser with an `embed`, before it in the list of bases: its head then gives log-scores.

    A time embedding is added to what the first block reads. The raw output a of the head becomes
    log s = a + log r(t) - log(number of tokens that can be), so that a network of zeros has the right sum at every time
    (Lou et al. 2023). log r(t) travels as the last column of the features: the head needs no time and may be put on any
    rows.
    """

    def told_the_time(self, noise: Noise, dim: int) -> None:
        """Add the time embedding of width ``dim`` and declare what the head gives; ends the constructor."""
        self.spec = dataclasses.replace(
            self.spec, time_conditioned=True, prediction="log_score", noise=noise, feature_dim=dim + 1, keeps_keys=False
        )
        self.time_in = nn.Linear(2 * FREQUENCIES, dim, bias=False)
        self.time_out = nn.Linear(dim, dim, bias=False)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        """(B, L, D + 1): features, and log r(t) - log(number of tokens) in the last column.

        Raises:
            UserError: no times were given.
        """
        if t is None:
            raise UserError("the network is conditioned on time, which this sampler or likelihood does not give")
        process = self.spec.process()
        assert isinstance(process, ScoreEntropyProcess)
        features = super().features(ids, valid, t)  # type: ignore[safe-super]
        tokens = self.spec.vocab_size - len(self.spec.forbidden_ids)
        scale = (process.score_scale(t) - math.log(tokens)).to(features.dtype)
        return torch.cat([features, scale[:, None, None].expand(*features.shape[:2], 1)], dim=-1)

    def embed(self, ids: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        wave = self.time_in(time_waves(t).to(self.time_in.weight.dtype))
        return super().embed(ids, t) + self.time_out(F.silu(wave))[:, None]  # type: ignore[misc]

    def head(self, features: Tensor) -> Tensor:
        """Log-scores (..., V), -inf at the forbidden ids."""
        return super().head(features[..., :-1]) + features[..., -1:]  # type: ignore[safe-super]


class ScoreDenoiser(Scored, TransformerDenoiser):
    """The embedded transformer in its score form."""

    model_type = "unveil-score-transformer"
    config_class = ScoreConfig

    def __init__(self, config: ScoreConfig, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.told_the_time(LogLinear(eps=config.noise_eps), config.dim)


def time_waves(t: Tensor) -> Tensor:
    """Cosines and sines (B, 2 * FREQUENCIES) of times t (B,) at periods from 6.3 down to 0.006."""
    frequency = 1000 ** (torch.arange(FREQUENCIES, dtype=torch.float64, device=t.device) / (FREQUENCIES - 1))
    angle = t.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)

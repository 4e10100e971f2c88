"""SEDD (arXiv 2310.16834): MDLM's network under the same names, which answers with log-scores and is told the noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.mdlm import MdlmDenoiser
from unveil.processes.score_entropy import Geometric, LogLinear, Noise
from unveil.registry import UserError


class SeddDenoiser(MdlmDenoiser):
    """SEDD's folder, absorbing process.

    The raw output a becomes log s = a + log r(t) - log(number of tokens); log r(t) travels as the last column of the
    features, so that the head needs no time.
    """

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        for part, key, allowed in (("graph", "type", "absorb"), ("model", "scale_by_sigma", True)):
            if (given := config[part].get(key)) != allowed:
                raise UserError(f"{part}.{key}: {given!r} is not supported (allowed: {allowed!r})")
        _noise(config["noise"])
        return super().build(config)

    @classmethod
    def shape(cls, config: dict[str, Any]) -> dict[str, Any]:
        model = config["model"]
        shape = {key: model.get(key) for key in ("cond_dim", "n_blocks", "n_heads")}
        return shape | {
            "vocab_size": config["tokens"] + 1,
            "model_length": model.get("length"),
            "hidden_dim": model.get("hidden_size"),
        }

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        """(B, L, D + 1): features, and log r(t) - log(number of tokens) in the last column."""
        features = super().hidden(ids, attendable, position, t)
        assert t is not None
        scale = -torch.expm1(self.noise.sigma(t)).log() - math.log(self.spec.vocab_size - 1)
        return torch.cat([features, scale.to(features.dtype)[:, None, None].expand(*ids.shape, 1)], dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features[..., :-1]) + features[..., -1:]

    def sizes(self) -> dict[str, int]:
        sizes = super().sizes()
        return sizes | {"feature_dim": sizes["feature_dim"] + 1}

    def _make_spec(self, text: Any) -> DenoiserSpec:
        self.noise = _noise(self.published.config["noise"])
        spec = super()._make_spec(text)
        return replace(spec, time_conditioned=True, prediction="log_score", noise=self.noise)


def _noise(settings: dict[str, Any]) -> Noise:
    if settings["type"] == "loglinear":
        return LogLinear()
    if settings["type"] == "geometric":
        return Geometric(low=settings["sigma_min"], high=settings["sigma_max"])
    raise UserError(f"noise.type: {settings['type']!r} is not known (allowed: geometric, loglinear)")

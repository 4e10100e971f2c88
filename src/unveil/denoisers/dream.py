"""Dream 7B and its relatives (DiffuCoder, Dream-Coder): a Qwen2 without causal mask that predicts the next token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.decoders import DecoderDenoiser, bidirectional
from unveil.denoisers.pretrained import NO_SETTINGS


class DreamDenoiser(DecoderDenoiser):
    """Dream's folder behind ``Qwen2ForCausalLM``; its features are moved one to the right."""

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in config.items() if key not in (*NO_SETTINGS, "model_type")}
        scaling = settings.pop("rope_scaling", None) or {"rope_type": "default"}
        settings["rope_parameters"] = {**scaling, "rope_theta": settings.pop("rope_theta", 10000.0)}
        return bidirectional("qwen2", settings)

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        return shift_right(super().hidden(ids, attendable, position, t), attendable)

    def _make_spec(self, text: Any) -> DenoiserSpec:
        return replace(super()._make_spec(text), logit_shift=1)


def shift_right(features: Tensor, valid: Tensor | None) -> Tensor:
    """Features (B, L, D) that predict the next token, moved so that feature i predicts token i.

    Each position takes the feature of the valid position before it; the first one, which nothing predicts, keeps its
    own, as Dream's sampler has it.
    """
    batch, length, dim = features.shape
    place = torch.arange(length, device=features.device).expand(batch, length)
    known = place if valid is None else torch.where(valid, place, -1).cummax(1).values
    before = torch.cat([torch.full_like(known[:, :1], -1), known[:, :-1]], 1)
    before = torch.where(before < 0, place, before)
    return features.gather(1, before[..., None].expand(-1, -1, dim))

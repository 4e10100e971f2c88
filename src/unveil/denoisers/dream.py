"""Dream 7B and its relatives (DiffuCoder, Dream-Coder): a Qwen2 without causal mask that predicts the next token."""

from __future__ import annotations

from typing import Any

from torch import nn

from unveil.denoisers.decoders import DecoderDenoiser, bidirectional
from unveil.denoisers.pretrained import NO_SETTINGS


class DreamDenoiser(DecoderDenoiser):
    """Dream's folder behind ``Qwen2ForCausalLM``; its features are moved one to the right."""

    shifted = True

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in config.items() if key not in (*NO_SETTINGS, "model_type")}
        scaling = settings.pop("rope_scaling", None) or {"rope_type": "default"}
        settings["rope_parameters"] = {**scaling, "rope_theta": settings.pop("rope_theta", 10000.0)}
        return bidirectional("qwen2", settings)

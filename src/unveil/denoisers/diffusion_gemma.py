"""DiffusionGemma (google/diffusiongemma-26B-A4B-it): block diffusion on uniform noise, a class of ``transformers``.

A causal encoder reads prompt and finished blocks into a cache of keys and values; a decoder with the same weights sees
the cache and, in both directions, a canvas of ``canvas_length`` random tokens. What it believed at the step before
comes back to it as self-conditioning. Images, which the encoder could read as well, are not offered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.pretrained import NO_SETTINGS, PretrainedDenoiser
from unveil.denoisers.uniform import UniformDenoiser
from unveil.registry import UserError


class Prefix(NamedTuple):
    """Keys and values of finished tokens, and which of them are real, (B, P)."""

    cache: Any
    valid: Tensor


class DiffusionGemmaDenoiser(PretrainedDenoiser, UniformDenoiser):
    """``DiffusionGemmaForBlockDiffusion`` behind `read` and `denoise`."""

    network: Any
    has_mask = False
    output_layers = ("lm_head",)

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        import transformers

        settings = {key: value for key, value in config.items() if key not in (*NO_SETTINGS, "model_type")}
        built: Any = transformers.DiffusionGemmaConfig(**settings)
        built.text_config.attention_dropout = 0.0
        built._attn_implementation = "sdpa"
        network = transformers.DiffusionGemmaForBlockDiffusion(built)
        network.tie_weights()
        return network

    def read(self, ids: Tensor, valid: Tensor, before: Prefix | None = None) -> Prefix:
        from transformers import DynamicCache

        config = self.network.config
        cache = DynamicCache(config=config.get_text_config(decoder=True)) if before is None else before.cache
        known = valid if before is None else torch.cat([before.valid, valid], 1)
        if not bool(known.any(1).all()):
            raise UserError("prompt: is empty, and the model cannot begin with nothing (a text, or the chat template)")
        if known.shape[1] + config.canvas_length > self.spec.context_length:
            raise UserError(
                f"the text has {known.shape[1]} tokens, the model's context_length of {self.spec.context_length} has "
                f"no room for a canvas of {config.canvas_length} behind them"
            )
        position = self._positions(known)[:, -ids.shape[1] :]
        self.network.model.encoder(input_ids=ids, attention_mask=known, cache=cache, position_ids=position)
        return Prefix(cache, known)

    def denoise(self, canvas: Tensor, valid: Tensor, prefix: Prefix, t: Tensor, believed: Tensor | None) -> Tensor:
        known = torch.cat([prefix.valid, valid], 1)
        if believed is not None:
            believed = believed.to(self.network.lm_head.weight.dtype)
        output = self.network(
            decoder_input_ids=canvas, cache=prefix.cache, self_conditioning_logits=believed,
            decoder_attention_mask=known, decoder_position_ids=self._positions(known)[:, -canvas.shape[1] :],
        )  # fmt: skip
        return output.logits + self.forbidden_bias

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        raise UserError(
            "model: a diffusion_gemma reads a canvas behind a cache of the text before it (allowed: decoding with "
            "entropy_bound or ancestral)"
        )

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        raise AssertionError("features are refused")

    def logits(self, features: Tensor) -> Tensor:
        raise AssertionError("features are refused")

    def sizes(self) -> dict[str, int]:
        config = self.network.config
        return {
            "vocab_size": config.text_config.vocab_size,
            "context_length": config.text_config.max_position_embeddings,
            "canvas_length": config.canvas_length,
        }

    def _make_spec(self, text: Any) -> DenoiserSpec:
        spec, config = super()._make_spec(text), self.network.config
        images = {config.boi_token_id, config.eoi_token_id, config.image_token_id} & set(range(spec.vocab_size))
        return replace(spec, corruption="uniform", forbidden_ids=tuple(sorted({*spec.forbidden_ids, *images})))

    @staticmethod
    def _positions(valid: Tensor) -> Tensor:
        """Place of every token among the real ones of its row, (B, P)."""
        return (valid.cumsum(1) - 1).clamp(min=0)

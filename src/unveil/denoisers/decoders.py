"""Published masked models whose network is a decoder of ``transformers`` with attention in both directions.

Qwen3-, Qwen2- and Llama-shaped checkpoints that were converted from autoregressive ones (``a2d-*``) need nothing else;
LLaDA and Dream are special cases in files of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.decoder_cache import cache_argument
from unveil.denoisers.kept import KeyValues
from unveil.denoisers.pretrained import NO_SETTINGS, PretrainedDenoiser
from unveil.registry import UserError, did_you_mean

ARCHITECTURES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "glm4_moe": "Glm4Moe"}


class DecoderDenoiser(PretrainedDenoiser):
    """``...ForCausalLM`` whose causal mask is off."""

    network: Any
    output_layers = ("lm_head",)
    prefix: ClassVar[str] = "a2d-"
    """Of the model_type, before the architecture's name."""
    shifted: ClassVar[bool] = False
    """True if the head at position i predicts token i + 1."""

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
        return bidirectional(settings.pop("model_type").removeprefix(cls.prefix), settings)

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        mask, network = self.mask(attendable, position, position), self.network.model
        features = network(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        return shift_right(features, attendable) if self.spec.logit_shift else features

    def window(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None = None) -> Tensor:
        if not self.spec.logit_shift:
            return self._kept(ids, valid, kept, columns)
        if columns is None:
            return shift_right(self._kept(ids, valid, kept, None), valid)
        first = columns[:, :1]
        before = (first - 1).clamp(min=0)
        before = torch.where(valid.gather(1, before), before, first)
        features = self._kept(ids, valid, kept, torch.cat([before, columns], 1))
        # Column c is predicted by c - 1, which stands one place before c's; a repeated column has its first one's.
        return features.gather(1, (columns - first)[..., None].expand(-1, -1, features.shape[-1]))

    def _kept(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None) -> Tensor:
        """`window`, features not moved."""
        attendable = valid | ~valid.any(1, keepdim=True)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        query = position
        if columns is not None:
            ids, query = ids.gather(1, columns), position.gather(1, columns)
        mask = self.mask(attendable, position, query)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": query, "use_cache": False}
        return self.network.model(**given, **cache_argument(kept, columns)).last_hidden_state

    def mask(self, attendable: Tensor | None, position: Tensor, query: Tensor) -> Tensor | None:
        """Which keys, at ``position`` (B, L), each query at ``query`` (B, W) sees, (B, 1, W, L); None: all of them."""
        if attendable is None:
            return None
        return attendable[:, None, None, :].expand(-1, 1, query.shape[1], -1)

    def _make_spec(self, text: Any) -> DenoiserSpec:
        return replace(super()._make_spec(text), logit_shift=int(self.shifted), keeps_keys=True)

    def logits(self, features: Tensor) -> Tensor:
        return self.network.lm_head(features)

    def sizes(self) -> dict[str, int]:
        config = self.network.config
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "feature_dim": config.hidden_size,
        }


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


def bidirectional(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A causal language model of ``transformers`` in which every position attends to every other.

    Raises:
        UserError: the architecture is not known.
    """
    import transformers

    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} is not known{did_you_mean(architecture, ARCHITECTURES)}")
    name = ARCHITECTURES[architecture]
    settings |= {key: 0.0 for key in settings if key.endswith("dropout")}
    config = getattr(transformers, f"{name}Config")(**settings)
    config.is_causal = False
    config._attn_implementation = "sdpa"
    network = getattr(transformers, f"{name}ForCausalLM")(config)
    network.tie_weights()
    return network

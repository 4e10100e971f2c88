"""Published masked models whose network is a decoder of ``transformers`` with attention in both directions.

Qwen3-, Qwen2- and Llama-shaped checkpoints that were converted from autoregressive ones (``a2d-*``) need nothing else;
LLaDA and Dream are special cases in files of their own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from unveil.denoisers.pretrained import NO_SETTINGS, PretrainedDenoiser
from unveil.registry import UserError, did_you_mean

ARCHITECTURES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "glm4_moe": "Glm4Moe"}


class DecoderDenoiser(PretrainedDenoiser):
    """``...ForCausalLM`` whose causal mask is off."""

    network: Any
    output_layers = ("lm_head",)
    prefix: ClassVar[str] = "a2d-"
    """Of the model_type, before the architecture's name."""

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
        return bidirectional(settings.pop("model_type").removeprefix(cls.prefix), settings)

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        mask, network = self.mask(attendable, position), self.network.model
        return network(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state

    def mask(self, attendable: Tensor | None, position: Tensor) -> Tensor | None:
        """Which keys each query sees, (B, 1, L, L); None: all of them."""
        if attendable is None:
            return None
        batch, length = attendable.shape
        return attendable[:, None, None, :].expand(batch, 1, length, length)

    def logits(self, features: Tensor) -> Tensor:
        return self.network.lm_head(features)

    def sizes(self) -> dict[str, int]:
        config = self.network.config
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "feature_dim": config.hidden_size,
        }


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

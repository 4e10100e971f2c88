"""LLaDA (8B Base, Instruct, 1.5; arXiv 2502.09992): a Llama without causal mask under names of its own."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from unveil.denoisers.decoders import DecoderDenoiser, bidirectional
from unveil.registry import UserError

_LAYER = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)")
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_FIXED = {
    "block_type": ("llama",),
    "rope": (True,),
    "alibi": (False,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "multi_query_attention": (None,),
}
"""What the configuration could say and no published checkpoint does: another value is another network."""


class LladaDenoiser(DecoderDenoiser):
    """LLaDA's folder behind ``LlamaForCausalLM``."""

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        for key, allowed in _FIXED.items():
            if (given := config.get(key, allowed[0])) not in allowed:
                raise UserError(f"{key}: {given!r} is not supported (allowed: {', '.join(map(repr, allowed))})")
        needed = ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length", "rope_theta")
        if lacking := [key for key in needed if key not in config]:
            raise UserError(f"{lacking[0]}: required, but missing")
        return bidirectional(
            "llama",
            {
                "vocab_size": config.get("embedding_size") or config["vocab_size"],
                "hidden_size": config["d_model"],
                "intermediate_size": config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * config["d_model"],
                "num_hidden_layers": config["n_layers"],
                "num_attention_heads": config["n_heads"],
                "num_key_value_heads": config.get("n_kv_heads"),
                "max_position_embeddings": config["max_sequence_length"],
                "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
                "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
                "attention_bias": bool(config.get("include_qkv_bias")),
                "tie_word_embeddings": bool(config.get("weight_tying")),
            },
        )

    def rename(self, name: str) -> str | None:
        if found := _LAYER.fullmatch(name):
            layer, part, kind = found.groups()
            return f"model.layers.{layer}.{_IN_LAYER.get(part, part)}.{kind}"
        return _OUTSIDE.get(name, name)

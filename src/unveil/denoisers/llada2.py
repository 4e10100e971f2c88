"""LLaDA 2.0 and 2.1: a mixture of experts with attention over blocks, each position seeing its block and all before it.

The network is that of GLM-4 MoE under other names: experts that the files keep apart are one tensor there, and the
projections of attention, which the files keep together, are three.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.decoders import DecoderDenoiser, bidirectional
from unveil.denoisers.pretrained import Part
from unveil.registry import UserError

BLOCK = 32
"""Tokens per block of attention, counted from the beginning of the text."""
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_RENAMED = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor", "moe_intermediate_size",
    "first_k_dense_replace", "head_dim", "use_qk_norm",
)  # fmt: skip
_FIXED = {
    "use_bias": False, "use_qkv_bias": False, "norm_head": False, "rope_scaling": None, "use_sliding_window": False,
}  # fmt: skip


class Llada2Denoiser(DecoderDenoiser):
    """LLaDA 2's folder behind ``Glm4MoeForCausalLM``."""

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        for key, allowed in _FIXED.items():
            if (given := config.get(key, allowed)) != allowed:
                raise UserError(f"{key}: {given!r} is not supported (allowed: {allowed!r})")
        needed = (*_SAME[:6], "num_experts", "num_shared_experts", "moe_intermediate_size", "rope_theta")
        if lacking := [key for key in needed if key not in config]:
            raise UserError(f"{lacking[0]}: required, but missing")
        settings = {key: config[key] for key in _SAME if key in config}
        settings |= {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
        settings |= {"norm_topk_prob": config["num_experts_per_tok"] > 1, "num_mtp_layers": 0}
        settings["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config.get("partial_rotary_factor", 0.5),
        }
        return bidirectional("glm4_moe", settings)

    def mask(self, attendable: Tensor | None, position: Tensor, query: Tensor) -> Tensor:
        size = self.block_length
        seen = position[:, None, :] // size <= query[:, :, None] // size
        return (seen if attendable is None else seen & attendable[:, None, :])[:, None]

    @property
    def block_length(self) -> int:
        return self.published.config.get("block_length", BLOCK)

    def _make_spec(self, text: Any) -> DenoiserSpec:
        return replace(super()._make_spec(text), attention_block=self.block_length)

    def parts(self, name: str) -> list[Part]:
        config = self.network.config
        if found := _EXPERT.fullmatch(name):
            experts, expert, which = found[1], int(found[2]), found[3]
            if which == "down":
                return [Part(f"{experts}.down_proj", (expert,))]
            size = config.moe_intermediate_size
            rows = slice(0, size) if which == "gate" else slice(size, 2 * size)
            return [Part(f"{experts}.gate_up_proj", (expert, rows))]
        if ".attention.query_key_value." in name:
            return [Part(name.replace("attention.query_key_value", f"self_attn.{which}_proj")) for which in "qkv"]
        return super().parts(name)

    def rename(self, name: str) -> str | None:
        for theirs, own in _RENAMED.items():
            name = name.replace(theirs, own)
        return name

"""MDLM (arXiv 2406.07524): a diffusion transformer with adaptive layer norms and rotary positions.

No library ships this network, so it is written here. Published checkpoints (mdlm-owt) are not conditioned on time: the
modulation is then that of noise level 0 everywhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.hub import download
from unveil.denoisers.pretrained import PretrainedDenoiser
from unveil.processes.score_entropy import LogLinear, Noise
from unveil.registry import UserError

TOKENIZER = "openai-community/gpt2"
"""The published folder holds no tokenizer: the model was trained on this one's ids and one more, the mask."""
_FREQUENCIES = 256


class MdlmDenoiser(PretrainedDenoiser):
    """MDLM's folder."""

    network: MdlmNetwork
    tokenizer_class = "GPT2Tokenizer"
    output_layers = ("linear",)
    noise: Noise = LogLinear()

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        config = cls.shape(config)
        needed = ("vocab_size", "model_length", "hidden_dim", "cond_dim", "n_blocks", "n_heads")
        if lacking := [key for key in needed if type(config.get(key)) is not int or config[key] < 1]:
            raise UserError(f"{lacking[0]}: should be a positive integer, got {config.get(lacking[0])!r}")
        if config["hidden_dim"] % (2 * config["n_heads"]):
            heads, dim = config["n_heads"], config["hidden_dim"]
            raise UserError(f"n_heads: {heads} must divide hidden_dim={dim} into even head sizes")
        return MdlmNetwork(config)

    @classmethod
    def shape(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The keys of a config.json that say how the network is built."""
        return config

    def rename(self, name: str) -> str | None:
        name = re.sub(r"^backbone\.", "", name)
        return re.sub(r"mlp\.(\d)\.", lambda found: f"mlp.{'up' if found[1] == '0' else 'down'}.", name)

    @classmethod
    def tokenizer_folder(cls, folder: Path) -> Path:
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
        try:
            return download(TOKENIZER, tokenizer_only=True)
        except UserError as error:
            raise UserError(
                f"{folder}: no tokenizer (allowed: tokenizer.json of GPT-2 in the folder); {error}"
            ) from error

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        if not self.spec.time_conditioned:
            sigma = torch.zeros(len(ids), device=ids.device)
        elif t is None:
            raise UserError("the network is conditioned on time, which this sampler or likelihood does not give")
        else:
            sigma = self.noise.sigma(t).float()
        return self.network(ids, sigma, attendable, position)

    def logits(self, features: Tensor) -> Tensor:
        return self.network.output_layer.linear(features)

    def sizes(self) -> dict[str, int]:
        config = self.shape(self.published.config)
        return {
            "vocab_size": config["vocab_size"],
            "context_length": config["model_length"],
            "feature_dim": config["hidden_dim"],
        }

    def default_mask(self) -> int:
        return self.sizes()["vocab_size"] - 1

    def checkpoint_gradients(self) -> None:
        self.network.checkpointing = True

    def _make_spec(self, text: Any) -> DenoiserSpec:
        return replace(super()._make_spec(text), time_conditioned=bool(self.published.config.get("time_conditioning")))


class MdlmNetwork(nn.Module):
    """Token embedding, blocks, and the modulated norm before the output layer, which the caller applies."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, condition = config["hidden_dim"], config["cond_dim"]
        self.checkpointing = False
        self.vocab_embed = _Embedding(config["vocab_size"], dim)
        self.sigma_map = _NoiseLevel(condition)
        self.rotary_emb = _Rotary(dim // config["n_heads"])
        self.blocks = nn.ModuleList(_Block(dim, config["n_heads"], condition) for _ in range(config["n_blocks"]))
        self.output_layer = _Output(dim, config["vocab_size"], condition)

    def forward(self, ids: Tensor, sigma: Tensor, attendable: Tensor | None, position: Tensor) -> Tensor:
        """Features (B, L, D) of ids (B, L) at noise levels sigma (B,)."""
        x = self.vocab_embed.embedding[ids]
        condition = F.silu(self.sigma_map(sigma))
        rotation = self.rotary_emb(position)
        mask = None if attendable is None else attendable[:, None, None, :]
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, condition, mask, use_reentrant=False)
            else:
                x = block(x, rotation, condition, mask)
        return self.output_layer(x, condition)


class _Embedding(nn.Module):
    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, dim))


class _TwoLayers(nn.Module):
    def __init__(self, given: int, hidden: int, made: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(given, hidden), nn.Linear(hidden, made)


class _NoiseLevel(nn.Module):
    """Sinusoids of the noise level, and two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = _TwoLayers(_FREQUENCIES, dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, device=sigma.device, dtype=torch.float32) / half)
        angle = sigma[:, None].float() * rate
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp.up.weight.dtype)
        return self.mlp.down(F.silu(self.mlp.up(wave)))


class _Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("inv_freq", frequency)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, L, head_dim), halves convention."""
        angle = position[..., None].float() * self.inv_freq.float()
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos(), angle.sin()


class _Norm(nn.Module):
    """Layer norm in fp32 with a scale and no shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.layer_norm(x.float(), x.shape[-1:]) * self.weight).to(x.dtype)


class _Block(nn.Module):
    """Attention and MLP, each between a modulation of its input and a gate on its output."""

    def __init__(self, dim: int, heads: int, condition: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _Norm(dim), _Norm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = _TwoLayers(dim, 4 * dim, dim)
        self.adaLN_modulation = nn.Linear(condition, 6 * dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], condition: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
        inner = self.norm1(x) * (1 + scale_attention) + shift_attention
        qkv = self.attn_qkv(inner).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + gate_attention * self.attn_out(mixed.transpose(1, 2).reshape(batch, length, dim))
        inner = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp.down(F.gelu(self.mlp.up(inner), approximate="tanh"))


class _Output(nn.Module):
    def __init__(self, dim: int, vocabulary: int, condition: int) -> None:
        super().__init__()
        self.norm_final = _Norm(dim)
        self.linear = nn.Linear(dim, vocabulary)
        self.adaLN_modulation = nn.Linear(condition, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        return self.norm_final(x) * (1 + scale) + shift


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)

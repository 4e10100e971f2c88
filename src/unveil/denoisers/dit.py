"""A compact diffusion transformer over patches of an image (DiT, arXiv 2212.09748).

Time and prompt act on every block by adaLN-zero: a shift and a scale before attention and MLP, and a gate behind them,
all 0 at first. A prompt of several ids is also read id by id: its embeddings are tokens beside the patches, and say at
which place of the prompt they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.image import Conditioning, ImageNetwork, Prompts, draw_weights
from unveil.registry import UserError


@dataclass(frozen=True, kw_only=True)
class Dit(ImageNetwork, name="dit"):
    """The shape of a diffusion transformer."""

    patch: Annotated[int, Field(ge=1)] = 2
    """Side of a patch in pixels; it must divide height and width."""
    dim: Annotated[int, Field(ge=2)] = 96
    """Width."""
    layers: Annotated[int, Field(ge=1)] = 4
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads; they must divide the width."""
    hidden: Annotated[int, Field(ge=1)] = 384
    """Width inside the MLP."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise UserError(f"heads: {self.heads} must divide dim={self.dim}")

    def build(self, shape: tuple[int, int, int], prompts: Prompts) -> DitNetwork:
        if shape[1] % self.patch or shape[2] % self.patch:
            raise UserError(f"network.patch: {self.patch} does not divide images of {shape[1]} x {shape[2]}")
        return DitNetwork(self, shape, prompts)


class DitBlock(nn.Module):
    """Attention and MLP, each modulated by the condition."""

    def __init__(self, config: Dit) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, config.hidden)
        self.down = nn.Linear(config.hidden, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, L, dim); condition (B, dim)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition)[:, None].chunk(6, dim=-1)
        batch, length, dim = x.shape
        qkv = self.qkv(modulated(x, shift, scale)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + gate * self.attention_out(mixed.transpose(1, 2).reshape(batch, length, dim))
        inner = F.gelu(self.up(modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
        return x + gate_mlp * self.down(inner)


class DitNetwork(nn.Module):
    """See the module."""

    def __init__(self, config: Dit, shape: tuple[int, int, int], prompts: Prompts) -> None:
        super().__init__()
        channels, height, width = shape
        self.patch, self.grid, self.words = config.patch, (height // config.patch, width // config.patch), prompts.width
        self.conditioning = Conditioning(config.dim, prompts)
        self.input = nn.Linear(channels * config.patch**2, config.dim)
        self.position = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], config.dim))
        if self.words > 1:
            self.place = nn.Embedding(self.words, config.dim)  # else a patch must learn of every id where it stands
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(config.layers))
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.output = nn.Linear(config.dim, channels * config.patch**2)

    def initialise(self, generator: torch.Generator) -> None:
        draw_weights(self, generator, zero=("modulation.weight", "output.weight"))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The prediction (B, C, H, W) at x (B, C, H, W), times (B,), prompt ids (B, P)."""
        batch, channels, height, width = x.shape
        condition = F.silu(self.conditioning(t, ids))
        # (B, C, h, p, w, p) -> (B, h w, C p p)
        cut = x.reshape(batch, channels, self.grid[0], self.patch, self.grid[1], self.patch)
        tokens = self.input(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + self.position
        patches = tokens.shape[1]
        if self.words > 1:
            tokens = torch.cat([tokens, self.conditioning.places(ids) + self.place.weight], dim=1)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        pixels = self.output(modulated(tokens[:, :patches], shift, scale))
        pixels = pixels.view(batch, *self.grid, channels, self.patch, self.patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The normalised features of x (B, L, dim), scaled and shifted (B, 1, dim)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

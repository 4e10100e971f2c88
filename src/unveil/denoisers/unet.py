"""A compact convolutional U-Net over small images: residual blocks, attention at the coarsest level.

Time and prompt act on every residual block by a scale and a shift of its second normalisation.
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
class UNet(ImageNetwork, name="unet"):
    """The shape of a U-Net."""

    channels: Annotated[int, Field(ge=4)] = 32
    """At the finest level; a multiple of 4."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level in units of the finest; every level halves height and width."""
    blocks: Annotated[int, Field(ge=1)] = 1
    """Residual blocks per level on the way down; one more on the way up."""
    heads: Annotated[int, Field(ge=1)] = 2
    """Attention heads at the coarsest level."""

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers: should be one or more positive numbers, got {list(self.multipliers)}")
        if self.channels % 4 or (self.channels * self.multipliers[-1]) % self.heads:
            raise UserError(f"channels: {self.channels} must be a multiple of 4, at the coarsest level of heads")

    def build(self, shape: tuple[int, int, int], prompts: Prompts) -> UNetNetwork:
        factor = 2 ** (len(self.multipliers) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"network.multipliers: {len(self.multipliers)} levels halve images of {shape[1]} x {shape[2]} too often"
            )
        return UNetNetwork(self, shape, prompts)


class ResidualBlock(nn.Module):
    """Two convolutions, the condition between them."""

    def __init__(self, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(4, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(dim, 2 * outputs)
        self.norm_out = nn.GroupNorm(4, outputs, affine=False)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, inputs, H, W); condition (B, dim)."""
        inner = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv_out(F.silu(self.norm_out(inner) * (1 + scale) + shift))
        return self.skip(x) + inner


class Attention(nn.Module):
    """Every place of the image sees every other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attention_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.attention_out(mixed).transpose(1, 2).reshape(x.shape)


class UNetNetwork(nn.Module):
    """See the module."""

    def __init__(self, config: UNet, shape: tuple[int, int, int], prompts: Prompts) -> None:
        super().__init__()
        dim = 4 * config.channels
        widths = [config.channels * factor for factor in config.multipliers]
        self.conditioning = Conditioning(dim, prompts)
        self.input = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        # In the order of use: residual blocks level by level, and the convolutions that change the size.
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, width = [widths[0]], widths[0]
        for level, wide in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(ResidualBlock(width, wide, dim))
                width = wide
                kept.append(width)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = nn.ModuleList([ResidualBlock(width, width, dim), ResidualBlock(width, width, dim)])
        self.attention = Attention(width, config.heads)
        for level, wide in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResidualBlock(width + kept.pop(), wide, dim))
                width = wide
            if level > 0:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(4, width)
        self.output = nn.Conv2d(width, shape[0], 3, padding=1)

    def initialise(self, generator: torch.Generator) -> None:
        draw_weights(self, generator, zero=("conv_out.weight", "attention_out.weight", "output.weight"))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The prediction (B, C, H, W) at x (B, C, H, W), times (B,), prompt ids (B, P)."""
        condition = F.silu(self.conditioning(t, ids))
        x = self.input(x)
        kept = [x]
        for part in self.down:
            x = part(x, condition) if isinstance(part, ResidualBlock) else part(x)
            kept.append(x)
        x = self.middle[1](self.attention(self.middle[0](x, condition)), condition)
        for part in self.up:
            if isinstance(part, ResidualBlock):
                x = part(torch.cat([x, kept.pop()], dim=1), condition)
            else:
                x = part(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.output(F.silu(self.norm(x)))

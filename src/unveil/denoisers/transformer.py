"""A compact bidirectional transformer over tokens: RoPE, RMSNorm, gated MLP, SDPA with a real padding mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.folder import load_weights, read_config, write_model
from unveil.denoisers.kept import KeyValues
from unveil.denoisers.tokenizer import END, MASK, PAD, UNKNOWN, TextTokenizer
from unveil.registry import UserError

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a `TransformerDenoiser`; the vocabulary comes from the tokenizer."""

    dim: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 256
    context_length: int = 64
    rope_base: float = 1000.0

    fractions: ClassVar[frozenset[str]] = frozenset({"rope_base"})
    """Keys that may hold a fraction."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            fraction = key in self.fractions
            if not (type(value) is int or (fraction and type(value) is float)):
                raise UserError(f"{key}: should be {'a number' if fraction else 'an integer'}, got {value!r}")
            if not 0 < value < float("inf"):
                raise UserError(f"{key}: should be greater than 0 and finite, got {value}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise UserError(f"heads: {self.heads} must divide dim={self.dim} into even head sizes")


class Block(nn.Module):
    """Pre-norm attention and gated MLP, each with a residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], attendable: Tensor | None, keep: Keep | None = None
    ) -> Tensor:
        """x (B, W, D); rotation = (cos, sin) each (B or 1, 1, W, head_dim); attendable (B, 1, 1, L) or None.

        ``keep`` takes the keys and values (B, heads, W, head_dim) of x and gives those of all L columns.
        """
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if keep is not None:
            key, value = keep(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attendable)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, dim))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TransformerDenoiser(MaskedDenoiser):
    """The embedded masked-token denoiser."""

    model_type: ClassVar[str] = "unveil-transformer"
    """What config.json calls this kind of network."""
    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig
    rope_cos: Tensor
    rope_sin: Tensor
    forbidden_bias: Tensor

    def __init__(self, config: TransformerConfig, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        mask, pad, end = (tokenizer.id(token) for token in (MASK, PAD, END))
        self.spec = DenoiserSpec(
            vocab_size=len(tokenizer),
            mask_id=mask,
            pad_id=pad,
            end_ids=(end,),
            forbidden_ids=(mask, pad, tokenizer.id(UNKNOWN)),
            context_length=config.context_length,
            feature_dim=config.dim,
            keeps_keys=True,
        )
        self.embedding = nn.Embedding(len(tokenizer), config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.unembedding = nn.Linear(config.dim, len(tokenizer), bias=False)
        cos, sin = _rope_table(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        bias = torch.zeros(len(tokenizer))
        bias[list(self.spec.forbidden_ids)] = -torch.inf
        self.register_buffer("forbidden_bias", bias, persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: normal with std 0.02, residual outputs scaled down by sqrt(2 layers), norms at one."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
                continue
            std = 0.02
            if name.endswith(("attention_out.weight", "down.weight")):
                std /= (2 * self.config.layers) ** 0.5
            nn.init.normal_(parameter, std=std, generator=generator)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        length = ids.shape[1]
        if length > self.config.context_length:
            raise UserError(
                f"the canvas has {length} tokens, the model's context_length is {self.config.context_length}"
            )
        rotation, attendable = self._places(valid)
        x = self.embed(ids, t)
        for block in self.blocks:
            x = block(x, rotation, attendable)
        return self.norm(x)

    def window(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None = None) -> Tensor:
        rotation, attendable = self._places(valid, columns)
        x = self.embed(ids if columns is None else ids.gather(1, columns), None)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, attendable, partial(kept.update, layer, columns))
        return self.norm(x)

    def _places(self, valid: Tensor, columns: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The rotation of ``columns`` (B, W), or of all, and who may be attended to (B, 1, 1, L), None for all."""
        if bool(valid.all()):
            place = slice(valid.shape[1]) if columns is None else columns
            cos, sin = self.rope_cos[place], self.rope_sin[place]
            return (cos.unsqueeze(-3), sin.unsqueeze(-3)), None
        position = (valid.cumsum(1) - 1).clamp(min=0)
        if columns is not None:
            position = position.gather(1, columns)
        # A row without any valid key would make softmax 0/0; its outputs are never read, so let it see itself.
        attendable = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
        return (self.rope_cos[position][:, None], self.rope_sin[position][:, None]), attendable

    def embed(self, ids: Tensor, t: Tensor | None) -> Tensor:
        """What the first block reads, (B, L, D)."""
        return self.embedding(ids)

    def head(self, features: Tensor) -> Tensor:
        return self.unembedding(features) + self.forbidden_bias

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_model(folder, {"model_type": self.model_type, **dataclasses.asdict(self.config)}, self.own_state())
        self.save_unmask(folder)
        self.tokenizer.save(folder / "tokenizer.json")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder written by `save_pretrained`.

        Raises:
            UserError: a file is missing or broken, or the weights are of another architecture.
        """
        folder = Path(folder)
        settings = read_config(folder)
        settings.pop("model_type", None)
        allowed = {field.name for field in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(settings) - allowed):
            raise UserError(
                f"{folder / 'config.json'}: unknown key {unknown[0]!r} (allowed: {', '.join(sorted(allowed))})"
            )
        try:
            config = cls.config_class(**settings)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from error
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        for token in (MASK, PAD, END, UNKNOWN):
            if token not in tokenizer:
                raise UserError(f"{folder / 'tokenizer.json'}: the vocabulary lacks {token}")
        denoiser = cls(config, tokenizer)
        load_weights(denoiser, folder / "model.safetensors")
        return denoiser


def _rope_table(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    head_dim = config.dim // config.heads
    frequency = config.rope_base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(config.context_length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x (B, heads, L, head_dim), halves convention."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)

"""The tiny denoiser of pointer chasing: response slots look tables up in one layer, one hop of the chain a layer.

A plain transformer would first have to learn which token is the one before and which entry it points at; that takes it
thousands of updates and is not what the claim is about.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.folder import load_weights
from unveil.denoisers.tokenizer import END, MASK, PAD, UNKNOWN, TextTokenizer
from unveil.denoisers.transformer import Block, TransformerConfig


class ChaseDenoiser(MaskedDenoiser):
    """A bidirectional transformer over table entries (place + value) and response slots (token + the one before)."""

    def __init__(self, *, values: int = 8, longest: int = 18, dim: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.tokenizer = TextTokenizer.of_words([str(value) for value in range(values)])
        ids = {token: self.tokenizer.id(token) for token in (MASK, PAD, END, UNKNOWN)}
        self.values = values
        self.spec = DenoiserSpec(
            vocab_size=len(self.tokenizer),
            mask_id=ids[MASK],
            pad_id=ids[PAD],
            end_ids=(ids[END],),
            forbidden_ids=(ids[MASK], ids[PAD], ids[UNKNOWN]),
            context_length=values + 1 + longest,
        )
        words = len(self.tokenizer)
        config = TransformerConfig(dim=dim, layers=layers, heads=4, hidden=2 * dim, context_length=values + longest)
        self.value, self.token = nn.Embedding(words, dim), nn.Embedding(words, dim)
        self.before, self.first = nn.Embedding(words, dim), nn.Embedding(words, dim)
        self.place = nn.Parameter(torch.zeros(values, dim))
        self.slot = nn.Parameter(torch.zeros(longest, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unembedding = nn.Linear(dim, words, bias=False)
        bias = torch.zeros(words)
        bias[list(self.spec.forbidden_ids)] = -torch.inf
        self.register_buffer("forbidden_bias", bias, persistent=False)
        # Places and slots are told apart by their embeddings; the blocks' rotation stays the identity.
        self.register_buffer("cos", torch.ones(1, 1, 1, dim // config.heads), persistent=False)
        self.register_buffer("sin", torch.zeros(1, 1, 1, dim // config.heads), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05, generator=generator)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        if not bool(valid.all()):
            raise ValueError("all canvases have to be of one length")
        table, start, response = ids[:, : self.values], ids[:, self.values, None], ids[:, self.values + 1 :]
        before = torch.cat([self.first(start), self.before(response[:, :-1])], 1)
        slots = self.token(response) + before + self.slot[: response.shape[1]]
        x = torch.cat([self.value(table) + self.place, slots], 1)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin), None)
        x = self.norm(x)
        return torch.cat([x[:, : self.values], torch.zeros_like(x[:, :1]), x[:, self.values :]], 1)

    def head(self, features: Tensor) -> Tensor:
        return self.unembedding(features) + self.forbidden_bias

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.own_state(), folder / "model.safetensors")
        self.save_unmask(folder)

    def load(self, folder: Path) -> ChaseDenoiser:
        load_weights(self, folder / "model.safetensors")
        return self

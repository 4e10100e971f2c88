"""The tiny denoiser of claim checks: response slot i sees prompt token i and response token i as one sum of embeddings.

With prompt and response in slots of their own a small network needs long to learn which prompt token belongs to which
response token; that is not what the claims are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unveil.claims.laboratory import Measured, train_to
from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.folder import load_weights
from unveil.denoisers.tokenizer import END, MASK, PAD, UNKNOWN, TextTokenizer
from unveil.denoisers.transformer import Block, TransformerConfig
from unveil.samplers.masked import MaskedSampler
from unveil.seeds import generator
from unveil.tasks.base import Task
from unveil.tasks.evaluate import evaluate
from unveil.training.denoising_job import DenoisingConfig, MixedTask


class SlotDenoiser(MaskedDenoiser):
    """A bidirectional transformer over response slots.

    Prompt token i lies on slot ``lead`` + i, by default such that the last ones meet; others have none.
    """

    def __init__(
        self,
        *,
        words: int | Sequence[str],
        prompt: int,
        response: int,
        lead: int | None = None,
        ends: bool = False,
        dim: int = 64,
        layers: int = 2,
    ) -> None:
        """``words``: the vocabulary, or how many numbers from 0 it holds; ``ends``: whether responses may end early."""
        super().__init__()
        vocabulary = [str(word) for word in range(words)] if isinstance(words, int) else words
        self.tokenizer = TextTokenizer.of_words(vocabulary)
        self.lead = response - prompt if lead is None else lead
        ids = {token: self.tokenizer.id(token) for token in (MASK, PAD, END, UNKNOWN)}
        forbidden = tuple(index for token, index in ids.items() if not (ends and token == END))
        self.prompt, self.response = prompt, response
        self.spec = DenoiserSpec(
            vocab_size=len(self.tokenizer),
            mask_id=ids[MASK],
            pad_id=ids[PAD],
            end_ids=(ids[END],),
            forbidden_ids=forbidden,
            context_length=prompt + response,
            feature_dim=dim,
        )
        config = TransformerConfig(dim=dim, layers=layers, heads=4, hidden=2 * dim, context_length=response)
        self.prompt_embedding = nn.Embedding(len(self.tokenizer), dim)
        self.response_embedding = nn.Embedding(len(self.tokenizer), dim)
        self.slot_embedding = nn.Parameter(torch.zeros(response, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unembedding = nn.Linear(dim, len(self.tokenizer), bias=False)
        bias = torch.zeros(len(self.tokenizer))
        bias[list(forbidden)] = -torch.inf
        self.register_buffer("forbidden_bias", bias, persistent=False)
        # Slots are told apart by their embeddings; the blocks' rotation stays the identity.
        head_dim = dim // config.heads
        self.register_buffer("cos", torch.ones(1, 1, response, head_dim), persistent=False)
        self.register_buffer("sin", torch.zeros(1, 1, response, head_dim), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05, generator=generator)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        if ids.shape[1] != self.prompt + self.response:
            raise ValueError(f"slots for {self.prompt} + {self.response} tokens, got a canvas of {ids.shape[1]}")
        x = self.response_embedding(ids[:, self.prompt :]) + self.slot_embedding
        around = (0, 0, self.lead, self.response - self.prompt - self.lead)
        x = x + F.pad(self.prompt_embedding(ids[:, : self.prompt]), around)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin), None)
        x = self.norm(x)
        return torch.cat([x.new_zeros(len(x), self.prompt, x.shape[2]), x], 1)

    def head(self, features: Tensor) -> Tensor:
        return self.unembedding(features) + self.forbidden_bias

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.own_state(), Path(folder) / "model.safetensors")
        self.save_unmask(Path(folder))

    def load(self, folder: Path) -> SlotDenoiser:
        load_weights(self, folder / "model.safetensors")
        return self


def train_sums(
    folder: Path, task: Task, prompt: int, response: int, seed: int, *, goal: float, steps: int, problems: int = 400
) -> Measured:
    """Train a network of ``seed`` on a task of sums mod 3 until greedy decoding in ``steps`` steps is right in a share
    ``goal`` of ``problems`` held-out problems; it is written to ``folder``."""
    denoiser = SlotDenoiser(words=3, prompt=prompt, response=response)
    denoiser.initialise(generator(seed, "slots"))
    data = DenoisingConfig(tasks=[MixedTask(task=task)], response_length=response, batch=64)
    held_out = task.problems("test", problems, 1)

    def score() -> float:
        return evaluate(denoiser, task, held_out, MaskedSampler(steps=steps), response_length=response).accuracy

    return train_to(denoiser, data, folder, seed=seed, goal=goal, score=score)

"""4 x 4 Sudoku for claim checks: the response is the blanks alone, and a small network sees the whole grid."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.folder import load_weights
from unveil.denoisers.tokenizer import END, MASK, PAD, UNKNOWN, TextTokenizer
from unveil.denoisers.transformer import Block, TransformerConfig
from unveil.rewards.sudoku import is_valid_grid
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.sudoku import Sudoku

CELLS = 16


@dataclass(kw_only=True)
class Blanks(Sudoku):
    """Prompt: all 16 cells, 0 for empty; response: the digits of the empty ones, in reading order."""

    blanks: int = 10

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [_blanks_only(problem) for problem in super().problems(split, count, seed)]

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Any valid grid is correct; the score is the share of blanks that equal the stored solution."""
        digits = completion.split()
        puzzle, solution = problem.answer["puzzle"], problem.answer["solution"]
        filled = iter(digits)
        grid = "".join(next(filled, "0") if cell == "0" else cell for cell in puzzle)
        correct = len(digits) == self.blanks and is_valid_grid(grid, 4)
        right = sum(ours == theirs and cell == "0" for ours, theirs, cell in zip(grid, solution, puzzle, strict=True))
        return Verdict(correct=correct, score=1.0 if correct else min(right, self.blanks - 1) / self.blanks)

    def held_out(self, count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
        """About ``count`` problems for validation and for the test together; no solution grid is in both."""
        drawn = self.problems("test", count, seed)
        odd = [zlib.crc32(problem.answer["solution"].encode()) // 10 % 2 == 1 for problem in drawn]
        pairs = list(zip(drawn, odd, strict=True))
        return [problem for problem, is_odd in pairs if is_odd], [problem for problem, is_odd in pairs if not is_odd]


class GridDenoiser(MaskedDenoiser):
    """A bidirectional transformer over the 16 cells; the response's tokens stand in the empty cells of the prompt."""

    def __init__(self, *, blanks: int = 10, dim: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokenizer = TextTokenizer.of_words(list("01234"))
        ids = {token: self.tokenizer.id(token) for token in (MASK, PAD, END, UNKNOWN, "0")}
        self.empty_id = ids["0"]
        self.spec = DenoiserSpec(
            vocab_size=len(self.tokenizer),
            mask_id=ids[MASK],
            pad_id=ids[PAD],
            end_ids=(ids[END],),
            forbidden_ids=tuple(ids.values()),
            context_length=CELLS + blanks,
            feature_dim=dim,
        )
        config = TransformerConfig(dim=dim, layers=layers, heads=4, hidden=2 * dim, context_length=CELLS)
        self.embedding = nn.Embedding(len(self.tokenizer), dim)
        self.cell_embedding = nn.Parameter(torch.zeros(CELLS, dim))
        self.empty_embedding = nn.Embedding(2, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.unembedding = nn.Linear(dim, len(self.tokenizer), bias=False)
        bias = torch.zeros(len(self.tokenizer))
        bias[list(ids.values())] = -torch.inf
        self.register_buffer("forbidden_bias", bias, persistent=False)
        # Cells are told apart by their embeddings; the blocks' rotation stays the identity.
        head_dim = dim // config.heads
        self.register_buffer("cos", torch.ones(1, 1, CELLS, head_dim), persistent=False)
        self.register_buffer("sin", torch.zeros(1, 1, CELLS, head_dim), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05, generator=generator)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        empty, response = ids[:, :CELLS] == self.empty_id, ids[:, CELLS:]
        x = self.embed(ids, t)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin), None)
        x = self.norm(x)
        return torch.cat([torch.zeros_like(x), x[empty].view(len(ids), response.shape[1], -1)], 1)

    def embed(self, ids: Tensor, t: Tensor | None) -> Tensor:
        """What the first block reads of the cells, (B, CELLS, D)."""
        puzzle = ids[:, :CELLS]
        empty = puzzle == self.empty_id
        cells = puzzle.masked_scatter(empty, ids[:, CELLS:])
        return self.embedding(cells) + self.cell_embedding + self.empty_embedding(empty.long())

    def head(self, features: Tensor) -> Tensor:
        return self.unembedding(features) + self.forbidden_bias

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.own_state(), Path(folder) / "model.safetensors")
        self.save_unmask(Path(folder))

    def load(self, folder: Path) -> GridDenoiser:
        load_weights(self, folder / "model.safetensors")
        return self


def _blanks_only(problem: Problem) -> Problem:
    pairs = zip(problem.answer["puzzle"], problem.answer["solution"], strict=True)
    solution = " ".join(digit for cell, digit in pairs if cell == "0")
    return Problem(id=problem.id, prompt=problem.prompt, answer=problem.answer, solution=solution)

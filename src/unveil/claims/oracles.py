"""Distributions small enough to know everything about, as denoisers that answer with the exact posterior.

A sampler that is put on them has no error but its own. At visible positions they answer with the posterior given all
*other* tokens (a leave-one-out prediction), or, with ``carry_over``, with the token itself.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.tokenizer import END, MASK, PAD, UNKNOWN, TextTokenizer

FIRST = 4
"""Id of word 0: the special tokens stand before the words."""


class Oracle(MaskedDenoiser):
    """Exact posteriors of x_0 over ``words`` words and ``length`` positions, on canvases without prompts."""

    def __init__(self, words: int, length: int, carry_over: bool = False) -> None:
        super().__init__()
        self.words, self.length, self.carry_over = words, length, carry_over
        self.tokenizer = TextTokenizer.of_words([str(word) for word in range(words)])
        ids = {token: self.tokenizer.id(token) for token in (MASK, PAD, END, UNKNOWN)}
        self.spec = DenoiserSpec(
            vocab_size=len(self.tokenizer), mask_id=ids[MASK], pad_id=ids[PAD], end_ids=(ids[END],),
            forbidden_ids=tuple(ids.values()), context_length=length,
        )  # fmt: skip

    def posterior(self, words: Tensor, masked: Tensor) -> Tensor:
        """p(x_l | all visible tokens but l), (B, L, words) float64, of ``words`` (B, L) where not ``masked`` (B, L)."""
        raise NotImplementedError

    def log_prob(self, words: Tensor) -> Tensor:
        """(B,) exact log-probability in nats of whole sequences (B, L) of words 0 .. words - 1."""
        raise NotImplementedError

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        masked = ids == self.spec.mask_id
        words = (ids - FIRST).clamp(min=0)
        answer = self.posterior(words, masked)
        if self.carry_over:
            given = functional.one_hot(words, self.words).double()
            answer = torch.where(masked[..., None], answer, given)
        return answer

    def head(self, features: Tensor) -> Tensor:
        return functional.pad(features.log(), (FIRST, 0), value=-torch.inf)

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError("an oracle has nothing to save")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class JointTable(Oracle):
    """A random joint distribution of words^length outcomes; ``sharpness`` 0 is uniform."""

    def __init__(self, words: int, length: int, generator: torch.Generator, sharpness: float = 1.5) -> None:
        super().__init__(words, length)
        table = sharpness * torch.randn(words**length, generator=generator, dtype=torch.float64)
        self.table = table.softmax(0)
        """Probability of the outcome x at index sum_l x_l words^(length - 1 - l)."""
        # Every canvas, the digit `words` standing for a mask.
        canvases = torch.tensor(list(itertools.product(range(words + 1), repeat=length)))
        outcomes = torch.tensor(list(itertools.product(range(words), repeat=length)))
        agrees = (canvases[:, None] == outcomes) | (canvases[:, None] == words)
        answers = []
        for place in range(length):
            rest = agrees[..., torch.arange(length) != place].all(-1).double() * self.table
            answers.append(rest @ functional.one_hot(outcomes[:, place], words).double())
        answer = torch.stack(answers, 1)
        self.answers = answer / answer.sum(-1, keepdim=True)

    def index(self, words: Tensor, base: int) -> Tensor:
        return (words * base ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def posterior(self, words: Tensor, masked: Tensor) -> Tensor:
        return self.answers[self.index(torch.where(masked, self.words, words), self.words + 1)]

    def log_prob(self, words: Tensor) -> Tensor:
        return self.table[self.index(words, self.words)].log()


class MarkovChain(Oracle):
    """A random stationary first-order chain; the posterior comes from the forward-backward recursion."""

    def __init__(
        self, words: int, length: int, generator: torch.Generator, sharpness: float = 2.0, carry_over: bool = False
    ) -> None:
        super().__init__(words, length, carry_over)
        logits = sharpness * torch.randn(words, words, generator=generator, dtype=torch.float64)
        self.transition = logits.softmax(-1)
        start = torch.full((words,), 1 / words, dtype=torch.float64)
        for _ in range(1000):
            start = start @ self.transition
        self.start = start

    @property
    def entropy_rate(self) -> float:
        """Nats per token in the long run."""
        return float((self.start[:, None] * torch.special.entr(self.transition)).sum())

    @property
    def pairs(self) -> Tensor:
        """(words, words) probability of two neighbours."""
        return self.start[:, None] * self.transition

    def posterior(self, words: Tensor, masked: Tensor) -> Tensor:
        seen = functional.one_hot(words, self.words).double().masked_fill(masked[..., None], 1.0)
        before, ahead = [self.start.expand(len(words), -1)], [torch.ones(len(words), self.words, dtype=torch.float64)]
        for place in range(self.length - 1):
            message = before[-1] * seen[:, place] / (before[-1] * seen[:, place]).sum(-1, keepdim=True)
            before.append(message @ self.transition)
        for place in range(self.length - 1, 0, -1):
            message = (ahead[-1] * seen[:, place]) @ self.transition.T
            ahead.append(message / message.sum(-1, keepdim=True))
        answer = torch.stack(before, 1) * torch.stack(ahead[::-1], 1)
        return answer / answer.sum(-1, keepdim=True)

    def log_prob(self, words: Tensor) -> Tensor:
        steps = self.transition.log()[words[:, :-1], words[:, 1:]].sum(1)
        return self.start.log()[words[:, 0]] + steps

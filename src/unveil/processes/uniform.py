"""The uniform process: corruption by random tokens instead of masks, and its reverse step (D3PM-uniform).

Linear schedule alpha_t = 1 - t; K tokens. At time t each token has been replaced, with probability t, by one drawn
uniformly from all K (itself included).

    corrupt:  q(x_t | x_0) = alpha_t [x_t = x_0] + (1 - alpha_t) / K
    reverse:  p(x_s | x_t) = sum_x0 mu(x_0) q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0),   mu = softmax(logits)
              with q(x_t | x_s) = a [x_t = x_s] + (1 - a) / K,  a = alpha_t / alpha_s

q(x_t | x_0) takes two values only, so the sum over x_0 is closed and costs one pass over the vocabulary. No state is
absorbing: every position may change at every step, and nothing but the time says how noisy a canvas is.

Sources: D3PM (arXiv 2107.03006), uniform diffusion language models (2412.10193).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.processes.masked import sample_categorical, temper


@dataclass(frozen=True, kw_only=True)
class UniformProcess:
    """The uniform process over ``vocab_size`` tokens."""

    vocab_size: int
    """K; noise is drawn from all of them, also from those that are never an answer."""

    def noise(self, u: Tensor) -> Tensor:
        """Tokens uniform over the vocabulary from ``u``, float64 in [0, 1)."""
        return (u * self.vocab_size).long().clamp(max=self.vocab_size - 1)

    def corrupt(self, x_0: Tensor, t: Tensor, *, u: Tensor, u_token: Tensor, maskable: Tensor) -> Tensor:
        """x_t (B, L): each ``maskable (B, L)`` position becomes a random token where ``u (B, L)`` < ``t (B,)``."""
        return torch.where(maskable & (u < t[:, None]), self.noise(u_token), x_0)

    def step(self, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, temperature: float = 1.0) -> UniformTransition:
        """The reverse transition from t to s < t of N positions, given ``logits (N, V)`` of x_0 at ``x_t (N,)``.

        Args:
            t, s: times (N,), 0 <= s < t <= 1.
            temperature: of the guess of x_0.

        Raises:
            ValueError: the times are not ordered so, or the temperature is negative.
        """
        if not ((s >= 0) & (s < t) & (t <= 1)).all():
            raise ValueError(f"a step needs 0 <= s < t <= 1, got t = {t.tolist()}, s = {s.tolist()}")
        size, here = self.vocab_size, x_t[:, None]
        keep_t, keep_s = 1 - t.double(), 1 - s.double()
        link = keep_t / keep_s
        guess = temper(logits, temperature).float().softmax(-1)
        same = guess.gather(-1, here)[:, 0].double()
        others = guess.scatter(-1, here, 0.0)
        other = others.sum(-1, dtype=torch.float64)  # 1 - same without its cancellation
        seen_same, seen_other = keep_t + (1 - keep_t) / size, (1 - keep_t) / size  # q(x_t | x_0)
        spread = (1 - keep_s) / size * (same / seen_same + other / seen_other)
        weights = others * (keep_s / seen_other).float()[:, None] + spread.float()[:, None]
        drift = (1 - link) / size * (keep_s * other / seen_other + (size - 1) * spread)
        stay = (link + (1 - link) / size) * (keep_s * same / seen_same + spread)
        total = drift + stay  # 1 but for the rounding of the softmax
        return UniformTransition(x_t=x_t, weights=weights.scatter(-1, here, 0.0), move=drift / total, stay=stay / total)


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformTransition:
    """The distribution of x_s given x_t at N positions; it samples and it scores.

    Attributes:
        x_t: the tokens (N,).
        weights: unnormalised probabilities (N, V) float32 of the tokens that a position may move to; 0 at x_t.
        move: probability that the token changes (N,), float64.
        stay: probability that it does not (N,), float64.
    """

    x_t: Tensor
    weights: Tensor
    move: Tensor
    stay: Tensor

    def sample(self, u_move: Tensor, u_token: Tensor) -> Tensor:
        """x_s (N,) from two float64 uniforms (N,): first which positions change, then to what.

        Two draws, since in a fine step nearly all the mass is on the token that is there.

        Raises:
            ValueError: noise that is not float64 or leaves [0, 1), or logits that are no distribution.
        """
        moves = u_move < self.move
        tokens = sample_categorical(self.weights[moves].log(), u_token[moves])
        return self.x_t.masked_scatter(moves, tokens.to(self.x_t.dtype))

    def log_prob(self, x_s: Tensor) -> Tensor:
        """log p(x_s | x_t) (N,) float32."""
        moves = x_s != self.x_t
        weights, target = self.weights[moves], x_s[moves]
        token = weights.gather(-1, target[:, None])[:, 0].log() - weights.sum(-1).log()
        # The logarithms are taken after the choice: that of a probability 0 which nobody asks for has no gradient.
        scored = self.weights.new_empty(len(x_s))
        scored = scored.masked_scatter(moves, self.move[moves].log().float() + token)
        return scored.masked_scatter(~moves, self.stay[~moves].log().float())

    def entropy(self) -> Tensor:
        """Entropy of x_s given x_t (N,) float32 in nats."""
        choice = torch.special.entr(self.move) + torch.special.entr(self.stay)
        share = self.weights / self.weights.sum(-1, keepdim=True).clamp(min=1e-38)
        return choice.float() + self.move.float() * torch.special.entr(share).sum(-1)

    def probs(self) -> Tensor:
        """The whole distribution p(x_s | x_t) (N, V), float64; for small vocabularies."""
        weights = self.weights.double()
        result = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) * self.move[:, None]
        return result.scatter(-1, self.x_t[:, None], self.stay[:, None])

"""The absorbing-state ("masked") process: corruption, loss weights, the reverse step, categorical sampling.

Linear schedule alpha_t = 1 - t throughout: at time t each token is masked with probability t, independently.

    corrupt:  q(x_t | x_0) = t [x_t = mask] + (1 - t) [x_t = x_0]
    reverse:  p(x_s | x_t = mask) = s/t [x_s = mask] + (t - s)/t softmax(logits)[x_s];  the rest is copied
    NELBO:    E_t[ 1/t sum_masked CE ] = E_n[ L/n sum_masked CE ],  n ~ U{1..L} masks in a uniform n-subset

Sources: MDLM (arXiv 2406.07524), LLaDA (2502.09992), 2409.02908 (the n-form is any-order autoregression).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 2**24
"""Logits cast to float32 or float64 at a time: 132 rows of a vocabulary of 126k, 128 MiB in float64."""


def row_chunks(logits: Tensor) -> tuple[Tensor, ...]:
    """Views of ``logits (N, V)`` along N, small enough to be cast up one after the other; no row is cut."""
    return logits.split(max(1, _CHUNK_ELEMENTS // logits.shape[-1]))


def integer_weights(logits: Tensor) -> Tensor:
    """Unnormalised probabilities as whole numbers: round(2^k exp(logits - row maximum)), int64 (N, V).

    Sums of integers do not depend on their order, so a cumulative sum is the same in every batch shape, and
    a token of weight zero never widens it; a parallel scan of floats promises neither. The arithmetic before
    the rounding is float64. k = 62 - bits(V), 45 for V = 126k: a token below 1e-14 of the likeliest gets 0.

    Raises:
        ValueError: a row is all -inf, or holds a nan or +inf.
    """
    top = logits.amax(-1, keepdim=True).double()
    if not torch.isfinite(top).all():
        row = int((~torch.isfinite(top[:, 0])).nonzero()[0])
        raise ValueError(f"row {row} of the logits is no distribution: all are -inf, or one is nan or +inf")
    scale = 2.0 ** (62 - logits.shape[-1].bit_length())
    return (logits.double() - top).exp_().mul_(scale).round_().long()


def sample_categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (N,) drawn from softmax(logits (N, V)) by inverting the cumulative distribution at ``u (N,)``.

    The token is the first whose cumulative probability exceeds u. Each row depends on its own u and logits
    alone. For a temperature pass ``logits.float() / temperature``, the numbers that `token_log_prob` scores.

    Args:
        u: uniform noise in [0, 1), float64: float32 noise is a multiple of 2^-24 and cuts off rare tokens.

    Raises:
        ValueError: u is not float64 or leaves [0, 1), or a row of logits is no distribution.
    """
    _check_uniform(u)
    parts, drawn = row_chunks(logits), []
    for part, u_part in zip(parts, u.split([len(part) for part in parts]), strict=True):
        cumulative = integer_weights(part).cumsum(-1)
        total = cumulative[:, -1]
        target = torch.minimum((u_part * total).long(), total - 1)
        drawn.append(torch.searchsorted(cumulative, target[:, None], right=True)[:, 0])
    return torch.cat(drawn)


def token_log_prob(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits (N, V) / temperature)[tokens (N,)], (N,) float32 whatever the logits' dtype.

    The one function behind every token log-probability, recorded while sampling or scored later, so that an
    on-policy ratio is exactly 1. Large inputs are cast in chunks of rows and recomputed in the backward pass.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    parts, scored = row_chunks(logits), []
    recompute = len(parts) > 1 and logits.requires_grad and torch.is_grad_enabled()
    for part, token in zip(parts, tokens.split([len(part) for part in parts]), strict=True):
        row = (part, token, temperature)
        if recompute:
            scored.append(checkpoint(_rows_log_prob, *row, use_reentrant=False, preserve_rng_state=False))
        else:
            scored.append(_rows_log_prob(*row))
    return torch.cat(scored)


def stratified_times(batch: int, *, generator: torch.Generator, low: float = 1e-3) -> Tensor:
    """Low-discrepancy times t (batch,) float32 in [low, 1]: low + (1 - low) (i + u_i) / batch, then shuffled.

    One uniform per stratum keeps the 1/t weights of a batch in balance (MDLM). The shuffle makes every t_i
    uniform by itself, so that the place of a sample within its batch does not bias its loss.
    ``low`` bounds the weight 1/t; the NELBO estimate then leaves out the times below it.
    """
    device = generator.device
    u = torch.rand(batch, dtype=torch.float64, generator=generator, device=device)
    order = torch.randperm(batch, generator=generator, device=device)
    return (low + (1 - low) * (order + u) / batch).float()


def hitting_times(u: Tensor, holes: Tensor, start: float | Tensor = 1.0) -> Tensor:
    """When the reverse process reveals its next tokens, in closed form (arXiv 2409.02908, Algorithm 1); (B, W) float64.

    Column j is tau_{n-j-1} = tau_{n-j} u^(1/(n-j)), the time at which the (j+1)-th of n tokens is revealed: the largest
    of n - j uniforms below the time before. No prediction of the network enters. For a schedule other than
    alpha_t = 1 - t these are the values of 1 - alpha; its inverse gives the times.

    Args:
        u: (B, W) float64 uniforms in [0, 1).
        holes: (B,) n, the masked positions of each row; columns from n on are 0.
        start: the time (B,) or one for all at which a row has its n holes.
    """
    _check_uniform(u)
    left = holes[:, None] - torch.arange(u.shape[1], device=u.device)
    shrink = torch.where(left > 0, u ** (1 / left.clamp(min=1)), 0.0)
    return shrink.cumprod(1) * torch.as_tensor(start, dtype=torch.float64, device=u.device).reshape(-1, 1)


@dataclass(frozen=True, kw_only=True)
class MaskedProcess:
    """The masked process over a vocabulary that contains ``mask_id`` as its absorbing state."""

    mask_id: int
    """The token id that stands for "masked"; its logit is ignored."""

    def corrupt(self, x_0: Tensor, t: Tensor, *, u: Tensor, maskable: Tensor) -> Tensor:
        """x_t (B, L): each ``maskable (B, L)`` position is masked where ``u (B, L)`` < ``t (B,)``."""
        return torch.where(maskable & (u < t[:, None]), self.mask_id, x_0)

    def corrupt_exact(self, x_0: Tensor, n: Tensor, *, u: Tensor, maskable: Tensor) -> Tensor:
        """x_t (B, L) with exactly ``n (B,)`` masks, at the ``maskable`` positions of smallest ``u`` (B, L).

        Every n-subset is equally likely. Equal u are taken from left to right.

        Raises:
            ValueError: a row has fewer than n maskable positions, or n is negative.
        """
        available = maskable.sum(-1)
        if not ((n >= 0) & (n <= available)).all():
            row = int(((n < 0) | (n > available)).nonzero()[0])
            raise ValueError(f"row {row}: n is {int(n[row])}, of {int(available[row])} maskable positions")
        order = u.masked_fill(~maskable, torch.inf).argsort(dim=-1, stable=True)
        places = torch.arange(u.shape[-1], device=u.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        return torch.where(rank < n[:, None], self.mask_id, x_0)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """1/t (B,), the weight of a canvas from `corrupt`.

        weight * (sum over masked positions of the cross-entropy), with t ~ U(0, 1), is an unbiased estimate
        of the NELBO in nats for the whole sequence (MDLM). Dividing by a length is left to the caller.
        """
        return 1 / t

    def elbo_weight_exact(self, n: Tensor, maskable: Tensor) -> Tensor:
        """L/n (B,) float32, L the number of ``maskable (B, L)`` positions, for a canvas from `corrupt_exact`.

        weight * (sum over masked positions of the cross-entropy), with n ~ U{1..L}, is an unbiased estimate
        of the NELBO in nats for the whole sequence; it varies less than with 1/t (LLaDA).

        Raises:
            ValueError: n < 1 somewhere: an unmasked canvas has no weight.
        """
        if not (n >= 1).all():
            raise ValueError(f"the exact weight needs n >= 1, got {int(n.min())}")
        return maskable.sum(-1).float() / n

    def step(self, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, temperature: float = 1.0) -> MaskedTransition:
        """The reverse transition from t to s < t, given ``logits (B, ..., V)`` of x_0 at ``x_t (B, ...)``.

        Args:
            t, s: times (B,), 0 <= s < t <= 1; float64 where t - s is tiny.
            temperature: of the revealed tokens; how many are revealed does not depend on it.

        Raises:
            ValueError: the times are not ordered so, or the temperature is negative.
        """
        masked = x_t == self.mask_id
        t, s = masked_times(masked, t, s)
        rows = temper(unmasked_logits(logits, masked, self.mask_id), temperature)
        return MaskedTransition(x_t=x_t, masked=masked, logits=rows, move=(t - s) / t, stay=s / t, mask_id=self.mask_id)


def masked_times(masked: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The times t and s (B,) of each of the N positions that are ``masked (B, ...)``, (N,) float64 each.

    Raises:
        ValueError: they do not satisfy 0 <= s < t <= 1.
    """
    if not ((s >= 0) & (s < t) & (t <= 1)).all():
        raise ValueError(f"a step needs 0 <= s < t <= 1, got t = {t.tolist()}, s = {s.tolist()}")
    shape = (-1, *[1] * (masked.dim() - 1))
    t, s = (time.double().reshape(shape).expand_as(masked)[masked] for time in (t, s))
    return t, s


def unmasked_logits(logits: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Logits (N, V) of the ``masked (B, ...)`` positions in row-major order, the mask class at -inf."""
    rows = logits[masked]
    rows[:, mask_id] = -torch.inf
    return rows


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N, V) of softmax(logits / temperature); at temperature 0 all mass is on the likeliest token.

    Raises:
        ValueError: the temperature is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        best = functional.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        return torch.zeros_like(logits).masked_fill(~best, -torch.inf)
    return logits if temperature == 1 else logits.float() / temperature


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedTransition:
    """The distribution of x_s given x_t, independent over positions; it samples and it scores.

    Attributes:
        x_t: the canvas (B, ...).
        masked: where x_t is masked (B, ...).
        logits: those of the N masked positions in row-major order (N, V), the mask class at -inf.
        move: probability that a masked position is revealed (N,), float64; may depend on the network.
        stay: probability that it stays masked (N,), float64.
        mask_id: the token id that stands for "masked".
    """

    x_t: Tensor
    masked: Tensor
    logits: Tensor
    move: Tensor
    stay: Tensor
    mask_id: int

    def sample(self, u_move: Tensor, u_token: Tensor) -> Tensor:
        """x_s (B, ...) from two float64 uniforms of its shape: first which positions move, then which tokens.

        Two draws, since in a fine step the mask class has probability near 1: one draw over all classes would
        push the tokens below the resolution of the noise (arXiv 2409.02908).

        Raises:
            ValueError: noise that is not float64 or leaves [0, 1), or logits that are no distribution.
        """
        _check_uniform(u_move)
        moves = u_move[self.masked] < self.move
        moved = self.masked.masked_scatter(self.masked, moves)
        tokens = sample_categorical(self.logits[moves], u_token[moved])
        return self.x_t.masked_scatter(moved, tokens.to(self.x_t.dtype))

    def log_prob(self, x_s: Tensor) -> Tensor:
        """log p(x_s | x_t) per position, (B, ...) float32: 0 for a copied token, -inf if impossible."""
        target = x_s[self.masked]
        stays = target == self.mask_id
        tokens = token_log_prob(self.logits[~stays], target[~stays])
        scored = self.logits.new_empty(len(target), dtype=torch.float32)
        # The logarithms are taken after the choice: that of a probability 0 which nobody asks for has no gradient.
        scored = scored.masked_scatter(~stays, tokens + self.move[~stays].log().float())
        scored = scored.masked_scatter(stays, self.stay[stays].log().float())
        result = torch.where(x_s == self.x_t, 0.0, -torch.inf)
        return result.masked_scatter(self.masked, scored)

    def entropy(self) -> Tensor:
        """Entropy of x_s given x_t per position, (B, ...) float32 in nats; 0 where a token is copied."""
        tokens = torch.special.entr(self.logits.float().softmax(-1)).sum(-1)
        choice = torch.special.entr(self.move) + torch.special.entr(self.stay)
        both = choice.float() + self.move.float() * tokens
        return torch.zeros(self.x_t.shape, device=self.x_t.device).masked_scatter(self.masked, both)

    def probs(self) -> Tensor:
        """The whole distribution p(x_s | x_t) (B, ..., V), float64; for small vocabularies."""
        result = functional.one_hot(self.x_t, self.logits.shape[-1]).double()
        revealed = self.logits.double().softmax(-1) * self.move[:, None]
        revealed[:, self.mask_id] = self.stay
        result[self.masked] = revealed
        return result


def _check_uniform(u: Tensor) -> None:
    if u.dtype != torch.float64 or not ((u >= 0) & (u < 1)).all():
        raise ValueError(f"the noise must be float64 in [0, 1), got {u.dtype} or a value outside")


def _rows_log_prob(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return -functional.cross_entropy(logits.float() / temperature, tokens, reduction="none")

"""The absorbing process in its score form (SEDD): noise schedules, the score-entropy loss, Tweedie and Euler steps.

A network estimates the ratios s_y(x_t, t) = p_t(x_t with y at a masked position) / p_t(x_t). With total noise
sigma(t), alpha = e^-sigma and r = 1 / (e^sigma - 1) = alpha / (1 - alpha) the true score is r * p(x_0 = y | x_t), so

    mu = s / sum(s)        the distribution of x_0 that the masked process uses,
    sum(s) = r             only if the network is calibrated; nothing enforces it.

    loss:     sigma' * [ sum_y s_y - r log s_{x_0} + r (log r - 1) ] at masked positions
              = w * [ -log mu_{x_0} + (S - 1 - log S) ],  S = sum(s) / r,  w = sigma' r  (1/t for log-linear noise):
              the NELBO and, on top, what a wrong sum costs
    reverse:  p(x_s = y | x_t = mask) = c s_y and the rest stays, where c = e^(sigma_t - sigma_s) - 1 (Tweedie) or
              (t - s) sigma'(t) (Euler, tau-leaping). Both are the same number under log-linear noise.

Sources: Lou et al. 2023 (arXiv 2310.16834), Sahoo et al. 2024 (2406.07524).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unveil.processes.masked import MaskedProcess, MaskedTransition, masked_times, temper, unmasked_logits

Method = Literal["tweedie", "euler"]


class Noise:
    """Total noise sigma(t) and its rate; at time t a token is masked with probability 1 - exp(-sigma(t))."""

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t in [0, 1], float64."""
        raise NotImplementedError

    def rate(self, t: Tensor) -> Tensor:
        """sigma'(t), float64."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LogLinear(Noise):
    """sigma = -log(1 - (1 - eps) t): tokens are masked with probability (1 - eps) t."""

    eps: float = 1e-3
    """Probability that a token is still there at t = 1; keeps sigma finite."""

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t.double())

    def rate(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / (1 - (1 - self.eps) * t.double())


@dataclass(frozen=True, kw_only=True)
class Geometric(Noise):
    """sigma = low^(1 - t) * high^t."""

    low: float = 1e-3
    """sigma(0)."""
    high: float = 10.0
    """sigma(1)."""

    def sigma(self, t: Tensor) -> Tensor:
        return self.low ** (1 - t.double()) * self.high ** t.double()

    def rate(self, t: Tensor) -> Tensor:
        return self.sigma(t) * torch.tensor(self.high / self.low, dtype=torch.float64).log()


@dataclass(frozen=True, kw_only=True)
class ScoreEntropyProcess:
    """The absorbing process over a vocabulary that contains ``mask_id``, for networks that answer with log-scores."""

    mask_id: int
    """The token id that stands for "masked"; its log-score is ignored."""
    noise: Noise = field(default_factory=LogLinear)
    """How much is masked at which time."""
    method: Method = "tweedie"
    """How the reverse rates are integrated over a step."""
    floor: float = 1e-6
    """Probability of staying masked that no step goes below (the last one, to s = 0, does): a score whose sum is too
    large would otherwise make it 0 or negative, and the log-probability of a recorded stay infinite."""

    def corrupt(self, x_0: Tensor, t: Tensor, *, u: Tensor, maskable: Tensor) -> Tensor:
        """x_t (B, L): each ``maskable (B, L)`` position is masked where ``u (B, L)`` < 1 - exp(-sigma(t (B,)))."""
        chance = -torch.expm1(-self.noise.sigma(t)).to(u.dtype)
        return MaskedProcess(mask_id=self.mask_id).corrupt(x_0, chance, u=u, maskable=maskable)

    def score_scale(self, t: Tensor) -> Tensor:
        """log r = -log(exp(sigma(t)) - 1), the logarithm of the true score's sum at times t, float64."""
        return -torch.expm1(self.noise.sigma(t)).log()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """sigma' r (B,) float32, the weight of a canvas from `corrupt`: 1/t under log-linear noise."""
        return (self.noise.rate(t) * self.score_scale(t).exp()).float()

    def loss(self, log_score: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Score entropy of N masked positions in units of r, (N,) float32: -log mu_{x_0} + (S - 1 - log S), S = sum/r.

        `elbo_weight` times this is sigma' times the score entropy. With t ~ U(0, 1) its sum over the masked positions
        estimates the NELBO in nats for the whole sequence, from above where S is not 1.

        Args:
            log_score: (N, V), -inf at tokens that cannot be.
            x_0: (N,) the true tokens.
            t: (N,) the time of each position's canvas.
        """
        rows = log_score.float() - self.score_scale(t).float()[:, None]
        rows[:, self.mask_id] = -torch.inf
        return rows.exp().sum(-1) - rows.gather(-1, x_0[:, None])[:, 0] - 1

    def step(self, log_score: Tensor, x_t: Tensor, t: Tensor, s: Tensor, temperature: float = 1.0) -> MaskedTransition:
        """The reverse transition from t to s < t, given ``log_score (B, ..., V)`` at ``x_t (B, ...)``.

        A masked position moves with probability min(c sum(s), 1 - floor), then to y with probability s_y / sum(s). At
        s = 0 it always moves (SEDD's last step drops the mask class). Differentiable in the score: the network also
        learns when tokens appear.

        Args:
            t, s: times (B,), 0 <= s < t <= 1.
            temperature: of the revealed tokens; when they appear does not depend on it.

        Raises:
            ValueError: the times are not ordered so, or the temperature is negative.
        """
        masked = x_t == self.mask_id
        t, s = masked_times(masked, t, s)
        rows = unmasked_logits(log_score, masked, self.mask_id)
        if self.method == "euler":
            factor = (t - s) * self.noise.rate(t)
        else:
            factor = torch.expm1(self.noise.sigma(t) - self.noise.sigma(s))
        chance = (rows.double().logsumexp(-1) + factor.log()).exp().clamp(max=1 - self.floor)
        move = torch.where(s == 0, 1.0, chance)
        return MaskedTransition(
            x_t=x_t, masked=masked, logits=temper(rows, temperature), move=move, stay=1 - move, mask_id=self.mask_id
        )

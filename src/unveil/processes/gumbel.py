"""What a sampler by Gumbel-max really draws when its noise cannot exceed a ceiling, in closed form.

argmax_k (log pi_k + g_k) draws class k with probability pi_k if the g_k are Gumbel. Computed as -log(-log u) from a
uniform u of p bits they never exceed M = -log(-log(1 - 2^-p)): 16.64 in float32, 36.74 in float64. With S_i the sum of
pi_k over k >= i, classes sorted so that pi_1 <= ... <= pi_K, and pi_0 = 0 (arXiv 2409.02908),

    P(n)    = pi_n * sum_{i <= n} beta(i)
    beta(i) = [ exp((K+1-i - S_i/pi_i) e^-M) - exp((K+1-i - S_i/pi_{i-1}) e^-M) ] / S_i     second term 0 for i = 1

Rare classes lose mass to frequent ones. In a fine ancestral step drawn at once the mask class has probability near 1
and every token is rare: tokens lose entropy (a temperature below 1), and a position with a flat distribution is
unmasked later than a peaked one, or never. Drawing first whether a position moves and then its token, or choosing
positions first as the first-hitting sampler does, keeps the mask class out of the competition.

The form conditions on noise below M. On a real lattice of 2^-p the last value also stands for all that lies above it: a
token of probability pi against a mask class near 1 keeps c / (e^c - 1) of it, c = 2^-p / pi, which is somewhat more.
`trial` measures what a sampler really does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNIFORM_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""u of ``torch.rand`` is a multiple of 2^-bits."""


def ceiling(dtype: str) -> float:
    """M, the largest Gumbel number that noise of this dtype can give.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in UNIFORM_BITS:
        raise ValueError(f"dtype {dtype!r} is unknown (allowed: {', '.join(sorted(UNIFORM_BITS))})")
    return -math.log(-math.log1p(-(2.0 ** -UNIFORM_BITS[dtype])))


def truncated(probs: Tensor, maximum: float) -> Tensor:
    """The probabilities (..., K) that Gumbel-max draws classes with, noise conditioned on <= ``maximum``; float64.

    Args:
        probs: (..., K) true probabilities, normalised here; zeros stay zero.
    """
    pi = probs.double()
    pi = pi / pi.sum(-1, keepdim=True)
    ranked, order = pi.sort(dim=-1)
    small = math.exp(-maximum)
    place = torch.arange(pi.shape[-1], device=pi.device)
    competing = (ranked > 0).sum(-1, keepdim=True)
    # K + 1 - i among the classes that can win at all: those of probability zero never compete.
    rivals = (pi.shape[-1] - place).minimum(competing).double()
    tail = ranked.flip(-1).cumsum(-1).flip(-1)
    below = torch.cat([torch.zeros_like(ranked[..., :1]), ranked[..., :-1]], -1)
    upper = ((rivals - tail / ranked) * small).exp()
    # exp(a) - exp(b) as -exp(a) expm1(b - a): the two are equal to many digits where neighbours are.
    gap = -torch.expm1((tail / ranked - tail / below) * small)
    beta = torch.where(ranked > 0, upper * gap / tail, 0.0)
    drawn = torch.where(ranked > 0, ranked * beta.cumsum(-1), 0.0)
    return torch.empty_like(drawn).scatter_(-1, order, drawn)


def entropy(probs: Tensor) -> Tensor:
    """-sum p log p in nats, (...) float64, of probabilities (..., K) that are normalised here."""
    p = probs.double()
    return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)


def effective_temperature(probs: Tensor, target: float) -> float:
    """The temperature T at which softmax(log probs (K,) / T) has the entropy ``target`` in nats, by bisection.

    Entropy rises with T from that of the ties at the top to log of the number of possible classes; a target outside
    gives 0 or inf. A flat distribution has one entropy at all temperatures: 1.
    """
    logs = probs.double().clamp(min=0).log()

    def reached(temperature: float) -> float:
        return float(entropy((logs / temperature).softmax(-1)))

    if abs(reached(1.0) - target) < 1e-12:
        return 1.0
    low, high = -9.0, 9.0
    if reached(math.exp(low)) >= target:
        return 0.0
    if reached(math.exp(high)) <= target:
        return math.inf
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(math.exp(middle)) < target else (low, middle)
    return math.exp((low + high) / 2)


Method = Literal["one-draw", "position-first"]


@dataclass(frozen=True, kw_only=True)
class Bias:
    """One masked position under one way of drawing.

    Attributes:
        unmask, unmask_exact: probability that the step reveals the position, as drawn and as it should be.
        entropy, entropy_exact: of the token that is revealed, in nats.
        temperature: that of the true token distribution at which it has the drawn one's entropy.
        distance: total variation between the drawn and the true token distribution.
    """

    unmask: float
    unmask_exact: float
    entropy: float
    entropy_exact: float
    temperature: float
    distance: float

    @property
    def biased(self) -> bool:
        """Off by more than 1 % in the unmasking probability, or at more than 1 % of the tokens."""
        return abs(self.unmask / self.unmask_exact - 1) > 0.01 or self.distance > 0.01


def bias(method: Method, tokens: Tensor, move: float, dtype: str) -> Bias:
    """How one masked position is drawn.

    Args:
        method: ``one-draw``: mask and tokens in one competition. ``position-first``: first whether the position moves
            (the split step) or which position does (the first-hitting sampler), then its token, which is drawn alone.
        tokens: (V,) token probabilities.
        move: probability (t - s)/t that the step reveals the position; 1/N in the first of N uniform steps.
        dtype: of the uniform noise.
    """
    tokens = tokens.double() / tokens.double().sum()
    if method == "one-draw":
        drawn = truncated(torch.cat([tokens * move, tokens.new_tensor([1.0 - move])]), ceiling(dtype))[:-1]
        unmask = float(drawn.sum())
    else:
        drawn, unmask = truncated(tokens, ceiling(dtype)), move
    # Where no token ever comes, the last ones to go are the likeliest.
    law = drawn / drawn.sum() if unmask > 0 else (tokens == tokens.max()).double()
    own = float(entropy(law))
    return Bias(
        unmask=unmask, unmask_exact=move, entropy=own, entropy_exact=float(entropy(tokens)),
        temperature=effective_temperature(tokens, own), distance=float((law / law.sum() - tokens).abs().sum() / 2),
    )  # fmt: skip


def zipf(vocabulary: int) -> Tensor:
    """(V,) probabilities proportional to 1/rank, the shape of word frequencies."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return weights / weights.sum()


Draw = Callable[[Tensor], Tensor]
"""A categorical sampler under test: probabilities (N, K) in, classes (N,) out."""


def gumbel_max(dtype: str, generator: torch.Generator) -> Draw:
    """The sampler of many codebases, argmax of p / -log(u), with noise of ``dtype``."""

    def draw(probs: Tensor) -> Tensor:
        u = torch.rand(probs.shape, dtype=getattr(torch, dtype), generator=generator)
        # Logarithms in float16 would add rounding of their own; only the ceiling of the noise is shown.
        return (probs / -u.to(probs.dtype).log()).argmax(-1)

    return draw


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a sampler drew at one masked position, against the truth.

    Attributes:
        draws: how often it drew.
        unmasked, expected: how often a token came, and how often it should have.
        rare, expected_rare: of these, tokens of the rarer half of the token mass.
        p_value: of the chi-square test of mask, frequent and rare tokens.
    """

    draws: int
    unmasked: int
    expected: float
    rare: int
    expected_rare: float
    p_value: float

    @property
    def biased(self) -> bool:
        return self.p_value < 1e-3


def trial(draw: Draw, tokens: Tensor, move: float, draws: int, dtype: torch.dtype = torch.float64) -> Trial:
    """Let a sampler draw from the classes [tokens, mask] of a fine ancestral step, in calls of at most 16M numbers.

    Args:
        tokens: (V,) token probabilities.
        move: probability of a token, see `bias`; 1 tests the token distribution alone.
        dtype: of the probabilities (N, V + 1) that the sampler is given.
    """
    tokens = tokens.double() / tokens.double().sum()
    probs = torch.cat([tokens * move, tokens.new_tensor([1.0 - move])])
    rare = _rarer_half(tokens)
    groups = torch.cat([rare.long(), tokens.new_full([1], 2).long()])
    counts = torch.zeros(3, dtype=torch.long)
    rows = max(1, 2**24 // len(probs))
    for start in range(0, draws, rows):
        part = probs.to(dtype).expand(min(rows, draws - start), -1)
        counts += torch.bincount(groups[draw(part)], minlength=3)
    share = torch.zeros(3, dtype=torch.float64).index_add_(0, groups, probs)
    return Trial(
        draws=draws, unmasked=int(counts[:2].sum()), expected=draws * move, rare=int(counts[1]),
        expected_rare=draws * float(share[1]), p_value=chi_square(counts, share),
    )  # fmt: skip


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """p-value of Pearson's test that ``counts`` (K,) come from ``probs`` (K,); impossible classes must not occur."""
    if (counts[probs <= 0] > 0).any():
        return 0.0
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = counts.sum() * probs / probs.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(counts) > 1 else 1.0


def _rarer_half(tokens: Tensor) -> Tensor:
    """(V,) True at the rarest tokens that together hold at most half of the mass."""
    ranked, order = tokens.sort()
    return torch.zeros_like(tokens, dtype=torch.bool).scatter_(0, order, ranked.cumsum(0) <= 0.5 * ranked.sum())

"""Coupled-GRPO, the reinforcement learning of DiffuCoder: token log-probabilities from a pair of complementary masks.

Gong, Zhang, Zheng, Gu, Jaitly, Kong, Zhang: *DiffuCoder: Understanding and Improving Masked Diffusion Models for Code
Generation*, 2025, arXiv 2506.20639. A random mask at t ~ U(0.2, 0.8) and its complement: every token of the answer is
scored exactly once in the pair, whatever was drawn, and once more with everything masked:

    A_g     = r_g - mean of the others' rewards                        leave one out, no standard deviation
    log p_i = 1/2 log p(y_i | all masked) + { 1/(2 t)       log p(y_i | mask)          where the mask hides i
                                            { 1/(2 (1 - t)) log p(y_i | complement)    elsewhere
    rho_i   = exp(log p_i new - log p_i old)
    loss    = mean over tokens up to the first end token of -min(rho A, clip(rho) A) + beta * (exp(d) - d - 1)

with new masks for each of mu inner updates. The pair alone, over all of (0, 1), would be an unbiased estimate of the
ELBO (`Coupled`, ``learning/estimators.py``); the full mask is what decoding starts from.

Differs from the released code: t is drawn per chain, not once per batch; tokens behind the end stay masked in all
views; padding is masked out; log-probabilities are taken at the sampling temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unveil.learning.advantages import GroupAdvantage
from unveil.learning.estimators import Coupled
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import Kl
from unveil.systems import System

SYSTEM = System(
    name="coupled_grpo",
    title="DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
    paper="2506.20639",
    family="masked",
    claim="complementary masks score every token once and lower the variance of token log-probabilities",
    checked_in="gdpo",
)


@dataclass(kw_only=True)
class CoupledGrpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(center="leave_one_out", scale="none"))
    likelihood: Coupled = field(default_factory=lambda: Coupled(after_end="drop"))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.5))
    weighting: TokenMean = field(default_factory=TokenMean)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.01, estimator="k3"))
    inner_updates: int = 2

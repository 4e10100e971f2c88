"""diffu-GRPO, the reinforcement learning of d1: the shared baseline of masked policy optimisation.

Zhao, Gupta, Zheng, Grover: *d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning*, 2025,
arXiv 2504.12216. GRPO in which the log-probability of every response token comes from ONE forward pass with the whole
response masked and a random 15 % of the prompt masked; a new prompt mask for each of mu inner updates:

    A_g    = r_g - mean(r)                                          no division by the standard deviation
    x^j    = [prompt, masked with probability 0.15 by seed j ; response, all masked]            j = 1..mu
    rho_i  = p_theta(o_i | x^j) / p_old(o_i | x^j)
    loss^j = mean over tokens up to the first end token of -min(rho A, clip(rho) A) + beta * (exp(d) - d - 1),
             d = log p_ref - log p

Every part is a shared one; this file is only their composition. The mean is over all tokens of the update, as in the
released code (the paper divides by each response's length). Differs from the released code: log-probabilities are taken
at the sampling temperature (set it to 1 for the code's), padding is masked out, noise never depends on a mask seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import OneStepLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import Kl
from unveil.systems import System

SYSTEM = System(
    name="diffu_grpo",
    title="d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
    paper="2504.12216",
    family="masked",
    claim="one-step log-probabilities with prompt masking allow many cheap inner updates per batch of rollouts",
    checked_in="mdpo",
)


@dataclass(kw_only=True)
class DiffuGrpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="none"))
    likelihood: OneStepLikelihood = field(default_factory=lambda: OneStepLikelihood(prompt_mask=0.15))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.5))
    weighting: TokenMean = field(default_factory=TokenMean)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.04, estimator="k3"))
    inner_updates: int = 12

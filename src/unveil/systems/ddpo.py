"""DDPO: the denoising chain of an image model as an MDP, trained by policy gradients; the shared baseline.

Black, Janner, Du, Kostrikov, Levine: *Training Diffusion Models with Reinforcement Learning*, 2023, arXiv 2305.13301.
State (prompt, t, x_t), action x_s drawn from the Gaussian of a DDIM step with eta = 1, reward only for the finished
image:

    A    = clip((r - mean) / (std + 1e-6), -5, 5)         over the last 16 or 32 rewards of the same prompt
    rho  = exp(l(x_s | x_t) - l_old(x_s | x_t))           l = log p averaged over dimensions
    IS:    mean over steps and images of -min(rho A, clip(rho, 1 - c, 1 + c) A)       several steps per rollout
    SF:    -A l                                                                       one step per rollout
    RWR:   w (matching loss of the finished image),   w = exp(A / temperature) normalised, or 1 for the best images

The sampler is ``latent`` with kernel ``ddim``; with guidance in the rollout the policy is the guided one, and so it is
trained. Differs from the released code: a step to clean data has no noise and is not trained (the code's last step has
next to none, and its log-probability dwarfs the others'); log-probabilities keep float64; c is for 16,384 dimensions
and grows as 1 / sqrt(dimensions) for smaller samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unveil.learning.advantages import PromptHistory, RewardWeights
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.noised import MatchingLikelihood
from unveil.learning.objectives import Clipped, Reinforce, TokenMean
from unveil.systems import System

SYSTEM = System(
    name="ddpo",
    title="Training Diffusion Models with Reinforcement Learning",
    paper="2305.13301",
    family="image",
    claim="importance sampling on the denoising MDP beats the score function and reward-weighted regression per reward "
    "query",
    checked_in="flow_grpo",
)


@dataclass(kw_only=True)
class Ddpo:
    """DDPO-IS, as keyword arguments of a `PolicyConfig`."""

    advantage: PromptHistory = field(default_factory=PromptHistory)
    likelihood: TransitionLikelihood = field(default_factory=TransitionLikelihood)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=1e-4, level="step"))
    weighting: TokenMean = field(default_factory=TokenMean)
    minibatches: int = 4


@dataclass(kw_only=True)
class DdpoSf:
    """DDPO-SF: the score-function gradient of one step per rollout."""

    advantage: PromptHistory = field(default_factory=PromptHistory)
    likelihood: TransitionLikelihood = field(default_factory=TransitionLikelihood)
    objective: Reinforce = field(default_factory=Reinforce)
    weighting: TokenMean = field(default_factory=TokenMean)


@dataclass(kw_only=True)
class Rwr:
    """Reward-weighted regression, the paper's baseline: the sampler may be any, for only finished images count."""

    advantage: RewardWeights = field(default_factory=RewardWeights)
    likelihood: MatchingLikelihood = field(default_factory=MatchingLikelihood)
    objective: Reinforce = field(default_factory=Reinforce)
    weighting: TokenMean = field(default_factory=TokenMean)
    minibatches: int = 4

"""GDPO: Group Diffusion Policy Optimization, GRPO with one ratio per sequence of ELBOs by fixed quadrature in time.

Rojas, Lin, Rasul, Schneider, Nevmyvaka, Tao, Deng: *Improving Reasoning for Diffusion Language Models via Group
Diffusion Policy Optimization*, 2025, arXiv 2510.08554. (Not the GDPO of 2601.05242, a normalisation of several
rewards.) An answer y is one action, and its log-likelihood is replaced by the ELBO, an integral over the masking
probability t. Most of the variance of a random estimate comes from t, so t is fixed at the nodes t_n of a quadrature
with weights w_n, and only the masks are random, K for each node (``sdmc`` in ``learning/estimators.py``):

    ELBO(y) = sum_n w_n / (t_n K) sum_k sum_{i masked} log p(y_i | y_{t_n}^k)
    A_g     = r_g - mean(r)                                       no division by the standard deviation
    rho_g   = exp((ELBO_new(y_g) - ELBO_old(y_g)) / L)            old, new and reference see the same masks
    loss    = mean over chains of -min(rho A, clip(rho) A) + beta / L * sum_i (exp(d_i) - d_i - 1)

d_i is the difference of the i-th position's ELBO term, reference minus new. ``length_norm`` says where the length L
goes: ``ratio``, into the ratio as above, which is what the released code does (GSPO's form); ``outer``, before the
clipped term only, as the paper writes it (an unnormalised ratio of a long answer clips at once); ``both``.

Differs from the released code: (1) old and new really share their masks; there the masks of later nodes come from a
stream that has run on by another amount, so that ratios are not 1 on-policy; (2) a node masks at least one token, and
its sum is divided by the share that was really masked (``realised: false`` gives theirs); (3) the KL term is taken
position by position, there on the unnormalised ELBO (released runs have beta = 0); (4) the Simpson rule works, there
it cannot be constructed; (5) log-probabilities are taken at the sampling temperature.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, replace
from typing import Literal

from unveil.learning.advantages import GroupAdvantage
from unveil.learning.estimators import SemiDeterministic
from unveil.learning.objectives import Clipped, SequenceMean
from unveil.learning.regularisers import Kl
from unveil.systems import System

SYSTEM = System(
    name="gdpo",
    title="Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization",
    paper="2510.08554",
    family="masked",
    claim="ELBOs at 2-3 fixed times have far less variance than random times, and train better as sequence ratios",
)


@dataclass(kw_only=True)
class Gdpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    length_norm: InitVar[Literal["ratio", "outer", "both"]] = "ratio"
    """Where a chain's length divides: ``objective.normalise``, ``weighting.by_length``, or both."""
    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="none"))
    likelihood: SemiDeterministic = field(default_factory=lambda: SemiDeterministic(rule="gauss-3"))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.5, level="sequence"))
    weighting: SequenceMean = field(default_factory=SequenceMean)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.0, estimator="k3"))
    inner_updates: int = 12

    def __post_init__(self, length_norm: str) -> None:
        self.objective = replace(self.objective, normalise=length_norm != "outer")
        self.weighting = replace(self.weighting, by_length=length_norm != "ratio")

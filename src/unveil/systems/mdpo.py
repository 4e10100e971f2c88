"""MDPO: Masked Diffusion Policy Optimization, with Running Confidence Remasking (RCR).

He, Renz, Cao, Geiger: *MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models*, 2025,
arXiv 2508.13148. The T denoising steps of a masked language model are an MDP. The model's full guess of x_0 is verified
at EVERY step s = 0..T-1, and the T rewards r_s of a rollout become T advantages:

    raw_s = (r_s - r_{s-1}) + mean(r_{s+1} .. r_{T-1})          r_{-1} = 0; at the last step the mean is r_{T-1}
    A_s   = (raw_s - mean over the group) / (std over the group + 1e-4)

Trained are the k steps of a rollout with the largest |A_s|, each on the state that inference really visited. With L
response positions, n holes, c_i the (tempered) probability of token i when it was drawn and rho_i its probability
ratio, the loss of one step is

    sum over holes of c_i / n * ( L/n * clipped(rho_i, A_s) + beta * (log p_ref - log p)^2 / 2 )

summed over the steps of a rollout and averaged over rollouts. RCR, the decoding rule, is ``samplers/rules.py``: rcr.

Differs from the released code: group statistics are by prompt id (the code's are right only for one group per batch);
the decoding rule ranks by the model's own probability, not by the tempered and filtered one
(``rollout.sampler.rank_by: sampling`` gives that), and c_i stays a probability where the rule ranks by something else;
several inner updates work (the code crashes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.advantages import Advantage, normalise_by_group, terminal
from unveil.learning.likelihoods import TokenViews, TrajectoryLikelihood
from unveil.learning.objectives import Clipped, Weighting
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import TopAdvantage
from unveil.samplers.base import Sampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.systems import System
from unveil.tasks.evaluate import Judged, over_denoised
from unveil.training.policy_config import ProblemFilter

SYSTEM = System(
    name="mdpo",
    title="MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models",
    paper="2508.13148",
    family="masked",
    claim="per-step rewards on the visited states beat diffu-GRPO at equal updates; RCR beats LCR without training",
)


@dataclass(kw_only=True)
class StepImprovement(Advantage, name="improvement"):
    """What step s improved, plus how well the chain went on from there; normalised per step over the group."""

    reads_guesses: ClassVar[bool] = True
    per_step: ClassVar[bool] = True
    terms: Literal["difference+future", "difference", "future", "terminal", "step", "from_here"] = "difference+future"
    """The paper's sum, or an ablation: difference r_s - r_{s-1} only, mean of later rewards only, the finished
    response's reward at every step, the step's own reward (the code's v1), the mean reward from s on (v2)."""

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        return normalise_by_group(self.raw(rewards, active), active, group)

    def raw(self, rewards: Tensor, active: Tensor) -> Tensor:
        """(B, S) before the group is subtracted."""
        r = rewards * active
        length = active.sum(1, keepdim=True)
        place = torch.arange(r.shape[1], device=r.device)
        from_here = r.flip(1).cumsum(1).flip(1)
        later = (length - place - 1).clamp(min=1)
        future = torch.where(place + 1 < length, (from_here - r) / later, r)
        difference = r - torch.cat([torch.zeros_like(r[:, :1]), r[:, :-1]], 1)
        return {
            "difference+future": difference + future,
            "difference": difference,
            "future": future,
            "terminal": terminal(rewards, active)[:, None] * active,
            "step": r,
            "from_here": from_here / (length - place).clamp(min=1),
        }[self.terms] * active


@dataclass(kw_only=True)
class StepWeighting(Weighting, name="mdpo"):
    """c_i * L / n^2 for the policy term and c_i / n for the KL term, averaged over rollouts."""

    needs: ClassVar[frozenset[str]] = frozenset({"log_prob"})
    reads_views = TokenViews
    weighs_orders = False
    confidence: bool = True
    """Weigh every token by its (detached) probability at rollout time, whatever the decoding rule ranked by."""
    length_ratio: bool = True
    """The factor L/n of the policy term: late steps, with few holes, weigh more per token."""

    def weights(
        self, views: TokenViews, advantage: Tensor, trajectory: TokenTrajectory, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        holes = views.holes[:, None] + 1e-4
        each = views.scored / holes / total(float(len(trajectory)))
        if self.confidence:
            assert trajectory.log_prob is not None
            each = each * trajectory.log_prob[views.rows, views.steps].exp()
        if not self.length_ratio:
            return each, each
        length = trajectory.response_valid.sum(1)[views.rows, None]
        return each * length / holes, each


@dataclass(kw_only=True)
class OverDenoising(ProblemFilter, name="over_denoising"):
    """Keep the problems on which some intermediate guess is right and the finished response is wrong."""

    decoder: Sampler
    """The training decoder at temperature 0."""
    pool: Annotated[int, Field(ge=1)] = 512
    """Candidates per epoch."""
    every: Annotated[int, Field(ge=1)] = 50
    """Updates per epoch."""

    def keep(self, judged: Judged) -> Tensor:
        return over_denoised(judged)


@dataclass(kw_only=True)
class Mdpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`: ``PolicyConfig(task=..., rollout=...,
    **vars(Mdpo()))``."""

    advantage: StepImprovement = field(default_factory=StepImprovement)
    selector: TopAdvantage = field(default_factory=lambda: TopAdvantage(k=8))
    likelihood: TrajectoryLikelihood = field(default_factory=lambda: TrajectoryLikelihood(tokens="masked"))
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.2))
    weighting: StepWeighting = field(default_factory=StepWeighting)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.02, estimator="k2"))

"""DiffusionNFT: finished images are noised again, and good ones pull where bad ones push; the chain is never looked at.

Zheng, Chen, Ye, Wang, Zhang, Jiang, Su, Ermon, Zhu, Liu: *DiffusionNFT: Online Diffusion Reinforcement with Forward
Process*, 2025, arXiv 2509.16117. A slow copy ``old`` of the policy draws the images, by any sampler. With their noised
copies x_t, the network v and d = v - v_old:

    A    = (R - mean over the group) / (std over the update + 1e-4)
    r    = 1/2 + clip(A, -m, m) / (2 m)                               how probably the image is a good one
    v+   = v_old + beta d,    v- = v_old - beta d                     two policies that the one network implies
    l(u) = mean (x0(u) - x0)^2 / sg max(mean |x0(u) - x0|, 1e-5)      mean over dimensions
    loss = mean over images and times of (m / beta) (r l(v+) + (1 - r) l(v-)) + beta_kl mean (v - v_ref)^2

At d = 0 both branches are v_old and the value of the loss says nothing of r; its gradient does. Parameterisations are
affine in one another at a given x_t, so the branches are taken of x_0, whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser, ContinuousSpec
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.noised import CopyLikelihood, NoisedViews, recognise
from unveil.learning.objectives import Objective, Weighting
from unveil.learning.regularisers import Velocity
from unveil.learning.views import Scores
from unveil.processes.gaussian import per_sample
from unveil.systems import System
from unveil.training.snapshots import Following

SYSTEM = System(
    name="diffusion_nft",
    title="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    paper="2509.16117",
    family="image",
    claim="contrasting good and bad samples in the forward process learns several times faster than Flow-GRPO, with "
    "any solver and without stored chains",
)


@dataclass(kw_only=True)
class BranchViews(NoisedViews):
    """Noised copies with two items each: the positive branch and the negative one.

    Attributes:
        weight: (N,) factor of a squared error of x_0.
    """

    called = "two branches of noised copies"
    opposed = True

    weight: Tensor

    @property
    def items(self) -> Tensor:
        return torch.ones(len(self), 2, dtype=torch.bool)


@dataclass(kw_only=True)
class ImplicitLikelihood(CopyLikelihood, name="implicit"):
    """-l / beta of both branches; ``old`` is the policy that drew the samples (``rollout.drawn_by``)."""

    makes = BranchViews
    gives: ClassVar[frozenset[str]] = frozenset({"velocity", "clean"})
    reads_old: ClassVar[frozenset[str]] = frozenset({"clean"})
    beta: Annotated[float, Field(gt=0)] = 1.0
    """How far the branches go along v - v_old; small ones make larger steps."""
    loss: Literal["normalised", "x0", "velocity"] = "normalised"
    """``normalised``: of x_0, divided by its own mean absolute error. The plain ones: the squared error of x_0, or of
    eps - x_0, the velocity of a flow (w(t) = 1)."""

    def made(self, spec: ContinuousSpec, **fields: Any) -> BranchViews:
        times: Tensor = fields["times"]
        weight = spec.process.error_factor("u", times) if self.loss == "velocity" else torch.ones_like(times)
        return BranchViews(**fields, weight=weight)

    def score(
        self, denoiser: ContinuousDenoiser, views: BranchViews, sampler: Any, old: Scores | None = None
    ) -> Scores:
        """Without an old policy both branches are the network itself."""
        guess, _, clean, _ = recognise(denoiser, views)
        log_prob = self.log_prob(guess.x0, None if old is None else old.clean, clean, views.weight)
        velocity = denoiser.spec.process.velocity(guess, views.times)
        return Scores(log_prob=log_prob, forwards=len(views), velocity=velocity, clean=guess.x0)

    def log_prob(self, x_0: Tensor, old: Tensor | None, clean: Tensor, weight: Tensor) -> Tensor:
        """(N, 2) of both branches.

        Args:
            x_0: (N, *D) what the network expects.
            old: (N, *D) what the old policy does.
            clean: (N, *D) the finished samples.
            weight: (N,) as in `BranchViews`.
        """
        if old is None:
            branches = x_0[None]
        else:
            old = old.to(x_0.device)
            step = self.beta * (x_0 - old)
            branches = torch.stack([old + step, old - step])
        return (-self._loss(branches - clean, weight.to(x_0.device)) / self.beta).T.expand(-1, 2)

    def measures(self, scores: Scores, old: Scores, views: BranchViews, spec: ContinuousSpec) -> dict[str, Tensor]:
        """``old_deviation``: mean over dimensions of (v - v_old)^2, of the velocity eps - x_0 whatever is predicted. It
        tells what the loss does not: how far ahead of ``old`` the policy is."""
        assert scores.clean is not None and old.clean is not None
        step = scores.clean.detach() - old.clean.to(scores.clean.device)
        factor = spec.process.error_factor("u", views.times).to(step.device)
        return {"old_deviation": per_sample(step.square()) / step[0].numel() * factor}

    def _loss(self, error: Tensor, weight: Tensor) -> Tensor:
        """l (K, N), float64, of errors (K, N, *D) of guesses."""
        kinds, size = error.shape[:2], error[0, 0].numel()
        squares = per_sample(error.square().flatten(0, 1)).view(kinds) / size * weight
        if self.loss == "normalised":
            return squares / (per_sample(error.detach().abs().flatten(0, 1)).view(kinds) / size).clamp(min=1e-5)
        return squares


@dataclass(kw_only=True)
class Optimality(Weighting, name="optimality"):
    """Mean over all copies; the positive branch weighs m r, the negative one m (1 - r), r from the advantage."""

    reads_views = BranchViews
    carries_advantages = True
    limit: Annotated[float, Field(gt=0)] = 5.0
    """m: the advantage at which r is 1."""
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """What becomes of the advantage first: nothing; only what is above, or below, 0 stays; 1 where it is above 0 and
    0 elsewhere; its sign."""
    branches: Literal["both", "positive"] = "both"
    """``positive``: without the negative branch (the paper's ablation)."""

    def probability(self, advantage: Tensor) -> Tensor:
        """r in [0, 1]."""
        known = {
            "all": lambda a: a,
            "positive_only": lambda a: a.clamp(min=0),
            "negative_only": lambda a: a.clamp(max=0),
            "one_only": lambda a: (a > 0).to(a),
            "binary": torch.sign,
        }
        return 0.5 + 0.5 * known[self.mode](advantage).clamp(-self.limit, self.limit) / self.limit

    def weights(
        self, views: BranchViews, advantage: Tensor, trajectory: Any, total: Callable[[float], float]
    ) -> tuple[Tensor, Tensor]:
        r = self.probability(advantage)
        other = 1 - r if self.branches == "both" else torch.zeros_like(r)
        copies = max(1.0, total(float(len(views))))
        return self.limit * torch.stack([r, other], 1) / copies, torch.full((len(views), 2), 0.5 / copies)


@dataclass(kw_only=True)
class Fit(Objective, name="fit"):
    """-log p of every item; what was good is in the weights."""

    reads_advantages = False

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return -log_prob

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        return {"matching_loss": -log_prob.mean().item()}


@dataclass(kw_only=True)
class DiffusionNft:
    """The paper's choices, as keyword arguments of a `PolicyConfig`. The rollout is drawn by ``old``; `old_schedule`
    says how it follows."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="batch_std", clip=5.0))
    likelihood: ImplicitLikelihood = field(default_factory=ImplicitLikelihood)
    objective: Fit = field(default_factory=Fit)
    weighting: Optimality = field(default_factory=Optimality)
    kl: Velocity = field(default_factory=lambda: Velocity(beta=1e-4))


def old_schedule(kind: Literal[0, 1, 2]) -> Following:
    """How ``old`` follows the policy: 0 a copy at every update; 1 decay 0.001 per update, at most 0.5; 2 copies for 75
    updates, then 0.0075 per update, at most 0.999 (for text in images)."""
    known = {0: Following(), 1: Following(rate=0.001, decay=0.5), 2: Following(rate=0.0075, decay=0.999, after=75)}
    return known[kind]

"""AlignProp, DRaFT and ReFL: where the reward can be differentiated, its gradient goes through the sampler itself.

Prabhudesai, Goyal, Pathak, Fragkiadaki: *Aligning Text-to-Image Diffusion Models with Reward Backpropagation*, 2023,
arXiv 2310.03739. Clark, Vicol, Swersky, Fleet: *Directly Fine-Tuning Diffusion Models on Differentiable Rewards*, 2023,
arXiv 2309.17400. ReFL is of Xu et al.: *ImageReward*, 2023, arXiv 2304.05977. No advantage, no log-probability:

    x_s  = step(x_t, f(x_t, t)),   s < t          the sampler's own steps, noise held fixed
    loss = -mean r(decode(x_0), prompt)            |  mean max(c - r, 0)  (ReFL, c = 2)

f is the network's output. In the steps before step K it is a constant (*truncation*), so that no gradient comes from
there, and need not be run again. They differ in what they differentiate:

| | through |
|---|---|
| AlignProp | the steps from K on, K drawn: uniform, or around 0.84 of the steps (the released code's default) |
| DRaFT, DRaFT-K | all steps; the last K |
| DRaFT-LV | the last step, and that step again from noised copies of the finished image: K = 1 with less variance |
| ReFL | the x_0 predicted at one late step, drawn; the chain goes no further |

The form in TRL drops the steps one by one (`drop_out`): there, and only there, a gradient passes a constant step by the
linear path from x_t to x_s. Differs from the released code: K is drawn per image and not per batch; rollouts are drawn
and scored first, as for any other method, and then run again, which costs one more forward pass a live step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser, ContinuousSpec
from unveil.learning.noised import FinishedLikelihood
from unveil.learning.objectives import Objective, TokenMean
from unveil.learning.views import FIRST, Asked, Inner, Scores, Views
from unveil.processes.gaussian import full
from unveil.registry import Plugin, UserError
from unveil.samplers.base import Sampler
from unveil.samplers.differentiable import Redone, run_again
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import LatentTrajectory
from unveil.samplers.windows import Everywhere
from unveil.seeds import derive_seed, generator, normal_rows
from unveil.systems import System

SYSTEM = System(
    name="alignprop",
    title="Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
    paper="2310.03739",
    family="image",
    claim="gradients of the reward through the sampler need a small part of DDPO's reward queries, and over-optimise "
    "sooner",
)


class Truncation(Plugin, family="truncation"):
    """Which steps of a chain have a gradient."""

    def live(self, steps: int, stream: torch.Generator) -> Tensor:
        """(steps,) True at those that have; at least the last."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Last(Truncation, name="last"):
    """The last ones (DRaFT-K)."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """K, at most all; None: all (DRaFT)."""

    def live(self, steps: int, stream: torch.Generator) -> Tensor:
        return torch.arange(steps) >= steps - (self.steps or steps)


@dataclass(kw_only=True)
class UniformCut(Truncation, name="uniform"):
    """Those from a step on that is drawn anew for every chain, each as often as every other (AlignProp's paper)."""

    def live(self, steps: int, stream: torch.Generator) -> Tensor:
        return torch.arange(steps) >= torch.randint(steps, (), generator=stream)


@dataclass(kw_only=True)
class NormalCut(Truncation, name="normal"):
    """Those from a step on that is drawn from a normal distribution, cut off at the ends (AlignProp's code)."""

    mean: Annotated[float, Field(ge=0, le=1)] = 0.84
    """Place of the first of them, as a share of the chain: 0 is the noisy end."""
    std: Annotated[float, Field(ge=0)] = 0.1
    """Likewise."""

    def live(self, steps: int, stream: torch.Generator) -> Tensor:
        cut = steps * (self.mean + self.std * torch.randn((), generator=stream))
        return torch.arange(steps) >= cut.long().clamp(0, steps - 1)


@dataclass(kw_only=True)
class DropOut(Truncation, name="drop_out"):
    """Every step by itself, the later the more often: step i of S with probability (i + 1) / S (TRL's trainer)."""

    def live(self, steps: int, stream: torch.Generator) -> Tensor:
        return torch.rand(steps, generator=stream) < (torch.arange(steps) + 1) / steps


@dataclass(kw_only=True)
class RewardViews(Views):
    """N images that are made once more, differentiably.

    Attributes:
        trajectory: the chains.
        place: (N,) or (N, S) which part of the chain is run again, as its likelihood has it.
        seeds: (N,) of noise that is not the chain's own.
        asked: by row of the trajectory.
    """

    trajectory: LatentTrajectory
    place: Tensor
    seeds: Tensor
    asked: Asked | None = None

    @property
    def factors(self) -> Tensor:
        return self.length[:, None]  # copies of one image count as one


class RewardLikelihood(FinishedLikelihood):
    """What stands in for log p is the reward itself, of an image with a gradient."""

    differentiates: ClassVar[bool] = True
    needs = frozenset({"latents", "times", "seeds"})

    def check_fits(self, sampler: Sampler, denoiser: Any) -> None:
        super().check_fits(sampler, denoiser)
        assert isinstance(sampler, LatentSampler)
        if not isinstance(sampler.window, Everywhere):
            raise UserError(
                f"policy.rollout.sampler.window: {sampler.window.name!r} chooses steps for a policy gradient, and "
                f"{self.name!r} has none (allowed: everywhere)"
            )
        if sampler.splits:
            raise UserError(
                f"policy.rollout.sampler.splits: chains with steps in common are no chains of their own, which "
                f"{self.name!r} runs again (allowed: [])"
            )

    def views(
        self,
        trajectory: LatentTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: ContinuousSpec,
        inner: Inner = FIRST,
    ) -> RewardViews:
        drawn = [self.places(trajectory.steps, generator(seed, inner.number, "truncation")) for seed in seeds]
        copies = len(drawn[0])
        rows = torch.arange(len(trajectory)).repeat_interleave(copies)
        noise = [derive_seed(seed, inner.number, "copy", copy) for seed in seeds for copy in range(copies)]
        return RewardViews(
            rows=rows,
            steps=trajectory.last_steps[rows],
            length=torch.full((len(rows),), 1 / copies),
            trajectory=trajectory,
            place=torch.cat(drawn),
            seeds=torch.tensor(noise),
        )

    def rewarded(self, views: RewardViews, asked: Asked) -> RewardViews:
        return replace(views, asked=asked)

    def score(self, denoiser: ContinuousDenoiser, views: RewardViews, sampler: LatentSampler) -> Scores:
        assert views.asked is not None
        redone, asked = self.redone(denoiser, views, sampler), views.asked
        images, rows = full(denoiser.decode(redone.samples)), views.rows.tolist()
        with torch.autocast(images.device.type, enabled=False):  # as it is asked about finished samples
            reward = asked.reward.values(images, [asked.prompts[r] for r in rows], [asked.metadata[r] for r in rows])
        return Scores(log_prob=reward.to(denoiser.device)[:, None], forwards=redone.forwards, velocity=redone.velocity)

    def places(self, steps: int, stream: torch.Generator) -> Tensor:
        """(copies,) or (copies, steps): `RewardViews.place` of one chain of so many steps."""
        raise NotImplementedError

    def redone(self, denoiser: ContinuousDenoiser, views: RewardViews, sampler: LatentSampler) -> Redone:
        """The latents of the images, differentiable."""
        raise NotImplementedError


@dataclass(kw_only=True)
class RolloutReward(RewardLikelihood, name="rollout_reward"):
    """The reward of the finished image, through the chain (AlignProp, DRaFT)."""

    through: Truncation = field(default_factory=Last)
    """Its steps that have a gradient."""
    recompute: bool = True
    """Run every step again in the backward pass rather than keep its activations: memory does not grow with steps."""

    def places(self, steps: int, stream: torch.Generator) -> Tensor:
        return self.through.live(steps, stream)[None]

    def redone(self, denoiser: ContinuousDenoiser, views: RewardViews, sampler: LatentSampler) -> Redone:
        return run_again(sampler, denoiser, views.trajectory, views.rows, views.place, recompute=self.recompute)


@dataclass(kw_only=True)
class LastStepReward(RewardLikelihood, name="last_step_reward"):
    """The reward of the finished image through the last step, in the mean over several states that it starts from: the
    chain's own and noised copies of the finished image (DRaFT-LV)."""

    copies: Annotated[int, Field(ge=0)] = 2
    """Noised copies; 0 is DRaFT-1."""

    def places(self, steps: int, stream: torch.Generator) -> Tensor:
        return torch.arange(self.copies + 1)

    def redone(self, denoiser: ContinuousDenoiser, views: RewardViews, sampler: LatentSampler) -> Redone:
        chains, made = views.trajectory.rows(views.rows), views.place > 0
        assert chains.latents is not None and chains.times is not None and chains.seeds is not None
        noise = normal_rows(denoiser.spec.shape, views.seeds[made].tolist()) if bool(made.any()) else chains.samples[:0]
        copies = denoiser.spec.process.corrupt(chains.samples[made], chains.times[made, -2], noise)
        chains.latents[made, -2], chains.seeds[made] = copies, views.seeds[made]
        live = Last(steps=1).live(chains.steps, torch.Generator()).expand(len(chains), -1)
        return run_again(sampler, denoiser, chains, torch.arange(len(chains)), live, recompute=False)


@dataclass(kw_only=True)
class PredictedReward(RewardLikelihood, name="predicted_reward"):
    """The reward of the x_0 that is predicted at one late step of the chain (ReFL)."""

    late: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the chain, from its end, that the step is drawn from; at least the last step."""

    def places(self, steps: int, stream: torch.Generator) -> Tensor:
        count = max(1, round(self.late * steps))
        return steps - 1 - torch.randint(count, (1,), generator=stream)

    def redone(self, denoiser: ContinuousDenoiser, views: RewardViews, sampler: LatentSampler) -> Redone:
        chains, rows, step, device = views.trajectory, views.rows, views.place, denoiser.device
        assert chains.latents is not None and chains.times is not None
        x, t = chains.latents[rows, step].to(device), chains.times[rows, step]
        guess = sampler.guess(denoiser, x, t, chains.condition.rows(rows).to(device))
        velocity = denoiser.spec.process.velocity(guess, t)
        return Redone(samples=guess.x0, velocity=velocity, forwards=len(x) * sampler.guidance.evaluations)


@dataclass(kw_only=True)
class Ascent(Objective, name="ascent"):
    """-r of every image: the reward itself is climbed, and no advantage is read."""

    enough: float | None = None
    """Reward from which on there is no gradient (ReFL: 2); None: there is no such."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return -(log_prob if self.enough is None else log_prob.clamp(max=self.enough))

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        return {"climbed_reward": log_prob.mean().item()}


@dataclass(kw_only=True)
class RewardGradient:
    """The family's choices, as keyword arguments of a `PolicyConfig`."""

    likelihood: RewardLikelihood = field(default_factory=lambda: RolloutReward(through=NormalCut()))
    objective: Ascent = field(default_factory=Ascent)
    weighting: TokenMean = field(default_factory=TokenMean)


def variant(name: Literal["alignprop", "draft", "draft_1", "draft_lv", "refl"]) -> RewardGradient:
    """A member of the family by name."""
    known: dict[str, RewardLikelihood] = {
        "alignprop": RolloutReward(through=NormalCut()),
        "draft": RolloutReward(through=Last()),
        "draft_1": RolloutReward(through=Last(steps=1)),
        "draft_lv": LastStepReward(),
        "refl": PredictedReward(),
    }
    return RewardGradient(likelihood=known[name], objective=Ascent(enough=2.0 if name == "refl" else None))

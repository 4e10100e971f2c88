"""An objective and an advantage of your own in the place of MDPO's; run this file for three updates."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.cli.recipes import find_recipe
from unveil.learning.advantages import Advantage, normalise_by_group
from unveil.learning.objectives import Objective
from unveil.recipe import build, load
from unveil.training.runs import TrainRecipe, train


@dataclass(kw_only=True)
class MyObjective(Objective):
    """REINFORCE with a capped weight: -min(rho, cap) A log p, where rho = exp(new - old) is held constant."""

    cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest weight of a token."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        weight = (log_prob - old).exp().clamp(max=self.cap).detach()
        return -weight * advantage * log_prob

    def diagnostics(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        return {"capped": ((log_prob - old).exp() > self.cap).float().mean().item()}


@dataclass(kw_only=True)
class MyAdvantage(Advantage):
    """Discounted improvement, sum over u >= s of discount^(u - s) (r_u - r_{u-1}), against the group."""

    reads_guesses: ClassVar[bool] = True  # asks for the reward of every step's guess
    discount: Annotated[float, Field(ge=0, le=1)] = 0.9
    """At 1 a step gets what the rest of the chain gains, at 0 only its own gain."""

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        gain = torch.diff(rewards, dim=1, prepend=torch.zeros_like(rewards[:, :1])) * active
        for step in reversed(range(gain.shape[1] - 1)):
            gain[:, step] += self.discount * gain[:, step + 1]
        return normalise_by_group(gain, active, group)


if __name__ == "__main__":
    small = ["updates=3", "eval.every=3", "eval.problems=64", "policy.rollout.prompts=4"]
    recipe = build(TrainRecipe, load(find_recipe("mdpo"), [*small, "policy.inner_updates=2"]))
    recipe.policy.objective, recipe.policy.advantage = MyObjective(cap=1.5), MyAdvantage(discount=0.8)
    run = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="my-objective-"))
    train(recipe, run, progress=lambda update, metrics: print(update, metrics["reward"], metrics["capped"]))
    print(f"unveil view {run}")

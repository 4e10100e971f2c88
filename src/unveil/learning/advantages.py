"""What was good: from rewards to advantages, always within the group of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import Plugin, UserError
from unveil.rewards.features import Features

EPSILON = 1e-4
"""Added to the standard deviation of a group."""


class Advantage(Plugin, family="advantage"):
    """Rewards of a batch of chains -> one advantage per chain and step."""

    reads_guesses: ClassVar[bool] = False
    """True if the reward of every step's guess is needed, not only that of the finished response."""
    per_step: ClassVar[bool] = False
    """True if the steps of a chain differ in their advantages."""
    reads_parts: ClassVar[bool] = False
    """True if it wants the parts of a sum of rewards apart: `mix` is then asked instead of `advantages`."""
    by_group: ClassVar[bool] = False
    """True if a sample is compared with the others of its group alone: small groups then make it mostly noise."""
    by_prompt: ClassVar[bool] = False
    """True if chains belong together by their prompt: equal prompts have equal ids, at every update of every run."""
    features: Features | None = None
    """What finished samples are compared by: `shaped` is then asked."""

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        """Advantages (B, S), 0 at inactive steps.

        Args:
            rewards: (B, S) reward of the guess at each step; the last active column is the finished response's.
            active: (B, S) True where a step happened.
            group: (B,) integer prompt ids; statistics are taken over equal ids, whatever the order of the rows.
        """
        raise NotImplementedError

    def mix(self, parts: Mapping[str, Tensor], weights: Mapping[str, float], active: Tensor, group: Tensor) -> Tensor:
        """Advantages (B, S) from the rewards of every part by itself.

        Args:
            parts: (B, S) per part, as ``rewards`` above; nan where a part does not apply to a chain.
            weights: of the parts that are optimised.
            active, group: as above.
        """
        raise NotImplementedError

    def shaped(self, values: Tensor, features: Tensor, group: Tensor) -> Tensor:
        """The advantages (B, S), once the samples themselves (as features (B, F)) have been looked at."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of advantages that remember earlier updates."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass(kw_only=True)
class GroupAdvantage(Advantage, name="group"):
    """The finished response's reward against its group: (r - mean) / std, the same at every step (GRPO)."""

    by_group: ClassVar[bool] = True
    center: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted: the group's mean, or the mean of the others (RLOO)."""
    scale: Literal["std", "batch_std", "none"] = "std"
    """Divide by the group's standard deviation, by that of all rewards of the update (Flow-GRPO), or not (diffu-GRPO,
    Dr. GRPO)."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest absolute value; None: no limit."""

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        final = terminal(rewards, active)[:, None]
        known = torch.ones_like(final, dtype=torch.bool)
        own: Literal["std", "none"] = "std" if self.scale == "std" else "none"
        values = normalise_by_group(final, known, group, center=self.center, scale=own)
        if self.scale == "batch_std":
            values = values / ((final.std() if len(final) > 1 else 0.0) + EPSILON)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return values * active


@dataclass(kw_only=True)
class PromptHistory(Advantage, name="prompt_history"):
    """(r - mean) / std over the last rewards of the same prompt, those of this update included (DDPO, 2305.13301).

    A prompt that has not been seen often enough has the statistics of the update instead.
    """

    by_prompt: ClassVar[bool] = True
    size: Annotated[int, Field(ge=1)] = 16
    """Rewards that are remembered per prompt."""
    least: Annotated[int, Field(ge=1)] = 16
    """Rewards from which on a prompt has statistics of its own. Above ``size`` none ever has: a plain z-score."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest absolute value; None: no limit."""
    remembered: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        final = terminal(rewards, active).double()
        for prompt, reward in zip(group.tolist(), final.tolist(), strict=True):
            self.remembered[prompt] = [*self.remembered.get(prompt, []), reward][-self.size :]
        values = torch.zeros_like(final)
        for prompt in set(group.tolist()):
            own = torch.tensor(self.remembered[prompt], dtype=torch.float64)
            over = own if len(own) >= self.least else final
            rows = group == prompt
            values[rows] = (final[rows] - over.mean()) / (over.std(correction=0) + 1e-6)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return values.float()[:, None] * active

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": {prompt: list(rewards) for prompt, rewards in self.remembered.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered = {prompt: list(rewards) for prompt, rewards in state["remembered"].items()}


@dataclass(kw_only=True)
class RewardWeights(Advantage, name="reward_weights"):
    """No advantage but a weight >= 0 with mean 1 over the update: reward-weighted regression."""

    form: Literal["softmax", "top", "threshold"] = "softmax"
    """exp(z / temperature) of the update's z-scores z; 1 for the best ``share`` of the chains and 0 for the rest; or 1
    where z is above ``threshold`` and 0 elsewhere, over their mean: all are 0 if no z is."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the softmax; small ones look at the best chains alone."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of ``top``."""
    threshold: float = 0.0
    """Of ``threshold``, in standard deviations from the update's mean."""

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        final = terminal(rewards, active).double()
        z = (final - final.mean()) / (final.std(correction=0) + EPSILON)
        if self.form == "softmax":
            weight = (z / self.temperature).softmax(0) * len(final)
        elif self.form == "threshold":
            above = (z > self.threshold).double()
            weight = above / above.mean().clamp(min=1 / len(final))
        else:
            chosen = max(1, round(self.share * len(final)))
            # Equal rewards at the border share what is left for them, so that their order decides nothing.
            border = final.sort(descending=True).values[chosen - 1]
            above, at = final > border, final == border
            weight = (above + at * (chosen - above.sum()) / at.sum()) * len(final) / chosen
        return weight.float()[:, None] * active


@dataclass(kw_only=True)
class Mixed(Advantage, name="mixed"):
    """Normalise, then sum: each part of a sum of rewards becomes an advantage by itself, and these are added with the
    parts' weights. A reward of large spread then no longer drowns the others (MixGRPO, 2507.21802; GDPO)."""

    by_group: ClassVar[bool] = True
    reads_parts = True

    of: Advantage = field(default_factory=GroupAdvantage)
    """How a part becomes an advantage."""
    rescale: bool = False
    """Divide by the deviation over all chains of the batch, as GDPO does, so that the scale does not grow with the
    number of parts."""

    def __post_init__(self) -> None:
        if self.of.name != GroupAdvantage.name:
            raise UserError(f"of: {self.of.name!r} cannot be asked about every part by itself (allowed: group)")

    def mix(self, parts: Mapping[str, Tensor], weights: Mapping[str, float], active: Tensor, group: Tensor) -> Tensor:
        mixed = torch.zeros(active.shape)
        for name, weight in weights.items():
            applies = ~parts[name].isnan().any(1)
            if applies.any():
                own = self.of.advantages(parts[name][applies], active[applies], group[applies])
                mixed[applies] += weight * own
        if self.rescale:
            final = terminal(mixed, active)
            mixed = (mixed - final.mean()) / (final.std() + EPSILON) * active if len(final) > 1 else mixed
        return mixed


def terminal(rewards: Tensor, active: Tensor) -> Tensor:
    """(B,) the reward at each chain's last active step."""
    last = (active.sum(1) - 1).clamp(min=0)
    return rewards.gather(1, last[:, None]).squeeze(1)


def normalise_by_group(
    values: Tensor,
    known: Tensor,
    group: Tensor,
    *,
    center: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "none"] = "std",
) -> Tensor:
    """(x - mean) / (std + 1e-4) per group and column of values (B, S), over entries that are ``known`` (B, S).

    The standard deviation is the unbiased one. Entries without a second known member of their group get 0.
    """
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    weight = known.to(torch.float64)
    x = values.to(torch.float64) * weight

    def total(per_row: Tensor) -> Tensor:
        return torch.zeros(groups, x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, index, per_row)[
            index
        ]

    count = total(weight)
    mean = total(x) / count.clamp(min=1)
    deviation = (x - mean) * weight
    variance = total(deviation**2) / (count - 1).clamp(min=1)
    if center == "leave_one_out":
        deviation = deviation * count / (count - 1).clamp(min=1)
    if scale == "std":
        deviation = deviation / (variance.sqrt() + EPSILON)
    return torch.where(known & (count > 1), deviation, 0).to(torch.float32)

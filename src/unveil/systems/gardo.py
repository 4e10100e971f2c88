"""GARDO: regularise only the samples that are rewarded suspiciously well, against a reference that keeps up.

He, Ye, Liu et al.: *GARDO: Reinforcing Diffusion Models without Reward Hacking*, 2025, arXiv 2512.24138. Three parts
that any group-based loop can take, here on Flow-GRPO (or on DiffusionNFT, with ``kl: {name: velocity}``). With the
optimised reward R, rewards R^1 .. R^K that are never optimised (role ``audit``), and features e of the samples:

    A_i = R_i - mean over the group,  times d_i where positive                           advantage ``novelty``
    d_i = min over others j of the group of 1 - cos(e_i, e_j),  over the group's mean
    U_i = w(R_i) - mean over k of w(R^k_i),   w(y_i) = (1/B) sum over j of [y_i > y_j]   gate ``uncertainty``
    g_i = [U_i > (1 - k) quantile of U]
    loss = mean of the policy terms + beta * mean over samples with g_i = 1 of |mean - mean_ref|^2 / (2 g^2)

The share k starts at 0.1 and is moved by 1.1 or 0.9 when the mean of the U >= 0 is above or below that of the last 20
updates. The reference becomes the policy when the gated KL is above a limit or m updates have passed (``snapshots``:
``reference_limit``, ``reference_sync``, ``reference_mix: 1``). The images of a group share their initial noise.

Differs from the released code, which ranks best first, so that its gate is the opposite of the paper's equation 7 and
takes the samples whose reward the audits find too low: ``flipped`` is that gate, for comparison. Its ranks break ties
by position; here equal rewards win nothing. The mean of all U is 0 but for ties, so k follows those >= 0, as the code
has it; the quantile is over all U, as the paper has it, or over those >= 0 (``over: positive``). A batch whose gate
lets every sample go has no KL at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.advantages import GroupAdvantage
from unveil.learning.gates import Gate
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import MeanSpace
from unveil.learning.selectors import ButLast, Selector
from unveil.rewards.features import Features, Pixels
from unveil.rewards.statistics import novelty
from unveil.systems import System
from unveil.training.snapshots import SnapshotConfig

SYSTEM = System(
    name="gardo",
    title="GARDO: Reinforcing Diffusion Models without Reward Hacking",
    paper="2512.24138",
    family="image",
    claim="a KL penalty on the few samples whose reward others doubt, and a reference that is reset, prevent reward "
    "hacking at full reward",
)


@dataclass(kw_only=True)
class NoveltyAdvantage(GroupAdvantage, name="novelty"):
    """r - mean of the group, positive ones times how new the sample is within its group."""

    scale: Literal["std", "batch_std", "none"] = "none"
    """Divide by the group's standard deviation, by that of all rewards of the update, or not (the paper's choice)."""
    features: Features = field(default_factory=Pixels)
    """What samples are compared by; the paper's is DINOv3."""
    relative: bool = True
    """Divide the novelty by its mean over the group, so that advantages keep their scale."""

    def shaped(self, values: Tensor, features: Tensor, group: Tensor) -> Tensor:
        factor = self.novelty(features, group)[:, None].to(values)
        return torch.where(values > 0, values * factor, values)

    def novelty(self, features: Tensor, group: Tensor) -> Tensor:
        """d (B,) of samples with features (B, F); 0 where another sample of the group is the same."""
        own = novelty(features, group.tolist()).clamp(min=0).double()
        if self.relative:
            for number in group.unique():
                rows = group == number
                own[rows] /= own[rows].mean().clamp(min=1e-12)
        return own


@dataclass(kw_only=True)
class UncertaintyGate(Gate, name="uncertainty"):
    """Holds back the samples whose reward wins more often than their audits do."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """k, the share of samples that are held back, at the start."""
    low: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Least k."""
    high: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Largest k."""
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """k grows or shrinks by this part of itself; 0: it stays."""
    window: Annotated[int, Field(ge=1)] = 20
    """Updates that the present uncertainty is compared with."""
    over: Literal["all", "positive"] = "all"
    """The quantile is that of all uncertainties, or of those that are not negative."""
    ranks: Literal["batch", "prompt"] = "batch"
    """A sample competes with all samples of the update, or with those of its group: easy prompts then do not win."""
    flipped: bool = False
    """Hold back the samples whose audits win more often than their reward: the gate of the released code."""
    past: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    present: float | None = field(default=None, init=False, repr=False, compare=False)

    def factors(self, rewards: Tensor, audits: Mapping[str, Tensor], group: Tensor) -> tuple[Tensor, dict[str, float]]:
        """B / (number of samples held back) for these, so that they are averaged among themselves; 0 for the rest."""
        uncertainty = self.uncertainty(rewards, audits, group)
        share = self.share if self.present is None else self.present
        held = self._held(uncertainty, share)
        level = self._level(uncertainty)
        self._move(level, share)
        count = int(held.sum())
        said = {"share": share, "held": count / len(held), "uncertainty": level}
        return held.float() * (len(held) / max(1, count)), said

    def uncertainty(self, rewards: Tensor, audits: Mapping[str, Tensor], group: Tensor) -> Tensor:
        """U (B,) float64, nan for samples without any audit; the sign is turned round if ``flipped``."""
        rivals = group if self.ranks == "prompt" else torch.zeros_like(group)
        others = torch.stack([win_rates(values, rivals) for values in audits.values()]).nanmean(0)
        own = win_rates(rewards, rivals) - others
        return -own if self.flipped else own

    def _held(self, uncertainty: Tensor, share: float) -> Tensor:
        """(B,) True above the quantile."""
        known = uncertainty[~uncertainty.isnan()]
        known = known[known >= 0] if self.over == "positive" else known
        if not len(known):
            return torch.zeros_like(uncertainty, dtype=torch.bool)
        return uncertainty > known.quantile(1 - share)

    def _level(self, uncertainty: Tensor) -> float:
        positive = uncertainty[uncertainty >= 0]
        return float(positive.mean()) if len(positive) else 0.0

    def _move(self, level: float, share: float) -> None:
        if self.past and level > max(self.past):
            share = share * (1 + self.rate)
        elif self.past and level < min(self.past):
            share = share * (1 - self.rate)
        self.present = min(max(share, self.low), self.high) if self.rate else share
        self.past = [*self.past, level][-self.window :]

    def state_dict(self) -> dict[str, Any]:
        return {"past": list(self.past), "present": self.present}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past, self.present = list(state["past"]), state["present"]


def win_rates(values: Tensor, rivals: Tensor) -> Tensor:
    """(B,) float64: how many of its rivals (equal ids (B,)) a value beats, over their number, itself included.

    Ties lose. nan beats nobody, is beaten by nobody, and has the win rate nan.
    """
    same = rivals[:, None] == rivals
    wins = (values[:, None] > values) & same
    rate = wins.sum(1).double() / same.sum(1)
    return rate.masked_fill(values.isnan(), torch.nan)


@dataclass(kw_only=True)
class Gardo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`; the reward must be a sum with audits."""

    advantage: NoveltyAdvantage = field(default_factory=NoveltyAdvantage)
    selector: Selector = field(default_factory=ButLast)
    likelihood: TransitionLikelihood = field(default_factory=TransitionLikelihood)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=1e-4, level="step"))
    weighting: TokenMean = field(default_factory=TokenMean)
    kl: MeanSpace = field(default_factory=lambda: MeanSpace(beta=0.04, rate=True))
    gate: UncertaintyGate = field(default_factory=UncertaintyGate)
    minibatches: int = 2


def resets(limit: float = 1e-4, every: int = 50) -> SnapshotConfig:
    """A reference that becomes the policy when the KL is above ``limit``, or after ``every`` updates."""
    return SnapshotConfig(reference_sync=every, reference_mix=1.0, reference_limit=limit)

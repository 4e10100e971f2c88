"""What the chains of an update came to, without the chains: small enough that every rank knows it of all of them.

Statistics of a group are over its members, on whatever rank they were drawn; what is logged is of the whole update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from unveil.learning.advantages import Advantage, terminal
from unveil.learning.gates import Gate
from unveil.rewards.features import Features
from unveil.seeds import derive_seed
from unveil.tasks.evaluate import over_denoised
from unveil.training.distribution import Ranks
from unveil.training.rollouts import Rollouts


@dataclass(kw_only=True)
class Outcome:
    """Of B chains.

    Attributes:
        group: (B,) the group of a chain.
        prompt: (B,) an id of the prompt, the same at all updates.
        rewards: (B, S) of the guess at each step, 0 where it is not known.
        active: (B, S) True where a step happened.
        known: (B,) False for chains without a reward.
        correct, score: (B,) verdict on the finished sample.
        unfinished: (B,) True for chains that ended with holes.
        guess_correct: (B, S) verdict on every guess; None if guesses were not recorded.
        over_denoised: (B,) some guess was right, and the end is not; None likewise.
        parts: (B, S) like ``rewards``, of every part of a sum of rewards; nan where a chain has none.
        features: (B, F) of finished samples, for advantages that compare them; None if nobody does.
    """

    group: Tensor
    prompt: Tensor
    rewards: Tensor
    active: Tensor
    known: Tensor
    correct: Tensor
    score: Tensor
    unfinished: Tensor
    guess_correct: Tensor | None = None
    over_denoised: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    @classmethod
    def of(cls, rollouts: Rollouts, features: Features | None = None) -> Outcome:
        judged, trajectory = rollouts.judged, rollouts.trajectory
        recorded = judged.guess_correct is not None
        prompts = {problem.prompt for problem in rollouts.problems}
        seed_of = dict(zip(prompts, map(derive_seed, prompts), strict=True))
        return cls(
            group=rollouts.group,
            prompt=torch.tensor([seed_of[problem.prompt] for problem in rollouts.problems]),
            rewards=rollouts.rewards,
            active=trajectory.active,
            known=rollouts.known,
            correct=rollouts.correct,
            score=torch.tensor([verdict.score for verdict in judged.verdicts], dtype=torch.float64),
            unfinished=trajectory.unfinished,
            guess_correct=judged.guess_correct,
            over_denoised=over_denoised(judged) if recorded else None,
            parts=rollouts.parts,
            features=None if features is None else features.of(judged.samples),
        )

    def everywhere(self, ranks: Ranks) -> tuple[Outcome, slice]:
        """The outcome of all ranks' chains, and which of them are this rank's."""
        parts = ranks.gather(self)
        start = sum(len(part) for part in parts[: ranks.rank])
        return join(parts), slice(start, start + len(self))

    def __len__(self) -> int:
        return len(self.group)

    @property
    def final(self) -> Tensor:
        """(B,) the reward of each finished sample."""
        return terminal(self.rewards, self.active)

    def advantages(self, advantage: Advantage, weights: Mapping[str, float] | None = None) -> Tensor:
        """(B, S); a chain without a reward is no member of its group, and has advantage 0.

        ``weights`` are those of the optimised parts of a sum of rewards, for advantages that read them.
        """
        known, values = self.known, torch.zeros(self.active.shape)
        if not known.any():
            return values
        active, group = self.active[known], (self.prompt if advantage.by_prompt else self.group)[known]
        if advantage.reads_parts:
            parts = {name: own[known] for name, own in self.parts.items()}
            own = advantage.mix(parts, weights or {}, active, group)
        else:
            own = advantage.advantages(self.rewards[known], active, group)
        values[known] = own if self.features is None else advantage.shaped(own, self.features[known], group)
        return values

    def gated(self, gate: Gate, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, float]]:
        """(B,) factors of the chains in the regularisers, and numbers for the log; 0 for a chain without a reward.

        ``weights`` are those of the audits; a negative one says that less is better.
        """
        known, factors = self.known, torch.zeros(len(self))
        if not known.any():
            return factors, {}
        audits = {name: terminal(self.parts[name], self.active)[known] * weight for name, weight in weights.items()}
        factors[known], said = gate.factors(self.final[known], audits, self.group[known])
        return factors, said

    def equal_groups(self) -> Tensor:
        """(groups,) True where all finished samples of a group have the same reward: there is nothing to learn."""
        final = self.final
        own = [final[(self.group == group) & self.known] for group in self.group.unique()]
        return torch.tensor([len(values.unique()) <= 1 for values in own])

    def metrics(self) -> dict[str, Any]:
        """Numbers for the log."""
        final, known, active = self.final, self.known, self.active
        values: dict[str, Any] = {
            "reward": final[known].mean().item(),
            "unrewarded": 1 - known.float().mean().item(),
            "accuracy": self.correct.float().mean().item(),
            "score": self.score.mean().item(),
            "group_reward_std": self._deviation(),
            "steps_per_chain": active.sum(1).float().mean().item(),
            "unfinished": self.unfinished.float().mean().item(),
        }
        for name, own in self.parts.items():
            values[f"reward/{name}"] = terminal(own, active).nanmean().item()
        if self.guess_correct is not None and self.over_denoised is not None:
            values["over_denoising"] = self.over_denoised.float().mean().item()
            values["guess_accuracy"] = (self.guess_correct.sum(0) / active.sum(0).clamp(min=1)).tolist()
        return values

    def _deviation(self) -> float:
        """Standard deviation of the reward within a group, mean over the groups with two known members or more."""
        final = self.final
        own = [final[self.known & (self.group == number)] for number in self.group.unique()]
        spread = [values.std() for values in own if len(values) > 1]
        return torch.stack(spread).mean().item() if spread else 0.0


def join(parts: Sequence[Outcome]) -> Outcome:
    """Several outcomes as one; chains of fewer steps get inactive ones."""
    if len(parts) == 1:
        return parts[0]
    steps = max(part.active.shape[1] for part in parts)

    def joined(values: list[Any]) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], Mapping):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        wide = [v if v.dim() == 1 else torch.cat([v, v.new_zeros(len(v), steps - v.shape[1])], 1) for v in values]
        return torch.cat(wide)

    names = [one.name for one in fields(Outcome) if one.name != "features"]
    features = [part.features for part in parts if part.features is not None]
    return Outcome(
        **{name: joined([getattr(part, name) for part in parts]) for name in names},
        features=torch.cat(features) if features else None,
    )


def mean_over_ranks(values: Mapping[str, float], weight: float, ranks: Ranks) -> dict[str, float]:
    """Means of numbers that every rank has of its own ``weight`` items, over the ranks that have the number."""
    parts = ranks.gather((dict(values), weight))
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part, _ in parts for name in part):
        own = [(part[name], share) for part, share in parts if name in part]
        found[name] = sum(value * share for value, share in own) / sum(share for _, share in own)
    return found

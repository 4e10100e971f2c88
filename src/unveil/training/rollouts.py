"""A batch of judged chains, and what may be done to its groups between reward and advantage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unveil.denoisers.base import Denoiser
from unveil.registry import Plugin
from unveil.samplers.base import Sampler
from unveil.samplers.trajectory import concatenate
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import Evaluation, Judged, chain_copies, evaluate, sample_problems
from unveil.training.trainer import Trainer


@dataclass(kw_only=True)
class Rollouts:
    """B chains with their problems and rewards.

    Attributes:
        problems: of every chain.
        group: (B,) the group that a chain belongs to: its place among the problems of the update.
        trajectory: the chains, of the sampler's kind.
        judged: verdicts of finished samples and, where recorded, of every guess.
        rewards: (B, S) of the guess at each step; without guesses only the last active step's is known, the rest is 0.
        known: (B,) False for chains without a reward, because it failed or does not apply: 0 in ``rewards``, and left
            out of their groups.
        seeds: one per chain, for everything random that is done with it.
        parts: (B, S) like ``rewards``, of every part of a sum of rewards, before any shaping; nan where there is none.
        gate: (B,) factor of each chain in the regularisers (see `unveil.learning.gates`); None: 1.
    """

    problems: list[Problem]
    group: Tensor
    trajectory: Any
    judged: Judged
    rewards: Tensor
    known: Tensor
    seeds: list[int]
    parts: dict[str, Tensor] = field(default_factory=dict)
    gate: Tensor | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def correct(self) -> Tensor:
        """(B,) whether each finished sample is right."""
        return torch.tensor([verdict.correct for verdict in self.judged.verdicts])

    def rows(self, index: Tensor) -> Rollouts:
        """The chains ``index`` (N,)."""
        places = index.tolist()
        judged = self.judged
        return Rollouts(
            problems=[self.problems[place] for place in places],
            group=self.group[index],
            trajectory=self.trajectory.rows(index),
            judged=replace(
                judged,
                samples=[judged.samples[place] for place in places],
                verdicts=[judged.verdicts[place] for place in places],
                guess_correct=None if judged.guess_correct is None else judged.guess_correct[index],
                guess_score=None if judged.guess_score is None else judged.guess_score[index],
                guess_samples=(
                    None if judged.guess_samples is None else [judged.guess_samples[place] for place in places]
                ),
            ),
            rewards=self.rewards[index],
            known=self.known[index],
            seeds=[self.seeds[place] for place in places],
            parts={name: values[index] for name, values in self.parts.items()},
            gate=None if self.gate is None else self.gate[index],
        )

    def extend(self, other: Rollouts) -> Rollouts:
        """These chains and those of ``other``."""
        trajectory = concatenate([self.trajectory, other.trajectory])
        steps = trajectory.steps
        parts = (self, other)

        def join(values: Sequence[Tensor | None]) -> Tensor | None:
            if any(value is None for value in values):
                return None
            return torch.cat([_widen(value, steps) for value in values])  # type: ignore[arg-type]

        guesses = [part.judged.guess_samples for part in parts]
        rewards = join([part.rewards for part in parts])
        assert rewards is not None
        return Rollouts(
            problems=[*self.problems, *other.problems],
            group=torch.cat([self.group, other.group]),
            trajectory=trajectory,
            judged=Judged(
                samples=[*self.judged.samples, *other.judged.samples],
                verdicts=[*self.judged.verdicts, *other.judged.verdicts],
                guess_correct=join([part.judged.guess_correct for part in parts]),
                guess_score=join([part.judged.guess_score for part in parts]),
                guess_samples=None if None in guesses else [row for own in guesses if own for row in own],
            ),
            rewards=rewards,
            known=torch.cat([self.known, other.known]),
            seeds=[*self.seeds, *other.seeds],
            parts={
                name: torch.cat([_widen(values, steps), _widen(other.parts[name], steps)])
                for name, values in self.parts.items()
            },
            gate=None if self.gate is None or other.gate is None else torch.cat([self.gate, other.gate]),
        )

    def replace(self, rows: Tensor, other: Rollouts, other_rows: Tensor) -> Rollouts:
        """Chains ``rows`` (N,) replaced by chains ``other_rows`` (N,) of ``other``; their groups stay."""
        order = torch.arange(len(self))
        order[rows] = len(self) + torch.arange(len(other_rows))
        joined = self.extend(other.rows(other_rows)).rows(order)
        joined.group = self.group
        return joined


class Roll(Protocol):
    """Draws and judges more chains for an update; they are counted in its cost."""

    def __call__(
        self,
        problems: Sequence[Problem],
        group: Tensor,
        *,
        label: str,
        sampler: Sampler | None = None,
        **how: Any,
    ) -> Rollouts:
        """One chain per problem, with the groups ``group`` (B,).

        Args:
            label: makes the noise another one than that of other chains of the same problem.
            sampler: instead of the rollout sampler.
            how: where the chains start, as in `Medium.start` (of text, ``initial`` and ``frozen``).
        """


class GroupHook(Plugin, family="group_hook"):
    """Repairs or extends the groups of an update, between reward and advantage."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Trajectory fields that `apply` reads."""

    def check_fits(self, sampler: Sampler, group_size: int, response_length: Any) -> None:
        """Refuse rollouts that this hook cannot work on.

        Raises:
            UserError: naming the key and what is allowed.
        """

    def apply(self, rollouts: Rollouts, roll: Roll, denoiser: Any) -> tuple[Rollouts, dict[str, float]]:
        """The rollouts to train on, and numbers for the log.

        Args:
            rollouts: as sampled; chains of one group are neighbours.
            roll: draws more chains.
            denoiser: what it declares of its samples.
        """
        raise NotImplementedError


class Shaping(Plugin, family="shaping"):
    """Changes rewards by how a chain came about (its number of steps ...). Accuracy stays what it is."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Trajectory fields that `shape` reads."""

    def check_fits(self, sampler: Sampler) -> None:
        """Refuse chains whose rewards this cannot change.

        Raises:
            UserError: naming the key and what is missing.
        """

    def shape(self, rewards: Tensor, trajectory: Any) -> Tensor:
        """New rewards (B, S) from ``rewards`` (B, S)."""
        raise NotImplementedError


def portions(group: Tensor, size: int) -> list[slice]:
    """Slices of whole groups of (B,), as many as fit ``size`` chains, at least one."""
    borders = [0, *((group[1:] != group[:-1]).nonzero().flatten() + 1).tolist(), len(group)]
    chosen = [0]
    for border, after in itertools.pairwise(borders):
        if border > chosen[-1] and after - chosen[-1] > size:
            chosen.append(border)
    return [slice(start, end) for start, end in itertools.pairwise([*chosen, len(group)])]


def sample_together(
    trainer: Trainer, denoiser: Denoiser, problems: Sequence[Problem], sampler: Sampler, **settings: Any
) -> Any:
    """`sample_problems` by all ranks, each of which draws its part and gets all; in the precision of training."""
    ranks = trainer.ranks
    part = ranks.part(len(problems))
    with trainer.autocast():
        if len(problems) < ranks.world:
            return sample_problems(denoiser, problems, sampler, **settings)
        copies = chain_copies(problems)[part]
        own = sample_problems(denoiser, problems[part], sampler, copies=copies, **settings)
    return concatenate(ranks.gather(own))


def evaluate_each(
    decoders: Mapping[str, Sampler],
    trainer: Trainer,
    task: Task,
    problems: Sequence[Problem],
    tell: Callable[[str, Sampler, Evaluation], None],
    **settings: Any,
) -> None:
    """What every decoder reaches on ``problems``, drawn by all ranks; ``tell(name, decoder, found)`` on the first one.

    ``settings`` are those of `evaluate`.
    """
    for name, sampler in decoders.items():
        with trainer.evaluated():
            together = partial(sample_together, trainer)
            found = evaluate(trainer.denoiser, task, problems, sampler, sample=together, **settings)
            if trainer.ranks.main:
                tell(name, sampler, found)


def _widen(value: Tensor, steps: int) -> Tensor:
    """``value`` (B, S) with zeros up to ``steps`` columns."""
    return torch.cat([value, value.new_zeros(len(value), steps - value.shape[1])], 1)

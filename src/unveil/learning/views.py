"""What a likelihood is, whatever is denoised: views of a trajectory, and their log-probabilities.

A *view* is one input of the network together with what is scored in its output. Old, reference and new network see the
very same views, so their randomness is shared by construction. Tokens: ``likelihoods.py``; latents: ``latents.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from unveil.registry import Plugin
from unveil.rewards.base import Metadata, Reward
from unveil.samplers.base import Sampler


@dataclass(frozen=True)
class Inner:
    """Which of the gradient steps on the same rollouts."""

    number: int = 0
    count: int = 1


FIRST = Inner()


@dataclass(kw_only=True)
class Views:
    """N network inputs and what is scored in each, its *items* in C columns. The views of a chain are neighbours.

    Attributes:
        rows: (N,) the chain that a view belongs to.
        steps: (N,) the step whose advantage it carries.
        length: (N,) this view's share of what a ratio is normalised by.
    """

    called: ClassVar[str] = "views"
    """What they show, for messages."""
    opposed: ClassVar[bool] = False
    """True if the items of a view pull opposite ways, so that only weights that carry the advantage tell them apart."""
    steps_are_units: ClassVar[bool] = False
    """True if every view is one step with one item: what is measured can be told step by step."""

    rows: Tensor
    steps: Tensor
    length: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def items(self) -> Tensor:
        """(N, C) True at everything that has a log-probability."""
        return torch.ones(len(self), 1, dtype=torch.bool)

    @property
    def factors(self) -> Tensor:
        """(N, C) what every item's log-probability is multiplied by in a sum."""
        return self.items.float()

    @property
    def parts(self) -> Tensor:
        """(C,) the kind of decision that a column is, from 0: some ratios cover one kind alone."""
        return torch.zeros(self.items.shape[1], dtype=torch.long)

    def slice(self, start: int, end: int) -> Self:
        """The views from ``start`` to before ``end``."""
        part = slice(start, end)
        return dataclasses.replace(self, **{name: value[part] for name, value in self._sliced().items()})

    def _sliced(self) -> dict[str, Any]:
        """The fields that have a leading axis of views."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a reward was asked about B chains, for likelihoods that ask it again.

    Attributes:
        reward: the one that is optimised.
        prompts: (B) of the problems.
        metadata: (B) see `unveil.rewards.base.Metadata`.
    """

    reward: Reward
    prompts: Sequence[str]
    metadata: Sequence[Metadata]


@dataclass(kw_only=True)
class Scores:
    """What a network says of the items of N views.

    Attributes:
        log_prob: (N, C) float32, 0 where there is no item.
        forwards: network evaluations of the denoiser, counted per sample.
        entropy: (N, C) in nats, without gradient; 0 where there is no item, and for orders. None: of no use.
        mean: (N, ...) of the Gaussian that a latent's next state was drawn from; None for tokens.
        std: (N,) its standard deviation.
        velocity: (N, ...) dx/dt of the probability flow; None for tokens.
        clean: (N, ...) the expected x_0; None for tokens.
    """

    log_prob: Tensor
    forwards: int
    entropy: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    velocity: Tensor | None = None
    clean: Tensor | None = None

    def only(self, reads: frozenset[str]) -> Scores:
        """Without what nobody reads of it, and on the CPU what is as large as the samples."""
        gone = {"entropy", "mean", "std", "velocity", "clean"} - reads
        small = dataclasses.replace(self, **dict.fromkeys(gone))  # type: ignore[arg-type]
        for name in {"mean", "velocity", "clean"} & reads:
            value = getattr(small, name)
            setattr(small, name, None if value is None else value.cpu())
        return small


class Likelihood(Plugin, family="likelihood"):
    """Makes views of a trajectory and scores them."""

    needs: frozenset[str] = frozenset()
    """Trajectory fields that `views` reads."""
    resamples: bool = False
    """True if the views of two inner updates differ; otherwise they are made and scored once."""
    per_step: ClassVar[bool] = True
    """True if views belong to steps (a selector chooses which), False if they stand for the whole chain."""

    makes: ClassVar[type[Views]] = Views
    """The kind of its views: weightings and regularisers may read more of them than what all views have."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Scores` that it fills besides log-probabilities and entropies."""
    reads_old: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Scores` that `score` reads of the policy that drew the chains, besides the log-probabilities. If there
    are any, `score` takes that policy's scores of the same views as ``old``; None while it is scored itself."""
    differentiates: ClassVar[bool] = False
    """True if its scores are those of the reward, which must then have a gradient."""

    @property
    def scores_samples(self) -> bool:
        """False if what a greedy sampler leaves can be scored as well."""
        return True

    def check_fits(self, sampler: Sampler, denoiser: Any) -> None:
        """Refuse a rollout sampler or network whose decisions this likelihood cannot score.

        Raises:
            UserError: naming the key and what is allowed.
        """

    def views(self, trajectory: Any, chosen: Tensor, seeds: Sequence[int], spec: Any, inner: Inner = FIRST) -> Any:
        """Views of the ``chosen`` (B, S) steps (those with a weight above 0); ``seeds`` holds one per chain."""
        raise NotImplementedError

    def rewarded(self, views: Any, asked: Asked) -> Any:
        """The views, knowing the reward of their chains; asked of likelihoods that differentiate it."""
        raise NotImplementedError

    def recorded(self, views: Any, trajectory: Any) -> Tensor | None:
        """(N, C) log-probabilities by the policy that drew the chains, where they were recorded; None: score them."""
        return None

    def score(self, denoiser: Any, views: Any, sampler: Any) -> Scores:
        """Log-probabilities of all items under the distributions that ``sampler`` draws from."""
        raise NotImplementedError

    def measures(self, scores: Scores, old: Scores, views: Any, spec: Any) -> dict[str, Tensor]:
        """Numbers (N,) of the views that tell how far the network is from the policy that drew the chains, for the log;
        of what was scored anyway, ``old`` holding the fields `reads_old`."""
        return {}


class TokenFilter(Plugin, family="token_filter"):
    """Chooses among the items of an update by how uncertain the policy that drew them was."""

    keeps_ratio: bool = False
    """True: what is dropped only loses its weight, and still belongs to the ratio of its unit. False: it is gone."""

    def keep(self, views: Any, entropy: Tensor, trajectory: Any) -> Tensor:
        """(N, C) bool from entropies (N, C) in nats under the policy that drew the rollouts."""
        raise NotImplementedError

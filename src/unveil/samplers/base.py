"""What every sampler is: a start and seeds in, a Trajectory out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch

from unveil.denoisers.base import Denoiser, MaskedDenoiser
from unveil.registry import Plugin, UserError
from unveil.samplers.actions import Action
from unveil.samplers.canvas import Canvas
from unveil.samplers.trajectory import TokenTrajectory, Trajectory, check_needs, concatenate


class Start(Protocol):
    """Where B chains begin: a `Canvas` of tokens, the `Noise` of latents."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int | None:
        """Response positions; None where samples have a shape of their own."""
        ...

    def rows(self, index: slice) -> Self:
        """The start of some chains."""
        ...


class Sampler(Plugin, family="sampler", default="masked"):
    """Draws samples from a denoiser. A row's result depends on its seed and content, never on its batch."""

    denoises: ClassVar[type[Denoiser]]
    """The denoisers that it can draw from."""
    leaves: ClassVar[type[Trajectory]]
    """What it leaves behind."""
    steps: int
    """Denoising steps."""

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn at random: two chains of one problem are then equal."""
        return False

    @property
    def action(self) -> Action | None:
        """The distribution over positions of a learned rule, whose log-probability can be trained; None: no such."""
        return None

    @property
    def exact(self) -> bool:
        """False if samples are not drawn from the network's own output at their step; nothing can then score them."""
        return True

    @property
    def planned_steps(self) -> int | None:
        """The number of steps that was asked for; None: the sampler sets its own pace."""
        return None

    def at(self, update: int, seed: int) -> Sampler:
        """The sampler of one update of a run, for samplers that change over training."""
        return self

    def told(self, start: Any, prompts: Sequence[str]) -> Any:
        """The start, with what the sampler has to know of its rows' prompts besides."""
        return start

    def check_fits(self, response_length: Any) -> None:
        """Refuse settings that do not fit responses of ``response_length`` tokens (None: a shape of their own).

        Raises:
            UserError: naming the key and what is allowed.
        """

    def refused_fields(self) -> dict[str, str]:
        """Trajectory fields that this sampler cannot record, and why."""
        return {}

    def check_denoiser(self, denoiser: Any) -> None:
        """Refuse a denoiser that this sampler cannot use.

        Raises:
            UserError: saying what is missing.
        """
        if not isinstance(denoiser, self.denoises):
            raise UserError(f"sampler: {self.name!r} draws nothing from a model of samples of kind {denoiser.medium!r}")

    @torch.no_grad()
    def sample(
        self,
        denoiser: Any,
        start: Any,
        seeds: Sequence[int],
        *,
        needs: Iterable[str] = (),
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Any:
        """Denoise every row of the start into a trajectory of the kind `leaves`.

        Args:
            denoiser: the network, of the kind `denoises`; put it into evaluation mode first.
            start: where to begin (B rows), a `Start` of the denoiser's kind.
            seeds: one per row; a row's randomness depends on nothing else.
            needs: optional fields of the trajectory that somebody will read.
            batch_size: rows per network call; all at once if None.
            on_batch: called with the number of finished rows after every batch.

        Raises:
            UserError: the settings do not fit the response or the denoiser, or a field cannot be recorded.
        """
        wanted = check_needs(needs, self.leaves, self.refused_fields())
        self.check_denoiser(denoiser)
        self.check_fits(start.width)
        if len(seeds) != len(start):
            raise ValueError(f"{len(start)} rows need as many seeds, got {len(seeds)}")
        size = batch_size or len(start)
        parts = []
        for first in range(0, len(start), size):
            rows = slice(first, first + size)
            parts.append(self.sample_batch(denoiser, start.rows(rows), seeds[rows], wanted))
            if on_batch is not None:
                on_batch(min(first + size, len(start)))
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def sample_batch(self, denoiser: Any, start: Any, seeds: Sequence[int], needs: frozenset[str]) -> Any:
        """The chains of one batch, with the fields ``needs``; `sample` has checked everything."""
        raise NotImplementedError


class TokenSampler(Sampler):
    """Fills a canvas with tokens."""

    denoises = MaskedDenoiser
    leaves = TokenTrajectory
    temperature: float
    """Of the drawn tokens; 0 takes the likeliest."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def check_denoiser(self, denoiser: Any) -> None:
        super().check_denoiser(denoiser)
        if denoiser.spec.corruption == "uniform":
            raise UserError(
                f"sampler: {self.name!r} fills masks, the model's noise is random tokens (allowed: entropy_bound, "
                "ancestral)"
            )

    def sample_batch(
        self, denoiser: MaskedDenoiser, start: Canvas, seeds: Sequence[int], needs: frozenset[str]
    ) -> TokenTrajectory:
        raise NotImplementedError

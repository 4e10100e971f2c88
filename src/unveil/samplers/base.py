"""What every sampler is: an initial canvas and seeds in, a Trajectory out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from unveil.denoisers.base import MaskedDenoiser
from unveil.registry import Plugin, UserError
from unveil.samplers.actions import Action
from unveil.samplers.canvas import Canvas
from unveil.samplers.trajectory import Trajectory, check_needs, concatenate


class Sampler(Plugin, family="sampler", default="masked"):
    """Draws samples from a denoiser. A row's result depends on its seed and content, never on its batch."""

    steps: int
    """Denoising steps."""
    temperature: float
    """Of the drawn tokens; 0 takes the likeliest."""

    @property
    def action(self) -> Action | None:
        """The distribution over positions of a learned rule, whose log-probability can be trained; None: no such."""
        return None

    @property
    def exact(self) -> bool:
        """False if tokens are not drawn from the network's own output at their step; nothing can then score them."""
        return True

    @property
    def planned_steps(self) -> int | None:
        """The number of steps that was asked for; None: the sampler sets its own pace."""
        return None

    def check_fits(self, response_length: int) -> None:
        """Refuse settings that do not fit responses of ``response_length`` tokens.

        Raises:
            UserError: naming the key and what is allowed.
        """

    def refused_fields(self) -> dict[str, str]:
        """Trajectory fields that this sampler cannot record, and why."""
        return {}

    def check_denoiser(self, denoiser: MaskedDenoiser) -> None:
        """Refuse a denoiser that this sampler cannot use; by default one that has no masks.

        Raises:
            UserError: saying what is missing.
        """
        if denoiser.spec.corruption == "uniform":
            raise UserError(
                f"sampler: {self.name!r} fills masks, the model's noise is random tokens (allowed: entropy_bound, "
                "ancestral)"
            )

    @torch.no_grad()
    def sample(
        self,
        denoiser: MaskedDenoiser,
        canvas: Canvas,
        seeds: Sequence[int],
        *,
        needs: Iterable[str] = (),
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Denoise every row of the canvas.

        Args:
            denoiser: the network; put it into evaluation mode first.
            canvas: where to start (B rows).
            seeds: one per row; a row's randomness depends on nothing else.
            needs: optional fields of the Trajectory that somebody will read.
            batch_size: rows per network call; all at once if None.
            on_batch: called with the number of finished rows after every batch.

        Raises:
            UserError: the settings do not fit the response or the denoiser, or a field cannot be recorded.
        """
        wanted = check_needs(needs, self.refused_fields())
        self.check_fits(canvas.response.shape[1])
        self.check_denoiser(denoiser)
        if len(seeds) != len(canvas):
            raise ValueError(f"{len(canvas)} rows need as many seeds, got {len(seeds)}")
        size = batch_size or len(canvas)
        parts = []
        for start in range(0, len(canvas), size):
            rows = slice(start, start + size)
            parts.append(self.sample_batch(denoiser, canvas.rows(rows), seeds[rows], wanted))
            if on_batch is not None:
                on_batch(min(start + size, len(canvas)))
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def sample_batch(
        self, denoiser: MaskedDenoiser, canvas: Canvas, seeds: Sequence[int], needs: frozenset[str]
    ) -> Trajectory:
        """The chains of one batch, with the fields ``needs``; `sample` has checked everything."""
        raise NotImplementedError

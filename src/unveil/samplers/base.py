"""What every sampler is: an initial canvas and seeds in, a Trajectory out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from unveil.denoisers.base import MaskedDenoiser
from unveil.registry import Plugin
from unveil.samplers.actions import Action
from unveil.samplers.canvas import Canvas
from unveil.samplers.trajectory import Trajectory


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
        """Refuse a denoiser that this sampler cannot use.

        Raises:
            UserError: saying what is missing.
        """

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
        raise NotImplementedError

"""The medium of images: latents start from noise, finished ones are decoded, records hold PNG."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.registry import UserError
from unveil.rewards.images import data_url
from unveil.samplers.latents import LatentTrajectory, Noise
from unveil.tasks.medium import Medium, Origins, Sample

DECODED = 64
"""Latents that are decoded at a time."""
SAMPLE_SIDE, FILM_SIDE = 256, 128
"""Longest side in pixels of the samples and of the films that a run keeps: a film of 512 x 512 would hold megabytes per
step, most of it noise that no PNG makes smaller."""


@dataclass(kw_only=True)
class Image(Medium, name="image"):
    """Images (C, H, W) with values in [0, 1]."""

    evaluated: ClassVar[frozenset[str]] = frozenset()
    shown: ClassVar[frozenset[str]] = frozenset({"latents", "times", "guesses"})

    def check_fits(self, denoiser: ContinuousDenoiser, prompts: Sequence[str], length: int | None) -> None:
        if length is not None:
            raise UserError(
                f"policy.rollout.response_length: an image has the model's own shape, got {length} (allowed: null)"
            )
        denoiser.condition(prompts[:1])  # refuses prompts of another kind

    def start(
        self, denoiser: ContinuousDenoiser, prompts: Sequence[str], length: int | None, origins: Origins, **how: Any
    ) -> Noise:
        """Noise, or ``initial`` states (B, *D) at ``time``, as in `Noise`."""
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        condition = denoiser.condition(list(place)).rows(torch.tensor([place[prompt] for prompt in prompts]))
        return Noise(condition=condition, problems=list(origins.problems), copies=list(origins.copies), **how)

    @torch.no_grad()
    def samples(self, denoiser: ContinuousDenoiser, states: Tensor) -> list[Sample]:
        parts = [denoiser.decode(part.to(denoiser.device)).float().cpu() for part in states.split(DECODED)]
        return [image for part in parts for image in part]

    def key(self, sample: Sample) -> Hashable:
        return id(sample)  # no two images are equal

    def numbers(self, denoiser: ContinuousDenoiser, trajectory: LatentTrajectory) -> dict[str, float]:
        """``latent_scale``: root mean square of the finished latents; it grows in training that loses the data."""
        return {"latent_scale": trajectory.samples.square().mean().sqrt().item()}

    def written(self, sample: Sample) -> dict[str, Any]:
        return {"image": data_url(shrunk(sample, SAMPLE_SIDE))}

    def steps(self, denoiser: ContinuousDenoiser, trajectory: LatentTrajectory, row: int) -> list[dict[str, Any]]:
        """The state after the step and the x_0 that the network expected at it, as images; the time after it."""
        assert trajectory.latents is not None and trajectory.guesses is not None and trajectory.times is not None
        count = int(trajectory.active[row].sum())
        states = self.samples(denoiser, trajectory.latents[row, 1 : count + 1])
        guesses = self.samples(denoiser, trajectory.guesses[row, :count])
        return [
            {
                "image": data_url(shrunk(states[step], FILM_SIDE)),
                "guess_image": data_url(shrunk(guesses[step], FILM_SIDE)),
                "time": round(float(trajectory.times[row, step + 1]), 6),
                "noisy": bool(trajectory.noisy[row, step]),
            }
            for step in range(count)
        ]


def shrunk(image: Tensor, side: int) -> Tensor:
    """An image (C, H, W) with its longest side cut down to ``side`` pixels; one that is no larger stays as it is."""
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    size = [max(1, round(length * side / longest)) for length in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

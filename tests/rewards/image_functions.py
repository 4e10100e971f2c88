"""Reward functions as a user would write them for DDPO."""

from __future__ import annotations

from typing import Any

import numpy
import torch


def brightness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[dict[str, Any], ...]) -> Any:
    assert images.ndim == 4 and images.dtype == torch.float32 and isinstance(prompts, tuple)
    return images.mean((1, 2, 3)) + torch.tensor([float(own["bonus"]) for own in metadata]), {}


def bare(images: Any, prompts: Any, metadata: Any) -> Any:
    return numpy.full(len(images), 2.0)


def of_pil(images: list[Any], prompts: Any, metadata: Any) -> Any:
    return [float(image.size[0]) for image in images], None


def made(factor: float = 1.0) -> Any:
    def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        return [factor] * len(images), {"factor": factor}

    return reward


def crashes(images: Any, prompts: Any, metadata: Any) -> Any:
    raise ZeroDivisionError("oh")


def two(images: Any, prompts: Any, metadata: Any) -> Any:
    return 1.0, 2.0


NOT_A_FUNCTION = 3

"""A reward of images with the signature of TRL's DDPO trainer; `policy.reward=ddpo` calls it as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def symmetric(
    images: Tensor, prompts: tuple[str, ...], metadata: tuple[dict[str, Any], ...]
) -> tuple[Tensor, dict[str, Any]]:
    """1 for an image (C, H, W) in [0, 1] that equals its mirror image, less the mean difference from it."""
    return 1 - (images - images.flip(-1)).abs().flatten(1).mean(1), {}

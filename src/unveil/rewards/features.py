"""What images are compared by: one row of numbers per image."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unveil.registry import Plugin, UserError
from unveil.rewards.networks import Classifier

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the three channels, as vision networks are trained with."""


class Features(Plugin, family="features"):
    """Maps samples to vectors in which near means alike."""

    medium: ClassVar[Literal["text", "image"]] = "image"
    """What it can look at."""

    def of(self, samples: Sequence[Tensor]) -> Tensor:
        """(N, F) float32 on the CPU, of images (C, H, W) in [0, 1]; what is no number counts as 0."""
        images = torch.stack([sample.detach().float().cpu() for sample in samples]).nan_to_num(0.0, 0.0, 0.0)
        with torch.no_grad():
            return self._of(images.clamp(0, 1)).float().cpu()

    def _of(self, images: Tensor) -> Tensor:
        """(N, F) of images (N, C, H, W)."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Pixels(Features, name="pixels"):
    """The image itself."""

    def _of(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@dataclass(kw_only=True)
class JudgeFeatures(Features, name="judge"):
    """The last hidden layer of a classifier."""

    network: str
    """Name of an embedded classifier, or path of a safetensors file (see `unveil.rewards.networks`)."""

    def __post_init__(self) -> None:
        _ = self.judge  # a file that is not there is refused before any work

    @cached_property
    def judge(self) -> Classifier:
        return Classifier.open(self.network)

    def _of(self, images: Tensor) -> Tensor:
        return self.judge.features(images)


@dataclass(kw_only=True)
class VisionFeatures(Features, name="vision"):
    """The pooled output of a published vision network (DINOv2, DINOv3, ViT), read through transformers."""

    path: str
    """Folder of the network, or ``owner/name`` on the hub."""
    size: int = 224
    """Pixels per side that images are resized to."""
    batch_size: int = 64
    """Images per call of the network."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("features 'vision': the extra is not installed (pip install 'unveil[hf]')")

    @cached_property
    def network(self) -> Any:
        from transformers import AutoModel

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoModel.from_pretrained(self.path).to(device).eval().requires_grad_(False)

    def _of(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        found = []
        for part in images.split(self.batch_size):
            scaled = interpolate(part, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            pixels = (scaled.expand(-1, 3, -1, -1) - mean) / deviation
            found.append(self.network(pixel_values=pixels.to(self.network.device)).pooler_output.cpu())
        return torch.cat(found)

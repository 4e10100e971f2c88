"""Rewards that look at pixels: the size of a JPEG, a classifier's opinion, plain statistics."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, RewardError, Score
from unveil.rewards.networks import Classifier


def pixels(image: Tensor) -> Tensor:
    """The 8-bit values (H, W, 3 or 1) of an image (C, H, W) in [0, 1], rounded to the nearest level.

    Raises:
        RewardError: it has another shape, or values that are no numbers.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.isfinite().all():
        raise RewardError("not_an_image", f"should be finite and (1 or 3, H, W), got shape {tuple(image.shape)}")
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def pil_image(image: Tensor) -> Any:
    """A PIL image of mode L or RGB; see `pixels`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("Pillow is not installed (pip install 'unveil[image]')") from error
    values = pixels(image).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def data_url(image: Tensor) -> str:
    """A lossless PNG of the image as ``data:image/png;base64,...``, for JSON and for pages."""
    buffer = io.BytesIO()
    pil_image(image).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def jpeg(image: Tensor, quality: int = 75) -> bytes:
    """The image as a JPEG; the default is Pillow's."""
    buffer = io.BytesIO()
    pil_image(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def image_batch(completions: Sequence[Any]) -> Tensor:
    """(N, C, H, W) in [0, 1] of images of one size.

    Raises:
        RewardError: an image holds what is no number.
    """
    images = torch.stack([image.detach().float().cpu() for image in completions])
    if not images.isfinite().all():
        raise RewardError("not_an_image", "an image holds nan or inf")
    return images.clamp(0, 1)


@dataclass(kw_only=True)
class JpegSize(Reward, name="jpeg"):
    """Kilobytes (1000 bytes) of the image as a JPEG: DDPO's incompressibility, or with ``small`` its compressibility.

    Of small images the file's head is most of it (some 330 bytes of a grey one); it is the same for all of a size.
    """

    medium = "image"

    prefer: Literal["small", "large"] = "small"
    """``small``: minus the kilobytes; ``large``: the kilobytes."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of the compression."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        sign = -1.0 if self.prefer == "small" else 1.0
        return [sign * self._kilobytes(image) for image in completions]

    def _kilobytes(self, image: Tensor) -> float:
        return len(jpeg(image, self.quality)) / 1000


@dataclass(kw_only=True)
class ClassProbability(Reward, name="classifier"):
    """How sure a classifier is of the class that was asked for (``label`` of the problem's answer)."""

    medium = "image"
    differentiable = True

    network: str
    """Name of an embedded classifier, or path of a safetensors file (see `unveil.rewards.networks`)."""
    output: Literal["probability", "log_probability", "logit"] = "probability"
    """The logarithm and the logit do not level off where the classifier is nearly sure."""

    def __post_init__(self) -> None:
        _ = self.judge  # a file that is not there is refused before any work

    @cached_property
    def judge(self) -> Classifier:
        return Classifier.open(self.network)

    @torch.no_grad()
    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return self.values(image_batch(completions), prompts, metadata).tolist()

    def values(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        logits = self.judge(images.float().cpu())
        if self.output != "logit":
            logits = logits.log_softmax(-1)
        labels = torch.tensor([own["label"] for own in metadata])
        own = logits[torch.arange(len(labels)), labels]
        return own.exp() if self.output == "probability" else own


@dataclass(kw_only=True)
class PixelStatistic(Reward, name="pixels"):
    """A plain statistic of an image: easy to raise, easy to see through, so a good test of what else changes."""

    medium = "image"
    differentiable = True

    statistic: Literal["brightness", "contrast", "sparsity", "norm", "colourfulness", "sharpness"]
    """``brightness``: mean; ``contrast``: standard deviation; ``sparsity``: share of pixels whose channels are all
    below 0.05; ``norm``: root mean square of the image scaled to -1 .. 1; ``colourfulness``: Hasler and Suesstrunk's,
    of 8-bit levels (0 for grey); ``sharpness``: mean size of the discrete Laplacian."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return self.values(image_batch(completions), prompts, metadata).tolist()

    def values(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        return _STATISTICS[self.statistic](images)

    def check_differentiable(self, path: str) -> None:
        if self.statistic in _COUNTED:
            smooth = ", ".join(name for name in _STATISTICS if name not in _COUNTED)
            raise UserError(f"{path}.statistic: {self.statistic!r} has no gradient (allowed: {smooth})")


def colourfulness(images: Tensor) -> Tensor:
    """(N,) sigma + 0.3 mu of the opponent colours rg = R - G and yb = (R + G)/2 - B, of images (N, 3, H, W).

    After "Measuring colourfulness in natural images" (2003): some 0 not, 33 averagely, 82 highly colourful.
    """
    if images.shape[1] != 3:
        return images.new_zeros(len(images))
    red, green, blue = (images * 255).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
    return opponents.std(-1, unbiased=False).norm(dim=1) + 0.3 * opponents.mean(-1).norm(dim=1)


def sharpness(images: Tensor) -> Tensor:
    """(N,) mean absolute response to the 4-neighbour Laplacian, inside the border."""
    inner = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (around - 4 * inner).abs().flatten(1).mean(1)


_STATISTICS = {
    "brightness": lambda images: images.flatten(1).mean(1),
    "contrast": lambda images: images.flatten(1).std(1, unbiased=False),
    "sparsity": lambda images: (images.amax(1) < 0.05).float().flatten(1).mean(1),
    "norm": lambda images: (images * 2 - 1).square().flatten(1).mean(1).sqrt(),
    "colourfulness": colourfulness,
    "sharpness": sharpness,
}
_COUNTED = ("sparsity",)
"""Of them those that count, and so are constant almost everywhere."""

"""OCR: what a reader makes of an image, against the text that was asked for.

`Ocr` reads with one of our small networks, images of its own size alone; `RapidOcr` with a published engine, any image.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, Score
from unveil.rewards.images import image_batch, pixels
from unveil.rewards.networks import Reader


def edit_distance(first: str, second: str) -> int:
    """Levenshtein: the fewest insertions, deletions and replacements of one character that lead to the other."""
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, start=1):
        before, row[0] = row[0], count
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
    return row[-1]


def text_score(read: str, wanted: str) -> float:
    """1 - distance / length of the wanted text, at least 0; case and spaces do not count (Flow-GRPO, 2505.05470)."""
    read, wanted = _plain(read), _plain(wanted)
    return max(0.0, 1 - edit_distance(read, wanted) / max(1, len(wanted)))


def wanted_text(prompt: str, metadata: Metadata) -> str | None:
    """``text`` of the problem's answer; without it what stands in the prompt's first pair of quotation marks."""
    if "text" in metadata:
        return metadata["text"]
    quoted = re.search(r'"([^"]+)"', prompt)
    return quoted[1] if quoted else None


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


@dataclass(kw_only=True)
class Ocr(Reward, name="ocr"):
    """How much of the wanted text (`wanted_text`) a reader finds in the image, from 0 to 1."""

    medium = "image"

    network: str
    """Name of an embedded reader, or path of a safetensors file (see `unveil.rewards.networks`)."""

    def __post_init__(self) -> None:
        _ = self.reader  # a file that is not there is refused before any work

    @cached_property
    def reader(self) -> Reader:
        return Reader.open(self.network)

    @torch.no_grad()
    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        read = self.reader.read(image_batch(completions))
        wanted = [wanted_text(prompt, own) for prompt, own in zip(prompts, metadata, strict=True)]
        return [None if want is None else text_score(text, want) for text, want in zip(read, wanted, strict=True)]


@dataclass(kw_only=True)
class RapidOcr(Reward, name="rapidocr"):
    """The same by RapidOCR, which is PaddleOCR's detector and recogniser on the processor.

    As in Flow-GRPO, whose reward is PaddleOCR's, all that is read is joined, and an image that has the wanted text
    somewhere in it is right whatever else stands there.
    """

    medium = "image"

    confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lines that the engine is less sure of are not read. Flow-GRPO takes all."""
    detect: bool = True
    """Look for lines first; otherwise the whole image is taken for one line, which is right for images of a few pixels
    and takes a twentieth of the time."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Of the processor, for one image."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise UserError(f"reward {self.name!r}: rapidocr-onnxruntime is not installed (pip install 'unveil[ocr]')")

    @cached_property
    def engine(self) -> Any:
        from rapidocr_onnxruntime import RapidOCR

        return RapidOCR(intra_op_num_threads=self.threads, text_score=self.confidence)

    def read(self, image: torch.Tensor) -> str:
        """The lines of an image (1 or 3, H, W), from top to bottom, as one text."""
        # The engine takes arrays of three channels for blue, green, red.
        array = pixels(image).expand(-1, -1, 3).flip(-1).contiguous().numpy()
        lines, _ = self.engine(array, use_det=self.detect, use_cls=False)
        return "".join(line[-2] for line in lines or [])  # [place,] text, confidence

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [
            None if (want := wanted_text(prompt, own)) is None else self._score(image, want)
            for image, prompt, own in zip(completions, prompts, metadata, strict=True)
        ]

    def _score(self, image: torch.Tensor, wanted: str) -> float:
        read = self.read(image)
        return 1.0 if _plain(wanted) in _plain(read) else text_score(read, wanted)

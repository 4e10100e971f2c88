"""OCR: what a reader makes of an image, against the text that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from unveil.rewards.base import Metadata, Reward, Score
from unveil.rewards.images import image_batch
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
    read, wanted = read.replace(" ", "").lower(), wanted.replace(" ", "").lower()
    return max(0.0, 1 - edit_distance(read, wanted) / max(1, len(wanted)))


@dataclass(kw_only=True)
class Ocr(Reward, name="ocr"):
    """How much of the wanted text (``text`` of the problem's answer) a reader finds in the image, from 0 to 1."""

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
        return [text_score(text, own["text"]) for text, own in zip(read, metadata, strict=True)]

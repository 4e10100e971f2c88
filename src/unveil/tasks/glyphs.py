"""Draw a word: text-conditioned images whose text a reader can check."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import UserError
from unveil.rewards.networks import Reader
from unveil.rewards.reading import text_score
from unveil.rewards.statistics import group_diversity
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.images import ImageTask, require, stacked

CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"
VOWELS = "AEIOUY"
LETTERS = "".join(sorted(CONSONANTS + VOWELS))
HEIGHT, WIDTH = 12, 32
SIZES = (9, 10, 11)
"""Of the type, in pixels: three capitals M fill the width at the largest."""


@dataclass(kw_only=True)
class Glyphs(ImageTask, name="glyphs"):
    """Prompt: three capitals, consonant, vowel, consonant (``CAT``). Right if the judge, a reader, reads just these.

    Images are grey, 12 x 32 pixels, light on black; size, place and brightness differ from image to image. One word in
    five is test, by a stable hash: a model never sees it, but all its letters.
    """

    fonts: list[str] = field(default_factory=list)
    """TrueType files, one of which is drawn at random for every image; none: the font inside Pillow."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of letters in the prompts of examples that are replaced by others of their kind (vowel or not)."""
    examples_of: Literal["words", "strings"] = "words"
    """What examples show: words of the split, or any one to three capitals (to teach a reader, who then guesses no
    letter from its neighbours)."""
    judge_name: str = "glyphs-judge"
    """The reader that judges: an embedded one, or a path (`unveil.rewards.networks`)."""

    def __post_init__(self) -> None:
        for number, path in enumerate(self.fonts):
            if not Path(path).is_file():
                raise UserError(f"fonts.{number}: {path!r}: no such file")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, HEIGHT, WIDTH)

    @cached_property
    def judge(self) -> Reader:
        return Reader.open(self.judge_name)

    @cached_property
    def words(self) -> dict[Split, list[str]]:
        """All words of each split."""
        found: dict[Split, list[str]] = {"train": [], "test": []}
        for letters in product(CONSONANTS, VOWELS, CONSONANTS):
            word = "".join(letters)
            found["test" if zlib.crc32(word.encode()) % 5 == 0 else "train"].append(word)
        return found

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        words = self.words[split]
        if count > len(words):
            raise UserError(f"glyphs has {len(words)} {split} words, {count} were asked for")
        chosen = random.Random(f"glyphs/{split}/{seed}").sample(words, count)
        return [Problem(id=f"glyphs-{word}", prompt=word, answer={"text": word}) for word in chosen]

    def examples(self, split: Split, count: int, seed: int) -> tuple[list[str], Tensor]:
        rng = random.Random(f"glyphs/{split}/examples/{seed}")
        words = [self._word(split, rng) for _ in range(count)]
        images = self.draw(words, rng)
        return ["".join(self._misheard(letter, rng) for letter in word) for word in words], images

    def draw(self, words: Sequence[str], rng: random.Random) -> Tensor:
        """An image (1, H, W) per word, as (N, 1, H, W).

        Raises:
            UserError: Pillow is not installed, or cannot read a font.
        """
        require("PIL")
        import numpy
        from PIL import Image, ImageDraw

        images = numpy.zeros((len(words), HEIGHT, WIDTH), dtype=numpy.uint8)
        for row, word in enumerate(words):
            font = rng.choice(self._fonts)
            left, top, right, bottom = font.getbbox(word)
            x = rng.uniform(0, max(0, WIDTH - (right - left))) - left
            y = rng.uniform(0, max(0, HEIGHT - (bottom - top))) - top
            canvas = Image.new("L", (WIDTH, HEIGHT))
            ImageDraw.Draw(canvas).text((round(x), round(y)), word, font=font, fill=rng.randint(150, 255))
            images[row] = numpy.asarray(canvas)
        return torch.from_numpy(images)[:, None].float() / 255

    @torch.no_grad()
    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        """Score: 1 - edit distance / length, of what the judge reads."""
        if not len(samples):
            return []
        found = []
        for text, problem in zip(self.judge.read(stacked(samples)), problems, strict=True):
            score = text_score(text, problem.answer["text"])
            found.append(Verdict(correct=score == 1, score=score, metrics={"letters": float(len(text))}))
        return found

    def measure(self, problems: Sequence[Problem], samples: Sequence[Any]) -> dict[str, float]:
        """``diversity``: mean distance between two images of the same word."""
        return {"diversity": group_diversity(stacked(samples).flatten(1), [problem.prompt for problem in problems])}

    def _word(self, split: Split, rng: random.Random) -> str:
        if self.examples_of == "words":
            return rng.choice(self.words[split])
        return "".join(rng.choices(LETTERS, k=rng.choice((1, 2, 3, 3, 3))))

    def _misheard(self, letter: str, rng: random.Random) -> str:
        kind = VOWELS if letter in VOWELS else CONSONANTS
        return rng.choice([other for other in kind if other != letter]) if rng.random() < self.label_noise else letter

    @cached_property
    def _fonts(self) -> list[Any]:
        from PIL import ImageFont

        try:
            if not self.fonts:
                return [ImageFont.load_default(size=size) for size in SIZES]
            return [ImageFont.truetype(path, size) for path in self.fonts for size in SIZES]
        except OSError as error:
            raise UserError(f"glyphs.fonts: {error}") from error

"""Draw a word: text-conditioned images whose text a reader can check."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

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
BRIGHTNESS = (150, 255)
"""Of the letters: the darkest and the lightest of 255."""


class _Typed(NamedTuple):
    """A text in a font, to be drawn at some place."""

    font: Any
    pieces: list[tuple[str, float]]
    """What is drawn at a time, and the left edge of the whole, seen from where the piece begins."""
    top: float
    """The upper edge of the whole, seen from where every piece begins."""
    across: tuple[float, float]
    """First and last place of its left edge."""
    down: tuple[float, float]
    """First and last place of its upper edge."""

    def draw(self, x: float, y: float, brightness: int) -> Tensor:
        """(1, H, W) in [0, 1] with the upper left corner at (x, y)."""
        import numpy
        from PIL import Image, ImageDraw

        canvas = Image.new("L", (WIDTH, HEIGHT))
        for text, left in self.pieces:
            place = (round(x - left), round(y - self.top))
            ImageDraw.Draw(canvas).text(place, text, font=self.font, fill=brightness)
        return torch.from_numpy(numpy.array(canvas))[None].float() / 255


@dataclass(kw_only=True)
class Glyphs(ImageTask, name="glyphs"):
    """Prompt: three capitals, consonant, vowel, consonant (``CAT``). Right if the judge, a reader, reads just these.

    Images are grey, 12 x 32 pixels, light on black; size, place and brightness differ from image to image. One word in
    five is test, by a stable hash: a model never sees it, but all its letters.
    """

    fonts: list[str] = field(default_factory=list)
    """TrueType files, one of which is drawn at random for every image; none: the font inside Pillow."""
    sizes: Annotated[list[Annotated[int, Field(ge=5, le=12)]], Field(min_length=1)] = field(
        default_factory=lambda: list(SIZES)
    )
    """Of the type, in pixels, one of which is drawn at random for every image."""
    pitch: Annotated[int, Field(ge=5, le=10)] | None = None
    """Pixels from the middle of a letter to that of the next, as a typewriter sets them; null: as the font has it."""
    jitter: Annotated[int, Field(ge=0)] | None = None
    """Pixels by which a word may stand off the middle, each way; null: anywhere inside."""
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
        drawn = []
        for word in words:
            typed = self._typed(word, rng.choice(self._fonts))
            x, y = rng.uniform(*typed.across), rng.uniform(*typed.down)
            drawn.append(typed.draw(x, y, rng.randint(*BRIGHTNESS)))
        return torch.stack(drawn)

    def drawings(self, text: str) -> Tensor:
        """All there is to `draw` for a text, at full brightness: (M, 1, H, W)."""
        found = []
        for typed in (self._typed(text, font) for font in self._fonts):
            (left, right), (top, bottom) = typed.across, typed.down
            first = typed.draw(left, top, 255)
            # All others are this one, moved to the right and down: windows of it with an empty edge there.
            moved = pad(first, (round(right - left), 0, round(bottom - top), 0))
            found.append(moved.unfold(1, HEIGHT, 1).unfold(2, WIDTH, 1).reshape(-1, 1, HEIGHT, WIDTH))
        return torch.cat(found)

    def distances(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(N,) Euclidean distance of images (N, 1, H, W) to the nearest that `draw` could draw for the text of each, of
        any brightness; to the empty canvas where the text is empty."""
        found = torch.zeros(len(texts), dtype=torch.float64)
        for text in set(texts):
            rows = [row for row, own in enumerate(texts) if own == text]
            seen, real = images[rows].double().flatten(1), self.drawings(text).double().flatten(1)
            dot, energy = seen @ real.T, real.square().sum(1)
            dark, light = BRIGHTNESS
            brightness = (dot / energy.clamp_min(1e-9)).clamp(dark / 255, light / 255)  # the nearest along the line
            squared = seen.square().sum(1, keepdim=True) - 2 * brightness * dot + brightness**2 * energy
            found[rows] = squared.amin(1).clamp_min(0).sqrt()
        return found

    @torch.no_grad()
    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        """Score: 1 - edit distance / length, of what the judge reads. Distance: to the nearest drawing of just what it
        reads, so that it says how well letters are drawn and not which ones."""
        if not len(samples):
            return []
        images = stacked(samples)
        read = self.judge.read(images)
        found = []
        for text, distance, problem in zip(read, self.distances(images, read).tolist(), problems, strict=True):
            score = text_score(text, problem.answer["text"])
            metrics = {"letters": float(len(text)), "distance": distance}
            found.append(Verdict(correct=score == 1, score=score, metrics=metrics))
        return found

    @torch.no_grad()
    def measure(self, problems: Sequence[Problem], samples: Sequence[Any]) -> dict[str, float]:
        """``diversity``: mean distance between two images of the same word. ``distance``: see `check_all`; the mean."""
        images = stacked(samples)
        return {
            "diversity": group_diversity(images.flatten(1), [problem.prompt for problem in problems]),
            "distance": self.distances(images, self.judge.read(images)).mean().item(),
        }

    def _word(self, split: Split, rng: random.Random) -> str:
        if self.examples_of == "words":
            return rng.choice(self.words[split])
        return "".join(rng.choices(LETTERS, k=rng.choice((1, 2, 3, 3, 3))))

    def _misheard(self, letter: str, rng: random.Random) -> str:
        kind = VOWELS if letter in VOWELS else CONSONANTS
        return rng.choice([other for other in kind if other != letter]) if rng.random() < self.label_noise else letter

    def _typed(self, text: str, font: Any) -> _Typed:
        left, top, right, bottom = font.getbbox(text)
        pieces, width = [(text, left)], right - left
        if self.pitch is not None:
            boxes = [font.getbbox(letter) for letter in text]
            # A letter stands in the middle of its own `pitch` pixels.
            pieces = [
                (letter, start - place * self.pitch - (self.pitch - (end - start)) // 2)
                for place, (letter, (start, _, end, _)) in enumerate(zip(text, boxes, strict=True))
            ]
            width = self.pitch * len(text)
        return _Typed(font, pieces, top, self._places(WIDTH - width), self._places(HEIGHT - (bottom - top)))

    def _places(self, free: float) -> tuple[float, float]:
        """First and last place along a side with so many free pixels."""
        free = max(0, free)
        if self.jitter is None:
            return 0, free
        return max(0, free // 2 - self.jitter), min(free, free // 2 + self.jitter)

    @cached_property
    def _fonts(self) -> list[Any]:
        from PIL import ImageFont

        try:
            if not self.fonts:
                return [ImageFont.load_default(size=size) for size in self.sizes]
            return [ImageFont.truetype(path, size) for path in self.fonts for size in self.sizes]
        except OSError as error:
            raise UserError(f"glyphs.fonts: {error}") from error

"""Prompts for image models, as published code keeps them: text files, JSON lines, a function; and folders of images."""

from __future__ import annotations

import importlib
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from unveil.registry import UserError
from unveil.rewards.base import Reward
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.files import choose_rows, read_json_lines, read_json_list, read_text_lines
from unveil.tasks.images import ImageTask, require

TEST_SHARE = 10
"""One prompt in so many is held out, where no file of test prompts is given."""


@dataclass(kw_only=True)
class _Judged(ImageTask):
    """Verdicts by a reward, since nothing says what is right."""

    judge: Reward | None = None
    """Scores samples; best one that is not trained on. None: nothing is ever correct, and every score is 0."""
    solved_at: float = 0.5
    """From this score of the judge on a sample counts as correct."""

    def __post_init__(self) -> None:
        if self.judge is not None:
            self.judge.check_medium("image", f"{self.name}.judge")

    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        """What the judge cannot score is not correct, and its metric ``judged`` is 0."""
        if self.judge is None or not samples:
            return [Verdict(correct=False, score=0.0, metrics={"judged": 0.0}) for _ in samples]
        metadata: list[Mapping[str, Any]] = [{**problem.answer, "id": problem.id} for problem in problems]
        given = self.judge.ask(list(samples), [problem.prompt for problem in problems], metadata).total
        return [
            Verdict(correct=one >= self.solved_at, score=one, metrics={"judged": 1.0})
            if isinstance(one, float)
            else Verdict(correct=False, score=0.0, metrics={"judged": 0.0})
            for one in given
        ]


@dataclass(kw_only=True)
class Prompts(_Judged, name="prompts"):
    """Prompts without images: from files, or from a function as TRL's DDPO trainer takes it.

    A ``.txt`` file holds a prompt per line, a ``.json`` file one list of prompts. Any other is JSON lines: ``prompt``,
    and further keys that become the metadata of rewards (those of an object ``metadata`` too). Equal prompts count
    once. Without ``test_file`` one prompt in ten, by a stable hash, is test.
    """

    train_file: str | None = None
    """Prompts to train on."""
    test_file: str | None = None
    """Prompts to test on; they are kept out of train."""
    function: str | None = None
    """``package.module:function``, called as ``function() -> (prompt, metadata)``, instead of ``train_file``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_file is None) == (self.function is None):
            raise UserError("prompts: needs either train_file or function")
        self._drawn: Callable[[], tuple[str, Any]] | None = None
        if self.function is not None:
            module, _, attribute = self.function.partition(":")
            try:
                self._drawn = getattr(importlib.import_module(module), attribute)
            except Exception as error:  # whatever a module does when it is imported
                raise UserError(f"prompts.function: {self.function!r} cannot be imported: {error}") from error

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        if split == "test" and self.test_file is not None:
            return choose_rows(self._test, split, count, seed, self.test_file)
        if self._drawn is not None:
            return self._draw(self._drawn, split, count, seed)
        assert self.train_file is not None
        rows = [row for row in self._rows if self._split(row.prompt) == split]
        return choose_rows(rows, split, count, seed, self.train_file)

    def _draw(self, function: Callable[[], tuple[str, Any]], split: Split, count: int, seed: int) -> list[Problem]:
        """Calls until there are enough different prompts. The function may use any global generator: they are seeded
        for the call, and left as they were."""
        import numpy

        python, array = random.getstate(), numpy.random.get_state()
        own = derive_seed("prompts", split, seed)
        found: dict[str, Problem] = {}
        with torch.random.fork_rng(devices=[]):
            random.seed(own)
            numpy.random.seed(own % 2**32)
            torch.manual_seed(own)
            try:
                for _ in range(200 * count):
                    prompt, metadata = function()
                    if self._split(prompt) == split:
                        found.setdefault(prompt, _problem(prompt, metadata or {}))
                    if len(found) == count:
                        break
            finally:
                random.setstate(python)
                numpy.random.set_state(array)
        if len(found) < count:
            name = f"prompts.function {self.function!r}"
            raise UserError(f"{name}: gave {len(found)} different {split} prompts, {count} were asked for")
        return list(found.values())

    def _split(self, prompt: str) -> Split:
        if self.test_file is not None:
            return "test" if prompt in self._test_prompts else "train"
        return "test" if zlib.crc32(prompt.encode()) % TEST_SHARE == 0 else "train"

    @cached_property
    def _rows(self) -> list[Problem]:
        return _read(self.train_file) if self.train_file else []

    @cached_property
    def _test(self) -> list[Problem]:
        return _read(self.test_file) if self.test_file else []

    @cached_property
    def _test_prompts(self) -> set[str]:
        return {problem.prompt for problem in self._test}


@dataclass(kw_only=True)
class ImageFolder(_Judged, name="image_folder"):
    """A folder of images with captions, to fine-tune on and to measure against.

    Captions come from ``metadata.jsonl`` in the folder (``file_name`` and ``text``, as the hub's image folders have
    them); without it the name of the subfolder that an image lies in is its caption. One image in ten, by a stable hash
    of its name, is test.
    """

    folder: str
    """Where the images are (png, jpg, jpeg, webp, bmp)."""
    size: Annotated[int, Field(ge=1)] = 64
    """Images are cut to their middle square and resized to so many pixels."""
    colour: bool = True
    """Three channels, or one of grey."""
    files: list[tuple[str, str]] = field(init=False, repr=False, compare=False)
    """(path, caption) of every image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.files = _listed(Path(self.folder))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.colour else 1, self.size, self.size)

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        captions = dict.fromkeys(caption for path, caption in self.files if _file_split(path) == split)
        if split == "train":  # a caption may stand beside images of both splits
            held_out = {caption for path, caption in self.files if _file_split(path) == "test"}
            captions = {caption: None for caption in captions if caption not in held_out} or captions
        return choose_rows([_problem(caption, {}) for caption in captions], split, count, seed, self.folder)

    def examples(self, split: Split, count: int, seed: int) -> tuple[list[str], Tensor]:
        own = [one for one in self.files if _file_split(one[0]) == split]
        if not own:
            raise UserError(f"{self.folder}: holds no {split} images")
        rows = torch.randint(len(own), (count,), generator=generator("image_folder", split, "examples", seed))
        chosen = [own[row] for row in rows.tolist()]
        return [caption for _, caption in chosen], torch.stack([self._image(path) for path, _ in chosen])

    def _image(self, path: str) -> Tensor:
        require("PIL")
        import numpy
        from PIL import Image

        try:
            with Image.open(path) as file:
                raw = numpy.array(file.convert("RGB" if self.colour else "L"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        image = torch.from_numpy(raw).reshape(*raw.shape[:2], -1).permute(2, 0, 1).float() / 255
        height, width = image.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[None, :, top : top + side, left : left + side]
        return interpolate(square, (self.size, self.size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _problem(prompt: str, metadata: Any) -> Problem:
    answer = dict(metadata) if isinstance(metadata, Mapping) else {"metadata": metadata}
    return Problem(id=prompt, prompt=prompt, answer=answer)


def _read(path: str) -> list[Problem]:
    """Different prompts of a file, in its order."""
    found: dict[str, Problem] = {}
    if path.endswith(".txt"):
        for _, line in read_text_lines(path):
            found.setdefault(line, _problem(line, {}))
        return list(found.values())
    if path.endswith(".json"):
        for number, entry in enumerate(read_json_list(path), start=1):
            if not isinstance(entry, str) or not entry.strip():
                raise UserError(f"{path}: entry {number} is no prompt (allowed: a list of strings; else JSON lines)")
            found.setdefault(entry, _problem(entry, {}))
        return list(found.values())
    for _, row in read_json_lines(path, ("prompt",)):
        inner = row.get("metadata")
        own = {key: value for key, value in row.items() if key not in ("prompt", "metadata")}
        found.setdefault(row["prompt"], _problem(row["prompt"], {**own, **(inner if isinstance(inner, dict) else {})}))
    return list(found.values())


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(path, caption) of every image below a folder, by name.

    Raises:
        UserError: there is none, or a caption or an image that is named is missing.
    """
    if not folder.is_dir():
        raise UserError(f"image_folder.folder: {str(folder)!r}: no such folder")
    captions = folder / "metadata.jsonl"
    if captions.is_file():
        rows = read_json_lines(captions, ("file_name", "text"))
        for number, row in rows:
            if not (folder / row["file_name"]).is_file():
                raise UserError(f"{captions}:{number}: {row['file_name']!r}: no such file")
        return [(str(folder / row["file_name"]), row["text"]) for _, row in rows]
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    found = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in endings)
    if not found:
        raise UserError(f"{folder}: holds neither metadata.jsonl nor images in subfolders")
    return [(str(path), path.parent.name) for path in found]


def _file_split(path: str) -> Split:
    return "test" if zlib.crc32(Path(path).name.encode()) % TEST_SHARE == 0 else "train"

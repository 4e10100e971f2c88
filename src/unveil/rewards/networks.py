"""Small networks that judge images: a classifier, and a reader of words.

Each is one safetensors file with its configuration inside. Those of the package lie in ``rewards/weights`` and are made
by the recipes ``judge-...`` of `unveil pretrain`.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, ctc_loss

from unveil.registry import Plugin, UserError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
"""The networks inside the package, ``NAME.safetensors``."""


class JudgeShape(Plugin, family="judge"):
    """Shape of a network that judges."""

    def build(self, shape: Sequence[int], names: Sequence[str]) -> JudgeNetwork:
        """A fresh network for images (C, H, W) of these classes; its weights come from torch's global generator."""
        raise NotImplementedError


class JudgeNetwork(nn.Module):
    """A network that says what an image shows. Everything in it is smooth: gradients reach the pixels."""

    kind: ClassVar[str]

    def __init__(self, about: dict[str, Any]) -> None:
        """``about``: its shape and that of its images, as its file holds them beside the weights."""
        super().__init__()
        self.about = about

    @abstractmethod
    def loss(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean negative log-probability of the prompts, as a scalar, of images (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def right(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) whether it says what the prompts say."""

    def save(self, path: Path) -> None:
        """Writes one file; weights are stored in half precision, which moves a logit by some 1e-3."""
        state = {name: value.to(torch.float16).contiguous() for name, value in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, metadata={"kind": self.kind, "about": json.dumps(self.about)})

    @classmethod
    def open(cls, name_or_path: str | Path) -> Self:
        """The network of a file, or the one of that name inside the package; frozen, in evaluation mode.

        Raises:
            UserError: there is none, or the file holds something else.
        """
        return _opened(cls, str(name_or_path))  # type: ignore[return-value, arg-type]


@cache
def _opened(cls: type[JudgeNetwork], name_or_path: str) -> JudgeNetwork:
    embedded = WEIGHTS / f"{name_or_path}.safetensors"
    path = embedded if embedded.is_file() else Path(name_or_path)
    if not path.is_file():
        hint = did_you_mean(name_or_path, [file.stem for file in WEIGHTS.glob("*.safetensors")])
        raise UserError(f"network {name_or_path!r}: no such file or embedded network{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        if header.get("kind") != cls.kind:
            raise UserError(f"network {name_or_path!r}: should be a {cls.kind}, is {header.get('kind', 'unmarked')!r}")
        network = cls(json.loads(header["about"]))
        network.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"network {name_or_path!r}: cannot be opened: {' '.join(str(error).split())[:200]}") from error
    return network.eval().requires_grad_(False)


@dataclass(kw_only=True)
class ClassifierShape(JudgeShape, name="classifier"):
    """Convolutions and two linear layers."""

    channels: list[int] = field(default_factory=lambda: [16, 32])
    """Width of each 3 x 3 convolution; the first keeps the size, each further one halves it."""
    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the last hidden layer: its activations are the features."""

    def build(self, shape: Sequence[int], names: Sequence[str]) -> Classifier:
        return Classifier({**dataclasses.asdict(self), "shape": list(shape), "names": list(names)})


class Classifier(JudgeNetwork):
    """Says which class an image is of."""

    kind = "classifier"

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__(about)
        self.names: list[str] = about["names"]
        channels, height, width = about["shape"]
        self.size = (height, width)
        layers: list[nn.Module] = []
        for number, out in enumerate(about["channels"]):
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=1 if number == 0 else 2), nn.GELU()]
            channels = out
            if number:
                height, width = (height + 1) // 2, (width + 1) // 2
        hidden = about["hidden"]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.GELU())
        self.head = nn.Linear(hidden, len(self.names))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, hidden). Images k times as large are read as means of k x k pixels."""
        times = images.shape[-2] // self.size[0]
        if times > 1:
            images = avg_pool2d(images, times)
        return self.body(images * 2 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.head(self.features(images))

    def loss(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return cross_entropy(self(images), self._labels(prompts).to(images.device))

    def right(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self(images).argmax(-1).cpu() == self._labels(prompts)

    def _labels(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self.names.index(prompt) for prompt in prompts])


@dataclass(kw_only=True)
class ReaderShape(JudgeShape, name="reader"):
    """Convolutions that leave one column per pixel column, each of which is a letter or nothing."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 48])
    """Width of each 3 x 3 convolution; all but the first halve the height."""
    hidden: Annotated[int, Field(ge=1)] = 96
    """Width of the layer that looks along the line, 7 columns at a time."""
    alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """The letters that it knows."""

    def build(self, shape: Sequence[int], names: Sequence[str]) -> Reader:
        return Reader({**dataclasses.asdict(self), "shape": list(shape)})


class Reader(JudgeNetwork):
    """Reads one line of text; taught by CTC (Graves et al., 2006)."""

    kind = "reader"

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__(about)
        self.alphabet: str = about["alphabet"]
        channels, height, _ = about["shape"]
        layers: list[nn.Module] = []
        for number, out in enumerate(about["channels"]):
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=(1 if number == 0 else 2, 1)), nn.GELU()]
            channels = out
            if number:
                height = (height + 1) // 2
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Conv1d(channels * height, about["hidden"], 7, padding=3), nn.GELU())
        self.head = nn.Conv1d(about["hidden"], len(self.alphabet) + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> log-probabilities (B, W, letters + 1); the last one is "no letter"."""
        return self.head(self.mix(self.body(images * 2 - 1).flatten(1, 2))).transpose(1, 2).log_softmax(-1)

    def read(self, images: Tensor) -> list[str]:
        """The most probable letter of every column, repetitions taken for one, gaps dropped."""
        blank = len(self.alphabet)
        words = []
        for row in self(images).argmax(-1).tolist():
            kept = [letter for letter, before in zip(row, [blank, *row[:-1]], strict=True) if letter != before]
            words.append("".join(self.alphabet[letter] for letter in kept if letter != blank))
        return words

    def loss(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        columns = self(images).transpose(0, 1)
        letters = torch.tensor([self.alphabet.index(letter) for prompt in prompts for letter in prompt])
        widths = torch.full((len(prompts),), len(columns))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return ctc_loss(columns, letters, widths, lengths, blank=len(self.alphabet), zero_infinity=True)

    def right(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([text == prompt for text, prompt in zip(self.read(images), prompts, strict=True)])

"""Small networks that judge images: a classifier, and a reader of words.

Each is one safetensors file with its configuration inside. Those of the package lie in ``rewards/weights``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unveil.registry import UserError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
"""The networks inside the package, ``NAME.safetensors``."""


class _Network(nn.Module):
    """What the judging networks share: a configuration, a seed, a file."""

    kind: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def save(self, path: Path) -> None:
        """Writes one file; weights are stored in half precision, which moves a logit by some 1e-3."""
        state = {name: value.to(torch.float16).contiguous() for name, value in self.state_dict().items()}
        written = {"kind": self.kind, "config": json.dumps(dataclasses.asdict(self.config))}  # type: ignore[call-overload]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, metadata=written)

    @classmethod
    def open(cls, name_or_path: str | Path) -> Self:
        """The network of a file, or the one of that name inside the package; frozen, in evaluation mode.

        Raises:
            UserError: there is none, or the file holds something else.
        """
        return _opened(cls, str(name_or_path))  # type: ignore[return-value, arg-type]


@cache
def _opened(cls: type[_Network], name_or_path: str) -> _Network:
    embedded = WEIGHTS / f"{name_or_path}.safetensors"
    path = embedded if embedded.is_file() else Path(name_or_path)
    if not path.is_file():
        hint = did_you_mean(name_or_path, [file.stem for file in WEIGHTS.glob("*.safetensors")])
        raise UserError(f"network {name_or_path!r}: no such file or embedded network{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        if about.get("kind") != cls.kind:
            raise UserError(f"network {name_or_path!r}: should be a {cls.kind}, is {about.get('kind', 'unmarked')!r}")
        network = cls(cls.config_class(**json.loads(about["config"])))
        network.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"network {name_or_path!r}: cannot be opened: {' '.join(str(error).split())[:200]}") from error
    return network.eval().requires_grad_(False)


@dataclass(kw_only=True)
class ClassifierConfig:
    """Shape of a `Classifier`."""

    shape: list[int]
    """Channels, height and width of its images."""
    classes: Annotated[int, Field(ge=2)] = 10
    """How many classes there are."""
    channels: list[int] = field(default_factory=lambda: [16, 32])
    """Width of each 3 x 3 convolution; the first keeps the size, each further one halves it."""
    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the last hidden layer: its activations are the features."""


class Classifier(_Network):
    """Convolutions and two linear layers. Everything is smooth: gradients reach the pixels."""

    kind = "classifier"
    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        channels, height, width = config.shape
        layers: list[nn.Module] = []
        for number, out in enumerate(config.channels):
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=1 if number == 0 else 2), nn.GELU()]
            channels = out
            if number:
                height, width = (height + 1) // 2, (width + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, config.hidden), nn.GELU())
        self.head = nn.Linear(config.hidden, config.classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, hidden)."""
        return self.body(images * 2 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.head(self.features(images))


@dataclass(kw_only=True)
class ReaderConfig:
    """Shape of a `Reader`."""

    shape: list[int]
    """Channels, height and width of its images."""
    alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """The letters that it knows."""
    channels: list[int] = field(default_factory=lambda: [16, 32, 48])
    """Width of each 3 x 3 convolution; all but the first halve the height."""


class Reader(_Network):
    """Reads one line of text: a letter or nothing per column, trained by CTC."""

    kind = "reader"
    config_class = ReaderConfig

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__(config)
        channels, height, _ = config.shape
        layers: list[nn.Module] = []
        for number, out in enumerate(config.channels):
            stride = (1, 1) if number == 0 else (2, 1)
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=stride), nn.GELU()]
            channels = out
            if number:
                height = (height + 1) // 2
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Conv1d(channels * height, 96, 7, padding=3), nn.GELU())
        self.head = nn.Conv1d(96, len(config.alphabet) + 1, 1)
        self.alphabet = config.alphabet

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> log-probabilities (B, columns, letters + 1); the last one is "no letter"."""
        return self.head(self.mix(self.body(images * 2 - 1).flatten(1, 2))).transpose(1, 2).log_softmax(-1)

    def read(self, images: Tensor) -> list[str]:
        """The most probable letter of every column, repetitions taken for one, gaps dropped."""
        blank = len(self.alphabet)
        words = []
        for row in self(images).argmax(-1).tolist():
            kept = [letter for letter, before in zip(row, [blank, *row[:-1]], strict=True) if letter != before]
            words.append("".join(self.alphabet[letter] for letter in kept if letter != blank))
        return words

"""What every denoiser of continuous samples declares and does.

The normal form: ``predict(x, t, condition)`` answers in one parameterisation of the process that the denoiser declares,
with the time in [0, 1], 1 all noise. A network's own time scale, packing and extra inputs stay inside its adapter.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unveil.denoisers.base import Denoiser
from unveil.processes.gaussian import GaussianProcess, Guess, Prediction


@dataclass(frozen=True, kw_only=True)
class ContinuousSpec:
    """What a sampler, likelihood or task needs to know of a denoiser."""

    shape: tuple[int, ...]
    """Of one latent: (C, H, W) for images."""
    process: GaussianProcess
    """The path on which the network was trained."""
    prediction: Prediction
    """What it predicts there."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What B samples are drawn for, as the network reads it: named tensors that all have the batch axis first.

    Encodings of text are larger than latents, and samples of one prompt share theirs: picking rows moves an index, and
    the tensors are laid out when the network reads them.

    Attributes:
        tensors: (P, ...) each, one row per encoding.
        index: (B,) which of them each sample has, beside the tensors; None: sample b has row b.
    """

    tensors: Mapping[str, Tensor]
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())) if self.index is None else self.index)

    def __getitem__(self, name: str) -> Tensor:
        """(B, ...) what the network reads."""
        value = self.tensors[name]
        return value if self.index is None else value[self.index]

    def rows(self, index: Tensor | slice) -> Condition:
        """Some of them, in that order, also repeatedly."""
        if isinstance(index, Tensor):
            index = index.to(next(iter(self.tensors.values())).device)
        if self.index is not None:
            return Condition(self.tensors, self.index[index])
        if isinstance(index, slice):
            return Condition({name: value[index] for name, value in self.tensors.items()})
        return Condition(self.tensors, index)

    def to(self, device: torch.device) -> Condition:
        """The same on another device, of the encodings only those that these samples have."""
        if all(value.device == device for value in self.tensors.values()):
            return self
        own = self.compact()
        index = None if own.index is None else own.index.to(device)
        return Condition({name: value.to(device) for name, value in own.tensors.items()}, index)

    def compact(self) -> Condition:
        """The same without the encodings that no sample has."""
        if self.index is None:
            return self
        used, index = self.index.unique(return_inverse=True)
        return Condition({name: value[used] for name, value in self.tensors.items()}, index)

    def beside(self, known: Mapping[str, Tensor]) -> Condition:
        """The same with further tensors (B, ...) that are equal for samples of one encoding."""
        first = next(iter(self.tensors.values()))
        own = {name: value.to(first.device) for name, value in known.items()}
        if self.index is not None:
            for name, value in own.items():
                own[name] = value.new_zeros(len(first), *value.shape[1:])
                own[name][self.index] = value
        return Condition({**self.tensors, **own}, self.index)

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Condition:
        """One below the other."""
        tables = [part.tensors for part in parts]
        if all(part.index is None for part in parts):
            return cls({name: torch.cat([table[name] for table in tables]) for name in tables[0]})
        if all(table is tables[0] for table in tables):
            return cls(tables[0], torch.cat([part._places() for part in parts]))
        starts = itertools.accumulate((len(next(iter(table.values()))) for table in tables), initial=0)
        index = torch.cat([start + part._places() for start, part in zip(starts, parts, strict=False)])
        return cls({name: torch.cat([table[name] for table in tables]) for name in tables[0]}, index)

    def _places(self) -> Tensor:
        """(B,) the index, also where it is left out."""
        if self.index is not None:
            return self.index
        value = next(iter(self.tensors.values()))
        return torch.arange(len(value), device=value.device)


class ContinuousDenoiser(Denoiser):
    """A network that says of noisy samples what they are without noise."""

    medium: ClassVar[str] = "image"
    spec: ContinuousSpec

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Condition:
        """What the network reads of B prompts; "" stands for no prompt, the unconditional model of guidance.

        Raises:
            UserError: a prompt that the network does not know.
        """

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, *D) at noisy samples x (B, *D) and times t (B,), as `ContinuousSpec.prediction` says."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, *D) of images (B, C, H, W) with values in [0, 1]."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B, C, H, W) with values in [0, 1] of latents (B, *D); differentiable."""

    def guess(self, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        """`predict` in the normal form, fp32 at least."""
        return self.spec.process.guess(self.predict(x, t, condition), self.spec.prediction, x, t)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.predict(x, t, condition)

"""What every denoiser of continuous samples declares and does.

The normal form: ``predict(x, t, condition)`` answers in one parameterisation of the process that the denoiser declares,
with the time in [0, 1], 1 all noise. A network's own time scale, packing and extra inputs stay inside its adapter.
"""

from __future__ import annotations

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
    """What B samples are drawn for, as the network reads it: named tensors that all have the batch axis first."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, index: Tensor | slice) -> Condition:
        """Some of them, in that order, also repeatedly."""
        return Condition({name: value[index.to(value.device) if isinstance(index, Tensor) else index]
                          for name, value in self.tensors.items()})  # fmt: skip

    def to(self, device: torch.device) -> Condition:
        return Condition({name: value.to(device) for name, value in self.tensors.items()})

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Condition:
        """One below the other."""
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


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

"""Small denoisers of images, conditioned on class names or on short words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.denoisers.folder import load_weights, read_config, write_model
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction
from unveil.recipe import build, dump
from unveil.registry import Plugin, UserError


class Prompts(Plugin, family="prompts"):
    """How a prompt becomes a fixed number of ids; id 0 is nothing, and the empty prompt is nothing but that."""

    @property
    def size(self) -> int:
        """How many ids there are besides 0."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Ids per prompt."""
        raise NotImplementedError

    def ids(self, prompt: str) -> list[int]:
        """The ``width`` ids of a prompt.

        Raises:
            UserError: it cannot be said in these ids.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Classes(Prompts, name="classes"):
    """One id per prompt: all prompts are known beforehand."""

    names: tuple[str, ...] = ()
    """The prompts."""

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        return 1

    def ids(self, prompt: str) -> list[int]:
        if prompt and prompt not in self.names:
            raise UserError(f"prompt {prompt!r}: the model knows other ones only (allowed: {', '.join(self.names)})")
        return [self.names.index(prompt) + 1 if prompt else 0]


@dataclass(frozen=True, kw_only=True)
class Characters(Prompts, name="characters"):
    """One id per character, by place."""

    alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """The characters."""
    length: Annotated[int, Field(ge=1)] = 3
    """The longest prompt."""

    @property
    def size(self) -> int:
        return len(self.alphabet)

    @property
    def width(self) -> int:
        return self.length

    def ids(self, prompt: str) -> list[int]:
        if len(prompt) > self.length or (unknown := sorted(set(prompt) - set(self.alphabet))):
            reason = f"longer than {self.length}" if len(prompt) > self.length else f"{unknown[0]!r} is unknown"
            raise UserError(f"prompt {prompt!r}: {reason} (allowed: up to {self.length} of {self.alphabet})")
        return [self.alphabet.index(character) + 1 for character in prompt] + [0] * (self.length - len(prompt))


class ImageNetwork(Plugin, family="image_network"):
    """The shape of a network over images."""

    def build(self, shape: tuple[int, int, int], prompts: Prompts) -> nn.Module:
        """A module with ``forward(x (B, C, H, W), t (B,), ids (B, P)) -> (B, C, H, W)`` and ``initialise(generator)``.

        Raises:
            UserError: the network is not for images of this shape.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """A small denoiser of images, all of it: what its config.json holds."""

    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    prompts: Prompts
    """What it is conditioned on."""
    network: ImageNetwork
    """The network."""
    process: GaussianProcess = field(default_factory=Flow)
    """The path that it is trained on."""
    prediction: Prediction = "u"
    """What it predicts."""

    def __post_init__(self) -> None:
        try:
            self.process.mixture(self.prediction, torch.ones(1))
        except ValueError as error:
            raise UserError(f"prediction: {error}") from error


class ImageDenoiser(ContinuousDenoiser):
    """An embedded image denoiser; a latent is the image itself in [-1, 1]."""

    model_type: ClassVar[str] = "unveil-image"
    output_layers: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, config: ImageModel) -> None:
        super().__init__()
        self.config = config
        self.spec = ContinuousSpec(shape=config.shape, process=config.process, prediction=config.prediction)
        self.network = config.network.build(config.shape, config.prompts)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights."""
        self.network.initialise(generator)  # type: ignore[operator]

    def condition(self, prompts: Sequence[str]) -> Condition:
        ids = [self.config.prompts.ids(prompt) for prompt in prompts]
        return Condition({"ids": torch.tensor(ids, device=self.device).reshape(len(ids), -1)})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(self.spec.process.scaled(x, t), t.to(x.device, x.dtype), condition["ids"])

    def encode(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def decode(self, x_0: Tensor) -> Tensor:
        return ((x_0 + 1) / 2).clamp(0, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        write_model(Path(folder), {"model_type": self.model_type, **dump(self.config)}, self.own_state())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder written by `save_pretrained`.

        Raises:
            UserError: a file is missing or broken, or the weights are of another architecture.
        """
        folder = Path(folder)
        settings = read_config(folder)
        settings.pop("model_type", None)
        try:
            config = build(ImageModel, settings)
            denoiser = cls(config)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from error
        load_weights(denoiser, folder / "model.safetensors")
        return denoiser


class Conditioning(nn.Module):
    """One vector per sample from its time and the ids of its prompt: their embeddings' sum, an embedding per place."""

    frequencies: Tensor

    def __init__(self, dim: int, prompts: Prompts) -> None:
        super().__init__()
        self.size = prompts.size + 1
        self.register_buffer("frequencies", _frequencies(dim // 2), persistent=False)
        self.time_in = nn.Linear(2 * (dim // 2), dim)
        self.time_out = nn.Linear(dim, dim)
        self.prompt = nn.Embedding(prompts.width * self.size, dim)

    def forward(self, t: Tensor, ids: Tensor) -> Tensor:
        """(B, dim) of times (B,) in [0, 1] and ids (B, P)."""
        angle = t[:, None] * self.frequencies.to(t.dtype)
        time = self.time_out(nn.functional.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], dim=-1))))
        return time + self.places(ids).sum(1)

    def places(self, ids: Tensor) -> Tensor:
        """(B, P, dim): the embedding of every id at its place."""
        return self.prompt(ids + torch.arange(ids.shape[1], device=ids.device) * self.size)


def _frequencies(count: int) -> Tensor:
    """Angles per unit of time, from 1000 geometrically down to 0.1."""
    return 1000.0 * 1e-4 ** (torch.arange(count, dtype=torch.float64) / max(count - 1, 1)).float()


def draw_weights(module: nn.Module, generator: torch.Generator, zero: Sequence[str]) -> None:
    """Matrices and kernels normal with std 1/sqrt(inputs), embeddings with std 1, norms 1, biases 0.

    Args:
        zero: ends of parameter names that start at 0, so that every block starts as the identity.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if name.endswith(tuple(zero)) or (parameter.dim() == 1 and name.endswith("bias")):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            std = 1.0 if id(parameter) in embeddings else 1 / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std, generator=generator)

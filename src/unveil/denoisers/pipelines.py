"""What all adapters to published image pipelines share: the folder, prompts, the VAE, adapters.

A pipeline is a folder with model_index.json, as the library ``diffusers`` reads and writes it. Its own code encodes
prompts and decodes latents; its U-Net or transformer is the network that is trained. Its scheduler says which process
the network belongs to and is not used: it keeps no log-probabilities. Nothing of a folder is executed: weights are
safetensors, and every part is a class of ``diffusers`` or ``transformers``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.denoisers.pretrained import DTYPES, Dtype
from unveil.processes.gaussian import GaussianProcess, Prediction
from unveil.registry import UserError

INDEX = "model_index.json"
_KEPT_PROMPTS = 64
"""Encoded prompts that stay on the device, the ones used last; 3 MB each for SD3 in bf16."""
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that take no part in denoising."""


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How a published image pipeline is used."""

    resolution: Annotated[int, Field(ge=8)] | None = None
    """Height and width of the images in pixels; None: what the model was made for."""
    guidance: Annotated[float, Field(ge=0)] = 3.5
    """Guidance that the network is told (FLUX.1-dev); networks that are not told any ignore it."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """Length of the T5 encoding (SD3, FLUX); longer prompts are cut."""


class PipelineDenoiser(ContinuousDenoiser):
    """A published pipeline in the normal form. A subclass says how prompts are encoded and the network is called."""

    class_name: ClassVar[str]
    """Of the pipeline in ``diffusers``, and in model_index.json."""
    component: ClassVar[str]
    """The part that is trained: ``unet`` or ``transformer``."""
    network: Any

    def __init__(self, pipe: Any, options: PipelineOptions) -> None:
        """``pipe`` is the pipeline as ``diffusers`` opens it.

        Raises:
            UserError: it is of a kind that this adapter does not know, or the options do not fit it.
        """
        super().__init__()
        self.network = getattr(pipe, self.component)
        # No module of this one: neither trained nor saved with the weights, and no adapters get in.
        self.pipe, self.options = pipe, options
        for frozen in self._frozen():
            frozen.requires_grad_(False).eval()
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # also in training: the ratio of a policy to itself must be 1
        pipe.set_progress_bar_config(disable=True)
        process, prediction = self.read_scheduler(dict(pipe.scheduler.config))
        side = options.resolution or self.native_resolution()
        if side % self.multiple():
            raise UserError(f"model.pipeline.resolution: {side} is no multiple of {self.multiple()}")
        channels, scale = self.latent_channels(), pipe.vae_scale_factor
        shape = (channels, side // scale, side // scale)
        self.spec = ContinuousSpec(shape=shape, process=process, prediction=prediction)
        self._encoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: Dtype = "fp32",
        options: PipelineOptions | None = None,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Read a pipeline's folder; the VAE stays fp32.

        Raises:
            UserError: a part is missing, broken or not of a known library, or of a kind that this adapter does not
                know.
        """
        import diffusers

        folder = Path(folder)
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not known (allowed: {', '.join(DTYPES)})")
        index = read_index(folder)
        left_out = {name: None for name in NOT_LOADED if name in index}
        try:
            pipe = getattr(diffusers, cls.class_name).from_pretrained(
                str(folder), dtype={"default": DTYPES[dtype], "vae": torch.float32}, use_safetensors=True,
                local_files_only=True, **left_out,
            )  # fmt: skip
        except Exception as error:  # broken files may fail in any of the library's ways
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"{folder}: cannot be opened as a {cls.class_name}: {reason}") from error
        try:
            denoiser = cls(pipe, options or PipelineOptions())
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        if gradient_checkpointing:
            denoiser.checkpoint_gradients()
        return denoiser.eval()

    @abstractmethod
    def read_scheduler(self, config: dict[str, Any]) -> tuple[GaussianProcess, Prediction]:
        """The process and prediction that the scheduler's configuration stands for.

        Raises:
            UserError: one that this adapter does not know.
        """

    @abstractmethod
    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """What the network reads of one prompt, by name, each (1, ...); "" is the unconditional one."""

    @abstractmethod
    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `encode_prompt` gives, without the leading 1."""

    @abstractmethod
    def call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output (B, C, H, W) at x (B, C, H, W) of its dtype and times t (B,)."""

    def native_resolution(self) -> int:
        """Height and width of the images that the model was made for."""
        return self.network.config.sample_size * self.pipe.vae_scale_factor

    def latent_channels(self) -> int:
        return self.network.config.in_channels

    def multiple(self) -> int:
        """What height and width must be divisible by."""
        return self.pipe.vae_scale_factor

    def checkpoint_gradients(self) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.network.enable_gradient_checkpointing()

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Condition:
        """The encodings of prompts, one by one, so that none depends on its neighbours; each is computed once."""
        rows = []
        for prompt in prompts:
            if prompt not in self._encoded:
                encoded = self.encode_prompt(prompt)
                self._encoded[prompt] = {name: value.detach().to(self.device) for name, value in encoded.items()}
                if len(self._encoded) > _KEPT_PROMPTS:
                    self._encoded.popitem(last=False)
            self._encoded.move_to_end(prompt)
            rows.append(Condition(self._encoded[prompt]))
        return Condition.cat(rows)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.call(x.to(self.network.dtype), t.to(x.device), condition)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mode of the VAE's posterior, in the scale that the network knows."""
        config, vae = self.pipe.vae.config, self.pipe.vae
        latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, x_0: Tensor) -> Tensor:
        config, vae = self.pipe.vae.config, self.pipe.vae
        latents = x_0 / config.scaling_factor + (config.shift_factor or 0.0)
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline, as ``diffusers`` opens it."""
        self.pipe.save_pretrained(str(folder), safe_serialization=True)

    def load_adapter(self, folder: str | Path) -> None:
        """Put adapters, as `save_adapter` or ``diffusers`` writes them, into the network's weights for good.

        Raises:
            UserError: there are none, or they are of another network.
        """
        if not any(Path(folder).glob("*.safetensors")):
            raise UserError(f"{str(folder)!r} holds no adapters (allowed: a folder with .safetensors)")
        try:
            self.pipe.load_lora_weights(str(folder), local_files_only=True)
            self.pipe.fuse_lora()
            self.pipe.unload_lora_weights()
        except Exception as error:  # files of another network may fail in any of the library's ways
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"adapters {str(folder)!r} do not fit the model: {reason}") from error

    def save_adapter(self, wrapped: Any, folder: Path) -> None:
        """pytorch_lora_weights.safetensors, as ``load_lora_weights`` of the pipeline reads it."""
        from peft import get_peft_model_state_dict

        inside = "base_model.model.network."
        state = {name.removeprefix(inside): value for name, value in get_peft_model_state_dict(wrapped).items()}
        settings = wrapped.peft_config["default"].to_dict()
        self.pipe.save_lora_weights(
            str(folder),
            **{f"{self.component}_lora_layers": state, f"{self.component}_lora_adapter_metadata": settings},
        )

    def _frozen(self) -> list[nn.Module]:
        parts = self.pipe.components
        return [part for name, part in parts.items() if isinstance(part, nn.Module) and name != self.component]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Text encoders and VAE go along to another device. (Called by `nn.Module.to`.)"""
        self._encoded.clear()
        for part in self._frozen():
            part._apply(fn)
        return super()._apply(fn, recurse)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a folder.

    Raises:
        UserError: it is missing or broken, or a part is of a library that is not trusted.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: value for name, value in index.items() if isinstance(value, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no readable index of a pipeline: {error}") from error
    for name, value in parts.items():
        if not (len(value) == 2 and value[0] in ("diffusers", "transformers", None)) and name not in NOT_LOADED:
            raise UserError(f"{path}: {name!r} is {value!r} (allowed: classes of diffusers and transformers)")
    return index

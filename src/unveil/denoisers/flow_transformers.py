"""Stable Diffusion 3 and 3.5, and FLUX.1: transformers on a rectified flow."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition
from unveil.denoisers.pipelines import PipelineDenoiser
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction
from unveil.registry import UserError


class _FlowPipeline(PipelineDenoiser):
    component: ClassVar[str] = "transformer"
    output_layers: ClassVar[tuple[str, ...]] = ("proj_out",)

    def read_scheduler(self, config: dict[str, Any]) -> tuple[GaussianProcess, Prediction]:
        name = config.get("_class_name", type(self.pipe.scheduler).__name__)
        if not str(name).startswith("FlowMatch"):
            raise UserError(f"scheduler: {name!r} is no scheduler of a flow")
        return Flow(), "u"

    def thousandths(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """1000 t (B,), rounded as the pipeline's own loop rounds it."""
        return (1000 * t.double()).float().to(dtype)


class StableDiffusion3(_FlowPipeline):
    """Stable Diffusion 3 and 3.5."""

    class_name: ClassVar[str] = "StableDiffusion3Pipeline"

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompt, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.options.prompt_tokens,
        )  # fmt: skip
        return {"states": states, "pooled": pooled}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        config, words = self.network.config, self.pipe.text_encoder.config.max_position_embeddings
        states = (words + self.options.prompt_tokens, config.joint_attention_dim)
        return {"states": states, "pooled": (config.pooled_projection_dim,)}

    def call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(
            hidden_states=x, timestep=self.thousandths(t, torch.float32), encoder_hidden_states=condition["states"],
            pooled_projections=condition["pooled"], return_dict=False,
        )[0]  # fmt: skip

    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size


class Flux(_FlowPipeline):
    """FLUX.1: latents are packed, 2 x 2 places to one token; the network may be told a guidance."""

    class_name: ClassVar[str] = "FluxPipeline"

    def native_resolution(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def latent_channels(self) -> int:
        return self.network.config.in_channels // 4

    def multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        states, pooled, _ = self.pipe.encode_prompt(
            prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self.options.prompt_tokens
        )
        return {"states": states, "pooled": pooled}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        states = (self.options.prompt_tokens, config.joint_attention_dim)
        return {"states": states, "pooled": (config.pooled_projection_dim,)}

    def call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        batch, channels, height, width = x.shape
        states = condition["states"]
        told = None
        if self.network.config.guidance_embeds:
            told = torch.full((batch,), self.options.guidance, device=x.device)
        packed = self.network(
            hidden_states=self.pipe._pack_latents(x, batch, channels, height, width),
            timestep=self.thousandths(t, x.dtype) / 1000, guidance=told, pooled_projections=condition["pooled"],
            encoder_hidden_states=states, txt_ids=torch.zeros(states.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(packed, height * scale, width * scale, scale)

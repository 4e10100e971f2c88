"""Stable Diffusion 1.5, 2 and XL: U-Nets on the variance-preserving path."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition
from unveil.denoisers.pipelines import PipelineDenoiser
from unveil.processes.gaussian import GaussianProcess, Prediction, VariancePreserving
from unveil.registry import UserError

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class StableDiffusion(PipelineDenoiser):
    """Stable Diffusion 1.5 and 2: cross-attention to the hidden states of one text encoder."""

    class_name: ClassVar[str] = "StableDiffusionPipeline"
    component: ClassVar[str] = "unet"

    def read_scheduler(self, config: dict[str, Any]) -> tuple[GaussianProcess, Prediction]:
        schedule, kind = config.get("beta_schedule"), config.get("prediction_type", "epsilon")
        if schedule not in _BETAS:
            raise UserError(f"scheduler: beta_schedule {schedule!r} is not known (allowed: {', '.join(_BETAS)})")
        if kind not in _PREDICTIONS:
            raise UserError(f"scheduler: prediction_type {kind!r} is not known (allowed: {', '.join(_PREDICTIONS)})")
        if config.get("trained_betas"):
            raise UserError("scheduler: trained_betas is set, which is not supported")
        process = VariancePreserving(
            betas=cast(Any, _BETAS[schedule]), steps=config["num_train_timesteps"], low=config["beta_start"],
            high=config["beta_end"], zero_terminal=bool(config.get("rescale_betas_zero_snr")),
        )  # fmt: skip
        return process, _PREDICTIONS[kind]

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        states, _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"states": states}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        words = self.pipe.text_encoder.config.max_position_embeddings
        return {"states": (words, self.network.config.cross_attention_dim)}

    def call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x, self.timestep(t), encoder_hidden_states=condition["states"], return_dict=False)[0]

    def timestep(self, t: Tensor) -> Tensor:
        """Place in the table of betas, as the network knows it, (B,) float32."""
        return cast(VariancePreserving, self.spec.process).timestep(t).float()


class StableDiffusionXl(StableDiffusion):
    """Stable Diffusion XL: two text encoders; the network is also told the pooled text and the size of the image."""

    class_name: ClassVar[str] = "StableDiffusionXLPipeline"

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        side = self.spec.shape[-1] * self.pipe.vae_scale_factor
        # Original size, the corner of the crop, size: as if nothing had been cut off.
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=states.dtype)
        return {"states": states, "pooled": pooled, "sizes": sizes}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.pipe.text_encoder_2.config.projection_dim
        return super().encoded_shapes() | {"pooled": (width,), "sizes": (6,)}

    def call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
        states = condition["states"]
        return self.network(
            x, self.timestep(t), encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False
        )[0]

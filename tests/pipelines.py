"""Tiny pipelines of every published kind with random weights, built as ``diffusers`` has them."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

KINDS = ("sd", "sd-v", "sdxl", "sd3", "flux")
_WIDTH = 16


def tiny(kind: str) -> Any:
    """A pipeline of one of `KINDS`, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = {"sd": _sd, "sd-v": _sd_v, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd(prediction: str = "epsilon") -> Any:
    return StableDiffusionPipeline(
        vae=_vae(4), text_encoder=_clip(CLIPTextModel), tokenizer=_clip_tokenizer(), unet=_unet(),
        scheduler=_ddim(prediction), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd_v() -> Any:
    return _sd("v_prediction")


def _sdxl() -> Any:
    return StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_clip(CLIPTextModel), text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(), scheduler=_ddim("epsilon"), add_watermarker=False,
        unet=_unet(
            cross_attention_dim=2 * _WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH, use_linear_projection=True,
        ),
    )  # fmt: skip


def _sd3() -> Any:
    clips = [_clip(CLIPTextModelWithProjection) for _ in range(2)]
    return StableDiffusion3Pipeline(
        vae=_vae(4, shift_factor=0.06), text_encoder=clips[0], text_encoder_2=clips[1], text_encoder_3=_t5(),
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(), tokenizer_3=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * _WIDTH, caption_projection_dim=16,
            pooled_projection_dim=2 * _WIDTH, pos_embed_max_size=16,
        ),
    )  # fmt: skip


def _flux() -> Any:
    return FluxPipeline(
        vae=_vae(4, shift_factor=0.06), text_encoder=_clip(CLIPTextModel), text_encoder_2=_t5(),
        tokenizer=_clip_tokenizer(), tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * _WIDTH, pooled_projection_dim=_WIDTH,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        ),
    )  # fmt: skip


def _vae(channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, scaling_factor=0.4, **more,
    )  # fmt: skip


def _unet(cross_attention_dim: int = _WIDTH, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim, attention_head_dim=4, norm_num_groups=4, **more,
    )  # fmt: skip


def _ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def _clip(kind: Any) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=80, hidden_size=_WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=_WIDTH, bos_token_id=72, eos_token_id=73, pad_token_id=73,
        )
    )  # fmt: skip


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=2 * _WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def _clip_tokenizer() -> CLIPTokenizer:
    characters = string.ascii_lowercase + string.digits
    words = [*characters, *(f"{one}</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 16
    return tokenizer


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )

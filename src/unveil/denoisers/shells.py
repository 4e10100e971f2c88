"""Image denoisers without weights: built on the device ``meta`` from configurations alone.

Every module is there, with its shapes; nothing is read, stored or computed. Parameters, operations and activations can
be counted on them as on the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.denoisers.folder import read_config
from unveil.denoisers.image import ImageDenoiser, ImageModel
from unveil.denoisers.load import EMBEDDED, pipeline_adapter
from unveil.denoisers.pipelines import INDEX, NOT_LOADED, PipelineDenoiser, PipelineOptions, read_index
from unveil.recipe import build
from unveil.registry import UserError, did_you_mean

_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32,
}  # fmt: skip

Parts = dict[str, tuple[str, str, dict[str, Any]]]
"""Library, class and configuration of the parts of a pipeline."""

KNOWN: dict[str, tuple[str, Parts]] = {
    "stable-diffusion-v1": (
        "StableDiffusionPipeline",
        {
            "unet": ("diffusers", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768,
                                                           "attention_head_dim": 8}),
            "vae": ("diffusers", "AutoencoderKL", {**_VAE, "latent_channels": 4, "scaling_factor": 0.18215}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "scheduler": ("diffusers", "DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085,
                                                         "beta_end": 0.012, "steps_offset": 1,
                                                         "clip_sample": False}),
        },
    ),
    "stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("diffusers", "SD3Transformer2DModel", {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
            }),
            "vae": ("diffusers", "AutoencoderKL", {**_VAE, "latent_channels": 16, "scaling_factor": 1.5305,
                                                   "shift_factor": 0.0609, "use_quant_conv": False,
                                                   "use_post_quant_conv": False}),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
}  # fmt: skip
"""Published configurations, for folders that are not there, by the beginning of a model's name."""


def shell(name: str, options: PipelineOptions | None) -> tuple[str, ContinuousDenoiser]:
    """Where the shape of a model was taken from, and the denoiser of that shape on the device ``meta``.

    Args:
        name: as a recipe has it: a folder, an embedded model; if there is none, one that `KNOWN` tells.
        options: how a published pipeline is used.

    Raises:
        UserError: nothing is known of the model, it is not of images, or a configuration is broken.
    """
    for folder in (Path(name), Path(name) / "model", EMBEDDED / name):
        if (folder / INDEX).is_file():
            index = read_index(folder)
            kind = str(index.get("_class_name"))
            return str(folder / INDEX), _pipeline(kind, _parts(folder, index), options, str(folder))
        if (folder / "config.json").is_file():
            return str(folder / "config.json"), _embedded(folder)
    short = name.rsplit("/", 1)[-1].lower()
    found = [key for key in KNOWN if short.startswith(key)]
    if not found:
        raise UserError(
            f"model.path: nothing is known of {name!r}, and there is no such folder{did_you_mean(short, KNOWN)}"
        )
    return f"published shape {found[0]}", _pipeline(*KNOWN[found[0]], options, found[0])


def encoded(denoiser: ContinuousDenoiser) -> Condition:
    """What a shell reads of one prompt."""
    if not isinstance(denoiser, PipelineDenoiser):
        return denoiser.condition([""])
    dtype = denoiser.network.dtype
    shapes = denoiser.encoded_shapes()
    return Condition({name: torch.empty(1, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()})


def _embedded(folder: Path) -> ImageDenoiser:
    settings = read_config(folder)
    kind = settings.pop("model_type", None)
    if kind != ImageDenoiser.model_type:
        raise UserError(f"{folder / 'config.json'}: model_type {kind!r} is no model of images")
    with torch.device("meta"):
        return ImageDenoiser(build(ImageModel, settings))


def _parts(folder: Path, index: Mapping[str, Any]) -> Parts:
    found: Parts = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or name in NOT_LOADED or name.startswith("tokenizer"):
            continue
        path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        try:
            found[name] = (entry[0], entry[1], json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no readable configuration: {error}") from error
    return found


def _pipeline(kind: str, parts: Parts, options: PipelineOptions | None, where: str) -> PipelineDenoiser:
    adapter = pipeline_adapter(kind, where)
    import diffusers

    made = {name: _part(*part) for name, part in parts.items()}
    cls = getattr(diffusers, adapter.class_name)
    wanted = [name for name in cls._get_signature_keys(cls)[0] if name not in made]
    try:
        pipe = cls(**made, **dict.fromkeys(wanted), **_without_checker(cls))
        return adapter(pipe, options or PipelineOptions())
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _without_checker(cls: Any) -> dict[str, bool]:
    optional = cls._get_signature_keys(cls)[1]
    return {"requires_safety_checker": False} if "requires_safety_checker" in optional else {}


def _part(library: str, kind: str, config: dict[str, Any]) -> Any:
    if library == "diffusers":
        import diffusers

        cls = getattr(diffusers, kind)
        with torch.device("cpu" if "Scheduler" in kind else "meta"):  # of a scheduler numbers are read
            return cls.from_config(config)
    import transformers

    cls = getattr(transformers, kind)
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(config))

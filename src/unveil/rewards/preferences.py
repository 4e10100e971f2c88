"""Published models of what people like: CLIPScore, PickScore, HPSv2, aesthetic heads, ImageReward.

All run on transformers' own networks; files in other layouts (open_clip's, BLIP's) are renamed on the way in. Images
are resized and normalised in torch, so neither torchvision nor the authors' packages are needed, and a float image
loses no levels.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, Score
from unveil.rewards.images import image_batch

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images; BLIP uses the same."""


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """(N, 1 or 3, H, W) in [0, 1] -> (N, 3, size, size): shorter side resized (bicubic), middle cut out, normalised."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    wanted = (max(size, round(height * scale)), max(size, round(width * scale)))
    if wanted != (height, width):
        images = interpolate(images, wanted, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (wanted[0] - size) // 2, (wanted[1] - size) // 2
    images = images[..., top : top + size, left : left + size].expand(-1, 3, -1, -1)
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


@dataclass(kw_only=True)
class _Published(Reward):
    """A large frozen network; it is opened at the first call."""

    medium = "image"
    differentiable = True

    path: str
    """Folder of the network, or ``owner/name`` on the hub."""
    device: str | None = None
    """Where it runs; None: on the GPU where there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of its weights."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per call of the network."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError(f"reward {self.name!r}: the extra is not installed (pip install 'unveil[hf]')")
        for key in ("path", "weights"):
            value = getattr(self, key, None)
            # What is no folder may be a name on the hub, owner/name; anything else is a mistake that shows at once.
            if value is not None and not Path(value).exists() and (key == "weights" or value.count("/") != 1):
                raise UserError(f"{key}: {value!r}: no such file or folder")

    @torch.no_grad()
    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        found: list[Score] = []
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._score(image_batch(completions[part]).to(self._device), prompts[part]).float().tolist()
        return found

    def values(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        return self._score(images.float().to(self._device), prompts).float()

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(N,) of images (N, C, H, W) in [0, 1], differentiable."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _ready(self, module: Any) -> Any:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        return module.to(self._device, kind).eval().requires_grad_(False)


@dataclass(kw_only=True)
class ClipReward(_Published, name="clip"):
    """Agreement of image and prompt in a CLIP: the cosine, or with ``scaled`` what its logit scale makes of it.

    CLIPScore: any CLIP. PickScore: ``yuvalkirstain/PickScore_v1`` with ``scaled``. HPSv2: the network of
    ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K`` with the file ``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2`` as ``weights``.
    """

    weights: str | None = None
    """A file with other weights for the network, in open_clip's layout (.pt or .safetensors)."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None: that of ``path``."""
    scaled: bool = False
    """Multiply the cosine by the exponential of the logit scale (about 100)."""

    @cached_property
    def network(self) -> Any:
        from transformers import CLIPModel

        network = CLIPModel.from_pretrained(self.path)
        if self.weights is not None:
            state = from_open_clip(read_weights(self.weights))
            missing, unexpected = network.load_state_dict(state, strict=False)
            missing = [name for name in missing if not name.endswith("position_ids")]
            if missing or unexpected:
                raise UserError(f"{self.weights}: does not fit {self.path}: {[*missing, *unexpected][0]!r}")
        return self._ready(network)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer or self.path)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        image, text = normalize(self.image_features(images), dim=-1), normalize(self.text_features(prompts), dim=-1)
        cosine = (image.float() * text.float()).sum(-1)
        return cosine * self.network.logit_scale.float().exp() if self.scaled else cosine

    def image_features(self, images: Tensor) -> Tensor:
        """(N, D) projected features of images (N, C, H, W) in [0, 1], not normalised; differentiable."""
        return clip_features(self.network, images)

    def text_features(self, texts: list[str]) -> Tensor:
        """(N, D) projected features of texts, cut off at the network's length."""
        length = self.network.config.text_config.max_position_embeddings
        given = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        given = {key: value.to(self._device) for key, value in given.items() if key in ("input_ids", "attention_mask")}
        return self.network.text_projection(self.network.text_model(**given).pooler_output)


def clip_features(network: Any, images: Tensor) -> Tensor:
    """(N, D) projected image features of a `CLIPModel`."""
    pixels = clip_pixels(images, network.config.vision_config.image_size).to(network.dtype)
    return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)


@dataclass(kw_only=True)
class Aesthetic(_Published, name="aesthetic"):
    """An aesthetic head: linear layers on normalised CLIP features, a score of about 1 to 10.

    The LAION predictor: ``openai/clip-vit-large-patch14`` with the file ``sac+logos+ava1-l14-linearMSE.pth``.
    """

    weights: str
    """File of the head: ``layers.0.weight``, ``layers.0.bias``, ``layers.2.weight`` ... (.pth, .pt or .safetensors)."""

    @cached_property
    def network(self) -> Any:
        from transformers import CLIPModel

        return self._ready(CLIPModel.from_pretrained(self.path))

    @cached_property
    def head(self) -> nn.Module:
        return linear_head(read_weights(self.weights), self.weights).to(self._device)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(normalize(clip_features(self.network, images).float(), dim=-1))[:, 0]


@dataclass(kw_only=True)
class ImageReward(_Published, name="image_reward"):
    """ImageReward (2304.05977): a BLIP reads the prompt while it looks at the image; a head on its first token scores.

    ``path`` holds (or is) ``ImageReward.pt`` of ``THUDM/ImageReward``. Scores have mean 0 and deviation 1 over the
    authors' images.
    """

    tokenizer: str = "bert-base-uncased"
    """Folder or hub name of the tokenizer of the texts."""
    heads: tuple[int, int] = (16, 12)
    """Attention heads of image and text network; all other sizes are read off the weights."""

    mean = 0.16717362830052426
    deviation = 1.0333394966054072
    longest = 35

    @cached_property
    def network(self) -> Any:
        path = Path(self.path)
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(self.path, "ImageReward.pt"))
        return self._ready(BlipScorer(read_weights(path / "ImageReward.pt" if path.is_dir() else path), self.heads))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        given = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt"
        )
        pixels = clip_pixels(images, self.network.image_size)
        raw = self.network(pixels, given["input_ids"].to(self._device), given["attention_mask"].to(self._device))
        return (raw.float() - self.mean) / self.deviation


class BlipScorer(nn.Module):
    """The network of ImageReward from a state dictionary in the authors' layout."""

    def __init__(self, weights: dict[str, Tensor], heads: tuple[int, int]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision, text = from_blip(weights)
        patches = vision["embeddings.position_embedding"].shape[1] - 1
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        self.image_size = round(patches**0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(vision), num_attention_heads=heads[0], image_size=self.image_size,
                patch_size=patch, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        words, hidden = text["embeddings.word_embeddings.weight"].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words, hidden_size=hidden, encoder_hidden_size=width,
                intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(text), num_attention_heads=heads[1],
                max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
                bos_token_id=None, eos_token_id=None, sep_token_id=None, pad_token_id=0,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        for module, state in ((self.vision, vision), (self.text, text)):
            missing, unexpected = module.load_state_dict(state, strict=False)
            if wrong := [name for name in [*missing, *unexpected] if not name.endswith("position_ids")]:
                raise UserError(f"ImageReward.pt: does not fit a BLIP: {wrong[0]!r}")
        head = {key.removeprefix("mlp."): value for key, value in weights.items() if key.startswith("mlp.")}
        self.head = linear_head(head, "ImageReward.pt")

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(N,) raw scores of normalised pixels (N, 3, S, S) and token ids (N, L)."""
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere
        )
        return self.head(read.last_hidden_state[:, 0])[:, 0]


# ---- weights in the layouts of their authors


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt file that holds nothing but tensors.

    Raises:
        UserError: it cannot be read, or holds other things.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {str(error).strip().splitlines()[0][:200]}") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict):
        raise UserError(f"{path}: should hold a state dictionary, holds {type(found).__name__}")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def linear_head(state: dict[str, Tensor], path: str) -> nn.Module:
    """The linear layers ``layers.N.weight``/``bias`` one after the other, in the order of N: there is nothing between
    them in the published heads but dropout.

    Raises:
        UserError: the layers do not fit together.
    """
    numbers = sorted({int(found[1]) for key in state if (found := re.fullmatch(r"layers\.(\d+)\.weight", key))})
    layers = []
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"].float(), state[f"layers.{number}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    if not layers or any(a[1] != b[0] for a, b in pairwise(widths)) or widths[-1][1] != 1:
        raise UserError(f"{path}: no head of linear layers that ends in one number (found: {widths})")
    return nn.Sequential(*layers).eval().requires_grad_(False)


_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_CLIP_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "logit_scale": "logit_scale",
}
_CLIP_NORMS = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
               "visual.ln_post": "vision_model.post_layernorm"}  # fmt: skip


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP in open_clip's layout under the names of transformers' `CLIPModel`."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
        if block:
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            if block[3].startswith("attn.in_proj_"):
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{name}_proj.{block[3].removeprefix('attn.in_proj_')}"] = part
            else:
                inner, _, kind = block[3].rpartition(".")
                found[f"{layer}.{_CLIP_LAYER[inner]}.{kind}"] = value
        elif key in ("text_projection", "visual.proj"):
            found["text_projection.weight" if key == "text_projection" else "visual_projection.weight"] = value.T
        elif key in _CLIP_NAMES:
            found[_CLIP_NAMES[key]] = value
        else:
            norm, _, kind = key.rpartition(".")
            if norm in _CLIP_NORMS:
                found[f"{_CLIP_NORMS[norm]}.{kind}"] = value
    return found


_BLIP_NAMES = (
    (r"^blocks\.", "encoder.layers."), (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm1\.", ".layer_norm1."), (r"\.norm2\.", ".layer_norm2."), (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)  # fmt: skip


def from_blip(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The image and text weights of a BLIP in its authors' layout, under the names of transformers."""
    vision, text = {}, {}
    for key, value in state.items():
        key = key.removeprefix("blip.")
        if key.startswith("visual_encoder."):
            name = key.removeprefix("visual_encoder.")
            for pattern, replacement in _BLIP_NAMES:
                name = re.sub(pattern, replacement, name)
            vision[name] = value
        elif key.startswith("text_encoder.") and not key.endswith("position_ids"):
            text[key.removeprefix("text_encoder.")] = value
    return vision, text


def _layers(state: dict[str, Tensor]) -> int:
    found = {int(number[1]) for key in state if (number := re.search(r"encoder\.layers?\.(\d+)\.", key))}
    return len(found)

"""Published preference models at toy size: networks in their authors' layout, written out here, against our own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, normalize
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from unveil.registry import UserError
from unveil.rewards.base import Failure, Reward
from unveil.rewards.preferences import (
    DEVIATION,
    MEAN,
    Aesthetic,
    BlipScorer,
    ClipReward,
    ImageReward,
    clip_pixels,
    linear_head,
    read_weights,
)

WORDS = ["<pad>", "<start>", "a", "cat", "dog", "red", "<end>"]
END = 6  # the largest, as in CLIP
PROMPTS = ["a red cat", "dog"]
LENGTH = 8


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def ask(reward: Reward, batch: Tensor, prompts: list[str] = PROMPTS) -> list[Any]:
    total = reward.ask(list(batch), prompts, [{}] * len(batch)).total
    return [one.message if isinstance(one, Failure) else one for one in total]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    raw = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", END)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CLIPModel]:
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    text = shared | ids | {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "hidden_act": "gelu"}
    vision = shared | {"image_size": 24, "patch_size": 8, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return str(folder), model


# ---- pixels


def test_pixels_are_what_clip_s_own_processor_makes_of_a_picture() -> None:
    from transformers import CLIPImageProcessor

    from unveil.rewards.images import pil_image

    own = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    smooth = torch.nn.functional.interpolate(images(1, 3, 6, 9), (60, 90), mode="bicubic").clamp(0, 1)[0]
    want = torch.as_tensor(own(pil_image(smooth), return_tensors="pt")["pixel_values"])
    assert (clip_pixels(smooth[None], 24) - want).abs().max() < 2.5 / 255 / min(DEVIATION)
    grey = clip_pixels(torch.full((2, 1, 24, 24), 0.5), 24)
    assert grey.shape == (2, 3, 24, 24)
    assert grey[0, :, 0, 0].tolist() == pytest.approx([(0.5 - m) / d for m, d in zip(MEAN, DEVIATION, strict=True)])
    assert clip_pixels(images(1, 3, 8, 5), 24).shape == (1, 3, 24, 24), "small images are enlarged"


# ---- CLIP


def test_the_cosine_and_the_scaled_score_are_those_of_the_network(clip: tuple[str, CLIPModel], tokenizer: str) -> None:
    folder, model = clip
    batch = images(2, 3, 24, 24)
    ids = torch.tensor([[1, 2, 5, 3, END, 0, 0, 0], [1, 4, END, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=clip_pixels(batch, 24))
    want = out.logits_per_image.diagonal()
    assert ask(ClipReward(path=folder, tokenizer=tokenizer, scaled=True), batch) == pytest.approx(want.tolist())
    cosine = ask(ClipReward(path=folder, tokenizer=tokenizer, batch_size=1), batch)
    assert cosine == pytest.approx((want / model.logit_scale.exp()).tolist(), abs=1e-6)
    assert all(-1 <= one <= 1 for one in cosine)


class OpenClipTower(nn.Module):
    """One tower of a CLIP with the parameter names of open_clip."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 40), "c_proj": nn.Linear(40, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 32, 8, stride=8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(32))
        self.visual.positional_embedding = nn.Parameter(torch.randn(10, 32))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.visual.transformer = OpenClipTower(32, 2)
        self.visual.proj = nn.Parameter(torch.randn(32, 16))
        self.token_embedding = nn.Embedding(len(WORDS), 32)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, 32))
        self.transformer = OpenClipTower(32, 2)
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.randn(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        future = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
        y = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, future))
        text = y[torch.arange(len(y)), (ids == END).int().argmax(1)] @ self.text_projection
        return (normalize(image, dim=-1) * normalize(text, dim=-1)).sum(-1)


@torch.no_grad()
def test_weights_in_open_clip_s_layout_give_open_clip_s_scores(
    clip: tuple[str, CLIPModel], tokenizer: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = OpenClip().eval()
    for name, value in model.named_parameters():
        if "ln_" in name or "bias" in name:
            value.add_(0.3 * torch.randn_like(value))  # nothing may hide behind ones and zeros
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    batch = images(2, 3, 24, 24)
    ids = torch.tensor([[1, 2, 5, 3, END, 0, 0, 0], [1, 4, END, 0, 0, 0, 0, 0]])
    want = model(clip_pixels(batch, 24), ids).tolist()
    settings = {"path": clip[0], "tokenizer": tokenizer, "weights": str(tmp_path / "HPS.pt")}
    assert ask(ClipReward(**settings), batch) == pytest.approx(want, abs=1e-5)
    state = model.state_dict()
    del state["visual.ln_pre.bias"]
    torch.save(state, tmp_path / "HPS.pt")
    (message, _) = ask(ClipReward(**settings), batch)
    assert "does not fit" in message and "pre_layrnorm.bias" in message


def differentiates(reward: Reward, batch: Tensor) -> None:
    """Its values are its scores, and their gradient that of a small step of all pixels."""
    inner = batch.clone().requires_grad_()
    values = reward.values(inner, PROMPTS, [{}] * len(batch))
    assert values.tolist() == pytest.approx(ask(reward, batch), abs=1e-5)
    values.sum().backward()
    assert inner.grad is not None
    step = 1e-2 * inner.grad.sign() * (inner.grad.abs() > inner.grad.abs().median())
    with torch.no_grad():
        ends = [float(reward.values(batch + sign * step, PROMPTS, []).sum()) for sign in (1, -1)]
    assert ends[0] - ends[1] == pytest.approx(2 * float((inner.grad * step).sum()), rel=0.05)


def test_cosines_are_differentiable(clip: tuple[str, CLIPModel], tokenizer: str) -> None:
    differentiates(ClipReward(path=clip[0], tokenizer=tokenizer, scaled=True), 0.3 + 0.4 * images(2, 3, 30, 27))


# ---- heads


def test_an_aesthetic_head_reads_normalised_features(clip: tuple[str, CLIPModel], tmp_path: Path) -> None:
    torch.manual_seed(2)
    first, second = nn.Linear(16, 4), nn.Linear(4, 1)
    state = {f"layers.{n}.{k}": v for n, layer in ((0, first), (2, second)) for k, v in layer.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    batch = images(2, 3, 24, 24)
    with torch.no_grad():
        features = clip[1].get_image_features(pixel_values=clip_pixels(batch, 24)).pooler_output
        want = second(first(normalize(features, dim=-1)))[:, 0]
    reward = Aesthetic(path=clip[0], weights=str(tmp_path / "head.pth"))
    assert ask(reward, batch) == pytest.approx(want.tolist(), abs=1e-5)
    differentiates(reward, 0.3 + 0.4 * batch)


def test_heads_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no head of linear layers"):
        linear_head({"layers.0.weight": torch.zeros(3, 4), "layers.0.bias": torch.zeros(3)}, "x.pth")
    with pytest.raises(UserError, match="no head of linear layers"):
        linear_head({}, "x.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "code.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="should hold a state dictionary"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"^path: 'nowhere': no such file or folder"):
        ClipReward(path="nowhere")
    with pytest.raises(UserError, match=r"^weights: 'a/b': no such file or folder"):
        Aesthetic(path="owner/name", weights="a/b")


# ---- ImageReward


def blip_weights() -> dict[str, Tensor]:
    """Random weights of a small BLIP with ImageReward's head, named as its authors name them."""
    stream = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, 24), "visual_encoder.pos_embed": (1, 10, 24),
        "visual_encoder.patch_embed.proj.weight": (24, 3, 8, 8), "visual_encoder.patch_embed.proj.bias": (24,),
        "text_encoder.embeddings.word_embeddings.weight": (len(WORDS), 16),
        "text_encoder.embeddings.position_embeddings.weight": (40, 16),
    }  # fmt: skip

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for layer in range(2):
        own = f"visual_encoder.blocks.{layer}"
        add(f"{own}.attn.qkv", 72, 24), add(f"{own}.attn.proj", 24, 24)
        add(f"{own}.mlp.fc1", 30, 24), add(f"{own}.mlp.fc2", 24, 30), add(f"{own}.norm1", 24), add(f"{own}.norm2", 24)
        own = f"text_encoder.encoder.layer.{layer}"
        for kind, width in (("attention", 16), ("crossattention", 24)):
            add(f"{own}.{kind}.self.query", 16, 16), add(f"{own}.{kind}.self.key", 16, width)
            add(f"{own}.{kind}.self.value", 16, width), add(f"{own}.{kind}.output.dense", 16, 16)
            add(f"{own}.{kind}.output.LayerNorm", 16)
        add(f"{own}.intermediate.dense", 20, 16), add(f"{own}.output.dense", 16, 20), add(f"{own}.output.LayerNorm", 16)
    add("visual_encoder.norm", 24), add("text_encoder.embeddings.LayerNorm", 16)
    found = {f"blip.{name}": torch.randn(shape, generator=stream) * 0.3 for name, shape in shapes.items()}
    found |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(1),
    }
    for number, (out, width) in {0: (6, 16), 2: (5, 6), 4: (1, 5)}.items():
        found[f"mlp.layers.{number}.weight"] = torch.randn(out, width, generator=stream)
        found[f"mlp.layers.{number}.bias"] = torch.randn(out, generator=stream)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def blip_score(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor, heads: tuple[int, int]) -> Tensor:
    """ImageReward's network written out: pre-norm ViT, post-norm BERT that also looks at the image, linear layers."""

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    kernel, bias = weights[f"{v}.patch_embed.proj.weight"], weights[f"{v}.patch_embed.proj.bias"]
    x = nn.functional.conv2d(pixels, kernel, bias, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + weights[f"{v}.pos_embed"]
    for layer in range(2):
        own = f"{v}.blocks.{layer}"
        qkv = apply(f"{own}.attn.qkv", norm(f"{own}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + apply(f"{own}.attn.proj", attend(*qkv, heads[0]))
        x = x + apply(f"{own}.mlp.fc2", gelu(apply(f"{own}.mlp.fc1", norm(f"{own}.norm2", x, 1e-6))))
    x = norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    y = weights[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = norm(
        f"{t}.embeddings.LayerNorm", y + weights[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12
    )
    for layer in range(2):
        own = f"{t}.encoder.layer.{layer}"
        for kind, other, seen in (("attention", None, mask), ("crossattention", x, None)):
            source = y if other is None else other
            parts = [
                apply(f"{own}.{kind}.self.query", y),
                *(apply(f"{own}.{kind}.self.{p}", source) for p in ("key", "value")),
            ]
            out = apply(f"{own}.{kind}.output.dense", attend(*parts, heads[1], seen))
            y = norm(f"{own}.{kind}.output.LayerNorm", out + y, 1e-12)
        out = apply(f"{own}.output.dense", gelu(apply(f"{own}.intermediate.dense", y)))
        y = norm(f"{own}.output.LayerNorm", out + y, 1e-12)
    z = y[:, 0]
    for number in (0, 2, 4):
        z = apply(f"mlp.layers.{number}", z)
    return z[:, 0]


@torch.no_grad()
def test_image_reward_in_its_authors_layout_gives_their_scores(tokenizer: str, tmp_path: Path) -> None:
    weights, heads = blip_weights(), (4, 2)
    torch.save(weights, tmp_path / "ImageReward.pt")
    batch = images(2, 3, 24, 24)
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :5], ids[1, :3] = torch.tensor([1, 2, 5, 3, END]), torch.tensor([1, 4, END])
    want = blip_score(weights, clip_pixels(batch, 24), ids, (ids != 0).long(), heads)
    for path in (tmp_path, tmp_path / "ImageReward.pt"):
        reward = ImageReward(path=str(path), tokenizer=tokenizer, heads=heads)
        found = ask(reward, batch)
        assert found == pytest.approx(((want - 0.16717362830052426) / 1.0333394966054072).tolist(), rel=1e-4)
        with torch.enable_grad():
            differentiates(reward, 0.3 + 0.4 * batch)
    assert reward.network.image_size == 24
    del weights["blip.visual_encoder.norm.bias"]
    with pytest.raises(UserError, match=r"does not fit a BLIP: 'post_layernorm\.bias'"):
        BlipScorer(weights, heads)

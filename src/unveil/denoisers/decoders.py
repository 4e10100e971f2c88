"""Masked models whose network is a decoder of ``transformers`` with attention in both directions.

Checkpoints that were converted from autoregressive ones, by others (``a2d-*``) or by this project (`convert`), need
nothing else; LLaDA and Dream are special cases in files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec
from unveil.denoisers.pretrained import NO_SETTINGS, PretrainedDenoiser
from unveil.registry import UserError, did_you_mean

_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
"""What old files hold and no network reads any more."""
_RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX


class DecoderDenoiser(PretrainedDenoiser):
    """``...ForCausalLM`` whose causal mask is off."""

    network: Any
    output_layers = ("lm_head",)
    prefix: ClassVar[str] = "a2d-"
    """Of the model_type, before the architecture's name."""
    shifted: ClassVar[bool] = False
    """Whether the head at position i predicts token i + 1 where config.json has no ``logit_shift``."""
    _opened: Tensor | None = None

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
        return bidirectional(settings.pop("model_type").removeprefix(cls.prefix), settings)

    def rename(self, name: str) -> str | None:
        return own_name(name, self._own_names, self.network.base_model_prefix)

    @cached_property
    def _own_names(self) -> set[str]:
        return set(self.network.state_dict())

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        mask, base = self.mask(attendable, position), self.network.base_model
        features = base(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        return shift_right(features, attendable) if self.spec.logit_shift else features

    def mask(self, attendable: Tensor | None, position: Tensor) -> Any:
        """Which keys each query sees, in a form that the library takes; None: all of them."""
        if self._opened is None:
            return attendable  # from which the library makes the mask of every kind of layer
        return partly_causal(self._opened.to(position.device), attendable, self.network)

    @contextmanager
    def opening(self, opened: Tensor | None) -> Iterator[None]:
        """Context in which each position sees the past, and of the future only where ``opened`` (L, L) [query, key]
        is True; None: everything."""
        self._opened = opened
        try:
            yield
        finally:
            self._opened = None

    def logits(self, features: Tensor) -> Tensor:
        logits, config = self.network.get_output_embeddings()(features), self.network.config
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def sizes(self) -> dict[str, int]:
        config = self.network.config
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "feature_dim": config.hidden_size,
        }

    def _make_spec(self, text: Any) -> DenoiserSpec:
        shift = self.published.config.get("logit_shift", int(self.shifted))
        if shift not in (0, 1):
            raise UserError(f"{self.published.folder / 'config.json'}: logit_shift: should be 0 or 1, got {shift!r}")
        return replace(super()._make_spec(text), logit_shift=int(shift))


def shift_right(features: Tensor, valid: Tensor | None) -> Tensor:
    """Features (B, L, D) that predict the next token, moved so that feature i predicts token i.

    Each position takes the feature of the valid position before it; the first one, which nothing predicts, keeps its
    own, as Dream's sampler has it.
    """
    batch, length, dim = features.shape
    place = torch.arange(length, device=features.device).expand(batch, length)
    known = place if valid is None else torch.where(valid, place, -1).cummax(1).values
    before = torch.cat([torch.full_like(known[:, :1], -1), known[:, :-1]], 1)
    before = torch.where(before < 0, place, before)
    return features.gather(1, before[..., None].expand(-1, -1, dim))


def own_name(name: str, own: Collection[str], prefix: str) -> str | None:
    """A network's own name of a tensor in the files; None for a buffer of old files."""
    name = _RENAMED.get(name, name)
    inner = f"{prefix}.{name}"  # files of GPT-2 leave it out
    if name not in own and inner in own:
        return inner
    return None if name not in own and _BUFFER.fullmatch(name) else name


def partly_causal(opened: Tensor, attendable: Tensor | None, network: Any) -> Any:
    """The attention mask of a decoder whose positions see the past and some of the future.

    Args:
        opened: (L, L) future keys that a query may see.
        attendable: (B, L) keys that are no padding; None: all.
        network: whose windows and kind of attention it has to suit.
    """
    config, length = network.config, len(opened)
    place = torch.arange(length, device=opened.device)
    ahead = place[None, :] - place[:, None]  # of the query, (L, L)
    seen = (opened | (ahead <= 0))[None]
    if attendable is not None:
        seen = (seen & attendable[:, None, :]) | (ahead == 0)  # padding sees itself: no row is empty
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    near = seen if window is None else seen & (-ahead < window) & (ahead <= window)

    def form(mask: Tensor) -> Tensor:
        mask = mask[:, None]  # (B or 1, 1, L, L)
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)

    if window is None or length <= window:
        return form(seen)
    return {"full_attention": form(seen), "sliding_attention": form(near)} if kinds else form(near)


def bidirectional(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A causal language model of ``transformers`` in which every position attends to every other.

    Raises:
        UserError: there is no decoder of that name.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    if architecture not in DECODERS:
        raise UserError(f"architecture {architecture!r} is no decoder{did_you_mean(architecture, DECODERS)}")
    config = transformers.AutoConfig.for_model(architecture, **settings)
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)  # some of the library's defaults are not 0
    config.is_causal = False
    network = getattr(transformers, DECODERS[architecture])(config)
    network.tie_weights()
    return network

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
from unveil.denoisers.decoder_cache import cache_argument
from unveil.denoisers.kept import KeyValues
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

    @cached_property
    def _plain(self) -> bool:
        """Whether every layer takes one mask of truth values: none looks back only so far."""
        config = self.network.config
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        return config._attn_implementation != "eager" and window >= config.max_position_embeddings

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        features = self.outputs(ids, attendable, position)
        return shift_right(features, attendable) if self.spec.logit_shift else features

    def outputs(self, ids: Tensor, attendable: Tensor | None, position: Tensor) -> Tensor:
        """`hidden`, features not moved."""
        mask: Any = attendable  # from which the library makes the masks of all kinds of layers
        if self._opened is not None:
            mask = partly_causal(self._opened.to(ids.device), attendable, self.network)
        elif self._plain:
            mask = self.mask(attendable, position, position)
        base = self.network.base_model
        return base(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state

    @contextmanager
    def opening(self, opened: Tensor | None) -> Iterator[None]:
        """Context in which each position sees the past, and of the future only where ``opened`` (L, L) [query, key]
        is True; None: everything."""
        self._opened = opened
        try:
            yield
        finally:
            self._opened = None

    def window(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None = None) -> Tensor:
        if not self.spec.logit_shift:
            return self._kept(ids, valid, kept, columns)
        if columns is None:
            return shift_right(self._kept(ids, valid, kept, None), valid)
        first = columns[:, :1]
        before = (first - 1).clamp(min=0)
        before = torch.where(valid.gather(1, before), before, first)
        features = self._kept(ids, valid, kept, torch.cat([before, columns], 1))
        # Column c is predicted by c - 1, which stands one place before c's; a repeated column has its first one's.
        return features.gather(1, (columns - first)[..., None].expand(-1, -1, features.shape[-1]))

    def _kept(self, ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None) -> Tensor:
        """`window`, features not moved."""
        attendable = valid | ~valid.any(1, keepdim=True)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        query = position
        if columns is not None:
            ids, query = ids.gather(1, columns), position.gather(1, columns)
        mask = self.mask(attendable, position, query)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": query, "use_cache": False}
        return self.network.base_model(**given, **cache_argument(kept, columns)).last_hidden_state

    def mask(self, attendable: Tensor | None, position: Tensor, query: Tensor) -> Tensor | None:
        """Which keys, at ``position`` (B, L), each query at ``query`` (B, W) sees, (B, 1, W, L); None: all of them."""
        if attendable is None:
            return None
        return attendable[:, None, None, :].expand(-1, 1, query.shape[1], -1)

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
        return replace(super()._make_spec(text), logit_shift=int(shift), keeps_keys=self._plain)


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

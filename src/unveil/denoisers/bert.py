"""Masked language models of the BERT kind: BERT and ModernBERT, whose classes are bidirectional as they are."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from unveil.denoisers.pretrained import NO_SETTINGS, PretrainedDenoiser

_CLASSES = {"bert": "Bert", "modernbert": "ModernBert"}
_UNREAD = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*|.*\.position_ids")
"""Of the next-sentence task, which a masked model does not have."""


class BertDenoiser(PretrainedDenoiser):
    """``...ForMaskedLM``. Prompts begin with [CLS], and [SEP] ends an answer."""

    network: Any
    tokenizer_class = "BertTokenizer"
    output_layers = ("decoder",)

    @classmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        import transformers

        settings = {key: value for key, value in config.items() if key not in NO_SETTINGS}
        name = _CLASSES[settings.pop("model_type")]
        settings |= {key: 0.0 for key in settings if "dropout" in key and key != "classifier_dropout"}
        made = getattr(transformers, f"{name}Config")(**settings)
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(made, key):
                setattr(made, key, 0.0)  # the library's default is not 0
        made._attn_implementation = "sdpa"
        network = getattr(transformers, f"{name}ForMaskedLM")(made)
        network.tie_weights()
        return network

    def rename(self, name: str) -> str | None:
        if _UNREAD.fullmatch(name):
            return None
        # Names of the first releases.
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        mask = None if attendable is None else attendable.long()
        return self.network.base_model(input_ids=ids, attention_mask=mask, position_ids=position).last_hidden_state

    def logits(self, features: Tensor) -> Tensor:
        if hasattr(self.network, "cls"):
            return self.network.cls(features)
        return self.network.decoder(self.network.head(features))

    def sizes(self) -> dict[str, int]:
        config = self.network.config
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "feature_dim": config.hidden_size,
        }

"""How large a denoiser is and what a forward pass costs, from its config.json alone: nothing is read or built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unveil.denoisers.tokenizer import TextTokenizer
from unveil.registry import UserError, did_you_mean

KNOWN: dict[str, dict[str, Any]] = {
    "llada-8b": {
        "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "mlp_hidden_size": 12288, "vocab_size": 126464, "weight_tying": False,
    },
    "dream-7b": {
        "model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "a2d-qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llada2-mini": {
        "model_type": "llada2_moe", "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120, "vocab_size": 157184,
        "tie_word_embeddings": False, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1,
        "moe_intermediate_size": 512, "first_k_dense_replace": 1,
    },
}  # fmt: skip
"""Keys of published configurations, for folders that are not there."""
_ALIASES = {"llada": "llada-8b", "dream": "dream-7b", "diffucoder": "dream-7b", "llada2": "llada2-mini"}
"""Families of one size, by the beginning of a model's name."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer with gated feed-forward layers. Counts are of one layer unless they say otherwise."""

    layers: int
    dim: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; that of the values is the same."""
    hidden: int
    """Width of the feed-forward layer (of all experts that a token visits)."""
    vocabulary: int
    tied: bool
    """Embedding and output layer share their weights."""
    stored_hidden: int = 0
    """Width of all experts together; 0: there are none."""
    experts: int = 0
    """How many there are: the router has a row of weights for each."""
    dense: tuple[int, int] = (0, 0)
    """First layers with an ordinary feed-forward layer instead of experts: how many, and their width."""
    norms: int = 0
    """Weights of norms and biases."""
    context: int = 0
    """The longest sequence; 0: not known."""

    @property
    def attention(self) -> int:
        """Weights of the projections of attention."""
        return self.dim * (2 * self.queries + 2 * self.keys)

    def layer(self, hidden: int) -> int:
        """Weights of matrices."""
        return self.attention + 3 * self.dim * hidden

    @property
    def stored_layer(self) -> int:
        return self.layer(self.stored_hidden or self.hidden) + self.experts * self.dim

    @property
    def outside(self) -> int:
        """Weights of embedding and output layer."""
        return self.vocabulary * self.dim * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        first, width = self.dense
        stored = (self.layers - first) * self.stored_layer + first * self.layer(width)
        return stored + self.layers * self.norms + self.dim + self.outside

    def forward_flops(self, length: int) -> float:
        """Of the layers, for one sequence of ``length`` tokens (a multiplication and an addition are two)."""
        first, width = self.dense
        visited = self.layer(self.hidden) + self.experts * self.dim
        weights = (self.layers - first) * visited + first * self.layer(width)
        return 2.0 * length * weights + 4.0 * length * length * self.queries * self.layers

    def head_flops(self, positions: float) -> float:
        """Of the output layer at some positions."""
        return 2.0 * positions * self.dim * self.vocabulary


def shape_of(name_or_path: str, folder: Path | None) -> tuple[str, Shape]:
    """The shape of a model, and where it was taken from.

    Args:
        name_or_path: as a recipe names it; if there is no folder, a name that `KNOWN` tells.
        folder: of the model, if it is there.

    Raises:
        UserError: nothing is known of the model.
    """
    if folder is not None:
        from unveil.denoisers.folder import read_config

        config = read_config(folder)
        if "vocab_size" not in config and (folder / "tokenizer.json").is_file():
            config["vocab_size"] = len(TextTokenizer.load(folder / "tokenizer.json"))
        return str(folder / "config.json"), shape_of_config(config)
    short = name_or_path.rsplit("/", 1)[-1].lower()
    found = [key for key in sorted(KNOWN, key=len, reverse=True) if short.startswith(key)]
    found += [known for start, known in sorted(_ALIASES.items(), reverse=True) if short.startswith(start)]
    if not found:
        raise UserError(
            f"model.path: nothing is known of {name_or_path!r}, and there is no such folder{did_you_mean(short, KNOWN)}"
        )
    return f"published shape {found[0]}", shape_of_config(KNOWN[found[0]])


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UserError: a model_type whose shape is not known, or a key is missing.
    """
    kind = str(config.get("model_type"))
    try:
        if kind.startswith("unveil-"):
            dim = config["dim"]
            return Shape(
                layers=config["layers"], dim=dim, queries=dim, keys=dim, hidden=config["hidden"],
                vocabulary=config["vocab_size"], tied=False, norms=2 * dim, context=config["context_length"],
            )  # fmt: skip
        if kind == "llada":
            dim, heads = config["d_model"], config["n_heads"]
            return Shape(
                layers=config["n_layers"], dim=dim, queries=dim,
                keys=dim // heads * (config.get("n_kv_heads") or heads),
                hidden=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * dim,
                vocabulary=config.get("embedding_size") or config["vocab_size"],
                tied=bool(config.get("weight_tying")), norms=2 * dim, context=config.get("max_sequence_length", 0),
            )  # fmt: skip
        if kind == "Dream" or kind.startswith("a2d-") or kind == "llada2_moe":
            return _decoder(config, kind)
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]}: required, but missing") from error
    raise UserError(f"model_type {kind!r}: its shape is not known (allowed: unveil-*, llada, llada2_moe, Dream, a2d-*)")


def _decoder(config: Mapping[str, Any], kind: str) -> Shape:
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or dim // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    norms = 2 * dim + (queries + 2 * keys if kind in ("Dream", "a2d-qwen2") else 0)
    norms += 2 * head if kind in ("a2d-qwen3", "llada2_moe") else 0
    hidden, stored, dense = config["intermediate_size"], 0, (0, 0)
    if "num_experts" in config:
        width, shared = config["moe_intermediate_size"], config.get("num_shared_experts") or 0
        dense = (config.get("first_k_dense_replace", 0), hidden)
        hidden = width * (config["num_experts_per_tok"] + shared)
        stored = width * (config["num_experts"] + shared)
    return Shape(
        layers=config["num_hidden_layers"], dim=dim, queries=queries, keys=keys, hidden=hidden,
        vocabulary=config["vocab_size"], tied=bool(config.get("tie_word_embeddings")), stored_hidden=stored,
        experts=config.get("num_experts", 0), dense=dense, norms=norms,
        context=config.get("max_position_embeddings", 0),
    )  # fmt: skip

"""Folders from the Hugging Face hub, by ``owner/name``."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from unveil.registry import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
_SMALL = ["*.json", "*.txt", "*.jinja", "*.py", "*.model", "LICENSE*", "NOTICE*"]


@functools.cache
def download(name: str, *, tokenizer_only: bool = False) -> Path:
    """The local copy of a model on the hub; downloaded once, then read from the hub's cache, also without a network.

    Of an image pipeline only the parts that make it up come along, not its other formats and precisions.

    Raises:
        UserError: the hub does not know the model, does not give it out, or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"model {name!r}: the extra is not installed (pip install 'unveil[hf]')") from error
    try:
        if tokenizer_only:
            return Path(snapshot_download(name, allow_patterns=_TOKENIZER))
        if (Path(snapshot_download(name, allow_patterns=_SMALL)) / "model_index.json").is_file():
            return _download_pipeline(name)
        return Path(snapshot_download(name, allow_patterns=[*_SMALL, "*.safetensors"]))
    except Exception as error:  # any of a dozen kinds: no network, no such repository, gated, interrupted
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"model {name!r}: no such folder, and the hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def _download_pipeline(name: str) -> Path:
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False))

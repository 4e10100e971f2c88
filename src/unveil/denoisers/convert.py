"""An autoregressive model becomes a masked one: a mask token, attention in both directions, the shift of its head.

The weights stay those of the autoregressive model until they are trained (DiffuLLaMA, arXiv 2410.17891; Dream, arXiv
2508.15487; with ``shift: false`` the token at a position is learned from that position, as a2d has it).
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from unveil.denoisers.decoders import DecoderDenoiser, own_name
from unveil.denoisers.pretrained import MASKS, Dtype, Part, PublishedFolder, first_line, read_tokenizer
from unveil.registry import UserError, did_you_mean

NEW_MASK = "<|mask|>"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(kw_only=True)
class Conversion:
    """How an autoregressive model becomes a masked one."""

    mask: str | None = None
    """A special token of the vocabulary that marks holes from now on, such as a reserved one; None: the mask token
    that there is, or else a new one, <|mask|>."""
    shift: bool = True
    """True: the feature of a position goes on predicting the token after it (DiffuLLaMA, Dream). False: the token at
    the position itself, which the model has to learn."""
    anneal: Annotated[int, Field(ge=0)] = 0
    """Updates over which attention opens: in update u each pair of a position and a later one is open with probability
    u / anneal, drawn anew every update. 0: attention is open at once."""

    def share(self, update: int) -> float:
        """Share of the future that is open in an update, 0-based."""
        return min(1.0, update / self.anneal) if self.anneal else 1.0


def convert(
    folder: str | Path,
    conversion: Conversion,
    *,
    dtype: Dtype = "fp32",
    chat: bool = False,
    gradient_checkpointing: bool = False,
) -> DecoderDenoiser:
    """Read an autoregressive model of ``transformers`` as a masked one.

    What it is saved as is a folder of the same architecture, which ``transformers`` opens too; config.json says what it
    has become by ``is_causal: false``, ``mask_token_id`` and ``logit_shift``.

    Raises:
        UserError: the folder holds no decoder, or one that is masked already; no such mask token; attention cannot be
            opened.
    """
    folder = Path(folder)
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{folder}: to convert a model needs an extra (pip install 'unveil[hf]')")
    published = PublishedFolder(folder)
    check_decoder(published.config, folder)
    text = read_tokenizer(folder, DecoderDenoiser.tokenizer_class)
    fresh = _name_mask(conversion.mask, published.config, text)
    text = _write_tokenizer(published, text)
    mask = text.mask_token_id
    network: Any = DecoderDenoiser.built(published, dtype)
    own, prefix = set(network.state_dict()), network.base_model_prefix
    found = {name: own_name(name, own, prefix) for name in published.shapes}
    names = {name: [] if inner is None else [Part(inner)] for name, inner in found.items()}
    published.pair(network, names)
    published.load(network, names)
    if fresh:
        _embed(network, mask, text)
    shift = int(conversion.shift)
    sizes = {"vocab_size": network.config.vocab_size}
    published.config |= {**sizes, "is_causal": False, "mask_token_id": mask, "logit_shift": shift}
    denoiser = DecoderDenoiser(network, published, text, chat=chat)
    name = text.convert_ids_to_tokens(mask)
    if mask in denoiser.frame.wrap([]):
        raise UserError(f"model.convert.mask: {name!r} is a part of the model's prompts (choose another one)")
    if gradient_checkpointing:
        denoiser.checkpoint_gradients()
    denoiser.eval()
    _probe(denoiser, folder)
    return denoiser


def check_decoder(config: dict[str, Any], folder: Path) -> None:
    """Refuse what is no autoregressive text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    kind, where = config.get("model_type"), f"{folder / 'config.json'}: model_type {config.get('model_type')!r}"
    if config.get("is_causal") is False or str(kind).startswith(DecoderDenoiser.prefix):
        raise UserError(f"{where}: a masked model already, nothing to convert (leave model.convert out)")
    if config.get("is_encoder_decoder"):
        raise UserError(f"{where}: has an encoder, only decoders can be converted")
    if "text_config" in config:
        raise UserError(f"{where}: takes more than text, only decoders of text can be converted")
    if not DECODERS.get(str(kind), "").endswith(("ForCausalLM", "GPT2LMHeadModel")):  # others of that name are BERTs
        raise UserError(f"{where}: no autoregressive model that can be converted{did_you_mean(str(kind), DECODERS)}")


def _name_mask(wanted: str | None, config: dict[str, Any], text: Any) -> bool:
    """Give the tokenizer its mask token; whether an embedding has to be made for it."""
    known = text.get_vocab()
    if wanted is None:
        held = next((token for token in (text.mask_token, *MASKS) if token in known), None)
        text.add_special_tokens({"mask_token": held or NEW_MASK})
        return held is None
    special = [token.content for token in text.added_tokens_decoder.values() if token.special]
    if wanted not in known:
        raise UserError(f"model.convert.mask: no token is called {wanted!r}{did_you_mean(wanted, special)}")
    if wanted not in special:
        raise UserError(f"model.convert.mask: {wanted!r} is a word of the vocabulary (allowed: {', '.join(special)})")
    index, ends = known[wanted], config.get("eos_token_id")
    used = {*(ends if isinstance(ends, list) else [ends]), config.get("pad_token_id"), config.get("bos_token_id")}
    if index in used | {text.eos_token_id, text.pad_token_id, text.bos_token_id, text.unk_token_id}:
        raise UserError(f"model.convert.mask: {wanted!r} has another use (end, padding, start or unknown)")
    fresh = wanted != text.mask_token
    text.add_special_tokens({"mask_token": wanted})
    return fresh


@torch.no_grad()
def _embed(network: Any, mask: int, text: Any) -> None:
    """Give the mask the mean embedding of all tokens: a word that says nothing yet."""
    ids = sorted(set(text.get_vocab().values()) - {mask})
    if mask >= network.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng():  # the library draws rows that are overwritten here
            network.resize_token_embeddings(mask + 1, mean_resizing=False)
    for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
        layer.weight[mask] = layer.weight[ids].float().mean(0)
        if getattr(layer, "bias", None) is not None:
            layer.bias[mask] = 0.0


def _write_tokenizer(published: PublishedFolder, text: Any) -> Any:
    """Replace the tokenizer's files by those of ``text``, and read them back: ids are what whoever opens them sees."""
    kept = {name: content for name, content in published.companions.items() if name not in _TOKENIZER}
    with tempfile.TemporaryDirectory() as scratch:
        text.save_pretrained(scratch)
        written = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
        published.companions = kept | written
        return read_tokenizer(Path(scratch), DecoderDenoiser.tokenizer_class)


@torch.no_grad()
def _probe(denoiser: DecoderDenoiser, folder: Path) -> None:
    """Try what the library does not promise of an architecture: that its attention can be opened and closed, and that
    nothing comes between its last feature and its logits that `DecoderDenoiser.logits` does not know."""
    vocabulary = [index for index in range(denoiser.spec.vocab_size) if index not in denoiser.spec.forbidden_ids][-4:]
    ids = torch.tensor([vocabulary, [*vocabulary[:3], vocabulary[0]]], device=denoiser.device)
    position = torch.arange(4, device=denoiser.device).expand(2, 4)
    where = f"{folder / 'config.json'}: model_type {denoiser.published.config['model_type']!r}"
    try:
        found = []
        for opened in (None, torch.zeros(4, 4, dtype=torch.bool)):
            with denoiser.opening(opened):
                found.append(denoiser.outputs(ids, None, position))
        own, theirs = denoiser.logits(found[0]), denoiser.network(input_ids=ids, position_ids=position).logits
    except Exception as error:  # an architecture may lack any of this
        raise UserError(f"{where}: cannot be converted: {first_line(error)}") from error
    (first, second), closed = found[0], found[1]
    if torch.equal(first[0], second[0]):
        raise UserError(f"{where}: cannot be converted: its attention stays causal")
    if not torch.allclose(closed[0, :3], closed[1, :3], atol=1e-5):
        raise UserError(f"{where}: cannot be converted: its attention cannot be closed")
    if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-2):
        raise UserError(f"{where}: cannot be converted: its output layer is not known")

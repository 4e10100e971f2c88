"""Toy folders in the formats of published models, written by hand: names and shapes are those of the authors' files.

``denoisers/fixtures/authors.json`` holds, per model, a configuration, the name and shape of every tensor as the
authors' own modelling code has it, token ids, and the logits which that code gave in float32 (LLaDA: LLaDAModel of
modeling_llada.py; Dream: DreamModel of modeling_dream.py, its logits moved by one as its sampler does; LLaDA 2:
LLaDA2MoeModelLM under its block mask; MDLM: DIT of models/dit.py at noise level 0, and at two others; SEDD of
model/transformer.py at two; qwen3: A2DQwen3LMHeadModel). Weights are not stored but follow from a tensor's name
(`weight`).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

AUTHORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "denoisers" / "fixtures" / "authors.json").read_text(encoding="utf-8")
)
CHAT = (
    "{{ '<|startoftext|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MASK, START, END, TURN = "<|mdm_mask|>", "<|startoftext|>", "<|endoftext|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789<|>_ .:\n+=[]"


def weight(name: str, shape: list[int]) -> Tensor:
    """Numbers that depend on the name alone, by a formula instead of a generator; scales of norms lie around 1."""
    norm = "norm" in name.lower() or "ln_f" in name
    count = torch.Size(shape).numel()
    x = torch.arange(count, dtype=torch.float64) + zlib.crc32(name.encode()) % 100003
    y = torch.sin(x * 12.9898 + 78.233) * 43758.5453
    uniform = 2 * (y - y.floor()) - 1
    return (float(norm) + (0.1 if norm else 0.3) * uniform).reshape(shape).float()


def tokenizer() -> Tokenizer:
    """64 places: 0-4 and 60 are control tokens, 5-52 characters, 53-59 and 61 on are no tokens."""
    mapped = {" ": "Ġ", "\n": "Ċ"}
    vocabulary = {token: index for index, token in enumerate((START, TURN, END, HEADER, HEADER_END))}
    vocabulary |= {mapped.get(letter, letter): 5 + index for index, letter in enumerate(ALPHABET)}
    vocabulary[MASK] = 60
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, TURN, END, HEADER, HEADER_END, MASK])
    return backend


def write(folder: Path, model: str, *, shards: int = 1, **changes: Any) -> Path:
    """A folder of a toy ``llada``, ``dream`` or ``mdlm``; ``changes`` are of config.json."""
    entry = AUTHORS[model]
    return write_folder(folder, entry["config"] | changes, entry["names"], shards=shards)


def write_folder(folder: Path, config: dict[str, Any], names: dict[str, list[int]], *, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: weight(name, shape) for name, shape in names.items()}
    for name in tensors:
        if name.endswith("inv_freq"):
            tensors[name] = 1 / 10000 ** (torch.arange(0, 2 * names[name][0], 2).float() / (2 * names[name][0]))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        parts = [f"model-{1 + part:05d}-of-{shards:05d}.safetensors" for part in range(shards)]
        files = {name: parts[place % shards] for place, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer().save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END, "pad_token": END,
        "chat_template": CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def write_diffusion_gemma(folder: Path, *, canvas_length: int = 8) -> Path:
    """A folder as ``transformers`` saves it; its words lie far apart, so that the network is sure of something."""
    import transformers

    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 1,
        "max_position_embeddings": 256, "sliding_window": 16, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 16,
    }  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=canvas_length, image_token_id=61, boi_token_id=62,
        eoi_token_id=63,
    )  # fmt: skip
    network = transformers.DiffusionGemmaForBlockDiffusion(config)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.parameters():
            if value.dim() > 1:
                value.copy_(0.06 * torch.randn(value.shape, generator=stream))
        network.model.decoder.embed_tokens.weight.mul_(20)
    network.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END, "pad_token": END,
        "chat_template": CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder

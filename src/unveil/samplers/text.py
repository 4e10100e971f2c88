"""Between text and canvases."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser


def response_texts(denoiser: MaskedDenoiser, responses: Tensor) -> list[str]:
    """Text of responses (M, R): everything before the first end token, special tokens dropped."""
    ends = set(denoiser.spec.end_ids)
    rows = []
    for row in responses.tolist():
        cut = next((place for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:cut])
    return denoiser.tokenizer.decode_batch(rows)


def response_ids(denoiser: MaskedDenoiser, text: str, length: int) -> list[int]:
    """Ids of a written response, filled up with end tokens to ``length`` (the padding that training sees).

    Raises:
        ValueError: the text does not fit.
    """
    ids = denoiser.tokenizer.encode(text)
    if len(ids) > length:
        raise ValueError(f"a response of {len(ids)} tokens does not fit into {length}: {text!r}")
    return ids + [denoiser.spec.end_ids[0]] * (length - len(ids))


def encode_prompts(denoiser: MaskedDenoiser, prompts: Sequence[str]) -> list[list[int]]:
    return [denoiser.encode_prompt(prompt) for prompt in prompts]

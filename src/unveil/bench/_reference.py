"""The published decoding loop, the prompts that are decoded, and the networks that decode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError
from unveil.seeds import derive_seed, generator

CPU = torch.device("cpu")
SMALL = TransformerConfig(dim=128, layers=4, heads=4, hidden=256, context_length=128)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts and response lengths; every response is a whole number of blocks."""

    prompts: list[list[int]]
    lengths: list[int]
    block_length: int = 8
    steps_per_block: int = 4

    @classmethod
    def of(cls, denoiser: MaskedDenoiser, batch: int, seed: int) -> Workload:
        """``batch`` random prompts of 8-24 tokens, responses of 16-48 tokens; fewer if the model's canvas is short.

        Raises:
            UserError: the model's canvas is too short.
        """
        context = denoiser.spec.context_length
        if context < 24:
            raise UserError(f"context_length: the bench needs a canvas of 24 tokens, the model has {context}")
        longest = min(48, 2 * context // 3 // 8 * 8)
        longest_prompt = min(24, context - longest)
        never = {*denoiser.spec.forbidden_ids, *denoiser.spec.end_ids}
        words = torch.tensor([index for index in range(denoiser.spec.vocab_size) if index not in never])
        stream = generator(seed, "bench prompts", batch)
        prompts, lengths = [], []
        for row in range(batch):
            length = int(torch.randint(8, longest_prompt + 1, (1,), generator=stream))
            prompts.append(words[torch.randint(len(words), (length,), generator=stream)].tolist())
            lengths.append(min(longest, (32, 16, 48, 24, 40)[row % 5]))
        return cls(prompts=prompts, lengths=lengths)


def random_network(
    vocabulary: int,
    seed: int,
    shape: TransformerConfig = SMALL,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 20.0,
) -> TransformerDenoiser:
    """A network with random weights whose head is ``sharpness`` times wider than freshly initialised.

    Fresh weights answer almost uniformly; a wider head spreads the confidences as training does.
    """
    tokenizer = TextTokenizer.of_words([f"w{index}" for index in range(vocabulary - 4)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            denoiser = TransformerDenoiser(shape, tokenizer)
    finally:
        torch.set_default_dtype(before)
    denoiser.initialise(torch.Generator(device).manual_seed(derive_seed(seed, "bench network")))
    with torch.no_grad():
        denoiser.unembedding.weight.mul_(sharpness)
    return denoiser


@torch.no_grad()
def plain_decode(
    denoiser: MaskedDenoiser,
    prompt: Sequence[int],
    response_length: int,
    *,
    block_length: int,
    steps: int,
    temperature: float = 0.0,
    noise: torch.Generator | None = None,
) -> Tensor:
    """The response (response_length,) of LLaDA's loop (arXiv 2502.09992) with low-confidence remasking.

    One prompt, as it is run in practice: the loop knows no padding mask. ``steps`` counts all blocks.
    """
    mask_id, device = denoiser.spec.mask_id, denoiser.device
    canvas = torch.full((1, len(prompt) + response_length), mask_id, device=device)
    canvas[0, : len(prompt)] = torch.tensor(prompt, device=device)
    blocks = response_length // block_length
    base, extra = divmod(block_length, steps // blocks)
    for block in range(blocks):
        end = len(prompt) + (block + 1) * block_length
        for step in range(steps // blocks):
            holes = canvas == mask_id
            logits = denoiser(canvas)
            noised = logits
            if temperature > 0:
                u = torch.rand(logits.shape, generator=noise, dtype=torch.float64, device=device)
                noised = logits.double().exp() / (-u.log()) ** temperature
            guess = torch.where(holes, noised.argmax(-1), canvas)
            certainty = logits.softmax(-1).gather(-1, guess[..., None])[..., 0]
            certainty[:, end:] = -torch.inf
            certainty = torch.where(holes, certainty, -torch.inf)
            chosen = torch.zeros_like(holes)
            for row in range(len(canvas)):
                chosen[row, certainty[row].topk(base + (step < extra)).indices] = True
            canvas[chosen] = guess[chosen]
    return canvas[0, len(prompt) :]

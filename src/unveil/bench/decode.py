"""Decoding with caches and with rules that commit several tokens, against the published loops.

All sides decode the same prompts of mixed lengths with one network at temperature 0. The published loops take one
prompt at a time, because they know no padding mask; they put the head on every column that they compute and take a
softmax over the whole vocabulary. Ours decode the batch in one call. Sides take turns (A B C ... A B C ...), and ratios
are formed turn by turn, always over the published loop without a cache (LLaDA's).

The default network is a random one, small but shaped like LLaDA-8B and with its vocabulary. Its answers mean nothing:
how much of them a cache changes says little about a trained model, for which there is ``--model``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from unveil.bench import _clock as clock
from unveil.bench import _memory as memory
from unveil.bench._cached_reference import plain_cached_decode
from unveil.bench._reference import Workload, plain_decode, random_network
from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.pretrained import DTYPES
from unveil.denoisers.transformer import TransformerConfig
from unveil.registry import UserError, did_you_mean
from unveil.samplers.caches import Cache, DualCache, PrefixCache, VicinityCache
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, Rule, Threshold
from unveil.seeds import generator

DEMAND_EXACT = 3.0
"""Without a cache, outputs identical: tokens per second over the reference, at least."""
DEMAND_CACHED = 8.0
"""With the cache `dual` and as many steps: the same."""
VOCABULARY = 126_464
SIZES = {
    "small": TransformerConfig(dim=256, layers=8, heads=4, hidden=768, context_length=1024, rope_base=500_000.0),
    "8b": TransformerConfig(dim=4096, layers=32, heads=32, hidden=12_288, context_length=4096, rope_base=500_000.0),
}
"""Shapes of random networks: 71 million weights with the default vocabulary, and LLaDA-8B's own."""
LOGIT_STD = 10.0
"""Of the random networks: about a third of the guesses is then more probable than 0.9."""
REFERENCE = "reference"
Decode = Callable[[MaskedDenoiser, Workload], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to decode the workload.

    Attributes:
        decode: all responses.
        twin: the published loop that does the same; outputs are compared with it.
        demand: of the ratio.
        exact: whether outputs must be those of the reference, with such a network.
    """

    decode: Decode
    twin: str | None = None
    demand: float | None = None
    exact: Callable[[DenoiserSpec], bool] = lambda spec: False


def ours(rule: Rule, cache: Cache | None) -> Decode:
    """All responses in one call of `MaskedSampler`."""

    def decode(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
        steps = max(work.lengths) // work.block_length * work.steps_per_block
        sampler = MaskedSampler(steps=steps, block_length=work.block_length, rule=rule, cache=cache)
        canvas = Canvas.of(work.prompts, work.lengths, denoiser.spec)
        done = sampler.sample(denoiser, canvas, [0] * len(canvas))
        return [row[:length] for row, length in zip(done.response_ids, work.lengths, strict=True)]

    return decode


def published(cache: Literal["prefix", "dual"] | None = None, threshold: float | None = None) -> Decode:
    """All responses by a published loop, one after the other."""

    def decode(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
        responses = []
        for prompt, length in zip(work.prompts, work.lengths, strict=True):
            block, steps = work.block_length, length // work.block_length * work.steps_per_block
            if cache is None:
                done = plain_decode(denoiser, prompt, length, block_length=block, steps=steps)
            else:
                done = plain_cached_decode(
                    denoiser, prompt, length, block_length=block, steps=steps, cache=cache, threshold=threshold
                )
            responses.append(done.cpu())
        return responses

    return decode


SIDES = {
    REFERENCE: Side(decode=published()),
    "reference prefix": Side(decode=published("prefix")),
    "reference dual": Side(decode=published("dual")),
    "reference dual, threshold": Side(decode=published("dual", 0.9)),
    "exact": Side(decode=ours(LowConfidence(), None), twin=REFERENCE, demand=DEMAND_EXACT, exact=lambda spec: True),
    "prefix": Side(decode=ours(LowConfidence(), PrefixCache()), twin="reference prefix", exact=PrefixCache().exact),
    "dual": Side(decode=ours(LowConfidence(), DualCache()), twin="reference dual", demand=DEMAND_CACHED),
    "vicinity": Side(decode=ours(LowConfidence(), VicinityCache())),
    "threshold": Side(decode=ours(Threshold(), None)),
    "dual, threshold": Side(decode=ours(Threshold(), DualCache()), twin="reference dual, threshold"),
}


def run(
    model: MaskedDenoiser | None = None,
    repeats: int = 1,
    *,
    batch: int = 8,
    size: str = "small",
    vocabulary: int = VOCABULARY,
    device: str = "cpu",
    dtype: str = "fp32",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every side.

    Args:
        model: the network of all sides; a random one if None.
        repeats: turns.
        batch: prompts.
        size: of the random network, a name of `SIZES`.
        vocabulary: tokens of the random network.
        device, dtype: of the random network.
        seed: of the random network and the prompts.

    Returns:
        Plain values for JSON: ``setting``, ``cases`` (one per side), ``ratios`` by name, and ``holds``.

    Raises:
        UserError: a value is out of range, or the model keeps no keys, or its canvas is too short.
    """
    for option, number, least in (("repeats", repeats, 1), ("batch", batch, 1), ("vocabulary", vocabulary, 16)):
        if number < least:
            raise UserError(f"{option}: should be at least {least}, got {number}")
    if size not in SIZES:
        raise UserError(f"size: {size!r} is not known{did_you_mean(size, SIZES)}")
    denoiser = model
    if denoiser is None:
        denoiser = _network(SIZES[size], vocabulary, seed, torch.device(device), DTYPES[dtype])
    if not denoiser.spec.keeps_keys:
        raise UserError(f"model: {type(denoiser).__name__} keeps no keys and values: there is no cache to measure")
    denoiser.eval()
    work = workload(denoiser, batch, seed)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    outputs: dict[str, list[Tensor]] = {}
    counts: dict[str, dict[str, int]] = {}
    for _ in range(repeats):
        for name, side in SIDES.items():
            with _Counted(denoiser) as counted:
                taken, outputs[name] = clock.timed(lambda side=side: side.decode(denoiser, work), denoiser.device)  # type: ignore[misc]
            seconds[name].append(taken)
            counts[name] = {"forwards": counted.forwards, "columns": counted.columns, "logits": counted.logits}
    brief = replace(work, steps_per_block=2)  # a block's first pass and one more: what lives at once is the same
    weights = list(denoiser.state_dict().values())
    tokens = sum(work.lengths)
    single = next(iter(weights)).dtype == torch.float32
    cases = []
    for name, side in SIDES.items():
        ratios = [base / own for base, own in zip(seconds[REFERENCE], seconds[name], strict=True)]
        case: dict[str, Any] = {
            "side": name,
            "tokens_per_second": tokens / median(seconds[name]),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            **counts[name],
            "peak_bytes": memory.peak_bytes(lambda side=side: side.decode(denoiser, brief), denoiser.device, weights),  # type: ignore[misc]
            "agreement": agreement(outputs[name], outputs[REFERENCE]),
            "twin": side.twin,
            "twin_agreement": None if side.twin is None else agreement(outputs[name], outputs[side.twin]),
            "demand": side.demand,
        }
        # In bfloat16 two batches differ by more than the gap between two confidences: there nothing is the same.
        case["exact"] = single and side.exact(denoiser.spec)
        case["holds"] = (side.demand is None or case["ratio"] >= side.demand) and not (
            case["exact"] and case["agreement"]["rows"] < 1
        )
        cases.append(case)
    return {
        "bench": "decode",
        "setting": {
            "model": f"random {size}" if model is None else type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
            "vocabulary": denoiser.spec.vocab_size,
            "device": torch.cuda.get_device_name() if denoiser.device.type == "cuda" else "cpu",
            "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "seed": seed,
            "prompt_lengths": [len(prompt) for prompt in work.prompts],
            "response_length": work.lengths[0],
            "block_length": work.block_length,
            "steps_per_block": work.steps_per_block,
            "clock": clock.name(denoiser.device),
            "memory": memory.method(denoiser.device),
        },
        "cases": cases,
        "ratios": {case["side"]: case["ratio"] for case in cases},
        "holds": all(case["holds"] for case in cases),
    }


def workload(denoiser: MaskedDenoiser, batch: int, seed: int) -> Workload:
    """``batch`` random prompts of 64-256 tokens, responses of two blocks of 32 at two tokens a step; all of it shorter
    where the model's canvas is short.

    Raises:
        UserError: the model's canvas is too short.
    """
    context = denoiser.spec.context_length
    if context < 24:
        raise UserError(f"context_length: the bench needs a canvas of 24 tokens, the model has {context}")
    block = 32 if context >= 128 else 8
    longest = min(256, context - 2 * block)
    stream = generator(seed, "bench decode", batch)
    never = {*denoiser.spec.forbidden_ids, *denoiser.spec.end_ids}
    words = torch.tensor([index for index in range(denoiser.spec.vocab_size) if index not in never])
    prompts = []
    for _ in range(batch):
        length = int(torch.randint(longest // 4, longest + 1, (1,), generator=stream))
        prompts.append(words[torch.randint(len(words), (length,), generator=stream)].tolist())
    return Workload(prompts=prompts, lengths=[2 * block] * batch, block_length=block, steps_per_block=block // 2)


def _network(
    shape: TransformerConfig, vocabulary: int, seed: int, device: torch.device, dtype: torch.dtype
) -> MaskedDenoiser:
    """Random weights whose layers do as much as those of width 4096 do at std 0.02: positions then differ."""
    sharpness = LOGIT_STD / (0.02 * shape.dim**0.5)  # features have length sqrt(dim)
    denoiser = random_network(vocabulary, seed, shape, device, dtype, sharpness)
    with torch.no_grad():
        for weight in denoiser.blocks.parameters():
            weight.mul_((4096 / shape.dim) ** 0.5 if weight.dim() > 1 else 1)
    return denoiser


def agreement(found: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    """Shares of equal tokens and of rows without a difference."""
    equal = [left == right for left, right in zip(found, want, strict=True)]
    return {
        "tokens": torch.cat(equal).float().mean().item(),
        "rows": sum(bool(row.all()) for row in equal) / len(equal),
    }


class _Counted:
    """While entered, counts evaluations of sequences, columns computed and columns under the head."""

    def __init__(self, denoiser: MaskedDenoiser) -> None:
        self.denoiser = denoiser
        self.forwards = self.columns = self.logits = 0

    def __enter__(self) -> _Counted:
        denoiser = self.denoiser
        features, window, head = denoiser.features, denoiser.window, denoiser.head

        def count(result: Tensor) -> Tensor:
            self.forwards += len(result)
            self.columns += result.shape[0] * result.shape[1]
            return result

        def headed(features: Tensor) -> Tensor:
            self.logits += features.numel() // features.shape[-1]
            return head(features)

        denoiser.features = lambda *args: count(features(*args))  # type: ignore[method-assign]
        denoiser.window = lambda *args: count(window(*args))  # type: ignore[method-assign]
        denoiser.head = headed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        for name in ("features", "window", "head"):
            delattr(self.denoiser, name)


def render(result: dict[str, Any]) -> Table:
    """The result of `run` as a table."""
    setting = result["setting"]
    title = f"decode: {setting['model']}, {setting['parameters'] / 1e6:.0f}M weights, {setting['vocabulary']:,} tokens"
    table = Table(title=f"{title}, on {setting['device']}, {setting['clock']}")
    sizes = ("forwards", "columns", "logits", "peak")
    for heading in ("side", "tokens/s", "ratio", "demand", *sizes, "as reference", "as twin"):
        table.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=True)
    table.add_column("verdict")
    for case in result["cases"]:
        twin = case["twin_agreement"]
        table.add_row(
            case["side"],
            f"{case['tokens_per_second']:.1f}",
            f"{case['ratio']:.2f}",
            "" if case["demand"] is None else f">= {case['demand']:g}",
            f"{case['forwards']:,}",
            f"{case['columns']:,}",
            f"{case['logits']:,}",
            f"{case['peak_bytes'] / 2**20:,.0f} MiB",
            f"{case['agreement']['tokens']:.0%}",
            "" if twin is None else f"{twin['tokens']:.0%}",
            "" if case["demand"] is None and not case["exact"] else "met" if case["holds"] else "missed",
        )
    return table

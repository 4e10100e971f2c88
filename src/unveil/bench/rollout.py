"""Decoding against the published loop, and scoring tokens against a full log-softmax.

The reference is LLaDA's decoding algorithm (arXiv 2502.09992, its Algorithm 5 with low-confidence remasking) as it is
run in practice: one prompt at a time, because that loop knows no padding mask; logits of the whole canvas; a softmax
over the whole vocabulary for the confidence; a top-k per row. Both sides use one network and the same prompts, with the
schedule `even` and temperature 0, so their outputs must be equal token by token, and every difference in time is the
loop's own. They take turns (A B A B ...), and ratios are formed turn by turn.

``network_ratio`` replays the network calls of both sides without any loop: what batching alone gains on this device. A
processor core that is busy with one sequence gains little from eight; a GPU that waits for launches gains almost eight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.learning.scoring import score_tokens
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.seeds import derive_seed, generator

DEMAND_SINGLE = 0.95
"""At batch 1: samples per second, ours over the reference, at least."""
DEMAND_MIXED = 3.0
"""At batch 8 and more, prompts and responses of mixed lengths: samples per second, ours over the reference, at
least."""
DEMAND_MEMORY = 0.25
"""Peak memory of scoring tokens, ours over the full log-softmax, at most."""

VOCABULARY = 126_464
"""LLaDA's, for the memory of scoring."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts and response lengths; every response is a whole number of blocks."""

    prompts: list[list[int]]
    lengths: list[int]
    block_length: int
    steps_per_block: int

    @classmethod
    def of(cls, denoiser: MaskedDenoiser, batch: int, seed: int) -> Workload:
        """``batch`` random prompts of 6-16 tokens, responses of 8, 12, 16, 20 and 24 tokens in blocks of 4, 2 steps
        each.

        Raises:
            UserError: the model's canvas is too short.
        """
        context = denoiser.spec.context_length
        if context < 72:
            raise UserError(f"context_length: the bench needs a canvas of 72 tokens, the model has {context}")
        forbidden = {*denoiser.spec.forbidden_ids, *denoiser.spec.end_ids}
        words = torch.tensor([index for index in range(denoiser.spec.vocab_size) if index not in forbidden])
        stream = generator(seed, "bench prompts", batch)
        prompts, lengths = [], []
        for row in range(batch):
            length = int(torch.randint(8, 25, (1,), generator=stream))
            drawn = torch.randint(len(words), (length,), generator=stream)
            prompts.append(words[drawn].tolist())
            lengths.append((32, 16, 48, 24, 40)[row % 5])
        return cls(prompts=prompts, lengths=lengths, block_length=8, steps_per_block=4)


def run(
    model: MaskedDenoiser | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 7,
    seed: int = 0,
    positions: int = 512,
) -> dict[str, Any]:
    """Measure decoding at every batch size, and the memory of scoring.

    Args:
        model: the network of both sides; a random one of 0.7 M parameters if None.
        batch_sizes: rows of one call of ours; the reference decodes them one after the other.
        repeats: pairs of turns.
        seed: of the random network and the prompts.
        positions: tokens that are scored for the memory ratio.

    Returns:
        Plain values for JSON: ``setting``, ``cases`` (one per batch size), ``log_prob_memory``, ``ratios`` by name, and
        ``holds``, whether every demand of this file is met.

    Raises:
        UserError: a number is below 1, or the model's canvas is too short.
    """
    for name, number in (
        ("repeats", repeats),
        ("positions", positions),
        *(("batch", size) for size in batch_sizes),
    ):
        if number < 1:
            raise UserError(f"{name}: should be at least 1, got {number}")
    denoiser = (random_network(seed) if model is None else model).eval()
    cases = [_decoding_case(denoiser, batch, repeats, seed) for batch in batch_sizes]
    memory = log_prob_memory(positions=positions, seed=seed, device=denoiser.device)
    ratios = {f"decode_batch_{case['batch']}": case["ratio"] for case in cases}
    return {
        "bench": "rollout",
        "setting": {
            "model": "random" if model is None else type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
            "device": str(denoiser.device),
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "seed": seed,
            "clock": "wall clock, synchronised" if denoiser.device.type == "cuda" else "CPU time of the process",
            "memory": _MEMORY[denoiser.device.type == "cuda"],
        },
        "cases": cases,
        "log_prob_memory": memory,
        "ratios": {**ratios, "log_prob_memory": memory["ratio"]},
        "holds": memory["holds"] and all(case["holds"] for case in cases),
    }


def render(result: dict[str, Any]) -> Table:
    """The result of `run` as a table, one row per ratio."""
    table = Table(title=f"rollout on {result['setting']['device']}, {result['setting']['parameters']:,} parameters")
    for heading in ("measure", "ours", "reference", "ratio (min-max)", "demand", "verdict"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for case in result["cases"]:
        ours, plain, batch = case["ours"], case["reference"], case["batch"]
        verdict = ("met" if case["holds"] else "missed") if case["identical"] else "outputs differ"
        ratio = f"{case['ratio']:.2f} ({case['ratio_min']:.2f}-{case['ratio_max']:.2f})"
        demand = "-" if case["demand"] is None else f">= {case['demand']:g}"
        speed = f"{ours['samples_per_second']:.1f}", f"{plain['samples_per_second']:.1f}"
        table.add_row(f"batch {batch}: samples/s", *speed, ratio, demand, verdict)
        table.add_row(f"batch {batch}: network alone", "", "", f"{case['network_ratio']:.2f}", "", "")
        table.add_row(f"batch {batch}: network calls", str(ours["calls"]), str(plain["calls"]), "", "", "")
        table.add_row(f"batch {batch}: sequences", str(ours["sequences"]), str(plain["sequences"]), "", "", "")
        peaks = _mebibytes(ours["peak_bytes"]), _mebibytes(plain["peak_bytes"])
        table.add_row(f"batch {batch}: peak memory", *peaks, "", "", "")
    memory = result["log_prob_memory"]
    peaks = _mebibytes(memory["peak_bytes"]), _mebibytes(memory["reference_peak_bytes"])
    label = f"scoring {memory['positions']} of {memory['vocabulary']:,}: peak memory"
    verdict = "met" if memory["holds"] else "missed"
    table.add_row(label, *peaks, f"{memory['ratio']:.2f}", f"<= {memory['demand']:g}", verdict)
    return table


def random_network(seed: int) -> TransformerDenoiser:
    """128 wide, 4 layers, a canvas of 128 tokens and 200 words, random weights."""
    tokenizer = TextTokenizer.of_words([f"w{index}" for index in range(200)])
    config = TransformerConfig(dim=128, layers=4, heads=4, hidden=256, context_length=128)
    denoiser = TransformerDenoiser(config, tokenizer)
    denoiser.initialise(generator(seed, "bench network"))
    with torch.no_grad():
        # Fresh weights answer almost uniformly; a wider head spreads the confidences as training does.
        denoiser.unembedding.weight.mul_(20)
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
    """The response (response_length,) of the published loop, one prompt at a time. ``steps`` counts all blocks."""
    mask_id, device = denoiser.spec.mask_id, denoiser.device
    canvas = torch.full((1, len(prompt) + response_length), mask_id, device=device)
    canvas[0, : len(prompt)] = torch.tensor(prompt, device=device)
    blocks = response_length // block_length
    for block in range(blocks):
        end = len(prompt) + (block + 1) * block_length
        base, extra = divmod(block_length, steps // blocks)
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


def our_decode(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
    """All responses of the workload in one call of `MaskedSampler`."""
    width = max(work.lengths)
    sampler = MaskedSampler(
        steps=width // work.block_length * work.steps_per_block,
        block_length=work.block_length,
        temperature=0.0,
    )
    canvas = Canvas.of(work.prompts, work.lengths, denoiser.spec)
    done = sampler.sample(denoiser, canvas, [derive_seed(row) for row in range(len(canvas))])
    return [row[:length] for row, length in zip(done.response_ids, work.lengths, strict=True)]


def plain_decodes(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
    """All responses of the workload by the published loop, one after the other."""
    return [
        plain_decode(
            denoiser,
            prompt,
            length,
            block_length=work.block_length,
            steps=length // work.block_length * work.steps_per_block,
        ).cpu()
        for prompt, length in zip(work.prompts, work.lengths, strict=True)
    ]


def log_prob_memory(
    *,
    positions: int = 512,
    width: int = 64,
    chunk_rows: int = 32,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Peak memory, forward and backward, of scoring ``positions`` tokens of a vocabulary of 126,464.

    Ours is `score_tokens` in chunks of ``chunk_rows``; the reference is head, float32, log_softmax, gather. The
    features,
    the head's weights and its gradient are counted on both sides.
    """
    head = _HeadOnly(width, generator(seed, "bench head")).to(device)
    stream = generator(seed, "bench features")
    features = torch.randn(positions, width, generator=stream).to(device).requires_grad_()
    tokens = torch.randint(VOCABULARY, (positions,), generator=stream).to(device)

    def clear() -> None:
        features.grad = head.weight.grad = None

    def ours() -> None:
        clear()
        score_tokens(head, features, tokens, chunk_rows=chunk_rows).sum().backward()

    def plain() -> None:
        clear()
        head.head(features).float().log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()

    fixed = [features.detach(), tokens, head.weight.detach()]
    peak, reference = (peak_bytes(call, features.device, fixed) for call in (ours, plain))
    clear()
    return {
        "positions": positions,
        "vocabulary": VOCABULARY,
        "width": width,
        "chunk_rows": chunk_rows,
        "peak_bytes": peak,
        "reference_peak_bytes": reference,
        "ratio": peak / reference,
        "demand": DEMAND_MEMORY,
        "holds": peak <= DEMAND_MEMORY * reference,
    }


_MEMORY = {
    False: "bytes of live tensors, read after every operator; buffers inside an operator are not seen",
    True: "torch.cuda.max_memory_allocated",
}


def peak_bytes(call: Callable[[], object], device: torch.device, fixed: Sequence[Tensor] = ()) -> int:
    """Peak memory of ``call``, in the sense of the result's ``setting.memory``; ``fixed`` tensors exist throughout."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with _LiveBytes(fixed) as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operators returned and that are still alive."""

    def __init__(self, fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._count(fixed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result

    def _count(self, tensors: Sequence[Tensor]) -> None:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self.storages[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))


class _HeadOnly(MaskedDenoiser):
    """A head over LLaDA's vocabulary without a network below it."""

    def __init__(self, width: int, stream: torch.Generator) -> None:
        super().__init__()
        self.spec = DenoiserSpec(
            vocab_size=VOCABULARY, mask_id=0, pad_id=1, end_ids=(2,), forbidden_ids=(0,), context_length=1
        )
        self.weight = nn.Parameter(torch.randn(VOCABULARY, width, generator=stream) * width**-0.5)

    def head(self, features: Tensor) -> Tensor:
        return features @ self.weight.T


class _Calls:
    """Keeps the inputs of every network call while it is entered."""

    def __init__(self, denoiser: MaskedDenoiser) -> None:
        self.denoiser = denoiser
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> _Calls:
        original = self.denoiser.features

        def kept(ids: Tensor, valid: Tensor) -> Tensor:
            self.inputs.append((ids.clone(), valid.clone()))
            return original(ids, valid)

        self.denoiser.features = kept  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self.denoiser.features

    @torch.no_grad()
    def replay(self) -> None:
        """The network calls alone, without the loop around them and without the head."""
        for ids, valid in self.inputs:
            self.denoiser.features(ids, valid)


def _decoding_case(denoiser: MaskedDenoiser, batch: int, repeats: int, seed: int) -> dict[str, Any]:
    work = Workload.of(denoiser, batch, seed)
    sides: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: our_decode(denoiser, work),
        "reference": lambda: plain_decodes(denoiser, work),
    }
    outputs, report, calls = {}, {}, {}
    for name, decode in sides.items():
        with _Calls(denoiser) as calls[name]:
            outputs[name] = decode()
        peak = peak_bytes(decode, denoiser.device, list(denoiser.state_dict().values()))
        inputs = calls[name].inputs
        report[name] = {"calls": len(inputs), "sequences": sum(len(ids) for ids, _ in inputs), "peak_bytes": peak}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    network: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, decode in sides.items():
            seconds[name].append(_seconds(decode, denoiser.device))
        for name in sides:
            network[name].append(_seconds(calls[name].replay, denoiser.device))
    for name in sides:
        report[name]["samples_per_second"] = batch / median(seconds[name])
    ratios, bounds = (
        [plain / ours for ours, plain in zip(times["ours"], times["reference"], strict=True)]
        for times in (seconds, network)
    )
    demand = DEMAND_SINGLE if batch == 1 else DEMAND_MIXED if batch >= 8 else None
    identical = all(map(torch.equal, outputs["ours"], outputs["reference"]))
    return {
        "batch": batch,
        "vocabulary": denoiser.spec.vocab_size,
        "prompt_lengths": [len(prompt) for prompt in work.prompts],
        "response_lengths": work.lengths,
        "block_length": work.block_length,
        "steps_per_block": work.steps_per_block,
        "identical": identical,
        **report,
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "network_ratio": median(bounds),
        "demand": demand,
        "holds": identical and (demand is None or median(ratios) >= demand),
    }


def _seconds(decode: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        decode()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    decode()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"

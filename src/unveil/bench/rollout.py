"""Decoding against the published loop, and scoring tokens against a full log-softmax.

The reference is LLaDA's decoding loop as it is run in practice: one prompt at a time, because that loop knows no
padding mask; logits of the whole canvas; a softmax over the whole vocabulary; a top-k per row. Both sides use one
network and the same prompts, with the schedule `even` and temperature 0, so their outputs must be equal token by
token. They take turns (A B A B ...), and ratios are formed turn by turn.

``network_ratio`` replays the network calls of both sides without any loop or head: what batching alone gains on this
device. A core that is busy with one sequence gains little from eight, and padding to a common width costs some of
that; a GPU that waits for launches gains almost eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unveil.bench import _clock as clock
from unveil.bench import _memory as memory
from unveil.bench._reference import Workload, plain_decode, random_network
from unveil.denoisers.base import MaskedDenoiser
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler

DEMAND_SINGLE = 0.95
"""At batch 1: samples per second, ours over the reference, at least."""
DEMAND_MIXED = 3.0
"""From batch 8 on, with mixed lengths: samples per second, ours over the reference, at least."""
VOCABULARIES = (204, 32_768)
"""Of the random networks: a word tokenizer's, as in the embedded models, and a sub-word tokenizer's."""


def run(
    model: MaskedDenoiser | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 7,
    seed: int = 0,
    positions: int = 512,
) -> dict[str, Any]:
    """Measure decoding at every batch size, and the memory of scoring.

    Args:
        model: the network of both sides; two random ones (of `VOCABULARIES`) if None.
        batch_sizes: rows of one call of ours; the reference decodes them one after the other.
        repeats: pairs of turns.
        seed: of the random networks and the prompts.
        positions: tokens that are scored for the memory ratio.

    Returns:
        Plain values for JSON: ``setting``, ``cases`` (one per network and batch size), ``log_prob_memory``,
        ``ratios`` by name, and ``holds``, whether every demand of these files is met.

    Raises:
        UserError: a number is below 1, or the model's canvas is too short.
    """
    numbers = [("repeats", repeats), ("positions", positions), *(("batch", size) for size in batch_sizes)]
    for name, number in numbers:
        if number < 1:
            raise UserError(f"{name}: should be at least 1, got {number}")
    device = torch.device("cpu") if model is None else model.device
    cases = []
    for denoiser in (random_network(size, seed) for size in VOCABULARIES) if model is None else [model]:
        denoiser.eval()
        cases += [_decoding_case(denoiser, batch, repeats, seed) for batch in batch_sizes]
    scoring = memory.log_prob_memory(positions=positions, seed=seed, device=device)
    ratios = {f"decode_vocabulary_{case['vocabulary']}_batch_{case['batch']}": case["ratio"] for case in cases}
    return {
        "bench": "rollout",
        "setting": {
            "model": "random" if model is None else type(model).__name__,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "seed": seed,
            "clock": clock.name(device),
            "memory": memory.method(device),
        },
        "cases": cases,
        "log_prob_memory": scoring,
        "ratios": {**ratios, "log_prob_memory": scoring["ratio"]},
        "holds": scoring["holds"] and all(case["holds"] for case in cases),
    }


def render(result: dict[str, Any]) -> Table:
    """The result of `run` as a table."""
    table = Table(title=f"rollout on {result['setting']['device']}, {result['setting']['clock']}")
    for heading in ("measure", "ours", "reference", "ratio (min-max)", "demand", "verdict"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    for case in result["cases"]:
        ours, plain = case["ours"], case["reference"]
        ratio = f"{case['ratio']:.2f} ({case['ratio_min']:.2f}-{case['ratio_max']:.2f})"
        demand = "" if case["demand"] is None else f">= {case['demand']:g}"
        verdict = _verdict(case["holds"]) if case["identical"] else "outputs differ"
        speed = f"{ours['samples_per_second']:.1f}", f"{plain['samples_per_second']:.1f}"
        label = f"{case['vocabulary']:,} tokens, batch {case['batch']}: samples/s"
        table.add_row(label, *speed, ratio, demand, verdict)
        table.add_row("  network alone", "", "", f"{case['network_ratio']:.2f}")
        table.add_row("  network calls", str(ours["calls"]), str(plain["calls"]))
        table.add_row("  sequences", str(ours["sequences"]), str(plain["sequences"]))
        table.add_row("  peak memory", _mebibytes(ours["peak_bytes"]), _mebibytes(plain["peak_bytes"]))
    scoring = result["log_prob_memory"]
    peaks = _mebibytes(scoring["peak_bytes"]), _mebibytes(scoring["reference_peak_bytes"])
    label = f"scoring {scoring['positions']} of {scoring['vocabulary']:,}: peak memory"
    demand = f"<= {scoring['demand']:g}"
    table.add_row(label, *peaks, f"{scoring['ratio']:.2f}", demand, _verdict(scoring["holds"]))
    return table


def our_decode(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
    """All responses of the workload in one call of `MaskedSampler`."""
    steps = max(work.lengths) // work.block_length * work.steps_per_block
    sampler = MaskedSampler(steps=steps, block_length=work.block_length)
    canvas = Canvas.of(work.prompts, work.lengths, denoiser.spec)
    done = sampler.sample(denoiser, canvas, [0] * len(canvas))
    return [row[:length] for row, length in zip(done.response_ids, work.lengths, strict=True)]


def plain_decodes(denoiser: MaskedDenoiser, work: Workload) -> list[Tensor]:
    """All responses of the workload by the published loop, one after the other."""
    responses = []
    for prompt, length in zip(work.prompts, work.lengths, strict=True):
        steps = length // work.block_length * work.steps_per_block
        done = plain_decode(denoiser, prompt, length, block_length=work.block_length, steps=steps)
        responses.append(done.cpu())
    return responses


class _Calls:
    """Keeps the inputs of every network call while it is entered."""

    def __init__(self, denoiser: MaskedDenoiser) -> None:
        self.denoiser = denoiser
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> _Calls:
        original = self.denoiser.features

        def kept(ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
            self.inputs.append((ids.clone(), valid.clone()))
            return original(ids, valid, t)

        self.denoiser.features = kept  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self.denoiser.features

    @torch.no_grad()
    def replay(self) -> None:
        for ids, valid in self.inputs:
            self.denoiser.features(ids, valid)


def _decoding_case(denoiser: MaskedDenoiser, batch: int, repeats: int, seed: int) -> dict[str, Any]:
    work = Workload.of(denoiser, batch, seed)
    sides: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: our_decode(denoiser, work),
        "reference": lambda: plain_decodes(denoiser, work),
    }
    outputs: dict[str, list[Tensor]] = {}
    report: dict[str, dict[str, float]] = {}
    calls = {name: _Calls(denoiser) for name in sides}
    for name, decode in sides.items():
        with calls[name] as kept:
            outputs[name] = decode()
        peak = memory.peak_bytes(decode, denoiser.device, list(denoiser.state_dict().values()))
        sequences = sum(len(ids) for ids, _ in kept.inputs)
        report[name] = {"calls": len(kept.inputs), "sequences": sequences, "peak_bytes": peak}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    network: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, decode in sides.items():
            seconds[name].append(clock.timed(decode, denoiser.device)[0])
        for name in sides:
            network[name].append(clock.timed(calls[name].replay, denoiser.device)[0])
    for name in sides:
        report[name]["samples_per_second"] = batch / median(seconds[name])
    ratios, alone = (
        [plain / ours for ours, plain in zip(times["ours"], times["reference"], strict=True)]
        for times in (seconds, network)
    )
    demand = DEMAND_SINGLE if batch == 1 else DEMAND_MIXED if batch >= 8 else None
    identical = all(map(torch.equal, outputs["ours"], outputs["reference"]))
    return {
        "vocabulary": denoiser.spec.vocab_size,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "batch": batch,
        "prompt_lengths": [len(prompt) for prompt in work.prompts],
        "response_lengths": work.lengths,
        "block_length": work.block_length,
        "steps_per_block": work.steps_per_block,
        "identical": identical,
        **report,
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "network_ratio": median(alone),
        "demand": demand,
        "holds": identical and (demand is None or median(ratios) >= demand),
    }


def _verdict(holds: bool) -> str:
    return "met" if holds else "missed"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"

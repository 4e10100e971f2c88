"""`unveil diagnose`: whether a sampler of a masked diffusion model is biased by the precision of its noise."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from unveil.cli.output import console, table
from unveil.registry import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from unveil.processes.gumbel import Draw, Method

SUMMARY = "tell whether a masked-diffusion sampler is biased by the precision of its random numbers"
METHODS: dict[Method, str] = {
    "one-draw": "mask and tokens in one competition (ancestral)",
    "position-first": "which positions move, then their tokens (split ancestral, first-hitting)",
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
_EXPECTED, _FEWEST = 30, 20
"""Unmasked positions that a trial should see, and the fewest that can tell anything."""
_TRIAL = {"vocabulary": 256, "steps": 195_313}
"""Each token then has probability 2e-8, a third of the grain of float32 noise: Gumbel-max loses 5 of 6 unmaskings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="take the token distributions of this model")
    parser.add_argument("--prompt", metavar="TEXT", help="what the model sees before an all-masked response")
    parser.add_argument("--length", type=int, metavar="N", help="response positions of the model (default: as trained)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of its tokens (default: 1)")
    parser.add_argument("--vocab", type=int, metavar="V", help="without a model: how many tokens (default: 50257)")
    parser.add_argument(
        "--tokens", choices=("zipf", "uniform"), help="without a model: their distribution (default: zipf)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="ancestral steps (default: 10000)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="of the noise; with --sampler of the probabilities that it gets (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=tuple(METHODS), default="one-draw", help="how your sampler draws (default: one-draw)"
    )
    parser.add_argument(
        "--sampler", metavar="NAME",
        help="try a sampler: package.module:function of probabilities (N, K) to classes (N,); or gumbel, or unveil",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, metavar="N", help=f"draws of a trial (default: {_EXPECTED} unmaskings)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of a trial (default: 0)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.cli.models import set_threads

    for option in ("vocab", "steps", "draws"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: should be at least 1, got {value}")
    set_threads()
    if args.sampler is not None:
        return _try(args)
    if args.draws is not None:
        raise UserError("--draws: only for a trial, with --sampler")
    tokens = _model_tokens(args) if args.model else _tokens(args, 50257, "zipf")[None]
    steps = args.steps or 10_000
    lines = [_line(method, dtype, tokens, steps) for method in METHODS for dtype in DTYPES]
    chosen = next(line for line in lines if (line["method"], line["dtype"]) == (args.method, args.dtype))
    people = console(args)
    people.print(
        f"{steps:,} steps, {tokens.shape[1]:,} tokens, {len(tokens)} masked position(s): the first step should unmask "
        f"each with probability {1 / steps:.3g}, by a token of {lines[0]['entropy_exact']:.3f} nats"
    )
    people.print(_table(lines, chosen))
    for method, meaning in METHODS.items():
        people.print(f"{method}: {meaning}")
    immune = ", ".join(f"{line['method']} {line['dtype']}" for line in lines if not line["biased"])
    people.print(f"immune: {immune or 'none'} (this package: position-first float64)")
    people.print(f"{args.method} {args.dtype}: {'BIASED' if chosen['biased'] else 'fine'}")
    return int(chosen["biased"]), {
        "biased": chosen["biased"], "steps": steps, "vocabulary": tokens.shape[1], "positions": len(tokens),
        "chosen": chosen, "samplers": lines,
    }  # fmt: skip


def _tokens(args: argparse.Namespace, vocabulary: int, kind: str) -> Tensor:
    import torch

    from unveil.processes.gumbel import zipf

    size = args.vocab or vocabulary
    shape = args.tokens or kind
    return zipf(size) if shape == "zipf" else torch.full((size,), 1 / size, dtype=torch.float64)


def _model_tokens(args: argparse.Namespace) -> Tensor:
    """(P, V) what the model says of every position of an all-masked response."""
    import torch

    from unveil.cli.models import open_model, trained_length
    from unveil.samplers.canvas import Canvas

    for option in ("vocab", "tokens"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option}: the tokens come from MODEL; leave one of them out")
    if not args.temperature > 0:
        raise UserError(f"--temperature: should be above 0, got {args.temperature:g}")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length: should be at least 1, got {args.length}")
    denoiser = open_model(args.model)
    prompt = denoiser.encode_prompt(args.prompt or "")
    length = args.length or trained_length(args.model) or max(1, denoiser.spec.context_length - len(prompt))
    canvas = Canvas.of([prompt], length, denoiser.spec).to(denoiser.device)
    if denoiser.spec.time_conditioned:
        raise UserError(f"{args.model}: a time-conditioned network (allowed: one that reads no time)")
    with torch.no_grad():
        features = denoiser.features(canvas.ids, canvas.valid)[0, canvas.prompt_width :]
        logits = denoiser.head(features).double().cpu()
    return (logits / args.temperature).softmax(-1)


def _line(method: Method, dtype: str, tokens: Tensor, steps: int) -> dict[str, Any]:
    """One way of drawing, averaged over the positions."""
    from unveil.processes.gumbel import bias

    each = [bias(method, row, 1 / steps, dtype) for row in tokens]
    unmask = [position.unmask for position in each]
    mean = {
        name: math.fsum(getattr(position, name) for position in each) / len(each)
        for name in ("unmask", "unmask_exact", "entropy", "entropy_exact", "distance")
    }
    # A position without choice says nothing about temperature.
    total = math.fsum(position.entropy_exact for position in each)
    mean["temperature"] = math.fsum(position.temperature * position.entropy_exact for position in each) / (total or 1)
    return {
        "method": method, "dtype": dtype, **mean, "unmask_lowest": min(unmask), "unmask_highest": max(unmask),
        "biased": any(position.biased for position in each),
    }  # fmt: skip


def _table(lines: list[dict[str, Any]], chosen: dict[str, Any]) -> Any:
    several = any(line["unmask_lowest"] < 0.999 * line["unmask_highest"] for line in lines)
    spread = ["lowest", "highest"] if several else []
    columns = ["sampler", "noise", "unmasks", *spread, "entropy", "T", "tokens off", "verdict"]
    rows = []
    for line in lines:
        numbers = ["unmask", "unmask_lowest", "unmask_highest"] if several else ["unmask"]
        rows.append([
            line["method"], line["dtype"], *(f"{line[name]:.3g}" for name in numbers),
            f"{line['entropy']:.3f}", f"{line['temperature']:.3f}", f"{100 * line['distance']:.2f} %",
            ("biased" if line["biased"] else "fine") + (" <" if line is chosen else ""),
        ])  # fmt: skip
    return table(columns, rows, numbers=columns[2:-1])


def _try(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Let a sampler draw and test what it drew."""
    import torch

    from unveil.processes.gumbel import trial

    if args.model:
        raise UserError("--sampler: a trial takes no MODEL; leave one of them out")
    tokens = _tokens(args, _TRIAL["vocabulary"], "uniform")
    steps = args.steps or _TRIAL["steps"]
    draws = args.draws or math.ceil(_EXPECTED * steps)
    if draws < _FEWEST * steps:
        raise UserError(f"--draws: {draws} are too few to tell anything (allowed: {_FEWEST * steps} or more)")
    torch.manual_seed(args.seed)  # a sampler of its own may draw from the global generator
    draw = _sampler(args)
    try:
        found = trial(draw, tokens, 1 / steps, draws, getattr(torch, args.dtype))
    except Exception as error:  # whatever a user's function raises
        if args.sampler in ("gumbel", "unveil"):
            raise
        raise UserError(f"--sampler: {args.sampler!r} failed: {type(error).__name__}: {error}") from error
    people = console(args)
    people.print(
        f"{found.draws:,} draws: {found.unmasked} unmasked, {found.expected:.1f} expected; {found.rare} of these in "
        f"the rarer half of the tokens, {found.expected_rare:.1f} expected; p = {found.p_value:.2g}"
    )
    people.print(f"{args.sampler}: {'BIASED' if found.biased else 'no bias found'}")
    return int(found.biased), {
        "biased": found.biased, "sampler": args.sampler, "steps": steps, "vocabulary": len(tokens),
        **dataclasses.asdict(found),
    }  # fmt: skip


def _sampler(args: argparse.Namespace) -> Draw:
    import importlib

    import torch

    from unveil.processes.gumbel import gumbel_max
    from unveil.processes.masked import sample_categorical
    from unveil.seeds import generator

    stream = generator(args.seed, "diagnose")
    if args.sampler == "gumbel":
        return gumbel_max(args.dtype, stream)
    if args.sampler == "unveil":

        def own(probs: Tensor) -> Tensor:
            noise = torch.rand(len(probs), dtype=torch.float64, generator=stream)
            return sample_categorical(probs.double().log(), noise)

        return own
    module, colon, function = args.sampler.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--sampler: {args.sampler!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"--sampler: {args.sampler!r} (allowed: gumbel, unveil, package.module:function)")
    return found

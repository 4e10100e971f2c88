"""`unveil eval` on tasks of texts: lengths x steps x blocks x rules, and the file of completions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.cli.completion_file import CompletionFile
from unveil.cli.eval_grid import Cell, grid
from unveil.cli.eval_numbers import report as table_of
from unveil.cli.eval_numbers import shares, speed
from unveil.cli.models import open_model, trained_length
from unveil.cli.output import interval
from unveil.cli.progress import Progress
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.load import fingerprint
from unveil.recipe import dump
from unveil.registry import UserError
from unveil.samplers.text import encode_prompts
from unveil.seeds import derive_seed
from unveil.tasks.base import Problem, Task
from unveil.tasks.completions import Batch, Completion, complete

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ALONG = ("decoder", "length", "block", "temperature")
"""What one line of the picture has in common; along it the steps change."""


@dataclass(kw_only=True)
class Measured:
    """What one decoder did: all completions, and the seconds of those that this call made."""

    completions: list[Completion]
    decoded: int = 0
    tokens: int = 0
    decoding: float = 0.0
    judging: float = 0.0

    def add(self, batch: Batch) -> None:
        self.completions += batch.completions
        self.decoded += len(batch.completions)
        self.tokens += sum(one.tokens for one in batch.completions)
        self.decoding += batch.decoding
        self.judging += batch.judging


def measured(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    """The results of all decoders."""
    args.blocks, args.temperature = args.blocks or [None], args.temperature or [0.0]
    denoiser = open_model(args.model, dtype=args.dtype, chat=args.chat)
    trained = None if args.lengths else trained_length(args.model)
    if not args.lengths and trained is None:
        raise UserError("--lengths: required, for the model comes without a recipe that tells its response length")
    cells = grid(args, args.lengths or [trained])
    problems = task.problems(args.split, args.problems, args.seed)
    longest = max(map(len, encode_prompts(denoiser, [problem.prompt for problem in problems])))
    room = denoiser.spec.context_length
    if too_long := sorted({cell.length for cell in cells if longest + cell.length > room}):
        raise UserError(
            f"--lengths: {too_long[0]} and prompts of up to {longest} tokens do not fit the model's canvas "
            f"(at most {room} tokens)"
        )
    file = None if args.out is None else _open(args, task, problems, cells)
    found = [Measured(completions=[] if file is None else file.done[place]) for place in range(len(cells))]
    chains = len(problems) * args.samples
    with Progress("completion", len(cells) * chains) as bar:
        for place, cell in enumerate(cells):
            label = " ".join(f"{key} {value}" for key, value in cell.settings().items() if value is not None)
            for batch in _batches(args, denoiser, task, problems, cell, len(found[place].completions)):
                found[place].add(batch)
                if file is not None:
                    file.append(place, batch.completions)
                bar.show(place * chains + len(found[place].completions), label)
    return [_summary(args, cell, own) for cell, own in zip(cells, found, strict=True)]


def finish(args: argparse.Namespace, answer: dict[str, Any], out: Console) -> None:
    """The file of completions is whole already."""


def _open(args: argparse.Namespace, task: Task, problems: Sequence[Problem], cells: Sequence[Cell]) -> CompletionFile:
    settings = {
        "model": args.model, "weights": fingerprint(args.model), "dtype": args.dtype, "chat": args.chat,
        "task": dump(task) | {"name": args.task},
        "split": args.split, "seed": args.seed, "problems": len(problems),
        "prompts": derive_seed(*((problem.id, problem.prompt, problem.answer) for problem in problems)),
        "samples": args.samples, "batch": args.batch, "final_only": args.final_only,
        "schedule": args.schedule, "transform": args.transform, "cache": args.cache,
        "decoders": [cell.settings() for cell in cells],
    }  # fmt: skip
    expected = [(problem.id, sample) for problem in problems for sample in range(args.samples)]
    plan = [(cell.settings(), expected) for cell in cells]
    return CompletionFile(Path(args.out), settings, plan, args.batch, resume=args.resume)


def _batches(
    args: argparse.Namespace,
    denoiser: MaskedDenoiser,
    task: Task,
    problems: Sequence[Problem],
    cell: Cell,
    done: int,
) -> Iterator[Batch]:
    return complete(
        denoiser, task, problems, cell.sampler, response_length=cell.length, samples=args.samples, seed=args.seed,
        batch_size=args.batch, start=done, guesses=not args.final_only,
    )  # fmt: skip


def _summary(args: argparse.Namespace, cell: Cell, measured: Measured) -> dict[str, Any]:
    """Numbers of one decoder, from its completions alone; speeds are of those that this call made."""
    made, n = measured.completions, args.samples
    lost = {} if args.final_only else {"over": [float(one.over_denoised or 0) for one in made]}
    said, more = shares(args, [one.correct for one in made], lost)
    over = more.get("over")
    groups = [made[start : start + n] for start in range(0, len(made), n)]
    if n > 1 and all(len({one.completion for one in group}) == 1 for group in groups):
        print("unveil: warning: all samples of a problem are equal: this decoder draws nothing", file=sys.stderr)
    seconds = measured.decoding + measured.judging
    return {
        **cell.settings(),
        **said,
        "over_denoising": over.mean if over else None,
        "over_denoising_low": over.low if over else None,
        "over_denoising_high": over.high if over else None,
        "ever_correct": said["accuracy"] + over.mean if over else None,
        "score": _mean([one.score for one in made]),
        "sample_entropy": _mean([one.entropy for one in made]),
        "steps_per_chain": _mean([one.chain_steps for one in made]),
        "forwards": round(sum(one.forwards for one in made)),
        "forwards_per_completion": _mean([one.forwards for one in made]),
        "tokens_per_completion": _mean([one.tokens for one in made]),
        "unfinished": _mean([one.unfinished for one in made]),
        "problems": len(groups), "samples": n,
        "decoded": measured.decoded,
        "seconds": round(seconds, 3),
        "samples_per_second": round(measured.decoded / seconds, 2) if seconds else None,
        "tokens_per_second": round(measured.tokens / measured.decoding, 2) if measured.decoding else None,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> Table:
    """The table of all decoders."""
    settings = {
        "length": [str(line["length"]) for line in results],
        "steps": [str(line["steps"] or "-") for line in results],
        "block": [str(line["block"] or "full") for line in results],
        "T": [f"{line['temperature']:g}" for line in results],
    }
    numbers: dict[str, list[str]] = {}
    if not args.final_only:
        keys = ("over_denoising", "over_denoising_low", "over_denoising_high")
        numbers["over denoised %"] = [interval(*(line[key] for key in keys)) for line in results]
        numbers["ever correct %"] = [f"{100 * line['ever_correct']:.1f}" for line in results]
    numbers["forwards"] = [f"{line['forwards_per_completion']:.1f}" for line in results]
    numbers["tokens"] = [f"{line['tokens_per_completion']:.1f}" for line in results]
    numbers["tokens per s"] = [speed(line["tokens_per_second"]) for line in results]
    return table_of(args, results, settings, numbers)

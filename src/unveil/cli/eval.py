"""`unveil eval`: accuracy of a model over a grid of lengths, steps, blocks and rules."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unveil.cli.models import add_model_options
from unveil.cli.output import console, interval, table
from unveil.registry import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from unveil.cli.completion_file import CompletionFile
    from unveil.cli.eval_grid import Cell
    from unveil.denoisers.base import MaskedDenoiser
    from unveil.tasks.base import Problem, Task
    from unveil.tasks.completions import Batch, Completion

T = TypeVar("T")

SUMMARY = "measure a model on a task's held-out problems, over lengths x steps x blocks x rules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, run folder, embedded model, or owner/name on the hub"
    )
    add_model_options(parser)
    parser.add_argument("words", nargs="*", metavar="task.key=value", help="settings of the task")
    parser.add_argument("--task", required=True, metavar="NAME", help="task: countdown, sudoku ...")
    parser.add_argument(
        "--lengths", type=_list_of(int), metavar="N,...",
        help="response lengths (default: what the model was trained with, where its recipe is at hand)",
    )  # fmt: skip
    parser.add_argument("--steps", type=_list_of(int), metavar="N,...", help="denoising steps (default: the length)")
    parser.add_argument(
        "--blocks", type=_list_of(_block), default=[None], metavar="N,...", help="block lengths; none: full"
    )
    parser.add_argument(
        "--rules",
        action="append",
        metavar="RULE;...",
        help="rules NAME[:field=value,...], or reverse; may be repeated (default: lcr)",
    )
    parser.add_argument("--schedule", metavar="NAME[:field=value,...]", help="tokens per step (default: even)")
    parser.add_argument("--transform", metavar="NAME[:field=value,...]", help="of scores before the rule: eoser")
    parser.add_argument("--cache", metavar="NAME[:field=value,...]", help="keys and values that steps take over")
    parser.add_argument("--temperature", type=_list_of(float), default=[0.0], metavar="T,...", help="default: 0")
    parser.add_argument("--problems", type=int, default=512, metavar="N", help="how many (default: 512)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per problem (default: 1)")
    parser.add_argument(
        "--k", type=_list_of(int), default=[1], metavar="K,...", help="pass@k, at most --samples (default: 1)"
    )
    parser.add_argument(
        "--final-only", action="store_true", help="judge finished responses alone: no rate of over-denoising"
    )
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which problems (default: test)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of problems and sampling (default: 0)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="chains at a time (default: 128)")
    parser.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap over problems (default: 10000)"
    )
    parser.add_argument("--out", metavar="FILE", help="write every completion to this new file (.jsonl)")
    parser.add_argument("--resume", action="store_true", help="go on with --out where a run with these options stopped")
    parser.add_argument("--plot", metavar="FILE", help="accuracy against forwards (.png), numbers beside it (.csv)")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} should be numbers with commas between them") from error

    return read


def _block(text: str) -> int | None:
    return None if text == "none" else int(text)


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


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.cli.eval_grid import grid
    from unveil.cli.models import open_model, trained_length
    from unveil.cli.progress import Progress
    from unveil.samplers.text import encode_prompts

    task = build_task(args.task, args.words)
    _check(args)
    if task.medium != "text":
        raise UserError(f"--task: {args.task} is a task of {task.medium}s (allowed: tasks of text)")
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
    measured = [Measured(completions=[] if file is None else file.done[place]) for place in range(len(cells))]
    chains = len(problems) * args.samples
    try:
        with Progress("completion", len(cells) * chains) as bar:
            for place, cell in enumerate(cells):
                label = " ".join(f"{key} {value}" for key, value in cell.settings().items() if value is not None)
                for batch in _batches(args, denoiser, task, problems, cell, len(measured[place].completions)):
                    measured[place].add(batch)
                    if file is not None:
                        file.append(place, batch.completions)
                    bar.show(place * chains + len(measured[place].completions), label)
    except KeyboardInterrupt:
        if file is None:
            raise
        print(f"unveil: interrupted; the same command with --resume goes on with {args.out}", file=sys.stderr)
        return 130, {"status": "interrupted", "out": args.out}
    results = [_summary(args, cell, own) for cell, own in zip(cells, measured, strict=True)]
    out = console(args)
    out.print(_report(args, results))
    out.print(f"95 % bootstrap intervals over problems ({args.resamples:,} resamples, seed {args.seed})")
    if args.plot is not None:
        from unveil.report.accuracy import draw, write_numbers

        numbers = Path(args.plot).with_suffix(".csv")
        draw(results, Path(args.plot), title=f"{args.model} on {args.task}")
        write_numbers(results, numbers)
        out.print(f"plot: {args.plot}, numbers: {numbers}")
    return 0, {
        "model": args.model,
        "task": args.task,
        "split": args.split,
        "seed": args.seed,
        "bootstrap": {"resamples": args.resamples, "seed": args.seed},
        "results": results,
        "out": args.out,
        "plot": args.plot,
    }


def build_task(name: str, settings: Sequence[str], option: str = "--task") -> Task:
    """The task ``name`` with the settings ``task.key=value``.

    Raises:
        UserError: a setting is wrong.
    """
    from unveil.overrides import merge
    from unveil.recipe import build
    from unveil.tasks.base import Task

    for word in settings:
        if not word.startswith("task."):
            raise UserError(f"{word!r} should look like task.key=value")
    data = merge({"task": {"name": name}}, settings)["task"]
    try:
        return build(Task, data, "task")
    except UserError as error:
        raise UserError(str(error).replace("task.name: ", f"{option}: ", 1)) from error


def _check(args: argparse.Namespace) -> None:
    for option in ("problems", "samples", "batch", "resamples"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option}: should be at least 1, got {getattr(args, option)}")
    for k in args.k:
        if not 1 <= k <= args.samples:
            raise UserError(f"--k: should be 1 to {args.samples} (--samples), got {k}")
    if args.resume and args.out is None:
        raise UserError("--resume: goes on with a file of completions; name it with --out")
    if args.out is not None:
        path = Path(args.out).absolute()
        if path.exists() and not args.resume:
            raise UserError(f"--out: {args.out!r} exists; --resume goes on with it")
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"--out: {args.out!r} should be a file in a folder that exists")
    if args.plot is not None:
        from unveil.report.accuracy import check_target

        check_target(Path(args.plot))


def _open(args: argparse.Namespace, task: Task, problems: Sequence[Problem], cells: Sequence[Cell]) -> CompletionFile:
    from unveil.cli.completion_file import CompletionFile
    from unveil.denoisers.load import fingerprint
    from unveil.recipe import dump
    from unveil.seeds import derive_seed

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
    from unveil.tasks.completions import complete

    return complete(
        denoiser, task, problems, cell.sampler, response_length=cell.length, samples=args.samples, seed=args.seed,
        batch_size=args.batch, start=done, guesses=not args.final_only,
    )  # fmt: skip


def _summary(args: argparse.Namespace, cell: Cell, measured: Measured) -> dict[str, Any]:
    """Numbers of one decoder, from its completions alone; speeds are of those that this call made."""
    from unveil.tasks.statistics import bootstrap, pass_at_k

    made, n = measured.completions, args.samples
    groups = [made[start : start + n] for start in range(0, len(made), n)]
    right = [sum(one.correct for one in group) for group in groups]
    lost = [] if args.final_only else [[sum(one.over_denoised or 0 for one in group) / n for group in groups]]
    passed = [[pass_at_k(n, count, k) for count in right] for k in args.k]
    accuracy, *rest = bootstrap(
        [[count / n for count in right], *passed, *lost], resamples=args.resamples, seed=args.seed
    )
    passes, over = rest[: len(passed)], rest[len(passed) :]
    if n > 1 and all(len({one.completion for one in group}) == 1 for group in groups):
        print("unveil: warning: all samples of a problem are equal: this decoder draws nothing", file=sys.stderr)
    seconds = measured.decoding + measured.judging
    return {
        **cell.settings(),
        "accuracy": accuracy.mean, "low": accuracy.low, "high": accuracy.high,
        "pass_at_k": [
            {"k": k, "value": one.mean, "low": one.low, "high": one.high}
            for k, one in zip(args.k, passes, strict=True)
        ],
        "over_denoising": over[0].mean if over else None,
        "over_denoising_low": over[0].low if over else None,
        "over_denoising_high": over[0].high if over else None,
        "ever_correct": accuracy.mean + over[0].mean if over else None,
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


def _report(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> Table:
    """Shares in percent. The title tells the settings that all decoders have in common."""
    settings: dict[str, list[str]] = {
        "length": [str(line["length"]) for line in results],
        "steps": [str(line["steps"] or "-") for line in results],
        "block": [str(line["block"] or "full") for line in results],
        "T": [f"{line['temperature']:g}" for line in results],
    }
    shared = [f"{name} {values[0]}" for name, values in settings.items() if len(set(values)) == 1]
    columns = {"decoder": [line["decoder"] for line in results]}
    columns |= {name: values for name, values in settings.items() if len(set(values)) > 1}
    columns["accuracy %"] = [interval(*(line[key] for key in ("accuracy", "low", "high"))) for line in results]
    for place, k in enumerate(args.k):
        if k > 1:
            found = [line["pass_at_k"][place] for line in results]
            columns[f"pass@{k} %"] = [interval(one["value"], one["low"], one["high"]) for one in found]
    if not args.final_only:
        keys = ("over_denoising", "over_denoising_low", "over_denoising_high")
        columns["over denoised %"] = [interval(*(line[key] for key in keys)) for line in results]
        columns["ever correct %"] = [f"{100 * line['ever_correct']:.1f}" for line in results]
    columns["forwards"] = [f"{line['forwards_per_completion']:.1f}" for line in results]
    columns["tokens"] = [f"{line['tokens_per_completion']:.1f}" for line in results]
    columns["tokens per s"] = [_speed(line["tokens_per_second"]) for line in results]
    made = table(tuple(columns), list(zip(*columns.values(), strict=True)), numbers=tuple(columns)[1:])
    count = f"{results[0]['problems']} problems" + (f" x {args.samples} samples" if args.samples > 1 else "")
    made.title = ", ".join([count, *shared])
    return made


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

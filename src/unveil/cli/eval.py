"""`unveil eval`: accuracy of a model over a grid of lengths, steps, blocks and rules."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unveil.cli.models import add_model_options
from unveil.cli.output import console, interval, table
from unveil.registry import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from unveil.denoisers.base import MaskedDenoiser
    from unveil.samplers.base import Sampler
    from unveil.tasks.base import Problem, Task
    from unveil.tasks.evaluate import Evaluation

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
    parser.add_argument("--temperature", type=_list_of(float), default=[0.0], metavar="T,...", help="default: 0")
    parser.add_argument("--problems", type=int, default=512, metavar="N", help="how many (default: 512)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which problems (default: test)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of problems and sampling (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write every completion to this new file (.jsonl)")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} should be numbers with commas between them") from error

    return read


def _block(text: str) -> int | None:
    return None if text == "none" else int(text)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One decoder of the grid."""

    rule: str
    length: int
    block: int | None
    temperature: float
    sampler: Sampler

    def settings(self) -> dict[str, Any]:
        """What tells this decoder from the others; no steps for rules that set their own pace."""
        return {
            "decoder": self.rule,
            "length": self.length,
            "steps": self.sampler.planned_steps,
            "block": self.block,
            "temperature": self.temperature,
        }


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.cli.models import open_model, trained_length
    from unveil.cli.progress import Progress
    from unveil.samplers.text import encode_prompts

    task = _task(args)
    if args.problems < 1:
        raise UserError(f"--problems: should be at least 1, got {args.problems}")
    if args.out is not None and (Path(args.out).exists() or not Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"--out: {args.out!r} should be a new file in a folder that exists")
    denoiser = open_model(args.model, dtype=args.dtype, chat=args.chat)
    trained = None if args.lengths else trained_length(args.model)
    if not args.lengths and trained is None:
        raise UserError("--lengths: required, for the model comes without a recipe that tells its response length")
    cells = _grid(args, args.lengths or [trained])
    problems = task.problems(args.split, args.problems, args.seed)
    longest = max(map(len, encode_prompts(denoiser, [problem.prompt for problem in problems])))
    room = denoiser.spec.context_length
    if too_long := sorted({cell.length for cell in cells if longest + cell.length > room}):
        raise UserError(
            f"--lengths: {too_long[0]} and prompts of up to {longest} tokens do not fit the model's canvas "
            f"(at most {room} tokens)"
        )
    results = []
    with Progress("problem", len(cells) * len(problems)) as bar:
        for place, cell in enumerate(cells):
            label = " ".join(f"{key} {value}" for key, value in cell.settings().items() if value is not None)

            def show(done: int, place: int = place, label: str = label) -> None:
                bar.show(place * len(problems) + done, label)

            results.append(_measure(args, denoiser, task, problems, cell, show))
    console(args).print(_report(results))
    return 0, {
        "model": args.model,
        "task": args.task,
        "split": args.split,
        "results": results,
        "out": args.out,
    }


def _task(args: argparse.Namespace) -> Task:
    from unveil.overrides import merge
    from unveil.recipe import build
    from unveil.tasks.base import Task

    for word in args.words:
        if not word.startswith("task."):
            raise UserError(f"{word!r} should look like task.key=value")
    data = merge({"task": {"name": args.task}}, args.words)["task"]
    try:
        return build(Task, data, "task")
    except UserError as error:
        raise UserError(str(error).replace("task.name: ", "--task: ", 1)) from error


def _grid(args: argparse.Namespace, lengths: Sequence[int]) -> list[Cell]:
    """All decoders that were asked for; equal ones (steps of a rule that ignores them) once.

    Raises:
        UserError: some do not fit; all of them are named.
    """
    from unveil.cli.decoders import plugin, sampler
    from unveil.cli.decoders import rule as named
    from unveil.samplers.schedules import Schedule
    from unveil.samplers.transforms import Transform

    options = {
        "steps": "--steps",
        "block_length": "--blocks",
        "rule": "--rules",
        "schedule": "--schedule",
        "transform": "--transform",
        "temperature": "--temperature",
    }
    shared = {
        "schedule": None if args.schedule is None else plugin(args.schedule, "--schedule", Schedule),
        "transform": None if args.transform is None else plugin(args.transform, "--transform", Transform),
    }
    rules = [rule.strip() for group in args.rules or ["lcr"] for rule in group.split(";") if rule.strip()]
    problems: dict[str, None] = {}
    cells: dict[str, Cell] = {}
    grid = itertools.product(rules, lengths, args.steps or [None], args.blocks, args.temperature)
    for rule, length, steps, block, temperature in grid:
        settings = shared | {
            "rule": named(rule, "--rules"),
            "steps": length if steps is None else steps,
            "block_length": block,
            "temperature": temperature,
        }
        if length < 1:
            problems[f"--lengths: should be at least 1, got {length}"] = None
            continue
        try:
            cell = Cell(
                rule=rule, length=length, block=block, temperature=temperature,
                sampler=sampler(settings, length, options),
            )  # fmt: skip
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
        else:
            cells.setdefault(json.dumps(cell.settings()), cell)
    if problems:
        raise UserError("\n".join(problems))
    return list(cells.values())


def _measure(
    args: argparse.Namespace,
    denoiser: MaskedDenoiser,
    task: Task,
    problems: Sequence[Problem],
    cell: Cell,
    show: Callable[[int], None],
) -> dict[str, Any]:
    from unveil.tasks.evaluate import evaluate

    started = time.perf_counter()
    result = evaluate(
        denoiser, task, problems, cell.sampler, response_length=cell.length, seed=args.seed, on_batch=show
    )
    seconds = time.perf_counter() - started
    if args.out is not None:
        _write(Path(args.out), problems, result, cell)
    return {
        **cell.settings(),
        **result.summary(),
        "forwards_per_problem": result.forwards / len(problems),
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(problems) / seconds, 2),
    }


def _write(path: Path, problems: Sequence[Problem], result: Evaluation, cell: Cell) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            for row, problem in enumerate(problems):
                record = {
                    "problem": problem.id,
                    "prompt": problem.prompt,
                    "completion": result.samples[row],
                    "correct": result.correct[row],
                    "score": result.scores[row],
                    **cell.settings(),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"unveil: warning: {path}: {error.strerror}; completions are not written", file=sys.stderr)


def _report(results: Sequence[dict[str, Any]]) -> Table:
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
    columns["over denoised %"] = [f"{100 * line['over_denoising']:.1f}" for line in results]
    columns["ever correct %"] = [f"{100 * line['ever_correct']:.1f}" for line in results]
    columns["forwards per problem"] = [f"{line['forwards_per_problem']:.1f}" for line in results]
    columns["samples per s"] = [f"{line['samples_per_second']:.1f}" for line in results]
    made = table(tuple(columns), list(zip(*columns.values(), strict=True)), numbers=tuple(columns)[1:])
    made.title = ", ".join([f"{results[0]['problems']} problems", *shared])
    return made

"""`unveil score`: the verdicts of a task, or of two, on completions that lie in files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.cli.eval import build_task
from unveil.cli.output import console, interval, table
from unveil.registry import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from unveil.tasks.base import Task, Verdict
    from unveil.tasks.stored import Stored

SUMMARY = "judge stored completions: of `unveil eval --out`, or generations of d1's evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="FILE ... [task.key=value ...]", help="files of completions; settings of the task"
    )
    parser.add_argument("--task", required=True, metavar="NAME", help="task whose verifier judges: gsm8k, gsm8k_d1 ...")
    parser.add_argument("--against", metavar="NAME", help="a second task that judges as well")
    parser.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap over problems (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write completions and verdicts to this new file (.jsonl)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.cli.progress import Progress
    from unveil.tasks.stored import read_completions

    files = [Path(word) for word in args.words if not word.startswith("task.")]
    settings = [word for word in args.words if word.startswith("task.")]
    if not files:
        raise UserError("FILE: required, but missing")
    if args.resamples < 1:
        raise UserError(f"--resamples: should be at least 1, got {args.resamples}")
    if args.out is not None and (Path(args.out).exists() or not Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"--out: {args.out!r} should be a new file in a folder that exists")
    names = [args.task] + ([] if args.against is None else [args.against])
    options = ("--task", "--against")
    tasks = [build_task(name, settings, option) for name, option in zip(names, options, strict=False)]
    stored = [one for path in files for one in read_completions(path, tasks[0])]
    setups: dict[str, list[tuple[Stored, list[Verdict | None]]]] = {}
    with Progress("completion", len(stored)) as bar:
        for done, one in enumerate(stored, start=1):
            setups.setdefault(one.setup, []).append((one, [_judge(task, one) for task in tasks]))
            bar.show(done)
    results = [_summary(args, setup, judged) for setup, judged in setups.items()]
    if args.out is not None:
        _write(Path(args.out), names, setups)
    out = console(args)
    out.print(_report(args, results))
    out.print(f"95 % bootstrap intervals over problems ({args.resamples:,} resamples, seed {args.seed})")
    return 0, {"task": args.task, "against": args.against, "results": results, "out": args.out}


def _judge(task: Task, one: Stored) -> Verdict | None:
    return None if one.problem is None else task.check(one.problem, one.text)


def _summary(args: argparse.Namespace, setup: str, judged: list[tuple[Stored, list[Verdict | None]]]) -> dict[str, Any]:
    """What has no reference answer is wrong."""
    from unveil.tasks.statistics import bootstrap

    problems: dict[str, list[list[Verdict | None]]] = {}
    for one, verdicts in judged:
        problems.setdefault(one.name, []).append(verdicts)

    def means(task: int) -> list[float]:
        return [sum(_right(own[task]) for own in group) / len(group) for group in problems.values()]

    counted = range(1 if args.against is None else 2)
    found = bootstrap([means(task) for task in counted], resamples=args.resamples, seed=args.seed)
    scores = [sum(v[0].score for _, v in judged if v[0] is not None) / len(judged)]
    result: dict[str, Any] = {
        "setup": setup, "completions": len(judged), "problems": len(problems),
        "without_reference": sum(one.problem is None for one, _ in judged),
        "right": sum(_right(verdicts[0]) for _, verdicts in judged),
        "accuracy": found[0].mean, "low": found[0].low, "high": found[0].high, "score": scores[0],
    }  # fmt: skip
    if args.against is not None:
        pairs = [(_right(verdicts[0]), _right(verdicts[1])) for _, verdicts in judged]
        result["against"] = {
            "right": sum(second for _, second in pairs),
            "accuracy": found[1].mean, "low": found[1].low, "high": found[1].high,
            "only_here": pairs.count((True, False)), "only_there": pairs.count((False, True)),
        }  # fmt: skip
    return result


def _right(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.correct


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> Table:
    columns = {"setup": [line["setup"] for line in results]}
    columns["completions"] = [str(line["completions"]) for line in results]
    if any(line["without_reference"] for line in results):
        columns["no reference"] = [str(line["without_reference"]) for line in results]
    keys = ("accuracy", "low", "high")
    columns[f"{args.task} %"] = [interval(*(line[key] for key in keys)) for line in results]
    columns["score %"] = [f"{100 * line['score']:.1f}" for line in results]
    if args.against is not None:
        columns[f"{args.against} %"] = [interval(*(line["against"][key] for key in keys)) for line in results]
        columns[f"only {args.task}"] = [str(line["against"]["only_here"]) for line in results]
        columns[f"only {args.against}"] = [str(line["against"]["only_there"]) for line in results]
    return table(tuple(columns), list(zip(*columns.values(), strict=True)), numbers=tuple(columns)[1:])


def _write(path: Path, names: list[str], setups: dict[str, list[tuple[Stored, list[Verdict | None]]]]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            for setup, judged in setups.items():
                for one, verdicts in judged:
                    record = {
                        "setup": setup, "problem": one.name, "completion": one.text,
                        "answer": None if one.problem is None else dict(one.problem.answer),
                        "correct": {name: _right(v) for name, v in zip(names, verdicts, strict=True)},
                    }  # fmt: skip
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out: {path}: {error.strerror}") from error

"""`unveil eval` on tasks of images: decoders x steps x grids x kernels x solvers x guidance, and the folder of samples.

Every decoder is measured by `unveil.tasks.evaluate.evaluate`, which runs of `unveil train` call too: with the same
problems, seed and batches the numbers are the same to the last bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.cli.decoders import listed, plugin
from unveil.cli.eval_images_grid import Cell, grid
from unveil.cli.eval_numbers import report as table_of
from unveil.cli.eval_numbers import shares, speed
from unveil.cli.models import open_image_model
from unveil.cli.progress import Progress
from unveil.cli.sample_folder import SampleFolder, write_results
from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.denoisers.load import fingerprint
from unveil.denoisers.pipelines import PipelineDenoiser
from unveil.recipe import build, dump
from unveil.registry import UserError
from unveil.report.sheet import Tile
from unveil.rewards.base import Failure, Reward, Score
from unveil.seeds import derive_seed
from unveil.tasks.base import Problem, Task
from unveil.tasks.evaluate import Evaluation, evaluate, sample_problems
from unveil.tasks.images import ImageTask, require
from unveil.tasks.medium import medium_of
from unveil.tasks.statistics import bootstrap
from unveil.training.rewarding import ask_held_out, mean_score

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ALONG = ("decoder", "grid", "kernel", "solver", "guidance")
"""What one line of the picture has in common; along it the steps change."""
MEASURE = "measure/"


@dataclass(kw_only=True)
class Clock:
    """What of a decoder this call made: images, and the seconds that they took."""

    drawn: int = 0
    drawing: float = 0.0
    judging: float = 0.0


def measured(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    """The results of all decoders."""
    rewards = _rewards(args)
    cells = grid(args)
    if args.out is not None:
        require("PIL")
    problems = task.problems(args.split, args.problems, args.seed)
    words = [word for word in args.words if word.startswith("pipeline.")]
    denoiser = open_image_model(args.model, dtype=args.dtype, words=words)
    if args.lora is not None:
        if not isinstance(denoiser, PipelineDenoiser):
            raise UserError(f"--lora: {args.model!r} is no published pipeline (allowed with those alone)")
        try:
            denoiser.load_adapter(args.lora)
        except UserError as error:
            raise UserError(f"--lora: {error}") from error
    _check_fits(denoiser, task, problems, cells)
    chains = [problem for problem in problems for _ in range(args.samples)]
    try:
        folder = None if args.out is None else SampleFolder(Path(args.out), _settings(args, task, problems, cells))
        found = _all(args, denoiser, task, chains, cells, rewards, folder)
    except OSError as error:
        if args.out is None:
            raise
        raise UserError(f"--out: {args.out}: {error.strerror or error} (--resume goes on with it)") from error
    return found


def _all(
    args: argparse.Namespace,
    denoiser: ContinuousDenoiser,
    task: Task,
    chains: Sequence[Problem],
    cells: Sequence[Cell],
    rewards: Mapping[str, Reward],
    folder: SampleFolder | None,
) -> list[dict[str, Any]]:
    found, records = [], []
    tiles: dict[str, list[Tile]] = {}
    with Progress("image", len(cells) * len(chains)) as bar:
        for place, cell in enumerate(cells):
            label = " ".join(f"{key} {value}" for key, value in cell.settings().items())
            before, clock = place * len(chains), Clock()

            def shown(done: int, before: int = before, label: str = label) -> None:
                bar.show(before + done, label)

            sample = partial(_drawn, clock, shown) if folder is None else folder.drawn(place, clock, shown)
            began = time.perf_counter()
            result = evaluate(
                denoiser, task, chains, cell.sampler, seed=args.seed, batch_size=args.batch, sample=sample
            )
            scores = _scores(rewards, chains, result)
            clock.judging = time.perf_counter() - began - clock.drawing
            found.append(_summary(args, cell, result, scores, clock))
            if folder is not None:
                files = folder.write_images(place, result.samples)
                records += _records(args, cell, chains, result, scores, files)
                _picture(folder, f"{place:02d}", chains, result)
                for number, row in enumerate(range(0, len(chains), args.samples)):
                    name = f"{number}: {chains[row].prompt}"
                    tiles.setdefault(name, []).append((result.samples[row], result.correct[row]))
    if folder is not None:
        folder.write_samples(records)
        if len(cells) > 1:
            folder.write_sheet("decoders", tiles, heads(cells))
    return found


def heads(cells: Sequence[Cell]) -> list[str]:
    """Short names: the number of each decoder, and those of its settings that not all have in common."""
    settings = [cell.settings() for cell in cells]
    names = [name for name in settings[0] if len({str(one[name]) for one in settings}) > 1]
    return [" ".join([f"{place:02d}", *(str(one[name]) for name in names)]) for place, one in enumerate(settings)]


def _drawn(
    clock: Clock, shown: Callable[[int], None], denoiser: Any, problems: Sequence[Problem], sampler: Any, **how: Any
) -> Any:
    """`sample_problems`, with its time taken."""
    began = time.perf_counter()
    trajectory = sample_problems(denoiser, problems, sampler, **(how | {"on_batch": shown}))
    clock.drawn, clock.drawing = len(problems), time.perf_counter() - began
    return trajectory


def _rewards(args: argparse.Namespace) -> dict[str, Reward]:
    """By the name of the column: that of the reward, numbered where it comes twice."""
    found: dict[str, Reward] = {}
    for text in listed(args.rewards or []):
        data = plugin(text, "--rewards", Reward)
        try:
            reward = build(Reward, data, "--rewards")
            reward.check_medium("image", "--rewards")
        except UserError as error:
            raise UserError(str(error).replace("--rewards.name: ", "--rewards: ")) from error
        name = next(one for one in (data["name"], *(f"{data['name']}-{n}" for n in range(2, 99))) if one not in found)
        found[name] = reward
    return found


def _check_fits(denoiser: ContinuousDenoiser, task: Task, problems: Sequence[Problem], cells: Sequence[Cell]) -> None:
    """Refuse what could only fail after hours.

    Raises:
        UserError: the model does not know the prompts, draws images of another shape than the task's, or a decoder is
            not for the model.
    """
    for cell in cells:
        cell.sampler.check_denoiser(denoiser)
        cell.sampler.check_fits(None)
        cell.sampler.times(denoiser)
    medium_of(denoiser).check_fits(denoiser, [problem.prompt for problem in problems], None)
    if isinstance(task, ImageTask) and task.vocabulary:  # its judge looks at its own shape alone
        import torch

        with torch.no_grad():
            shape = tuple(denoiser.decode(torch.zeros(1, *denoiser.spec.shape, device=denoiser.device)).shape[1:])
        if shape != task.shape:
            made, wanted = (" x ".join(map(str, one)) for one in (shape, task.shape))
            raise UserError(f"--task: {task.name!r} has images of {wanted}, the model draws {made}")


def _settings(
    args: argparse.Namespace, task: Task, problems: Sequence[Problem], cells: Sequence[Cell]
) -> dict[str, Any]:
    """What tells this evaluation from others."""
    return {
        "model": args.model, "weights": fingerprint(args.model), "dtype": args.dtype, "lora": args.lora,
        "pipeline": [word for word in args.words if word.startswith("pipeline.")],
        "task": dump(task) | {"name": args.task},
        "split": args.split, "seed": args.seed, "problems": len(problems),
        "prompts": derive_seed(*((problem.id, problem.prompt) for problem in problems)),
        "samples": args.samples, "batch": args.batch, "rewards": listed(args.rewards or []),
        "decoders": [cell.settings() | {"sampler": dump(cell.sampler)} for cell in cells],
    }  # fmt: skip


def _scores(rewards: Mapping[str, Reward], chains: Sequence[Problem], result: Evaluation) -> dict[str, list[Score]]:
    """Of every reward, and of every part of a sum, the scores of all images."""
    found: dict[str, list[Score]] = {}
    for name, reward in rewards.items():
        answer = ask_held_out(reward, chains, result.judged)
        found |= {name: answer.total} | {f"{name}/{part}": scores for part, scores in answer.parts.items()}
        if failures := answer.failures():
            first = failures[0][1]
            message = " ".join(first.message.split())
            print(
                f"unveil: warning: --rewards: {name}: {len(failures)} images have no score: {first.kind}: {message}",
                file=sys.stderr,
            )
    return found


def _summary(
    args: argparse.Namespace, cell: Cell, result: Evaluation, scores: Mapping[str, list[Score]], clock: Clock
) -> dict[str, Any]:
    """Numbers of one decoder; speeds are of the images that this call drew."""
    count, n = len(result.samples), args.samples
    verdicts = result.judged.verdicts
    per_image = {name: [verdict.metrics[name] for verdict in verdicts] for name in verdicts[0].metrics}
    whole = {name.removeprefix(MEASURE): v for name, v in result.numbers.items() if name.startswith(MEASURE)}
    said, more = shares(args, result.correct, per_image)
    if n > 1 and cell.sampler.greedy:
        print("unveil: warning: all samples of a problem are equal: this decoder draws nothing", file=sys.stderr)
    measures = {
        name: {"value": whole[name] if name in whole else more[name].mean}
        | ({"low": more[name].low, "high": more[name].high} if name in more else {"low": None, "high": None})
        for name in dict.fromkeys((*whole, *more))
    }
    seconds = clock.drawing + clock.judging
    return {
        **cell.settings(),
        **said,
        "score": result.score,
        "measures": measures,
        "rewards": {name: _reward(args, own) for name, own in scores.items()},
        **{name: value for name, value in result.numbers.items() if not name.startswith(MEASURE)},
        "steps_per_chain": result.steps_per_chain,
        "forwards": result.forwards,
        "forwards_per_sample": result.forwards / count,
        "problems": count // n, "samples": n,
        "decoded": clock.drawn,
        "seconds": round(seconds, 3),
        "samples_per_second": round(clock.drawn / clock.drawing, 2) if clock.drawn else None,
    }  # fmt: skip


def _reward(args: argparse.Namespace, scores: Sequence[Score]) -> dict[str, Any]:
    """The mean score with its interval over the problems that have one."""
    n, groups = args.samples, []
    for start in range(0, len(scores), n):
        known = [one for one in scores[start : start + n] if isinstance(one, float)]
        groups += [sum(known) / len(known)] if known else []
    (found,) = bootstrap([groups], resamples=args.resamples, seed=args.seed) if groups else (None,)
    return {
        "value": mean_score(scores) if groups else None,
        "low": found and found.low, "high": found and found.high,
        "failures": sum(isinstance(one, Failure) for one in scores),
    }  # fmt: skip


def _records(
    args: argparse.Namespace,
    cell: Cell,
    chains: Sequence[Problem],
    result: Evaluation,
    scores: Mapping[str, list[Score]],
    files: Sequence[str],
) -> list[dict[str, Any]]:
    """An image's line in the file of samples."""
    return [
        {
            "problem": problem.id, "sample": row % args.samples, "prompt": problem.prompt, "image": files[row],
            "correct": verdict.correct, "score": verdict.score, "metrics": verdict.metrics,
            "rewards": {
                name: own[row] if isinstance(own[row], float) else None for name, own in scores.items()
            },
            **cell.settings(),
        }
        for row, (problem, verdict) in enumerate(zip(chains, result.judged.verdicts, strict=True))
    ]  # fmt: skip


def _picture(folder: SampleFolder, name: str, chains: Sequence[Problem], result: Evaluation) -> None:
    """A decoder's images, a row per prompt."""
    rows: dict[str, list[Tile]] = {}
    for row, problem in enumerate(chains):
        rows.setdefault(problem.prompt, []).append((result.samples[row], result.correct[row]))
    folder.write_sheet(name, dict(sorted(rows.items())))


def finish(args: argparse.Namespace, answer: dict[str, Any], out: Console) -> None:
    """The numbers beside the images, and a word on where to look."""
    write_results(Path(args.out), answer)
    out.print(f"images: {args.out}, a picture of each decoder: {', '.join(_pictures(answer))}")


def _pictures(answer: dict[str, Any]) -> list[str]:
    names = [f"{place:02d}.png" for place in range(len(answer["results"]))]
    return names + (["decoders.png"] if len(names) > 1 else [])


def report(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> Table:
    """The table of all decoders."""
    settings = {name: [str(line[name]) for line in results] for name in ("steps", *ALONG[1:])}
    numbers = {"score": [f"{line['score']:.3f}" for line in results]}
    for group in ("measures", "rewards"):
        for name in results[0][group]:
            numbers[name] = [_value(line[group][name]) for line in results]
    numbers["forwards"] = [f"{line['forwards_per_sample']:.1f}" for line in results]
    numbers["seconds"] = [f"{line['seconds']:.1f}" for line in results]
    numbers["images per s"] = [speed(line["samples_per_second"]) for line in results]
    return table_of(args, results, settings, numbers)


def _value(one: Mapping[str, Any]) -> str:
    """``1.23 (1.2 to 1.27)``; without an interval where none is known."""
    if one["value"] is None:
        return "-"
    if one["low"] is None:
        return f"{one['value']:.4g}"
    return f"{one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"

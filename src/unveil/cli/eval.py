"""`unveil eval`: accuracy of a model over a grid of decoders, on a task of texts or of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unveil.cli.models import add_model_options
from unveil.cli.output import console
from unveil.registry import UserError

if TYPE_CHECKING:
    from unveil.tasks.base import Task

T = TypeVar("T")

SUMMARY = "measure a model on a task's held-out problems, over a grid of decoders"
TEXT = {
    "lengths": "--lengths", "blocks": "--blocks", "rules": "--rules", "schedule": "--schedule",
    "transform": "--transform", "cache": "--cache", "temperature": "--temperature", "final_only": "--final-only",
    "chat": "--chat",
}  # fmt: skip
"""Options that only texts have."""
IMAGES = {
    "grids": "--grids", "kernels": "--kernels", "solvers": "--solvers", "guidance": "--guidance",
    "rewards": "--rewards", "lora": "--lora",
}  # fmt: skip
"""Options that only images have."""
WORDS = {"text": ("task",), "image": ("task", "sampler", "pipeline")}
"""What ``key=value`` words may change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, run folder, embedded model, or owner/name on the hub"
    )
    add_model_options(parser)
    parser.add_argument(
        "words", nargs="*", metavar="key=value",
        help="settings of the task (task.key=value); of images also of sampler and pipeline",
    )  # fmt: skip
    parser.add_argument("--task", required=True, metavar="NAME", help="task: countdown, sudoku, digits ...")
    parser.add_argument(
        "--steps", type=_list_of(int), metavar="N,...",
        help="denoising steps (default: of texts the length; of images those of the model's recipe)",
    )  # fmt: skip
    parser.add_argument("--problems", type=int, default=512, metavar="N", help="how many (default: 512)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="samples per problem (default: 1)")
    parser.add_argument(
        "--k", type=_list_of(int), default=[1], metavar="K,...", help="pass@k, at most --samples (default: 1)"
    )
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which problems (default: test)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of problems and sampling (default: 0)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="chains at a time (default: 128)")
    parser.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap over problems (default: 10000)"
    )
    parser.add_argument(
        "--out", metavar="PATH", help="write every sample there: of texts a new file (.jsonl), of images a new folder"
    )
    parser.add_argument("--resume", action="store_true", help="go on with --out where a run with these options stopped")
    parser.add_argument("--plot", metavar="FILE", help="accuracy against forwards (.png), numbers beside it (.csv)")
    texts = parser.add_argument_group("tasks of texts")
    texts.add_argument(
        "--lengths", type=_list_of(int), metavar="N,...",
        help="response lengths (default: what the model was trained with, where its recipe is at hand)",
    )  # fmt: skip
    texts.add_argument("--blocks", type=_list_of(_block), metavar="N,...", help="block lengths; none: full (default)")
    texts.add_argument(
        "--rules",
        action="append",
        metavar="RULE;...",
        help="rules NAME[:field=value,...], or reverse; may be repeated (default: lcr)",
    )
    texts.add_argument("--schedule", metavar="NAME[:field=value,...]", help="tokens per step (default: even)")
    texts.add_argument("--transform", metavar="NAME[:field=value,...]", help="of scores before the rule: eoser")
    texts.add_argument("--cache", metavar="NAME[:field=value,...]", help="keys and values that steps take over")
    texts.add_argument("--temperature", type=_list_of(float), metavar="T,...", help="default: 0")
    texts.add_argument(
        "--final-only", action="store_true", help="judge finished responses alone: no rate of over-denoising"
    )
    images = parser.add_argument_group(
        "tasks of images", "each a list NAME[:field=value,...];... that may be repeated; what is not given is as in "
        "the decoders of the model's recipe",
    )  # fmt: skip
    for option, what in (
        ("--grids", "times of the steps: uniform:shift=3, karras, sd3, table"),
        ("--kernels", "how steps are drawn: ddim, flow, dance, cps"),
        ("--solvers", "of steps without noise: first, heun, dpmpp_2m"),
        ("--guidance", "numbers are scales of classifier-free guidance: none,1,3 or cfg:scale=3,rescale=0.7"),
        ("--rewards", "further opinions of the images: jpeg, ocr, clip:path=..., classifier:network=..."),
    ):
        images.add_argument(option, action="append", metavar="LIST", help=what)
    images.add_argument("--lora", metavar="DIR", help="adapters of a published pipeline, put into its weights")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} should be numbers with commas between them") from error

    return read


def _block(text: str) -> int | None:
    return None if text == "none" else int(text)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    task = build_task(args.task, [word for word in args.words if not word.startswith(("sampler.", "pipeline."))])
    _check(args, task)
    kind: Any
    if task.medium == "text":
        from unveil.cli import eval_text as kind
    else:
        from unveil.cli import eval_images as kind
    try:
        results = kind.measured(args, task)
    except KeyboardInterrupt:
        if args.out is None or not Path(args.out).exists():
            raise
        print(f"unveil: interrupted; the same command with --resume goes on with {args.out}", file=sys.stderr)
        return 130, {"status": "interrupted", "out": args.out}
    out = console(args)
    out.print(kind.report(args, results))
    out.print(f"95 % bootstrap intervals over problems ({args.resamples:,} resamples, seed {args.seed})")
    if args.plot is not None:
        from unveil.report.accuracy import draw, write_numbers

        numbers = Path(args.plot).with_suffix(".csv")
        draw(results, Path(args.plot), title=f"{args.model} on {args.task}", along=kind.ALONG)
        write_numbers(results, numbers)
        out.print(f"plot: {args.plot}, numbers: {numbers}")
    answer = {
        "model": args.model,
        "task": args.task,
        "split": args.split,
        "seed": args.seed,
        "bootstrap": {"resamples": args.resamples, "seed": args.seed},
        "results": results,
        "out": args.out,
        "plot": args.plot,
    }
    if args.out is not None:
        kind.finish(args, answer, out)
    return 0, answer


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


def _check(args: argparse.Namespace, task: Task) -> None:
    foreign = IMAGES if task.medium == "text" else TEXT
    own = TEXT if task.medium == "text" else IMAGES
    for field, option in foreign.items():
        if getattr(args, field) not in (None, False):
            raise UserError(
                f"{option}: {args.task!r} is a task of {task.medium}s, which have no such option (allowed: --steps, "
                f"{', '.join(own.values())})"
            )
    for word in args.words:
        if (part := word.partition(".")[0]) not in WORDS[task.medium]:
            raise UserError(f"{word!r}: a task of {task.medium}s has no {part} (allowed: {', '.join(own.values())})")
    for option in ("problems", "samples", "batch", "resamples"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option}: should be at least 1, got {getattr(args, option)}")
    for k in args.k:
        if not 1 <= k <= args.samples:
            raise UserError(f"--k: should be 1 to {args.samples} (--samples), got {k}")
    if args.resume and args.out is None:
        raise UserError("--resume: goes on with what was written; name it with --out")
    if args.out is not None:
        path = Path(args.out).absolute()
        if path.exists() and not args.resume:
            raise UserError(f"--out: {args.out!r} exists; --resume goes on with it")
        wrong = path.is_dir() if task.medium == "text" else path.is_file()
        if wrong or not path.parent.is_dir():
            kind = "a file" if task.medium == "text" else "a folder"
            raise UserError(f"--out: {args.out!r} should be {kind} in a folder that exists")
    if args.plot is not None:
        from unveil.report.accuracy import check_target

        check_target(Path(args.plot))

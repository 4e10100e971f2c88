"""`unveil plan`: whether a recipe fits on the GPUs that there are, and how long an update will take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unveil.cli.output import console, duration, table
from unveil.cli.recipes import find_recipe
from unveil.registry import UserError

SUMMARY = "estimate the memory and time that a recipe needs on a number of GPUs"
_KINDS = {"policy": "train", "data": "pretrain"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE [key=value ...]", help="name or path of a recipe, and changes of it"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many GPUs (default: 1)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="of one GPU (default: 80)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=256, metavar="N", help="of a prompt (default: 256, or what fits)"
    )
    parser.add_argument(
        "--peak", type=float, default=989.0, metavar="TFLOPS",
        help="dense bf16 operations of one GPU in 1e12 a second (default: 989, an H100)",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation", type=float, default=0.35, metavar="SHARE", help="of the peak that is reached (default: 0.35)"
    )


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.denoisers.shapes import shape_of
    from unveil.training import plan

    for option in ("gpus", "memory", "peak", "utilisation", "prompt_tokens"):
        value = getattr(args, option)
        if value <= 0 or (option == "utilisation" and value > 1):
            allowed = "above 0 and at most 1" if option == "utilisation" else "greater than 0"
            raise UserError(f"--{option.replace('_', '-')}: should be {allowed}, got {value}")
    recipe = _recipe(args)
    where, shape = shape_of(*_model(recipe))
    machine = plan.Machine(gpus=args.gpus, memory=args.memory, peak=args.peak, utilisation=args.utilisation)
    if shape.context:
        room = shape.context - plan.response_length(recipe)
        args.prompt_tokens = min(args.prompt_tokens, max(0, room))
    work = plan.work_of(recipe, shape, args.gpus, args.prompt_tokens)
    bytes_ = plan.memory(shape, work)
    fits = plan.fits(shape, work, machine)
    times = {name: plan.seconds(done, work, machine) for name, done in plan.operations(shape, work).items()}
    update = sum(times.values())
    change = [] if fits else plan.advice(shape, work, machine)

    people = console(args)
    people.print(f"{shape.parameters / 1e9:.2f}e9 weights, {work.trained / 1e9:.3f}e9 of them trained ({where})")
    people.print(
        f"on each of {args.gpus} GPU(s): {work.chains:g} chains of {work.steps} steps and {work.length} tokens, "
        f"{work.views:g} scored views, {work.inner} gradient step(s) an update"
    )
    cells = [[name, f"{value / plan.GB:.1f}"] for name, value in bytes_.items() if value > 0]
    people.print(table(("memory of one GPU", "GB"), cells, numbers=("GB",)))
    cells = [[name, duration(value)] for name, value in times.items()]
    people.print(table(("time of an update", "about"), cells, numbers=("about",)))
    people.print(
        f"an update takes about {duration(update)}, {recipe.updates:,} of them {duration(update * recipe.updates)} "
        f"(at {args.utilisation:.0%} of {args.peak:g}e12 operations a second; rewards and communication not counted)"
    )
    limit = machine.memory * (1 - plan.SPARE)
    people.print(f"{'fits' if fits else 'does not fit'}: {bytes_['peak'] / plan.GB:.1f} GB of {limit:.1f} GB")
    for line in change:
        people.print(f"change: {line}")
    answer = {
        "fits": fits, "weights": shape.parameters, "trained": work.trained, "shape": where,
        "memory_gb": {name: round(value / plan.GB, 3) for name, value in bytes_.items()}, "limit_gb": round(limit, 3),
        "seconds": times, "seconds_per_update": update, "updates": recipe.updates, "change": change,
    }  # fmt: skip
    return (0 if fits else 1), answer


def _recipe(args: argparse.Namespace) -> Any:
    from unveil.recipe import build, load
    from unveil.training.runs import PretrainRecipe, TrainRecipe

    if not args.words or "=" in args.words[0]:
        raise UserError("RECIPE: required, but missing")
    name, *overrides = args.words
    if wrong := [word for word in overrides if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is no override (RECIPE comes first, then key=value)")
    path = find_recipe(name)
    data = load(path, overrides)
    found = [kind for key, kind in _KINDS.items() if key in data]
    if len(found) != 1:
        raise UserError(f"{path}: neither a recipe for `unveil train` nor one for `unveil pretrain`")
    recipe = build(TrainRecipe if found[0] == "train" else PretrainRecipe, data)
    task = getattr(getattr(recipe, "policy", None), "task", None)
    if task is not None and task.medium != "text":
        raise UserError(
            f"policy.task: {task.name!r} has samples of kind {task.medium!r} (allowed: tasks of texts, only their "
            "models are planned)"
        )
    return recipe


def _model(recipe: Any) -> tuple[str, Path | None]:
    """The name of a recipe's model, and its folder if it is there; a new one is described by the recipe itself."""
    from unveil.denoisers.load import EMBEDDED

    name = recipe.model.path
    if name is None:
        raise UserError("model.path: needed, the shape of a new model is not estimated")
    for folder in (Path(name), Path(name) / "model", EMBEDDED / name):
        if (folder / "config.json").is_file():
            return name, folder
    return name, None

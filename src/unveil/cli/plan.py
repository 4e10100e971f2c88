"""`unveil plan`: whether a recipe fits on the GPUs that there are, what it counts, and how long an update will take."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.cli.output import console, duration, table
from unveil.cli.recipes import find_recipe
from unveil.registry import UserError

if TYPE_CHECKING:
    from unveil.training.plan import Machine

SUMMARY = "estimate the memory and time that a recipe needs on a number of GPUs, and count what it does"
_KINDS = {"policy": "train", "data": "pretrain"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE [key=value ...]", help="name or path of a recipe, and changes of it"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many GPUs (default: 1)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="of one GPU (default: 80)")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="of a prompt, for models of text (default: 256, or what fits)"
    )
    parser.add_argument(
        "--peak", type=float, default=989.0, metavar="TFLOPS",
        help="dense bf16 operations of one GPU in 1e12 a second (default: 989, an H100)",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation", type=float, default=0.35, metavar="SHARE", help="of the peak that is reached (default: 0.35)"
    )


@dataclass(kw_only=True)
class Estimate:
    """What is said of a recipe, whatever its medium.

    Attributes:
        where: the shape is from.
        weights, trained: how many.
        sizes: an update on one GPU, in words.
        memory: bytes of one GPU by purpose, and ``peak``.
        fits: whether the peak fits.
        seconds: of the largest update on one GPU, by phase.
        total: seconds of all updates.
        change: what would make it fit.
        counts: of all updates on all GPUs, as a run counts them; ``per_update`` of the largest.
        host: bytes that a process holds on the processor.
    """

    where: str
    weights: int
    trained: int
    sizes: str
    memory: dict[str, float]
    fits: bool
    seconds: dict[str, float]
    total: float
    change: list[str]
    counts: dict[str, Any] | None = None
    per_update: dict[str, int] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.training import plan

    for option in ("gpus", "memory", "peak", "utilisation", "prompt_tokens"):
        value = getattr(args, option)
        if value is not None and (value <= 0 or (option == "utilisation" and value > 1)):
            allowed = "above 0 and at most 1" if option == "utilisation" else "greater than 0"
            raise UserError(f"--{option.replace('_', '-')}: should be {allowed}, got {value}")
    recipe = _recipe(args)
    machine = plan.Machine(gpus=args.gpus, memory=args.memory, peak=args.peak, utilisation=args.utilisation)
    policy = getattr(recipe, "policy", None)
    of_images = policy is not None and policy.task.medium == "image"
    found = _images(args, recipe, machine) if of_images else _text(args, recipe, machine)
    warnings = policy.warnings if policy is not None else []
    _print(args, recipe, found, warnings, machine)
    answer = {
        "fits": found.fits, "weights": found.weights, "trained": found.trained, "shape": found.where,
        "memory_gb": {name: round(value / plan.GB, 3) for name, value in found.memory.items()},
        "limit_gb": round(machine.room / plan.GB, 3), "seconds": found.seconds,
        "seconds_per_update": sum(found.seconds.values()),
        "updates": recipe.updates, "change": found.change, "warnings": warnings,
    }  # fmt: skip
    if found.counts is not None:
        answer |= {
            "counts": found.counts, "counts_per_update": found.per_update, "seconds_in_all": found.total,
            "host_memory_gb": {name: round(value / plan.GB, 3) for name, value in found.host.items()},
        }  # fmt: skip
    return (0 if found.fits else 1), answer


def _print(args: argparse.Namespace, recipe: Any, found: Estimate, warnings: list[str], machine: Machine) -> None:
    from unveil.training.plan import GB

    people = console(args)
    people.print(f"{found.weights / 1e9:.2f}e9 weights, {found.trained / 1e9:.3f}e9 of them trained ({found.where})")
    people.print(f"on each of {args.gpus} GPU(s): {found.sizes}")
    if found.counts is not None:
        most = "" if found.counts["exact"] else "at most "
        names = {"rollouts": "", "forwards": most, "optimizer_steps": most}
        rows = [
            [name.replace("_", " "), f"{how}{found.per_update[name]:,}", f"{how}{found.counts[name]:,}"]
            for name, how in names.items()
        ]
        rows.append(["forwards of evaluations", "", f"{found.counts['evaluations']:,}"])
        columns = ("counted on all GPUs", "an update", f"{recipe.updates:,} updates")
        people.print(table(columns, rows, numbers=columns[1:]))
    cells = [[name, f"{value / GB:.1f}"] for name, value in found.memory.items() if value > 0]
    people.print(table(("memory of one GPU", "GB"), cells, numbers=("GB",)))
    if found.host:
        cells = [[name, f"{value / GB:.2f}"] for name, value in found.host.items()]
        people.print(table(("held on the processor until the gradient step", "GB"), cells, numbers=("GB",)))
    cells = [[name, duration(value)] for name, value in found.seconds.items()]
    people.print(table(("time of an update", "about"), cells, numbers=("about",)))
    people.print(
        f"an update takes about {duration(sum(found.seconds.values()))}, {recipe.updates:,} of them "
        f"{duration(found.total)} (at {args.utilisation:.0%} of {args.peak:g}e12 operations a second; rewards and "
        "communication not counted)"
    )
    said, peak = "fits" if found.fits else "does not fit", found.memory["peak"] / GB
    people.print(f"{said}: {peak:.1f} GB of {machine.room / GB:.1f} GB")
    for line in found.change:
        people.print(f"change: {line}")
    for line in warnings:
        people.print(f"warning: {line}")


def _text(args: argparse.Namespace, recipe: Any, machine: Machine) -> Estimate:
    from unveil.denoisers.shapes import shape_of
    from unveil.training import plan

    where, shape = shape_of(*_model(recipe))
    prompt = args.prompt_tokens or 256
    if shape.context:
        prompt = min(prompt, max(0, shape.context - plan.response_length(recipe)))
    work = plan.work_of(recipe, shape, args.gpus, prompt)
    fits = plan.fits(shape, work, machine)
    times = {name: plan.seconds(done, work, machine) for name, done in plan.operations(shape, work).items()}
    return Estimate(
        where=where, weights=shape.parameters, trained=work.trained, memory=plan.memory(shape, work), fits=fits,
        sizes=f"{work.chains:g} chains of {work.steps} steps and {work.length} tokens, {work.views:g} scored views, "
        f"{work.inner} gradient step(s) an update",
        seconds=times, total=sum(times.values()) * recipe.updates,
        change=[] if fits else plan.advice(shape, work, machine),
    )  # fmt: skip


def _images(args: argparse.Namespace, recipe: Any, machine: Machine) -> Estimate:
    from unveil.denoisers.shells import shell
    from unveil.training import plan, plan_images
    from unveil.training.rehearsal import rehearse

    if args.prompt_tokens is not None:
        raise UserError("--prompt-tokens: of models of text (of a pipeline it is model.pipeline.prompt_tokens)")
    where, denoiser = shell(recipe.model.path, recipe.model.pipeline)
    updates, counts = rehearse(recipe, denoiser.spec)
    largest = max(updates, key=lambda update: update.forwards)
    work = plan_images.work_of(recipe, largest, args.gpus)
    shape = plan_images.shape_of(denoiser, recipe)

    def seconds(update: Any) -> dict[str, float]:
        own = plan_images.work_of(recipe, update, args.gpus)
        return {name: plan.seconds(done, own, machine) for name, done in plan_images.operations(shape, own).items()}

    fits = plan_images.fits(shape, work, machine)
    total = sum(times * sum(seconds(update).values()) for update, times in Counter(updates).items())
    steps = recipe.policy.rollout.sampler.planned_steps
    return Estimate(
        where=where, weights=shape.parameters, trained=shape.trained, memory=plan_images.memory(shape, work), fits=fits,
        sizes=f"{work.chains:g} chains of {steps} steps, {work.views:g} scored views, {largest.steps} gradient step(s) "
        "an update",
        seconds=seconds(largest), total=total, change=[] if fits else plan_images.advice(shape, work, machine),
        counts=vars(counts), host=plan_images.host_memory(shape, work),
        per_update={
            "rollouts": largest.rollouts, "forwards": largest.forwards, "optimizer_steps": largest.steps
        },
    )  # fmt: skip


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
    if len(found) != 1 or "judge" in data:
        raise UserError(f"{path}: neither a recipe for `unveil train` nor one of a denoiser for `unveil pretrain`")
    return build(TrainRecipe if found[0] == "train" else PretrainRecipe, data)


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

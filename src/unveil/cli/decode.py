"""`unveil decode`: text from a model, and how it came about."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.cli.models import add_model_options
from unveil.cli.output import console, one_line
from unveil.registry import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from unveil.denoisers.base import MaskedDenoiser
    from unveil.samplers.base import Sampler
    from unveil.samplers.decoding import DecodeRecipe
    from unveil.samplers.trajectory import TokenTrajectory

SUMMARY = "complete prompts with a model; show or save the denoising trajectory"
_MASK = "<mask>"
_LONGEST = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="MODEL [key=value ...]",
        help="model folder, run folder, embedded model, or owner/name on the hub; changes of a recipe",
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument(
        "--recipe", metavar="NAME", help="sampler, length and model of a system that needs no training, or a path"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt per line, or JSON lines with "prompt" (default: lines of stdin)',
    )
    parser.add_argument(
        "--infill",
        metavar="TEXT",
        help=f"a response in which words stay and each {_MASK} is filled; gives the length",
    )
    parser.add_argument(
        "--length", type=int, metavar="N",
        help="response positions (default: as trained, where the model's recipe is at hand, else what "
        f"the model's canvas leaves, at most {_LONGEST})",
    )  # fmt: skip
    parser.add_argument(
        "--rule", metavar="NAME[:field=value,...]",
        help="decoding rule, or reverse: the reverse process on a grid of times; for uniform noise entropy_bound or "
        "ancestral (default: lcr, for uniform noise entropy_bound)",
    )  # fmt: skip
    parser.add_argument("--schedule", metavar="NAME[:field=value,...]", help="tokens per step (default: even)")
    parser.add_argument("--transform", metavar="NAME[:field=value,...]", help="of scores before the rule: eoser")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: one per position)")
    parser.add_argument("--block", type=int, metavar="N", help="block length (default: full diffusion)")
    parser.add_argument("--solver", metavar="NAME[:field=value,...]", help="outputs that tokens use (default: first)")
    parser.add_argument(
        "--cache", metavar="NAME[:field=value,...]", help="keys and values that steps take over (default: none)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest (default: 0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus filter")
    parser.add_argument("--top-k", type=int, metavar="K", help="top-k filter")
    parser.add_argument("--rank-by", metavar="NAME", help="distribution of confidence: model (default) or sampling")
    parser.add_argument(
        "--stop-at-end", action="store_true", default=None, help="finish once an end token stands behind whole text"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="everything random derives from it (default: 0)"
    )
    parser.add_argument("--trajectory", metavar="PATH", help="save all states, guesses and confidences (.safetensors)")
    parser.add_argument("--show", action="store_true", help="print every denoising step: · hole, new, taken back")


OPTIONS = {
    "steps": "--steps", "block_length": "--block", "rule": "--rule", "schedule": "--schedule", "solver": "--solver",
    "transform": "--transform", "cache": "--cache", "temperature": "--temperature", "top_p": "--top-p",
    "top_k": "--top-k", "rank_by": "--rank-by", "stop_at_end": "--stop-at-end",
}  # fmt: skip


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.cli.models import open_model
    from unveil.denoisers.tokenizer import whole
    from unveil.samplers.canvas import Canvas
    from unveil.samplers.text import response_texts
    from unveil.seeds import derive_seed
    from unveil.tasks.evaluate import text_tokens, unigram_entropy

    if args.samples < 1:
        raise UserError(f"--samples: should be at least 1, got {args.samples}")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length: should be at least 1, got {args.length}")
    if args.infill is not None and args.length is not None:
        raise UserError("--length: the length comes from --infill; leave one of them out")
    if args.trajectory is not None:
        _check_target(Path(args.trajectory))
    recipe = _recipe(args)
    prompts = [whole(prompt) for prompt in _prompts(args, recipe)]
    denoiser = open_model(args.model, dtype=args.dtype, chat=args.chat)
    tokens = []
    for row, prompt in enumerate(prompts):
        tokens.append(denoiser.encode_prompt(prompt))
        _warn_unknown(denoiser, tokens[-1], prompt, f"prompt {row}")
    template = None if args.infill is None else _template(denoiser, args.infill)
    length = len(template) if template else _length(args, recipe, denoiser, max(map(len, tokens)))
    sampler = _sampler(args, recipe, length, denoiser)
    copies = [row for row in range(len(prompts)) for _ in range(args.samples)]
    initial = None if template is None else [template] * len(copies)
    canvas = Canvas.of([tokens[row] for row in copies], length, denoiser.spec, initial=initial)
    seeds = [derive_seed(args.seed, "decode", row, place % args.samples) for place, row in enumerate(copies)]
    needs: set[str] = set()
    if args.show or args.trajectory:
        needs = {"states", "guesses", "confidence", "log_prob", "revealed", "taken_back"}
        needs = (needs | {"step_map"}) - sampler.refused_fields().keys()
    started = time.perf_counter()
    trajectory = sampler.sample(denoiser, canvas, seeds, needs=needs, batch_size=128)
    seconds = time.perf_counter() - started
    texts = response_texts(denoiser, trajectory.response_ids)
    if args.trajectory:
        trajectory.save(args.trajectory)
    for place, text in enumerate(texts):
        if args.show:
            _show(args, denoiser, trajectory, place, prompts[copies[place]])
        if not args.json:
            print(one_line(text))
    taken = trajectory.active.sum(1).tolist()
    holes = ((trajectory.response_ids == trajectory.mask_id) & trajectory.response_valid).sum(1).tolist()
    completions = [
        {
            "prompt": prompts[row], "sample": place % args.samples, "completion": texts[place],
            "steps": taken[place], "holes": holes[place],
        }
        for place, row in enumerate(copies)
    ]  # fmt: skip
    return 0, {
        "completions": completions, "length": length, "steps": sampler.steps, "forwards": trajectory.forwards,
        "sample_entropy": unigram_entropy(trajectory.response_ids, text_tokens(denoiser, trajectory)).mean().item(),
        "seconds": round(seconds, 3), "trajectory": args.trajectory,
    }  # fmt: skip


def _check_target(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"--trajectory: {str(path)!r} should end in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"--trajectory: {str(path.parent)!r}: no such folder")


def _recipe(args: argparse.Namespace) -> DecodeRecipe | None:
    """The recipe, if one is named; sets ``args.model``.

    Raises:
        UserError: the recipe is wrong, options say what it already says, or there is no model.
    """
    models = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    if len(models) > 1:
        raise UserError(f"{models[1]!r}: one MODEL is enough")
    args.model = models[0] if models else None
    if args.recipe is None:
        if changes:
            raise UserError(f"{changes[0]!r}: changes a recipe, but there is none (give --recipe NAME)")
        if args.model is None:
            raise UserError("MODEL: required, but missing (or --recipe NAME)")
        return None
    from unveil.cli.recipes import find_recipe
    from unveil.recipe import build, load
    from unveil.samplers.decoding import DecodeRecipe

    for field, option in OPTIONS.items():
        if getattr(args, option.removeprefix("--").replace("-", "_")) is not None:
            raise UserError(f"{option}: the recipe gives the sampler (write sampler.{field}=VALUE)")
    path = find_recipe(args.recipe)
    data = load(path, changes)
    for key, command in (("policy", "train"), ("data", "pretrain")):
        if key in data:
            raise UserError(f"{path}: a recipe for `unveil {command}`, not for `unveil decode`")
    recipe = build(DecodeRecipe, data)
    args.model = args.model or recipe.model.path
    return recipe


def _prompts(args: argparse.Namespace, recipe: DecodeRecipe | None) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    if args.prompts is None and recipe is not None and recipe.prompts:
        return recipe.prompts
    if args.prompts is None:
        if sys.stdin.isatty():
            raise UserError("--prompt: required, but missing (or --prompts FILE, or lines on stdin)")
        try:
            return _plain_lines(sys.stdin.read(), "stdin")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: not text in {sys.stdin.encoding.upper()}") from error
    from unveil.tasks.files import read_json_lines

    path = Path(args.prompts)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if path.suffix == ".jsonl" or text.startswith("{"):
        return [row["prompt"] for _, row in read_json_lines(path, ["prompt"])]
    return _plain_lines(text, str(path))


def _plain_lines(text: str, source: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.rstrip().split("\n")]
    if not text.strip():
        raise UserError(f"{source}: no prompts")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{source}:{number}: blank line (allowed only at the end)")
    return lines


def _warn_unknown(denoiser: MaskedDenoiser, ids: list[int], text: str, what: str) -> None:
    """Report words that the model does not know, for it cannot read them."""
    unknown = denoiser.tokenizer.unknown
    if unknown is not None and (count := ids.count(unknown)):
        print(
            f"unveil: warning: {what} has {count} word(s) that the model does not know: {text!r}",
            file=sys.stderr,
        )


def _template(denoiser: MaskedDenoiser, text: str) -> list[int]:
    """Ids of a response with holes."""
    if _MASK not in text:
        raise UserError(f"--infill: {text!r} has no {_MASK} to fill")
    ids: list[int] = []
    for place, part in enumerate(text.split(_MASK)):
        ids += [denoiser.spec.mask_id] if place else []
        ids += denoiser.tokenizer.encode(part) if part.strip() else []
    _warn_unknown(denoiser, ids, text, "--infill")
    return ids


def _length(args: argparse.Namespace, recipe: DecodeRecipe | None, denoiser: MaskedDenoiser, longest: int) -> int:
    from unveil.cli.models import trained_length

    if args.length is not None:
        return args.length
    if recipe is not None:
        return recipe.response_length
    if denoiser.spec.canvas_length is not None:
        return denoiser.spec.canvas_length
    # At least 1, so that a prompt as long as the canvas gets the canvas's own message.
    room = max(1, denoiser.spec.context_length - longest)
    return min(room, trained_length(args.model) or _LONGEST)


def _sampler(args: argparse.Namespace, recipe: DecodeRecipe | None, length: int, denoiser: MaskedDenoiser) -> Sampler:
    from unveil.cli.decoders import plugin, rule, sampler
    from unveil.samplers.caches import Cache
    from unveil.samplers.schedules import Schedule
    from unveil.samplers.solvers import Solver
    from unveil.samplers.transforms import Transform

    if recipe is not None:
        recipe.sampler.check_fits(length)
        return recipe.sampler
    usual = "entropy_bound" if denoiser.spec.corruption == "uniform" else "lcr"
    canvas = denoiser.spec.canvas_length
    if canvas is not None and length % canvas:
        raise UserError(f"--length: should be a multiple of the model's canvas_length ({canvas}), got {length}")
    settings = {
        "steps": args.steps,
        "block_length": args.block,
        "rule": rule(args.rule or usual, "--rule"),
        "schedule": None if args.schedule is None else plugin(args.schedule, "--schedule", Schedule),
        "transform": None if args.transform is None else plugin(args.transform, "--transform", Transform),
        "solver": None if args.solver is None else plugin(args.solver, "--solver", Solver),
        "cache": None if args.cache is None else plugin(args.cache, "--cache", Cache),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "rank_by": args.rank_by,
        "stop_at_end": args.stop_at_end,
    }
    return sampler(settings, length, OPTIONS)


def _show(
    args: argparse.Namespace, denoiser: MaskedDenoiser, trajectory: TokenTrajectory, row: int, prompt: str
) -> None:
    """Print the canvas after every step of one chain."""
    from unveil.tasks.medium import medium_of

    out = console(args)
    out.print(f"prompt: {one_line(prompt)}")
    width = int(trajectory.response_valid[row].sum())
    first = trajectory.states[row, 0, :width].tolist() if trajectory.states is not None and trajectory.steps else []
    before = denoiser.tokenizer.tokens(first)
    for number, step in enumerate(medium_of(denoiser).steps(denoiser, trajectory, row), start=1):
        out.print(_step_line(number, step, before, styled=out.is_terminal))
        before = [old if token is None else token for token, old in zip(step["tokens"], before, strict=True)]


def _step_line(number: int, step: dict[str, Any], before: list[str], *, styled: bool) -> Text:
    """One step; where there are no colours, ``[new]`` and ``~taken back~`` stand for them."""
    from rich.text import Text

    line = Text(f"step {number:3d}  ")
    for place, token in enumerate(step["tokens"]):
        if place in step["taken_back"]:
            line.append(before[place] if styled else f"~{before[place]}~", style="red strike")
        elif token is None:
            line.append("·", style="dim")
        elif place in step["revealed"]:
            line.append(token if styled else f"[{token}]", style="bold green")
        else:
            line.append(token)
        line.append(" ")
    line.rstrip()
    return line

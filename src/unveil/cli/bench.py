"""`unveil bench`: speed and memory as ratios."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from unveil.cli.output import console
from unveil.registry import UserError, did_you_mean

if TYPE_CHECKING:
    from unveil.denoisers.base import MaskedDenoiser

SUMMARY = "measure speed and memory against reference loops, as ratios in one run"


OPTIONS = ("repeats", "batch", "size", "vocabulary", "device", "dtype")
"""Those that a bench may take; each has a default of its own for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what to measure: decode, image or rollout")
    parser.add_argument("--model", metavar="MODEL", help="the network (default: a random one)")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of all sides (default: decode 1, else 7)")
    parser.add_argument("--batch", type=int, metavar="N", help="decode: prompts (default: 8)")
    parser.add_argument("--size", metavar="NAME", help="decode: of the random network, small or 8b (default: small)")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="decode: of the random network (default: 126464)")
    parser.add_argument("--device", metavar="NAME", help="decode: cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="decode: of the weights (default: fp32)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil import bench
    from unveil.cli.models import set_threads

    known = [module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_")]
    if args.name not in known:
        raise UserError(f"no bench is called {args.name!r}{did_you_mean(args.name, known)}")
    module = importlib.import_module(f"unveil.bench.{args.name}")
    given = {key: value for key in OPTIONS if (value := getattr(args, key)) is not None}
    taken = inspect.signature(module.run).parameters
    for key, value in given.items():
        if key not in taken:
            raise UserError(f"--{key}: not an option of the bench {args.name!r}")
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{key}: should be at least 1, got {value}")
    set_threads()
    if args.model is not None and "model" not in taken:
        raise UserError(f"--model: the bench {args.name!r} has networks of its own")
    if "device" in taken:
        given["device"] = _device(args.device)
    if args.model is not None:
        for key in ("size", "vocabulary"):
            if key in given:
                raise UserError(f"--{key}: of the random network; leave it or --model out")
        given["model"] = _model(args.model, given.pop("device", None), given.pop("dtype", "fp32"))
    result: dict[str, Any] = module.run(**given)
    console(args).print(module.render(result))
    return int(not result["holds"]), result


def _device(name: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not there):
        raise UserError(f"--device: {name!r} is not there (allowed: {'cpu, cuda' if there else 'cpu'})")
    return name or ("cuda" if there else "cpu")


def _model(name: str, device: str | None, dtype: str) -> MaskedDenoiser:
    from unveil.cli.models import open_model

    model = open_model(name, dtype=dtype)
    return model if device is None else model.to(device)

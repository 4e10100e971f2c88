"""Decode requests of all kinds: every model, every rule, hostile prompts, and options that do not always fit.

A request is an ordinary command line. It may be refused, in one line; it may not crash, and a prompt may not become a
control token, nor a control token an answer.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import published
from unveil.denoisers.load import load_denoiser
from unveil.registry import names
from unveil.samplers.rules import Rule
from unveil.samplers.schedules import Schedule
from unveil.systems.unmasking_policies import ConfidencePolicy
from unveil.training.runs import attach_unmask

TOYS = ("llada", "dream", "sedd", "mdlm", "diffusion_gemma")
EMBEDDED = ("countdown-base", "sudoku-base", "sudoku-sedd")
WORDS = {
    "policy": ["6 9 9 -> 27", "1 1 1 -> 3"],
    "countdown-base": ["6 9 9 -> 27", "3 4 5 -> 12", "1 1 1", "->", "20 20 20 -> 99"],
    "sudoku-base": ["2 0 1 0 0 0 2 4 4 0 0 1 1 3 0 0", "0 0 0 0", "1 2 3 4 " * 4],
    "sudoku-sedd": ["2 0 1 0 0 0 2 4 4 0 0 1 1 3 0 0", "4"],
}
CONTROLS = [
    "<mask>", "<pad>", "<end>", "<unk>", "<|mdm_mask|>", "<|mask|>", "<|endoftext|>", "<|eot_id|>", "<|startoftext|>",
    "<|start_header_id|>", "<|end_header_id|>", "[MASK]", "[CLS]", "[SEP]", "</s>", "<s>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
MARKERS = [
    "PROMPT0", "{{ messages }}", "{% for message in messages %}", "{question}", "{numbers} -> {target}", "%s %d",
    "${a.b}",
    "<|start_header_id|>assistant<|end_header_id|>\n\n", "key=value", "--json", "[red]bold[/red]", "\\boxed{1}",
]  # fmt: skip
STRANGE = [
    "", " ", "\t", "\n", "\r\n", "\x00", "a\x00b", "\x1b[31mred", "\x07\x08\x7f", "\u202eright to left", "\ufeff",
    "\ufffd", "\U0001f600" * 20, "e\u0301" * 30, "\u0627\u0644\u0639\u0631\u0628",
    "\u4f60\u597d" * 40, "\u200b\u200d\u2060", "\ud800",
    "abc\udcffdef", "\udfff\ud800", "\U0010ffff", "a" * 400, "9 " * 300, "\u2028\u2029",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line, and what is to be known of its prompts."""

    words: list[str]
    prompts: list[str]


def write_models(root: Path) -> dict[str, str]:
    """Path of every model by its name."""
    for name in TOYS:
        if name == "diffusion_gemma":
            published.write_diffusion_gemma(root / name)
        else:
            published.write(root / name, name)
    learned = load_denoiser("countdown-base")
    attach_unmask(learned, ConfidencePolicy(dim=8, hidden=16, bias=-1.0), seed=0)
    learned.save_pretrained(root / "policy")
    made = {name: str(root / name) for name in (*TOYS, "policy")}
    return made | {name: name for name in EMBEDDED}


def text(rng: random.Random, model: str) -> str:
    """A prompt: what the model knows, what it does not, or what nobody should write."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(WORDS.get(model, ["abc 12 + 3", "hello there", "1 2 3"]))
    if kind < 0.5:
        return rng.choice([*CONTROLS, *MARKERS])
    if kind < 0.7:
        return rng.choice(STRANGE)
    if kind < 0.85:  # controls between ordinary words, with and without spaces
        parts = [rng.choice([*CONTROLS, *MARKERS, *STRANGE, "12", "a b", "->"]) for _ in range(rng.randint(2, 6))]
        return rng.choice(["", " ", "\n"]).join(parts)
    return "".join(chr(rng.choice([rng.randint(0, 127), rng.randint(0, 0x10FFFF)])) for _ in range(rng.randint(1, 40)))


def requests(count: int, models: dict[str, str], seed: int = 0) -> Iterator[Request]:
    """``count`` requests, the same for the same arguments."""
    rng = random.Random(f"requests/{seed}")
    rules = [*names(Rule), "reverse", "entropy_bound", "ancestral", "lcr:nothing=1", "no such rule"]
    schedules = names(Schedule)
    for _ in range(count):
        model = rng.choice([*models])
        words, prompts = ["decode", models[model]], [text(rng, model) for _ in range(rng.randint(1, 3))]
        for prompt in prompts:
            words.append(f"--prompt={prompt}")
        uniform, scores = model == "diffusion_gemma", model in ("sedd", "sudoku-sedd")
        usual = [*names(Rule), "reverse"]
        if model != "policy":
            usual.remove("policy")
        usual = ["entropy_bound", "ancestral"] if uniform else ["reverse"] if scores else usual
        rule = rng.choice(usual if rng.random() < 0.9 else rules)
        words.append(f"--rule={rule}")
        if rng.random() < 0.15:
            pieces = ["<mask>"] * 30 + ["1", "+", "a", *CONTROLS, *STRANGE]
            parts = [rng.choice(pieces) for _ in range(rng.randint(1, 8))]
            words.append("--infill=" + " ".join(parts))
        elif rng.random() < 0.9:
            fitting = rng.choice([8, 16, 24]) if uniform else rng.randint(1, 24)
            words.append(f"--length={rng.choice([0, -3, 10**6]) if rng.random() < 0.03 else fitting}")
        plain = rule in names(Rule)
        if rng.random() < 0.6:
            words.append(f"--steps={rng.choice([0] + [1, 2, 4, 6, 8] * 4)}")
        for chance, option in (
            (0.2, f"--block={rng.choice([1, 2, 4, 8, 100])}"),
            (0.2, f"--schedule={rng.choice(schedules)}"),
            (0.1, "--transform=eoser"),
            (0.1, f"--solver={rng.choice(['extrapolation', 'predictor_corrector'])}"),
            (0.1, f"--top-p={rng.choice([0.1, 0.9, 1.0, 1.5])}"),
            (0.1, f"--top-k={rng.choice([1, 3, 1000, 0])}"),
            (0.1, "--stop-at-end"),
            (0.1, f"--rank-by={rng.choice(['model', 'sampling', 'nothing'])}"),
        ):
            if rng.random() < (chance if plain else chance / 5):
                words.append(option)
        if rng.random() < 0.6:
            words.append(f"--temperature={rng.choice([0.3, 1.0, 2.0] * 8 + [0.0, -1.0, float('inf')])}")
        if rng.random() < 0.3:
            words.append(f"--samples={rng.choice([2, 3] * 5 + [0])}")
        if rng.random() < 0.3 and model in ("llada", "diffusion_gemma"):
            words.append("--chat")
        if rng.random() < 0.1:
            words.append("--show")
        words.append(f"--seed={rng.randint(0, 10**6)}")
        yield Request(words=words, prompts=prompts)


def resident() -> int:
    """Bytes of memory that this process holds."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("memory is read from /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

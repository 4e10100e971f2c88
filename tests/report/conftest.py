"""A synthetic run folder that looks like a real one: Countdown with written-out steps, two decoders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

HOSTILE = '</script><img src=x onerror="window.hacked = 1"><!-- {{data}}'
RECIPE = """system:
  name: mdpo          # per-step advantages on the trajectory itself
  trained_steps: 4
sampler:
  steps: 8
  rule:
    name: lcr
training:
  updates: 400
  learning_rate: 1.0e-4
"""
DECODERS = ("lcr", "rcr")
EVALS = range(0, 401, 50)
STEPS = 8
PROBLEMS = {
    "c-004": ("12 7 3 -> 57", "12 + 7 = 19 , 19 * 3 = 57"),
    "c-011": ("25 4 6 -> 94", "25 * 4 = 100 , 100 - 6 = 94"),
    "c-017": ("9 8 14 -> 58", "9 * 8 = 72 , 72 - 14 = 58"),
    "c-023": ("31 17 2 -> 28", "31 - 17 = 14 , 14 * 2 = 28"),
    "c-030": ("6 6 5 -> 41", "6 * 6 = 36 , 36 + 5 = 41"),
    "c-042": ("40 8 3 -> 15", "40 / 8 = 5 , 5 * 3 = 15"),
}

Line = dict[str, Any]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train_line(step: int, rng: random.Random) -> Line:
    learned = 1 / (1 + math.exp(-(step - 140) / 60))
    reward = 0.31 + 0.4 * learned + rng.gauss(0, 0.05)
    rise = [0.16 + (0.34 + 0.3 * learned) * (1 - math.exp(-(s + 1) / 2.2)) for s in range(STEPS)]
    fall = [0.0] * (STEPS - 3) + [0.02, 0.05, 0.085]
    return {
        "kind": "train",
        "step": step,
        "seconds": 0.9 * step,
        "reward": reward,
        "accuracy": min(1.0, max(0.0, reward - 0.06 + rng.gauss(0, 0.02))),
        "score": reward + 0.08,
        "zero_variance_groups": min(1.0, max(0.0, 0.2 + 0.5 * learned + rng.gauss(0, 0.08))),
        "group_reward_std": 0.34 - 0.16 * learned + rng.gauss(0, 0.02),
        "over_denoising": max(0.0, 0.12 - 0.08 * learned + rng.gauss(0, 0.015)),
        "guess_accuracy": [
            min(1.0, max(0.0, up - (1.1 - learned) * down + rng.gauss(0, 0.02)))
            for up, down in zip(rise, fall, strict=True)
        ],
        "loss": -0.02 + rng.gauss(0, 0.01),
        "kl": 0.04 * learned * step / 400 + abs(rng.gauss(0, 0.002)),
        "ratio_mean": 1 + rng.gauss(0, 0.002),
        "ratio_std": 0.04 + abs(rng.gauss(0, 0.01)),
        "clip_low": max(0.0, 0.01 + rng.gauss(0, 0.004)),
        "clip_high": max(0.0, 0.016 + rng.gauss(0, 0.005)),
        "grad_norm": 0.6 + abs(rng.gauss(0, 0.2)) + (3.2 if step == 233 else 0),
        "entropy": 1.4 - 0.7 * learned + rng.gauss(0, 0.03),
        "lr": 1e-4 * min(1.0, step / 20),
        "forwards": 2048 * step,
        "tokens_per_second": 5200 + rng.gauss(0, 150),
    }


def eval_line(step: int, decoder: str, count: int = 512) -> Line:
    learned = 1 / (1 + math.exp(-(step - 140) / 60))
    accuracy = {"lcr": 0.412, "rcr": 0.463}[decoder] + {"lcr": 0.24, "rcr": 0.218}[decoder] * learned
    spread = 1.96 * math.sqrt(accuracy * (1 - accuracy) / count)
    over = {"lcr": 0.118, "rcr": 0.074}[decoder] * (1.1 - 0.7 * learned)
    return {
        "kind": "eval",
        "step": step,
        "decoder": decoder,
        "accuracy": accuracy,
        "low": accuracy - spread,
        "high": accuracy + spread,
        "over_denoising": over,
        "score": accuracy + 0.1,
        "problems": count,
    }


def trajectory(step: int, decoder: str, problem: str, seed: int) -> Line:
    """A small decoder at work: guesses improve as places are revealed; rcr re-masks the least sure ones."""
    prompt, solution = PROBLEMS[problem]
    target, rng = solution.split(), random.Random(seed)
    canvas: list[str | None] = [None] * len(target)
    sure = [0.0] * len(target)
    steps = []
    for index in range(STEPS):
        known = sum(a == b for a, b in zip(canvas, target, strict=True)) / len(target)
        skill = (0.62 if step == 0 else 0.8) + 0.38 * known
        guess, confidence = list(canvas), [None] * len(target)
        for place, token in enumerate(canvas):
            if token is None:
                right = rng.random() < skill or not target[place].isdigit()
                slip = rng.choice([-9, -1, 1, 2, 10])
                guess[place] = target[place] if right else str(int(target[place]) + slip)
                confidence[place] = rng.betavariate(6, 1.5) if right else rng.betavariate(2.5, 3)
        before = list(canvas)
        scores = [kept if new is None else new for new, kept in zip(confidence, sure, strict=True)]
        order = sorted(range(len(target)), key=lambda place: -scores[place])
        keep = len(target) * (index + 1) // STEPS
        if decoder == "rcr":
            chosen = set(order[:keep])
            canvas = [guess[place] if place in chosen else None for place in range(len(target))]
            sure = scores
        else:
            masked = [place for place in order if canvas[place] is None]
            for place in masked[: keep - len(target) + len(masked)]:
                canvas[place], sure[place] = guess[place], scores[place]
        right = sum(a == b for a, b in zip(guess, target, strict=True)) / len(target)
        steps.append(
            {
                "tokens": list(canvas),
                "guess": guess,
                "confidence": confidence,
                "revealed": [p for p, old in enumerate(before) if old is None and canvas[p] is not None],
                "taken_back": [p for p, old in enumerate(before) if old is not None and canvas[p] is None],
                "text": " ".join(str(token) for token in guess),
                "correct": guess == target,
                "score": 1.0 if guess == target else 0.6 * right,
            }
        )
    head = {"step": step, "decoder": decoder, "problem": problem, "prompt": prompt, "reference": solution}
    return {**head, "steps": steps}


def scripted_trajectory() -> Line:
    """Three steps, with hostile strings: right at step 2, where place 1 is taken back, wrong at the end."""

    def step(tokens: list[str | None], guess: list[str], new: list[int], taken: list[int], ok: bool) -> Line:
        confidence = [0.25 if token is None else 0.9 for token in tokens]
        line: Line = {"tokens": tokens, "guess": guess, "confidence": confidence, "text": " ".join(guess)}
        line |= {"revealed": new, "taken_back": taken, "correct": ok, "score": 1.0 if ok else 0.5}
        return line

    return {
        "step": 0,
        "decoder": "rcr",
        "problem": "hostile",
        "prompt": HOSTILE,
        "reference": None,
        "steps": [
            step([None, "7", None], ["1", "7", HOSTILE], [1], [], False),
            step(["1", None, None], ["1", "2", "3"], [0], [1], True),
            step(["1", "2", HOSTILE], ["1", "2", HOSTILE], [1, 2], [], False),
        ],
    }


def write_run(folder: Path) -> Path:
    """Writes the whole run folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    train = [train_line(step, rng) for step in range(1, 401)]
    evals = [eval_line(step, decoder) for step in EVALS for decoder in DECODERS]
    write_lines(folder / "metrics.jsonl", sorted(train + evals, key=lambda line: line["step"]))
    cost = {"optimizer_steps": 400, "rollouts": 51200, "forwards": 819200, "samples": 51200}
    info = {
        "system": "mdpo",
        "command": "unveil train mdpo training.updates=400 sampler.steps=8",
        "status": "finished",
        "seed": 0,
        "started": "2025-11-24T09:14:03+00:00",
        "versions": {"unveil": "0.1.0", "torch": "2.8.0", "python": "3.11.9"},
        "cost": {**cost, "seconds": 4371.2},
    }
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    ends = [[eval_line(step, decoder) for decoder in DECODERS] for step in (0, 400)]
    table: Line = {"rows": ["base", "tuned"], "columns": list(DECODERS), "problems": 512}
    table |= {key: [[line[key] for line in row] for row in ends] for key in ("accuracy", "low", "high")}
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
    trajectories = [
        trajectory(step, decoder, problem, seed=89 * number + step)
        for number, problem in enumerate(PROBLEMS)
        for step in (0, 400)
        for decoder in DECODERS
    ]
    write_lines(folder / "trajectories.jsonl", [*trajectories, scripted_trajectory()])
    samples = [
        {
            "step": step,
            "problem": problem,
            "prompt": prompt,
            "completion": solution if rng.random() < 0.35 + step / 800 else solution[:-2] + "61",
            "decoder": decoder,
        }
        for step in (0, 200, 400)
        for decoder in DECODERS
        for problem, (prompt, solution) in PROBLEMS.items()
    ]
    for sample in samples:
        right = sample["completion"] == PROBLEMS[sample["problem"]][1]
        sample |= {"correct": right, "score": 1.0 if right else 0.55}
    hostile = {"step": 0, "problem": "hostile", "prompt": HOSTILE, "completion": HOSTILE, "decoder": "lcr"}
    write_lines(folder / "samples.jsonl", [*samples, {**hostile, "correct": False, "score": 0.0}])
    return folder


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "countdown-mdpo-0")


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "countdown-mdpo-0")

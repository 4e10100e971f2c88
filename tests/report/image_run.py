"""A synthetic run folder on images: noise becomes a bar at the place that the prompt names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.rewards.images import data_url

Line = dict[str, Any]
UPDATES = range(0, 41, 5)
STEPS = 6
PROMPTS = [str(number) for number in range(8)]


def bar(place: int, strength: float, seed: int) -> Tensor:
    noise = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed))
    image = torch.zeros(1, 8, 8)
    image[:, :, place] = 1
    return strength * image + (1 - strength) * noise


def learned(step: int) -> float:
    return 1 / (1 + math.exp(-(step - 15) / 4))


def trajectory(step: int, prompt: str) -> Line:
    place = int(prompt)
    steps = []
    for number in range(STEPS):
        done = (number + 1) / STEPS
        right = step > 10 or (place + number) % 3 == 0
        guess = bar(place if right else (place + 1) % 8, 0.4 + 0.6 * done, place)
        steps.append(
            {
                "image": data_url(bar(place, done * (0.5 + 0.5 * learned(step)), place)),
                "guess_image": data_url(guess),
                "time": round(1 - done, 4),
                "noisy": number < STEPS - 1,
                "correct": right,
                "score": 0.9 if right else 0.2,
            }
        )
    head = {"step": step, "decoder": "ode", "problem": f"bars-test-{prompt}", "prompt": prompt, "reference": None}
    return {**head, "steps": steps}


def write_image_run(folder: Path, *, gamed: bool = True) -> Path:
    """Writes the run folder and returns it; ``gamed``: samples leave the data while the reward rises."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for step in range(41):
        skill, drift = learned(step), learned(step) if gamed else 0.0
        if step:
            spread = [0.001 * (1 + number) ** 1.5 * skill for number in range(STEPS)]
            line: Line = {"kind": "train", "step": step, "reward": 0.45 + 0.5 * skill, "score": 0.45 + 0.4 * skill}
            line |= {"accuracy": 0.44 + 0.5 * skill, "loss": 0.01, "ratio_mean": 1.0, "ratio_deviation": spread[-1]}
            line |= {"clip_low": 0.1 * skill, "clip_high": 0.2 * skill, "grad_norm": 0.2, "reward/near": 1.1 + drift}
            line |= {"steps/ratio_deviation": [*spread[:-1], None], "steps/clip_high": [2 * value for value in spread]}
            lines.append(line)
        if step in UPDATES:
            accuracy = 0.44 + 0.5 * skill
            line = {"kind": "eval", "step": step, "decoder": "ode", "accuracy": accuracy, "low": accuracy - 0.04}
            line |= {"high": accuracy + 0.04, "score": accuracy, "problems": 500, "reward": 0.45 + 0.5 * skill}
            line |= {"measure/distance": 1.13 + 0.8 * drift, "measure/diversity": 2.1 - 1.2 * drift}
            lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [
        {
            "step": step,
            "decoder": "ode",
            "problem": f"bars-test-{prompt}",
            "prompt": prompt,
            "image": data_url(bar(int(prompt), 0.3 + 0.7 * learned(step), int(prompt))),
            "correct": step > 3 * int(prompt),
            "score": 0.5,
        }
        for step in UPDATES
        for prompt in PROMPTS
    ]
    chains = [trajectory(step, prompt) for step in (0, 20, 40) for prompt in PROMPTS]
    for name, records in (("samples", samples), ("trajectories", chains)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    info = {"system": "flow_grpo", "status": "finished", "seed": 0, "command": "unveil train flow_grpo"}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder

"""Real but tiny objects for the tests of continuous samples: a denoiser of 2 x 4 x 4 latents, a task, jobs on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import MeanSpace
from unveil.learning.selectors import AllSteps
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction
from unveil.processes.kernels import FlowSde
from unveil.rewards.base import Shaped
from unveil.samplers.latent import LatentSampler
from unveil.seeds import generator
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.lora import Adapter
from unveil.training.policy_config import PolicyConfig, PolicyEval, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

SHAPE = (2, 4, 4)
DIM = 32


class Mlp(ContinuousDenoiser):
    """Two layers over latent, time and prompt ("a", "b" or ""). Its images are the first channel."""

    def __init__(self, process: GaussianProcess | None = None, prediction: Prediction = "u", seed: int = 0) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=SHAPE, process=process or Flow(), prediction=prediction)
        self.prompt = torch.nn.Embedding(3, 8)
        self.inner = torch.nn.Linear(DIM + 8 + 2, 24)
        self.outer = torch.nn.Linear(24, DIM)
        stream = generator(seed, "tiny images")
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=stream)

    def condition(self, prompts: Any) -> Condition:
        return Condition({"ids": torch.tensor([["", "a", "b"].index(prompt) for prompt in prompts])})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        scaled = self.spec.process.scaled(x, t).flatten(1)
        time = t.to(x)[:, None]
        told = [scaled, self.prompt(condition["ids"]), time, time.square()]
        hidden = torch.tanh(self.inner(torch.cat(told, 1)))
        return self.outer(hidden).view(-1, *SHAPE) + 0.3 * x

    def encode(self, images: Tensor) -> Tensor:
        return (2 * images - 1).repeat(1, 2, 1, 1)

    def decode(self, x_0: Tensor) -> Tensor:
        return torch.sigmoid(x_0[:, :1])

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.own_state(), Path(folder) / "weights.pt")


@dataclass(kw_only=True)
class Bright(Task, name="tiny_bright"):
    """Images of "a" should be bright, those of "b" dark."""

    medium = "image"

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [
            Problem(id=f"{split}-{seed}-{number}", prompt="ab"[number % 2], answer={"sign": 1 - 2 * (number % 2)})
            for number in range(count)
        ]

    def check(self, problem: Problem, completion: Tensor) -> Verdict:
        light = float(completion.mean())
        score = light if problem.answer["sign"] > 0 else 1 - light
        return Verdict(correct=score > 0.5, score=score, metrics={"light": light})


def sampler(**changes: Any) -> LatentSampler:
    settings: dict[str, Any] = {"steps": 5, "kernel": FlowSde(noise=0.7)} | changes
    return LatentSampler(**settings)


def policy(**changes: Any) -> PolicyConfig:
    """A change of ``rollout`` is a dictionary."""
    rollout: dict[str, Any] = {"sampler": sampler(), "prompts": 2, "group_size": 4} | changes.pop("rollout", {})
    settings: dict[str, Any] = {
        "task": Bright(), "reward": Shaped(), "rollout": RolloutConfig(**rollout), "selector": AllSteps(),
        "likelihood": TransitionLikelihood(),
    }  # fmt: skip
    return PolicyConfig(**(settings | changes))


def job(
    folder: Path,
    config: PolicyConfig,
    net: Mlp | None = None,
    *,
    optim: OptimConfig | None = None,
    snapshots: SnapshotConfig | None = None,
    adapter: Adapter | None = None,
    updates: int = 6,
    **checkpoints: int,
) -> PolicyJob:
    trainer = Trainer(
        net or Mlp(),
        optim or OptimConfig(lr=1e-2, max_grad_norm=1e9),
        CheckpointConfig(**checkpoints),
        snapshots or SnapshotConfig(),
        updates=updates,
        eval_every=10**6,
        run=folder,
        ranks=Ranks(),
        adapter=adapter,
        keep_reference=config.keeps_reference,
    )
    evaluation = PolicyEval(every=10**6, problems=4, decoders={})
    return PolicyJob(trainer, config, evaluation, RunLog(folder, LogConfig(tensorboard=False)), seed=3)


def learned(folder: Path, sampler: LatentSampler, choices: Any, updates: int = 25) -> float:
    """How far the mean reward rises from the first update to the last, without KL and with a clip range for so few
    dimensions."""
    own = vars(choices) | {"kl": MeanSpace()}
    if isinstance(choices.objective, Clipped):
        own["objective"] = Clipped(clip=0.02, level="step")
    rollout = RolloutConfig(sampler=sampler, prompts=4, group_size=16)
    config = PolicyConfig(task=Bright(), reward=Shaped(), rollout=rollout, **own)
    policy_job = job(folder, config, optim=OptimConfig(lr=2e-2, max_grad_norm=1.0, microbatch=512))
    rewards = [policy_job.update(update, policy_job.trainer.optimise)["reward"] for update in range(updates)]
    return rewards[-1] - rewards[0]

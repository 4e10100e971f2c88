"""An update by the general job and by a plain loop, on copies of one network: one class per method."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unveil.bench._diffusion_nft import PlainNft
from unveil.bench._flow_grpo import Plain
from unveil.denoisers.image import Classes, ImageDenoiser, ImageModel, ImageNetwork
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped, StepMean
from unveil.learning.regularisers import Velocity
from unveil.learning.selectors import ButLast
from unveil.processes.kernels import FlowSde
from unveil.rewards.base import Shaped
from unveil.samplers.latent import LatentSampler
from unveil.seeds import generator
from unveil.systems.diffusion_nft import DiffusionNft, ImplicitLikelihood, Optimality, old_schedule
from unveil.tasks.base import Problem, Split, Verdict
from unveil.tasks.images import ImageTask
from unveil.training.distribution import Ranks
from unveil.training.gradient_steps import Batch
from unveil.training.log import LogConfig, RunLog
from unveil.training.policy_config import PolicyConfig, PolicyEval, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

PROMPTS = ("a", "b", "c", "d")
LR = 1e-4


@dataclass(kw_only=True)
class Brightness(ImageTask):
    """As many problems as prompts; a sample's score is its mean brightness."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [Problem(id=f"{split}-{n}", prompt=PROMPTS[n % len(PROMPTS)], answer={}) for n in range(count)]

    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        scores = torch.stack(list(samples)).flatten(1).mean(1).tolist()
        return [Verdict(correct=False, score=score) for score in scores]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between the two sides after one update on the same chains.

    Attributes:
        gradient: norm of the difference of the (clipped) gradients over the norm of the loop's.
        weights: largest difference of a weight, in learning rates: AdamW's first step moves every weight by about one.
    """

    gradient: float
    weights: float

    @property
    def none(self) -> bool:
        """True if the two are one update, but for rounding."""
        return self.gradient < 1e-4 and self.weights < 0.05


class Sides:
    """The job and the plain loop of a method, on copies of one network.

    Args:
        steps: of a chain.
        group: chains per prompt.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    snapshots: ClassVar[SnapshotConfig] = SnapshotConfig()

    def __init__(self, network: ImageNetwork, shape: tuple[int, int, int], steps: int, group: int, seed: int) -> None:
        denoiser = ImageDenoiser(ImageModel(shape=shape, prompts=Classes(names=PROMPTS), network=network))
        denoiser.initialise(generator(seed, "bench image"))
        _shift(denoiser, generator(seed, "alive"))  # a new network says 0, and its gradient reaches the last layer only
        self.steps, self.group, self.count = steps, group, len(PROMPTS) * group
        self.folder = tempfile.TemporaryDirectory()
        optim = OptimConfig(lr=LR, betas=(0.9, 0.999), microbatch=self.count)
        self.trainer = Trainer(
            denoiser, optim, CheckpointConfig(), self.snapshots, updates=10**6, eval_every=10**6,
            run=Path(self.folder.name), ranks=Ranks(),
        )  # fmt: skip
        policy = self.policy(RolloutConfig(
            sampler=self.sampler(), prompts=len(PROMPTS), group_size=group, batch_size=self.count,
            drawn_by="policy" if self.snapshots.old is None else "old",
        ))  # fmt: skip
        evaluation = PolicyEval(every=10**6, problems=1, decoders={})
        log = RunLog(Path(self.folder.name), LogConfig(tensorboard=False))
        self.job = PolicyJob(self.trainer, policy, evaluation, log, seed=seed)
        old = copy.deepcopy(denoiser).network
        if self.snapshots.old is not None:
            _shift(denoiser, generator(seed, "ahead"))  # at the first update the policy is the old one otherwise
        self.denoiser, self.other = denoiser, copy.deepcopy(denoiser)
        self.ids = self.other.condition([prompt for prompt in PROMPTS for _ in range(group)])["ids"]
        self.stream = generator(seed, "plain")
        optimizer = torch.optim.AdamW(self.other.network.parameters(), lr=LR, weight_decay=0.0)
        self.plain = self.loop(network=self.other.network, old=old, optimizer=optimizer)
        self.done = 0

    def sampler(self) -> LatentSampler:
        raise NotImplementedError

    def policy(self, rollout: RolloutConfig) -> PolicyConfig:
        """The method's choices."""
        raise NotImplementedError

    def loop(self, network: nn.Module, old: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """The plain loop with the same settings."""
        raise NotImplementedError

    def reference(self) -> None:
        """One update of the plain loop on chains of its own."""
        raise NotImplementedError

    def repeat(self, chains: Any, views: Any) -> None:
        """One update of the plain loop on what the job drew."""
        raise NotImplementedError

    def kept(self) -> int:
        """Bytes that grow with the steps on purpose: what an update keeps from the rollout to the gradient step."""
        raise NotImplementedError

    def ours(self) -> None:
        self.job.update(self.done, self.trainer.optimise)
        self.done += 1
        self.trainer.snapshots.after_update(self.done)

    def difference(self) -> Difference:
        """After one update of the job, and of the plain loop on its chains."""
        drawn: list[Any] = []
        used: list[Batch] = []
        roll, batch = self.job._roll, self.job.steps.batch
        self.job._roll = _spied(roll, drawn)  # type: ignore[method-assign]
        self.job.steps.batch = _spied(batch, used)  # type: ignore[method-assign]
        self.ours()
        self.job._roll, self.job.steps.batch = roll, batch  # type: ignore[method-assign]
        self.repeat(drawn[0].trajectory, used[0].views)
        pairs = list(zip(self.denoiser.network.parameters(), self.other.network.parameters(), strict=True))
        gradients = [(one.grad, other.grad) for one, other in pairs if one.grad is not None and other.grad is not None]
        assert len(gradients) == len(pairs)
        apart = torch.stack([(one - other).norm() for one, other in gradients]).norm()
        whole = torch.stack([other.norm() for _, other in gradients]).norm()
        weights = max((one - other).abs().max().item() for one, other in [*pairs, *self.copies()]) / LR
        return Difference(gradient=float(apart / whole), weights=weights)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of further weights that must be equal after an update."""
        return []

    def rewards(self, latents: Tensor) -> Tensor:
        return self.denoiser.decode(latents).flatten(1).mean(1)

    def noise(self) -> Tensor:
        return torch.randn(self.count, *self.denoiser.spec.shape, generator=self.stream)

    def bytes_of(self, states: int) -> int:
        """So many float32 states of every chain."""
        return 4 * self.count * states * math.prod(self.denoiser.spec.shape)


class FlowGrpoSides(Sides):
    """Chains with noise, ratios over all steps but the last."""

    method = "flow_grpo"
    title = "Flow-GRPO"
    level, clip = 0.7, 1e-4
    plain: Plain

    def sampler(self) -> LatentSampler:
        return LatentSampler(steps=self.steps, kernel=FlowSde(noise=self.level))

    def policy(self, rollout: RolloutConfig) -> PolicyConfig:
        return PolicyConfig(
            task=Brightness(), reward=Shaped(), selector=ButLast(), objective=Clipped(clip=self.clip, level="step"),
            likelihood=TransitionLikelihood(), weighting=StepMean(), rollout=rollout,
        )  # fmt: skip

    def loop(self, network: nn.Module, old: nn.Module, optimizer: torch.optim.Optimizer) -> Plain:
        return Plain(
            network=network, optimizer=optimizer, steps=self.steps, noise=self.level, clip=self.clip, group=self.group
        )

    def reference(self) -> None:
        latents, scores = self.plain.rollout(self.noise(), self.ids, self.stream)
        self.plain.update(latents, scores, self.ids, self.rewards(latents[-1]))

    def repeat(self, chains: Any, views: Any) -> None:
        latents, scores = chains.scored.transpose(0, 1), chains.log_prob.T / chains.samples[0].numel()
        self.plain.update(latents, scores.float(), chains.condition["ids"], self.rewards(latents[-1]))

    def kept(self) -> int:
        return self.bytes_of(self.steps + 1)


class DiffusionNftSides(Sides):
    """Images by the old policy's ODE, noised again at the times of the grid but the last; no reference penalty."""

    method = "diffusion_nft"
    title = "DiffusionNFT"
    snapshots = SnapshotConfig(old=old_schedule(1))
    beta, limit = 1.0, 5.0
    plain: PlainNft

    def sampler(self) -> LatentSampler:
        return LatentSampler(steps=self.steps)

    def policy(self, rollout: RolloutConfig) -> PolicyConfig:
        choices = DiffusionNft(
            likelihood=ImplicitLikelihood(beta=self.beta), weighting=Optimality(limit=self.limit), kl=Velocity(beta=0.0)
        )
        return PolicyConfig(task=Brightness(), reward=Shaped(), rollout=rollout, **vars(choices))

    def loop(self, network: nn.Module, old: nn.Module, optimizer: torch.optim.Optimizer) -> PlainNft:
        return PlainNft(
            network=network, old=old, optimizer=optimizer, steps=self.steps, beta=self.beta, limit=self.limit,
            group=self.group,
        )  # fmt: skip

    def reference(self) -> None:
        images = self.plain.rollout(self.noise(), self.ids)
        drawn = self.plain.draw(self.count, images.shape[1:], self.stream)
        self._update(images, self.ids, *drawn)

    def repeat(self, chains: Any, views: Any) -> None:
        times, noise = views.times.view(self.count, -1), views.noise.view(self.count, -1, *chains.samples.shape[1:])
        self._update(chains.samples, chains.condition["ids"], times.float(), noise)

    def _update(self, images: Tensor, ids: Tensor, times: Tensor, noise: Tensor) -> None:
        self.plain.update(images, ids, self.rewards(images), times, noise)
        self.plain.follow(self._decay())

    def _decay(self) -> float:
        assert self.snapshots.old is not None
        return self.snapshots.old.decay_at(max(1, self.done))

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        mine = self.trainer.snapshots.sets["old"].values.values()
        return list(zip(mine, self.plain.old.parameters(), strict=True))

    def kept(self) -> int:
        return self.bytes_of(self.steps - 1)  # what the old policy says of every noised copy


METHODS: tuple[type[Sides], ...] = (FlowGrpoSides, DiffusionNftSides)


@torch.no_grad()
def _shift(module: nn.Module, stream: torch.Generator) -> None:
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=stream))


def _spied(call: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """The same call, whose results are also put down."""

    def spied(*args: Any, **how: Any) -> Any:
        results.append(call(*args, **how))
        return results[-1]

    return spied

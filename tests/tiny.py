"""Real but tiny objects for the tests of training: a task, a denoiser of 4,000 weights, jobs and recipes on them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.score import ScoreConfig, ScoreDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.denoisers.uniform import UniformDenoiser
from unveil.denoisers.unmask import UnmaskInputs, UnmaskNetwork
from unveil.samplers.masked import MaskedSampler
from unveil.seeds import generator
from unveil.systems.diffu_grpo import DiffuGrpo
from unveil.systems.mdpo import Mdpo
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.training.checkpoints import list_checkpoints, load_state
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.lora import Adapter
from unveil.training.policy_config import PolicyConfig, PolicyEval, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import BaseModel, TrainRecipe, attach_unmask
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

Net = TypeVar("Net", bound=MaskedDenoiser)
WORDS = ["a", "b", "c", "d"]
RESPONSE = 5


@dataclass(kw_only=True)
class Echo(Task, name="tiny_echo"):
    """Prompts of 1 to 4 words; a response is right if it repeats the prompt's last word anywhere."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"{split}/{seed}")
        found: dict[str, Problem] = {}
        while len(found) < count:
            words = rng.choices(WORDS, k=rng.randint(1, 4))
            text = " ".join(words)
            solution = " ".join([words[-1]] * 2)
            found[text] = Problem(id=f"{split}-{text}", prompt=text, answer={"word": words[-1]}, solution=solution)
        return list(found.values())

    def check(self, problem: Problem, completion: str) -> Verdict:
        said = completion.split()
        correct = problem.answer["word"] in said
        return Verdict(correct=correct, score=1.0 if correct else len(said) / 100, metrics={"words": float(len(said))})


def denoiser(seed: int = 0, scale: float = 8.0) -> TransformerDenoiser:
    """Weights of std 0.16 instead of 0.02, so that distributions are far from uniform."""
    shape = TransformerConfig(dim=16, layers=1, heads=2, hidden=16, context_length=16)
    net = TransformerDenoiser(shape, TextTokenizer.of_words(WORDS))
    net.initialise(generator(seed, "tiny"))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return net.eval()


def score_denoiser(seed: int = 0, scale: float = 8.0) -> ScoreDenoiser:
    """The like of `denoiser` that is told the time and answers with log-scores."""
    shape = ScoreConfig(dim=16, layers=1, heads=2, hidden=16, context_length=16)
    net = ScoreDenoiser(shape, TextTokenizer.of_words(WORDS))
    net.initialise(generator(seed, "tiny score"))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return net.eval()


class Uniform(UniformDenoiser, TransformerDenoiser):
    """The like of `denoiser` whose noise is random tokens. It is not told the time: any network may guess x_0."""

    def __init__(self, config: TransformerConfig, tokenizer: TextTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.spec = replace(self.spec, corruption="uniform")


def uniform_denoiser(seed: int = 0, scale: float = 8.0) -> Uniform:
    net = denoiser(seed, scale)
    own = Uniform(net.config, net.tokenizer)
    own.load_state_dict(net.state_dict())
    return own.eval()


def shifted(net: TransformerDenoiser, seed: int = 1, by: float = 0.1) -> TransformerDenoiser:
    """The same network after Gaussian steps of its weights, in place."""
    stream = generator(seed, "shift")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=stream))
    return net


@dataclass(kw_only=True)
class TinyUnmask(UnmaskNetwork, name="tiny_unmask"):
    """A linear map of what an unmasking policy is told; with features it reads those as well."""

    features: bool = False

    @property
    def reads_features(self) -> bool:  # type: ignore[override]
        return self.features

    def build(self, feature_dim: int) -> torch.nn.Module:
        return _TinyUnmask(feature_dim if self.features else 0)


class _TinyUnmask(torch.nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4 + features, 1)

    def forward(self, inputs: UnmaskInputs) -> Tensor:
        progress = (inputs.step / inputs.planned)[:, None].expand_as(inputs.confidence)
        told = [inputs.masked.float(), inputs.block.float(), inputs.confidence, progress]
        shown = torch.stack(told, -1)
        if inputs.features is not None:
            shown = torch.cat([shown, inputs.features], -1)
        return self.linear(shown)[..., 0]


class Pooled(MaskedDenoiser):
    """A second architecture: every position reads itself, its place and the mean over all real tokens. No attention."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.tokenizer = TextTokenizer.of_words(WORDS)
        self.spec = replace(denoiser().spec, feature_dim=dim, keeps_keys=False)
        size = self.spec.vocab_size
        self.embedding = torch.nn.Embedding(size, dim)
        self.place = torch.nn.Embedding(self.spec.context_length, dim)
        self.mix = torch.nn.Linear(2 * dim, dim)
        self.out = torch.nn.Linear(dim, size)
        stream = generator("pooled")
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=stream)

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        real = valid[..., None].to(self.place.weight.dtype)
        x = self.embedding(ids) + self.place((valid.cumsum(1) - 1).clamp(min=0))
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return torch.tanh(self.mix(torch.cat([x, mean.expand_as(x)], -1)))

    def head(self, features: Tensor) -> Tensor:
        logits = self.out(features)
        logits[..., list(self.spec.forbidden_ids)] = -torch.inf
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


def with_policy(net: Net, *, features: bool = False) -> Net:
    """The same network, carrying an unmasking policy."""
    attach_unmask(net, TinyUnmask(features=features), seed=3)
    return net


def float64(net: torch.nn.Module, **overwrite: Tensor) -> TransformerDenoiser:
    """A float64 copy whose parameters require gradients."""
    copy = type(net)(net.config, net.tokenizer)  # type: ignore[arg-type, call-arg]
    copy.load_state_dict({**net.state_dict(), **overwrite})
    return copy.double().eval()  # type: ignore[return-value]


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().double().clone() for name, p in net.named_parameters() if p.grad is not None}


def rollouts(**changes: Any) -> RolloutConfig:
    sampler = changes.pop("sampler", MaskedSampler(steps=5, temperature=0.7))
    settings: dict[str, Any] = {"response_length": RESPONSE, "prompts": 4, "group_size": 4} | changes
    return RolloutConfig(sampler=sampler, **settings)


def policy(system: str, **changes: Any) -> PolicyConfig:
    """``mdpo`` or ``diffu_grpo`` with the paper's choices; a change of ``rollout`` is a dictionary."""
    own: dict[str, Any] = vars(Mdpo()) if system == "mdpo" else vars(DiffuGrpo())
    changes["rollout"] = rollouts(**changes.get("rollout", {}))
    return PolicyConfig(**({"task": Echo()} | own | changes))


def job(
    folder: Path,
    config: PolicyConfig,
    net: MaskedDenoiser | None = None,
    *,
    optim: OptimConfig | None = None,
    snapshots: SnapshotConfig | None = None,
    adapter: Adapter | None = None,
    updates: int = 6,
    **checkpoints: int,
) -> PolicyJob:
    trainer = Trainer(
        net or denoiser(),
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


def recipe(folder: Path, system: str, updates: int, **changes: Any) -> TrainRecipe:
    """A recipe whose model lies in ``folder``; the model is written if it is not there."""
    if not (folder / "base" / "config.json").is_file():
        denoiser().save_pretrained(folder / "base")
    settings: dict[str, Any] = {
        "system": system,
        "model": BaseModel(path=str(folder / "base")),
        "policy": policy(system, **changes.pop("policy", {})),
        "eval": PolicyEval(every=2, problems=6, decoders={"lcr": MaskedSampler(steps=5)}, shown=2),
        "optim": OptimConfig(lr=1e-2),
        "checkpoint": CheckpointConfig(every=100, keep=2),
        "log": LogConfig(tensorboard=False),
        "updates": updates,
        "seed": 5,
    }
    return TrainRecipe(**(settings | changes))


def newest(run: Path) -> dict[str, Any]:
    """State of the newest checkpoint."""
    return load_state(list_checkpoints(run / "checkpoints")[-1])


def newest_but_one(run: Path) -> dict[str, Any]:
    return load_state(list_checkpoints(run / "checkpoints")[-2])


def same(left: Any, right: Any, where: str = "") -> list[str]:
    """Paths at which two nested states differ in any bit; seconds do not count."""
    if isinstance(left, Tensor):
        equal = left.dtype == right.dtype and torch.equal(left, right)
        return [] if equal else [where]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{where}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [d for key in left if key != "seconds" for d in same(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{where}: {len(left)} != {len(right)}"]
        pairs = zip(left, right, strict=True)
        return [d for place, pair in enumerate(pairs) for d in same(*pair, f"{where}.{place}")]
    return [] if left == right else [f"{where}: {left} != {right}"]

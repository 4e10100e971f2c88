"""What a run of texts will need: memory of one process and time of an update, estimated from shapes alone.

Memory is the larger of two peaks, that of rollouts (whole weights, logits of all holes) and that of a gradient step
(activations, gradients); what both hold are weights, gradients, moments and snapshots. Times are floating-point
operations over what a device reaches. Neither loading, rewards nor communication are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from unveil.denoisers.shapes import Shape
from unveil.learning.estimators import MaskedAnswer
from unveil.learning.scoring import CHUNK_ELEMENTS
from unveil.learning.views import FIRST
from unveil.training.policy_config import PolicyConfig
from unveil.training.runs import PretrainRecipe, TrainRecipe

GB = 1e9
FIXED = 2.0 * GB
"""What a process holds besides tensors: the driver's context, communication buffers, workspaces."""
SPARE = 0.08
"""Share of a device's memory that fragmentation takes."""
PER_NODE = 8
DRAWN_AT_ONCE = 2**24
"""Logits that a sampler casts up at a time."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it shall run."""

    gpus: int = 1
    memory: float = 80.0
    """Of one device, in GB (1e9 bytes)."""
    peak: float = 989.0
    """Dense bf16 operations of one device in 1e12 a second; float32 is taken for a fifteenth of it."""
    utilisation: float = 0.35
    """Share of the peak that is reached."""

    @property
    def room(self) -> float:
        """Bytes of one device that a run may fill."""
        return self.memory * GB * (1 - SPARE)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One update's sizes on one process, out of a recipe.

    Attributes:
        weights, precision: bytes of a weight, and of a number that the network computes with.
        adapter: weights of adapters; 0: all weights are trained.
        trained: weights that are trained.
        snapshots: how many copies of them.
        shards: over how many processes weights are split.
        checkpointed: activations are recomputed.
        length, response: tokens of a sequence, and of its response.
        chains: drawn by this process; ``batch`` of them at a time.
        steps: forward passes of a chain.
        views: scored views of a chain; ``microbatch`` at a time.
        scored: positions that a view reads.
        inner: gradient steps on them.
        scorings: scoring passes without gradient, of all views.
        cached: a key-value cache.
    """

    weights: int
    precision: int
    adapter: int
    trained: int
    snapshots: int
    shards: int
    checkpointed: bool
    length: int
    response: int
    chains: float
    batch: int
    steps: int
    views: float
    microbatch: int
    scored: float
    inner: int
    scorings: int
    cached: bool = False


def response_length(recipe: TrainRecipe | PretrainRecipe) -> int:
    """In tokens; 1 for models that have none."""
    length = recipe.policy.rollout.response_length if isinstance(recipe, TrainRecipe) else recipe.data.response_length
    return length or 1


def work_of(recipe: TrainRecipe | PretrainRecipe, shape: Shape, gpus: int, prompt: int) -> Work:
    """The sizes of a recipe on ``gpus`` processes, with prompts of ``prompt`` tokens."""
    optim, model = recipe.optim, recipe.model
    lora, dtype = getattr(model, "lora", None), getattr(model, "dtype", "fp32")
    adapter = 0 if lora is None else adapter_weights(shape, lora.rank, lora.targets)
    snapshots = int(recipe.snapshots.ema_decay is not None)
    shard = recipe.distributed.shard if gpus > 1 else "none"
    common: dict[str, Any] = {
        "weights": 2 if dtype == "bf16" else 4,
        "precision": 2 if dtype == "bf16" or optim.precision == "bf16" else 4,
        "adapter": adapter,
        "trained": adapter or shape.parameters,
        "shards": {"none": 1, "full": gpus, "node": min(gpus, PER_NODE)}[shard],
        "checkpointed": bool(getattr(model, "gradient_checkpointing", False)),
    }
    if isinstance(recipe, PretrainRecipe):
        length, batch = response_length(recipe), recipe.data.batch / gpus
        return Work(
            **common, snapshots=snapshots, length=prompt + length, response=length, chains=0, batch=0, steps=0,
            views=batch, microbatch=min(optim.microbatch, -int(-batch // 1)), scored=length / 2, inner=1, scorings=0,
        )  # fmt: skip
    policy, rollout = recipe.policy, recipe.policy.rollout
    moved = adapter == 0 or recipe.snapshots.reference_sync is not None
    snapshots += int(policy.kl.beta > 0 and moved)
    length = response_length(recipe)
    chains = rollout.prompts * rollout.group_size / gpus
    steps = _steps(policy, length)
    per_chain = views_per_chain(policy, steps, length)
    every = policy.likelihood.per_step
    revealed = getattr(policy.likelihood, "tokens", "masked") == "revealed"
    scored = length / steps if every and revealed else length / 2
    return Work(
        **common, snapshots=snapshots, length=prompt + length, response=length, chains=chains,
        batch=min(rollout.batch_size, -int(-chains // 1)), steps=steps, views=chains * per_chain,
        microbatch=min(optim.microbatch, max(1, round(chains * per_chain))), scored=scored,
        inner=policy.inner_updates, cached=getattr(rollout.sampler, "cache", None) is not None,
        scorings=int(policy.inner_updates > 1 or policy.token_filter is not None) + int(policy.kl.beta > 0),
    )  # fmt: skip


def _steps(policy: PolicyConfig, length: int) -> int:
    """Of a chain. Rules that set their own pace take at most a step per token."""
    sampler: Any = policy.rollout.sampler
    return getattr(sampler, "planned_steps", None) or length


def views_per_chain(policy: PolicyConfig, steps: int, length: int) -> int:
    """How many inputs of a chain are scored in a gradient step."""
    likelihood, selector = policy.likelihood, policy.selector
    if isinstance(likelihood, MaskedAnswer):
        return len(likelihood.masks(length, 0, FIRST).holes)
    if not likelihood.per_step:
        return 1
    chosen = getattr(selector, "k", None) or getattr(selector, "draws", None) or steps
    return min(int(chosen), steps)


def adapter_weights(shape: Shape, rank: int, targets: list[str] | str) -> int:
    """Weights of adapters on the matrices of the layers that are named so (all of them: ``all-linear``)."""
    dim, hidden = shape.dim, shape.hidden
    matrices = {
        "q_proj": (dim, shape.queries), "k_proj": (dim, shape.keys), "v_proj": (dim, shape.keys),
        "o_proj": (shape.queries, dim), "gate_proj": (dim, hidden), "up_proj": (dim, hidden),
        "down_proj": (hidden, dim),
    }  # fmt: skip
    named = [matrices[name] for name in targets if name in matrices] if isinstance(targets, list) else []
    return shape.layers * rank * sum(a + b for a, b in named or matrices.values())


def memory(shape: Shape, work: Work, *, fixed: float = FIXED) -> dict[str, float]:
    """Bytes of one process, by what they are for; ``peak`` is what has to fit."""
    total, shards, number = shape.parameters, work.shards, work.precision
    frozen = total if work.adapter else 0
    own = (frozen * work.weights + work.trained * (4 if work.adapter else work.weights)) / shards
    split = shards > 1
    held = {
        "weights": own,
        "gradients": work.trained * 4 / shards,
        "optimiser": work.trained * 8 / shards,
        "snapshots": work.snapshots * work.trained * 4 / shards,
        # Autocast keeps what it has cast until it ends.
        "weights in bf16": 0.0 if split or number == work.weights else float(total * number),
    }
    whole = (total * number + work.adapter * 4) if split else 0.0
    tokens = work.batch * work.length
    layer = _layer_activations(shape, number)
    rollout = {
        "whole weights": whole,
        "rollout activations": tokens * layer,
        "rollout logits": _rollout_logits(shape, work),
        "cache": 2.0 * work.batch * work.length * shape.keys * shape.layers * number if work.cached else 0.0,
    }
    tokens = work.microbatch * work.length
    kept = shape.layers * (tokens * shape.dim * number if work.checkpointed else tokens * layer)
    gathered = (shape.outside + 2 * shape.stored_layer) * number + shape.stored_layer * (number + 4.0) if split else 0.0
    step = {
        "gathered layers": gathered,
        "activations": kept + (tokens * layer if work.checkpointed else 0.0),
        "training logits": _chunk(shape, work) * (number + 12.0),
    }
    update = {"optimiser scratch": work.trained * 4 / shards}
    # A forward pass has freed its activations when logits are there.
    drawing = whole + rollout["cache"] + max(rollout["rollout activations"], rollout["rollout logits"])
    peak = sum(held.values()) + max(drawing, sum(step.values()), sum(update.values())) + fixed
    return held | rollout | step | update | {"fixed": fixed, "peak": peak}


def _layer_activations(shape: Shape, number: int) -> float:
    """Bytes a token that a layer keeps for its backward pass: inputs of matrices and products; of norms in float32."""
    # Input and normed input, of both halves; queries, keys and values, also rotated; what attention gives, twice; gate,
    # up, the gate's function, the product.
    kept = 4 * shape.dim + 4 * shape.queries + 3 * shape.keys + 4 * shape.hidden
    return float(kept * number + (8 * shape.dim if number < 4 else 0))


def _rollout_logits(shape: Shape, work: Work) -> float:
    """Logits of all holes as the head gives them and at the temperature in float32, and what draws a part of them."""
    logits = float(work.batch * work.response * shape.vocabulary)
    return logits * (work.precision + 4) + min(logits, DRAWN_AT_ONCE) * 16


def _chunk(shape: Shape, work: Work) -> float:
    """Logits that exist at a time in training."""
    return min(float(CHUNK_ELEMENTS), work.microbatch * work.scored * shape.vocabulary)


def operations(shape: Shape, work: Work) -> dict[str, float]:
    """Floating-point operations of one update on one process. Caches save some, which is not counted."""
    forward = shape.forward_flops(work.length)
    draws = work.chains * work.steps * (forward + shape.head_flops(work.response / 2))
    once = forward + shape.head_flops(work.scored)
    backward = 3.0 + (1.0 if work.checkpointed else 0.0)  # recomputing costs one more forward pass
    return {
        "rollouts": draws,
        "scoring": work.scorings * work.views * once,
        "gradient steps": work.inner * work.views * once * backward,
    }


class Computed(Protocol):
    """Work of any kind."""

    @property
    def precision(self) -> int:
        """Bytes of a number that the network computes with."""
        ...


def seconds(done: float, work: Computed, machine: Machine) -> float:
    """What ``done`` operations take."""
    speed = machine.peak * 1e12 * machine.utilisation * (1.0 if work.precision == 2 else 1 / 15)
    return done / speed


Sized = TypeVar("Sized")
Change = tuple[str, Callable[[Sized], Sized]]


def changed(
    work: Sized, changes: Sequence[Change[Sized]], peak: Callable[[Sized], float], room: float
) -> tuple[Sized, list[str]]:
    """The work after those of the changes that lower its peak, one after the other until it fits, and their names."""
    names: list[str] = []
    for name, change in changes:
        if peak(work) <= room:
            break
        after = change(work)
        if peak(after) < peak(work):
            work = after
            names.append(name)
    return work, names


def fits(shape: Shape, work: Work, machine: Machine) -> bool:
    return memory(shape, work)["peak"] <= machine.room


def advice(shape: Shape, work: Work, machine: Machine) -> list[str]:
    """Changes of the recipe, one after the other, until it fits; the last line says so if nothing here does."""
    changes: list[Change[Work]] = []
    if machine.gpus > 1 and work.shards == 1:
        changes.append(("distributed.shard=full", lambda w: replace(w, shards=machine.gpus)))
    if not work.checkpointed:
        changes.append(("model.gradient_checkpointing=true", lambda w: replace(w, checkpointed=True)))
    if work.precision == 4:
        changes.append(("optim.precision=bf16", lambda w: replace(w, precision=2)))
    work, found = changed(work, changes, lambda one: memory(shape, one)["peak"], machine.room)
    if fits(shape, work, machine):
        return found
    while work.microbatch > 1 or work.batch > 1:
        work = replace(work, microbatch=max(1, work.microbatch // 2), batch=max(work.batch // 2, min(1, work.batch)))
        if fits(shape, work, machine):
            found.append(f"optim.microbatch={work.microbatch}")
            return [*found, f"policy.rollout.batch_size={work.batch}"] if work.batch else found
    if not work.adapter:
        lora = adapter_weights(shape, 128, "all-linear")
        small = replace(work, adapter=lora, trained=lora, weights=2, precision=2, snapshots=0)
        if fits(shape, small, machine):
            return [*found, "model.lora={rank: 128, alpha: 64} model.dtype=bf16", "optim.microbatch=1"]
    gpus = machine.gpus
    while gpus < 1024:
        gpus *= 2
        if fits(shape, replace(work, shards=gpus), replace(machine, gpus=gpus)):
            return [*found, "optim.microbatch=1", f"distributed.shard=full on {gpus} GPUs"]
    return [*found, "nothing of this makes it fit: a larger device is needed"]

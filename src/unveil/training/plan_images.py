"""What a run of images will need: memory of one process and time of an update, from a model without weights.

A pass through one image is made on the device ``meta``. Its operations are those that torch counts, its activations the
tensors that autograd would keep; attention is taken for a fused kernel, which keeps no scores. Both grow with the
number of images. What is held on the processor between rollout and gradient step is counted as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.denoisers.live_bytes import LiveBytes
from unveil.denoisers.pipelines import PipelineDenoiser
from unveil.denoisers.shells import encoded
from unveil.registry import UserError
from unveil.tasks.pixels import DECODED
from unveil.training.lora import Adapter
from unveil.training.plan import FIXED, Change, Machine, changed
from unveil.training.rehearsal import Update
from unveil.training.runs import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """A denoiser in numbers; bytes and operations are those of one image.

    Attributes:
        parameters: weights of the network, without adapters.
        buffers: numbers that it holds beside them.
        trained: weights that are trained.
        adapter: of them those of adapters; 0: all weights are trained.
        frozen: bytes of text encoders and VAE.
        kept: bytes that autograd keeps, without those inside blocks.
        inputs: bytes of what goes into the blocks.
        blocks: bytes that autograd keeps inside all blocks.
        block: bytes inside the largest one; 0: the network cannot recompute its blocks.
        drawing: bytes that live at a time when nothing is kept.
        forward, backward: operations.
        decoding: bytes that live at a time when an image is decoded, beside it.
        decoding_operations: of that.
        latent, image: numbers of each.
        encoding: bytes of a prompt's.
    """

    parameters: int
    buffers: int
    trained: int
    adapter: int
    frozen: float
    kept: float
    inputs: float
    blocks: float
    block: float
    drawing: float
    forward: float
    backward: float
    decoding: float
    decoding_operations: float
    latent: int
    image: int
    encoding: float


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """One update's sizes on one process, as in `unveil.training.plan.Work`.

    Attributes:
        drawn, scored, trained: network evaluations.
        rows, scored_rows: images of a network call per chain and per view, two with guidance.
        states: held per chain until it has been trained on.
        decoded: latents that are decoded at a time.
    """

    weights: int
    precision: int
    snapshots: int
    checkpointed: bool
    chains: float
    prompts: float
    batch: int
    views: float
    microbatch: int
    rows: int
    scored_rows: int
    drawn: float
    scored: float
    trained: float
    states: int
    decoded: float


def shape_of(denoiser: ContinuousDenoiser, recipe: TrainRecipe) -> ImageShape:
    """Measure a denoiser on the device ``meta``, with the adapters of a recipe."""
    frozen = 0.0
    size = 2 if recipe.model.dtype == "bf16" else 4
    if isinstance(denoiser, PipelineDenoiser):
        pipe = denoiser.pipe
        others = [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]
        others = [(name, part) for name, part in others if name != denoiser.component]
        frozen = float(sum(_numbers(part) * (4 if name == "vae" else size) for name, part in others))
    parameters = sum(one.numel() for one in denoiser.parameters())
    buffers = sum(one.numel() for one in denoiser.buffers())
    lora = recipe.model.lora
    # The network computes in this precision, whatever its weights have.
    denoiser.to(torch.bfloat16 if _precision(recipe) == 2 else torch.float32)
    if isinstance(denoiser, PipelineDenoiser):
        denoiser.pipe.vae.float()
    if lora is not None:
        Adapter(denoiser, lora)
    trained = sum(one.numel() for one in denoiser.parameters() if one.requires_grad)
    passed = _passed(denoiser)
    image, decoding, decoding_operations = _decoded(denoiser)
    condition = encoded(denoiser)
    return ImageShape(
        parameters=parameters, buffers=buffers, trained=trained, adapter=0 if lora is None else trained, frozen=frozen,
        decoding=decoding, decoding_operations=decoding_operations, image=image,
        latent=torch.Size(denoiser.spec.shape).numel(),
        encoding=float(sum(value.numel() * value.element_size() for value in condition.tensors.values())), **passed,
    )  # fmt: skip


def work_of(recipe: TrainRecipe, update: Update, gpus: int) -> ImageWork:
    """The sizes of an update on ``gpus`` processes.

    Raises:
        UserError: the recipe splits weights, which models of images are not.
    """
    if gpus > 1 and recipe.distributed.shard != "none":
        raise UserError(f"distributed.shard: {recipe.distributed.shard!r} is for models of text (allowed here: none)")
    policy, rollout, snapshots = recipe.policy, recipe.policy.rollout, recipe.snapshots
    moved = recipe.model.lora is None or snapshots.moves_reference
    kept = [snapshots.ema_decay is not None, snapshots.old is not None, policy.keeps_reference and moved]
    guidance = getattr(rollout.sampler, "guidance", None)
    chains, views = update.rollouts / gpus, update.views / gpus
    return ImageWork(
        weights=2 if recipe.model.dtype == "bf16" else 4, precision=_precision(recipe), snapshots=sum(kept),
        checkpointed=recipe.model.gradient_checkpointing, chains=chains, prompts=min(rollout.prompts, chains),
        batch=min(rollout.batch_size, -int(-chains // 1)), views=views,
        microbatch=min(recipe.optim.microbatch, max(1, round(views / policy.minibatches))),
        rows=getattr(guidance, "evaluations", 1),
        scored_rows=max(1, round(update.pass_forwards / max(1, update.views))),
        drawn=update.drawn / gpus, scored=update.scorings * update.pass_forwards / gpus,
        trained=update.gradients * update.pass_forwards / gpus, states=update.states + update.fields,
        decoded=min(DECODED, max(rollout.batch_size, rollout.group_size) if rollout.score_beside else chains, chains),
    )  # fmt: skip


def memory(shape: ImageShape, work: ImageWork, *, fixed: float = FIXED) -> dict[str, float]:
    """Bytes of one process, by what they are for; ``peak`` is what has to fit on a device."""
    own = shape.parameters if shape.adapter else 0
    number = work.precision
    held = {
        "weights": own * work.weights
        + shape.trained * (4 if shape.adapter else work.weights)
        + shape.buffers * work.weights,
        "text encoders and VAE": shape.frozen,
        "gradients": shape.trained * 4.0,
        "optimiser": shape.trained * 8.0,
        "snapshots": work.snapshots * shape.trained * 4.0,
        # Autocast keeps what it has cast until it ends.
        "weights in bf16": 0.0 if number == work.weights else float(shape.parameters * number),
    }
    decoded = work.decoded * (shape.decoding + shape.image * 4.0)
    drawing = {"rollout activations": work.batch * work.rows * shape.drawing, "decoding": decoded}
    seen = work.microbatch * work.scored_rows
    inner = shape.inputs + shape.block if work.checkpointed and shape.block else shape.blocks
    step = {"activations": seen * (shape.kept + inner)}
    update = {"optimiser scratch": shape.trained * 4.0}
    peak = sum(held.values()) + max(*drawing.values(), sum(step.values()), sum(update.values())) + fixed
    return held | drawing | step | update | {"fixed": fixed, "peak": peak}


def host_memory(shape: ImageShape, work: ImageWork) -> dict[str, float]:
    """Bytes that a process holds on the processor from an update's rollouts to its gradient steps."""
    held = {
        "states": work.chains * work.states * shape.latent * 4.0,
        "images": work.chains * shape.image * 4.0,
        "encodings": work.prompts * shape.encoding,
    }
    return held | {"held": sum(held.values())}


def operations(shape: ImageShape, work: ImageWork) -> dict[str, float]:
    """Floating-point operations of one update on one process."""
    again = shape.forward if work.checkpointed and shape.block else 0.0
    return {
        "rollouts": work.drawn * shape.forward + work.chains * shape.decoding_operations,
        "scoring": work.scored * shape.forward,
        "gradient steps": work.trained * (shape.forward + shape.backward + again),
    }


def fits(shape: ImageShape, work: ImageWork, machine: Machine) -> bool:
    return memory(shape, work)["peak"] <= machine.room


def advice(shape: ImageShape, work: ImageWork, machine: Machine) -> list[str]:
    """Changes of the recipe, one after the other, until it fits; the last line says so if nothing here does."""
    changes: list[Change[ImageWork]] = []
    if shape.block and not work.checkpointed:
        changes.append(("model.gradient_checkpointing=true", lambda w: replace(w, checkpointed=True)))
    if work.precision == 4:
        changes.append(("optim.precision=bf16", lambda w: replace(w, precision=2)))
    if shape.adapter and work.weights == 4:
        changes.append(("model.dtype=bf16", lambda w: replace(w, weights=2, precision=2)))
    work, found = changed(work, changes, lambda one: memory(shape, one)["peak"], machine.room)
    while not fits(shape, work, machine):
        if work.microbatch == work.batch == 1:
            lora = [] if shape.adapter else ["model.lora={rank: 32, alpha: 64}"]
            return [*found, *lora, "nothing else of this makes it fit: a larger device is needed"]
        work = replace(work, microbatch=max(1, work.microbatch // 2), batch=max(1, work.batch // 2))
        smaller = [f"optim.microbatch={work.microbatch}", f"policy.rollout.batch_size={work.batch}"]
        if fits(shape, work, machine):
            return found + smaller
    return found


def _precision(recipe: TrainRecipe) -> int:
    return 2 if recipe.model.dtype == "bf16" or recipe.optim.precision == "bf16" else 4


def _numbers(module: nn.Module) -> int:
    return sum(one.numel() for one in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    """All that a module holds."""
    return [*module.parameters(), *module.buffers()]


# ---- measuring


class _Kept:
    """Bytes of what autograd keeps, every storage once, weights not."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {one.untyped_storage()._cdata for one in _tensors(module)}
        self.storages: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage
        return tensor

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class _Fused(torch.autograd.Function):
    """Attention of the right shape that keeps its inputs and its output, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _FusedAttention(TorchFunctionMode):
    """Context in which attention is `_Fused`; ``operations`` counts those of its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attended(*args, **(kwargs or {}))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, *how: Any, **named: Any) -> Tensor:
        self.operations += 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _Fused.apply(query, key, value)


def _passed(denoiser: ContinuousDenoiser) -> dict[str, float]:
    """What a pass through one image takes."""
    condition = encoded(denoiser)
    t = torch.full((1,), 0.5, dtype=torch.float64)
    weights = next(iter(denoiser.parameters()))
    x = torch.empty(1, *denoiser.spec.shape, device="meta", dtype=weights.dtype)
    denoiser.eval()
    with torch.no_grad(), _FusedAttention(), LiveBytes(ignored=_tensors(denoiser)) as live:
        denoiser.predict(x, t, condition)
    drawing = live.peak
    denoiser.train()
    outside, inputs = _Kept(denoiser), _Kept(denoiser)
    inside: list[int] = []

    def block(module: Any, *args: Any, **kwargs: Any) -> Any:
        """A block that a run would recompute: what it keeps is counted by itself."""
        for one in args:
            if isinstance(one, Tensor):
                inputs.add(one)
        own = _Kept(denoiser)
        with own.watching():
            result = module(*args, **kwargs)
        inside.append(own.bytes)
        return result

    if isinstance(denoiser, PipelineDenoiser):
        denoiser.network.enable_gradient_checkpointing(block)
    with _FusedAttention() as attention, FlopCounterMode(display=False) as counted, outside.watching():
        prediction = denoiser.predict(x, t, condition)
        forward = counted.get_total_flops()
        prediction.float().sum().backward()
        backward = counted.get_total_flops() - forward
    return {
        "kept": float(outside.bytes), "inputs": float(inputs.bytes), "blocks": float(sum(inside)),
        "block": float(max(inside, default=0)), "drawing": float(drawing),
        "forward": forward + attention.operations, "backward": backward + 2 * attention.operations,
    }  # fmt: skip


def _decoded(denoiser: ContinuousDenoiser) -> tuple[int, float, float]:
    """Numbers of an image, bytes that live while it is decoded, and operations of that."""
    latent = torch.empty(1, *denoiser.spec.shape, device="meta")
    own = _tensors(denoiser.pipe.vae) if isinstance(denoiser, PipelineDenoiser) else []
    counted, live = FlopCounterMode(display=False), LiveBytes(ignored=own)
    with torch.no_grad(), _FusedAttention() as attention, counted, live:
        image = denoiser.decode(latent)
    return image.numel(), float(live.peak), counted.get_total_flops() + attention.operations

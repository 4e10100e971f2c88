"""Weights split over the ranks by torch's ``fully_shard`` (FSDP2), and when they are whole.

A sampler's ranks retire rows at different steps, and their numbers of network calls differ; the collectives of
``fully_shard`` in a forward pass need the same number on every rank, or hang. So there are two phases, and a job need
not know of either:

*Whole*, the state at rest: every rank holds all weights (gathered once, in the precision that the network runs in), and
rollouts, evaluation and scoring without gradient are free to differ. A rank needs as much memory for the weights as any
engine that generates with them. The alternative, empty forward passes in step with the slowest rank, would gather every
layer once per denoising step of the longest chain of all.

*Split*, within a gradient step: layers are gathered one by one, gradients arrive summed over the ranks and split, and
so do the optimiser's moments and the snapshots. Here all ranks do go in step: a rank with fewer micro-batches, or one
whose loss needs no network, makes up for it by a pass over a single token whose loss is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unveil.denoisers.base import Denoiser, MaskedDenoiser
from unveil.registry import UserError
from unveil.training.distribution import Ranks


@dataclass(kw_only=True)
class DistributedConfig:
    """How a run is spread over the processes that ``torchrun`` starts. One process takes no notice of it."""

    shard: Literal["none", "full", "node"] = "none"
    """Where weights, gradients, optimiser and snapshots live. ``none``: all of them on every process. ``full``: split
    over all processes. ``node``: split over the processes of a node, the same on every node."""


class Shards:
    """The weights of a denoiser that is split over the ranks. At first they are split."""

    def __init__(self, denoiser: Denoiser, shard: str, ranks: Ranks, *, bf16: bool) -> None:
        """Split a denoiser, layer by layer; what belongs to no layer (embedding, output ...) is one more part.

        Args:
            bf16: gather weights in bf16 (gradients are summed in fp32).

        Raises:
            UserError: this torch or this denoiser cannot be split.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise UserError(f"distributed.shard: {shard!r} needs a torch newer than {torch.__version__}")
        if not isinstance(denoiser, MaskedDenoiser):
            raise UserError(f"distributed.shard: {shard!r} is for models of text (allowed here: none)")
        rule = set() if denoiser.unmask is None else set(denoiser.unmask.parameters())
        if not any(p.requires_grad for p in denoiser.parameters() if p not in rule):
            raise UserError(f"distributed.shard: {shard!r} splits a denoiser that is trained (allowed here: none)")
        nodes, kind = ranks.world // ranks.per_node, ranks.device.type
        if shard == "node" and nodes > 1:
            mesh = init_device_mesh(kind, (nodes, ranks.per_node), mesh_dim_names=("node", "rank"))
        else:
            mesh = init_device_mesh(kind, (ranks.world,), mesh_dim_names=("rank",))
        half = torch.bfloat16 if bf16 else None
        # Inputs stay as they are: times and rotations in bf16 would be other times and rotations.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        settings: Any = {"mesh": mesh, "mp_policy": policy}
        for layer in layers_of(denoiser):
            fully_shard(layer, **settings)
        # Split by hand after the gradient step: the output layer is called beside the forward pass, in many pieces.
        fully_shard(denoiser, **settings, reshard_after_forward=False)
        register_fsdp_forward_method(denoiser, "features")
        self.denoiser, self.ranks, self.mesh = denoiser, ranks, mesh
        self.root = cast(Any, denoiser)
        self.parts: list[Any] = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)  # sums, and not means: the losses have global denominators
            part.set_force_sum_reduction_for_comms(True)
            part.set_reduce_scatter_unused_params(True, recurse=False)
        self.root.set_reshard_after_backward(False, recurse=False)
        self.calls = 0
        self._count(self.root)
        with torch.no_grad():
            self.root.idle()  # the first pass tells torch which part is the root
        self.split()

    def _count(self, denoiser: Any) -> None:
        inner = denoiser.features

        def features(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return inner(*args, **kwargs)

        denoiser.features = features

    def join(self) -> None:
        """Gather all weights on every rank."""
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def split(self) -> None:
        """Back to this rank's part of the weights."""
        for part in self.parts:
            part.reshard()
            part.set_reshard_after_forward(part is not self.root, recurse=False)

    def in_step(self, loss: Callable[[], Tensor] | None) -> Tensor:
        """The value of a loss, with exactly one forward pass on this rank; None: there is none left here."""
        self.root.unshard()
        self.calls = 0
        value = torch.zeros((), device=self.ranks.device) if loss is None else loss()
        if self.calls > 1:
            raise RuntimeError(f"a loss made {self.calls} forward passes, and ranks in step make one each")
        return value if self.calls else value + 0.0 * self.denoiser.idle()

    @contextmanager
    def whole_on_main(self, *, trained: bool) -> Iterator[None]:
        """Within the context the main rank's denoiser is an ordinary one on the CPU, to be saved; no rank may call it.

        Args:
            trained: only the trained weights are needed (adapters).
        """
        self.split()
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        made: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for module in self.denoiser.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor) and (parameter.requires_grad or not trained):
                    if id(parameter) not in made:
                        full = whole(parameter.detach())  # asks all ranks
                        keep = full.cpu() if self.ranks.main else full.new_empty(0)
                        made[id(parameter)] = nn.Parameter(keep, requires_grad=parameter.requires_grad)
                    held.append((module, name, parameter))
        if self.ranks.main:
            for module, name, parameter in held:
                module._parameters[name] = made[id(parameter)]
        try:
            yield
        finally:
            if self.ranks.main:
                for module, name, parameter in held:
                    module._parameters[name] = parameter
        self.join()

    def part_of(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor that is the same on all of them. Scalars stay."""
        if full.dim() == 0:
            return full
        # No source: every rank cuts its own piece.
        return distribute_tensor(full.to(self.ranks.device), self.mesh, self._placements(), src_data_rank=None)

    def empty(self, like: Tensor) -> Tensor:
        """Room for this rank's part of a tensor of the shape and type of ``like``."""
        from torch.distributed.tensor import empty

        return empty(like.shape, dtype=like.dtype, device_mesh=self.mesh, placements=self._placements())

    def _placements(self) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        return [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]


def layers_of(denoiser: nn.Module) -> list[nn.Module]:
    """The layers that a network repeats: the members of its first list of modules."""
    lists = (module for module in denoiser.modules() if isinstance(module, nn.ModuleList))
    return list(next(lists, nn.ModuleList()))


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts, which asks all ranks; an ordinary one as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(value: Tensor) -> Tensor:
    """This rank's part of a tensor; an ordinary one as it is."""
    return value.to_local() if isinstance(value, DTensor) else value

"""Networks that decide WHERE to unmask, from what a denoiser believes at the moment.

A denoiser may carry one (`attach`). It is saved as a safetensors file of its own, beside the model or apart from it, so
that a policy trained on one model can be put on another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unveil.recipe import build, dump
from unveil.registry import Plugin, UserError

FILE = "unmask.safetensors"
"""Its name inside a model folder."""
_HEADER = "unveil.unmask"


@dataclass(kw_only=True)
class UnmaskInputs:
    """What the network reads of one step of N chains.

    Attributes:
        masked: (N, R) holes.
        block: (N, R) positions of the current block.
        confidence: (N, R) what the rule reads at the holes, 0 elsewhere.
        valid: (N, R) inside each chain's response.
        step: (N,) steps done.
        planned: (N,) steps of the whole chain; for rules without a schedule the most that it may take.
        features: (N, R, D) of the denoiser; None unless the network reads them.
    """

    masked: Tensor
    block: Tensor
    confidence: Tensor
    valid: Tensor
    step: Tensor
    planned: Tensor
    features: Tensor | None = None

    @property
    def candidates(self) -> Tensor:
        """(N, R) the positions that may be chosen."""
        return self.masked & self.block

    def rows(self, part: slice | Tensor) -> UnmaskInputs:
        return self._each(lambda value: value[part])

    def to(self, device: torch.device) -> UnmaskInputs:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Any) -> UnmaskInputs:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: None if value is None else change(value) for name, value in values.items()}
        return UnmaskInputs(**changed)  # type: ignore[arg-type]


class UnmaskNetwork(Plugin, family="unmask_network"):
    """The shape of such a network."""

    reads_features: ClassVar[bool] = False
    """Whether `UnmaskInputs.features` is needed."""

    def build(self, feature_dim: int) -> nn.Module:
        """A module whose ``forward(inputs: UnmaskInputs)`` gives one logit per position, (N, R) float32.

        Padding never changes the logits of valid positions. ``feature_dim`` is the denoiser's; 0 if it has none.
        """
        raise NotImplementedError


def save_unmask(network: UnmaskNetwork, module: nn.Module, path: str | Path, action: Mapping[str, Any] | None) -> None:
    """Write weights, shape, and the recipe of the action that it was trained with to one safetensors file."""
    header = {"network": dump(network), "action": action}
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(state, path, metadata={_HEADER: json.dumps(header)})


def read_unmask_header(path: str | Path) -> dict[str, Any]:
    """``network`` and ``action`` of a file written by `save_unmask`, as recipe data.

    Raises:
        UserError: the file is missing or broken, or is no unmasking policy.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable unmasking policy: {error}") from error
    if _HEADER not in metadata:
        raise UserError(f"{path}: not an unmasking policy (a safetensors file that `unveil train` writes as {FILE})")
    return json.loads(metadata[_HEADER])


def load_unmask(path: str | Path, feature_dim: int) -> tuple[UnmaskNetwork, nn.Module]:
    """Read a file written by `save_unmask`, for a denoiser with features of ``feature_dim``.

    Raises:
        UserError: the file is missing or broken, is no unmasking policy, or does not fit the denoiser.
    """
    network = build(UnmaskNetwork, read_unmask_header(path)["network"], str(path))
    state = load_file(path)
    module = network.build(feature_dim)
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    loaded = {name: tuple(value.shape) for name, value in state.items()}
    if own != loaded:
        name = min(name for name in own.keys() | loaded.keys() if own.get(name) != loaded.get(name))
        raise UserError(f"{path}: {name!r} is {loaded.get(name)}, this model needs {own.get(name)}")
    module.load_state_dict(state)
    return network, module

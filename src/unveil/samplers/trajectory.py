"""What one batch of denoising leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unveil.registry import UserError, did_you_mean

OPTIONAL = (
    "states", "guesses", "confidence", "log_prob", "entropy", "revealed", "taken_back", "step_map",
    "block", "order", "order_log_prob", "times",
)  # fmt: skip
"""Fields that a reader must ask for: ``sample(..., needs={"guesses", "confidence"})``."""
PER_CHAIN = ("step_map",)
"""Those of them that have no step axis."""


@dataclass(kw_only=True)
class Trajectory:
    """States, decisions and beliefs of B denoising chains of at most S steps over R response positions.

    Chains end on their own: ``active[b, s]`` is False from the step at which chain b was done.

    Attributes:
        prompt_ids: (B, P) left-padded prompts; with ``response_ids`` they make up the canvas.
        response_ids: (B, R) the finished responses.
        valid: (B, P + R) True at real tokens.
        active: (B, S) True where step s of chain b happened.
        given: (B, R) True at response positions that were no holes at the start.
        planned: (B,) steps that a chain's schedule has; for rules that set their own pace the most it may take.
        forwards: network evaluations, counted per sequence (NFE).
        mask_id: the id of the hole.
        states: (B, S, R) the response before step s; the finished response where the chain was done.
        guesses: (B, S, R) the full guess of x_0 at step s: the drawn token at the holes that were read, the state
            elsewhere.
        confidence: (B, S, R) what the rule ranked by at the holes that were read, 0 elsewhere.
        log_prob: (B, S, R) log-probability of the guess at the holes that were read (tempered, unfiltered), 0
            elsewhere.
        entropy: (B, S, R) entropy in nats of the distribution that the guess was drawn from (untempered), at the holes
            that were read, 0 elsewhere.
        revealed: (B, S, R) True where step s turned a hole into a token.
        taken_back: (B, S, R) True where step s turned a token into a hole.
        step_map: (B, R) the step at which each token came, -1 where it was given; the chain's number of steps where
            ``stop_at_end`` filled up the rest. Only exact for rules that never take back; then it replaces ``states``.
        block: (B, S, R) True at the positions of the current block.
        order: (B, S, R) what the step chose: 0 where a position stayed, else its rank from 1; other than learned rules
            rank nothing, so that all they reveal has rank 1.
        order_log_prob: (B, S) log-probability of that choice under a learned rule.
        times: (B, S, 2) float64, the times of the states before and after step s, 1 all masks; 0 where the chain was
            done. Only samplers on a grid of times have it.
        expert_share: (B,) share of the group's chains that a second sampler drew in the policy's stead; 0 for the
            policy's own. None: all are.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    valid: Tensor
    active: Tensor
    given: Tensor
    planned: Tensor
    forwards: int
    mask_id: int
    states: Tensor | None = None
    guesses: Tensor | None = None
    confidence: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    revealed: Tensor | None = None
    taken_back: Tensor | None = None
    step_map: Tensor | None = None
    block: Tensor | None = None
    order: Tensor | None = None
    order_log_prob: Tensor | None = None
    times: Tensor | None = None
    expert_share: Tensor | None = None

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def steps(self) -> int:
        """S, the number of steps of the longest chain."""
        return self.active.shape[1]

    @property
    def last_steps(self) -> Tensor:
        """(B,) the last active step of every chain."""
        return (self.active.sum(1) - 1).clamp(min=0)

    @property
    def response_valid(self) -> Tensor:
        """(B, R) True inside each row's response."""
        return self.valid[:, self.prompt_ids.shape[1] :]

    @property
    def unfinished(self) -> Tensor:
        """(B,) True where a chain ended with holes."""
        return ((self.response_ids == self.mask_id) & self.response_valid).any(1)

    def states_at(self, rows: Tensor, steps: Tensor) -> Tensor:
        """The responses (N, R) that chains ``rows`` (N,) showed before steps ``steps`` (N,).

        Raises:
            ValueError: neither states nor step_map were recorded.
        """
        if self.states is not None:
            return self.states[rows, steps].long()
        if self.step_map is None:
            raise ValueError("the trajectory holds neither states nor step_map")
        late = self.step_map[rows] >= steps[:, None]
        return torch.where(late, self.mask_id, self.response_ids[rows])

    def holes_at(self, rows: Tensor, steps: Tensor) -> Tensor:
        """(N, R) True where the state was masked."""
        return (self.states_at(rows, steps) == self.mask_id) & self.response_valid[rows]

    def rows(self, index: Tensor) -> Trajectory:
        """The chains ``index`` (N,). ``forwards`` stays that of the whole batch."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Trajectory(**{n: v[index] if isinstance(v, Tensor) else v for n, v in values.items()})  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            f.name: getattr(self, f.name).contiguous()
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        header = {"forwards": self.forwards, "mask_id": self.mask_id}
        save_file(tensors, path, metadata={"unveil.trajectory": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file written by `save`.

        Raises:
            UserError: the file is missing, broken, or not a trajectory.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "unveil.trajectory" not in metadata:
                    raise UserError(f"{path}: not a trajectory file")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable trajectory file: {error}") from error
        try:
            return cls(**tensors, **json.loads(metadata["unveil.trajectory"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: not a trajectory file of this version: {error}") from error


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """Trajectories of batches with one response width, as one; step axes and prompts are padded to the longest.

    A field that one part lacks is dropped, except that chains without an ``expert_share`` have 0.
    """
    steps = max(part.steps for part in parts)
    width = max(part.prompt_ids.shape[1] for part in parts)
    joined: dict[str, Tensor | None] = {}
    for name in ("prompt_ids", "response_ids", "valid", "active", "given", "planned", *OPTIONAL, "expert_share"):
        values = [getattr(part, name) for part in parts]
        if name == "expert_share" and any(value is not None for value in values):
            values = [v if v is not None else torch.zeros(len(p)) for v, p in zip(values, parts, strict=True)]
        if any(value is None for value in values):
            joined[name] = None
            continue
        if name == "active" or (name in OPTIONAL and name not in PER_CHAIN):
            idle = [part.response_ids if name in ("states", "guesses") else None for part in parts]
            values = [_pad_steps(value, steps, rest) for value, rest in zip(values, idle, strict=True)]
        if name in ("prompt_ids", "valid"):
            values = [_pad_prompts(v, width - p.prompt_ids.shape[1]) for v, p in zip(values, parts, strict=True)]
        joined[name] = torch.cat(values)
    return Trajectory(**joined, forwards=sum(part.forwards for part in parts), mask_id=parts[0].mask_id)  # type: ignore[arg-type]


def check_needs(needs: Iterable[str], refused: Mapping[str, str]) -> frozenset[str]:
    """Validate the names of fields that a reader asks for; ``refused`` says why a sampler cannot record some.

    Raises:
        UserError: an unknown field, or one that is refused.
    """
    wanted = frozenset(needs)
    for name in sorted(wanted):
        if name not in OPTIONAL:
            raise UserError(f"trajectory field {name!r} does not exist{did_you_mean(name, OPTIONAL)}")
        if name in refused:
            raise UserError(f"trajectory field {name!r} {refused[name]}")
    return wanted


def _pad_steps(value: Tensor, steps: int, idle: Tensor | None) -> Tensor:
    """``value`` (B, S, ...) for more steps: filled with the finished responses ``idle`` (B, R), or with zeros."""
    missing = steps - value.shape[1]
    if idle is None:
        return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
    return torch.cat([value, idle[:, None].expand(-1, missing, -1).to(value.dtype)], dim=1)


def _pad_prompts(value: Tensor, missing: int) -> Tensor:
    """``value`` (B, P + ...) with ``missing`` columns of padding in front: id 0, which nothing reads, or False."""
    return torch.cat([value.new_zeros(len(value), missing), value], dim=1) if missing else value

"""What one batch of denoising leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unveil.registry import UserError, did_you_mean

OPTIONAL = ("states", "guesses", "confidence", "log_prob", "revealed", "taken_back", "step_map", "times")
"""Fields that a reader must ask for: ``sample(..., needs={"guesses", "confidence"})``."""


@dataclass(kw_only=True)
class Trajectory:
    """States, decisions and beliefs of B denoising chains of at most S steps over R response positions.

    Chains end on their own: ``active[b, s]`` is False from the step at which chain b was done.

    Attributes:
        prompt_ids: (B, P) left-padded prompts; with ``response_ids`` they make up the canvas.
        response_ids: (B, R) the finished responses.
        valid: (B, P + R) True at real tokens.
        active: (B, S) True where step s of chain b happened.
        forwards: network evaluations, counted per sequence (NFE).
        mask_id: the id of the hole.
        states: (B, S, R) the response before step s; the finished response where the chain was done.
        guesses: (B, S, R) the full guess of x_0 at step s: the drawn token at the holes that were read, the state
            elsewhere.
        confidence: (B, S, R) what the rule ranked by at the holes that were read, 0 elsewhere.
        log_prob: (B, S, R) log-probability of the guess at the holes that were read (tempered, unfiltered), 0
            elsewhere.
        revealed: (B, S, R) True where step s turned a hole into a token.
        taken_back: (B, S, R) True where step s turned a token into a hole.
        step_map: (B, R) the step at which each token came, -1 where it was given; the chain's number of steps where
            ``stop_at_end`` filled up the rest. Only exact for rules that never take back; then it replaces ``states``.
        times: (B, S, 2) float64, the time before and after step s; 0 where the chain was done.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    valid: Tensor
    active: Tensor
    forwards: int
    mask_id: int
    states: Tensor | None = None
    guesses: Tensor | None = None
    confidence: Tensor | None = None
    log_prob: Tensor | None = None
    revealed: Tensor | None = None
    taken_back: Tensor | None = None
    step_map: Tensor | None = None
    times: Tensor | None = None

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
    """Trajectories of batches that share the prompt and response width, as one; shorter step axes are padded."""
    steps = max(part.steps for part in parts)
    joined: dict[str, Tensor | None] = {}
    for name in ("prompt_ids", "response_ids", "valid", "active", *OPTIONAL):
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            joined[name] = None
            continue
        if name == "active" or (name in OPTIONAL and name != "step_map"):
            idle = [part.response_ids if name in ("states", "guesses") else None for part in parts]
            values = [_pad_steps(value, steps, rest) for value, rest in zip(values, idle, strict=True)]
        joined[name] = torch.cat(values)
    return Trajectory(**joined, forwards=sum(part.forwards for part in parts), mask_id=parts[0].mask_id)  # type: ignore[arg-type]


def check_needs(needs: Iterable[str], never_takes_back: bool) -> frozenset[str]:
    """Validate the names of fields that a reader asks for.

    Raises:
        UserError: an unknown field, or step_map for a rule that takes tokens back.
    """
    wanted = frozenset(needs)
    for name in wanted:
        if name not in OPTIONAL:
            raise UserError(f"trajectory field {name!r} does not exist{did_you_mean(name, OPTIONAL)}")
    if "step_map" in wanted and not never_takes_back:
        raise UserError("trajectory field 'step_map' is not exact for a rule that takes tokens back; ask for 'states'")
    return wanted


def _pad_steps(value: Tensor, steps: int, idle: Tensor | None) -> Tensor:
    """``value`` (B, S, ...) for more steps: filled with the finished responses ``idle`` (B, R), or with zeros."""
    missing = steps - value.shape[1]
    if idle is None:
        return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
    return torch.cat([value, idle[:, None].expand(-1, missing, -1).to(value.dtype)], dim=1)

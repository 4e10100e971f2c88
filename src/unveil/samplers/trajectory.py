"""What one batch of denoising leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unveil.registry import UserError, did_you_mean


@dataclass(kw_only=True)
class Trajectory:
    """What B denoising chains of at most S steps leave behind, whatever they denoise.

    Chains end on their own: ``active[b, s]`` is False from the step at which chain b was done.

    Attributes:
        active: (B, S) True where step s of chain b happened.
        planned: (B,) steps that a chain's schedule has; for rules that set their own pace the most it may take.
        forwards: network evaluations, counted per sample (NFE).
        guesses: (B, S, ...) the full guess of x_0 at step s, in the form of `finished`; on demand.
    """

    kind: ClassVar[str]
    """How a file says what it holds."""
    optional: ClassVar[tuple[str, ...]]
    """Fields that a reader must ask for: ``sample(..., needs={"guesses", "log_prob"})``."""
    per_chain: ClassVar[tuple[str, ...]] = ()
    """Those of them that have no step axis."""

    active: Tensor
    planned: Tensor
    forwards: int
    guesses: Tensor | None = None

    def __len__(self) -> int:
        return self.active.shape[0]

    @property
    def steps(self) -> int:
        """S, the number of steps of the longest chain."""
        return self.active.shape[1]

    @property
    def last_steps(self) -> Tensor:
        """(B,) the last active step of every chain."""
        return (self.active.sum(1) - 1).clamp(min=0)

    @property
    def decided(self) -> Tensor:
        """(B, S) True at the steps that chose something, which can be trained."""
        return self.active

    @property
    def finished(self) -> Tensor:
        """(B, ...) what the chains ended with."""
        raise NotImplementedError

    @property
    def unfinished(self) -> Tensor:
        """(B,) True where a chain ended before its sample was whole."""
        return torch.zeros(len(self), dtype=torch.bool)

    def rows(self, index: Tensor) -> Self:
        """The chains ``index`` (N,). ``forwards`` stays that of the whole batch."""
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Trajectories of batches as one; step axes are padded to the longest. A field that one part lacks is gone."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        header = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), int)}
        save_file(tensors, path, metadata={"unveil.trajectory": json.dumps({"kind": self.kind} | header)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`.

        Raises:
            UserError: the file is missing, broken, or not a trajectory of this kind.
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
            header = json.loads(metadata["unveil.trajectory"])
            kind = header.pop("kind", TokenTrajectory.kind)
            if kind != cls.kind:
                raise UserError(f"{path}: a trajectory of {kind}, not of {cls.kind}")
            return cls._built(tensors, header)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: not a trajectory file of this version: {error}") from error

    @classmethod
    def _built(cls, tensors: dict[str, Tensor], header: dict[str, int]) -> Self:
        """The inverse of what `save` takes apart."""
        return cls(**tensors, **header)  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors; each has a leading axis of chains."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(kw_only=True)
class TokenTrajectory(Trajectory):
    """States, decisions and beliefs of B chains of masked tokens over R response positions.

    Attributes:
        prompt_ids: (B, P) left-padded prompts; with ``response_ids`` they make up the canvas.
        response_ids: (B, R) the finished responses.
        valid: (B, P + R) True at real tokens.
        given: (B, R) True at response positions that were no holes at the start.
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

    kind = "tokens"
    optional = (
        "states", "guesses", "confidence", "log_prob", "entropy", "revealed", "taken_back", "step_map",
        "block", "order", "order_log_prob", "times",
    )  # fmt: skip
    per_chain = ("step_map",)

    prompt_ids: Tensor
    response_ids: Tensor
    valid: Tensor
    given: Tensor
    mask_id: int
    states: Tensor | None = None
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

    @property
    def finished(self) -> Tensor:
        return self.response_ids

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

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See `Trajectory.joined`; responses have one width, prompts are padded to the longest. Chains without an
        ``expert_share`` have 0."""
        steps = max(part.steps for part in parts)
        width = max(part.prompt_ids.shape[1] for part in parts)
        joined: dict[str, Tensor | None] = {}
        names = ("prompt_ids", "response_ids", "valid", "active", "given", "planned", *cls.optional, "expert_share")
        for name in names:
            values = [getattr(part, name) for part in parts]
            if name == "expert_share" and any(value is not None for value in values):
                values = [v if v is not None else torch.zeros(len(p)) for v, p in zip(values, parts, strict=True)]
            if any(value is None for value in values):
                joined[name] = None
                continue
            if name == "active" or (name in cls.optional and name not in cls.per_chain):
                idle = [part.response_ids if name in ("states", "guesses") else None for part in parts]
                values = [pad_steps(value, steps, rest) for value, rest in zip(values, idle, strict=True)]
            if name in ("prompt_ids", "valid"):
                values = [_pad_prompts(v, width - p.prompt_ids.shape[1]) for v, p in zip(values, parts, strict=True)]
            joined[name] = torch.cat(values)
        return cls(**joined, forwards=sum(part.forwards for part in parts), mask_id=parts[0].mask_id)  # type: ignore[arg-type]


T = TypeVar("T", bound=Trajectory)


def concatenate(parts: Sequence[T]) -> T:
    """Trajectories of batches, all of one kind, as one: see `Trajectory.joined`."""
    return type(parts[0]).joined(parts)


def check_needs(needs: Iterable[str], kind: type[Trajectory], refused: Mapping[str, str]) -> frozenset[str]:
    """Validate the names of fields that a reader asks for; ``refused`` says why a sampler cannot record some.

    Raises:
        UserError: an unknown field, or one that is refused.
    """
    wanted = frozenset(needs)
    for name in sorted(wanted):
        if name not in kind.optional:
            raise UserError(f"trajectory field {name!r} does not exist{did_you_mean(name, kind.optional)}")
        if name in refused:
            raise UserError(f"trajectory field {name!r} {refused[name]}")
    return wanted


def pad_steps(value: Tensor, steps: int, idle: Tensor | None) -> Tensor:
    """``value`` (B, S, ...) for more steps: filled with the finished samples ``idle`` (B, ...), or with zeros."""
    missing = steps - value.shape[1]
    if idle is None:
        return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
    rest = idle[:, None].expand(-1, missing, *idle.shape[1:])
    return torch.cat([value, rest.to(value.dtype)], dim=1)


def _pad_prompts(value: Tensor, missing: int) -> Tensor:
    """``value`` (B, P + ...) with ``missing`` columns of padding in front: id 0, which nothing reads, or False."""
    return torch.cat([value.new_zeros(len(value), missing), value], dim=1) if missing else value

"""What stands in for log p: which canvases the network is shown, and which of their tokens count.

A likelihood turns a Trajectory into *views*: partly masked canvases together with the tokens whose log-probability is
read from them. Old, reference and new network see the very same views, so their randomness is shared by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.registry import Plugin
from unveil.samplers.trajectory import Trajectory
from unveil.seeds import generator


@dataclass(kw_only=True)
class Views:
    """N network inputs and what is scored in each.

    Attributes:
        ids: (N, L) canvases.
        valid: (N, L) True at real tokens.
        prompt_width: the column at which responses start; R = L - prompt_width.
        scored: (N, R) True at tokens whose log-probability is read.
        targets: (N, R) the tokens themselves.
        rows: (N,) the chain that a view belongs to.
        steps: (N,) the step whose advantage it carries.
        holes: (N,) masked response tokens of the canvas.
    """

    ids: Tensor
    valid: Tensor
    prompt_width: int
    scored: Tensor
    targets: Tensor
    rows: Tensor
    steps: Tensor
    holes: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def slice(self, start: int, end: int) -> Views:
        part = slice(start, end)
        return Views(
            ids=self.ids[part], valid=self.valid[part], prompt_width=self.prompt_width, scored=self.scored[part],
            targets=self.targets[part], rows=self.rows[part], steps=self.steps[part], holes=self.holes[part],
        )  # fmt: skip


class Likelihood(Plugin, family="likelihood"):
    """Makes views of a trajectory."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Trajectory fields that `views` reads."""
    resamples: ClassVar[bool] = False
    """True if the views of two inner updates differ."""
    per_step: ClassVar[bool] = True
    """True if views belong to steps (a selector chooses which), False if one view stands for the whole chain."""

    def views(self, trajectory: Trajectory, chosen: Tensor, seeds: Sequence[int], spec: DenoiserSpec) -> Views:
        """Views of the ``chosen`` (B, S) steps; ``seeds`` holds one seed per chain and inner update."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TrajectoryLikelihood(Likelihood, name="trajectory"):
    """The states that inference really visited: sum over steps of sum over tokens of log p(a_s | x_s)."""

    needs: ClassVar[frozenset[str]] = frozenset({"states", "guesses", "revealed"})
    tokens: Literal["masked", "revealed"] = "masked"
    """``masked``: the action is a token for every hole (MDPO). ``revealed``: only what the step committed (CJ-GRPO)."""

    def views(self, trajectory: Trajectory, chosen: Tensor, seeds: Sequence[int], spec: DenoiserSpec) -> Views:
        rows, steps = (chosen & trajectory.active).nonzero(as_tuple=True)
        assert trajectory.guesses is not None
        states = trajectory.states_at(rows, steps)
        holes = trajectory.holes_at(rows, steps)
        scored = holes
        if self.tokens == "revealed":
            assert trajectory.revealed is not None
            scored = holes & trajectory.revealed[rows, steps]
        return Views(
            ids=torch.cat([trajectory.prompt_ids[rows], states], 1),
            valid=trajectory.valid[rows],
            prompt_width=trajectory.prompt_ids.shape[1],
            scored=scored,
            targets=trajectory.guesses[rows, steps],
            rows=rows,
            steps=steps,
            holes=holes.sum(1),
        )


@dataclass(kw_only=True)
class OneStepLikelihood(Likelihood, name="one_step"):
    """One forward pass with the whole response masked and a random part of the prompt masked (diffu-GRPO, 2504.12216).

    Tokens up to and including the first end token count. Every inner update masks the prompt anew.
    """

    resamples: ClassVar[bool] = True
    per_step: ClassVar[bool] = False
    prompt_mask: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Probability of masking each prompt token."""

    def views(self, trajectory: Trajectory, chosen: Tensor, seeds: Sequence[int], spec: DenoiserSpec) -> Views:
        batch, width = trajectory.prompt_ids.shape
        prompt_valid, response_valid = trajectory.valid[:, :width], trajectory.response_valid
        drawn = torch.ones(batch, width)
        for row, seed in enumerate(seeds):
            # Drawn for the prompt's own length: padding of the batch must not change what is masked.
            own = prompt_valid[row].nonzero().squeeze(1)
            drawn[row, own] = torch.rand(len(own), generator=generator(seed, "prompt mask"))
        prompts = torch.where(prompt_valid & (drawn < self.prompt_mask), spec.mask_id, trajectory.prompt_ids)
        masked = torch.where(response_valid, spec.mask_id, trajectory.response_ids)
        scored = response_valid & up_to_end(trajectory.response_ids, spec.end_ids)
        return Views(
            ids=torch.cat([prompts, masked], 1),
            valid=trajectory.valid,
            prompt_width=width,
            scored=scored,
            targets=trajectory.response_ids,
            rows=torch.arange(batch),
            steps=trajectory.last_steps,
            holes=response_valid.sum(1),
        )


def up_to_end(ids: Tensor, end_ids: Sequence[int]) -> Tensor:
    """(B, R) True up to and including the first end token of each row."""
    ends = torch.isin(ids, torch.tensor(list(end_ids), device=ids.device))
    return (ends.cumsum(1) - ends.long()) == 0

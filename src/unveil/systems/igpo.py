"""IGPO: where all rollouts of a prompt are wrong, roll out again with parts of a known solution already in the canvas.

Zhao, Liu, Huang, Liu, Wang, Liu, Tian, Pang, Bell, Grover, Chen: *Inpainting-Guided Policy Optimization for Diffusion
Large Language Models*, 2025, arXiv 2509.10396. A group without a right answer has zero advantage and teaches nothing.
A masked model can inpaint, so such a group gets G more samples, each with its own share eta ~ U[low, high] of the
trace y* in place; the rest is decoded around it as usual, and up to R of those that turn out right replace members:

    chunks  = y* cut into pieces of random length; floor(n (1 - eta)) of the n pieces are hidden
    start_1 = floor(first_1 s),  start_k = end_{k-1} + min(floor(gap_k s), max_gap),  s = clamp(room / |y*|, 1, stretch)
    A_g     = r_g - mean(r)                                    over the repaired group
    rho_g   = exp(mean over k of log p_new - log p_old)        one ratio per chain, the whole response masked
    loss    = mean of -min(rho A, clip(rho) A) + beta (exp(d) - d - 1)

Hints are off-policy, so of a chain's hint tokens only the fifth with the highest entropy is learned from. In the
released code this `HintEntropy` thins only the mean over tokens. With a ratio per sequence all tokens of a chain have
the same policy term, so that there the filter takes weight from the chains with hints (their group's advantages no
longer balance) and every hint token keeps its gradient: ``token_filter.keeps_ratio: true`` and ``weighting:
token_mean``. Here what is filtered leaves the ratio, the loss and the KL term, and all chains weigh the same.

Also differs from the released code: all-wrong is asked of every group (there of the whole batch of a device, right only
for one group) and of the verifier, not of a reward of 3.0; replaced members are drawn at random (there the first); both
ends of eta work (there a full trace crashes); every sample is hinted or not by its own share. Kept: one attempt,
replacement from the seed, hints masked and scored like the rest of the response, no correction for their origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import OneStepLikelihood, TokenViews
from unveil.learning.objectives import Clipped, SequenceMean, Weighting
from unveil.learning.regularisers import Kl
from unveil.learning.views import Likelihood, TokenFilter
from unveil.registry import UserError
from unveil.samplers.base import Sampler, TokenSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.samplers.uniform import UniformSampler
from unveil.seeds import generator
from unveil.systems import System
from unveil.tasks.base import Problem
from unveil.training.rollouts import GroupHook, Roll, Rollouts

SYSTEM = System(
    name="igpo",
    title="Inpainting-Guided Policy Optimization for Diffusion Large Language Models",
    paper="2509.10396",
    family="masked",
    claim="hints in the canvas give all-wrong groups something to learn from; more is learned than from resampling",
)

Chunk = tuple[int, int]
"""First position and the position after the last."""


@dataclass(kw_only=True)
class Inpaint(GroupHook, name="inpaint"):
    """Repairs all-wrong groups by samples with hints from ``Problem.solution``; all lengths in tokens."""

    replacements: Annotated[int, Field(ge=1)] = 4
    """R, most members of a group that right samples replace; one member always stays, or nothing could be compared."""
    ratio_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Least share of the trace's chunks that is shown. Both shares 0: plain resampling, at the same cost."""
    ratio_high: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Largest share. Both shares 1: the whole trace."""
    sort: bool = True
    """The shares of a group rise from its first sample to its last."""
    chunk_min: Annotated[int, Field(ge=1)] = 5
    """Shortest chunk. What is left over at the end of the trace, if shorter, is shown only at a share of 1."""
    chunk_max: Annotated[int, Field(ge=1)] = 10
    """Longest chunk."""
    stretch: Annotated[float, Field(ge=1)] = 1.5
    """A trace that is shorter than its room is spread out by up to this factor."""
    max_gap: Annotated[int, Field(ge=0)] = 100
    """Most open positions between two chunks."""
    free_tail: Annotated[int, Field(ge=1)] = 30
    """Last positions of the response that never hold a hint."""
    answer_tokens: Annotated[int, Field(ge=0)] = 0
    """Last tokens of the trace that are never shown: the answer, if the trace ends with it."""
    answer_marker: str | None = None
    """The trace is cut off before the last occurrence of this text, such as ``The answer is`` or ``####``."""

    def __post_init__(self) -> None:
        if self.ratio_low > self.ratio_high:
            raise UserError(f"ratio_low: should be at most ratio_high ({self.ratio_high}), got {self.ratio_low}")
        if self.chunk_min > self.chunk_max:
            raise UserError(f"chunk_min: should be at most chunk_max ({self.chunk_max}), got {self.chunk_min}")

    def check_fits(self, sampler: Sampler, group_size: int, response_length: int) -> None:
        if not isinstance(sampler, TokenSampler) or isinstance(sampler, UniformSampler):
            raise UserError(
                f"policy.groups: 'inpaint' puts hints among masks, and {sampler.name!r} fills none (allowed: masked, "
                "reverse)"
            )
        if self.free_tail >= response_length and self.ratio_high > 0:
            raise UserError(
                f"policy.groups.free_tail: should be less than rollout.response_length ({response_length}), got "
                f"{self.free_tail}"
            )

    def apply(self, rollouts: Rollouts, roll: Roll, denoiser: MaskedDenoiser) -> tuple[Rollouts, dict[str, float]]:
        groups = [(rollouts.group == number).nonzero().flatten() for number in rollouts.group.unique()]
        wrong = [members for members in groups if not rollouts.correct[members].any()]
        said = {"all_wrong_groups": len(wrong) / len(groups), "all_wrong_left": len(wrong) / len(groups)}
        said["replaced"] = 0.0
        if not wrong:
            return rollouts, said
        problems = [rollouts.problems[int(members[0])] for members in wrong]
        streams = [generator(rollouts.seeds[int(members[0])], "hints") for members in wrong]
        width = rollouts.trajectory.response_ids.shape[1]
        initial = []
        for problem, members, stream in zip(problems, wrong, streams, strict=True):
            trace = self.trace(problem, denoiser)
            for ratio in self.ratios(len(members), stream):
                response = [denoiser.spec.mask_id] * width
                for position, token in self.place(trace, width, ratio, stream).items():
                    response[position] = token
                initial.append(response)
        rows = torch.cat(wrong)
        again = [rollouts.problems[row] for row in rows.tolist()]
        drawn = roll(again, rollouts.group[rows], label="inpaint", initial=initial)
        replaced, source = [], []
        for members, stream in zip(wrong, streams, strict=True):
            right = (drawn.correct & (drawn.group == rollouts.group[members[0]])).nonzero().flatten()
            most = min(self.replacements, len(members) - 1)
            chosen = right[torch.randperm(len(right), generator=stream)[:most]]
            source.append(chosen)
            replaced.append(members[torch.randperm(len(members), generator=stream)[: len(chosen)]])
        said["all_wrong_left"] = sum(not len(chosen) for chosen in source) / len(groups)
        said["inpainted_accuracy"] = drawn.correct.float().mean().item()
        said["replaced"] = sum(len(chosen) for chosen in source) / len(rollouts)
        return rollouts.replace(torch.cat(replaced), drawn, torch.cat(source)), said

    def trace(self, problem: Problem, denoiser: MaskedDenoiser) -> list[int]:
        """The tokens of the solution that may be shown.

        Raises:
            UserError: the problem has no solution.
        """
        text = problem.solution
        if text is None:
            raise UserError(f"policy.groups: 'inpaint' needs problems with a solution, {problem.id} has none")
        if self.answer_marker and self.answer_marker in text:
            text = text.rpartition(self.answer_marker)[0]
        tokens = denoiser.tokenizer.encode(text)
        return tokens[: max(0, len(tokens) - self.answer_tokens)]

    def ratios(self, count: int, stream: torch.Generator) -> list[float]:
        """Shares of the ``count`` samples of a group."""
        drawn = torch.rand(count, generator=stream, dtype=torch.float64)
        shares = self.ratio_low + (self.ratio_high - self.ratio_low) * drawn
        return (shares.sort().values if self.sort else shares).tolist()

    def place(self, trace: Sequence[int], width: int, ratio: float, stream: torch.Generator) -> dict[int, int]:
        """Response position -> hint, in a response of ``width`` positions that shows a share ``ratio`` of the trace."""
        room = max(0, width - self.free_tail)
        length = min(len(trace), room)
        if ratio <= 0 or length == 0:
            return {}
        shown = [(0, length)]
        if ratio < 1:
            shown = reveal(cut(length, self.chunk_min, self.chunk_max, stream), ratio, stream)
        starts = spread(shown, min(max(1.0, room / len(trace)), self.stretch), self.max_gap)
        return {
            start + offset: trace[first + offset]
            for start, (first, end) in zip(starts, shown, strict=True)
            for offset in range(end - first)
            if start + offset < room
        }


def cut(length: int, low: int, high: int, stream: torch.Generator) -> list[Chunk]:
    """Consecutive chunks of ``length`` tokens, each ``low`` to ``high`` long; a shorter tail is left out."""
    chunks, start = [], 0
    while length - start >= low:
        size = int(torch.randint(low, high + 1, (), generator=stream))
        chunks.append((start, min(start + size, length)))
        start = chunks[-1][1]
    return chunks


def reveal(chunks: Sequence[Chunk], ratio: float, stream: torch.Generator) -> list[Chunk]:
    """What is left of n chunks, in order, after floor(n (1 - ratio)) random ones are hidden."""
    hidden = int(len(chunks) * (1 - ratio) + 1e-9)
    kept = torch.randperm(len(chunks), generator=stream)[hidden:].sort().values
    return [chunks[index] for index in kept.tolist()]


def spread(chunks: Sequence[Chunk], factor: float, max_gap: int) -> list[int]:
    """New starts of chunks: the first start and every gap grow by ``factor``, gaps up to ``max_gap``."""
    starts: list[int] = []
    for number, (first, _) in enumerate(chunks):
        if number == 0:
            starts.append(int(first * factor))
        else:
            before, after = chunks[number - 1]
            starts.append(starts[-1] + after - before + min(int((first - after) * factor), max_gap))
    return starts


@dataclass(kw_only=True)
class HintEntropy(TokenFilter, name="hint_entropy"):
    """Of the hint tokens of every view only the most uncertain count; what the model wrote itself always does."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a view's hint tokens that is kept, by highest entropy; at least one."""
    keeps_ratio: bool = False
    """True: dropped tokens only lose their weight in the mean (the released code). False: they are gone."""

    def keep(self, views: TokenViews, entropy: Tensor, trajectory: TokenTrajectory) -> Tensor:
        hint = views.scored & trajectory.given[views.rows]
        quota = (hint.sum(1) * self.share + 1e-9).floor().clamp(min=1)
        uncertain = entropy[:, : hint.shape[1]].masked_fill(~hint, -torch.inf)
        rank = uncertain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = torch.ones_like(entropy, dtype=torch.bool)
        keep[:, : hint.shape[1]] = ~hint | (rank < quota[:, None])
        return keep


@dataclass(kw_only=True)
class Igpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`. ``likelihood`` may also be `PartialMask`, the
    released code's other schedule, or any other, and ``groups`` goes with any other method."""

    groups: Inpaint = field(default_factory=Inpaint)
    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="none"))
    likelihood: Likelihood = field(default_factory=lambda: OneStepLikelihood(prompt_mask=0.0, after_end="keep"))
    token_filter: HintEntropy | None = field(default_factory=HintEntropy)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.2, level="sequence", normalise=True))
    weighting: Weighting = field(default_factory=SequenceMean)
    kl: Kl = field(default_factory=lambda: Kl(beta=0.01, estimator="k3"))
    inner_updates: int = 4

"""What lies between a task and a sampler: how problems become a start, and finished states samples.

One medium per kind of sample, found by the denoiser. Everything above (evaluation, rewards, the policy job, records)
asks the medium, and knows nothing of tokens or pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unveil.denoisers.base import Denoiser, MaskedDenoiser
from unveil.registry import Plugin, UserError, lookup
from unveil.samplers.base import Start
from unveil.samplers.canvas import Canvas
from unveil.samplers.text import encode_prompts, response_texts
from unveil.samplers.trajectory import TokenTrajectory

Sample = Any
"""What a task judges and a reward scores: a string, or a tensor (C, H, W) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the B chains of a rollout come from.

    Attributes:
        problems: (B) a seed of each chain's problem.
        copies: (B) which of the problem's chains it is, from 0.
    """

    problems: Sequence[int]
    copies: Sequence[int]


class Medium(Plugin, family="medium"):
    """One kind of sample."""

    evaluated: ClassVar[frozenset[str]]
    """Trajectory fields that an evaluation reads."""
    shown: ClassVar[frozenset[str]]
    """Trajectory fields that `steps` reads."""

    def check_fits(self, denoiser: Any, prompts: Sequence[str], length: int | None) -> None:
        """Refuse prompts and a response length that the model has no room for.

        Raises:
            UserError: naming the key of `RolloutConfig` and what is allowed.
        """
        raise NotImplementedError

    def start(self, denoiser: Any, prompts: Sequence[str], length: int | None, origins: Origins, **how: Any) -> Start:
        """Where one chain per prompt begins; ``how`` is this medium's own."""
        raise NotImplementedError

    def samples(self, denoiser: Any, states: Tensor) -> list[Sample]:
        """N samples from finished states or guesses (N, ...)."""
        raise NotImplementedError

    def key(self, sample: Sample) -> Hashable:
        """Equal for samples that are judged and rewarded alike, so that it need be done only once."""
        raise NotImplementedError

    def numbers(self, denoiser: Any, trajectory: Any) -> dict[str, float]:
        """What an evaluation tells of the chains besides their verdicts."""
        return {}

    def written(self, sample: Sample) -> dict[str, Any]:
        """A sample as fields of a JSON record."""
        raise NotImplementedError

    def steps(self, denoiser: Any, trajectory: Any, row: int) -> list[dict[str, Any]]:
        """Every step of one chain as a JSON record, from the fields `shown`."""
        raise NotImplementedError


def medium_of(denoiser: Denoiser) -> Medium:
    return lookup(Medium, denoiser.medium)()


@dataclass(kw_only=True)
class Text(Medium, name="text"):
    """Responses of masked tokens."""

    evaluated: ClassVar[frozenset[str]] = frozenset({"guesses"})
    shown: ClassVar[frozenset[str]] = frozenset({"states", "guesses", "confidence", "revealed", "taken_back"})

    def check_fits(self, denoiser: MaskedDenoiser, prompts: Sequence[str], length: int | None) -> None:
        if length is None:
            raise UserError("policy.rollout.response_length: required for text, but missing")
        longest = max(len(ids) for ids in encode_prompts(denoiser, prompts))
        if longest + length > denoiser.spec.context_length:
            raise UserError(
                f"policy.rollout.response_length: {length} and prompts of up to {longest} tokens "
                f"do not fit the model's canvas (at most {denoiser.spec.context_length} tokens)"
            )

    def start(
        self, denoiser: MaskedDenoiser, prompts: Sequence[str], length: int | None, origins: Origins, **how: Any
    ) -> Canvas:
        """All holes, or ``initial`` responses with ``frozen`` positions, as in `Canvas.of`."""
        if length is None:
            raise UserError("response_length: required for text, but missing")
        return Canvas.of(encode_prompts(denoiser, prompts), length, denoiser.spec, **how)

    def samples(self, denoiser: MaskedDenoiser, states: Tensor) -> list[Sample]:
        return response_texts(denoiser, states)

    def key(self, sample: Sample) -> Hashable:
        return sample

    def numbers(self, denoiser: MaskedDenoiser, trajectory: TokenTrajectory) -> dict[str, float]:
        entropy = unigram_entropy(trajectory.response_ids, text_tokens(denoiser, trajectory)).mean().item()
        return {"sample_entropy": entropy}

    def written(self, sample: Sample) -> dict[str, Any]:
        return {"completion": sample}

    def steps(self, denoiser: MaskedDenoiser, trajectory: TokenTrajectory, row: int) -> list[dict[str, Any]]:
        """Canvas after the step (null = hole), guess, confidence, what changed."""
        assert trajectory.states is not None and trajectory.guesses is not None and trajectory.confidence is not None
        assert trajectory.revealed is not None and trajectory.taken_back is not None
        width = int(trajectory.response_valid[row].sum())
        count = int(trajectory.active[row].sum())
        texts = response_texts(denoiser, trajectory.guesses[row, :count])
        name = denoiser.tokenizer.tokens
        steps = []
        for step in range(count):
            last = step + 1 == count
            after = trajectory.response_ids[row] if last else trajectory.states[row, step + 1]
            hole = trajectory.states[row, step, :width] == trajectory.mask_id
            confidence = trajectory.confidence[row, step, :width]
            record: dict[str, Any] = {
                "tokens": [
                    None if token == trajectory.mask_id else text
                    for token, text in zip(after[:width].tolist(), name(after[:width].tolist()), strict=True)
                ],
                "guess": name(trajectory.guesses[row, step, :width].tolist()),
                "confidence": [
                    round(value, 4) if open_ else None
                    for value, open_ in zip(confidence.tolist(), hole.tolist(), strict=True)
                ],
                "revealed": trajectory.revealed[row, step, :width].nonzero().flatten().tolist(),
                "taken_back": trajectory.taken_back[row, step, :width].nonzero().flatten().tolist(),
                "text": texts[step],
            }
            steps.append(record)
        return steps


def text_tokens(denoiser: MaskedDenoiser, trajectory: TokenTrajectory) -> Tensor:
    """(B, R) True at the tokens of each response before its first end token; holes are no tokens."""
    ends = torch.isin(trajectory.response_ids, torch.tensor(denoiser.spec.end_ids))
    tokens = trajectory.response_valid & (trajectory.response_ids != trajectory.mask_id)
    return tokens & (ends.cumsum(1) == 0)


def unigram_entropy(ids: Tensor, counted: Tensor) -> Tensor:
    """-sum p log p in nats of the token frequencies within each sequence, (B,) float64; 0 where nothing is counted.

    Args:
        ids: (B, R) tokens.
        counted: (B, R) which of them count.
    """
    rows = []
    for row, own in zip(ids, counted, strict=True):
        frequency = row[own].unique(return_counts=True)[1].double()
        rows.append(torch.special.entr(frequency / frequency.sum()).sum())
    return torch.stack(rows)

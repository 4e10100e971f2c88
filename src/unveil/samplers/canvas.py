"""The canvas that a masked sampler writes on: prompts on the left, responses on the right, each row its own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.registry import UserError


@dataclass(kw_only=True)
class Canvas:
    """A batch of sequences ``[padding | prompt | response | padding]`` whose responses start at one column.

    Attributes:
        ids: (B, L) tokens; masks are holes to fill.
        valid: (B, L) True at real tokens, False at padding.
        frozen: (B, R) response positions that no decoding rule may write (infilled text, padding).
        prompt_width: the column at which every response starts; R = L - prompt_width.
    """

    ids: Tensor
    valid: Tensor
    frozen: Tensor
    prompt_width: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        response_length: int | Sequence[int],
        spec: DenoiserSpec,
        *,
        initial: Sequence[Sequence[int]] | None = None,
        frozen: Sequence[Sequence[bool]] | None = None,
    ) -> Canvas:
        """Lay out prompts and responses.

        Args:
            prompts: token ids, any lengths.
            response_length: one for all, or one per row.
            initial: responses to start from, mask ids where they are open; all masked if absent.
            frozen: positions of ``initial`` that stay whatever the rule does; if absent, its tokens that are not masks.

        Raises:
            UserError: a canvas would be longer than the model's context, a response is empty, or lengths do not fit.
        """
        lengths = [response_length] * len(prompts) if isinstance(response_length, int) else list(response_length)
        if not prompts:
            raise UserError("prompts: should hold at least one prompt, got none")
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            if length < 1:
                raise UserError(f"response_length: should be at least 1, got {length}")
            if len(prompt) + length > spec.context_length:
                raise UserError(
                    f"the model's canvas of {spec.context_length} tokens is too short for prompt {row} "
                    f"({len(prompt)} tokens) and its response ({length} tokens)"
                )
        prompt_width, width = max(len(prompt) for prompt in prompts), max(lengths)
        ids = torch.full((len(prompts), prompt_width + width), spec.pad_id)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        fixed = torch.ones(len(prompts), width, dtype=torch.bool)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            start, end = prompt_width - len(prompt), prompt_width + length
            response = [spec.mask_id] * length if initial is None else list(initial[row])
            held = [token != spec.mask_id for token in response] if frozen is None else list(frozen[row])
            if len(response) != length or len(held) != length:
                raise UserError(f"initial: row {row} has {len(response)} tokens, its response has {length}")
            if any(keep and token == spec.mask_id for keep, token in zip(held, response, strict=True)):
                raise UserError(f"frozen: row {row} freezes a mask, which nothing could ever fill")
            ids[row, start:prompt_width] = torch.tensor(list(prompt), dtype=torch.long)
            ids[row, prompt_width:end] = torch.tensor(response)
            valid[row, start:end] = True
            fixed[row, :length] = torch.tensor(held)
        return cls(ids=ids, valid=valid, frozen=fixed, prompt_width=prompt_width)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """R, columns of the responses."""
        return self.ids.shape[1] - self.prompt_width

    @property
    def response(self) -> Tensor:
        """(B, R) response part of the ids (a view)."""
        return self.ids[:, self.prompt_width :]

    @property
    def response_valid(self) -> Tensor:
        """(B, R) True inside each row's response."""
        return self.valid[:, self.prompt_width :]

    def to(self, device: torch.device) -> Canvas:
        return Canvas(
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            frozen=self.frozen.to(device),
            prompt_width=self.prompt_width,
        )

    def rows(self, index: Tensor | slice) -> Canvas:
        """The canvas of some rows, columns unchanged."""
        return Canvas(
            ids=self.ids[index],
            valid=self.valid[index],
            frozen=self.frozen[index],
            prompt_width=self.prompt_width,
        )

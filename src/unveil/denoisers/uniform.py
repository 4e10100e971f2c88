"""What a denoiser of uniform noise does: it reads what is finished and denoises a canvas of random tokens behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser


class UniformDenoiser(MaskedDenoiser):
    """A network whose noise is random tokens. Prompt and finished blocks are read once per canvas.

    The methods here serve a network that sees prompt and canvas in one sequence; one with a cache has its own.
    """

    def read(self, ids: Tensor, valid: Tensor, before: Any = None) -> Any:
        """What denoising needs to know of the finished tokens ``ids`` (B, P), which follow those of ``before``."""
        if before is not None:
            ids, valid = torch.cat([before[0], ids], 1), torch.cat([before[1], valid], 1)
        return ids, valid

    def denoise(self, canvas: Tensor, valid: Tensor, prefix: Any, t: Tensor, believed: Tensor | None) -> Tensor:
        """Logits (B, C, V) of x_0 at ``canvas`` (B, C) behind a prefix from `read`; padding where not ``valid`` (B, C).

        Args:
            t: (B,) the time of each canvas; networks without time conditioning ignore it.
            believed: (B, C, V) logits that tokens were drawn from at the step before, None at the first; networks
                without self-conditioning ignore them.
        """
        ids, before = prefix
        features = self.features(torch.cat([ids, canvas], 1), torch.cat([before, valid], 1), t)
        return self.head(features[:, ids.shape[1] :])

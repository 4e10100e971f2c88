"""Real handwritten digits, 8 x 8 pixels, that come with scikit-learn: the smallest images worth generating."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unveil.tasks.images import LabelledImages, require


@dataclass(kw_only=True)
class Digits(LabelledImages, name="digits"):
    """1,797 grey digits of 17 levels. Prompts: ``0`` .. ``9``."""

    names = tuple("0123456789")
    judge_name = "digits-judge"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        require("sklearn")
        from sklearn.datasets import load_digits

        found = load_digits()
        return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)

"""For all tests. Lying here, it also puts this folder on the import path (for `tiny`)."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

"""Seeds that depend on what is computed, never on where or in which batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, e.g. ``derive_seed(run_seed, "rollout", problem_id, sample)``.

    Stable across processes, machines and Python versions (unlike ``hash``).
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def normal_rows(shape: Sequence[int], seeds: Iterable[int]) -> torch.Tensor:
    """N(0, I) (rows, *shape) on the CPU, each row from a seed of its own."""
    stream = torch.Generator()
    return torch.stack([torch.randn(shape, generator=stream.manual_seed(seed)) for seed in seeds])

"""Seeds that depend on what is computed, never on where or in which batch."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, e.g. ``derive_seed(run_seed, "rollout", problem_id, sample)``.

    Stable across processes, machines and Python versions (unlike ``hash``).
    """
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))

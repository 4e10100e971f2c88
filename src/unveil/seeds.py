"""Seeds that depend on what is computed, never on where or in which batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, e.g. ``derive_seed(run_seed, "rollout", problem_id, sample)``.

    Stable across processes, machines and Python versions (unlike ``hash``).
    """
    return _hashed("\x1f".join(map(str, parts)))


def derive_seeds(seeds: Iterable[int], *parts: object) -> list[int]:
    """``derive_seed(seed, *parts)`` of every one of some seeds."""
    rest = "".join(f"\x1f{part}" for part in parts)
    return [_hashed(f"{seed}{rest}") for seed in seeds]


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def normal_rows(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """N(0, I) (rows, *shape) on the CPU, each row from a seed of its own."""
    return _filled(torch.Tensor.normal_, shape, seeds)


def uniform_rows(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Uniform in [0, 1), otherwise as `normal_rows`."""
    return _filled(torch.Tensor.uniform_, shape, seeds)


def _filled(draw: Callable[..., torch.Tensor], shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    stream, rows = torch.Generator(), torch.empty(len(seeds), *shape)
    for row, seed in zip(rows.unbind(), seeds, strict=True):
        draw(row, generator=stream.manual_seed(seed))
    return rows


def _hashed(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Seeds and rows of noise against the same one by one."""

from __future__ import annotations

import torch

from unveil.seeds import derive_seed, derive_seeds, normal_rows, uniform_rows

SEEDS = [derive_seed("row", number) for number in range(4)]


def test_seeds_of_many_are_those_of_each() -> None:
    assert derive_seeds(SEEDS, "step", 3, True) == [derive_seed(seed, "step", 3, True) for seed in SEEDS]
    assert derive_seeds(SEEDS) == [derive_seed(seed) for seed in SEEDS]
    assert len({*derive_seeds(SEEDS, "step", 3), *derive_seeds(SEEDS, "step", 4)}) == 8


def test_rows_are_those_of_a_generator_each() -> None:
    """Of fewer numbers than are drawn at a time, and of more, and of a shape without axes."""
    for shape in ((), (1,), (3,), (15,), (16,), (17,), (2, 4, 4), (3, 5, 7)):
        streams = [[torch.Generator().manual_seed(seed) for seed in SEEDS] for _ in range(2)]
        normal = [torch.randn(shape, generator=stream) for stream in streams[0]]
        uniform = [torch.rand(shape, generator=stream) for stream in streams[1]]
        assert torch.equal(normal_rows(shape, SEEDS), torch.stack(normal))
        assert torch.equal(uniform_rows(shape, SEEDS), torch.stack(uniform))

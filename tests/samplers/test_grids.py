"""Time grids against the formulas they are named after."""

from __future__ import annotations

import math

import pytest
import torch

from unveil.processes.gaussian import Flow, VarianceExploding, VariancePreserving
from unveil.registry import UserError
from unveil.samplers.grids import Grid, Karras, Sd3, Table, Uniform, resolution_shift

VP = VariancePreserving(betas="scaled_linear", low=0.00085, high=0.012)


def test_uniform_and_shifted() -> None:
    assert Uniform().times(Flow(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert Uniform(start=0.6, end=0.1).times(Flow(), 5).tolist() == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    times = Uniform(shift=3.0).times(Flow(), 10)
    ratios = Flow().ratio(times) / Flow().ratio(Uniform().times(Flow(), 10))
    assert ratios[1:-1].tolist() == pytest.approx([3.0] * 9)
    assert times[-2:].tolist() == pytest.approx([0.25, 0])


def test_sd3_shifts_its_lower_end_twice() -> None:
    times = Sd3().times(Flow(), 10)
    assert times[-3:].tolist() == pytest.approx([0.278, 0.0089, 0], abs=5e-4)
    awm = Sd3(start=0.999, halved=True).times(Flow(), 10)
    assert awm[0] == 0.999 and awm[1:-2].tolist() == times[1:-2].tolist()
    assert awm[-2:].tolist() == [float(times[-3]) / 2, 0]


def test_flux_shift_is_a_shift_of_e_to_the_m() -> None:
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    t, m = 0.3, math.log(resolution_shift(1024))
    published = math.exp(m) / (math.exp(m) + 1 / t - 1)
    assert float(Uniform(shift=math.exp(m), start=t).times(Flow(), 1)[0]) == pytest.approx(published)


def test_karras_is_even_in_the_root_of_the_noise() -> None:
    for process in (VarianceExploding(), VP):
        ratio = process.ratio(Karras().times(process, 8)[:-1])
        root = ratio ** (1 / 7)
        torch.testing.assert_close(root.diff(), root.diff().mean().expand(7))
        assert float(ratio[-1]) == pytest.approx(0.002)
        assert float(ratio[0]) == pytest.approx(float(process.ratio(torch.ones(1))))
    # EDM's own time is even there.
    times = Karras(ratio_min=80 * 1e-12).times(VarianceExploding(), 5)
    torch.testing.assert_close(times[:-1].diff(), times[:-1].diff().mean().expand(4))


def test_tables_choose_the_published_entries() -> None:
    def entries(grid: Table, steps: int) -> list[int]:
        return (grid.times(VP, steps)[:-1] * 1000 - 1).round().long().tolist()

    assert entries(Table(), 4) == [750, 500, 250, 0]
    assert entries(Table(offset=1), 4) == [751, 501, 251, 1]
    assert entries(Table(spacing="trailing"), 7) == [999, 856, 713, 570, 428, 285, 142]
    assert entries(Table(spacing="linspace"), 4) == [999, 666, 333, 0]
    assert float(Table(offset=1, final="first").times(VP, 4)[-1]) == 0.001
    assert float(Table().times(VP, 4)[-1]) == 0


@pytest.mark.parametrize(
    ("grid", "process", "steps", "message"),
    [
        (Uniform(), Flow(), 0, "steps: should be at least 1, got 0"),
        (Uniform(start=0.2, end=0.4), Flow(), 2, "do not fall at 2 steps"),
        (Karras(), Flow(), 5, "ratio_max is inf"),
        (Karras(ratio_max=100.0), VarianceExploding(), 5, "ratio_max is 100, at most the finite 80"),
        (Karras(ratio_min=9.0, ratio_max=3.0), Flow(), 5, "must be below ratio_max 3"),
        (Table(), Flow(), 5, "needs a process with a table of betas"),
        (Table(), VP, 1001, "more than the table's 1000"),
        (Table(offset=500), VP, 4, "leads beyond the table"),
        (Table(final="first"), VP, 4, "do not fall at 4 steps"),
    ],
)
def test_bad_grids_are_refused(grid: Grid, process: Flow, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        grid.times(process, steps)
    assert "\n" not in str(error.value)

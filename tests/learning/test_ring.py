"""Process, matching loss, grid, solver and sampler together: a ring of eight narrow bumps in the plane is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.matching import LogNormalNoise, TimeDistribution, UniformTimes, matching_errors, stratified
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction, VarianceExploding, VariancePreserving
from unveil.processes.kernels import Ddim, FlowSde, Kernel
from unveil.samplers.grids import Grid, Karras, Uniform
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import DpmSolver2M, First, Heun, LatentSolver
from unveil.samplers.latents import Noise

ANGLES = torch.arange(8) * math.pi / 4
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WIDTH = 0.05


class Plane(ContinuousDenoiser):
    """Three hidden layers over a point and Fourier features of its time."""

    def __init__(self, process: GaussianProcess, prediction: Prediction) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=(2,), process=process, prediction=prediction)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((2 + 16, 96), (96, 96), (96, 96), (96, 2)))

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        angle = t.to(x)[:, None] * (2.0 ** torch.arange(8)) * math.pi / 2
        hidden = torch.cat([self.spec.process.scaled(x, t), angle.sin(), angle.cos()], 1)
        for layer in self.layers[:-1]:
            hidden = F.silu(layer(hidden))
        return self.layers[-1](hidden)


def ring(count: int, stream: torch.Generator) -> Tensor:
    mode = torch.randint(8, (count,), generator=stream)
    return CENTRES[mode] + WIDTH * torch.randn(count, 2, generator=stream)


def taught(process: GaussianProcess, prediction: Prediction, times: TimeDistribution) -> Plane:
    stream = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Plane(process, prediction)
    steps = 4000
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    empty = net.condition([""] * 256)
    for _ in range(steps):
        u = stratified(torch.rand(256, generator=stream, dtype=torch.float64), stream)
        noise = torch.randn(256, 2, generator=stream)
        loss = matching_errors(net, ring(256, stream), times.times(u, process), noise, empty).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "prediction", "times", "grid", "between"),
    [
        (Flow(), "u", UniformTimes(), Uniform(), 0.1),
        (VariancePreserving(betas="cosine"), "v", UniformTimes(), Uniform(), 0.1),
        (VarianceExploding(sigma_max=20.0), "edm", LogNormalNoise(), Karras(), 0.025),
    ],
    ids=["flow", "vp", "edm"],
)
def test_a_ring_of_eight_bumps(process: Any, prediction: Any, times: Any, grid: Grid, between: float) -> None:
    """Under every kernel and solver each bump gets its share, and at most ``between`` lies five widths away from all.

    The limit on what lies between the bumps is that of so small a network (measured: 2-6 % on a flow or the
    variance-preserving path, 0.4-1.6 % with EDM's preconditioning).
    """
    net, count = taught(process, prediction, times), 4000
    start = Noise(condition=net.condition([""] * count), problems=list(range(count)), copies=[0] * count)
    ways: list[tuple[Kernel, LatentSolver, int]] = [
        (Ddim(eta=0.0), First(), 100), (Ddim(eta=0.0), Heun(), 30), (Ddim(eta=0.0), DpmSolver2M(), 40),
        (Ddim(eta=1.0), First(), 200), (FlowSde(noise=0.5), First(), 400),
    ]  # fmt: skip
    for kernel, solver, steps in ways:
        if kernel.name == "flow" and process.name != "flow":
            continue
        sampler = LatentSampler(steps=steps, grid=grid, kernel=kernel, solver=solver)
        points = sampler.sample(net, start, list(range(count))).samples
        distance, mode = torch.cdist(points, CENTRES).min(1)
        shares = torch.bincount(mode, minlength=8) / count
        assert float(shares.min()) > 0.09 and float(shares.max()) < 0.16, (kernel, solver, shares)
        assert float((distance > 5 * WIDTH).float().mean()) < between, (kernel, solver)

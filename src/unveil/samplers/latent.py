"""One denoising loop for continuous latents: any grid, kernel, solver, window of stochastic steps and guidance.

A step asks the network once, guidance included, and then either draws x_s from the kernel's Gaussian or moves on as the
solver says. `LatentSampler.transition` is that Gaussian; a likelihood scores stored steps with the very same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.processes.gaussian import Gaussian, GaussianProcess, Guess, spread
from unveil.processes.kernels import Ddim, Kernel, Mixing, deterministic
from unveil.registry import UserError, names
from unveil.samplers.base import Sampler
from unveil.samplers.grids import Grid, Uniform
from unveil.samplers.guidance import Clamp, Guidance, NoGuidance
from unveil.samplers.latent_solvers import Again, Churn, First, LatentSolver, Memory
from unveil.samplers.latents import LatentTrajectory, Noise, at_ends
from unveil.samplers.windows import Everywhere, Window
from unveil.seeds import derive_seed, derive_seeds, normal_rows


@dataclass(frozen=True, kw_only=True)
class Split:
    """A further point at which chains go apart, behind the one where the window begins."""

    left: Annotated[int, Field(ge=1)]
    """Steps that are left there."""
    leaves: Annotated[int, Field(ge=2)]
    """Chains that are one until then."""


class Move(NamedTuple):
    """One step of B chains.

    Attributes:
        times: (B,) at which the network was asked.
        guess: what it said.
        gaussian: the distribution of the next states; without noise std is 0.
        after: (B, *D) the next states.
        noisy: whether they were drawn with noise.
        memory: what the solver remembers.
    """

    times: Tensor
    guess: Guess
    gaussian: Gaussian
    after: Tensor
    noisy: bool
    memory: Memory


@dataclass(kw_only=True)
class LatentSampler(Sampler, name="latent"):
    """How samples are drawn from a denoiser of continuous latents."""

    denoises = ContinuousDenoiser
    leaves = LatentTrajectory

    steps: Annotated[int, Field(ge=1)]
    """Denoising steps."""
    grid: Grid = field(default_factory=Uniform)
    """The times of the steps."""
    kernel: Kernel = field(default_factory=lambda: Ddim(eta=0.0))
    """How steps inside the window are drawn; by default none is: the ODE."""
    window: Window = field(default_factory=Everywhere)
    """Which steps the kernel draws. They are what a policy is trained on."""
    outside: Kernel = field(default_factory=lambda: Ddim(eta=0.0))
    """How the other steps are made; by default without noise."""
    solver: LatentSolver = field(default_factory=First)
    """Of steps without noise."""
    churn: Churn | None = None
    """Noise that is added before every step without noise, and taken away by it (EDM)."""
    compress: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps behind the window that remains, at least one; they are the longer (MixGRPO-Flash)."""
    guidance: Guidance = field(default_factory=NoGuidance)
    """What becomes of the prompt's prediction. The policy is the guided one."""
    clamp: Clamp | None = None
    """The interval that the expected x_0 is cut to; None: it stays as it is."""
    share: Literal["nothing", "noise", "prefix"] = "nothing"
    """What the chains of one problem have in common: nothing, the initial noise, or everything before the window, which
    is then computed once (branches of one stem)."""
    branches: Annotated[int, Field(ge=1)] | None = None
    """Chains that share; None: all those of a problem."""
    splits: list[Split] = field(default_factory=list)
    """With ``share: prefix`` a tree: a stem's branches go apart where the window begins, and again at each of these, in
    the order of the steps."""

    def __post_init__(self) -> None:
        self.window.check_fits(self.steps)
        if self.branches is not None and self.share == "nothing":
            raise UserError("branches: the chains share nothing (allowed with share: noise, prefix)")
        if self.splits and self.share != "prefix":
            raise UserError(f"splits: the chains share {self.share} (allowed with share: prefix)")
        left, leaves = self.steps, self.branches
        for number, split in enumerate(self.splits):
            if split.left >= left:
                raise UserError(f"splits.{number}.left: should be below {left}, got {split.left}")
            if leaves is not None and (leaves % split.leaves or split.leaves == leaves):
                raise UserError(f"splits.{number}.leaves: should divide {leaves} into several, got {split.leaves}")
            left, leaves = split.left, split.leaves
        for key, kernel in (("kernel", self.kernel), ("outside", self.outside)):
            if self.solver.reads_std and kernel.stochastic and not isinstance(kernel, Mixing):
                known = ", ".join(name for name in names(Kernel) if issubclass(Kernel.known[name], Mixing))
                raise UserError(
                    f"{key}: {kernel.name!r} makes steps that the solver {self.solver.name!r} does not know "
                    f"(allowed: {known})"
                )

    @property
    def greedy(self) -> bool:
        noisy = self.kernel.stochastic or self.outside.stochastic or self.churn is not None
        return self.share != "nothing" and self.branches is None and not noisy

    @property
    def planned_steps(self) -> int | None:
        first, kept = self._behind()
        return first + kept

    def at(self, update: int, seed: int) -> LatentSampler:
        return replace(self, window=self.window.at(update, seed, self.steps))

    def told(self, start: Noise, prompts: Sequence[str]) -> Noise:
        known = self.guidance.told(prompts)
        return replace(start, condition=start.condition.beside(known)) if known else start

    def check_fits(self, response_length: int | None) -> None:
        if response_length is not None:
            raise UserError(
                f"response_length: samples of the sampler 'latent' have the network's own shape, got {response_length} "
                "(allowed: null)"
            )

    def refused_fields(self) -> dict[str, str]:
        if not self.kernel.stochastic:
            return {"log_prob": "needs steps with noise, and the sampler's kernel has none"}
        if self.solver.through_noise:
            why = f"is of no use: a step of the solver {self.solver.name!r} depends on more than the state before it"
            return {"log_prob": why, "means": why}
        return {}

    def times(self, denoiser: ContinuousDenoiser, start: float = 1.0) -> Tensor:
        """(S + 1,) float64 times of the states of a chain that starts at ``start``."""
        grid = self.grid.times(denoiser.spec.process, self.steps)
        first, kept = self._behind()
        if first + kept < self.steps:
            places = torch.linspace(first, self.steps, kept + 1).round().long()  # of the grid's own times
            grid = torch.cat([grid[:first], grid[places]])
        if start >= 1:
            return grid
        return torch.cat([grid.new_tensor([start]), grid[grid < start]])

    def inside(self, steps: int) -> Tensor:
        """(steps,) True at the steps in the window, of a chain that takes the last ``steps`` of the grid's."""
        first, kept = self._behind()
        return self.window.inside(self.steps)[: first + kept][-steps:]

    def _behind(self) -> tuple[int, int]:
        """The first step behind the window, and how many steps there are from there on."""
        inside = self.window.inside(self.steps).nonzero()
        first = int(inside[-1]) + 1 if len(inside) else 0
        rest = self.steps - first
        return first, max(1, round(self.compress * rest)) if rest else 0

    def transition(
        self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition
    ) -> tuple[Gaussian, Guess]:
        """The distribution of x_s given x (B, *D) inside the window, times t and s (B,), and the guess behind it."""
        guess = self.guess(denoiser, x, t, condition)
        return self.kernel.step(denoiser.spec.process, guess, x, t, s), guess

    def guess(self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        """What a step at x (B, *D), times t (B,), is made with."""
        guess = self.guidance.guess(denoiser, x, t, condition)
        return guess if self.clamp is None else self.clamp.cut(denoiser.spec.process, guess, x, t)

    def move(
        self,
        process: GaussianProcess,
        asked: Again,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        *,
        noise: Callable[[], Tensor],
        memory: Memory,
        inside: bool = True,
    ) -> Move:
        """One step of chains at x (B, *D) from times t to s (B,); ``memory`` stays as it is.

        Args:
            asked: what the network says, guidance included.
            noise: draws (B, *D) from N(0, I); called at most once.
            memory: what the solver remembers of the steps before.
            inside: whether the step lies in the window.
        """
        kernel, memory = self.kernel if inside else self.outside, dict(memory)
        if self.churn is not None and not kernel.stochastic:
            x, t = self.churn.raised(process, x, t, noise(), self.steps)

        def solved(std: Tensor | None = None) -> Guess:
            return self.solver.solve(process, guess, x, t, s, memory, asked, std)

        guess = better = asked(x, t)
        gaussian = kernel.step(process, guess, x, t, s) if kernel.stochastic else None
        through = gaussian is not None and self.solver.through_noise
        if gaussian is not None and through:
            better = solved(gaussian.std)
            gaussian = kernel.step(process, better, x, t, s)
        noisy = gaussian is not None and bool((gaussian.std > 0).all())
        if gaussian is not None and noisy:
            after = gaussian.sample(noise())
            if not through:
                memory = {}  # what a solver remembers is of a chain without noise
        else:
            after = deterministic(process, better if through else solved(), s)
            gaussian = Gaussian(mean=after, std=torch.zeros(len(x), dtype=torch.float64))
        return Move(times=t, guess=guess, gaussian=gaussian, after=after, noisy=noisy, memory=memory)

    def sample_batch(
        self, denoiser: ContinuousDenoiser, start: Noise, seeds: Sequence[int], needs: frozenset[str]
    ) -> LatentTrajectory:
        return _Chains(self, denoiser, start, seeds, needs).run()


class _Level:
    """Steps from ``start`` on at which the chains with one seed are one row. Their first chain stands for all."""

    def __init__(self, start: int, seeds: Sequence[int], device: torch.device, *, apart: bool = False) -> None:
        """``seeds`` (B) of every chain; ``apart``: each chain is a row, whatever its seed."""
        names = list(range(len(seeds))) if apart else list(seeds)
        first = {name: chain for chain, name in reversed(list(enumerate(names)))}
        rows = list(dict.fromkeys(names))
        order = {name: number for number, name in enumerate(rows)}
        self.start = start
        self.first = torch.tensor([first[row] for row in rows])
        self.seeds = [seeds[chain] for chain in self.first.tolist()]
        self.row_of = torch.tensor([order[name] for name in names], device=device)
        """(B,) the row of each chain."""


class _Chains:
    """The chains of one batch. There may be fewer rows than chains: one per stem, then one per branch of it."""

    def __init__(
        self,
        sampler: LatentSampler,
        denoiser: ContinuousDenoiser,
        start: Noise,
        seeds: Sequence[int],
        needs: frozenset[str],
    ) -> None:
        self.sampler, self.denoiser, self.needs, self.seeds = sampler, denoiser, needs, seeds
        self.process, self.device = denoiser.spec.process, denoiser.device
        self.times = sampler.times(denoiser, start.time)
        self.steps = len(self.times) - 1
        self.inside = sampler.inside(self.steps)
        first = int(self.inside.nonzero()[0]) if bool(self.inside.any()) else self.steps
        self.levels = self._levels(start, first if sampler.share == "prefix" else 0)
        self.level = self.levels.pop(0)
        self.batch = len(start)
        self.condition = start.condition.to(self.device)
        self.x = self._initial(start)
        self.memory: Memory = {}
        self.forwards = 0
        self.states: list[Tensor] = []
        self.kept: dict[str, list[Tensor]] = {name: [] for name in needs - {"latents", "scored", "times", "seeds"}}
        self.noisy: list[bool] = []

    def run(self) -> LatentTrajectory:
        for step in range(self.steps):
            while self.levels and self.levels[0].start == step:
                self._part(self.levels.pop(0))
            self._step(step, self.condition if not self.levels else self.condition.rows(self.level.first))
        self.x = self._of_chains(self.x)
        return self._trajectory()

    def _part(self, level: _Level) -> None:
        """Go on with the rows of another level."""
        rows = self.level.row_of[level.first.to(self.device)]
        self.x = self.x[rows]
        self.memory = {name: value[rows.to(value.device)] for name, value in self.memory.items()}
        self.level = level

    def _of_chains(self, value: Tensor) -> Tensor:
        """(B, ...) of a value per row."""
        return value if len(value) == self.batch else value[self.level.row_of.to(value.device)]

    def _step(self, step: int, condition: Condition) -> None:
        sampler, count = self.sampler, len(self.x)
        inside = bool(self.inside[step])

        def asked(x: Tensor, t: Tensor) -> Guess:
            self.forwards += count * sampler.guidance.evaluations
            return sampler.guess(self.denoiser, x, t, condition)

        move = sampler.move(
            self.process, asked, self.x, self.times[step].expand(count), self.times[step + 1].expand(count),
            noise=lambda: self._noise(step), memory=self.memory, inside=inside,
        )  # fmt: skip
        self._record(self.x, move)
        self.noisy.append(move.noisy and inside)
        self.x, self.memory = move.after, move.memory

    def _stems(self, start: Noise) -> list[int]:
        """(B) a seed of what each chain shares with others; its own if it shares nothing."""
        if self.sampler.share == "nothing":
            return list(self.seeds)
        size = self.sampler.branches
        number = [0 if size is None else copy // size for copy in start.copies]
        return [derive_seed(problem, "stem", place) for problem, place in zip(start.problems, number, strict=True)]

    def _levels(self, start: Noise, own_from: int) -> list[_Level]:
        """Stems up to step ``own_from``, then the branches of every split, then each chain by itself."""
        levels, begin = [], 0
        if own_from:
            levels, begin = [_Level(0, self._stems(start), self.device)], own_from
        for split in self.sampler.splits:
            end = self.steps - split.left
            if end > begin:
                number = [copy // split.leaves for copy in start.copies]
                pairs = zip(start.problems, number, strict=True)
                seeds = [derive_seed(problem, "split", split.left, place) for problem, place in pairs]
                levels.append(_Level(begin, seeds, self.device))
                begin = end
        return [*levels, _Level(begin, self.seeds, self.device, apart=True)]

    def _initial(self, start: Noise) -> Tensor:
        """The states that the rows start from."""
        chains = self.level.first
        if start.initial is not None:
            return start.initial[chains].to(self.device, torch.float32)
        own = self._stems(start)
        noise = _drawn(self.denoiser, [own[chain] for chain in chains.tolist()], "initial")
        return noise * spread(self.process.sigma(self.times[:1]), noise)

    def _noise(self, step: int) -> Tensor:
        return step_noise(self.denoiser, self.level.seeds, step)

    def _record(self, x: Tensor, move: Move) -> None:
        if self.needs & {"latents", "scored"}:
            self.states.append(self._of_chains(x).cpu())
        for name in self.kept:
            if name == "guesses":
                value = move.guess.x0
            elif name == "means":
                value = move.gaussian.mean
            elif name == "stds":
                value = move.gaussian.std
            elif move.noisy:
                value = move.gaussian.log_prob(move.after, "sum")
            else:
                value = torch.zeros(len(x), dtype=torch.float64)
            self.kept[name].append(self._of_chains(value).cpu())

    def _trajectory(self) -> LatentTrajectory:
        samples, noisy = self.x.cpu(), torch.tensor(self.noisy)
        recorded = {name: torch.stack(values, 1) for name, values in self.kept.items()}
        if self.states:
            states = torch.stack([*self.states, samples], 1)
            if "latents" in self.needs:
                recorded["latents"] = states
            if "scored" in self.needs:
                recorded["scored"] = states[:, at_ends(noisy)]
        if "times" in self.needs:
            recorded["times"] = self.times.expand(self.batch, -1).clone()
        if "seeds" in self.needs:
            recorded["seeds"] = torch.tensor(self.seeds)
        return LatentTrajectory(
            active=torch.ones(self.batch, self.steps, dtype=torch.bool),
            planned=torch.full((self.batch,), self.steps),
            forwards=self.forwards,
            samples=samples,
            noisy=noisy.repeat(self.batch, 1),
            condition=self.condition.to(torch.device("cpu")),
            **recorded,
        )


def step_noise(denoiser: ContinuousDenoiser, seeds: Sequence[int], step: int) -> Tensor:
    """N(0, I) (B, *D) of one step of chains, each from its own seed."""
    return _drawn(denoiser, seeds, "step", step)


def _drawn(denoiser: ContinuousDenoiser, seeds: Sequence[int], *parts: object) -> Tensor:
    """N(0, I) (rows, *D), each row from a seed of its own."""
    return normal_rows(denoiser.spec.shape, derive_seeds(seeds, *parts)).to(denoiser.device)

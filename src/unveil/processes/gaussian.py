"""Gaussian processes over continuous samples: corruption, parameterisations, one reverse step that samples and scores.

    x_t = alpha(t) x_0 + sigma(t) eps,   t = 0 data, t = 1 noise,   lambda = log(alpha / sigma) half the log-SNR

Networks predict one of several linear combinations p = a x_0 + b eps. With x_t these are two equations, so every
prediction leads to the same normal form, a `Guess` (x_0, eps):

    x_0 = (b x_t - sigma p) / D,   eps = (alpha p - a x_t) / D,   D = alpha b - sigma a

| path | alpha, sigma | usual prediction |
|---|---|---|
| `VariancePreserving` | sqrt(ab), sqrt(1 - ab), ab = cumprod(1 - beta) | eps, x0, v = alpha eps - sigma x_0 |
| `Flow` | 1 - t, t | u = eps - x_0 |
| `VarianceExploding` (EDM) | 1, sigma_max t^rho | edm: the F in D(x) = c_skip x + c_out F |

Times are per sample, shape (B,); coefficients are float64 and then take the dtype of the sample, which is float32 or
float64: half precision is cast up. Times may stay on the CPU while samples are on another device: checking them then
does not wait for it.

Sources: DDPM (arXiv 2006.11239), DDIM (2010.02502), EDM (2206.00364), rectified flow (2209.03003).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import Plugin, UserError

Prediction = Literal["eps", "x0", "v", "u", "edm"]
Reduce = Literal["sum", "mean"]
Answer = TypeVar("Answer")


class Form(NamedTuple):
    """Of samples (B, *D): what a number per sample must be to be multiplied with them."""

    device: torch.device
    dtype: torch.dtype
    dim: int

    @classmethod
    def of(cls, x: Tensor) -> Form:
        return cls(x.device, x.dtype, x.dim())


def remembered(compute: Callable[..., Answer]) -> Callable[..., Answer]:
    """Remembers what a function says of numbers per sample.

    The chains of a run are asked about the few times of one grid, update after update, and coefficients are many small
    operations.

    Args:
        compute: a function of numbers (B,), which come as float64 on the CPU, and of hashable settings.

    Returns:
        The same function, of numbers of any dtype on any device, that have no gradient. Its answers must stay as they
        are.
    """

    @functools.lru_cache(maxsize=1024)
    def known(*arguments: Any) -> Answer:
        with torch.inference_mode(False):
            return compute(*(_numbers(one) if isinstance(one, bytes) else one for one in arguments))

    @functools.wraps(compute)
    def asked(*arguments: Any) -> Answer:
        return known(*[_bytes(one) if isinstance(one, Tensor) else one for one in arguments])

    return asked


def _bytes(numbers: Tensor) -> bytes:
    return numbers.double().cpu().numpy().tobytes()


def _numbers(held: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(held).copy())


class Guess(NamedTuple):
    """What a network says of a noisy sample, in the normal form.

    Attributes:
        x0: the clean sample that it expects (B, *D).
        eps: the noise that it expects (B, *D); x_t = alpha x0 + sigma eps unless one of the two was changed.
    """

    x0: Tensor
    eps: Tensor


class Gaussian(NamedTuple):
    """Independent normal distributions, one per sample; std 0 is a point.

    Attributes:
        mean: (B, *D) float32 or float64.
        std: (B,) float64, the same for all dimensions of a sample.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with noise (B, *D) from N(0, I)."""
        return self.mean + spread(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduce: Reduce) -> Tensor:
        """log density at x (B, *D), (B,) float64; x is data, so no gradient flows into it.

        Args:
            reduce: ``sum`` is the log-density; ``mean`` divides it by the number of dimensions, so that a ratio of
                two of them is the true ratio to the power 1 / dimensions.

        Raises:
            ValueError: a std is 0: a deterministic step has no density.
        """
        squares = per_sample((x.detach().to(self.mean.dtype) - self.mean).square())
        width, level = _density(self.std, squares.device)
        dimensions = self.mean[0].numel()
        total = -squares / width - dimensions * level
        return total if reduce == "sum" else total / dimensions

    def log_ratio(self, old: Gaussian, x: Tensor, reduce: Reduce) -> Tensor:
        """log of this density over that of ``old`` at x (B, *D), (B,) float64; both have the same std.

        The difference of the two `log_prob` without their cancellation: small ratios keep all digits.

        Raises:
            ValueError: a std is 0, or the stds differ.
        """
        self._check_same(old)
        middle = x.detach().to(self.mean.dtype) - (self.mean + old.mean) / 2
        total = per_sample((self.mean - old.mean) * middle) / self.std.to(middle.device) ** 2
        return total if reduce == "sum" else total / self.mean[0].numel()

    def kl(self, other: Gaussian, reduce: Reduce) -> Tensor:
        """KL(self || other), (B,) float64: |mean - other mean|^2 / (2 std^2), both of the same std.

        Raises:
            ValueError: a std is 0, or the stds differ.
        """
        self._check_same(other)
        squares = per_sample((self.mean - other.mean).square())
        total = squares / (2 * self.std.to(squares.device) ** 2)
        return total if reduce == "sum" else total / self.mean[0].numel()

    def _check_same(self, other: Gaussian) -> None:
        _density(self.std, self.std.device)
        if not torch.equal(self.std, other.std.to(self.std.device)):
            raise ValueError("the two steps have different noise: they are not between the same times")


@remembered
def _density(std: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """2 std^2 and log std + log(2 pi) / 2 of stds (B,).

    Raises:
        ValueError: a std is 0.
    """
    if not bool((std > 0).all()):
        row = int((std <= 0).nonzero()[0])
        raise ValueError(f"row {row}: the step is deterministic (std 0): it has no density")
    std = std.to(device)
    return 2 * std**2, std.log() + 0.5 * math.log(2 * math.pi)


class GaussianProcess(Plugin, family="process"):
    """x_t = alpha(t) x_0 + sigma(t) eps; a subclass says what alpha and sigma are.

    It is a frozen dataclass: what it says of times is remembered.
    """

    native: ClassVar[Prediction] = "u"
    """The prediction whose mean over a step is meant by higher-order solvers: where it is constant the step is exact.

    u belongs to the coordinates x / (alpha + sigma), sigma / (alpha + sigma), which stay finite up to pure noise.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the data at times t, float64."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise at times t, float64."""
        raise NotImplementedError

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt at times t, float64."""
        raise NotImplementedError

    def time(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio`` (>= 0, inf allowed), float64, at most 1."""
        raise NotImplementedError

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t (B, *D) as a network looks at it, on the scale of the data."""
        return x

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha at times t, float64: EDM's sigma; inf where nothing is left of the data."""
        return self.sigma(t) / self.alpha(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma) at times t, float64."""
        return self.alpha(t).log() - self.sigma(t).log()

    def corrupt(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, *D) of clean samples at times t (B,), with noise (B, *D) from N(0, I)."""
        x_0 = full(x_0)
        alpha, sigma = self.shares(t, Form.of(x_0))
        return alpha * x_0 + sigma * noise

    @remembered
    def shares(self, t: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (B,), to be multiplied with samples of that form."""
        return spread(self.alpha(t), form), spread(self.sigma(t), form)

    def mixture(self, kind: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of p = a x_0 + b eps at times t, float64 each.

        Raises:
            ValueError: this path has no such prediction.
        """
        zero, one = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        known = {"x0": (one, zero), "eps": (zero, one), "u": (-one, one)}
        if kind == "v":
            return -self.sigma(t), self.alpha(t)
        if kind not in known:
            raise ValueError(f"prediction {kind!r} is not known on the path {self.name!r}")
        return known[kind]

    def guess(self, prediction: Tensor, kind: Prediction, x: Tensor, t: Tensor) -> Guess:
        """The normal form of a prediction (B, *D) at x_t (B, *D).

        Raises:
            ValueError: the prediction says nothing at a time: eps where alpha is 0, x0 where sigma is 0.
        """
        x, prediction = full(x), full(prediction)
        b, sigma, alpha, a = self._inverse(kind, t, Form.of(x))
        return Guess(x0=b * x - sigma * prediction, eps=alpha * prediction - a * x)

    @remembered
    def _inverse(self, kind: Prediction, t: Tensor, form: Form) -> tuple[Tensor, ...]:
        """b, sigma, alpha and a over the determinant."""
        alpha, sigma, (a, b) = self.alpha(t), self.sigma(t), self.mixture(kind, t)
        determinant = alpha * b - sigma * a
        if not bool((determinant != 0).all()):
            row = int((determinant == 0).nonzero()[0])
            raise ValueError(f"row {row}: a prediction of {kind} determines nothing at t = {float(t[row])}")
        return tuple(spread(one / determinant, form) for one in (b, sigma, alpha, a))

    def target(self, kind: Prediction, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The prediction (B, *D) that is right for x_t = alpha x_0 + sigma noise: what a network is trained on."""
        a, b = self.mixture(kind, t)
        return spread(a, x_0) * x_0 + spread(b, x_0) * noise

    def velocity(self, guess: Guess, t: Tensor) -> Tensor:
        """dx/dt (B, *D) of the probability-flow ODE."""
        alpha_rate, sigma_rate = self._rates(t, Form.of(guess.x0))
        return alpha_rate * guess.x0 + sigma_rate * guess.eps

    @remembered
    def _rates(self, t: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        alpha_rate, sigma_rate = self.rates(t)
        return spread(alpha_rate, form), spread(sigma_rate, form)

    def score(self, guess: Guess, t: Tensor) -> Tensor:
        """Gradient of log p_t at x_t (B, *D)."""
        return -guess.eps / spread(self.sigma(t), guess.eps)

    def rederived(self, x0: Tensor, x: Tensor, t: Tensor) -> Guess:
        """The guess of a changed x0 (B, *D) with the noise that then explains x_t."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return Guess(x0=x0, eps=(x - spread(alpha, x) * x0) / spread(sigma, x))

    @remembered
    def error_factor(self, kind: Prediction, t: Tensor) -> Tensor:
        """Squared error of a prediction over the squared error of the x_0 that follows from it, (B,) float64.

        eps: SNR; v on the variance-preserving path: 1 + SNR; u of a flow: 1 / t^2.
        """
        a, b = self.mixture(kind, t)
        return (a - b * self.alpha(t) / self.sigma(t)) ** 2

    def check_times(self, t: Tensor, s: Tensor) -> None:
        """Refuse steps that do not lead from a time to a less noisy one.

        Raises:
            ValueError: naming the times.
        """
        if not bool(((s >= 0) & (s < t) & (t <= 1)).all()):
            raise ValueError(f"a step needs 0 <= s < t <= 1, got t = {t.tolist()}, s = {s.tolist()}")


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(GaussianProcess, name="vp"):
    """DDPM: a table of betas, alpha^2 + sigma^2 = 1.

    Entry k of the table (0-based, the ``timestep`` of published networks) is the time (k + 1) / steps, and t = 0 is
    clean data. In between log(alpha^2) is interpolated: constant beta, the continuous process.
    """

    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """``scaled_linear``: linear in sqrt(beta) (Stable Diffusion). ``cosine``: no other field but steps is used."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Length of the table."""
    low: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta."""
    high: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta."""
    zero_terminal: bool = False
    """Shift and stretch alpha over the table so that its last entry is 0, pure noise (arXiv 2305.08891). Sampling then
    starts where training ended; eps says nothing at t = 1, so the network should predict v or x_0."""

    def __post_init__(self) -> None:
        if self.zero_terminal and self.steps == 1:
            raise UserError("zero_terminal: needs a table of at least 2 steps, got 1")

    def timestep(self, t: Tensor) -> Tensor:
        """Place in the table of times t: 0 to steps - 1, fractions in between; float64."""
        return (t.double() * self.steps - 1).clamp(min=0)

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self._log_squared(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self._log_squared(t))).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table().to(t.device)
        # The piece that ends at t: a step goes towards smaller times.
        piece = (t.double() * self.steps).ceil().long().sub(1).clamp(0, self.steps - 1)
        slope = (table[piece + 1] - table[piece]) * self.steps
        squared = self._log_squared(t)
        alpha, sigma = (0.5 * squared).exp(), (-torch.expm1(squared)).sqrt()
        steep = -(0.5 * table[piece]).exp() * self.steps  # of alpha, in a piece that ends in pure noise
        return (
            torch.where(slope.isinf(), steep, 0.5 * slope * alpha),
            torch.where(slope.isinf(), -alpha * steep / sigma, -0.5 * slope * squared.exp() / sigma),
        )

    def time(self, ratio: Tensor) -> Tensor:
        falling = -self._table().to(ratio.device)  # 0, ..., large
        wanted = torch.log1p(ratio.double() ** 2).clamp(max=float(falling[-1]))
        piece = torch.searchsorted(falling, wanted).sub(1).clamp(0, self.steps - 1)
        left, right = falling[piece], falling[piece + 1]
        part = torch.where(right.isinf(), -torch.expm1((left - wanted) / 2), (wanted - left) / (right - left))
        return (piece + part) / self.steps

    def _log_squared(self, t: Tensor) -> Tensor:
        """log alpha^2 at times t. In a piece that ends in pure noise alpha itself is interpolated."""
        table, place = self._table().to(t.device), t.double() * self.steps
        piece = place.floor().long().clamp(0, self.steps - 1)
        left, fall, part = table[piece], table[piece + 1] - table[piece], place - piece
        straight = left + part * fall.masked_fill(fall.isinf(), 0.0)
        return torch.where(fall.isinf(), left + 2 * torch.log1p(-part), straight)

    def _table(self) -> Tensor:
        return _log_cumulative(self.betas, self.steps, self.low, self.high, self.zero_terminal)


@functools.cache
def _log_cumulative(betas: str, steps: int, low: float, high: float, zero_terminal: bool) -> Tensor:
    """(steps + 1,) float64: log of the cumulative product of 1 - beta, from 0."""
    if betas == "cosine":
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        level = ((place + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    elif betas == "scaled_linear":
        beta = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2
    else:
        beta = torch.linspace(low, high, steps, dtype=torch.float64)
    table = torch.log1p(-beta).cumsum(0)
    if zero_terminal:
        alpha = (0.5 * table).exp()
        # The first entry stays, the last becomes 0.
        table = 2 * ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).log()
    return torch.cat([torch.zeros(1, dtype=torch.float64), table])


@dataclass(frozen=True, kw_only=True)
class Flow(GaussianProcess, name="flow"):
    """Rectified flow: straight lines from noise to data, at t = 1 nothing but noise."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio.double())  # 0 and inf come out right


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(GaussianProcess, name="edm"):
    """EDM: the data stays as it is and noise is added, sigma = sigma_max t^rho.

    Equal steps of t are Karras' grid with sigma_min = 0.
    """

    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    """Noise at t = 1."""
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    """Standard deviation of the data, for the preconditioning of networks that predict ``edm``."""
    rho: Annotated[float, Field(ge=1)] = 7.0
    """Exponent: how much of the time is spent at small noise."""

    native: ClassVar[Prediction] = "eps"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t.double() ** self.rho

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t, dtype=torch.float64), self.rho * self.sigma_max * t.double() ** (self.rho - 1)

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio.double().clamp(max=self.sigma_max) / self.sigma_max) ** (1 / self.rho)

    def input_scale(self, t: Tensor) -> Tensor:
        """What brings x_t to the scale of the data, float64."""
        return 1 / (self.sigma(t) ** 2 + self.sigma_data**2).sqrt()

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        return spread(self.input_scale(t), x) * x

    def mixture(self, kind: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
        if kind != "edm":
            return super().mixture(kind, t)
        # F = (D - c_skip x) / c_out, with D = x_0 for the right answer.
        sigma, scale = self.sigma(t), self.input_scale(t)
        return sigma * scale / self.sigma_data, -self.sigma_data * scale


def translate(x: Tensor, t: Tensor, source: GaussianProcess, to: GaussianProcess) -> tuple[Tensor, Tensor]:
    """The same noisy sample on another path: (x (B, *D), t (B,)), of the same sigma / alpha; guesses stay as they are.

    A network of one path serves a sampler of another. Exact where the other path reaches the same noise: 1 on a flow is
    more than any other path has.
    """
    time = to.time(source.ratio(t))
    x = full(x)
    # The larger of the two shares is never 0.
    noisy = source.sigma(t) > source.alpha(t)
    scale = torch.where(noisy, to.sigma(time) / source.sigma(t), to.alpha(time) / source.alpha(t))
    return spread(scale, x) * x, time


def spread(coefficient: Tensor, x: Tensor | Form) -> Tensor:
    """A number per sample (B,) in the shape (B, 1, ...), dtype and device of x (B, *D)."""
    form = Form.of(x) if isinstance(x, Tensor) else x
    return coefficient.to(form.device, form.dtype).reshape(-1, *[1] * (form.dim - 1))


def full(x: Tensor) -> Tensor:
    """x in float32 if it is of half precision: no arithmetic of a process is done in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_sample(x: Tensor) -> Tensor:
    """Sum of x (B, *D) over all but the batch, (B,) float64: clip ranges are smaller than float32 resolves a sum."""
    return x.flatten(1).sum(1, dtype=torch.float64)

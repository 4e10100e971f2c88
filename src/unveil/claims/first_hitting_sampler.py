"""Claim check of the first-hitting sampler (arXiv 2409.02908); ``unveil reproduce first_hitting_sampler``.

No network is trained: the denoisers are exact posteriors (a joint table of 4 tokens over 4 positions; Markov chains of
16 tokens over 24 positions), so that every error is the sampler's own.

1. Exactness, on the table. (a) 200,000 samples of the first-hitting sampler, one token a step: chi-square p > 0.001
   on every seed. (b) 20,000 samples of the ancestral sampler with 1,000 steps likewise. (c) The ancestral sampler with
   8 steps reveals as many positions at every step as it should (p > 0.001), but its distance from the table is at
   least 3 times that of as many exact samples.
2. Hitting times: tau_{n-1}/tau_n against u^(1/n) for n = 1, 5, 50, and all of them against sorted uniforms:
   Kolmogorov-Smirnov p > 0.001 on every seed.
3. Precision. (a) The closed form of truncated Gumbel noise agrees with draws (64 classes, ceiling 6) to 4 standard
   errors, on every seed. (b) In float32 (ceiling 16.64), 50,257 Zipf tokens: with 1,000 / 10,000 / 50,000 ancestral
   steps a position is unmasked with probability 6.4e-4 / 4.4e-5 / 6.0e-6 and by tokens of 5.32 / 3.91 / 2.88 nats
   instead of 7.57, a uniform position at 10,000 steps with 1e-17 (all to 1 %); in float64 nothing is off by 1e-6.
   (c) By trial, float32 Gumbel-max is biased (p < 0.001), this package's sampler is not. (d) Whole sequences: drawn at
   once with 11-bit noise in 256 steps, both the generative perplexity and the entropy are lower than with exact noise,
   by at least 3 standard errors; position first with the same noise, neither is off by 3.
4. Work, a small network with 4,096 tokens, 32 positions, 8 rows, 1,024 ancestral steps: the cached ancestral sampler as
   published makes at least 5 times the network calls and exactly 1,024 times the categorical draws. With 32 tokens as
   well; seconds are reported, no demand (a busy machine distorts them).
5. Second order, on the chains, L/4 steps: the predictor-corrector's total variation of neighbouring pairs is at least
   5 % below that of parallel decoding on 60 % of the seeds. Extrapolation and variants: reported, no demand.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.claims.goodness import same_p_value, uniform_p_value
from unveil.claims.laboratory import Measured, concluded, markdown_table, spread, two_processes
from unveil.claims.oracles import FIRST, JointTable, MarkovChain
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.processes.gumbel import bias, chi_square, gumbel_max, trial, truncated, zipf
from unveil.processes.masked import hitting_times, sample_categorical
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.reverse import ReverseSampler
from unveil.samplers.solvers import Solver
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import derive_seed, generator
from unveil.systems.first_hitting_sampler import Extrapolation, FirstHitting, PredictorCorrector
from unveil.tasks.evaluate import generative_perplexity, unigram_entropy

LEVEL = 1e-3
DISTANCE_RATIO, CALL_RATIO, SECOND_ORDER_GAIN, SECOND_ORDER_SEEDS = 3.0, 5.0, 0.05, 0.6
GRID = 1024
FAULTS = {1_000: (6.4e-4, 5.32), 10_000: (4.4e-5, 3.91), 50_000: (6.0e-6, 2.88)}
"""Steps: unmasking probability and token entropy in float32."""
COARSE_BITS, COARSE_STEPS = 11, 256
"""Noise of float16: at 256 steps it does to 16 tokens what float32 does at 2 million."""


def reproduce(seeds: int, quick: bool, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run all five checks; see the module docstring.

    Args:
        seeds: independent tables, chains and noise.
        quick: fewer samples, no trial of float32.
        out: not used: nothing is trained.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers, share = list(range(seeds)), 5 if quick else 1
    with two_processes(report) as every:
        tried = [] if quick else every(_trial, [("gumbel",), ("unveil",)])
        exact = every(_exactness, [(seed, 60_000 if quick else 200_000, 20_000 // share) for seed in numbers])
        coarse = every(_sequences, [(seed, 1000 // share) for seed in numbers])
        chains = every(_second_order, [(seed, 4000 // share) for seed in numbers])
        noise = every(_noise, [(seed,) for seed in numbers])
    # One after the other and alone: their seconds are reported.
    work = [_work(4096, repeats=1 if quick else 3), _work(32, repeats=1 if quick else 3)]
    checks = [
        *_exactness_checks(exact), _times_check(noise), *_precision_checks(noise, tried, coarse), _work_check(work),
        _second_order_check(chains),
    ]  # fmt: skip
    return concluded(
        "first_hitting_sampler", checks, [*exact, *coarse, *chains, *work], started, _table(exact, coarse, chains, work)
    )


def _draw(
    oracle: MaskedDenoiser, length: int, sampler: Sampler, count: int, *parts: object, **own: Any
) -> TokenTrajectory:
    canvas = Canvas.of([[]] * count, length, oracle.spec)
    first = derive_seed(*parts) >> 8
    return sampler.sample(oracle, canvas, range(first, first + count), **own)


def _first_hitting(steps: int, **own: Any) -> MaskedSampler:
    return MaskedSampler(steps=steps, **(vars(FirstHitting()) | own))


# 1 --------------------------------------------------------------------------------------------------------------------


def _exactness(seed: int, many: int, few: int) -> Measured:
    oracle = JointTable(4, 4, generator(seed, "table"))

    def compare(sampler: Sampler, count: int, batch: int, **own: Any) -> tuple[float, float, TokenTrajectory]:
        """p-value, total variation, what was drawn."""
        drawn = _draw(oracle, 4, sampler, count, seed, "exact", sampler.name, sampler.steps, batch_size=batch, **own)
        counts = torch.bincount(oracle.index(drawn.response_ids - FIRST, 4), minlength=len(oracle.table))
        return chi_square(counts, oracle.table), float((counts / count - oracle.table).abs().sum() / 2), drawn

    own, noise, hit = compare(_first_hitting(4), many, 20_000)
    fine, _, grid = compare(ReverseSampler(steps=1000), few, 1000)
    coarse, distance, rough = compare(ReverseSampler(steps=8), many, 20_000, needs={"step_map"})
    parallel, apart, pairs = compare(_first_hitting(2), few, 20_000)
    assert rough.step_map is not None
    revealed = torch.bincount(rough.step_map.flatten(), minlength=9)
    grid_times = ReverseSampler(steps=8).times()
    counts = chi_square(revealed, grid_times[:-1] - grid_times[1:])
    return {
        "first_hitting": own, "ancestral_1000": fine, "ancestral_8": coarse, "counts_8": counts,
        "distance": noise, "distance_8": distance, "parallel": parallel, "distance_parallel": apart,
        "forwards": sum(drawn.forwards for drawn in (hit, grid, rough, pairs)),
        "line": f"p {own:.3f}, ancestral {fine:.3f}; distance {noise:.4f}, in 8 steps {distance:.4f}",
    }  # fmt: skip


def _exactness_checks(exact: list[Measured]) -> list[Measured]:
    def lowest(key: str) -> float:
        return min(result[key] for result in exact)

    ratios = [result["distance_8"] / result["distance"] for result in exact]
    per_seed = [{key: value for key, value in result.items() if key != "line"} for result in exact]
    return [
        {
            "name": "1a the first-hitting sampler draws the joint distribution", "demand": f"p > {LEVEL} on every seed",
            "measured": f"lowest p {lowest('first_hitting'):.3f}", "holds": lowest("first_hitting") > LEVEL,
            "per_seed": per_seed,
        },
        {
            "name": "1b so does the ancestral sampler in 1,000 steps", "demand": f"p > {LEVEL} on every seed",
            "measured": f"lowest p {lowest('ancestral_1000'):.3f}", "holds": lowest("ancestral_1000") > LEVEL,
        },
        {
            "name": "1c in 8 steps it reveals as it should, but not the joint distribution",
            "demand": f"p of the counts > {LEVEL}, distance >= {DISTANCE_RATIO:g}x that of exact samples; every seed",
            "measured": f"lowest p {lowest('counts_8'):.3f}, distance {min(ratios):.1f}x to {max(ratios):.1f}x",
            "holds": lowest("counts_8") > LEVEL and min(ratios) >= DISTANCE_RATIO,
        },
    ]  # fmt: skip


# 2, 3 -----------------------------------------------------------------------------------------------------------------


def _noise(seed: int) -> Measured:
    """Hitting times against uniforms, and the closed form of truncated Gumbel noise against draws."""
    stream = generator(seed, "noise")

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=stream)

    times = hitting_times(uniforms(20_000, 50), torch.full((20_000,), 50))
    before = torch.cat([torch.ones_like(times[:, :1]), times[:, :-1]], 1)
    ratio = times / before
    found = {f"ratio_{n}": same_p_value(ratio[:, 50 - n], uniforms(20_000) ** (1 / n)) for n in (1, 5, 50)}
    found |= {f"exponent_{n}": uniform_p_value(ratio[:, 50 - n] ** n) for n in (1, 5, 50)}
    ranked = uniforms(20_000, 50).sort(1, descending=True).values
    found |= {f"sorted_{place}": same_p_value(times[:, place], ranked[:, place]) for place in (0, 24, 49)}

    probs = (1.5 * torch.randn(64, dtype=torch.float64, generator=stream)).softmax(0)
    expected, draws, maximum = truncated(probs, 6.0), 400_000, 6.0
    counts = torch.zeros(64, dtype=torch.long)
    for _ in range(8):
        gumbel = -(-(uniforms(draws // 8, 64) * math.exp(-math.exp(-maximum))).log()).log()
        counts += torch.bincount((probs.log() + gumbel).argmax(-1), minlength=64)
    errors = (counts / draws - expected) / (expected * (1 - expected) / draws).sqrt()
    return {
        "p_values": found, "errors": float(errors.abs().max()),
        "line": f"lowest p {min(found.values()):.3f}, largest deviation {errors.abs().max():.1f} standard errors",
    }  # fmt: skip


def _trial(name: str) -> Measured:
    """A sampler at tokens of probability 2e-8, a third of the grain of float32 noise."""
    stream = generator(0, "trial")

    def own(probs: Tensor) -> Tensor:
        noise = torch.rand(len(probs), dtype=torch.float64, generator=stream)
        return sample_categorical(probs.double().log(), noise)

    steps, vocabulary = 195_313, 256
    draw = own if name == "unveil" else gumbel_max("float32", stream)
    tokens = torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64)
    found = trial(draw, tokens, 1 / steps, 30 * steps, torch.float32)
    return {
        "biased": found.biased, "share": found.unmasked / found.expected, "p": found.p_value,
        "line": f"{found.unmasked} unmasked of {found.expected:.0f}, p {found.p_value:.2g}",
    }  # fmt: skip


def _sequences(seed: int, count: int) -> Measured:
    """Sequences of a Markov chain, drawn at once or position first, with exact or coarse noise."""
    chain = MarkovChain(16, 24, generator(seed, "chain"))
    whole = torch.ones(count, chain.length, dtype=torch.bool)
    result: Measured = {"forwards": 0}
    for method in ("one-draw", "position-first"):
        for bits in (53, COARSE_BITS):
            words, forwards = _ancestral(chain, count, COARSE_STEPS, method, bits, generator(seed, method, bits))
            quality = generative_perplexity(chain.log_prob, words, whole)
            spread_of = chain.log_prob(words).std() / chain.length / math.sqrt(count)
            result[f"{method} {bits}"] = {
                "perplexity": quality.perplexity, "entropy": quality.sample_entropy,
                "error": quality.perplexity * float(spread_of), "entropy_error": _entropy_error(words),
            }  # fmt: skip
            result["forwards"] += forwards
    coarse, exact = result[f"one-draw {COARSE_BITS}"], result["one-draw 53"]
    result["line"] = (
        f"perplexity {exact['perplexity']:.2f} -> {coarse['perplexity']:.2f}, "
        f"entropy {exact['entropy']:.3f} -> {coarse['entropy']:.3f} with {COARSE_BITS}-bit noise"
    )
    return result


def _entropy_error(words: Tensor) -> float:
    each = unigram_entropy(words, torch.ones_like(words, dtype=torch.bool))
    return float(each.std()) / math.sqrt(len(each))


def _ancestral(
    chain: MarkovChain, count: int, steps: int, method: str, bits: int, stream: torch.Generator
) -> tuple[Tensor, int]:
    """Words (count, L) by Gumbel-max with noise that is a multiple of 2^-bits, on a uniform grid of times."""

    def gumbel_argmax(probs: Tensor) -> Tensor:
        u = torch.randint(0, 2**bits, probs.shape, generator=stream).double() / 2.0**bits
        return (probs / -u.log()).argmax(-1)

    words = torch.zeros(count, chain.length, dtype=torch.long)
    masked = torch.ones_like(words, dtype=torch.bool)
    forwards = 0
    for step in range(steps, 0, -1):
        if not bool(masked.any()):
            break
        live = masked.any(1)
        forwards += int(live.sum())
        tokens = chain.posterior(words[live], masked[live])[masked[live]]
        move = 1 / step
        if method == "one-draw":
            drawn = gumbel_argmax(torch.cat([tokens * move, tokens.new_full((len(tokens), 1), 1 - move)], 1))
            moves = drawn < chain.words
        else:
            moves = torch.rand(len(tokens), dtype=torch.float64, generator=stream) < move
            drawn = gumbel_argmax(tokens)
        place = masked.nonzero()[moves]
        words[place[:, 0], place[:, 1]] = drawn[moves]
        masked[place[:, 0], place[:, 1]] = False
    return words, forwards


def _times_check(noise: list[Measured]) -> Measured:
    lowest = min(value for result in noise for value in result["p_values"].values())
    return {
        "name": "2 hitting times against u^(1/n) and sorted uniforms", "demand": f"p > {LEVEL} in every test and seed",
        "measured": f"lowest of {sum(len(result['p_values']) for result in noise)} p-values {lowest:.3f}",
        "holds": lowest > LEVEL, "per_seed": [result["p_values"] for result in noise],
    }  # fmt: skip


def _precision_checks(noise: list[Measured], tried: list[Measured], coarse: list[Measured]) -> list[Measured]:
    largest = max(result["errors"] for result in noise)
    found = {steps: bias("one-draw", zipf(50257), 1 / steps, "float32") for steps in FAULTS}
    sound = {steps: bias("one-draw", zipf(50257), 1 / steps, "float64") for steps in FAULTS}
    flat = bias("one-draw", torch.ones(50257), 1e-4, "float32").unmask
    near = [abs(found[steps].unmask / unmask - 1) < 0.01 for steps, (unmask, _) in FAULTS.items()]
    near += [abs(found[steps].entropy / nats - 1) < 0.01 for steps, (_, nats) in FAULTS.items()]
    off = max(abs(exact.unmask / exact.unmask_exact - 1) for exact in sound.values())
    off = max(off, *(abs(exact.entropy / exact.entropy_exact - 1) for exact in sound.values()))
    listed = "; ".join(f"{steps:,} steps: {b.unmask:.2e}, {b.entropy:.2f} nats" for steps, b in found.items())
    checks = [
        {
            "name": "3a closed form of truncated Gumbel noise against draws", "demand": "<= 4 standard errors",
            "measured": f"largest deviation {largest:.1f} standard errors", "holds": largest <= 4,
            "per_seed": [result["errors"] for result in noise],
        },
        {
            "name": "3b the fault of float32, in closed form", "demand": "the numbers expected to 1 %; float64 to 1e-6",
            "measured": f"{listed}; uniform {flat:.1e}; float64 off by {off:.1e}",
            "holds": all(near) and abs(flat / 1e-17 - 1) < 0.05 and off < 1e-6,
        },
    ]  # fmt: skip
    if tried:
        theirs, ours = tried
        checks.append({
            "name": "3c by trial at tokens of probability 2e-8", "demand": f"float32 Gumbel-max p < {LEVEL}, ours not",
            "measured": f"Gumbel-max {theirs['line']}; ours {ours['line']}",
            "holds": theirs["biased"] and not ours["biased"],
        })  # fmt: skip
    checks.append(_sequences_check(coarse))
    return checks


def _sequences_check(coarse: list[Measured]) -> Measured:
    """Means over seeds of what coarse noise does, in standard errors of all sequences together."""

    def shift(method: str, key: str, error: str) -> tuple[float, float]:
        exact, rough = ([result[f"{method} {bits}"] for result in coarse] for bits in (53, COARSE_BITS))
        change = statistics.mean(r[key] - e[key] for e, r in zip(exact, rough, strict=True))
        scale = math.sqrt(sum(part[error] ** 2 for part in (*exact, *rough))) / len(coarse)
        return change, change / scale

    at_once = [shift("one-draw", *keys) for keys in (("perplexity", "error"), ("entropy", "entropy_error"))]
    first = [shift("position-first", *keys) for keys in (("perplexity", "error"), ("entropy", "entropy_error"))]
    return {
        "name": f"3d sequences in {COARSE_STEPS} steps with {COARSE_BITS}-bit noise: perplexity and entropy",
        "demand": "drawn at once both fall by >= 3 standard errors; position first neither moves by 3",
        "measured": f"at once {at_once[0][0]:+.2f} ({at_once[0][1]:+.1f} s.e.) and {at_once[1][0]:+.3f} nats "
        f"({at_once[1][1]:+.1f}); position first {first[0][1]:+.1f} and {first[1][1]:+.1f} s.e.",
        "holds": all(z <= -3 for _, z in at_once) and all(abs(z) < 3 for _, z in first),
        "per_seed": [{key: value for key, value in result.items() if key != "line"} for result in coarse],
    }


# 4 --------------------------------------------------------------------------------------------------------------------


def _work(words: int, repeats: int) -> Measured:
    """Calls, categorical draws and seconds of three samplers on a network of 64 dimensions, 32 positions, 8 rows."""
    rows, length = 8, 32
    shape = TransformerConfig(dim=64, layers=2, heads=4, hidden=128, context_length=length)
    net = TransformerDenoiser(shape, TextTokenizer.of_words([str(word) for word in range(words)]))
    net.initialise(generator(words, "work"))
    net.eval()
    result: Measured = {"words": words, "forwards": 0}

    def measure(name: str, run: Callable[[], tuple[int, int]]) -> None:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            calls, draws = run()
            seconds.append(time.perf_counter() - started)
        result[name] = {"calls": calls, "draws": draws, "seconds": statistics.median(seconds)}
        result["forwards"] += calls * rows * repeats

    def house(sampler: Sampler) -> tuple[int, int]:
        drawn = _draw(net, length, sampler, rows, words, sampler.name, needs={"revealed"})
        assert drawn.revealed is not None
        # Sequence-forwards per row, and the tokens drawn: the split step and the first-hitting one draw no others.
        return math.ceil(drawn.forwards / rows), int(drawn.revealed.sum())

    measure("first-hitting", lambda: house(_first_hitting(length)))
    measure("ancestral, split", lambda: house(ReverseSampler(steps=GRID)))
    measure("ancestral, as published", lambda: _published(net, rows, length, generator(words, "published")))
    return result


@torch.no_grad()
def _published(net: MaskedDenoiser, rows: int, length: int, stream: torch.Generator) -> tuple[int, int]:
    """The cached ancestral sampler of the released code: every step draws every position from mask and tokens at once,
    and the whole batch is evaluated anew after any change. Calls and categorical draws."""
    mask = net.spec.mask_id
    ids = torch.full((rows, length), mask)
    probs: Tensor | None = None
    calls = draws = 0
    for step in range(GRID, 0, -1):
        if probs is None:
            probs = net(ids).double().softmax(-1)
            calls += 1
        joint = probs * (1 / step)
        joint[..., mask] = 1 - 1 / step
        noise = -torch.rand(joint.shape, dtype=torch.float64, generator=stream).log()
        drawn = (joint / noise).argmax(-1)
        draws += drawn.numel()
        updated = torch.where(ids == mask, drawn, ids)
        if not torch.equal(updated, ids):
            ids, probs = updated, None
    return calls, draws


def _work_check(work: list[Measured]) -> Measured:
    calls, draws, seconds = (
        [result["ancestral, as published"][key] / result["first-hitting"][key] for result in work]
        for key in ("calls", "draws", "seconds")
    )
    return {
        "name": f"4 work of the published ancestral sampler in {GRID} steps over that of the first-hitting one",
        "demand": f"network calls >= {CALL_RATIO:g}x, categorical draws {GRID}x",
        "measured": "; ".join(
            f"{result['words']} tokens: calls {c:.1f}x, draws {d:g}x, seconds {s:.1f}x"
            for result, c, d, s in zip(work, calls, draws, seconds, strict=True)
        ),
        "holds": min(calls) >= CALL_RATIO and all(ratio == GRID for ratio in draws),
        "per_seed": work,
    }


# 5 --------------------------------------------------------------------------------------------------------------------


def _second_order(seed: int, count: int) -> Measured:
    length = 24
    chain = MarkovChain(16, length, generator(seed, "chain"))
    whole = torch.ones(count, length, dtype=torch.bool)
    result: Measured = {"forwards": 0, "entropy_rate": chain.entropy_rate, "decoders": {}}
    for name, steps, own in _decoders(length):
        drawn = _draw(chain, length, _first_hitting(steps, **own), count, seed, "chain", batch_size=4000)
        words = drawn.response_ids - FIRST
        pairs = words[:, :-1] * chain.words + words[:, 1:]
        counts = torch.bincount(pairs.flatten(), minlength=chain.words**2).double()
        quality = generative_perplexity(chain.log_prob, words, whole)
        result["decoders"][name] = {
            "distance": float((counts / counts.sum() - chain.pairs.flatten()).abs().sum() / 2), "steps": steps,
            "perplexity": quality.perplexity, "entropy": quality.sample_entropy,
        }  # fmt: skip
        result["forwards"] += drawn.forwards
    few = result["decoders"]
    before, after = few["parallel"]["distance"], few["predictor-corrector"]["distance"]
    result["gain"] = 1 - after / before
    result["line"] = f"distance {before:.4f}, corrected {after:.4f}"
    return result


def _decoders(length: int) -> list[tuple[str, int, dict[str, Solver]]]:
    few = length // 4
    return [
        ("one token a step", length, {}),
        ("parallel", few, {}),
        ("extrapolation", few, {"solver": Extrapolation()}),
        ("extrapolation of logarithms", few, {"solver": Extrapolation(of="log_probability")}),
        ("predictor-corrector", few, {"solver": PredictorCorrector()}),
        ("predictor-corrector, drawn afresh", few, {"solver": PredictorCorrector(redraw="fresh")}),
    ]


def _second_order_check(chains: list[Measured]) -> Measured:
    gains = [result["gain"] for result in chains]
    good = sum(gain >= SECOND_ORDER_GAIN for gain in gains)
    return {
        "name": "5 predictor-corrector against parallel decoding, L/4 steps",
        "demand": f"distance of pairs >= {100 * SECOND_ORDER_GAIN:g} % less on {100 * SECOND_ORDER_SEEDS:g} % of seeds",
        "measured": f"smaller by {', '.join(f'{100 * gain:.0f} %' for gain in gains)}",
        "holds": good >= SECOND_ORDER_SEEDS * len(gains),
        "per_seed": [result["decoders"] for result in chains],
    }


def _table(exact: list[Measured], coarse: list[Measured], chains: list[Measured], work: list[Measured]) -> str:
    samplers = [
        ("first-hitting, 4 steps", "first_hitting", "distance"),
        ("first-hitting, 2 steps (fewer samples)", "parallel", "distance_parallel"),
        ("ancestral, 8 steps", "ancestral_8", "distance_8"),
    ]
    joint = markdown_table(
        ["joint table", "chi-square p, lowest", "distance from the table"],
        [[name, f"{min(r[p] for r in exact):.2g}", spread([r[d] for r in exact], 1, 4)] for name, p, d in samplers],
    )
    noise = markdown_table(
        [f"ancestral, {COARSE_STEPS} steps", "noise, bits", "generative perplexity", "entropy, nats"],
        [
            [method, bits, *(spread([r[f"{method} {bits}"][key] for r in coarse], 1, 3) for key in
             ("perplexity", "entropy"))]
            for method in ("one-draw", "position-first") for bits in (53, COARSE_BITS)
        ],
    )  # fmt: skip
    second = markdown_table(
        ["Markov chain", "steps", "distance of pairs", "generative perplexity", "entropy, nats"],
        [
            [name, steps, spread([r["decoders"][name]["distance"] for r in chains], 1, 4),
             *(spread([r["decoders"][name][key] for r in chains], 1, 3) for key in ("perplexity", "entropy"))]
            for name, steps, _ in _decoders(24)
        ],
    )  # fmt: skip
    cost = markdown_table(
        ["tokens", "sampler", "network calls", "categorical draws", "seconds (median)"],
        [
            [result["words"], name, result[name]["calls"], result[name]["draws"], f"{result[name]['seconds']:.2f}"]
            for result in work for name in ("first-hitting", "ancestral, split", "ancestral, as published")
        ],
    )  # fmt: skip
    return "\n\n".join([joint, noise, cost, second])

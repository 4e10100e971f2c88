"""A model class for EleutherAI's lm-evaluation-harness: ``python -m unveil.cli.lm_eval --model unveil ...``.

The harness finds no models of other packages by itself; importing this module registers ours, and running it hands the
command line over to the harness.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from unveil.cli.decoders import plugin, rule, sampler
from unveil.cli.models import open_model
from unveil.learning.elbo import elbo
from unveil.registry import UserError, did_you_mean
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.schedules import Schedule
from unveil.samplers.text import response_texts
from unveil.samplers.transforms import Transform
from unveil.seeds import derive_seed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_LENGTH = 256
"""Response tokens where neither the model's arguments nor the task says how many."""
_FIELDS = ("steps", "block_length", "rule", "schedule", "transform", "temperature")
_NAMES = {"block_length": "block"}

log = logging.getLogger(__name__)


@register_model("unveil")
class UnveilLM(LM):
    """A masked denoiser. What the harness calls log-likelihood is an ELBO, see `unveil.learning.elbo`.

    Args:
        path: embedded model, model folder, run or hub name; the harness's usual ``pretrained`` also does.
        chat: wrap every context into the model's chat template, as one turn of the user.
        dtype: fp32 or bf16.
        length: response tokens; by default the task's ``max_gen_toks``.
        steps: denoising steps; by default one per response token.
        block: block length; by default full diffusion.
        rule, schedule, transform: as the options of ``unveil eval``.
        temperature: of sampling; where a task asks for sampling, its own temperature holds.
        mc: masks per text for the ELBO.
        check_greedy: also find out whether greedy decoding, one token a step, would give the continuation.
        seed: everything random derives from it and the texts.
        batch_size: canvases at a time.
        device: a torch device.

    Raises:
        UserError: an argument is unknown or wrong.
    """

    def __init__(
        self,
        path: str = "",
        *,
        pretrained: str = "",
        chat: bool = False,
        dtype: str = "fp32",
        length: int | None = None,
        steps: int | None = None,
        block: int | None = None,
        rule: str = "lcr",
        schedule: str | None = None,
        transform: str | None = None,
        temperature: float = 0.0,
        mc: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = [name for name in UnveilLM.__init__.__kwdefaults__ or {} if name != "max_batch_size"]
            raise UserError(f"model_args: no argument is called {(name := min(unknown))!r}{did_you_mean(name, known)}")
        self.path = str(path or pretrained)
        if not self.path:
            raise UserError("model_args: path is required, but missing")
        for name, value in (("mc", mc), ("length", length)):
            if value is not None and value < 1:
                raise UserError(f"model_args: {name} should be at least 1, got {value}")
        if not (isinstance(batch_size, int) or str(batch_size).isdigit()):
            raise UserError(f"batch_size: should be a number, got {batch_size!r}")
        self.denoiser = open_model(self.path, dtype=dtype, chat=chat)
        if device is not None and (torch.cuda.is_available() or not str(device).startswith("cuda")):
            self.denoiser = self.denoiser.to(device)  # the harness says cuda:0 on machines that have none
        self.chat, self.length, self.temperature = chat, length, temperature
        self.draws, self.check_greedy, self.seed, self.rows = mc, check_greedy, seed, int(batch_size)
        self.decoder: dict[str, Any] = {
            "steps": steps, "block_length": block, "rule": _rule(str(rule)),
            "schedule": None if schedule is None else plugin(schedule, "schedule", Schedule),
            "transform": None if transform is None else plugin(transform, "transform", Transform),
        }  # fmt: skip
        self._sampler(length or (steps or 1) * (block or 1), temperature)  # refuse now what is wrong
        self._cut_prompts = False
        if check_greedy:
            try:
                MaskedSampler(steps=1).check_denoiser(self.denoiser)
            except UserError as error:
                raise UserError(f"model_args: check_greedy: should be false for this model: {error}") from error

    # ---- the harness's three questions

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decoded answers, cut at the first stop string. Noise depends on the seed, the context and its repetition."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[int, float], list[int]] = {}
        repeats: dict[str, int] = {}
        seeds = []
        for place, request in enumerate(requests):
            context, how = request.args
            length = int(self.length or how.get("max_gen_toks") or _LENGTH)
            temperature = float(how.get("temperature", 1.0)) if how.get("do_sample") else self.temperature
            groups.setdefault((length, temperature), []).append(place)
            repeats[context] = repeats.get(context, -1) + 1
            seeds.append(derive_seed(self.seed, "generate", context, repeats[context]))
        for (length, temperature), places in groups.items():
            decoder = self._sampler(length, temperature)
            prompts = [self._fit(self.denoiser.encode_prompt(requests[place].args[0]), length) for place in places]
            canvas = Canvas.of(prompts, length, self.denoiser.spec)
            made = decoder.sample(self.denoiser, canvas, [seeds[place] for place in places], batch_size=self.rows)
            for place, text in zip(places, response_texts(self.denoiser, made.response_ids), strict=True):
                answers[place] = _cut(text, requests[place].args[1].get("until"))
                self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
        return answers

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO of the continuation in nats, whether greedy decoding gives it; False if ``check_greedy`` is off)."""
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds(pairs)
        found = [
            (bound, self.check_greedy and self._is_greedy(*pair)) for bound, pair in zip(bounds, pairs, strict=True)
        ]
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ELBO of whole texts in nats; longer ones than the context are cut into windows that do not see each other."""
        windows: list[tuple[list[int], list[int]]] = []
        owner = []
        for place, request in enumerate(requests):
            ids = self.denoiser.tokenizer.encode(request.args[0])
            start = self.denoiser.encode_prompt("")
            room = self.denoiser.spec.context_length - len(start)
            for first in range(0, len(ids), room):
                windows.append((start, ids[first : first + room]))
                owner.append(place)
        totals = [0.0] * len(requests)
        for place, value in zip(owner, self._bounds(windows), strict=True):
            totals[place] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- chat templates

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """System and user message as one text; the template itself is put around it when it is encoded."""
        if not self.chat:
            raise UserError("apply_chat_template: needs the model argument chat=true")
        roles = [message["role"] for message in chat_history]
        if roles not in (["user"], ["system", "user"]) or not add_generation_prompt:
            raise UserError(f"apply_chat_template: one turn of the user alone (no multi-turn examples), got {roles}")
        return "\n\n".join(message["content"] for message in chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return f"unveil: the template of {self.path}" if self.chat else ""

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    # ---- how

    def _sampler(self, length: int, temperature: float) -> Any:
        settings = self.decoder | {"temperature": temperature}
        settings["steps"] = length if settings["steps"] is None else settings["steps"]
        return sampler(settings, length, {field: f"model_args: {_NAMES.get(field, field)}" for field in _FIELDS})

    def _fit(self, prompt: list[int], length: int) -> list[int]:
        """The end of a prompt that leaves room for ``length`` tokens, as the harness's own models have it."""
        room = self.denoiser.spec.context_length - length
        if room < 1:
            raise UserError(f"length: {length} tokens do not fit the canvas of {self.denoiser.spec.context_length}")
        if len(prompt) > room and not self._cut_prompts:
            self._cut_prompts = True
            log.warning("a context of %d tokens is cut to its last %d; others may be too", len(prompt), room)
        return prompt[-room:]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, encoded as one text. Spaces at the end of the context belong to the continuation."""
        encode = self.denoiser.tokenizer.encode
        spaces = len(context) - len(context.rstrip())
        if spaces and not self.chat:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        answer = encode(continuation)
        if not self.chat:
            before, whole = encode(context), encode(context + continuation)
            answer = whole[len(before) :] if whole[: len(before)] == before else answer
        answer = answer[-(self.denoiser.spec.context_length - 1) :]
        return self._fit(self.denoiser.encode_prompt(context), len(answer)), answer

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        bounds = elbo(
            self.denoiser, [pair[0] for pair in pairs], [pair[1] for pair in pairs], draws=self.draws, seed=self.seed,
            batch_size=self.rows,
        )  # fmt: skip
        errors = [bound.error for bound in bounds]
        if errors:
            log.info(
                "ELBO of %d texts by up to %d masks each; standard error in nats: median %.3g, largest %.3g",
                len(errors), self.draws, statistics.median(errors), max(errors),
            )  # fmt: skip
        return [bound.value for bound in bounds]

    def _is_greedy(self, prompt: list[int], answer: list[int]) -> bool:
        if not answer:
            return True
        canvas = Canvas.of([prompt], len(answer), self.denoiser.spec)
        made = MaskedSampler(steps=len(answer), temperature=0.0).sample(self.denoiser, canvas, [0])
        return bool(made.response_ids[0].tolist() == answer)


def _rule(text: str) -> dict[str, Any]:
    return rule(text, "model_args: rule")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text


def main() -> None:
    """The harness's command line, with our model among its own."""
    import os
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.path.append(os.getcwd())  # where a user's `package.module:Class` lives
    try:
        cli_evaluate()
    except UserError as error:
        print(f"unveil: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

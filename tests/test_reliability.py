"""Thousands of decode requests: none crashes, none leaks a control token, memory stays where it is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import hostile
from unveil.cli.main import main
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.tokenizer import whole
from unveil.samplers.trajectory import TokenTrajectory


@dataclass
class Tally:
    """What became of the requests."""

    outcome: Counter[str] = field(default_factory=Counter)
    """Done, refused ..."""
    completions: int = 0
    forwards: int = 0
    memory: list[int] = field(default_factory=list)
    """Bytes after every request."""
    refusals: Counter[str] = field(default_factory=Counter)
    """By the option that they name."""


def work_off(count: int, folder: Path, capsys: pytest.CaptureFixture[str], seed: int = 0) -> Tally:
    """Send the requests, one after the other, and check what comes back."""
    torch.set_num_threads(1)
    models = hostile.write_models(folder / "models")
    denoisers = {path: load_denoiser(path) for path in models.values()}
    tally, saved = Tally(), folder / "steps.safetensors"
    capsys.readouterr()  # progress bars of the library that wrote the toy models
    for request in hostile.requests(count, models, seed):
        saved.unlink(missing_ok=True)
        status = main([*request.words, f"--trajectory={saved}", "--json"])
        out, err = capsys.readouterr()
        where = " ".join(map(repr, request.words))
        assert status in (0, 2), where
        if status == 2:
            errors = [line for line in err.split("\n") if line and not line.startswith("unveil: warning: ")]
            assert errors and all(line.startswith("unveil: error: ") for line in errors), (where, err)
            assert json.loads(out).keys() == {"error"} and not saved.exists() and "Traceback" not in err, where
            tally.outcome["refused"] += 1
            tally.refusals[errors[0].split(":")[2].strip()[:40]] += 1
        else:
            result = json.loads(out.split("\n")[-2])
            trajectory = TokenTrajectory.load(saved)
            check(denoisers[request.words[1]], trajectory, request, result, where)
            tally.outcome["done"] += 1
            tally.completions += len(result["completions"])
            tally.forwards += result["forwards"]
        tally.memory.append(hostile.resident())
    return tally


def check(denoiser, trajectory: TokenTrajectory, request: hostile.Request, result: dict, where: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    """No control token in a prompt but those of the frame, none that is forbidden in an answer."""
    spec = denoiser.spec
    copies = len(result["completions"]) // len(request.prompts)
    asked = [whole(prompt) for prompt in request.prompts for _ in range(copies)]
    assert [one["prompt"] for one in result["completions"]] == asked, where
    controls = {spec.mask_id, spec.pad_id, *spec.end_ids, *spec.forbidden_ids} - {denoiser.tokenizer.unknown}
    width = trajectory.prompt_ids.shape[1]
    for row, one in enumerate(result["completions"]):
        seen = trajectory.prompt_ids[row][trajectory.valid[row, :width]].tolist()
        framed = _frame(denoiser) if "--chat" in request.words else []
        assert sorted(set(seen) & controls) == sorted(set(framed) & controls), where
        assert sum(token in controls for token in seen) == sum(token in controls for token in framed), where
        open_ = trajectory.response_valid[row] & ~trajectory.given[row]
        answer = trajectory.response_ids[row][open_]
        holes = answer == spec.mask_id
        assert int(holes.sum()) <= one["holes"] and (one["holes"] == 0 or "policy" in where), where
        assert not torch.isin(answer[~holes], torch.tensor(spec.forbidden_ids)).any(), where


def _frame(denoiser) -> list[int]:  # type: ignore[no-untyped-def]
    """The control tokens that the chat template writes, from a prompt that has none."""
    return load_denoiser(denoiser.published.folder, chat=True).encode_prompt("a")


def test_hostile_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = work_off(80, tmp_path, capsys, seed=1)
    assert tally.outcome["done"] >= 30 and tally.outcome["refused"] >= 5


@pytest.mark.slow
def test_two_thousand_hostile_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = work_off(2000, tmp_path, capsys)
    assert tally.outcome["done"] >= 1000
    # The first half fills the allocator's and the libraries' caches; after that nothing may be added.
    first, last = max(tally.memory[:1000]), max(tally.memory[1500:])
    with capsys.disabled():
        print(f"\n{dict(tally.outcome)}, {tally.completions} completions, {tally.forwards} forwards")
        print("MiB after 1, 250, 500, 1000, 1500, 2000: ", end="")
        print([round(tally.memory[place - 1] / 2**20) for place in (1, 250, 500, 1000, 1500, 2000)])
        print(f"largest until 1000: {first / 2**20:.0f} MiB, from 1500 on: {last / 2**20:.0f} MiB")
        print(tally.refusals.most_common())
    assert last <= first + 16 * 2**20

"""The frontier and the denoiser of the check of unmasking policies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unveil.claims.chase import ChaseDenoiser
from unveil.claims.unmasking_policies import frontier
from unveil.samplers.canvas import Canvas
from unveil.seeds import generator


@pytest.mark.parametrize(
    ("steps", "height"),
    [(1.9, 0.0), (2.0, 0.2), (3.0, 0.4), (5.0, 0.7), (6.0, 0.8), (9.0, 0.8)],
)
def test_the_frontier_joins_the_best_points(steps: float, height: float) -> None:
    points = [(2.0, 0.2), (4.0, 0.6), (3.5, 0.1), (6.0, 0.8), (5.0, 0.55), (7.0, 0.5)]
    found = frontier([{"steps": taken, "accuracy": accuracy} for taken, accuracy in points], steps)
    assert found == pytest.approx(height)


def test_the_denoiser_reads_table_start_and_the_tokens_before(tmp_path: Path) -> None:
    net = ChaseDenoiser(values=4, longest=6)
    net.initialise(generator(0, "chase"))
    prompt = [net.tokenizer.id(word) for word in ("3", "0", "1", "3", "2")]
    mask, two = net.spec.mask_id, net.tokenizer.id("2")
    rows = [[mask] * 6, [two, *[mask] * 5]]
    ids = Canvas.of([prompt, prompt], 6, net.spec, initial=rows).ids
    with torch.no_grad():
        logits = net(ids)
        assert logits.shape == (2, 11, 8)
        assert (logits[..., list(net.spec.forbidden_ids)] == -torch.inf).all()
        assert net.spec.end_ids[0] not in net.spec.forbidden_ids  # the end has to be written
        changed = (logits[0] != logits[1])[:, 4:].any(1)
        assert changed[5:].all() and not changed[4]  # attention tells every slot; the start's column says nothing
        net.save_pretrained(tmp_path)
        again = ChaseDenoiser(values=4, longest=6).load(tmp_path)
        torch.testing.assert_close(again(ids), logits, rtol=0, atol=0)
        shorter = net(ids[:, :8])
        assert shorter.shape == (2, 8, 8) and shorter[:, :, 4:].isfinite().all()
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, 0] = False
    with pytest.raises(ValueError, match="one length"):
        net.features(ids, valid)

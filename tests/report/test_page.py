"""The page as text: what is embedded, what is refused, what survives a crash."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unveil.registry import UserError
from unveil.report.page import POINTS, _bins, _curves, _ends_first, _step_map, _within_budget, build_page, write_page

DATA = '<script type="application/json" id="data">'


def embedded(page: str) -> dict[str, Any]:
    """What the browser finds in #data: the text up to the first </script, as HTML defines it."""
    return json.loads(re.split("</script", page.split(DATA)[1], maxsplit=1, flags=re.IGNORECASE)[0])


def minimal(folder: Path, **files: str) -> Path:
    """A run folder with run.json and the given files; the first _ of a name stands for its dot."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"system": "mdpo"}')
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


def test_page_holds_the_numbers_of_the_run(run: Path) -> None:
    data = embedded(build_page(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert data["train"]["reward"]["x"] == [line["step"] for line in train]
    assert data["train"]["reward"]["y"] == pytest.approx([line["reward"] for line in train], rel=1e-5)
    assert "tokens_per_second" in data["train"], "a key that the page does not know"
    lcr = [line["high"] for line in lines if line["kind"] == "eval" and line["decoder"] == "lcr"]
    assert data["evals"]["lcr"]["high"] == pytest.approx(lcr, rel=1e-5)
    assert data["run"]["cost"]["rollouts"] == 51200
    assert data["run"]["name"] == run.name
    assert data["recipe"] == (run / "recipe.yaml").read_text()
    assert len(data["trajectories"]) == 25
    assert data["notes"] == []


def test_summary_compares_the_tuned_model_with_the_base(tmp_path: Path) -> None:
    table = {
        "rows": ["base", "tuned"],
        "columns": ["lcr", "rcr"],
        "accuracy": [[0.4, 0.5], [0.6, 0.45]],
        "low": [[0.36, 0.46], [0.56, 0.41]],
        "high": [[0.44, 0.54], [0.64, 0.49]],
        "problems": 1512,
    }
    assert embedded(build_page(minimal(tmp_path, table_json=json.dumps(table))))["summary"] == [
        "With lcr, held-out accuracy goes from 40.0% (base) to 60.0% (tuned): "
        "+20.0 points on 1,512 problems; the intervals do not overlap.",
        "With rcr, held-out accuracy goes from 50.0% (base) to 45.0% (tuned): "
        "−5.0 points on 1,512 problems; the intervals overlap.",
    ]


def test_summary_without_a_table_uses_the_evaluations(tmp_path: Path) -> None:
    found = [(0, 0.25), (50, 0.5), (90, 0.75)]
    metrics = as_lines([{"kind": "eval", "step": step, "decoder": "lcr", "accuracy": y} for step, y in found])
    run = minimal(tmp_path / "a", metrics_jsonl=metrics)
    sentence = "With lcr, held-out accuracy goes from 25.0% (update 0) to 75.0% (update 90): +50.0 points."
    assert embedded(build_page(run))["summary"] == [sentence]
    run = minimal(tmp_path / "b", metrics_jsonl=metrics.splitlines()[0] + "\n")
    assert embedded(build_page(run))["summary"] == ["With lcr, held-out accuracy is 25.0% (update 0)."]
    assert embedded(build_page(minimal(tmp_path / "c")))["summary"] == ["No held-out evaluation yet."]


HOSTILE = ["</script><img src=x onerror=alert(1)>", "</SCRIPT >", "<!--<script>", "{{data}}", "\u2028\ud800"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_stay_inside_the_data(tmp_path: Path, hostile: str) -> None:
    sample = {"step": 0, "problem": hostile, "prompt": hostile, "completion": hostile, "correct": False}
    recipe = hostile.encode("ascii", "replace").decode()
    run = minimal(tmp_path, samples_jsonl=as_lines([sample]), recipe_yaml=recipe)
    (run / "run.json").write_text(json.dumps({"system": hostile, "command": hostile}))
    page = build_page(run)
    assert embedded(page)["samples"] == [sample]
    assert embedded(page)["run"]["command"] == hostile
    assert len(re.findall("</script", page, re.IGNORECASE)) == 3
    assert "<img" not in page


def test_folder_name_is_escaped(tmp_path: Path) -> None:
    page = build_page(minimal(tmp_path / "<b>&amp;"))
    assert "<title>&lt;b&gt;&amp;amp; · unveil</title>" in page


def test_policy_allows_the_own_scripts_and_no_network(run: Path) -> None:
    page = build_page(run)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:,)", page.split(DATA)[0])
    texts = re.findall(r"<(?:style|script|script type=\"module\")>(.*?)</(?:style|script)>", page, re.DOTALL)
    assert len(texts) == 3
    for text in texts:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "trajectories.jsonl"])
def test_last_line_cut_by_a_crash_is_left_out_and_noted(run: Path, name: str) -> None:
    whole = embedded(build_page(run))
    with (run / name).open("ab") as file:
        file.write('{"kind": "train", "step": 401, "prompt": "é'.encode()[:-1])
    data = embedded(build_page(run))
    assert data.pop("notes") == [f"The last line of {name} is cut short and left out."]
    whole.pop("notes")
    assert data == whole


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("metrics.jsonl", '{"kind": "train", "st', "metrics.jsonl' line 3 is no valid JSON"),
        ("metrics.jsonl", "[1]", "metrics.jsonl' line 3 must hold a JSON object, not list"),
        ("metrics.jsonl", '{"kind": "train"}', "line 3: 'step' must be of type int, not 'None'"),
        ("samples.jsonl", '{"step": true, "problem": "a"}', "line 3: 'step' must be of type int, not 'True'"),
        ("trajectories.jsonl", '{"step": 0, "problem": "a", "decoder": "x"}', "line 3: 'steps' must be"),
        (
            "trajectories.jsonl",
            '{"step": 0, "problem": "a", "decoder": "x", "steps": [{"tokens": ["1"], "guess": []}]}',
            "line 3: 'steps[0].guess' must be a list of 1",
        ),
    ],
)
def test_broken_line_is_named(run: Path, name: str, line: str, message: str) -> None:
    lines = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError) as caught:
        build_page(run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no run folder: it has no run\.json"):
            build_page(folder)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json' is no valid JSON"):
        build_page(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rows": ["base"], "columns": ["lcr"]}, "'accuracy' must be a list with entries"),
        ({"rows": ["a"], "columns": ["b"], "accuracy": [[1, 2]]}, "'accuracy' must have 1 rows of 1 numbers"),
        ({"rows": ["a"], "columns": ["b"], "accuracy": [[1]], "low": [[], []]}, "'low' must have 1 rows"),
    ],
)
def test_broken_table_is_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build_page(minimal(tmp_path, table_json=json.dumps(table)))


def as_lines(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_only_run_json_is_needed(tmp_path: Path) -> None:
    data = embedded(build_page(minimal(tmp_path)))
    assert data["train"] == data["evals"] == {}
    assert data["recipe"] is data["table"] is data["guesses"] is None


def test_values_that_are_no_numbers_become_gaps(tmp_path: Path) -> None:
    first = {"kind": "train", "step": 1, "kl": float("nan"), "word": "x", "on": True}
    lines = as_lines([first, {"kind": "train", "step": 2, "kl": 0.5, "loss": float("inf")}])
    data = embedded(build_page(minimal(tmp_path, metrics_jsonl=lines)))
    assert data["train"] == {"kl": {"x": [1, 2], "y": [None, 0.5]}}


def test_updates_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    written = [(1, 1), (2, 2), (3, 3), (2, 20), (3, 30)]
    lines = [{"kind": "train", "step": step, "reward": reward} for step, reward in written]
    data = embedded(build_page(minimal(tmp_path, metrics_jsonl=as_lines(lines))))
    assert data["train"]["reward"] == {"x": [1, 2, 3], "y": [1, 20, 30]}


def test_groups_without_variance_are_counted(tmp_path: Path) -> None:
    shares = [0.1, 0.81, 0.8, 0.9, 0.2]
    lines = [{"kind": "train", "step": i, "zero_variance_groups": share} for i, share in enumerate(shares)]
    data = embedded(build_page(minimal(tmp_path, metrics_jsonl=as_lines(lines))))
    assert data["groups"] == {"limit": 0.8, "updates": 5, "flat": 2, "last": 3}


@settings(max_examples=50, deadline=None)
@given(length=st.integers(0, 6000), limit=st.integers(1, 2500))
def test_bins_cover_every_index_once(length: int, limit: int) -> None:
    bins = _bins(length, limit)
    assert [i for part in bins for i in part] == list(range(length))
    assert len(bins) == min(length, limit)
    assert not bins or max(map(len, bins)) - min(map(len, bins)) <= 1


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(length=st.integers(POINTS - 1, 3 * POINTS), spike=st.integers(0, POINTS - 2))
def test_long_curves_are_thinned_and_keep_their_spikes(length: int, spike: int) -> None:
    lines = [{"step": step, "loss": 100 if step == spike else step % 7} for step in range(length)]
    curve = _curves(lines)["loss"]
    assert len(curve["x"]) == len(curve["y"]) == min(length, POINTS)
    assert max(curve.get("high", curve["y"])) == 100
    if length <= POINTS:
        assert curve == {"x": list(range(length)), "y": [line["loss"] for line in lines]}
    else:
        bands = zip(curve["low"], curve["y"], curve["high"], strict=True)
        assert all(low <= y <= high for low, y, high in bands)


def test_guess_map_averages_columns_and_pads_short_rows() -> None:
    lines = [{"step": step, "guess_accuracy": [step % 2, 0.5][: 1 + (step > 0)]} for step in range(320)]
    found = _step_map(lines, "guess_accuracy")
    assert found is not None
    assert found["from"][:2] == [0, 2]
    assert found["to"][-1] == 319
    assert found["values"] == [[0.5, 0.5]] * 160
    alone = _step_map(lines[:1] + lines[319:], "guess_accuracy")
    assert alone is not None
    assert alone["values"] == [[0, None], [1, 0.5]]


def test_budget_prefers_the_ends_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "problem": "a"} for step in range(9)]
    monkeypatch.setattr("unveil.report.page._BUDGET", 3 * len(json.dumps(lines[0])))
    notes: list[str] = []
    assert [line["step"] for line in _within_budget(lines, "samples", notes)] == [0, 4, 8]
    assert notes == ["6 of 9 samples are left out to keep this page small."]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 37])
def test_every_update_has_a_rank_and_the_ends_come_first(count: int) -> None:
    order = _ends_first(range(count))
    assert sorted(order) == list(range(count))
    assert order[:2] == [count - 1, 0][:count]


def test_write_page_replaces_the_old_page_and_leaves_nothing_else(run: Path) -> None:
    (run / "report.html").write_text("old")
    before = {path.name for path in run.iterdir()}
    assert write_page(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == build_page(run)
    assert {path.name for path in run.iterdir()} == before


def test_failed_build_or_write_keeps_the_old_page(run: Path) -> None:
    (run / "report.html").write_text("old")
    (run / "run.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        write_page(run)
    assert (run / "report.html").read_text() == "old"
    (run / "run.json").write_text("{}")
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html' cannot be written"):
        write_page(run)
    assert not list(run.glob(".report*"))

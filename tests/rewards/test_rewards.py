"""Rewards: the task's own, functions of TRL, a server that misbehaves, and sums of them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from PIL import Image

from unveil.recipe import RecipeError, build, dump
from unveil.registry import UserError
from unveil.rewards.base import Correct, Failure, Part, Reward, Shaped, Sum
from unveil.rewards.images import data_url, jpeg
from unveil.rewards.remote import Pickled, Remote
from unveil.rewards.trl import Trl

TEXTS = ["a", "b", "ab c"]
PROMPTS = ["p", "q", "r"]
METADATA: list[Any] = [
    {"id": str(number), "word": "b", "correct": number == 1, "score": number / 4} for number in range(3)
]


def ask(reward: Reward, texts: list[str] = TEXTS) -> list[Any]:
    """Scores, with the kind in the place of a failure."""
    count = len(texts)
    prompts, metadata = (PROMPTS * count)[:count], (METADATA * count)[:count]
    total = reward.ask(texts, prompts, metadata).total
    return [one.kind if isinstance(one, Failure) else one for one in total]


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trl]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return lambda name, **settings: Trl(function=f"functions:{name}", **settings)


# ---- the task's own


def test_the_task_s_verdict_is_a_reward() -> None:
    assert ask(Correct()) == [0.0, 1.0, 0.0] and ask(Shaped()) == [0.0, 0.25, 0.5]


# ---- functions of TRL


def test_a_function_is_called_with_prompts_completions_and_a_list_per_column(trl: Callable[..., Trl]) -> None:
    assert ask(trl("length")) == [1.0, 1.0, 4.0]
    columns = {key: [own[key] for own in METADATA] for key in ("id", "word", "correct", "score")}
    assert sys.modules["functions"].calls[-1] == {"prompts": PROMPTS, "completions": TEXTS, **columns}


def test_other_shapes_of_functions(trl: Callable[..., Trl]) -> None:
    assert ask(trl("only_named")) == [0.0, 1.0, 0.0]
    assert ask(trl("waits")) == ask(trl("waits", timeout=None)) == [1.0, None, 1.0]
    assert ask(trl("chat", messages=True)) == [5.0, 5.0, 8.0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("crashes", "exception"),
        ("leaves", "exception"),
        ("too_few", "wrong_length"),
        ("no_list", "exception"),
        ("text", "not_a_number"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_broken_function_scores_nothing(trl: Callable[..., Trl], name: str, kind: str, timeout: float | None) -> None:
    assert ask(trl(name, timeout=timeout)) == [kind] * 3


def test_a_slow_function_is_not_waited_for(trl: Callable[..., Trl]) -> None:
    started = time.perf_counter()
    assert ask(trl("sleeps", timeout=0.05)) == ["timeout"] * 3
    assert time.perf_counter() - started < 0.4


def test_what_is_no_number_fails_alone(trl: Callable[..., Trl]) -> None:
    bad = "not_a_number"
    assert ask(trl("odd"), ["x"] * 7) == [bad, bad, bad, bad, bad, None, 1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("functions:nothing", "cannot be imported: module 'functions' has no attribute 'nothing'"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("functions", "cannot be imported"),
        ("functions:needs_ids", "needs 'completion_ids', which there is not here"),
    ],
)
def test_a_function_that_cannot_work_is_refused_before_any_work(
    trl: Callable[..., Trl], function: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=f"^reward: function: '{function}' {said}"):
        build(Reward, {"name": "trl", "function": function}, "reward")


# ---- a server


class Server(ThreadingHTTPServer):
    """Answers the n-th request with the n-th of ``plan`` (the last one for ever): a status or the name of a fault."""

    daemon_threads = True
    plan: list[Any]
    seen: list[Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score?v=1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        pickled = self.headers["Content-Type"] == "application/octet-stream"
        body = pickle.loads(raw) if pickled else json.loads(raw)
        plan = self.server.plan
        what = plan[min(len(self.server.seen), len(plan) - 1)]
        self.server.seen.append(body | {"path": self.path})
        key = next(name for name in ("completions", "image", "images") if name in body)
        scores: Any = [float(len(one)) for one in body[key]]
        if what == "slow":
            time.sleep(0.4)
        if what == "hangs up":
            return
        answers = {
            "malformed": b"{scores",
            "deep": b"[" * 100_000,
            "no scores": b'{"score": [1]}',
            "true": json.dumps({"scores": [True] * len(scores)}).encode(),
            "nan": b'{"scores": [NaN, 1e999, 2]}',
            "null": b'{"scores": [null, 1, 2]}',
            "short": json.dumps({"scores": scores[1:]}).encode(),
        }
        answer = answers.get(what, json.dumps({"rewards" if key == "image" else "scores": scores}).encode())
        if pickled:
            answer = pickle.dumps({"outputs": os.getcwd if what == "calls" else scores})
        self.send_response(what if isinstance(what, int) else 200)
        if what == 302:
            self.send_header("Location", self.server.url)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have gone
            self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        found.plan, found.seen = [200], []
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def remote(server: Server, **settings: Any) -> Remote:
    return Remote(url=server.url, **{"timeout": 5.0, "backoff": 0.0} | settings)


def test_a_server_is_sent_what_the_page_says(server: Server) -> None:
    assert ask(remote(server, batch_size=2)) == [1.0, 1.0, 4.0]
    bodies = [
        {"path": "/score?v=1", "completions": TEXTS[part], "prompts": PROMPTS[part], "metadata": METADATA[part]}
        for part in (slice(0, 2), slice(2, 3))
    ]
    assert server.seen == bodies


def test_a_server_is_sent_images_as_pngs(server: Server) -> None:
    images = [torch.zeros(1, 4, 4), torch.rand(3, 5, 6)]
    answer = remote(server).ask(images, PROMPTS[:2], METADATA[:2])
    sent = server.seen[0]["completions"]
    assert sent == [data_url(image) for image in images] and answer.total == [float(len(one)) for one in sent]


def test_other_servers_have_other_names(server: Server) -> None:
    """Those of Flow-Factory's reward server: bare base64."""
    images = [torch.zeros(1, 4, 4), torch.rand(3, 5, 6)]
    names = {"prompts_as": "prompt", "completions_as": "image", "metadata_as": None, "scores_as": "rewards"}
    reward = remote(server, **names, images="base64", extra={"video": None})
    answer = reward.ask(images, PROMPTS[:2], METADATA[:2])
    sent = server.seen[0]["image"]
    assert server.seen == [{"path": "/score?v=1", "prompt": PROMPTS[:2], "image": sent, "video": None}]
    read = [Image.open(io.BytesIO(base64.b64decode(one))) for one in sent]
    assert [numpy.array(one).shape for one in read] == [(4, 4), (5, 6, 3)]
    assert answer.total == [float(len(one)) for one in sent]
    with pytest.raises(UserError, match="extra: two keys of a request have one name"):
        remote(server, completions_as="prompts")


def test_a_server_of_pickles_is_answered_and_runs_nothing(server: Server) -> None:
    images = [torch.rand(1, 8, 8), torch.rand(3, 8, 8)]
    reward = Pickled(url=server.url, timeout=5.0, metadata_as="meta_datas", extra={"only_strict": True}, backoff=0.0)
    answer = reward.ask(images, PROMPTS[:2], METADATA[:2])
    assert answer.total == [float(len(jpeg(one))) for one in images]
    body = server.seen[0]
    assert body["images"] == [jpeg(one) for one in images] and body["only_strict"] is True
    assert body["prompts"] == PROMPTS[:2] and body["meta_datas"] == METADATA[:2]
    server.plan = ["calls"]
    failed = reward.ask(images, PROMPTS[:2], METADATA[:2]).failures()
    assert [one.kind for _, one in failed] == ["malformed"] * 2 and "posix.getcwd" in failed[0][1].message
    with pytest.raises(UserError, match="images: 'pickled' sends JPEGs"):
        Pickled(url=server.url, images="base64")


@pytest.mark.parametrize("fault", [500, 503, 429, "hangs up"])
def test_a_passing_fault_is_tried_again(server: Server, fault: Any) -> None:
    server.plan = [fault, fault, 200]
    assert ask(remote(server, retries=2)) == [1.0, 1.0, 4.0]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("fault", "kind", "requests"),
    [
        (500, "status", 2),
        ("hangs up", "connection", 2),
        (404, "status", 1),
        (302, "status", 1),
        ("malformed", "malformed", 1),
        ("deep", "malformed", 1),
        ("no scores", "malformed", 1),
        ("true", "malformed", 1),
        ("short", "wrong_length", 1),
    ],
)
def test_a_broken_server_scores_nothing(server: Server, fault: Any, kind: str, requests: int) -> None:
    server.plan = [fault]
    assert ask(remote(server, retries=1)) == [kind] * 3
    assert len(server.seen) == requests


def test_numbers_of_a_server_fail_one_by_one(server: Server) -> None:
    server.plan = ["nan", "null"]
    reward = remote(server)
    assert ask(reward) == ["not_a_number", "not_a_number", 2.0]
    assert ask(reward) == [None, 1.0, 2.0]


def test_a_slow_server_is_not_waited_for(server: Server) -> None:
    server.plan = ["slow"]
    started = time.perf_counter()
    assert ask(remote(server, timeout=0.05, retries=0)) == ["timeout"] * 3
    assert time.perf_counter() - started < 0.35


def test_nobody_there(server: Server) -> None:
    server.shutdown()
    server.server_close()
    assert ask(remote(server)) == ["connection"] * 3


def test_the_breaker_opens_and_closes(server: Server) -> None:
    server.plan = [500]
    reward = remote(server, retries=1, breaker_failures=2, breaker_seconds=0.2)
    assert ask(reward)[0] == ask(reward)[0] == "status" and len(server.seen) == 4
    assert ask(reward) == ["breaker"] * 3 and len(server.seen) == 4, "an open breaker sends nothing"
    time.sleep(0.25)
    assert ask(reward)[0] == "status" and len(server.seen) == 5, "the trial is one try"
    assert ask(reward)[0] == "breaker", "a failed trial opens it again"
    server.plan = [200]
    time.sleep(0.25)
    assert ask(reward) == [1.0, 1.0, 4.0]
    server.plan = [500]
    assert ask(reward)[0] == "status" and len(server.seen) == 8, "closed: a full request of two tries again"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "host/x", "http://", "http://u:p@host/", "http://h:x/", "http://h/a b"],
)
def test_only_web_addresses_are_taken(url: str) -> None:
    with pytest.raises(UserError, match=r"^url: should be http://HOST"):
        Remote(url=url)


# ---- sums


def test_a_sum_weighs_its_parts_and_only_watches_an_audit(trl: Callable[..., Trl]) -> None:
    parts = {
        "right": Part(reward=Correct(), weight=2.0),
        "length": Part(reward=trl("length"), weight=-0.5),
        "b": Part(reward=trl("waits"), weight=10.0),
        "audit": Part(reward=trl("crashes"), weight=100.0, role="audit"),
    }
    answer = Sum(parts=parts).ask(TEXTS, PROMPTS, METADATA)
    assert answer.total == [10 - 0.5, 2 - 0.5, 10 - 2.0], "None adds nothing; an audit that fails changes nothing"
    assert answer.parts["length"] == [1.0, 1.0, 4.0]
    assert [(name, failure.kind) for name, failure in answer.failures()] == [("audit", "exception")] * 3


def test_a_sum_with_a_hole_has_failed(trl: Callable[..., Trl]) -> None:
    parts = {"right": Part(reward=Correct()), "broken": Part(reward=trl("too_few"))}
    assert ask(Sum(parts=parts)) == ["wrong_length"] * 3
    assert ask(Sum(parts={"b": Part(reward=trl("waits"))})) == [1.0, None, 1.0]


def test_sums_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="at least one should have the role 'optimise'"):
        Sum(parts={"a": Part(reward=Correct(), role="audit")})
    with pytest.raises(UserError, match=r"parts\.a\.reward: a sum inside a sum"):
        Sum(parts={"a": Part(reward=Sum(parts={"b": Part(reward=Correct())}))})


def test_parts_of_a_curriculum_are_optimised_at_their_updates() -> None:
    curriculum = Sum(
        parts={
            "base": Part(reward=Correct(), weight=2.0),
            "first": Part(reward=Correct(), weight=3.0, updates=[(0, 2), (5, 6)]),
            "later": Part(reward=Correct(), weight=5.0, updates=[(4, None)]),
            "seen": Part(reward=Correct(), role="audit"),
        }
    )
    weights = [sorted(curriculum.at(update).part_weights) for update in range(8)]
    assert weights == [["base", "first"]] * 2 + [["base"]] * 2 + [
        ["base", "later"], ["base", "first", "later"], ["base", "later"], ["base", "later"]
    ]  # fmt: skip
    assert [curriculum.at(update).ask(TEXTS, PROMPTS, METADATA).total[1] for update in (0, 2, 5)] == [5.0, 2.0, 10.0]
    resting = curriculum.at(2).ask(TEXTS, PROMPTS, METADATA)
    assert sorted(resting.parts) == ["base", "seen"]
    assert sorted(curriculum.at(2).ask(TEXTS, PROMPTS, METADATA, evaluating=True).parts) == sorted(curriculum.parts)
    assert curriculum.at(0).audit_weights == {"seen": 1.0}
    plain = Sum(parts={"base": Part(reward=Correct())})
    assert plain.at(3) is plain and Correct().at(3) == Correct()
    assert build(Reward, dump(curriculum)) == curriculum


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"updates": [(3, 3)]}, r"parts\.a\.updates: should be \[from, to\] with 0 <= from < to, got \[3, 3\]"),
        ({"updates": [(0, 5)]}, "none is optimised at update 5"),
        ({"updates": [(2, None)]}, "none is optimised at update 0"),
        ({"updates": [(0, None)], "role": "audit"}, r"parts\.a\.updates: only for parts with the role 'optimise'"),
    ],
)
def test_curricula_that_make_no_sense_are_refused(part: Any, message: str) -> None:
    parts = {"a": Part(reward=Correct(), **part)}
    if "role" in part or part["updates"] == [(3, 3)]:
        parts["b"] = Part(reward=Correct())
    with pytest.raises(UserError, match=message):
        Sum(parts=parts)


def test_a_recipe_says_all_of_it_and_gets_it_back(trl: Callable[..., Trl]) -> None:
    data = {
        "name": "sum",
        "parts": {
            "a": {"reward": "correct", "weight": 0.5},
            "b": {"reward": {"name": "trl", "function": "functions:length"}, "role": "audit"},
            "c": {"reward": {"name": "remote", "url": "https://example.org:8080", "retries": 0}},
        },
    }
    reward = build(Reward, data)
    assert build(Reward, dump(reward)) == reward
    assert "failed" not in dump(reward)["parts"]["c"]["reward"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_recipes_of_the_page_are_valid(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root))
    page = (root / "docs" / "rewards.md").read_text(encoding="utf-8")
    block = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)[number]
    reward = build(Reward, yaml.safe_load(block)["policy"]["reward"])
    if number == 0:
        assert reward == Remote(url="http://127.0.0.1:8000/score")
        return
    assert isinstance(reward, Sum)
    if number == 1:
        geneval = reward.parts["geneval"].reward
        assert isinstance(geneval, Pickled) and geneval.scores_as == "scores" and geneval.extra == {"only_strict": True}
        assert reward.parts["deqa"].reward == Pickled(url="http://127.0.0.1:18086", timeout=120)
    else:
        answer = reward.ask(["1 + 1 = 2", "", "="], PROMPTS, METADATA)
        assert answer.total == pytest.approx([-0.005, 1.1, -0.001]) and answer.parts["form"] == [1.0, None, 1.0]

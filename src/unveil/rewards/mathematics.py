r"""Whether two mathematical answers are equal, by ``math-verify`` in a process of its own.

The package stops slow work by ``signal.alarm``, which only works in a main thread and not within one long
operation on integers. So a child process does the work; it is killed and replaced where an answer takes too long.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress

from unveil.registry import UserError

MAX_CHARACTERS = 1000
"""A longer answer is wrong: this bounds the cost of any input."""
_SECONDS = 6.0
_START_SECONDS = 60.0

_WORKER = r"""
import json, logging, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
        wrapped = [parse("\\boxed{" + text + "}", parsing_timeout=2) for text in (gold, answer)]
        print(int(bool(verify(*wrapped, timeout_seconds=2))), flush=True)
    except Exception:
        print(0, flush=True)
"""


def require() -> None:
    """Raises UserError where ``math-verify`` is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("task: mathematical answers need the extra (pip install 'unveil[math]')")


class _Judge:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def equal(self, gold: str, answer: str) -> bool:
        with self.lock:
            try:
                if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                    self.start()
                assert self.process is not None and self.process.stdin is not None
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self.process.stdin.flush()
                return self.line(_SECONDS) == b"1"
            except (OSError, TimeoutError):
                self.stop()
                return False

    def start(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.line(_START_SECONDS)

    def line(self, seconds: float) -> bytes:
        assert self.process is not None and self.process.stdout is not None
        pipe, text, deadline = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        while not text.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(pipe, 100)
            if not piece:
                raise OSError("the verifier's process ended")
            text += piece
        return text.strip()

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            with suppress(OSError):
                self.process.kill()
                self.process.communicate()
        self.process = None


_judge = _Judge()
atexit.register(_judge.stop)


def same_text(gold: str, answer: str) -> bool:
    """Equal as written, white space aside."""
    return "".join(gold.split()) == "".join(answer.split())


def equal_answers(gold: str, answer: str) -> bool:
    """Equal as written (white space aside) or equal in value. Never raises on any string."""
    if same_text(gold, answer):
        return True
    if not answer.strip() or len(answer) > MAX_CHARACTERS:
        return False
    return _judge.equal(gold, answer)

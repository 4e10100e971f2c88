from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from unveil.rewards.sandbox import Limits, run_python

SHORT = Limits(seconds=2.0)


def test_a_program_passes_only_where_it_reaches_its_end() -> None:
    assert run_python("import math, random\nassert math.pi > 3").passed
    for program in ("assert False", "import os; os._exit(0)", "raise SystemExit(0)", "x = (", "\0"):
        result = run_python(program)
        assert not result.passed and not result.timed_out and result.error, program


def test_limits() -> None:
    loop = run_python("while True: pass", SHORT)
    assert loop.timed_out and 2 <= loop.seconds < 5
    assert "MemoryError" in run_python("bytearray(1 << 31)").error
    assert not run_python("open('x', 'w').write('a' * 2**22)").passed
    loud = run_python("print('a' * 10**7)", Limits(output=1000))
    assert loud.passed and len(loud.output) == 1000


def test_a_fork_bomb_is_limited() -> None:
    result = run_python("import os\nwhile True: os.fork()", SHORT)
    assert not result.passed and result.seconds < 5


def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    held = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(held, True)
    listed = "[n for n in range(3, 64) if os.path.exists(f'/proc/self/fd/{n}')]"
    seen = run_python(f"import os\nprint(sorted(os.environ), {listed})")
    os.close(held)
    assert seen.output.strip() in ("[] []", "['LC_CTYPE'] []")


def test_a_server_that_listens_is_never_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        call = f"import socket\nsocket.socket().connect(('127.0.0.1', {server.getsockname()[1]}))\n"
        exec(call, {})  # from outside it can be reached
        server.accept()[0].close()
        assert not run_python(call).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_writing_outside_and_the_parent_lives(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    outside = tmp_path / "escaped"
    result = run_python(f"open({str(outside)!r}, 'w')")
    assert "files" not in result.guarantees or not outside.exists()
    run_python("import os\nfor who in (os.getppid(), -1): os.kill(who, 9)")
    assert os.getpid()


def test_background_processes_die_with_the_program() -> None:
    program = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  while True: time.sleep(0.1)"
    start = time.monotonic()
    result = run_python(program + "\nprint(os.getpid())", SHORT)
    assert time.monotonic() - start < 5
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert result.passed == ("processes" in result.guarantees)
    assert not any(b"audithook(refuse)" in command for command in commands)

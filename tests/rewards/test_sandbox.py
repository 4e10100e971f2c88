from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unveil.rewards import sandbox
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


def test_the_library_is_whole() -> None:
    """Submodules of what the sandbox itself has imported, and codecs, lie where the program may read them."""
    program = "import collections.abc, json.tool, importlib.metadata, random\n'ä'.encode('cp1252').decode('cp437')"
    assert run_python(program).passed


def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    held = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(held, True)
    listed = "[n for n in range(3, 64) if os.path.exists(f'/proc/self/fd/{n}')]"
    seen = run_python(f"import os\nprint(sorted(os.environ), {listed})")
    os.close(held)
    assert seen.output.strip() in ("[] []", "['LC_CTYPE'] []")


# ---- attempts to escape: as this user, as one without rights, as root of a container, with and without namespaces

DRIVER = """
import importlib.util, json, os, sys, tempfile
job = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("sandbox", job["module"])
sandbox = importlib.util.module_from_spec(spec)
sys.modules["sandbox"] = sandbox
sys.dont_write_bytecode = True
spec.loader.exec_module(sandbox)
if job["bare"]:
    assert "libc.unshare(" in sandbox._BOOT
    sandbox._BOOT = sandbox._BOOT.replace("libc.unshare(", "(lambda flags: -1)(")
folders, make = [], tempfile.mkdtemp
def remember(**given):
    folders.append(make(**given))
    return folders[-1]
tempfile.mkdtemp = remember
found = []
for program in job["programs"]:
    result = sandbox.run_python(program, sandbox.Limits(seconds=4.0))
    found.append({name: getattr(result, name) for name in ("passed", "timed_out", "error", "output", "guarantees")})
print(json.dumps({"results": found, "left": [folder for folder in folders if os.path.exists(folder)]}))
"""
NOBODY = 65534


def open_to_all(path: Path) -> bool:
    return all(part.stat().st_mode & 1 for part in (path, *path.parents))


def interpreters() -> tuple[str, str | None]:
    """This one, and one that a user without rights may run."""
    shared = [Path(sys.executable).resolve(), *map(Path, ("/usr/bin/python3", "/usr/local/bin/python3"))]
    for path in shared:
        asked = [str(path), "-c", "import sys; print(sys.version_info >= (3, 11))"]
        if path.exists() and open_to_all(path.resolve()) and subprocess.check_output(asked) == b"True\n":
            return sys.executable, str(path)
    return sys.executable, None


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may write into, with a copy of the module and a victim."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    shutil.copy(sandbox.__file__, folder / "module.py")
    (folder / "module.py").chmod(0o644)
    (folder / "victim").write_text("alive")
    (folder / "victim").chmod(0o666)
    yield folder
    shutil.rmtree(folder)


ATTEMPTS = {
    "the network": "import socket\nsocket.socket().connect(('127.0.0.1', PORT))",
    "the network, below": "import _socket\n_socket.socket().connect(('127.0.0.1', PORT))",
    "the shadow file": "print(open('/etc/shadow').read())",
    "others' environments": "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
    "  try: print(open(path).read())\n  except OSError: pass",
    "killing all": "import os\nfor who in (os.getppid(), -1):\n  try: os.kill(who, 9)\n  except OSError: pass",
    "killing the group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "writing": "open('FOLDER/escaped', 'w').write('x')",
    "writing, below": "import os\nos.open('FOLDER/escaped', os.O_CREAT | os.O_WRONLY)",
    "truncating": "open('FOLDER/victim', 'r+').truncate(0)",
    "removing": "import os\nos.remove('FOLDER/victim')",
    "removing a tree": "import shutil\nshutil.rmtree('FOLDER', ignore_errors=True)",
    "renaming": "import os\nos.rename('FOLDER/victim', 'FOLDER/escaped')",
    "a link out": "import os\nos.symlink('FOLDER/victim', 'link')\nopen('link', 'w').write('x')",
    "a program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo x > FOLDER/escaped'])",
    "a program, below": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo x > FOLDER/escaped'])",
    "a daemon": "import os\nif os.fork() == 0:\n  os.setsid()\n  os.execv('/bin/sleep', ['MARK', '50'])",
    "bombs": "import os\nwhile True: os.fork()",
    "threads without end": "import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (9,))",
    "memory": "bytearray(1 << 31)",
    "a locked folder": "import os\nos.mkdir('d')\nopen('d/f', 'w').close()\nos.chmod('d', 0)\nos.chmod('.', 0)",
    "a deep folder": "import os\nfor _ in range(1100):\n  os.mkdir('d')\n  os.chdir('d')",
    "the disk": "for n in range(90): open(str(n), 'w').write('a' * 2**20)",
    "its own folder": "import os\nopen('x', 'w').write('a')\nos.rename('x', 'y')\nassert open('y').read() == 'a'\n"
    "import math, random, re, typing, collections.abc, heapq",
}


@pytest.mark.parametrize(
    "situation",
    [
        "this user", "this user, bare", "nobody, bare", "root of a container",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nobody", "root of a container, bare")),
    ],
)  # fmt: skip
def test_attempts_to_escape(situation: str, public: Path) -> None:
    own, shared = interpreters()
    command = [own, "-c", DRIVER]
    if not situation.startswith("this user"):
        if os.getuid() != 0 or shared is None or shutil.which("setpriv") is None:
            pytest.skip("becoming another user needs root, setpriv and a Python that all may run")
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        fake = ["unshare", "--user", "--map-root-user"] if situation.startswith("root") else []
        if fake and subprocess.run([*drop, *fake, "true"], capture_output=True).returncode:
            pytest.skip("this system grants no user namespaces")
        command = [*drop, *fake, shared, "-c", DRIVER]
    mark = f"sleep-{secrets.token_hex(8)}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        words = {"PORT": str(server.getsockname()[1]), "FOLDER": str(public), "MARK": mark}
        programs = [re.sub("PORT|FOLDER|MARK", lambda found: words[found[0]], text) for text in ATTEMPTS.values()]
        job = {"module": str(public / "module.py"), "bare": situation.endswith("bare"), "programs": programs}
        environment = {"PATH": os.environ["PATH"], "PARENTS_SECRET": "k3y"}
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        with pytest.raises(TimeoutError):
            server.accept()
    told = json.loads(done.stdout)
    results = dict(zip(ATTEMPTS, told["results"], strict=True))
    guarantees = set(results["its own folder"]["guarantees"])
    assert all(set(result["guarantees"]) == guarantees for result in results.values())
    expected = {"this user": os.getuid() == 0, "nobody": False, "root of a container": False}
    if situation.endswith("bare"):
        assert guarantees == ({"user"} if expected[situation.removesuffix(", bare")] else set())
        assert done.stderr.count("unveil: warning: sandbox: ") == 1 and "of the network, " in done.stderr
    elif {"network", "processes", "files"} <= guarantees:
        assert ("user" in guarantees) == expected[situation]
        assert ("unveil: warning" in done.stderr) == (situation == "root of a container")
    passed = {name for name, result in results.items() if result["passed"]}
    # These end without an exception whether or not they reached anything; below it is asked what they reached.
    quiet = {"others' environments", "killing all", "removing a tree", "a locked folder", "a deep folder"}
    quiet |= {"its own folder"}
    quiet |= {"a daemon", "a program, below"} if "processes" in guarantees else set()
    quiet |= set() if "files" in guarantees else {"the disk"}  # which is not contained then
    assert passed <= quiet and "its own folder" in passed, (passed, results)
    assert not any("k3y" in result["output"] + result["error"] for result in results.values())
    assert "root:" not in results["the shadow file"]["output"]
    assert (public / "victim").read_text() == "alive" and sorted(os.listdir(public)) == ["module.py", "victim"]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(mark.encode() in line for line in commands)
    assert told["left"] == []


def test_a_daemon_that_holds_the_output_open_is_not_waited_for() -> None:
    program = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  while True: time.sleep(0.1)"
    start = time.monotonic()
    result = run_python(program + "\nprint(os.getpid())", SHORT)
    assert result.passed == ("processes" in result.guarantees)
    assert not result.timed_out and result.seconds <= time.monotonic() - start

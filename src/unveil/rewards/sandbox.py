"""Runs untrusted Python in a process of its own, without network, inheritance or unlimited resources."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use: wall and CPU seconds, bytes of memory per process, of a file and of all files (the last
    where the system grants ``files``), processes (none beside itself where it does not grant ``processes``), output
    bytes."""

    seconds: float = 10.0
    memory: int = 2**30
    file_size: int = 2**20
    disk: int = 2**26
    processes: int = 8
    output: int = 2**16


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How a program ended.

    Attributes:
        passed: it ran to its last line (an early exit does not pass).
        timed_out: it was stopped at the wall-time limit.
        error: the end of its output where it did not pass, else empty.
        seconds: wall time.
        output: the first bytes of what it wrote.
        guarantees: what the system granted: ``network`` (empty network namespace), ``processes`` (process
            namespace: all die with the first, and no others are seen), ``files`` (everything but its folder, which
            has a size, is read-only), ``user`` (root became an identity without rights). What is missing is only
            covered by a Python audit hook, which hostile code can get around.
    """

    passed: bool
    timed_out: bool
    error: str
    seconds: float
    output: str
    guarantees: tuple[str, ...]


_BOOT = r"""
import ctypes, json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
libc = ctypes.CDLL(None, use_errno=True)
limits, folder, root, got = job["limits"], os.getcwd(), os.getuid() == 0, []
here, uid, gid = os.fsencode(folder), os.getuid(), os.getgid()
USER, NET, PID, MOUNT, IPC = 0x10000000, 0x40000000, 0x20000000, 0x20000, 0x8000000
sys.dont_write_bytecode = True
def mount(source, target, kind, flags, options=None):
    return libc.mount(source, target, kind, flags, options) == 0
if not root and libc.unshare(USER) == 0:
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
    except OSError:
        pass
if libc.unshare(NET) == 0:
    got.append("network")
libc.unshare(IPC)
mounts = libc.unshare(MOUNT) == 0 and mount(b"none", b"/", None, 0x4000 | 0x40000)
readable = not root
if mounts:
    options = b"mode=0777,nr_inodes=4096,size=%d" % limits["disk"]
    if mount(b"tmpfs", here, b"tmpfs", 0x6, options) or mount(here, here, None, 0x1000):
        os.chdir(folder)
        library = folder + "/.python"
        if root:  # so that the library stays readable where it lies in a private home
            os.mkdir(library)
            if mount(os.fsencode(sys.base_prefix), os.fsencode(library), None, 0x1000):
                for paths in (sys.path, *(getattr(module, "__path__", []) for module in sys.modules.values())):
                    paths[:] = [entry.replace(sys.base_prefix, library) for entry in paths]
                readable = True
        lock, free = (ctypes.c_uint64 * 4)(1, 0, 0, 0), (ctypes.c_uint64 * 4)(0, 1, 0, 0)
        if libc.syscall(442, -100, b"/", 0x8000, lock, 32) == 0:
            if libc.syscall(442, -100, here, 0, free, 32) == 0:
                got.append("files")
    os.chdir(folder)
if not readable:  # without rights, a library in a private home is only what has been imported before
    import array, bisect, cmath, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, hashlib
    import heapq, itertools, math, numbers, operator, queue, random, re, statistics, string, textwrap, typing
alone = libc.unshare(PID) == 0
told, tell = os.pipe()
ready, go = os.pipe()
child = os.fork()
if child:
    os.close(tell)
    os.close(ready)
    hidden, dropped = (os.read(told, 2) or b"00").decode()
    got += ["processes"] * int(hidden) + ["user"] * int(dropped)
    os.write(1, json.dumps({"pid": child, "guarantees": got}).encode() + b"\n")
    os.write(go, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)
os.setsid()
hidden = dropped = False
if alone and mounts:  # a process space of its own, and no sight of the old one
    hidden = mount(b"proc", b"/proc", b"proc", 0xE) or mount(b"tmpfs", b"/proc", b"tmpfs", 0xF, b"size=4k")
cpu = int(limits["seconds"]) + 1
for name, value in (
    ("CPU", cpu), ("AS", limits["memory"]), ("FSIZE", limits["file_size"]),
    ("NPROC", limits["processes"] if hidden else 0), ("NOFILE", 64), ("CORE", 0),
):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except (OSError, ValueError):
        pass
if root:
    try:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
        dropped = True
    except OSError:  # root of a container that has no other users
        pass
libc.prctl(38, 1, 0, 0, 0)
os.write(tell, b"%d%d" % (hidden, dropped))
os.read(ready, 1)
got += ["processes"] * hidden
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.closerange(3, 64)
missing = {"network", "processes", "files"} - set(got)
if missing:
    own = os.path.realpath(folder)
    changes = {
        "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr",
        "os.symlink", "os.utime",
    }
    starts = {
        "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.system",
        "pty.spawn", "signal.pthread_kill", "subprocess.Popen",
    }
    def outside(path, where=-1):  # a relative path counts from the open folder where
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        base = f"/proc/self/fd/{where}" if isinstance(where, int) and where >= 0 else ""
        real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        return not (real + "/").startswith(own + "/") and real != os.devnull
    def refuse(event, args):
        if event.startswith("ctypes."):
            raise PermissionError("no ctypes in the sandbox")
        if "network" in missing and event.startswith("socket."):
            raise PermissionError("no network in the sandbox")
        if "processes" in missing:
            if event in starts:
                raise PermissionError("no processes in the sandbox")
            if event == "open" and isinstance(args[0], (str, bytes)):
                real = os.path.realpath(os.fsdecode(args[0]))
                if real.startswith("/proc/") and not real.startswith(f"/proc/{os.getpid()}/"):
                    raise PermissionError("no other processes in the sandbox")
        if "files" in missing:
            if event == "open" and args[2] & 0o3103 and outside(args[0]) or event == "os.truncate" and outside(args[0]):
                raise PermissionError("no writing outside the folder of the sandbox")
            if event in changes and any(outside(part, args[-1]) for part in args):
                raise PermissionError("no changes outside the folder of the sandbox")
    sys.addaudithook(refuse)
exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(1, job["token"].encode())
os._exit(0)
"""
_MISSING = {
    "network": "the network",
    "processes": "other processes (only starting any is ruled out)",
    "files": "what the user may write",
    "user": "what root may do",
}
_warned: set[str] = set()


def _warn_once(guarantees: tuple[str, ...]) -> None:
    """Say on stderr, once per process, what this system does not keep programs from."""
    wanted = [name for name in _MISSING if name != "user" or os.getuid() == 0]
    missing = [name for name in wanted if name not in guarantees and name not in _warned]
    if missing:
        _warned.update(missing)
        parts = ", ".join(_MISSING[name] for name in missing)
        print(
            f"unveil: warning: sandbox: this system grants no isolation of {parts}; only a Python hook stands between "
            "programs and it, which hostile code can get around (docs/tasks.md)",
            file=sys.stderr,
        )


def run_python(program: str, limits: Limits | None = None) -> SandboxResult:
    """Run ``program`` by ``python -I`` in a fresh folder with an empty environment. Never raises on any program.

    The program shares its interpreter with the tests in it: code written to attack its own tests can still
    pass them, as with every in-process harness.
    """
    limits = limits or Limits()
    start = time.monotonic()
    folder = tempfile.mkdtemp(prefix="unveil-")
    token = secrets.token_hex(16)
    uid = _unknown_user()
    job = {"program": program, "limits": asdict(limits), "token": token, "uid": uid}
    try:
        if os.getuid() == 0:
            with suppress(OSError):  # root of a container that has no other users
                os.chown(folder, uid, uid)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            close_fds=True,
            start_new_session=True,
        )
        with process:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
                process.stdin.flush()
            with suppress(BrokenPipeError):
                process.stdin.close()
            head, tail, timed_out = _read(process, start + limits.seconds, limits.output)
    finally:
        _remove(folder)
    first, _, body = head.partition(b"\n")
    try:
        guarantees = tuple(json.loads(first)["guarantees"])
    except (ValueError, KeyError, TypeError):
        guarantees, body = (), head
    if first:
        _warn_once(guarantees)
    said = tail.removeprefix(first + b"\n")
    passed = not timed_out and process.returncode == 0 and tail.endswith(token.encode())
    output = body[: limits.output].decode("utf-8", "replace").replace(token, "")
    error = "" if passed else "timed out" if timed_out else said[-500:].decode("utf-8", "replace").strip()
    return SandboxResult(
        passed=passed,
        timed_out=timed_out,
        error=error if passed or error else f"ended early (status {process.returncode})",
        seconds=time.monotonic() - start,
        output=output,
        guarantees=guarantees,
    )


def _unknown_user() -> int:
    """A number that names no user of this system."""
    while True:
        uid = 20_000 + secrets.randbelow(40_000)
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid


def _remove(folder: str) -> None:
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):  # a program has locked a part of it, or it is deeper than Python recurses
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _read(process: subprocess.Popen[bytes], deadline: float, limit: int) -> tuple[bytes, bytes, bool]:
    """First and last bytes of the output and whether the time ran out; afterwards every process is dead."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    head, tail, ended, timed_out = b"", b"", False, False
    while True:
        ended = process.poll() is not None
        select.select([pipe], [], [], 0 if ended else 0.02)
        chunk = b""
        with suppress(BlockingIOError):
            chunk = os.read(pipe, 2**16)
        head += chunk[: max(0, limit + 512 - len(head))]
        tail = (tail + chunk)[-(2**11) :]
        timed_out = not ended and time.monotonic() > deadline
        if timed_out or (ended and not chunk) or time.monotonic() > deadline:
            break
    with suppress(ValueError, KeyError, TypeError, OSError):
        inner = int(json.loads(head.partition(b"\n")[0])["pid"])
        if process.poll() is None:
            with suppress(OSError):
                os.kill(inner, signal.SIGKILL)
        with suppress(OSError):
            os.killpg(inner, signal.SIGKILL)
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return head, tail, timed_out

"""Runs untrusted Python in a process of its own, without network, inheritance or unlimited resources."""

from __future__ import annotations

import json
import os
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
    """What one program may use: wall and CPU seconds, bytes of memory and of a file, processes, output bytes."""

    seconds: float = 10.0
    memory: int = 2**30
    file_size: int = 2**20
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
            namespace: all die with the first), ``files`` (everything but its folder is read-only), ``user``
            (an identity without rights). What is missing is only covered by a Python audit hook, which hostile
            code can get around.
    """

    passed: bool
    timed_out: bool
    error: str
    seconds: float
    output: str
    guarantees: tuple[str, ...]


_BOOT = r"""
import ctypes, json, os, resource, signal, socket, sys
job = json.loads(sys.stdin.buffer.read())
libc = ctypes.CDLL(None, use_errno=True)
folder, root, got = os.getcwd(), os.getuid() == 0, []
uid, gid = os.getuid(), os.getgid()
USER, NET, PID, MOUNT, IPC = 0x10000000, 0x40000000, 0x20000000, 0x20000, 0x8000000
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
mounts = libc.unshare(MOUNT) == 0 and libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0
if mounts:
    here = os.fsencode(folder)
    if libc.mount(here, here, None, 0x1000, None) == 0:
        os.chdir(folder)
        library = folder + "/.python"
        if root:  # so that the library stays readable where it lies in a private home
            os.mkdir(library)
            if libc.mount(os.fsencode(sys.base_prefix), os.fsencode(library), None, 0x1000, None) == 0:
                sys.path = [entry.replace(sys.base_prefix, library) for entry in sys.path]
        lock, free = (ctypes.c_uint64 * 4)(1, 0, 0, 0), (ctypes.c_uint64 * 4)(0, 1, 0, 0)
        if libc.syscall(442, -100, b"/", 0x8000, lock, 32) == 0:
            if libc.syscall(442, -100, here, 0, free, 32) == 0:
                got.append("files")
    os.chdir(folder)
if libc.unshare(PID) == 0:
    got.append("processes")
ready, go = os.pipe()
child = os.fork()
if child:
    os.close(ready)
    if root:
        got.append("user")
    os.write(1, json.dumps({"pid": child, "guarantees": got}).encode() + b"\n")
    os.write(go, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)
os.close(go)
os.read(ready, 1)
os.close(ready)
os.setsid()
if "processes" in got and mounts:
    libc.mount(b"proc", b"/proc", b"proc", 0xE, None)
limits = job["limits"]
cpu = int(limits["seconds"]) + 1
for name, value in (
    ("CPU", cpu), ("AS", limits["memory"]), ("FSIZE", limits["file_size"]),
    ("NPROC", limits["processes"]), ("NOFILE", 64), ("CORE", 0),
):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except (OSError, ValueError):
        pass
if root:
    os.setgroups([])
    os.setgid(job["uid"])
    os.setuid(job["uid"])
libc.prctl(38, 1, 0, 0, 0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.closerange(3, 64)
if not {"network", "processes"} <= set(got):
    def refuse(event, args):
        if event.startswith("socket.") and "network" not in got:
            raise PermissionError("no network in the sandbox")
        if event in ("os.kill", "os.killpg", "os.fork", "os.posix_spawn", "subprocess.Popen", "os.system"):
            raise PermissionError("no processes in the sandbox")
        if event.startswith("ctypes."):
            raise PermissionError("no ctypes in the sandbox")
    sys.addaudithook(refuse)
exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(1, job["token"].encode())
os._exit(0)
"""


def run_python(program: str, limits: Limits | None = None) -> SandboxResult:
    """Run ``program`` by ``python -I`` in a fresh folder with an empty environment. Never raises on any program.

    The program shares its interpreter with the tests in it: code written to attack its own tests can still
    pass them, as with every in-process harness.
    """
    limits = limits or Limits()
    start = time.monotonic()
    folder = tempfile.mkdtemp(prefix="unveil-")
    token = secrets.token_hex(16)
    uid = 20_000 + secrets.randbelow(40_000)
    job = {"program": program, "limits": asdict(limits), "token": token, "uid": uid}
    try:
        if os.getuid() == 0:
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
        shutil.rmtree(folder, ignore_errors=True)
    first, _, body = head.partition(b"\n")
    try:
        guarantees = tuple(json.loads(first)["guarantees"])
    except (ValueError, KeyError, TypeError):
        guarantees, body = (), head
    passed = not timed_out and process.returncode == 0 and tail.endswith(token.encode())
    output = body[: limits.output].decode("utf-8", "replace").replace(token, "")
    error = "" if passed else "timed out" if timed_out else tail[-500:].decode("utf-8", "replace").strip()
    return SandboxResult(
        passed=passed,
        timed_out=timed_out,
        error=error if passed or error else f"ended early (status {process.returncode})",
        seconds=time.monotonic() - start,
        output=output,
        guarantees=guarantees,
    )


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

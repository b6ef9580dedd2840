"""Python processes that start at once: forked from a server that has imported torch and all of ours already.

Importing costs a worker three seconds of a core and a router one, which the system tests would pay hundreds of times.
What runs is the same: `python -m MODULE ...` in a process of its own, with its own arguments, environment, standard
streams and session, a child of whoever asked. That the commands also start from nothing is shown where users do it:
tests/system/test_readme.py, tests/penstock/test_fleet.py, tests/penstock/test_demo.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "penstock.decode_worker.worker", "penstock.prefill_worker.worker", "penstock.router.server",
    "penstock.router.service", "uvicorn.lifespan.on", "uvicorn.loops.uvloop", "uvicorn.protocols.http.httptools_impl",
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000  # unshare(2), setns(2)
_MS_REC, _MS_SLAVE, _MNT_DETACH = 1 << 14, 1 << 19, 2  # mount(2), umount2(2)
_MAX_BYTES = 1 << 18
_ROOM_FOR_NAMES = 2000  # characters, in which children write their own command lines


@dataclass(frozen=True)
class _Job:
    """`python -m module arguments...`, to be a child of `parent`; in the network namespace `netns`, if one is named."""

    module: str
    arguments: list[str]
    netns: str
    environ: dict[str, str]
    cwd: str
    new_session: bool
    parent: int


class ForkedPython(subprocess.Popen[Any]):
    """A `Popen` that forks `[sys.executable, "-m", MODULE, ...]`, behind die_with_parent.py or `ip netns exec NAME` or
    neither; the child dies with this process. Any other command is started as usual."""

    def _execute_child(self, *given: Any) -> None:
        command, cwd, environ, pipes, new_session = given[0], given[5], given[6], given[10:16], given[21]
        own = command[5:] if command[3:4] and command[3].endswith("die_with_parent.py") else command
        netns, own = (own[3], own[4:]) if list(own[:3]) == ["ip", "netns", "exec"] else ("", own)
        if list(own[:2]) != [sys.executable, "-m"]:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        environ = dict(os.environ if environ is None else environ)
        job = _Job(own[2], list(own[3:]), netns, environ, str(cwd or os.getcwd()), new_session, os.getpid())
        # Of the six the child's are the first of the pair for stdin, the second for stdout and stderr.
        streams = [fd if fd != -1 else number for number, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = _server().fork(job, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


class _Server:
    """The process that has imported everything; it ends when its socket is closed, that is, with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking", str(theirs.fileno()), "-" * _ROOM_FOR_NAMES],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def fork(self, job: _Job, streams: list[int]) -> int:
        """Start the job with these descriptors as its standard streams; its process id."""
        with self._lock:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # so that the child, whose own parent ends at once, becomes ours
            try:
                socket.send_fds(self._channel, [json.dumps(asdict(job)).encode()], streams)
                answer = self._channel.recv(_MAX_BYTES)
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        assert answer, "the fork server has died"
        return int(answer)


@cache
def _server() -> _Server:
    return _Server()


def start_server() -> None:
    """Start the server now, for a test that counts the processes there are."""
    _server()


def _prctl(option: int, value: int) -> None:
    _libc("prctl", option, value, 0, 0, 0)


def _enter(netns: str) -> None:
    """As `ip netns exec`: the namespace's network, and a /sys that shows it, where UCX looks for devices."""
    with Path("/var/run/netns", netns).open() as namespace:
        _libc("setns", namespace.fileno(), _CLONE_NEWNET)
    _libc("unshare", _CLONE_NEWNS)
    _libc("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)  # nothing of the following leaves this process
    with contextlib.suppress(OSError):  # nothing was mounted there
        _libc("umount2", b"/sys", _MNT_DETACH)
    _libc("mount", b"sysfs", b"/sys", b"sysfs", 0, None)


def _libc(function: str, *arguments: int | bytes | None) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function}{arguments} failed")


def _serve(channel: socket.socket) -> _Job | None:
    """Fork for every request. Returns its job in each child, and None in the server, at the end."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, _MAX_BYTES, 3)
        if not message:
            return None
        job = _Job(**json.loads(message))
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
                os._exit(0)
            os.close(told)
            os.close(tell)
            channel.close()
            _become(job, streams, between)
            return job
        answer = os.read(told, 32)
        os.waitpid(between, 0)
        for fd in (told, tell, *streams):
            os.close(fd)
        channel.send(answer)


def _become(job: _Job, streams: list[int], between: int) -> None:
    while os.getppid() == between:
        time.sleep(0.0002)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job.parent:
        os._exit(1)
    if job.new_session:
        os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in set(streams) - {0, 1, 2}:
        os.close(fd)
    if job.netns:
        _enter(job.netns)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.environ)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = [job.module, *job.arguments]
    _show_as([sys.executable, "-m", job.module, *job.arguments])


def _show_as(command: list[str]) -> None:
    """In /proc/PID/cmdline, over the server's own words: proc_pid_stat(5) says where they are."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    words = "\0".join(command).encode()[: end - begin - 1]
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, words, len(words))


def main() -> None:
    """The server; in its children, what was asked for."""
    for module in PRELOADED:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "what was imported has started threads: a fork would lose them, and what they hold"
    gc.collect()
    gc.freeze()
    with contextlib.closing(socket.socket(fileno=int(sys.argv[1]))) as channel:
        job = _serve(channel)
    if job is not None:
        _leave(_run(job))


def _run(job: _Job) -> int:
    """Its exit status."""
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(status: int) -> None:
    """As the interpreter ends: threads, exit functions, streams. But all that was imported is not taken apart, which
    would take a third of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()

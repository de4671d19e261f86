"""Run a foreign program and its tests; a process of its own, which gets its job from ``sandbox.py`` on standard input.

This process makes a worker, waits for it no longer than allowed, ends all that the worker left behind, and reports on standard
output. The worker gives up its rights, runs the program and then the tests, and writes what came of them, sealed by a keyed hash:
who only finds the pipe cannot write a report. It shares a process with the program all the same; a program that walks through
the harness's own frames can still lie, as one can whose results are equal to everything.

Imports the standard library alone.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import os
import platform
import select
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement  # type: ignore[import-not-found]  # both stand beside this file
import system_calls  # type: ignore[import-not-found]

del sys.path[0]

# Held from here on: what a program puts in the place of Python's own functions decides nothing.
__builtins__ = dict(vars(builtins))  # type: ignore[assignment]
_UNWATCH = sys.settrace, sys.setprofile
FORBIDDEN = {errno.EPERM, errno.EACCES, errno.EROFS, errno.ENETUNREACH, errno.ENOSYS}


def main() -> None:
    """Do one job."""
    job = json.load(sys.stdin)
    # The worker inherits this object and not its key, which nobody holds.
    seal = hashlib.blake2b(key=os.urandom(32))
    confinement.die_with_parent()
    if job["isolation"] == "namespaces":
        confinement.enter_namespaces()
    else:
        confinement.adopt_orphans()
    receiver, sender = os.pipe()
    parent, worker = os.getpid(), os.fork()
    if not worker:
        os.close(receiver)
        _first(job, seal, sender, parent)
    os.close(sender)
    said, status, late = _await(worker, receiver, job["timeout"])
    _end_all()
    print(json.dumps(_judge(said, status, seal, late=late)))


def _await(worker: int, receiver: int, timeout: float) -> tuple[bytes, int, bool]:
    """Return what the worker wrote, its status, and whether it had to be stopped."""
    said, end, late = b"", time.monotonic() + timeout, False
    os.set_blocking(receiver, False)
    while True:
        if select.select([receiver], [], [], 0.01)[0]:
            with contextlib.suppress(BlockingIOError):
                said = (said + os.read(receiver, 65536))[-65536:]
        found, status = os.waitpid(worker, os.WNOHANG)
        if found:
            with contextlib.suppress(BlockingIOError):
                said += os.read(receiver, 65536)
            return said, status, late
        if not late and time.monotonic() > end:
            late = True
            os.kill(worker, signal.SIGKILL)


def _end_all() -> None:
    """Kill and reap whatever is left below this process, also what calls itself a daemon."""
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    return [int(one) for one in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _judge(said: bytes, status: int, seal: Any, *, late: bool) -> dict[str, Any]:
    """Return the report, or what became of a worker that has none."""
    for line in said.split(b"\n"):
        report, _, mark = line.rpartition(b" ")
        checked = seal.copy()
        checked.update(report)
        if report and mark == checked.hexdigest().encode():
            kind, passed, detail = report.decode("ascii").split(" ", 2)
            return {"kind": kind, "passed": int(passed), "detail": detail}
    number = status & 127 or max(0, (status >> 8) - 128)
    if late or number == signal.SIGXCPU:
        return {"kind": "timeout", "detail": "still running when its time was up", "passed": 0}
    if number == signal.SIGKILL:
        return {
            "kind": "memory",
            "detail": "killed by the system, most likely for memory or processor time",
            "passed": 0,
        }
    if number == signal.SIGXFSZ:
        return {"kind": "forbidden", "detail": "wrote a file beyond the limit", "passed": 0}
    how = f"by signal {number}" if number else f"with exit code {status >> 8}"
    return {"kind": "exited", "detail": f"ended before its tests had, {how}", "passed": 0}


def _first(job: dict[str, Any], seal: Any, sender: int, parent: int) -> NoReturn:
    """Be the first process of the new process numbers, which all others die with; or, without them, the worker."""
    # Held here: what a program puts in the place of the system's functions, or of json's, reports nothing.
    write, leave = os.write, os._exit
    try:
        confinement.die_with_parent()
        if job["isolation"] != "namespaces" and os.getppid() != parent:
            leave(1)  # it has ended already
        if job["isolation"] == "namespaces":
            confinement.close_file_system(Path(job["folder"]))
            worker = os.fork()
            if worker:
                os.close(sender)
                _pass_on(worker)
        _confine(job)
    except BaseException as error:
        report = ("broken", 0, f"the sandbox: {type(error).__name__}: {error}")
    else:
        report = _run(job["program"], job["tests"])
    kind, passed, detail = report
    text = f"{kind} {passed} {ascii(detail[:500])[1:-1]}".encode("ascii")
    seal.update(text)
    write(sender, b"\n" + text + b" " + seal.hexdigest().encode() + b"\n")
    leave(0)


def _pass_on(worker: int) -> NoReturn:
    """Wait for the worker, reaping orphans, and end as it did."""
    found = 0
    while found != worker:
        found, status = os.wait()
    os._exit(128 + (status & 127) if status & 127 else status >> 8)


def _confine(job: dict[str, Any]) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.environ.clear()
    isolation = job["isolation"]
    if isolation != "namespaces":
        os.chdir(job["folder"])
    confinement.limit(seconds=job["timeout"], memory=job["memory"])
    if isolation == "landlock":
        confinement.forbid_files(Path(job["folder"]))
    if isolation != "none":
        confinement.drop_capabilities()
        if system_calls.known():
            confinement.forbid_calls(system_calls.rules(platform.machine()))


def _run(program: str, tests: list[str]) -> tuple[str, int, str]:
    """Run a program, then each test in what the program left; a test passes that raises nothing."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    space, passed, plain = vars(module), 0, dict(vars(builtins))
    # Before the program, which may listen to what is compiled.
    codes = [_compiled(test, f"test {place}") for place, test in enumerate(tests)]
    _let_nobody_listen()
    first = _raised(_compiled(program, "program"), "program", space, plain)
    for place, code in enumerate(codes if first is None else ()):
        found = _raised(code, f"test {place}", space, plain)
        passed += found is None
        first = first or found
    kind, detail = first or ("passed", "")
    return kind, passed, detail


class _Plain(dict[str, Any]):
    """Builtins that stay as they are."""

    def _kept(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("these builtins cannot be changed")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _kept


def _compiled(source: str, name: str) -> Any:
    """Return the code of a source, or what is wrong with it."""
    try:
        return compile(source, f"<{name}>", "exec", dont_inherit=True)
    except Exception as error:  # not of syntax alone: of nul bytes, of what is nested too deep
        return error


def _let_nobody_listen() -> None:
    """Refuse audit hooks and monitors of a program's own: they are told of what the harness does."""
    sys.addaudithook(_refuse_hooks)
    if sys.version_info >= (3, 12):
        for tool in range(6):
            sys.monitoring.use_tool_id(tool, "sandbox")


def _refuse_hooks(event: str, _: Any) -> None:
    if event == "sys.addaudithook":
        raise RuntimeError("no hooks here")


def _raised(code: Any, name: str, space: dict[str, Any], plain: dict[str, Any]) -> tuple[str, str] | None:
    """Return kind and text of what some code raised, or ``None``; builtins are the plain ones again afterwards."""
    names = vars(builtins)
    raised: BaseException | None = None
    try:
        if isinstance(code, Exception):
            raise code
        # A test has builtins of its own, which a program that finds them cannot fill.
        space["__builtins__"] = names if name == "program" else _Plain(plain)
        exec(code, space)
    except BaseException as error:
        raised = error
    # What a program puts in place of abs and the like does not judge it.
    names.update(plain)
    for stop in _UNWATCH:
        stop(None)
    return None if raised is None else (_kind(raised), f"{name}: {type(raised).__name__}: {_words(raised)}")


def _words(raised: BaseException) -> str:
    try:
        return f"{raised}"[:300]
    except BaseException:  # its class is the program's
        return "(says nothing)"


def _kind(raised: BaseException) -> str:
    if isinstance(raised, MemoryError):
        return "memory"
    if isinstance(raised, SystemExit):
        return "exited"
    return "forbidden" if isinstance(raised, OSError) and raised.errno in FORBIDDEN else "failed"


if __name__ == "__main__":
    main()

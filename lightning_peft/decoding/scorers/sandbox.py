"""Run a foreign program and its tests in a process that may do next to nothing, and say what became of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_peft.decoding.scorers import confinement, system_calls

Isolation = Literal["auto", "namespaces", "landlock", "none"]
_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Args:
        kind: ``passed``, ``failed`` (a test or the program raised), ``timeout``, ``memory``, ``forbidden`` (the system refused a
            file, a socket, a process), or ``exited`` (it ended itself before the tests had).
        detail: Where and by what, in words.
        passed: How many tests passed.
        tests: Of how many.
    """

    kind: str
    detail: str
    passed: int
    tests: int


def run_program(
    program: str, tests: Sequence[str], *, timeout: float = 3.0, memory: int = 512 << 20, isolation: Isolation = "auto"
) -> Outcome:
    """Run a program and then each test in what it has defined.

    Args:
        program: Source of the program.
        tests: Sources; one passes that raises nothing.
        timeout: Seconds of wall time for all, and of processor time (rounded up).
        memory: Bytes of address space.
        isolation: As in ``RunsTests``.

    Raises:
        RuntimeError: Where the isolation is not to be had, or the sandbox itself broke.

    >>> run_program("def double(x): return 2 * x", ["assert double(2) == 4", "assert double(2) == 5"], isolation="none")
    Outcome(kind='failed', detail='test 1: AssertionError: ', passed=1, tests=2)
    """
    chosen = chosen_isolation(isolation)
    with _folder() as folder:
        job = {
            "program": program,
            "tests": list(tests),
            "timeout": timeout,
            "memory": memory,
            "isolation": chosen,
            "folder": folder,
        }
        found = _child(job, timeout + 10)
    if found.get("kind") in (None, "broken"):
        raise RuntimeError(
            f"run_program: isolation={chosen!r} failed: {found.get('detail')}. Another may work, see RunsTests."
        )
    return Outcome(found["kind"], found["detail"], found["passed"], len(tests))


@contextmanager
def _folder() -> Iterator[str]:
    """Give an empty folder, and remove what a program has left in it, folders in folders without an end among it."""
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)  # most programs leave nothing
        except OSError:
            _remove(folder)


def _remove(folder: str) -> None:
    if not sys.platform.startswith("linux"):
        return shutil.rmtree(folder, ignore_errors=True)
    # Python's own way comes to the end of its stack, or of its handles.
    with suppress(subprocess.TimeoutExpired):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, timeout=60, check=False)
    return None


def chosen_isolation(isolation: Isolation) -> Isolation:
    """Return the isolation that is meant by ``"auto"``, or the asked-for one if it is to be had.

    Raises:
        ValueError: For a name that is none.
        RuntimeError: If it is not to be had here.
    """
    if isolation == "none":
        return isolation
    kinds: tuple[Isolation, ...] = ("namespaces", "landlock")
    if isolation not in ("auto", *kinds):
        raise ValueError(f"RunsTests: isolation={isolation!r} is none of 'auto', 'namespaces', 'landlock', 'none'.")
    reasons = {}
    for kind in kinds if isolation == "auto" else (isolation,):
        reasons[kind] = why_not(kind)
        if reasons[kind] is None:
            return kind
    raise RuntimeError(
        f"RunsTests: programs cannot be shut in here: {reasons}. Allow user namespaces (kernel.unprivileged_userns_clone, "
        "or the container's settings), or take a kernel with Landlock (6.12 or later). isolation='none' runs them with the rights "
        "of this user: only for programs that you trust."
    )


@functools.cache
def why_not(isolation: Isolation) -> str | None:
    """Return why an isolation is not to be had, ``None`` if it is: a small program was run in it."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} is not Linux"
    if isolation == "landlock":
        if confinement.landlock_version() < 6:
            return f"Landlock of version 6 is needed, here is {confinement.landlock_version()} (0: none)"
        if not system_calls.known():
            return "no seccomp filter for this processor"
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "program": "",
            "tests": [""],
            "timeout": 10,
            "memory": 512 << 20,
            "isolation": isolation,
            "folder": folder,
        }
        found = _child(job, 20)
    return None if found.get("kind") == "passed" else str(found.get("detail"))


def _child(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-I", "-B", str(_CHILD)]
    # What a process was started with stays in its memory, where a program can read it. Some Pythons need this one to start.
    environment = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    environment["MALLOC_ARENA_MAX"] = "1"  # else each thread takes 64 MiB of the address space that is allowed
    try:
        run = subprocess.run(
            command,
            env=environment,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            start_new_session=True,
        )
        return dict(json.loads(run.stdout)) if run.stdout else {"detail": run.stderr.strip().rpartition("\n")[2]}
    except subprocess.TimeoutExpired:
        return {"kind": "timeout", "detail": "the sandbox did not come back", "passed": 0}

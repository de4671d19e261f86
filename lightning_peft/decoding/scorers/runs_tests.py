"""Programs run against their tests behind a wall: never inside this process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft

Isolation = Literal["auto", "namespaces", "landlock", "none"]
_JAIL = Path(__file__).with_name("jail.py")
_WALLS = ("namespaces", "landlock")


@dataclass(frozen=True)
class RunReport:
    """How a program went.

    Args:
        kind: ``passed``; ``failed`` (an exception, of a test or before); ``timeout``; ``memory``; ``exited`` before its tests
            ended; ``killed`` by a signal.
        detail: More, as the exception's text.
    """

    kind: str
    detail: str = ""


@dataclass
class RunsTests:
    """A final scorer: 1 for a program that passes its tests, 0 for another.

    A program is prompt, completion and tests in one text. It runs in a process of its own with limits on time and memory, on an
    empty folder, without network, other files or other processes: behind user namespaces where the kernel has them for everyone,
    else behind Landlock (Linux 6.7; files and TCP, but neither UDP nor the modes of files, which Python alone then refuses). Where
    there is neither, it refuses to run anything.

    **The trap:** the wall is for the machine. A program that looks through the frames of its own process can find the word that
    means success; what a model writes by chance does not, but do not train on this score without looking at what passes.

    Args:
        tests: Code that follows the program, by problem: a list by ``Draft.problem``, or a function of the draft.
        timeout: Seconds that a program may take, start included.
        memory: Bytes that it may take.
        isolation: ``"auto"`` for the best wall there is, ``"none"`` to run without one.
        workers: Programs at once.

    Raises:
        RuntimeError: Where no wall is to be had, when the first program shall run.
    """

    tests: Sequence[str] | Callable[[Draft], str]
    timeout: float = 5.0
    memory: int = 1 << 30
    isolation: Isolation = "auto"
    workers: int = 2

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.isolation not in ("auto", *_WALLS, "none"):
            raise ValueError(
                f"RunsTests: isolation={self.isolation!r} must be 'auto', 'namespaces', 'landlock' or 'none'."
            )
        if not self.timeout > 0 or self.memory < 1 << 26 or self.workers < 1:
            raise ValueError(
                f"RunsTests: timeout={self.timeout!r} must be above 0, memory={self.memory!r} at least 64 MiB, "
                f"workers={self.workers!r} at least 1."
            )

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return 1 for each program that passes, 0 for the others."""
        return torch.tensor([float(report.kind == "passed") for report in self.reports(texts)])

    def reports(self, texts: list[Draft]) -> list[RunReport]:
        """Run programs and say how each went."""
        wall = self._wall()
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda text: self._run(f"{text}\n{self._tests_of(text)}\n", wall), texts))

    def _tests_of(self, text: Draft) -> str:
        return self.tests(text) if callable(self.tests) else self.tests[text.problem]

    def _wall(self) -> str:
        if self.isolation == "none":
            return "none"
        for wall in _WALLS if self.isolation == "auto" else (self.isolation,):
            if (report := _tried(wall)).kind == "passed":
                return wall
        raise RuntimeError(
            f"RunsTests: isolation={self.isolation!r} cannot be had here ({report.detail or report.kind}). Programs that a model "
            "wrote run only behind user namespaces or Landlock 4. Run on a Linux that has them, or give isolation='none' where the "
            "whole machine is expendable."
        )

    def _run(self, program: str, wall: str) -> RunReport:
        return _run_in_jail(program, wall, self.timeout, self.memory)


def _run_in_jail(program: str, wall: str, timeout: float, memory: int) -> RunReport:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job = {"program": program, "timeout": timeout, "memory": memory, "folder": folder}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_JAIL), wall],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd=folder, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(json.dumps(job), timeout=timeout + 10)
            return RunReport(**json.loads(said))
        except (subprocess.TimeoutExpired, ValueError, TypeError) as error:
            return RunReport("killed", f"the jail itself did not answer ({type(error).__name__})")
        finally:
            process.kill()
            process.wait()


@functools.cache
def _tried(wall: str) -> RunReport:
    """Return whether a wall stands here: a harmless program passes behind it."""
    return _run_in_jail("assert 1 + 1 == 2", wall, 10.0, 1 << 28)

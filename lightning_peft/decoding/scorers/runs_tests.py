"""Whether programs pass their tests."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers.sandbox import Isolation, Outcome, chosen_isolation, run_program
from lightning_peft.decoding.scorers.text_scorer import Reads, TextScorer


class RunsTests(TextScorer):
    """Run each program with the tests of its problem, shut in: 1 for one that passes them, else 0.

    A process of its own runs the program, then each test in what the program has defined, under limits of time, memory, file
    size and processes. What else it may do depends on ``isolation``. All processes that it leaves behind are ended.

    **The trap**: program and tests share a process. One that ends itself early, writes to every open file or patches builtins is
    not taken for passed; one that walks through the harness's frames or objects, returns what equals everything, or defines a
    name, changes a module or puts one of its own where the tests look for Python's, can be. Files are limited one by one, threads
    of root by their memory, and under Landlock what a file is called, how large it is and what marks it has is seen outside, too.

    Args:
        tests: For each problem (``Draft.problem``) its tests: one source, or several. A plain string is of problem 0.
        timeout: Seconds for a program with all its tests.
        memory: Bytes of address space.
        isolation: ``"namespaces"``: own users, processes, mounts and network; of the files, Python and the system's libraries,
            read-only. ``"landlock"``: those files and one empty folder to write in, no network, by Landlock and a seccomp
            filter. ``"auto"``: the first of the two that is to be had. ``"none"``: the limits alone, so that a program may do
            all that the user may.
        share: Give the share of tests passed instead of 1 or 0.
        workers: Programs that run at once.
        reads: ``"whole"`` runs prompt and completion.
        cache_size: How many outcomes are remembered.

    Raises:
        ValueError: For numbers below their least, an unknown isolation, or a draft of a problem that has no tests.
        RuntimeError: If the isolation is not to be had here.

    >>> scorer = RunsTests([["assert double(2) == 4", "assert double(3) == 6"]], share=True, isolation="none")
    >>> scorer(["def double(x): return 2 * x", "def double(x): return x ** 2"])
    tensor([1.0000, 0.5000])
    """

    def __init__(
        self,
        tests: Sequence[str | Sequence[str]],
        *,
        timeout: float = 3.0,
        memory: int = 512 << 20,
        isolation: Isolation = "auto",
        share: bool = False,
        workers: int = 1,
        reads: Reads = "whole",
        cache_size: int = 65_536,
    ) -> None:
        super().__init__(reads=reads, cache_size=cache_size)
        if isinstance(tests, str):
            raise ValueError(f"RunsTests: tests={tests!r} is one source. Give a list: for each problem its tests.")
        if timeout <= 0 or memory < 64 << 20 or workers < 1:
            raise ValueError(
                f"RunsTests: timeout={timeout!r} must be above 0, memory={memory!r} at least {64 << 20} (Python alone "
                f"needs some), workers={workers!r} at least 1."
            )
        self.tests = [[one] if isinstance(one, str) else list(one) for one in tests]
        self.timeout = timeout
        self.memory = memory
        self.isolation = chosen_isolation(isolation)
        self.share = share
        self.workers = workers

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return 1 or 0, or the share of tests passed, for each text: ``(texts,)``."""
        found = self.outcomes(texts)
        shares = [one.passed / max(one.tests, 1) for one in found]
        passed = [float(one.kind == "passed") for one in found]
        return torch.tensor(shares if self.share else passed)

    def outcomes(self, texts: Sequence[str]) -> list[Outcome]:
        """Return what became of each program."""
        jobs = [(self.part(text), self._problem(text)) for text in texts]
        new = [job for job in dict.fromkeys(jobs) if job not in self.answers]
        with ThreadPoolExecutor(self.workers) as pool:
            found = dict(zip(new, pool.map(self._run, new), strict=True))
        return [self.answers.ask(job, partial(self._found, found, job)) for job in jobs]

    def _found(self, found: dict[tuple[str, int], Outcome], job: tuple[str, int]) -> Outcome:
        return found[job] if job in found else self._run(job)

    def _run(self, job: tuple[str, int]) -> Outcome:
        program, problem = job
        return run_program(
            program, self.tests[problem], timeout=self.timeout, memory=self.memory, isolation=self.isolation
        )

    def _problem(self, text: str) -> int:
        problem = text.problem if isinstance(text, Draft) else 0
        if not 0 <= problem < len(self.tests):
            raise ValueError(
                f"RunsTests: a draft of problem {problem!r}, but there are tests of {len(self.tests)}, from 0."
            )
        return problem

"""A killed run goes on exactly: every boundary, strategy and LR scheduler of tests/resume_matrix.py; and a real kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.resume_matrix import SCHEDULERS, STOPS, combinations, differences

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*command: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *command]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "scheduler", [name if name == "OneCycleLR" else pytest.param(name, marks=pytest.mark.large) for name in SCHEDULERS]
)
def test_one_process_goes_on_exactly(scheduler, accumulate):
    assert set(differences("ddp", scheduler, list(STOPS.values()), accumulate).values()) == {0.0}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    run = subprocess.run(
        torchrun("-m", "tests.resume_matrix", str(folder)),
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank-{k}.pt", weights_only=False) for k in range(2)]


@pytest.mark.large
@pytest.mark.parametrize("cell", combinations(), ids=str)
def test_two_processes_go_on_exactly(cell, cells):
    for found in cells:
        assert not isinstance(found[cell], str), found[cell]
        assert set(found[cell].values()) == {0.0}


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all it has started: torchrun gives each worker a session of its own, so that a signal to
    the launcher's group leaves the workers training (and writing) beside the run that is to go on from their checkpoint."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family[1:])


def run_killed(folder: Path, *kills: int, processes: int, steps: int = 24) -> dict[str, torch.Tensor]:
    """Start a run, kill it with SIGKILL once it has taken so many steps, start it again, until it ends by itself."""
    module = ["-m", "tests.killed", str(folder), str(steps)]
    taken, said, left = folder / "steps.txt", folder / "said.txt", list(kills)
    for _ in range(len(kills) + 1):
        with said.open("w") as log:
            command = [sys.executable, *module] if processes == 1 else torchrun(*module)
            process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=log)
        while process.poll() is None:
            if left and taken.exists() and len(taken.read_text()) >= left[0]:
                kill(process)
                left.pop(0)
            time.sleep(0.005)
        if process.returncode == 0:
            assert not left, "it ended before it was killed"
            return torch.load(folder / "end.pt", weights_only=True)
        assert process.returncode == -signal.SIGKILL, said.read_text()[-3000:]
    raise AssertionError("it never ended")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.large)])
def test_a_run_killed_twice_by_sigkill_ends_as_one_that_was_not(processes, tmp_path):
    ends = []
    for name, kills in (("whole", ()), ("killed", (3, 14))):
        (tmp_path / name).mkdir()
        ends.append(run_killed(tmp_path / name, *kills, processes=processes))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

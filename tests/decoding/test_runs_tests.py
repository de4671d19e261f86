"""Programs that a model might write are run, judged and stopped, and touch nothing."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightning_peft.decoding import Draft
from lightning_peft.decoding.scorers import RunsTests
from lightning_peft.decoding.scorers import runs_tests as module

WALLS = [wall for wall in ("namespaces", "landlock") if module._tried(wall).kind == "passed"]
walls = pytest.mark.parametrize(
    "wall", WALLS or [pytest.param("none", marks=pytest.mark.skip("no wall can be had here"))]
)
QUICK = {"timeout": 2.0, "memory": 1 << 28}
GOOD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(2, 3) == 5"


def report(program, wall, test="", **given):
    return RunsTests([test], isolation=wall, **QUICK | given).reports([Draft(program)])[0]


@walls
def test_programs_pass_and_fail_by_their_tests(wall):
    wrong = GOOD.replace("+", "-")
    drafts = [
        Draft(GOOD, problem=0),
        Draft(wrong, problem=0),
        Draft("def add(a, b):", problem=0),
        Draft(GOOD, problem=1),
    ]
    scorer = RunsTests([TEST, "assert add('a', 'b') == 'ab'"], isolation=wall, **QUICK)
    assert scorer(drafts).tolist() == [1.0, 0.0, 0.0, 1.0]
    kinds = [(r.kind, r.detail.partition(":")[0]) for r in scorer.reports(drafts)]
    assert kinds == [("passed", ""), ("failed", "AssertionError"), ("failed", "IndentationError"), ("passed", "")]


@walls
def test_the_standard_library_is_there(wall):
    program = "import collections, json, math, random, re, heapq, itertools, datetime\nrandom.random()"
    assert report(program, wall).kind == "passed"


@walls
def test_the_prompt_is_part_of_the_program_and_tests_may_depend_on_it(wall):
    scorer = RunsTests(lambda draft: f"assert add(1, 1) == {2 + draft.problem}", isolation=wall, **QUICK)
    drafts = [Draft("    return a + b", prompt="def add(a, b):\n", problem=i) for i in range(2)]
    assert scorer(drafts).tolist() == [1.0, 0.0]


SAYS_SO = """
import os
for n in range(64):
    try:
        os.write(n, b'{"kind": "passed"}\\n')
    except OSError:
        pass
"""
HOSTILE = {
    "endless loop": ("while True: pass", "timeout"),
    "endless sleep": ("import time; time.sleep(60)", "timeout"),
    "endless printing": ("while True: print('x' * 1000)", "timeout"),
    "memory bomb": ("x = [bytearray(1 << 20) for _ in range(10_000)]", "memory"),
    "leaves before the tests": ("import os; os._exit(0)", "exited"),
    "exits before the tests": ("import sys; sys.exit(0)", "exited"),
    "crashes": ("import os; os.kill(os.getpid(), 9)", "killed"),
    "deep recursion in C": ("x = None\nfor _ in range(10**6): x = [x]\nhash(repr(x))", None),
    "forks": ("import os\nwhile True: os.fork()", "failed"),
    "starts a program": ("import subprocess; subprocess.run(['true'])", "failed"),
    "says it has passed": (
        'import os\nfor n in range(64):\n try: os.write(n, b\'{"kind": "passed"}\\n\')\n except OSError: pass',
        "exited",
    ),
}


@walls
@pytest.mark.parametrize(("program", "kind"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_is_stopped_and_reported(wall, program, kind):
    start = time.monotonic()
    found = report(program, wall, "assert False")
    assert found.kind != "passed"
    assert kind is None or found.kind == kind
    assert time.monotonic() - start < 20
    assert not remains()


def remains():
    """Return the processes of a jail that still live."""
    time.sleep(0.05)
    return [p for p in psutil.process_iter() if "jail.py" in " ".join(_command(p))]


def _command(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@walls
def test_a_fork_bomb_that_goes_around_python_leaves_nothing(wall):
    bomb = "import ctypes\nlibc = ctypes.CDLL(None)\nfor _ in range(6): libc.fork()\nwhile True: pass"
    assert report(bomb, wall).kind in {"timeout", "exited", "failed"}
    assert not remains()


@walls
def test_a_daemon_is_found(wall):
    daemon = "import ctypes, time\nlibc = ctypes.CDLL(None)\nif libc.fork() == 0:\n    libc.setsid()\n    libc.fork()\n"
    daemon += "    time.sleep(50)"
    report(daemon, wall)
    assert not remains()


@walls
def test_files_of_others_can_be_neither_read_nor_written_nor_removed(wall, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    mode = secret.stat().st_mode & 0o777
    for line in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w').write('yours')",
        f"import os; os.remove({str(secret)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.listdir({str(Path(__file__).parent)!r})",
        f"open({str(Path(sys.base_prefix) / 'added')!r}, 'w')",
        f"import os; os.remove({os.__file__!r})",
        f"import os; os.chmod({str(secret)!r}, 0)",
    ):
        assert report(line, wall).kind == "failed", line
    assert secret.read_text() == "mine"
    assert secret.stat().st_mode & 0o777 == mode
    assert Path(os.__file__).exists()
    assert not (Path(sys.base_prefix) / "added").exists()


@walls
def test_it_may_write_into_an_empty_folder_which_is_gone_afterwards(wall):
    assert (
        report(
            "import os\nassert os.listdir() == []\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'", wall
        ).kind
        == "passed"
    )


@walls
def test_there_is_no_network(wall):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        found = report(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)", wall)
        assert found.kind == "failed"
        assert found.detail.split(":")[0] in {"PermissionError", "OSError", "ConnectionRefusedError"}
        with pytest.raises(TimeoutError):
            server.accept()


@walls
def test_other_processes_can_be_neither_seen_nor_stopped(wall):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert report(f"import os; os.kill({victim.pid}, 9)", wall).kind == "failed"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@walls
def test_the_environment_is_not_handed_on(wall, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    assert report("import os\nassert 'A_TOKEN' not in os.environ", wall).kind == "passed"


@pytest.mark.skipif("namespaces" not in WALLS, reason="user namespaces cannot be had here")
def test_whoever_owns_the_namespace_may_not_open_it_again():
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(None, b'/usr', None, 32 | 4096, None) == -1\n"
        "assert libc.unshare(0x10000000) == -1 or libc.mount(b'tmpfs', b'/usr', b'tmpfs', 0, None) == -1\n"
        "assert not {'tmp', 'var', 'proc', 'sys'} & set(os.listdir('/')) and os.listdir('/old') == []"
    )
    assert report(program, "namespaces").kind == "passed"


def test_without_a_wall_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_tried", lambda wall: module.RunReport("wall", f"no {wall} here"))
    touched = tmp_path / "touched"
    with pytest.raises(RuntimeError, match=r"isolation='auto' cannot be had here .*isolation='none'"):
        RunsTests([""])([Draft(f"open({str(touched)!r}, 'w')")])
    assert not touched.exists()


def test_none_is_what_someone_asks_for():
    assert report(GOOD, "none", TEST).kind == "passed"
    assert report("while True: pass", "none").kind == "timeout"
    assert not remains()


@pytest.mark.parametrize("given", [{"isolation": "hope"}, {"timeout": 0}, {"memory": 1}, {"workers": 0}])
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}={next(iter(given.values()))!r}"):
        RunsTests([""], **given)


def test_it_is_pickled():
    assert pickle.loads(pickle.dumps(RunsTests(["pass"]))) == RunsTests(["pass"])

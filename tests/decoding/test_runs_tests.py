"""Programs that mean harm are stopped, and told what stopped them; none is taken for passed."""

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_peft.data.packaged import human_eval
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import RunsTests, sandbox, system_calls
from lightning_peft.decoding.scorers.sandbox import chosen_isolation, run_program, why_not

ISOLATIONS = [
    pytest.param(kind, marks=pytest.mark.skipif(why_not(kind) is not None, reason=f"{kind}: {why_not(kind)}"))
    for kind in ("namespaces", "landlock")
]
GOOD = "def double(x):\n    return 2 * x\n"
TEST = "assert double(2) == 4"


@pytest.fixture(params=ISOLATIONS)
def run(request):
    def one(program, tests=(TEST,), **options):
        return run_program(program, list(tests), isolation=request.param, **{"timeout": 2.0, **options})

    one.isolation = request.param
    return one


def test_a_right_program_passes_and_a_wrong_one_fails(run):
    assert run(GOOD).kind == "passed"
    found = run(GOOD, ["assert double(2) == 5"])
    assert (found.kind, found.detail) == ("failed", "test 0: AssertionError: ")
    assert "SyntaxError" in run("def double(").detail


def test_what_programs_commonly_need_works(run):
    program = "import math, re, typing, hashlib, collections, itertools, heapq, random, datetime, threading\n"
    program += "t = threading.Thread(target=print); t.start(); t.join()\nopen('note', 'w').write('x')\n" + GOOD
    assert run(program).kind == "passed"


IGNORING = """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: pass
"""
FORKING = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
# What a program does, and as what it is reported.
HOSTILE = {
    "endless loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(60)", {"timeout"}),
    "ignores signals": (IGNORING, {"timeout"}),
    "memory": ("x = [0] * 10**10", {"memory"}),
    "memory, slowly": ("x = []\nwhile True: x.append(bytearray(10**7))", {"memory"}),
    "endless output": ("while True: print('x' * 10**5)", {"timeout"}),
    "fork": ("import os; os.fork()", {"forbidden"}),
    "fork bomb": (FORKING, {"timeout"}),
    "daemon": ("import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)", {"forbidden"}),
    "socket": ("import socket; socket.socket()", {"forbidden"}),
    "huge file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))", {"forbidden", "failed"}),
    "sys.exit": ("import sys; sys.exit(0)", {"exited"}),
    "os._exit": ("import os; os._exit(0)", {"exited"}),
    "exit at the end": ("import atexit, os; atexit.register(os._exit, 0)\nraise SystemExit", {"exited"}),
    "crash": ("import ctypes; ctypes.string_at(0)", {"exited"}),
    "recursion": ("def f(): f()\nf()", {"failed"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped_and_reported(run, name):
    program, kinds = HOSTILE[name]
    found = run(program + "\n" + GOOD, timeout=1.0, memory=128 << 20)
    assert found.kind in kinds, found
    assert found.passed == 0
    assert found.detail


@pytest.mark.parametrize(
    ("program", "how"), [("os._exit(3)", "with exit code 3"), ("signal.alarm(1); signal.pause()", "by signal 14")]
)
def test_how_a_program_ended_itself_is_told(run, program, how):
    assert run(f"import os, signal\n{program}").detail == f"ended before its tests had, {how}"


WRONG = "\ndef double(x): return 9"
WRITING = """
import os
for number in range(3, 64):
    try: os.write(number, b"\\npassed 1  x\\n")
    except OSError: pass
os._exit(0)
"""
ECHOING = """
import os
for source in range(3, 64):
    try:
        os.set_blocking(source, False)
        got = os.read(source, 4096)
    except OSError:
        got = b"passed 1 "
    for target in range(3, 64):
        try: os.write(target, got)
        except OSError: pass
os._exit(0)
"""
# Ways to look as if the tests had passed, though double is wrong or is not there.
FAKES = {
    "exiting when called": "import os\ndef double(x): os._exit(0)",
    "raising SystemExit when called": "def double(x): raise SystemExit(0)",
    "writing to every file": WRITING,
    "reading every file and writing it back": ECHOING,
    "patching what tests use": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = None" + WRONG,
    "giving tests builtins of its own": "import builtins\n__builtins__ = {**vars(builtins), 'abs': lambda x: 0}"
    + WRONG,
    "patching exec and compile": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n",
    "patching json": 'import json\njson.dumps = lambda *a: \'{"kind": "passed", "passed": 1}\'' + WRONG,
    "patching os": "import os\nos.write = os._exit = os.getpid = lambda *a: 0" + WRONG,
    "raising what has no words": "class E(Exception):\n  def __str__(self): raise E\ndef double(x): raise E",
    "printing a report": "print('passed 1 ')\nimport os; os._exit(0)",
    "tracing": "import sys\nsys.settrace(lambda *a: sys.exit(0))" + WRONG,
    "excepthook": "import sys\nsys.excepthook = lambda *a: None" + WRONG,
}


@pytest.mark.parametrize("name", FAKES)
def test_success_cannot_be_faked_by(run, name):
    found = run(FAKES[name], ["assert abs(double(2) - 4) < 1e-9"])
    assert found.kind in {"failed", "exited", "forbidden"}, found
    assert found.passed == 0


ACTIONS = [
    "open({0!r}).read()",
    "open({0!r}, 'w')",
    "os.remove({0!r})",
    "os.rename({0!r}, 'x')",
    "os.chmod({0!r}, 0)",
    "os.chown({0!r}, 0, 0)",
    "os.utime({0!r})",
    "os.truncate({0!r}, 0)",
    "shutil.rmtree({1!r})",
    "os.mkdir({1!r} + '/new')",
    "os.symlink('x', {1!r} + '/s')",
]
# What root of its own namespaces might try first, were it still root.
FREEING = """
import ctypes, os
libc = ctypes.CDLL(None)
for place in (b"/", b"/usr", os.path.dirname(os.__file__).encode()):
    libc.mount(b"none", place, None, ctypes.c_ulong(32 | 4096), None)
libc.unshare(0x10000000)
libc.chroot(b".")
"""


def test_files_outside_stay_as_they_are_and_unseen(run, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for action in ACTIONS:
        program = "import os, shutil\n" + action.format(str(kept), str(tmp_path))
        assert run(program + "\n" + GOOD).kind in {"forbidden", "failed"}, action
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"
    assert kept.stat().st_mode & 0o777


def test_python_itself_cannot_be_changed(run):
    library = Path(os.__file__)
    before = library.stat().st_mtime_ns
    for action in (
        f"open({str(library)!r}, 'a')",
        f"os.utime({str(library)!r})",
        f"os.mkdir({str(library.parent / 'new')!r})",
    ):
        assert run(FREEING + action).kind in {"forbidden", "failed"}, action
    assert library.stat().st_mtime_ns == before
    assert not (library.parent / "new").exists()


def test_no_server_of_this_machine_is_reached(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert run(program).kind == "forbidden"
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_other_process_is_signalled_or_seen(run):
    other = subprocess.Popen(["sleep", "30"])
    try:
        for action in (
            f"os.kill({other.pid}, 9)",
            "os.kill(-1, 9)",
            f"open('/proc/{other.pid}/environ').read()",
            "os.kill(os.getppid(), 9)",
            f"resource.prlimit({other.pid}, resource.RLIMIT_NOFILE, (9, 9))",
            f"os.sched_setaffinity({other.pid}, [0])",
        ):
            assert run(f"import os, resource\n{action}").kind in {"forbidden", "failed"}, action
        assert other.poll() is None
        assert resource.prlimit(other.pid, resource.RLIMIT_NOFILE) == resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        other.kill()
        other.wait()


def test_a_right_program_that_breaks_the_system_module_still_passes(run):
    assert run("import os\nos.write = os._exit = lambda *a: 0\n" + GOOD).kind == "passed"


def test_no_capability_is_left(run):
    program = "import ctypes\nfound = (ctypes.c_uint32 * 6)()\n"
    program += (
        "assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), found) == 0\nassert not any(found)\n"
    )
    assert run(program + GOOD).kind == "passed"


@pytest.mark.parametrize(
    "what", ["shmget(0, 4096, 0o1600)", "semget(0, 1, 0o1600)", "msgget(0, 0o1600)", "syscall(250, 0, -3, 1)"]
)
def test_nothing_that_outlasts_a_program_is_made_and_no_key_is_asked_for(run, what):
    if "syscall" in what and os.uname().machine != "x86_64":
        pytest.skip("the number is of another processor")
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{what} == -1 and ctypes.get_errno() == 1\n"
    assert run(program + GOOD).kind == "passed"


@pytest.mark.parametrize(
    "number", [452, 463, 466, 469], ids=["fchmodat2", "setxattrat", "removexattrat", "file_setattr"]
)
def test_attributes_of_files_are_not_changed_by_the_calls_of_newer_kernels_either(run, number):
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program += (
        f"assert libc.syscall({number}, -100, b'.', 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, ctypes.get_errno()\n"
    )
    assert run(program + GOOD).kind == "passed"


REQUESTS = {"FS_IOC_SETFLAGS": 0x40086602, "FS_IOC_FSSETXATTR": 0x401C5820, "FS_IOC_ENABLE_VERITY": 0x40806685}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_flags_of_files_are_not_set_through_a_handle_for_reading(run, request_):
    program = "import fcntl, os, termios\nhandle = os.open('.', os.O_RDONLY)\ntry:\n"
    program += f"    fcntl.ioctl(handle, {request_}, bytes(128))\n    raise SystemExit(1)\n"
    program += "except PermissionError:\n    fcntl.ioctl(handle, termios.FIOCLEX)\n"  # what Python needs is allowed
    program += "    os.set_inheritable(handle, True)\n    os.isatty(handle)\n    reader, _ = os.pipe()\n"
    program += (
        "    os.set_blocking(reader, False)\n    assert fcntl.ioctl(reader, termios.FIONREAD, bytes(4)) == bytes(4)\n"
    )
    assert run(program + GOOD).kind == "passed"


REFUSED = {
    "memory of others": "libc.shmat(0, None, 0)",
    "messages of others": "libc.msgctl(0, 0, 0)",
    "a queue of messages": "libc.syscall(240 if os.uname().machine == 'x86_64' else 180, b'queue', 0o102, 0o600, None)",
    "memory that nobody counts": "mmap.mmap(-1, 4096)",
    "a file in memory": "os.memfd_create('x')",
    "letters to anywhere": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "space beyond the limit": "libc.fallocate(open('x', 'w').fileno(), 1, ctypes.c_long(0), ctypes.c_long(1 << 31))",
    "a lease": "fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "life after its parent": "libc.prctl(1, 0, 0, 0, 0)",
    "looking at others' files": "libc.inotify_init()",
    "queues of disk work": "libc.syscall(206 if os.uname().machine == 'x86_64' else 0, 8, ctypes.byref(ctypes.c_long(0)))",
}


@pytest.mark.parametrize("what", REFUSED.values(), ids=REFUSED)
def test_what_goes_around_the_walls_is_refused(run, what):
    program = "import ctypes, fcntl, mmap, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program += "libc.shmat.restype = ctypes.c_ssize_t\n"
    program += (
        f"handle = os.open(os.__file__, os.O_RDONLY)\ntry:\n    assert {what} == -1 and ctypes.get_errno() == 1\n"
    )
    program += "except PermissionError:\n    pass\n"
    assert run(program + GOOD).kind == "passed"


def test_what_right_programs_need_is_not_refused(run):
    program = "import asyncio, concurrent.futures, fcntl, os, sqlite3, tempfile, threading\n"
    program += "async def one(): return 1\nassert asyncio.run(one()) == 1\n"
    program += "with concurrent.futures.ThreadPoolExecutor(2) as pool: assert list(pool.map(abs, [-1])) == [1]\n"
    program += "assert sqlite3.connect(':memory:').execute('select 1').fetchone() == (1,)\n"
    program += "with tempfile.TemporaryFile() as file: file.write(b'x'); os.posix_fallocate(file.fileno(), 0, 99)\n"
    program += "assert fcntl.fcntl(os.dup(0), fcntl.F_GETFL) >= 0\n"
    program += "base = sqlite3.connect('base')\nbase.execute('create table a (b)')\nbase.commit()\n"
    program += "import mmap\nwith open('x', 'wb+') as file:\n    file.write(b'abc'); file.flush()\n"
    program += "    fcntl.flock(file, fcntl.LOCK_EX)\n    assert mmap.mmap(file.fileno(), 3)[:] == b'abc'\n"
    assert run(program + GOOD).kind == "passed"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_answers_every_call_as_its_rules_say(machine):
    lines, column = system_calls.rules(machine), ["x86_64", "aarch64"].index(machine)
    refused = {numbers[column] for numbers in system_calls._NEVER.values()} - {None}
    by_argument = {rule.numbers[column]: rule for rule in system_calls._BY_ARGUMENT.values()}
    assert not refused & by_argument.keys()
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    for number in range(600):
        rule = by_argument.get(number)
        argument = rule.argument if rule else 0
        for value in {
            0,
            1,
            2,
            3,
            0x22,
            0x23,
            0x801,
            0x5401,
            0x10000,
            0x11200,
            1 << 20,
            *(rule.answers if rule else ()),
        }:
            expected = 0x50001 if number in refused else 0x7FFF0000
            if number == 435:
                expected = 0x50026
            if rule:
                expected = rule.answers.get(value & rule.mask, rule.otherwise)
            data = {0: number, 4: architecture, 16 + 8 * argument: value}
            assert answered(lines, data) == expected, (number, value)
    assert answered(lines, {0: 0, 4: 1}) == answered(lines, {0: 0x40000001, 4: architecture}) == 0x80000000


def answered(lines, data):
    """What classic BPF comes to: loads, jumps and an answer."""
    place, held = 0, 0
    while True:
        operation, yes, no, value = lines[place]
        if operation == 0x06:
            return value
        if operation == 0x20:
            held = data.get(value, 0)
        elif operation == 0x54:
            held &= value
        else:
            met = {0x15: held == value, 0x35: held >= value}[operation]
            place += yes if met else no
        place += 1


def test_locks_are_not_taken(run):
    with open(os.__file__, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a real one would wait for this one
        assert run(f"import fcntl\nfcntl.flock(open({os.__file__!r}), fcntl.LOCK_EX)\n" + GOOD).kind == "passed"


def test_a_folder_that_cannot_be_listed_is_removed(run):
    before = set(Path(tempfile.gettempdir()).glob("program-*"))
    assert run("import os\nos.mkdir('d', 0o300)\nopen('d/f', 'w').close()\n" + GOOD).kind == "passed"
    assert set(Path(tempfile.gettempdir()).glob("program-*")) <= before


def test_folders_in_folders_are_removed(run):
    before = set(Path(tempfile.gettempdir()).glob("program-*"))
    program = "import os\ntry:\n    for _ in range(5000): os.mkdir('d'); os.chdir('d')\nexcept OSError: pass\n"
    assert run(program + GOOD).kind == "passed"
    assert set(Path(tempfile.gettempdir()).glob("program-*")) <= before


@pytest.mark.parametrize(
    "patch",
    [
        "__builtins__['abs'] = lambda value: 0",
        "import builtins; builtins.abs = lambda value: 0",
        "globals()['__builtins__'] = {'abs': lambda value: 0}",
    ],
)
def test_builtins_that_a_program_puts_in_place_while_it_is_tested_judge_nothing(patch):
    program = (
        f"def double(x):\n    try:\n        {patch}\n    except (NameError, TypeError):\n        pass\n    return 9\n"
    )
    tests = [
        "y = double(2)\nassert abs(y - 4) < 1e-9",
        "def check(f):\n    y = f(2)\n    assert abs(y - 4) < 1e-9\ncheck(double)",
    ]
    for test in tests:
        assert run_program(program, [test], isolation="none").kind == "failed"


def test_a_profile_that_a_program_sets_judges_nothing():
    program = "import sys\ndef look(frame, event, value):\n    if frame.f_code.co_filename.startswith('<test'):\n"
    program += "        frame.f_builtins['abs'] = lambda value: 0\nsys.setprofile(look)\ndef double(x): return 9\n"
    test = "def check(f):\n    assert abs(f(2) - 4) < 1e-9\ncheck(double)"
    assert run_program(program, [test], isolation="none").kind == "failed"


PATCHES = {
    "a type of the harness": "import types\ntypes.FunctionType = lambda code, space: lambda: None",
    "a codec": "import codecs, encodings\nclass E(bytes):\n    def __radd__(self, other): return b'passed 2 '\n"
    "codecs.unregister(encodings.search_function)\n"
    "codecs.register(lambda name: codecs.CodecInfo(lambda text, errors='': (E(b''), 0), None) if 'escape' in name else None)",
    "an audit hook": "import builtins, sys\nsys.addaudithook(lambda event, given: event == 'sys.setprofile' and "
    "setattr(builtins, 'compile', lambda *a, **k: (lambda: 0).__code__))",
    "settrace of its own": "import builtins, sys\nsys.settrace = lambda f: setattr(builtins, 'compile', "
    "lambda *a, **k: (lambda: 0).__code__)",
    "exec": "import builtins\nbuiltins.exec = lambda *a: None",
    "a hook when a test runs": "import sys\nsys.addaudithook(lambda event, given: event == 'exec' and "
    "dict.__setitem__(globals()['__builtins__'], 'abs', lambda value: 0))",
    "exec, over and over": "import builtins, sys, threading\nsys.setswitchinterval(1e-6)\ndef fake(*a): pass\ndef again():\n"
    "    while True: builtins.exec = fake\n[threading.Thread(target=again, daemon=True).start() for _ in range(4)]\n"
    "import time\ntime.sleep(0.05)",
}


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_what_a_program_puts_in_the_place_of_pythons_own_does_not_judge_it(patch):
    program = f"{patch}\ndef double(x): return 0\n"
    tests = ["import math", "assert abs(double(2) - 4) < 1e-9"]
    assert run_program(program, tests, isolation="none").kind == "failed"


def test_a_program_that_keeps_every_handle_is_judged_by_what_it_does(run):
    program = "kept = []\ntry:\n    while True: kept.append(open('x', 'w'))\nexcept OSError: pass\n"
    assert run(program + GOOD).kind == "passed"


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("from datetime import datetime\ndef f(s): return datetime.strptime(s, '%Y').year", "assert f('2024') == 2024"),
        (
            "import pickle, datetime\ndef f(d): return pickle.loads(pickle.dumps(d))",
            "import datetime\nd = datetime.date(2024, 1, 1)\nassert f(d) == d",
        ),
        ("import re\nP = re.compile('(a)')\ndef f(s): return P.sub(r'<\\1>', s)", "assert f('a') == '<a>'"),
        ("def f(x): return eval('abs(x)', globals(), {'x': x})", "assert f(-1) == 1 and callable(__builtins__['abs'])"),
        (
            "import concurrent.futures, time\ndef f(n):\n    with concurrent.futures.ThreadPoolExecutor(n) as pool:\n"
            "        return sum(pool.map(lambda i: time.sleep(0.05) or 1, range(n)))",
            "assert f(30) == 30",
        ),
    ],
    ids=["strptime", "pickle", "re", "eval", "threads"],
)
def test_right_programs_pass_whatever_of_python_they_use(run, program, test):
    assert run(program, [test]).detail == ""


def test_what_tests_define_is_there_for_the_next_ones():
    program = "count = 0\ndef more():\n    global count\n    count += 1\n"
    tests = ["more()\nassert count == 1\ndef twice(): more(); more()", "twice()\nassert count == 3"]
    assert run_program(program, tests, isolation="none").kind == "passed"


def test_secrets_of_the_environment_are_not_handed_on(run, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    assert run("import os\nassert 'SECRET' not in os.environ\n" + GOOD).kind == "passed"
    # The words a process was started with end where AT_EXECFN is.
    program = "import ctypes\nwhere = ctypes.CDLL(None).getauxval\nwhere.restype = ctypes.c_ulong\n"
    program += "assert b'SECRET=' not in ctypes.string_at(where(ctypes.c_ulong(31)) - 512, 512)\n"
    assert run(program + GOOD).kind == "passed"


def test_processes_that_a_trusted_program_leaves_are_ended():
    name = f"{time.time_ns() % 10**8 + 1000}"
    program = (
        f"import subprocess\nfor _ in range(3): subprocess.Popen(['sleep', '{name}'], start_new_session=True)\n" + GOOD
    )
    assert run_program(program, [TEST], isolation="none").kind == "passed"
    assert not any(name.encode() in command for command in commands())


def commands():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            yield file.read_bytes()


def children(process):
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def runs(process):
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("isolation", [*ISOLATIONS, "none"])
def test_a_program_ends_with_the_process_that_waits_for_it(isolation, tmp_path):
    job = {"program": "import time; time.sleep(60)", "tests": [], "timeout": 60, "memory": 512 << 20}
    waiting = subprocess.Popen([sys.executable, "-I", str(sandbox._CHILD)], stdin=subprocess.PIPE, text=True)
    waiting.stdin.write(json.dumps({**job, "isolation": isolation, "folder": str(tmp_path)}))
    waiting.stdin.close()
    end = time.monotonic() + 20
    while not (workers := children(waiting.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # until the program runs
    waiting.kill()
    waiting.wait()
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert workers
    assert time.monotonic() < end


def test_the_share_of_tests_and_the_tests_of_each_problem():
    scorer = RunsTests([[TEST, "assert double(3) == 7"], "assert double(1) == 2"], share=True, isolation="none")
    assert scorer(
        [
            Draft(GOOD, problem=0),
            Draft(GOOD, problem=1),
            Draft("    return 2 * x", prompt="def double(x):\n", problem=1),
        ]
    ).tolist() == [
        0.5,
        1,
        1,
    ]
    assert RunsTests([[TEST, "assert False"]], isolation="none")([GOOD]).tolist() == [0]


def test_equal_programs_run_once_and_workers_change_nothing(monkeypatch):
    ran = []
    real = run_program

    def counting(program, tests, **options):
        ran.append(program)
        return real(program, tests, **options)

    monkeypatch.setattr("lightning_peft.decoding.scorers.runs_tests.run_program", counting)
    scorer = RunsTests([TEST], isolation="none", workers=3)
    texts = [GOOD, "x = 1", GOOD, GOOD + "\n", "def double(x): return 4"]
    assert scorer(texts).tolist() == [1, 0, 1, 1, 1]
    assert scorer(texts[:2]).tolist() == [1, 0]
    assert len(ran) == 4


def test_solutions_pass_their_tests_and_the_bare_prompt_does_not():
    try:
        rows = human_eval()[:12]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    scorer = RunsTests([f"{row['test']}\ncheck({row['entry_point']})" for row in rows], isolation="none", timeout=10)
    right = [Draft(row["canonical_solution"], prompt=row["prompt"], problem=place) for place, row in enumerate(rows)]
    assert scorer(right).tolist() == [1] * len(rows)
    assert scorer([Draft("    pass\n", prompt=text.prompt, problem=text.problem) for text in right]).tolist() == [
        0
    ] * len(rows)


def test_where_nothing_shuts_in_programs_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda kind: f"{kind} is off")
    with pytest.raises(
        RuntimeError, match=r"cannot be shut in here.*namespaces is off.*isolation='none' runs them with the rights"
    ):
        RunsTests([TEST])
    assert RunsTests([TEST], isolation="none")([GOOD]).tolist() == [1]


def test_the_second_way_is_taken_where_the_first_is_missing(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", {"namespaces": "off", "landlock": None}.get)
    assert chosen_isolation("auto") == "landlock"
    with pytest.raises(RuntimeError, match="namespaces"):
        chosen_isolation("namespaces")


def test_a_kernel_without_landlock_and_one_without_namespaces_are_noticed(monkeypatch):
    monkeypatch.setattr(sandbox.confinement, "landlock_version", lambda: 0)
    assert "Landlock of version 6" in why_not.__wrapped__("landlock")
    monkeypatch.setattr(sandbox, "_child", lambda job, timeout: {"detail": "unshare: Operation not permitted"})
    assert "not permitted" in why_not.__wrapped__("namespaces")


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"memory": 1000}, {"workers": 0}, {"isolation": "docker"}, {"tests": "assert x"}]
)
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="RunsTests"):
        RunsTests(**{"tests": [TEST], "isolation": "none", **options})


def test_a_draft_without_tests_is_refused():
    with pytest.raises(ValueError, match="problem 3, but there are tests of 1"):
        RunsTests([TEST], isolation="none")([Draft("x", problem=3)])

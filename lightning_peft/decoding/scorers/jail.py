"""Run a program where it can do no harm. A script of its own, with the standard library alone: see :mod:`~.runs_tests`.

``python -I jail.py MECHANISM`` reads a job from stdin and writes a report to stdout. Three processes: this one waits, kills and
reports; its child goes behind the wall and is the first process there; the program runs in a child of that. With ``namespaces`` the
wall is a user, mount, network, PID and IPC namespace whose root holds the interpreter, read-only, and an empty folder in memory;
when its first process dies, all in it die. With ``landlock`` the kernel refuses all files but those of the interpreter and an empty
folder, and TCP; descendants are found and killed one by one. Programs may start no others in either.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import secrets
import select
import signal
import struct
import sys
import time
from typing import Any

_LIBC: Any = ctypes.CDLL(None, use_errno=True)
_SPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000  # user, network, PID, IPC
_MOUNTS = 0x00020000
_BIND, _RECURSIVE, _PRIVATE, _REMOUNT, _READ_ONLY, _NO_SUID, _NO_DEVICES = 4096, 16384, 1 << 18, 32, 1, 2, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# Said in Python's words sooner than the kernel would; of changed modes, which Landlock does not know, by nobody else.
_FORBIDDEN = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "subprocess.Popen", "pty.spawn"}
_FORBIDDEN |= {"os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"}


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def readable() -> list[str]:
    """Return what an interpreter needs to read."""
    found = [sys.base_prefix, "/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime"]
    return [path for path in dict.fromkeys(found) if os.path.lexists(path)]


# --- namespaces ---------------------------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Leave for namespaces of one's own; a child that is forked next is their first process."""
    user, group = os.getuid(), os.getgid()
    _checked(_LIBC.unshare(_SPACES), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    given = [text.encode() if text else None for text in (source, target, kind)]
    _checked(_LIBC.mount(*given, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def enter_new_root(folder: str) -> None:
    """Make a file system of what is readable and a folder in memory, and lose sight of all others."""
    _checked(_LIBC.unshare(_MOUNTS), "unshare of mounts")  # here: the process that waits keeps its own root
    _mount("", "/", "", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEVICES, "size=16m,mode=755")
    for path in [*readable(), *_DEVICES]:
        target = folder + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        _mount(path, target, "", _BIND | _RECURSIVE)
        if path not in _DEVICES:
            kept = os.statvfs(path).f_flag & ~_READ_ONLY & 0xF  # flags that a namespace may not take away
            _mount("", target, "", _BIND | _REMOUNT | _READ_ONLY | kept)
    for name in ("work", "old"):
        os.mkdir(f"{folder}/{name}")
    _checked(_LIBC.syscall(_PIVOT_ROOT[platform.machine()], folder.encode(), f"{folder}/old".encode()), "pivot_root")
    os.chdir("/")
    _checked(_LIBC.umount2(b"/old", 2), "umount")
    os.chdir("/work")


def drop_capabilities() -> None:
    """Give up what a namespace's owner may do, for good."""
    _checked(_LIBC.prctl(38, 1, 0, 0, 0), "prctl no_new_privs")
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _checked(_LIBC.capset(header, nothing), "capset")


# --- Landlock -----------------------------------------------------------------------------------------------------------------


def landlock_version() -> int:
    """Return the kernel's version of Landlock, 0 without."""
    return max(int(_LIBC.syscall(444, None, 0, 1)), 0)


def enter_landlock(folder: str) -> None:
    """Let the kernel refuse all files but what is readable and a folder, and TCP."""
    version = landlock_version()
    if version < 4:
        raise OSError(f"Landlock of version {version} knows no network; 4 is needed")
    every = (1 << {4: 15, 5: 16}.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", every, 3, 3 if version >= 6 else 0)[: 24 if version >= 6 else 16]
    rules = _checked(_LIBC.syscall(444, attributes, len(attributes), 0), "landlock_create_ruleset")
    reading, of_files = 1 | 4 | 8, 1 | 2 | 4 | 1 << 14
    allowed = dict.fromkeys(readable(), reading) | dict.fromkeys(_DEVICES, 2 | 4) | {folder: every & ~(1 << 15)}
    for path, access in allowed.items():
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & (every if os.path.isdir(path) else of_files), handle)
        _checked(_LIBC.syscall(445, rules, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(handle)
    _checked(_LIBC.prctl(38, 1, 0, 0, 0), "prctl no_new_privs")
    _checked(_LIBC.syscall(446, rules, 0), "landlock_restrict_self")
    os.chdir(folder)


# --- the program --------------------------------------------------------------------------------------------------------------


def limit(job: dict[str, Any]) -> None:
    """Set what the program may use at most."""
    limits = {
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_CPU: int(job["timeout"]) + 1,
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 64,
    }
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (most, most))


def _forbid(event: str, _: Any) -> None:
    if event in _FORBIDDEN:
        raise PermissionError(
            f"{event}: a program under test may neither start another nor change a file's owner or mode"
        )


def run_program(job: dict[str, Any], told: int, token: str) -> None:
    """Run a program and its tests, and say how it went; this process does nothing else and ends."""
    said: dict[str, Any] = {"kind": "exited", "detail": "ended before its tests did"}
    try:
        limit(job)
        sys.addaudithook(_forbid)
        exec(compile(job["program"], "<program>", "exec"), {"__name__": "__program__"})
        said = {"kind": "passed", "detail": "", "token": token}
    except MemoryError:
        said = {"kind": "memory", "detail": "MemoryError"}
    except SystemExit:
        pass
    except BaseException as error:
        said = {"kind": "failed", "detail": f"{type(error).__name__}: {error}"[:300]}
    finally:
        os.write(told, json.dumps(said).encode() + b"\n")
        os._exit(0)


def first_process(mechanism: str, job: dict[str, Any], told: int, token: str) -> None:
    """Go behind the wall, start the program there and wait for it."""
    try:
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        if mechanism == "namespaces":
            enter_new_root(job["folder"])
            drop_capabilities()
        elif mechanism == "landlock":
            enter_landlock(job["folder"])
        else:
            os.chdir(job["folder"])
    except OSError as error:
        os.write(told, json.dumps({"kind": "wall", "detail": str(error)}).encode() + b"\n")
        os._exit(1)
    program = os.fork()
    if program == 0:
        run_program(job, told, token)
    _, status = os.waitpid(program, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        os.write(told, json.dumps({"kind": "killed", "detail": name}).encode() + b"\n")
    os._exit(0)


def kill_descendants() -> None:
    """Kill every process below this one; orphans have come to it, since it is their reaper."""
    for _ in range(200):
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            found.append((int(name), parent))
        family = {os.getpid()}
        while more := {child for child, parent in found if parent in family} - family:
            family |= more
        family.discard(os.getpid())
        for child in family:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(0.005)


def supervise(mechanism: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job to its end or its limit, leave no process of it, and return the report."""
    _LIBC.prctl(36, 1, 0, 0, 0)  # orphans of this one's descendants become its children
    token, (listen, told) = secrets.token_hex(16), os.pipe()
    if mechanism == "namespaces":
        enter_namespaces()
    child = os.fork()
    if child == 0:
        os.close(listen)
        first_process(mechanism, job, told, token)
    os.close(told)
    heard, deadline = b"", time.monotonic() + job["timeout"]
    while (left := deadline - time.monotonic()) > 0 and len(heard) < 65_536:
        if select.select([listen], [], [], left)[0]:
            part = os.read(listen, 4096)
            if not part:
                break
            heard += part
            if b"\n" in heard:
                break  # said; whatever else goes on is killed
    else:
        heard = heard if b"\n" in heard else b""
    os.kill(child, signal.SIGKILL)
    kill_descendants()
    if b"\n" not in heard:
        late = time.monotonic() >= deadline
        detail = f"ran longer than {job['timeout']} s" if late else "ended without a word"
        return {"kind": "timeout" if late else "exited", "detail": detail}
    try:
        said: dict[str, Any] = json.loads(heard.split(b"\n")[0])
        passed = said["kind"] == "passed"
    except (ValueError, KeyError, TypeError):
        return {"kind": "exited", "detail": "said what is no report"}
    if passed and said.pop("token", None) != token:
        return {"kind": "exited", "detail": "claimed a success that was none"}
    return said


if __name__ == "__main__":
    try:
        report = supervise(sys.argv[1], json.load(sys.stdin))
    except OSError as error:
        report = {"kind": "wall", "detail": str(error)}
    print(json.dumps(report))

"""Take a process's rights away, by what Linux lets any user do: namespaces, Landlock, seccomp, resource limits.

Imports the standard library alone: the process that runs foreign programs loads this file by itself.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE = {
    "mount": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38
_PR_SET_THP_DISABLE = 41
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}


def _call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(what: str, *arguments: object) -> None:
    _call(what, _LIBC.prctl(*arguments))


def die_with_parent() -> None:
    """Let this process be killed when the one that made it ends."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every process further down whose own parent ends."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_SUBREAPER, 1, 0, 0, 0)


def enter_namespaces() -> None:
    """Move into own users, mounts, network, inter-process communication; children get own process numbers.

    Raises:
        OSError: Where the kernel or a container forbids it.
    """
    user, group = os.getuid(), os.getgid()
    _call("unshare", _LIBC.unshare(sum(_CLONE.values())))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def close_file_system(folder: Path) -> None:
    """Leave of the file system what Python needs, read-only, and ``/program``, an empty one in memory; call in namespaces.

    Args:
        folder: An empty folder; the new root is built on it.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", str(folder), "tmpfs", _MS_NOSUID | _MS_NODEV, "size=16m,nr_inodes=4096")
    for source in readable():
        target = folder / source.relative_to("/")
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        _mount(str(source), str(target), None, _MS_BIND)
        _mount("none", str(target), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _kept_flags(target))
    (folder / "program").mkdir()
    os.chroot(folder)
    os.chdir("/program")


def readable() -> list[Path]:
    """Return the folders and files that running Python needs."""
    python = {Path(place).resolve() for place in (sys.prefix, sys.base_prefix)}
    wanted = [*python, *map(Path, ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"))]
    found = [place for place in dict.fromkeys(wanted) if place.exists()]
    return [one for one in found if not any(other in one.parents for other in found)]


def _kept_flags(place: Path) -> int:
    # What was locked when the namespace was made may not be dropped by a remount.
    flags = os.statvfs(place).f_flag
    return flags & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC) | (flags & (1024 | 2048)) | (1 << 21 if flags & 4096 else 0)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    found = _LIBC.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _call(f"mount {target}", found)


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has, 0 for none."""
    return max(0, int(_LIBC.syscall(_LANDLOCK["create"], None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def forbid_files(folder: Path) -> None:
    """Let this process read what Python needs, write in one folder, and connect or signal to nothing outside, by Landlock.

    Raises:
        OSError: Where there is no Landlock.
    """
    version = landlock_version()
    # Rights of files: 13 in version 1, then refer, truncate, ioctl; of the network: bind and connect; scopes: sockets and signals.
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    rules = [files, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    # An older kernel refuses a longer record than it knows.
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(
        "Landlock", _LIBC.syscall(_LANDLOCK["create"], struct.pack("QQQ", *rules), ctypes.c_size_t(size), 0)
    )
    _no_new_rights()
    reading = 0b1101  # execute, read a file, read a folder
    for place in readable():
        _allow(ruleset, place, (reading if place.is_dir() else 0b101) | (2 if place.name == "null" else 0))
    _allow(ruleset, folder, files & ~1)
    _call("Landlock", _LIBC.syscall(_LANDLOCK["restrict"], ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, place: Path, rights: int) -> None:
    handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, handle)
        _call(f"Landlock {place}", _LIBC.syscall(_LANDLOCK["add"], ruleset, 1, rule, 0))
    finally:
        os.close(handle)


def drop_capabilities() -> None:
    """Give up what root may do, for good: root of own namespaces could else make read-only mounts writable."""
    _no_new_rights()
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # beyond the last, or none was held
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", _LIBC.capset(header, nothing))


def _no_new_rights() -> None:
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def forbid_calls(rules: Sequence[tuple[int, int, int, int]]) -> None:
    """Let a seccomp filter answer system calls from now on.

    Raises:
        OSError: Where the kernel has no filters.
    """
    program = b"".join(struct.pack("=HBBI", *line) for line in rules)
    held = ctypes.create_string_buffer(program)
    record = struct.pack("HP", len(rules), ctypes.addressof(held))
    _no_new_rights()
    _prctl("seccomp", _PR_SET_SECCOMP, 2, record, 0, 0)


def limit(*, seconds: float, memory: int, files: int = 1 << 20) -> None:
    """Limit processor time, memory, the size of files, and the number of open files and of processes.

    Args:
        seconds: Of processor time, rounded up.
        memory: In bytes, of address space.
        files: In bytes, of each file that is written.
    """
    _prctl("PR_SET_THP_DISABLE", _PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a large page holds more memory than it counts for
    cpu = int(seconds) + 1
    for what, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_SIGPENDING, 64),  # timers, of which all of a user's processes share the number
        # Does not bind root: that is what the filter of system calls is for.
        (resource.RLIMIT_NPROC, 256),
    ):
        hard = resource.getrlimit(what)[1]
        lower = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (lower, lower))

"""Which system calls a program may make that nobody trusts: rules, as a seccomp filter of the kernel takes them.

Namespaces and Landlock know files, sockets and processes. What is refused here goes around them: by other processes, by memory and
messages that outlast a program, by attributes and locks of files, by handles that are open for reading alone.

Imports the standard library alone: it is part of the sandbox's own process.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from typing import NamedTuple

Line = tuple[int, int, int, int]
"""An instruction of classic BPF: operation, jump if true, jump if not, value."""

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# By name the numbers on x86_64 and aarch64; None where a processor has no such call.
_NEVER: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "sched_setattr": (314, 274),
    # the network, mounts and namespaces, and what leads around a filter
    "socket": (41, 198), "chroot": (161, 51), "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "pidfd_open": (434, 434), "name_to_handle_at": (303, 264), "listmount": (458, 458),
    # modes, owners, times and attributes of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    # looking where others write, and making the system's disks and caches slow
    "sync": (162, 81), "syncfs": (306, 267), "fadvise64": (221, 223),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # memory, messages and keys that outlast a program, or that no limit counts
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184), "mq_getsetattr": (245, 185), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "io_setup": (206, 0),    "splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANSWER = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _NOTHING, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000, 0x00050001, 0x00050026
"""Do it; end the process; say that it is done; EPERM; ENOSYS."""


class _Rule(NamedTuple):
    """A call that depends on one of its arguments."""

    numbers: tuple[int, int]
    argument: int
    answers: Mapping[int, int]
    """By value of the argument."""
    otherwise: int
    mask: int = 0xFFFFFFFF
    """The bits of the argument that count."""


_BY_ARGUMENT: dict[str, _Rule] = {
    "prlimit64": _Rule((302, 261), 0, {0: _ALLOW}, _REFUSE),  # of the caller itself
    "clone": _Rule((56, 220), 0, {0x10000: _ALLOW}, _REFUSE, mask=0x10000),  # a thread
    # PR_SET_PDEATHSIG: the worker ends with its parent. PR_SET_THP_DISABLE: large pages count less than they hold.
    "prctl": _Rule((157, 167), 0, {1: _REFUSE, 41: _REFUSE}, _ALLOW),
    "socketpair": _Rule((53, 199), 1, {1: _ALLOW}, _REFUSE, mask=0xF),  # streams: others can send anywhere
    "mmap": _Rule(
        (9, 222), 3, {0x21: _REFUSE}, _ALLOW, mask=0x21
    ),  # shared and of no file: the limit on memory does not count it
    "fallocate": _Rule((285, 47), 1, {0: _ALLOW}, _REFUSE),  # other modes pass by the limit on files
    # Duplicates, flags, asking for a lock, the size of a pipe. Record locks, with which nobody else is to be stopped, are not
    # taken. Others lease and mark files that are open for reading.
    "fcntl": _Rule(
        (72, 25), 1, dict.fromkeys((0, 1, 2, 3, 4, 5, 1030, 1032), _ALLOW) | dict.fromkeys((6, 7), _NOTHING), _REFUSE
    ),
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, which Python makes. Others set flags of files, seal them
    # or remove subvolumes, each file system by requests of its own.
    "ioctl": _Rule(
        (16, 29), 1, dict.fromkeys((0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), _ALLOW), _REFUSE
    ),
    "flock": _Rule((73, 32), 1, {}, _NOTHING),  # as record locks
}


def known() -> bool:
    """Return whether there are rules for this processor."""
    return platform.machine() in _ARCHITECTURES and sys.maxsize > 2**32


def rules(machine: str) -> list[Line]:
    """Return the filter for a processor, by its name.

    >>> rules("x86_64")[:2]
    [(32, 0, 0, 4), (21, 1, 0, 3221225534)]
    """
    architecture, column = _ARCHITECTURES[machine]
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_ANSWER, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    # The numbers of 32-bit pointers on x86-64 would lead around the filter.
    lines += [(_AT_LEAST, 0, 1, 0x40000000), (_ANSWER, 0, 0, _KILL)]
    lines += [(_EQUAL, 0, 1, 435), (_ANSWER, 0, 0, _UNKNOWN)]  # clone3, whose flags are out of a filter's sight
    for numbers in _NEVER.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_ANSWER, 0, 0, _REFUSE)]
    for rule in _BY_ARGUMENT.values():
        then = [(_LOAD, 0, 0, 16 + 8 * rule.argument), (_AND, 0, 0, rule.mask)]
        for value, answer in rule.answers.items():
            then += [(_EQUAL, 0, 1, value), (_ANSWER, 0, 0, answer)]
        then.append((_ANSWER, 0, 0, rule.otherwise))
        lines += [(_EQUAL, 0, len(then), rule.numbers[column]), *then]
    return [*lines, (_ANSWER, 0, 0, _ALLOW)]

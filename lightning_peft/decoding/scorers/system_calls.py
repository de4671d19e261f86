"""Which system calls a program may make that nobody trusts: rules, as a seccomp filter of the kernel takes them.

Namespaces and Landlock know files, sockets and processes. What is refused here goes around them: by other processes, by memory and
messages that outlast a program, by attributes and locks of files, by handles that are open for reading alone.

Imports the standard library alone: it is part of the sandbox's own process.
"""

from __future__ import annotations

import platform
import sys

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
    "io_uring_setup": (425, 425),
    # modes, owners, times and attributes of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    # locks on what others use, and looking where others write
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # memory, messages and keys that outlast a program, or that no limit counts
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184), "mq_getsetattr": (245, 185), "memfd_create": (319, 279), "io_setup": (206, 0),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM and ENOSYS
# By name: numbers, the argument that decides, and how; then the answer if one of the values is met, and if none is.
_Rule = tuple[tuple[int, int], int, int, tuple[int, ...], int, int]
_BY_ARGUMENT: dict[str, _Rule] = {
    "prlimit64": ((302, 261), 0, _EQUAL, (0,), _ALLOW, _REFUSE),  # of the caller itself
    "clone": ((56, 220), 0, _ANY_BIT, (0x00010000,), _ALLOW, _REFUSE),  # a thread
    "prctl": ((157, 167), 0, _EQUAL, (1,), _REFUSE, _ALLOW),  # PR_SET_PDEATHSIG: the worker ends with its parent
    "socketpair": ((53, 199), 1, _EQUAL, (1, 0x801, 0x80001, 0x80801), _ALLOW, _REFUSE),  # streams: others can send anywhere
    "mmap": ((9, 222), 3, _ANY_BIT, (1,), _REFUSE, _ALLOW),  # shared memory, which the limit on memory does not count
    "fallocate": ((285, 47), 1, _EQUAL, (0,), _ALLOW, _REFUSE),  # other modes pass by the limit on files
    # Duplicates, flags, the size of a pipe; others lock, lease and mark files that are open for reading.
    "fcntl": ((72, 25), 1, _EQUAL, (0, 1, 2, 3, 4, 1030, 1032), _ALLOW, _REFUSE),
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, which Python makes. Others set flags of files, seal them or
    # remove subvolumes, each file system by requests of its own.
    "ioctl": ((16, 29), 1, _EQUAL, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), _ALLOW, _REFUSE),
}  # fmt: skip


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
    for of, argument, how, values, met, unmet in _BY_ARGUMENT.values():
        lines += [(_EQUAL, 0, len(values) + 3, of[column]), (_LOAD, 0, 0, 16 + 8 * argument)]
        lines += [(how, len(values) - place, 0, value) for place, value in enumerate(values)]
        lines += [(_ANSWER, 0, 0, unmet), (_ANSWER, 0, 0, met)]
    return [*lines, (_ANSWER, 0, 0, _ALLOW)]

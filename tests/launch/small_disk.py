"""A disk of a few megabytes that only one process and its children see."""

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h

_LIBC = ctypes.CDLL(None, use_errno=True)


def mount(place: Path, size: str) -> None:
    """Put a tmpfs of that size at place, for this process and its children alone; root of its own it is, too.

    Raises OSError. This process must have one thread.
    """
    user, group = os.geteuid(), os.getegid()
    _done(_LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _done(_LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _done(_LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))


def _done(code: int) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

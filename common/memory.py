"""The C library's memory, where tensors on a CPU lie."""

from __future__ import annotations

import ctypes

# Numbers of malloc.h (glibc).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1
_MIB = 2**20


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory of freed tensors for the next ones, or give it back to the system as glibc does by itself.

    glibc maps every block above 32 MiB anew, and the kernel clears its pages at the first touch: for activations of that size
    this takes several times as long as the arithmetic on them. A process that keeps its memory stays at its largest size.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    if keep:
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    # glibc's default number of mappings, and the sizes that its own adjustment ends at in a process with such blocks.
    done = libc.mallopt(_M_MMAP_MAX, 65536) and libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
    done = done and libc.mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)
    libc.malloc_trim(0)
    return bool(done)

"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 << 20
"""Bytes that are asked for beyond what is needed, each time the heap grows."""


def keep_freed_memory() -> bool:
    """Leave freed memory with this process from now on, up to its end; whether the C library can do that (glibc can).

    glibc gives every large block back to the system when it is freed. A step of training frees and takes the same
    gigabytes again, and the system clears each page anew before the process sees it. What is reused needs neither; the
    process holds the most that it ever needed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library, or none that can be asked
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD))
    )

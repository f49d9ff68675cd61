"""Memory of CPU training."""

from __future__ import annotations

import ctypes
import ctypes.util

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for the next ones, instead of giving it back and asking for it anew.

    A training step frees and allocates the same few hundred megabytes every time, and fresh pages from the system cost
    more
    than the arithmetic on them: HKSA forward and backward took 1.8 times as long without this (docs/lab-log.md). With
    another C library nothing happens.
    """
    library = ctypes.util.find_library("c")
    if library is None:
        return
    mallopt = getattr(ctypes.CDLL(library), "mallopt", None)
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
            mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions of glibc take
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

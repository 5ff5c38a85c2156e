"""The host allocator: keep memory that was freed, instead of giving it back to the kernel at every step.

glibc serves large blocks by mmap and returns them on free, so that every step of a training on the CPU takes
the same pages again and the kernel clears them again: up to half of the time of a step. Raising the two
thresholds keeps the blocks in the process. The price: peak memory stays resident.
"""

import ctypes
import platform

M_TRIM_THRESHOLD = -1  # parameter numbers of mallopt(3), from glibc's malloc.h
M_MMAP_THRESHOLD = -3
LARGEST_HEAP_BLOCK = 1 << 30
"""Bytes. Larger blocks (whole-model buffers) are rare, live long, and may go through mmap."""


def keep_freed_memory() -> bool:
    """Tell glibc to serve blocks up to 1 GiB from its heap and never to trim the heap.

    Acts on the whole process from this call on: call it first, before torch allocates. Returns whether it
    acted; on systems without glibc (musl, macOS, Windows) nothing is done and the result is False.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # evaluate both: one setting without the other keeps the page faults
    kept = [mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK), mallopt(M_TRIM_THRESHOLD, -1)]
    return all(kept)

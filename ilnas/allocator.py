"""What glibc's allocator does with the activations that are freed after every step. Elsewhere nothing is done."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes that may lie idle beside the libraries' few hundred million: to be given them again takes time.
MOST_IDLE = 1 << 30


class _MallInfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks "
                "fordblks keepcost".split()]  # fmt: skip


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def reuse_memory() -> None:
    """Keep freed blocks of up to 32 MB: activations would else be mapped and zeroed anew at every step."""
    if (glibc := _glibc()) is not None:  # without it, this is only slower
        glibc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # at its largest
        glibc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def release_memory() -> None:
    """Give freed memory back to the system where much of it lies idle.

    To be called where the sizes of activations change, around evaluations and after expansions: glibc fits few of the
    new ones into the gaps that the old ones left, and its heap would grow every time.
    """
    glibc = _glibc()
    if not hasattr(glibc, "mallinfo2"):  # glibc has it since 2.33
        return
    glibc.mallinfo2.restype = _MallInfo2
    info = glibc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident - info.uordblks - info.hblkhd > MOST_IDLE:
        glibc.malloc_trim(0)

"""What the C library's allocator keeps of freed memory, and when it gives it back."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

import dask.config

__all__ = ["give_back", "keep_memory"]

# Of glibc's malloc.h. A batch of four windows of 256 pixels in 32 channels is a little more than
# the 32 MB that glibc itself goes up to; its older versions refuse more.
_M_TRIM_THRESHOLD, _TRIM = -1, 128 * 2**20
_M_MMAP_THRESHOLD, _MMAP = -3, (48 * 2**20, 32 * 2**20)


@cache
def _libc() -> Any:
    """Return the C library if it is glibc and the user has set nothing about its allocator.

    What Dask's nanny sets by itself does not count.
    """
    nanny = dask.config.merge(*dask.config.defaults).get("distributed", {}).get("nanny", {})
    given = {k: str(v) for k, v in nanny.get("pre-spawn-environ", {}).items()}
    for name, value in os.environ.items():
        if name.startswith("MALLOC_") and value != given.get(name):
            return None
    if not sys.platform.startswith("linux") or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") else None  # musl's has none


def keep_memory() -> bool:
    """Let this process keep the memory of freed activations; return whether it does.

    As it is, glibc maps the largest activations anew for each batch, and every page of them is
    faulted in (4 % of the time). In a Dask worker it does so with all of them (3.3 million faults,
    5 of 18 s, in a scene of 2048 pixels a side): the nanny starts it with
    ``MALLOC_TRIM_THRESHOLD_=65536``, and once that is set, glibc no longer learns from what is
    freed that large blocks come back soon. Anything else that is set for the allocator is the
    user's, and stands.
    """
    libc = _libc()
    if libc is None:
        return False
    kept = any(libc.mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _MMAP)
    return kept and libc.mallopt(_M_TRIM_THRESHOLD, _TRIM) == 1


def give_back() -> None:
    """Give all freed memory back to the system, once a chunk is done.

    What activations leave in the arenas of several threads adds up over many chunks to some
    hundred MB that Dask takes for lost. It takes 10 ms; what the user has set stands.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)

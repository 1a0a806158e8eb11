"""Memory: what the C library's allocator keeps of what was freed, and who is on a card."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from queue import LifoQueue
from typing import Any

import dask.config

__all__ = ["give_back", "keep_memory", "turn_on"]

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


# Chunks on one card at a time: while one is computed, another one is brought or fetched.
_TURNS = 2
_turns: dict[str, LifoQueue[Any]] = {}
_turns_lock = threading.Lock()


@contextmanager
def turn_on(device: str) -> Iterator[None]:
    """Wait for a turn on a CUDA card, and give a stream of its own to what is done there.

    However many threads a process has, so many chunks and no more share a card's memory, and
    copying one never waits for the work of another. Other devices have room for all.
    """
    if not device.startswith("cuda"):
        yield
        return
    import torch

    with _turns_lock:
        if device not in _turns:
            _turns[device] = LifoQueue()
            new: Any = torch.cuda.Stream  # not typed
            for _ in range(_TURNS):
                _turns[device].put(new(device))
    stream = _turns[device].get()
    try:
        # The networks were brought by another stream.
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    finally:
        _turns[device].put(stream)

"""What a Dask worker is given: the only module that needs dask.distributed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import dask.config
from distributed import WorkerPlugin

__all__ = ["Weights", "keep_memory"]

# Of glibc's malloc.h, and what glibc itself goes up to as long as nothing is set.
_M_TRIM_THRESHOLD, _TRIM = -1, 64 * 2**20
_M_MMAP_THRESHOLD, _MMAP = -3, 32 * 2**20


class Weights(WorkerPlugin):
    """Keeps a model file's bytes in the worker's process, where `ModelRef` finds them."""

    idempotent = True

    def __init__(self, key: str, payload: Any, remember: Callable[[str, Any], None]):
        self.name, self.key, self.payload = f"deepdem-{key}", key, payload
        self.remember = remember

    def setup(self, worker: Any) -> None:
        """Run on each worker, and on each that joins later."""
        self.remember(self.key, self.payload)


def keep_memory() -> bool:
    """Let glibc keep the memory of freed activations, as outside a worker; return whether it does.

    Dask's nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``. Once that is set, glibc no
    longer learns from what is freed that large blocks come back soon: each activation is mapped
    anew, and every page of it faulted in (3.3 million faults, 5 of 18 s, in a scene of 2048 pixels
    a side). Anything else that is set for the allocator is the user's, and stands.
    """
    nanny = dask.config.merge(*dask.config.defaults).get("distributed", {}).get("nanny", {})
    given = nanny.get("pre-spawn-environ", {}).get("MALLOC_TRIM_THRESHOLD_")
    ours = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    if ours != {"MALLOC_TRIM_THRESHOLD_": str(given)}:
        return False
    if not sys.platform.startswith("linux") or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    wanted = (_M_MMAP_THRESHOLD, _MMAP), (_M_TRIM_THRESHOLD, _TRIM)
    return mallopt is not None and all(mallopt(*pair) == 1 for pair in wanted)

"""What a Dask worker is given: the only module that needs dask.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import WorkerPlugin


class Weights(WorkerPlugin):
    """Keeps a model file's bytes in the worker's process, where `ModelRef` finds them."""

    idempotent = True

    def __init__(self, key: str, payload: Any, remember: Callable[[str, Any], None]):
        self.name, self.key, self.payload = f"deepdem-{key}", key, payload
        self.remember = remember

    def setup(self, worker: Any) -> None:
        """Run on each worker, and on each that joins later."""
        self.remember(self.key, self.payload)

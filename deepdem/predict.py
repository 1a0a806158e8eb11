"""One copy of a model in each process, and which device, threads and precision it gets there.

The graph holds a `ModelRef`, a hash. The process that made it has the weights; a cluster's
workers get them once each, by a worker plugin if a client was active when `ship` was called, and
else with the graph, where the reference stands once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepdem.models import ModelSpec, ResidualNet, read_model, serialise, weights_hash

__all__ = ["ModelRef", "predict", "resolve_device", "ship"]

log = logging.getLogger(__name__)

_lock = threading.RLock()
# The weights as they came, by hash; the networks made of them, by hash and device.
_payloads: dict[str, bytes] = {}
_nets: dict[tuple[str, str], ResidualNet] = {}
_MOST_NETS = 8
# Which client has sent which weights to its workers.
_shipped: set[tuple[str, str]] = set()


class ModelRef:
    """A reference to one network by the hash of its weights: small, and cheap to pickle."""

    def __init__(self, net: ResidualNet):
        self.hash, self.spec = weights_hash(net), net.spec
        with _lock:
            if self.hash not in _payloads:
                _payloads[self.hash] = serialise(net)

    def __dask_tokenize__(self) -> str:
        return self.hash

    def __repr__(self) -> str:
        return f"<ModelRef {self.hash[:8]}>"

    def __reduce__(self) -> tuple[Any, ...]:
        client = _active_client()
        on_workers = client is not None and (client.id, self.hash) in _shipped
        payload = None if on_workers else _payloads.get(self.hash)
        return _restore, (self.hash, self.spec, payload)

    def net(self, device: str) -> ResidualNet:
        """Return this process's copy of the network on `device`, made when first asked for."""
        key = (self.hash, device)
        with _lock:
            if key not in _nets:
                if self.hash not in _payloads:
                    raise RuntimeError(
                        f"the weights {self.hash[:8]} have not reached this process: compute with "
                        "the Dask client that was active when refine() was called"
                    )
                while len(_nets) >= _MOST_NETS:
                    _nets.pop(next(iter(_nets)))
                net = read_model(_payloads[self.hash]).to(device)
                _nets[key] = net.to(memory_format=torch.channels_last)
            return _nets[key]


def _restore(key: str, spec: ModelSpec, payload: bytes | None) -> ModelRef:
    ref = ModelRef.__new__(ModelRef)
    ref.hash, ref.spec = key, spec
    if payload is not None:
        remember(key, payload)
    return ref


def remember(key: str, payload: bytes) -> None:
    """Keep a model file's bytes in this process under the hash of its weights."""
    with _lock:
        _payloads.setdefault(key, payload)


def _active_client() -> Any:
    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None


def ship(ref: ModelRef) -> None:
    """Send the weights to every present and future worker of the active Dask client, if any."""
    client = _active_client()
    if client is None or client.asynchronous or (client.id, ref.hash) in _shipped:
        return
    from deepdem._worker import Weights

    client.register_plugin(Weights(ref.hash, _payloads[ref.hash], remember))
    _shipped.add((client.id, ref.hash))


def resolve_device(device: str) -> str:
    """Return the torch device that ``device`` means in this process.

    ``"auto"`` is CUDA where there is, each worker of a host its own card in turn; else MPS; else
    the CPU.
    """
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return f"cuda:{_worker_number() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _worker_number() -> int:
    """Return this worker's number on its cluster; 0 outside of one, or where it has no number."""
    if "distributed" not in sys.modules:
        return 0
    from distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:
        return 0
    return int(name.rsplit("-", 1)[-1]) if name.rsplit("-", 1)[-1].isdigit() else 0


class _Threads:
    """Shares this process's torch threads out among the Dask tasks that compute at the moment.

    A thread's own OpenMP setting is changed before each batch, so that N tasks do not start N
    times all cores, and the last one, alone, has them all.
    """

    def __init__(self) -> None:
        self.total, self.busy = torch.get_num_threads(), 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def task(self) -> Iterator[None]:
        """Count a task in while it computes."""
        with self.lock:
            self.busy += 1
        try:
            yield
        finally:
            with self.lock:
                self.busy -= 1
            torch.set_num_threads(self.total)

    def share(self) -> None:
        """Give the calling thread its share."""
        torch.set_num_threads(max(1, self.total // max(self.busy, 1)))


threads = _Threads()


@torch.inference_mode()
def predict(net: ResidualNet, batch: Tensor, *, device: str, bf16: bool) -> Tensor:
    """Return the residual of a batch of windows, metres, float32, on the CPU.

    Parameters
    ----------
    net
        On `device`, in evaluation mode.
    batch
        (n, layer, y, x) raw layers, NaN for no data, on the CPU.
    device
        A torch device.
    bf16
        Whether convolutions run in bfloat16. Centring, scaling and heights never do.

    Notes
    -----
    A batch that does not fit a CUDA card's memory is halved and tried again; any other error is
    raised.
    """
    if device == "cpu":
        threads.share()
        return _forward(net, batch, device, bf16)
    try:
        return _forward(net, batch.to(device, non_blocking=True), device, bf16).cpu()
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
        log.warning("a batch of %d windows does not fit %s: halving it", len(batch), device)
    torch.cuda.empty_cache()
    half = len(batch) // 2
    parts = (batch[:half], batch[half:])
    return torch.cat([predict(net, part, device=device, bf16=bf16) for part in parts])


def _forward(net: ResidualNet, batch: Tensor, device: str, bf16: bool) -> Tensor:
    z = net.standardise(batch)
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
        out = net.network(z)
    residual: Tensor = out[:, 0].float() * net.spec.dsm_scale
    return residual

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from deepdem.models import ModelSpec, ResidualNet, read_model, serialise, weights_hash

__all__ = ["ModelRef", "Prediction", "bf16_is_fast", "predict", "resolve_device", "ship"]

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


def bf16_is_fast(device: str) -> bool:
    """Return whether `device` has instructions for bfloat16, without which it is slower."""
    here = resolve_device(device)
    if here == "cpu":
        supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, bool)()) for name in supported)
    return here.startswith("cuda") and torch.cuda.get_device_capability(here)[0] >= 8


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


@dataclass(frozen=True)
class Prediction:
    """How a batch is predicted, besides by which networks.

    Attributes
    ----------
    device
        A torch device.
    bf16
        Whether convolutions run in bfloat16.
    tta
        Whether each window is seen in its eight symmetries.
    swap
        Where the left and the right image are among the layers, if a window is to be seen with
        the two swapped as well.
    """

    device: str = "cpu"
    bf16: bool = False
    tta: bool = False
    swap: tuple[int, int] | None = None


@torch.inference_mode()
def predict(
    nets: Sequence[ResidualNet], batch: Tensor, how: Prediction
) -> tuple[Tensor, Tensor | None]:
    """Return the residual of a batch of windows and its variance, metres, float32, on the CPU.

    Parameters
    ----------
    nets
        On the device, in evaluation mode; more than one is an ensemble of equal weights.
    batch
        (n, layer, y, x) raw layers, NaN for no data, on the CPU.
    how
        Device, precision, symmetries.

    Returns
    -------
    tuple of Tensor
        Mean residual (n, y, x), metres; variance (n, y, x), square metres, or None where there is
        one network that predicts no scale, seen once. The members (networks and symmetries) are
        a mixture: its variance is the mean of their variances (2 b^2 of a Laplace
        distribution of scale b) plus the variance of their means (law of total variance, as in
        Lakshminarayanan et al., 2017, section 2.4).

    Notes
    -----
    A batch that does not fit a CUDA card's memory is halved and tried again; any other error is
    raised.
    """
    if how.device == "cpu":
        threads.share()
        return _mixture(nets, batch, how)
    try:
        mean, variance = _mixture(nets, batch.to(how.device, non_blocking=True), how)
        return mean.cpu(), None if variance is None else variance.cpu()
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
        log.warning("a batch of %d windows does not fit %s: halving it", len(batch), how.device)
    torch.cuda.empty_cache()
    half = len(batch) // 2
    parts = [predict(nets, part, how) for part in (batch[:half], batch[half:])]
    variances = [variance for _, variance in parts if variance is not None]
    return torch.cat([mean for mean, _ in parts]), torch.cat(variances) if variances else None


def _mixture(
    nets: Sequence[ResidualNet], batch: Tensor, how: Prediction
) -> tuple[Tensor, Tensor | None]:
    views = _views(how)
    members = len(nets) * len(views)
    scaled = any(net.spec.uncertainty for net in nets)
    if members == 1 and not scaled:
        return nets[0].moments(batch, bf16=how.bf16)[0], None
    # Running mean and sum of squared deviations (Welford, 1962): no member is kept.
    mean, spread = torch.zeros_like(batch[:, 0]), torch.zeros_like(batch[:, 0])
    own = torch.zeros_like(batch[:, 0])
    seen = 0
    for net in nets:
        for forth, back in views:
            residual, scale = (
                None if part is None else back(part)
                for part in net.moments(forth(batch), bf16=how.bf16)
            )
            assert residual is not None
            seen += 1
            step = residual - mean
            mean = mean + step / seen
            spread = spread + step * (residual - mean)
            if scale is not None:
                own = own + 2 * scale.square()
    return mean, (own + spread) / members


View: TypeAlias = "tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]"


def _views(how: Prediction) -> list[View]:
    """Return ways to look at a batch, and to turn what was seen back: itself alone, or all."""
    if not how.tta:
        return [(lambda x: x, lambda y: y)]
    views: list[View] = []
    swaps = (False, True) if how.swap else (False,)
    for turns, flip, swap in product(range(4), (False, True), swaps):

        def forth(x: Tensor, turns: int = turns, flip: bool = flip, swap: bool = swap) -> Tensor:
            if swap and how.swap:
                order = list(range(x.shape[1]))
                left, right = how.swap
                order[left], order[right] = right, left
                x = x[:, order]
            return torch.rot90(torch.flip(x, (-1,)) if flip else x, turns, (-2, -1))

        def back(y: Tensor, turns: int = turns, flip: bool = flip) -> Tensor:
            y = torch.rot90(y, -turns, (-2, -1))
            return torch.flip(y, (-1,)) if flip else y

        views.append((forth, back))
    return views

"""One copy of a model in each process, and which device, threads and precision it gets there.

The graph holds a `ModelRef`, a hash. The process that made it has the weights; a cluster's
workers get them once each, by a worker plugin if a client was active when `ship` was called, and
else with the graph, where the reference stands once.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepdem._memory import keep_memory
from deepdem.inference import for_inference
from deepdem.modelfile import read_model, serialise, weights_hash
from deepdem.models import OWN, ModelSpec, ResidualNet

__all__ = [
    "ModelRef",
    "Prediction",
    "bf16_is_fast",
    "predict",
    "predictions",
    "resolve_device",
    "ship",
    "swapped_layers",
]

log = logging.getLogger(__name__)

_lock = threading.RLock()
#: A model file's bytes, and the module they are for if it is the user's own.
Payload: TypeAlias = "tuple[bytes, nn.Module | None]"
# The weights as they came, by hash; the networks made of them, by hash, device, and whether they
# convolve in bfloat16 and are compiled.
_payloads: dict[str, Payload] = {}
_nets: dict[tuple[str, str, bool, bool], ResidualNet] = {}
_MOST_NETS = 8
# Which client has sent which weights to its workers.
_shipped: set[tuple[str, str]] = set()


class ModelRef:
    """A reference to one network by the hash of its weights: small, and cheap to pickle."""

    def __init__(self, net: ResidualNet):
        self.hash, self.spec = weights_hash(net), net.spec
        with _lock:
            if self.hash not in _payloads:
                own = net.spec.architecture == OWN
                module = copy.deepcopy(net.network).cpu() if own else None
                _payloads[self.hash] = (serialise(net), module)

    def __dask_tokenize__(self) -> str:
        return self.hash

    def __repr__(self) -> str:
        return f"<ModelRef {self.hash[:8]}>"

    def __reduce__(self) -> tuple[Any, ...]:
        client = _active_client()
        on_workers = client is not None and (client.id, self.hash) in _shipped
        payload = None if on_workers else _payloads.get(self.hash)
        return _restore, (self.hash, self.spec, payload)

    def net(self, device: str, *, bf16: bool = False, compiled: bool = False) -> ResidualNet:
        """Return this process's copy of the network on `device`, made when first asked for."""
        key = (self.hash, device, bf16, compiled)
        with _lock:
            if key not in _nets:
                if self.hash not in _payloads:
                    raise RuntimeError(
                        f"the weights {self.hash[:8]} have not reached this process: compute with "
                        "the Dask client that was active when refine() was called"
                    )
                while len(_nets) >= _MOST_NETS:
                    _nets.pop(next(iter(_nets)))
                content, module = _payloads[self.hash]
                net = read_model(content, network=copy.deepcopy(module)).to(device)
                # In a thread of the pool: with all cores at once, its small passes wait for each
                # other many times as long if something else runs on one of them.
                executor, _ = _pool.get()
                made = executor.submit(for_inference, net, bf16=bf16, compiled=compiled)
                _nets[key] = made.result()
            return _nets[key]


def _restore(key: str, spec: ModelSpec, payload: Payload | None) -> ModelRef:
    ref = ModelRef.__new__(ModelRef)
    ref.hash, ref.spec = key, spec
    if payload is not None:
        remember(key, payload)
    return ref


def remember(key: str, payload: Payload) -> None:
    """Keep a model file's bytes in this process, and the module of its own, by their hash."""
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
    the CPU. Workers are told apart by the number that their name ends in, as clusters give them.
    """
    if device != "auto":
        return device
    if torch.cuda.is_available():
        if "dask_cuda" in sys.modules:
            return "cuda:0"  # of a list that begins with the worker's own card
        return f"cuda:{_worker_number() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _this_worker() -> Any:
    """Return the Dask worker whose task this is, or None."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def bf16_is_fast(device: str) -> bool:
    """Return whether `device` has instructions for bfloat16, without which it is slower."""
    here = resolve_device(device)
    if here == "cpu":
        supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, bool)()) for name in supported)
    return here.startswith("cuda") and torch.cuda.get_device_capability(here)[0] >= 8


def _worker_number() -> int:
    """Return this worker's number on its cluster; 0 outside of one, or where it has no number."""
    name = str(getattr(_this_worker(), "name", ""))
    return int(name.rsplit("-", 1)[-1]) if name.rsplit("-", 1)[-1].isdigit() else 0


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
    compiled
        Whether the networks go through `torch.compile`.
    """

    device: str = "cpu"
    bf16: bool = False
    tta: bool = False
    swap: tuple[int, int] | None = None
    compiled: bool = False


def swapped_layers(specs: Sequence[ModelSpec]) -> tuple[int, int] | None:
    """Return where left and right image are, if all models were trained with them swapped."""
    layers, pair = specs[0].layers, ("ortho_left", "ortho_right")
    swapped = all("swap" in spec.training.get("augment", ()) for spec in specs)
    if not swapped or not set(pair) <= set(layers):
        return None
    return layers.index(pair[0]), layers.index(pair[1])


class _Pool:
    """The threads in which this process's networks run on the CPU, one torch thread each.

    As many as torch was given for the process (OMP_NUM_THREADS, or all cores), or as a Dask
    worker was given threads, whichever is more; N Dask threads share them and never start N times
    all cores. Forward passes of small batches side by side do 1.5 times the work of one
    that is cut up among all threads, and their activations are small enough for the allocator to
    keep: a larger batch gives its memory back to the system and takes it again at each layer.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0

    def get(self) -> tuple[ThreadPoolExecutor, int]:
        """Return the executor and how many threads it has, made when first asked for."""
        with self.lock:
            if self.executor is None:
                self.size = max(torch.get_num_threads(), _worker_threads())
                keep_memory()
                self.executor = ThreadPoolExecutor(
                    self.size, "deepdem", initializer=_one_torch_thread,
                    initargs=(torch.get_num_threads(),),
                )  # fmt: skip
            return self.executor, self.size


def _one_torch_thread(others: int) -> None:
    torch.get_num_threads()  # what a thread starts with is set when it first asks: before ours
    torch.set_num_threads(1)
    # That also sets what threads start with that are yet to come: put it back for the user's.
    restore = threading.Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()


def _worker_threads() -> int:
    """Return how many threads Dask gave this worker; 1 outside of one."""
    worker = _this_worker()
    return 1 if worker is None else int(worker.state.nthreads)


_pool = _Pool()


def predictions(
    nets: Sequence[ResidualNet], batches: Iterable[NDArray[np.float32]], how: Prediction
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Give what `predict` gives of each batch, in order, several at a time on the CPU.

    Parameters
    ----------
    nets, how
        As in `predict`.
    batches
        (n, layer, y, x) each; taken one by one, a few ahead of what is given.
    """

    def one(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        mean, variance = predict(nets, torch.from_numpy(batch), how)
        return mean.numpy(), None if variance is None else variance.numpy()

    if how.device != "cpu":
        yield from map(one, batches)
        return
    executor, size = _pool.get()
    ahead: deque[Future[Any]] = deque()
    try:
        for batch in batches:
            ahead.append(executor.submit(one, batch))
            if len(ahead) > size:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


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
        return nets[0].moments(batch)[0], None
    # Running mean and sum of squared deviations (Welford, 1962): no member is kept.
    mean, spread = torch.zeros_like(batch[:, 0]), torch.zeros_like(batch[:, 0])
    own = torch.zeros_like(batch[:, 0])
    seen = 0
    for net in nets:
        for forth, back in views:
            residual, scale = (
                None if part is None else back(part) for part in net.moments(forth(batch))
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

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
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from deepdem._memory import keep_memory
from deepdem.inference import exact, for_inference
from deepdem.modelfile import read_model, serialise, weights_hash
from deepdem.models import OWN, ModelSpec, ResidualNet
from deepdem.mosaic import Batch

__all__ = [
    "ModelRef",
    "Prediction",
    "Predictions",
    "bf16_is_fast",
    "in_one_thread",
    "predict",
    "resolve_device",
    "ship",
    "swapped_layers",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

_lock = threading.RLock()
#: A model file's bytes, and the module they are for if it is the user's own.
Payload: TypeAlias = "tuple[bytes, nn.Module | None]"
# The weights as they came, by hash; the networks made of them, by hash, device, and whether they
# convolve in bfloat16 and are compiled.
_payloads: dict[str, Payload] = {}
_nets: dict[tuple[str, str, bool, bool], ResidualNet] = {}
_MOST_NETS = 8
_MOST_KERNELS = 1024  # more than there are Dask threads: none waits for another
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
        # One thread for each Dask thread that is at a chunk: what it does beside the networks.
        self.kernels: ThreadPoolExecutor | None = None
        self.size = 0

    def get(self) -> tuple[ThreadPoolExecutor, int]:
        """Return the executor and how many threads it has, made when first asked for."""
        with self.lock:
            if self.executor is None:
                self.size = max(torch.get_num_threads(), _worker_threads())
                keep_memory()
                self.executor, self.kernels = (
                    ThreadPoolExecutor(
                        size, name, initializer=_one_torch_thread,
                        initargs=(torch.get_num_threads(),),
                    )
                    for size, name in ((self.size, "deepdem"), (_MOST_KERNELS, "deepdem-chunk"))
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


def in_one_thread(work: Callable[[], T]) -> T:
    """Return what `work` gives in a thread of its own, in which torch starts no others."""
    _pool.get()
    assert _pool.kernels is not None
    return _pool.kernels.submit(work).result()


#: How a network sees layers: the numbers that it standardises them by, and whether left is right.
_Look: TypeAlias = "tuple[Any, ...]"
# Pixels of a layer that are made ready at once on a CPU: all layers of them stay in its cache.
_READY_PX = 2**15


class Predictions:
    """What `predict` gives of the windows of a chunk: the predictor of `deepdem.mosaic`.

    Layers are standardised once for all windows. With chips' own means, heights are then relative
    to one height for all of the chunk, from which a window's mean is subtracted as it is cut.

    Parameters
    ----------
    nets, how
        As in `predict`.
    """

    def __init__(self, nets: Sequence[ResidualNet], how: Prediction):
        self.nets, self.how = nets, how
        # Members of an ensemble mostly have the same statistics: then they share what is ready.
        self.looks: dict[_Look, tuple[ResidualNet, bool]] = {}
        for net in nets:
            for swap in _swaps(how):
                self.looks.setdefault(_look(net, swap), (net, swap))
        self.own_mean = any(net.spec.centering == "chip" for net in nets)
        self.base: float | None = None

    @property
    def depths(self) -> Sequence[int]:
        """How many channels the things have that are made ready.

        The layers, for each way to see them; with chips' own means, heights above the common one,
        and where there are any.
        """
        return [len(net.spec.layers) for net, _ in self.looks.values()] + [1, 1] * self.own_mean

    def prepare(
        self, layers: Sequence[Tensor], level: Tensor | None, into: Sequence[Tensor]
    ) -> None:
        """Make the layers ready: standardised, channels last, and without NaN."""
        height, width = layers[0].shape
        rows = max(1, _READY_PX // width) if self.how.device == "cpu" else height
        dsm = layers[self.nets[0].spec.layers.index("dsm")]
        if self.own_mean and self.base is None:
            known = dsm[dsm.isfinite()]
            self.base = float(known.mean()) if known.numel() else None
        base = self.base or 0.0
        for y in range(0, height, rows):
            there = slice(y, y + rows)
            relative = base if level is None else level[there]
            for (net, swap), ready in zip(self.looks.values(), into, strict=False):
                order = _order(len(layers), self.how.swap if swap else None)
                for i, n in enumerate(order):
                    ready[there, :, i] = net.plain(i, layers[n][there], relative)
            if self.own_mean:
                above, known = (dsm[there] - base), into[-1][there, :, 0]
                known.copy_((above * 0).eq_(0))
                into[-2][there, :, 0] = torch.nan_to_num_(above, nan=0.0, posinf=0.0, neginf=0.0)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Give the residual of each batch and its variance, in order, several at a time on a CPU.

        Batches are taken one by one, a few ahead of what is given.
        """
        if self.how.device != "cpu":
            yield from map(self._one, batches)
            return
        executor, size = _pool.get()
        ahead: deque[Future[Any]] = deque()
        try:
            for batch in batches:
                ahead.append(executor.submit(self._one, batch))
                if len(ahead) > size:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    @torch.inference_mode()
    def _one(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        def work(lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
            part = batch.part(lo, hi)

            def moments(net: ResidualNet, view: View) -> tuple[Tensor, Tensor | None]:
                return net.moments_of(view.turn(self._seen(part, net, view.swap)))

            return _mixture(self.nets, moments, self.how)

        return _fitting(work, 0, len(batch), self.how.device)

    def _seen(self, batch: Batch, net: ResidualNet, swap: bool) -> Tensor:
        """Return the windows as the network sees them, (n, layer, y, x), channels last."""
        index = list(self.looks).index(_look(net, swap))
        if batch.filled is not None:
            # Each window has its own heights.
            z, level = batch.ready(index), batch.level()
            centre = net.centre(batch.filled, batch.filled if level is None else level)
            for i in net.heights:
                z[..., i] = net.plain(i, batch.height(net.spec.layers[i]), centre)
        elif self.own_mean:
            z = self._above_mean(batch, net, index)
        else:
            z = batch.ready(index)
        return z.permute(0, 3, 1, 2)

    def _above_mean(self, batch: Batch, net: ResidualNet, index: int) -> Tensor:
        """Return the windows, (n, y, x, layer), their heights above each window's mean."""
        views = batch.views(index)
        height, width, layers = views[0].shape
        counts = torch.stack([view.sum() for view in batch.views(-1)])
        means = torch.stack([view.sum() for view in batch.views(-2)]) / counts.clamp(min=1)
        # Subtracted of all layers, most of it 0: one pass over the window.
        row = means.new_zeros((len(views), 1, layers))
        row[..., net.heights] = (means / net.spec.dsm_scale)[:, None, None]
        z = views[0].new_empty((len(views), height, width, layers))
        for n, (view, own) in enumerate(zip(views, row.repeat(1, width, 1), strict=True)):
            torch.sub(view, own, out=z[n])
        # To ask a card would be to wait for it.
        if z.device.type != "cpu" or bool((counts < height * width).any()):
            known = batch.ready(-1)[..., 0]
            for i in net.heights:
                z[..., i].mul_(known)
        return z


def _look(net: ResidualNet, swap: bool) -> _Look:
    spec = net.spec
    images = tuple((n, spec.means.get(n), spec.stds.get(n)) for n in spec.layers)
    return images, spec.clip, spec.dsm_scale, swap


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
        (n, channel, y, x) raw layers, NaN for no data, on the CPU.
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

    def work(lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        part = batch[lo:hi].to(how.device, non_blocking=True)

        def moments(net: ResidualNet, view: View) -> tuple[Tensor, Tensor | None]:
            order = _order(part.shape[1], how.swap if view.swap else None)
            return net.moments(view.turn(part[:, order] if view.swap else part))

        mean, variance = _mixture(nets, moments, how)
        return mean.cpu(), None if variance is None else variance.cpu()

    return _fitting(work, 0, len(batch), how.device)


def _fitting(
    work: Callable[[int, int], tuple[Tensor, Tensor | None]], lo: int, hi: int, device: str
) -> tuple[Tensor, Tensor | None]:
    """Return what `work` gives of windows [lo, hi), in halves where they do not fit a card."""
    try:
        return work(lo, hi)
    except torch.cuda.OutOfMemoryError:
        if device == "cpu" or hi - lo == 1:
            raise
        log.warning("a batch of %d windows does not fit %s: halving it", hi - lo, device)
    torch.cuda.empty_cache()
    half = lo + (hi - lo) // 2
    parts = [_fitting(work, *part, device) for part in ((lo, half), (half, hi))]
    variances = [variance for _, variance in parts if variance is not None]
    return torch.cat([mean for mean, _ in parts]), torch.cat(variances) if variances else None


@exact()
def _mixture(
    nets: Sequence[ResidualNet],
    moments: Callable[[ResidualNet, View], tuple[Tensor, Tensor | None]],
    how: Prediction,
) -> tuple[Tensor, Tensor | None]:
    views = _views(how)
    members = len(nets) * len(views)
    scaled = any(net.spec.uncertainty for net in nets)
    if members == 1 and not scaled:
        return moments(nets[0], views[0])[0], None
    # Running mean and sum of squared deviations (Welford, 1962): no member is kept.
    mean = spread = own = torch.zeros(())
    seen = 0
    for net in nets:
        for view in views:
            residual, scale = moments(net, view)
            residual = view.back(residual)
            if not seen:
                mean, spread, own = (torch.zeros_like(residual) for _ in range(3))
            seen += 1
            step = residual - mean
            mean = mean + step / seen
            spread = spread + step * (residual - mean)
            if scale is not None:
                own = own + 2 * view.back(scale).square()
    return mean, (own + spread) / members


@dataclass(frozen=True)
class View:
    """One way to look at windows: quarter turns, mirrored, left and right image swapped."""

    turns: int = 0
    flip: bool = False
    swap: bool = False

    def turn(self, x: Tensor) -> Tensor:
        """Return windows (n, layer, y, x) as they are seen."""
        x = torch.flip(x, (-1,)) if self.flip else x
        # A turn by nothing would be a copy, and in another layout.
        return torch.rot90(x, self.turns, (-2, -1)) if self.turns else x

    def back(self, y: Tensor) -> Tensor:
        """Return what was seen (n, y, x) the way the windows were."""
        y = torch.rot90(y, -self.turns, (-2, -1)) if self.turns else y
        return torch.flip(y, (-1,)) if self.flip else y


def _swaps(how: Prediction) -> tuple[bool, ...]:
    return (False, True) if how.tta and how.swap else (False,)


def _order(count: int, swap: tuple[int, int] | None) -> list[int]:
    """Return which layer stands where if the images are swapped, or are not."""
    order = list(range(count))
    if swap is not None:
        left, right = swap
        order[left], order[right] = right, left
    return order


def _views(how: Prediction) -> list[View]:
    """Return the ways to look at a batch: as it is, or all."""
    if not how.tta:
        return [View()]
    return [View(*each) for each in product(range(4), (False, True), _swaps(how))]

"""Batches of chips, made in this process or in others that open the stores themselves.

An item of the datasets here is a whole batch, asked for by epoch and number. Worker processes are
started fresh (forkserver or spawn), never forked from a process that has threads: those hang.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from deepdem.regions import Opened, Region
from deepdem.sampling import Chip, FixedChip, Plan, Stream

__all__ = [
    "LANES",
    "Batch",
    "FixedBatches",
    "TrainBatches",
    "TrainLoader",
    "fixed_loader",
    "train_loader",
]

#: A batch: "layers" (n, channel, y, x), as `ModelSpec.channels` names them, and "target"
#: (n, y, x); float32, raw units, NaN for no data.
Batch: TypeAlias = "dict[str, Tensor]"

#: Streams of a process: 1, 2 or 4 workers can share them out and read no pixel twice.
LANES = 4
#: Blocks of memory that are kept to be used again: those of a few batches.
_KEPT = 7
#: A worker that gives nothing for so long is said to have failed. Seconds.
_PATIENCE = 900


class _Memory:
    """Memory for batches, given again once nobody holds a batch in it.

    The pages of fresh memory cost as much as copying chips into them.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float32]] = []

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()

    def empty(self, *shape: int) -> Tensor:
        """Return a tensor of that shape; what is in it is left over."""
        size = math.prod(shape)
        if get_worker_info() is not None:
            # Where the process that trains will see it, as torch's own collating does.
            storage = torch.UntypedStorage._new_shared(4 * size)  # type: ignore[no-untyped-call]
            shared: Tensor = torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
            return shared
        # A block's references are the list's, the loop's and the call's; a batch holds one more.
        for block in self._blocks:
            if block.size == size and sys.getrefcount(block) == 3:
                return torch.from_numpy(block).view(shape)
        block = np.empty(size, dtype=np.float32)
        self._blocks = [*self._blocks[-_KEPT:], block]
        return torch.from_numpy(block).view(shape)


def _batch(chips: Sequence[Chip], size: int, memory: _Memory) -> Batch:
    region = chips[0][0].region
    layers = memory.empty(len(chips), len(region.layers), size, size)
    target = memory.empty(len(chips), size, size)
    into, truth = layers.numpy(), target.numpy()
    for k, (opened, chip) in enumerate(chips):
        out: dict[str, NDArray[np.float32]] = dict(zip(region.layers, into[k], strict=True))
        out[region.target] = truth[k]
        opened.crop(chip, out)
    return {"layers": layers, "target": target}


@dataclass
class _Running:
    """A stream, and how many batches have been taken of it."""

    epoch: int
    taken: int
    stream: Stream


class TrainBatches(Dataset[Batch]):
    """Training batches: item (epoch, number). Chips are drawn and moved anew in each epoch."""

    def __init__(self, regions: Sequence[Region], plan: Plan, *, batch_size: int, chips: int):
        self.regions, self.plan = list(regions), plan
        self.batch_size = min(batch_size, chips)
        self._count = max(1, chips // batch_size)
        self._running: dict[int, _Running] = {}
        self._memory = _Memory()

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        epoch, number = index if isinstance(index, tuple) else (0, index)
        position, which = divmod(number, self.plan.streams)
        running = self._running.get(which)
        if running is None or running.epoch != epoch or running.taken > position:
            self._running.pop(which, None)  # its tiles go before new ones come
            stream = Stream(self.regions, self.plan, epoch=epoch, number=which)
            running = self._running[which] = _Running(epoch, 0, stream)
        for _ in range(position - running.taken):
            running.stream.take(self.batch_size)
        running.taken = position + 1
        return _batch(running.stream.take(self.batch_size), self.plan.size, self._memory)


class FixedBatches(Dataset[Batch]):
    """Batches of chips that stand still, the same in the same order each time: item number.

    Neighbouring batches are dealt to lanes, so that workers do not read each other's tiles.
    """

    def __init__(self, regions: Sequence[Region], chips: Sequence[FixedChip], *, batch_size: int):
        self.regions = list(regions)
        cuts = [chips[i : i + batch_size] for i in range(0, len(chips), batch_size)]
        lanes = np.array_split(np.arange(len(cuts)), LANES)
        order = [int(n) for row in zip_longest(*lanes) for n in row if n is not None]
        self._batches = [list(cuts[n]) for n in order]
        self._opened: tuple[int, Opened] | None = None
        self._memory = _Memory()

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def chips(self) -> list[FixedChip]:
        """All chips, in the order they are given."""
        return [chip for batch in self._batches for chip in batch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, index: int) -> Batch:
        chips = self._batches[index]
        opened = [(self._open(chip), chip.box) for chip in chips]
        return _batch(opened, chips[0].box.shape[0], self._memory)

    def _open(self, chip: FixedChip) -> Opened:
        """Return the tile that a chip is in; the last one is kept."""
        if self._opened is None or self._opened[0] != chip.region:
            self._opened = None
        if self._opened is None or self._opened[1].box != chip.tile:
            self._opened = chip.region, self.regions[chip.region].open(chip.tile)
        return self._opened[1]


class _Numbers(DistributedSampler[Batch]):
    """Which training batches this process sees: all, or of several processes every so-many-th.

    Of Lightning's kind of sampler, so that a strategy of many devices takes it as it is; and it
    can begin in the middle of an epoch.
    """

    def __init__(self, batches: TrainBatches, *, world: int, rank: int):
        super().__init__(batches, num_replicas=world, rank=rank, shuffle=False, drop_last=True)
        self.begin = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]  # what its batches are asked for by
        mine = range(self.rank, self.total_size, self.num_replicas)[self.begin :]
        self.begin = 0
        return iter([(self.epoch, number) for number in mine])


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give batches; while one is trained with, another thread makes the next one.

    Most of the making is copying, during which NumPy lets other threads run.
    """
    here = torch.cuda.current_device()  # where memory is pinned goes by the thread
    with ThreadPoolExecutor(1, "deepdem-chips", torch.cuda.set_device, (here,)) as executor:
        coming = executor.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = executor.submit(next, batches, None)
            yield batch


class TrainLoader(DataLoader[Batch]):
    """A DataLoader over training batches, which can be resumed in the middle of an epoch."""

    def __iter__(self) -> Any:
        self._seen = self.sampler.begin if isinstance(self.sampler, _Numbers) else 0
        batches: Iterator[Batch] = super().__iter__()
        if self.pin_memory and not self.num_workers:
            batches = _ahead(batches)
        return self._counted(batches)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been given out; Lightning keeps it."""
        assert isinstance(self.sampler, _Numbers)
        return {"epoch": self.sampler.epoch, "batch": getattr(self, "_seen", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken, if that was in the epoch that is about to begin."""
        assert isinstance(self.sampler, _Numbers)
        if state["epoch"] == self.sampler.epoch and state["batch"] < len(self):
            self.sampler.begin = state["batch"]


def train_loader(
    batches: TrainBatches,
    *,
    workers: int,
    epoch: int = 0,
    batch: int = 0,
    world: int = 1,
    rank: int = 0,
    pin: bool = False,
) -> TrainLoader:
    """Return a loader of training batches that has `workers` processes of its own; 0: none.

    It begins at a batch of an epoch. Of `world` training processes this one is number `rank`.
    With `pin`, batches come in pinned memory, from which a CUDA card takes them while it works,
    and are made ahead of their time: it would wait for each otherwise.
    """
    sampler = _Numbers(batches, world=world, rank=rank)
    sampler.set_epoch(epoch)
    sampler.begin = batch
    return TrainLoader(
        batches, batch_size=None, sampler=sampler, pin_memory=pin, **_processes(workers)
    )


def fixed_loader(batches: FixedBatches, *, workers: int) -> DataLoader[Batch]:
    """Return a loader of the same batches in the same order; for many devices Lightning deals."""
    return DataLoader(batches, batch_size=None, **_processes(workers))


def _processes(workers: int) -> dict[str, Any]:
    if not workers:
        return {}
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        # The server imports torch once, for all workers: the first batch comes in 0.6 of the time.
        # It computes nothing, so that its forks have no threads to miss.
        context.set_forkserver_preload(["__main__", __name__])
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "persistent_workers": True,
        "timeout": _PATIENCE,
    }

"""Parts of scenes as arrays in memory: read box by box, from wherever the scene is.

What is stored (Zarr on a disk, in a bucket, in memory; a file) is read without Dask: a process
that receives a region opens the store by itself and reads what it needs. What is computed goes
through Dask. What fits in memory can be held there, shared between processes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import torch
import xarray as xr
from dask.array.core import getter
from dask.base import compute
from dask.system import CPU_COUNT
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from xarray.backends.zarr import ZarrArrayWrapper
from xarray.core import indexing
from zarr.buffer.cpu import NDBuffer

from deepdem.blocks import Box, Kernel, stored_source
from deepdem.splits import Part

__all__ = ["Opened", "Plane", "Region", "SceneReader", "Seen", "shared_room"]

#: What is read at once when a region is taken into memory: a shard.
_BLOCK_PX = 2048
_TORCH = {np.dtype(np.float32): torch.float32, np.dtype(bool): torch.bool}


@dataclass(frozen=True)
class Plane:
    """A layer that a scene does not have: float32, computed from others where chips are read.

    Attributes
    ----------
    name
        What it is called among the layers.
    inputs
        The layers that it is computed from.
    kernel
        As in `map_regions`: ``kernel(arrays, out=Box, region=Box)``, boxes in pixels of the scene,
        gives the plane over `out`. Processes must be able to receive it: no lambda.
    region
        Takes the box that is wanted, gives the box of the inputs that it needs; it is clipped to
        the scene.
    """

    name: str
    inputs: tuple[str, ...]
    kernel: Kernel
    region: Callable[[Box], Box]


class SceneReader:
    """Reads boxes of a scene's layers as float32; boxes are in pixels of the scene."""

    def __init__(self, ds: xr.Dataset, names: Sequence[str]):
        self.shape: tuple[int, int] = (ds.sizes["y"], ds.sizes["x"])
        self._stored: dict[str, _Stored] = {}
        self._other: dict[str, xr.Variable] = {}
        self._masks = frozenset(name for name in names if ds[name].dtype == bool)
        for name in names:
            variable = ds[name].variable
            data = variable.data if variable.chunks is not None else None
            source = stored_source(data) if isinstance(data, da.Array) else None
            if source is not None:
                self._stored[name] = _Stored(*source)
            else:
                self._other[name] = variable

    @property
    def is_direct(self) -> bool:
        """Whether every layer is read from where it is stored, without Dask."""
        return not self._other

    def held_as(self, name: str) -> np.dtype[Any]:
        """Return the type in which a layer is held in memory: bool for masks, else float32."""
        return np.dtype(bool if name in self._masks else np.float32)

    def in_memory(self, name: str) -> NDArray[Any] | None:
        """Return the whole layer if it is an array in memory, of the type it is held as."""
        variable = self._other.get(name)
        if variable is None or not variable._in_memory or variable.dtype != self.held_as(name):
            return None
        values: NDArray[Any] = variable.values
        return values

    def read(self, names: Sequence[str], box: Box) -> list[NDArray[np.float32]]:
        """Return the layers over a box, one array each."""
        there = slice(box.y0, box.y1), slice(box.x0, box.x1)
        found = {n: self._stored[n].read(box) for n in names if n in self._stored}
        if other := [n for n in names if n not in found]:
            # In a worker the other cores have their own work, and a cluster is out of reach.
            options = {"scheduler": "synchronous"} if get_worker_info() is not None else {}
            (values,) = compute([self._other[n][there].data for n in other], **options)
            found |= {n: np.asarray(v, np.float32) for n, v in zip(other, values, strict=True)}
        return [found[name] for name in names]

    def read_into(self, out: Mapping[str, NDArray[Any]], box: Box) -> None:
        """Read the layers over a box into arrays of its shape, of the type they are held as."""
        targets = {n: out[n] for n in out if n in self._other}
        there = slice(box.y0, box.y1), slice(box.x0, box.x1)
        lazy = {n: self._other[n][there].data for n in targets}
        if chunked := [n for n in targets if isinstance(lazy[n], da.Array)]:
            # All at once: layers that come of one another are computed once.
            da.store(
                [lazy[n].astype(targets[n].dtype) for n in chunked],
                [targets[n] for n in chunked], lock=False,
            )  # fmt: skip
        for name in targets.keys() - set(chunked):
            targets[name][:] = lazy[name]

        def one(job: tuple[str, int]) -> None:
            name, y = job
            strip = Box(y, min(_next(y), box.y1), box.x0, box.x1)
            self._stored[name].read(strip, out[name][strip.within(box)])

        # Strips of whole shards: they lie in one piece in memory, where they can be decoded to.
        strips = _steps(box.y0, box.y1)
        with ThreadPoolExecutor(CPU_COUNT) as threads:
            list(threads.map(one, product([n for n in out if n in self._stored], strips)))


@dataclass(frozen=True)
class _Stored:
    """A layer as it is stored, and the row and column of it where the scene begins."""

    source: Any
    y: int
    x: int

    def read(self, box: Box, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return a box of it: float32, or in `out` if that is given."""
        where = (
            slice(box.y0 + self.y, box.y1 + self.y), slice(box.x0 + self.x, box.x1 + self.x)
        )  # fmt: skip
        array = _zarr_array(self.source)
        dtype = np.dtype(np.float32) if out is None else out.dtype
        if array is None or array.dtype != dtype:
            values: NDArray[Any] = np.asarray(getter(self.source, where), dtype=dtype)
            if out is None:
                return values
            out[:] = values
            return out
        # Decoded to where it is wanted: fresh memory costs as much as what is decoded into it.
        out = np.empty(box.shape, dtype=dtype) if out is None else out
        array.get_basic_selection(where, out=NDBuffer.from_numpy_array(out))
        return out


def _zarr_array(source: Any) -> Any:
    """Return the Zarr array that xarray would read as it is, or None if it would do more."""
    wrappers = (
        indexing.ImplicitToExplicitIndexingAdapter, indexing.MemoryCachedArray,
        indexing.CopyOnWriteArray, indexing.LazilyIndexedArray,
    )  # fmt: skip
    while isinstance(source, wrappers):
        key = getattr(source, "key", None)
        if key is not None and any(part != slice(None) for part in key.tuple):
            return None
        source = source.array
    return source.get_array() if isinstance(source, ZarrArrayWrapper) else None


def _next(lo: int) -> int:
    """Return where the next shard of a scene begins."""
    return (lo // _BLOCK_PX + 1) * _BLOCK_PX


def _steps(lo: int, hi: int) -> list[int]:
    """Return where blocks begin: at `lo`, and then where shards of the scene do."""
    return [lo, *range(_next(lo), hi, _BLOCK_PX)]


def shared_room() -> float:
    """Return how many bytes there are that processes can share; infinite where nothing says so."""
    shared = Path("/dev/shm")  # noqa: S108  # where processes share memory
    return shutil.disk_usage(shared).free if shared.is_dir() else math.inf


class Seen:
    """How many usable pixels the cells of a box have, as far as the box has been read.

    The coarse level of a mask that nobody has computed: it is filled in as tiles are read, in
    whichever process, and says then where chips cannot be worth having without a look at a pixel.
    It takes 4 bytes a cell and costs a sum over each pixel once; nothing before. For chips of 256
    pixels cells are 32 wide: 39 MB for a box of 100 000 by 100 000 pixels once all of it was read.

    Parameters
    ----------
    box
        Pixels of the scene.
    size
        The chips' width. Cells are about an eighth of it, such that half a chip is whole cells.
    shared
        Whether processes that are sent it fill it in together; each for itself where there is too
        little memory that they can share, as in a container.
    """

    def __init__(self, box: Box, size: int, *, shared: bool):
        self.box, half = box, max(1, size // 2)
        least = min(max(16, size // 8), half)
        self.cell_px = next(n for n in range(least, half + 1) if half % n == 0)
        rows, columns = (-(-length // self.cell_px) for length in box.shape)
        bytes_ = 4 * rows * columns
        if shared and bytes_ <= shared_room() / 2:  # what has not been written to takes no memory
            storage = torch.UntypedStorage._new_shared(bytes_)  # type: ignore[no-untyped-call]
            empty = torch.empty(0, dtype=torch.int32)
            cells = empty.set_(storage, 0, (rows, columns))  # type: ignore[call-overload]
        else:
            cells = torch.from_numpy(np.zeros((rows, columns), dtype=np.int32))
        #: Of each cell its usable pixels and one more; 0 where it has not been read.
        self._cells: torch.Tensor = cells

    def whole_cells(self, box: Box) -> Box:
        """Return the box and what of the cells at its sides it lacks."""
        (top, bottom), (left, right) = self._touched(box)
        whole = Box(
            self.box.y0 + top * self.cell_px, self.box.y0 + bottom * self.cell_px,
            self.box.x0 + left * self.cell_px, self.box.x0 + right * self.cell_px,
        )  # fmt: skip
        return whole.intersect(self.box)

    def _touched(self, box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return where the cells that a box touches begin and end, by row and by column."""
        cell, origin = self.cell_px, self.box
        return (
            ((box.y0 - origin.y0) // cell, -(-(box.y1 - origin.y0) // cell)),
            ((box.x0 - origin.x0) // cell, -(-(box.x1 - origin.x0) // cell)),
        )

    def note(self, usable: NDArray[np.bool_], box: Box) -> None:
        """Fill in the cells of a box, which are whole (see `whole_cells`)."""
        assert box == self.whole_cells(box)
        (top, bottom), (left, right) = self._touched(box)
        cells = self._cells.numpy()[top:bottom, left:right]
        if cells.all():
            return
        ys, xs = (np.arange(0, length, self.cell_px) for length in box.shape)
        rows = [usable[y : y + self.cell_px].sum(axis=0, dtype=np.int32) for y in ys]
        cells[:] = np.add.reduceat(np.array(rows), xs, axis=1) + 1

    def most(self, ys: NDArray[np.int64], xs: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Return how many usable pixels chips that begin there have at most."""
        chips = Box(int(ys.min()), int(ys.max()) + size, int(xs.min()), int(xs.max()) + size)
        (top, bottom), (left, right) = self._touched(chips)
        cells = self._cells.numpy()[top:bottom, left:right]
        counts = np.where(cells > 0, cells - 1, self.cell_px**2)
        sums = np.pad(counts.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        y0, x0 = ys - self.box.y0, xs - self.box.x0
        rows = y0 // self.cell_px - top, -(-(y0 + size) // self.cell_px) - top
        columns = x0 // self.cell_px - left, -(-(x0 + size) // self.cell_px) - left
        inside = (
            sums[rows[1], columns[1]] - sums[rows[0], columns[1]]
            - sums[rows[1], columns[0]] + sums[rows[0], columns[0]]
        )  # fmt: skip
        most: NDArray[np.int64] = np.minimum(inside, size**2)
        return most


class Opened:
    """What was read of a region: gives chips of it. The truth is read first, the rest at need."""

    def __init__(self, region: Region, box: Box):
        self.region, self.box = region, box
        first = list(region.names) if region.held is not None else ["dsm", region.target]
        self._arrays = dict(zip(first, region.read(first, box), strict=True))
        #: Where both the DSM and the truth are there.
        self.usable: NDArray[np.bool_]
        if region.usable is None:
            self._arrays[region.target] = region.within_part(self.truth, box)
            self.usable = np.isfinite(self.dsm) & np.isfinite(self.truth)
            if region.seen is not None and box == region.seen.whole_cells(box):
                region.seen.note(self.usable, box)
        else:
            self.usable = region.usable.numpy()[box.within(region.box)]
        self._rest = [n for n in region.names if n not in self._arrays]

    @property
    def dsm(self) -> NDArray[np.float32]:
        """The initial surface, metres."""
        return self._arrays["dsm"]

    @property
    def truth(self) -> NDArray[np.float32]:
        """The truth, metres; NaN outside the region's part of the scene."""
        return self._arrays[self.region.target]

    def _complete(self) -> None:
        if self._rest:
            values = self.region.read(self._rest, self.box)
            self._arrays.update(zip(self._rest, values, strict=True))
            self._rest = []

    def layer(self, name: str) -> NDArray[Any]:
        """Return a layer over all that was opened, float32, or bool of a mask that is held."""
        if name not in self._arrays:
            self._complete()
        return self._arrays[name]

    def crop(self, chip: Box, out: Mapping[str, NDArray[np.float32]]) -> None:
        """Write a chip into `out`: a 2-D array for each layer and the truth, by name."""
        self._complete()
        place = chip.within(self.box)
        for name, array in out.items():
            array[:] = self._arrays[name][place]


class Region:
    """A part of a scene, with the layers and the truth that chips of it have.

    Layers that are the name of a plane are computed, the others read.
    """

    def __init__(
        self, reader: SceneReader, part: Part, layers: Sequence[str], target: str,
        planes: Sequence[Plane] = (), *, scene: int = 0,
    ):  # fmt: skip
        self.reader, self.part, self.scene = reader, part, scene
        self.layers, self.target, self.planes = tuple(layers), target, tuple(planes)
        self.held: dict[str, torch.Tensor] | None = None
        #: Where both the DSM and the truth are there, if the region is held.
        self.usable: torch.Tensor | None = None
        #: Else what is known of that, once `watch` has been called.
        self.seen: Seen | None = None

    @property
    def box(self) -> Box:
        """The pixels of the scene in which chips may lie."""
        return self.part.box

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, planes among them, the DSM and the truth."""
        return tuple(dict.fromkeys((*self.layers, "dsm", self.target)))

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        pixel = sum(self._held_as(name).itemsize for name in self.names)
        return pixel * self.box.shape[0] * self.box.shape[1]

    def hold(self, *, shared: bool) -> None:
        """Take the region into memory; `shared`: into memory that worker processes can see."""
        there = self.box.within(Box(0, self.reader.shape[0], 0, self.reader.shape[1]))
        held, read = {}, {}
        for name in self.names:
            array = None if shared or self._plane(name) else self.reader.in_memory(name)
            if array is not None and array.flags.writeable:  # torch warns of what is not
                held[name] = torch.from_numpy(array[there])
                continue
            if shared:
                held[name] = torch.empty(self.box.shape, dtype=_TORCH[self._held_as(name)])
                held[name].share_memory_()  # type: ignore[no-untyped-call]  # of torch
            else:
                # NumPy asks for huge pages, torch does not: crops a third faster.
                held[name] = torch.from_numpy(np.empty(self.box.shape, self._held_as(name)))
            if not self._plane(name):
                read[name] = held[name].numpy()
        self.reader.read_into(read, self.box)
        self._hold_planes(held)
        truth = self.within_part(held[self.target].numpy(), self.box)
        held[self.target] = torch.from_numpy(truth)
        usable = np.empty(self.box.shape, dtype=bool)
        for y in range(0, len(usable), _BLOCK_PX):
            rows = slice(y, y + _BLOCK_PX)
            np.isfinite(truth[rows], out=usable[rows])
            usable[rows] &= np.isfinite(held["dsm"].numpy()[rows])
        self.held, self.usable = held, torch.from_numpy(usable)
        for tensor in (held[self.target], self.usable) if shared else ():
            tensor.share_memory_()  # type: ignore[no-untyped-call]  # of torch

    def _hold_planes(self, held: Mapping[str, torch.Tensor]) -> None:
        """Compute planes block by block, of what is held where that is enough."""
        blocks = [
            Box(y, min(_next(y), self.box.y1), x, min(_next(x), self.box.x1))
            for y, x in product(_steps(self.box.y0, self.box.y1), _steps(self.box.x0, self.box.x1))
        ]

        def one(job: tuple[Plane, Box]) -> None:
            plane, block = job
            made = held[plane.name].numpy()
            made[block.within(self.box)] = self._compute(plane, block, held)

        planes = [plane for plane in self.planes if plane.name in held]
        with ThreadPoolExecutor(CPU_COUNT) as threads:
            list(threads.map(one, product(planes, blocks)))

    def watch(self, size: int, *, shared: bool) -> None:
        """Remember from now on where chips of a size cannot be; reads nothing."""
        self.seen = Seen(self.box, size, shared=shared)

    def may_have(
        self, ys: NDArray[np.int64], xs: NDArray[np.int64], size: int, least: float
    ) -> bool:
        """Return False if none of the chips that begin there has `least` usable pixels.

        Nothing is read for it: True is what is said of what has not been read yet.
        """
        if self.seen is None:
            return True
        if (self.seen.most(ys, xs, size) < least).all():
            return False
        tile = Box(int(ys.min()), int(ys.max()) + size, int(xs.min()), int(xs.max()) + size)
        inside = self.part.inside(tile)
        return inside is None or bool(inside.any())

    def within_part(self, truth: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
        """Return the truth over a box, NaN outside the region's part of the scene."""
        inside = self.part.inside(box)
        return truth if inside is None else np.where(inside, truth, np.float32(np.nan))

    def _held_as(self, name: str) -> np.dtype[Any]:
        # The truth is cut off by NaN.
        made = name == self.target or self._plane(name) is not None
        return np.dtype(np.float32) if made else self.reader.held_as(name)

    def _plane(self, name: str) -> Plane | None:
        return next((plane for plane in self.planes if plane.name == name), None)

    def _compute(
        self, plane: Plane, out: Box, held: Mapping[str, torch.Tensor] | None = None
    ) -> NDArray[np.float32]:
        height, width = self.reader.shape
        needed = plane.region(out).intersect(Box(0, height, 0, width))
        # The truth that is held ends with the part, that of the scene does not.
        there = set(held or ()) - {self.target}
        if held and needed == needed.intersect(self.box) and there.issuperset(plane.inputs):
            place = needed.within(self.box)
            arrays = [np.asarray(held[n].numpy()[place], np.float32) for n in plane.inputs]
        else:
            arrays = self.reader.read(plane.inputs, needed)
        return np.asarray(plane.kernel(arrays, out=out, region=needed), dtype=np.float32)

    def read(self, names: Sequence[str], box: Box) -> list[NDArray[Any]]:
        """Return layers over a box of the scene, float32; or views of what is held."""
        if self.held is not None:
            place = box.within(self.box)
            return [self.held[name].numpy()[place] for name in names]
        planes = {name: plane for name in names if (plane := self._plane(name))}
        plain = [name for name in names if name not in planes]
        found = dict(zip(plain, self.reader.read(plain, box), strict=True))
        found |= {name: self._compute(plane, box) for name, plane in planes.items()}
        return [found[name] for name in names]

    def open(self, box: Box) -> Opened:
        """Return what lies in a box of the scene, to take chips of it."""
        return Opened(self, box)

    def survey(self, box: Box) -> Opened:
        """Return what lies in a box, and a little round it, so that `seen` knows all of it."""
        return Opened(self, box if self.seen is None else self.seen.whole_cells(box))

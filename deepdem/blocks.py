"""The Dask glue: an output chunk from a region of its inputs, without a word of arithmetic.

Reprojection needs for one output chunk some window of a source raster; inference needs the chunk
and a halo. Both are `map_regions`: it finds the input blocks that a region touches, has the small
part that is needed cut out of each (so that no neighbour stays in memory for the sake of its
edge), and calls a kernel with the assembled NumPy arrays. Output chunks share nothing but those
cuts: they can be computed in any order, anywhere, and lost and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, List, Task, TaskRef
from numpy.typing import DTypeLike, NDArray

__all__ = ["Box", "Chunks", "chunks_of", "map_regions"]

Chunks: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Box:
    """Pixels [y0, y1) by [x0, x1) of a raster; a region may be empty."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def empty(self) -> bool:
        """Whether there is no pixel in it."""
        return self.y1 <= self.y0 or self.x1 <= self.x0

    def within(self, other: Box) -> tuple[slice, slice]:
        """Return the slices that pick this box out of an array that covers `other`."""
        return (
            slice(self.y0 - other.y0, self.y1 - other.y0),
            slice(self.x0 - other.x0, self.x1 - other.x0),
        )

    def intersect(self, other: Box) -> Box:
        """Return the pixels that both have."""
        return Box(
            max(self.y0, other.y0),
            min(self.y1, other.y1),
            max(self.x0, other.x0),
            min(self.x1, other.x1),
        )


#: A kernel: (arrays of the region, one for each input; the output box; the region) and the
#: keywords that are the same for every chunk. Gives the output block.
Kernel: TypeAlias = Callable[..., NDArray[Any]]


def chunks_of(shape: tuple[int, int], size: int | tuple[int, int]) -> Chunks:
    """Return the chunks of a raster of `shape` cut into blocks of `size` pixels."""
    sizes = (size, size) if isinstance(size, int) else size
    normal: Chunks = da.core.normalize_chunks(sizes, shape=shape)
    return normal


def _edges(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _touched(edges: list[int], lo: int, hi: int) -> range:
    first = int(np.searchsorted(edges, lo, side="right")) - 1
    last = int(np.searchsorted(edges, hi, side="left"))
    return range(first, last)


def _cut(block: NDArray[Any], y: slice, x: slice) -> NDArray[Any]:
    # A copy, not a view: a view would keep the whole neighbour alive.
    return np.ascontiguousarray(block[y, x])


def _keywords(names: tuple[str, ...], *values: Any) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def _assemble(
    kernel: Kernel,
    pieces: list[list[NDArray[Any]]],
    places: list[list[tuple[slice, slice]]],
    region: Box,
    out: Box,
    common: Mapping[str, Any],
) -> NDArray[Any]:
    arrays = []
    for parts, slots in zip(pieces, places, strict=True):
        if len(parts) == 1 and parts[0].shape == region.shape:
            arrays.append(parts[0])
            continue
        whole = np.empty(region.shape, dtype=parts[0].dtype if parts else np.float32)
        for part, slot in zip(parts, slots, strict=True):
            whole[slot] = part
        arrays.append(whole)
    return kernel(arrays, out=out, region=region, **common)


class _Source:
    """One input array: its block grid, and the cuts that were made of it."""

    def __init__(self, array: da.Array, token: str):
        self.array, self.token = array, token
        self.y, self.x = (_edges(sizes) for sizes in array.chunks)
        self.cuts: dict[Any, Task] = {}

    def pieces(self, region: Box, where: tuple[int, int]) -> tuple[list[Any], list[Any]]:
        """Return references to what covers `region`, and the place of each in it."""
        parts, places = [], []
        rows = _touched(self.y, region.y0, region.y1)
        columns = _touched(self.x, region.x0, region.x1)
        for i, j in product(rows, columns):
            block = Box(self.y[i], self.y[i + 1], self.x[j], self.x[j + 1])
            piece = block.intersect(region)
            if piece.empty:
                continue
            source = (self.array.name, i, j)
            if piece == block:
                parts.append(TaskRef(source))
            else:
                key = (f"cut-{self.token}", *where, i, j)
                self.cuts[key] = Task(key, _cut, TaskRef(source), *piece.within(block))
                parts.append(TaskRef(key))
            places.append(piece.within(region))
        return parts, places


def map_regions(
    kernel: Kernel,
    arrays: Sequence[da.Array],
    *,
    chunks: Chunks,
    region: Callable[[Box], Box],
    dtype: DTypeLike,
    name: str,
    common: Mapping[str, Any] | None = None,
    planes: int | None = None,
) -> da.Array:
    """Return a lazy array each of whose chunks is a kernel of a region of the inputs.

    Parameters
    ----------
    kernel
        ``kernel(arrays, out=Box, region=Box, **common)`` gives the block of the output box:
        shape ``out.shape``, or ``(planes, *out.shape)``. `arrays` are NumPy, each of the region's
        shape; it must not write to them.
    arrays
        2-D Dask arrays (y, x), all of one shape; their chunks may differ.
    chunks
        The chunks of the output; it need not have the shape of the inputs.
    region
        Takes an output box, gives the input box that its kernel needs (within the inputs, may
        be empty: the kernel then gets arrays without a pixel).
    dtype
        Of the output.
    name
        The prefix of the task names.
    common
        Keywords that are the same for every chunk. Each stands once in the graph, and on a
        cluster reaches each worker once.
    planes
        The length of a leading dimension of the output, if it has one.

    Returns
    -------
    dask.array.Array
        Shape (y, x) or (planes, y, x). The task names are a deterministic function of all inputs.
    """
    common = dict(common or {})
    ys, xs = (_edges(sizes) for sizes in chunks)
    boxes = {
        (i, j): Box(ys[i], ys[i + 1], xs[j], xs[j + 1])
        for i, j in product(range(len(chunks[0])), range(len(chunks[1])))
    }
    needed = {where: region(box) for where, box in boxes.items()}
    regions = np.array([(r.y0, r.y1, r.x0, r.x1) for r in needed.values()])
    token = tokenize(
        kernel, [array.name for array in arrays], chunks, regions, np.dtype(dtype), common, planes
    )
    name = f"{name}-{token}"
    graph: dict[Any, Any] = {}
    for keyword, value in common.items():
        graph[f"{name}-{keyword}"] = DataNode(f"{name}-{keyword}", value)
    shared = [TaskRef(f"{name}-{keyword}") for keyword in common]
    graph[f"{name}-common"] = Task(f"{name}-common", _keywords, tuple(common), *shared)
    sources = [_Source(array, f"{token}-{n}") for n, array in enumerate(arrays)]
    for where, box in boxes.items():
        parts, places = [], []
        for source in sources:
            part, place = source.pieces(needed[where], where)
            parts.append(List(*part))
            places.append(place)
        key: tuple[str | int, ...] = (name, *where) if planes is None else (name, 0, *where)
        graph[key] = Task(
            key, _assemble, kernel, List(*parts), places, needed[where], box,
            TaskRef(f"{name}-common"),
        )  # fmt: skip
    for source in sources:
        graph.update(source.cuts)
    inputs: list[Any] = list(arrays)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=inputs)
    out_chunks = chunks if planes is None else ((planes,), *chunks)
    return da.Array(layers, name, chunks=out_chunks, dtype=np.dtype(dtype))

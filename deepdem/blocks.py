"""The Dask glue: an output chunk from a region of its inputs, without a word of arithmetic.

Reprojection needs for one output chunk some window of a source raster; inference needs the chunk
and a halo. Both are `map_regions`: it finds the input blocks that a region touches and calls a
kernel with the assembled NumPy arrays. Output chunks share nothing but slivers of the inputs:
they can be computed in any order, anywhere, and lost and computed again.

A raster that is stored (a Zarr array, a file) can be read region by region by the tasks that need
it: a halo is read twice rather than kept, memory depends on the chunk alone, and there is one task
a chunk. An input that is itself computed is computed block by block, and of a block that several
output chunks need one task cuts all the slivers at once, so that the block itself can go. A task
for each sliver lost: Dask runs it only when its consumer is due, and the whole block waits until
then (131 blocks of a 16 by 16 raster in memory, against 21 now).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from operator import getitem
from typing import Any, TypeAlias

import dask.array as da
import dask.threaded
import numpy as np
from dask import core
from dask._task_spec import convert_legacy_graph  # not public, but its tasks are
from dask.array.chunk import getitem as slicing
from dask.array.core import getter, getter_nofancy
from dask.array.optimization import optimize
from dask.base import clone_key, get_scheduler, tokenize
from dask.blockwise import Blockwise
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.optimization import cull
from dask.task_spec import Alias, DataNode, List, Task, TaskRef
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "TABLES",
    "Box",
    "Chunks",
    "Kernel",
    "Unread",
    "chunks_of",
    "made_with",
    "map_regions",
    "read_again",
    "settle",
    "stored_source",
    "unzipped",
]

#: How the key of a task begins that many chunks wait for, and that itself waits for many.
TABLES = "deepdem-table"

Chunks: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
#: Row and column of a block, or of an output chunk.
Where: TypeAlias = tuple[int, int]


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
#: keywords that are the same for every chunk. Gives the output block, or what `unzipped` takes.
Kernel: TypeAlias = Callable[..., NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]]


def chunks_of(shape: tuple[int, int], size: int | tuple[int, int]) -> Chunks:
    """Return the chunks of a raster of `shape` cut into blocks of `size` pixels."""
    sizes = (size, size) if isinstance(size, int) else size
    normal: Chunks = da.core.normalize_chunks(sizes, shape=shape)
    return normal


def _edges(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _touched(edges: list[int], lo: int, hi: int) -> range:
    return range(bisect_right(edges, lo) - 1, bisect_left(edges, hi))


class _Again(MaterializedLayer):
    """Tasks that make once more what the array `original` is, unless `settle` has come by."""

    original: str


def read_again(array: da.Array, *, seed: str, until_settled: bool = False) -> da.Array:
    """Return the same array by other tasks: what it needs is read and computed once more.

    With `until_settled`, only as long as `settle` has not made it needless.

    Two consumers of one array that are far apart in time would keep all of it in memory between
    them. `dask.graph_manipulation.clone` is meant for this, but as of Dask 2026.8 it renames the
    keys of a materialised layer (any slicing makes one) and leaves the tasks under them as they
    were, so that the clone depends on what it was cloned from.
    """
    graph = convert_legacy_graph(dict(array.__dask_graph__()))
    # Objects that are only held (files, the arrays of a scene in memory) need no second name.
    names = {
        key: clone_key(key, seed)
        for key, task in graph.items()
        if not isinstance(task, DataNode) and isinstance(key, str | tuple)
    }
    layer = {new: graph[old].substitute(names, key=new) for old, new in names.items()}
    name = clone_key(array.name, seed)
    if name not in {key[0] for key in layer if isinstance(key, tuple)}:
        return array  # all of it is held already
    made: Any = layer
    if until_settled:
        made = _Again(layer)
        made.original = array.name
    inputs: list[Any] = [array]
    return da.Array(
        HighLevelGraph.from_collections(name, made, dependencies=inputs),
        name, array.chunks, meta=array._meta,
    )  # fmt: skip


def settle(arrays: Sequence[da.Array]) -> list[da.Array]:
    """Return the same arrays, the small tables that their chunks wait for computed.

    A table for which the whole scene must be read (`TABLES`) makes every chunk wait, and Dask keep
    whatever it has read of other layers by then; where that had to be avoided, layers are read
    twice (`read_again`). With the tables there, neither is so: a chunk of all layers waits for
    nothing but its own pixels. To be used where all layers are stored together.
    """
    graph = HighLevelGraph.merge(*(array.dask for array in arrays))
    # Dask names a layer after its key, and puts a token behind it where it optimised the graph.
    homes = {
        key: name
        for name, layer in graph.layers.items()
        if isinstance(name, str) and name.startswith(f"{TABLES}-")
        for key in layer.get_output_keys()
    }
    schedule = get_scheduler() or dask.threaded.get
    tables = schedule(optimize(graph, list(homes)), list(homes)) if homes else ()
    layers, needs = dict(graph.layers), dict(graph.dependencies)
    for name, layer in graph.layers.items():
        if isinstance(layer, _Again):
            same = {key: (layer.original, *key[1:]) for key in layer if key[0] == name}
            layers[name] = MaterializedLayer({key: Alias(key, was) for key, was in same.items()})
            needs[name] = {layer.original}
    for (key, name), table in zip(homes.items(), tables, strict=True):
        layers[name] = MaterializedLayer({key: DataNode(key, table)})
        needs[name] = set()
    # As plain tasks: Dask would fuse layers that work block by block, and what two of them need
    # would be made twice.
    keys = [key for array in arrays for key in core.flatten(array.__dask_keys__())]
    tasks = cull(convert_legacy_graph(dict(HighLevelGraph(layers, needs))), keys)[0]
    # Dask's order passes over data that many tasks need, but finishes one by one the many that wait
    # for a task, all of them before any other layer.
    for key, task in tasks.items():
        if isinstance(task, Task) and task.func is _keywords:
            held = {need: tasks[need].value for need in task.dependencies}
            tasks[key] = DataNode(key, task(held))
    return [da.Array(tasks, array.name, array.chunks, meta=array._meta) for array in arrays]


def _cut(
    block: NDArray[Any], places: Mapping[Where, tuple[slice, slice]]
) -> dict[Where, NDArray[Any]]:
    # Copies, not views: a view would keep the whole block alive.
    return {where: block[place].copy() for where, place in places.items()}


def _keywords(names: tuple[str, ...], *values: Any) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Unread:
    """A region of a stored raster that is read when it is sliced, as often as it is."""

    stored: Any
    region: Box

    @property
    def shape(self) -> tuple[int, int]:
        """The region's height and width in pixels."""
        return self.region.shape

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[Any]:
        """Return these rows and columns of the region: slices of pixels that it has."""
        ends = (self.region.y0, self.region.y1), (self.region.x0, self.region.x1)
        there = tuple(
            slice(lo + (part.start or 0), hi if part.stop is None else lo + part.stop)
            for part, (lo, hi) in zip(place, ends, strict=True)
        )
        pixels: NDArray[Any] = np.asarray(getter(self.stored, there))
        return pixels


def _assemble(
    kernel: Kernel,
    pieces: list[list[Any]],
    places: list[list[tuple[slice, slice]] | None],
    where: Where,
    region: Box,
    out: Box,
    common: Mapping[str, Any],
    sliced: bool = False,
) -> Any:
    arrays: list[Any] = []
    for parts, slots in zip(pieces, places, strict=True):
        if slots is None:
            unread = Unread(parts[0], region)
            arrays.append(unread if sliced else unread[:, :])
            continue
        blocks = [part[where] if isinstance(part, dict) else part for part in parts]
        if len(blocks) == 1 and blocks[0].shape == region.shape:
            arrays.append(blocks[0])
            continue
        whole = np.empty(region.shape, dtype=blocks[0].dtype if blocks else np.float32)
        for block, slot in zip(blocks, slots, strict=True):
            whole[slot] = block
        arrays.append(whole)
    return kernel(arrays, out=out, region=region, **common)


def _stored(array: da.Array) -> Any:
    """Return the key of what `array` is stored in, or None unless it is that, cut into chunks.

    That is so where each chunk's task is ``getter(stored, place)``, as `dask.array.from_array`
    makes it for xarray's lazy arrays. The first and the last chunk are looked at: all of a
    Blockwise layer are made by one rule.
    """
    layer = array.dask.layers.get(array.name)
    if not isinstance(layer, Blockwise):
        return None
    ys, xs = (_edges(sizes) for sizes in array.chunks)
    rows, columns = array.numblocks
    for i, j in {(0, 0), (rows - 1, columns - 1)}:
        task = layer[(array.name, i, j)]
        place = slice(ys[i], ys[i + 1], None), slice(xs[j], xs[j + 1], None)
        if not isinstance(task, Task) or task.func not in (getter, getter_nofancy):
            return None
        if len(task.args) != 2 or len(task.dependencies) != 1:
            return None
        where = task.args[1]
        if (where.value if isinstance(where, DataNode) else where) != place:
            return None
    (key,) = task.dependencies
    held = array.dask.layers.get(key, {}).get(key)
    stored = held.value if isinstance(held, DataNode) else held
    return key if getattr(stored, "shape", None) == array.shape else None


def stored_source(array: da.Array) -> tuple[Any, int, int] | None:
    """Return what `array` is stored in and the row and column of it where the array begins.

    None unless every chunk is read from one raster, by plain slices that together are one
    rectangle of it: an array that was opened, or a part of one, and nothing was computed of it.
    Every chunk is looked at, since a concatenation can have the first and the last in their
    places and others not.
    """
    ys, xs = (_edges(sizes) for sizes in array.chunks)
    begins = set()
    for i, j in product(*map(range, array.numblocks)):
        origin = _origin(array, (array.name, i, j))
        if origin is None:
            return None
        key, y, x = origin
        begins.add((key, y - ys[i], x - xs[j]))
        if len(begins) > 1:
            return None
    ((key, y, x),) = begins
    held = array.dask.layers.get(key, {}).get(key)
    stored = held.value if isinstance(held, DataNode) else held
    return (stored, y, x) if len(getattr(stored, "shape", ())) == 2 else None


def _origin(array: da.Array, key: Any) -> tuple[Any, int, int] | None:
    """Return the key of what a chunk is read from, and the first row and column read."""
    y = x = 0
    while True:
        task = array.dask.layers.get(key[0], {}).get(key)
        if isinstance(task, Alias):
            key = task.target
            continue
        if not isinstance(task, Task) or len(task.args) != 2 or len(task.dependencies) != 1:
            return None
        where = task.args[1]
        place = where.value if isinstance(where, DataNode) else where
        if not isinstance(place, tuple) or not all(
            isinstance(s, slice) and s.step in (None, 1) and (s.start or 0) >= 0 for s in place
        ):
            return None
        y, x = y + (place[0].start or 0), x + (place[1].start or 0)
        (key,) = task.dependencies
        if task.func in (getter, getter_nofancy):
            return key, y, x
        if task.func is not slicing:
            return None


@dataclass(frozen=True)
class _Piece:
    """What a region needs of one block: where it is in the block (None: all of it) and in both."""

    block: Where
    of_block: tuple[slice, slice] | None
    of_region: tuple[slice, slice]


def _pieces(edges: tuple[list[int], list[int]], region: Box) -> list[_Piece]:
    """Return the pieces that cover `region`, of blocks with these edges."""
    y, x = edges
    rows, columns = _touched(y, region.y0, region.y1), _touched(x, region.x0, region.x1)
    pieces = []
    for i, j in product(rows, columns):
        block = Box(y[i], y[i + 1], x[j], x[j + 1])
        piece = block.intersect(region)
        if not piece.empty:
            part = None if piece == block else piece.within(block)
            pieces.append(_Piece((i, j), part, piece.within(region)))
    return pieces


class _Source:
    """One input array: its block grid, and the slivers that are cut of its blocks."""

    def __init__(self, array: da.Array, token: str, *, direct: bool, reread: bool):
        self.array, self.token = array, token
        self.stored = _stored(array) if direct else None
        # Needless for what is stored: no block of it is ever held.
        twice = reread and self.stored is None
        self.again = read_again(array, seed=token) if twice else array
        self.edges = (_edges(array.chunks[0]), _edges(array.chunks[1]))
        self.slivers: dict[Where, dict[Where, tuple[slice, slice]]] = {}

    def refer(self, pieces: list[_Piece], where: Where) -> list[Any]:
        """Return references to the pieces that the output chunk at `where` needs."""
        parts = []
        for piece in pieces:
            if piece.of_block is None:
                parts.append(TaskRef((self.array.name, *piece.block)))
            else:
                self.slivers.setdefault(piece.block, {})[where] = piece.of_block
                parts.append(TaskRef((f"cut-{self.token}", *piece.block)))
        return parts

    def cuts(self) -> Iterator[Task]:
        """Give the tasks that cut the slivers, one a block."""
        for block, places in self.slivers.items():
            key = (f"cut-{self.token}", *block)
            yield Task(key, _cut, TaskRef((self.again.name, *block)), places)


class _References:
    """The references of an output chunk to what covers its region of each source.

    Layers of one scene are mostly cut alike: where their pieces lie is found once for all.
    """

    def __init__(self, sources: Sequence[_Source]):
        self.sources = sources
        self.edges = {s.array.chunks: s.edges for s in sources if s.stored is None}

    def __call__(
        self, region: Box, where: Where
    ) -> tuple[List, list[list[tuple[slice, slice]] | None]]:
        """Return references, and the places in the region of what they give; None: it is cut."""
        pieces = {chunks: _pieces(edges, region) for chunks, edges in self.edges.items()}
        places = {chunks: [piece.of_region for piece in found] for chunks, found in pieces.items()}
        parts = [
            List(*(source.refer(pieces[source.array.chunks], where)))
            if source.stored is None
            else List(TaskRef(source.stored))
            for source in self.sources
        ]
        return List(*parts), [
            None if source.stored is not None else places[source.array.chunks]
            for source in self.sources
        ]


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
    direct: bool = False,
    sliced: bool = False,
    reread: bool = False,
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
    direct
        Whether the kernel's task itself reads its region of an input that is stored. For kernels
        that end a graph or cost much: tasks that need no other are begun early, and what
        a cheap one makes would wait for its consumer.
    sliced
        Whether the kernel is given such inputs as `Unread`, to slice them when it is due.
    reread
        Whether slivers are cut from inputs that are read, or computed, once more for that. Then
        a block is in memory only while its own output chunk is computed, whatever the width of
        the raster. Worth it where the kernel is dear and the inputs are cheap.

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
        kernel,
        [array.name for array in arrays],
        chunks,
        regions,
        np.dtype(dtype),
        common,
        planes,
        reread,
    )
    name = f"{name}-{token}"
    graph: dict[Any, Any] = {}
    for keyword, value in common.items():
        graph[f"{name}-{keyword}"] = DataNode(f"{name}-{keyword}", value)
    shared = [TaskRef(f"{name}-{keyword}") for keyword in common]
    graph[f"{name}-common"] = Task(f"{name}-common", _keywords, tuple(common), *shared)
    sources = [
        _Source(array, f"{token}-{n}", direct=direct, reread=reread)
        for n, array in enumerate(arrays)
    ]
    refer = _References(sources)
    for where, box in boxes.items():
        parts, places = refer(needed[where], where)
        key: tuple[str | int, ...] = (name, *where) if planes is None else (name, 0, *where)
        graph[key] = Task(
            key, _assemble, kernel, parts, places, where, needed[where], box,
            TaskRef(f"{name}-common"), sliced,
        )  # fmt: skip
    inputs: list[Any] = []
    for source in sources:
        graph.update({task.key: task for task in source.cuts()})
        inputs += [source.array, source.again]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=inputs)
    out_chunks = chunks if planes is None else ((planes,), *chunks)
    return da.Array(layers, name, chunks=out_chunks, dtype=np.dtype(dtype))


def unzipped(both: da.Array, *, planes: int, dtypes: tuple[DTypeLike, DTypeLike]) -> list[da.Array]:
    """Return two lazy arrays of one whose kernel gives two things of each block.

    Parameters
    ----------
    both
        As `map_regions` gives it; the kernel gives ``(block, number)``: ``(planes, *out.shape)``
        and ``(1, 1)``.
    planes
        The length of the first one's leading dimension.
    dtypes
        Of both.

    Returns
    -------
    list of dask.array.Array
        (plane, y, x); (row of blocks, column of blocks). Computed together they cost no more than
        the first: see `made_with`.
    """
    ones = tuple((1,) * n for n in both.numblocks)
    parts = []
    for n, (chunks, lead) in enumerate(((((planes,), *both.chunks), (0,)), (ones, ()))):
        name = f"{both.name}-{n}"
        graph: dict[Any, Any] = {}
        for where in product(*map(range, both.numblocks)):
            key: tuple[str | int, ...] = (name, *lead, *where)
            graph[key] = Task(key, getitem, TaskRef((both.name, *where)), n)
        inputs: list[Any] = [both]
        layers = HighLevelGraph.from_collections(name, graph, dependencies=inputs)
        parts.append(da.Array(layers, name, chunks=chunks, dtype=np.dtype(dtypes[n])))
    return parts


def made_with(one: da.Array, other: da.Array) -> bool:
    """Return whether `one`, of `unzipped`, comes of work that `other` needs done in any case."""
    (both,) = one.dask.dependencies[one.name]
    return both in other.dask.layers

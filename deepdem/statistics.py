"""Statistics of a scene that merge over chunks: moments, percentiles, the DSM scale.

One pass: each chunk of each layer becomes one small summary (NumPy only), summaries merge in a
tree, and what is said of the scene is a function of the merged summaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from dask.layers import ArraySliceDep
from numpy.typing import NDArray

from deepdem.layers import describe
from deepdem.windows import Axis

__all__ = [
    "CHIP_SIZES",
    "STATISTICS",
    "Histogram",
    "merge_tasks",
    "plan_statistics",
    "robust_mean",
    "stored_statistics",
]

Array: TypeAlias = NDArray[Any]
Place: TypeAlias = tuple[slice, slice]  # of a block in the scene, in pixels from its origin

#: The attribute of a scene that holds what `plan_statistics` says of it.
STATISTICS = "deepdem_statistics"
#: The widths of chips, pixels, for which a scene knows its DSM scale.
CHIP_SIZES = (64, 128, 256, 512, 1024)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# Values are counted by the upper bits of an order-preserving key of their float32: 11 bits of
# mantissa, so that a bin is at most 1/2048 of the value wide, and any range of values fits.
_KEY_BITS = 20
_DROP, _SIGN = np.uint32(32 - _KEY_BITS), np.uint32(0x80000000)
_TINY = 1e-30
_CELL_PX, _STRIP_PX = 64, 256
_TILE = 4  # a task merges the summaries of so many by so many chunks


# --- kernels: NumPy only -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Histogram:
    """The occupied bins of some values, ascending, and how many fall into each; exact to add up.

    Attributes
    ----------
    keys, counts
        Bins by their place in the order of all float32, and the values in each.
    low, high
        The least and the greatest value; infinite where there is none.
    """

    keys: NDArray[np.uint32]
    counts: NDArray[np.int64]
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: Array) -> Histogram:
        """Return the histogram of finite float32 values of any shape."""
        if not values.size:
            return cls(np.empty(0, np.uint32), np.empty(0, np.int64))
        low, high = values.min(), values.max()
        bits = np.ascontiguousarray(values).view(np.uint32).ravel()
        if low > 0 or (low == 0 and not np.signbit(low) and (bits < 0x80000000).all()):
            ordered, sign = bits >> _DROP, _SIGN >> _DROP
        else:
            # A negative number's bits run backwards: flip all of them, of a positive one the sign.
            ordered = bits ^ ((np.uint32(0) - (bits >> np.uint32(31))) | _SIGN)
            ordered >>= _DROP
            sign = np.uint32(0)
        least = ordered.min()
        ordered -= least
        counts = np.bincount(ordered)
        first = int(least + sign)
        filled = np.flatnonzero(counts)
        return cls(
            (filled + first).astype(np.uint32), counts[filled],
            float(low), float(high),
        )  # fmt: skip

    @classmethod
    def merge(cls, parts: Iterable[Histogram]) -> Histogram:
        """Return the histogram of all values of `parts`."""
        parts = [p for p in parts if p.keys.size]
        if len(parts) < 2:
            return parts[0] if parts else cls.of(np.empty(0, np.float32))
        keys, place = np.unique(np.concatenate([p.keys for p in parts]), return_inverse=True)
        # Weights are float64: exact up to 2**53 values.
        counts = np.bincount(place, np.concatenate([p.counts for p in parts])).astype(np.int64)
        return cls(keys, counts, min(p.low for p in parts), max(p.high for p in parts))

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    def edges(self) -> tuple[Array, Array]:
        """Return where each bin begins and ends, within the least and the greatest value."""
        ends = [_value_of(self.keys.astype(np.int64) + step) for step in (0, 1)]
        return np.clip(ends[0], self.low, self.high), np.clip(ends[1], self.low, self.high)

    def below(self, values: Array) -> Array:
        """Return how many lie below each of ascending `values`; spread evenly within a bin."""
        starts, ends = self.edges()
        total = np.cumsum(self.counts)
        x = np.stack([starts, ends], axis=1).ravel()
        y = np.stack([total - self.counts, total], axis=1).ravel()
        return np.interp(values, x, y)

    def quantiles(self, q: Sequence[float]) -> Array:
        """Return the `q` quantiles, each to 1/2048 of its value; NaN where there is no value."""
        if not self.keys.size:
            return np.full(len(q), np.nan)
        starts, ends = self.edges()
        total = np.cumsum(self.counts)
        wanted = np.asarray(q) * total[-1]
        at = np.minimum(np.searchsorted(total, wanted), len(total) - 1)
        share = np.clip(1 - (total[at] - wanted) / self.counts[at], 0, 1)
        found: Array = starts[at] + share * (ends[at] - starts[at])
        return found


def _value_of(keys: NDArray[np.int64]) -> Array:
    """Return the least value of each bin."""
    ordered = (np.clip(keys, 0, 2**_KEY_BITS - 1) << int(_DROP)).astype(np.uint32)
    bits = np.where(ordered >> np.uint32(31), ordered ^ np.uint32(0x80000000), ~ordered)
    # Beyond infinity, which bounds the greatest finite bin, are the NaNs, which are never counted.
    big = float(np.finfo(np.float32).max)
    return np.nan_to_num(bits.view(np.float32), nan=big, posinf=big, neginf=-big).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Count, mean and sum of squares about it of the heights in cells from (`y`, `x`) on."""

    y: int
    x: int
    n: Array
    mean: Array
    m2: Array


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """All that is said of a layer, of some of its pixels; summaries merge.

    Attributes
    ----------
    pixels, count
        All pixels, and those with a value.
    mean, m2
        Of the values: their mean, and the sum of squares about it.
    histogram
        Of the values.
    cells
        For the DSM scale: the heights' moments cell by cell.
    """

    pixels: int
    count: int
    mean: float
    m2: float
    histogram: Histogram
    cells: tuple[_Cells, ...] = ()

    @classmethod
    def merge(cls, parts: Iterable[LayerSummary]) -> LayerSummary:
        """Return the summary of the union; moments by Chan, Golub & LeVeque (1979), eq. 2.1."""
        parts = list(parts)
        n = np.array([p.count for p in parts], np.float64)
        means = np.array([p.mean for p in parts])
        mean = float(n @ means / n.sum()) if n.sum() else 0.0
        return cls(
            sum(p.pixels for p in parts),
            sum(p.count for p in parts),
            mean,
            float(sum(p.m2 for p in parts) + n @ np.square(means - mean)),
            Histogram.merge(p.histogram for p in parts),
            tuple(cell for p in parts for cell in p.cells),
        )


def summarise(
    values: Array, place: Place, *, edges: tuple[Array, Array] | None = None
) -> LayerSummary:
    """Return the summary of a block, which lies at `place`; `edges` are those of DSM cells.

    In strips that a processor's cache holds: quicker, and what is needed on the way is small.
    """
    rows, columns = place
    first = rows.start - rows.start % _STRIP_PX
    parts = []
    for top in range(first, rows.stop, _STRIP_PX):
        strip = slice(max(top, rows.start), min(top + _STRIP_PX, rows.stop))
        part = values[strip.start - rows.start : strip.stop - rows.start]
        parts.append(_summarise_strip(part, (strip, columns), edges))
    return LayerSummary.merge(parts)


def _summarise_strip(
    values: Array, place: Place, edges: tuple[Array, Array] | None
) -> LayerSummary:
    if values.dtype != np.float32:
        values = values.astype(np.float32)
    known = np.isfinite(values)
    finite = values if known.all() else values[known]
    n = finite.size
    mean = float(finite.mean(dtype=np.float64)) if n else 0.0
    # Differences from the mean are small: float32 is enough for them.
    off = finite - np.float32(mean)
    shift = float(off.mean(dtype=np.float64)) if n else 0.0
    m2 = float(np.square(off, out=off).sum(dtype=np.float64)) - n * shift**2
    cells = () if edges is None else (_cells(values, known, place, edges, mean),)
    return LayerSummary(values.size, n, mean, max(m2, 0.0), Histogram.of(finite), cells)


def _cell_edges(length: int) -> Array:
    """Return where cells begin, and the far edge: every chip of `CHIP_SIZES` is whole cells."""
    last = {length - size for size in CHIP_SIZES if size <= length}  # moved inward
    return np.array([*sorted({*range(0, length, _CELL_PX), *last}), length])


def _cells(
    values: Array, known: Array, place: Place, edges: tuple[Array, Array], about: float
) -> _Cells:
    first, starts = [], []
    for axis in (0, 1):
        span, edge = place[axis], edges[axis]
        one = int(np.searchsorted(edge, span.start, side="right")) - 1
        inside = edge[(edge > span.start) & (edge < span.stop)]
        first.append(one)
        starts.append(np.concatenate([[0], inside - span.start]))
    off = np.where(known, values.astype(np.float64) - about, 0.0)

    def sums(array: Array) -> Array:
        rows = np.add.reduceat(array, starts[0], axis=0, dtype=np.float64)
        return np.add.reduceat(rows, starts[1], axis=1)

    n, total, squares = sums(known), sums(off), sums(np.square(off, out=off.copy()))
    mean = total / np.maximum(n, 1)
    return _Cells(first[0], first[1], n, mean + about, np.maximum(squares - n * mean**2, 0))


def _dsm_scales(parts: Iterable[_Cells], shape: tuple[int, int]) -> dict[int, float]:
    """Return the DSM scale by chip size, as `deepdem.chips.dsm_scale` defines it."""
    edges = _cell_edges(shape[0]), _cell_edges(shape[1])
    size = len(edges[0]) - 1, len(edges[1]) - 1
    n, mean, m2 = np.zeros(size), np.zeros(size), np.zeros(size)
    for part in parts:
        at = slice(part.y, part.y + len(part.n)), slice(part.x, part.x + part.n.shape[1])
        both = n[at] + part.n
        off = part.mean - mean[at]
        share = part.n / np.maximum(both, 1)
        m2[at] += part.m2 + off**2 * n[at] * share
        mean[at] += off * share
        n[at] = both
    if not n.any():
        return {}
    off = np.where(n > 0, mean - (n * mean).sum() / n.sum(), 0)
    # Summed from the corner on: a chip is then a difference of four.
    first, second, count = (
        np.pad(a.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for a in (n * off, m2 + n * off**2, n)
    )
    scales = {}
    for chip in (c for c in CHIP_SIZES if c <= min(shape)):
        span = []
        for axis in (0, 1):
            start = np.array(Axis(shape[axis], chip, chip).starts(0, shape[axis]))
            span.append((np.searchsorted(edges[axis], start),
                         np.searchsorted(edges[axis], start + chip)))  # fmt: skip
        (top, bottom), (left, right) = span
        inside, one, two = (
            a[np.ix_(bottom, right)] - a[np.ix_(top, right)]
            - a[np.ix_(bottom, left)] + a[np.ix_(top, left)]
            for a in (count, first, second)
        )  # fmt: skip
        variance = (two - one**2 / np.maximum(inside, 1)) / np.maximum(inside, 1)
        std = np.where(2 * inside >= chip**2, np.sqrt(np.maximum(variance, 0)), np.nan)
        scale = robust_mean(std)
        if scale > 0:
            scales[chip] = scale
    return scales


def robust_mean(stds: Array) -> float:
    """Return the mean of those within the 5th and the 95th percentile, both included.

    Of two values neither is: then both count.
    """
    known = stds[np.isfinite(stds)]
    if known.size == 0:
        return float("nan")
    low, high = np.percentile(known, [5, 95])
    inside = known[(known >= low) & (known <= high)]
    return float((inside if inside.size else known).mean())


@dataclass(frozen=True)
class _Report:
    """What is known of the scene beforehand, and the words for what its summaries say."""

    shape: tuple[int, int]
    grid: Mapping[str, Any]
    masks: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, names: Sequence[str], summaries: Sequence[LayerSummary]) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        found: dict[str, Any] = {**self.grid, "layers": layers}
        for name, summary in zip(names, summaries, strict=True):
            if name in self.masks:
                layers[name] = {"share": _digits(summary.mean)}
                continue
            quantiles = summary.histogram.quantiles([p / 100 for p in PERCENTILES])
            std = math.sqrt(summary.m2 / summary.count) if summary.count else math.nan
            low, high = summary.histogram.low, summary.histogram.high
            layers[name] = {
                "share": _digits(summary.count / summary.pixels),
                "mean": _digits(summary.mean if summary.count else math.nan),
                "std": _digits(std),
                "min": _digits(low),
                "max": _digits(high),
                "percentiles": {
                    str(p): _digits(q) for p, q in zip(PERCENTILES, quantiles.tolist(), strict=True)
                },
            }
            if summary.cells:
                scales = _dsm_scales(summary.cells, self.shape)
                found["dsm_scale"] = {str(size): _digits(s) for size, s in scales.items()}
        if "valid" in layers:
            found["valid"] = layers["valid"]["share"]
        return found


def _digits(value: float) -> float | None:
    """Return the value to six digits, which is what any chunks agree on; None for no value."""
    if not math.isfinite(value):
        return None
    # The bin that begins at zero ends at the least number that a float32 can be.
    return float(f"{value:.6g}") if abs(value) > _TINY else 0.0


# --- Dask and xarray: no arithmetic on pixels ----------------------------------------------------


def merge_tasks(tasks: Any, merge: Any) -> Any:
    """Return one task out of a 2-D array of them, merged in square tiles.

    Not row by row: Dask then finishes one region of a raster before the next.
    """
    merged = delayed(merge, pure=True)
    tasks = np.atleast_2d(tasks)
    while tasks.size > 1:
        rows, columns = (range(0, n, _TILE) for n in tasks.shape)
        tasks = np.array([
            [merged(tasks[y : y + _TILE, x : x + _TILE].ravel().tolist()) for x in columns]
            for y in rows
        ], dtype=object)  # fmt: skip
    return tasks[0, 0]


def plan_statistics(
    ds: xr.Dataset, *, pixel_size_m: float, store: Callable[..., None] | None = None
) -> Any:
    """Return the statistics of a scene's layers as a Delayed: one pass, one task a chunk.

    Parameters
    ----------
    ds
        A scene; layers on (y, x), Dask-backed or in memory.
    pixel_size_m
        Metres on the ground, for the reader: the DSM scale depends on it.
    store
        Is called with a chunk's place and its layers by name before they are counted. That one
        task wants all layers of a chunk is what makes Dask finish one chunk before the next.

    Returns
    -------
    dask.delayed.Delayed
        A dict that JSON can hold. ``layers``: for each layer ``share`` (of pixels with a value; of
        a mask, that are 1), ``mean``, ``std``, ``min``, ``max`` and ``percentiles`` (1, 5, 25, 50,
        75, 95, 99; each to 1/2048 of its value). ``valid``: the share of valid pixels.
        ``dsm_scale``: metres, by chip size, for those of `CHIP_SIZES` that fit the scene and of
        which one is half valid. ``shape``, ``first_pixel`` and ``pixel_size_m`` say of which grid
        that is true. Six digits: the same whatever the chunks. None where there is no value.

    Notes
    -----
    A chunk's summary takes some tens of kilobytes a layer.
    """
    names = [str(n) for n in ds.data_vars if ds[n].dims == ("y", "x")]
    shape = ds.sizes["y"], ds.sizes["x"]
    lazy = [ds[n] if ds[n].chunks is not None else ds[n].chunk(2048) for n in names]
    arrays = [layer.data for layer in xr.unify_chunks(*lazy)]
    work = _ChunkWork(tuple(names), (_cell_edges(shape[0]), _cell_edges(shape[1])), store)
    pairs = [item for array in arrays for item in (array, "ij")]
    blocks = da.blockwise(
        work, "ij", ArraySliceDep(arrays[0].chunks), "ij", *pairs, dtype=object,
        meta=np.empty((0, 0)), align_arrays=False, token="statistics" if store is None else "store",
    )  # fmt: skip
    summaries = merge_tasks(blocks.to_delayed(optimize_graph=False), _merge_layers)
    masks = frozenset(n for n in names if describe(n).role == "mask" or ds[n].dtype == bool)
    report = _Report(shape, {**_grid(ds), "pixel_size_m": _digits(pixel_size_m)}, masks)
    return delayed(report, pure=True)(names, summaries)


@dataclass(frozen=True)
class _ChunkWork:
    """What is done with one chunk of all layers."""

    names: tuple[str, ...]
    edges: tuple[Array, Array]
    store: Callable[..., None] | None

    def __call__(self, place: Place, *blocks: Array) -> tuple[LayerSummary, ...]:
        if self.store is not None:
            self.store(place, dict(zip(self.names, blocks, strict=True)))
        return tuple(
            summarise(block, place, edges=self.edges if name == "dsm" else None)
            for name, block in zip(self.names, blocks, strict=True)
        )


def _merge_layers(parts: Sequence[tuple[LayerSummary, ...]]) -> tuple[LayerSummary, ...]:
    return tuple(map(LayerSummary.merge, zip(*parts, strict=True)))


def _grid(ds: xr.Dataset) -> dict[str, Any]:
    """Return what tells a scene from a part of it, as JSON has it."""
    first = [float(ds[d][0]) if d in ds.coords else 0.0 for d in ("y", "x")]
    return {"shape": [ds.sizes["y"], ds.sizes["x"]], "first_pixel": first}


def stored_statistics(ds: xr.Dataset) -> dict[str, Any] | None:
    """Return the statistics that a scene carries, or None where it has none, or those of another.

    A scene that was cut or stacked anew keeps its attrs: they count only where the grid is the one
    that they were made of. Layers that were replaced since are not noticed.
    """
    found = ds.attrs.get(STATISTICS)
    if not isinstance(found, dict):
        return None
    layers = found.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        return None
    same = all(found.get(key) == value for key, value in _grid(ds).items())
    return found if same else None

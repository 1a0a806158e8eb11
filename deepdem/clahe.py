"""Contrast-limited adaptive histogram equalisation (CLAHE) of a raster larger than memory.

`equalise_array` needs more of the scene than the pixel itself, in two passes over the chunks:

1. tiles: grey values counted in tiles of a pixel grid anchored at the scene's origin, finely enough
   for any grey range -> the grey range, robust to hot pixels, and one table of mappings,
   (tiles_y, tiles_x, bins + 1) float32: a thousandth of the scene;
2. mapping: each chunk through the mappings of the tiles around it.

Every task of the second pass waits for the table of the first. If both shared their source chunks,
Dask would hold the whole scene meanwhile; so the first reads through a clone of its own
(`deepdem.blocks.read_again`): memory is bounded by the chunk, and an ortho is read twice.
Only integers are added up across chunks: the result is the same, bit for bit, however it is cut.

Whoever writes a whole scene computes the tables before all else (`deepdem.blocks.settle`): what is
left are chunks that wait for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.delayed import delayed
from dask.layers import ArraySliceDep
from scipy.ndimage import distance_transform_edt

from deepdem.blocks import TABLES, read_again
from deepdem.statistics import Histogram, merge_tasks

__all__ = ["Clahe", "equalise_array"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
GreyRange = tuple[float, float] | None  # None: the percentiles of the scene
Place = tuple[slice, slice]  # of a block in the scene, in pixels from its origin
TileCounts: TypeAlias = Mapping[tuple[int, int], Histogram]
Tables: TypeAlias = tuple[tuple[float, float], Float32]  # grey range, mappings

# --- kernels: arrays in, arrays out ---


@dataclass(frozen=True)
class Clahe:
    """The settings of one equalisation, and the grid of tiles that they lay over a scene.

    Attributes
    ----------
    shape
        Of the scene, (y, x) in pixels.
    tile_px, clip_limit, bins, percentiles
        As in `deepdem.derive.equalise`, which checks them.
    """

    shape: tuple[int, int]
    tile_px: int
    clip_limit: float
    bins: int
    percentiles: tuple[float, float]

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of tiles down and across."""
        # A rest under half a tile belongs to the last tile: its own histogram would be a poor one.
        y, x = (max(1, (n + self.tile_px // 2) // self.tile_px) for n in self.shape)
        return y, x

    def tile_of(self, place: slice, axis: int) -> npt.NDArray[np.intp]:
        """The tile that each pixel of `place` counts in."""
        pixels = np.arange(place.start, place.stop)
        return np.asarray(np.minimum(pixels // self.tile_px, self.tiles[axis] - 1))

    def between(self, place: slice, axis: int) -> tuple[npt.NDArray[np.intp], Float32]:
        """The tile whose centre comes before each pixel, and the weight of the tile after it."""
        n, pixels = self.tiles[axis], np.arange(place.start, place.stop)
        first = np.arange(n) * self.tile_px
        centre = (first + np.append(first[1:], self.shape[axis]) - 1) / 2
        position = np.interp(pixels, centre, np.arange(n))
        before = np.minimum(position.astype(np.intp), max(n - 2, 0))
        return before, (position - before).astype(np.float32)


def _grey_range(counts: Histogram, clahe: Clahe) -> tuple[float, float]:
    """The percentiles (each to 1/2048 of its value)."""
    low, high = counts.low, counts.high
    if not low < high:
        return (low, low + 1) if low == high else (0.0, 1.0)
    start, stop = counts.quantiles([p / 100 for p in clahe.percentiles]).tolist()
    start = low if clahe.percentiles[0] == 0 else start
    stop = high if clahe.percentiles[1] == 100 else stop
    # All but constant: then the few pixels that differ are all the contrast there is.
    return (start, stop) if start < stop else (low, high)


def _levels(values: Array, grey_range: tuple[float, float], bins: int) -> Float32:
    """Values as grey levels from 0 to `bins`, clipped at the range's ends; NaN stays."""
    low, high = np.float32(grey_range[0]), np.float32(grey_range[1])
    levels = np.clip(values.astype(np.float32, copy=False), low, high)
    levels -= low
    levels *= np.float32(bins / (grey_range[1] - grey_range[0]))
    return np.clip(levels, 0, bins, out=levels)


def _runs(labels: npt.NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Each label of an ascending array and the stretch over which it stays the same."""
    names, starts = np.unique(labels, return_index=True)
    for name, start, stop in zip(names, starts, [*starts[1:], len(labels)], strict=True):
        yield int(name), slice(int(start), int(stop))


def _count_tiles(values: Array, place: Place, clahe: Clahe) -> TileCounts:
    """Valid pixels by grey value in each tile that the block touches."""
    values = values.astype(np.float32, copy=False)
    counts = {}
    for i, rows in _runs(clahe.tile_of(place[0], 0)):
        for j, cols in _runs(clahe.tile_of(place[1], 1)):
            part = values[rows, cols]
            counts[i, j] = Histogram.of(part[np.isfinite(part)])
    return counts


def _merge_tiles(parts: Sequence[TileCounts]) -> TileCounts:
    tiles: dict[tuple[int, int], list[Histogram]] = {}
    for part in parts:
        for tile, counts in part.items():
            tiles.setdefault(tile, []).append(counts)
    return {tile: Histogram.merge(counts) for tile, counts in tiles.items()}


def _clip_counts(counts: Array, clip_limit: float) -> npt.NDArray[np.float64]:
    """Cut each histogram at its limit and spread the excess over the bins that have room.

    Zuiderveld (1994) hands the excess out in rounds. This is where his rounds end, in closed form:
    every bin raised by the same amount, none beyond the limit.
    """
    limit = clip_limit * counts.sum(axis=-1, keepdims=True)
    cut = np.minimum(counts, limit)
    excess = (counts - cut).sum(axis=-1, keepdims=True)
    room = np.sort(limit - cut, axis=-1)
    taken = np.cumsum(room, axis=-1) - room
    open_bins = np.arange(counts.shape[-1], 0, -1)
    # A rise by the k-th smallest room takes up taken[k] + room[k] * open_bins[k] of the excess.
    k = (taken + room * open_bins < excess).sum(axis=-1, keepdims=True)
    k = np.minimum(k, counts.shape[-1] - 1)
    rise = (excess - np.take_along_axis(taken, k, axis=-1)) / open_bins[k]
    return np.asarray(np.minimum(cut + rise, limit))


def _tables(parts: TileCounts, grey_range: GreyRange, clahe: Clahe) -> Tables:
    """The grey range, and mappings (tiles_y, tiles_x, bins + 1) from grey level to [0, 1].

    A tile less than a quarter full cannot speak for itself: what it lacks it borrows from the
    nearest fuller one, so that an empty tile takes over its neighbour's mapping.
    """
    span = grey_range or _grey_range(Histogram.merge(parts.values()), clahe)
    counts = np.zeros((*clahe.tiles, clahe.bins))
    inner = np.linspace(*span, clahe.bins + 1)[1:-1]
    for tile, part in parts.items():
        if part.keys.size:
            counts[tile] = np.diff(part.below(inner), prepend=0, append=part.count)
    return span, _mappings(counts, clahe)


def _mappings(counts: npt.NDArray[np.float64], clahe: Clahe) -> Float32:
    filled = counts.sum(axis=-1)
    if not filled.any():
        return np.tile(np.linspace(0, 1, clahe.bins + 1, dtype=np.float32), (*clahe.tiles, 1))
    enough = min(filled.max(), clahe.tile_px**2 / 4)
    lacking = np.maximum(enough - filled, 0)
    donor = tuple(distance_transform_edt(lacking, return_distances=False, return_indices=True))
    counts += (lacking / filled[donor])[..., None] * counts[donor]
    if 0 < clahe.clip_limit < 1:
        counts = _clip_counts(counts, clahe.clip_limit)
    shares = np.cumsum(counts, axis=-1)
    shares /= shares[..., -1:]
    return np.pad(shares, [(0, 0), (0, 0), (1, 0)]).astype(np.float32)


def _look_up(levels: Float32, left: Float32, right: Float32, weight: Float32) -> Float32:
    """Send each row of `levels` through its own `left` and `right` mapping, and blend the two."""
    bins = left.shape[1] - 1
    known = np.where(np.isnan(levels), np.float32(0), levels)
    index = np.minimum(known.astype(np.intp), bins - 1)
    # Linear within the bin too: 256 steps would posterise an 11-bit image.
    fraction = known - index.astype(np.float32)
    index += np.arange(len(left))[:, None] * (bins + 1)
    ends = []
    for table in (left, right):
        end = np.take(np.diff(table, axis=1, append=1), index, mode="clip")
        end *= fraction
        end += np.take(table, index, mode="clip")
        ends.append(end)
    blend: Float32 = ends[0] + (ends[1] - ends[0]) * weight
    blend[np.isnan(levels)] = np.nan
    return np.clip(blend, 0, 1, out=blend)


def _map(values: Array, place: Place, tables: Tables, clahe: Clahe) -> Float32:
    """Values through the mappings of the four tiles around each pixel, bilinearly."""
    grey_range, maps = tables
    out = np.empty(values.shape, dtype=np.float32)
    (tile_rows, down), (tile_cols, along) = (clahe.between(place[axis], axis) for axis in (0, 1))
    last_row, last_col = np.array(clahe.tiles) - 1
    for i, rows in _runs(tile_rows):
        upper, lower = maps[i], maps[min(i + 1, last_row)]
        for j, cols in _runs(tile_cols):
            left, right = (
                upper[tile] + down[rows, None] * (lower[tile] - upper[tile])
                for tile in (j, min(j + 1, last_col))
            )
            part = values[rows, cols]
            part = np.where(np.isfinite(part), part, np.float32(np.nan))
            levels = _levels(part, grey_range, clahe.bins)
            out[rows, cols] = _look_up(levels, left, right, along[cols])
    return out


# --- the Dask glue: chooses blocks, calls the kernels ---


def equalise_array(image: Any, grey_range: GreyRange, clahe: Clahe) -> Any:
    """Return `image` equalised: float32 in [0, 1], NaN where it is not finite.

    Parameters
    ----------
    image
        (y, x) of ``clahe.shape``, NumPy or Dask, any real dtype. A Dask array gives a lazy one of
        the same chunks.
    grey_range
        Where the bins begin and end; ``None``: at ``clahe.percentiles`` of all finite pixels.
    clahe
        The settings.
    """
    run = _equalise_dask if isinstance(image, da.Array) else _equalise_numpy
    return run(image, grey_range, clahe)


def _equalise_numpy(image: Array, grey_range: GreyRange, clahe: Clahe) -> Float32:
    place = (slice(0, image.shape[0]), slice(0, image.shape[1]))
    tables = _tables(_count_tiles(image, place, clahe), grey_range, clahe)
    return _map(image, place, tables, clahe)


def _blocks(kernel: Any, image: Any, *rest: Any, dtype: Any) -> Any:
    # What is not the image goes in whole, as a literal: a contracted axis would keep Dask from
    # fusing this layer with the source's, and blocks would be read before the tables are there.
    pairs = [
        pair for arg in rest for pair in (arg, "ij" if isinstance(arg, ArraySliceDep) else None)
    ]
    # Nothing to align: all the rest is cut as the image is.
    return da.blockwise(
        kernel, "ij", image, "ij", *pairs, dtype=dtype, meta=np.empty((0, 0), dtype),
        align_arrays=False, token=f"equalise{kernel.__name__}",  # what a dashboard shows
    )  # fmt: skip


def _equalise_dask(image: Any, grey_range: GreyRange, clahe: Clahe) -> Any:
    place = ArraySliceDep(image.chunks)
    token = tokenize(image, grey_range, clahe)
    again = read_again(image, seed=f"deepdem-tiles-{token}")
    # The blocks are counts, not arrays: they are only ever used as the tasks behind them.
    counts = _blocks(_count_tiles, again, place, clahe, dtype=object)
    merged = merge_tasks(counts.to_delayed(optimize_graph=False), _merge_tiles)
    tables = delayed(_tables, pure=True)(
        merged, grey_range, clahe, dask_key_name=f"{TABLES}-equalise-{token}"
    )
    return _blocks(_map, image, place, tables, clahe, dtype=np.float32)

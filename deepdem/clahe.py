"""Contrast-limited adaptive histogram equalisation (CLAHE) of a raster larger than memory.

`equalise_array` needs more of the scene than the pixel itself, in three passes over the chunks:

1. range: grey values counted over the whole scene -> the grey range, robust to hot pixels;
2. tiles: grey levels counted in tiles of a pixel grid anchored at the scene's origin -> one table
   of mappings, (tiles_y, tiles_x, bins + 1) float32: a thousandth of the scene;
3. mapping: each chunk through the mappings of the tiles around it.

Every task of a pass waits for the table of the pass before. If the passes shared their source
chunks, Dask would hold the whole scene meanwhile; so each reads through a clone of its own
(`deepdem.blocks.read_again`): memory is bounded by the chunk, and an ortho is read three times.
Only integers are added up across chunks: the result is the same, bit for bit, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.base import tokenize
from dask.delayed import delayed
from dask.layers import ArraySliceDep
from scipy.ndimage import distance_transform_edt

from deepdem.blocks import read_again

__all__ = ["Clahe", "equalise_array"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
GreyRange = tuple[float, float] | None  # None: the percentiles of the scene
Place = tuple[slice, slice]  # of a block in the scene, in pixels from its origin

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


def _count_keys(values: Array) -> npt.NDArray[np.int64]:
    """Count finite values by the upper 16 bits of an order-preserving key: fits any grey values."""
    values = values.astype(np.float32, copy=False)
    bits = values[np.isfinite(values)].view(np.uint32)
    # A negative number's bits run backwards: flip all of them, of a positive one the sign alone.
    ordered = bits ^ ((np.uint32(0) - (bits >> np.uint32(31))) | np.uint32(0x80000000))
    return np.bincount(ordered >> np.uint32(16), minlength=2**16)[None, None]


def _key_edges() -> npt.NDArray[np.float64]:
    """The lower edges of the bins of `_count_keys`, and the last one's upper edge."""
    ordered = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    bits = np.where(ordered >> np.uint32(31), ordered ^ np.uint32(0x80000000), ~ordered)
    # Infinity bounds the greatest finite bin; beyond it are the NaNs, which are never counted.
    big = float(np.finfo(np.float32).max)
    edges = np.nan_to_num(bits.view(np.float32), nan=big, posinf=big, neginf=-big)
    return np.append(edges.astype(np.float64), big)


def _extremes(values: Array) -> npt.NDArray[np.float64]:
    """The least and minus the greatest finite value, so that both combine by a minimum."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.array([[[finite.min(initial=np.inf), (-finite).min(initial=np.inf)]]])


def _grey_range(counts: Array, extremes: Array, clahe: Clahe) -> tuple[float, float]:
    """The percentiles (each to 1/128 of its value), within the extremes."""
    low, high = float(extremes[0]), -float(extremes[1])
    if not low < high:
        return (low, low + 1) if low == high else (0.0, 1.0)
    filled, total, edges = np.flatnonzero(counts), np.cumsum(counts), _key_edges()
    wanted = np.asarray(clahe.percentiles) / 100 * total[-1]
    bins = filled[np.minimum(np.searchsorted(total[filled], wanted), len(filled) - 1)]
    share = np.clip(1 - (total[bins] - wanted) / counts[bins], 0, 1)
    ends = np.clip(edges[bins] + share * (edges[bins + 1] - edges[bins]), low, high)
    start = low if clahe.percentiles[0] == 0 else float(ends[0])
    stop = high if clahe.percentiles[1] == 100 else float(ends[1])
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


def _count_tiles(
    values: Array, place: Place, grey_range: tuple[float, float], clahe: Clahe
) -> npt.NDArray[np.int32]:
    """Valid pixels by grey level in each tile the block touches: (tiles_y, tiles_x, bins)."""
    tile_rows, tile_cols = (list(_runs(clahe.tile_of(place[axis], axis))) for axis in (0, 1))
    counts = np.zeros((len(tile_rows), len(tile_cols), clahe.bins), dtype=np.int32)
    for i, (_, rows) in enumerate(tile_rows):
        for j, (_, cols) in enumerate(tile_cols):
            part = values[rows, cols]
            levels = _levels(part[np.isfinite(part)], grey_range, clahe.bins)
            index = np.minimum(levels.astype(np.intp), clahe.bins - 1)
            counts[i, j] = np.bincount(index, minlength=clahe.bins)
    return counts


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


def _mappings(parts: Array, tile_rows: Array, tile_cols: Array, clahe: Clahe) -> Float32:
    """Mappings (tiles_y, tiles_x, bins + 1) from grey level to [0, 1]; a tile's parts are added.

    A tile less than a quarter full cannot speak for itself: what it lacks it borrows from the
    nearest fuller one, so that an empty tile takes over its neighbour's mapping.
    """
    counts = np.zeros((*clahe.tiles, clahe.bins))
    np.add.at(counts, (tile_rows[:, None], tile_cols[None, :]), parts)
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


def _map(
    values: Array, place: Place, grey_range: tuple[float, float], maps: Float32, clahe: Clahe
) -> Float32:
    """Values through the mappings of the four tiles around each pixel, bilinearly."""
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
    if grey_range is None:
        grey_range = _grey_range(_count_keys(image)[0, 0], _extremes(image)[0, 0], clahe)
    parts = _count_tiles(image, place, grey_range, clahe)
    maps = _mappings(parts, np.arange(clahe.tiles[0]), np.arange(clahe.tiles[1]), clahe)
    return _map(image, place, grey_range, maps, clahe)


def _blocks(kernel: Any, out: str, image: Any, *rest: Any, dtype: Any, **options: Any) -> Any:
    # What is not the image goes in whole, as a literal: a contracted axis would keep Dask from
    # fusing this layer with the source's, and blocks would be read before the tables are there.
    pairs = [
        pair for arg in rest for pair in (arg, "ij" if isinstance(arg, ArraySliceDep) else None)
    ]
    meta = np.empty((0,) * len(out), dtype)
    options["token"] = f"equalise{kernel.__name__}"  # what a dashboard shows
    # Nothing to align: all the rest is cut as the image is.
    return da.blockwise(
        kernel, out, image, "ij", *pairs, dtype=dtype, meta=meta, align_arrays=False, **options
    )


def _slices(chunks: tuple[int, ...]) -> Iterator[slice]:
    for size, stop in zip(chunks, np.cumsum(chunks).tolist(), strict=True):
        yield slice(stop - size, stop)


def _whole(array: Any) -> Any:
    """The array as one object of the graph, to be a literal."""
    return array.rechunk(-1).to_delayed(optimize_graph=False).item()


def _equalise_dask(image: Any, grey_range: GreyRange, clahe: Clahe) -> Any:
    place = ArraySliceDep(image.chunks)
    grey: Any = grey_range
    if grey is None:
        again = read_again(image, seed=f"deepdem-range-{tokenize(image, clahe)}")
        one = {"i": 1, "j": 1}
        counts = _blocks(
            _count_keys, "ijk", again, dtype=np.int64, new_axes={"k": 2**16}, adjust_chunks=one
        ).sum(axis=(0, 1))
        extremes = _blocks(
            _extremes, "ijk", again, dtype=np.float64, new_axes={"k": 2}, adjust_chunks=one
        ).min(axis=(0, 1))
        grey = delayed(_grey_range, pure=True)(_whole(counts), _whole(extremes), clahe)
    again = read_again(image, seed=f"deepdem-tiles-{tokenize(image, grey_range, clahe)}")
    rows, cols = (
        [np.unique(clahe.tile_of(part, axis)) for part in _slices(chunks)]
        for axis, chunks in enumerate(image.chunks)
    )
    parts = _blocks(
        _count_tiles, "ijk", again, place, grey, clahe, dtype=np.int32, new_axes={"k": clahe.bins},
        adjust_chunks={"i": tuple(map(len, rows)), "j": tuple(map(len, cols))},
    )  # fmt: skip
    maps = delayed(_mappings, pure=True)(
        _whole(parts), np.concatenate(rows), np.concatenate(cols), clahe
    )
    return _blocks(_map, "ij", image, place, grey, maps, clahe, dtype=np.float32)

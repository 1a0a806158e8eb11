"""Chips: where they lie, which are worth having, and what the training regions have in common.

xbatcher says where chips lie; which of them are worth having is read from the validity mask,
block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import xbatcher
from numpy.typing import NDArray
from xbatcher.generators import BatchSchema

from deepdem.blocks import Box, chunks_of, map_regions
from deepdem.scene import check_scene, dask_layer
from deepdem.statistics import robust_mean
from deepdem.windows import Axis, overlap_px

__all__ = [
    "chip_generator",
    "chip_numbers",
    "chip_starts",
    "dsm_scale",
]


class _Chips(xbatcher.BatchGenerator):  # type: ignore[misc]  # xbatcher ships no types
    """xbatcher's generator, with the chips at the far edges that it drops, and without others."""

    def __init__(self, ds: xr.Dataset, places: _Selectors, size: int, overlap: int):
        # Of one chip of the scene: for all of a large one it makes a dict a chip, for a minute.
        super().__init__(
            ds.isel(y=slice(size), x=slice(size)), {"y": size, "x": size},
            {"y": overlap, "x": overlap}, preload_batch=False,
        )  # fmt: skip
        self.ds = ds
        self._batch_selectors.selectors = places


class _Selectors(Mapping[int, list[dict[str, slice]]]):
    """What xbatcher selects for each chip, made when it is asked for; `which`: of all places."""

    def __init__(
        self, ys: NDArray[np.int64], xs: NDArray[np.int64], size: int,
        which: NDArray[np.int64] | None = None,
    ):  # fmt: skip
        self.ys, self.xs, self.size, self.which = ys, xs, size, which

    def __len__(self) -> int:
        return len(self.ys) * len(self.xs) if self.which is None else len(self.which)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, index: int) -> list[dict[str, slice]]:
        if not 0 <= index < len(self):
            raise KeyError(index)
        place = index if self.which is None else int(self.which[index])
        row, column = divmod(place, len(self.xs))
        y, x = int(self.ys[row]), int(self.xs[column])
        return [{"y": slice(y, y + self.size), "x": slice(x, x + self.size)}]


def chip_generator(
    ds: xr.Dataset, *, size: int = 256, overlap: float = 0, min_valid: float = 0.0
) -> xbatcher.BatchGenerator:
    """Return a generator of chips: lazy Datasets of `size` by `size` pixels.

    Chips stand every ``size - overlap`` pixels from the scene's origin; the last of a row or
    column is moved inward, so that the far edges are covered as well.

    Parameters
    ----------
    size
        The chip's width in pixels.
    overlap
        A fraction of the chip, or pixels.
    min_valid
        Chips with a smaller share of valid pixels are left out. Above 0 the mask is read once,
        block by block (the layer ``valid``, or without it where ``dsm`` is not NaN); with 0
        nothing is computed.

    Raises
    ------
    ValueError
        The scene is smaller than a chip.
    """
    box = check_scene(ds)
    if size > min(box.shape):
        raise ValueError(
            f"chips of {size} px do not fit a scene of {box.shape.y} by {box.shape.x} px: pass a "
            "smaller size"
        )
    pixels = overlap_px(overlap, size)
    ys, xs = (chip_starts(int(n), size, size - pixels) for n in (box.shape.y, box.shape.x))
    which = None
    if min_valid > 0:
        share = chip_numbers(_mask(ds), size, size - pixels).compute().ravel()
        which = np.flatnonzero(share >= min_valid)
    return _Chips(ds, _Selectors(ys, xs, size, which), size, pixels)


def chip_starts(length: int, size: int, stride: int) -> NDArray[np.int64]:
    """Return where chips begin along one axis: where xbatcher says, and the far edge, ascending.

    xbatcher drops what is left at the far edge; one more chip is moved inward to cover it.
    """
    # One axis at a time: for both at once xbatcher makes a dict a chip, 600 000 of them for a
    # scene of 100 000 pixels.
    line = xr.Dataset(coords={"i": np.empty(length, dtype=np.int8)})
    schema = BatchSchema(line, {"i": size}, {"i": size - stride}, concat_input_bins=False)
    starts = {chips[0]["i"].start for chips in schema.selectors.values()}
    return np.array(sorted(starts | {length - size}), dtype=np.int64)


def _mask(ds: xr.Dataset) -> da.Array:
    if "valid" in ds:
        return dask_layer(ds.assign(valid=ds["valid"].astype(bool)), "valid")
    check_scene(ds, ["dsm"])
    finite: da.Array = da.isfinite(dask_layer(ds, "dsm"))
    return finite


def _number_kernel(
    arrays: list[NDArray[Any]], *, out: Box, region: Box, chips: tuple[Axis, Axis], std: bool
) -> NDArray[np.float32]:
    """Return of each chip the share of valid pixels, or the standard deviation of its heights."""
    result = np.full(out.shape, np.nan, dtype=np.float32)
    for i in range(out.y0, out.y1):
        for j in range(out.x0, out.x1):
            y, x = chips[0].start(i), chips[1].start(j)
            chip = Box(y, y + chips[0].window_px, x, x + chips[1].window_px).within(region)
            values = arrays[0][chip]
            if not std:
                result[i - out.y0, j - out.x0] = np.mean(values)
                continue
            heights = values[np.isfinite(values)].astype(np.float64)
            if 2 * heights.size >= values.size:
                result[i - out.y0, j - out.x0] = heights.std()
    return result


def chip_numbers(layer: da.Array, size: int, stride: int, *, std: bool = False) -> da.Array:
    """Return a small lazy array with one number for each chip (row, column)."""
    axes = Axis(layer.shape[0], size, stride), Axis(layer.shape[1], size, stride)
    counts = axes[0].count, axes[1].count
    block = max(1, 2048 // stride)

    def region(out: Box) -> Box:
        y0, y1 = axes[0].start(out.y0), axes[0].start(out.y1 - 1) + size
        x0, x1 = axes[1].start(out.x0), axes[1].start(out.x1 - 1) + size
        return Box(y0, y1, x0, x1)

    return map_regions(
        _number_kernel, [layer], chunks=chunks_of(counts, block), region=region,
        dtype=np.float32, name="chip-statistics", common={"chips": axes, "std": std},
    )  # fmt: skip


def dsm_scale(ds: xr.Dataset, *, size: int = 256) -> float:
    """Return the DSM scale in metres; computes, block by block.

    The mean over chips of the standard deviation of heights in a chip, chips outside the 5th to
    95th percentile left out (as the published DeepDEM workflow defines it). Chips do not overlap;
    those less than half valid do not count. It depends on the chip size and on the pixel size.

    Parameters
    ----------
    size
        The chip's width in pixels.

    Raises
    ------
    ValueError
        The scene is smaller than a chip, has no ``dsm``, or no chip is half valid.
    """
    box = check_scene(ds, ["dsm"])
    if size > min(box.shape):
        raise ValueError(
            f"chips of {size} px do not fit a scene of {box.shape.y} by {box.shape.x} px: pass a "
            "smaller size"
        )
    scale = robust_mean(chip_numbers(dask_layer(ds, "dsm"), size, size, std=True).compute())
    if not scale > 0:
        raise ValueError(
            f"no DSM scale: no chip of {size} px is half valid, or the surface is flat"
        )
    return scale

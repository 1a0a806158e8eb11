"""The local level of a surface: its smooth mean over about a chip, with which voids do not meddle.

A network that sees heights above the local level does not care where a window starts or how wide
it is: the level is the scene's, not the window's. The kernel is NumPy only. It works on sums over
small cells that stand on a grid anchored at the scene's origin, so that it costs next to nothing,
and so that any region of a scene, however it was cut, has the same level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdem.blocks import Box

__all__ = ["LevelRegion", "local_level"]

# Cells along a chip. The level is smooth at the scale of a chip: what a cell of a sixteenth of it
# adds to the kernel's width is a thousandth.
_CELLS = 16
# Pixels of level made at once: its float64 sums stay in the cache.
_TILE_PX = 256


def _cell_px(chip_px: int) -> int:
    return max(1, chip_px // _CELLS)


@dataclass(frozen=True)
class LevelRegion:
    """Which pixels of a scene of `shape` the level of a box depends on."""

    chip_px: int
    shape: tuple[int, int]

    def __call__(self, out: Box) -> Box:
        """Return them: whole cells, and no pixel outside the scene."""
        cell, (height, width) = _cell_px(self.chip_px), self.shape
        reach = self.chip_px + cell

        def span(lo: int, hi: int, length: int) -> tuple[int, int]:
            return max(lo - reach, 0) // cell * cell, min(-(-(hi + reach) // cell) * cell, length)

        return Box(*span(out.y0, out.y1, height), *span(out.x0, out.x1, width))


def local_level(
    arrays: Sequence[NDArray[Any]], *, out: Box, region: Box, chip_px: int
) -> NDArray[np.float32]:
    """Return the local level of the heights of one box.

    Parameters
    ----------
    arrays
        The heights of the region, metres, NaN for no data; the first one counts.
    out, region
        Pixels of the scene: what is made, and what the heights cover, which is what `LevelRegion`
        says, or more by whole cells.
    chip_px
        The width of a training chip, to which the level is smooth.

    Returns
    -------
    ndarray
        ``out.shape``, float32, metres. The mean of the valid heights within a chip's width,
        weighted by a cubic B-spline whose spread is that of a mean over a chip (normalised
        convolution: Knutsson and Westin, 1993, equation 7); NaN where no height is within reach.
    """
    cell = _cell_px(chip_px)
    sums, counts = _cells(arrays[0], cell)
    level = np.empty(out.shape, dtype=np.float32)
    down = _tiles(out.y0, out.y1, region.y0, sums.shape[0], cell, chip_px)
    across = _tiles(out.x0, out.x1, region.x0, sums.shape[1], cell, chip_px)
    for (y, rows, left), (x, columns, right) in product(down, across):
        height, weight = (left @ of[rows, columns] @ right.T for of in (sums, counts))
        known = weight > 0
        np.divide(height, weight, out=height, where=known)
        level[y, x] = np.where(known, height, np.nan)
    return level


def _cells(heights: NDArray[Any], cell: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the number of the valid heights of each cell."""
    ys, xs = (np.arange(0, length, cell) for length in heights.shape)
    sums = np.empty((len(ys), len(xs)))
    counts = np.empty_like(sums)
    for n, y in enumerate(ys):
        rows = heights[y : y + cell]
        finite = np.isfinite(rows)
        height = np.where(finite, rows, 0).sum(axis=0, dtype=np.float64)
        sums[n] = np.add.reduceat(height, xs)
        counts[n] = np.add.reduceat(finite.sum(axis=0, dtype=np.float64), xs)
    return sums, counts


def _tiles(
    lo: int, hi: int, origin: int, count: int, cell: int, chip_px: int
) -> list[tuple[slice, slice, NDArray[np.float64]]]:
    """Return of each tile along an axis its pixels from `lo` on, its cells and their weights."""
    cuts = [(k, min(k + _TILE_PX, hi)) for k in range(lo, hi, _TILE_PX)]
    return [
        (slice(first - lo, last - lo), *_weights(first, last, origin, count, cell, chip_px))
        for first, last in cuts
    ]


def _weights(
    lo: int, hi: int, origin: int, count: int, cell: int, chip_px: int
) -> tuple[slice, NDArray[np.float64]]:
    """Return which cells count for pixels [lo, hi), and their weights (pixel, cell)."""
    first = max(0, (lo - chip_px - origin) // cell)
    last = min(count, -(-(hi + chip_px - origin) // cell))
    centres = origin + (np.arange(first, last) + 0.5) * cell
    # Four knots, half a chip apart: its variance, a third of a knot squared, is a chip's twelfth.
    away = np.abs(np.arange(lo, hi)[:, None] + 0.5 - centres) / (chip_px / 2)
    near = (4 - 6 * away**2 + 3 * away**3) / 6
    return slice(first, last), np.where(away < 1, near, np.maximum(2 - away, 0) ** 3 / 6)

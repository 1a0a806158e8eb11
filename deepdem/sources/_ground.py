"""Bare ground from points: a triangulation with a stated reach, and ground found without classes.

All of it is local: what a pixel becomes depends on the points within a stated distance of it, so
that any cut of the grid gives the same surface.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deepdem.blocks import Box
from deepdem.sources._cells import Points, cell_percentiles, inside

__all__ = [
    "Smrf",
    "centroids",
    "fill_gaps",
    "nearest_idw",
    "smrf_ground",
    "smrf_reach_px",
    "tin",
]

# Of a pixel: by so much are points moved before they are triangulated (never when heights are
# interpolated), so that four on a circle, as on any raster, have one triangulation and not two.
_JITTER_PX = 1e-4
_NEIGHBOURS = 12
# Pairs of a triangle and a pixel that are looked at in one go: 100 MB.
_CANDIDATES = 500_000


def centroids(points: Points, box: Box) -> Points:
    """Return one point a pixel: the mean position and value of those in it.

    On a plane the means lie on the plane. More than one vertex a pixel would make triangles that
    no pixel centre sees.
    """
    points = inside(points, box)
    width = box.x1 - box.x0
    cols = np.floor(points[0]).astype(np.int64) - box.x0
    rows = np.floor(points[1]).astype(np.int64) - box.y0
    cells, size = rows * width + cols, math.prod(box.shape)
    counts = np.bincount(cells, minlength=size)
    held = counts > 0
    # Against the pixel's own corner: sums of whole coordinates would round differently.
    corner = np.floor(points)
    corner[2] = 0.0
    sums = [np.bincount(cells, of, minlength=size)[held] for of in points - corner]
    means = np.stack(sums) / counts[held]
    y, x = np.divmod(np.flatnonzero(held), width)
    means[0] += x + box.x0
    means[1] += y + box.y0
    return means


def _jittered(points: Points) -> NDArray[np.float64]:
    """Return (2, n) coordinates moved by a hash of themselves: the same in every chunk.

    The hash is splitmix64's (Steele et al., 2014).
    """
    bits = np.ascontiguousarray(points[:2]).view(np.uint64)
    seed = bits * np.array([[0x9E3779B97F4A7C15], [0xC2B2AE3D27D4EB4F]], dtype=np.uint64)
    mixed = np.stack([seed[0] ^ (seed[1] >> np.uint64(7)), seed[1] ^ (seed[0] >> np.uint64(11))])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    unit = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    moved: NDArray[np.float64] = points[:2] + _JITTER_PX * (2 * unit - 1)
    return moved


def tin(points: Points, box: Box, gap_m: float, step_m: tuple[float, float]) -> NDArray[np.float32]:
    """Return heights at pixel centres, linear in the Delaunay triangles of the points.

    A triangle counts if its circumcircle, which holds no point, is at most `gap_m` wide: the width
    of a gap is that of the widest circle that fits into it. A pixel's triangle then lies within
    `gap_m` of it, and so does all that makes it a triangle of the whole cloud's triangulation
    (an empty circumcircle: Delaunay, 1934). Points farther than that change nothing.

    Parameters
    ----------
    points
        No two of them at one place. Needed within `gap_m` of the box.
    box
        The pixels.
    gap_m
        Metres.
    step_m
        Metres of a pixel along (y, x).

    Returns
    -------
    ndarray
        Shape of the box, float32; NaN in wider gaps, and outside the points' hull.
    """
    out = np.full(math.prod(box.shape), -np.inf)
    scale = np.array([[step_m[1]], [step_m[0]]])
    # Whole pixels are subtracted, which is exact: float64 then has digits to spare.
    flat = (_jittered(points) - np.array([[box.x0], [box.y0]])) * scale
    corners = _triangles(flat)
    corners = corners[_circumradii(flat[:, corners]) <= gap_m / 2]
    # In one order whoever made them, so that sums round alike in every chunk.
    order = np.lexsort((points[0][corners], points[1][corners]), axis=1)
    corners = np.take_along_axis(corners, order, axis=1)
    for which, x, y in _candidates(flat[:, corners] / scale[:, :, None], box.shape):
        mine = corners[which]
        centre = np.stack([x + 0.5, y + 0.5])
        weights = _weights(flat[:, mine] / scale[:, :, None] - centre[:, :, None])
        hit = np.flatnonzero(weights.min(axis=1) >= -1e-9)
        centre += np.array([[box.x0], [box.y0]])
        local = points[:2, mine[hit]] - centre[:, hit, None]
        heights = (_weights(local) * points[2][mine[hit]]).sum(axis=1)
        # On an edge two triangles say the same but for the last digits: the higher one stands.
        np.maximum.at(out, y[hit] * box.shape[1] + x[hit], heights)
    out[np.isneginf(out)] = np.nan
    return out.astype(np.float32).reshape(box.shape)


def _triangles(flat: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the corners of Delaunay's triangles, shape (n, 3); none where all is on a line.

    startinpy's predicates are exact, and it takes 2 µs a point where qhull takes 9.
    """
    if flat.shape[1] < 3:
        return np.empty((0, 3), dtype=np.int64)
    try:
        import startinpy
    except ImportError as error:
        raise ImportError('triangulations need startinpy: pip install "deepdem[lidar]"') from error
    mesh = startinpy.DT()
    mesh.snap_tolerance = 1e-9  # the default joins points 1 mm apart
    mesh.insert(np.vstack([flat, np.zeros(flat.shape[1])]).T.copy(), insertionstrategy="BBox")
    found = np.asarray(mesh.triangles, dtype=np.int64).reshape(-1, 3)
    # Its first vertex is the one at infinity.
    assert len(mesh.points) == flat.shape[1] + 1, "two points at one place"
    return found - 1


def _candidates(
    corners: NDArray[np.float64], shape: tuple[int, int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Give triangles, and columns and rows of the pixel centres in their bounding boxes.

    `corners` is of shape (2, n, 3), in pixels.
    """
    sizes = np.array([shape[1], shape[0]])[:, None]
    first = np.clip(np.ceil(corners.min(axis=2) - 0.5 - 1e-6), 0, sizes).astype(np.int64)
    last = np.clip(np.floor(corners.max(axis=2) - 0.5 + 1e-6) + 1, 0, sizes).astype(np.int64)
    wide, high = np.maximum(last - first, 0)
    ends = np.cumsum(wide * high)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CANDIDATES, side="right")))
        some = np.arange(start, stop)
        counts = (wide * high)[some]
        which = np.repeat(some, counts)
        nth = np.arange(len(which)) - np.repeat(ends[some] - counts - before, counts)
        y, x = np.divmod(nth, wide[which])
        yield which, x + first[0, which], y + first[1, which]
        start = stop


def _circumradii(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the radii of the circumcircles of triangles, shape (2, n, 3)."""
    x, y = corners - corners[:, :, [1, 2, 0]]
    sides = np.hypot(x, y)
    twice_area = np.abs(x[:, 0] * y[:, 1] - x[:, 1] * y[:, 0])
    with np.errstate(divide="ignore"):
        radii: NDArray[np.float64] = sides.prod(axis=1) / (2 * twice_area)
    return radii


def _weights(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the barycentric coordinates of (0, 0) in triangles, shape (2, n, 3) to (n, 3)."""
    x, y = corners
    areas = [x[:, b] * y[:, c] - x[:, c] * y[:, b] for b, c in ((1, 2), (2, 0), (0, 1))]
    weights: NDArray[np.float64] = np.stack(areas, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _centres(box: Box) -> NDArray[np.float64]:
    """Return columns and rows of the centres of the pixels of `box`: shape (2, pixels)."""
    y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1] + 0.5
    return np.stack([x.ravel(), y.ravel()])


def nearest_idw(
    points: Points, box: Box, gap_m: float, step_m: tuple[float, float], power: float = 2.0
) -> NDArray[np.float32]:
    """Return heights as means of the nearest points, weighted by inverse distance.

    The 12 nearest within half of `gap_m` count: in the middle of a gap as wide its rim is reached.
    NaN where `tin` gives NaN: in wider gaps, and outside the points' hull.
    """
    out = tin(points, box, gap_m, step_m).ravel()
    if np.isnan(out).all():
        return out.reshape(box.shape)
    scale = np.array([[step_m[1]], [step_m[0]]])
    origin = np.array([[box.x0], [box.y0]])
    tree = cKDTree(((points[:2] - origin) * scale).T)
    away, which = tree.query(
        ((_centres(box) - origin) * scale).T, k=_NEIGHBOURS, distance_upper_bound=gap_m / 2
    )
    weight = np.maximum(away, 1e-6) ** -power  # infinitely far where there are fewer: 0
    value = np.append(points[2], 0.0)[which]
    hit = (weight[:, 0] > 0) & ~np.isnan(out)
    out[hit] = (weight * value).sum(axis=1)[hit] / weight.sum(axis=1)[hit]
    return out.reshape(box.shape)


def fill_gaps(
    cells: NDArray[np.float32], box: Box, gap_m: float, step_m: tuple[float, float]
) -> NDArray[np.float32]:
    """Return cells whose gaps, up to `gap_m` wide, are filled from their rims by `tin`.

    A rim is every cell with a value that has one without among its eight neighbours. Cells are
    needed as far as `gap_m` and one more around those that are meant.
    """
    empty = np.isnan(cells)
    rim = ndimage.binary_dilation(empty, np.ones((3, 3))) & ~empty
    rows, cols = np.nonzero(rim)
    points = np.stack([cols + box.x0 + 0.5, rows + box.y0 + 0.5, cells[rim]]).astype(np.float64)
    return np.where(empty, tin(points, box, gap_m, step_m), cells)


# --- ground without classes ----------------------------------------------------------------------
#
# Of what pip installs, the cloth of `cloth-simulation-filter` is kept up best, but it hangs
# together: cut lidR's Topography.laz in two, and 6 % of the points 80 m and more from the cut
# change sides (kappa 0.48 against the file's classes; 0.41 here, in an eighth of the time).
# Pingel's own code has no distribution that pip finds. The filter is scipy's minimum and maximum.


class Smrf:
    """The numbers of the filter that finds ground: Pingel et al. (2013), table 2's defaults.

    ``window_m``: half the width of the widest building. ``slope``: rise over run that ground does
    not exceed. ``threshold_m`` and ``scaling``: a point is ground if it is no farther from the
    provisional surface than the threshold and the scaling times the surface's slope.
    """

    cell_m, window_m, slope, threshold_m, scaling = 1.0, 18.0, 0.15, 0.5, 1.25


def _smrf_cell_px(step_m: tuple[float, float]) -> int:
    return max(1, round(Smrf.cell_m / (sum(step_m) / 2)))


def _smrf_radii(step_m: tuple[float, float]) -> list[int]:
    widest = max(1, round(Smrf.window_m / (_smrf_cell_px(step_m) * sum(step_m) / 2)))
    return list(range(1, widest + 1))


def smrf_reach_px(step_m: tuple[float, float]) -> int:
    """Return how far from a pixel, in pixels, points still matter to whether it is ground.

    Openings by squares: one of radius r of one of a smaller radius is that of radius r alone, so
    that the reach is twice the widest and not the sum of all.
    """
    cell, widest = _smrf_cell_px(step_m), _smrf_radii(step_m)[-1]
    gap = math.ceil(2 * Smrf.window_m / min(step_m) / cell)
    return cell * (2 * widest + 2 + gap + 4)


def smrf_ground(points: Points, box: Box, step_m: tuple[float, float]) -> Points:
    """Return the points of bare ground among last returns, found by their shape.

    The simple morphological filter of Pingel, Clarke and McBride (ISPRS J. 77, 2013): what an
    opening of growing width takes off the lowest surface is an object if it stands out by more
    than the slope explains. Two things are ours, to keep it local: the openings leave empty cells
    out instead of filling them first, and what is cut out is filled from a triangulation that
    spans no more than the widest window (theirs solves a system of springs over the whole area).

    Parameters
    ----------
    points
        Last returns, without noise.
    box
        Where they are; those nearer than `smrf_reach_px` to its edges are not decided right.
    step_m
        Metres of a pixel along (y, x).
    """
    cell = _smrf_cell_px(step_m)
    coarse = points.copy()
    coarse[:2] /= cell
    around = Box(box.y0 // cell, -(-box.y1 // cell), box.x0 // cell, -(-box.x1 // cell))
    coarse = inside(coarse, around)
    wide_m = (step_m[0] * cell, step_m[1] * cell)
    lowest = cell_percentiles(coarse, around, 0.0)
    objects = _stands_out(lowest, _smrf_radii(step_m), Smrf.slope * sum(wide_m) / 2)
    # What lies far below all around is noise: a pit that a closing of one cell fills.
    objects |= _stands_out(-lowest, [1], 5.0 * sum(wide_m) / 2)
    bare = np.where(objects, np.float32(np.nan), lowest)
    surface = fill_gaps(bare, around, 2 * Smrf.window_m, wide_m)
    slopes = np.hypot(*np.gradient(surface, *wide_m)) if min(surface.shape) > 1 else surface * 0
    height = _bilinear(surface, coarse, around)
    allowed = Smrf.threshold_m + Smrf.scaling * _bilinear(slopes, coarse, around)
    with np.errstate(invalid="ignore"):
        ground = np.abs(coarse[2] - height) <= allowed
    found = coarse[:, ground]
    found[:2] *= cell
    return found


def _stands_out(surface: NDArray[np.float32], radii: list[int], rise: float) -> NDArray[np.bool_]:
    """Return where openings of growing radius fall by more than `rise` times the radius."""
    empty = np.isnan(surface)
    low, high = np.where(empty, np.inf, surface), np.zeros(surface.shape, dtype=bool)
    last = low
    for radius in radii:
        eroded = ndimage.minimum_filter(low, 2 * radius + 1, mode="nearest")
        # Where a whole window is empty the minimum is no height: it must not win the maximum.
        eroded[np.isinf(eroded)] = -np.inf
        opened = ndimage.maximum_filter(eroded, 2 * radius + 1, mode="nearest")
        with np.errstate(invalid="ignore"):
            high |= (last - opened) > rise * radius
        last = np.where(empty, np.inf, opened)
    return high & ~empty


def _bilinear(surface: NDArray[Any], points: Points, box: Box) -> NDArray[np.float64]:
    """Return the surface at the points, NaN where one of the four cells around is."""
    at = np.stack([points[1] - box.y0 - 0.5, points[0] - box.x0 - 0.5])
    heights: NDArray[np.float64] = ndimage.map_coordinates(
        surface.astype(np.float64), at, order=1, mode="nearest"
    )
    return heights

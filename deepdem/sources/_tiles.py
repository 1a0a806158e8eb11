"""A tile of a raster from points: which points, from where, and what is made of them. No Dask."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyproj
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from deepdem.blocks import Box
from deepdem.grid import ground_steps
from deepdem.sources._cells import (
    Points,
    cell_counts,
    cell_idw,
    cell_means,
    cell_percentiles,
    inside,
    without_outliers,
)
from deepdem.sources._clouds import Cloud, CopcTree, EptTree, LasFile, Raw
from deepdem.sources._ground import (
    centroids,
    fill_gaps,
    nearest_idw,
    smrf_ground,
    smrf_reach_px,
    tin,
)

__all__ = ["Ground", "Job", "Sorted", "ground_of", "make_tile", "sort_piece"]

#: How bare ground is known: by its class, or by its shape.
Ground = Literal["classes", "smrf"]

# Sorted pieces of unsorted files are cut into squares of so many pixels, which stand on the
# grid's origin, whatever the chunks.
_BUCKET_PX = 128
_OUTLIER_SQUARE_M = 50.0
_EVERY_ROW = 64


@dataclass(frozen=True)
class Job:
    """All that decides what a pixel is, but for the points."""

    grid: GeoBox
    #: Metres of a pixel along (y, x), in the middle of the grid.
    step_m: tuple[float, float]
    clouds: tuple[Cloud, ...]
    kind: str
    method: str
    percentile: float
    gap_m: float
    radius_m: float
    returns: str
    drop_classes: tuple[int, ...]
    ground_classes: tuple[int, ...]
    ground: str
    zscore: float | None
    #: Metres on the ground: a tree's levels with points closer to each other stay unread.
    spacing_m: float | None
    #: Whether the first cloud that has something at a pixel decides it; otherwise all together.
    ranked: bool

    def region(self, box: Box, ground: Ground | None = None) -> Box:
        """Return the pixels whose points `box` needs; it may reach beyond the grid."""
        halo = self._px(self.gap_m)
        if self.kind != "lidar_dtm" and self.method == "idw":
            halo += self._px(self.radius_m)
        if self.kind == "lidar_dtm" and (ground or self.ground) != "classes":
            halo += smrf_reach_px(self.step_m)
        out = Box(box.y0 - halo, box.y1 + halo, box.x0 - halo, box.x1 + halo)
        if self.zscore is None:
            return out
        square = self.square_px
        return Box(
            out.y0 // square * square, -(-out.y1 // square) * square,
            out.x0 // square * square, -(-out.x1 // square) * square,
        )  # fmt: skip

    def _px(self, metres: float) -> int:
        """Return pixels that hold so many metres, and the neighbours of a gap's rim."""
        return math.ceil(metres / min(self.step_m)) + 2 if metres else 0

    def wide(self, box: Box) -> Box:
        """Return the pixels from whose values the gaps in `box` are filled."""
        halo = self._px(self.gap_m)
        return Box(box.y0 - halo, box.y1 + halo, box.x0 - halo, box.x1 + halo)

    @property
    def square_px(self) -> int:
        """Pixels of a square in which outliers are looked for."""
        return max(1, round(_OUTLIER_SQUARE_M / (sum(self.step_m) / 2)))


# --- which points --------------------------------------------------------------------------------


def _chosen(raw: Raw, job: Job, ground: Ground | None) -> NDArray[np.bool_]:
    """Return which points count."""
    keep = ~raw.withheld & ~_in_classes(raw, job.drop_classes)
    returns = job.returns
    if job.kind == "lidar_dtm":
        if ground == "classes":
            return keep & _in_classes(raw, job.ground_classes)
        returns = "last"
    if returns == "first":
        keep &= raw.returns <= 1  # 0 where a file does not count them
    elif returns == "last":
        keep &= raw.returns >= raw.of_returns
    return keep


def _in_classes(raw: Raw, classes: Sequence[int]) -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=bool)
    table[list(classes)] = True
    found: NDArray[np.bool_] = table[raw.classes]
    return found


@lru_cache(maxsize=256)
def _transformer(source: str, target: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(source, target, always_xy=True)


def _between(cloud: Cloud, grid: GeoBox) -> pyproj.Transformer | None:
    """Return the way from the cloud's CRS to the grid's; None where they are the same."""
    assert grid.crs is not None  # grid_from has seen to it
    target = grid.crs.proj.to_2d()
    if cloud.frame.crs.equals(target, ignore_axis_order=True):
        return None
    return _transformer(cloud.frame.crs.to_wkt(), target.to_wkt())


def to_points(cloud: Cloud, raw: Raw, job: Job, ground: Ground | None) -> Points:
    """Return the points that count, in pixels of the grid, heights in metres."""
    keep = _chosen(raw, job, ground)
    x, y = raw.x[keep], raw.y[keep]
    transformer = _between(cloud, job.grid)
    if transformer is not None:
        x, y = transformer.transform(x, y)
    value = raw.intensity[keep] if job.kind == "intensity" else raw.z[keep] * cloud.frame.height_m
    transform = job.grid.transform
    points = np.empty((3, len(x)))
    points[0] = (x - transform.c) / transform.a
    points[1] = (y - transform.f) / transform.e
    points[2] = value
    sound = np.isfinite(points).all(axis=0)
    return points if sound.all() else points[:, sound]


def footprint_px(cloud: Cloud, job: Job) -> Box:
    """Return the pixels of the grid that the cloud's extent covers, and one more all round."""
    transformer, extent = _between(cloud, job.grid), cloud.extent
    if transformer is not None:
        extent = transformer.transform_bounds(*extent, densify_pts=21)
    if not np.isfinite(extent).all():
        return Box(0, 0, 0, 0)  # the other side of the Earth
    cols, rows = zip(*(~job.grid.transform * corner for corner in (extent[:2], extent[2:])),
                     strict=True)  # fmt: skip
    return Box(
        math.floor(min(rows)) - 1, math.ceil(max(rows)) + 1,
        math.floor(min(cols)) - 1, math.ceil(max(cols)) + 1,
    )  # fmt: skip


def _extent(region: Box, cloud: Cloud, job: Job) -> tuple[float, float, float, float] | None:
    """Return a region as an extent in the cloud's CRS, there with a pixel more all round."""
    region = region.intersect(footprint_px(cloud, job))
    if region.empty:
        return None
    transformer = _between(cloud, job.grid)
    more = 0 if transformer is None else 1  # edges are not straight any more
    transform = job.grid.transform
    left, top = transform * (region.x0 - more, region.y0 - more)
    right, bottom = transform * (region.x1 + more, region.y1 + more)
    if transformer is None:
        return left, bottom, right, top
    found: tuple[float, float, float, float] = transformer.transform_bounds(
        left, bottom, right, top, densify_pts=21, direction="INVERSE"
    )
    return found


def _spacing(cloud: Cloud, job: Job) -> float | None:
    """Return the spacing wanted in the cloud's own units, which need not be metres on the ground.

    A metre of EPSG:3857 is 0.7 m on the ground in the south of France.
    """
    if job.spacing_m is None:
        return None
    left, bottom, right, top = cloud.extent
    steps = ground_steps(
        cloud.frame.crs, at=((bottom + top) / 2, (left + right) / 2), step=(1.0, 1.0)
    )
    return job.spacing_m / (sum(steps) / 2)


def _tree_points(cloud: CopcTree | EptTree, region: Box, job: Job, ground: Ground | None) -> Points:
    extent = _extent(region, cloud, job)
    if extent is None:
        return np.empty((3, 0))
    raw = cloud.read(extent, _spacing(cloud, job))
    return inside(to_points(cloud, raw, job, ground), region)


def ground_of(job: Job) -> Ground:
    """Return how ground is known: by class if a sample of any of the clouds has such points.

    Eight clouds are looked at, spread over all: the root of a tree, fifty thousand points of a
    file.
    """
    told: dict[str, Ground] = {"classes": "classes", "smrf": "smrf"}
    if job.ground in told:
        return told[job.ground]
    some = np.unique(np.linspace(0, len(job.clouds) - 1, 8).round().astype(int))
    for n in some:
        if _in_classes(_sample(job.clouds[n]), job.ground_classes).any():
            return "classes"
    return "smrf"


@lru_cache(maxsize=64)
def _sample(cloud: Cloud) -> Raw:
    assert isinstance(cloud, LasFile | CopcTree | EptTree)
    return cloud.sample()


# --- files in any order --------------------------------------------------------------------------


class Sorted:
    """A piece of an unsorted file, sorted by place, on this machine's disk.

    The file goes when this object does, which Dask lets go as soon as no tile needs it. A copy on
    another worker reads the same file; where it cannot, for the machine is another one or the
    worker is gone, the piece is decoded again.
    """

    def __init__(self, number: int, span: tuple[int, int], points: Points):
        self.number, self.span, self.path = number, span, _new_path()
        buckets = np.floor(points[:2] / _BUCKET_PX).astype(np.int64)
        low = buckets.min(axis=1) if points.shape[1] else np.zeros(2, dtype=np.int64)
        cols = int(buckets[0].max() - low[0]) + 1 if points.shape[1] else 1
        flat = (buckets[1] - low[1]) * cols + buckets[0] - low[0]
        if flat.size and flat.max() < 2**16:
            flat = flat.astype(np.uint16)  # NumPy sorts these by digits
        order = np.argsort(flat, kind="stable")
        np.save(self.path, points[:, order])
        self.held, counts = np.unique(flat, return_counts=True)
        self.ends = np.cumsum(counts)
        self.low, self.cols = low, cols
        self.keeper = weakref.finalize(self, _unlink, str(self.path))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what removes the file: it is the original's to do."""
        return {k: v for k, v in vars(self).items() if k != "keeper"}

    def points(self, region: Box, job: Job, ground: Ground | None) -> Points:
        """Return the points of a region."""
        rows, cols = np.divmod(self.held.astype(np.int64), self.cols)
        top, left = (rows + self.low[1]) * _BUCKET_PX, (cols + self.low[0]) * _BUCKET_PX
        touched = np.flatnonzero(
            (top < region.y1) & (top + _BUCKET_PX > region.y0)
            & (left < region.x1) & (left + _BUCKET_PX > region.x0)
        )  # fmt: skip
        if not touched.size:
            return np.empty((3, 0))
        try:
            every = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            every = _decoded(job, self.number, self.span, ground)
            return inside(_in_buckets(every), region)
        starts = np.concatenate([[0], self.ends[:-1]])
        runs = np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1)
        parts = [every[:, starts[run[0]] : self.ends[run[-1]]] for run in runs]
        return inside(np.concatenate(parts, axis=1), region)


def _in_buckets(points: Points) -> Points:
    """Return points in the order that `Sorted` gives them."""
    col, row = np.floor(points[:2] / _BUCKET_PX).astype(np.int64)
    return points[:, np.lexsort((col, row))]


_NUMBERS, _LOCK = itertools.count(), threading.Lock()


@lru_cache(maxsize=1)
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="deepdem-points-", ignore_cleanup_errors=True)


def _new_path() -> Path:
    """Return a new file's path: in the folder of the Dask worker, or in one of this process."""
    with _LOCK:  # two threads at once would make two, and one of them would be removed
        folder = Path(_own_folder().name)
    if "distributed" in sys.modules:
        from distributed import get_worker

        with contextlib.suppress(ValueError):  # no worker runs this
            folder = Path(get_worker().local_directory)
    return folder / f"points-{os.getpid()}-{next(_NUMBERS)}.npy"


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def sort_piece(
    job: Job, number: int, span: tuple[int, int], ground: Ground | None, whole: Box
) -> Sorted:
    """Decode a piece of a file, once, and sort what of it lies in `whole` by place."""
    return Sorted(number, span, inside(_decoded(job, number, span, ground), whole))


def _decoded(job: Job, number: int, span: tuple[int, int], ground: Ground | None) -> Points:
    cloud = job.clouds[number]
    assert isinstance(cloud, LasFile)
    return to_points(cloud, cloud.read(*span), job, ground)


# --- what is made of them ------------------------------------------------------------------------


def make_tile(
    job: Job, box: Box, numbers: Sequence[int], pieces: Sequence[Sorted], ground: Ground | None
) -> NDArray[np.float32]:
    """Return the pixels of `box`.

    Parameters
    ----------
    numbers
        Of the clouds that may have points there.
    pieces
        Of those that are files, in order.
    """
    region = job.region(box, ground)

    def points_of(number: int) -> Iterable[Points]:
        cloud = job.clouds[number]
        if isinstance(cloud, LasFile):
            mine = (piece for piece in pieces if piece.number == number)
            return (piece.points(region, job, ground) for piece in mine)
        assert isinstance(cloud, CopcTree | EptTree)
        return (_tree_points(cloud, region, job, ground),)

    if not job.ranked:
        parts = [part for number in numbers for part in points_of(number)]
        return _raster(job, _together(parts), box, region, ground)
    out = _raster(job, _together([]), box, region, ground)
    empty = 0.0 if job.kind == "density" else np.nan
    for number in numbers:
        missing = np.isnan(out) if np.isnan(empty) else out == empty
        if not missing.any():
            break
        more = _raster(job, _together(points_of(number)), box, region, ground)
        out[missing] = more[missing]
    return out


def _together(parts: Iterable[Points]) -> Points:
    return np.concatenate([np.empty((3, 0)), *parts], axis=1)


def _raster(
    job: Job, points: Points, box: Box, region: Box, ground: Ground | None
) -> NDArray[np.float32]:
    if job.zscore is not None:
        points = without_outliers(points, job.zscore, job.square_px)
    if job.kind == "density":
        area = _areas(job.grid, box)
        return (cell_counts(points, box) / area[:, None]).astype(np.float32)
    if job.kind == "lidar_dtm":
        if ground == "smrf":
            points = smrf_ground(points, region, job.step_m)
        points = centroids(points, region)
        if job.method == "idw":
            return nearest_idw(points, box, job.gap_m, job.step_m)
        return tin(points, box, job.gap_m, job.step_m)
    wide = job.wide(box)
    if job.method == "mean":
        cells = cell_means(points, wide)
    elif job.method == "idw":
        cells = cell_idw(points, wide, job.radius_m, job.step_m)
    else:
        cells = cell_percentiles(points, wide, job.percentile)
    return fill_gaps(cells, wide, job.gap_m, job.step_m)[box.within(wide)] if job.gap_m else cells


def _areas(grid: GeoBox, box: Box) -> NDArray[np.float64]:
    """Return the square metres on the ground of a pixel of each row, shape (rows,).

    Measured in the middle column, at every 64th row of the grid, and in between linearly.
    """
    crs = None if grid.crs is None else grid.crs.proj
    dx, dy = grid.resolution.xy
    knots = np.arange(box.y0 // _EVERY_ROW, -(-box.y1 // _EVERY_ROW) + 1) * _EVERY_ROW
    areas = []
    for row in knots:
        x, y = grid.transform * (grid.shape.x / 2, float(row))
        areas.append(abs(math.prod(ground_steps(crs, at=(y, x), step=(dy, dx)))))
    rows = np.arange(box.y0, box.y1) + 0.5
    found: NDArray[np.float64] = np.interp(rows, knots, areas)
    return found

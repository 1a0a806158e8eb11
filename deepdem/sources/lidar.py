"""Lidar points on a grid: the truth, lazy, from LAS, LAZ, COPC and EPT, local or by HTTP.

An output chunk reads what it needs: of a tree (COPC, EPT) the nodes that its bounds touch, down to
the level that its pixels can show. The points of a LAS or LAZ file are in any order, so that each
piece of it is decoded once, by one task, sorted by place into a temporary file, and read from there
by the chunks: nothing but a piece and a chunk is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from os import PathLike
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, List, Task, TaskRef
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from deepdem.blocks import Box, Chunks, chunks_of
from deepdem.grid import grid_from, ground_steps
from deepdem.layers import describe
from deepdem.sources._clouds import LasFile, open_clouds
from deepdem.sources._collections import USGS_3DEP, Collection, find_collections
from deepdem.sources._tiles import Job, footprint_px, ground_of, make_tile, sort_piece

__all__ = ["USGS_3DEP", "Collection", "PointSource", "find_collections", "grid_points"]

#: A path, a URL or a pattern, a collection of `find_collections`, or several of one sort.
PointSource: TypeAlias = (
    "str | PathLike[str] | Collection | Sequence[str | PathLike[str]] | Sequence[Collection]"
)

_METHODS = {
    "lidar_dsm": ("percentile", "max", "mean", "idw"),
    "lidar_dtm": ("tin", "idw"),
    "intensity": ("mean", "percentile", "max", "idw"),
    "density": ("count",),
}
_SHORT = {"dsm": "lidar_dsm", "dtm": "lidar_dtm"}
_RETURNS = {"lidar_dsm": "first", "lidar_dtm": "all", "intensity": "first", "density": "all"}
_POINTS_A_CHUNK = 3_000_000
_NAMED = 8


def grid_points(
    source: PointSource,
    like: GeoBox | xr.Dataset | xr.DataArray,
    kind: str = "lidar_dsm",
    *,
    method: str | None = None,
    percentile: float = 98.0,
    max_gap: float | None = None,
    radius: float | None = None,
    returns: str | None = None,
    drop_classes: Sequence[int] = (7, 18),
    ground: str = "auto",
    water: bool = False,
    zscore: float | None = None,
    crs: Any = None,
    vertical_unit: str | float | None = None,
    spacing: float | str | None = "auto",
    chunks: int | str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> xr.DataArray:
    """Return lidar points as a layer on the grid of `like`, lazy.

    Called, it reads headers (of a tree ``ept.json``, or the head of the COPC file). Computed, each
    chunk reads the hierarchy and the nodes that it touches; a LAS or LAZ file is decoded once, and
    what counts of it waits in temporary files, 24 bytes a point (in a worker's local directory, or
    in ``tempfile.gettempdir()``) until no chunk needs it. The result does not depend on the chunks.
    Points are reprojected one by one; heights keep their vertical datum and become metres.

    Parameters
    ----------
    source
        A LAS, LAZ or COPC file, an ``ept.json`` or its folder, by path or by a URL that fsspec
        knows, a pattern of local files, or several: their points count together. Of the
        collections of `find_collections` the first that has something at a pixel decides it.
    like
        A scene, a DataArray or a GeoBox: the grid.
    kind
        ``"lidar_dsm"``: the surface, metres. ``"lidar_dtm"``: bare ground, metres.
        ``"intensity"``. ``"density"``: points per square metre on the ground, 0 where there are
        none.
    method
        ``lidar_dsm``: ``"percentile"`` (default), ``"max"`` or ``"mean"`` of the points in the
        pixel, or ``"idw"``. ``lidar_dtm``: ``"tin"`` (default), the linear surface through ground
        points (their mean in each pixel) at the pixel's centre, or ``"idw"`` of the 12 nearest.
        ``intensity``: ``"mean"`` (default) or the surface's.
    percentile
        For ``"percentile"``.
    max_gap
        Metres: what is interpolated is as wide as that at most, the width of a gap being that of
        the widest circle in it. Default: 50 for ``lidar_dtm``, else 0: a pixel without points is
        NaN.
    radius
        Metres, for ``"idw"`` of a surface or of intensity; default: a pixel's diagonal.
    returns
        ``"first"`` (those of several and only returns; the default for ``lidar_dsm`` and
        ``intensity``), ``"last"`` or ``"all"``. Ground is of all returns.
    drop_classes
        Left out; 7 and 18 are noise. Points flagged as withheld always are.
    ground
        ``"classes"``: class 2 (with `water`, 9 too). ``"smrf"``: found by shape among the last
        returns, with the simple morphological filter. ``"auto"``: by class if a sample of the
        points has it.
    zscore
        Points farther from the mean of the square of 50 m around them than so many standard
        deviations are left out.
    crs
        Instead of the CRS that the files state.
    vertical_unit
        ``"m"``, ``"ft"``, ``"us-ft"`` or the metres of one. Default: of the vertical CRS, of the
        GeoTIFF key, or the unit of x and y.
    spacing
        Metres on the ground: levels of a tree whose points are closer are not read. ``"auto"``: a
        16th of a pixel (256 points in each), for ``"max"`` and ``density`` all; ``None``: all.
    chunks
        The width of the result's chunks. ``"auto"``: three million points in each.
    storage_options
        For fsspec: headers, tokens.

    Returns
    -------
    DataArray
        Dims (y, x), Dask-backed, float32; NaN where there are no points. Named `kind`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        No CRS: pass ``crs=``. A kind, method or option that is not known; the message lists them.
    ImportError
        laspy is missing: ``pip install "deepdem[lidar]"``.

    Examples
    --------
    >>> dsm = grid_points("tiles/*.laz", ds, "lidar_dsm")
    >>> ds = ds.assign(lidar_dsm=dsm, lidar_dtm=grid_points("tiles/*.laz", ds, "lidar_dtm"))
    """
    kind = _SHORT.get(kind, kind)
    method = _checked(kind, method, percentile, returns, ground)
    grid = grid_from(like)
    ranked = isinstance(source, Collection) or _all_collections(source)
    urls: Any = [c.url for c in _as_list(source)] if ranked else source
    clouds = tuple(open_clouds(urls, crs=crs, vertical_unit=vertical_unit,
                               options=storage_options or {}))  # fmt: skip
    centre = grid.transform * (grid.shape.x / 2, grid.shape.y / 2)
    dx, dy = map(abs, grid.resolution.xy)
    step = ground_steps(grid.crs.proj if grid.crs else None, at=centre[::-1], step=(dy, dx))
    job = Job(
        grid=grid, step_m=step, clouds=clouds, kind=kind, method=method,
        percentile=100.0 if method == "max" else float(percentile),
        gap_m=float(max_gap if max_gap is not None else 50.0 if kind == "lidar_dtm" else 0.0),
        radius_m=float(math.hypot(*step) if radius is None else radius),
        returns=returns or _RETURNS[kind], drop_classes=tuple(map(int, drop_classes)),
        ground_classes=(2, 9) if water else (2,), ground=ground, zscore=zscore,
        spacing_m=_spacing(spacing, kind, method, step), ranked=ranked,
    )  # fmt: skip
    size = _chunk_px(job) if chunks == "auto" else int(chunks)
    return _as_layer(job, _graph(job, chunks_of((grid.shape.y, grid.shape.x), size)), source)


def _as_list(source: Any) -> list[Any]:
    return [source] if isinstance(source, Collection) else list(source)


def _all_collections(source: Any) -> bool:
    several = [] if isinstance(source, str | PathLike | Collection) else list(source)
    given = {isinstance(one, Collection) for one in several}
    if len(given) > 1:
        raise ValueError(
            "source= mixes collections with paths: the former are ranked, the latter are not; grid "
            "them apart and join them, first.fillna(second)"
        )
    return given == {True}


def _checked(
    kind: str, method: str | None, percentile: float, returns: str | None, ground: str
) -> str:
    """Return the method, or raise for what is not known."""
    if kind not in _METHODS:
        raise ValueError(f"kind={kind!r}: pass one of {', '.join(_METHODS)}")
    if method is None:
        method = _METHODS[kind][0]
    if method not in _METHODS[kind]:
        raise ValueError(f"{kind}: method={method!r}: pass one of {', '.join(_METHODS[kind])}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"{kind}: percentile={percentile}: pass 0 to 100")
    if returns not in (None, "first", "last", "all"):
        raise ValueError(f"{kind}: returns={returns!r}: pass 'first', 'last' or 'all'")
    if ground not in ("auto", "classes", "smrf"):
        raise ValueError(f"{kind}: ground={ground!r}: pass 'auto', 'classes' or 'smrf'")
    return method


def _spacing(
    spacing: float | str | None, kind: str, method: str, step: tuple[float, float]
) -> float | None:
    if spacing == "auto":
        return None if kind == "density" or method == "max" else sum(step) / 2 / 16
    if spacing is None:
        return None
    if isinstance(spacing, str) or not spacing > 0:
        raise ValueError(f"spacing={spacing!r}: pass 'auto', None or metres")
    return float(spacing)


def _chunk_px(job: Job) -> int:
    """Return the width of chunks of about three million points."""
    pixels = [box.shape[0] * box.shape[1] for box in (footprint_px(c, job) for c in job.clouds)]
    a_pixel = sum(c.count for c in job.clouds) / max(sum(pixels), 1)
    if job.spacing_m is not None and not any(isinstance(c, LasFile) for c in job.clouds):
        a_pixel = min(a_pixel, 2 * (sum(job.step_m) / 2 / job.spacing_m) ** 2)
    width = math.sqrt(_POINTS_A_CHUNK / max(a_pixel, 1e-6))
    return int(min(max(width // 64, 1), 32)) * 64


# --- the graph -----------------------------------------------------------------------------------


def _graph(job: Job, chunks: Chunks) -> da.Array:
    """Return the lazy pixels.

    One task a chunk; before it, where files are in any order, one task a piece of those that the
    chunk touches; and one that says how ground is known.
    """
    token = tokenize(job, chunks)
    name, sort = f"grid-points-{job.kind}-{token}", f"sort-points-{token}"
    graph: dict[Any, Any] = {f"{name}-job": DataNode(f"{name}-job", job)}
    shared, how = TaskRef(f"{name}-job"), TaskRef(f"{name}-ground")
    ground_key = f"{name}-ground"
    if job.kind == "lidar_dtm":
        graph[ground_key] = Task(ground_key, ground_of, shared)
    else:
        graph[ground_key] = DataNode(ground_key, None)
    edges = [np.concatenate([[0], np.cumsum(sizes)]).tolist() for sizes in chunks]
    whole = job.region(Box(0, edges[0][-1], 0, edges[1][-1]))
    footprints = [footprint_px(cloud, job) for cloud in job.clouds]
    sides = np.array([(b.y0, b.y1, b.x0, b.x1) for b in footprints])
    pieces: dict[int, list[Any]] = {}
    for number, cloud in enumerate(job.clouds):
        if isinstance(cloud, LasFile) and not footprints[number].intersect(whole).empty:
            keys = [(sort, number, start) for start, _ in cloud.pieces()]
            for key, span in zip(keys, cloud.pieces(), strict=True):
                graph[key] = Task(key, sort_piece, shared, number, span, how, whole)
            pieces[number] = [TaskRef(key) for key in keys]
    for i, j in product(range(len(chunks[0])), range(len(chunks[1]))):
        box = Box(edges[0][i], edges[0][i + 1], edges[1][j], edges[1][j + 1])
        region = job.region(box)
        numbers = np.flatnonzero(
            (sides[:, 0] < region.y1) & (sides[:, 1] > region.y0)
            & (sides[:, 2] < region.x1) & (sides[:, 3] > region.x0)
        ).tolist()  # fmt: skip
        mine = List(*(ref for number in numbers for ref in pieces.get(number, ())))
        graph[(name, i, j)] = Task((name, i, j), make_tile, shared, box, numbers, mine, how)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[])
    return da.Array(layers, name, chunks=chunks, dtype=np.dtype(np.float32))


def _as_layer(job: Job, data: da.Array, source: Any) -> xr.DataArray:
    from deepdem import __version__

    layer = describe(job.kind)
    out = xr.DataArray(data, coords=xr_coords(job.grid, always_yx=True), dims=("y", "x"))
    urls = [cloud.url.partition("?")[0] for cloud in job.clouds]  # a signature is nobody's business
    attrs: dict[str, Any] = {
        "long_name": layer.long_name, "units": layer.units,
        "source": ", ".join(urls[:_NAMED]) + (f" and {len(urls) - _NAMED} more"
                                              if len(urls) > _NAMED else ""),
        "deepdem_version": __version__,
        "deepdem_method": job.method, "deepdem_points": sum(c.count for c in job.clouds),
        "deepdem_drop_classes": list(job.drop_classes),
    }  # fmt: skip
    if job.method == "percentile":
        attrs["deepdem_percentile"] = job.percentile
    if job.kind == "lidar_dtm":
        attrs |= {"deepdem_ground": job.ground, "deepdem_ground_classes": list(job.ground_classes)}
    else:
        attrs["deepdem_returns"] = job.returns
    if job.gap_m:
        attrs["deepdem_max_gap_m"] = job.gap_m
    if job.method == "idw" and job.kind != "lidar_dtm":
        attrs["deepdem_radius_m"] = job.radius_m
    if job.zscore is not None:
        attrs["deepdem_zscore"] = float(job.zscore)
    if job.spacing_m is not None:
        attrs["deepdem_spacing_m"] = job.spacing_m
    if layer.is_height:
        units = sorted({f"{c.frame.height_m:.9g} m, from {c.frame.unit_from}" for c in job.clouds})
        attrs["deepdem_height_unit"] = "; ".join(units)
        above = {c.frame.above for c in job.clouds}
        if len(above) == 1 and None not in above:
            attrs["vertical_reference"] = above.pop()
    if job.ranked:
        attrs["deepdem_collections"] = [c.name for c in _as_list(source)]
    out.attrs, out.encoding = attrs, {"grid_mapping": "spatial_ref"}
    # Not written anywhere: what `deepdem.write` needs to know whether the points have changed.
    stamp: NDArray[np.uint64] = np.frombuffer(
        bytes.fromhex(tokenize(job)), dtype=np.uint64, count=1
    )
    out.encoding["deepdem_inputs"] = da.full(data.numblocks, stamp[0] | 1, np.uint64, chunks=1)
    return out.rename(job.kind)

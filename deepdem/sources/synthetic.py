"""The embedded default scene: a made-up landscape, its lidar truth and a stereo DSM that errs.

What is drawn lives in `deepdem.sources._landscape`, what the satellite makes of it in
`deepdem.sources._stereo`; here it is spread over chunks and labelled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
import pyproj
import rioxarray  # noqa: F401  registers .rio
import xarray as xr
from affine import Affine
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from deepdem.layers import describe
from deepdem.sources._lattice import Frame, World
from deepdem.sources._stereo import render

__all__ = ["synthetic_scene"]

_LAYERS = (
    "dsm",
    "ortho_left",
    "ortho_right",
    "triangulation_error",
    "red",
    "nir",
    "lidar_dsm",
    "lidar_dtm",
)

# Raise it whenever the landscape changes: it is part of every token, so no cache mixes two worlds.
_VERSION = 1

# Where the scene's top-left corner lies, metres: on the cells of the coarse bands.
_EASTING_M, _NORTHING_M = 580_000.0, 5_400_000.0


def synthetic_scene(
    shape: tuple[int, int] = (1024, 1024),
    *,
    seed: int = 0,
    pixel_size: float = 1.0,
    crs: Any = "EPSG:32610",
    chunks: int | str | tuple[Any, ...] = 1024,
) -> xr.Dataset:
    """Return a made-up scene: all layers of a stereo DSM and both lidar truths, lazy.

    The landscape is an endless plane in metres, fixed by `seed`; a scene is its corner, cut to
    `shape` and sampled at `pixel_size`. So a larger scene begins with the smaller one, a finer
    scene shows the same trees and houses, and any chunks give the same numbers.

    **Modelled.** Relief with joined valleys, flat valley floors and gullies; parcels with crops,
    roads, lanes and hedges; stands of single crowns (cones and domes, 6 to 30 m); villages of
    houses with gable and flat roofs, and halls. Orthoimages: sun shading, cast shadows, blur, the
    stretched edge of whatever hides a pixel from the sensor, a displacement where `dsm` is wrong
    (the images are put on the map with it), shot and read-out noise. The initial ``dsm``: a
    matching window that rounds and a foreground that wins in it, bulges and noise in shadow and
    occlusion and on plain fields and roofs, noise correlated over some metres, attitude jitter
    along the track, blunders and holes. ``triangulation_error`` rises with that noise, on
    blunders, at tall edges and where a view is blind, with a wide scatter of its own.
    At 1 m the initial ``dsm`` has, over a square kilometre of different places, an MAE of 1.3 to
    1.7 m, an RMSE of 2.7 to 3.0 m, an NMAD of 0.6 to 1.0 m, a bias of 0.6 to 0.7 m (mostly in
    woods) and 3 to 4 % of holes.

    **Not modelled.** Image matching itself: the stereo errors are drawn from the true surface by
    filters and masks, not by correlating the images. Cameras and orbits (parallel rays only),
    water, bridges, crown transparency, moving things, clouds, change between the images and the
    lidar, errors of the lidar. Shadows end after 32 m and relief casts none beyond; views reach
    16 m. The matching window has a size in metres, whatever the pixel size, and what is smaller
    than a pixel is sampled at its centre, not averaged.

    Parameters
    ----------
    shape
        Rows and columns.
    seed
        Any integer: another seed, another landscape.
    pixel_size
        Metres. The speed is best and the errors most lifelike between 0.5 and 2.
    crs
        Any projected CRS that `pyproj.CRS` understands. The corner lies at 580 000 m east,
        5 400 000 m north, whatever the CRS; the coordinates are in its units.
    chunks
        As `dask.array` takes them, for ``(y, x)``. Each chunk is made with a margin of about 64 m,
        so chunks below 512 pixels waste work.

    Returns
    -------
    xarray.Dataset
        Dims ``(y, x)``, pixel centres, ``spatial_ref``; nothing is computed. Variables, all
        float32: ``dsm``, ``lidar_dsm``, ``lidar_dtm`` (metres), ``triangulation_error`` (metres,
        positive), ``ortho_left``, ``ortho_right`` (whole digital numbers, 1 to 2047), ``red``,
        ``nir`` (reflectance, from 10 m cells). NaN only in ``dsm`` and ``triangulation_error``,
        in the holes of the stereo.

    Raises
    ------
    ValueError
        If `shape` is not two positive integers, `pixel_size` not a positive number, `seed` not an
        integer, or `crs` not projected (pass, for example, the UTM zone of the place).

    Examples
    --------
    >>> ds = synthetic_scene((256, 256), seed=3)
    >>> error = (ds["dsm"] - ds["lidar_dsm"]).compute()
    >>> bool(0.5 < abs(error).mean() < 4.0)  # metres
    True
    """
    height, width = _checked_shape(shape)
    pixel_m = _checked_pixel_size(pixel_size)
    world = World(_checked_seed(seed), pixel_m)
    projected = _checked_crs(crs)
    unit_m = projected.axis_info[0].unit_conversion_factor or 1.0

    grid = da.core.normalize_chunks(chunks, (height, width), dtype=np.float32)
    arrays = _spread(world, grid)
    pixel, left, top = (value / unit_m for value in (pixel_m, _EASTING_M, _NORTHING_M))
    ds = xr.Dataset(
        {name: (("y", "x"), array, _attrs(name)) for name, array in arrays.items()},
        coords={
            "y": top - (np.arange(height) + 0.5) * pixel,
            "x": left + (np.arange(width) + 0.5) * pixel,
        },
        attrs={
            "title": "Synthetic landscape with a simulated stereo DSM",
            "source": "deepdem.synthetic_scene",
            "seed": world.seed,
            "pixel_size": pixel_m,
        },
    )
    ds = ds.rio.write_crs(projected)
    ds = ds.rio.write_transform(Affine(pixel, 0.0, left, 0.0, -pixel, top))
    return ds.rio.write_coordinate_system()  # type: ignore[no-any-return]  # rioxarray is untyped


def _attrs(name: str) -> dict[str, str]:
    layer = describe(name)
    return {"long_name": layer.long_name, "units": layer.units}


def _spread(world: World, chunks: tuple[tuple[int, ...], ...]) -> dict[str, da.Array]:
    """Return the layers as Dask arrays.

    One task a chunk draws all layers, for they share the landscape; a layer's own task only picks
    its array out of that answer.
    """
    token = tokenize(_VERSION, world, chunks)
    blocks = f"synthetic_scene-{token}"
    starts = [np.concatenate([[0], np.cumsum(c)[:-1]]).tolist() for c in chunks]
    drawn: dict[tuple[str, int, int], Any] = {
        (blocks, i, j): (_block, world, y0, x0, chunks[0][i], chunks[1][j])
        for i, y0 in enumerate(starts[0])
        for j, x0 in enumerate(starts[1])
    }
    arrays = {}
    for name in _LAYERS:
        own = f"{name}-{token}"
        picked = {(own, *key[1:]): (operator.getitem, key, name) for key in drawn}
        layers: Mapping[str, Mapping[Any, Any]] = {blocks: drawn, own: picked}
        graph = HighLevelGraph(layers, {blocks: set(), own: {blocks}})
        arrays[name] = da.Array(graph, own, chunks, dtype=np.float32)
    return arrays


def _block(world: World, y0: int, x0: int, height: int, width: int) -> dict[str, Any]:
    return dict(render(world, Frame(y0, x0, height, width, world.pixel_m)))


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(n) for n in shape)
    except (TypeError, ValueError):
        height = width = 0
    if height <= 0 or width <= 0:
        raise ValueError(
            f"shape: got {shape!r}, wanted two positive integers: pass (rows, columns), "
            "for example (1024, 1024)"
        )
    return height, width


def _checked_pixel_size(pixel_size: float) -> float:
    try:
        pixel_m = float(pixel_size)
    except (TypeError, ValueError):
        pixel_m = math.nan
    if not (math.isfinite(pixel_m) and pixel_m > 0):
        raise ValueError(
            f"pixel_size: got {pixel_size!r}, wanted a positive number of metres: "
            "pass, for example, 1.0"
        )
    return pixel_m


def _checked_seed(seed: int) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise ValueError(f"seed: got {seed!r}, wanted an integer: pass, for example, 0") from None


def _checked_crs(crs: Any) -> pyproj.CRS:
    try:
        parsed = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise ValueError(
            f"crs: got {crs!r}, wanted a projected CRS: pass one that pyproj understands, "
            "for example 'EPSG:32610'"
        ) from error
    if not parsed.is_projected:
        raise ValueError(
            f"crs: got {parsed.name!r}, wanted a projected CRS because the landscape is in metres: "
            "pass, for example, the UTM zone of the place ('EPSG:32610')"
        )
    return parsed

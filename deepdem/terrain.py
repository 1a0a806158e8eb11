"""Terrain: slope and shaded relief, and the steps in metres that both need.

A kernel of the 3 by 3 neighbourhood each, and a thin lazy wrapper.
"""

# xarray-spatial would be the library for both. At 0.5.3 its hillshade ignores the cell size (relief
# on a grid of 0.5 m is half as steep) and which way y runs, and its slope is NaN along the edge and
# beside every hole.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pyproj
import xarray as xr
from numpy.typing import NDArray

from deepdem.blocks import Box, map_regions
from deepdem.grid import ground_steps

__all__ = [
    "hillshade",
    "horn_gradient",
    "neighbourhood",
    "shade",
    "slope",
    "slope_kernel",
    "steps",
    "steps_m",
]

Array = NDArray[Any]


# --- kernels: NumPy only -------------------------------------------------------------------------


def horn_gradient(z: Array, step_y: float, step_x: float) -> tuple[Array, Array]:
    """Return dz/dy and dz/dx, shape and float dtype of `z`, by the 3x3 weights of Horn (1981).

    A difference that lacks a neighbour (NaN, or beyond the edge) is taken on the other side
    only, and one that lacks both gets no weight, so that a plane's gradient is exact beside holes
    and at the edge. NaN where `z` is NaN or stands alone.
    """
    padded = np.pad(z, 1, constant_values=np.nan)

    def along_rows(p: Array) -> Array:
        """Return the mean difference between columns, per pixel; `p` has one more all round."""
        total = np.zeros((p.shape[0] - 2, p.shape[1] - 2), z.dtype)
        weight = np.zeros_like(total)
        for row, w in ((0, 1), (1, 2), (2, 1)):
            line = p[row : row + total.shape[0]]
            back, here, ahead = line[:, :-2], line[:, 1:-1], line[:, 2:]
            d = (ahead - back) / 2
            d = np.where(np.isnan(d), ahead - here, d)
            d = np.where(np.isnan(d), here - back, d)
            known = ~np.isnan(d)
            total += np.where(known, w * d, 0)
            weight += w * known
        weight[np.isnan(p[1:-1, 1:-1]) | (weight == 0)] = np.nan
        mean: Array = total / weight
        return mean

    return along_rows(padded.T).T / z.dtype.type(step_y), along_rows(padded) / z.dtype.type(step_x)


def slope_kernel(z: Array, *, step_y: float, step_x: float) -> Array:
    """Return the slope in degrees; steps as in `shade`, NaN as in `horn_gradient`."""
    return np.degrees(np.arctan(np.hypot(*horn_gradient(z, step_y, step_x))))


def shade(
    z: Array, *, step_y: float, step_x: float, azimuth: float, altitude: float, z_factor: float
) -> Array:
    """Return the cosine of the angle between the sun and the surface's normal, 0 in shadow.

    Lambert's law with the gradient of Horn (1981). Steps are metres, negative where the
    coordinate descends; a pixel without a neighbour is flat; NaN where `z` is.
    """
    z = z.astype(np.float32, copy=False)
    to_north, to_east = (
        z_factor * np.nan_to_num(g) for g in horn_gradient(z, step_y, step_x)
    )  # fmt: skip
    sun, up = math.radians(azimuth), math.radians(altitude)
    towards_sun = math.sin(sun) * to_east + math.cos(sun) * to_north
    lit = math.sin(up) - math.cos(up) * towards_sun
    lit = np.clip(lit / np.sqrt(1 + to_east**2 + to_north**2), 0, 1)
    shaded: Array = np.where(np.isnan(z), np.float32(np.nan), lit.astype(np.float32))
    return shaded


# --- Dask and xarray: no arithmetic on pixels ----------------------------------------------------


def slope(heights: xr.DataArray) -> xr.DataArray:
    """Return the slope in degrees by Horn (1981), lazy, float, shape of `heights`, NaN kept.

    Chunks get a halo of one pixel, edges and holes one-sided differences: no pixel is lost beside
    them. Pixel sizes are metres on the ground, whatever the CRS's units.

    Parameters
    ----------
    heights
        Metres, dims (y, x), NaN no data.

    Raises
    ------
    ValueError
        A dimension has but one pixel, so that there is no slope.

    Examples
    --------
    >>> x = xr.DataArray([0.0, 2.0, 4.0], dims="x", coords={"x": [0.0, 2.0, 4.0]})
    >>> y = xr.DataArray([2.0, 0.0], dims="y", coords={"y": [2.0, 0.0]})
    >>> float(slope(x + 0 * y).mean().round(3))
    45.0
    """
    step_y, step_x = steps_m(heights)
    data = neighbourhood(heights, slope_kernel, step_y=step_y, step_x=step_x)
    attrs = {"units": "degree", "long_name": "slope"}
    return heights.transpose("y", "x").copy(data=data).rename("slope").assign_attrs(attrs)


def hillshade(
    heights: xr.DataArray, *, azimuth: float = 315, altitude: float = 45, z_factor: float = 1
) -> xr.DataArray:
    """Return the shaded relief of `heights`: lazy, float32 in [0, 1], NaN where `heights` is.

    Lambert's law, the cosine between sun and normal, with the gradient of Horn (1981): chunks get
    a halo of one pixel, edges and holes one-sided differences, so nothing is lost beside them.

    Parameters
    ----------
    heights
        Metres, dims (y, x), with coordinates: they say where north is and how large a pixel is.
    azimuth, altitude
        Of the sun, degrees: clockwise from north, and above the horizon.
    z_factor
        Heights are multiplied by it.

    Returns
    -------
    xarray.DataArray
        Dims (y, x), the coordinates of `heights`, named ``hillshade``.

    Raises
    ------
    ValueError
        A dimension has but one pixel or no coordinate: there is no pixel size.

    Examples
    --------
    >>> flat = xr.DataArray(np.ones((2, 2)), {"y": [1.0, 0.0], "x": [0.0, 1.0]}, ("y", "x"))
    >>> float(hillshade(flat, altitude=30)[0, 0].round(6))
    0.5
    """
    step_y, step_x = steps_m(heights)
    sun = {"azimuth": float(azimuth), "altitude": float(altitude), "z_factor": float(z_factor)}
    z = heights.transpose("y", "x").astype(np.float32)
    shaded = z.copy(data=neighbourhood(z, shade, step_y=step_y, step_x=step_x, **sun))
    shaded.attrs = {"long_name": "shaded relief", "units": "1", **sun}
    return shaded.rename("hillshade")


def neighbourhood(heights: xr.DataArray, kernel: Callable[..., Array], **options: Any) -> da.Array:
    """Return the Dask array of `kernel` over the chunks of `heights` with one pixel of halo.

    A chunk stays in memory until its neighbours are made: of 8 to 24 rows of chunks Dask keeps up
    to seven (measured with hillshade).
    """
    heights = heights.transpose("y", "x")
    data: da.Array = (heights if heights.chunks is not None else heights.chunk(2048)).data
    if data.dtype.kind != "f":
        data = data.astype(np.float32)
    whole = Box(0, data.shape[0], 0, data.shape[1])

    def region(out: Box) -> Box:
        return Box(out.y0 - 1, out.y1 + 1, out.x0 - 1, out.x1 + 1).intersect(whole)

    return map_regions(
        _without_halo, [data], chunks=data.chunks, region=region, dtype=data.dtype,
        name=kernel.__name__, common={"kernel": kernel, "options": options}, reread=True,
    )  # fmt: skip


def _without_halo(
    arrays: list[Array], *, out: Box, region: Box, kernel: Callable[..., Array],
    options: dict[str, Any],
) -> Array:  # fmt: skip
    # A copy: a view would keep the halo.
    return np.ascontiguousarray(kernel(arrays[0], **options)[out.within(region)])


def steps_m(layer: xr.DataArray | xr.Dataset) -> tuple[float, float]:
    """Return the steps along y and x in metres on the ground, negative where y or x descends.

    Measured in the middle of the grid, see `deepdem.grid.ground_steps`; without a CRS they are
    taken for metres.
    """
    step = steps(layer)
    wkt = layer.coords["spatial_ref"].attrs.get("crs_wkt") if "spatial_ref" in layer.coords else ""
    y, x = (float(layer[dim][layer.sizes[dim] // 2]) for dim in ("y", "x"))
    return ground_steps(pyproj.CRS.from_wkt(wkt) if wkt else None, at=(y, x), step=step)


def steps(layer: xr.DataArray | xr.Dataset) -> tuple[float, float]:
    """Return the signed steps along y and x in the CRS's units."""
    for dim in ("y", "x"):
        if dim not in layer.coords or layer.sizes[dim] < 2:
            raise ValueError(
                f"no pixel size along {dim!r}: it needs a coordinate of at least 2 pixels, got "
                f"sizes {dict(layer.sizes)} and coordinates {list(layer.coords)}"
            )
    y, x = layer["y"].to_numpy(), layer["x"].to_numpy()
    return float(y[-1] - y[0]) / (y.size - 1), float(x[-1] - x[0]) / (x.size - 1)

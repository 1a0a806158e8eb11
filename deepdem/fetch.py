"""A layer brought from elsewhere onto disk: its grid, and a file that is whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox

from deepdem.cog import write_cog
from deepdem.grid import grid_from
from deepdem.sources.raster import open_layer
from deepdem.store import open_scene
from deepdem.write import write_zarr

__all__ = ["target_grid", "write_layer"]


def target_grid(
    like: str | None = None,
    *,
    group: str | None = None,
    bounds: tuple[float, float, float, float] | None = None,
    resolution: float | None = None,
    crs: Any = None,
) -> GeoBox:
    """Return the grid of a stored scene or a raster, or one of bounds, resolution and CRS.

    Parameters
    ----------
    like
        A path or URL of a Zarr store with a scene (of the name `group` in it), or of a raster.
    bounds, resolution, crs
        (left, bottom, right, top) in the CRS, widened to multiples of the resolution.

    Raises
    ------
    ValueError
        Neither is given, or both are.
    """
    given = [bounds is not None, resolution is not None, crs is not None]
    if like is not None and not any(given):
        if like.rstrip("/").lower().endswith(".zarr"):
            return grid_from(open_scene(like, group))
        return grid_from(open_layer("like", like))
    if like is not None or not all(given):
        raise ValueError("a grid is wanted: --like, or all of --bounds, --resolution and --crs")
    assert bounds is not None  # the line above has seen to it
    extent = BoundingBox(*bounds, crs=crs)
    return grid_from(None, crs=crs, resolution=resolution, extent=extent)


def write_layer(
    layer: xr.DataArray, out: str, *, overwrite: bool = False, progress: bool | str = "auto"
) -> None:
    """Write a lazy layer to x.zarr or x.tif, going on where an earlier run stopped; computes.

    Chunk by chunk to Zarr; the GeoTIFF is made of that when it is whole, and until then there is
    a folder ``.x.tif.zarr`` beside it.

    Parameters
    ----------
    layer
        As `deepdem.grid_points` gives it: what it was made of is compared when going on.
    out
        A path of a GeoTIFF, or a path or URL of a Zarr store.
    overwrite
        Whether what is there, finished or not, is replaced.
    progress
        As in `deepdem.write.write_zarr`.

    Raises
    ------
    FileExistsError
        There is a GeoTIFF of that name.
    ValueError
        The name ends neither in .tif nor in .zarr, or what is there was begun with other settings.
    """
    if out.rstrip("/").lower().endswith(".zarr"):
        write_zarr(layer, out, resume=not overwrite, overwrite=overwrite, progress=progress)
        return
    if not out.lower().endswith((".tif", ".tiff")):
        raise ValueError(f"{out}: name it x.tif for a GeoTIFF or x.zarr for a Zarr store")
    if "://" in out:
        raise ValueError(f"{out} is a URL: write a local file and upload that, or write x.zarr")
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{out} is there: choose another name, or pass --overwrite")
    part = path.with_name(f".{path.name}.zarr")
    write_zarr(layer, part, resume=not overwrite, overwrite=overwrite, progress=progress)
    write_cog(open_scene(part)[str(layer.name)], path, progress=progress)
    shutil.rmtree(part)

"""Stereo runs as they come: the folder of a run is a scene."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr
from numpy.typing import NDArray

from deepdem.layers import describe
from deepdem.scene import stack
from deepdem.sources.folder import find_asp, find_deepdem
from deepdem.sources.raster import RasterSource, open_layer

__all__ = ["open_asp", "open_deepdem"]


def open_asp(
    folder: str | Path,
    *,
    dem: str = "*-DEM.tif",
    layers: Mapping[str, RasterSource] | None = None,
    **options: Any,
) -> xr.Dataset:
    """Return a run of the Ames Stereo Pipeline as a scene, lazy; only headers are read.

    Parameters
    ----------
    folder
        Where ``point2dem --errorimage --orthoimage`` wrote, or the folder above it.
    dem
        Which file is the DEM, a name or a pattern, where there are several.
    layers
        More layers (``{"lidar_dsm": "lidar.tif"}``), or others in place of those that are found:
        `deepdem.sources.folder.find_asp` says which those are.
    **options
        Those of `stack`. Heights of ``*-DEM.tif`` are above the ellipsoid, as point2dem makes them
        and as the file does not say, unless ``heights={"dsm": …}`` says otherwise; those of
        ``*-adj.tif`` (``dem_geoid``) are above a geoid that only you know.

    Returns
    -------
    Dataset
        ``dsm``; ``triangulation_error`` in metres, of three bands (``--compute-error-vector``:
        north, east, down) the length of the vector, NaN where one of them is; ``ortho_left`` and
        ``ortho_right``, or ``ortho_1`` … ``ortho_n``, or none. The grid is the DEM's unless
        `options` say otherwise.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no DEM in it.
    ValueError
        Several files could be the DEM or the error, or what `stack` raises.

    Examples
    --------
    >>> ds = deepdem.open_asp("stereo", layers={"lidar_dsm": "lidar.tif"}, vertical_crs="EPSG:5703")
    """
    found: dict[str, RasterSource] = {**find_asp(folder, dem=dem), **(layers or {})}
    chunks = {"chunks": options["chunks"]} if "chunks" in options else {}
    error = found.get("triangulation_error")
    if isinstance(error, str) and _bands(error) == 3:
        found["triangulation_error"] = _vector_error(error, **chunks)
    path = found["dsm"]
    heights = dict(options.pop("heights", None) or {})
    if "dsm" not in heights and isinstance(path, str) and not path.endswith("-adj.tif"):
        said = open_layer("dsm", path).attrs.get("vertical_reference")
        heights |= {} if said else {"dsm": "ellipsoid"}
    return stack(found, heights=heights, **options)


def _bands(path: str) -> int:
    with rasterio.open(path) as file:
        return int(file.count)


def _vector_error(path: str, **chunks: int) -> xr.DataArray:
    parts = [open_layer("triangulation_error", (path, band), **chunks) for band in (1, 2, 3)]
    length = xr.apply_ufunc(_length, *parts, dask="parallelized", output_dtypes=[np.float32])
    assert isinstance(length, xr.DataArray)
    return length.assign_attrs(source=path)


def _length(
    north: NDArray[np.float32], east: NDArray[np.float32], down: NDArray[np.float32]
) -> NDArray[np.float32]:
    length: NDArray[np.float32] = np.sqrt(north * north + east * east + down * down)
    return length


def open_deepdem(
    folder: str | Path,
    *,
    lidar: str = "lidar_dsm",
    equalised: bool = True,
    layers: Mapping[str, RasterSource] | None = None,
    **options: Any,
) -> xr.Dataset:
    """Return a folder of DeepDEM's preprocessing (``final_<name>.tif``) as a scene, lazy.

    Parameters
    ----------
    folder
        Where the ``final_*.tif`` lie; `deepdem.sources.folder.DEEPDEM_NAMES` says what is what.
    lidar
        Which truth ``final_lidar_data.tif`` is: ``"lidar_dsm"`` or ``"lidar_dtm"``. The file does
        not say; the preprocessing writes either under this name.
    equalised
        Whether the orthoimages went through the preprocessing's last step, scikit-image's
        `equalize_adapthist`. Then `prepare` leaves them as they are.
    layers
        More layers, or others in place of those that are found.
    **options
        Those of `stack`.

    Returns
    -------
    Dataset
        Our names for theirs: ``asp_dsm`` is ``dsm``, ``ortho_channel1`` or ``ortho_left`` is
        ``ortho_left``, and so on. ``valid`` is their ``nodata_mask``, which is 1 where there **is**
        data, in every layer and in the truth. Orthoimages and NDVI, which they set to zero where
        there is none, are NaN there.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no ``final_asp_dsm.tif`` in it.
    ValueError
        `lidar` is no truth, two files are the same layer, or what `stack` raises.

    Examples
    --------
    >>> ds = deepdem.open_deepdem("processed_rasters", lidar="lidar_dtm")
    """
    if describe(lidar).role != "truth":
        raise ValueError(f"lidar={lidar!r} is no truth: pass 'lidar_dsm' or 'lidar_dtm'")
    found = find_deepdem(folder)
    if lidar != "lidar_dsm" and "lidar_dsm" in found:
        if lidar in found:
            raise ValueError(
                f"lidar={lidar!r}: there is a file of that layer already, {found[lidar]}"
            )
        found[lidar] = found.pop("lidar_dsm")
    ds = stack({**found, **(layers or {})}, **options)
    for name in set(found) - set(layers or {}):
        role = describe(name).role
        if role == "image" and equalised:
            ds[name].attrs["equalised"] = "scikit-image equalize_adapthist (DeepDEM)"
        if role in ("image", "index") and "valid" in ds:
            with xr.set_options(keep_attrs=True):
                kept = ds[name].where(ds["valid"] | (ds[name] != 0))
            ds[name] = ds[name].copy(data=kept.data)
    return ds

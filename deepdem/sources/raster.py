"""Rasters on disk or in memory as layers: only headers are read, nodata becomes NaN."""

from __future__ import annotations

import warnings
from os import PathLike, fspath
from typing import Any, TypeAlias

import numpy as np
import rasterio
import rasterio.errors
import rioxarray
import xarray as xr
from odc.geo.geobox import GeoBox

from deepdem.layers import describe

__all__ = ["RasterSource", "geobox_of", "open_layer"]

#: A path or URL that GDAL reads, a path with a band number (from 1), or a DataArray.
RasterSource: TypeAlias = "str | PathLike[str] | tuple[str | PathLike[str], int] | xr.DataArray"

_NO_CRS = (
    "layer {name!r} ({what}) has no coordinate reference system: write it into the file "
    "(gdal_edit.py -a_srs EPSG:… FILE) or pass a DataArray with .rio.write_crs(...)"
)
_NO_TRANSFORM = (
    "layer {name!r} ({what}) has no geotransform, so its place on the ground is unknown: write "
    "one into the file (gdal_edit.py -a_ullr …) or orthorectify the image first"
)


def open_layer(name: str, source: RasterSource, *, chunks: int = 2048) -> xr.DataArray:
    """Return one raster as a lazy layer on its own grid; only its header is read.

    Parameters
    ----------
    name
        The layer's name, for its units, its role and the error messages.
    source
        A path or URL that GDAL reads, ``(path, band)`` with the band counted from 1, or a
        DataArray with dims (y, x) or (band, y, x) with one band.
    chunks
        The width of the Dask chunks.

    Returns
    -------
    DataArray
        Dims (y, x), Dask-backed, float32; NaN where the file's nodata value or mask band says so.
        The file's scale and offset are applied. A mask layer is 1.0 or 0.0.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        No CRS, no geotransform, or more than one band where none was chosen.
    """
    if isinstance(source, xr.DataArray):
        array, what = _plane(name, source, "a DataArray", None), "a DataArray"
        array = _mask_nodata(array)
    else:
        path, band = source if isinstance(source, tuple) else (source, None)
        what = fspath(path)
        array = _mask_nodata(_plane(name, _open(name, what, chunks), what, band))
    geobox = geobox_of(array)
    if geobox is None or geobox.crs is None:
        raise ValueError(_NO_CRS.format(name=name, what=what))
    if geobox.transform.is_identity:
        raise ValueError(_NO_TRANSFORM.format(name=name, what=what))
    if array.chunks is None:
        array = array.chunk(chunks)
    array = array.astype(np.float32)
    array.attrs = {"source": what, **_described(name), **_vertical(array.attrs)}
    return array.rename(name)


def geobox_of(data: xr.DataArray | xr.Dataset) -> GeoBox | None:
    """Return the grid (shape, transform, CRS) of `data`, or None where it has none."""
    box = data.odc.geobox
    return box if isinstance(box, GeoBox) else None


def _open(name: str, path: str, chunks: int) -> xr.DataArray:
    try:
        with warnings.catch_warnings():
            # The missing geotransform is reported below, with the layer's name and the cure.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # lock=False: each chunk may be read through a file handle of its own thread.
            opened = rioxarray.open_rasterio(
                path, chunks={"y": chunks, "x": chunks}, masked=True, lock=False
            )
    except rasterio.errors.RasterioIOError as error:
        raise FileNotFoundError(
            f"layer {name!r}: {path} could not be opened as a raster ({error}): check the path"
        ) from error
    if not isinstance(opened, xr.DataArray):
        raise ValueError(
            f"layer {name!r}: {path} holds several rasters: name one of them in GDAL's way "
            "(for example NETCDF:file.nc:variable)"
        )
    return opened


def _plane(name: str, array: xr.DataArray, what: str, band: int | None) -> xr.DataArray:
    """Return the one band of `array` that is meant, without its band coordinate."""
    if array.ndim == 3:
        dim = array.dims[0]
        count = array.sizes[dim]
        if band is None and count > 1:
            raise ValueError(
                f"layer {name!r} ({what}) has {count} bands and a layer has one: choose with "
                f"(path, band), bands counted from 1, or pass array.isel({dim}=…)"
            )
        if band is not None and not 1 <= band <= count:
            raise ValueError(f"layer {name!r} ({what}) has bands 1 to {count}, not {band}")
        array = array.isel({dim: (band or 1) - 1}, drop=True)
    if array.ndim != 2:
        raise ValueError(f"layer {name!r} ({what}) has dims {array.dims}: a layer has two, (y, x)")
    return array


def _mask_nodata(array: xr.DataArray) -> xr.DataArray:
    """Return float32 values, NaN for no data, the packing undone."""
    scale, offset = (float(array.attrs.get(k, d)) for k, d in _PACKING)
    nodata = array.rio.nodata
    if array.dtype.kind in "iub":
        values = array.astype(np.float32)
        if nodata is not None and not np.isnan(nodata):
            # Compared before the cast: an int32 fill value may not be a float32.
            values = values.where(array != nodata)
        array = values
    elif nodata is not None and not np.isnan(nodata):
        array = array.where(array != array.dtype.type(nodata))
    if (scale, offset) != (1.0, 0.0):
        array = array * np.float32(scale) + np.float32(offset)
    return array


_PACKING = (("scale_factor", 1.0), ("add_offset", 0.0))


def _described(name: str) -> dict[str, Any]:
    layer = describe(name)
    return {"long_name": layer.long_name, "units": layer.units}


def _vertical(attrs: dict[Any, Any]) -> dict[str, str]:
    """Return what a file's tags say of its vertical reference (a tag ``VERTICAL``), if anything."""
    says = {str(k).upper(): str(v) for k, v in attrs.items()}
    return {"vertical_reference": says["VERTICAL"]} if "VERTICAL" in says else {}

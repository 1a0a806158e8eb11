"""Rasters on disk or in memory as layers: only headers are read, nodata becomes NaN."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import rasterio
import rasterio.errors
import rioxarray
import xarray as xr
from affine import Affine
from dask.base import tokenize
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from deepdem.layers import describe
from deepdem.vertical import vertical_of

__all__ = ["RasterSource", "geobox_of", "open_layer"]

#: A path or URL that GDAL reads, a path with a band number (from 1), or a DataArray.
RasterSource: TypeAlias = "str | PathLike[str] | tuple[str | PathLike[str], int] | xr.DataArray"

# Of a pixel: coordinates off even ones by more lie on no grid, by less are even as they are.
_EVEN_PX, _EXACT_PX = 1e-2, 1e-12
_NO_CRS = (
    "layer {name!r} ({what}) has no coordinate reference system: write it into the file "
    "(gdal_edit.py -a_srs EPSG:… FILE) or pass a DataArray with .rio.write_crs(...)"
)
_NO_TRANSFORM = (
    "layer {name!r} ({what}) has no geotransform, so its place on the ground is unknown: write "
    "one into the file (gdal_edit.py -a_ullr …) or orthorectify the image first"
)
_NO_GRID = (
    "layer {name!r} ({what}) lies on no regular grid: its coordinates are off even ones by up to "
    "{off:.2g} pixels; interpolate it onto even ones first, e.g. array.interp(x=…, y=…)"
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
        The file's scale and offset are applied. A mask layer is 1.0 or 0.0. North is up: rasters
        whose rows go north are turned over; a rotated one is left as it is, for the warper. Height
        layers have ``attrs["vertical_reference"]`` where the CRS (compound or 3-D) or a tag
        ``VERTICAL`` says it.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        No CRS, no geotransform, coordinates that are not evenly spaced, or more than one band
        where none was chosen.
    """
    if isinstance(source, xr.DataArray):
        what = str(source.attrs.get("source", "a DataArray"))
        array = _plane(name, source, what, None)
        array = _mask_nodata(array)
    else:
        path, band = source if isinstance(source, tuple) else (source, None)
        what = fspath(path)
        array = _read_by_window(_plane(name, _open(name, what), what, band), what, band, chunks)
    if array.rio.crs is None:
        raise ValueError(_NO_CRS.format(name=name, what=what))
    geobox = geobox_of(array)
    if geobox is None or geobox.crs is None:
        raise ValueError(_NO_GRID.format(name=name, what=what, off=np.nan))
    if geobox.transform.is_identity:
        raise ValueError(_NO_TRANSFORM.format(name=name, what=what))
    if array.chunks is None:
        array = array.chunk(chunks)
    attrs = {"source": what, **_described(name)}
    if describe(name).is_height and (above := vertical_of(array.attrs, geobox.crs.proj)):
        attrs["vertical_reference"] = above.name
    array = _north_up(_even(name, what, array)).astype(np.float32)
    array.attrs = attrs
    return array.rename(name)


def _even(name: str, what: str, array: xr.DataArray) -> xr.DataArray:
    """Return the raster as (y, x) on exactly even coordinates, if its own are nearly so."""
    dims = array.odc.spatial_dims
    if dims is None or any(d not in array.indexes or array.sizes[d] < 2 for d in dims):
        return array  # placed by a geotransform
    array = array.transpose(*dims)
    ends: list[tuple[float, float]] = []
    off = 0.0
    for dim in dims:
        at = array[dim].to_numpy().astype(float)
        step = (at[-1] - at[0]) / (len(at) - 1)
        if not step or (off := max(off, np.abs(at - at[0] - step * np.arange(len(at))).max()
                                   / abs(step))) > _EVEN_PX:  # fmt: skip
            raise ValueError(_NO_GRID.format(name=name, what=what, off=off))
        ends.append((at[0] - step / 2, step))
    (top, dy), (left, dx) = ends
    if off < _EXACT_PX:
        return array
    # odc-geo takes the pixel size from the first two coordinates: with a drift of a billionth in
    # them it would be wrong by that much at every pixel of the row.
    height, width = array.shape
    box = GeoBox((height, width), Affine(dx, 0, left, 0, dy, top), array.odc.geobox.crs)
    return xr.DataArray(
        array.data, coords=xr_coords(box, always_yx=True), dims=("y", "x"), attrs=array.attrs
    )


def _north_up(array: xr.DataArray) -> xr.DataArray:
    """Return the raster with its rows going south and its columns east; a rotated one as it is."""
    box = geobox_of(array)
    assert box is not None  # seen to before
    down, right = box.transform.e < 0, box.transform.a > 0
    if not box.transform.is_rectilinear or (down and right):
        return array
    height, width = box.shape
    turn = Affine(1 if right else -1, 0, 0 if right else width,
                  0, 1 if down else -1, 0 if down else height)  # fmt: skip
    turned = GeoBox(box.shape, box.transform @ turn, box.crs)
    return xr.DataArray(
        array.data[:: 1 if down else -1, :: 1 if right else -1],
        coords=xr_coords(turned, always_yx=True), dims=("y", "x"), attrs=array.attrs,
    )  # fmt: skip


def geobox_of(data: xr.DataArray | xr.Dataset) -> GeoBox | None:
    """Return the grid (shape, transform, CRS) of `data`, or None where it has none."""
    box = data.odc.geobox
    return box if isinstance(box, GeoBox) else None


@dataclass(frozen=True)
class _Pixels:
    """A band of a raster on disk as an array of float32 that is read window by window.

    NaN where there is no data, the packing undone. Dask knows it as something stored: whoever needs
    a region across chunks reads just that (`deepdem.blocks.map_regions`), and no chunk is kept for
    a neighbour. The file is opened for each window: GDAL's cache of its blocks, up to a twentieth
    of the machine's memory, ends with it.
    """

    path: str
    band: int
    shape: tuple[int, int]
    token: str
    dtype = np.dtype(np.float32)
    ndim = 2

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.float32]:
        spans = [range(n)[part] for n, part in zip(self.shape, key, strict=True)]
        if not all(map(len, spans)):
            return np.empty(tuple(map(len, spans)), np.float32)
        rows, columns = ((min(s[0], s[-1]), max(s[0], s[-1]) + 1) for s in spans)
        with rasterio.open(self.path) as file:
            read = file.read(self.band, window=(rows, columns), masked=True)
            scale, offset = file.scales[self.band - 1], file.offsets[self.band - 1]
        values: NDArray[np.float32] = np.ma.filled(read.astype(np.float32), np.nan)
        if (scale, offset) != (1.0, 0.0):
            values *= np.float32(scale)
            values += np.float32(offset)
        return values[:: spans[0].step, :: spans[1].step]

    def __dask_tokenize__(self) -> str:
        return self.token


def _read_by_window(plane: xr.DataArray, path: str, band: int | None, chunks: int) -> xr.DataArray:
    file = Path(path)
    token = tokenize(path, file.stat().st_mtime_ns if file.exists() else None, band, plane.shape)
    pixels = _Pixels(path, band or 1, (plane.shape[0], plane.shape[1]), token)
    return plane.copy(data=da.from_array(pixels, chunks=chunks, asarray=False, fancy=False))


def _open(name: str, path: str) -> xr.DataArray:
    try:
        with warnings.catch_warnings():
            # The missing geotransform is reported below, with the layer's name and the cure.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # Old GeoTIFFs keep the vertical part of their CRS to themselves unless they are asked.
            with rasterio.Env(GTIFF_REPORT_COMPD_CS=True):
                opened = rioxarray.open_rasterio(path, masked=True, lock=False, cache=False)
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

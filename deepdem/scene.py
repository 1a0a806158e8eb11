"""One scene on one grid: stack it and check it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import dask.array as da
import pyproj
import rasterio.enums
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox

from deepdem.grid import (
    Bounds,
    check_grids,
    crop_grid,
    flat,
    grid_from,
    odc_crs,
    pixel_size_m,
    regrid,
)
from deepdem.layers import describe
from deepdem.provenance import noted
from deepdem.sources.raster import RasterSource, geobox_of, open_layer
from deepdem.vertical import (
    Vertical,
    check_vertical,
    convert_heights,
    horizontal,
    vertical_from,
    vertical_of,
    with_vertical,
)

__all__ = [
    "check_scene",
    "dask_layer",
    "geobox_of",
    "pixel_size",
    "stack",
]

#: Of Dask chunks, unless something else is asked for.
CHUNK_PX = 2048


def stack(
    layers: Mapping[str, RasterSource],
    *,
    like: str | GeoBox | xr.Dataset | xr.DataArray | None = None,
    crs: Any = None,
    resolution: float | None = None,
    bounds: Bounds = "intersection",
    resampling: Mapping[str, str] | str | None = None,
    heights: Mapping[str, Any] | None = None,
    vertical_crs: Any = None,
    chunks: int = CHUNK_PX,
) -> xr.Dataset:
    """Return one scene: every layer on one grid, lazy; nothing but headers is read.

    Parameters
    ----------
    layers
        The layers by name: a path or URL that GDAL reads, ``(path, band)``, or a DataArray.
        Standard names are in `deepdem.layers.LAYERS`; others are kept as they are called.
    like
        The grid: a layer's name, a scene, a DataArray or a GeoBox. Without it, and without
        `resolution`, that of ``dsm``, or else of the first layer.
    crs, resolution
        Instead of `like`: a CRS (default: that of ``dsm`` or the first layer) and a pixel size in
        its units. Pixel edges lie on multiples of it.
    bounds
        ``"intersection"`` or ``"union"`` of the layers' extents, or (left, bottom, right, top) in
        the grid's CRS. Always whole pixels of the grid. A GeoBox or a scene as `like` is kept
        whole unless bounds are numbers.
    resampling
        One method for all, or one a layer; names of `rasterio.enums.Resampling`. Default:
        bilinear, masks nearest. Layers whose pixels lie on the grid's are copied.
    heights
        What the heights of a layer are above, where its file does not say it or says it wrong:
        ``{"dsm": "ellipsoid", "lidar_dsm": "EPSG:5703"}``.
    vertical_crs
        What heights are to be above: ``"ellipsoid"`` (that of the grid's CRS) or a vertical CRS
        such as ``"EPSG:5773"``. Every height layer is converted by PROJ, lazily, and the scene's
        CRS becomes 3-D or compound. Without it heights stay as they are.
    chunks
        The width of the Dask chunks in pixels.

    Returns
    -------
    Dataset
        Dims (y, x), coordinates y, x (pixel centres) and ``spatial_ref``; float32 layers, NaN for
        no data, whatever a file's nodata value or mask band; masks bool. North is up, whichever
        way a raster's rows go; rotated rasters are turned by the warper. Height layers have
        ``attrs["vertical_reference"]`` where it is known. On a geographic grid
        ``attrs["pixel_size_m"]`` is the pixel size derived from it (`deepdem.grid.pixel_size_m`).

    Raises
    ------
    ValueError
        A raster lacks a CRS or a geotransform or has several bands, rasters do not overlap, a
        name in `like`, `resampling` or `heights` is no layer, the grid itself is rotated, some
        heights are above an ellipsoid and some above a geoid, or the geoid's grid that
        `vertical_crs` needs is missing. The message names the layer and the cure.
    FileNotFoundError
        A path cannot be opened.

    Warns
    -----
    UserWarning
        A layer lies half a pixel off the grid; a geographic grid's pixels are not square; some
        heights do not say what they are above, or are above different geoids.

    Examples
    --------
    >>> truth = deepdem.synthetic_scene((64, 64))
    >>> scene = deepdem.stack({"dsm": truth.dsm, "lidar_dsm": truth.lidar_dsm})
    >>> dict(scene.sizes)
    {'y': 64, 'x': 64}
    """
    if not layers:
        raise ValueError("no layer: pass {'dsm': 'dem.tif', ...}")
    opened = {name: open_layer(name, source, chunks=chunks) for name, source in layers.items()}
    boxes = {name: _box(array) for name, array in opened.items()}
    grid = _target(like, crs, resolution, bounds, boxes)
    methods = _methods(resampling, opened)
    check_grids(grid, boxes)
    above = _verticals(opened, boxes, heights or {})
    to = None if vertical_crs is None else vertical_from(vertical_crs)
    if to is None:
        check_vertical(above)
        # A grid that was taken from elsewhere does not say what these heights are above.
        own = vertical_of({}, _proj(grid))
        if own is not None and not all(said is None or said.agrees(own) for said in above.values()):
            grid = flat(grid)
    elif to.metres != 1:
        raise ValueError(f"vertical_crs={vertical_crs!r} is not in metres: heights here are")
    else:
        grid = GeoBox(grid.shape, grid.affine, odc_crs(with_vertical(_proj(grid), to)))
    arrays = {
        name: regrid(array, grid, resampling=methods[name], chunks=chunks)
        for name, array in opened.items()
    }
    for name, said in above.items():
        if to is not None:
            arrays[name] = _converted(arrays[name], boxes[name], said, grid)
        elif said is not None:
            arrays[name].attrs["vertical_reference"] = said.name
    ds = _dataset(arrays)
    if _proj(grid).is_geographic:
        ds.attrs["pixel_size_m"] = pixel_size_m(grid)
    return noted(
        ds, "stack", layers={name: array.attrs.get("source") for name, array in opened.items()},
        like=like if isinstance(like, str | None) else type(like).__name__, bounds=bounds,
        resampling=methods, heights=dict(heights or {}), vertical_crs=vertical_crs,
    )  # fmt: skip


def _proj(grid: GeoBox) -> pyproj.CRS:
    assert grid.crs is not None  # grid_from has seen to it
    return grid.crs.proj


def _verticals(
    layers: Mapping[str, xr.DataArray], boxes: Mapping[str, GeoBox], heights: Mapping[str, Any]
) -> dict[str, Vertical | None]:
    """Return what the height layers are above, as they say or as it is said of them."""
    names = [name for name in layers if describe(name).is_height]
    if strange := sorted(set(heights) - set(names)):
        raise ValueError(f"heights= names {strange}, which are no height layers: {names} are")
    return {
        name: vertical_from(heights[name])
        if name in heights
        else vertical_of(layers[name].attrs, _proj(boxes[name]))
        for name in names
    }


def _converted(
    array: xr.DataArray, box: GeoBox, above: Vertical | None, grid: GeoBox
) -> xr.DataArray:
    if above is None or above.kind == "unknown":
        raise ValueError(
            f"vertical_crs=: layer {array.name!r} does not say what its heights are above"
            f"{'' if above is None else f' ({above.name!r})'}: pass heights={{{array.name!r}: "
            "'ellipsoid'}, or a vertical CRS such as 'EPSG:5773'"
        )
    return convert_heights(
        array, transform=grid.affine, source=with_vertical(_proj(box), above), target=_proj(grid)
    )


def _box(array: xr.DataArray) -> GeoBox:
    box = geobox_of(array)
    assert box is not None  # open_layer has seen to it
    return box


def _target(
    like: Any, crs: Any, resolution: float | None, bounds: Bounds, boxes: dict[str, GeoBox]
) -> GeoBox:
    default = "dsm" if "dsm" in boxes else next(iter(boxes))
    if like is not None and (crs is not None or resolution is not None):
        raise ValueError("pass like= or crs=/resolution=, not both")
    if isinstance(like, str):
        if like not in boxes:
            raise ValueError(f"like={like!r} is no layer of this stack: {', '.join(boxes)}")
        return crop_grid(grid_from(boxes[like]), boxes, bounds)
    if like is not None:
        grid = grid_from(like)
        return grid if isinstance(bounds, str) else crop_grid(grid, boxes, bounds)
    if crs is None and resolution is None:
        return crop_grid(grid_from(boxes[default]), boxes, bounds)
    if resolution is None:
        raise ValueError(f"crs={crs!r} without a resolution: pass resolution= in its units")
    target = odc_crs(boxes[default].crs if crs is None else crs)
    level = odc_crs(horizontal(target.proj))
    extents = [flat(box).footprint(level).boundingbox for box in boxes.values()]
    extent = BoundingBox(
        min(e.left for e in extents), min(e.bottom for e in extents),
        max(e.right for e in extents), max(e.top for e in extents), crs=target,
    )  # fmt: skip
    return crop_grid(grid_from(None, crs=target, resolution=resolution, extent=extent), boxes,
                     bounds)  # fmt: skip


def _methods(resampling: Mapping[str, str] | str | None, layers: Iterable[str]) -> dict[str, str]:
    names = list(layers)
    if isinstance(resampling, str):
        resampling = dict.fromkeys(names, resampling)
    chosen = dict(resampling or {})
    if unknown := set(chosen.values()) - set(rasterio.enums.Resampling.__members__):
        raise ValueError(
            f"resampling={sorted(unknown)} is not known: pass one of "
            + ", ".join(sorted(rasterio.enums.Resampling.__members__))
        )
    # A name that is a standard layer but not in this stack (ndvi, made later) does no harm.
    if strange := {n for n in chosen if n not in names and describe(n).role == "other"}:
        raise ValueError(f"resampling= names {sorted(strange)}, which are no layers of this stack")
    return {name: chosen.get(name, describe(name).resampling) for name in names}


def _dataset(arrays: Mapping[str, xr.DataArray]) -> xr.Dataset:
    for name, array in arrays.items():
        if describe(name).role == "mask":
            attrs, encoding = array.attrs, array.encoding
            array = array == 1  # NaN, no data, is not usable
            array.attrs, array.encoding = attrs, encoding
            arrays = {**arrays, name: array}
    return xr.Dataset(dict(arrays))


def check_scene(ds: xr.Dataset, layers: Iterable[str] = ()) -> GeoBox:
    """Return the scene's grid once everything that the package relies on has been checked.

    Parameters
    ----------
    ds
        The scene.
    layers
        Layers that it must have.

    Raises
    ------
    ValueError
        There is no y, x or CRS, a layer has other dims, or a layer is missing. The message names
        the layer, what came, what was wanted and the cure.
    """
    if missing := [name for name in layers if name not in ds.data_vars]:
        cure = (
            "run ds.deepdem.prepare() first"
            if set(missing) <= {"ndvi", "valid"}
            else "stack them with deepdem.stack, or rename the scene's layers"
        )
        raise ValueError(
            f"the scene lacks the layers {missing}: it has {sorted(map(str, ds.data_vars))}; {cure}"
        )
    for name in layers:
        if ds[name].dims != ("y", "x"):
            raise ValueError(
                f"layer {name!r} has dims {ds[name].dims}, wanted ('y', 'x'): "
                "use .transpose('y', 'x') or select one band"
            )
    if not {"y", "x"} <= set(ds.dims):
        raise ValueError(f"the scene has dims {tuple(ds.sizes)}, wanted y and x")
    if 0 in (ds.sizes["y"], ds.sizes["x"]):
        raise ValueError(f"the scene has no pixel: sizes {dict(ds.sizes)}")
    box = geobox_of(ds)
    if box is None or box.crs is None:
        raise ValueError(
            "the scene has no CRS or no x and y coordinates: write one with "
            "ds.rio.write_crs('EPSG:…'), and open Zarr with deepdem.open_scene or "
            "decode_coords='all'"
        )
    return box


def dask_layer(ds: xr.Dataset, name: str) -> da.Array:
    """Return a layer's pixels as a Dask array; reads none, whether or not the scene is chunked."""
    layer = ds[name] if ds[name].chunks is not None else ds[name].chunk(CHUNK_PX)
    assert isinstance(layer.data, da.Array)
    return layer.data


def pixel_size(ds: xr.Dataset) -> float:
    """Return the scene's pixel size in metres on the ground."""
    return pixel_size_m(check_scene(ds))

"""One scene on one grid: stack it, check it, write it to Zarr and open it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import rasterio.enums
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from zarr.codecs import BloscCodec
from zarr.errors import ZarrUserWarning

from deepdem.grid import Bounds, crop_grid, grid_from, pixel_size_m, regrid
from deepdem.layers import LAYERS, describe
from deepdem.sources.raster import RasterSource, geobox_of, open_layer

__all__ = [
    "as_stored",
    "check_scene",
    "dask_layer",
    "geobox_of",
    "is_complete",
    "mark_complete",
    "open_scene",
    "open_scenes",
    "pixel_size",
    "scene_to_zarr",
    "stack",
]

#: Zarr: what is read at once (a window's size), and what is written at once at most.
INNER_PX, SHARD_PX = 256, 2048
#: The attribute of a group that says whether it was written to its end.
COMPLETE = "deepdem_complete"


def stack(
    layers: Mapping[str, RasterSource],
    *,
    like: str | GeoBox | xr.Dataset | xr.DataArray | None = None,
    crs: Any = None,
    resolution: float | None = None,
    bounds: Bounds = "intersection",
    resampling: Mapping[str, str] | str | None = None,
    chunks: int = 2048,
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
    chunks
        The width of the Dask chunks in pixels.

    Returns
    -------
    Dataset
        Dims (y, x), coordinates y, x (pixel centres) and ``spatial_ref``; float32 layers, NaN for
        no data, whatever a file's nodata value or mask band; masks bool.

    Raises
    ------
    ValueError
        A raster lacks a CRS or a geotransform or has several bands, rasters do not overlap, a
        name in `like` or `resampling` is no layer. The message names the layer and the cure.
    FileNotFoundError
        A path cannot be opened.

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
    return _dataset(
        {
            name: regrid(array, grid, resampling=methods[name], chunks=chunks)
            for name, array in opened.items()
        }
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
    target: Any = boxes[default].crs if crs is None else crs
    extents = [box.footprint(target).boundingbox for box in boxes.values()]
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
    layer = ds[name] if ds[name].chunks is not None else ds[name].chunk(SHARD_PX)
    assert isinstance(layer.data, da.Array)
    return layer.data


def pixel_size(ds: xr.Dataset) -> float:
    """Return the scene's pixel size in metres on the ground."""
    return pixel_size_m(check_scene(ds))


def scene_to_zarr(
    ds: xr.Dataset,
    store: Any,
    *,
    group: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a scene to a Zarr store, chunk by chunk; computes.

    Zarr format 3, zstd with byte shuffle, one shard a Dask chunk with inner chunks of 256 pixels.
    The CRS is in ``spatial_ref`` (CF) and, for GDAL, in each array's ``_CRS``. A group that was
    left half-written by a crash is known as such: it is written again.

    Parameters
    ----------
    ds
        The scene. Scenes in memory are cut into chunks of 2048.
    store
        A path, a URL that fsspec knows, or any Zarr store.
    group
        The scene's name in the store; several scenes are groups of one store.
    overwrite
        Whether a finished scene of that name may be replaced.

    Raises
    ------
    FileExistsError
        There is a finished scene of that name and `overwrite` is False.
    """
    box = check_scene(ds)
    target = str(store) if isinstance(store, Path) else store
    if not overwrite and is_complete(target, group) is not None:
        if is_complete(target, group):
            raise FileExistsError(
                f"{target} holds a scene {group or '(root)'!r}: choose another group, or pass "
                "overwrite=True"
            )
        overwrite = True  # what is there is the rest of a crash
    sizes = tuple(min(SHARD_PX, -(-n // INNER_PX) * INNER_PX) for n in (box.shape.y, box.shape.x))
    out, encoding = as_stored(
        ds.chunk({"y": sizes[0], "x": sizes[1]}), inner=(INNER_PX, INNER_PX), shards=sizes
    )
    out.to_zarr(
        target, group=group, mode="w" if overwrite else "w-", encoding=encoding, zarr_format=3,
        consolidated=False,
    )  # fmt: skip
    mark_complete(target, group)


def as_stored(
    ds: xr.Dataset, *, inner: tuple[int, ...], shards: tuple[int, ...]
) -> tuple[xr.Dataset, dict[str, dict[str, Any]]]:
    """Return the dataset as Zarr can hold it, marked half-written, and its layers' encoding.

    Parameters
    ----------
    ds
        A scene, or layers on its grid; stays lazy.
    inner, shards
        Pixels (y, x) that are read at once, and that are written at once.
    """
    crs: Any = check_scene(ds).crs
    out = ds.drop_encoding()
    encoding: dict[str, dict[str, Any]] = {}
    for name, layer in out.data_vars.items():
        if layer.dims != ("y", "x"):
            continue
        encoding[str(name)] = {
            "chunks": inner,
            "shards": shards,
            "compressors": (BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),),
            "grid_mapping": "spatial_ref",
        }
        out[name].attrs = {**_json_safe(layer.attrs), "_CRS": {"wkt": crs.to_wkt()}}
        out[name].attrs.pop("grid_mapping", None)
    out.attrs = {**_json_safe(ds.attrs), COMPLETE: False}
    return out, encoding


def mark_complete(store: Any, group: str | None) -> None:
    """Mark a group as written to its end, and consolidate its metadata where the store can."""
    written = zarr.open_group(store, path=group or "", mode="r+", use_consolidated=False)
    if getattr(written.store, "supports_consolidated_metadata", True):
        with warnings.catch_warnings():
            # Zarr warns that consolidated metadata is not yet in the format's third version. A
            # reader that does not know it passes it over; plain xr.open_zarr of this group asks
            # for it.
            warnings.simplefilter("ignore", ZarrUserWarning)
            written = zarr.consolidate_metadata(written.store, path=written.path, zarr_format=3)
    written.attrs[COMPLETE] = True  # last: until then there is something left to do


def is_complete(store: Any, group: str | None) -> bool | None:
    """Return whether a scene was written to its end; None if there is none."""
    try:
        attrs = zarr.open_group(store, path=group or "", mode="r").attrs
    except FileNotFoundError:
        return None
    # A group without the mark is either another program's or only a parent of scenes.
    return bool(attrs[COMPLETE]) if COMPLETE in attrs else None


def _json_safe(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attrs that Zarr can store: NumPy scalars and arrays as Python's, the rest as text."""
    return {str(k): json.loads(json.dumps(v, default=_plain)) for k, v in attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def open_scene(store: Any, group: str | None = None, *, chunks: Any = "auto") -> xr.Dataset:
    """Return a scene of a Zarr store, lazy.

    Parameters
    ----------
    store
        A path, a URL that fsspec knows, or any Zarr store.
    group
        The scene's name; not needed where the store is one scene.
    chunks
        ``"auto"``: one Dask chunk a shard, as it was written. Otherwise as in
        `xarray.open_zarr`.

    Raises
    ------
    FileNotFoundError
        There is no such store or group; the message says which groups there are.
    ValueError
        The scene was left half-written.
    """
    target = str(store) if isinstance(store, Path) else store
    complete = is_complete(target, group)
    if complete is False:
        raise ValueError(
            f"the scene {group or '(root)'!r} of {target} is half-written: the process that wrote "
            "it was stopped; write it again (to_zarr does so without overwrite=True), or, if it is "
            "a refined surface, go on with refined.deepdem.to_zarr(store, resume=True)"
        )
    try:
        ds = xr.open_zarr(
            target, group=group, chunks=None if chunks == "auto" else chunks, decode_coords="all",
            consolidated=False, zarr_format=3,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no scene {group or '(root)'!r} in {target}; {_groups(target)}"
        ) from error
    if not ds.data_vars:
        raise FileNotFoundError(f"{target} is no scene by itself: pass group=; {_groups(target)}")
    if chunks == "auto":
        ds = _chunk_by_shard(ds)
    return _opened(ds)


def _groups(store: Any) -> str:
    try:
        names = sorted(name for name, _ in zarr.open_group(store, mode="r").groups())
    except FileNotFoundError:
        return "there is no Zarr store there"
    return f"its groups are {names}"


def _chunk_by_shard(ds: xr.Dataset) -> xr.Dataset:
    # After opening, not by chunks={}: that is a task for each inner chunk, 64 of them a shard.
    shards = [v.encoding.get("shards") for v in ds.data_vars.values() if v.dims == ("y", "x")]
    known = [s for s in shards if s] or [(SHARD_PX, SHARD_PX)]
    return ds.chunk({"y": known[0][0], "x": known[0][1]})


def _opened(ds: xr.Dataset) -> xr.Dataset:
    # Zarr lists arrays as the file system does.
    known = [name for name in LAYERS if name in ds.data_vars]
    rest = sorted(str(name) for name in ds.data_vars if name not in LAYERS)
    out = ds[[*known, *rest]]
    for layer in out.data_vars.values():
        layer.attrs = {k: v for k, v in layer.attrs.items() if k != "_CRS"}
    out.attrs = {k: v for k, v in ds.attrs.items() if k != COMPLETE}
    return out


def open_scenes(store: Any, *, chunks: Any = "auto") -> xr.DataTree:
    """Return all finished scenes of a Zarr store as a tree, lazy: one node a scene.

    Parameters
    ----------
    store, chunks
        As in `open_scene`.

    Raises
    ------
    FileNotFoundError
        There is no store, or no scene in it.

    Examples
    --------
    >>> for name, node in deepdem.open_scenes("scenes.zarr").children.items():
    ...     print(name, node.to_dataset().sizes)
    """
    target = str(store) if isinstance(store, Path) else store
    root = zarr.open_group(target, mode="r")
    scenes = {
        name: open_scene(store, name, chunks=chunks)
        for name, _ in sorted(root.groups())
        if is_complete(target, name)
    }
    if not scenes:
        raise FileNotFoundError(f"no scene in {target}: write one with ds.deepdem.to_zarr")
    return xr.DataTree.from_dict(scenes)

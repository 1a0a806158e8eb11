"""Scenes in Zarr: written chunk by chunk, known as half-written until the end, opened again."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from zarr.codecs import BloscCodec
from zarr.errors import ZarrUserWarning
from zarr.registry import register_pipeline
from zarr.storage import LocalStore
from zarrs import ZarrsCodecPipeline

from deepdem.blocks import settle
from deepdem.grid import pixel_size_m
from deepdem.layers import LAYERS, describe
from deepdem.provenance import json_safe
from deepdem.scene import check_scene
from deepdem.statistics import STATISTICS, plan_statistics

__all__ = [
    "as_stored",
    "is_complete",
    "mark_complete",
    "open_scene",
    "open_scenes",
    "scene_to_zarr",
]

#: Zarr: what is read at once (a window's size), and what is written at once at most.
INNER_PX, SHARD_PX = 256, 2048
#: The attribute of a group that says whether it was written to its end.
COMPLETE = "deepdem_complete"
#: Two of GeoZarr's conventions, as a group has to register them.
_CONVENTIONS = (
    {
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
        "description": "Coordinate reference system information for geospatial data",
    },
    {
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "description": "Spatial coordinate information",
    },
)


def scene_to_zarr(
    ds: xr.Dataset,
    store: Any,
    *,
    group: str | None = None,
    overwrite: bool = False,
    precision_m: float | None = None,
) -> None:
    """Write a scene to a Zarr store, chunk by chunk; computes.

    Zarr format 3, zstd with byte shuffle, one shard a Dask chunk with inner chunks of 256 pixels.
    The georeference is in ``spatial_ref`` (CF, as xarray, rioxarray and odc-geo read it), in the
    group's ``proj:`` and ``spatial:`` attributes (GeoZarr's conventions) and in each array's
    ``_CRS`` (GDAL's own). GDAL 3.10, which rasterio 1.4 comes with, lists the arrays of such a
    store and cannot open them: it does not know the codecs of Zarr's third format. For such
    readers there is `deepdem.cog.write_cog`. A group that was left half-written by a crash is
    known as such: it is written again.

    Peak memory is one chunk of all layers for each worker, and what makes it. The statistics of all
    pixels are found in the same pass: ``attrs["deepdem_statistics"]``, see
    `deepdem.statistics.plan_statistics`.

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
    precision_m
        Heights are rounded to the largest power of two up to it: 0.001 gives steps of 1/1024 m
        and errors up to 0.49 mm, and saves a fifth of their size (18 to 24 %, measured). `attrs` of
        the layer have the step as ``precision_m``. Decimal millimetres would save a tenth of that:
        they leave no bit of a float unused.

    Raises
    ------
    FileExistsError
        There is a finished scene of that name and `overwrite` is False.
    ValueError
        `precision_m` is not positive.
    """
    box = check_scene(ds)
    if precision_m is not None:
        ds = _rounded(ds, precision_m)
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
        _in_one_pass(ds.chunk({"y": sizes[0], "x": sizes[1]})),
        inner=(INNER_PX, INNER_PX), shards=sizes,
    )  # fmt: skip
    # Metadata and coordinates; the layers are written below, and counted as they pass.
    out.to_zarr(
        target, group=group, mode="w" if overwrite else "w-", encoding=encoding, zarr_format=3,
        consolidated=False, compute=False,
    )  # fmt: skip
    local = isinstance(target, str) and "://" not in target
    # A worker may stand in another folder.
    writer = _ChunkWriter(str(Path(target).absolute()) if local else target, group)
    if any(layer.dims == ("y", "x") for layer in out.data_vars.values()):
        found = plan_statistics(out, pixel_size_m=pixel_size_m(box), store=writer).compute()
        writer.open().attrs[STATISTICS] = found
    mark_complete(target, group)


@dataclass(frozen=True)
class _ChunkWriter:
    """Writes a chunk of each layer into a group, opened anew in each task: any process may run it.

    Chunks are shards: no two tasks write one file.
    """

    store: Any
    group: str | None

    def open(self) -> zarr.Group:
        return zarr.open_group(self.store, path=self.group or "", mode="r+", use_consolidated=False)

    def __call__(self, place: tuple[slice, slice], layers: Mapping[str, Any]) -> None:
        group = self.open()
        for name, block in layers.items():
            array: Any = group[name]
            array[place] = block.astype(array.dtype, copy=False)


def _rounded(ds: xr.Dataset, precision_m: float) -> xr.Dataset:
    """Return the scene with its heights rounded to a power of two of metres, lazy."""
    if not precision_m > 0:
        raise ValueError(f"precision_m={precision_m!r}: wanted a step in metres such as 0.001")
    step = 2.0 ** math.floor(math.log2(precision_m))
    rounded = {}
    for name, layer in ds.data_vars.items():
        if describe(str(name)).is_height:
            values = xr.apply_ufunc(
                _round_to, layer, kwargs={"step": step}, dask="parallelized",
                output_dtypes=[layer.dtype],
            )  # fmt: skip
            rounded[name] = layer.copy(data=values.data)
            rounded[name].attrs["precision_m"] = step
    return ds.assign(rounded)


def _round_to(values: NDArray[Any], *, step: float) -> NDArray[Any]:
    # Exact in binary: both the division and the product only change the exponent.
    exact = values.dtype.type(step)
    rounded: NDArray[Any] = np.rint(values / exact) * exact
    return rounded


def _geozarr(box: GeoBox) -> dict[str, Any]:
    """Return the group's attributes by GeoZarr's ``proj`` and ``spatial`` conventions."""
    assert box.crs is not None  # check_scene has seen to it
    crs = box.crs.proj
    code = crs.to_authority(min_confidence=100)
    left, bottom, right, top = box.extent.boundingbox.bbox
    return {
        "zarr_conventions": [dict(convention) for convention in _CONVENTIONS],
        **({"proj:code": ":".join(code)} if code else {"proj:wkt2": crs.to_wkt("WKT2_2019")}),
        "spatial:dimensions": ["y", "x"],
        "spatial:shape": list(box.shape),
        "spatial:transform_type": "affine",
        "spatial:transform": list(box.affine)[:6],
        "spatial:bbox": [left, bottom, right, top],
        "spatial:registration": "pixel",
    }


def _in_one_pass(ds: xr.Dataset) -> xr.Dataset:
    """Return the scene so that a store of all layers needs little memory, and each chunk once."""
    lazy = {name: layer for name, layer in ds.data_vars.items() if layer.chunks is not None}
    layers = {name: layer for name, layer in lazy.items() if layer.dims == ("y", "x")}
    data = settle([layer.data for layer in layers.values()])
    settled = zip(layers.items(), data, strict=True)
    # What is no layer is written with the coordinates.
    rest = {name: layer.compute() for name, layer in lazy.items() if name not in layers}
    return ds.assign(rest | {name: layer.copy(data=d) for (name, layer), d in settled})


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
    box = check_scene(ds)
    crs: Any = box.crs
    out = ds.drop_encoding()
    encoding: dict[str, dict[str, Any]] = {}
    for name, layer in out.data_vars.items():
        if layer.dims != ("y", "x"):
            continue
        encoding[str(name)] = {
            "chunks": inner,
            "shards": shards,
            # Level 5 takes four times as long and saves 1 to 4 % on heights and orthos.
            "compressors": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),),
            "grid_mapping": "spatial_ref",
        }
        out[name].attrs = {**json_safe(layer.attrs), "_CRS": {"wkt": crs.to_wkt()}}
        out[name].attrs.pop("grid_mapping", None)
    out.attrs = {**json_safe(ds.attrs), **_geozarr(box), COMPLETE: False}
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


class Pipeline(ZarrsCodecPipeline):
    """Reads the chunks of a store on a local disk with zarrs (Rust), outside of Python's lock.

    A shard of 64 chunks costs half of what it does in Zarr-Python. Elsewhere waiting for the store
    is what costs: other stores, memory and transactions among them, are Zarr-Python's.
    """

    #: The process in which zarrs has started its threads. A fork of it has none of them, and would
    #: wait for them for ever.
    _process: ClassVar[int | None] = None

    @classmethod
    def from_array_metadata_and_store(cls, array_metadata: Any, store: Any) -> Pipeline:
        """Return a pipeline for one array."""
        if type(store) is not LocalStore:
            raise NotImplementedError("zarrs is for local stores")  # Zarr takes its own then
        pipeline: Pipeline = super().from_array_metadata_and_store(array_metadata, store)
        return pipeline

    async def read(self, batch_info: Any, out: Any, drop_axes: tuple[int, ...] = ()) -> None:
        """Read parts of chunks into `out`."""
        process = os.getpid()
        if Pipeline._process is None:
            Pipeline._process = process
        if Pipeline._process != process and self.python_impl is not None:
            await self.python_impl.read(batch_info, out, drop_axes)
        else:
            await super().read(batch_info, out, drop_axes)


register_pipeline(Pipeline)
_OURS = f"{Pipeline.__module__}.{Pipeline.__qualname__}"
_ZARRS_OWN = "zarr.core.codec_pipeline.BatchedCodecPipeline"


@contextmanager
def _quick_reading() -> Iterator[None]:
    """Let arrays that are opened meanwhile be read by `Pipeline`, unless the user chose one."""
    if zarr.config.get("codec_pipeline.path") == _ZARRS_OWN:
        with zarr.config.set({"codec_pipeline.path": _OURS}):
            yield
    else:
        yield


def is_complete(store: Any, group: str | None) -> bool | None:
    """Return whether a scene was written to its end; None if there is none."""
    try:
        attrs = zarr.open_group(store, path=group or "", mode="r").attrs
    except FileNotFoundError:
        return None
    # A group without the mark is either another program's or only a parent of scenes.
    return bool(attrs[COMPLETE]) if COMPLETE in attrs else None


def open_scene(store: Any, group: str | None = None, *, chunks: Any = "auto") -> xr.Dataset:
    """Return a scene of a Zarr store, lazy.

    What lies on a local disk is read with zarrs, unless Zarr's setting ``codec_pipeline.path`` says
    otherwise.

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
        with _quick_reading():
            ds = xr.open_zarr(
                target, group=group, chunks=None if chunks == "auto" else chunks,
                decode_coords="all", consolidated=False, zarr_format=3,
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
    # Once it is cropped the scene's place is another: only the coordinates are right then.
    out.attrs = {
        k: v for k, v in ds.attrs.items()
        if k not in (COMPLETE, "zarr_conventions") and not k.startswith(("proj:", "spatial:"))
    }  # fmt: skip
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

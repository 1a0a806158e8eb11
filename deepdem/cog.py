"""A surface as a cloud-optimised GeoTIFF, never whole in memory."""

from __future__ import annotations

import glob
import os
import threading
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import xarray as xr
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray
from rasterio.windows import Window

from deepdem._run import Key, active_scheduler, compute, progress_bar
from deepdem.scene import check_scene, dask_layer
from deepdem.vertical import geotiff_crs
from deepdem.write import as_dataset, grid_of, slices_of

__all__ = ["write_cog"]


class _Raster:
    """A GeoTIFF that tasks of this process write blocks of, in any order."""

    def __init__(self, dataset: Any):
        self.dataset, self.lock = dataset, threading.Lock()

    def put(self, band: int, place: tuple[slice, slice], block: NDArray[Any]) -> None:
        """Write one block; GDAL lets one thread at a time into a dataset."""
        with self.lock:
            self.dataset.write(
                block.astype(np.float32, copy=False), band, window=Window.from_slices(*place)
            )


def write_cog(
    result: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    compress: str = "deflate",
    overviews: bool = True,
    progress: bool | str = "auto",
) -> None:
    """Write a surface as a cloud-optimised GeoTIFF, block by block; computes.

    Blocks go to an uncompressed raster beside the target as they are computed, GDAL makes the COG
    of it, and the target appears, or is replaced, when it is whole. On a cluster the workers
    compute and this process writes. Memory is that of the blocks in work and 128 MB for GDAL.

    Parameters
    ----------
    result
        A surface, or a Dataset: one band a variable. Float32, no data is NaN; masks are 1 and 0.
    path
        A local file; its folder needs room for the raster uncompressed, for as long as it takes.
    compress
        ``"deflate"``, ``"zstd"`` or ``"lzw"``, with the predictor for floating point, or
        ``"none"``.
    overviews
        Whether there are smaller versions of it inside, by averages.
    progress
        As in `deepdem.write.write_zarr`.

    Raises
    ------
    ValueError
        `path` is a URL, or `compress` is not known.
    NotImplementedError
        Dask's scheduler of processes is active.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is a URL: write a local file and upload that, or use to_zarr")
    if compress.lower() not in (known := ("deflate", "zstd", "lzw", "none")):
        raise ValueError(f"compress={compress!r}: pass one of {', '.join(known)}")
    ds = as_dataset(result)
    check_scene(ds, map(str, ds.data_vars))
    path = Path(path).absolute()
    pixels, part = (path.with_name(f".{path.name}.{step}") for step in ("pixels", "part"))
    try:
        with rasterio.Env(GDAL_CACHEMAX=128 * 1024**2, GDAL_TIFF_INTERNAL_MASK=True):
            _write_pixels(ds, pixels, progress)
            rasterio.shutil.copy(
                pixels, part, driver="COG", COMPRESS=compress.upper(), BIGTIFF="IF_SAFER",
                PREDICTOR="NO" if compress.lower() == "none" else "FLOATING_POINT",
                OVERVIEWS="AUTO" if overviews else "NONE", OVERVIEW_RESAMPLING="AVERAGE",
                NUM_THREADS="ALL_CPUS",
            )  # fmt: skip
        part.replace(path)
    finally:
        for rest in (pixels, *path.parent.glob(f"{glob.escape(part.name)}*")):
            rest.unlink(missing_ok=True)


def _write_pixels(ds: xr.Dataset, path: Path, progress: bool | str) -> None:
    """Write all bands as a plain raster: tiles that are written in part can be written again."""
    box = grid_of(ds)
    with rasterio.open(
        path, "w", driver="GTiff", height=box.shape.y, width=box.shape.x, count=len(ds.data_vars),
        dtype="float32", crs=geotiff_crs(box.crs.proj).to_wkt(), transform=box.affine,
        nodata=np.nan, tiled=True, blockxsize=512, blockysize=512, interleave="band",
        BIGTIFF="IF_SAFER", SPARSE_OK=True,
    ) as dataset:  # fmt: skip
        dataset.update_tags(**{str(k): str(v) for k, v in ds.attrs.items()})
        for band, (name, layer) in enumerate(ds.data_vars.items(), 1):
            tags = {str(k): str(v) for k, v in layer.attrs.items()}
            dataset.set_band_description(band, tags.pop("long_name", str(name)))
            dataset.set_band_unit(band, tags.pop("units", ""))
            # Of a single surface they are the file's own.
            dataset.update_tags(band if len(ds.data_vars) > 1 else 0, **tags)
        _fill_raster(ds, _Raster(dataset), progress)


def _fill_raster(ds: xr.Dataset, raster: _Raster, progress: bool | str) -> None:
    schedule, client = active_scheduler()
    if getattr(schedule, "__module__", "") == "dask.multiprocessing":
        raise NotImplementedError(
            "a GeoTIFF by Dask's scheduler of processes, which would bring the whole raster here "
            "at once: use threads or a dask.distributed.Client"
        )
    arrays: list[Any] = [dask_layer(ds, str(name)) for name in ds.data_vars]
    name = f"cog-{tokenize([array.name for array in arrays], id(raster))}"
    graph: dict[Any, Any] = {f"{name}-to": DataNode(f"{name}-to", raster)}
    blocks: dict[Key, tuple[int, tuple[slice, slice]]] = {}
    for band, array in enumerate(arrays, 1):
        rows, columns = slices_of(array.chunks)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            source = (array.name, i, j)
            key: Key = source if client else (name, band, i, j)
            blocks[key] = band, (row, column)
            graph[key] = Task(
                key, _Raster.put, TaskRef(f"{name}-to"), band, (row, column), TaskRef(source)
            )  # fmt: skip
    layers = HighLevelGraph.from_collections(name, {} if client else graph, dependencies=arrays)
    sizes = {
        key: (row.stop - row.start) * (column.stop - column.start)
        for key, (_, (row, column)) in blocks.items()
    }
    with progress_bar(progress, "Writing", len(sizes)) as advance:
        for key, block in compute(layers, sizes, advance):
            raster.put(*blocks[key], block)

"""Building a scene from GeoTIFFs to Zarr against whole-raster preprocessing, time and memory.

The predecessor's steps, each on whole rasters: read, bring onto the ortho's grid
(`rasterio.warp.reproject`), write a deflate GeoTIFF, collect the nodata mask, NDVI, and
scikit-image's CLAHE of both orthos. Each run is a process of its own, with two threads or workers;
the figure of memory is the peak of its resident pages (`VmHWM`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from common import Result, folder, options, report
from memory import peak_mib
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import reproject, transform_bounds
from rasterio.windows import Window

CORES = 2
#: Where two UTM zones meet: the orthos are in the western one, the lidar in the eastern.
HERE, BESIDE, LEFT, TOP = 32610, 32611, 730_000.0, 5_000_000.0
_TILED = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
_NODATA = {"ortho_left": 0, "ortho_right": 0, "red": -9999, "nir": -9999}
_RAW = ("ortho_left", "ortho_right", "dsm", "triangulation_error", "red", "nir", "lidar_dsm")


# --- the inputs ----------------------------------------------------------------------------------


def inputs(cache: Path, width: int) -> Path:
    """Return a folder of rasters as stereo, HLS and lidar give them, `width` pixels of 1 m."""
    into = cache / f"rasters-{width}"
    if (into / "done").exists():
        return into
    import deepdem

    into.mkdir(exist_ok=True)
    tile = deepdem.synthetic_scene((512, 512), seed=5).compute()
    grids = {
        "ortho_left": (HERE, LEFT, TOP, 1.0, width),
        # Stereo programs crop each raster as they please, on one grid of pixels.
        "ortho_right": (HERE, LEFT - 37, TOP + 12, 1.0, width + 64),
        "dsm": (HERE, LEFT - 5, TOP + 9, 1.0, width + 16),
        "triangulation_error": (HERE, LEFT - 5, TOP + 9, 1.0, width + 16),
        "red": (HERE, LEFT - 95, TOP + 105, 30.0, width // 30 + 9),
        "nir": (HERE, LEFT - 95, TOP + 105, 30.0, width // 30 + 9),
        "lidar_dsm": (BESIDE, *_beside(width)),
    }
    for name, (epsg, left, top, pixel, size) in grids.items():
        values = tile[name].values
        low, high = np.nanmin(values), np.nanmax(values)
        if name.startswith("ortho"):  # 11 bits
            values = np.nan_to_num(1 + (values - low) / (high - low) * 2046).astype(np.uint16)
        elif name in ("red", "nir"):
            values = np.nan_to_num(values * 1e4, nan=-9999).astype(np.int16)
        else:
            values = np.nan_to_num(values, nan=-9999).astype(np.float32)
        profile = {
            "driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": values.dtype,
            "crs": epsg, "transform": from_origin(left, top, pixel, pixel),
            "nodata": _NODATA.get(name, -9999), **_TILED,
        }  # fmt: skip
        with rasterio.open(into / f"{name}.tif", "w", **profile) as file:
            if name in ("red", "nir"):
                file.scales = (1e-4,)
            for row in range(0, size, 512):
                for column in range(0, size, 512):
                    part = values[:: 1 - 2 * (row // 512 % 2), :: 1 - 2 * (column // 512 % 2)]
                    part = part[: size - row, : size - column]
                    file.write(part, 1, window=Window(column, row, *part.shape[::-1]))
    (into / "done").touch()
    return into


def _beside(width: int) -> tuple[float, float, float, int]:
    bounds = transform_bounds(HERE, BESIDE, LEFT, TOP - width, LEFT + width, TOP)
    size = round(max(bounds[2] - bounds[0], bounds[3] - bounds[1])) + 40
    return round(bounds[0]) - 20.3, round(bounds[3]) + 20.6, 1.0, size


# --- the predecessor's way -----------------------------------------------------------------------


def theirs(rasters: Path, out: Path) -> None:
    """Preprocess whole rasters, as its notebook does, but for 2-D images and float32."""
    from skimage.exposure import equalize_adapthist

    with rasterio.open(rasters / "ortho_left.tif") as file:
        crs, transform, shape = file.crs, file.transform, file.shape
        bounds = file.bounds
    target = {"crs": crs, "transform": transform, "height": shape[0], "width": shape[1], **_TILED}
    mask = np.ones(shape, np.uint8)
    for name in _RAW:
        with rasterio.open(rasters / f"{name}.tif") as file:
            profile = {**file.profile, **target}
            pixels = np.array(file.transform)[[0, 4]]
            if file.crs == crs and (pixels == np.array(transform)[[0, 4]]).all():
                values = file.read(1, window=file.window(*bounds).round())
            else:
                values = np.full(shape, file.nodata, file.dtypes[0])
                reproject(
                    file.read(1), values, src_transform=file.transform, src_crs=file.crs,
                    src_nodata=file.nodata, dst_transform=transform, dst_crs=crs,
                    resampling=Resampling.bilinear, num_threads=CORES,
                )  # fmt: skip
        mask[values == profile["nodata"]] = 0
        _write(out / f"final_{name}.tif", values, profile)
    bands = []
    for name in ("red", "nir"):
        with rasterio.open(out / f"final_{name}.tif") as file:
            bands.append(np.ma.masked_equal(file.read(1), file.nodata).astype(np.float32))
    ndvi = (bands[1] - bands[0]) / (bands[1] + bands[0])
    mask[(ndvi.filled(9) < -1) | (ndvi.filled(9) > 1)] = 0
    _write(out / "final_ndvi.tif", ndvi.filled(0), {**profile, "dtype": "float32"})
    _write(out / "final_nodata_mask.tif", mask, {**profile, "dtype": "uint8", "nodata": None})
    del bands, ndvi
    for name in ("ortho_left", "ortho_right"):
        with rasterio.open(out / f"final_{name}.tif") as file:
            image, profile = file.read(1), {**file.profile, "dtype": "float32"}
        known = image != profile["nodata"]
        _write(out / f"final_{name}.tif", equalize_adapthist(image).astype("f4") * known, profile)


def _write(path: Path, values: np.ndarray, profile: dict) -> None:
    with rasterio.open(path, "w", num_threads=CORES, **profile) as file:
        file.write(values, 1)


# --- ours ----------------------------------------------------------------------------------------


def ours(rasters: Path, out: Path) -> None:
    """Build the scene."""
    import dask

    import deepdem

    layers = {name: str(rasters / f"{name}.tif") for name in _RAW}
    config = {"stack": {"like": "ortho_left"}, "scenes": {"bench": {"layers": layers}}}
    with dask.config.set(scheduler="threads", num_workers=CORES):
        report = deepdem.build(config, out / "scenes.zarr")
    if report.failed:
        raise RuntimeError(report.failed)


# --- the measures --------------------------------------------------------------------------------


def child(way: Callable[[Path, Path], None], rasters: str, out: str) -> None:
    """Run one way, and print its seconds and its peak in MiB."""
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir()
    began = time.perf_counter()
    way(Path(rasters), Path(out))
    print(json.dumps([time.perf_counter() - began, peak_mib()]))


def run(way: Callable[[Path, Path], None], rasters: Path, out: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", way.__name__, str(rasters),
         str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    took, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way.__name__} on {rasters.name}: {took:.1f} s, {peak:.0f} MiB", flush=True)
    return took, peak


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child({"theirs": theirs, "ours": ours}[sys.argv[2]], *sys.argv[3:5])
        return
    args = options(__doc__)
    widths = {"small": (512, 1024), "medium": (4096, 8192), "full": (8192, 16384)}[args.size]
    with folder(args) as cache:
        small, large = (inputs(cache, width) for width in widths)
        out = cache / "out"
        rounds = [(run(ours, small, out), run(theirs, small, out)) for _ in range(args.repeat or 1)]
        times = [b[0] / a[0] for a, b in rounds]
        peaks = [a[1] / b[1] for a, b in rounds]
        mine = max(a[1] for a, _ in rounds)
        larger = run(ours, large, out)[1]
    print()
    one, two = widths
    # Smaller scenes than that are a few chunks of 2048, and imports are half of their time.
    bars = (1.5, 0.25, 1.2) if args.size == "full" else (None, None, None)
    report([
        Result(f"wall, whole rasters / ours, {one} wide", float(np.median(times)), bars[0], True),
        Result(f"peak memory, ours / whole rasters, {one} wide", float(np.median(peaks)), bars[1]),
        Result(f"peak memory, {two} / {one} wide", larger / mine, bars[2],
               note=f"{larger:.0f} MiB / {mine:.0f} MiB"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()

"""The size on disk of a scene in our Zarr against GeoTIFFs of the same layers.

The GeoTIFFs are what GDAL's users keep: tiled, deflate, with and without the floating-point
predictor. Scenes are real where the data folder is there, synthetic where it is not; the layers
hold the same numbers in both. Then the same with heights rounded by ``precision_m=0.001``, in the
Zarr alone and in both. Bits are counted, not seconds: one run says it all.

    python ci/bench/zarr_size.py [--small | --medium]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
from common import Result, data_folder, folder, options, report, table

import deepdem
from deepdem.layers import describe

PRECISION_M = 0.001


def scenes(size: str) -> Iterator[tuple[str, xr.Dataset]]:
    width = {"small": 256, "medium": 1024, "full": 2048}[size]
    world = deepdem.synthetic_scene((width, width), seed=5).deepdem.prepare()
    yield f"synthetic {width}", world.compute()
    data = data_folder()
    if data is None or size == "small":
        return
    quarry = data / "stereo_marseille_quarry"
    yield "quarry (1/256 m)", deepdem.stack(
        {"dsm": quarry / "dsm_initial.tif", "lidar_dsm": quarry / "reference.tif",
         "ortho_1": quarry / "ortho_1.tif", "ortho_2": quarry / "ortho_2.tif",
         "triangulation_error": quarry / "ortho_mismatch_m.tif"}
    ).compute()  # fmt: skip
    # Onto another grid, so that heights are any float, as those of a stereo run are.
    yield "quarry regridded", deepdem.stack(
        {"dsm": quarry / "dsm_initial.tif", "lidar_dsm": quarry / "reference.tif"},
        crs="EPSG:32631", resolution=0.6,
    ).compute()  # fmt: skip


def bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def tiff(path: Path, layer: xr.DataArray, predictor: int) -> int:
    values = layer.values
    if values.dtype == bool:
        values, predictor = values.astype(np.uint8), min(predictor, 2)
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
        dtype=values.dtype, crs=layer.rio.crs, transform=layer.rio.transform(), tiled=True,
        blockxsize=256, blockysize=256, compress="deflate", predictor=predictor,
    ) as file:  # fmt: skip
        file.write(values, 1)
    return bytes_of(path)


def sizes(ds: xr.Dataset, where: Path) -> dict[str, dict[str, int]]:
    """Return the bytes of each layer, by way of storing it."""
    found: dict[str, dict[str, int]] = {}
    rounded = where / "rounded.zarr"
    ds.deepdem.to_zarr(where / "exact.zarr", overwrite=True)
    ds.deepdem.to_zarr(rounded, overwrite=True, precision_m=PRECISION_M)
    again = deepdem.open_scene(rounded).compute()
    for name in map(str, ds.data_vars):
        found[name] = {
            "raw": ds[name].nbytes,
            "zarr": bytes_of(where / "exact.zarr" / name),
            "zarr rounded": bytes_of(rounded / name),
            "tiff": tiff(where / "a.tif", ds[name], 1),
            "tiff predictor": tiff(where / "b.tif", ds[name], 3),
            "tiff rounded": tiff(where / "c.tif", again[name], 1),
            "tiff predictor, rounded": tiff(where / "d.tif", again[name], 3),
        }
    return found


def main() -> None:
    args = options(__doc__)
    results = []
    with folder(args) as cache:
        for title, ds in scenes(args.size):
            found = sizes(ds, cache)
            ways = [way for way in next(iter(found.values())) if way != "raw"]
            print(f"{title}: bytes a pixel")
            rows = []
            for name, by in found.items():
                pixels = ds[name].size
                rows.append((name, *(f"{by[way] / pixels:.2f}" for way in ways)))
            table(("layer", *ways), rows)

            def total(way: str, names: list[str], found=found) -> int:
                return sum(found[name][way] for name in names)

            every = list(found)
            heights = [name for name in every if describe(name).is_height]
            results += [
                Result(f"{title}: Zarr / deflate GeoTIFF, all layers",
                       total("zarr", every) / total("tiff", every), 1.0),
                Result(f"{title}: Zarr / GeoTIFF with predictor 3, all layers",
                       total("zarr", every) / total("tiff predictor", every)),
                Result(f"{title}: heights rounded / as they are, Zarr",
                       total("zarr rounded", heights) / total("zarr", heights)),
                Result(f"{title}: heights rounded in Zarr / deflate GeoTIFF as they are",
                       total("zarr rounded", heights) / total("tiff", heights), 1.0),
                Result(f"{title}: the same rounded heights, Zarr / deflate GeoTIFF",
                       total("zarr rounded", heights) / total("tiff rounded", heights), 1.0),
            ]  # fmt: skip
    report(results)


if __name__ == "__main__":
    main()

"""Make the rasters that scenes.yaml lists: what stereo, HLS and lidar give of a made-up world."""

import sys
from pathlib import Path

import numpy as np
import xarray as xr

import deepdem


def main(into: Path) -> None:
    scene = deepdem.synthetic_scene((600, 600), seed=7).compute()
    valley = into / "valley"
    valley.mkdir(parents=True, exist_ok=True)
    options = {"compress": "deflate", "tiled": True}
    scene["dsm"].rio.to_raster(valley / "run-DEM.tif", **options)
    scene["triangulation_error"].rio.to_raster(valley / "run-IntersectionErr.tif", **options)
    for side in ("left", "right"):
        scene[f"ortho_{side}"].rio.to_raster(valley / f"scene_ortho_{side}.tif", **options)
    lidar = xr.concat([scene["lidar_dsm"], scene["lidar_dtm"]], "band")
    lidar.rio.to_raster(into / "lidar.tif", **options)
    for name, band in (("red", "B04"), ("nir", "B8A")):
        coarse = scene[name].coarsen(y=30, x=30).mean()
        numbers = (coarse / 1e-4).round().fillna(-9999).astype(np.int16)
        numbers.attrs = {"scale_factor": 1e-4, "_FillValue": -9999}
        numbers.rio.to_raster(valley / f"HLS.S30.T31TFJ.2020123T103619.v2.0.{band}.tif")
    for number in (1, 2):
        folder = into / f"flat_{number}"
        folder.mkdir(exist_ok=True)
        part = deepdem.synthetic_scene((300, 300), seed=number).compute()
        for name in ("dsm", "ortho_left", "ortho_right", "triangulation_error", "lidar_dsm"):
            part[name].rio.to_raster(folder / f"{name}.tif", **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "rasters")

"""A STAC API on loopback, a real one, over rasters that are served beside it."""

from __future__ import annotations

import datetime as dt
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pystac
import rasterio
from affine import Affine
from rasterio.warp import transform_bounds


def write_cog(path: Path, array: np.ndarray, transform: Affine, crs: str, nodata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = array.shape
    with rasterio.open(
        path, "w", driver="COG", height=height, width=width, count=1, dtype=array.dtype, crs=crs,
        transform=transform, nodata=nodata, blocksize=128,
    ) as raster:  # fmt: skip
        raster.write(array, 1)
    return path


def make_item(
    name: str, when: str, rasters: dict[str, Path], *, url: str, folder: Path, cloud: float = 0.0
) -> pystac.Item:
    """Return an item as catalogues have them: a rounded box, and nothing said of the projection."""
    with rasterio.open(next(iter(rasters.values()))) as raster:
        box = [round(v, 5) for v in transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)]
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(
        name, {"type": "Polygon", "coordinates": [ring]}, box, dt.datetime.fromisoformat(when),
        {"eo:cloud_cover": cloud},
    )  # fmt: skip
    for key, path in rasters.items():
        item.add_asset(key, pystac.Asset(f"{url}/{path.relative_to(folder).as_posix()}"))
    return item


@contextmanager
def catalogue(folder: Path, collections: dict[str, list[pystac.Item]]) -> Iterator[str]:
    """Give the URL of a STAC API with the items of each collection."""
    import uvicorn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from stac_fastapi.static.api import Settings, make_api

    root = pystac.Catalog("root", "for tests")
    for name, items in collections.items():
        extent = pystac.Extent(
            pystac.SpatialExtent([[-180, -90, 180, 90]]),
            pystac.TemporalExtent([[dt.datetime(2000, 1, 1), None]]),
        )
        collection = pystac.Collection(name, "for tests", extent)
        collection.add_items(items)
        root.add_child(collection)
    root.normalize_and_save(str(folder), pystac.CatalogType.SELF_CONTAINED)
    app = make_api(Settings(catalog_href=(folder / "catalog.json").as_uri())).app
    # Its CORS headers fail with the newest Starlette; no browser asks here.
    app.user_middleware[:] = [m for m in app.user_middleware if "CORS" not in m.cls.__name__]
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()

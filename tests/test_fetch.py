from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
from clouds import LEFT, TOP, draw_points, write_ept, write_las
from odc.geo.geobox import GeoBox
from served import served
from typer.testing import CliRunner

import deepdem
from deepdem import fetch
from deepdem.cli import app
from deepdem.sources import _clouds
from deepdem.sources.lidar import grid_points

run = CliRunner()
PLACE = ["--bounds", f"{LEFT}", f"{TOP - 60}", f"{LEFT + 60}", f"{TOP}", "--resolution", "1",
         "--crs", "EPSG:32610"]  # fmt: skip


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    return write_las(tmp_path_factory.mktemp("cloud") / "a.laz", draw_points())


def _fetch(*arguments: object) -> str:
    done = run.invoke(app, ["fetch", "lidar", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_layer_is_fetched_as_a_geotiff_and_as_zarr(cloud, tmp_path):
    tif, zarr = tmp_path / "lidar_dsm.tif", tmp_path / "dtm.zarr"
    _fetch(cloud, tif, *PLACE, "--method", "max")
    grid = GeoBox.from_bbox((LEFT, TOP - 60, LEFT + 60, TOP), "EPSG:32610", resolution=1)
    wanted = grid_points(cloud, grid, method="max").compute()
    ds = deepdem.stack({"lidar_dsm": tif}, like="lidar_dsm")
    np.testing.assert_array_equal(ds["lidar_dsm"], wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["lidar_dsm.tif"]
    with rasterio.open(tif) as raster:
        assert raster.tags()["deepdem_method"] == "max"
        assert raster.units == ("m",)
    with pytest.raises(FileExistsError, match="--overwrite"):
        _fetch(cloud, tif, *PLACE)
    _fetch(cloud, tif, *PLACE, "--overwrite")
    _fetch(cloud, zarr, "--like", tif, "--kind", "lidar_dtm")
    scene = deepdem.open_scene(zarr)
    np.testing.assert_array_equal(
        scene["lidar_dtm"], grid_points(cloud, wanted, "lidar_dtm").compute()
    )
    _fetch(cloud, tmp_path / "density.zarr", "--like", zarr, "--kind", "density")


def test_it_goes_on_where_it_stopped(cloud, tmp_path, monkeypatch):
    out = tmp_path / "dsm.tif"
    grid = fetch.target_grid(bounds=(LEFT, TOP - 60, LEFT + 60, TOP), resolution=1,
                             crs="EPSG:32610")  # fmt: skip
    layer = grid_points(write_ept(tmp_path / "tree", draw_points()), grid, chunks=20)
    read, calls = _clouds.EptTree.read, []

    def stop(self, *where):
        calls.append(where)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return read(self, *where)

    import dask

    with dask.config.set(scheduler="sync"):
        monkeypatch.setattr(_clouds.EptTree, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch.write_layer(layer, str(out))
        assert not out.exists()  # half of it is not taken for a layer
        calls.clear()
        monkeypatch.setattr(_clouds.EptTree, "read", lambda s, *w: calls.append(w) or read(s, *w))
        with pytest.raises(ValueError, match=r"deepdem_method is .* overwrite=True"):
            fetch.write_layer(grid_points(tmp_path / "tree", grid, chunks=20, method="max"),
                              str(out))  # fmt: skip
        fetch.write_layer(layer, str(out))
    assert len(calls) == 5  # of nine chunks
    found = deepdem.stack({"lidar_dsm": out}, like="lidar_dsm")["lidar_dsm"]
    np.testing.assert_array_equal(found, layer.compute())
    # What it was made of changed in the meantime.
    part = tmp_path / "other.zarr"
    with dask.config.set(scheduler="sync"):
        fetch.write_layer(layer, str(part))
        write_ept(tmp_path / "tree2", draw_points(seed=3))
        about = json.loads((tmp_path / "tree2/ept.json").read_text())
        (tmp_path / "tree/ept.json").write_text(json.dumps({**about, "points": 6001}))
        with pytest.raises(ValueError, match=r"deepdem_points|the inputs of chunk"):
            fetch.write_layer(grid_points(tmp_path / "tree", grid, chunks=20), str(part))


def test_the_public_collections_are_said_which(tmp_path):
    write_ept(tmp_path / "tree", draw_points())
    ring = [[-123.1, 45.0], [-122.9, 45.0], [-122.9, 45.3], [-123.1, 45.3], [-123.1, 45.0]]
    with served(tmp_path) as server:
        about = {"name": "WA_Baker_2_B22", "id": 1, "count": 6000,
                 "url": f"{server.url}/tree/ept.json"}  # fmt: skip
        feature = {"type": "Feature", "properties": about,
                   "geometry": {"type": "Polygon", "coordinates": [ring]}}  # fmt: skip
        index = tmp_path / "resources.geojson"
        index.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        said = _fetch("3dep", tmp_path / "dsm.tif", *PLACE, "--index", index)
    assert "WA_Baker_2_B22 (2022)" in said
    assert "100% covered" in said
    assert (tmp_path / "dsm.tif").exists()


def test_what_is_wrong_is_said(cloud, tmp_path):
    with pytest.raises(ValueError, match="a grid is wanted: --like, or all of --bounds"):
        _fetch(cloud, tmp_path / "a.tif", "--resolution", 1)
    with pytest.raises(ValueError, match=r"name it x\.tif"):
        _fetch(cloud, tmp_path / "a.png", *PLACE)
    with pytest.raises(ValueError, match="is a URL"):
        _fetch(cloud, "s3://bucket/a.tif", *PLACE)

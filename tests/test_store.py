from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from affine import Affine
from pyproj import CRS

import deepdem


def test_round_trip_keeps_values_crs_attrs_dtypes_and_nan(scene, tmp_path):
    odd = scene.assign_attrs(name="a", number=np.float32(2), nested={"a": np.arange(2)})
    odd.deepdem.to_zarr(tmp_path / "s.zarr", group="one")
    back = deepdem.open_scene(tmp_path / "s.zarr", "one")
    assert back.dsm.chunks is not None
    for name, layer in scene.items():
        np.testing.assert_array_equal(back[name], layer)
        assert back[name].dtype == layer.dtype
        assert back[name].attrs == layer.attrs
    xr.testing.assert_equal(back.x, scene.x)
    assert back.rio.crs == scene.rio.crs
    assert back.rio.transform() == scene.rio.transform()
    assert json.loads(json.dumps(back.attrs))["number"] == 2
    xr.testing.assert_identical(
        back.compute(), deepdem.open_scene(tmp_path / "s.zarr/one").compute()
    )


@pytest.mark.filterwarnings("ignore:Failed to open Zarr store with consolidated")
def test_plain_xarray_sees_the_crs(scene, tmp_path):
    scene.deepdem.to_zarr(tmp_path / "s.zarr", group="one")
    plain = xr.open_zarr(tmp_path / "s.zarr", group="one", decode_coords="all")
    assert plain.rio.crs == plain.dsm.rio.crs == scene.rio.crs
    assert plain.odc.geobox == scene.odc.geobox


def test_heights_may_be_rounded(scene, tmp_path, no_compute):
    scene.deepdem.to_zarr(tmp_path / "exact.zarr")
    lazy = scene.chunk(y=100, x=100)
    lazy.deepdem.to_zarr(tmp_path / "s.zarr", precision_m=0.001)
    back = deepdem.open_scene(tmp_path / "s.zarr")
    for name in ("dsm", "lidar_dsm", "lidar_dtm"):
        assert back[name].dtype == np.float32
        assert back[name].attrs == {**scene[name].attrs, "precision_m": 1 / 1024}
        assert 1e-4 < float(np.abs(back[name] - scene[name]).max()) <= 0.5 / 1024
        np.testing.assert_array_equal(back[name].isnull(), scene[name].isnull())
        np.testing.assert_array_equal(back[name] * 1024 % 1, back[name] * 0)
    for name in ("ortho_left", "triangulation_error", "ndvi", "valid"):
        xr.testing.assert_identical(back[name].compute(), scene[name])
    assert "precision_m" not in scene.dsm.attrs
    size = {store: sum(f.stat().st_size for f in (tmp_path / store / "dsm").rglob("*"))
            for store in ("exact.zarr", "s.zarr")}  # fmt: skip
    assert size["s.zarr"] < 0.9 * size["exact.zarr"]
    with pytest.raises(ValueError, match="precision_m=0: wanted a step in metres"):
        scene.deepdem.to_zarr(tmp_path / "t.zarr", precision_m=0)


@pytest.mark.parametrize("crs", ["EPSG:32610", "EPSG:32610+5703", "odd"])
def test_geozarr_attributes_say_where_the_scene_is(scene, tmp_path, crs):
    odd = "+proj=laea +lat_0=48 +lon_0=-121 +ellps=GRS80 +units=m +type=crs"
    crs = CRS(odd if crs == "odd" else crs)
    placed = scene[["dsm"]].rio.write_crs(crs.to_wkt())
    placed.deepdem.to_zarr(tmp_path / "s.zarr")
    attrs = zarr.open_group(tmp_path / "s.zarr").attrs
    assert {c["name"] for c in attrs["zarr_conventions"]} == {"proj:", "spatial:"}
    said = attrs.get("proj:code") or attrs["proj:wkt2"]
    assert CRS(said) == crs
    assert ("proj:code" in attrs) == (crs.to_epsg() is not None)
    box = placed.odc.geobox
    assert attrs["spatial:dimensions"] == ["y", "x"]
    assert attrs["spatial:shape"] == list(box.shape)
    assert Affine(*attrs["spatial:transform"]) == box.affine
    assert attrs["spatial:bbox"] == [*box.extent.boundingbox.bbox]
    # The first pixel's centre is half a pixel inside.
    x, y = Affine(*attrs["spatial:transform"]) @ (0.5, 0.5)
    assert (x, y) == (placed.x[0], placed.y[0])
    back = deepdem.open_scene(tmp_path / "s.zarr")
    assert not [k for k in back.attrs if ":" in k or k == "zarr_conventions"]
    assert CRS(back.rio.crs) == crs
    assert back.odc.geobox.crs.proj == crs


def test_gdal_sees_the_georeference_where_it_knows_the_format(scene, tmp_path):
    scene.deepdem.to_zarr(tmp_path / "s.zarr", group="one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(f'ZARR:"{tmp_path / "s.zarr"}"') as store:
            assert any(name.endswith("/one/dsm") for name in store.subdatasets)
    where = f'ZARR:"{tmp_path / "s.zarr"}":/one/dsm'
    if tuple(map(int, rasterio.__gdal_version__.split(".")[:2])) < (3, 11):
        with pytest.raises(rasterio.errors.RasterioIOError, match="Unsupported codec"):
            rasterio.open(where)
        return
    with rasterio.open(where) as file:
        assert file.crs == scene.rio.crs
        assert file.transform == scene.rio.transform()
        np.testing.assert_array_equal(file.read(1), scene.dsm)


def test_layout_is_sharded_float32_zarr_3(scene, tmp_path):
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    array = zarr.open_array(tmp_path / "s.zarr", path="dsm")
    assert array.metadata.zarr_format == 3
    assert array.dtype == np.float32
    assert (array.chunks, array.shards) == ((256, 256), (512, 512))
    assert array.attrs["_CRS"]["wkt"].startswith("PROJCRS")
    assert len(list((tmp_path / "s.zarr/dsm/c").rglob("*/*"))) == 1  # one shard, one file


def test_a_finished_scene_is_safe_and_a_half_written_one_is_redone(scene, tmp_path, monkeypatch):
    store = tmp_path / "s.zarr"
    monkeypatch.setattr(
        zarr, "consolidate_metadata", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    real = zarr.core.attributes.Attributes.__setitem__
    monkeypatch.setattr(
        zarr.core.attributes.Attributes, "__setitem__",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        scene.deepdem.to_zarr(store, group="a")
    monkeypatch.undo()
    assert zarr.core.attributes.Attributes.__setitem__ is real
    with pytest.raises(ValueError, match="half-written"):
        deepdem.open_scene(store, "a")
    with pytest.raises(FileNotFoundError, match="no scene in"):
        deepdem.open_scenes(store)
    scene.deepdem.to_zarr(store, group="a")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        scene.deepdem.to_zarr(store, group="a")
    (scene + 1).assign_coords(scene.coords).deepdem.to_zarr(store, group="a", overwrite=True)
    assert float(deepdem.open_scene(store, "a").dsm.max()) == float(scene.dsm.max() + 1)


def test_many_scenes_are_a_tree(scene, tmp_path):
    for name in ("b", "a"):
        scene.deepdem.to_zarr(tmp_path / "s.zarr", group=name)
    tree = deepdem.open_scenes(tmp_path / "s.zarr")
    assert list(tree.children) == ["a", "b"]
    xr.testing.assert_equal(tree["a"].to_dataset().dsm.compute(), scene.dsm)
    with pytest.raises(FileNotFoundError, match=r"no scene 'c'.*groups are \['a', 'b'\]"):
        deepdem.open_scene(tmp_path / "s.zarr", "c")
    with pytest.raises(FileNotFoundError, match="pass group="):
        deepdem.open_scene(tmp_path / "s.zarr")
    with pytest.raises(FileNotFoundError, match="no Zarr store"):
        deepdem.open_scene(tmp_path / "none.zarr")


def test_a_store_in_memory(scene):
    store = zarr.storage.MemoryStore()
    scene.deepdem.to_zarr(store, group="m")
    assert deepdem.open_scene(store, "m").dsm.equals(scene.dsm)

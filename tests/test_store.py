from __future__ import annotations

import json
import subprocess
import sys
import warnings
from multiprocessing import get_all_start_methods
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import obstore.store
import pytest
import rasterio
import xarray as xr
import zarr
from affine import Affine
from pyproj import CRS
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_pipeline

import deepdem
from deepdem.blocks import stored_source
from deepdem.regions import _zarr_array
from deepdem.store import Pipeline, _quick_reading


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


# --- what reads it -------------------------------------------------------------------------------


def _pipeline(ds):
    source, _, _ = stored_source(ds.dsm.data)
    return type(_zarr_array(source)._async_array.codec_pipeline)


def test_zarrs_reads_what_is_on_a_local_disk_unless_told_otherwise(scene, tmp_path):
    path, own = tmp_path / "s.zarr", BatchedCodecPipeline
    scene.chunk(y=256, x=256).deepdem.to_zarr(path)
    assert _pipeline(deepdem.open_scene(path)) is Pipeline
    assert _pipeline(deepdem.open_scene(zarr.storage.LocalStore(path))) is Pipeline
    assert zarr.config.get("codec_pipeline.path").endswith(".BatchedCodecPipeline")
    (tmp_path / "bucket").mkdir()
    for other in (
        zarr.storage.MemoryStore(), "memory://zarrs/s.zarr",
        zarr.storage.ObjectStore(obstore.store.LocalStore(str(tmp_path / "bucket"))),
    ):  # fmt: skip
        scene.deepdem.to_zarr(other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ds = deepdem.open_scene(other)
            assert _pipeline(ds) is own
            xr.testing.assert_equal(ds.compute(), scene)
    register_pipeline(_Chosen)
    with zarr.config.set({"codec_pipeline.path": f"{__name__}._Chosen"}):
        assert _pipeline(deepdem.open_scene(path)) is _Chosen


class _Chosen(BatchedCodecPipeline):
    """A user's own."""


def test_zarrs_reads_the_same_holes_and_all(scene, tmp_path):
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    shards = zarr.open_group(tmp_path / "s.zarr", mode="a")
    layer = np.full((600, 600), np.nan, np.float32)
    layer[:256] = scene.dsm.values[:1, :1]
    made = shards.create_array(
        "sparse",
        shape=layer.shape,
        dtype="f4",
        chunks=(64, 64),
        shards=(256, 256),
        fill_value=np.nan,
    )
    made[:256] = layer[:256]
    assert not (tmp_path / "s.zarr/sparse/c/2").exists()  # never written
    with _quick_reading():
        array = zarr.open_array(tmp_path / "s.zarr", path="sparse", mode="r")
    assert type(array._async_array.codec_pipeline) is Pipeline
    for there in (np.s_[:], np.s_[250:300, 7:90], np.s_[599:, 599:], np.s_[3], np.s_[0:0]):
        np.testing.assert_array_equal(array[there], layer[there], strict=True)
    copy = ForkingPickler.loads(bytes(ForkingPickler.dumps(array)))
    assert type(copy._async_array.codec_pipeline) is Pipeline
    np.testing.assert_array_equal(copy[:], layer)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="needs processes that fork")
def test_a_forked_process_reads_and_does_not_hang(scene, tmp_path):
    """It has none of the threads that zarrs has started in its parent."""
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    program = (
        "import os, sys, numpy as np, deepdem\n"
        "ds = deepdem.open_scene(sys.argv[1], chunks=None)\n"
        "ds.dsm.load()\n"
        "if os.fork() == 0:\n"
        "    os._exit(int(not np.isfinite(ds.ndvi.values).any()))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    subprocess.run(  # noqa: S603  # our own words
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "s.zarr")],
        check=True, timeout=60, cwd=Path(__file__).parents[1],
    )  # fmt: skip

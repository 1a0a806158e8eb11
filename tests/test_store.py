from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
import zarr

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

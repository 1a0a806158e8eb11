"""Co-registration: known offsets come back, layers move together, and only a sample is read."""

from __future__ import annotations

import importlib
import json

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import deepdem
from deepdem import coregister as room
from deepdem.coregister import METHODS, coregister
from deepdem.grid import regrid
from deepdem.scene import geobox_of

pytest.importorskip("xdem", reason="needs the extra deepdem[coregister]")

#: Pixels east, pixels north, metres up: where the surface has been put.
OFFSET = (3.4, -1.7, 0.8)


def displaced(layer: xr.DataArray, offset=OFFSET, *, name="dsm", resampling="cubic"):
    """Return the layer put elsewhere, by the warper that every layer of a scene goes through."""
    east, north, up = offset
    grid = geobox_of(layer)
    move = room._Move(columns=east, rows=-north)
    data = layer.chunk(512).data
    out = regrid(room._translated(data, name, grid, move), grid, resampling=resampling, chunks=512)
    return (out + np.float32(up)).compute().rename(name).assign_attrs(units="m")


@pytest.fixture(scope="module")
def world() -> xr.Dataset:
    """A scene in memory, 320 by 300 pixels, whose dsm is the true surface put elsewhere."""
    ds = deepdem.synthetic_scene((320, 300), seed=3).compute()
    return ds.assign(
        dsm=displaced(ds["lidar_dsm"]),
        ortho_left=displaced(ds["ortho_left"], (3.4, -1.7, 0), name="ortho_left"),
    )


def found_px(record):
    return record["shift_columns_px"], -record["shift_rows_px"], record["shift_z_m"]


def stacked(**layers):
    return deepdem.stack(layers, like="lidar_dsm", chunks=512)


# --- the answer ----------------------------------------------------------------------------------


def test_a_known_offset_comes_back(world):
    out = coregister(world)
    record = out.attrs["coregistration"]
    # What was added undoes where it had been put.
    np.testing.assert_allclose(found_px(record), [-o for o in OFFSET], atol=0.1)
    assert record["after"]["nmad"] < 0.6 * record["before"]["nmad"]
    assert abs(record["after"]["median"]) < 0.02
    left = (out["dsm"] - out["lidar_dsm"]).compute()
    assert abs(float(left.median())) < 0.05
    # Said on the ground: pixels of a metre, north is up.
    np.testing.assert_allclose(
        [record["shift_x_m"], record["shift_y_m"]], [-3.4, 1.7], atol=0.1
    )  # fmt: skip


@pytest.mark.parametrize(
    "path", ["stereo_reunion/dsm_initial.tif", "lidar_topography/dtm.tif"]
)  # fmt: skip
def test_a_known_offset_on_a_real_surface(data_folder, path):
    truth = stacked(lidar_dsm=data_folder / path).isel(y=slice(0, 600), x=slice(0, 600)).compute()
    off = truth.assign(dsm=displaced(truth["lidar_dsm"]))
    record = coregister(off).attrs["coregistration"]
    np.testing.assert_allclose(found_px(record), [-o for o in OFFSET], atol=0.1)
    assert record["after"]["nmad"] < 0.2 * record["before"]["nmad"]


def test_two_stereo_pipelines_of_one_pair(data_folder):
    pair = data_folder / "stereo_reunion"
    ds = stacked(lidar_dsm=pair / "dsm_initial.tif", dsm=pair / "dsm_s2p.tif")
    record = coregister(ds).attrs["coregistration"]
    found = [record[f"shift_{axis}_m"] for axis in "xyz"]
    np.testing.assert_allclose(found, [-0.215, 0.302, -0.027], atol=0.01)
    assert record["after"]["nmad"] < record["before"]["nmad"]
    assert record["after"]["count"] > 0.9 * record["before"]["count"]


def test_a_pair_of_another_project_on_a_grid_of_degrees(data_folder):
    pair = data_folder / "dem_pair_srtm_shifted"
    ds = stacked(lidar_dsm=pair / "srtm_ref.tif", dsm=pair / "srtm_blurred_and_shifted.tif")
    ds = ds.isel(y=slice(0, 500), x=slice(0, 500))
    with pytest.raises(ValueError, match=r"max_shift_m=20.*check the CRS.*larger max_shift_m"):
        coregister(ds)
    record = coregister(ds, max_shift_m=600).attrs["coregistration"]
    np.testing.assert_allclose(
        [record["shift_columns_px"], record["shift_rows_px"], record["shift_z_m"]],
        [3.0, 5.0, -0.018], atol=0.03,
    )  # fmt: skip
    # An arc second is 31 m along a meridian, and less along a parallel.
    assert record["shift_y_m"] / -5 == pytest.approx(92.5, rel=0.01)
    assert 0 < record["shift_x_m"] / 3 < 0.9 * 92.5


def test_a_tilt_is_taken_off(world):
    v = xr.DataArray(np.linspace(-1, 1, 320), dims="y")
    u = xr.DataArray(np.linspace(-1, 1, 300), dims="x")
    tilt = (1.5 * u - 0.5 * v).astype(np.float32)
    ds = world.assign(dsm=displaced(world["lidar_dsm"]) + tilt)
    # A tilt looks like a shift where slopes share a direction: twice finds what once does not.
    method = ["nuth_kaab", "deramp"]
    once = coregister(ds, method=method, max_ndvi=None).attrs["coregistration"]
    assert once == coregister(ds, method="nuth_kaab+deramp", max_ndvi=None).attrs["coregistration"]
    moved = coregister(ds, method=2 * method, max_ndvi=None)
    record = moved.attrs["coregistration"]
    for (i, j), coefficient in {(1, 0): -1.5, (0, 1): 0.5, (1, 1): 0}.items():
        assert once["ramp"][i][j] == pytest.approx(coefficient, abs=0.15)
        assert record["ramp"][i][j] == pytest.approx(coefficient, abs=0.05)
    np.testing.assert_allclose(found_px(record)[:2], [-3.4, 1.7], atol=0.1)
    left = (moved["dsm"] - moved["lidar_dsm"]).isel(x=slice(10, -10), y=slice(10, -10)).compute()
    assert float(left.isel(x=slice(0, 20)).median()) == pytest.approx(0, abs=0.1)
    assert float(left.isel(x=slice(-20, None)).median()) == pytest.approx(0, abs=0.1)
    assert moved.attrs["coregistration"]["after"]["nmad"] < record["before"]["nmad"] / 2


def test_a_vertical_shift_leaves_pixels_where_they_are(world):
    ds = world.assign(dsm=world["lidar_dsm"] - 2.25)
    out = coregister(ds, method="vertical_shift")
    np.testing.assert_allclose(out["dsm"], world["lidar_dsm"], atol=1e-4)
    np.testing.assert_array_equal(out["ortho_left"], world["ortho_left"])
    assert out.attrs["coregistration"]["shift_x_m"] == 0


def test_stable_ground_is_what_counts(world):
    raised = xr.zeros_like(world["lidar_dsm"]).astype(bool)
    raised[:, 100:] = True
    clean = world.assign(dsm=world["lidar_dsm"] + np.float32(0.5))
    ds = clean.assign(
        dsm=clean["dsm"] + 6 * raised.astype(np.float32),
        ndvi=xr.where(raised, 0.8, 0.1).astype(np.float32),
        rock_mask=~raised,
    )
    vertical = {"method": "vertical_shift"}

    def up(scene, **options):
        return coregister(scene, **vertical, **options).attrs["coregistration"]["shift_z_m"]

    assert up(ds, max_ndvi=None) == pytest.approx(-6.5, abs=1e-3)
    assert up(ds) == pytest.approx(-0.5, abs=1e-3)
    assert up(ds, max_ndvi=None, stable="rock_mask") == pytest.approx(-0.5, abs=1e-3)
    bands = ds.drop_vars("ndvi").assign(red=0.1 + 0 * ds["ndvi"], nir=xr.where(raised, 0.5, 0.1))
    assert up(bands) == pytest.approx(-0.5, abs=1e-3)
    record = coregister(ds, **vertical, max_slope=20, max_ndvi=None).attrs["coregistration"]
    everywhere = coregister(ds, **vertical, max_slope=90, max_ndvi=None).attrs["coregistration"]
    assert record["before"]["count"] < everywhere["before"]["count"]


# --- what moves ----------------------------------------------------------------------------------


def test_the_stereo_side_moves_together_and_nothing_else(world):
    ds = world.assign(
        valid=xr.ones_like(world["dsm"], dtype=bool),
        ndvi=xr.zeros_like(world["dsm"]),
        confidence=world["dsm"] * 0 + 1,
    )
    out = coregister(ds)
    record = out.attrs["coregistration"]
    moved = {"dsm", "ortho_left", "ortho_right", "triangulation_error", "valid"}
    for name, layer in ds.data_vars.items():
        assert out[name].dtype == layer.dtype
        assert out[name].attrs.get("units") == layer.attrs.get("units")
        if name in moved:
            assert out[name].attrs["coregistration"] == record
            assert isinstance(out[name].data, da.Array)
        else:
            xr.testing.assert_identical(out[name], layer)
    for dim in ("y", "x"):
        np.testing.assert_array_equal(out[dim], ds[dim])
    assert geobox_of(out) == geobox_of(ds)
    # The image was put where the surface was: it comes back with it.
    truth = deepdem.synthetic_scene((320, 300), seed=3)["ortho_left"].compute()
    inner = {"y": slice(10, -10), "x": slice(10, -10)}
    before, after = (abs((d["ortho_left"] - truth).isel(inner)).mean() for d in (ds, out))
    assert float(after) < 0.35 * float(before)
    # It came from the east edge: three columns there have nothing.
    assert bool(out["dsm"].isel(x=slice(-3, None)).isnull().all())
    assert not bool(out["valid"].isel(x=slice(-3, None)).any())
    assert bool(out["valid"].isel(inner).all())

    chosen = coregister(ds, layers=["confidence"])
    assert "coregistration" in chosen["confidence"].attrs
    assert "coregistration" not in chosen["ortho_left"].attrs
    assert "coregistration" not in ds.attrs


def test_holes_stay_holes_and_nothing_leaks(world):
    holed = world["dsm"].copy()
    holed[100:140, 120:150] = np.nan
    ds = world.assign(dsm=holed)
    out = coregister(ds)["dsm"].compute()
    assert bool(out[105:130, 125:140].isnull().all())
    assert float(abs(out - world["lidar_dsm"])[95:150, 110:160].median()) < 0.3
    assert bool(np.isfinite(out[150:-5, 20:-20]).all())


def test_the_record_is_kept_in_zarr(world, tmp_path):
    once = coregister(world, method="vertical_shift")
    twice = coregister(once)
    twice.deepdem.to_zarr(tmp_path / "s.zarr", group="a")
    back = deepdem.open_scene(tmp_path / "s.zarr", "a")
    record = json.loads(json.dumps(twice.attrs["coregistration"], allow_nan=False))
    assert back.attrs["coregistration"] == record
    assert back["dsm"].attrs["coregistration"] == record
    assert record["previous"]["method"] == "vertical_shift"
    xr.testing.assert_equal(back["dsm"].load(), twice["dsm"].compute())


# --- chunks, laziness, the sample ----------------------------------------------------------------


@settings(max_examples=6)
@given(
    chunks=st.tuples(st.integers(40, 320), st.integers(40, 300)), tiles=st.booleans(),
    method=st.sampled_from(["nuth_kaab", "vertical_shift+deramp"]),
)  # fmt: skip
def test_the_chunks_do_not_matter(chunks, tiles, method):
    ds = deepdem.synthetic_scene((320, 300), seed=3)[["dsm", "lidar_dsm", "ortho_left"]].compute()
    ds["dsm"] = displaced(ds["lidar_dsm"])
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        if tiles:
            patch.setattr(room, "_WHOLE_PX", 100)
            patch.setattr(room, "_TILE_PX", 64)
        want = coregister(ds, method=method, max_ndvi=None, sample_px=20_000)
        got = coregister(
            ds.chunk(dict(zip("yx", chunks, strict=True))), method=method, max_ndvi=None,
            sample_px=20_000,
        )  # fmt: skip
        assert got.attrs == want.attrs
        assert ("tiles" in got.attrs["coregistration"]["sample"]) == tiles
        xr.testing.assert_identical(got.compute(), want.compute())


class Counted:
    """An array on disk, so to speak, that counts the pixels that are read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, 2
        self.read = 0

    def __getitem__(self, key):
        part = self.values[key]
        self.read += part.size
        return part


def test_only_a_sample_is_read_and_the_rest_is_lazy(world, monkeypatch):
    monkeypatch.setattr(room, "_WHOLE_PX", 100)
    monkeypatch.setattr(room, "_TILE_PX", 64)
    stores = {n: Counted(world[n].values) for n in ("dsm", "lidar_dsm", "ortho_left")}
    ds = world[list(stores)]
    for name, store in stores.items():
        data = da.from_array(store, chunks=64, asarray=True)
        ds[name] = ("y", "x"), data, world[name].attrs
    out = coregister(ds, max_ndvi=None, sample_px=10_000)
    assert stores["ortho_left"].read == 0
    # Eight tiles are read at a time, of 25.
    assert stores["dsm"].read == stores["lidar_dsm"].read <= 8 * 64**2
    record = out.attrs["coregistration"]
    assert record["sample"].startswith("8 tiles of 64 px")
    np.testing.assert_allclose(found_px(record), [-o for o in OFFSET], atol=0.15)
    assert float(abs(out["dsm"].compute() - world["lidar_dsm"]).median()) < 0.15


def test_applying_computes_nothing(world, no_compute, monkeypatch):
    sample = room._collect(
        room._sampled(world, "lidar_dsm", room.StableGround()), room.StableGround(),
        sample_px=1000, gap_px=30, step=(-1, 1),
    )  # fmt: skip
    monkeypatch.setattr(room, "_collect", lambda *_, **__: sample)
    with no_compute():
        coregister(world.chunk(100))


def test_tiles_are_looked_for_until_there_is_ground(world, monkeypatch):
    monkeypatch.setattr(room, "_WHOLE_PX", 100)
    monkeypatch.setattr(room, "_TILE_PX", 32)
    only_there = world["lidar_dsm"].where(world["x"] > world["x"][-101])
    record = coregister(world.assign(lidar_dsm=only_there), max_ndvi=None).attrs["coregistration"]
    assert "(100 of 100 read)" in record["sample"]
    np.testing.assert_allclose(found_px(record), [-o for o in OFFSET], atol=0.2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5), (40, 31)])
def test_any_beginning_of_the_tiles_is_spread_out(shape):
    order = list(room._spread_out(*shape))
    assert sorted(order) == [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    if shape == (40, 31):
        quarter = np.array(order[: len(order) // 4])
        inside = [((quarter[:, 0] < 20) == a) & ((quarter[:, 1] < 15) == b)
                  for a in (True, False) for b in (True, False)]  # fmt: skip
        assert min(np.sum(i) for i in inside) > 0.8 * len(quarter) / 4


# --- what is refused -----------------------------------------------------------------------------


def test_a_shift_too_far_is_refused(world):
    ds = world.assign(dsm=world["lidar_dsm"] + 40)
    with pytest.raises(ValueError, match=r"-40.00 m up, more than max_shift_m=20.*ellipsoid"):
        coregister(ds, method="vertical_shift")
    for bound in (45, None):
        record = coregister(ds, method="vertical_shift", max_shift_m=bound)
        assert record.attrs["coregistration"]["shift_z_m"] == pytest.approx(-40, abs=1e-3)
    with pytest.raises(ValueError, match=r"-3\.\d\d m east.*check the CRS"):
        coregister(world, max_shift_m=2)


def test_errors_name_what_is_wrong(world):
    with pytest.raises(ValueError, match=rf"\['icp'\] not known.*{METHODS[0]}.*rotate"):
        coregister(world, method="nuth_kaab+icp")
    with pytest.raises(ValueError, match="names nothing"):
        coregister(world, method=[])
    with pytest.raises(ValueError, match="lacks the layers"):
        coregister(world.drop_vars("lidar_dsm"))
    with pytest.raises(ValueError, match="no other surface"):
        coregister(world, reference="ortho_left")
    with pytest.raises(ValueError, match="stays: leave it out"):
        coregister(world, layers=["lidar_dsm"])
    with pytest.raises(ValueError, match=r"only 0 pixels of stable ground.*0 pixels have both"):
        coregister(world.assign(lidar_dsm=world["lidar_dsm"] * np.nan))
    with pytest.raises(ValueError, match=r"only 0 pixels.*max_slope=-1"):
        coregister(world, max_slope=-1)
    flat = xr.zeros_like(world["lidar_dsm"])
    with pytest.raises(ValueError, match=r"nuth_kaab found no shift.*'lidar_dsm'.*flat ground"):
        coregister(world.assign(lidar_dsm=flat, dsm=flat + 1))


def test_what_cannot_be_trusted_is_refused(world, monkeypatch):
    rng = np.random.default_rng(0)
    dots = xr.DataArray(rng.random(world["dsm"].shape) < 0.3, dims=("y", "x"))
    with pytest.raises(ValueError, match=r"could use \d+ pixels only.*holes"):
        coregister(world.assign(lidar_dsm=world["lidar_dsm"].where(dots)))
    worse = room._Move(columns=9.0)
    monkeypatch.setattr(room, "_estimate", lambda *_, **__: worse)
    with pytest.raises(ValueError, match=r"nuth_kaab made it worse: NMAD.*stable="):
        coregister(world)


def test_the_extra_is_named(world, monkeypatch):
    real = importlib.import_module

    def missing(name, *more):
        if name == "xdem":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"deepdem\[coregister\]"):
        coregister(world)


def test_the_accessor_does_the_same(world):
    a = world.deepdem.coregister(reference="lidar_dtm", method="vertical_shift")
    b = coregister(world, reference="lidar_dtm", method="vertical_shift")
    assert a.attrs == b.attrs

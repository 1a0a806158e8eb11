from __future__ import annotations

from functools import partial
from multiprocessing.reduction import ForkingPickler

import dask.array as da
import numpy as np
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import deepdem
from deepdem.blocks import Box, stored_source
from deepdem.level import LevelRegion, local_level
from deepdem.regions import Plane, Region, SceneReader, Seen
from deepdem.sources.synthetic import synthetic_scene
from deepdem.splits import Part

NAMES = ("dsm", "ortho_left", "valid", "lidar_dsm")


@pytest.fixture(scope="module")
def stored(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "s.zarr"
    scene.deepdem.to_zarr(path)
    return deepdem.open_scene(path)


def _region(ds, box=None, layers=("dsm", "ortho_left", "valid"), **more):
    shape = ds.sizes["y"], ds.sizes["x"]
    reader = SceneReader(ds, NAMES)
    return Region(reader, Part(box or Box(0, shape[0], 0, shape[1])), layers, "lidar_dsm", **more)


def test_what_is_stored_is_found_through_slices_and_nothing_else(stored):
    source, y, x = stored_source(stored.dsm.data)
    assert (source.shape, y, x) == ((300, 260), 0, 0)
    small = deepdem.open_scene(stored.encoding["source"], chunks={"y": 64, "x": 50})
    part = small.isel(y=slice(30, 280), x=slice(7, None)).isel(y=slice(10, 200)).dsm.data
    source, y, x = stored_source(part)
    assert (source.shape, y, x) == ((300, 260), 40, 7)
    whole = small.dsm.data
    for other in (
        whole + 1, whole[::2], whole[::-1], whole[:, [3, 1]], da.concatenate([whole, whole]),
        da.concatenate([whole[:64], whole[128:192], whole[128:192]]),
        synthetic_scene((64, 64), seed=0, chunks=32).dsm.data,
    ):  # fmt: skip
        assert stored_source(other) is None


@pytest.mark.parametrize("how", ["stored", "part", "chunked", "in memory", "lazy", "derived"])
def test_a_box_is_the_same_from_wherever_it_is_read(scene, stored, how, no_compute):
    ds = {
        "stored": stored,
        "part": stored,
        "chunked": scene.chunk(y=70, x=90),
        "in memory": scene,
        "lazy": xr.open_zarr(stored.encoding["source"], chunks=None, decode_coords="all"),
        "derived": stored.assign(ortho_left=stored.ortho_left + 0),
    }[how]
    wanted = scene
    if how == "part":
        cut = {"y": slice(20, 290), "x": slice(10, 250)}
        ds, wanted = ds.isel(cut), scene.isel(cut)
    with no_compute():
        reader = SceneReader(ds, NAMES)
    assert reader.is_direct == (how in ("stored", "part"))
    box = Box(33, 140, 50, 170)
    for name, array in zip(NAMES, reader.read(NAMES, box), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(
            array, wanted[name][33:140, 50:170].astype(np.float32), strict=True
        )
    if reader.is_direct:  # without Dask
        with no_compute():
            reader.read(NAMES, box)
    region = _region(ds, box)
    region.hold(shared=False)
    (mask,) = region.read(["valid"], box)
    np.testing.assert_array_equal(mask, wanted.valid[33:140, 50:170], strict=True)  # still bool
    assert region.nbytes == (3 * 4 + 1) * 107 * 120


def test_what_is_in_memory_is_not_copied(scene):
    region = _region(scene)
    region.hold(shared=False)
    (dsm,) = region.read(["dsm"], Box(10, 20, 30, 40))
    assert np.shares_memory(dsm, scene.dsm.values)


def test_only_a_handle_travels_to_another_process(stored):
    region = _region(stored)
    sent = bytes(ForkingPickler.dumps(region))
    assert len(sent) < 30_000  # of 1 MB
    there = ForkingPickler.loads(sent)
    box = Box(0, 50, 100, 150)
    np.testing.assert_array_equal(there.read(["dsm"], box)[0], stored.dsm[:50, 100:150])


@pytest.mark.parametrize("held", [True, False])
def test_planes_are_what_the_whole_scene_has(scene, stored, held):
    shape = scene.sizes["y"], scene.sizes["x"]
    whole = Box(0, shape[0], 0, shape[1])
    level = local_level([scene.dsm.values], out=whole, region=whole, chip_px=32)
    plane = Plane("dsm_level", ("dsm",), partial(local_level, chip_px=32), LevelRegion(32, shape))
    region = _region(
        stored, Box(64, 256, 0, 200), layers=("dsm", "valid", "dsm_level"), planes=[plane]
    )
    if held:
        region.hold(shared=False)
    opened = region.open(Box(100, 200, 20, 150))
    out = {name: np.empty((32, 32), np.float32) for name in ("dsm_level", "dsm", "lidar_dsm")}
    opened.crop(Box(120, 152, 40, 72), out)
    np.testing.assert_allclose(out["dsm_level"], level[120:152, 40:72], atol=1e-3)
    np.testing.assert_array_equal(out["dsm"], scene.dsm[120:152, 40:72])


@pytest.mark.parametrize("held", [True, False])
def test_the_truth_is_read_first_and_stops_at_the_part(scene, held):
    asked = []

    class Spy(SceneReader):
        def read(self, names, box):
            asked.append(tuple(names))
            return super().read(names, box)

    part = Part(Box(0, 128, 0, 128), shapely.box(0, 0, 64, 64))
    region = Region(Spy(scene.chunk(), NAMES), part, ("dsm", "valid"), "lidar_dsm")
    if held:
        region.hold(shared=True)
        assert all(tensor.is_shared() for tensor in (*region.held.values(), region.usable))
    opened = region.open(Box(0, 128, 0, 128))
    assert asked == ([] if held else [("dsm", "lidar_dsm")])
    finite = np.isfinite(scene.dsm + scene.lidar_dsm)[:128, :128].values
    finite[64:] = finite[:, 64:] = False
    np.testing.assert_array_equal(opened.usable, finite)
    out = {name: np.empty((128, 128), np.float32) for name in ("valid", "lidar_dsm")}
    opened.crop(Box(0, 128, 0, 128), out)
    assert asked == ([] if held else [("dsm", "lidar_dsm"), ("valid",)])
    np.testing.assert_array_equal(np.isfinite(out["lidar_dsm"])[64:], False)
    assert np.isfinite(scene.lidar_dsm[64:128]).any()  # the scene itself is as it was


@settings(max_examples=25)
@given(
    st.tuples(st.integers(40, 150), st.integers(40, 150)), st.integers(1, 40), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_no_chip_has_more_than_what_was_seen_allows(shape, size, shared, seed):
    draw = np.random.default_rng(seed)
    box = Box(5, 5 + shape[0], 9, 9 + shape[1])
    usable = np.kron(draw.random((10, 10)) < 0.3, np.ones((15, 15), bool))[: shape[0], : shape[1]]
    ys = draw.integers(box.y0, box.y1 - size + 1, 30)
    xs = draw.integers(box.x0, box.x1 - size + 1, 30)
    there = [np.s_[y - 5 : y - 5 + size, x - 9 : x - 9 + size] for y, x in zip(ys, xs, strict=True)]
    wanted = np.array([np.count_nonzero(usable[t]) for t in there])
    seen = Seen(box, size, shared=shared)
    np.testing.assert_array_equal(seen.most(ys, xs, size), size**2)
    for y, x in draw.integers(0, 100, (4, 2)):
        part = Box(5 + y, 45 + y, 9 + x, 49 + x).intersect(box)
        if not part.empty:
            whole = seen.whole_cells(part)
            assert whole.intersect(part) == part
            seen.note(usable[whole.within(box)], whole)
            assert (seen.most(ys, xs, size) >= wanted).all()
    seen.note(usable, box)
    cell = seen.cell_px
    assert max(1, size // 2) % cell == 0
    wide = np.pad(np.pad(usable, cell), size)
    for y, x, most, least in zip(ys - 5, xs - 9, seen.most(ys, xs, size), wanted, strict=True):
        near = wide[y + size : y + 2 * size + 2 * cell, x + size : x + 2 * size + 2 * cell]
        assert least <= most <= min(np.count_nonzero(near), size**2)


def test_processes_fill_in_together_what_was_seen(monkeypatch):
    box = Box(0, 64, 0, 64)
    seen = Seen(box, 32, shared=True)
    assert seen._cells.is_shared()
    monkeypatch.setattr("deepdem.regions.shared_room", lambda: 100.0)  # a small container
    assert not Seen(box, 32, shared=True)._cells.is_shared()
    there = ForkingPickler.loads(bytes(ForkingPickler.dumps(seen)))
    there.note(np.zeros(box.shape, bool), box)
    assert seen.most(np.array([3]), np.array([5]), 32) == 0

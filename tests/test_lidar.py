"""Lidar points on a grid: which points, where, how, and that cutting the grid changes nothing."""

from __future__ import annotations

import gc
import json
import math
import pickle
import time
import warnings
from pathlib import Path

import dask
import laspy
import numpy as np
import pyproj
import pytest
import xarray as xr
from affine import Affine
from clouds import LEFT, TOP, draw_points, write_ept, write_las
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from scipy.interpolate import LinearNDInterpolator
from served import served

import deepdem
from deepdem.blocks import Box
from deepdem.grid import ground_steps
from deepdem.sources import _clouds, _tiles
from deepdem.sources._cells import (
    cell_counts,
    cell_idw,
    cell_means,
    cell_percentiles,
    without_outliers,
)
from deepdem.sources._ground import centroids, fill_gaps, smrf_ground, tin
from deepdem.sources.lidar import find_collections, grid_points
from deepdem.vertical import vertical_of

GRID = GeoBox((60, 60), Affine(1, 0, LEFT, 0, -1, TOP), "EPSG:32610")


def boxed(rows: int, cols: int, left: float, top: float, crs: object, step: float = 1.0) -> GeoBox:
    return GeoBox((rows, cols), Affine(step, 0, left, 0, -step, top), crs)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A LAZ file that is read in several pieces, and its points."""
    points = draw_points()
    return write_las(tmp_path_factory.mktemp("cloud") / "a.laz", points), points


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(_clouds, "_PIECE_POINTS", 1000)
    monkeypatch.setattr(_tiles, "_BUCKET_PX", 16)


def brute(points, keep, reduce, grid=GRID):
    """Return cells by a loop over them."""
    out = np.full(grid.shape, np.nan)
    rows = np.floor((grid.transform.f - points["y"]) / -grid.transform.e).astype(int)
    cols = np.floor((points["x"] - grid.transform.c) / grid.transform.a).astype(int)
    for i, j in {*zip(rows[keep].tolist(), cols[keep].tolist(), strict=True)}:
        if 0 <= i < grid.shape[0] and 0 <= j < grid.shape[1]:
            out[i, j] = reduce(points["z"][keep & (rows == i) & (cols == j)])
    return out


# --- kernels -------------------------------------------------------------------------------------


def in_pixels(seed: int, count: int, *, lattice: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    at = rng.uniform(-20, 60, (2, count))
    if lattice:  # many on a circle, some twice at one place
        at = np.round(at * 2) / 2 + 0.25
    return np.vstack([at, rng.normal(-5, 20, count)])


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(0, 3000), st.floats(0, 100))
def test_cells_are_what_numpy_says_of_each(seed, count, percentile):
    points, box = in_pixels(seed, count), Box(-3, 20, 5, 17)
    counts, means = cell_counts(points, box), cell_means(points, box)
    quantiles = cell_percentiles(points, box, percentile)
    assert counts.shape == means.shape == quantiles.shape == box.shape
    assert means.dtype == quantiles.dtype == np.float32
    for i in range(0, box.shape[0], 5):
        for j in range(box.shape[1]):
            here = (np.floor(points[0]) == j + box.x0) & (np.floor(points[1]) == i + box.y0)
            values = points[2][here]
            assert counts[i, j] == len(values)
            if not len(values):
                assert np.isnan(means[i, j])
                assert np.isnan(quantiles[i, j])
                continue
            np.testing.assert_allclose(means[i, j], values.mean(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(
                quantiles[i, j], np.percentile(values, percentile), rtol=1e-5, atol=1e-5
            )


def test_idw_is_shepards():
    points = in_pixels(1, 400)
    box, step = Box(0, 12, 0, 9), (0.5, 0.25)
    found = cell_idw(points, box, 0.9, step)
    for i in range(12):
        for j in range(9):
            away = np.hypot((points[0] - j - 0.5) * 0.25, (points[1] - i - 0.5) * 0.5)
            near = away <= 0.9
            wanted = np.average(points[2][near], weights=away[near] ** -2) if near.any() else np.nan
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-5)
    on_it = cell_idw(np.array([[2.5, 2.6], [1.5, 1.5], [7.0, 99.0]]), box, 0.9, step)
    assert on_it[1, 2] == pytest.approx(7.0)


def test_a_triangulation_of_everything_is_scipys():
    points = in_pixels(2, 300)
    box = Box(-10, 50, -10, 50)
    found = tin(points, box, 1e9, (1.0, 1.0))
    y, x = np.mgrid[-10:50, -10:50] + 0.5
    wanted = LinearNDInterpolator(points[:2].T, points[2])(x, y)
    both = np.isfinite(found) & np.isfinite(wanted)
    # What is moved before triangulating, by 0.1 mm of a metre, turns hardly any triangle.
    assert np.mean(np.abs(found - wanted)[both] < 1e-4) > 0.999
    assert both.sum() > 0.99 * np.isfinite(wanted).sum()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 9999), count=st.integers(0, 1500), lattice=st.booleans(),
    gap=st.floats(0.5, 15), y0=st.integers(-15, 40), x0=st.integers(-15, 40),
    step=st.sampled_from([(1.0, 1.0), (0.5, 0.8)]),
)  # fmt: skip
def test_a_triangulation_does_not_know_what_lies_beyond_the_gap(
    seed, count, lattice, gap, y0, x0, step
):
    """The promise behind chunk invariance: points within the gap's width decide."""
    every = centroids(in_pixels(seed, count, lattice=lattice), Box(-20, 60, -20, 60))
    box = Box(y0, y0 + 12, x0, x0 + 9)
    away = np.hypot(*(
        np.maximum(0, np.maximum(low - every[n] * s, every[n] * s - high))
        for n, low, high, s in ((0, box.x0 * step[1], box.x1 * step[1], step[1]),
                                (1, box.y0 * step[0], box.y1 * step[0], step[0]))
    ))  # fmt: skip
    whole = tin(every, Box(-20, 60, -20, 60), gap, step)
    part = tin(every[:, away <= gap], box, gap, step)
    np.testing.assert_array_equal(part, whole[y0 + 20 : y0 + 32, x0 + 20 : x0 + 29])


def test_gaps_are_as_wide_as_the_circle_that_fits_in():
    y, x = np.mgrid[0:60, 0:60] + 0.5
    cells = (3 * x + 2 * y).astype(np.float32)
    box = Box(0, 60, 0, 60)
    holed = cells.copy()
    holed[10:16, 10:50] = np.nan  # 7 m from rim to rim
    holed[30:50, 20:40] = np.nan  # 21 m, and 29.7 m the circle through its corners
    filled = fill_gaps(holed, box, 12.0, (1.0, 1.0))
    np.testing.assert_allclose(filled[10:16, 10:50], cells[10:16, 10:50], atol=1e-3)
    assert np.isnan(filled[36:44, 26:34]).all()
    np.testing.assert_allclose(fill_gaps(holed, box, 31.0, (1.0, 1.0)), cells, atol=1e-3)


def test_outliers_are_told_from_those_around_them():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 100, (2, 4000))
    points = np.stack([x, y, 10 * np.floor(x / 50) * 100 + rng.normal(0, 1, 4000)])
    points[2, 7] += 60
    kept = without_outliers(points, 6.0, 50)
    # The predecessor's, of all points at once, sees nothing: a step of 1000 m is in its deviation.
    z = np.abs(points[2] - points[2].mean()) / points[2].std()
    assert z[7] < 6
    assert kept.shape == (3, 3999)
    assert without_outliers(np.empty((3, 0)), 3.0, 50).shape == (3, 0)


def test_ground_is_found_by_its_shape():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 150, (2, 40_000))
    ground = 100 + 0.1 * x + 3 * np.sin(y / 20)
    z = ground + rng.normal(0, 0.03, x.size)
    house = (x > 60) & (x < 85) & (y > 50) & (y < 80)
    z[house] = 125
    tree = ~house & (rng.random(x.size) < 0.3)
    z[tree] += rng.uniform(1, 15, tree.sum())
    z[0] -= 30  # one far below
    found = smrf_ground(np.stack([x, y, z]), Box(0, 150, 0, 150), (1.0, 1.0))
    inner = (found[:2].min(axis=0) > 45) & (found[:2].max(axis=0) < 105)
    col, row, height = found[:, inner]
    assert np.abs(height - (100 + 0.1 * col + 3 * np.sin(row / 20))).max() < 1.5
    truly = ~house & ~tree & (np.minimum(x, y) > 45) & (np.maximum(x, y) < 105)
    assert inner.sum() > 0.95 * truly.sum()
    assert not ((col > 61) & (col < 84) & (row > 51) & (row < 79)).any()


# --- files ---------------------------------------------------------------------------------------


def test_each_kind_takes_its_points(cloud):
    path, p = cloud
    good = p["classification"] != 18
    first = good & (p["return_number"] == 1)
    dsm = grid_points(path, GRID)
    assert (dsm.name, dsm.dims, dsm.dtype, dsm.attrs["units"]) == (
        "lidar_dsm", ("y", "x"), np.float32, "m"
    )  # fmt: skip
    np.testing.assert_allclose(
        dsm, brute(p, first, lambda z: np.percentile(z, 98)), rtol=0, atol=1e-3
    )
    for method, reduce in (("max", np.max), ("mean", np.mean)):
        np.testing.assert_allclose(
            grid_points(path, GRID, method=method), brute(p, first, reduce), rtol=0, atol=1e-3
        )
    lowest = grid_points(path, GRID, percentile=0, returns="last", drop_classes=(6, 7, 18))
    keep = good & (p["classification"] != 6) & (p["return_number"] == p["number_of_returns"])
    np.testing.assert_allclose(lowest, brute(p, keep, np.min), rtol=0, atol=1e-3)
    counts = np.nan_to_num(brute(p, good, len))
    step = ground_steps(GRID.crs.proj, at=(TOP - 30, LEFT + 30), step=(1, 1))
    density = grid_points(path, GRID, "density")
    np.testing.assert_allclose(density, counts / np.prod(step), rtol=1e-5)
    assert density.attrs["units"] == "m-2"
    bright = brute({**p, "z": p["intensity"].astype(float)}, first, np.mean)
    np.testing.assert_allclose(grid_points(path, GRID, "intensity"), bright, rtol=1e-5)


def test_the_ground_is_interpolated_as_far_as_is_said(cloud):
    path, p = cloud
    dtm = grid_points(path, GRID, "dtm", max_gap=30.0).compute()
    x, y = dtm.x.values - LEFT, TOP - dtm.y.values
    wanted = 100 + 5 * np.sin(x[None] / 15) + 0.1 * y[:, None]
    inner = np.s_[3:-3, 3:-3]
    assert np.abs((dtm - wanted).values[inner]).max() < 0.5  # under the house, too
    narrow = grid_points(path, GRID, "lidar_dtm", max_gap=5.0).compute()
    assert np.isnan(narrow[24, 26])  # the middle of the house
    assert np.isfinite(narrow.values[3:17, 3:-3]).all()
    idw = grid_points(path, GRID, "lidar_dtm", method="idw", max_gap=30.0).compute()
    assert np.abs((idw - wanted).values[inner]).max() < 1.5
    # Classes are missing: found by shape, and so it says if it is told to.
    bare = {**p, "classification": np.where(p["classification"] == 18, 18, 0).astype(np.uint8)}
    unclassed = write_las(path.with_name("unclassed.laz"), bare)
    auto = grid_points(unclassed, GRID, "lidar_dtm", max_gap=30.0).compute()
    told = grid_points(path, GRID, "lidar_dtm", ground="smrf", max_gap=30.0).compute()
    np.testing.assert_array_equal(auto, told)
    assert np.nanpercentile(np.abs((auto - wanted).values[inner]), 95) < 0.6
    nothing = grid_points(unclassed, GRID, "lidar_dtm", ground="classes").compute()
    assert np.isnan(nothing).all()


OPTIONS = (
    ("lidar_dsm", {}), ("lidar_dsm", {"method": "mean", "zscore": 2.5}),
    ("lidar_dsm", {"method": "idw", "radius": 2.7}), ("lidar_dsm", {"max_gap": 6.0}),
    ("lidar_dsm", {"method": "idw", "max_gap": 4.0}), ("lidar_dtm", {"max_gap": 8.0}),
    ("lidar_dtm", {"method": "idw", "max_gap": 8.0, "zscore": 3.0}),
    ("lidar_dtm", {"ground": "smrf", "max_gap": 8.0}), ("density", {}), ("intensity", {}),
)  # fmt: skip


@settings(max_examples=16)
@given(
    chunks=st.integers(5, 70), option=st.sampled_from(OPTIONS), tree=st.booleans(),
    pieces=st.sampled_from([1000, 6000]),
)  # fmt: skip
def test_chunks_change_nothing(tmp_path_factory, chunks, option, tree, pieces):
    """Not a bit: the grid is cut differently, the file is read in other pieces."""
    root = tmp_path_factory.getbasetemp() / "invariance"
    if not root.exists():
        root.mkdir()
        points = draw_points(3000, seed=5)
        write_las(root / "a.laz", points)
        write_ept(root / "tree", points)
    kind, options = option
    source = root / ("tree" if tree else "a.laz")
    # Another CRS than the cloud's, and its pixels askew to it.
    like = GeoBox((50, 66), Affine(1.1, 0, LEFT - 5, 0, -0.9, TOP + 7), "EPSG:26910")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_clouds, "_PIECE_POINTS", 3000)
        whole = grid_points(source, like, kind, chunks=100, **options).compute()
        patch.setattr(_clouds, "_PIECE_POINTS", pieces // 2)
        cut = grid_points(source, like, kind, chunks=chunks, **options)
        assert cut.chunks is not None
        xr.testing.assert_identical(cut.compute(scheduler="sync"), whole)
    assert np.isfinite(whole).any()


def test_the_edges_of_a_grid_are_no_edges_of_the_cloud(cloud):
    path, _ = cloud
    part = GRID[20:35, 11:40]
    for kind, options in OPTIONS:
        if "zscore" in options or options.get("ground") == "smrf":
            continue  # squares and cells stand on the grid's own origin
        if kind == "lidar_dsm" and "max_gap" in options:
            continue  # which diagonal a square of cells gets hangs on where it is in the grid
        whole = grid_points(path, GRID, kind, **options).compute()
        np.testing.assert_allclose(
            grid_points(path, part, kind, **options), whole[20:35, 11:40], rtol=0, atol=1e-4
        )


def test_nothing_but_headers_is_read_until_it_is_computed(cloud, tmp_path, no_compute, monkeypatch):
    path, points = cloud
    tree = write_ept(tmp_path / "tree", points)

    def refuse(*_: object) -> None:
        raise AssertionError("points were read")

    with monkeypatch.context() as patch, no_compute():
        for kind in (_clouds.LasFile, _clouds.EptTree):
            patch.setattr(kind, "read", refuse)
        lazy = [grid_points(s, GRID, k) for s in (path, tree) for k in ("dsm", "dtm", "density")]
    for layer in lazy:
        assert dask.is_dask_collection(layer.data)
        json.dumps(layer.attrs)
    assert lazy[0].data.name == grid_points(path, GRID, "dsm").data.name  # deterministic


def test_a_file_is_decoded_once_and_what_is_sorted_goes(cloud, monkeypatch):
    path, _ = cloud
    read, made = [], []
    once, new = _clouds.LasFile.read, _tiles._new_path
    monkeypatch.setattr(_clouds.LasFile, "read",
                        lambda self, *span: read.append(span) or once(self, *span))  # fmt: skip
    monkeypatch.setattr(_tiles, "_new_path", lambda: made.append(new()) or made[-1])
    wanted = grid_points(path, GRID, chunks=60).compute()
    assert sorted(read) == [(n, n + 1000) for n in range(0, 6000, 1000)]
    read.clear()
    grid_points(path, GRID, chunks=7).compute()
    assert len(read) == 6
    gc.collect()
    assert len(made) == 12
    assert not any(file.exists() for file in made)
    # A piece whose file another machine has is decoded again.
    lazy = grid_points(path, GRID, chunks=60)
    (job,) = (t.value for k, t in lazy.data.dask.items() if str(k).endswith("-job"))
    piece = _tiles.sort_piece(job, 0, (0, 6000), None, Box(0, 60, 0, 60))
    copied = pickle.loads(pickle.dumps(piece))  # noqa: S301  # our own
    piece.path.unlink()
    found = _tiles.make_tile(job, Box(0, 60, 0, 60), [0], [copied], None)
    np.testing.assert_array_equal(found, wanted)


def test_several_files_are_one_cloud(cloud, tmp_path):
    path, p = cloud
    west = p["x"] < LEFT + 30
    for name, part in (("w.las", west), ("e.laz", ~west)):
        write_las(tmp_path / name, {k: v[part] for k, v in p.items()})
    wanted = grid_points(path, GRID, "lidar_dtm").compute()
    for source in (str(tmp_path / "*.la[sz]"), [tmp_path / "e.laz", tmp_path / "w.las"]):
        found = grid_points(source, GRID, "lidar_dtm", chunks=25)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    far = boxed(10, 10, LEFT + 9000, TOP, "EPSG:32610")
    assert np.isnan(grid_points(path, far).compute()).all()
    assert (grid_points(path, far, "density").compute() == 0).all()


def test_it_is_a_layer_of_a_scene(cloud, tmp_path):
    path, _ = cloud
    dsm = xr.DataArray(np.zeros((60, 60), np.float32), coords=xr_coords(GRID), dims=("y", "x"))
    truth = grid_points(path, dsm.rename("dsm"), "lidar_dsm")
    ds = deepdem.stack({"dsm": dsm, "lidar_dsm": truth}, like="dsm")
    np.testing.assert_array_equal(ds["lidar_dsm"], truth)
    ds.deepdem.to_zarr(tmp_path / "s.zarr")
    back = deepdem.open_scene(tmp_path / "s.zarr")["lidar_dsm"]
    np.testing.assert_array_equal(back, truth)
    xr.testing.assert_equal(grid_points(path, ds).compute(), truth.compute())


# --- where the points are ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("horizontal", "vertical", "foot"),
    [(2285, 6360, 1200 / 3937), (2285, 5703, 1.0), (2994, 8228, 0.3048)],
)
def test_feet_become_metres(tmp_path, horizontal, vertical, foot):
    crs = pyproj.CRS(f"EPSG:{horizontal}+{vertical}")
    unit = crs.sub_crs_list[0].axis_info[0].unit_conversion_factor
    left, top = 1_200_000.0, 800_000.0
    points = {
        "x": left + np.array([0.5, 10.5, 10.6]), "y": top - np.array([0.5, 0.5, 0.6]),
        "z": np.array([100.0, 200.0, 300.0]),
    }  # fmt: skip
    path = write_las(tmp_path / "feet.laz", points, crs=crs)
    like = boxed(2, 20, left, top, f"EPSG:{horizontal}")
    dsm = grid_points(path, like, method="max").compute()
    np.testing.assert_allclose(dsm[0, [0, 10]], np.array([100, 300]) * foot, rtol=1e-7)
    # In words that say what heights are above, and no longer in which unit.
    said = vertical_of(dsm.attrs, None)
    assert said is not None
    assert (said.kind, said.metres) == ("geoid", 1.0)
    assert dsm.attrs["vertical_reference"].startswith(crs.sub_crs_list[1].name[:6])
    ds = deepdem.stack({"lidar_dsm": dsm}, like="lidar_dsm")
    assert ds["lidar_dsm"].attrs["vertical_reference"] == said.name
    density = grid_points(path, like, "density").compute()
    assert float(density[0, 10]) == pytest.approx(2 / unit**2, rel=2e-3)
    told = grid_points(path, like, method="max", vertical_unit="m").compute()
    assert float(told[0, 0]) == 100
    with pytest.raises(ValueError, match="vertical_unit='yd': pass 'm', 'ft', 'us-ft'"):
        grid_points(path, like, vertical_unit="yd")


def _vlr(record: int, data: bytes) -> laspy.VLR:
    return laspy.VLR("LASF_Projection", record, "", data)


def test_geotiff_keys_that_spell_a_projection_out_are_read(tmp_path):
    """As old files of state plane feet have them: no EPSG code, a user-defined projection."""
    keys = [
        (1024, 0, 1, 1), (2048, 0, 1, 4269), (3072, 0, 1, 32767), (3074, 0, 1, 32767),
        (3075, 0, 1, 8), (3076, 0, 1, 9003), (3078, 34736, 1, 0), (3079, 34736, 1, 1),
        (3084, 34736, 1, 2), (3085, 34736, 1, 3), (3086, 34736, 1, 4), (3087, 34736, 1, 5),
        (4099, 0, 1, 9003),
    ]  # fmt: skip
    directory = np.array([(1, 1, 0, len(keys)), *keys], dtype="<u2").tobytes()
    unit = 1200 / 3937
    numbers = np.array([47.5, 48.733333333333, -120.833333333333, 47.0, 500_000 / unit, 0.0])
    points = {"x": np.array([1_300_000.5]), "y": np.array([799_999.5]), "z": np.array([1000.0])}
    vlrs = [_vlr(34735, directory), _vlr(34736, numbers.tobytes())]
    path = write_las(tmp_path / "keys.las", points, crs=None, point_format=1, vlrs=vlrs)
    to_utm = pyproj.Transformer.from_crs(2285, 26910, always_xy=True)  # the same projection
    x, y = to_utm.transform(1_300_000.5, 799_999.5)
    like = boxed(11, 11, np.floor(x) - 5, np.floor(y) + 6, "EPSG:26910")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the vertical unit is stated
        dsm = grid_points(path, like).compute()
    assert np.argwhere(np.isfinite(dsm.values)).tolist() == [[5, 5]]
    assert float(dsm[5, 5]) == pytest.approx(1000 * unit, abs=1e-4)


def test_a_crs_is_asked_for_where_there_is_none(cloud, tmp_path):
    _, p = cloud
    path = write_las(tmp_path / "none.laz", p, crs=None)
    with pytest.raises(ValueError, match=r"none.laz says no CRS .* pass crs="):
        grid_points(path, GRID)
    assert np.isfinite(grid_points(path, GRID, crs="EPSG:32610").compute()).any()
    with pytest.raises(ValueError, match="'EPSG:0' is no CRS: pass crs="):
        grid_points(path, GRID, crs="EPSG:0")
    wrong = write_las(tmp_path / "geocentric.laz", p, crs="EPSG:4978")
    with pytest.raises(ValueError, match=r"Geocentric CRS.* which is no map: .*crs="):
        grid_points(wrong, GRID)
    with pytest.warns(UserWarning, match="heights are taken to be in US survey foot"):
        grid_points(path, GRID, crs="EPSG:2285")
    tree = write_ept(tmp_path / "tree", p, srs={})
    with pytest.raises(ValueError, match=r"ept.json says no CRS: pass crs="):
        grid_points(tree, GRID)


def test_points_are_reprojected_one_by_one(cloud):
    path, p = cloud
    to_mercator = pyproj.Transformer.from_crs(32610, 3857, always_xy=True)
    x, y = to_mercator.transform(p["x"], p["y"])
    like = boxed(90, 90, np.floor(x.min()), np.ceil(y.max()), "EPSG:3857")
    dsm = grid_points(path, like, method="max", chunks=33)
    keep = (p["classification"] != 18) & (p["return_number"] == 1)
    wanted = brute({"x": x, "y": y, "z": p["z"]}, keep, np.max, like)
    np.testing.assert_allclose(dsm, wanted, rtol=0, atol=1e-3)
    # Its metres are not those of the ground: 1.4 of them are one at 45 degrees north.
    density = grid_points(path, like, "density").compute()
    good = int((p["classification"] != 18).sum())
    assert float(density.sum()) / good == pytest.approx(1 / np.cos(np.radians(45.1)) ** 2, rel=0.01)


def test_words_that_are_not_known(cloud, tmp_path):
    path, _ = cloud
    for options, message in (
        ({"kind": "chm"}, "kind='chm': pass one of lidar_dsm, lidar_dtm, intensity, density"),
        ({"method": "tin"}, "lidar_dsm: method='tin': pass one of percentile, max, mean, idw"),
        ({"percentile": 101}, "percentile=101: pass 0 to 100"),
        ({"returns": "second"}, "returns='second': pass 'first', 'last' or 'all'"),
        ({"ground": "csf"}, "ground='csf': pass 'auto', 'classes' or 'smrf'"),
        ({"spacing": -1}, "spacing=-1: pass 'auto', None or metres"),
    ):
        with pytest.raises(ValueError, match=message):
            grid_points(path, GRID, **options)
    for source, message in (
        (tmp_path / "none.laz", "there is no such point cloud"),
        (str(tmp_path / "*.laz"), "no file fits"),
        (tmp_path, "is a folder without ept.json"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            grid_points(source, GRID)
    (tmp_path / "a.laz").write_text("text")
    with pytest.raises(ValueError, match=r"a.laz is no LAS or LAZ file"):
        grid_points(tmp_path / "a.laz", GRID)
    whole = cloud[0].read_bytes()
    for length in (100, len(whole) // 2):
        (tmp_path / "a.laz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a.laz is damaged or cut off"):
            grid_points(tmp_path / "a.laz", GRID).compute()
    with pytest.raises(ValueError, match="source= is empty"):
        grid_points([], GRID)


# --- trees and HTTP ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["laszip", "binary", "zstandard"])
def test_a_tree_gives_what_the_file_gives(cloud, tmp_path, kind):
    path, points = cloud
    tree = write_ept(tmp_path / "tree", points, kind=kind)
    for layer in ("lidar_dsm", "lidar_dtm", "intensity", "density"):
        wanted = grid_points(path, GRID, layer).compute()
        found = grid_points(tree, GRID, layer, chunks=40)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    with served(tmp_path) as server:
        served_tree = grid_points(f"{server.url}/tree/ept.json", GRID, layer, chunks=40)
        np.testing.assert_array_equal(served_tree, found)


def test_of_a_tree_only_what_is_needed_is_fetched(cloud, tmp_path):
    _, points = cloud
    write_ept(tmp_path / "tree", points)
    every = sum(f.stat().st_size for f in (tmp_path / "tree").rglob("*.laz"))
    with served(tmp_path) as server:
        url = f"{server.url}/tree"
        corner = grid_points(url, GRID[:10, :10])
        assert set(server.sent) == {"/tree/ept.json"}  # lazy
        corner.compute()
        part = sum(n for path, n in server.sent.items() if path.endswith(".laz"))
        assert 0 < part < 0.5 * every
        server.sent.clear()
        # 60 m wide, 16 points across: 4 m apart in the root, and 1 m in the last of three levels.
        coarse = grid_points(url, GRID.zoom_out(20))
        coarse.compute()
        levels = {path.split("/")[-1][0] for path in server.sent if path.endswith(".laz")}
        assert levels == {"0", "1", "2"}
        server.sent.clear()
        grid_points(url, GRID.zoom_out(20), spacing=2.5).compute()
        levels = {path.split("/")[-1][0] for path in server.sent if path.endswith(".laz")}
        assert levels == {"0", "1"}
        server.sent.clear()
        grid_points(url, GRID.zoom_out(20), "density", spacing=None).compute()
        assert sum(n for p, n in server.sent.items() if p.endswith(".laz")) == every


def test_the_metres_of_web_mercator_are_not_those_of_the_ground(tmp_path):
    points = draw_points(3000)
    to_mercator = pyproj.Transformer.from_crs(32610, 3857, always_xy=True)
    x, y = to_mercator.transform(points["x"], points["y"])
    srs = {"authority": "EPSG", "horizontal": "3857"}
    (cloud,) = _clouds.open_clouds(
        write_ept(tmp_path / "tree", {**points, "x": x, "y": y}, srs=srs), options={}
    )
    assert cloud.frame.crs == pyproj.CRS(3857)
    layer = grid_points(tmp_path / "tree", GRID, spacing=1.0)
    (job,) = (t.value for k, t in layer.data.dask.items() if str(k).endswith("-job"))
    assert _tiles._spacing(cloud, job) == pytest.approx(1 / np.cos(np.radians(45.1)), rel=0.01)
    flat = write_las(tmp_path / "a.laz", points)
    found = grid_points(tmp_path / "tree", GRID, "density").sum().compute()
    assert float(found) == pytest.approx(float(grid_points(flat, GRID, "density").sum()), rel=1e-3)


def test_a_server_that_fails_is_asked_again(cloud, tmp_path, monkeypatch):
    path, points = cloud
    monkeypatch.setattr("deepdem.sources._bytes._WAIT_S", 0.001)
    write_ept(tmp_path / "tree", points)
    write_las(tmp_path / "a.laz", points)
    write_ept(tmp_path / "tree2", points)
    wanted = grid_points(path, GRID).compute()
    with served(tmp_path) as server:
        lazy = grid_points(f"{server.url}/tree/ept.json", GRID)
        server.failures = 3
        np.testing.assert_allclose(lazy, wanted, rtol=0, atol=1e-3)
        (tmp_path / "tree/ept-data/0-0-0-0.laz").rename(tmp_path / "gone.laz")
        with pytest.raises(FileNotFoundError, match=r"0-0-0-0\.laz"):
            lazy.compute()
        server.failures = 100
        with pytest.raises(OSError, match=r"after 4 attempts: try later, or download it"):
            grid_points(f"{server.url}/tree/ept.json", GRID)
        server.failures = 0
        # Options and signatures go with every request, and are not written down.
        signed = grid_points(
            f"{server.url}/tree2/ept.json?sig=secret", GRID, storage_options={"headers": {"a": "b"}}
        )
        assert "secret" not in json.dumps(signed.attrs)
        np.testing.assert_allclose(signed, wanted, rtol=0, atol=1e-3)
        assert {path.partition("?")[2] for path in server.sent if "tree2" in path} == {"sig=secret"}
        # A LAZ file is read in order; its parts come by ranges.
        np.testing.assert_allclose(grid_points(f"{server.url}/a.laz", GRID), wanted, atol=1e-3)
        server.ranges = False
        with pytest.raises(OSError, match="answers a request for a range with all of the file"):
            grid_points(f"{server.url}/a.laz", GRID)


# --- collections ---------------------------------------------------------------------------------


def _outline(west: float, east: float) -> dict:
    ring = [[west, 45.0], [east, 45.0], [east, 45.3], [west, 45.3], [west, 45.0]]
    return {"type": "Polygon", "coordinates": [ring]}


def test_of_several_collections_the_newest_comes_first(cloud, tmp_path):
    _, p = cloud
    west = p["x"] < LEFT + 40
    write_ept(tmp_path / "new", {k: v[west] for k, v in p.items()})
    write_ept(tmp_path / "old", {**p, "z": p["z"] + 1000})
    names = {
        "USGS_LPC_WA_Baker_2013_LAS_2016": ("old", 50_000, _outline(-123.2, -122.8)),
        "WA_Baker_2_B22": ("new", 4000, _outline(-123.2, -122.8)),
        "OR_Elsewhere_2019": ("old", 1, _outline(-120.0, -119.0)),
    }
    with served(tmp_path) as server:
        features = [
            {"type": "Feature", "geometry": outline,
             "properties": {"name": name, "id": n, "count": count,
                            "url": f"{server.url}/{at}/ept.json"}}
            for n, (name, (at, count, outline)) in enumerate(names.items())
        ]  # fmt: skip
        index = tmp_path / "resources.geojson"
        index.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        found = find_collections(GRID, index=f"{server.url}/resources.geojson")
        assert [c.name for c in found] == ["WA_Baker_2_B22", "USGS_LPC_WA_Baker_2013_LAS_2016"]
        assert [c.year for c in found] == [2022, 2013]
        assert found[0].covers == pytest.approx(1.0)
        # 0.4 by 0.3 degrees at 45 north.
        assert found[1].density == pytest.approx(50_000 / (31_450 * 33_340), rel=0.01)
        densest = find_collections(GRID, index=index, order="densest")
        assert densest[0].year == 2013
        dsm = grid_points(found, GRID, chunks=30)
        assert dsm.attrs["deepdem_collections"] == [c.name for c in found]
        dsm = dsm.compute()
        new, old = (grid_points(tmp_path / name, GRID).compute().values for name in ("new", "old"))
        np.testing.assert_allclose(dsm, np.where(np.isnan(new), old, new), atol=1e-3)
        assert float(dsm[:, :39].max()) < 500 < float(dsm[:, 41:].min())
        density = grid_points(found, GRID, "density").compute()
        assert float(density[:, 41:].sum()) > 0
        with pytest.raises(ValueError, match="mixes collections with paths"):
            grid_points([found[0], "a.laz"], GRID)
        with pytest.raises(ValueError, match=r"no collection of .* covers"):
            find_collections(boxed(5, 5, 100_000, 100_000, "EPSG:32633"), index=index)
        with pytest.raises(ValueError, match="order='best'"):
            find_collections(GRID, index=index, order="best")
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match="is no index of collections"):
            find_collections(GRID, index=tmp_path / "other.json")


# --- real clouds ---------------------------------------------------------------------------------

LONE_STAR = boxed(88, 88, 515_363, 4_918_383, "EPSG:26912", 0.5)


def test_trees_over_http_give_what_the_whole_file_gives(data_folder):
    local = data_folder / "copc_lone_star/lone-star.copc.laz"
    every = laspy.read(local)
    wanted = np.full(LONE_STAR.shape, -np.inf)
    x, y, z = (np.asarray(getattr(every, axis)) for axis in "xyz")
    at = ((4_918_383 - y) / 0.5).astype(int), ((x - 515_363) / 0.5).astype(int)
    np.maximum.at(wanted, at, z)
    wanted[np.isinf(wanted)] = np.nan
    with served(data_folder) as server:
        for source in (
            local,
            f"{server.url}/copc_lone_star/lone-star.copc.laz",
            f"{server.url}/ept_lone_star/lone-star-laszip/ept.json",
        ):
            dsm = grid_points(source, LONE_STAR, method="max", crs="EPSG:26912", chunks=60)
            np.testing.assert_allclose(dsm, wanted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="Geocentric"):
        grid_points(local, LONE_STAR)


def test_a_tenth_of_the_place_costs_a_quarter_of_the_bytes(data_folder):
    """A tree as the public ones are, and a COPC file at the resolution of its pixels."""
    tree = data_folder / "ept_ign_urban_3857"
    every = sum(f.stat().st_size for f in tree.rglob("*") if f.is_file())
    about = json.loads((tree / "ept.json").read_text())
    west, south, _, east, north, _ = about["boundsConforming"]
    # Where few nodes meet: a tree of 74 nodes is too shallow for any place (40 % on average).
    like = boxed(45, 66, 431_115, 5_402_794, "EPSG:3857")
    assert math.prod(like.shape) == pytest.approx(0.1 * (east - west) * (north - south), rel=0.01)
    with served(data_folder) as server:
        dsm = grid_points(f"{server.url}/{tree.name}/ept.json", like)
        dsm.compute()
        assert server.total < 0.25 * every
        server.sent.clear()
        box = LONE_STAR[30:58, 38:66]  # 14 m of 44 m: a tenth
        path = "copc_lone_star/lone-star.copc.laz"
        coarse = grid_points(f"{server.url}/{path}", box, crs="EPSG:26912", spacing=0.35)
        assert np.isfinite(coarse.compute()).mean() > 0.5
        assert server.total < 0.25 * (data_folder / path).stat().st_size


@pytest.mark.parametrize("name", ["lidar_topography", "lidar_autzen"])
def test_rasters_that_other_code_made_of_the_same_points(data_folder, name, monkeypatch):
    monkeypatch.setattr(_clouds, "_PIECE_POINTS", 50_000)
    folder = data_folder / name
    (path,) = (folder / "points").glob("*.laz")
    reference = deepdem.stack({k: folder / f"{k}.tif" for k in ("dsm_max", "dtm")}, like="dtm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # feet
        dsm = grid_points(path, reference, method="max", chunks=100).compute()
        dtm = grid_points(path, reference, "lidar_dtm", water=True, chunks=100).compute()
    assert (np.isfinite(dsm) == np.isfinite(reference["dsm_max"])).all()
    error = (dsm - reference["dsm_max"]).values.ravel()
    assert np.nanmax(np.abs(error)) < 0.005  # theirs is rounded to 1/256 m
    error = (dtm - reference["dtm"]).values.ravel()
    error = error[np.isfinite(error)]
    assert abs(np.median(error)) < 0.005
    assert 1.4826 * np.median(np.abs(error - np.median(error))) < 0.01


@pytest.mark.slow
def test_workers_give_what_threads_give(cloud):
    from distributed import Client

    path, _ = cloud
    lazy = grid_points(path, GRID, "lidar_dtm", chunks=20)
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        found = lazy.compute()
        # What one sorted the other read; Dask let go of it, and the files are gone.
        for _ in range(50):
            left = client.run(
                lambda dask_worker: len([*Path(dask_worker.local_directory).rglob("*.npy")])
            )
            if not any(left.values()):
                break
            time.sleep(0.1)
    assert list(left.values()) == [0, 0]
    xr.testing.assert_identical(found, lazy.compute(scheduler="threads"))

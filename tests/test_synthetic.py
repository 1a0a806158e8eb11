"""The synthetic scene: one world whatever the cut, and errors like those of real stereo."""

from __future__ import annotations

import json
from typing import Any

import dask
import numpy as np
import pytest
import rioxarray  # noqa: F401
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter
from scipy.stats import spearmanr

from deepdem.layers import LAYERS, describe
from deepdem.sources import synthetic
from deepdem.sources.synthetic import synthetic_scene

NAMES = [
    "dsm",
    "ortho_left",
    "ortho_right",
    "triangulation_error",
    "red",
    "nir",
    "lidar_dsm",
    "lidar_dtm",
]


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("something was computed")


@pytest.fixture(scope="module")
def scene() -> xr.Dataset:
    return synthetic_scene((1024, 1024), chunks=-1).compute()


@pytest.fixture(scope="module")
def error(scene: xr.Dataset) -> np.ndarray:
    e = (scene["dsm"] - scene["lidar_dsm"]).to_numpy()
    return e[np.isfinite(e)]


def _sizes(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    cuts = st.sets(st.integers(1, n - 1), max_size=2)
    return cuts.map(lambda c: tuple(np.diff([0, *sorted(c), n]).tolist()))


# --- one world ---------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(rows=_sizes(90), columns=_sizes(130), pixel_size=st.sampled_from([0.7, 1.0, 4.0, 25.0]))
def test_chunks_do_not_show(
    rows: tuple[int, ...], columns: tuple[int, ...], pixel_size: float
) -> None:
    whole = synthetic_scene((90, 130), pixel_size=pixel_size, chunks=-1)
    parts = synthetic_scene((90, 130), pixel_size=pixel_size, chunks=(rows, columns))
    assert parts["dsm"].chunks == (rows, columns)
    xr.testing.assert_identical(whole.compute(), parts.compute())


def test_larger_scene_begins_with_the_smaller(scene: xr.Dataset) -> None:
    small = synthetic_scene((130, 200)).compute()
    corner = scene.isel(y=slice(130), x=slice(200))
    for name in NAMES:
        np.testing.assert_array_equal(small[name], corner[name])


def test_seed_decides() -> None:
    one, again, other = (synthetic_scene((64, 64), seed=s) for s in (7, 7, 8))
    assert one["dsm"].data.name == again["dsm"].data.name
    assert one["dsm"].data.name != other["dsm"].data.name
    xr.testing.assert_identical(one.compute(), again.compute())
    for name in NAMES:
        assert not np.array_equal(one[name], other[name], equal_nan=True)


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert np.isfinite(synthetic_scene((4, 4), seed=seed)["lidar_dsm"]).all()


@pytest.mark.parametrize("shape", [(1, 7), (1, 1), (40, 3), (33, 65)])
def test_any_shape(shape: tuple[int, int]) -> None:
    ds = synthetic_scene(shape).compute()
    assert set(ds.data_vars) == set(NAMES)
    for layer in ds.data_vars.values():
        assert layer.shape == shape
        assert layer.dims == ("y", "x")
        assert layer.dtype == np.float32


def test_finer_pixels_show_the_same_world() -> None:
    coarse = synthetic_scene((200, 200)).compute()
    # Three to one, so that every third centre falls on a centre of the coarse grid.
    fine = synthetic_scene((600, 600), pixel_size=1 / 3).compute()
    shared = fine.isel(y=slice(1, None, 3), x=slice(1, None, 3))
    np.testing.assert_allclose(shared["x"], coarse["x"])
    np.testing.assert_allclose(shared["y"], coarse["y"])
    for name in ("lidar_dtm", "lidar_dsm"):
        apart = np.abs(shared[name].to_numpy() - coarse[name].to_numpy())
        # A centre on the very edge of a crown may fall on either side of it.
        assert np.mean(apart > 1e-3) < 1e-3


# --- lazy --------------------------------------------------------------------------------------


def test_building_computes_nothing() -> None:
    with dask.config.set(scheduler=_raise):
        ds = synthetic_scene((16384, 16384))
    blocks = 16 * 16
    assert len(dict(ds["dsm"].data.__dask_graph__())) == 2 * blocks
    assert ds["dsm"].chunksizes["y"] == (1024,) * 16


def test_a_chunk_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []
    real = synthetic.render

    def counted(world: Any, frame: Any) -> Any:
        frames.append(frame)
        return real(world, frame)

    monkeypatch.setattr(synthetic, "render", counted)
    synthetic_scene((40, 60), chunks=(20, 30)).compute(scheduler="sync")
    assert sorted((f.y0, f.x0, f.height, f.width) for f in frames) == [
        (0, 0, 20, 30),
        (0, 30, 20, 30),
        (20, 0, 20, 30),
        (20, 30, 20, 30),
    ]


# --- geometry and labels -------------------------------------------------------------------------


def test_coordinates_are_pixel_centres() -> None:
    ds = synthetic_scene((20, 30), pixel_size=0.5, crs="EPSG:32633")
    assert ds.rio.crs.to_epsg() == 32633
    transform = ds.rio.transform()
    assert (transform.a, transform.e) == (0.5, -0.5)
    assert (transform.c + 0.25, transform.f - 0.25) == (float(ds["x"][0]), float(ds["y"][0]))
    np.testing.assert_allclose(np.diff(ds["y"]), -0.5)
    np.testing.assert_allclose(np.diff(ds["x"]), 0.5)
    for layer in ds.data_vars.values():
        assert layer.encoding["grid_mapping"] == "spatial_ref"


def test_coordinates_are_in_the_units_of_the_crs() -> None:
    feet = synthetic_scene((4, 4), crs="EPSG:2285")  # US survey feet
    np.testing.assert_allclose(np.diff(feet["x"]), 3937 / 1200)
    np.testing.assert_array_equal(feet["dsm"], synthetic_scene((4, 4))["dsm"])


def test_labels() -> None:
    ds = synthetic_scene((8, 8), seed=3, pixel_size=2)
    assert json.loads(json.dumps(ds.attrs)) == ds.attrs
    assert ds.attrs["source"] == "deepdem.synthetic_scene"
    assert (ds.attrs["seed"], ds.attrs["pixel_size"]) == (3, 2.0)
    for name in NAMES:
        assert name in LAYERS
        assert ds[name].attrs["units"] == describe(name).units
        assert ds[name].attrs["long_name"] == describe(name).long_name


# --- what is seen --------------------------------------------------------------------------------


def test_truth(scene: xr.Dataset) -> None:
    height = (scene["lidar_dsm"] - scene["lidar_dtm"]).to_numpy()
    assert height.min() >= -1e-3
    assert 25 < height.max() < 45
    assert 0.2 < np.mean(height > 3) < 0.55
    assert 60 < float(np.ptp(scene["lidar_dtm"].to_numpy())) < 500


def test_error_statistics(error: np.ndarray) -> None:
    assert 1.2 < np.abs(error).mean() < 2.0
    assert 2.0 < np.sqrt(np.square(error).mean()) < 4.0
    assert 0.5 < 1.4826 * np.median(np.abs(error - np.median(error))) < 1.2
    assert 0.1 < error.mean() < 0.9


def test_holes(scene: xr.Dataset) -> None:
    hole = np.isnan(scene["dsm"].to_numpy())
    assert 0.02 < hole.mean() < 0.06
    np.testing.assert_array_equal(hole, np.isnan(scene["triangulation_error"]))
    for name in set(NAMES) - {"dsm", "triangulation_error"}:
        assert np.isfinite(scene[name]).all()


def test_triangulation_error_knows_something(scene: xr.Dataset) -> None:
    said = scene["triangulation_error"].to_numpy()
    error = np.abs(scene["dsm"] - scene["lidar_dsm"]).to_numpy()
    seen = np.isfinite(said)
    assert said[seen].min() > 0
    # 0.55 measured: a hint, as in real stereo, not the answer.
    assert 0.4 < spearmanr(said[seen][::53], error[seen][::53]).statistic < 0.8
    blunder = seen & (error > 12)
    assert said[blunder].mean() > 2 * said[seen].mean()


def test_noise_is_correlated_in_space(scene: xr.Dataset) -> None:
    e = (scene["dsm"] - scene["lidar_dsm"]).to_numpy()
    a, b = e[:, :-1].ravel(), e[:, 1:].ravel()
    open_ground = (np.abs(a) < 1) & (np.abs(b) < 1)
    assert np.corrcoef(a[open_ground], b[open_ground])[0, 1] > 0.5


def test_orthos(scene: xr.Dataset) -> None:
    left, right = (scene[f"ortho_{side}"].to_numpy() for side in ("left", "right"))
    for image in (left, right):
        assert image.min() >= 1
        assert image.max() <= 2047
        np.testing.assert_array_equal(image, np.rint(image))
    assert 0.8 < np.corrcoef(left.ravel(), right.ravel())[0, 1] < 0.995
    # Views part at and beside what stands, and agree on open ground.
    height = (scene["lidar_dsm"] - scene["lidar_dtm"]).to_numpy()
    near = maximum_filter(height, 31) > 3
    apart = np.log(left / left.mean()) - np.log(right / right.mean())
    assert apart[near].std() > 3 * apart[~near].std()


def test_bands(scene: xr.Dataset) -> None:
    red, nir = scene["red"].to_numpy(), scene["nir"].to_numpy()
    assert 0 < red.min() < red.max() < 1
    assert 0 < nir.min() < nir.max() < 1
    ndvi = (nir - red) / (nir + red)
    wood = (scene["lidar_dsm"] - scene["lidar_dtm"]).to_numpy() > 12
    assert ndvi[wood].mean() > 0.6
    # Coarser than the grid: a metre on, next to nothing changes.
    assert np.abs(np.diff(red, axis=1)).max() < 0.03


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, -1), (5,), (1.5, 2), 7])
def test_bad_shape(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"shape: got .* wanted two positive integers"):
        synthetic_scene(shape)


@pytest.mark.parametrize("pixel_size", [0, -1.0, float("nan"), float("inf"), "fine"])
def test_bad_pixel_size(pixel_size: Any) -> None:
    with pytest.raises(ValueError, match=r"pixel_size: got .* wanted a positive number"):
        synthetic_scene((4, 4), pixel_size=pixel_size)


@pytest.mark.parametrize("crs", ["EPSG:4326", "nonsense"])
def test_bad_crs(crs: str) -> None:
    with pytest.raises(ValueError, match=r"crs: got .* wanted a projected CRS"):
        synthetic_scene((4, 4), crs=crs)


def test_bad_seed() -> None:
    with pytest.raises(ValueError, match=r"seed: got 0.5, wanted an integer"):
        synthetic_scene((4, 4), seed=0.5)  # type: ignore[arg-type]

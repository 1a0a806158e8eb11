from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import deepdem
from deepdem.sources.simulated import filled


@pytest.fixture(scope="module")
def lidar(scene) -> xr.Dataset:
    """The two truths of the synthetic scene, as if they were all there is, with a void."""
    part = scene[["lidar_dsm", "lidar_dtm"]].isel(y=slice(0, 150), x=slice(0, 140)).copy(deep=True)
    part.lidar_dsm[60:66, 70:75] = np.nan
    return part


@pytest.fixture(scope="module")
def simulated(lidar) -> xr.Dataset:
    return deepdem.simulate_stereo(lidar, seed=3).compute()


def test_a_stereo_scene_of_lidar(lidar, simulated):
    """All layers that a model may want, errors like those of stereo, the truth as it was."""
    assert set(simulated.data_vars) == {
        "lidar_dsm", "lidar_dtm", "dsm", "ortho_left", "ortho_right", "triangulation_error", "red",
        "nir",
    }  # fmt: skip
    xr.testing.assert_identical(simulated.lidar_dsm.drop_attrs(), lidar.lidar_dsm.drop_attrs())
    assert simulated.rio.crs == lidar.rio.crs
    error = (simulated.dsm - simulated.lidar_dsm).values
    known = np.isfinite(error)
    assert 0.9 < known.mean() < 0.995
    assert 0.3 < np.abs(error[known]).mean() < 3
    # The triangulation error knows something of it.
    worse = simulated.triangulation_error.values[known]
    assert np.corrcoef(worse, np.abs(error[known]))[0, 1] > 0.2
    for name in ("ortho_left", "ortho_right"):
        assert simulated[name].dtype == np.float32
        assert 50 < float(simulated[name].median()) < 900
    assert simulated.deepdem.prepare().ndvi.max() <= 1
    other = deepdem.simulate_stereo(lidar, seed=4).dsm.values
    assert np.nanmean(np.abs(other - simulated.dsm.values)) > 0.05


@settings(max_examples=3)
@given(y=st.integers(40, 150), x=st.integers(40, 140))
def test_any_chunks_give_the_same(lidar, simulated, y, x):
    cut = deepdem.simulate_stereo(lidar.chunk(y=y, x=x), seed=3)
    assert cut.dsm.chunks[0][0] == y
    for name in ("dsm", "ortho_left", "triangulation_error", "red"):
        np.testing.assert_allclose(cut[name], simulated[name], atol=1e-3)


def test_it_is_lazy_and_keeps_layers_that_are_there(lidar, no_compute):
    with no_compute():
        lit = lidar.chunk(y=64).assign(ndvi=lidar.lidar_dsm * 0, shine=lidar.lidar_dsm * 0 + 0.3)
        out = deepdem.simulate_stereo(lit, albedo="shine")
    assert "red" not in out
    assert np.isfinite(out.ortho_left.isel(y=slice(0, 64)).values).all()


def test_voids_are_filled_from_what_is_near():
    y, x = np.mgrid[:80, :200].astype(np.float32)
    plane = 2000 + 0.1 * y + 0.05 * x
    heights = plane.copy()
    heights[20:30, 20:30] = np.nan
    heights[:, 60:] = np.nan
    out = filled(heights, 1.0)
    np.testing.assert_array_equal(out[:, :20], heights[:, :20])
    np.testing.assert_allclose(out[20:30, 20:30], plane[20:30, 20:30], atol=0.6)
    assert np.isfinite(out[:, 90]).all()
    assert np.isnan(out[:, 130:]).all()
    assert np.isnan(filled(np.full((9, 9), np.nan, np.float32), 1.0)).all()


def test_far_from_any_lidar_there_is_nothing(lidar):
    wide = lidar.pad(x=(0, 200), constant_values=np.nan)
    wide = wide.assign_coords(x=lidar.x.values[0] + np.arange(340.0)).rio.write_crs(lidar.rio.crs)
    out = deepdem.simulate_stereo(wide)
    assert np.isnan(out.dsm[:, 300:]).all()
    assert np.isfinite(out.dsm[:, :140]).mean() > 0.9


def test_errors(lidar):
    with pytest.raises(ValueError, match="lidar_dsm"):
        deepdem.simulate_stereo(lidar.drop_vars("lidar_dsm"))
    with pytest.raises(ValueError, match="intensity"):
        deepdem.simulate_stereo(lidar, albedo="intensity")
    with pytest.raises(ValueError, match="wanted an integer"):
        deepdem.simulate_stereo(lidar, seed="three")

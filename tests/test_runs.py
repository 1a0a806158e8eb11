from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
import xarray as xr
from conftest import fitted
from rasterio.transform import from_origin

import deepdem
from deepdem.sources.folder import find_asp, find_deepdem

NODATA = -9999.0


def _write(path, *bands, left=500_000, top=4_600_000, crs="EPSG:32631", tags=None, nodata=NODATA):
    path.parent.mkdir(parents=True, exist_ok=True)
    stacked = np.stack(bands).astype("float32")
    place = {} if crs is None else {"crs": crs, "transform": from_origin(left, top, 2, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", count=len(bands), dtype="float32", nodata=nodata,
            height=stacked.shape[1], width=stacked.shape[2], **place,
        ) as file:  # fmt: skip
            file.write(stacked)
            file.update_tags(**(tags or {}))
    return path


def _values(seed=0):
    values = 100 + np.random.default_rng(seed).random((30, 40)).astype("float32")
    values[:3, :4] = NODATA
    return values


MAPPROJECT = {"INPUT_IMAGE_FILE": "a.ntf", "CAMERA_FILE": "a.xml", "DEM_FILE": "dem.tif"}


# --- Ames Stereo Pipeline -------------------------------------------------------------------------


def test_a_run_of_asp_is_a_scene(tmp_path, no_compute):
    dem = _values()
    _write(tmp_path / "run-DEM.tif", dem)
    _write(tmp_path / "run-DEM-adj.tif", dem - 50)
    _write(tmp_path / "run-IntersectionErr.tif", _values(1))
    _write(tmp_path / "run-DRG.tif", _values(2))
    _write(tmp_path / "run-L.tif", _values(3), crs=None)  # aligned, not mapprojected
    _write(tmp_path / "run-R.tif", _values(4), crs=None)
    with no_compute():
        ds = deepdem.open_asp(tmp_path, chunks=16)
    assert list(ds) == ["dsm", "triangulation_error", "ortho_left"]
    assert ds.dsm.chunks[0] == (16, 14)
    np.testing.assert_array_equal(ds.dsm.fillna(NODATA), dem)
    np.testing.assert_array_equal(ds.ortho_left.fillna(NODATA), _values(2))
    assert ds.dsm.attrs["vertical_reference"] == "ellipsoid"
    # What dem_geoid makes is above a geoid that the file does not name.
    adjusted = deepdem.open_asp(tmp_path, dem="*-DEM-adj.tif")
    assert "vertical_reference" not in adjusted.dsm.attrs
    np.testing.assert_allclose(adjusted.dsm[5:], dem[5:] - 50)
    said = deepdem.open_asp(tmp_path, heights={"dsm": "EPSG:5773"}).dsm
    assert said.attrs["vertical_reference"] == "EGM96 height (EPSG:5773)"
    lidar = _write(tmp_path / "lidar.tif", dem, crs="EPSG:32631+5703")
    with pytest.raises(ValueError, match=r"'dsm' is above 'ellipsoid', 'lidar_dsm'.*vertical_crs="):
        deepdem.open_asp(tmp_path, layers={"lidar_dsm": lidar})


def test_a_vector_error_is_its_length(tmp_path, no_compute):
    north, east, down = _values(1), _values(2), _values(3)
    east[10, 10] = NODATA
    _write(tmp_path / "run-DEM.tif", _values())
    _write(tmp_path / "run-IntersectionErr.tif", north, east, down)
    with no_compute():
        ds = deepdem.open_asp(tmp_path, chunks=16)
    wanted = np.sqrt(north.astype(float) ** 2 + east.astype(float) ** 2 + down.astype(float) ** 2)
    error = ds.triangulation_error
    there = error.notnull().values
    assert (~there).sum() == 12 + 1
    np.testing.assert_allclose(error.values[there], wanted[there], rtol=1e-6)
    assert error.attrs["source"].endswith("run-IntersectionErr.tif")
    assert error.attrs["units"] == "m"


def test_asp_orthos(tmp_path):
    """Mapprojected images come first, then L and R if they are georeferenced, then the DRG."""
    run = tmp_path / "stereo"
    for name in ("out-DEM.tif", "out-DRG.tif"):
        _write(run / name, _values())
    assert find_asp(run).keys() == find_asp(tmp_path).keys() == {"dsm", "ortho_left"}
    _write(run / "out-L.tif", _values(), crs=None)
    _write(run / "out-R.tif", _values())
    assert find_asp(tmp_path)["ortho_left"].endswith("DRG.tif")
    _write(run / "out-L.tif", _values())
    assert find_asp(tmp_path)["ortho_left"].endswith("out-L.tif")
    assert find_asp(tmp_path)["ortho_right"].endswith("out-R.tif")
    for name in ("cat1_left_ortho_1.0m.tif", "cat2_right_ortho_1.0m.tif"):
        _write(tmp_path / name, _values())
    _write(tmp_path / "refdem.tif", _values())  # no image: neither its name nor its tags say so
    found = find_asp(tmp_path)
    assert found["ortho_left"].endswith("cat1_left_ortho_1.0m.tif")
    assert found["ortho_right"].endswith("cat2_right_ortho_1.0m.tif")
    _write(tmp_path / "cat3.tif", _values(), tags=MAPPROJECT)
    assert set(find_asp(tmp_path)) == {"dsm", "ortho_1", "ortho_2", "ortho_3"}
    assert set(deepdem.open_asp(tmp_path)) == {"dsm", "ortho_1", "ortho_2", "ortho_3"}


def test_asp_errors_name_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        deepdem.open_asp(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="run point2dem"):
        deepdem.open_asp(tmp_path)
    for name in ("a-DEM.tif", "b-DEM.tif", "a-IntersectionErr.tif", "b-IntersectionErr.tif"):
        _write(tmp_path / name, _values())
    with pytest.raises(ValueError, match=r"\['a-DEM.tif', 'b-DEM.tif'\] may each.* dem='…'"):
        deepdem.open_asp(tmp_path)
    found = find_asp(tmp_path, dem="b-DEM.tif")
    assert found["triangulation_error"].endswith("b-IntersectionErr.tif")


# --- the predecessor ------------------------------------------------------------------------------


def _deepdem(folder, left="ortho_left", right="ortho_right"):
    mask = np.ones((30, 40))
    mask[:3, :4] = 0
    mask[20, 20] = 0  # the lidar's void
    orthos = np.random.default_rng(5).random((30, 40)) * mask
    orthos[8, 8] = 0  # black, but data
    files = {
        "asp_dsm": _values(), left: orthos, right: orthos, "ndvi": mask * 0.3,
        "lidar_data": _values(6), "hls_red": _values(7), "hls_nir": _values(8), "coherence": mask,
        "canopy_height_model": mask,
    }  # fmt: skip
    for name, values in files.items():
        _write(folder / f"final_{name}.tif", values)
    _write(folder / "final_triangulation_error.tif", np.where(mask, 0.5, -1), nodata=-1)
    _write(folder / "final_nodata_mask.tif", mask, nodata=None)
    return mask.astype(bool), orthos


@pytest.mark.parametrize("names", [("ortho_left", "ortho_right"),
                                   ("ortho_channel1", "ortho_channel2")])  # fmt: skip
def test_a_deepdem_folder_is_a_scene(tmp_path, no_compute, names):
    mask, orthos = _deepdem(tmp_path, *names)
    with no_compute():
        ds = deepdem.open_deepdem(tmp_path, chunks=16)
    assert set(ds) == {"dsm", "ortho_left", "ortho_right", "ndvi", "lidar_dsm", "red", "nir",
                       "triangulation_error", "valid", "coherence", "canopy_height"}  # fmt: skip
    assert ds.valid.dtype == bool
    np.testing.assert_array_equal(ds.valid, mask)  # 1 in nodata_mask is valid
    np.testing.assert_array_equal(ds.ortho_left, np.where(mask, orthos, np.nan).astype("float32"))
    np.testing.assert_array_equal(ds.ndvi.notnull(), mask)
    np.testing.assert_array_equal(ds.triangulation_error.notnull(), mask)
    assert float(ds.ortho_left[8, 8]) == 0
    prepared = ds.deepdem.prepare()
    np.testing.assert_array_equal(prepared.ortho_left, ds.ortho_left)  # equalised already
    np.testing.assert_array_equal(prepared.valid, mask)
    raw = deepdem.open_deepdem(tmp_path, equalised=False).deepdem.prepare()
    assert not raw.ortho_left.equals(ds.ortho_left)


def test_deepdem_options_and_errors(tmp_path):
    _deepdem(tmp_path)
    ground = deepdem.open_deepdem(tmp_path, lidar="lidar_dtm")
    assert "lidar_dsm" not in ground
    assert ground.lidar_dtm.attrs["long_name"] == "lidar bare ground"
    with pytest.raises(ValueError, match="lidar='dsm' is no truth"):
        deepdem.open_deepdem(tmp_path, lidar="dsm")
    _write(tmp_path / "final_lidar_dtm_data.tif", _values())
    assert {"lidar_dsm", "lidar_dtm"} <= set(deepdem.open_deepdem(tmp_path))
    with pytest.raises(ValueError, match="there is a file of that layer already"):
        deepdem.open_deepdem(tmp_path, lidar="lidar_dtm")
    _write(tmp_path / "final_ortho_channel1.tif", _values())
    with pytest.raises(ValueError, match=r"final_ortho_channel1.tif and final_ortho_left.tif are"):
        find_deepdem(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no final_asp_dsm.tif \(found: \[\]\)"):
        deepdem.open_deepdem(tmp_path / "empty")


# --- one, two, many views, none -------------------------------------------------------------------


@pytest.mark.parametrize(
    "orthos",
    [(), ("ortho_left",), ("ortho_left", "ortho_right"), ("ortho_1", "ortho_2", "ortho_3")],
)
def test_any_number_of_views_goes_all_the_way(orthos, scene, tmp_path):
    layers = {"dsm": scene.dsm, **dict.fromkeys(orthos, scene.ortho_left)}
    ds = deepdem.stack(layers, chunks=100).deepdem.prepare()
    assert list(ds) == ["dsm", *orthos, "valid"]
    ds.deepdem.to_zarr(tmp_path / "s.zarr")
    ds = deepdem.open_scene(tmp_path / "s.zarr")
    refined = ds.deepdem.refine(fitted(("dsm", *orthos)))
    assert isinstance(refined, xr.DataArray)
    np.testing.assert_array_equal(refined.notnull(), ds.valid)
    assert 0 < float(np.abs(refined - ds.dsm).max()) < 1000

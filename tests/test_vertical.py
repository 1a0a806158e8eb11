from __future__ import annotations

import struct
import warnings

import numpy as np
import pyproj
import pytest
import rasterio
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import CRS, Transformer
from rasterio.transform import from_origin

import deepdem
from deepdem.vertical import check_vertical, vertical_from, vertical_of

UTM = "EPSG:32631"
BOX = GeoBox.from_bbox((500_000, 4_983_000, 500_200, 4_983_150), crs=UTM, resolution=1)


def _undulation(lon, lat):
    """A geoid that is bilinear in longitude and latitude: PROJ interpolates it exactly."""
    return 40 + 3 * (lon - 3) + 2 * (lat - 45) + 5 * (lon - 3) * (lat - 45)


LAT, LON = np.arange(44, 46.01, 0.1), np.arange(2, 4.01, 0.1)


def _gtx(path, lat=LAT, lon=LON):
    with path.open("wb") as file:
        file.write(struct.pack(">ddddii", lat[0], lon[0], 0.1, 0.1, len(lat), len(lon)))
        file.write(_undulation(lon[None], lat[:, None]).astype(">f4").tobytes())
    return path


def _custom(path, crs="+proj=utm +zone=31 +datum=WGS84"):
    return CRS(f"{crs} +geoidgrids={path} +vunits=m +type=crs").to_wkt()


@pytest.fixture
def egm96(tmp_path):
    """PROJ knows a grid by the name of EGM96's, which is the small one."""
    folder = tmp_path / "proj"
    folder.mkdir()
    values = _undulation(LON[None], LAT[::-1][:, None]).astype("float32")
    with rasterio.open(
        folder / "us_nga_egm96_15.tif", "w", driver="GTiff", height=len(LAT), width=len(LON),
        count=1, dtype="float32", crs="EPSG:4326",
        transform=from_origin(1.95, LAT[-1] + 0.05, 0.1, 0.1),
    ) as file:  # fmt: skip
        file.write(values, 1)
        file.update_tags(AREA_OR_POINT="Point", TYPE="VERTICAL_OFFSET_GEOGRAPHIC_TO_VERTICAL")
        file.set_band_description(1, "geoid_undulation")
    before = pyproj.datadir.get_data_dir()
    pyproj.datadir.append_data_dir(str(folder))
    deepdem.vertical._operation.cache_clear()
    yield folder
    pyproj.datadir.set_data_dir(before)
    deepdem.vertical._operation.cache_clear()


def _heights(crs=UTM, box=BOX, **attrs):
    rng = np.random.default_rng(0)
    values = (300 + 50 * rng.random(box.shape)).astype("float32")
    values[10:20, 30:40] = np.nan
    array = xr.DataArray(values, coords=xr_coords(box, always_yx=True), dims=("y", "x"))
    return array.drop_vars("spatial_ref").assign_attrs(attrs).rio.write_crs(crs)


def _n(box=BOX):
    """The geoid's height at each pixel, without PROJ's vertical machinery."""
    coords = xr_coords(box, always_yx=True)
    x, y = np.meshgrid(coords["x"].values, coords["y"].values)
    return _undulation(*Transformer.from_crs(box.crs.proj, 4326, always_xy=True).transform(x, y))


# --- what a layer says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "says"),
    [("EPSG:32631", None), ("EPSG:32631+5773", "EGM96 height (EPSG:5773)"),
     ("EPSG:4979", "WGS 84 ellipsoid"), ("EPSG:4326+3855", "EGM2008 height (EPSG:3855)")],
)  # fmt: skip
def test_files_say_it_by_their_crs(tmp_path, crs, says):
    degrees = not CRS(crs).is_projected
    place = from_origin(3, 45, 1e-5, 1e-5) if degrees else from_origin(5e5, 4.983e6, 1, 1)
    for version in ("AUTO", "1.0"):  # old ones hide a compound CRS
        path = tmp_path / f"a{version}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", height=20, width=20, count=1, dtype="float32", crs=crs,
            transform=place, GEOTIFF_VERSION=version,
        ) as file:  # fmt: skip
            file.write(np.ones((1, 20, 20), "float32"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # degrees are not square
            ds = deepdem.stack({"dsm": path, "ortho_left": path})
        if (crs, version) != ("EPSG:4979", "1.0"):  # a 3-D CRS needs GeoTIFF 1.1
            assert ds.dsm.attrs.get("vertical_reference") == says
        assert "vertical_reference" not in ds.ortho_left.attrs


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [("metres above EGM96 geoid", "geoid", 5773), ("EGM2008", "geoid", 3855),
     ("NAVD88 (Geoid18)", "geoid", 5703), ("metres IGN69", "geoid", 5720),
     ("metres, cloud heights = ellipsoidal", "ellipsoid", None),
     ("metres (orthometric, unspecified)", "geoid", None), ("local", "unknown", None),
     ("EGM96 height (EPSG:5773)", "geoid", 5773)],
)  # fmt: skip
def test_words_are_understood(text, kind, code):
    said = vertical_of({"VERTICAL": text}, CRS(UTM))
    assert (said.name, said.kind) == (text, kind)
    assert (None if said.crs is None else said.crs.to_epsg()) == code
    assert vertical_of({}, CRS(UTM)) is None


def test_an_option_says_it():
    assert vertical_from("ellipsoid").kind == "ellipsoid"
    assert vertical_from("EPSG:4326+5773").crs == CRS("EPSG:5773")
    with pytest.raises(ValueError, match="horizontal CRS: pass 'ellipsoid' or a vertical CRS"):
        vertical_from(UTM)
    with pytest.raises(ValueError, match="'geoid' is no vertical reference"):
        vertical_from("geoid")


# --- mixing ---------------------------------------------------------------------------------------


def test_ellipsoidal_and_geoid_heights_are_not_mixed():
    layers = {"dsm": _heights(), "lidar_dsm": _heights(f"{UTM}+5773")}
    with pytest.raises(ValueError, match=r"'dsm' is above 'ellipsoid', 'lidar_dsm' is above "
                       r"'EGM96 height \(EPSG:5773\)'; pass vertical_crs="):  # fmt: skip
        deepdem.stack(layers, heights={"dsm": "ellipsoid"})
    with pytest.warns(UserWarning, match=r"\['dsm'\] do not say what their heights are above"):
        deepdem.stack(layers)
    same = deepdem.stack(layers, heights={"dsm": "EPSG:5773"})
    assert same.dsm.attrs["vertical_reference"] == same.lidar_dsm.attrs["vertical_reference"]
    np.testing.assert_array_equal(same.dsm, same.lidar_dsm)  # one horizontal grid: copied
    with pytest.raises(ValueError, match=r"heights= names \['red'\], which are no height layers"):
        deepdem.stack(layers, heights={"red": "ellipsoid"})


def test_a_grid_from_elsewhere_does_not_say_what_heights_are_above():
    geoid = _heights(f"{UTM}+5773")
    own = deepdem.stack({"dsm": geoid}, like=geoid)
    assert own.odc.geobox.crs.proj.is_compound
    other = deepdem.stack({"dsm": geoid}, like=geoid, heights={"dsm": "ellipsoid"})
    assert not other.odc.geobox.crs.proj.is_compound
    assert other.dsm.attrs["vertical_reference"] == "ellipsoid"
    step = other.attrs["deepdem_provenance"]
    assert "ellipsoid" in str(step)
    words = _heights(VERTICAL="metres above EGM96 geoid")
    assert deepdem.stack({"dsm": words}, like=geoid).odc.geobox.crs.proj.is_compound


def test_geoids_that_differ_are_said():
    with pytest.warns(UserWarning, match="different geoids"):
        check_vertical({"dsm": vertical_from("EPSG:5773"), "lidar_dsm": vertical_from("EPSG:3855")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vertical({"dsm": vertical_from("EPSG:5773"), "lidar_dsm": vertical_from("EPSG:5773")})
        check_vertical({"dsm": None, "lidar_dsm": None})


def test_heights_in_feet_are_refused_or_converted():
    feet = _heights("EPSG:32631+6360")
    with pytest.raises(
        ValueError, match=r"'dsm' has heights in units of 0.304801 m .*vertical_crs="
    ):
        deepdem.stack({"dsm": feet})
    ds = deepdem.stack({"dsm": feet}, vertical_crs="EPSG:5703")
    np.testing.assert_allclose(ds.dsm, feet * (1200 / 3937), atol=1e-4)
    with pytest.raises(ValueError, match="not in metres"):
        deepdem.stack({"dsm": feet}, vertical_crs="EPSG:6360")


# --- conversion -----------------------------------------------------------------------------------


def test_conversion_is_right_to_a_millimetre_and_lazy(tmp_path, no_compute):
    geoid = _custom(_gtx(tmp_path / "small.gtx"))
    above_geoid, ellipsoidal = _heights(geoid), _heights()
    with no_compute():
        ds = deepdem.stack(
            {"dsm": above_geoid, "lidar_dsm": ellipsoidal}, heights={"lidar_dsm": "ellipsoid"},
            vertical_crs="ellipsoid", chunks=64,
        )  # fmt: skip
        back = deepdem.stack({"dsm": ds.dsm}, vertical_crs=geoid, chunks=64)
    np.testing.assert_allclose(ds.dsm, above_geoid + _n().astype("float32"), atol=1e-3)
    np.testing.assert_array_equal(ds.lidar_dsm, ellipsoidal)  # nothing to shift
    np.testing.assert_allclose(back.dsm, above_geoid, atol=1e-3)
    assert ds.dsm.isnull().sum() == 100
    assert ds.dsm.attrs["vertical_reference"] == "WGS 84 ellipsoid"
    assert "PROJ" in ds.dsm.attrs["vertical_operation"]
    assert len(ds.rio.crs.to_wkt()) > 0
    assert ds.odc.geobox.crs.proj.is_projected
    assert len(ds.odc.geobox.crs.proj.axis_info) == 3


@settings(max_examples=8)
@given(st.integers(10, 210), st.integers(10, 210), st.integers(20, 160))
def test_conversion_ignores_chunks(tmp_path_factory, height, width, chunks):
    folder = tmp_path_factory.getbasetemp() / "chunks"
    folder.mkdir(exist_ok=True)
    array = _heights(_custom(_gtx(folder / "small.gtx")))
    whole = deepdem.stack({"dsm": array}, vertical_crs="ellipsoid", chunks=4096)
    cut = deepdem.stack(
        {"dsm": array.chunk(y=height, x=width)}, vertical_crs="ellipsoid", chunks=chunks
    )
    np.testing.assert_array_equal(whole.dsm, cut.dsm)


def test_conversion_onto_another_zone_and_back_on_disk(tmp_path):
    geoid = _gtx(tmp_path / "small.gtx")
    ds = deepdem.stack(
        {"dsm": xr.ones_like(_heights(_custom(geoid))).fillna(1)}, crs="EPSG:32630",
        resolution=2, vertical_crs="ellipsoid",
    )  # fmt: skip
    inner = ds.dsm[20:-20, 20:-20]
    assert inner.notnull().mean() > 0.8
    box = inner.odc.geobox
    np.testing.assert_allclose(inner.where(inner.notnull(), _n(box) + 1), _n(box) + 1, atol=1e-3)
    ds.deepdem.to_zarr(tmp_path / "s.zarr")
    again = deepdem.open_scene(tmp_path / "s.zarr")
    assert again.odc.geobox.crs == ds.odc.geobox.crs
    assert again.dsm.attrs == ds.dsm.attrs


@pytest.mark.parametrize("crs", [f"{UTM}+5773", "3-D", "geoid grid"])
def test_a_geotiff_keeps_the_place_and_the_reference(crs, tmp_path):
    if crs == "geoid grid":
        crs = _custom(_gtx(tmp_path / "small.gtx"), "+proj=utm +zone=31 +datum=WGS84")
    elif crs == "3-D":
        crs = CRS(UTM).to_3d().to_wkt()
    ds = deepdem.stack({"dsm": _heights(crs)})
    ds.deepdem.to_cog(tmp_path / "a.tif")
    assert not (tmp_path / "a.tif.aux.xml").exists()
    back = deepdem.stack({"dsm": tmp_path / "a.tif"})
    assert back.dsm.attrs["vertical_reference"] == ds.dsm.attrs["vertical_reference"]
    level = deepdem.stack({"dsm": tmp_path / "a.tif", "red": _heights()})
    np.testing.assert_array_equal(level.red, _heights())  # one horizontal grid: copied


def test_an_epsg_geoid_whose_grid_is_there(egm96):
    ds = deepdem.stack({"dsm": _heights(f"{UTM}+5773")}, vertical_crs="ellipsoid")
    # In this thread: others may have asked PROJ for its folders before.
    np.testing.assert_allclose(
        ds.dsm.compute(scheduler="synchronous"), _heights() + _n().astype("float32"), atol=1e-3
    )


def test_a_missing_geoid_grid_is_an_error_and_no_zero_shift():
    assert not pyproj.network.is_network_enabled()
    for crs, grid in (("5773", "us_nga_egm96_15.tif"), ("3855", "us_nga_egm08_25.tif")):
        with pytest.raises(ValueError, match=rf"layer 'dsm' .*{grid}.* are not there.*projsync"):
            deepdem.stack({"dsm": _heights(f"{UTM}+{crs}")}, vertical_crs="ellipsoid")


def test_a_layer_that_does_not_say_is_not_converted():
    with pytest.raises(ValueError, match=r"layer 'dsm' does not say.*pass heights="):
        deepdem.stack({"dsm": _heights()}, vertical_crs="ellipsoid")
    with pytest.raises(ValueError, match="'orthometric' names no vertical CRS"):
        deepdem.stack({"dsm": _heights(VERTICAL="orthometric")}, vertical_crs="ellipsoid")


def test_a_geoid_that_ends_within_the_scene(tmp_path):
    far = _gtx(tmp_path / "far.gtx", lat=LAT + 5)
    with pytest.raises(ValueError, match="does not cover"):
        deepdem.stack({"dsm": _heights(_custom(far))}, vertical_crs="ellipsoid")
    # Its northern edge lies within the scene.
    lat = np.array([44.8, 44.9, 45.0]) + 0.00105
    part = _gtx(tmp_path / "part.gtx", lat=lat)
    array = _heights(_custom(part))
    ds = deepdem.stack({"dsm": array}, vertical_crs="ellipsoid", chunks=50)
    with pytest.raises(ValueError, match=r"'dsm': its heights .*does not cover"):
        ds.compute()
    # Where there is no height there is nothing to convert, and the last pixels are converted.
    _, lat_px = Transformer.from_crs(UTM, 4326, always_xy=True).transform(
        *np.meshgrid(array.x, array.y)
    )
    kept = array.where(lat_px < lat[-1])
    ds = deepdem.stack({"dsm": kept}, vertical_crs="ellipsoid", chunks=50).compute()
    assert 0 < int(ds.dsm.notnull().sum()) == int(kept.notnull().sum()) < kept.size * 0.9
    np.testing.assert_allclose(ds.dsm, kept + _n().astype("float32"), atol=1e-3)

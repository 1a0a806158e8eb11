from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import CRS, Transformer
from rasterio.transform import from_origin

import deepdem
from deepdem.grid import pixel_size_m, regrid
from deepdem.scene import check_scene, geobox_of, pixel_size

UTM = "EPSG:32631"


def _write(path, array, *, crs=UTM, left=500_000, top=4_600_000, pixel=1.0, mask=None, **profile):
    array = np.atleast_3d(array).transpose(2, 0, 1) if array.ndim == 2 else array
    transform = profile.pop("transform", from_origin(left, top, pixel, pixel))
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", height=array.shape[1], width=array.shape[2],
            count=array.shape[0], dtype=array.dtype, crs=crs, transform=transform, **profile,
        ) as file,
    ):  # fmt: skip
        file.write(array)
        if mask is not None:
            file.write_mask(mask)
    return str(path)


def _ramp(shape, dtype="float32"):
    return np.arange(1, shape[0] * shape[1] + 1).reshape(shape).astype(dtype)


def _surface(x, y):
    return 100 + 0.2 * (x - 500_000) + 20 * np.sin(x / 40) * np.cos(y / 55)


def _analytic(box: GeoBox, crs=UTM) -> np.ndarray:
    coords = xr_coords(box, always_yx=True)
    x, y = np.meshgrid(coords["x"].values, coords["y"].values)
    return _surface(*Transformer.from_crs(box.crs, crs, always_xy=True).transform(x, y))


@pytest.fixture(scope="module")
def hilly() -> xr.DataArray:
    box = GeoBox.from_bbox((500_000, 4_600_000, 500_900, 4_600_800), crs=UTM, resolution=1)
    return xr.DataArray(
        _analytic(box).astype("float32"), coords=xr_coords(box), dims=("y", "x"), name="dsm"
    )


# --- stack: nodata, grids, laziness ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("float32", -9999.0), ("int16", -32768), ("uint16", 0), ("float32", np.nan),
     ("float64", -9999.0), ("int32", -2147483647), ("float32", -3.4028234663852886e38)],
)  # fmt: skip
def test_nodata_becomes_nan_whatever_it_is(tmp_path, dtype, nodata):
    array = _ramp((20, 30), dtype)
    array[5:8, 10:12] = nodata
    ds = deepdem.stack({"dsm": _write(tmp_path / "a.tif", array, nodata=nodata)})
    assert ds.dsm.dtype == np.float32
    assert ds.dsm.isnull().sum() == 6
    assert ds.dsm[5:8, 10:12].isnull().all()
    assert ds.dsm[0, 0] == 1


def test_a_mask_band_is_nodata(tmp_path):
    mask = np.full((20, 30), 255, np.uint8)
    mask[:4] = 0
    ds = deepdem.stack({"dsm": _write(tmp_path / "a.tif", _ramp((20, 30)), mask=mask)})
    assert ds.dsm[:4].isnull().all()
    assert ds.dsm[4:].notnull().all()


def test_scale_and_offset_of_the_file_are_applied(tmp_path):
    path = _write(tmp_path / "a.tif", _ramp((5, 5), "int16"), nodata=-1)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.5,), (10.0,)
    assert deepdem.stack({"dsm": path}).dsm[0, :3].values.tolist() == [10.5, 11.0, 11.5]


def test_only_headers_are_read(tmp_path, monkeypatch, no_compute):
    paths = {
        "dsm": _write(tmp_path / "a.tif", _ramp((200, 300)), nodata=-9999),
        "ortho_left": _write(tmp_path / "b.tif", _ramp((90, 90), "uint16"), pixel=2.0, nodata=0),
    }

    def refuse(*_, **__):
        raise AssertionError("pixels were read")

    with monkeypatch.context() as patch, no_compute():
        patch.setattr(rioxarray._io.RasterioArrayWrapper, "_getitem", refuse)
        ds = deepdem.stack(paths, like="dsm")
        ds.deepdem.prepare()
    assert ds.sizes == {"y": 180, "x": 180}
    assert ds.ortho_left.notnull().mean() > 0.99


def test_files_arrays_crs_and_resolutions_mix(tmp_path, hilly):
    box = geobox_of(hilly)
    zone30 = GeoBox.from_bbox(box.footprint("EPSG:32630").boundingbox, crs="EPSG:32630",
                              resolution=1)  # fmt: skip
    other = xr.DataArray(
        _analytic(zone30).astype("float32"), coords=xr_coords(zone30), dims=("y", "x")
    )
    file = tmp_path / "coarse.tif"
    coarse = GeoBox.from_bbox((499_990, 4_599_990, 500_910, 4_600_810), crs=UTM, resolution=5)
    _write(file, _analytic(coarse).astype("float32"), left=499_990, top=4_600_810, pixel=5)
    ds = deepdem.stack({"dsm": hilly, "lidar_dsm": other, "other": file}, like="dsm")
    assert ds.dsm.shape == hilly.shape
    truth = _analytic(box)
    inner = (slice(5, -5), slice(5, -5))
    np.testing.assert_array_equal(ds.dsm, hilly)  # its own grid: copied
    assert np.nanmax(np.abs(ds.lidar_dsm.values - truth)[inner]) < 0.01
    assert np.nanmax(np.abs(ds.other.values - truth)[inner]) < 0.2  # 5 m pixels, 20 m waves


def _smooth(x, y):
    """Steep and gently waved: what a pixel's mean and its centre differ by is millimetres."""
    return 0.8 * (x - 500_000) + 15 * np.sin(x / 60) * np.cos(y / 70)


@pytest.mark.filterwarnings("ignore:the scene's grid is in degrees")
@pytest.mark.parametrize("pixel", [0.7, 1.3, 3.6])
@pytest.mark.parametrize("crs", [UTM, "EPSG:32630", "EPSG:3857", "EPSG:4326"])
def test_reprojection_is_right_to_a_centimetre_and_ignores_chunks(crs, pixel):
    source = GeoBox.from_bbox((500_000, 4_600_000, 500_300, 4_600_170), crs=UTM, resolution=1)
    coords = xr_coords(source, always_yx=True)
    values = _smooth(*np.meshgrid(coords["x"].values, coords["y"].values)).astype("float32")
    dsm = _array(source, values)
    size = pixel * (1e-5 if crs == "EPSG:4326" else 1)
    around = source.footprint(crs).buffer(5.3 * size).boundingbox
    box = GeoBox.from_bbox(around, crs=crs, resolution=size, tight=True)
    whole = deepdem.stack({"dsm": dsm}, like=box, chunks=4096).dsm.compute()
    cut = deepdem.stack({"dsm": dsm.chunk(y=77, x=90)}, like=box, chunks=59).dsm.compute()
    # The rim as well: the very edge of the data, on a slope of 0.8.
    np.testing.assert_allclose(cut, whole, atol=1e-3)
    coords = xr_coords(box, always_yx=True)
    x, y = np.meshgrid(*(coords[name].values for name in ("x", "y")))
    truth = _smooth(*Transformer.from_crs(crs, UTM, always_xy=True).transform(x, y))
    inner = whole.rolling(y=5, x=5, center=True).mean().notnull().values
    assert inner.sum() > 2000
    assert np.abs(whole.values - truth)[inner].max() < 0.01


@pytest.mark.parametrize("crs", ["EPSG:32630", "EPSG:3857"])
def test_the_warper_does_not_take_long_rows_for_straight(crs):
    """GDAL's approximation along a row of 2000 pixels is 5 mm off, and goes with the chunks."""
    box = GeoBox.from_bbox((500_000, 4_600_000, 502_400, 4_600_120), crs=UTM, resolution=1)
    coords = xr_coords(box, always_yx=True)
    plane = (0.8 * (coords["x"].values - 501_200) + 0 * coords["y"].values[:, None]).astype("f4")
    dsm = _array(box, plane)
    like = box.footprint(crs).boundingbox
    grid = GeoBox.from_bbox(like, crs=crs, resolution=1.2)
    whole = deepdem.stack({"dsm": dsm}, like=grid, chunks=4096).dsm.compute()
    fine = deepdem.stack({"dsm": dsm.chunk(y=50, x=300)}, like=grid, chunks=170).dsm.compute()
    np.testing.assert_allclose(fine, whole, atol=3e-4)
    coords = xr_coords(grid, always_yx=True)
    x, y = np.meshgrid(coords["x"].values, coords["y"].values)
    x, _ = Transformer.from_crs(crs, UTM, always_xy=True).transform(x, y)
    # Not on the rim: with half of its neighbours missing bilinear is one-sided.
    inner = whole.rolling(y=5, x=5, center=True).mean().notnull().values
    assert inner.sum() > 1e5
    assert np.abs(whole.values - 0.8 * (x - 501_200))[inner].max() < 5e-4


def test_downsampling_averages(tmp_path):
    board = np.indices((200, 200)).sum(0) % 2 * 100.0
    path = _write(tmp_path / "a.tif", board.astype("float32"))
    box = GeoBox.from_bbox((500_000, 4_599_800, 500_200, 4_600_000), crs=UTM, resolution=4)
    ds = deepdem.stack({"dsm": path}, like=box)
    np.testing.assert_allclose(ds.dsm[2:-2, 2:-2], 50, atol=1e-4)


def test_a_known_corner_lands_on_the_known_pixel(tmp_path):
    array = np.zeros((40, 40), np.float32)
    array[10, 20] = 7
    path = _write(tmp_path / "a.tif", array)
    ds = deepdem.stack({"dsm": path}, bounds=(500_015, 4_599_985, 500_025, 4_599_995))
    assert ds.dsm.shape == (10, 10)
    assert float(ds.dsm.sel(x=500_020.5, y=4_599_989.5)) == 7
    assert float(ds.dsm.sum()) == 7
    assert ds.x[0] == 500_015.5
    assert ds.y[0] == 4_599_994.5


def test_bounds(tmp_path):
    one = _write(tmp_path / "a.tif", _ramp((50, 50)))
    two = _write(tmp_path / "b.tif", _ramp((50, 50)), left=500_030, top=4_600_010)
    layers = {"dsm": one, "lidar_dsm": two}
    both = deepdem.stack(layers)
    assert dict(both.sizes) == {"y": 40, "x": 20}
    assert both.to_array().notnull().all()
    either = deepdem.stack(layers, bounds="union")
    assert dict(either.sizes) == {"y": 60, "x": 80}
    assert either.dsm.notnull().sum() == either.lidar_dsm.notnull().sum() == 2500
    same = deepdem.stack({"dsm": one}, like=both)
    xr.testing.assert_equal(same.dsm, both.dsm)
    coarse = deepdem.stack({"dsm": one}, crs=UTM, resolution=5)
    assert dict(coarse.sizes) == {"y": 10, "x": 10}


def test_masks_are_bool_and_nearest(tmp_path):
    mask = (np.indices((60, 60)).sum(0) > 50).astype(np.uint8)
    ds = deepdem.stack(
        {"dsm": _write(tmp_path / "a.tif", _ramp((30, 30)), pixel=2),
         "valid": _write(tmp_path / "m.tif", mask)}
    )  # fmt: skip
    assert ds.valid.dtype == bool
    assert ds.valid.shape == (30, 30)


# --- stack: errors --------------------------------------------------------------------------------


def test_errors_name_the_layer_and_the_cure(tmp_path):
    good = _write(tmp_path / "good.tif", _ramp((20, 20)))
    far = _write(tmp_path / "far.tif", _ramp((20, 20)), left=600_000)
    nowhere = _write(tmp_path / "nocrs.tif", _ramp((20, 20)), crs=None)
    flat = _write(tmp_path / "notransform.tif", _ramp((20, 20)), transform=None)
    two = _write(tmp_path / "two.tif", np.zeros((2, 20, 20), np.float32))

    def fails(match, error=ValueError, **layers):
        with pytest.raises(error, match=match):
            deepdem.stack({"dsm": good, **layers})

    fails(r"'dsm' and 'lidar_dsm' do not overlap.*bounds='union'", lidar_dsm=far)
    fails(r"'red' .*nocrs.tif.* has no coordinate reference system.*write", red=nowhere)
    fails(r"'red' .*has no geotransform", red=flat)
    fails(r"'red' .*has 2 bands.*\(path, band\)", red=two)
    fails(r"bands 1 to 2, not 3", red=(two, 3))
    fails(r"'red'.*missing.tif could not be opened", FileNotFoundError, red="missing.tif")
    assert deepdem.stack({"dsm": good, "red": (two, 2)}).red.sum() == 0
    with pytest.raises(ValueError, match="like='ortho_left' is no layer"):
        deepdem.stack({"dsm": good}, like="ortho_left")
    with pytest.raises(ValueError, match="not both"):
        deepdem.stack({"dsm": good}, like="dsm", resolution=1)
    with pytest.raises(ValueError, match="without a resolution"):
        deepdem.stack({"dsm": good}, crs=UTM)
    with pytest.raises(ValueError, match="no layer"):
        deepdem.stack({})
    with pytest.raises(ValueError, match="not known: pass one of average, bilinear"):
        deepdem.stack({"dsm": good}, resampling={"dsm": "smooth"})
    with pytest.raises(ValueError, match=r"\['typo'\], which are no layers"):
        deepdem.stack({"dsm": good}, resampling={"typo": "nearest"})
    with pytest.raises(ValueError, match="leave no whole pixel"):
        deepdem.stack({"dsm": good}, like=deepdem.stack({"dsm": good}),
                      bounds=(500_000, 4_599_999.9999, 500_000.0001, 4_600_000))  # fmt: skip


# --- one grid -------------------------------------------------------------------------------------


def _array(box: GeoBox, values=None) -> xr.DataArray:
    values = _analytic(box).astype("float32") if values is None else values
    return xr.DataArray(values, coords=xr_coords(box, always_yx=True), dims=("y", "x"))


def test_a_rotated_raster_is_turned_but_is_no_grid(tmp_path, hilly):
    turned = (Affine.translation(500_100, 4_600_400) @ Affine.rotation(20)) @ Affine.scale(1, -1)
    column, row = np.meshgrid(np.arange(400) + 0.5, np.arange(300) + 0.5)
    x = turned.a * column + turned.b * row + turned.c
    y = turned.d * column + turned.e * row + turned.f
    path = _write(tmp_path / "r.tif", _surface(x, y).astype("float32"), transform=turned)
    ds = deepdem.stack({"dsm": hilly, "lidar_dsm": path}, like="dsm", bounds="union", chunks=100)
    there = ds.lidar_dsm.notnull().values
    assert there.sum() == pytest.approx(400 * 300, rel=0.02)
    truth = _analytic(geobox_of(ds))
    # Bilinear between pixels of a metre on waves of 250 m, and one-sided at the raster's rim.
    inner = ds.lidar_dsm.rolling(y=5, x=5, center=True).mean().notnull().values
    assert np.abs(ds.lidar_dsm.values - truth)[inner].max() < 0.01
    with pytest.raises(ValueError, match=r"rotated or not north-up: pass like= .* resolution="):
        deepdem.stack({"dsm": path})


def test_rows_that_go_north_are_turned_over(tmp_path):
    up = Affine(1, 0, 500_000, 0, 1, 4_599_980)
    path = _write(tmp_path / "s.tif", _ramp((20, 30)), transform=up)
    good = _write(tmp_path / "g.tif", _ramp((20, 30)))
    ascending = deepdem.stack({"dsm": good}).dsm.compute()[::-1]
    assert ascending.y[0] < ascending.y[-1]
    for source in (path, ascending.astype("float64"), ascending.chunk(y=7, x=9), ascending.T):
        ds = deepdem.stack({"dsm": source})  # the grid itself
        assert ds.y[0] > ds.y[-1]
        assert ds.odc.geobox == deepdem.stack({"dsm": good}).odc.geobox
        wanted = _ramp((20, 30)) if source is not path else _ramp((20, 30))[::-1]
        np.testing.assert_array_equal(ds.dsm, wanted)
        other = deepdem.stack({"dsm": good, "red": source})
        np.testing.assert_array_equal(other.red, wanted)
    left = deepdem.stack({"dsm": ascending[:, ::-1]})
    np.testing.assert_array_equal(left.dsm, _ramp((20, 30)))


def test_half_a_pixel_is_said_other_fractions_are_not(tmp_path):
    layers = {"dsm": _write(tmp_path / "a.tif", _ramp((20, 20)))}
    for left, top, axes in ((0.5, 0, "x"), (3, -1.5, "y"), (0.5, 0.5, "x and y")):
        layers["red"] = _write(
            tmp_path / "b.tif", _ramp((20, 20)), left=500_000 + left, top=4_600_000 + top
        )
        with pytest.warns(UserWarning, match=rf"'red' lies half a pixel \({axes}\) off.*gdal_edit"):
            deepdem.stack(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for left, pixel in ((0.3, 1), (1, 1), (0.5, 3), (0.25, 0.5)):
            layers["red"] = _write(
                tmp_path / "b.tif", _ramp((40, 40)), left=500_000 + left, pixel=pixel
            )
            deepdem.stack(layers)


@pytest.mark.parametrize("drift", [1e-9, 1e-6])
def test_drift_in_coordinates_is_tolerated(drift):
    box = GeoBox.from_bbox((500_000, 4_600_000, 508_000, 4_600_020), crs=UTM, resolution=1)
    clean = _array(box, np.arange(20 * 8000, dtype="float32").reshape(20, 8000))
    noise = np.random.default_rng(0).normal(size=8000) * drift
    drifted = clean.assign_coords(x=clean.x + noise, y=clean.y + noise[:20])
    ds = deepdem.stack({"dsm": clean, "red": drifted, "nir": drifted.astype("float64")})
    for name in ds:  # copied, not interpolated
        np.testing.assert_array_equal(ds[name], clean)
    np.testing.assert_array_equal(ds.x, clean.x)
    own = deepdem.stack({"dsm": drifted, "red": clean})  # the grid itself drifts
    np.testing.assert_array_equal(own.red, clean)
    assert np.abs(own.x.values - clean.x.values).max() < 10 * drift


def test_uneven_coordinates_are_refused():
    box = GeoBox.from_bbox((500_000, 4_600_000, 500_040, 4_600_021), crs=UTM, resolution=0.3)
    clean = _array(box)
    single = clean.assign_coords(y=clean.y.astype("float32"))  # to 0.25 m, so far from the equator
    with pytest.raises(ValueError, match=r"'dsm' .*off even ones by up to 0\.\d+ pixels; interp"):
        deepdem.stack({"dsm": single})
    with pytest.raises(ValueError, match="off even ones"):
        deepdem.stack({"dsm": clean.assign_coords(x=clean.x + 0.1 * np.sin(clean.x))})


def test_a_geographic_grid_says_its_pixel_size_in_metres(hilly):
    with pytest.warns(UserWarning, match=r"0.834 m wide and 1.111 m high; its size .* 0.972 m"):
        ds = deepdem.stack({"dsm": hilly}, crs="EPSG:4326", resolution=1e-5)
    assert ds.attrs["pixel_size_m"] == pixel_size(ds) == pytest.approx(0.9725, abs=1e-3)
    inner = (slice(200, -200), slice(200, -200))
    np.testing.assert_allclose(ds.dsm.values[inner], _analytic(geobox_of(ds))[inner], atol=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        equator = GeoBox.from_bbox((0, 0, 1e-3, 1e-3), crs="EPSG:4326", resolution=1e-5)
        deepdem.stack({"dsm": _array(equator, np.zeros(equator.shape, "float32"))})
    assert "pixel_size_m" not in deepdem.stack({"dsm": hilly}).attrs


@pytest.mark.filterwarnings("ignore:the scene's grid is in degrees")
@pytest.mark.parametrize("crs", ["UTM+5773", "3-D UTM", "EPSG:4979", "EPSG:4326+3855"])
def test_compound_and_3d_crss_stay_all_the_way(crs, tmp_path, model):
    world = deepdem.synthetic_scene((96, 80), seed=3).drop_vars(["red", "nir"]).compute()
    flat = world.odc.geobox
    utm = flat.crs.proj
    crs = utm.to_3d() if crs == "3-D UTM" else CRS(crs.replace("UTM", f"EPSG:{utm.to_epsg()}"))
    crs = crs.to_wkt()
    if not CRS(crs).is_projected:
        flat = GeoBox(flat.shape, Affine(1e-5, 0, 3, 0, -1e-5, 45), "EPSG:4326")
    coords = xr_coords(GeoBox(flat.shape, flat.affine, crs), always_yx=True)
    world = world.drop_vars("spatial_ref").assign_coords(coords)
    layers = {str(n): world[n] for n in world if n != "lidar_dtm"}
    level = {**layers, "ortho_left": _array(flat, world.ortho_left.values)}  # horizontal only
    ds = deepdem.stack(level, chunks=50).assign(ndvi=world.dsm * 0)
    np.testing.assert_array_equal(ds.ortho_left, world.ortho_left)  # one grid: copied
    assert geobox_of(ds).crs.proj == CRS(crs)
    ds = ds.deepdem.prepare()
    ds.deepdem.to_zarr(tmp_path / "s.zarr")
    ds = deepdem.open_scene(tmp_path / "s.zarr")
    assert geobox_of(ds).crs.proj == CRS(crs)
    assert ds.rio.transform().almost_equals(flat.affine, 1e-12)
    assert pixel_size(ds) == pixel_size_m(flat)
    refined = ds.deepdem.refine(model).compute()
    assert geobox_of(refined).crs.proj == CRS(crs)
    assert refined.attrs["vertical_reference"] == ds.dsm.attrs["vertical_reference"]
    np.testing.assert_array_equal(refined.notnull(), ds.valid)
    onto = deepdem.stack({"dsm": refined}, crs=crs, resolution=float(flat.resolution.x) * 2)
    assert geobox_of(onto).crs.proj == CRS(crs)


def test_check_scene(scene):
    with pytest.raises(ValueError, match=r"lacks the layers \['red_edge'\]"):
        check_scene(scene, ["red_edge"])
    with pytest.raises(ValueError, match="no CRS"):
        check_scene(scene.drop_vars("spatial_ref"))
    with pytest.raises(ValueError, match=r"has dims \('x', 'y'\), wanted"):
        check_scene(scene.transpose("x", "y"), ["dsm"])
    with pytest.raises(ValueError, match="no pixel"):
        check_scene(scene.isel(x=slice(0, 0)))


@pytest.mark.parametrize(
    ("crs", "bounds", "resolution", "metres"),
    [("EPSG:32631", (5e5, 4e6, 5.001e5, 4.0001e6), 1, 1.0),
     ("EPSG:2994", (6e5, 8e5, 6.01e5, 8.01e5), 1, 0.3048),
     ("EPSG:4326", (0, 60, 0.01, 60.01), 1e-5, (0.5580 + 1.1142) / 2)],
)  # fmt: skip
def test_pixel_size_is_in_metres_on_the_ground(crs, bounds, resolution, metres):
    box = GeoBox.from_bbox(bounds, crs=crs, resolution=resolution)
    assert pixel_size_m(box) == pytest.approx(metres, rel=2e-3)


# --- the real data --------------------------------------------------------------------------------


def test_the_quarry_stacks(data_folder):
    from deepdem.sources.folder import find_layers

    layers = find_layers(data_folder / "stereo_marseille_quarry")
    assert {"dsm", "ortho_1", "ortho_2", "ortho_3", "triangulation_error", "lidar_dsm"} == set(
        layers
    )
    ds = deepdem.stack(layers).deepdem.prepare()
    assert ds.dsm.shape == (1206, 1268)
    assert pixel_size_m(geobox_of(ds)) == pytest.approx(0.5, rel=1e-3)
    assert ds.dsm.attrs["vertical_reference"] == "metres above EGM96 geoid"
    assert float(ds.dsm.notnull().mean()) == pytest.approx(0.65, abs=0.01)
    error = (ds.dsm - ds.lidar_dsm).compute().median()
    assert float(error) == pytest.approx(-2.37, abs=0.01)


@pytest.mark.parametrize("step", [1.0, -1.0])
def test_a_grid_may_begin_at_the_origin(step):
    # Of pixels of one unit: GDAL takes such a transform for none.
    grid = GeoBox((30, 30), Affine(1, 0, 0, 0, step, 0), "EPSG:32631")
    half = GeoBox((30, 30), grid.transform * Affine.translation(0.5, 0.5), grid.crs)
    plane = np.add.outer(np.arange(30.0), np.arange(30.0)).astype(np.float32)
    for source, target, first in ((grid, half, 1.0), (half, grid, 0.0)):
        layer = xr.DataArray(plane, xr_coords(source, always_yx=True), ("y", "x"), name="a")
        for chunks in (10, 30):
            got = regrid(layer.chunk(15), target, resampling="bilinear", chunks=chunks)
            np.testing.assert_allclose(got[5:9, 5:9], plane[5:9, 5:9] + 2 * first - 1, atol=1e-3)

"""Terrain: exact on planes up to the edge, the sun in the right place, chunked equals whole."""

from __future__ import annotations

import math

import dask
import dask.array as da
import numpy as np
import pyproj
import pytest
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from deepdem.grid import ground_steps, pixel_size_m
from deepdem.terrain import hillshade, horn_gradient, slope, steps_m

QUICK = settings(max_examples=25, deadline=None)


def grid(shape, *, pixel=0.5, ascending=False):
    y = 5_000.0 - pixel * np.arange(shape[0])
    return {"y": y[::-1] if ascending else y, "x": 700.0 + pixel * np.arange(shape[1])}


def plane(dz_north, dz_east, *, shape=(8, 9), **options):
    coords = grid(shape, **options)
    z = dz_north * coords["y"][:, None] + dz_east * coords["x"][None]
    return xr.DataArray(z, coords, ("y", "x"))


def rough(shape, *, holes=0.1, seed=0):
    rng = np.random.default_rng(seed)
    z = xr.DataArray(rng.normal(50, 3, shape).astype("float32"), grid(shape), ("y", "x"))
    return z.where(rng.random(shape) >= holes)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "y", "x", "metres"),
    [
        ("EPSG:32610", 5_400_000.0, 500_000.0, 1 / 0.9996),
        ("EPSG:32610+5703", 5_400_000.0, 500_000.0, 1 / 0.9996),
        ("EPSG:3857", 6_274_861.39, -13_000_000.0, math.cos(math.radians(49))),
        ("EPSG:2994", 700_000.0, 650_000.0, 0.3048),
        ("EPSG:27572", 2_200_000.0, 600_000.0, 1 / 0.99987742),  # its longitudes are in grads
        ('LOCAL_CS["site",UNIT["foot",0.3048]]', 0.0, 0.0, 0.3048),
    ],
)
def test_pixels_are_measured_on_the_ground(crs, y, x, metres):
    ref = xr.DataArray(0, attrs={"crs_wkt": pyproj.CRS(crs).to_wkt()})
    z = xr.DataArray(
        np.zeros((3, 3)), {"y": y - np.arange(3.0), "x": x + np.arange(3.0), "spatial_ref": ref},
        ("y", "x"),
    )  # fmt: skip
    step_y, step_x = steps_m(z)
    assert step_y == pytest.approx(-metres, rel=5e-3)
    assert step_x == pytest.approx(metres, rel=5e-3)
    grid = GeoBox((3, 3), Affine(1, 0, x - 0.5, 0, -1, y + 0.5), pyproj.CRS(crs).to_wkt())
    assert pixel_size_m(grid) == pytest.approx((step_x - step_y) / 2, rel=1e-9)


def test_degrees_are_shorter_along_a_parallel():
    utm, lonlat = pyproj.CRS("EPSG:32632"), pyproj.CRS("EPSG:4326")
    dy, dx = ground_steps(lonlat, at=(60.0, 9.0), step=(-1e-5, 1e-5))
    assert dy == pytest.approx(-1.1141, rel=1e-3)
    assert dx == pytest.approx(0.5580, rel=1e-3)
    assert ground_steps(utm, at=(6_650_000, 500_000), step=(2, -2)) == pytest.approx(
        (2 / 0.9996, -2 / 0.9996), rel=1e-6
    )
    assert ground_steps(None, at=(0, 0), step=(-3.0, 4.0)) == (-3, 4)


def test_a_place_off_the_map_is_named():
    with pytest.raises(ValueError, match=r"y=1000000000000.0.*UTM zone 10N.*write_crs"):
        ground_steps(pyproj.CRS("EPSG:32610"), at=(1e12, 1e12), step=(-1, 1))


# --- slope ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("pixel", [0.5, 2.0])
def test_slope_of_a_plane_is_exact_up_to_the_edge_and_beside_holes(pixel, ascending):
    z = plane(0.3, -0.4, shape=(9, 11), pixel=pixel, ascending=ascending).copy()
    z[3, 4] = z[4, 4] = np.nan
    z[0, 0] = np.nan
    got = slope(z.chunk({"y": 4, "x": 5})).compute()
    np.testing.assert_array_equal(got.isnull(), z.isnull())
    assert float(abs(got - math.degrees(math.atan(0.5))).max()) < 1e-6


def test_gradient_is_horns():
    z = np.random.default_rng(0).normal(size=(3, 3))
    (a, b, c), (d, _, f), (g, h, i) = z
    gy, gx = horn_gradient(z, -2.0, 2.0)
    assert gx[1, 1] == pytest.approx(((c + 2 * f + i) - (a + 2 * d + g)) / 16)
    assert gy[1, 1] == pytest.approx(((a + 2 * b + c) - (g + 2 * h + i)) / 16)


@QUICK
@given(
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    chunks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    holes=st.sampled_from([0.0, 0.3]),
)
def test_slope_is_chunk_invariant(shape, chunks, holes):
    z = rough(shape, holes=holes)
    want = slope(z).compute()
    got = slope(z.chunk(dict(zip("yx", chunks, strict=True))))
    assert isinstance(got.data, da.Array)
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_array_equal(got.to_numpy(), want.to_numpy())


def test_one_pixel_has_no_slope():
    with pytest.raises(ValueError, match="at least 2 pixels"):
        slope(rough((1, 5)))


# --- shaded relief -------------------------------------------------------------------------------


@pytest.mark.parametrize("ascending", [False, True])
def test_the_sun_is_in_the_north_west(ascending):
    facing_nw = hillshade(plane(-1, 1, ascending=ascending))  # falls to the north and the west
    facing_se = hillshade(plane(1, -1, ascending=ascending))
    assert float(facing_nw.min()) > 0.95
    assert float(facing_se.max()) < 0.05


@pytest.mark.parametrize("azimuth", range(0, 360, 45))
@pytest.mark.parametrize("pixel", [0.5, 2.0])
def test_a_planes_shade_is_lamberts_cosine(azimuth, pixel):
    north, east, altitude, z_factor = 0.3, -0.2, 40, 1.5
    sun = np.array([
        math.sin(math.radians(azimuth)) * math.cos(math.radians(altitude)),
        math.cos(math.radians(azimuth)) * math.cos(math.radians(altitude)),
        math.sin(math.radians(altitude)),
    ])  # fmt: skip
    normal = np.array([-z_factor * east, -z_factor * north, 1.0])
    got = hillshade(
        plane(north, east, pixel=pixel), azimuth=azimuth, altitude=altitude, z_factor=z_factor
    )
    want = max(0.0, float(sun @ normal / np.linalg.norm(normal)))
    # float32 heights of 1600 m are good to 0.1 mm: 2e-4 of a pixel of 0.5 m.
    np.testing.assert_allclose(got, want, atol=5e-4)


@QUICK
@given(
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    chunks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 1000),
)
def test_hillshade_is_chunk_invariant_and_keeps_no_data(shape, chunks, holes, seed):
    z = rough(shape, holes=holes, seed=seed)
    with dask.config.set(scheduler="synchronous"):
        want = hillshade(z).compute()
        got = hillshade(z.chunk(dict(zip("yx", chunks, strict=True)))).compute()
    xr.testing.assert_identical(got, want)
    np.testing.assert_array_equal(got.isnull(), z.isnull())
    assert got.dtype == np.float32
    assert float(got.fillna(0).min()) >= 0
    assert float(got.fillna(0).max()) <= 1


def test_hillshade_is_lazy_and_keeps_the_grid():
    def boom(*_, **__):
        raise AssertionError("computed")

    z = rough((120, 150)).chunk({"y": 40, "x": 40})
    z = z.assign_coords(spatial_ref=xr.DataArray(0, attrs={"GeoTransform": "…"}))
    with dask.config.set(scheduler=boom):
        shaded = hillshade(z)
        eager_in = hillshade(z.copy(data=np.zeros(z.shape, "float32")))
    assert isinstance(shaded.data, da.Array)
    assert isinstance(eager_in.data, da.Array)
    assert shaded.name == "hillshade"
    assert set(shaded.coords) == {"y", "x", "spatial_ref"}
    assert shaded.attrs["units"] == "1"
    assert shaded.data.chunks == z.data.chunks

"""Derived layers: right values, no nodata anywhere, the same whatever the chunks, and lazy."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import rioxarray  # noqa: F401  registers .rio
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdem.derive import (
    clip_error,
    equalise,
    hls_bands,
    hls_ndvi,
    hls_reflectance,
    ndvi,
    prepare,
    valid_mask,
)
from deepdem.provenance import PROVENANCE

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@contextmanager
def nothing_computes() -> Iterator[None]:
    def scheduler(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed")

    with dask.config.set(scheduler=scheduler):
        yield


def ortho(values: np.ndarray, name: str = "ortho_left") -> xr.DataArray:
    return xr.DataArray(values, dims=("y", "x"), name=name)


def scene(shape: tuple[int, int] = (40, 50), *, orthos: int | str = "pair") -> xr.Dataset:
    rng = np.random.default_rng(1)
    names = {"pair": ["ortho_left", "ortho_right"], "mono": ["ortho_1"], "none": []}
    images = names.get(str(orthos), [f"ortho_{i + 1}" for i in range(9)][: int(orthos == 3) * 3])
    layers = {name: rng.integers(1, 2048, shape) for name in images}
    layers["dsm"] = rng.normal(100, 5, shape)
    layers["triangulation_error"] = rng.uniform(0, 2, shape)
    layers["red"], layers["nir"] = rng.uniform(0.05, 0.4, (2, *shape))
    layers["lidar_dsm"] = np.full(shape, np.nan)
    layers["water_mask"] = np.zeros(shape)
    ds = xr.Dataset(
        {name: (("y", "x"), values.astype(np.float32)) for name, values in layers.items()},
        coords={"y": np.arange(shape[0])[::-1] * 0.5, "x": np.arange(shape[1]) * 0.5},
        attrs={"title": "a scene"},
    )
    return ds.rio.write_crs(32631)


# --- ndvi ---


def test_ndvi_values_and_edges() -> None:
    nan, inf = np.nan, np.inf
    red = ortho(np.array([[0.1, 0.4, 0.0, nan, 0.2, 0.0, -0.1, 0.3, -0.4, inf]]), "red")
    nir = ortho(np.array([[0.3, 0.4, 0.5, 0.3, nan, 0.0, 0.5, -0.1, 0.3, inf]]), "nir")
    got = ndvi(red, nir)
    np.testing.assert_allclose(got.values[0], [0.5, 0, 1, *[nan] * 7], rtol=1e-6)
    assert got.dtype == np.float32
    assert got.name == "ndvi"
    assert got.attrs["units"] == "1"


def test_ndvi_of_unsigned_integers_does_not_wrap() -> None:
    red, nir = (ortho(np.array([[v]], dtype=np.uint16)) for v in (60000, 20000))
    assert float(ndvi(red, nir)[0, 0]) == pytest.approx(-0.5)


def test_ndvi_refuses_two_grids() -> None:
    red = ortho(np.ones((2, 2))).assign_coords(x=[0, 1])
    with pytest.raises(ValueError, match="x"):
        ndvi(red, red.assign_coords(x=[1, 2]))


# --- equalise ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_px": 1},
        {"clip_limit": -0.1},
        {"bins": 1},
        {"percentiles": (99, 1)},
        {"grey_range": (5, 5)},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.*'ortho_left'"):
        equalise(ortho(np.ones((4, 4))), **wrong)
    with pytest.raises(ValueError, match="2 dimensions"):
        equalise(xr.DataArray(np.ones((1, 4, 4)), dims=("band", "y", "x")))


# --- valid ---


def test_valid_mask_is_finite_and_in_range() -> None:
    layers = {
        "dsm": ortho(np.array([[1.0, np.nan, np.inf, 1.0, 1.0, 1.0]])),
        "triangulation_error": ortho(np.array([[0.0, 1.0, 1.0, -1.0, 1.0, 1.0]])),
        "ndvi": ortho(np.array([[-1.0, 1.0, 1.0, 1.0, 1.01, 1.0]])),
        "valid": ortho(np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])),
    }
    got = valid_mask(layers, ["dsm", "triangulation_error", "ndvi"])
    np.testing.assert_array_equal(got.values[0], [True, False, False, False, False, True])
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(valid_mask(layers, ["valid"]).values[0], [True] * 5 + [False])


def test_valid_mask_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"no layer 'ndvi'.*\['dsm'\].*stack it"):
        valid_mask({"dsm": ortho(np.ones((2, 2)))}, ["dsm", "ndvi"])
    with pytest.raises(ValueError, match="no layer is named"):
        valid_mask({"dsm": ortho(np.ones((2, 2)))}, [])


# --- prepare ---


@settings(max_examples=15, deadline=None)
@given(y=st.integers(1, 40), x=st.integers(1, 50), orthos=st.sampled_from(["pair", "mono", 3]))
def test_prepare_chunked_is_prepare_eager(y: int, x: int, orthos: Any) -> None:
    ds = scene(orthos=orthos)
    lazy = prepare(ds.chunk(y=max(y, 5), x=max(x, 5)), equalise_orthos={"tile_px": 16})
    xr.testing.assert_identical(
        lazy.compute(scheduler="sync"), prepare(ds, equalise_orthos={"tile_px": 16})
    )


@pytest.mark.parametrize("orthos", ["pair", "mono", 3, "none"])
@pytest.mark.parametrize("chunked", [True, False])
def test_prepare_twice_is_prepare_once(orthos: Any, chunked: bool) -> None:
    ds = scene(orthos=orthos)
    ds = ds.chunk(y=16) if chunked else ds
    once = prepare(ds, equalise_orthos={"tile_px": 16})
    xr.testing.assert_identical(prepare(once).compute(), once.compute())


def test_prepare_leaves_its_input_alone() -> None:
    ds = scene()
    before = ds.copy(deep=True)
    attrs = {name: dict(ds[name].attrs) for name in ds.variables}
    ds["ortho_left"].encoding = {"dtype": "uint16", "_FillValue": 0, "grid_mapping": "spatial_ref"}
    encoding = dict(ds["ortho_left"].encoding)
    prepare(ds)
    xr.testing.assert_identical(ds, before)
    assert {name: dict(ds[name].attrs) for name in ds.variables} == attrs
    assert ds["ortho_left"].encoding == encoding


def test_prepare_is_lazy_and_its_names_are_deterministic() -> None:
    ds = scene().chunk(y=13, x=17)
    with nothing_computes():
        first, second = prepare(ds), prepare(ds)
        ndvi(ds.red, ds.nir)
        equalise(ds.ortho_left)
        valid_mask(ds, ["dsm"])
        prepare(first)
    for name in ("ortho_left", "ortho_right", "ndvi", "valid"):
        assert first[name].data.name == second[name].data.name
        assert dict(first[name].data.dask).keys() == dict(second[name].data.dask).keys()
    other = prepare(ds, equalise_orthos={"tile_px": 64})
    assert other["ortho_left"].data.name != first["ortho_left"].data.name


def test_attrs_crs_and_encoding_survive() -> None:
    ds = scene()
    ds["ortho_left"].attrs |= {"units": "DN", "_FillValue": 0, "sensor": "P1A"}
    ds["ortho_left"].encoding |= {"dtype": "uint16", "scale_factor": 2.0, "chunks": (8, 8)}
    out = prepare(ds)
    assert out.rio.crs.to_epsg() == 32631
    assert {k: v for k, v in out.attrs.items() if k != PROVENANCE} == ds.attrs
    assert out.attrs[PROVENANCE]["prepare"]["valid_of"][0] == "ortho_left"
    json.dumps(out.attrs)
    for name in ("ortho_left", "ndvi", "valid"):
        assert out[name].rio.crs.to_epsg() == 32631
        assert out[name].rio.grid_mapping == "spatial_ref"
        assert out[name].attrs["units"] == "1"
        assert out[name].attrs["long_name"]
        json.dumps(out[name].attrs)
    left = out["ortho_left"]
    assert left.attrs["sensor"] == "P1A"
    assert "_FillValue" not in left.attrs
    assert left.attrs["equalised"].startswith("clahe tile_px=512 clip_limit=0.01 bins=256")
    # The new values would be destroyed by the old ones' coding.
    assert not {"dtype", "scale_factor"} & left.encoding.keys()
    assert left.encoding["chunks"] == (8, 8)


def test_zarr_gives_back_what_was_prepared(tmp_path: Any) -> None:
    ds = scene().chunk(y=16, x=16)
    ds["ortho_left"].encoding |= {"dtype": "uint16", "_FillValue": 0}
    ds["dsm"][3:6, 4:9] = np.nan
    out = prepare(ds)
    out.to_zarr(tmp_path / "scene.zarr")
    back = xr.open_zarr(tmp_path / "scene.zarr", decode_coords="all")
    for name in out.data_vars:
        np.testing.assert_array_equal(back[name], out[name])
        assert back[name].dtype == out[name].dtype
    xr.testing.assert_identical(prepare(back).compute(), back.compute())


def test_what_counts_in_valid() -> None:
    ds = scene()  # its lidar_dsm is NaN everywhere and its water_mask 0
    ds["red"][0, 0] = np.nan
    ds["triangulation_error"][1, 1] = -5
    ds["ortho_right"][2, 2] = np.nan
    expected = np.ones(ds["dsm"].shape, dtype=bool)
    expected[[0, 1, 2], [0, 1, 2]] = False
    out = prepare(ds)
    np.testing.assert_array_equal(out["valid"], expected)
    assert np.isnan(out["triangulation_error"].values[1, 1])
    given_ndvi = prepare(ds.assign(ndvi=xr.ones_like(ds.red)))  # kept: red's hole is not its own
    assert (given_ndvi["ndvi"] == 1).all()
    assert given_ndvi["valid"].values[0, 0]
    np.testing.assert_array_equal(
        prepare(ds, needs=["dsm", "triangulation_error", "valid"])["valid"].values.sum(),
        40 * 50 - 1,
    )
    assert not prepare(ds, needs=["red"])["valid"].values[0, 0]
    assert not prepare(ds.drop_vars("nir"))["valid"].values[0, 0]


def test_a_valid_that_is_there_counts_as_well() -> None:
    mine = xr.DataArray(np.ones((40, 50)), dims=("y", "x"))
    mine[7, 7] = 0
    mine[8, 8] = np.nan
    out = prepare(scene().assign(valid=mine))
    assert out["valid"].dtype == np.bool_
    assert (~out["valid"]).sum() == 2


def test_missing_and_unfit_needs_are_named() -> None:
    with pytest.raises(ValueError, match=r"'ortho_9'.*ortho_left"):
        prepare(scene(), needs=["dsm", "ortho_9"])
    with pytest.raises(ValueError, match=r"lidar_dsm.*truth"):
        prepare(scene(), needs=["dsm", "lidar_dsm"])
    with pytest.raises(ValueError, match="no layer is named"):
        prepare(scene()[["lidar_dsm"]])


def test_orthos_can_be_left_as_they_are() -> None:
    ds = scene()
    xr.testing.assert_identical(prepare(ds, equalise_orthos=False)["ortho_left"], ds["ortho_left"])


def test_no_chunk_waits_for_the_histograms() -> None:
    """In a store of the whole scene Dask's own order must not hold a layer's chunks."""
    alive, peak, size = 0, 0, 24

    def died() -> None:
        nonlocal alive
        alive -= 1

    def read(block: np.ndarray) -> np.ndarray:
        nonlocal alive, peak
        alive, out = alive + 1, block.copy()
        weakref.finalize(out, died)
        peak = max(peak, alive)
        return out

    ds = scene((size * 8, size * 8)).chunk(size)
    for name in ("dsm", "ortho_left", "ortho_right", "red", "nir", "triangulation_error"):
        ds[name] = ds[name].copy(data=ds[name].data.map_blocks(read, dtype=np.float32))
    out = prepare(ds)
    targets = [np.empty(out.dsm.shape, out[name].dtype) for name in out.data_vars]
    da.store([da.asarray(out[name].data) for name in out.data_vars], targets, scheduler="sync")
    # 64 chunks a layer: any layer held from one pass to the next would show as 64 at once.
    assert peak < 30


def test_import_is_cheap() -> None:
    code = (
        "import sys, deepdem.derive; print({'torch', 'distributed', 'skimage'} & set(sys.modules))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert got.stdout.strip() == "set()"


# --- HLS ---


def test_hls_reflectance_scales_fills_and_bounds() -> None:
    numbers = np.array([[1500, 0, -9999, -10, -2001, 16001, 32767]], dtype=np.int16)
    got = hls_reflectance(ortho(numbers, "red"))
    np.testing.assert_allclose(
        got.values[0], [0.15, 0, *[np.nan], -0.001, *[np.nan] * 3], atol=1e-7
    )
    assert got.dtype == np.float32
    assert got.name == "red"
    # Fill values that a reader has made NaN are NaN, and nothing else changes.
    floats = np.where(numbers == -9999, np.nan, numbers)
    np.testing.assert_array_equal(hls_reflectance(ortho(floats)).values, got.values)
    scaled = ortho(floats * 1e-4)
    scaled.encoding["scale_factor"] = 1e-4
    with pytest.raises(ValueError, match="scaled already"):
        hls_reflectance(scaled)


@pytest.mark.parametrize(
    ("product", "nir"),
    [("L30", "B05"), ("HLSL30_2.0", "B05"), ("hls.s30.t31tfj.2020123T103619.v2.0.B8A", "B8A")],
)
def test_hls_bands_are_those_of_the_product(product: str, nir: str) -> None:
    assert hls_bands(product) == ("B04", nir)


def test_hls_bands_of_what_is_neither() -> None:
    for product in ("LC08", "HLSL30 and HLSS30"):
        with pytest.raises(ValueError, match=r"'L30' \(Landsat\) or 'S30'"):
            hls_bands(product)


def test_hls_ndvi_of_integers_is_lazy_and_right() -> None:
    red = np.array([[1000, -9999, 500, -100, 0]], dtype=np.int16)
    nir = np.array([[3000, 3000, -9999, 3000, 0]], dtype=np.int16)
    with nothing_computes():
        got = hls_ndvi(*(ortho(da.from_array(band, (1, 2))) for band in (red, nir)))
    np.testing.assert_allclose(got.values[0], [0.5, *[np.nan] * 4], rtol=1e-6)


# --- triangulation error, slope, canopy ---


def test_errors_are_clipped_and_filled_as_documented() -> None:
    nan, inf = np.nan, np.inf
    error = ortho(np.array([[0.5, 12.0, -1.0, nan, nan, inf]], dtype=np.float32))
    dsm = ortho(np.array([[1.0, 1.0, 1.0, 1.0, nan, 1.0]], dtype=np.float32))
    got = clip_error(error, dsm, max_m=8)
    np.testing.assert_array_equal(got.values, [[0.5, 8, 8, 8, nan, 8]])
    np.testing.assert_array_equal(clip_error(error, max_m=8).values, [[0.5, 8, nan, nan, nan, 8]])
    assert got.attrs["clipped_at_m"] == 8
    assert got.attrs["units"] == "m"
    with pytest.raises(ValueError, match="max_m=0"):
        clip_error(error, max_m=0)


def test_filled_errors_are_valid_and_others_are_not() -> None:
    ds = scene().chunk(y=16)
    ds["triangulation_error"][0, :3] = [-1, np.nan, 50]
    ds["dsm"][0, 1] = np.nan
    filled = prepare(ds, error_max_m=1.5, fill_error=True)
    np.testing.assert_array_equal(filled["valid"].values[0, :4], [True, False, True, True])
    assert float(filled["triangulation_error"].max()) == 1.5
    clipped = prepare(ds, error_max_m=1.5)
    np.testing.assert_array_equal(clipped["valid"].values[0, :4], [False, False, True, True])
    xr.testing.assert_identical(prepare(clipped, error_max_m=1.5).compute(), clipped.compute())
    with pytest.raises(ValueError, match="error_max_m: pass it too"):
        prepare(ds, fill_error=True)


@settings(max_examples=10, deadline=None)
@given(y=st.integers(5, 40), x=st.integers(5, 50))
def test_slope_and_canopy_are_the_same_in_any_chunks(y: int, x: int) -> None:
    ds = scene(orthos="none").assign(lidar_dtm=lambda d: d.dsm * 0 + 90)
    ds["lidar_dsm"] = ds["dsm"] + 1
    options: Any = {"add": ["slope", "canopy_height"], "error_max_m": 1}
    eager = prepare(ds, **options)
    with nothing_computes():
        lazy = prepare(ds.chunk(y=y, x=x), **options)
    xr.testing.assert_identical(lazy.compute(scheduler="sync"), eager)
    np.testing.assert_allclose(eager["canopy_height"], ds["dsm"] - 89, rtol=1e-6)
    assert eager["slope"].attrs["units"] == "degree"
    assert eager["slope"].dtype == np.float32


def test_canopy_height_never_counts_in_valid() -> None:
    ds = scene().assign(lidar_dtm=lambda d: d.lidar_dsm)  # NaN everywhere
    assert prepare(ds, add="canopy_height")["valid"].values.all()
    with pytest.raises(ValueError, match=r"canopy_height.*truth"):
        prepare(ds, add=["canopy_height"], needs=["dsm", "canopy_height"])


def test_what_cannot_be_added_is_named() -> None:
    with pytest.raises(ValueError, match=r"'canopy_height'.*lacks \['lidar_dtm'\]"):
        prepare(scene(), add=["canopy_height"])
    with pytest.raises(ValueError, match=r"add='aspect'.*canopy_height"):
        prepare(scene(), add=["aspect"])

"""Statistics of a scene: right, the same whatever the chunks, in one pass, and kept with it."""

from __future__ import annotations

import json
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import deepdem
from deepdem.chips import dsm_scale
from deepdem.statistics import (
    CHIP_SIZES,
    STATISTICS,
    Histogram,
    LayerSummary,
    plan_statistics,
    stored_statistics,
    summarise,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@st.composite
def floats(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["normal", "integers", "tiny", "wide", "constant", "one"]))
    n = draw(st.integers(1, 500))
    values = {
        "normal": rng.normal(1500, 300, n),
        "integers": rng.integers(-50, 2047, n),
        "tiny": rng.normal(0, 1e-30, n),
        "wide": rng.normal(size=n) * 10.0 ** rng.integers(-20, 20, n),
        "constant": np.full(n, -7.25),
        "one": rng.normal(size=1),
    }[kind]
    return values.astype(np.float32)


@given(values=floats(), cut=st.floats(0, 1))
def test_histograms_add_up_and_give_quantiles(values: np.ndarray, cut: float) -> None:
    whole = Histogram.of(values)
    at = int(cut * values.size)
    merged = Histogram.merge([Histogram.of(values[:at]), Histogram.of(values[at:])])
    np.testing.assert_array_equal(whole.keys, merged.keys)
    np.testing.assert_array_equal(whole.counts, merged.counts)
    assert (merged.low, merged.high, merged.count) == (values.min(), values.max(), values.size)
    q = np.linspace(0, 1, 11)
    got = whole.quantiles(list(q))
    order = np.sort(values.astype(np.float64))
    # Between the values that enclose the rank, give or take a bin's width.
    below = order[np.clip(np.floor(q * (values.size - 1)).astype(int) - 1, 0, None)]
    above = order[np.clip(np.ceil(q * values.size).astype(int), None, values.size - 1)]
    slack = 1e-3 * np.abs(got) + 1e-38
    assert (got >= below - slack).all()
    assert (got <= above + slack).all()
    assert whole.below(np.array([-np.inf, np.inf]))[1] == values.size


def test_quantiles_are_within_a_2048th() -> None:
    values = np.random.default_rng(0).normal(1500, 40, 100_000).astype(np.float32)
    q = [0.01, 0.05, 0.5, 0.95, 0.99]
    np.testing.assert_allclose(
        Histogram.of(values).quantiles(q), np.quantile(values, q), atol=1500 / 2048
    )
    assert np.isnan(Histogram.of(values[:0]).quantiles(q)).all()


def test_moments_merge() -> None:
    values = np.random.default_rng(0).normal(3000, 0.2, (40, 50)).astype(np.float32)
    values[3, :9] = np.nan
    place = slice(0, 40), slice(0, 50)
    parts = [summarise(values[a:b], place) for a, b in ((0, 1), (1, 17), (17, 17), (17, 40))]
    for summary in (summarise(values, place), LayerSummary.merge(parts)):
        assert (summary.pixels, summary.count) == (2000, 1991)
        exact = values.astype(np.float64)
        assert summary.mean == pytest.approx(np.nanmean(exact), rel=1e-9)
        assert np.sqrt(summary.m2 / summary.count) == pytest.approx(np.nanstd(exact), rel=1e-5)


def rough(shape: tuple[int, int]) -> xr.Dataset:
    rng = np.random.default_rng(2)
    dsm = 900 + rng.normal(size=shape).cumsum(0).cumsum(1) / 20
    dsm[: shape[0] // 3, 10:90] = np.nan
    ds = xr.Dataset(
        {
            "dsm": (("y", "x"), dsm.astype(np.float32)),
            "ortho_left": (("y", "x"), rng.integers(0, 2047, shape).astype(np.float32)),
            "lidar_dsm": (("y", "x"), np.full(shape, np.nan, np.float32)),
            "valid": (("y", "x"), np.isfinite(dsm)),
        },
        coords={"y": np.arange(shape[0])[::-1] + 0.5, "x": np.arange(shape[1]) + 0.5},
    )
    return ds.rio.write_crs(32631)


@given(y=st.integers(1, 330), x=st.integers(1, 300))
def test_any_chunks_give_the_same_statistics(y: int, x: int) -> None:
    ds = rough((333, 305))
    whole = plan_statistics(ds.chunk(y=-1, x=-1), pixel_size_m=1.0).compute(scheduler="sync")
    cut = plan_statistics(ds.chunk(y=max(y, 20), x=max(x, 20)), pixel_size_m=1.0)
    same(cut.compute(scheduler="sync"), whole)


def same(one: Any, two: Any) -> None:
    """Equal to the six digits that are said; the last may round the other way."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=2e-6)
    else:
        assert one == two


def test_what_is_said_is_what_numpy_says() -> None:
    ds = rough((333, 305))
    found = plan_statistics(ds.chunk(y=100, x=70), pixel_size_m=2.0).compute()
    assert json.loads(json.dumps(found)) == found
    dsm = ds["dsm"].values.astype(np.float64)
    layer = found["layers"]["dsm"]
    assert layer["mean"] == pytest.approx(np.nanmean(dsm), rel=1e-5)
    assert layer["std"] == pytest.approx(np.nanstd(dsm), rel=1e-5)
    assert layer["min"] == pytest.approx(np.nanmin(dsm), rel=1e-5)
    assert layer["share"] == pytest.approx(np.isfinite(dsm).mean(), rel=1e-5)
    assert layer["percentiles"]["95"] == pytest.approx(np.nanpercentile(dsm, 95), rel=1e-3)
    assert found["valid"] == layer["share"]
    empty = found["layers"]["lidar_dsm"]
    assert empty["share"] == 0
    assert empty["mean"] is empty["std"] is empty["percentiles"]["50"] is None
    assert found["pixel_size_m"] == 2.0


@pytest.mark.parametrize("shape", [(333, 305), (256, 256), (64, 100), (50, 300)])
def test_dsm_scales_are_those_of_chips(shape: tuple[int, int]) -> None:
    ds = rough(shape)
    found = plan_statistics(ds.chunk(y=100, x=70), pixel_size_m=1.0).compute()
    fitting = [size for size in CHIP_SIZES if size <= min(shape)]
    assert [int(size) for size in found.get("dsm_scale", {})] == fitting
    for size in fitting:
        assert found["dsm_scale"][str(size)] == pytest.approx(dsm_scale(ds, size=size), rel=1e-4)


def test_a_plane_s_scale_is_known() -> None:
    ds = rough((1100, 1100))
    ds["dsm"] = (ds["dsm"] * 0).fillna(0) + 2000 + 0.1 * ds["x"]
    found = plan_statistics(ds.chunk(500), pixel_size_m=1.0).compute()
    for size in CHIP_SIZES:
        std = 0.1 * np.sqrt((size**2 - 1) / 12)
        assert found["dsm_scale"][str(size)] == pytest.approx(std, rel=1e-3)


def test_to_zarr_reads_once_and_keeps_what_it_found(tmp_path: Any) -> None:
    ds, reads = rough((300, 300)), []

    def read(block: np.ndarray) -> np.ndarray:
        reads.append(1)
        return block

    source = da.from_array(ds["dsm"].values, 100, inline_array=True)
    lazy = ds.chunk(100).assign(
        dsm=ds["dsm"].copy(data=da.map_blocks(read, source, meta=np.empty((0, 0), np.float32)))
    )
    lazy.deepdem.to_zarr(tmp_path / "s.zarr", group="a")
    assert len(reads) == 9
    back = deepdem.open_scene(tmp_path / "s.zarr", "a")
    found = stored_statistics(back)
    assert found is not None
    same(found, plan_statistics(ds, pixel_size_m=found["pixel_size_m"]).compute())
    assert stored_statistics(back.isel(x=slice(1, None))) is None
    assert stored_statistics(back.isel(y=slice(0, 200))) is None
    assert stored_statistics(ds) is None
    # Written again in part, the part's own.
    back.isel(y=slice(0, 200)).deepdem.to_zarr(tmp_path / "s.zarr", group="b")
    again = deepdem.open_scene(tmp_path / "s.zarr", "b")
    assert stored_statistics(again) is not None
    assert again.attrs[STATISTICS]["shape"] == [200, 300]


def test_what_is_no_layer_is_written_too(tmp_path: Any) -> None:
    ds = rough((70, 60)).chunk(30)
    ds["pair"] = xr.concat([ds["dsm"], ds["dsm"] + 1], "band").chunk(band=1)
    ds["count"] = ((), 3)
    ds.deepdem.to_zarr(tmp_path / "s.zarr", group="a")
    back = deepdem.open_scene(tmp_path / "s.zarr", "a")
    xr.testing.assert_equal(back[["pair", "count"]].compute(), ds[["pair", "count"]].compute())
    assert list(back.attrs[STATISTICS]["layers"]) == ["dsm", "ortho_left", "lidar_dsm", "valid"]
    ds[["pair"]].deepdem.to_zarr(tmp_path / "s.zarr", group="b")
    pair = deepdem.open_scene(tmp_path / "s.zarr", "b")
    xr.testing.assert_equal(pair.pair.compute(), ds.pair.compute())
    assert STATISTICS not in pair.attrs

"""Statistics: chunked equals NumPy, the same pixels for all, one pass, no silent alignment."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dask.callbacks import Callback
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdem.evaluate import METRICS, Summary, evaluate, slope

QUICK = settings(max_examples=25, deadline=None)


def scene(shape=(40, 50), *, seed=0, holes=0.1, chunks=None, pixel=0.5, origin=(4_000.0, 500.0)):
    rng = np.random.default_rng(seed)
    truth = rng.normal(100, 20, shape).astype(np.float32)
    dsm = truth + rng.standard_t(2, shape).astype(np.float32)
    refined = truth + rng.normal(0.1, 0.5, shape).astype(np.float32)
    for array in (truth, dsm, refined):
        array[rng.random(shape) < holes] = np.nan
    arrays = {"lidar_dsm": truth, "dsm": dsm, "refined": refined, "valid": rng.random(shape) > 0.1}
    ds = xr.Dataset(
        {name: (("y", "x"), array) for name, array in arrays.items()},
        coords={
            "y": origin[0] - pixel * np.arange(shape[0]),
            "x": origin[1] + pixel * np.arange(shape[1]),
        },
    )
    ds = ds if chunks is None else ds.chunk(dict(zip("yx", chunks, strict=True)))
    return ds.drop_vars("refined"), ds["refined"]


def by_numpy(e):
    """The definitions, once more and as plainly as they can be written."""
    middle = np.median(e)
    return {
        "count": e.size,
        "bias": e.mean(),
        "median": middle,
        "MAE": np.abs(e).mean(),
        "RMSE": np.sqrt((e**2).mean()),
        "MedAE": np.median(np.abs(e)),
        "NMAD": 1.4826 * np.median(np.abs(e - middle)),
        "LE90": np.quantile(np.abs(e), 0.9),
        "LE95": np.quantile(np.abs(e), 0.95),
    }


EXACT = ("count", "bias", "MAE", "RMSE")


def assert_matches(row, e):
    for metric, want in by_numpy(e).items():
        # The promise: 0.3 mm for quantiles, 0.9 mm for NMAD up to 20 m, relative beyond.
        atol = 1e-9 if metric in EXACT else 9e-4 if metric == "NMAD" else 3e-4
        rtol = 1e-9 if metric in EXACT else 3e-5
        assert row[metric] == pytest.approx(want, abs=atol, rel=rtol), metric


def errors_of(ds, surface, others):
    stacked = [np.asarray(a, np.float64) for a in (ds["lidar_dsm"], surface, *others)]
    together = np.logical_and.reduce([np.isfinite(a) for a in stacked]) & ds["valid"].to_numpy()
    return (stacked[1] - stacked[0])[together]


@QUICK
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    chunks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    refined_chunks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    holes=st.sampled_from([0.0, 0.2, 0.7]),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_numpy(shape, chunks, refined_chunks, holes, seed):
    ds, refined = scene(shape, seed=seed, holes=holes)
    lazy, lazy_refined = (
        obj.chunk(dict(zip("yx", c, strict=True)))
        for obj, c in ((ds, chunks), (refined, refined_chunks))
    )
    with dask.config.set(scheduler="synchronous"):
        table = evaluate(lazy, lazy_refined)
        eager = evaluate(ds, refined)
    assert list(table.index) == ["dsm", "refined"]
    np.testing.assert_allclose(table, eager, rtol=1e-10, atol=1e-10)
    for name, surface, other in (("dsm", ds["dsm"], refined), ("refined", refined, ds["dsm"])):
        e = errors_of(ds, surface, [other])
        if e.size:
            assert_matches(table.loc[name], e)
        else:
            assert table.loc[name, "count"] == 0


@QUICK
@given(
    errors=st.lists(st.floats(-1e4, 1e4, allow_subnormal=False), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_summaries_merge_and_keep_the_stated_accuracy(errors, cuts):
    e = np.array(errors)
    parts = np.split(e, sorted(min(c, e.size) for c in cuts))
    merged = Summary.merge(Summary.of(p, wanted=p.size, covered=p.size) for p in parts)
    assert merged.counts.sum() == merged.count == merged.wanted == e.size
    exact = by_numpy(e)
    row = {metric: f(merged) for metric, f in METRICS.items()}
    scale = np.abs(e).max()
    bin_half = 2e-4 * math.hypot(1, scale / 20)
    for metric, want in exact.items():
        atol = {"NMAD": 2 * 1.4826 * bin_half}.get(metric, bin_half)
        atol = 1e-12 * (1 + scale) * e.size if metric in EXACT else 1.001 * atol
        assert row[metric] == pytest.approx(want, rel=1e-12, abs=atol), metric


def test_moments_do_not_cancel_far_from_zero():
    e = 1e7 + np.random.default_rng(0).normal(0, 1e-3, 10_000)
    merged = Summary.merge(Summary.of(p, wanted=0, covered=0) for p in np.split(e, 50))
    assert merged.m2 / merged.count == pytest.approx(e.var(), rel=1e-6)


def test_a_perfect_surface_has_no_error_at_all():
    ds, _ = scene(holes=0)
    row = evaluate(ds, ds["lidar_dsm"].rename("refined")).loc["refined"]
    assert (row.drop(["count", "coverage"]) == 0).all()


def test_no_surface_wins_by_leaving_out_pixels():
    ds, refined = scene(holes=0)
    hard = np.abs(ds["dsm"] - ds["lidar_dsm"]) > 1
    table = evaluate(ds, {"honest": refined, "coward": ds["dsm"].where(~hard)})
    assert list(table.index) == ["dsm", "honest", "coward"]
    assert table["count"].nunique() == 1
    assert table.loc["dsm", "MAE"] == table.loc["coward", "MAE"]
    assert table.loc["dsm", "coverage"] == 1
    usable = ds["valid"].to_numpy()
    assert table.loc["coward", "coverage"] == pytest.approx((~hard.to_numpy())[usable].mean())
    assert table.attrs["compared_pixels"] == table["count"].iloc[0]
    assert table.attrs["truth_pixels"] == usable.sum()


def test_what_refined_may_be():
    ds, refined = scene()
    want = evaluate(ds, refined)
    for same in (refined.rename(None), refined.to_dataset(), {"refined": refined}, refined.T):
        assert evaluate(ds, same).equals(want)
    assert list(evaluate(ds, refined.rename("other")).index) == ["dsm", "other"]
    assert list(evaluate(ds, refined, baseline=None).index) == ["refined"]
    with pytest.raises(ValueError, match="two surfaces are called 'dsm'"):
        evaluate(ds, refined.rename("dsm"))
    with pytest.raises(ValueError, match="got ndarray"):
        evaluate(ds, refined.to_numpy())


@pytest.mark.parametrize(
    ("misplace", "what"),
    [
        (lambda r: r.assign_coords(x=r.x + 0.25), "0.5 pixels off.*'x'"),
        (lambda r: r.assign_coords(y=r.y[::-1].to_numpy()), "off the scene along 'y'"),
        (lambda r: r.isel(y=slice(1, None)), "'y': 39.*'y': 40.*stack"),
        (lambda r: r.expand_dims(band=1), "band"),
    ],
)
def test_another_grid_is_an_error_and_never_an_inner_join(misplace, what):
    ds, refined = scene()
    with pytest.raises(ValueError, match=what):
        evaluate(ds, misplace(refined))


def test_grids_may_differ_by_rounding():
    ds, refined = scene()
    assert evaluate(ds, refined.assign_coords(x=refined.x + 1e-5)).equals(evaluate(ds, refined))


def test_missing_layers_are_named():
    ds, refined = scene()
    for wrong in ({"truth": "lidar"}, {"baseline": "asp"}, {"mask": "water_mask"}, {"by": "soil"}):
        (name,) = wrong.values()
        with pytest.raises(ValueError, match=f"no layer '{name}'.*lidar_dsm"):
            evaluate(ds, refined, **wrong)


def test_masks():
    ds, refined = scene()
    everywhere = evaluate(ds, refined, mask=None)
    assert evaluate(ds.drop_vars("valid"), refined).equals(everywhere)
    assert everywhere["count"].iloc[0] > evaluate(ds, refined)["count"].iloc[0]
    as_float = ds.assign(own_mask=ds["valid"].astype("float32").where(ds["valid"]))
    assert evaluate(as_float, refined, mask="own_mask").equals(evaluate(ds, refined))


def test_nothing_to_compare_is_nan_without_a_warning():
    ds, refined = scene()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = evaluate(ds.assign(lidar_dsm=ds["lidar_dsm"] * np.nan), refined, by="slope")
    assert (table["count"] == 0).all()
    assert table.drop(columns="count").isna().all(axis=None)
    assert table["count"].dtype.kind == "i"


def test_computes_once_and_nothing_before():
    ds, refined = scene(chunks=(16, 16))
    calls = []

    def scheduler(dsk, keys, **kwargs):
        calls.append(keys)
        return dask.get(dsk, keys, **kwargs)

    with dask.config.set(scheduler=scheduler):
        slope(ds["lidar_dsm"])
        assert not calls
        evaluate(ds, refined, by="slope")
    assert len(calls) == 1


def test_every_chunk_is_read_once_and_nothing_is_mutated():
    ds, refined = scene(chunks=(16, 16))
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"])
        return block

    counted = refined.copy(data=refined.data.map_blocks(read, dtype=refined.dtype))
    before, before_refined = ds.copy(deep=True), refined.copy(deep=True)
    evaluate(ds, counted)
    assert sorted(reads) == sorted(itertools.product(range(3), range(4)))
    xr.testing.assert_identical(ds, before)
    xr.testing.assert_identical(refined, before_refined)


@pytest.mark.parametrize(("by", "chunks"), [(None, 4), ("slope", 9 * 16)])
def test_memory_is_a_few_chunks_or_rows_of_chunks_and_not_the_rasters(by, chunks):
    """Of 16 x 16 chunks in each of three rasters: how many lie in Dask's cache at most."""

    class Source:
        ndim, dtype = 2, np.dtype("float32")

        def __init__(self, seed):
            self.seed, self.shape = seed, (512, 512)

        def __getitem__(self, where):
            shape = [s.stop - s.start for s in where]
            return np.random.default_rng(self.seed).integers(0, 9, shape).astype("float32")

    ds, _ = scene((512, 512))
    layers = {
        name: da.from_array(Source(i), chunks=32, asarray=False, name=f"source-{name}")
        for i, name in enumerate(("lidar_dsm", "dsm", "refined"))
    }
    lazy = xr.Dataset({n: (("y", "x"), a) for n, a in layers.items()}, {"y": ds.y, "x": ds.x})
    peak = 0

    def measure(_key, _value, _dsk, state, _worker):
        nonlocal peak
        arrays = [v for v in state["cache"].values() if isinstance(v, np.ndarray)]
        owners = [v if v.base is None else v.base for v in arrays]  # a view keeps all of it alive
        peak = max(peak, sum({id(v): v.nbytes for v in owners}.values()))

    with dask.config.set(scheduler="synchronous"), Callback(posttask=measure):
        evaluate(lazy[["lidar_dsm", "dsm"]], lazy["refined"], by=by)
    assert peak <= chunks * 32 * 32 * 4


def test_the_summary_of_a_chunk_is_small():
    e = np.random.default_rng(0).normal(0, 2, 2_000_000)
    summary = Summary.of(e, wanted=e.size, covered=e.size)
    assert summary.bins.nbytes + summary.counts.nbytes < e.nbytes / 20


# --- strata --------------------------------------------------------------------------------------


def strata_scene(chunks=None):
    ds, refined = scene((60, 70), chunks=chunks)
    smooth = 100 + 8 * np.sin(ds.x / 3) * np.cos(ds.y / 4)
    shape = ds["dsm"].shape
    rng = np.random.default_rng(1)
    ds = ds.assign(
        lidar_dsm=smooth.transpose("y", "x").astype("float32").where(ds["lidar_dsm"].notnull()),
        ndvi=(("y", "x"), rng.uniform(-1, 1, shape).astype("float32")),
        classes=(("y", "x"), rng.integers(2, 5, shape)),
        water=(("y", "x"), rng.random(shape) > 0.5),
    )
    canopy = (("y", "x"), rng.choice([-0.1, 1, 5, 15, 30], shape).astype("float32"))
    ds["lidar_dtm"] = ds["lidar_dsm"] - xr.DataArray(canopy[1], dims=("y", "x"))
    return (ds if chunks is None else ds.chunk(dict(zip("yx", chunks, strict=True)))), refined


@pytest.mark.parametrize(
    ("by", "labels"),
    [
        ("slope", ["0 to 5", "5 to 10", "10 to 20", "20 to 40", "40 to 90"]),
        ("ndvi", ["-1 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 1"]),
        ("canopy", ["below 2", "2 to 10", "10 to 20", "20 and more"]),
        ("classes", ["2", "3", "4"]),
        ("water", ["False", "True"]),
        (("ndvi", (-1, 0, 0.5)), ["-1 to 0", "0 to 0.5", "unclassified"]),
        (("slope", [0, 90]), ["0 to 90"]),
    ],
)
def test_strata_add_up_to_all(by, labels):
    ds, refined = strata_scene(chunks=(25, 30))
    table = evaluate(ds, refined, by=by)
    assert table.index.names == ["stratum", "surface"]
    assert list(table.index.get_level_values("stratum").unique()) == ["all", *labels]
    counts = table["count"].unstack("stratum")
    assert (counts.drop(columns="all").sum(axis=1) == counts["all"]).all()
    assert (counts > 0).all(axis=None)
    whole = evaluate(ds, refined)
    np.testing.assert_allclose(table.loc["all"], whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        table, evaluate(ds.compute(), refined.compute(), by=by), rtol=1e-10, atol=1e-10
    )


def test_a_stratum_holds_its_own_pixels():
    ds, refined = strata_scene()
    table = evaluate(ds, refined, by="classes")
    for code in (2, 3, 4):
        part = ds.assign(valid=ds["valid"] & (ds["classes"] == code))
        assert_matches(
            table.loc[(str(code), "refined")], errors_of(part, refined, [ds["dsm"]])
        )  # fmt: skip
    edges = evaluate(ds, refined, by=("ndvi", [-1, 0.2, 1]))
    part = ds.assign(valid=ds["valid"] & (ds["ndvi"] < 0.2))
    assert_matches(edges.loc[("-1 to 0.2", "refined")], errors_of(part, refined, [ds["dsm"]]))


def test_by_may_be_an_array_of_the_users_own():
    ds, refined = strata_scene()
    own = ds["classes"].rename("soil")
    assert evaluate(ds, refined, by=own).equals(evaluate(ds, refined, by="classes"))
    assert evaluate(ds, refined, by=(ds["ndvi"], [-1, 1])).attrs["by"] == "ndvi"
    with pytest.raises(ValueError, match="off the scene"):
        evaluate(ds, refined, by=own.assign_coords(x=own.x + 1))


def test_strata_that_cannot_be():
    ds, refined = strata_scene()
    with pytest.raises(ValueError, match=r"by='dsm' has dtype float32.*by=\('dsm', \["):
        evaluate(ds, refined, by="dsm")
    with pytest.raises(ValueError, match="ascend"):
        evaluate(ds, refined, by=("ndvi", [1, 0]))
    with pytest.raises(ValueError, match="lidar_dtm"):
        evaluate(ds.drop_vars("lidar_dtm"), refined, by="canopy")


def test_attrs_are_json_safe():
    ds, refined = strata_scene()
    for by in (None, "slope", ("ndvi", np.array([0.0, 1.0]))):
        attrs = evaluate(ds, refined, by=by).attrs
        assert json.loads(json.dumps(attrs)) == attrs
        assert attrs["units"] == "m"

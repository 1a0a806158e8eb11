"""Figures carry what they promise, and read it once."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import dask
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Text

from deepdem.evaluate import evaluate
from deepdem.plot import compare, hillshade, plot

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def grid(shape, *, pixel=0.5, ascending=False):
    y = 5_000.0 - pixel * np.arange(shape[0])
    return {"y": y[::-1] if ascending else y, "x": 700.0 + pixel * np.arange(shape[1])}


def plane(dz_north, dz_east, *, shape=(8, 9), **options):
    coords = grid(shape, **options)
    z = dz_north * coords["y"][:, None] + dz_east * coords["x"][None]
    return xr.DataArray(z, coords, ("y", "x"))


def town(shape=(120, 150), *, seed=0, chunks=None):
    """Blocks of houses on a slope, seen badly by stereo, better by a refinement."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    ground = 200 + 0.02 * x
    truth = ground + 9.0 * ((y // 20 % 2 == 1) & (x // 25 % 2 == 1))
    blur = sum(np.roll(truth, s, a) for a in (0, 1) for s in range(-4, 5)) / 18
    dsm = blur + rng.normal(0, 1.0, shape)
    dsm[5:15, 5:15] = np.nan
    layers = {
        "dsm": dsm,
        "ortho_left": rng.integers(100, 900, shape),
        "triangulation_error": rng.gamma(2, 0.2, shape),
        "ndvi": rng.uniform(-0.2, 0.8, shape),
        "lidar_dsm": truth,
        "lidar_dtm": ground,
    }
    ds = xr.Dataset(
        {name: (("y", "x"), a.astype("float32")) for name, a in layers.items()}, grid(shape)
    )
    ds["valid"] = ds["dsm"].notnull()
    ds = ds if chunks is None else ds.chunk(chunks)
    return ds, (0.2 * ds["dsm"] + 0.8 * ds["lidar_dsm"]).rename("refined")


def texts(figure):
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


# --- figures -------------------------------------------------------------------------------------


def test_plot_shows_every_layer_with_title_and_axes():
    ds, _ = town()
    figure = plot(ds)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert len(titles) == len(ds.data_vars)
    assert titles[0] == "Initial stereo digital surface model"
    assert {"Easting [m]", "Northing [m]"} <= set(texts(figure))
    extent = figure.axes[0].images[0].get_extent()
    assert extent[0] == pytest.approx(float(ds.x[0]) - 0.25)
    assert extent[3] == pytest.approx(float(ds.y[0]) + 0.25)
    assert len(plot(ds, layers=["ndvi"]).axes) == 2  # the map and its colour bar


def test_plot_of_a_large_scene_is_in_kilometres_and_thinned():
    ds = xr.Dataset({"dsm": plane(0.1, 0.1, shape=(90, 300), pixel=10.0)})
    figure = plot(ds, max_px=100)
    assert "Easting [km]" in texts(figure)
    assert figure.axes[0].images[0].get_array().shape[:2] == (30, 100)


def test_heights_share_one_scale():
    ds, _ = town()
    bars = [ax for ax in plot(ds, layers=["dsm", "lidar_dsm", "lidar_dtm"]).axes if not ax.images]
    ranges = {ax.get_ylim() for ax in bars if ax.get_ylabel() == "m"}
    assert len(ranges) == 1


def test_compare_has_one_symmetric_scale_for_all_errors():
    ds, refined = town()
    figure = compare(ds, refined)
    errors = [ax.images[0] for ax in figure.axes if "− truth" in ax.get_title(loc="left")]
    assert len(errors) == 2
    limits = {image.get_clim() for image in errors}
    assert len(limits) == 1
    ((low, high),) = limits
    assert low == -high
    assert {image.get_cmap().name for image in errors} == {"RdBu_r"}
    assert "error: surface − lidar_dsm [m]" in texts(figure)


def test_compare_tells_the_statistics_of_evaluate():
    ds, refined = town()
    table = evaluate(ds, refined)
    legend = [t for t in texts(compare(ds, refined, max_px=40)) if "NMAD" in t and ":" in t]
    for name, title in (("dsm", "Initial DSM"), ("refined", "Refined")):
        row = table.loc[name]
        assert f"{title}: MAE {row.MAE:.2f}, NMAD {row.NMAD:.2f} m" in legend


def test_compare_zooms_into_a_large_scene_or_a_given_window():
    ds, refined = town()
    assert _rows(compare(ds, refined)) == 1
    figure = compare(ds, refined, window=(slice(20, 60), slice(30, 100)))
    assert _rows(figure) == 2
    zoom = next(ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[0] == 40)
    assert zoom.get_xlim() == pytest.approx((700 + 15 - 0.25, 700 + 50 - 0.25))
    large = town((500, 450))
    assert _rows(compare(*large)) == 2
    with pytest.raises(ValueError, match="fewer than 2 x 2"):
        compare(ds, refined, window=(slice(200, 300), slice(0, 50)))


def _rows(figure):
    """The rows of shaded relief: those whose images are RGBA."""
    reliefs = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 3]
    return len({round(ax.get_position().y0, 3) for ax in reliefs})


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["ortho_right", "ortho_left"], ["Left orthoimage", "Right orthoimage"]),
        (["ortho_10", "ortho_2", "ortho_1"], ["Orthoimage 1", "Orthoimage 2"]),
        (["ortho_left"], ["Orthoimage"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("window", [None, (slice(20, 60), slice(30, 100))])
def test_compare_shows_two_orthoimages(names, titles, window):
    ds, refined = town()
    image = ds["ortho_left"]
    ds = ds.drop_vars("ortho_left").assign({name: image + len(name) for name in names})
    figure = compare(ds, refined, window=window)
    assert sorted(t for t in texts(figure) if "rthoimage" in t) == titles
    assert "Statistics of the same" in " ".join(texts(figure))
    shown = {ax.get_title(loc="left"): ax for ax in figure.axes}
    if len(names) > 1:
        first, second = (shown[title] for title in titles)
        assert first.get_position().x0 == second.get_position().x0
        assert second.get_position().y1 == pytest.approx(
            shown["Refined − truth\n" + _legend(ds, refined)].get_position().y1
        )
        assert first.get_xlim() == second.get_xlim()
        assert len(first.patches) == len(second.patches) == (window is not None)


def _legend(ds, refined):
    row = evaluate(ds, refined).loc["refined"]
    return f"MAE {row.MAE:.2f}, RMSE {row.RMSE:.2f} m"


def test_compare_without_an_orthoimage_and_with_more_surfaces():
    ds, refined = town()
    without = ds.drop_vars("ortho_left")
    titles = {ax.get_title(loc="left") for ax in compare(without, refined).axes}
    assert "Orthoimage" not in titles
    figure = compare(ds, {"unet": refined, "median_filter": ds["dsm"]})
    assert sum("− truth" in ax.get_title(loc="left") for ax in figure.axes) == 3
    assert "Median filter" in {ax.get_title(loc="left") for ax in figure.axes}


@pytest.mark.parametrize("ascending", [False, True])
def test_no_text_lies_over_another(ascending):
    ds, refined = town((450, 500))
    if ascending:
        ds, refined = ds.isel(y=slice(None, None, -1)), refined.isel(y=slice(None, None, -1))
    many = {"refined": refined, "median_filter": refined}
    two = ds.assign(ortho_right=ds["ortho_left"])
    none = ds.drop_vars("ortho_left")
    first = ["valid", "triangulation_error", "lidar_dsm", "ndvi", "dsm"]
    long = ds["ndvi"].assign_attrs(long_name="width of the widest window wherever we walked " * 3)
    figures = [
        plot(ds), plot(ds, layers=first), plot(ds.isel(x=slice(150)), layers=first),
        plot(ds.assign(a=long, b=long, c=long == 1).isel(y=slice(150)), layers=["c", "a", "b"]),
        compare(ds, refined), compare(ds, many), compare(two, refined), compare(two, many),
        compare(none, refined), compare(none, many),
    ]  # fmt: skip
    for figure in figures:
        figure.draw_without_rendering()
        boxes = [
            (t.get_text(), t.get_window_extent()) for t in figure.findobj(Text)
            if t.get_visible() and t.get_text().strip() and t.axes and t.axes.get_visible()
        ]  # fmt: skip
        ticks = {
            label.get_text()
            for ax in figure.axes
            for axis in (ax.xaxis, ax.yaxis)
            for label in axis.get_ticklabels()
        }
        # Tick labels outside of the view are kept as texts though they are not drawn.
        boxes = [(text, box) for text, box in boxes if text not in ticks]
        for (one, a), (two, b) in itertools.combinations(boxes, 2):
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert not (wide > 1 and high > 1), (one, two)
        for text, box in boxes:
            assert box.x0 > -1, text
            assert box.x1 < figure.bbox.x1 + 1, text


def test_compare_computes_once_and_mutates_nothing():
    ds, refined = town(chunks={"y": 64, "x": 64})
    before, runs, computed = ds.copy(deep=True), [], []

    def inference(block, block_info=None):
        computed.append(block_info[0]["chunk-location"])
        return block

    refined = refined.copy(data=refined.data.map_blocks(inference, dtype=refined.dtype))

    def scheduler(dsk, keys, **kwargs):
        runs.append(keys)
        return dask.get(dsk, keys, **kwargs)

    with dask.config.set(scheduler=scheduler):
        compare(ds, refined, window=(slice(0, 50), slice(0, 50)))
        assert len(runs) == 1
        plot(ds)
        assert len(runs) == 2
    assert sorted(computed) == sorted(set(computed))
    xr.testing.assert_identical(ds, before)


def test_a_figure_leaves_the_backend_interactive(tmp_path):
    """As a notebook's backend is: it turns that on when pyplot first loads it."""
    (tmp_path / "late_backend.py").write_text(
        "import matplotlib\n"
        "from matplotlib.backends.backend_agg import *\n"
        "matplotlib.interactive(True)\n"
    )
    code = (
        "import matplotlib, numpy, xarray, deepdem.plot as p\n"
        "z = xarray.DataArray(numpy.eye(3), {'y': [2., 1, 0], 'x': [0., 1, 2]}, ('y', 'x'))\n"
        "ds = xarray.Dataset({'dsm': z + 1, 'lidar_dsm': z})\n"
        "assert not matplotlib.is_interactive()\n"
        "p.FIGURE and matplotlib.is_interactive() or exit('no longer interactive')\n"
    )
    paths = [str(tmp_path), *filter(None, sys.path)]
    environment = os.environ | {
        "MPLBACKEND": "module://late_backend", "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    for figure in ("plot(ds)", "compare(ds, z)"):
        command = [sys.executable, "-c", code.replace("FIGURE", figure)]
        done = subprocess.run(  # noqa: S603  # our own words
            command, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_nothing_valid_is_drawn_all_the_same():
    ds, refined = town()
    empty = ds.assign(lidar_dsm=ds["lidar_dsm"] * np.nan)
    compare(empty, refined).draw_without_rendering()
    plot(empty, layers=["lidar_dsm", "valid"]).draw_without_rendering()


def test_what_cannot_be_drawn():
    ds, refined = town()
    with pytest.raises(ValueError, match="no layer 'slope'"):
        plot(ds, layers=["slope"])
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(ds[[]])
    with pytest.raises(ValueError, match="at least 2 pixels a side"):
        plot(ds, max_px=1)
    with pytest.raises(ValueError, match="off the scene"):
        compare(ds, refined.assign_coords(x=refined.x + 3))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of ../shared/data is not here")
def test_a_real_town_by_pixel_size_in_metres():
    import rioxarray

    path = DATA / "dsm_dtm_goteborg" / "dsm.tif"
    dsm = rioxarray.open_rasterio(path, masked=True, chunks=100).squeeze("band", drop=True)
    level = float(hillshade(dsm).compute().median())  # streets, courts and flat roofs
    assert level == pytest.approx(math.sin(math.radians(45)), abs=0.02)
    ds = xr.Dataset({"dsm": dsm.shift(x=1), "lidar_dsm": dsm})
    table = evaluate(ds, dsm.rename("refined"), by="slope")
    assert table.loc[("all", "refined"), "RMSE"] == 0
    assert table.loc[("40 to 90", "dsm"), "MAE"] > 10 * table.loc[("0 to 5", "dsm"), "MAE"]

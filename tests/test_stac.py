"""Layers from STAC: found in a real API, read over HTTP, on the grid to the bit."""

from __future__ import annotations

import itertools
import json
import pickle
import time
import warnings

import dask
import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from catalogue import catalogue, make_item, write_cog
from guarded import guarded
from odc.geo.geobox import GeoBox
from typer.testing import CliRunner

import deepdem
from deepdem.blocks import Box
from deepdem.cli import app
from deepdem.grid import odc_crs
from deepdem.scene import geobox_of
from deepdem.sources import _assets
from deepdem.sources._assets import AssetReader, AssetWarning, Reading
from deepdem.sources.stac import (
    FMASK_BITS,
    _coarser,
    clear_sky,
    hls_ndvi,
    lidar_3dep,
    load_items,
    reduce_time,
    search_items,
)

pytest.importorskip("stackstac", reason="needs the extra deepdem[stac]")
pytest.importorskip("stac_fastapi.static", reason="needs a STAC API server, of the extra test")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LEFT, TOP, CRS = 600_000.0, 5_400_000.0, "EPSG:32610"
#: A scene of half metres inside the granules, off their pixels' edges.
GRID = GeoBox((260, 300), Affine(0.5, 0, LEFT + 901.25, 0, -0.5, TOP - 703.75), CRS)
BANDS = {"L30": ("B04", "B05"), "S30": ("B04", "B8A")}
#: Product, time, red, nir (numbers), cloud (percent), the Fmask of the granule's west half.
GRANULES = (
    ("L30", "2021-06-01T18:50:00", 1000, 3000, 10, 0),
    ("L30", "2021-06-17T18:50:00", 1000, 7000, 20, 0b00000010),
    ("S30", "2021-06-05T19:00:00", 1000, 2000, 5, 0b11000000),
    ("S30", "2021-07-05T19:00:00", 1000, 9000, 80, 0b00000010),
)


def granule(folder, product, when, red, nir, cloud, fmask, url):
    transform = Affine(30, 0, LEFT, 0, -30, TOP)
    name = f"HLS.{product}.T10UEV.{when[:10]}.v2.0"
    # The red has a gap in its north, filled as HLS fills it; B05 of an S30 is no infrared.
    numbers = {BANDS[product][0]: np.full((100, 100), red), BANDS[product][1]: nir}
    numbers["B05" if product == "S30" else "B8A"] = np.full((100, 100), 500)
    rasters = {}
    for key, value in numbers.items():
        array = np.broadcast_to(value, (100, 100)).astype("int16").copy()
        if key == "B04":
            array[:5] = -9999
        rasters[key] = write_cog(folder / name / f"{key}.tif", array, transform, CRS, -9999)
    codes = np.zeros((100, 100), "uint8")
    codes[:, :33] = fmask
    rasters["Fmask"] = write_cog(folder / name / "Fmask.tif", codes, transform, CRS, 255)
    return make_item(name, when, rasters, url=url, folder=folder, cloud=cloud)


def surface(shape, transform):
    """Return heights by place: what two tiles share they agree on."""
    x = transform.c + transform.a * (np.arange(shape[1]) + 0.5) - LEFT
    y = TOP - (transform.f + transform.e * (np.arange(shape[0]) + 0.5))
    return (100 + 20 * np.sin(x / 37)[None] + 0.05 * y[:, None]).astype("float32")


def lidar_tile(folder, name, when, column, up, url):
    transform = Affine(1, 0, LEFT + 880 + column, 0, -1, TOP - 680)
    array = surface((256, 128), transform) + np.float32(up)
    if name == "west":
        array[40:44, 40:44] = -9999
    path = write_cog(folder / name / "dsm.tif", array, transform, CRS, -9999)
    return make_item(name, when, {"data": path}, url=url, folder=folder)


class Api:
    """The catalogue's URL, and the server of its rasters."""

    def __init__(self, url, files, folder):
        self.url, self.files, self.folder = url, files, folder


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rasters")
    with guarded(folder) as files:
        collections = {"hls2-l30": [], "hls2-s30": [], "3dep-lidar-dsm": []}
        for product, *rest in GRANULES:
            collections[f"hls2-{product.lower()}"].append(
                granule(folder, product, *rest, url=files.url)
            )
        for row in (("old", "2012-05-01", 0, 50.0), ("west", "2018-05-01", 0, 0.0),
                    ("east", "2018-05-02", 128, 0.0)):  # fmt: skip
            collections["3dep-lidar-dsm"].append(lidar_tile(folder, *row, url=files.url))
        with catalogue(tmp_path_factory.mktemp("catalogue"), collections) as url:
            yield Api(url, files, folder)


@pytest.fixture
def dsm_items(api):
    return search_items(api.url, GRID, ["3dep-lidar-dsm"])


# --- found ---------------------------------------------------------------------------------------


def test_items_are_found_by_place_time_and_cloud(api):
    def names(**options):
        found = search_items(api.url, GRID, ["hls2-l30", "hls2-s30"], **options)
        return [(item.id[4:7], item.id[15:25]) for item in found]

    assert names() == [("L30", "2021-06-01"), ("S30", "2021-06-05"), ("L30", "2021-06-17"),
                       ("S30", "2021-07-05")]  # fmt: skip
    assert len(names(datetime="2021-06-02/2021-06-30")) == 2
    assert len(names(max_cloud=10)) == 2
    away = GeoBox((9, 9), Affine(1, 0, 500_000, 0, -1, 4_000_000), CRS)
    with pytest.raises(ValueError, match=r"no item in hls2-l30 of.*longitude -12.*0 are"):
        search_items(api.url, away, ["hls2-l30"])
    with pytest.raises(ValueError, match="4 are there, those with more cloud"):
        names(max_cloud=1)


# --- on the grid ---------------------------------------------------------------------------------


def test_the_grid_is_kept_to_the_bit(api, dsm_items):
    loaded = load_items(dsm_items, GRID, ["data"])
    want = deepdem.stack({"a": api.folder / "west" / "dsm.tif"}, like=GRID)
    assert loaded.dims == ("time", "band", "y", "x")
    assert loaded.dtype == np.float32
    for dim in ("y", "x"):  # pixel centres, and no bound moved to a multiple of the resolution
        np.testing.assert_array_equal(loaded[dim], want[dim])
    assert geobox_of(loaded.isel(time=0, band=0)) == GRID
    assert list(loaded["id"].values) == ["old", "west", "east"]
    assert loaded["time"].values[1] == np.datetime64("2018-05-01")
    json.dumps(loaded.attrs, allow_nan=False)
    # And the pixels are those that the same file gives without a catalogue.
    got = loaded.sel(band="data").isel(time=1).compute()
    np.testing.assert_array_equal(got.values, want["a"].values)
    assert 0 < int(got.isnull().sum()) < got.size


def test_another_crs_and_one_without_a_code(api, dsm_items):
    lambert = (
        "+proj=lcc +lat_1=48 +lat_2=49 +lat_0=48.5 +lon_0=-122 +x_0=0 +y_0=0 +datum=WGS84 +units=m"
    )
    for crs in ("EPSG:32611", lambert, "EPSG:32610+5703"):
        place = GRID.footprint(crs).boundingbox if "+5703" not in crs else GRID.boundingbox
        grid = GeoBox.from_bbox(place.bbox, crs=odc_crs(crs), resolution=2.0)
        got = load_items(dsm_items, grid, ["data"], chunks=40).isel(time=2, band=0)
        want = deepdem.stack({"a": api.folder / "east" / "dsm.tif"}, like=grid)["a"]
        np.testing.assert_allclose(got.values, want.values, atol=1e-4)
        assert np.isfinite(got.values).sum() > 100


@pytest.mark.parametrize("seed", range(3))
def test_the_chunks_do_not_matter(api, seed):
    rng = np.random.default_rng(seed)
    chunks = int(rng.integers(50, 150))
    rows, columns = rng.integers(1, 200, 2)
    grid = GRID[rng.integers(0, 50) :, rng.integers(0, 50) :][:rows, :columns]
    with dask.config.set(scheduler="synchronous"):
        for build in (
            lambda c: lidar_3dep(grid, catalog=api.url, chunks=c),
            lambda c: hls_ndvi(grid, "2021-06", catalog=api.url, chunks=c),
        ):
            xr.testing.assert_identical(build(chunks).compute(), build(5000).compute())


def test_nothing_is_read_before_it_is_computed(api, no_compute):
    api.files.tell(sent=0)
    with no_compute():
        a = lidar_3dep(GRID, catalog=api.url)
        b = hls_ndvi(GRID, "2021-06", catalog=api.url)
        load_items(search_items(api.url, GRID, ["hls2-l30"]), GRID, ["B04"])
    assert api.files.total == 0
    assert a.chunks
    assert b.chunks
    a.compute()
    assert api.files.total > 0


def test_a_chunk_is_finished_before_the_next_is_read(api, monkeypatch):
    read, order = AssetReader.read, []
    monkeypatch.setattr(
        AssetReader, "read", lambda self, w: order.append(self.asset["item"]) or read(self, w)
    )

    def finish(block):
        order.append("finished")
        return block

    for layer in (
        lidar_3dep(GRID, catalog=api.url, chunks=100),
        hls_ndvi(GRID, "2021-06-01", catalog=api.url, products=["L30"], chunks=100),
    ):
        order.clear()
        with dask.config.set(scheduler="synchronous"):
            layer.data.map_blocks(finish, dtype=np.float32, meta=np.empty((0, 0))).compute()
        assert order.count("finished") == 9
        assert "finished" in order[:4]  # three items, or three bands


def test_what_is_missing_is_said_and_not_filled(api, dsm_items):
    with pytest.raises(ValueError, match=r"item 'old' lacks the assets \['B99'\].*data"):
        load_items(dsm_items, GRID, ["B99"])
    away = GeoBox((9, 9), Affine(1, 0, 500_000, 0, -1, 4_000_000), CRS)
    with pytest.raises(ValueError, match="none of 3 items overlaps"):
        load_items(dsm_items, away, ["data"])
    with pytest.raises(ValueError, match="no item"):
        load_items([], GRID, ["data"])
    with pytest.raises(ValueError, match="pass 'raise' or 'nan'"):
        load_items(dsm_items, GRID, ["data"], errors="ignore")
    with pytest.raises(ValueError, match="pass 1 or more"):
        load_items(dsm_items, GRID, ["data"], tries=0)


def test_scales_in_the_items_are_applied_or_not(api):
    items = search_items(api.url, GRID, ["hls2-l30"])
    for item in items:
        item.assets["B04"].extra_fields["raster:bands"] = [{"scale": 0.0001, "offset": 0.5}]
    scaled = load_items(items, GRID, ["B04"]).isel(time=0, band=0, y=0, x=0)
    plain = load_items(items, GRID, ["B04"], rescale=False).isel(time=0, band=0, y=0, x=0)
    assert float(scaled) == pytest.approx(0.6)
    assert float(plain) == 1000


# --- times ---------------------------------------------------------------------------------------


def test_fmask_bits():
    for name, bit in FMASK_BITS.items():
        assert not clear_sky(np.array([1 << bit]), [name])[0]
        others = [n for n in FMASK_BITS if n != name]
        assert clear_sky(np.array([1 << bit]), others)[0]
    assert clear_sky(np.array([0b11100000.__index__()], "uint8"), ["cloud"])[0]
    np.testing.assert_array_equal(clear_sky(np.array([np.nan, 255, 32])), [False, False, True])
    with pytest.raises(ValueError, match=r"no bits \['rain'\].*cloud"):
        clear_sky(np.zeros(1), ["rain"])


def test_times_are_reduced_by_day():
    nan = np.nan
    values = np.array([[1, nan, nan], [5, 2, nan], [9, 9, nan], [4, nan, nan]], "float32")
    times = np.array(["2021-01-01T10", "2021-01-01T11", "2021-01-02", "2021-01-03"], "M8[ns]")
    stack = xr.DataArray(
        values[:, None], {"time": times, "id": ("time", list("abcd"))}, ("time", "y", "x")
    )
    # Of the first day the first that is known: 1, 2.
    for how, want in {"median": [4, 5.5, nan], "mean": [14 / 3, 5.5, nan], "first": [1, 2, nan],
                      "best": [4, 9, nan]}.items():  # fmt: skip
        cloud = {"a": 50, "b": 50, "c": 20, "d": 10}
        for chunks in ({}, {"time": 1, "x": 2}):
            got = reduce_time(stack.chunk(chunks), how, cloud=cloud)
            assert got.dims == ("y", "x")
            np.testing.assert_allclose(got.values[0], want, rtol=1e-6)
    with pytest.raises(ValueError, match="pass one of median"):
        reduce_time(stack, "max")


# --- layers --------------------------------------------------------------------------------------


def test_vegetation_of_both_products(api):
    # West of x = 33 * 30 m the L30 of June 17 is under cloud, and the S30 of June 5 is not: its
    # two highest bits are aerosol.
    layer = hls_ndvi(GRID, "2021-06", catalog=api.url)
    assert layer.name == "ndvi"
    assert layer.attrs["units"] == "1"
    assert geobox_of(layer) == GRID
    got = layer.compute()
    west, east = float(got[5, 5]), float(got[5, -5])
    june1, june17, june5 = 0.5, 0.75, 1 / 3
    assert west == pytest.approx((june1 + june5) / 2, abs=1e-5)
    assert east == pytest.approx(np.median([june1, june17, june5]), abs=1e-5)
    assert layer.attrs["deepdem_items"] == [
        "HLS.L30.T10UEV.2021-06-01.v2.0", "HLS.S30.T10UEV.2021-06-05.v2.0",
        "HLS.L30.T10UEV.2021-06-17.v2.0",
    ]  # fmt: skip
    json.dumps(layer.attrs, allow_nan=False)

    def at_east(**options):
        return float(hls_ndvi(GRID, "2021", catalog=api.url, **options)[5, -5])

    assert at_east(max_cloud=100, reduce="best") == pytest.approx(june5, abs=1e-5)
    assert at_east(products=["S30"], max_cloud=100) == pytest.approx((june5 + 0.8) / 2, abs=1e-5)
    assert at_east(products={"L30": "hls2-l30"}) == pytest.approx((june1 + june17) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="names no HLS product"):
        hls_ndvi(GRID, "2021", catalog=api.url, products=["M09"])
    with pytest.raises(ValueError, match="no bits"):
        hls_ndvi(GRID, "2021", catalog=api.url, hide=["rain"])


def test_gaps_and_clouds_are_no_data(api):
    # The first five rows of the red band are filled; the grid begins 30 m below the granule's top.
    grid = GeoBox((40, 100), Affine(10, 0, LEFT + 300, 0, -10, TOP), CRS)
    one = hls_ndvi(grid, "2021-06-17", catalog=api.url, products=["L30"]).compute()
    assert bool(one[:10].isnull().all())
    assert bool(one[:, :60].isnull().all())
    known = one[20:, 75:]
    np.testing.assert_allclose(known, 0.75, atol=1e-6)
    snow = hls_ndvi(grid, "2021-06-17", catalog=api.url, products=["L30"], hide=["snow"])
    assert bool(np.isfinite(snow[20:, :60]).all())


def test_a_coarser_grid_is_made_of_whole_pixels():
    coarse = _coarser(GRID, 30.0)
    to_fine = ~GRID.transform * coarse.transform
    assert (to_fine.a, to_fine.e) == pytest.approx((60, 60))
    assert to_fine.c == pytest.approx(-to_fine.a)
    assert coarse.shape.y * to_fine.a >= GRID.shape.y + 2 * to_fine.a
    wide = GeoBox((5, 5), Affine(100, 0, 0, 0, -100, 5_000_000), CRS)
    assert _coarser(wide, 30.0).resolution.x == 100


def test_the_newest_lidar_counts(api):
    layer = lidar_3dep(GRID, "dsm", catalog=api.url)
    assert layer.name == "lidar_dsm"
    assert layer.attrs["units"] == "m"
    got = layer.compute()
    truth = surface(GRID.shape, GRID.transform)
    known = np.isfinite(got.values)
    # What the newest tile lacks an older one has, 50 m higher here.
    high = got.values > truth + 25
    assert 0 < high.sum() < 200
    assert known.mean() > 0.99
    off = np.abs((got - truth).values[~high & known])
    assert float(np.median(off)) < 0.002
    assert float(off.max()) < 0.5  # beside the hole, where a value has neighbours on one side only
    with pytest.raises(ValueError, match="pass 'dsm' or 'dtm'"):
        lidar_3dep(GRID, "chm", catalog=api.url)


def test_the_layers_go_into_a_scene(api, tmp_path):
    ds = deepdem.synthetic_scene((64, 64))
    grid = GRID[:64, :64]
    layers = {"lidar_dsm": lidar_3dep(grid, catalog=api.url),
              "ndvi": hls_ndvi(grid, "2021-06", catalog=api.url)}  # fmt: skip
    dsm = layers["lidar_dsm"].copy(data=ds["dsm"].data).rename("dsm")
    scene = xr.Dataset({"dsm": dsm, **layers})
    scene.deepdem.prepare().deepdem.to_zarr(tmp_path / "s.zarr", group="a")
    back = deepdem.open_scene(tmp_path / "s.zarr", "a")
    np.testing.assert_array_equal(back["ndvi"], layers["ndvi"])
    assert back["lidar_dsm"].attrs["deepdem_items"] == ["west", "old"]


def test_real_bands(data_folder, tmp_path):
    folder = data_folder / "optical_sentinel2"
    with rasterio.open(folder / "red.tif") as raster:
        crs, shape, transform = raster.crs, raster.shape, raster.transform
    with guarded(tmp_path) as files:
        rasters = {}
        for key, name in (("B04", "red"), ("B8A", "nir")):
            with rasterio.open(folder / f"{name}.tif") as raster:
                pixels = raster.read(1)
            rasters[key] = write_cog(tmp_path / f"{key}.tif", pixels, transform, crs)
        codes = np.zeros(shape, "uint8")
        rasters["Fmask"] = write_cog(tmp_path / "Fmask.tif", codes, transform, crs, 255)
        item = make_item("HLS.S30.X", "2020-01-01", rasters, url=files.url, folder=tmp_path)
        with catalogue(tmp_path / "c", {"hls2-s30": [item]}) as url:
            grid = GeoBox(shape, transform, str(crs))
            series = hls_ndvi(_coarser(grid, 30), "2020", catalog=url, products=["S30"]).compute()
            fine = hls_ndvi(grid, "2020", catalog=url, products=["S30"]).compute()
    want = deepdem.stack({"red": folder / "red.tif", "nir": folder / "nir.tif"}).deepdem.prepare(
        needs=["red"]
    )["ndvi"]
    assert series.size < fine.size / 8
    want = want.compute()
    assert float(abs(fine - want).median()) < 0.02
    assert (
        float(np.corrcoef(fine.values[5:-5, 5:-5].ravel(), want.values[5:-5, 5:-5].ravel())[0, 1])
        > 0.8
    )


# --- tokens, retries, errors ---------------------------------------------------------------------


class Signer:
    """Signs URLs with a new token each time, or as often as it is told to."""

    def __init__(self, *, keep=1):
        self.keep, self.asked = keep, 0

    def __call__(self, url):
        self.asked += 1
        return f"{url}?sig={id(self)}-{self.asked // self.keep}"


@pytest.fixture
def files(api):
    yield api.files
    api.files.tell(failures=0, uses=None)


def quick(**options):
    return {"backoff_s": 0.001, "chunks": 100, **options}


def test_urls_are_signed_again_when_they_expire(api, files):
    want = lidar_3dep(GRID, catalog=api.url, chunks=100).compute()
    files.tell(uses=6)  # a read takes about four requests
    sign = Signer()
    got = lidar_3dep(GRID, catalog=api.url, sign=sign, **quick()).compute()
    np.testing.assert_array_equal(got, want)
    assert sign.asked >= 10
    # A signer that keeps a token too long is asked again after the refusal.
    files.tell(uses=10)
    sign = Signer(keep=4)
    got = lidar_3dep(GRID, catalog=api.url, sign=sign, **quick(tries=9)).compute(num_workers=1)
    np.testing.assert_array_equal(got, want)
    assert sign.asked > 12
    with pytest.raises(OSError, match="Pass sign= if it needs a token"):
        lidar_3dep(GRID, catalog=api.url, **quick(tries=1)).compute(num_workers=1)


def test_a_busy_server_is_asked_again(api, files):
    want = lidar_3dep(GRID, catalog=api.url, chunks=100).compute()
    files.tell(failures=8)
    got = lidar_3dep(GRID, catalog=api.url, **quick(tries=12)).compute(num_workers=1)
    np.testing.assert_array_equal(got, want)
    assert files.tell()["failures"] == 0


def test_it_waits_longer_each_time(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    reading = Reading(GRID, tries=4, backoff_s=0.5)
    url = _assets.packed("nowhere.tif", item="i", asset="a", resampling="nearest", nodata=None,
                         scale=1.0, offset=0.0)  # fmt: skip
    with pytest.raises(OSError, match="in 4 tries"):
        AssetReader(reading, url=url).read(rasterio.windows.Window(0, 0, 5, 5))
    assert waits == [0.5, 1.0, 2.0]


def test_a_read_that_fails_names_its_item_and_no_token(api, files, caplog):
    files.tell(uses=0)
    layer = lidar_3dep(
        GRID[:50, :50], catalog=api.url, sign=lambda url: f"{url}?sig=secret", **quick(tries=2)
    )
    with pytest.raises(OSError, match=r"asset 'data' of item '(old|west|east)'.*errors='nan'") as e:
        layer.compute()
    assert "secret" not in str(e.getrepr(chain=True, style="short"))
    assert "/dsm.tif" in str(e.value)
    assert "403" in caplog.text
    assert "secret" not in caplog.text


def test_a_missing_file_is_an_error_unless_told_otherwise(api, monkeypatch):
    items = search_items(api.url, GRID, ["3dep-lidar-dsm"])
    items[1].assets["data"].href = f"{api.files.url}/gone.tif"
    with pytest.raises(OSError, match=r"item 'west'.*gone\.tif"):
        load_items(items, GRID, ["data"], **quick(tries=1)).compute()
    monkeypatch.setattr(_assets._failures, "count", 0)
    loaded = load_items(items, GRID, ["data"], **quick(tries=1, errors="nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = loaded.compute(num_workers=1)
    counts = [str(w.message) for w in caught if issubclass(w.category, AssetWarning)]
    assert [int(text.split()[0]) for text in counts] == list(range(1, len(counts) + 1))
    assert len(counts) == 6 or len(counts) > 2
    assert "item 'west'" in counts[0]
    assert bool(got.isel(time=1).isnull().all())
    assert bool(got.isel(time=2).notnull().any())


def test_several_bands_are_refused(api, tmp_path):
    path = tmp_path / "two.tif"
    with rasterio.open(path, "w", driver="GTiff", height=9, width=9, count=2, dtype="uint8",
                       crs=CRS, transform=Affine(1, 0, 0, 0, -1, 0)) as raster:  # fmt: skip
        raster.write(np.ones((2, 9, 9), "uint8"))
    url = _assets.packed(str(path), item="i", asset="a", resampling="nearest", nodata=None,
                         scale=1.0, offset=0.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"asset 'a' of item 'i'.*2 bands"):
        AssetReader(Reading(GRID), url=url).read(rasterio.windows.Window(0, 0, 5, 5))


def test_a_reader_travels(api):
    item = search_items(api.url, GRID, ["3dep-lidar-dsm"])[1]
    url = _assets.packed(item.assets["data"].href, item="i", asset="a", resampling="bilinear",
                         nodata=None, scale=1.0, offset=0.0)  # fmt: skip
    reader = AssetReader(Reading(GRID, sign=str), url=url)
    window = rasterio.windows.Window(10, 20, 30, 40)
    with pickled(reader) as other:
        np.testing.assert_array_equal(other.read(window), reader.read(window))
    assert reader.read(window).shape == Box(20, 60, 10, 40).shape


class pickled:  # reads as a verb
    def __init__(self, thing):
        self.thing = pickle.loads(pickle.dumps(thing))  # noqa: S301  # our own words

    def __enter__(self):
        return self.thing

    def __exit__(self, *_):
        self.thing.close()


def test_names_of_tasks_are_the_same_each_time(api):
    one, other = (lidar_3dep(GRID, catalog=api.url) for _ in range(2))
    assert one.data.name == other.data.name
    names = [hls_ndvi(GRID, "2021-06", catalog=api.url, reduce=how).data.name
             for how in ("median", "median", "mean")]  # fmt: skip
    assert names[0] == names[1] != names[2]
    assert len({*itertools.chain(names)}) == 2


# --- from a shell --------------------------------------------------------------------------------


def _fetch(*arguments):
    done = CliRunner().invoke(app, ["fetch", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def _placed(api):
    edges = [str(v) for v in GRID[:128, :160].boundingbox.bbox]
    return ["--bounds", *edges, "--resolution", "0.5", "--crs", CRS, "--catalog", api.url]


def test_layers_are_fetched(api, tmp_path):
    place = _placed(api)
    said = _fetch("hls", tmp_path / "ndvi.tif", "--datetime", "2021-06", *place, "--reduce", "best",
                  "--product", "L30=hls2-l30", "--product", "S30=hls2-s30")  # fmt: skip
    assert said.startswith("3 items")
    _fetch("lidar-3dep", tmp_path / "dsm.zarr", *place)
    ds = deepdem.stack({"ndvi": tmp_path / "ndvi.tif"}, like="ndvi")
    want = hls_ndvi(ds, "2021-06", catalog=api.url, reduce="best")
    np.testing.assert_array_equal(ds["ndvi"], want)
    dsm = deepdem.open_scene(tmp_path / "dsm.zarr")["lidar_dsm"]
    np.testing.assert_array_equal(dsm, lidar_3dep(dsm, catalog=api.url))
    assert dsm.attrs["deepdem_source"] == "3DEP"
    with pytest.raises(ValueError, match="--sign nowhere:sign"):
        _fetch("lidar-3dep", tmp_path / "x.zarr", *place, "--sign", "nowhere:sign")


def test_a_fetch_that_failed_is_not_there_and_goes_on(api, files, tmp_path, monkeypatch):
    monkeypatch.setattr("deepdem.sources.stac.lidar_3dep.__kwdefaults__", {
        **lidar_3dep.__kwdefaults__, "chunks": 64,
    })  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda _: None)
    out, place = tmp_path / "dsm.tif", _placed(api)
    files.tell(uses=50)  # tokens that are never renewed: some chunks are read, then no more
    sign = Signer(keep=1000)
    monkeypatch.setattr(_assets, "signs_for_the_test", sign, raising=False)
    signed = ["--sign", "deepdem.sources._assets:signs_for_the_test"]
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(OSError, match="could not be read"):
            _fetch("lidar-3dep", out, *place, *signed)
        assert not out.exists()
        read, reads = _assets.AssetReader.read, []
        monkeypatch.setattr(
            _assets.AssetReader, "read", lambda self, w, **k: reads.append(w) or read(self, w, **k)
        )
        files.tell(uses=None)
        _fetch("lidar-3dep", out, *place)
        went_on = len(reads)
        got = deepdem.stack({"lidar_dsm": out}, like="lidar_dsm")["lidar_dsm"]
        np.testing.assert_array_equal(got, lidar_3dep(got, catalog=api.url))
        assert 0 < went_on < len(reads) - went_on

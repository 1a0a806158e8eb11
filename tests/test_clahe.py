"""CLAHE: the same bits however it is cut, no nodata in a histogram, close to scikit-image."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from deepdem.blocks import settle
from deepdem.clahe import _clip_counts
from deepdem.derive import equalise

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def texture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth ground under fine texture, in the digital numbers of an 11-bit sensor."""
    rng = np.random.default_rng(seed)
    ground = gaussian_filter(rng.normal(size=shape), 12, mode="wrap") * 12
    detail = gaussian_filter(rng.normal(size=shape), 1, mode="wrap")
    return np.round(np.clip(700 + 250 * ground + 150 * detail, 1, 2047)).astype(np.float32)


def ortho(values: np.ndarray, name: str = "ortho_left") -> xr.DataArray:
    return xr.DataArray(values, dims=("y", "x"), name=name)


@st.composite
def holed_images(draw: st.DrawFn) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    shape = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    image = texture(shape, draw(st.integers(0, 9))) - draw(st.sampled_from([0, 800]))
    for _ in range(draw(st.integers(0, 3))):
        top, left = draw(st.integers(0, shape[0])), draw(st.integers(0, shape[1]))
        image[top : top + draw(st.integers(0, 60)), left : left + draw(st.integers(0, 60))] = np.nan
    cuts = [
        sorted(draw(st.sets(st.integers(1, n - 1), max_size=4))) if n > 1 else [] for n in shape
    ]
    chunks = [np.diff([0, *c, n]).tolist() for c, n in zip(cuts, shape, strict=True)]
    return image, (tuple(chunks[0]), tuple(chunks[1]))


@settings(max_examples=60, deadline=None)
@given(drawn=holed_images(), tile_px=st.sampled_from([5, 16, 33, 512]), whole=st.booleans())
def test_any_chunking_gives_the_same_bits(drawn: Any, tile_px: int, whole: bool) -> None:
    image, chunks = drawn
    options: Any = {"tile_px": tile_px, "percentiles": (0, 100) if whole else (0.1, 99.9)}
    eager = equalise(ortho(image), **options)
    chunked = equalise(ortho(da.from_array(image, chunks)), **options)
    assert chunked.chunks == chunks
    np.testing.assert_array_equal(chunked.compute(scheduler="sync"), eager)
    np.testing.assert_array_equal(np.isnan(eager), np.isnan(image))
    assert eager.dtype == chunked.dtype == np.float32
    if not np.isnan(image).all():
        assert 0 <= np.nanmin(eager) <= np.nanmax(eager) <= 1


def test_close_to_scikit_image() -> None:
    exposure = pytest.importorskip("skimage.exposure")
    image = texture((512, 512))
    theirs = exposure.equalize_adapthist(image.astype(np.uint16), kernel_size=128, clip_limit=0.01)
    error = equalise(ortho(image), tile_px=128, percentiles=(0, 100)).values - theirs
    assert np.abs(error).mean() < 0.006
    assert np.abs(error).max() < 0.025


def test_clipping_is_the_limit_of_scikit_images_rounds() -> None:
    adapthist = pytest.importorskip("skimage.exposure._adapthist")
    counts = np.random.default_rng(0).gamma(0.3, 400, size=(5, 256)).round()
    theirs = [adapthist.clip_histogram(c.astype(int), int(0.01 * c.sum())) for c in counts]
    ours = _clip_counts(counts, 0.01)
    np.testing.assert_allclose(ours.sum(axis=1), counts.sum(axis=1))
    # Their last rounds hand out whole pixels from the first bin on; what counts is the mapping.
    shares = np.cumsum(ours - np.array(theirs), axis=1) / counts.sum(axis=1, keepdims=True)
    assert np.abs(shares).max() < 0.005


@pytest.mark.parametrize("wild", [-9999.0, 0.0, 65535.0, -3.4028235e38])
def test_nodata_is_in_no_histogram(wild: float) -> None:
    image = texture((96, 96))
    hole = np.zeros(image.shape, dtype=bool)
    hole[10:22, 4:30] = True  # in the first of 3 x 3 tiles
    whole = equalise(ortho(image), tile_px=32, grey_range=(1, 2047)).values
    holed = equalise(ortho(np.where(hole, np.nan, image)), tile_px=32, grey_range=(1, 2047)).values
    assert np.isnan(holed[hole]).all()
    np.testing.assert_array_equal(holed[:, 48:], whole[:, 48:])
    np.testing.assert_allclose(holed[~hole], whole[~hole], atol=0.1)
    # The scene's range: the hole's pixels count neither as NaN, nor as what they once were.
    robust = equalise(ortho(np.where(hole, np.nan, image)), tile_px=32)
    np.testing.assert_allclose(
        robust.values[:, 48:], equalise(ortho(image), tile_px=32)[:, 48:], atol=0.05
    )
    unmasked = equalise(ortho(np.where(hole, wild, image)), tile_px=32)
    assert np.abs(unmasked.values - robust.values)[~hole].max() > 0.1
    infinite = equalise(ortho(np.where(hole, np.inf, image)), tile_px=32)
    np.testing.assert_array_equal(infinite, robust)


def test_a_border_of_nodata_around_changes_nothing() -> None:
    image = texture((64, 64))
    alone = equalise(ortho(image), tile_px=32)
    framed = equalise(ortho(np.pad(image, 64, constant_values=np.nan)), tile_px=32)
    np.testing.assert_allclose(framed.values[64:-64, 64:-64], alone, atol=1e-6)


def test_a_nearly_empty_tile_speaks_with_its_neighbour() -> None:
    image = texture((32, 64))
    image[:, 32:] = np.nan
    image[5, 60] = image[5, 20]
    got = equalise(ortho(image), tile_px=32, percentiles=(0, 100))
    same = image[:, :16] == image[5, 20]  # left of the first centre its own mapping alone counts
    assert same.any()
    assert abs(got.values[5, 60] - got.values[:, :16][same].mean()) < 0.05


def test_hot_pixels_do_not_use_up_the_grey_levels() -> None:
    image = texture((256, 256))
    hot = image.copy()
    hot[::64, ::64] = 65535
    cold = image != hot
    calm, upset = equalise(ortho(image), tile_px=64), equalise(ortho(hot), tile_px=64)
    assert np.abs(calm - upset).values[~cold].mean() < 0.02
    assert equalise(ortho(hot), tile_px=64, percentiles=(0, 100)).std() < 0.7 * upset.std()


@pytest.mark.parametrize("gain", [1 / 2047, 1.0, 30.0])
def test_any_grey_scale_comes_out_alike(gain: float) -> None:
    image = texture((128, 128))
    difference = np.abs(equalise(ortho(image)) - equalise(ortho(image * np.float32(gain))))
    assert difference.mean() < 0.01


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float64", ">f4"])
def test_other_dtypes(dtype: str) -> None:
    image = np.minimum(texture((40, 40)), 255)
    np.testing.assert_array_equal(
        equalise(ortho(image.astype(dtype)), tile_px=16), equalise(ortho(image), tile_px=16)
    )


def test_constant_empty_and_tiny_images() -> None:
    for value in (7.0, -3.0, 0.0):
        np.testing.assert_array_equal(equalise(ortho(np.full((9, 9), value))), 0)
    assert np.isnan(equalise(ortho(np.full((9, 9), np.nan)))).all()
    assert np.isnan(equalise(ortho(da.full((9, 9), np.nan, chunks=4)))).all()
    assert float(equalise(ortho(np.ones((1, 1))))[0, 0]) == 0
    step = np.ones((50, 50))
    step[0, 0] = 2  # both percentiles fall on 1
    assert equalise(ortho(step)).values[0, 0] == pytest.approx(1, abs=1e-4)


def test_an_image_is_read_twice() -> None:
    image, reads = texture((64, 64)), []

    def read(block: np.ndarray) -> np.ndarray:
        reads.append(1)
        return block

    for given_range in (None, (image.min(), image.max())):
        reads.clear()
        lazy = da.map_blocks(
            read, da.from_array(image, 32, inline_array=True), meta=np.empty((0, 0), np.float32)
        )
        got = equalise(ortho(lazy), percentiles=(0, 100), grey_range=given_range)
        np.testing.assert_array_equal(got, equalise(ortho(image), percentiles=(0, 100)))
        assert len(reads) == 4 * 2


def test_tables_are_found_and_computed_first() -> None:
    image = texture((64, 64))
    reads = []

    def read(block: np.ndarray) -> np.ndarray:
        reads.append(1)
        return block

    lazy = da.map_blocks(
        read, da.from_array(image, 16, inline_array=True), meta=np.empty((0, 0), np.float32)
    )
    equalised = equalise(ortho(lazy), tile_px=16)
    (settled,) = settle([equalised.data])
    assert len(reads) == 16
    # What is left of each chunk waits for no other.
    graph = dict(settled.dask)
    assert not [key for key in graph if "count_tiles" in str(key)]
    np.testing.assert_array_equal(settled.compute(), equalise(ortho(image), tile_px=16))
    assert len(reads) == 32
    assert settled.name == equalised.data.name
    assert settle([lazy])[0].name == lazy.name

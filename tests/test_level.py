from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import holey

from deepdem.blocks import Box
from deepdem.level import LevelRegion, local_level

CHIPS = st.sampled_from((4, 32, 64))


def _whole(dsm: np.ndarray, chip_px: int) -> np.ndarray:
    box = Box(0, dsm.shape[0], 0, dsm.shape[1])
    return local_level([dsm], out=box, region=box, chip_px=chip_px)


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), CHIPS, st.data())
def test_the_level_of_a_part_is_that_of_the_whole(shape, chip_px, data):
    dsm = holey(shape, data.draw(st.integers(0, 99)), 2000.0)
    whole = _whole(dsm, chip_px)
    y0, x0 = (data.draw(st.integers(0, n - 1)) for n in shape)
    y1, x1 = (data.draw(st.integers(lo + 1, n)) for lo, n in zip((y0, x0), shape, strict=True))
    out = Box(y0, y1, x0, x1)
    region = LevelRegion(chip_px, shape)(out)
    part = local_level([dsm[region.y0 : region.y1, region.x0 : region.x1]], out=out,
                       region=region, chip_px=chip_px)  # fmt: skip
    np.testing.assert_allclose(part, whole[y0:y1, x0:x1], rtol=0, atol=2.5e-4)


def test_a_plane_is_its_own_level_and_a_constant_too_at_edges_and_voids():
    plane = np.add.outer(0.3 * np.arange(300), -0.1 * np.arange(300)).astype(np.float32)
    np.testing.assert_allclose(_whole(plane, 64)[64:-64, 64:-64], plane[64:-64, 64:-64], atol=1e-4)
    flat = np.full((100, 130), 1234.5, np.float32)
    flat[20:60, 30:90] = np.nan
    np.testing.assert_allclose(_whole(flat, 64), 1234.5, atol=1e-4)


def test_it_is_as_smooth_as_a_mean_over_a_chip():
    """An impulse comes out as a bump whose spread is that of a box of a chip's width."""
    dsm = np.zeros((257, 257), np.float32)
    dsm[128, 128] = 1.0
    line = _whole(dsm, 64)[128].astype(float)
    away = np.arange(257) - 128
    spread = np.sqrt((line * away**2).sum() / line.sum())
    assert spread == pytest.approx(64 / np.sqrt(12), rel=0.01)
    # To a cell's width: 4 pixels.
    assert abs(int(line.argmax()) - 128) < 4
    assert (np.diff(line[132:]) <= 0).all()


def test_nothing_is_known_beyond_the_reach_of_any_height():
    dsm = np.full((300, 300), np.nan, np.float32)
    dsm[:10, :10] = 7.0
    level = _whole(dsm, 32)
    assert np.isnan(level[60:, :]).all()
    np.testing.assert_array_equal(level[:30, :30], 7.0)

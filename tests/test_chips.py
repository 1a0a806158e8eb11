from __future__ import annotations

import numpy as np
import pytest
import xbatcher
from hypothesis import given
from hypothesis import strategies as st

from deepdem.chips import chip_starts, dsm_scale
from deepdem.windows import Axis


def test_chips_are_xbatcher_s_and_reach_the_far_edges(scene, no_compute):
    with no_compute():
        chips = scene.chunk(y=64, x=64).deepdem.chips(size=128, overlap=32)
        assert isinstance(chips, xbatcher.BatchGenerator)
        assert len(chips) == 3 * 3
        last = chips[8]
    assert dict(last.sizes) == {"y": 128, "x": 128}
    assert last.x[-1] == scene.x[-1]
    assert last.y[-1] == scene.y[-1]
    assert last.dsm.chunks is not None
    np.testing.assert_array_equal(chips[0].dsm, scene.dsm[:128, :128])


def test_min_valid_leaves_poor_chips_out(scene):
    holes = scene.copy(deep=True)
    holes["valid"][:, :130] = False
    chips = holes.deepdem.chips(size=64, overlap=0, min_valid=0.5)
    assert 0 < len(chips) < len(holes.deepdem.chips(size=64, overlap=0))
    shares = [float(chip.valid.mean()) for chip in chips]
    assert min(shares) >= 0.5
    every = [float(chip.valid.mean()) for chip in holes.deepdem.chips(size=64)]
    assert len(chips) == sum(share >= 0.5 for share in every)
    without = scene.drop_vars("valid").deepdem.chips(size=64, min_valid=0.9)
    assert len(without) > 0


def test_a_scene_smaller_than_a_chip(scene):
    with pytest.raises(ValueError, match="do not fit a scene of 300 by 260 px"):
        scene.deepdem.chips(size=512)
    with pytest.raises(ValueError, match="do not fit a scene"):
        scene.deepdem.dsm_scale(size=512)


def test_dsm_scale_is_its_definition(scene):
    heights = scene.dsm.values.astype(np.float64)
    starts = [[*range(0, n - 64, 64), n - 64] for n in heights.shape]
    stds = []
    for y in starts[0]:
        for x in starts[1]:
            chip = heights[y : y + 64, x : x + 64]
            if np.isfinite(chip).mean() >= 0.5:
                stds.append(np.nanstd(chip))
    low, high = np.percentile(stds, [5, 95])
    inside = [s for s in stds if low <= s <= high]
    assert len(inside) < len(stds)
    assert dsm_scale(scene, size=64) == pytest.approx(np.mean(inside), rel=1e-5)
    chunked = scene.chunk(y=50, x=71)
    assert chunked.deepdem.dsm_scale(size=64) == pytest.approx(np.mean(inside), rel=1e-5)


def test_dsm_scale_passes_nodata_over(scene):
    holes = scene.copy(deep=True)
    holes.dsm[100:150, 100:150] = np.nan
    assert np.isfinite(dsm_scale(holes, size=64))
    holes.dsm[:] = np.nan
    with pytest.raises(ValueError, match="no chip of 64 px is half valid"):
        dsm_scale(holes, size=64)
    holes.dsm[:] = 5
    with pytest.raises(ValueError, match="the surface is flat"):
        dsm_scale(holes, size=64)


@given(st.integers(1, 200), st.integers(1, 64), st.data())
def test_chips_stand_where_xbatcher_and_the_windows_say(length, size, data):
    stride = data.draw(st.integers(1, size))
    if length < size:
        return
    starts = chip_starts(length, size, stride)
    np.testing.assert_array_equal(starts, Axis(length, size, stride).starts(0, length))

from __future__ import annotations

import numpy as np
import pytest
import xbatcher
from hypothesis import given
from hypothesis import strategies as st

from deepdem.blocks import Box
from deepdem.chips import dsm_scale
from deepdem.splits import split_scene


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


@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.sampled_from(["left", "right", "top", "bottom"]),
    st.integers(1, 99), st.integers(0, 100),
)  # fmt: skip
def test_split_regions_are_a_guard_apart(shape, side, share, guard):
    train, val = split_scene(shape, f"{side} {share} %", guard)
    whole = Box(0, shape[0], 0, shape[1])
    for box in (train, val):
        assert box.intersect(whole) == box
    if not val.empty and not train.empty:
        gap = max(val.x0 - train.x1, train.x0 - val.x1, val.y0 - train.y1, train.y0 - val.y1)
        assert gap == guard


@pytest.mark.parametrize("split", ["middle 50 %", "left", "left 0 %", "left 100 %", "0.8"])
def test_a_split_that_is_none(split):
    with pytest.raises(ValueError, match="pass for example 'left 80 %'"):
        split_scene((10, 10), split, 0)

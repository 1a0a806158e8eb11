from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdem.windows import BLENDS, Axis, blend_weights, overlap_px, window_grid


@given(st.integers(1, 500), st.integers(1, 90), st.data())
def test_windows_cover_every_pixel_and_stay_inside(length, window, data):
    stride = data.draw(st.integers(1, window))
    axis = Axis(length, window, stride)
    starts = [axis.start(i) for i in range(axis.count)]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] + window == max(length, window)
    seen = np.zeros(axis.padded_px, dtype=int)
    for start in starts:
        seen[start : start + window] += 1
    assert (seen > 0).all()


@given(st.integers(1, 500), st.integers(1, 90), st.data())
def test_covering_finds_exactly_the_windows_that_touch(length, window, data):
    axis = Axis(length, window, data.draw(st.integers(1, window)))
    lo = data.draw(st.integers(0, length - 1))
    hi = data.draw(st.integers(lo + 1, length))
    wanted = [s for s in (axis.start(i) for i in range(axis.count)) if s < hi and s + window > lo]
    assert list(axis.starts(lo, hi)) == wanted
    assert axis.span(lo, hi) == (wanted[0], wanted[-1] + window)


@given(st.integers(1, 500), st.sampled_from((1, 8, 32)), st.integers(1, 9), st.data())
def test_windows_of_any_width_stand_on_multiples_and_end_with_the_scene(length, step, wide, data):
    window = step * wide
    stride = step * data.draw(st.integers(1, wide))
    axis = Axis(length, window, stride, step)
    windows = [(s, axis.end(s)) for s in map(axis.start, range(axis.count))]
    assert [s for s, _ in windows] == list(range(0, stride * axis.count, stride))
    assert windows[-1][1] == axis.padded_px == -(-length // step) * step
    assert all(e - s == window for s, e in windows[:-1])
    # No window lies within the one before it, and none leaves a gap.
    assert all(b <= e < f for (_, e), (b, f) in pairwise(windows))
    lo = data.draw(st.integers(0, length - 1))
    hi = data.draw(st.integers(lo + 1, length))
    wanted = [(s, e) for s, e in windows if s < hi and e > lo]
    assert list(axis.starts(lo, hi)) == [s for s, _ in wanted]
    assert axis.span(lo, hi) == (wanted[0][0], wanted[-1][1])
    reach = data.draw(st.integers(0, 100))
    for start, end in wanted:
        first, last = axis.part(start, lo, hi, reach)
        assert start <= first < last <= end
        assert first % step == last % step == 0
        assert first == start or lo - reach - step < first <= lo - reach
        assert last == end or hi + reach <= last < hi + reach + step


@pytest.mark.parametrize("name", sorted(BLENDS))
@pytest.mark.parametrize("window", [1, 2, 31, 256])
def test_blends_are_positive_symmetric_and_at_most_one(name, window):
    weights = blend_weights(name, window)
    assert weights.dtype == np.float32
    assert weights.shape == (window,)
    assert (weights > 0).all()
    assert weights.max() == 1
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-6)


def test_hann_at_half_overlap_adds_up_by_itself():
    weights = blend_weights("hann", 64).astype(np.float64)
    total = weights[32:] + weights[:32]
    np.testing.assert_allclose(total, total[0], rtol=1e-6)


def test_a_callable_blend_is_checked():
    assert blend_weights(lambda n: np.arange(1, n + 1), 4).tolist() == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(ValueError, match="all positive"):
        blend_weights(np.hanning, 8)  # zero at its ends
    with pytest.raises(ValueError, match=r"wanted shape \(8,\)"):
        blend_weights(lambda n: np.ones(n + 1), 8)
    with pytest.raises(ValueError, match="one of gaussian, hann"):
        blend_weights("triangle", 8)


@pytest.mark.parametrize(
    ("overlap", "pixels"), [(0, 0), (0.0, 0), (0.5, 128), (0.25, 64), (1, 1), (255, 255)]
)
def test_overlap_is_a_fraction_or_pixels(overlap, pixels):
    assert overlap_px(overlap, 256) == pixels


@pytest.mark.parametrize("overlap", [-1, 256, 300, 1.5, -0.1, 0.999])
def test_overlap_that_leaves_no_step_is_refused(overlap):
    with pytest.raises(ValueError, match="does not fit a window of 256 px"):
        overlap_px(overlap, 256)


def test_grid_counts_windows():
    assert window_grid((2048, 2048), 256, 128).count == 225

from __future__ import annotations

from functools import partial

import dask.array as da
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Cut, cuts, holey

from deepdem.blocks import Box, chunks_of, map_regions
from deepdem.mosaic import Job, Windows, _fill, refine_block
from deepdem.windows import blend_weights, window_grid


class _Predictor:
    """A network of one layer, in NumPy: a function of windows (n, channel, y, x)."""

    depths = ()

    def __init__(self, residual, most_px=1 << 30):
        self.residual, self.most_px = residual, most_px

    def prepare(self, layers, level, into):
        assert (len(layers), into) == (1, [])

    def __call__(self, batches):
        for batch in batches:
            seen = [batch.height("dsm")]
            if (level := batch.level()) is not None:
                seen.append(level)
            assert seen[0].numel() <= self.most_px
            yield torch.from_numpy(self.residual(torch.stack(seen, 1).numpy())), None


def _fake(batch: np.ndarray) -> np.ndarray:
    """A residual that depends on all of a window: exact in float32, blind to where it stands."""
    assert batch.dtype == np.float32
    assert batch.shape[2] == batch.shape[3]
    filled = np.nan_to_num(batch[:, 0])
    return np.round(filled + filled.max(axis=(1, 2), keepdims=True)) / 8


def _fake_local(batch: np.ndarray, cut: Cut) -> np.ndarray:
    """A residual of the pixel and of blocks of pixels, up to the cut's reach away, as by pooling.

    Beyond the window's edges it sees zeros.
    """
    assert batch.shape[2] % cut.step_px == batch.shape[3] % cut.step_px == 0
    above = np.nan_to_num(batch[:, 0] - batch[:, -1])
    n, height, width = above.shape
    step, far = cut.step_px, int(cut.reach_px) // cut.step_px
    blocks = above.reshape(n, height // step, step, width // step, step).max(axis=(2, 4))
    framed = np.pad(blocks, ((0, 0), (far, far), (far, far)))
    near = sum(
        framed[:, dy : dy + blocks.shape[1], dx : dx + blocks.shape[2]]
        for dy, dx in ((0, far), (2 * far, far), (far, 0), (far, 2 * far))
    )
    return above + near.repeat(step, axis=1).repeat(step, axis=2) / 4


def _level(dsm: np.ndarray, chip: int) -> np.ndarray:
    """The definition: at each pixel the mean over cells, weighted by a B-spline."""
    cell = max(1, chip // 16)

    def spline(length: int) -> np.ndarray:
        # Four boxes of half a chip, convolved with each other.
        centres = (np.arange(0, length, cell) + cell / 2)[None]
        away = np.abs(np.arange(length)[:, None] + 0.5 - centres) / (chip / 2)
        return (np.maximum(2 - away, 0) ** 3 - 4 * np.maximum(1 - away, 0) ** 3) / 6

    ys, xs = np.arange(0, dsm.shape[0], cell), np.arange(0, dsm.shape[1], cell)

    def add(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(values.astype(np.float64), ys, 0), xs, 1)

    finite = np.isfinite(dsm)
    down, across = spline(dsm.shape[0]), spline(dsm.shape[1])
    heights, weights = (
        np.einsum("yi,xj,ij->yx", down, across, add(of), optimize=True)
        for of in (np.where(finite, dsm, 0), finite)
    )
    with np.errstate(invalid="ignore"):
        return np.where(weights > 0, heights / weights, np.nan)


def _naive(dsm: np.ndarray, cut: Cut) -> np.ndarray:
    """The definition, in a plain loop over windows of a mirrored scene."""
    height, width = dsm.shape
    window, stride = cut.window_px, cut.window_px - cut.overlap_px
    seen = [dsm] if cut.level_px is None else [dsm, _level(dsm, cut.level_px)]
    step = cut.step_px
    wholes = [-(-n // step) * step if step else max(n, window) for n in dsm.shape]
    padded = np.pad(
        np.stack(seen).astype(np.float32),
        ((0, 0), (0, wholes[0] - height), (0, wholes[1] - width)), mode="reflect",
    )  # fmt: skip
    line = blend_weights(cut.blend, window)
    total, norm = np.zeros(wholes, np.float64), np.zeros(wholes, np.float64)

    def starts(n: int) -> list[int]:
        if step:  # until one ends with the scene, which it may cut
            return [0, *(s for s in range(stride, n, stride) if s - stride + window < n)]
        return sorted({*range(0, n - window, stride), n - window})

    for y in starts(wholes[0]):
        for x in starts(wholes[1]):
            there = slice(y, min(y + window, wholes[0])), slice(x, min(x + window, wholes[1]))
            batch = padded[:, *there][None]
            if not np.isfinite(batch[:, 0]).any():
                continue
            residual = _fake(batch) if cut.level_px is None else _fake_local(batch, cut)
            weight = np.outer(line, line)[: residual.shape[1], : residual.shape[2]]
            total[there] += residual[0] * weight
            norm[there] += weight
    with np.errstate(invalid="ignore"):
        residual = (total / norm)[:height, :width]
    return np.where(np.isfinite(dsm), dsm + residual, np.nan)


def _blocked(dsm: np.ndarray, cut) -> np.ndarray:
    windows = Windows(
        cut.grid, tuple(map(float, blend_weights(cut.blend, cut.window_px))), cut.reach_px,
        cut.level_px,
    )  # fmt: skip
    job = Job(windows, ("dsm",), batch_size=cut.batch, rows_px=1 + cut.seed % 50)

    fake = _fake if cut.level_px is None else partial(_fake_local, cut=cut)
    predictor = _Predictor(fake, cut.batch * cut.window_px**2)

    def kernel(arrays, *, out, region):
        return refine_block(arrays, predictor, job, out=out, region=region)[0]

    lazy = map_regions(
        kernel, [da.from_array(dsm, chunks=cut.chunks)], chunks=chunks_of(cut.shape, cut.out_px),
        region=windows.needs, dtype=np.float32, name="refine",
    )  # fmt: skip
    return lazy.compute(scheduler="sync")


@given(cuts())
def test_any_chunking_equals_a_plain_loop_over_windows(cut):
    dsm = holey(cut.shape, cut.seed)
    np.testing.assert_allclose(_blocked(dsm, cut), _naive(dsm, cut), atol=2e-4, rtol=1e-6)


@given(cuts(local=True), st.sampled_from((0.0, 2000.0)))
def test_nor_does_it_matter_to_a_network_with_local_centring(cut, height):
    """Whose windows are computed no further than they are needed."""
    dsm = holey(cut.shape, cut.seed, height)
    # At 2000 m a float32 height has steps of 0.12 mm.
    np.testing.assert_allclose(_blocked(dsm, cut), _naive(dsm, cut), atol=8e-4, rtol=0)


@given(cuts(), st.floats(-5, 5, width=32))
def test_a_constant_residual_comes_out_constant(cut, value):
    dsm = holey(cut.shape, cut.seed)
    windows = Windows(cut.grid, tuple(map(float, blend_weights(cut.blend, cut.window_px))))
    whole = Box(0, cut.shape[0], 0, cut.shape[1])
    (out,) = refine_block(
        [dsm], _Predictor(lambda b: np.full(b[:, 0].shape, value, np.float32)),
        Job(windows, ("dsm",), batch_size=3), out=whole, region=windows.needs(whole),
    )  # fmt: skip
    np.testing.assert_allclose(out, dsm + np.float32(value), atol=1e-5, equal_nan=True)


def test_seams_are_gone_with_hann_and_there_without():
    """A network that returns its window's own mean: the worst case for a seam."""
    dsm = np.tile(np.linspace(0, 400, 400, dtype=np.float32), (200, 1))

    def jump(blend: str) -> float:
        windows = Windows(
            window_grid((200, 400), 64, 32), tuple(map(float, blend_weights(blend, 64)))
        )
        whole = Box(0, 200, 0, 400)
        (out,) = refine_block(
            [dsm], _Predictor(lambda b: b[:, 0].mean((1, 2), keepdims=True) + 0 * b[:, 0]),
            Job(windows, ("dsm",)), out=whole, region=whole,
        )  # fmt: skip
        steps = np.abs(np.diff(out - dsm, axis=1))[100, 64:336]
        return float(steps.max())

    # A ramp of 1 m a pixel: its residual cannot be flatter than 1 m a pixel on average.
    assert jump("none") > 25
    assert jump("hann") < 2


def test_filling_is_exact_on_a_plane_s_level_and_leaves_the_rest():
    window = np.full((1, 32, 32), 2000.25, np.float32)
    window[0, 10:14, 10:14] = np.nan
    _fill(window)
    np.testing.assert_array_equal(window, np.full((1, 32, 32), 2000.25, np.float32))
    empty = np.full((1, 8, 8), np.nan, np.float32)
    assert np.isnan(_fill(empty)).all()

"""Draws shapes, chunkings, windows and NaN holes for the property tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from deepdem.windows import BLENDS, Grid, window_grid


@dataclass(frozen=True)
class Cut:
    """A scene's shape, how it is chunked, and how windows stand on it."""

    shape: tuple[int, int]
    chunks: tuple[int, int]
    out_px: int
    window_px: int
    overlap_px: int
    blend: str
    batch: int
    seed: int
    step_px: int = 0
    reach_px: float = math.inf
    level_px: int | None = None

    @property
    def grid(self) -> Grid:
        """The windows that are meant."""
        stride = self.window_px - self.overlap_px
        return window_grid(self.shape, self.window_px, stride, self.step_px)


@st.composite
def cuts(draw: st.DrawFn, *, local: bool = False) -> Cut:
    """Draw a cut; a local one for networks that feel no further than some blocks of pixels."""
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    step = draw(st.sampled_from((1, 2, 4, 8))) if local else 1
    window = step * draw(st.integers(1, 40 // step))
    return Cut(
        shape=shape,
        chunks=draw(st.tuples(st.integers(1, 60), st.integers(1, 60))),
        out_px=draw(st.integers(7, 80)),
        window_px=window,
        overlap_px=step * draw(st.integers(0, window // step - 1)),
        blend=draw(st.sampled_from(sorted(BLENDS))),
        batch=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**16)),
        step_px=step if local else 0,
        reach_px=step * draw(st.integers(1, 3)) if local else math.inf,
        level_px=draw(st.sampled_from((4, 16, 48))) if local else None,
    )


def holey(shape: tuple[int, int], seed: int, offset: float = 0.0) -> np.ndarray:
    """Return a rough float32 surface with blocks and single pixels of NaN."""
    draw = np.random.default_rng(seed)
    array = (draw.normal(size=shape).cumsum(0) + offset).astype(np.float32)
    array[draw.random(shape) < 0.05] = np.nan
    for _ in range(draw.integers(0, 4)):
        y, x = draw.integers(0, shape[0]), draw.integers(0, shape[1])
        array[y : y + draw.integers(1, 40), x : x + draw.integers(1, 40)] = np.nan
    return array

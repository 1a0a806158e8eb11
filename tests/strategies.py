"""Draws shapes, chunkings, windows and NaN holes for the property tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from deepdem.windows import BLENDS


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


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    window = draw(st.integers(1, 40))
    return Cut(
        shape=shape,
        chunks=draw(st.tuples(st.integers(1, 60), st.integers(1, 60))),
        out_px=draw(st.integers(7, 80)),
        window_px=window,
        overlap_px=draw(st.integers(0, window - 1)),
        blend=draw(st.sampled_from(sorted(BLENDS))),
        batch=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**16)),
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

"""Where inference windows stand and how they are blended: NumPy only.

Windows stand on a grid anchored at the scene's origin, pixel (0, 0), so that what a window sees
never depends on how the scene is chunked. A newcomer adds a blend window here, in `BLENDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLENDS", "Axis", "Blend", "Grid", "blend_weights", "overlap_px", "window_grid"]

#: A blend: takes the window's width in pixels, gives weights along one axis, shape (window,),
#: all of them positive. The weights of a window are the outer product of both axes'.
Blend: TypeAlias = Callable[[int], NDArray[np.floating]]


def _hann(window_px: int) -> NDArray[np.float64]:
    # Sampled at pixel centres: never zero, so that the scene's border has a weight, and windows
    # at a stride of window/2, window/3 … add up to a constant by themselves.
    return np.sin(np.pi * (np.arange(window_px) + 0.5) / window_px) ** 2


def _linear(window_px: int) -> NDArray[np.float64]:
    centre = (np.arange(window_px) + 0.5) / window_px
    return 1.0 - np.abs(2.0 * centre - 1.0)


def _gaussian(window_px: int) -> NDArray[np.float64]:
    # A standard deviation of one eighth of the window, as nnU-Net and MONAI use it.
    centre = (np.arange(window_px) + 0.5) / window_px
    return np.exp(-0.5 * ((centre - 0.5) / 0.125) ** 2)


def _none(window_px: int) -> NDArray[np.float64]:
    return np.ones(window_px)


#: The blends that can be asked for by name.
BLENDS: dict[str, Blend] = {
    "hann": _hann,
    "linear": _linear,
    "gaussian": _gaussian,
    "none": _none,
}


def blend_weights(blend: str | Blend, window_px: int) -> NDArray[np.float32]:
    """Return the weights of one window along one axis.

    Parameters
    ----------
    blend
        A name from `BLENDS`, or a callable that takes the width and gives the weights.
    window_px
        The window's width in pixels.

    Returns
    -------
    ndarray
        Shape (window_px,), float32, positive and finite, the largest 1.

    Raises
    ------
    ValueError
        The name is not known, or a callable's weights have another shape or are not positive.
    """
    if isinstance(blend, str):
        if blend not in BLENDS:
            raise ValueError(
                f"blend={blend!r} is not known: pass one of {', '.join(sorted(BLENDS))}, or a "
                "callable that takes the window's width and gives positive weights"
            )
        function = BLENDS[blend]
    else:
        function = blend
    weights = np.asarray(function(window_px), dtype=np.float64)
    if weights.shape != (window_px,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(
            f"blend={blend!r} gave weights of shape {weights.shape} between {weights.min()} and "
            f"{weights.max()} for a window of {window_px} px: wanted shape ({window_px},), all "
            "positive and finite"
        )
    scaled: NDArray[np.float32] = (weights / weights.max()).astype(np.float32)
    return scaled


def overlap_px(overlap: float, window_px: int) -> int:
    """Return the overlap of neighbouring windows in pixels.

    Parameters
    ----------
    overlap
        A float below 1 is a fraction of the window; an int of 1 or more is pixels; 0 is none.
    window_px
        The window's width in pixels.

    Raises
    ------
    ValueError
        The overlap is negative or leaves no step between windows.

    Examples
    --------
    >>> overlap_px(0.5, 256), overlap_px(32, 256)
    (128, 32)
    """
    is_fraction = isinstance(overlap, float) and overlap < 1
    pixels = round(overlap * window_px) if is_fraction else int(overlap)
    if overlap < 0 or (pixels != overlap and not is_fraction) or pixels >= window_px:
        raise ValueError(
            f"overlap={overlap!r} does not fit a window of {window_px} px: pass a fraction in "
            f"[0, 1) or whole pixels from 0 to {window_px - 1}"
        )
    return pixels


@dataclass(frozen=True)
class Axis:
    """The windows along one axis of a scene: every `stride_px`, the last one moved inward or cut.

    Attributes
    ----------
    length_px
        The scene's length. The caller pads what is too short (see `padded_px`).
    window_px, stride_px
        The window's width and the step from one to the next.
    step_px
        0: all windows are equally wide, and the last one is moved inward. Else windows may be as
        narrow as this, and begin and end at multiples of it: the last one ends with the scene.
    """

    length_px: int
    window_px: int
    stride_px: int
    step_px: int = 0

    @property
    def padded_px(self) -> int:
        """The length with the padding that a small scene, or its last window, needs."""
        if self.step_px:
            return -(-self.length_px // self.step_px) * self.step_px
        return max(self.length_px, self.window_px)

    @property
    def count(self) -> int:
        """How many windows there are."""
        return -(-max(self.padded_px - self.window_px, 0) // self.stride_px) + 1

    def start(self, index: int) -> int:
        """Return the first pixel of window `index`."""
        regular = index * self.stride_px
        return regular if self.step_px else min(regular, self.padded_px - self.window_px)

    def end(self, start: int) -> int:
        """Return the pixel after the last one of the window that begins at `start`."""
        return min(start + self.window_px, self.padded_px)

    def covering(self, lo: int, hi: int) -> range:
        """Return the indices of all windows that touch pixels [lo, hi)."""
        first = max(0, (lo - self.window_px) // self.stride_px + 1)
        last = min(self.count - 1, (hi - 1) // self.stride_px)
        # The last window is moved inward, so it may reach pixels before its place on the grid.
        if not self.step_px and hi > self.padded_px - self.window_px:
            last = self.count - 1
        return range(min(first, last), last + 1)

    def starts(self, lo: int, hi: int) -> NDArray[np.int64]:
        """Return the first pixels of all windows that touch pixels [lo, hi), ascending."""
        return np.array([self.start(i) for i in self.covering(lo, hi)], dtype=np.int64)

    def part(self, start: int, lo: int, hi: int, reach_px: float) -> tuple[int, int]:
        """Return the pixels of a window that tell on its result within [lo, hi).

        A network that feels no further than `reach_px` gives the same there from a part of the
        window, if the part begins and ends at a multiple of the step.
        """
        first, last, step = start, self.end(start), self.step_px
        if step and math.isfinite(reach_px):
            reach = int(reach_px)
            first = max(first, (lo - reach) // step * step)
            last = min(last, -(-(hi + reach) // step) * step)
        return first, last

    def span(self, lo: int, hi: int, reach_px: float = math.inf) -> tuple[int, int]:
        """Return the pixels [first, last) of the windows touching [lo, hi) that are needed."""
        touching = self.covering(lo, hi)
        first, _ = self.part(self.start(touching[0]), lo, hi, reach_px)
        _, last = self.part(self.start(touching[-1]), lo, hi, reach_px)
        return first, last


@dataclass(frozen=True)
class Grid:
    """The windows of a scene: one `Axis` along y and one along x."""

    y: Axis
    x: Axis

    @property
    def count(self) -> int:
        """How many windows cover the scene."""
        return self.y.count * self.x.count


@lru_cache(maxsize=32)
def window_grid(shape: tuple[int, int], window_px: int, stride_px: int, step_px: int = 0) -> Grid:
    """Return the grid of windows over a scene of `shape` (y, x)."""
    y, x = (Axis(length, window_px, stride_px, step_px) for length in shape)
    return Grid(y, x)

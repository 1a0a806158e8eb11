"""One block of a result from its windows: NumPy but for the network that it calls.

What a window sees depends on its place on the scene's window grid alone, never on a chunk: that
is why any chunking gives the same surface.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.fill import fillnodata

from deepdem.blocks import Box
from deepdem.layers import describe
from deepdem.level import LevelRegion, local_level
from deepdem.windows import Grid

__all__ = ["Job", "Predictor", "Windows", "auto_batch", "refine_block"]

# Raised for windows, which have no place on the ground when their voids are filled.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.fill")

#: Takes batches of windows (n, channel, y, x) of raw layers, gives of each, in order, the residual
#: (n, y, x) in metres and its variance, or None for the latter.
Predictor: TypeAlias = Callable[
    [Iterator[NDArray[np.float32]]],
    Iterable[tuple[NDArray[np.float32], NDArray[np.float32] | None]],
]


#: A window, and the part of it that is computed.
Part: TypeAlias = tuple[Box, Box]


@dataclass(frozen=True)
class Windows:
    """How a scene is cut into windows.

    Attributes
    ----------
    grid
        Where they stand.
    weights
        Along one axis of a window.
    reach_px
        How far a pixel tells on the result; of a window that straddles the output box no more
        than that is computed beyond it. Infinite: all of each window.
    level_px
        The width of a chip, if heights are relative to the local level; None: to the window's
        own mean.
    """

    grid: Grid
    weights: tuple[float, ...]
    reach_px: float = math.inf
    level_px: int | None = None

    @property
    def width(self) -> int:
        """A window's width in pixels."""
        return self.grid.y.window_px

    @property
    def shape(self) -> tuple[int, int]:
        """The scene's."""
        return self.grid.y.length_px, self.grid.x.length_px

    def region(self, out: Box) -> Box:
        """Return the pixels of the scene that the windows touching `out` see."""
        y0, y1 = self.grid.y.span(out.y0, out.y1, self.reach_px)
        x0, x1 = self.grid.x.span(out.x0, out.x1, self.reach_px)
        return Box(y0, min(y1, self.shape[0]), x0, min(x1, self.shape[1]))

    def needs(self, out: Box) -> Box:
        """Return the pixels of the scene that a result in `out` depends on."""
        seen = self.region(out)
        return seen if self.level_px is None else LevelRegion(self.level_px, self.shape)(seen)

    def parts(self, out: Box) -> list[Part]:
        """Return the windows that touch `out`, row by row, and what of each must be computed."""
        return [
            (Box(y, self.grid.y.end(y), x, self.grid.x.end(x)),
             Box(*self.grid.y.part(y, out.y0, out.y1, self.reach_px),
                 *self.grid.x.part(x, out.x0, out.x1, self.reach_px)))
            for y in self.grid.y.starts(out.y0, out.y1).tolist()
            for x in self.grid.x.starts(out.x0, out.x1).tolist()
        ]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a block of the result is made of, besides the layers and the networks.

    Attributes
    ----------
    windows
        Their grid and weights, and what heights in them are relative to.
    layers
        The layers' names, in the order of the arrays.
    mask
        The name of a further array, not seen by the network, of pixels that may be used.
    batch_size
        Windows in one call of the predictor, or parts of windows of no more pixels than that;
        None: what suits the device.
    fill_voids
        Whether voids of the initial DSM are filled.
    uncertainty
        Whether a plane of standard deviations is made.
    """

    windows: Windows
    layers: tuple[str, ...]
    mask: str | None = None
    batch_size: int | None = None
    fill_voids: bool = False
    uncertainty: bool = False

    @property
    def planes(self) -> tuple[str, ...]:
        """The names of what is made, in order."""
        extra = (("refined_std", self.uncertainty), ("filled", self.fill_voids))
        return ("refined", *(name for name, wanted in extra if wanted))

    @property
    def dsm(self) -> int:
        """The index of the initial DSM among the arrays."""
        return self.layers.index("dsm")

    def usable(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Return where a result is wanted: where every layer, and the mask, has data.

        With `fill_voids` also where the DSM is void, if all is there that does not itself come
        of matching: the triangulation error is void where the DSM is, and so is ``valid``.
        """

        def there(array: NDArray[Any]) -> NDArray[np.bool_]:
            return np.isfinite(array) if array.dtype.kind == "f" else array.astype(bool)

        def everywhere(arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
            # One by one: NumPy would make one array of all of them.
            result = there(arrays[0])
            for array in arrays[1:]:
                result &= there(array)
            return result

        usable = everywhere(arrays)
        if self.fill_voids:
            names = [*self.layers, *([self.mask] if self.mask else [])]
            of_matching = ("height", "error", "mask")
            others = [a for n, a in zip(names, arrays, strict=True)
                      if describe(n).role not in of_matching]  # fmt: skip
            usable |= everywhere([~there(arrays[self.dsm]), *others])
        return usable


def refine_block(
    arrays: Sequence[NDArray[Any]], predictor: Predictor, job: Job, *, out: Box, region: Box
) -> NDArray[np.float32]:
    """Return the planes of one output box.

    Parameters
    ----------
    arrays
        One a layer of the job, and the mask if it has one; each of the region's shape, raw
        units, NaN for no data. They are not changed.
    predictor
        Gives the residuals of batches of windows, and their variances, in order.
    job
        Windows, layers, what is wanted.
    out, region
        Pixels of the scene: what is made, and what the arrays cover.

    Returns
    -------
    ndarray
        (plane, *out.shape), float32. ``refined``, metres: the initial DSM plus the weighted mean
        of the windows' residuals; NaN where no result is wanted. ``refined_std``, metres: the
        windows are a mixture by their weights, so the variance is the weighted mean of their
        variances plus the weighted variance of their residuals. ``filled``: 1 or 0.
    """
    windows, level = job.windows, None
    if windows.level_px is not None:
        seen = windows.region(out)
        level = local_level([arrays[job.dsm]], out=seen, region=region, chip_px=windows.level_px)
        arrays, region = [array[seen.within(region)] for array in arrays], seen
    inside = out.within(region)
    wanted = job.usable([array[inside] for array in arrays])
    if level is not None:
        wanted &= np.isfinite(level[inside])
    channels = [*arrays[: len(job.layers)], *([] if level is None else [level])]
    dsm = arrays[job.dsm][inside]
    void = wanted & ~np.isfinite(dsm)
    parts = [
        (window, part)
        for window, part in windows.parts(out)
        if _worth(window, wanted, arrays[job.dsm], out, region)
    ]
    groups = _groups(parts, job)
    line = np.array(windows.weights, dtype=np.float32)
    weight = np.outer(line, line)
    norm = np.zeros(out.shape, dtype=np.float32)
    planes = np.zeros((len(job.planes), *out.shape), dtype=np.float32)
    mean, square = planes[0], planes[1 if job.uncertainty else 0]
    starts: deque[NDArray[np.float32]] = deque()

    def batches() -> Iterator[NDArray[np.float32]]:
        for group in groups:
            batch = _batch(channels, [part for _, part in group], region)
            if job.fill_voids:
                starts.append(_fill(batch[:, job.dsm], None if level is None else batch[:, -1]))
            yield batch

    for group, (residuals, variances) in zip(groups, predictor(batches()), strict=True):
        start = starts.popleft() if job.fill_voids else None
        for n, (window, part) in enumerate(group):
            box = window.intersect(out)
            there, here = box.within(out), box.within(part)
            w, residual = weight[box.within(window)], residuals[n][here]
            if start is not None:
                # In a void each window has an initial DSM of its own, interpolated from what
                # it sees: what it adds to zero, the void's value below, is its height.
                residual = residual + np.where(void[there], start[n][here], 0)
            norm[there] += w
            mean[there] += w * residual
            if job.uncertainty:
                assert variances is not None
                square[there] += w * (variances[n][here] + residual * residual)
    _finish(job, planes, wanted & (norm > 0), void, dsm, norm)
    return planes


def _finish(
    job: Job,
    planes: NDArray[np.float32],
    done: NDArray[np.bool_],
    void: NDArray[np.bool_],
    dsm: NDArray[Any],
    norm: NDArray[np.float32],
) -> None:
    """Make the planes of a block, in place, of the weighted sums over its windows."""
    mean = planes[0]
    np.divide(mean, norm, out=mean, where=done)
    if job.uncertainty:
        square = planes[1]
        np.divide(square, norm, out=square, where=done)
        square -= mean * mean
        np.sqrt(np.maximum(square, 0, out=square), out=square)
        square[~done] = np.nan
    np.add(mean, dsm, out=mean, where=done & ~void)
    mean[~done] = np.nan
    if job.fill_voids:
        planes[-1] = void & done


def _groups(parts: Sequence[Part], job: Job) -> list[list[Part]]:
    """Return the parts in groups of one shape, each of no more pixels than a batch of windows."""
    width = job.windows.width
    pixels = (job.batch_size or auto_batch("cpu", width)) * width**2
    shapes: dict[tuple[int, int], list[Part]] = {}
    for window, part in parts:
        shapes.setdefault(part.shape, []).append((window, part))
    return [
        same[k : k + size]
        for shape, same in shapes.items()
        for size in [pixels // (shape[0] * shape[1])]
        for k in range(0, len(same), size)
    ]


def _worth(
    window: Box, wanted: NDArray[np.bool_], dsm: NDArray[Any], out: Box, region: Box
) -> bool:
    """Return whether a window has a wanted pixel in the output box, and any height at all."""
    if not wanted[window.intersect(out).within(out)].any():
        return False
    return bool(np.isfinite(dsm[window.intersect(region).within(region)]).any())


def _fill(
    heights: NDArray[np.float32], levels: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Fill the NaN of each window's heights in place, from the window alone; return the heights.

    By inverse distance from the nearest pixels in eight directions (GDAL's FillNodata), over
    heights above the local level, or else above the window's lowest: at 2000 m a float32 would
    lose the decimetres.
    """
    for n, window in enumerate(heights):
        finite = np.isfinite(window)
        if not finite.all() and finite.any():
            low = window[finite].min() if levels is None else levels[n]
            above = np.where(finite, window - low, 0)
            window[:] = low + fillnodata(above, finite, max_search_distance=2.0 * len(window))
    return heights


def _batch(
    channels: Sequence[NDArray[Any]], parts: Sequence[Box], region: Box
) -> NDArray[np.float32]:
    """Return windows (n, channel, y, x); beyond the scene's far edge it is mirrored."""
    shape = parts[0].shape
    batch = np.empty((len(parts), len(channels), *shape), dtype=np.float32)
    for n, part in enumerate(parts):
        box = part.intersect(region)
        there = box.within(region)
        beyond = [(0, whole - length) for whole, length in zip(shape, box.shape, strict=True)]
        for m, channel in enumerate(channels):
            pixels = channel[there]
            if pixels.shape != shape:
                pixels = np.pad(pixels, beyond, mode="reflect")
            batch[n, m] = pixels
    return batch


def auto_batch(device: str, width: int) -> int:
    """Return how many windows of `width` suit a device in one forward pass."""
    # Four windows of 256 on a CPU: weights are loaded once for all, and the allocator still keeps
    # between layers what it gave (see predict.py).
    pixels = 4 * 256**2 if device == "cpu" else 32 * 256**2
    return max(1, min(pixels // width**2, 64))

"""One block of a result from its windows: torch, on whatever device the networks are.

What a window sees depends on its place on the scene's window grid alone, never on a chunk: that
is why any chunking gives the same surface. What does not depend on the window, which is all but
the heights, is made ready for the networks once for all the windows that share it.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.fill import fillnodata
from torch import Tensor

from deepdem._memory import turn_on
from deepdem.blocks import Box
from deepdem.layers import describe
from deepdem.level import LevelRegion, local_level
from deepdem.windows import Grid

__all__ = ["Batch", "Job", "Predictor", "Windows", "auto_batch", "refine_block"]

# Raised for windows, which have no place on the ground when their voids are filled.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.fill")

#: Rows and columns of a window in a region.
Place: TypeAlias = tuple[slice, slice]


@dataclass(frozen=True)
class Batch:
    """Windows, or parts of windows, of one shape, that are cut when they are asked for.

    Attributes
    ----------
    heights
        The height layers of the region, metres, NaN for no data: (y, x) each,
        by name.
    level
        The local level of the region, if heights are relative to it.
    ready
        What the predictor made of the region, (y, x, n) each.
    places
        Where the windows are in the region.
    filled
        (n, y, x), the initial DSM of each window with its voids filled; None: as it is.
    """

    heights: dict[str, Tensor]
    level: Tensor | None
    ready: Sequence[Tensor]
    places: Sequence[Place]
    filled: Tensor | None = None

    def __len__(self) -> int:
        """Return how many windows there are."""
        return len(self.places)

    def part(self, lo: int, hi: int) -> Batch:
        """Return windows [lo, hi)."""
        filled = None if self.filled is None else self.filled[lo:hi]
        return Batch(self.heights, self.level, self.ready, self.places[lo:hi], filled)

    def cut(self, region: Tensor) -> Tensor:
        """Return the windows of something of the region's shape, (n, y, x, ...)."""
        return torch.stack([region[place] for place in self.places])

    def height(self, name: str) -> Tensor:
        """Return a height layer, (n, y, x)."""
        if name == "dsm" and self.filled is not None:
            return self.filled
        return self.cut(self.heights[name])


class Predictor(Protocol):
    """What a block asks of the networks."""

    @property
    def depths(self) -> Sequence[int]:
        """How many channels the things have that it makes ready of a region."""

    def prepare(self, layers: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Make ready what does not depend on a window.

        Parameters
        ----------
        layers
            (y, x) each, some rows of a region: raw units, NaN for no data, in the job's order.
        into
            (y, x, depth) each: where it goes.
        """

    def __call__(self, batches: Iterator[Batch]) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Give the residual of each batch (n, y, x), metres, and its variance or None, in order."""


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
        (y0, y1), (x0, x1) = self._spans(out)
        height, width = self.shape
        # And those that what is beyond the far edges mirrors.
        y0, x0 = (max(0, min(lo, 2 * length - 1 - hi)) if hi > length else lo
                  for lo, hi, length in ((y0, y1, height), (x0, x1, width)))  # fmt: skip
        return Box(y0, min(y1, height), x0, min(x1, width))

    def _spans(self, out: Box) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.grid.y.span(out.y0, out.y1, self.reach_px),
                self.grid.x.span(out.x0, out.x1, self.reach_px))  # fmt: skip

    def framed(self, out: Box) -> Box:
        """Return the same with what is beyond the scene's far edges, which mirror it."""
        (_, y1), (_, x1) = self._spans(out)
        seen = self.region(out)
        return Box(seen.y0, max(y1, seen.y1), seen.x0, max(x1, seen.x1))

    def needs(self, out: Box) -> Box:
        """Return the pixels of the scene that a result in `out` depends on."""
        seen = self.region(out)
        return seen if self.level_px is None else LevelRegion(self.level_px, self.shape)(seen)

    def rows(self, out: Box) -> Iterator[list[Part]]:
        """Give the windows that touch `out`, row by row, and what of each must be computed."""
        for y in self.grid.y.starts(out.y0, out.y1).tolist():
            yield [
                (Box(y, self.grid.y.end(y), x, self.grid.x.end(x)),
                 Box(*self.grid.y.part(y, out.y0, out.y1, self.reach_px),
                     *self.grid.x.part(x, out.x0, out.x1, self.reach_px)))
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


@torch.inference_mode()
def refine_block(
    arrays: Sequence[NDArray[Any]],
    predictor: Predictor,
    job: Job,
    *,
    out: Box,
    region: Box,
    device: str = "cpu",
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
    device
        Where it is made: the layers go there once, and the finished planes come back.

    Returns
    -------
    ndarray
        (plane, *out.shape), float32. ``refined``, metres: the initial DSM plus the weighted mean
        of the windows' residuals; NaN where no result is wanted. ``refined_std``, metres: the
        windows are a mixture by their weights, so the variance is the weighted mean of their
        variances plus the weighted variance of their residuals. ``filled``: 1 or 0.
    """
    windows, level = job.windows, None
    seen = windows.region(out)
    if windows.level_px is not None:
        level = local_level([arrays[job.dsm]], out=seen, region=region, chip_px=windows.level_px)
    arrays = [array[seen.within(region)] for array in arrays]
    with turn_on(device):
        ground = _Ground(arrays, level, predictor, job, out, seen, device)
        sums = _Sums(job, ground, out, device)
        under_way: deque[tuple[list[Part], Tensor | None]] = deque()

        def batches() -> Iterator[Batch]:
            for group in _groups(ground, job, out):
                batch = ground.batch([part for _, part in group])
                under_way.append((group, batch.filled))
                yield batch

        for residuals, variances in predictor(batches()):
            sums.add(*under_way.popleft(), residuals, variances)
        return sums.planes().cpu().numpy()


class _Ground:
    """The layers that the windows of an output box see, read row by row, as far as needed."""

    def __init__(
        self,
        arrays: Sequence[NDArray[Any]],
        level: NDArray[np.float32] | None,
        predictor: Predictor,
        job: Job,
        out: Box,
        seen: Box,
        device: str,
    ):
        self.arrays, self.predictor, self.job, self.device = arrays, predictor, job, device
        self.out, self.seen, self.framed = out, seen, job.windows.framed(out)
        self.known = None if level is None else level[out.within(seen)]
        self.wanted = np.zeros(out.shape, dtype=np.bool_)
        self.heights = {
            name: torch.empty(self.framed.shape, device=device)
            for name in job.layers
            if describe(name).is_height
        }
        self.ready = [torch.empty((*self.framed.shape, n), device=device) for n in predictor.depths]
        self.level = None
        if level is not None:
            self.level = torch.empty(self.framed.shape, device=device)
            self.level[: seen.shape[0], : seen.shape[1]] = torch.from_numpy(level)
        # Pixel i of the frame is pixel mirror[i] of what is there.
        self.mirror = [np.pad(np.arange(n), (0, m - n), mode="reflect")
                       for n, m in zip(seen.shape, self.framed.shape, strict=True)]  # fmt: skip
        self._mirror_columns(self.level, 0, seen.shape[0])
        self._mirror_rows(self.level)
        self.read_px = 0

    def read(self, until: int) -> None:
        """Read the rows of the scene up to row `until`, those that were not read yet."""
        first, last = self.read_px, min(until, self.seen.y1) - self.seen.y0
        if last <= first:
            return
        rows = [array[first:last] for array in self.arrays]
        there = Box(self.seen.y0 + first, self.seen.y0 + last, self.seen.x0, self.seen.x1)
        inside = there.intersect(self.out)
        if not inside.empty:
            place = inside.within(self.out)
            wanted = self.job.usable([part[inside.within(there)] for part in rows])
            if self.known is not None:
                wanted &= np.isfinite(self.known[place])
            self.wanted[place] = wanted
        layers = [_tensor(part).to(self.device, non_blocking=True)
                  for part in rows[: len(self.job.layers)]]  # fmt: skip
        width = self.seen.shape[1]
        for name, layer in zip(self.job.layers, layers, strict=True):
            if name in self.heights:
                self.heights[name][first:last, :width] = layer
        self.predictor.prepare(layers, [ready[first:last, :width] for ready in self.ready])
        canvases = [*self.heights.values(), *self.ready]
        for canvas in canvases:
            self._mirror_columns(canvas, first, last)
        if last == self.seen.shape[0]:
            for canvas in canvases:
                self._mirror_rows(canvas)
        self.read_px = last

    def _mirror_columns(self, canvas: Tensor | None, first: int, last: int) -> None:
        width = self.seen.shape[1]
        if canvas is not None and self.framed.shape[1] > width:
            canvas[first:last, width:] = canvas[first:last, self.mirror[1][width:]]

    def _mirror_rows(self, canvas: Tensor | None) -> None:
        height = self.seen.shape[0]
        if canvas is not None and self.framed.shape[0] > height:
            canvas[height:] = canvas[self.mirror[0][height:]]

    def worth(self, window: Box) -> bool:
        """Return whether a window has a wanted pixel in the output box, and any height at all."""
        if not self.wanted[window.intersect(self.out).within(self.out)].any():
            return False
        if not self.job.fill_voids:
            return True  # a pixel that is wanted has one
        dsm = self.arrays[self.job.dsm][window.intersect(self.seen).within(self.seen)]
        return bool(np.isfinite(dsm).any())

    def batch(self, parts: Sequence[Box]) -> Batch:
        """Return these windows, the voids of their initial DSM filled if they are to be."""
        places = [part.within(self.framed) for part in parts]
        batch = Batch(self.heights, self.level, self.ready, places)
        if not self.job.fill_voids:
            return batch
        levels = None if self.level is None else batch.cut(self.level).cpu().numpy()
        filled = _fill(batch.height("dsm").cpu().numpy(), levels)
        return Batch(
            self.heights, self.level, self.ready, places,
            torch.from_numpy(filled).to(self.device),
        )  # fmt: skip

    def dsm(self) -> Tensor:
        """Return the initial DSM of the output box."""
        return self.heights["dsm"][self.out.within(self.framed)]


class _Sums:
    """The weighted sums over the windows of an output box, and the planes that are made of them."""

    def __init__(self, job: Job, ground: _Ground, out: Box, device: str):
        self.job, self.ground, self.out = job, ground, out
        line = torch.tensor(job.windows.weights, device=device)
        self.weight = torch.outer(line, line)
        self.sums = torch.zeros((len(job.planes), *out.shape), device=device)
        self.norm = torch.zeros(out.shape, device=device)

    def add(
        self,
        group: Sequence[Part],
        filled: Tensor | None,
        residuals: Tensor,
        variances: Tensor | None,
    ) -> None:
        """Add the windows of a batch."""
        for n, (window, part) in enumerate(group):
            box = window.intersect(self.out)
            there, here = box.within(self.out), box.within(part)
            weight, residual = self.weight[box.within(window)], residuals[n][here]
            if filled is not None:
                # In a void each window has an initial DSM of its own, interpolated from what
                # it sees: what it adds to zero, the void's value below, is its height.
                void = self.ground.dsm()[there].isfinite().logical_not()
                residual = residual + torch.where(void, filled[n][here], 0.0)
            self.norm[there] += weight
            self.sums[0][there].addcmul_(weight, residual)
            if self.job.uncertainty:
                assert variances is not None
                square = residual.square().add_(variances[n][here])
                self.sums[1][there].addcmul_(weight, square)

    def planes(self) -> Tensor:
        """Return the planes; the sums are gone."""
        wanted = torch.from_numpy(self.ground.wanted).to(self.norm.device)
        dsm, planes = self.ground.dsm(), self.sums
        done = wanted.logical_and_(self.norm > 0)
        void = dsm.isfinite().logical_not_()
        mean = planes[0].div_(self.norm)
        if self.job.uncertainty:
            square = planes[1].div_(self.norm).sub_(mean.square())
            square.clamp_(min=0).sqrt_().masked_fill_(~done, torch.nan)
        mean.add_(dsm.masked_fill(void, 0.0)).masked_fill_(~done, torch.nan)
        if self.job.fill_voids:
            planes[-1] = void & done
        return planes


def _groups(ground: _Ground, job: Job, out: Box) -> Iterator[list[Part]]:
    """Give the windows that are worth it, each with the part that is computed, row by row.

    In groups of one shape, each of no more pixels than a batch of windows.
    """
    width = job.windows.width
    pixels = (job.batch_size or auto_batch("cpu", width)) * width**2
    shapes: dict[tuple[int, int], list[Part]] = {}
    for row in job.windows.rows(out):
        ground.read(max(part.y1 for _, part in row))
        for window, part in row:
            if not ground.worth(window):
                continue
            same = shapes.setdefault(part.shape, [])
            same.append((window, part))
            if len(same) == pixels // (part.shape[0] * part.shape[1]):
                yield shapes.pop(part.shape)
    ground.read(out.y1)
    yield from shapes.values()


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor: as it is, or as float32 where torch has no such thing."""
    if array.dtype not in (np.float32, np.bool_):
        array = array.astype(np.float32)
    plain = array.flags.writeable and all(step >= 0 for step in array.strides)
    return torch.from_numpy(array if plain else array.copy())


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


def auto_batch(device: str, width: int) -> int:
    """Return how many windows of `width` suit a device in one forward pass."""
    if not device.startswith("cuda"):
        # Four windows of 256 on a CPU: weights are loaded once for all, and the allocator still
        # keeps between layers what it gave (see predict.py).
        pixels = (4 if device == "cpu" else 32) * 256**2
        return max(1, min(pixels // width**2, 64))
    # One of 256 pixels for each GiB of the card, of which a ResNet-18 U-Net takes an eighth in
    # float32; 64 fill an H100. cuDNN's choices for 16 and 32 take 1.5 times as long a window there.
    room = torch.cuda.get_device_properties(device).total_memory >> 30
    return max(1, min(room, 64) * 256**2 // width**2)

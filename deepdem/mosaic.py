"""One block of a result from its windows: torch, on whatever device the networks are.

What a window sees depends on its place on the scene's window grid alone, never on a chunk: that
is why any chunking gives the same surface. What does not depend on the window, which is all but
the heights, is made ready for the networks once for all the windows that share it.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# Rows of a result that are finished at once on a CPU, so that they stay in its cache.
_FINISHED_ROWS = 16

#: Rows and columns of something in an array.
Place: TypeAlias = tuple[slice, slice]


class Array(Protocol):
    """What gives NumPy arrays when it is sliced: one itself, or what reads them only then."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def __getitem__(self, place: Place, /) -> NDArray[Any]:
        """Return some rows and columns of it."""


@dataclass(frozen=True)
class _Band:
    """Rows of a region, from `top` on, of which windows are cut; see `Batch`."""

    top: int
    heights: dict[str, Tensor]
    level: Tensor | None
    ready: Sequence[Tensor]


@dataclass(frozen=True)
class Batch:
    """Windows, or parts of windows, of one shape, that are cut when they are asked for.

    Attributes
    ----------
    places
        The rows of the region that each window is in, and its place in them.
    filled
        (n, y, x), the initial DSM of each window with its voids filled; None: as it is.
    """

    places: Sequence[tuple[_Band, Place]]
    filled: Tensor | None = None

    def __len__(self) -> int:
        """Return how many windows there are."""
        return len(self.places)

    def part(self, lo: int, hi: int) -> Batch:
        """Return windows [lo, hi)."""
        return Batch(self.places[lo:hi], None if self.filled is None else self.filled[lo:hi])

    def views(self, index: int) -> list[Tensor]:
        """Return each window of what the predictor made ready as thing `index`, (y, x, depth)."""
        return [band.ready[index][place] for band, place in self.places]

    def ready(self, index: int) -> Tensor:
        """Return the same as one, (n, y, x, depth)."""
        return torch.stack(self.views(index))

    def height(self, name: str) -> Tensor:
        """Return a height layer, metres, NaN for no data, (n, y, x)."""
        if name == "dsm" and self.filled is not None:
            return self.filled
        return torch.stack([band.heights[name][place] for band, place in self.places])

    def level(self) -> Tensor | None:
        """Return the local level, metres, (n, y, x), if heights are relative to it."""
        levels = [band.level[place] for band, place in self.places if band.level is not None]
        return torch.stack(levels) if levels else None


class Predictor(Protocol):
    """What a block asks of the networks."""

    @property
    def depths(self) -> Sequence[int]:
        """How many channels the things have that it makes ready of a region."""

    def prepare(
        self, layers: Sequence[Tensor], level: Tensor | None, into: Sequence[Tensor]
    ) -> None:
        """Make ready what does not depend on a window.

        Parameters
        ----------
        layers
            (y, x) each, some rows of a region: raw units, NaN for no data, in the job's order.
        level
            (y, x), the local level there, if heights are relative to it.
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
    rows_px
        Rows that are read at once, beginning at a multiple of them, where it is not all.
    """

    windows: Windows
    layers: tuple[str, ...]
    mask: str | None = None
    batch_size: int | None = None
    fill_voids: bool = False
    uncertainty: bool = False
    rows_px: int = 512

    @property
    def planes(self) -> tuple[str, ...]:
        """The names of what is made, in order."""
        extra = (("refined_std", self.uncertainty), ("filled", self.fill_voids))
        return ("refined", *(name for name, wanted in extra if wanted))

    @property
    def heights(self) -> tuple[str, ...]:
        """The layers that are heights."""
        return tuple(name for name in self.layers if describe(name).is_height)

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
    arrays: Sequence[Array],
    predictor: Predictor,
    job: Job,
    *,
    out: Box,
    region: Box,
    device: str = "cpu",
    note: Callable[[Sequence[NDArray[Any]]], None] | None = None,
) -> NDArray[np.float32]:
    """Return the planes of one output box.

    Parameters
    ----------
    arrays
        One a layer of the job, and the mask if it has one; each of the region's shape, raw
        units, NaN for no data. They are not changed, and on a CPU are sliced only when the rows
        are due: what comes of it is read while other windows are computed.
    predictor
        Gives the residuals of batches of windows, and their variances, in order.
    job
        Windows, layers, what is wanted.
    out, region
        Pixels of the scene: what is made, and what the arrays cover.
    device
        Where it is made: the layers go there once, and the finished planes come back.
    note
        Is told of the arrays' pixels in the output box, some rows at a time, in order.

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
    held: list[Array] = list(arrays)
    if windows.level_px is not None or job.fill_voids:
        dsm = held[job.dsm] = held[job.dsm][:, :]
        if windows.level_px is not None:
            level = local_level([dsm], out=seen, region=region, chip_px=windows.level_px)
    if device != "cpu":
        # Nothing is read while others wait for their turn.
        held = [array[:, :] for array in held]
    with turn_on(device):
        ground = _Ground(held, level, predictor, job, out, region, device, note)
        sums: _Sums | None = None
        under_way: deque[tuple[list[Part], Tensor | None]] = deque()

        def batches() -> Iterator[Batch]:
            for group, batch in _groups(ground, job, out):
                under_way.append((group, batch.filled))
                yield batch

        for residuals, variances in predictor(batches()):
            # Not before the first batches are under way: the memory takes its time.
            sums = sums or _Sums(job, ground, device)
            sums.add(*under_way.popleft(), residuals, variances)
        sums = sums or _Sums(job, ground, device)
        return sums.planes().cpu().numpy()


class _Ground:
    """The layers that the windows of an output box see, read in bands of rows, as far as needed."""

    def __init__(
        self,
        arrays: Sequence[Array],
        level: NDArray[np.float32] | None,
        predictor: Predictor,
        job: Job,
        out: Box,
        region: Box,
        device: str,
        note: Callable[[Sequence[NDArray[Any]]], None] | None,
    ):
        self.arrays, self.predictor, self.job, self.device = arrays, predictor, job, device
        self.out, self.region, self.note = out, region, note
        self.seen, self.framed = job.windows.region(out), job.windows.framed(out)
        self.known = None if level is None else level[out.within(self.seen)]
        self.wanted = np.zeros(out.shape, dtype=np.bool_)
        self.dsm = torch.empty(out.shape, device=device)
        # Pixel i of the frame is pixel mirror[i] of what is there.
        self.mirror = [
            np.pad(np.arange(n), (0, m - n), mode="reflect")
            for n, m in zip(self.seen.shape, self.framed.shape, strict=True)
        ]
        self.level = None
        if level is not None:
            if self.framed.shape != self.seen.shape:
                level = level[np.ix_(*self.mirror)]
            self.level = torch.from_numpy(level).to(device)
        self.band = _Band(0, {}, None, ())
        self.read_px = 0

    def read(self, first: int, until: int) -> None:
        """Have rows [first, until) of the scene in the band, as far as the scene goes."""
        if min(until, self.seen.y1) - self.seen.y0 <= self.read_px:
            return
        rows = self.job.rows_px
        last = min(-(-until // rows) * rows, self.seen.y1) - self.seen.y0
        bottom = last if last < self.seen.shape[0] else self.framed.shape[0]
        top = 0
        if self.read_px:  # what the windows begin with, and what is mirrored, is there already
            top = min(first - self.framed.y0, *self.mirror[0][last:bottom].tolist(), last)
        before, kept = self.band, self.read_px - top
        new = self._read(self.read_px, last)

        def canvas(old: Tensor | None, *depth: int) -> Tensor:
            made = torch.empty((bottom - top, self.framed.shape[1], *depth), device=self.device)
            if old is not None and kept:
                made[:kept] = old[top - before.top :]
            return made

        heights = {n: canvas(before.heights.get(n)) for n in self.job.heights}
        depths = self.predictor.depths
        old: Sequence[Tensor | None] = before.ready or [None] * len(depths)
        ready = [canvas(o, d) for o, d in zip(old, depths, strict=True)]
        width, there = self.seen.shape[1], slice(kept, last - top)
        for name, layer in zip(self.job.layers, new, strict=False):
            if name in heights:
                heights[name][there, :width] = layer
        level = None if self.level is None else self.level[top:bottom]
        self.predictor.prepare(
            new, None if level is None else level[there, :width],
            [made[there, :width] for made in ready],
        )  # fmt: skip
        for made in (*heights.values(), *ready):
            if self.framed.shape[1] > width:
                made[there, width:] = made[there, self.mirror[1][width:]]
            if bottom > last:
                made[last - top :] = made[self.mirror[0][last:] - top]
        self.band, self.read_px = _Band(top, heights, level, ready), last

    def _read(self, first: int, last: int) -> list[Tensor]:
        """Return rows of the layers; note where they are usable, and the initial DSM."""
        there = Box(self.seen.y0 + first, self.seen.y0 + last, self.seen.x0, self.seen.x1)
        rows = [array[there.within(self.region)] for array in self.arrays]
        layers = [_tensor(part) for part in rows[: len(self.job.layers)]]
        if self.device.startswith("cuda"):
            # What is not pinned is copied only once all that was asked of the card is done.
            layers = [layer.pin_memory() for layer in layers]
        layers = [layer.to(self.device, non_blocking=True) for layer in layers]
        inside = there.intersect(self.out)
        if not inside.empty:
            place, own = inside.within(self.out), [part[inside.within(there)] for part in rows]
            self.wanted[place] = self.job.usable(own)
            if self.known is not None:
                self.wanted[place] &= np.isfinite(self.known[place])
            self.dsm[place] = layers[self.job.dsm][inside.within(there)]
            if self.note is not None:
                self.note(own)
        return layers

    def worth(self, window: Box) -> bool:
        """Return whether a window has a wanted pixel in the output box, and any height at all."""
        if not self.wanted[window.intersect(self.out).within(self.out)].any():
            return False
        if not self.job.fill_voids:
            return True  # a pixel that is wanted has one
        dsm = self.arrays[self.job.dsm][window.intersect(self.seen).within(self.region)]
        return bool(np.isfinite(dsm).any())

    def place(self, part: Box) -> tuple[_Band, Place]:
        """Return where this part of a window is."""
        frame = self.framed
        band = Box(frame.y0 + self.band.top, frame.y1, frame.x0, frame.x1)
        return self.band, part.within(band)

    def batch(self, places: Sequence[tuple[_Band, Place]]) -> Batch:
        """Return these windows, the voids of their initial DSM filled if they are to be."""
        batch = Batch(places)
        if not self.job.fill_voids:
            return batch
        level = batch.level()
        filled = _fill(
            batch.height("dsm").cpu().numpy(), None if level is None else level.cpu().numpy()
        )
        return Batch(places, torch.from_numpy(filled).to(self.device))


class _Sums:
    """The weighted sums over the windows of an output box, and the planes that are made of them."""

    def __init__(self, job: Job, ground: _Ground, device: str):
        self.job, self.ground, self.out = job, ground, ground.out
        line = torch.tensor(job.windows.weights, device=device)
        self.weight = torch.outer(line, line)
        self.sums = torch.zeros((len(job.planes), *self.out.shape), device=device)
        self.norm = torch.zeros(self.out.shape, device=device)

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
                void = self.ground.dsm[there].isfinite().logical_not_()
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
        height = len(self.norm)
        rows = _FINISHED_ROWS if self.norm.device.type == "cpu" else height
        for y in range(0, height, rows):
            there = slice(y, y + rows)
            dsm, norm, planes = self.ground.dsm[there], self.norm[there], self.sums[:, there]
            undone = (norm > 0).logical_and_(wanted[there]).logical_not_()
            mean = planes[0].div_(norm)
            if self.job.uncertainty:
                square = planes[1].div_(norm).sub_(mean.square())
                square.clamp_(min=0).sqrt_().masked_fill_(undone, torch.nan)
            # What was made in a void is a height already.
            mean.add_(torch.nan_to_num(dsm, nan=0.0, posinf=0.0, neginf=0.0))
            mean.masked_fill_(undone, torch.nan)
            if self.job.fill_voids:
                planes[-1] = dsm.isfinite().logical_or_(undone).logical_not_()
        return self.sums


def _groups(ground: _Ground, job: Job, out: Box) -> Iterator[tuple[list[Part], Batch]]:
    """Give the windows that are worth it, each with the part that is computed, row by row.

    In groups of one shape, each of no more pixels than a batch of windows.
    """
    width = job.windows.width
    pixels = (job.batch_size or auto_batch("cpu", width)) * width**2
    shapes: dict[tuple[int, int], list[tuple[Part, tuple[_Band, Place]]]] = {}

    def group(shape: tuple[int, int]) -> tuple[list[Part], Batch]:
        same = shapes.pop(shape)
        return [one for one, _ in same], ground.batch([place for _, place in same])

    for row in job.windows.rows(out):
        ground.read(row[0][1].y0, row[0][1].y1)
        for window, part in row:
            if not ground.worth(window):
                continue
            same = shapes.setdefault(part.shape, [])
            same.append(((window, part), ground.place(part)))
            if len(same) == pixels // (part.shape[0] * part.shape[1]):
                yield group(part.shape)
    for shape in list(shapes):
        yield group(shape)


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

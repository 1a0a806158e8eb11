"""Which chips a network sees, in which order: the same for a seed, however many processes read.

Chips stand half a chip apart and are moved at random within their step, anew in each epoch. To
read each pixel once rather than once a chip, places are grouped into tiles: a tile is read whole,
and its chips are taken from memory. A batch is drawn from several tiles that are open at once.
Whether a chip is worth having is counted in the tile, where the truth has been read anyway: a scene
of any size costs nothing to set up. What was counted is remembered cell by cell (`regions.Seen`):
a tile without a chip is read once, not in each epoch.

An epoch's batches are dealt to a few streams, batch i to stream i modulo their number, each with
tiles of its own. A stream depends on the seed, the epoch and its number, never on who asks:
workers can share the streams out among them and give the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deepdem.blocks import Box
from deepdem.chips import chip_starts
from deepdem.regions import Opened, Region

__all__ = [
    "WEIGHTS",
    "Chip",
    "FixedChip",
    "Places",
    "Plan",
    "Stream",
    "Weight",
    "fixed_chips",
    "tiling",
]

#: A chip that can be taken from what was read.
Chip: TypeAlias = "tuple[Opened, Box]"
#: How much a chip is worth: takes DSM and truth of it (y, x), metres, NaN for no data.
Weight: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.float32]], float]

#: However much a chip is worth, it comes no more often than this in an epoch.
_MOST_COPIES = 4


def _steepness(dsm: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    steps = np.abs(np.diff(truth, axis=0)[:, :-1]) + np.abs(np.diff(truth, axis=1)[:-1])
    known = np.isfinite(steps)
    return float(steps.mean(where=known)) if known.any() else 0.0


def _error(dsm: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    error = np.abs(dsm - truth)
    return float(error.mean(where=np.isfinite(error)))


#: What chips can be drawn by: the steepness of the true surface, or the error of the initial one.
WEIGHTS: dict[str, Weight] = {"terrain": _steepness, "error": _error}


@dataclass(frozen=True)
class Tile:
    """Some neighbouring places. Chip k begins at a row of [y, y_end)[k], a column of [x, x_end)[k].

    `box` is all that chips of them may touch.
    """

    y: NDArray[np.int64]
    y_end: NDArray[np.int64]
    x: NDArray[np.int64]
    x_end: NDArray[np.int64]
    box: Box


@dataclass(frozen=True)
class Places:
    """Where chips can lie in a box of a scene: every `stride`, grouped into tiles."""

    box: Box
    size: int
    stride: int
    tile_px: int

    @cached_property
    def _axes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if min(self.box.shape) < self.size:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return (
            chip_starts(self.box.shape[0], self.size, self.stride) + self.box.y0,
            chip_starts(self.box.shape[1], self.size, self.stride) + self.box.x0,
        )

    @property
    def count(self) -> int:
        """How many chips there are."""
        return len(self._axes[0]) * len(self._axes[1])

    @property
    def _per_tile(self) -> int:
        return max(1, self.tile_px // self.stride)

    @property
    def _tiles(self) -> tuple[int, int]:
        ys, xs = self._axes
        return -(-len(ys) // self._per_tile), -(-len(xs) // self._per_tile)

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self._tiles[0] * self._tiles[1]

    def tile(self, index: int, *, jitter: bool) -> Tile:
        """Return a tile; `jitter`: its chips may be moved as far as the next place."""
        row, column = divmod(index, self._tiles[1])
        sides = []
        for starts, k in zip(self._axes, (row, column), strict=True):
            there = slice(k * self._per_tile, (k + 1) * self._per_tile)
            ends = np.append(starts[1:], starts[-1] + 1) if jitter else starts + 1
            sides.append((starts[there], ends[there]))
        (ys, y_ends), (xs, x_ends) = sides
        size = self.size
        box = Box(int(ys[0]), int(y_ends[-1]) - 1 + size, int(xs[0]), int(x_ends[-1]) - 1 + size)
        n, m = len(ys), len(xs)
        return Tile(np.repeat(ys, m), np.repeat(y_ends, m), np.tile(xs, n), np.tile(x_ends, n), box)

    def core(self, index: int) -> Box:
        """Return the pixels that are this tile's alone: those of all tiles make up the box."""
        ends = []
        for starts, k in zip(self._axes, divmod(index, self._tiles[1]), strict=True):
            next_one = (k + 1) * self._per_tile
            last = starts[next_one] if next_one < len(starts) else starts[-1] + self.size
            ends += [int(starts[k * self._per_tile]), int(last)]
        return Box(*ends)


def tiling(
    area_px: int, *, size: int, planes: int, streams: int, groups: int, limit: int
) -> tuple[int, int]:
    """Return how wide tiles are and how many of them a stream has open, to fit in memory.

    Widths are multiples of the chip's, so that a little more or less memory changes no chip. The
    wider a tile, the less is read twice; the more are open, the more places a batch comes from.

    Parameters
    ----------
    area_px
        Pixels in all regions.
    size
        The chip's width.
    planes
        Layers that are read, truth and planes among them.
    streams
        How many streams there are.
    groups
        Of how many scenes there must be a tile open in each stream.
    limit
        What all open tiles may take in memory, bytes. A tile is one chip wide at least.
    """
    # Each stream needs tiles of its own, or workers would read the same.
    shared_out = int((area_px / (2 * streams)) ** 0.5)
    for least in (4, 3, 2):
        open_tiles = max(least, groups)
        bytes_each = limit / (streams * open_tiles)
        widest = int((bytes_each / (4 * planes + 1)) ** 0.5) - size
        if widest >= 3 * size:
            break
    return max(1, min(2048, widest, shared_out) // size) * size, open_tiles


@dataclass(frozen=True)
class Plan:
    """How training chips are drawn.

    Attributes
    ----------
    size
        The chip's width in pixels; places are half of it apart.
    min_valid
        The least share of pixels with both DSM and truth.
    seed
        The same seed draws the same chips.
    evenly
        As many chips from each scene, instead of all places equally often.
    weight
        How much a chip is worth: places come in proportion to it. None: all the same.
    tile_px, open_tiles, streams
        How wide a tile is, how many are open in one stream, and how many streams there are.
    """

    size: int
    min_valid: float
    seed: int
    evenly: bool = False
    weight: Weight | None = None
    tile_px: int = 1024
    open_tiles: int = 4
    streams: int = 1

    def places(self, region: Region) -> Places:
        """Return where chips can lie in a region."""
        return Places(region.box, self.size, max(1, self.size // 2), self.tile_px)

    @property
    def least(self) -> float:
        """How many pixels that count a chip must have: one at least."""
        return max(1, self.min_valid * self.size**2)

    def enough(self, usable: NDArray[np.bool_]) -> bool:
        """Return whether a chip has enough pixels that count."""
        return bool(np.count_nonzero(usable) >= self.least)


_Starts: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64]]"


def _moved(tile: Tile, which: NDArray[np.int64], draw: np.random.Generator) -> _Starts:
    """Return where chips of a tile begin, moved at random: rows and columns."""
    ys = draw.integers(tile.y[which], tile.y_end[which])
    return ys, draw.integers(tile.x[which], tile.x_end[which])


class Stream:
    """The chips of one stream in one epoch: an endless supply, in the order they are to be seen."""

    def __init__(self, regions: Sequence[Region], plan: Plan, *, epoch: int, number: int):
        self.regions, self.plan, self.epoch, self.number = regions, plan, epoch, number
        self.places = [plan.places(region) for region in regions]
        self._first = np.cumsum([0, *(p.tiles for p in self.places)])
        tiles = np.arange(self._first[-1])
        scene = np.repeat([r.scene for r in regions], [p.tiles for p in self.places])
        scenes = np.unique(scene) if plan.evenly else [None]
        self._groups = [tiles if s is None else tiles[scene == s] for s in scenes]
        self._orders = [self._order(group) for group in range(len(self._groups))]
        self._open: list[list[tuple[Opened, list[Box]]]] = [[] for _ in self._groups]
        self._draw = np.random.default_rng((plan.seed, epoch, number, 0))
        self._turn = 0
        self._worth = np.zeros(2)  # sum of weights, and how many
        self._per_tile = max(1, 4 * plan.tile_px**2 // plan.size**2)

    def _order(self, group: int) -> Iterator[tuple[int, int]]:
        """Yield round and tile: this stream's share first, then, if more is wanted, all of them."""
        plan, tiles = self.plan, self._groups[group]
        for turn in count():
            draw = np.random.default_rng((plan.seed, self.epoch, group, turn, 1))
            order = draw.permutation(tiles)
            mine = order[self.number :: plan.streams]
            if turn:
                mine = np.roll(order, -self.number * len(order) // plan.streams)
            for tile in mine:
                yield turn, int(tile)
            if turn and not self._worth[1]:
                raise ValueError(
                    f"no training chip: no place of {plan.size} px in the training regions has "
                    f"{plan.min_valid:.0%} of its pixels with both 'dsm' and "
                    f"{self.regions[0].target!r}: pass a smaller chip_size or min_valid, or "
                    "another split"
                )

    def _open_one(self, group: int) -> None:
        """Read tiles until one has a chip."""
        for turn, tile in self._orders[group]:
            which = int(np.searchsorted(self._first, tile, side="right")) - 1
            place = self.places[which].tile(tile - int(self._first[which]), jitter=True)
            draw = np.random.default_rng((self.plan.seed, self.epoch, turn, tile, 2))
            region, moved = self.regions[which], _moved(place, np.arange(len(place.y)), draw)
            if not region.may_have(*moved, self.plan.size, self.plan.least):
                continue
            opened = region.survey(place.box)
            if chips := self._chips(opened, place, moved, draw):
                self._open[group].append((opened, chips))
                return

    def _chips(
        self, opened: Opened, tile: Tile, moved: _Starts, draw: np.random.Generator
    ) -> list[Box]:
        """Return the chips of a tile that are worth having, shuffled."""
        plan = self.plan
        chips = self._good(opened, np.arange(len(tile.y)), moved)
        if plan.weight is None:
            self._worth += len(chips), len(chips)
            found = [chip for _, chip in chips]
        else:
            inside = [chip.within(opened.box) for _, chip in chips]
            worth = [plan.weight(opened.dsm[i], opened.truth[i]) for i in inside]
            self._worth += sum(worth), len(worth)
            mean = self._worth[0] / max(self._worth[1], 1) or 1.0
            copies = np.floor(np.array(worth) / mean + draw.random(len(worth))).astype(int)
            copies = np.minimum(copies, _MOST_COPIES)
            found = [chip for (_, chip), n in zip(chips, copies, strict=True) if n]
            again = np.repeat([k for k, _ in chips], np.maximum(copies - 1, 0)).astype(int)
            found += [c for _, c in self._good(opened, again, _moved(tile, again, draw))]
        return [found[i] for i in draw.permutation(len(found))]

    def _good(
        self, opened: Opened, which: NDArray[np.int64], moved: _Starts
    ) -> list[tuple[int, Box]]:
        """Return those chips of a tile that have enough pixels that count."""
        size = self.plan.size
        chips = [
            (int(k), Box(int(y), int(y) + size, int(x), int(x) + size))
            for k, y, x in zip(which, *moved, strict=True)
        ]
        whole = bool(opened.usable.all())
        return [
            (k, chip)
            for k, chip in chips
            if whole or self.plan.enough(opened.usable[chip.within(opened.box)])
        ]

    def take(self, n: int) -> list[Chip]:
        """Return the next `n` chips."""
        held = all(region.held is not None for region in self.regions)
        # What is in memory costs nothing to open. What is not is opened little by little: the
        # first batch need not wait for all, and tiles do not run out all at once.
        more = self.plan.open_tiles if held else 1 + n // self._per_tile
        for group, open_ones in enumerate(self._open):
            missing = max(1, self.plan.open_tiles // len(self._groups)) - len(open_ones)
            for _ in range(min(more, missing, len(self._groups[group]) - len(open_ones))):
                self._open_one(group)
        return [self._next() for _ in range(n)]

    def _next(self) -> Chip:
        group = self._turn % len(self._groups)
        self._turn += 1
        open_ones = self._open[group]
        if not open_ones:
            self._open_one(group)
        which, nth = 0, int(self._draw.integers(sum(len(chips) for _, chips in open_ones)))
        while nth >= len(open_ones[which][1]):  # the tile that the nth of all chips is in
            nth -= len(open_ones[which][1])
            which += 1
        opened, chips = open_ones[which]
        chip = chips.pop()
        if not chips:
            del open_ones[which]
        return opened, chip


@dataclass(frozen=True)
class FixedChip:
    """A chip that stands still: its region's number, its place, and the tile that it is read in."""

    region: int
    box: Box
    tile: Box


def fixed_chips(regions: Sequence[Region], plan: Plan, most: int | None) -> list[FixedChip]:
    """Return chips that stand still, tile by tile; reads the DSM and the truth.

    They do not overlap but at the far edges. Where there are more than `most`, tiles are drawn,
    the same ones for the same seed, until there are as many.
    """
    size = plan.size
    places = [Places(r.box, size, size, max(plan.tile_px, size)) for r in regions]
    tiles = [(i, k) for i, p in enumerate(places) for k in range(p.tiles)]
    total = sum(p.count for p in places)
    missing = total if most is None else most
    if total > missing:
        draw = np.random.default_rng((plan.seed, 3))
        tiles = [tiles[i] for i in draw.permutation(len(tiles))]
    found: dict[tuple[int, int], list[FixedChip]] = {}
    for i, k in tiles:
        if missing <= 0:
            break
        tile = places[i].tile(k, jitter=False)
        if not regions[i].may_have(tile.y, tile.x, size, plan.least):
            continue
        opened = regions[i].survey(tile.box)
        boxes = [
            Box(int(y), int(y) + size, int(x), int(x) + size)
            for y, x in zip(tile.y, tile.x, strict=True)
        ]
        good = [b for b in boxes if plan.enough(opened.usable[b.within(opened.box)])][:missing]
        found[i, k] = [FixedChip(i, box, tile.box) for box in good]
        missing -= len(good)
    return [chip for key in sorted(found) for chip in found[key]]

"""Random numbers that are places: the base of the synthetic landscape. NumPy only.

What makes blocks independent is that nothing is drawn from a random stream. Each random number is
the hash of the seed, a name and the integer coordinates of a lattice node in the world, so a block
can ask for any node, inside it or beyond its edge, and finds what its neighbour finds.

Sums whose order depends on the array's shape (matrix products, running sums) are avoided here and
in the modules that build on this one: that keeps any two chunkings equal to the last bit.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """The settings of a landscape; together with a `Frame` they say everything."""

    seed: int
    pixel_m: float
    sun_azimuth_deg: float = 152.0
    sun_elevation_deg: float = 47.0
    view_azimuth_deg: tuple[float, float] = (12.0, 192.0)
    view_off_nadir_deg: tuple[float, float] = (14.0, 19.0)

    def key(self, name: str) -> int:
        """Return 32 bits that differ between seeds and between names."""
        text = f"{self.seed}/{name}".encode()
        return zlib.crc32(text) ^ (zlib.adler32(text) * 0x9E3779B1 & 0xFFFFFFFF)


@dataclass(frozen=True)
class Frame:
    """A rectangle of global pixels; pixel (0, 0) is the corner of every scene."""

    y0: int
    x0: int
    height: int
    width: int
    pixel_m: float

    @cached_property
    def y(self) -> Doubles:
        """Pixel centres, metres south of the corner."""
        return (np.arange(self.y0, self.y0 + self.height, dtype=np.float64) + 0.5) * self.pixel_m

    @cached_property
    def x(self) -> Doubles:
        """Pixel centres, metres east of the corner."""
        return (np.arange(self.x0, self.x0 + self.width, dtype=np.float64) + 0.5) * self.pixel_m

    def grow(self, margin_m: float) -> Frame:
        """Return the frame with a margin on every side.

        Four pixels more than asked for: operations on neighbours (gradient, blur, interpolation)
        reach that far however large a pixel is.
        """
        n = math.ceil(margin_m / self.pixel_m) + 4
        return Frame(
            self.y0 - n, self.x0 - n, self.height + 2 * n, self.width + 2 * n, self.pixel_m
        )

    def inside(self, outer: Frame) -> tuple[slice, slice]:
        """Return where this frame lies in an array of `outer`."""
        top, left = self.y0 - outer.y0, self.x0 - outer.x0
        return slice(top, top + self.height), slice(left, left + self.width)


# --- numbers out of coordinates ------------------------------------------------------------------


def _mix(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # Chris Wellons' lowbias32: the least biased 32-bit mixer of two multiplications.
    h ^= h >> 16
    h *= np.uint32(0x7FEB352D)
    h ^= h >> 15
    h *= np.uint32(0x846CA68B)
    h ^= h >> 16
    return h


def _hash(key: int, i: Ints, j: Ints) -> NDArray[np.uint32]:
    rows = _mix(i.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(key))
    cols = _mix(j.astype(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(key ^ 0xC2B2AE3D))
    return _mix(rows + cols)


def uniform(key: int, i: Ints, j: Ints) -> Floats:
    return (_hash(key, i, j) >> 8).astype(np.float32) * np.float32(2.0**-24)


def _bell(key: int, i: Ints, j: Ints) -> Floats:
    """Return triangular noise of unit variance: as good as normal here and much cheaper."""
    h = _hash(key, i, j)
    both = (h & np.uint32(0xFFFF)) + (h >> 16)
    return (both.astype(np.float32) - np.float32(65535.0)) * np.float32(math.sqrt(6.0) / 65536.0)


def _taps(at: Doubles, spacing: float) -> tuple[Ints, list[Floats]]:
    """Return the first of four nodes and the weights of the cubic B-spline."""
    t = at / spacing
    node = np.floor(t)
    f = t - node
    g = 1.0 - f
    weights = [
        g * g * g / 6.0,
        (4.0 - 6.0 * f * f + 3.0 * f * f * f) / 6.0,
        (4.0 - 6.0 * g * g + 3.0 * g * g * g) / 6.0,
        f * f * f / 6.0,
    ]
    return node.astype(np.int64) - 1, [w.astype(np.float32) for w in weights]


@dataclass(frozen=True)
class Lattice:
    """Values on a lattice of the world; `i0`, `j0` index the first node."""

    values: Floats
    i0: int
    j0: int
    spacing_m: float

    def grid(self, y: Doubles, x: Doubles) -> Floats:
        """Return the smooth surface on the grid of 1-D `y` and `x`."""
        iy, wy = _taps(y, self.spacing_m)
        ix, wx = _taps(x, self.spacing_m)
        # Columns first: the gather along x then touches the small array only.
        some = sum(w * self.values[:, ix - self.j0 + k] for k, w in enumerate(wx))
        some = np.ascontiguousarray(some)
        out = np.take(some, iy - self.i0, axis=0)
        out *= wy[0][:, None]
        part = np.empty_like(out)
        for k in (1, 2, 3):
            np.take(some, iy - self.i0 + k, axis=0, out=part, mode="clip")
            part *= wy[k][:, None]
            out += part
        return out

    def points(self, y: Doubles, x: Doubles) -> Doubles:
        """Return the smooth surface at points, `y` and `x` of the same shape."""
        iy, wy = _taps(y, self.spacing_m)
        ix, wx = _taps(x, self.spacing_m)
        out = np.zeros(y.shape)
        for a in range(4):
            row = (iy - self.i0 + a) * self.values.shape[1] - self.j0
            out += wy[a] * sum(wx[b] * self.values.ravel()[row + ix + b] for b in range(4))
        return out


def white(world: World, name: str, spacing: float, y: Doubles, x: Doubles) -> Lattice:
    i0, i1 = (math.floor(float(f(y)) / spacing) + d for f, d in ((np.min, -1), (np.max, 3)))
    j0, j1 = (math.floor(float(f(x)) / spacing) + d for f, d in ((np.min, -1), (np.max, 3)))
    values = _bell(world.key(name), np.arange(i0, i1)[:, None], np.arange(j0, j1)[None])
    # The B-spline averages white noise down to this deviation; undo it.
    return Lattice(values * np.float32(1.0 / 0.479), i0, j0, spacing)


def smooth_noise(world: World, name: str, spacing: float, frame: Frame) -> Floats:
    """Return smooth noise of unit variance; its waves are some three spacings long."""
    return white(world, name, spacing, frame.y, frame.x).grid(frame.y, frame.x)


def speckle(world: World, name: str, frame: Frame) -> Floats:
    """Return white noise of unit variance, one number a pixel."""
    rows = np.arange(frame.y0, frame.y0 + frame.height)[:, None]
    columns = np.arange(frame.x0, frame.x0 + frame.width)[None]
    return _bell(world.key(name), rows, columns)

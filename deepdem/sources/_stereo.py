"""What a stereo satellite makes of the synthetic landscape: light, two views, a DSM that errs.

A kernel: `render` takes a rectangle of global pixels and returns all layers; NumPy and SciPy only.
What looks at a neighbourhood reaches a bounded distance; a block is made with that margin and cut.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deepdem.sources._landscape import Surface, survey
from deepdem.sources._lattice import Floats, Frame, World, smooth_noise, speckle

_LIT_M = 32.0  # margin of all that follows the light: windows, views, parallax, coarse bands
_SHADOW_M = 32.0  # how far a shadow is followed
_VIEW_M = 16.0  # how far a line of sight is followed
_PARALLAX_M = 6.0  # the largest displacement in an ortho
_BLUR_PX = 0.6
_COARSE_M = 10.0  # cell of the multispectral bands


# --- light and views -----------------------------------------------------------------------------


def _shift(a: Floats, dy: int, dx: int, fill: float) -> Floats:
    """Return `a` as seen (dy, dx) further on: ``out[r, c] = a[r + dy, c + dx]``."""
    out = np.full_like(a, fill)
    h, w = a.shape
    if abs(dy) < h and abs(dx) < w:
        to = (slice(max(-dy, 0), h - max(dy, 0)), slice(max(-dx, 0), w - max(dx, 0)))
        out[to] = a[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
    return out


def _skyline(
    top: Floats, image: Floats, azimuth_deg: float, rise: float, reach_m: float, px: float
) -> tuple[Floats, Floats]:
    """Return what stands highest against the ray from each pixel towards `azimuth_deg`.

    The ray climbs `rise` metres a metre. The first array is the highest surface along it, lowered
    by the ray's climb: above `top` where the ray is blocked. The second is `image` at that place.
    Reaches double from step to step, so n steps look 2^n - 1 pixels far.
    """
    a = math.radians(azimuth_deg)
    high, step = top, 1
    while step * px <= max(0.5 * reach_m, px):
        dy, dx = round(-step * math.cos(a)), round(step * math.sin(a))
        ahead = _shift(high, dy, dx, -np.inf)
        ahead -= np.float32(rise * math.hypot(dy, dx) * px)
        if image is not top:
            image = np.where(ahead > high, _shift(image, dy, dx, 0.0), image)
        high = np.maximum(high, ahead)
        step *= 2
    return high, image


def _gauss(a: Floats, sigma_m: float, px: float) -> Floats:
    if sigma_m < 0.2 * px:
        return a
    n = max(1, math.ceil(2.5 * sigma_m / px))
    kernel = np.exp(-0.5 * (np.arange(-n, n + 1) * px / sigma_m) ** 2)
    kernel /= kernel.sum()
    once = ndimage.correlate1d(a, kernel, axis=0, mode="nearest")
    out: Floats = ndimage.correlate1d(once, kernel, axis=1, mode="nearest")
    return out


def _highest(a: Floats, size_m: float, px: float) -> Floats:
    size = 2 * round(0.5 * (size_m / px - 1)) + 1
    out: Floats = ndimage.maximum_filter(a, size, mode="nearest") if size > 1 else a
    return out


def _light(world: World, top: Floats, px: float) -> tuple[Floats, Floats]:
    """Return the light that falls on each pixel (about 0..1.1) and the cast shadow (0 or 1)."""
    azimuth, elevation = map(math.radians, (world.sun_azimuth_deg, world.sun_elevation_deg))
    high, _ = _skyline(top, top, world.sun_azimuth_deg, math.tan(elevation), _SHADOW_M, px)
    shadow = (high > top + np.float32(0.3)).astype(np.float32)
    east, south = math.cos(elevation) * math.sin(azimuth), -math.cos(elevation) * math.cos(azimuth)
    gy, gx = np.zeros_like(top), np.zeros_like(top)
    gy[1:-1] = (top[2:] - top[:-2]) * np.float32(0.5 / px)
    gx[:, 1:-1] = (top[:, 2:] - top[:, :-2]) * np.float32(0.5 / px)
    facing = np.float32(math.sin(elevation)) - gy * np.float32(south) - gx * np.float32(east)
    facing /= np.sqrt(1 + gy * gy + gx * gx)
    return np.float32(0.2) + np.float32(0.9) * np.maximum(facing, 0) * (1 - shadow), shadow


def _at_offset(image: Floats, along: Floats, dy: float, dx: float) -> Floats:
    """Return the image `along` pixels further on in direction (dy, dx), bilinear."""
    h, w = image.shape
    oy, ox = along * np.float32(dy), along * np.float32(dx)
    fy, fx = np.floor(oy), np.floor(ox)
    wy, wx = oy - fy, ox - fx
    r = np.clip(np.arange(h)[:, None] + fy.astype(np.int32), 0, h - 2)
    c = np.clip(np.arange(w)[None, :] + fx.astype(np.int32), 0, w - 2)
    flat, at = image.ravel(), r * w + c
    upper = flat[at] * (1 - wx) + flat[at + 1] * wx
    lower = flat[at + w] * (1 - wx) + flat[at + w + 1] * wx
    out: Floats = upper * (1 - wy) + lower * wy
    return out


def _view(world: World, view: int, radiance: Floats, top: Floats) -> tuple[Floats, Floats]:
    """Return the image of one view on the true surface and what it does not see (0 or 1).

    A hidden pixel shows the edge of what hides it, stretched along the line of sight.
    """
    rise = 1.0 / math.tan(math.radians(world.view_off_nadir_deg[view]))
    azimuth = world.view_azimuth_deg[view]
    high, image = _skyline(top, radiance, azimuth, rise, _VIEW_M, world.pixel_m)
    return image, (high > top + np.float32(0.5)).astype(np.float32)


def _ortho(world: World, frame: Frame, view: int, image: Floats, miss: Floats) -> Floats:
    """Return one orthoimage in digital numbers; `miss` is true minus stereo height, metres."""
    px, azimuth = world.pixel_m, math.radians(world.view_azimuth_deg[view])
    # The image was put on the map with the stereo surface: where that is wrong, it is displaced.
    slant = math.tan(math.radians(world.view_off_nadir_deg[view]))
    off = np.clip(miss * np.float32(slant / px), -_PARALLAX_M / px, _PARALLAX_M / px)
    image = _at_offset(image, off, -math.cos(azimuth), math.sin(azimuth))
    gain, haze = ((1050.0, 62.0), (980.0, 74.0))[view]
    image = np.float32(gain) * image + np.float32(haze)
    # Read-out noise and, with the light, shot noise.
    image += speckle(world, f"sensor {view}", frame) * (3.0 + np.float32(0.012) * image)
    out: Floats = np.clip(np.rint(image), 1, 2047)
    return out


# --- stereo --------------------------------------------------------------------------------------


def _stereo(
    world: World, frame: Frame, surface: Surface, shadow: Floats, hidden: Floats
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return the stereo surface without holes, its triangulation error and the holes (bool)."""
    px = frame.pixel_m
    half = np.float32(0.5)
    # A matching window sees its surroundings, and the nearer surface wins the vote: a mean and a
    # share of the maximum. The maximum is of heights above ground, lest a bare slope be lifted.
    above = surface.top - surface.ground
    fat = _highest(above, 5.0, px)
    voted = np.float32(0.8) * above + np.float32(0.2) * fat
    smooth = _gauss(surface.ground + voted, 2.7, px)
    blind = _gauss(np.maximum(np.float32(0.8) * shadow, hidden), 1.6, px)
    # Where there is nothing to match, what stands beside spreads over the gap.
    bulge = _gauss(_highest(smooth, 9.0, px), 2.0, px) - smooth
    smooth += np.float32(0.28) * blind * bulge

    weak = blind + np.float32(0.7) * surface.plain
    level: Floats = np.float32(0.12) + np.float32(0.22) * weak + np.float32(0.006) * surface.canopy
    noise = smooth_noise(world, "match", 2.8, frame)
    noise += np.float32(0.6) * smooth_noise(world, "match wide", 11.0, frame)
    spread = smooth_noise(world, "blunder", 5.0, frame) + np.float32(1.1) * weak
    wrong: Floats = np.clip((spread - np.float32(2.45)) * np.float32(2.5), 0, 1)
    amount: Floats = wrong * (np.float32(13.0) * smooth_noise(world, "blunder size", 12.0, frame))
    dsm = smooth + level * noise + _jitter(world, frame) + amount

    scatter = speckle(world, "rays", frame) + smooth_noise(world, "rays", 4.0, frame)
    error = np.float32(0.08) + np.float32(0.5) * level * (1 + half * np.abs(noise))
    error += np.float32(0.12) * np.abs(amount) + np.float32(0.25) * blind
    error += np.float32(0.02) * np.abs(fat - above)
    error *= np.maximum(1 + np.float32(0.25) * scatter, np.float32(0.15))
    holes = smooth_noise(world, "hole", 4.0, frame) + np.float32(2.0) * blind > 2.45
    return dsm, error, holes


def _jitter(world: World, frame: Frame) -> Floats:
    """Return the attitude jitter of the platform: waves along the track, a little askew."""
    out = np.zeros((frame.height, frame.width), np.float32)
    for wave, metres in ((1350.0, 0.14), (410.0, 0.11), (137.0, 0.06)):
        # sin(a + b), taken apart: a sine a row and a column instead of one a pixel.
        turn = 2.0 * math.pi / wave
        phase = world.key(f"jitter {wave}") * (2.0 * math.pi / 2**32)
        a = (0.98 * frame.y * turn + phase)[:, None]
        b = (0.17 * frame.x * turn)[None]
        out += (metres * np.sin(a)).astype(np.float32) * np.cos(b).astype(np.float32)
        out += (metres * np.cos(a)).astype(np.float32) * np.sin(b).astype(np.float32)
    return out


def _coarse(frame: Frame, a: Floats) -> Floats:
    """Return the mean over the cells of a coarser grid, bilinear between their centres."""
    cell = max(_COARSE_M, frame.pixel_m)
    iy, ix = (np.floor(c / cell).astype(np.int64) for c in (frame.y, frame.x))
    for axis, index in ((0, iy), (1, ix)):
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
        counts = np.diff(starts, append=index.size).astype(np.float32)
        total: Floats = np.add.reduceat(a, starts, axis=axis)
        a = total / (counts[:, None] if axis == 0 else counts)
    for axis, (at, index) in enumerate(((frame.y, iy), (frame.x, ix))):
        t = np.clip(at / cell - 0.5 - index[0], 0, a.shape[axis] - 1)
        low = np.minimum(np.floor(t).astype(np.int64), max(a.shape[axis] - 2, 0))
        share = (t - low).astype(np.float32)
        w = share[:, None] if axis == 0 else share[None]
        upper = np.minimum(low + 1, a.shape[axis] - 1)
        a = a.take(low, axis=axis) * (1 - w) + a.take(upper, axis=axis) * w
    return a


def surroundings(frame: Frame) -> Frame:
    """Return the frame on which the true surface must be known for an image of `frame`."""
    return frame.grow(_LIT_M).grow(_SHADOW_M)


def render(world: World, frame: Frame) -> dict[str, Floats]:
    """Return all layers of a frame by name; float32, metres or digital numbers, NaN in holes."""
    return observe(world, frame, survey(world, surroundings(frame)))


def observe(world: World, frame: Frame, surface: Surface) -> dict[str, Floats]:
    """Return all layers of a frame by name, of a surface that covers its `surroundings`."""
    lit = frame.grow(_LIT_M)
    wide = surroundings(frame)
    light, shadow = _light(world, surface.top, frame.pixel_m)
    cut = lit.inside(wide)
    surface = surface.cut(cut)
    light, shadow = (np.ascontiguousarray(a[cut]) for a in (light, shadow))

    radiance = _gauss(surface.albedo * light, _BLUR_PX * world.pixel_m, world.pixel_m)
    views = [_view(world, k, radiance, surface.top) for k in (0, 1)]
    hidden = np.maximum(views[0][1], views[1][1])
    dsm, error, holes = _stereo(world, lit, surface, shadow, hidden)
    left, right = (_ortho(world, lit, k, views[k][0], surface.top - dsm) for k in (0, 1))
    dsm, error = (np.where(holes, np.float32(np.nan), a) for a in (dsm, error))
    haze = np.float32(0.3) + np.float32(0.7) * light
    layers = {
        "dsm": dsm,
        "ortho_left": left,
        "ortho_right": right,
        "triangulation_error": error,
        "red": _coarse(lit, np.maximum(surface.red, np.float32(0.01)) * haze),
        "nir": _coarse(lit, surface.nir * haze),
        "lidar_dsm": surface.top,
        "lidar_dtm": surface.ground,
    }
    cut = frame.inside(lit)
    return {name: np.ascontiguousarray(a[cut], np.float32) for name, a in layers.items()}

"""The true landscape of the synthetic scene, one block at a time: relief, parcels, trees, houses.

A kernel: a rectangle of global pixels in, arrays out; NumPy only. Slow fields are computed on nodes
8 m apart and interpolated; objects stand on lattices of cells, one a cell at most, so that a block
finds those of its surroundings that reach into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepdem.sources._lattice import (
    Doubles,
    Floats,
    Frame,
    Ints,
    Lattice,
    World,
    smooth_noise,
    uniform,
    white,
)

_NODE_M = 8.0
_PARCEL_M = 170.0
_TREE_M = 4.6
_CROWN_M = 5.0  # the largest crown radius


# --- relief and what goes with it, on the coarse nodes -------------------------------------------


@dataclass(frozen=True)
class Region:
    """The smooth fields of the world round a frame, each a `Lattice` of 8 m nodes."""

    ground: Lattice  # metres
    hill: Lattice  # 0 in the valley floor, 1 on the slopes
    forest: Lattice  # positive: trees grow here
    village: Lattice  # positive: houses stand here
    u: Lattice  # warped axes, metres: parcels and roads follow them
    v: Lattice
    stand_m: Lattice  # height of the stand
    conifer: Lattice


def _gullies(world: World, h: Doubles, y: Doubles, x: Doubles, wave: float) -> Doubles:
    """Return furrows that run down the slope of `h`.

    Stripes along the gradient, of a phase that is random from cell to cell and blended between
    cells: the erosion-like noise of procedural terrain. Cheaper than routing water, and local.
    """
    gy, gx = np.gradient(h, _NODE_M)
    slope = np.sqrt(gy * gy + gx * gx) + 1e-9
    ty, tx = -gx / slope, gy / slope
    cell = 1.6 * wave
    ci, cj = np.floor(y / cell).astype(np.int64), np.floor(x / cell).astype(np.int64)
    total, weight = np.zeros_like(h), np.full_like(h, 1e-9)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            i, j = ci + di, cj + dj
            py = (i + uniform(world.key(f"gully y {wave}"), i, j)) * cell
            px = (j + uniform(world.key(f"gully x {wave}"), i, j)) * cell
            dy, dx = y - py, x - px
            w = np.maximum(0.0, 1.0 - (dy * dy + dx * dx) / (1.3 * cell) ** 2) ** 3
            total += w * np.cos((dy * ty + dx * tx) * (2.0 * math.pi / wave))
            weight += w
    furrows: Doubles = total / weight * np.minimum(slope, 0.6) * wave
    return furrows


def _region(world: World, frame: Frame) -> Region:
    """Compute the smooth fields on all nodes that a frame's pixels and objects can ask for."""
    # Objects beyond the edge, and the nodes that one-sided gradients spoil.
    pad = 9 + math.ceil(frame.pixel_m / _NODE_M)
    i0, j0 = (math.floor(float(a[0]) / _NODE_M) - pad for a in (frame.y, frame.x))
    i1, j1 = (math.floor(float(a[-1]) / _NODE_M) + pad + 2 for a in (frame.y, frame.x))
    rows: Doubles = np.arange(i0, i1, dtype=np.float64) * _NODE_M
    columns: Doubles = np.arange(j0, j1, dtype=np.float64) * _NODE_M
    y, x = np.meshgrid(rows, columns, indexing="ij")

    def noise(name: str, spacing: float) -> Floats:
        return white(world, name, spacing, rows, columns).grid(rows, columns)

    def winding(name: str, spacing: float) -> Doubles:
        return white(world, name, spacing, *warped).points(*warped)

    def lattice(values: Doubles | Floats) -> Lattice:
        return Lattice(values.astype(np.float32), i0, j0, _NODE_M)

    warped = (
        y + 110.0 * noise("warp y", 260.0) + 25.0 * noise("warp y fine", 70.0),
        x + 110.0 * noise("warp x", 260.0) + 25.0 * noise("warp x fine", 70.0),
    )
    level = 30.0 * noise("level", 1500.0)
    relief = 38.0 * winding("relief", 640.0)
    # |noise| is sharp where it crosses zero: valleys that join, between rounded backs.
    for k, (spacing, metres) in enumerate(((420.0, 62.0), (190.0, 24.0), (90.0, 8.0))):
        relief += metres * (np.abs(winding(f"valley {k}", spacing)) - 0.8)
    for wave, share in ((190.0, 0.16), (84.0, 0.15), (38.0, 0.10)):
        relief += share * _gullies(world, relief, y, x, wave)
    above = relief + 22.0
    ground = 400.0 + level + 0.5 * (above + np.sqrt(above * above + 64.0))
    hill = np.clip(above / 22.0 + 0.1, 0.0, 1.0)

    turn = 0.45
    uu = y + 45.0 * noise("parcel y", 180.0)
    vv = x + 45.0 * noise("parcel x", 180.0)
    woods = 0.8 * noise("woods", 95.0) + 0.35 * noise("woods fine", 28.0) + 1.3 * hill - 1.2
    return Region(
        ground=lattice(ground),
        hill=lattice(hill),
        forest=lattice(woods),
        village=lattice(noise("village", 150.0) - 2.0 * hill - 0.45),
        u=lattice(math.cos(turn) * uu - math.sin(turn) * vv),
        v=lattice(math.sin(turn) * uu + math.cos(turn) * vv),
        stand_m=lattice(np.clip(17.5 + 5.0 * noise("stand", 75.0), 8.0, 28.0)),
        conifer=lattice(noise("conifer", 85.0)),
    )


# --- parcels, roads ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parcels:
    """Where points lie in the pattern of parcels: rows of blocks of unequal width."""

    row: Ints
    column: Ints
    edge_m: Any  # distance to the nearest parcel edge across the row
    road_m: Any  # how far inside a road; negative: outside


def _parcels(world: World, u: Any, v: Any, village: Any) -> Parcels:
    rows = v * np.float32(1.0 / _PARCEL_M)
    row = np.floor(rows).astype(np.int64)
    low, high = int(row.min()), int(row.max()) + 2
    one = np.zeros(1, np.int64)
    index = np.arange(low, high)
    per_width = 1.0 / (110.0 + 170.0 * uniform(world.key("parcel width"), index, one))
    shift = uniform(world.key("parcel shift"), index, one)
    scale = per_width[row - low]
    columns = u * scale + shift[row - low]
    column = np.floor(columns).astype(np.int64)
    near_row = np.rint(rows)
    near_column = np.rint(columns)
    across = np.abs(rows - near_row) * np.float32(_PARCEL_M)
    along = np.abs(columns - near_column) / scale

    row_half = np.where(uniform(world.key("road"), index, one) < 0.45, 3.2, -4.0)
    main = row_half.astype(np.float32)[near_row.astype(np.int64) - low] - across
    left, right = int(column.min()), int(column.max()) + 2
    chance = uniform(world.key("lane"), index[:, None], np.arange(left, right)[None])
    half = np.where(chance < 0.35, 2.0, -4.0).astype(np.float32)
    lane = half[row - low, near_column.astype(np.int64) - left] - along
    streets = np.where(village > 0.0, np.float32(2.6) - np.minimum(across, along), np.float32(-9))
    return Parcels(row, column, along, np.maximum(np.maximum(main, lane), streets))


def _by_parcel(world: World, name: str, parcels: Parcels) -> Floats:
    """Return a uniform number for each point's parcel."""
    r, c = parcels.row, parcels.column
    r0, c0 = int(r.min()), int(c.min())
    table = uniform(
        world.key(name),
        np.arange(r0, int(r.max()) + 1)[:, None],
        np.arange(c0, int(c.max()) + 1)[None],
    )
    values: Floats = table.ravel()[(r - r0) * table.shape[1] + (c - c0)]
    return values


# --- objects -------------------------------------------------------------------------------------


def _scatter(
    world: World, name: str, frame: Frame, cell_m: float, jitter: float, reach_m: float
) -> tuple[Ints, Ints, Doubles, Doubles]:
    """Return cell and place (y, x) of all objects, one a cell, that can reach into the frame."""
    i0, i1 = (math.floor((float(frame.y[e]) + s * reach_m) / cell_m) for e, s in ((0, -1), (-1, 1)))
    j0, j1 = (math.floor((float(frame.x[e]) + s * reach_m) / cell_m) for e, s in ((0, -1), (-1, 1)))
    grid = np.meshgrid(np.arange(i0, i1 + 1), np.arange(j0, j1 + 1), indexing="ij")
    i, j = (a.ravel() for a in grid)
    y = (i + 0.5 + jitter * (uniform(world.key(f"{name} y"), i, j) - 0.5)) * cell_m
    x = (j + 0.5 + jitter * (uniform(world.key(f"{name} x"), i, j) - 0.5)) * cell_m
    near = (y > frame.y[0] - reach_m) & (y < frame.y[-1] + reach_m)
    near &= (x > frame.x[0] - reach_m) & (x < frame.x[-1] + reach_m)
    return i[near], j[near], y[near], x[near]


def _canopy(world: World, region: Region, frame: Frame) -> Floats:
    """Return the height of the crowns above the ground, 0 where there is none."""
    reach_m = _CROWN_M + frame.pixel_m
    i, j, y, x = _scatter(world, "tree", frame, _TREE_M, 0.8, reach_m)
    chance, size, shape = (uniform(world.key(f"tree {n}"), i, j) for n in ("is", "size", "shape"))
    at = [f.points(y, x) for f in (region.forest, region.village, region.u, region.v)]
    forest, village, u, v = at
    parcels = _parcels(world, u, v, village)
    # Some parcels are cleared and some planted, so that a wood has straight edges as well.
    forest = forest + 1.1 * (_by_parcel(world, "planted", parcels) - 0.5)
    hedge = (parcels.edge_m < 3.0) & (_by_parcel(world, "hedge", parcels) < 0.4)
    odds = np.where(forest > 0.0, 0.88, np.where(hedge, 0.6, np.where(village > -0.1, 0.05, 0.008)))
    grows = (chance < odds) & (parcels.road_m < -1.5)
    i, j, y, x, size, shape, forest = (a[grows] for a in (i, j, y, x, size, shape, forest))
    height = region.stand_m.points(y, x) * (0.68 + 0.5 * size) * np.clip(0.6 + forest, 0.6, 1.0)
    conifer = region.conifer.points(y, x) + 1.5 * (shape - 0.5) > 0.0
    radius = np.clip(
        (np.where(conifer, 0.11, 0.17) * height + 1.4) * (0.75 + 0.55 * shape), 1.8, _CROWN_M
    )
    height, radius = np.clip(height, 6.0, 30.0).astype(np.float32), radius.astype(np.float32)

    px = frame.pixel_m
    most = math.ceil(_CROWN_M / px)
    pad = 2 * most  # a crown that reaches into the frame lies wholly within the padding
    canopy = np.zeros((frame.height + 2 * pad, frame.width + 2 * pad), np.float32)
    reach = np.ceil(radius / px).astype(np.int64)
    for k in np.unique(reach):  # trees whose patches have one size are drawn together
        mine = reach == k
        _stamp_crowns(canopy, frame, pad, int(k), y[mine], x[mine], height[mine], radius[mine],
                      conifer[mine])  # fmt: skip
    return np.ascontiguousarray(canopy[pad:-pad, pad:-pad])


def _stamp_crowns(
    canopy: Floats, frame: Frame, pad: int, k: int, y: Doubles, x: Doubles,
    height: Floats, radius: Floats, conifer: NDArray[np.bool_],
) -> None:  # fmt: skip
    px = frame.pixel_m
    row, col = np.floor(y / px).astype(np.int64), np.floor(x / px).astype(np.int64)
    r, c = row - frame.y0 + pad, col - frame.x0 + pad
    ok = (r >= k) & (r < canopy.shape[0] - k) & (c >= k) & (c < canopy.shape[1] - k)
    y, x, height, radius, conifer, row, col, r, c = (
        a[ok] for a in (y, x, height, radius, conifer, row, col, r, c)
    )
    step = np.arange(-k, k + 1)
    dy = ((row[:, None] + step + 0.5) * px - y[:, None]).astype(np.float32)
    dx = ((col[:, None] + step + 0.5) * px - x[:, None]).astype(np.float32)
    r2 = (dy * dy)[:, :, None] + (dx * dx)[:, None, :]
    r2 /= (radius * radius)[:, None, None]
    # A fir is a cone, a broad-leaved tree a dome; both are cut at the lowest branches.
    fall = np.where(conifer[:, None, None], np.float32(0.75) * np.sqrt(r2), np.float32(0.5) * r2)
    top = np.where(r2 < 1.0, height[:, None, None] * (1 - fall), np.float32(0.0))
    flat = ((r[:, None] + step) * canopy.shape[1])[:, :, None] + (c[:, None] + step)[:, None, :]
    np.maximum.at(canopy.reshape(-1), flat.ravel(), top.ravel())


def _buildings(world: World, region: Region, frame: Frame) -> tuple[Floats, Floats]:
    """Return absolute roof heights (-inf where there is none) and the roofs' albedo."""
    roof = np.full((frame.height, frame.width), -np.inf, np.float32)
    albedo = np.zeros_like(roof)
    for kind, cell, size, eaves, share in (
        ("house", 27.0, (9.0, 17.0), (3.5, 7.0), 0.7),
        ("hall", 88.0, (22.0, 46.0), (6.0, 18.0), 0.35),
    ):
        # Half the diagonal of the largest roof.
        i, j, y, x = _scatter(world, kind, frame, cell, 0.4, 0.7 * size[1] + frame.pixel_m)
        r = {n: uniform(world.key(f"{kind} {n}"), i, j)
             for n in ("is", "long", "wide", "high", "turn", "bright", "flat")}  # fmt: skip
        village, hill = region.village.points(y, x), region.hill.points(y, x)
        u, v = region.u.points(y, x), region.v.points(y, x)
        road = _parcels(world, u, v, village).road_m
        length = size[0] + (size[1] - size[0]) * r["long"]
        width = length * (0.55 + 0.3 * r["wide"])
        built = (r["is"] < share) & (village > 0.05) & (hill < 0.7) & (road < -0.5 * width - 1.0)
        # Houses face the streets, so they share the turn of the parcels, give or take.
        turn = 0.45 + 0.5 * math.pi * (r["turn"] < 0.5) + 0.12 * (r["bright"] - 0.5)
        base = region.ground.points(y, x)
        walls = eaves[0] + (eaves[1] - eaves[0]) * r["high"] ** 2
        pitch = np.where((r["flat"] < 0.25) | (kind == "hall"), 0.03, 0.55 + 0.3 * r["wide"])
        bright = 0.16 + 0.5 * r["bright"] ** 2
        for n in np.flatnonzero(built):
            _stamp_roof(roof, albedo, frame, (y[n], x[n]), (length[n], width[n]), turn[n],
                        base[n] + walls[n], pitch[n], bright[n])  # fmt: skip
    return roof, albedo


def _stamp_roof(
    roof: Floats, albedo: Floats, frame: Frame, at: tuple[float, float],
    size: tuple[float, float], turn: float, eaves: float, pitch: float, bright: float,
) -> None:  # fmt: skip
    px, half = frame.pixel_m, 0.5 * math.hypot(*size)
    r0, r1 = (math.floor((at[0] + s * half) / px) - frame.y0 + d for s, d in ((-1, 0), (1, 1)))
    c0, c1 = (math.floor((at[1] + s * half) / px) - frame.x0 + d for s, d in ((-1, 0), (1, 1)))
    r0, r1 = max(r0, 0), min(r1, frame.height)
    c0, c1 = max(c0, 0), min(c1, frame.width)
    if r0 >= r1 or c0 >= c1:
        return
    dy, dx = frame.y[r0:r1, None] - at[0], frame.x[None, c0:c1] - at[1]
    along = np.abs(dx * math.cos(turn) + dy * math.sin(turn))
    across = np.abs(dy * math.cos(turn) - dx * math.sin(turn))
    inside = (along <= 0.5 * size[0]) & (across <= 0.5 * size[1])
    top = (eaves + (0.5 * size[1] - across) * pitch).astype(np.float32)
    here = (slice(r0, r1), slice(c0, c1))
    higher = inside & (top > roof[here])
    roof[here][higher] = top[higher]
    albedo[here][higher] = bright


# --- the surface and what covers it --------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """The true landscape on a frame."""

    ground: Floats  # metres
    top: Floats  # metres, first return
    albedo: Floats  # panchromatic
    red: Floats
    nir: Floats
    plain: Floats  # 0..1: nothing for a matcher to hold on to
    canopy: Floats  # metres above ground

    def cut(self, window: tuple[slice, slice]) -> Surface:
        """Return the part inside `window`."""
        return Surface(**{k: np.ascontiguousarray(a[window]) for k, a in vars(self).items()})


def _blend(below: Floats, above: Any, share: Floats) -> Floats:
    mixed: Floats = below + (above - below) * share
    return mixed


def survey(world: World, frame: Frame) -> Surface:
    region = _region(world, frame)
    y, x = frame.y, frame.x
    ground = region.ground.grid(y, x)
    hill, village = region.hill.grid(y, x), region.village.grid(y, x)
    parcels = _parcels(world, region.u.grid(y, x), region.v.grid(y, x), village)
    road = np.clip(parcels.road_m + np.float32(0.5), 0.0, 1.0)
    field = np.clip((np.float32(0.75) - hill) * 5, 0, 1) * (village < -0.05) * (1 - road)
    crop = _by_parcel(world, "crop", parcels)
    rough = smooth_noise(world, "rough", 9.0, frame) + np.float32(0.5) * smooth_noise(
        world, "fine", 2.6, frame
    )
    ground += np.float32(0.22) * rough * (1 - road) * (1 - np.float32(0.8) * field)

    canopy = _canopy(world, region, frame)
    grain = smooth_noise(world, "grain", 1.1, frame)
    tree = canopy > 0
    canopy += np.where(tree, np.clip(np.float32(0.5) * grain, -1.5, 1.5), np.float32(0))
    low = field * np.maximum(crop - np.float32(0.4), 0) * np.float32(1.6)
    top = ground + np.maximum(canopy, low)
    roof, roof_albedo = _buildings(world, region, frame)
    built = roof > top
    top = np.maximum(top, roof)

    mottle = np.float32(0.035) * rough + np.float32(0.02) * grain
    wild = np.float32(0.30) - np.float32(0.06) * hill + mottle
    shade = _by_parcel(world, "shade", parcels)
    albedo = _blend(
        wild, np.float32(0.2) + np.float32(0.3) * shade + np.float32(0.25) * mottle, field
    )
    albedo = _blend(albedo, np.float32(0.46) + np.float32(0.2) * mottle, road)
    albedo = np.where(tree, np.float32(0.17) + np.float32(0.7) * mottle, albedo)
    albedo = np.where(built, roof_albedo + np.float32(0.01) * grain, albedo)
    green = np.where(crop > 0.35, np.float32(0.9), np.float32(0.25))
    green = _blend(np.full_like(wild, 0.6), green, field) * (1 - road)
    green = np.where(tree, np.float32(1.0), np.where(built, np.float32(0.0), green))
    return Surface(
        ground=ground,
        top=top,
        albedo=np.maximum(albedo, np.float32(0.03)),
        red=np.float32(0.22)
        - np.float32(0.18) * green
        + np.float32(0.1) * (albedo - np.float32(0.3)),
        nir=np.float32(0.20)
        + np.float32(0.25) * green
        + np.float32(0.3) * (albedo - np.float32(0.3)),
        plain=np.maximum(field * (shade > 0.4), np.maximum(built, road)).astype(np.float32),
        canopy=canopy,
    )

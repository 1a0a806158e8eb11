"""One grid: which one is meant, and a raster of another grid brought onto it.

The kernel is GDAL's warper through rasterio. Three of its habits cost heights centimetres to
decimetres and are set here for good: its transformer between two CRSs is an approximation to an
eighth of a pixel (which rasterio 1.4 cannot be told to refine); libraries that pin its
resampling radius to one source pixel make it pick rather than average when the target is coarser;
and where the radius is stretched instead, a sloping plane comes out rough.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyproj
import rasterio.warp
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from odc.geo.overlap import compute_reproject_roi
from odc.geo.xr import xr_coords
from rasterio.errors import NotGeoreferencedWarning

from deepdem.blocks import Box, chunks_of, map_regions
from deepdem.sources.raster import geobox_of
from deepdem.vertical import horizontal

__all__ = [
    "Bounds",
    "bring",
    "check_grids",
    "crop_grid",
    "flat",
    "grid_from",
    "ground_steps",
    "odc_crs",
    "pixel_size_m",
    "regrid",
]

#: ``"intersection"``, ``"union"`` or (left, bottom, right, top) in the grid's CRS.
Bounds: TypeAlias = "str | tuple[float, float, float, float]"

# Raised for the arrays in memory that rasterio warps, whose transform is given beside them.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.warp")

# Of a pixel: grids closer than this are one grid, and values are copied, not interpolated.
_SAME_PX = 1e-3
_HALF_PX = 0.02
# The shortest rows that the warper is given, for time's sake, and the longest.
_STRIP_PX, _WHOLE_PX = 32, 2**20
# Methods that interpolate between source pixels; the others look at a target pixel's area anyway.
_INTERPOLATING = frozenset({"bilinear", "cubic", "cubic_spline", "lanczos"})
# Points that are warped at once.
_BLOCK_PX = 2**23
# By how much a pixel's sides may differ on the ground.
_SQUARE = 0.02
# The warper's transformer is an approximation, linear along each row that it is given. Rows are cut
# so short that it is right to this many source pixels: to 0.1 mm on a slope of 45 degrees and
# pixels of a metre.
_TRANSFORMER_PX = 1e-4


def flat(box: GeoBox) -> GeoBox:
    """Return the grid without the vertical part of its CRS: what pixels are compared by."""
    if box.crs is None or not (box.crs.proj.is_compound or len(box.crs.proj.axis_info) > 2):
        return box
    crs = horizontal(box.crs.proj)
    return GeoBox(box.shape, box.affine, odc_crs(crs))


def odc_crs(crs: Any) -> CRS:
    """Return odc-geo's CRS of anything that pyproj knows: compound ones it takes as WKT only."""
    if isinstance(crs, CRS):
        return crs
    proj = pyproj.CRS(crs)
    code = proj.to_epsg(min_confidence=100)
    return CRS(f"EPSG:{code}") if code else CRS(proj.to_wkt())


def _integer_shift(source: GeoBox, target: GeoBox) -> tuple[int, int] | None:
    """Return by how many whole pixels (y, x) `target` starts inside `source`, if by whole ones."""
    source, target = flat(source), flat(target)
    if source.crs != target.crs:
        return None
    to_source: Affine = ~source.transform * target.transform
    # The scale is judged by what it adds up to over the whole width.
    drift = max(
        abs(to_source.a - 1) * target.shape.x,
        abs(to_source.e - 1) * target.shape.y,
        abs(to_source.b) * target.shape.y,
        abs(to_source.d) * target.shape.x,
    )
    x, y = round(to_source.c), round(to_source.f)
    off = max(abs(to_source.c - x), abs(to_source.f - y))
    return (y, x) if max(drift, off) < _SAME_PX else None


def grid_from(
    like: GeoBox | xr.Dataset | xr.DataArray | None,
    *,
    crs: Any = None,
    resolution: float | None = None,
    extent: BoundingBox | None = None,
) -> GeoBox:
    """Return the target grid before it is cropped: of `like`, or of a CRS and a resolution.

    With `resolution` pixel edges lie on multiples of it (as gdalwarp's ``-tap``).

    Raises
    ------
    ValueError
        Neither `like` nor what makes a grid is given, or `like` is rotated.
    """
    if like is not None:
        box = like if isinstance(like, GeoBox) else geobox_of(like)
        if box is None or box.crs is None:
            raise ValueError("like= has no grid: it needs x and y coordinates and a CRS")
    elif extent is None or resolution is None:
        raise ValueError("no grid: pass like= (a layer's name, a scene, a GeoBox) or resolution=")
    else:
        box = GeoBox.from_bbox(extent, crs=odc_crs(crs), resolution=resolution, tight=False)
    if not box.transform.is_rectilinear or box.transform.e > 0 or box.transform.a < 0:
        raise ValueError(
            f"the grid's geotransform {tuple(box.transform)[:6]} is rotated or not north-up: pass "
            "like= a north-up raster or a GeoBox, or crs= and resolution="
        )
    return box


def crop_grid(grid: GeoBox, footprints: Mapping[str, GeoBox], bounds: Bounds) -> GeoBox:
    """Return `grid` cut or extended by whole pixels to `bounds`.

    Parameters
    ----------
    grid
        Gives the CRS, the pixel size and where pixel edges lie.
    footprints
        The grids of the layers, by name.
    bounds
        ``"intersection"``: the pixels that the bounding boxes of all layers have in common.
        ``"union"``: those of any. (left, bottom, right, top): in the grid's CRS, widened to whole
        pixels.

    Raises
    ------
    ValueError
        The layers do not overlap (the message names the two that do not), or `bounds` are none.
    """
    crs = flat(grid).crs
    assert crs is not None  # grid_from has seen to it
    boxes = {name: flat(box).footprint(crs).boundingbox for name, box in footprints.items()}
    if isinstance(bounds, str):
        if bounds not in ("intersection", "union"):
            raise ValueError(
                f"bounds={bounds!r}: pass 'intersection', 'union' or (left, bottom, right, top)"
            )
        inward = bounds == "intersection"
        if inward:
            _check_overlap(boxes)
        pick = (max, max, min, min) if inward else (min, min, max, max)
        edges = [f(box[i] for box in boxes.values()) for i, f in enumerate(pick)]
    else:
        inward, edges = False, [float(b) for b in bounds]
        if len(edges) != 4 or edges[0] >= edges[2] or edges[1] >= edges[3]:
            raise ValueError(
                f"bounds={bounds!r}: wanted (left, bottom, right, top) in {crs}, "
                "left < right and bottom < top"
            )
    left, top = ~grid.transform * (edges[0], edges[3])
    right, bottom = ~grid.transform * (edges[2], edges[1])
    x0, y0 = (_snap(v, up=inward) for v in (left, top))
    x1, y1 = (_snap(v, up=not inward) for v in (right, bottom))
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"bounds={bounds!r} leave no whole pixel of {grid.resolution.x} {crs.units[0]}"
        )
    return GeoBox((y1 - y0, x1 - x0), grid.transform * Affine.translation(x0, y0), grid.crs)


def _snap(edge_px: float, *, up: bool) -> int:
    near = round(edge_px)
    if abs(edge_px - near) < _SAME_PX:
        return near
    return math.ceil(edge_px) if up else math.floor(edge_px)


def _check_overlap(boxes: Mapping[str, BoundingBox]) -> None:
    names = list(boxes)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            one, two = boxes[a], boxes[b]
            if min(one.right, two.right) <= max(one.left, two.left) or min(one.top, two.top) <= max(
                one.bottom, two.bottom
            ):
                raise ValueError(
                    f"layers {a!r} and {b!r} do not overlap: {a!r} covers {_pretty(one)}, {b!r} "
                    f"covers {_pretty(two)} ({one.crs}): check that both show the same place and "
                    "that their CRSs are right, or pass bounds='union'"
                )


def _pretty(box: BoundingBox) -> str:
    return f"x {box.left:.1f} to {box.right:.1f}, y {box.bottom:.1f} to {box.top:.1f}"


def check_grids(grid: GeoBox, layers: Mapping[str, GeoBox]) -> None:
    """Warn of grids that are probably not what was meant; `stack` goes on all the same.

    Parameters
    ----------
    grid
        The scene's.
    layers
        The layers' own, by name. One of the same pixel size that lies half a pixel off is named:
        as a rule someone took the centre of a pixel for its corner. Other fractions of a pixel are
        interpolated without a word.
    """
    for name, box in layers.items():
        if flat(box).crs != flat(grid).crs:
            continue
        to_box: Affine = ~grid.transform * box.transform
        scale = np.array([to_box.a - 1, to_box.b, to_box.d, to_box.e - 1])
        if np.abs(scale).max() * max(box.shape) > _SAME_PX:
            continue
        off = {"x": to_box.c % 1, "y": to_box.f % 1}
        if half := [axis for axis, shift in off.items() if abs(shift - 0.5) < _HALF_PX]:
            warnings.warn(
                f"layer {name!r} lies half a pixel ({' and '.join(half)}) off the scene's grid, at "
                "the same pixel size: a pixel's centre may have been taken for its corner "
                "(AREA_OR_POINT). If so move it by half a pixel (gdal_edit.py -a_ullr …); it is "
                "interpolated as it stands",
                UserWarning, stacklevel=3,
            )  # fmt: skip
    if grid.crs is not None and grid.crs.geographic:
        dy, dx = map(abs, _ground_pixel(grid))
        if abs(dx / dy - 1) > _SQUARE:
            warnings.warn(
                f"the scene's grid is in degrees: a pixel is {dx:.3f} m wide and {dy:.3f} m high; "
                f"its size is taken for {(dx + dy) / 2:.3f} m, the mean of both geodesics at the "
                "grid's centre. For square pixels pass crs= (a UTM zone) and resolution=",
                UserWarning, stacklevel=3,
            )  # fmt: skip


def pixel_size_m(grid: GeoBox) -> float:
    """Return the pixel size in metres on the ground: the mean of both axes, at the grid's centre.

    See `ground_steps`: it is measured, so that a nominal metre of UTM may be 1.0004 m. Without a
    CRS, the size is taken for metres.
    """
    return sum(map(abs, _ground_pixel(grid))) / 2


def _ground_pixel(grid: GeoBox) -> tuple[float, float]:
    """Return a pixel's height and width in metres on the ground, at the grid's centre."""
    centre = grid.transform * (grid.shape.x / 2, grid.shape.y / 2)
    crs = None if grid.crs is None else horizontal(grid.crs.proj)
    dx, dy = grid.resolution.xy
    return ground_steps(crs, at=(centre[1], centre[0]), step=(dy, dx))


def ground_steps(
    crs: pyproj.CRS | None, *, at: tuple[float, float], step: tuple[float, float]
) -> tuple[float, float]:
    """Return steps along y and x as metres on the ground, of the same signs as `step`.

    They are geodesics on the CRS's ellipsoid: degrees, feet and Web Mercator's stretched metres
    come out right, and so does the scale of a projection (0.9996 in the middle of a UTM zone).

    Parameters
    ----------
    crs
        ``None``: the steps are taken for metres.
    at
        (y, x), where it is measured.
    step
        (y, x), in the CRS's units.

    Raises
    ------
    ValueError
        The place is not on the CRS's map: the CRS or the coordinates are wrong.
    """
    if crs is None:
        return step
    geodesy = _geodesy(crs)
    if geodesy is None:  # a local engineering CRS has no ellipsoid to measure on
        unit: float = crs.axis_info[0].unit_conversion_factor
        return step[0] * unit, step[1] * unit
    to_lonlat, geod, degrees = geodesy
    (y, x), (dy, dx) = at, step
    lon, lat = to_lonlat.transform(
        [x, x - dx / 2, x, x + dx / 2], [y - dy / 2, y, y + dy / 2, y]
    )  # fmt: skip
    if not np.isfinite([lon, lat]).all():
        raise ValueError(
            f"y={y}, x={x} is no place in {crs.name}: the CRS or the coordinates are wrong; write "
            "the right ones, e.g. ds.rio.write_crs('EPSG:…')"
        )
    lon, lat = np.multiply(lon, degrees), np.multiply(lat, degrees)
    _, _, metres = geod.inv(lon[:2], lat[:2], lon[2:], lat[2:])
    return math.copysign(metres[0], dy), math.copysign(metres[1], dx)


@lru_cache(maxsize=64)  # a transformer takes 0.3 ms to make, and a reprojection asks for many
def _geodesy(crs: pyproj.CRS) -> tuple[pyproj.Transformer, pyproj.Geod, float] | None:
    """Return the way to longitude and latitude, the ellipsoid, and their unit in degrees."""
    geodetic, geod = crs.geodetic_crs, crs.get_geod()
    if geodetic is None or geod is None:
        return None
    # Not every one counts in degrees: NTF (Paris), below the old French Lambert grids, in grads.
    degrees = math.degrees(geodetic.axis_info[0].unit_conversion_factor)
    return pyproj.Transformer.from_crs(crs, geodetic, always_xy=True), geod, degrees


def regrid(array: xr.DataArray, grid: GeoBox, *, resampling: str, chunks: int) -> xr.DataArray:
    """Return `array` on `grid`, lazy.

    Parameters
    ----------
    array
        Dims (y, x), Dask-backed float32, NaN for no data, with a grid of its own.
    grid
        The target.
    resampling
        A name of `rasterio.enums.Resampling`. Interpolating methods leave NaN out. Where the target
        is coarser they average: over points inside the target's pixel, no further apart than the
        source's pixels; half of them must be there. Where the two grids differ by whole
        pixels values are copied, whatever the method.
    chunks
        The width of the result's chunks.

    Raises
    ------
    ValueError
        The resampling method is not known.
    """
    methods = rasterio.enums.Resampling.__members__
    if resampling not in methods:
        raise ValueError(
            f"layer {array.name!r}: resampling={resampling!r} is not known: pass one of "
            + ", ".join(sorted(methods))
        )
    source = geobox_of(array)
    assert source is not None  # open_layer has seen to it
    # The warper is kept from the vertical part: it would ask PROJ for geoids on its own.
    full, source, grid = grid, flat(source), flat(grid)
    shift = _integer_shift(source, grid)
    zoom = max(_zoom(source, grid), 1.0)
    strip = _strip_px(source, grid) if shift is None else 0

    def region(out: Box) -> Box:
        return _needed(out, source, grid, shift, zoom)

    data = map_regions(
        _paste if shift is not None else _warp,
        [array.data],
        chunks=chunks_of((grid.shape.y, grid.shape.x), chunks),
        region=region,
        dtype=np.float32,
        name=f"regrid-{array.name}",
        direct=True,
        common={
            "source": source,
            "target": grid,
            "resampling": resampling,
            "zoom": zoom,
            "strip": strip,
        }
        if shift is None
        else {"shift": shift},
    )
    out = xr.DataArray(data, coords=xr_coords(full, always_yx=True), dims=("y", "x"))
    out.attrs = dict(array.attrs)
    out.encoding = {"grid_mapping": "spatial_ref"}
    return out.rename(array.name)


def bring(
    read: Callable[[Box], NDArray[Any]],
    source: GeoBox,
    grid: GeoBox,
    out: Box,
    *,
    resampling: str,
) -> NDArray[np.float32]:
    """Return the pixels `out` of `grid` from a raster on `source`, as `regrid` makes them.

    Parameters
    ----------
    read
        Takes a region of the source, gives its pixels, NaN no data. It is not asked for nothing.
    source, grid
        The grid of the raster, and the target.
    out
        Pixels of `grid`.
    resampling
        A name of `rasterio.enums.Resampling`.
    """
    source, grid = flat(source), flat(grid)
    shift = _integer_shift(source, grid)
    zoom = max(_zoom(source, grid), 1.0)
    region = _needed(out, source, grid, shift, zoom)
    if region.empty:
        return np.full(out.shape, np.nan, dtype=np.float32)
    if shift is not None:
        return _paste([read(region)], out=out, region=region, shift=shift)
    return _warp(
        [read(region)], out=out, region=region, source=source, target=grid, resampling=resampling,
        zoom=zoom, strip=_strip_px(source, grid),
    )  # fmt: skip


def _needed(
    out: Box, source: GeoBox, grid: GeoBox, shift: tuple[int, int] | None, zoom: float
) -> Box:
    """Return the pixels of `source` that `out`, pixels of `grid`, is made of."""
    whole = Box(0, source.shape.y, 0, source.shape.x)
    if shift is not None:
        y, x = shift
        return Box(out.y0 + y, out.y1 + y, out.x0 + x, out.x1 + x).intersect(whole)
    tile = grid[out.y0 : out.y1, out.x0 : out.x1]
    # The kernel's radius grows with the target's pixel.
    radius = 3 * math.ceil(zoom) + 1
    roi = compute_reproject_roi(source, tile, padding=radius).roi_src
    return Box(roi[0].start, roi[0].stop, roi[1].start, roi[1].stop).intersect(whole)


def _zoom(source: GeoBox, target: GeoBox) -> float:
    """Return how many source pixels a target pixel is wide."""
    if source.crs == target.crs:
        # Exact: what is measured differs a little from one grid's centre to the other's.
        return float((abs(target.resolution.x) + abs(target.resolution.y))
                     / (abs(source.resolution.x) + abs(source.resolution.y)))  # fmt: skip
    return pixel_size_m(target) / pixel_size_m(source)


def _strip_px(source: GeoBox, target: GeoBox) -> int:
    """Return how many pixels of a row of the target the warper may take for a straight line.

    The deviation in the middle of a row is measured where the grid is most curved (along its
    edges and its middle) and falls with the square of the row's length.
    """
    if source.crs == target.crs:
        return _WHOLE_PX  # an affine transformation is straight
    assert source.crs is not None  # open_layer has seen to it
    assert target.crs is not None
    height, width = target.shape
    length = min(width, 1024)
    row, start = np.meshgrid(np.linspace(0, height, 5), np.linspace(0, width - length, 5))
    column = np.stack([start, start + length / 2, start + length])
    a, b, c, d, e, f = target.transform[:6]
    way = pyproj.Transformer.from_crs(target.crs.proj, source.crs.proj, always_xy=True)
    x, y = way.transform(a * column + b * row + c, d * column + e * row + f)
    a, b, c, d, e, f = (~source.transform)[:6]
    ends = np.hypot(*(
        q[1] - (q[0] + q[2]) / 2 for q in (a * x + b * y + c, d * x + e * y + f)
    ))  # fmt: skip
    off = float(np.max(ends[np.isfinite(ends)], initial=0.0))
    if off == 0:
        return _WHOLE_PX
    best = length * math.sqrt(_TRANSFORMER_PX / off)
    return min(max(1 << math.floor(math.log2(max(best, 1))), _STRIP_PX), _WHOLE_PX)


def _paste(
    arrays: list[NDArray[Any]], *, out: Box, region: Box, shift: tuple[int, int]
) -> NDArray[np.float32]:
    result = np.full(out.shape, np.nan, dtype=np.float32)
    if not region.empty:
        y, x = shift
        here = Box(region.y0 - y, region.y1 - y, region.x0 - x, region.x1 - x)
        result[here.within(out)] = arrays[0]
    return result


def _warp(
    arrays: list[NDArray[Any]],
    *,
    out: Box,
    region: Box,
    source: GeoBox,
    target: GeoBox,
    resampling: str,
    zoom: float,
    strip: int,
) -> NDArray[np.float32]:
    result = np.full(out.shape, np.nan, dtype=np.float32)
    if region.empty:
        return result
    there = source[region.y0 : region.y1, region.x0 : region.x1]
    # A block of pixels of one unit that begins at the origin would have no place: GDAL takes such
    # a transform for none. Within one CRS only the places of the two to each other matter.
    aside = 1023.37 if source.crs == target.crs else 0.0
    moved = Affine.translation(aside * abs(source.resolution.x), aside * abs(source.resolution.y))
    # An interpolating kernel that is stretched to a coarser target's pixel does not keep a plane a
    # plane (0.07 m off on a slope of 0.8 at 1.2 m from 1 m). The mean of points inside it does.
    points = math.ceil(zoom - _SAME_PX) if resampling in _INTERPOLATING else 1
    rows = max(1, _BLOCK_PX // (min(strip, out.shape[1]) * points**2))
    # Strips begin at the same columns of the target whichever chunk they are warped in.
    for y0, y1 in pairwise([*range(out.y0, out.y1, rows), out.y1]):
        for x0, x1 in pairwise([out.x0, *range((out.x0 // strip + 1) * strip, out.x1, strip),
                                out.x1]):  # fmt: skip
            part = np.full(((y1 - y0) * points, (x1 - x0) * points), np.nan, dtype=np.float32)
            rasterio.warp.reproject(
                arrays[0],
                part,
                src_transform=moved @ there.transform,
                src_crs=str(there.crs),
                dst_transform=moved @ target[y0:y1, x0:x1].transform @ Affine.scale(1 / points),
                dst_crs=str(target.crs),
                src_nodata=np.nan,
                dst_nodata=np.nan,
                resampling=rasterio.enums.Resampling[resampling],
                # Destination pixels a source pixel, said once for the whole grid: left to itself
                # the warper works it out chunk by chunk.
                XSCALE=points / zoom if points == 1 else 1,
                YSCALE=points / zoom if points == 1 else 1,
            )
            result[y0 - out.y0 : y1 - out.y0, x0 - out.x0 : x1 - out.x0] = _mean(part, points)
    return result


def _mean(values: NDArray[np.float32], points: int) -> NDArray[np.float32]:
    """Return the mean of each `points` by `points` values, NaN where fewer than half are there."""
    if points == 1:
        return values
    height, width = (n // points for n in values.shape)
    there = np.isfinite(values)
    cells = (height, points, width, points)
    count = there.reshape(cells).sum((1, 3))
    total = np.where(there, values, 0).reshape(cells).sum((1, 3), dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(2 * count >= points**2, total / count, np.nan)
    return mean.astype(np.float32)

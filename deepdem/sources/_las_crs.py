"""Where a point cloud's coordinates lie, and what its units are worth."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from typing import Any

import pyproj
import rasterio
from pyproj.exceptions import CRSError
from rasterio.io import MemoryFile

from deepdem.vertical import horizontal, vertical_of

__all__ = ["Frame", "frame_of", "header_crs", "named_crs"]

_UNITS = {"m": 1.0, "ft": 0.3048, "us-ft": 1200 / 3937}
_KEY_TAGS = {34735: "H", 34736: "d", 34737: "s"}  # directory, doubles, characters
_VERTICAL_UNITS_KEY = 4099
_EPSG_UNITS = {9001: 1.0, 9002: 0.3048, 9003: 1200 / 3937}


def named_crs(crs: Any, url: str) -> pyproj.CRS:
    """Return a CRS from anything that pyproj understands.

    Raises
    ------
    ValueError
        It does not.
    """
    try:
        return pyproj.CRS.from_user_input(crs)
    except CRSError as error:
        raise ValueError(
            f"{url}: {str(crs)[:80]!r} is no CRS: pass crs=, for example crs='EPSG:26910'"
        ) from error


def header_crs(header: Any, url: str) -> pyproj.CRS:
    """Return the CRS of a LAS header, from its WKT or its GeoTIFF keys.

    Raises
    ------
    ValueError
        There is none, or it cannot be read: the cure is ``crs=``.
    """
    records = {vlr.record_id: vlr for vlr in header.vlrs if vlr.user_id == "LASF_Projection"}
    if 2112 in records:
        wkt = records[2112].record_data_bytes().rstrip(b"\0").decode("utf-8", "replace")
        if wkt.strip():
            return named_crs(wkt, url)
    keys = {tag: bytes(records[tag].record_data_bytes()) for tag in _KEY_TAGS if tag in records}
    if 34735 in keys:
        wkt = _geotiff_wkt(keys)
        if wkt:
            return named_crs(wkt, url)
    raise ValueError(f"{url} says no CRS that can be read: pass crs=, for example crs='EPSG:26910'")


def _geotiff_wkt(keys: dict[int, bytes]) -> str:
    """Return what GDAL makes of GeoTIFF keys: they are put into a GeoTIFF of one pixel.

    laspy knows the codes of EPSG alone, and takes a projection that is spelled out, as those in
    feet often are, for longitude and latitude.
    """
    # width, height, bits, compression, photometric, strip, samples, rows, bytes
    plain = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    entries = [(tag, "H", 1, struct.pack("<HH", value, 0)) for tag, value in plain.items()]
    extra = b"\0" * 8
    # The scale and the place of a pixel, or GDAL would not look at the keys.
    places = {33550: struct.pack("<3d", 1, 1, 0), 33922: struct.pack("<6d", 0, 0, 0, 0, 0, 0)}
    for tag, data in {**places, **keys}.items():
        kind = _KEY_TAGS.get(tag, "d")
        width = {"H": 2, "d": 8, "s": 1}[kind]
        where = 8 + len(extra)
        packed = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", where)
        entries.append((tag, kind, len(data) // width, packed))
        extra += data + b"\0" * (-len(data) % 8)
    start = 8 + len(extra)
    types = {"H": 3, "d": 12, "s": 2}
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHI", tag, types[kind], count) + packed
        for tag, kind, count, packed in sorted(entries)
    )
    tiff = struct.pack("<2sHI", b"II", 42, start) + extra + directory + b"\0" * 4
    with (
        rasterio.Env(GTIFF_REPORT_COMPD_CS=True, GTIFF_POINT_GEO_IGNORE=True),
        MemoryFile(tiff, ext=".tif") as memory,
        memory.open() as raster,
    ):
        return raster.crs.to_wkt() if raster.crs else ""


@dataclass(frozen=True)
class Frame:
    """How to read a cloud's coordinates.

    Attributes
    ----------
    crs
        Two-dimensional.
    height_m
        Metres of one unit of height.
    unit_from
        Who says so.
    above
        What heights are above, in words that `deepdem.vertical` knows; None: nobody says.
    """

    crs: pyproj.CRS
    height_m: float
    unit_from: str
    above: str | None


def frame_of(crs: pyproj.CRS, unit: Any, header: Any, url: str) -> Frame:
    """Return what a CRS, an option and a header say of the coordinates.

    The unit of height is, in this order: `unit`; that of the vertical part of the CRS; that of the
    GeoTIFF key; that of a projected CRS's axes (with a warning where that is not the metre).

    Raises
    ------
    ValueError
        The CRS is geocentric or local, or `unit` is not known.
    """
    flat = horizontal(crs)
    if not (flat.is_projected or flat.is_geographic):
        raise ValueError(
            f"{url} is said to be in {flat.name!r} ({flat.type_name}), which is no map: pass the "
            "right one, for example crs='EPSG:26910'"
        )
    vertical = vertical_of({}, crs)
    above = None if vertical is None else vertical.name
    if vertical is not None and vertical.metres != 1:
        # "NAVD88 height (ftUS) (EPSG:6360)": heights become metres, and are not above that.
        above = vertical.name.partition(" (")[0]
    if unit is not None:
        factor = _UNITS.get(unit, unit) if isinstance(unit, str) else unit
        if isinstance(factor, str) or not factor > 0:
            raise ValueError(
                f"vertical_unit={unit!r}: pass {', '.join(map(repr, _UNITS))} or the metres of one"
            )
        return Frame(flat, float(factor), "vertical_unit=", above)
    if vertical is not None:
        return Frame(flat, vertical.metres, "the vertical CRS", above)
    key = _vertical_key(header)
    if key is not None:
        return Frame(flat, key, "the GeoTIFF key of vertical units", above)
    if flat.is_geographic:
        return Frame(flat, 1.0, "nobody", above)
    axis = flat.axis_info[0]
    if abs(axis.unit_conversion_factor - 1) > 1e-9:
        warnings.warn(
            f"{url} states no vertical unit: heights are taken to be in {axis.unit_name}, as x and "
            "y are; pass vertical_unit='m' (or 'ft', 'us-ft') to say which",
            stacklevel=2,
        )
    return Frame(flat, axis.unit_conversion_factor, "the unit of x and y", above)


def _vertical_key(header: Any) -> float | None:
    """Return the metres of the GeoTIFF key of vertical units, if there is one."""
    for vlr in [] if header is None else header.vlrs:
        for key in getattr(vlr, "geo_keys", []):
            if key.id == _VERTICAL_UNITS_KEY and key.value_offset in _EPSG_UNITS:
                return _EPSG_UNITS[key.value_offset]
    return None

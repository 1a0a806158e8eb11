"""The public collections of lidar points over a place, from an index of their outlines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import pyproj
import xarray as xr
from odc.geo import geom
from odc.geo.geobox import GeoBox

from deepdem.grid import grid_from
from deepdem.sources._bytes import fetch

__all__ = ["USGS_3DEP", "Collection", "find_collections"]

#: The index of the EPT trees that USGS and Hobu keep of the 3D Elevation Program; GeoJSON.
USGS_3DEP = "https://raw.githubusercontent.com/hobu/usgs-lidar/master/boundaries/resources.geojson"

# Names end in the year of publication ("…_2015_LAS_2017") or of the contract ("…_2_B22").
_YEAR = re.compile(r"(?<!\d)(?<!LAS_)(19[89]\d|20\d\d)(?!\d)")
_CONTRACT = re.compile(r"_[A-D](\d\d)(?:_|$)")


@dataclass(frozen=True)
class Collection:
    """A tree of points that an index lists.

    Attributes
    ----------
    name, id
        As the index has them.
    url
        Of its ``ept.json``.
    count
        Points.
    density
        Points per square metre on the ground: the count by the outline's area.
    year
        Of the survey, read from the name; None where it says none.
    covers
        The share of the place that the outline covers, 0 to 1.
    """

    name: str
    id: str
    url: str
    count: int
    density: float
    year: int | None
    covers: float


def find_collections(
    like: GeoBox | xr.Dataset | xr.DataArray,
    *,
    index: str | PathLike[str] = USGS_3DEP,
    order: str = "newest",
    storage_options: Mapping[str, Any] | None = None,
) -> list[Collection]:
    """Return the collections of points over the grid of `like`, the best first; reads the index.

    Pass them, or some of them, to `grid_points`: the first that has points at a pixel decides it.

    Parameters
    ----------
    like
        A scene, a DataArray or a GeoBox.
    index
        A path or URL of a GeoJSON of polygons with ``name``, ``id``, ``count`` and ``url``.
    order
        ``"newest"`` (by the year in the name; those of one year by density) or ``"densest"``.
    storage_options
        For fsspec.

    Raises
    ------
    FileNotFoundError
        There is no such index.
    ValueError
        No collection covers the place, `order` is not known, or the index is none.

    Examples
    --------
    >>> found = find_collections(ds, index="resources.geojson")
    >>> dsm = grid_points(found, ds)
    """
    if order not in ("newest", "densest"):
        raise ValueError(f"order={order!r}: pass 'newest' or 'densest'")
    text = fetch(fspath(index), dict(storage_options or {}))
    try:
        features = json.loads(text)["features"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{fspath(index)} is no index of collections: a GeoJSON of polygons with name, id, "
            "count and url is wanted"
        ) from error
    grid = grid_from(like)
    place = grid.footprint("EPSG:4326")
    found = []
    for feature in features:
        outline = geom.Geometry(feature["geometry"], "EPSG:4326")
        if not outline.is_valid:
            outline = outline.buffer(0)
        common = outline.intersection(place)
        if not common.is_empty:
            found.append(_collection(feature["properties"], outline, common.area / place.area))
    if not found:
        raise ValueError(
            f"no collection of {fspath(index)} covers {place.boundingbox.bbox} (longitudes and "
            "latitudes): pass another index=, or files of your own to grid_points"
        )
    by_year = order == "newest"
    return sorted(
        found, key=lambda c: ((c.year or 0) if by_year else 0, c.density, c.name), reverse=True
    )


def _collection(about: Mapping[str, Any], outline: geom.Geometry, covers: float) -> Collection:
    name, count = str(about["name"]), int(about.get("count") or 0)
    area_m2 = abs(pyproj.Geod(ellps="WGS84").geometry_area_perimeter(outline.geom)[0])
    return Collection(
        name, str(about.get("id", "")), str(about["url"]), count,
        count / area_m2 if area_m2 else 0.0, _year(name), min(covers, 1.0),
    )  # fmt: skip


def _year(name: str) -> int | None:
    years = [int(year) for year in _YEAR.findall(name)]
    years += [2000 + int(digits) for digits in _CONTRACT.findall(name)]
    return max(years, default=None)

"""What heights are above: read from files, compared between layers, converted with PROJ.

A geoid undulates by a metre in a few kilometres and lies up to a hundred from the ellipsoid. PROJ,
left to itself, shifts by nothing where the geoid's grid is missing; here that is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pyproj
import pyproj.datadir
import xarray as xr
from affine import Affine
from numpy.typing import NDArray
from pyproj.crs import CompoundCRS
from pyproj.exceptions import CRSError
from pyproj.transformer import AreaOfInterest, TransformerGroup

from deepdem.blocks import Box, map_regions

__all__ = [
    "Vertical",
    "check_vertical",
    "convert_heights",
    "geotiff_crs",
    "horizontal",
    "vertical_from",
    "vertical_of",
    "with_vertical",
]

Floats: TypeAlias = "NDArray[np.floating[Any]]"

#: The operation is worked out at every 16th pixel and interpolated between: nine times as fast as
#: asking PROJ at every pixel, and the same to 0.02 mm on a geoid with cells of 10 km.
_LATTICE_PX = 16
# What tags say in words. More such words do no harm; what none of them matches stays text.
_WORDS = (
    (r"ellips", "ellipsoid"),
    (r"egm\s*(20)?08", "EPSG:3855"),
    (r"egm\s*(19)?96", "EPSG:5773"),
    (r"egm\s*(19)?84", "EPSG:5798"),
    (r"navd\s*(19)?88", "EPSG:5703"),
    (r"ign\s*69", "EPSG:5720"),
)


@dataclass(frozen=True)
class Vertical:
    """What heights are above.

    Attributes
    ----------
    name
        As a layer's ``attrs["vertical_reference"]`` has it.
    kind
        ``ellipsoid``: that of the horizontal CRS. ``geoid``: any vertical CRS, or words that name
        some geoid. ``unknown``: words that say neither.
    crs
        The vertical CRS, where there is one.
    """

    name: str
    kind: Literal["ellipsoid", "geoid", "unknown"]
    crs: pyproj.CRS | None = None

    @property
    def metres(self) -> float:
        """How many metres a unit of the heights is."""
        return 1.0 if self.crs is None else float(self.crs.axis_info[-1].unit_conversion_factor)

    def agrees(self, other: Vertical) -> bool:
        """Return whether heights above both are the same as far as is known."""
        if self.kind == other.kind == "geoid" and self.crs is not None and other.crs is not None:
            return bool(self.crs.name == other.crs.name)
        return self.kind == other.kind


def horizontal(crs: pyproj.CRS) -> pyproj.CRS:
    """Return a CRS without its vertical part; a 2-D one as it is."""
    if crs.is_compound:
        crs = crs.sub_crs_list[0]
    return crs.to_2d() if len(crs.axis_info) > 2 else crs


def with_vertical(crs: pyproj.CRS, vertical: Vertical) -> pyproj.CRS:
    """Return the compound or 3-D CRS of a horizontal one and what heights are above.

    Raises
    ------
    ValueError
        The vertical reference is known in words only.
    """
    flat = horizontal(crs)
    if vertical.kind == "ellipsoid":
        return flat.to_3d()
    if vertical.crs is None:
        raise ValueError(
            f"{vertical.name!r} names no vertical CRS that PROJ knows: say which it is, for "
            "example heights={'dsm': 'EPSG:5773'}"
        )
    return CompoundCRS(f"{flat.name} + {vertical.crs.name}", [flat, vertical.crs])


def geotiff_crs(crs: pyproj.CRS) -> pyproj.CRS:
    """Return the CRS as a GeoTIFF can hold it.

    It has no place for a projected 3-D CRS, nor for a geoid that is only a grid: GDAL puts the
    whole CRS into a file beside it, which is lost on the way. The horizontal part goes into it;
    the vertical one is in its tag ``vertical_reference``, which `vertical_of` reads.
    """
    bound = crs.is_compound and crs.sub_crs_list[-1].is_bound
    deep = crs.is_projected and not crs.is_compound and len(crs.axis_info) > 2
    return horizontal(crs) if bound or deep else crs


def _of_crs(crs: pyproj.CRS) -> Vertical | None:
    """Return the vertical part of a CRS; None: it is horizontal."""
    if crs.is_compound:
        return _of_crs(crs.sub_crs_list[-1])
    if crs.is_vertical:
        plain = crs.source_crs if crs.is_bound and crs.source_crs is not None else crs
        code = plain.to_authority(min_confidence=100)
        return Vertical(f"{plain.name} ({':'.join(code)})" if code else plain.name, "geoid", crs)
    if len(crs.axis_info) == 3:
        ellipsoid = crs.ellipsoid.name if crs.ellipsoid is not None else "the"
        # The horizontal CRS's own: a 3-D one in feet is kept for its unit.
        feet = crs.axis_info[-1].unit_conversion_factor != 1
        return Vertical(f"{ellipsoid} ellipsoid", "ellipsoid", crs if feet else None)
    return None


def _of_text(text: str) -> Vertical:
    if match := re.search(r"EPSG:(\d+)", text):
        try:
            found = _of_crs(pyproj.CRS(int(match[1])))
        except CRSError:
            found = None
        if found is not None:
            return Vertical(text, found.kind, found.crs)
    for word, means in _WORDS:
        if re.search(word, text, re.IGNORECASE):
            if means == "ellipsoid":
                return Vertical(text, "ellipsoid")
            return Vertical(text, "geoid", pyproj.CRS(means))
    geoid = re.search(r"geoid|orthometric|sea level", text, re.IGNORECASE)
    return Vertical(text, "geoid" if geoid else "unknown")


def vertical_of(attrs: Mapping[Any, Any], crs: pyproj.CRS | None) -> Vertical | None:
    """Return what a raster says its heights are above; None: it does not say.

    ``attrs["vertical_reference"]`` comes first, then a compound or 3-D CRS, then a tag
    ``VERTICAL`` in words.
    """
    of_crs = None if crs is None else _of_crs(crs)
    if own := attrs.get("vertical_reference"):
        # A CRS without a code is known by its name only.
        return of_crs if of_crs is not None and of_crs.name == own else _of_text(str(own))
    if of_crs is not None:
        return of_crs
    said = [str(v) for k, v in attrs.items() if str(k).upper() == "VERTICAL"]
    return _of_text(said[0]) if said else None


def vertical_from(what: Any) -> Vertical:
    """Return the vertical reference that an option means.

    Parameters
    ----------
    what
        ``"ellipsoid"``, or a vertical, compound or 3-D CRS as `pyproj.CRS` takes them.

    Raises
    ------
    ValueError
        It is no CRS, or one without a vertical part.
    """
    if what == "ellipsoid":
        return Vertical("ellipsoid", "ellipsoid")
    try:
        found = _of_crs(pyproj.CRS(what))
    except CRSError as error:
        raise ValueError(
            f"{what!r} is no vertical reference: pass 'ellipsoid' or a vertical CRS such as "
            f"'EPSG:5773' ({error})"
        ) from error
    if found is None:
        raise ValueError(
            f"{what!r} is a horizontal CRS: pass 'ellipsoid' or a vertical CRS such as 'EPSG:5773'"
        )
    return found


def check_vertical(references: Mapping[str, Vertical | None]) -> None:
    """Raise or warn where the height layers of one scene are not above the same.

    Parameters
    ----------
    references
        Of the height layers, by name; None: the layer does not say.

    Raises
    ------
    ValueError
        Some are above an ellipsoid and some above a geoid, or heights are not in metres.
    """
    known = {name: said for name, said in references.items() if said is not None}
    for name, said in known.items():
        if said.metres != 1:
            raise ValueError(
                f"layer {name!r} has heights in units of {said.metres:.6g} m ({said.name}), wanted "
                "metres: pass vertical_crs= one in metres, and they are converted"
            )
    by_kind = {kind: [n for n, v in known.items() if v.kind == kind]
               for kind in ("ellipsoid", "geoid")}  # fmt: skip
    if by_kind["ellipsoid"] and by_kind["geoid"]:
        raise ValueError(
            "heights above an ellipsoid and above a geoid in one scene: "
            + ", ".join(f"{n!r} is above {v.name!r}" for n, v in known.items())
            + "; pass vertical_crs= (for example 'ellipsoid' or 'EPSG:5773') to convert them, or "
            "heights={name: reference} where a file says it wrong"
        )
    geoids = {n: v for n in by_kind["geoid"] if (v := known[n]).crs is not None}
    if len({v.crs.name for v in geoids.values() if v.crs is not None}) > 1:
        warnings.warn(
            "heights above different geoids in one scene: "
            + ", ".join(f"{n!r} is above {v.name!r}" for n, v in geoids.items())
            + "; they may differ by decimetres to metres: pass vertical_crs= to convert them",
            UserWarning, stacklevel=3,
        )  # fmt: skip
    if known and len(known) < len(references):
        silent = sorted(set(references) - set(known))
        warnings.warn(
            f"the layers {silent} do not say what their heights are above, others do ("
            + ", ".join(f"{n!r}: {v.name!r}" for n, v in known.items())
            + "): they are taken to be the same; if you know, pass heights={name: reference}",
            UserWarning, stacklevel=3,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _operation(source: str, target: str, area: tuple[float, ...], name: str) -> tuple[str, str]:
    """Return PROJ's best operation, as a pipeline and in words; grids it needs are there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is missing is said below
        group = TransformerGroup(
            source, target, always_xy=True, allow_ballpark=False,
            area_of_interest=AreaOfInterest(*area),
        )  # fmt: skip
    missing = sorted({
        f"{grid.short_name} ({grid.url})" if grid.url else grid.short_name
        for operation in group.unavailable_operations
        for grid in operation.grids if not grid.available
    })  # fmt: skip
    asked = f"heights of layer {name!r} from {pyproj.CRS(source).name} to {pyproj.CRS(target).name}"
    if not group.transformers:
        raise ValueError(
            f"{asked}: "
            + (
                f"the geoid grids {missing} are not there, and without one nothing would be "
                "shifted; fetch one with `projsync --file NAME` or pyproj sync, or put it into "
                "one of the folders of pyproj.datadir.get_data_dir(), on every worker"
                if missing
                else "PROJ knows no such transformation here: check both references"
            )
        )
    best = group.transformers[0]
    if not group.best_available:
        warnings.warn(
            f"{asked}: the best operation needs {missing}, which are not there; used is "
            f"{best.description} (accuracy {best.accuracy} m)",
            UserWarning, stacklevel=4,
        )  # fmt: skip
    return str(best.definition), f"{best.description} (PROJ {pyproj.proj_version_str})"


def convert_heights(
    array: xr.DataArray, *, transform: Affine, source: pyproj.CRS, target: pyproj.CRS
) -> xr.DataArray:
    """Return heights above another reference, lazy.

    Parameters
    ----------
    array
        Dims (y, x), Dask-backed float32 heights on a grid of `target`'s horizontal CRS; NaN stays.
    transform
        The grid's geotransform.
    source
        The compound or 3-D CRS that the heights are in.
    target
        The one that they should be in.

    Returns
    -------
    DataArray
        float32, metres. `attrs` say the reference and the operation. The operation is PROJ's best
        for the scene's extent, one for the whole scene, worked out at every 16th pixel and
        interpolated between (to a millimetre wherever the geoid's grid is a kilometre or wider).

    Raises
    ------
    ValueError
        The operation's geoid grid is missing, or does not cover the scene: nothing is ever
        shifted by zero instead. Where it ends within the scene, computing raises.
    """
    name = str(array.name)
    flat = horizontal(target)
    height, width = array.shape
    x, y = _places(transform, *np.meshgrid(np.linspace(0, width, 5), np.linspace(0, height, 5)))
    area = pyproj.Transformer.from_crs(flat, 4326, always_xy=True).transform_bounds(
        x.min(), y.min(), x.max(), y.max()
    )
    pipeline, words = _operation(source.to_wkt(), target.to_wkt(), area, name)
    way = None if horizontal(source) == flat else (flat.to_wkt(), horizontal(source).to_wkt())
    if not np.isfinite(_shift(x, y, pipeline, way)[0]).any():
        raise ValueError(_uncovered(name, words))
    data = map_regions(
        _converted,
        [array.data],
        chunks=array.data.chunks,
        region=lambda out: out,
        dtype=np.float32,
        name=f"heights-{name}",
        common={"transform": transform, "pipeline": pipeline, "way": way,
                "uncovered": _uncovered(name, words)},
    )  # fmt: skip
    reference = _of_crs(target)
    assert reference is not None  # it has a vertical part
    out = array.copy(data=data)
    out.attrs |= {"vertical_reference": reference.name, "vertical_operation": words}
    return out


def _places(transform: Affine, column: Floats, row: Floats) -> tuple[Floats, Floats]:
    a, b, c, d, e, f = transform[:6]
    return a * column + b * row + c, d * column + e * row + f


def _uncovered(name: str, words: str) -> str:
    return (
        f"layer {name!r}: its heights cannot be converted ({words}): the geoid's grid does not "
        "cover it, or is not on this worker; use a geoid that does, or crop the scene with bounds="
    )


@lru_cache(maxsize=64)
def _transformer(pipeline: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_pipeline(pipeline)


@lru_cache(maxsize=64)
def _flat_transformer(source: str, target: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(source, target, always_xy=True)


def _shift(
    x: Floats, y: Floats, pipeline: str, way: tuple[str, str] | None
) -> tuple[Floats, Floats]:
    """Return a and b of the new height, a + b z, at places on the target's grid; inf: no grid.

    It is linear in the height: b is 1 but for units, and for a few parts in a million between
    datums of different scale.
    """
    if way is not None:
        x, y = _flat_transformer(*way).transform(x, y)
    low, high = (
        np.asarray(_transformer(pipeline).transform(x, y, np.full(x.shape, z))[2])
        for z in (0.0, 1000.0)
    )
    with np.errstate(invalid="ignore"):  # inf - inf where there is no grid
        return low, (high - low) / 1000


def _converted(
    arrays: list[NDArray[Any]],
    *,
    out: Box,
    region: Box,
    transform: Affine,
    pipeline: str,
    way: tuple[str, str] | None,
    uncovered: str,
) -> NDArray[np.float32]:
    # The lattice's nodes are pixel centres of the scene, whichever chunk asks.
    rows, cols = (np.arange(start, stop) for start, stop in ((out.y0, out.y1), (out.x0, out.x1)))
    i, j = rows // _LATTICE_PX, cols // _LATTICE_PX
    node_y, node_x = (np.arange(k[0], k[-1] + 2, dtype=float) * _LATTICE_PX + 0.5 for k in (i, j))
    nodes = _shift(*_places(transform, *np.meshgrid(node_x, node_y)), pipeline, way)
    v, u = (rows % _LATTICE_PX / _LATTICE_PX)[:, None], cols % _LATTICE_PX / _LATTICE_PX
    i, j = i - i[0], j - j[0]
    with np.errstate(invalid="ignore"):  # 0 times inf, beside a node beyond the geoid's edge
        by_row = [(1 - v) * n[i] + v * n[i + 1] for n in nodes]
        a, b = ((1 - u) * n[:, j] + u * n[:, j + 1] for n in by_row)
        result = a + b * arrays[0]
    # A node beyond the geoid's edge is no reason to lose the pixels before it.
    at = np.isfinite(arrays[0]) & ~np.isfinite(result)
    if at.any():
        y, x = np.nonzero(at)
        places = _places(transform, x + out.x0 + 0.5, y + out.y0 + 0.5)
        a, b = _shift(*places, pipeline, way)
        result[at] = a + b * arrays[0][at]
        if not np.isfinite(result[at]).all():
            raise ValueError(uncovered)
    return np.where(np.isfinite(arrays[0]), result, np.nan).astype(np.float32)

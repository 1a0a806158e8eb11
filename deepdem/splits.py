"""Which part of which scene is for training, which for validation, which for the test.

A split is a small object that says it for a list of scenes. Between parts of different use lies a
guard band of one chip, so that no pixel of one was ever seen by the other, not even at the edge of
a chip.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import rasterio.features
import shapely
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.geo.geom import Geometry
from rasterio import Affine
from shapely.geometry.base import BaseGeometry

from deepdem.blocks import Box

__all__ = ["ByScene", "Part", "Parts", "Polygons", "Split", "Stripes", "split_of", "split_scene"]

Use: TypeAlias = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Part:
    """A part of a scene: a box, or what of it lies inside a polygon.

    Attributes
    ----------
    box
        Chips lie wholly in it.
    shape
        In pixels of the scene, (0, 0) the outer corner of the first one. Pixels whose centre is
        not inside do not count: they have no truth. None: all of the box counts.
    """

    box: Box
    shape: BaseGeometry | None = None

    def inside(self, box: Box) -> NDArray[np.bool_] | None:
        """Return which pixels of `box` count, shape ``box.shape``; None: all of them."""
        if self.shape is None:
            return None
        there = shapely.box(box.x0, box.y0, box.x1, box.y1)
        part = shapely.intersection(self.shape, there)
        if shapely.equals(part, there):
            return None
        areas = _areas(part)
        if not areas:
            return np.zeros(box.shape, dtype=bool)
        burnt: NDArray[np.bool_] = rasterio.features.geometry_mask(
            areas, box.shape, Affine.translation(box.x0, box.y0), invert=True
        )
        return burnt


#: The parts of one scene by their use.
Parts: TypeAlias = "dict[Use, list[Part]]"


class Split(Protocol):
    """Says which part of each scene is for what."""

    def parts(self, scenes: Mapping[str, GeoBox], guard_px: int) -> list[Parts]:
        """Return the parts of each scene; those of different use are `guard_px` apart.

        Parameters
        ----------
        scenes
            The scenes' grids by their names, in order.
        guard_px
            The width of the band between parts of different use.
        """
        ...


_SHARE = re.compile(r"(left|right|top|bottom)\s+(\d+(?:\.\d+)?)\s*%")


def split_scene(shape: tuple[int, int], split: str, guard_px: int) -> tuple[Box, Box]:
    """Return the training and the validation region of a scene, `guard_px` apart.

    Parameters
    ----------
    shape
        Of the scene (y, x).
    split
        ``"left 80 %"`` (or ``right``, ``top``, ``bottom``): the side and the share that is trained
        on; the other side, less the guard band, is for validation.
    guard_px
        The width of the band between them that belongs to neither.

    Raises
    ------
    ValueError
        `split` is not understood.

    Examples
    --------
    >>> split_scene((100, 200), "left 60 %", 20)
    (Box(y0=0, y1=100, x0=0, x1=120), Box(y0=0, y1=100, x0=140, x1=200))
    """
    match = _SHARE.fullmatch(split.strip())
    if match is None or not 0 < float(match[2]) < 100:
        raise ValueError(
            f"split={split!r} is not understood: pass for example 'left 80 %', or one of "
            "deepdem.Stripes, deepdem.ByScene and deepdem.Polygons"
        )
    height, width = shape
    side, share = match[1], float(match[2]) / 100
    along = width if side in ("left", "right") else height
    edge = round(along * share)
    if side in ("left", "top"):
        train, val = (0, edge), (min(edge + guard_px, along), along)
    else:
        train, val = (along - edge, along), (0, max(along - edge - guard_px, 0))
    if side in ("left", "right"):
        return Box(0, height, *train), Box(0, height, *val)
    return Box(*train, 0, width), Box(*val, 0, width)


@dataclass(frozen=True)
class _Share:
    """One side of each scene is trained on, the rest is for validation."""

    text: str

    def parts(self, scenes: Mapping[str, GeoBox], guard_px: int) -> list[Parts]:
        out: list[Parts] = []
        for grid in scenes.values():
            train, val = split_scene(_shape(grid), self.text, guard_px)
            out.append({"train": [Part(train)], "val": [Part(val)]})
        return out


def split_of(split: str | Split) -> Split:
    """Return the split that a string says, or the one that is given.

    Raises
    ------
    ValueError
        The string is not understood; see `split_scene`.
    """
    if not isinstance(split, str):
        return split
    split_scene((1, 1), split, 0)  # a wrong one is told now, not when training starts
    return _Share(split)


def _shape(grid: GeoBox) -> tuple[int, int]:
    return int(grid.shape.y), int(grid.shape.x)


@dataclass(frozen=True)
class Stripes:
    """Each scene cut into stripes: one for validation, the next for the test, the rest to train.

    With ``fold`` from 0 to ``count - 1`` each stripe is validated on once and tested on once (the
    stripe after the last one is the first). The guard band is taken from the training stripes,
    and between the two others from the test's.

    Attributes
    ----------
    axis
        ``"x"``: vertical stripes, side by side; ``"y"``: horizontal ones.
    fold
        Which stripe is for validation, from 0.
    count
        How many stripes.

    Examples
    --------
    >>> data = deepdem.ChipDataModule([ds], chip_size=128, split=deepdem.Stripes("x", fold=2))
    """

    axis: str = "x"
    fold: int = 0
    count: int = 5

    def __post_init__(self) -> None:
        if self.axis not in ("x", "y"):
            raise ValueError(f"axis={self.axis!r}: wanted 'x' or 'y'")
        if self.count < 3:
            raise ValueError(
                f"count={self.count}: wanted 3 stripes or more, to train, validate and test"
            )
        if not 0 <= self.fold < self.count:
            raise ValueError(
                f"fold={self.fold}: wanted 0 to {self.count - 1}, one for each of the "
                f"{self.count} stripes"
            )

    def parts(self, scenes: Mapping[str, GeoBox], guard_px: int) -> list[Parts]:
        """Return the parts of each scene; see `Split`."""
        return [self._cut(_shape(grid), guard_px) for grid in scenes.values()]

    def _cut(self, shape: tuple[int, int], guard: int) -> Parts:
        length = shape[1] if self.axis == "x" else shape[0]
        edges = [round(length * i / self.count) for i in range(self.count + 1)]
        uses: list[Use] = ["train"] * self.count
        uses[self.fold], uses[(self.fold + 1) % self.count] = "val", "test"
        parts: Parts = {"train": [], "val": [], "test": []}
        rank = {"val": 0, "test": 1, "train": 2}  # who gives way: the one with the larger number
        begin = 0
        for i in range(1, self.count + 1):
            if i < self.count and uses[i] == uses[begin]:
                continue
            use = uses[begin]
            lo, hi = edges[begin], edges[i]
            if begin > 0 and rank[use] > rank[uses[begin - 1]]:
                lo += guard
            if i < self.count and rank[use] > rank[uses[i]]:
                hi -= guard
            hi = max(lo, hi)
            box = Box(0, shape[0], lo, hi) if self.axis == "x" else Box(lo, hi, 0, shape[1])
            parts[use].append(Part(box))
            begin = i
        return parts


@dataclass(frozen=True)
class ByScene:
    """Whole scenes for validation and for the test; the others are trained on.

    Scenes of one place must have the same use: nothing here looks at whether they overlap.

    Attributes
    ----------
    val, test
        Names of scenes (of a tree's nodes, or ``attrs["name"]`` or ``attrs["title"]``), or their
        places in the list, from 0.

    Examples
    --------
    >>> split = deepdem.ByScene(val=["baker_2017"], test=["rainier_2019"])
    """

    val: Sequence[str | int]
    test: Sequence[str | int] = ()

    def parts(self, scenes: Mapping[str, GeoBox], guard_px: int) -> list[Parts]:
        """Return the parts of each scene; see `Split`."""
        names = list(scenes)
        uses: list[Use] = ["train"] * len(names)
        wanted: tuple[tuple[Use, Sequence[str | int]], ...] = ("val", self.val), ("test", self.test)
        for use, which in wanted:
            for scene in which:
                index = _index(scene, names)
                if uses[index] not in ("train", use):
                    raise ValueError(f"scene {scene!r} is for validation and for the test as well")
                uses[index] = use
        return [
            {use: [Part(Box(0, grid.shape.y, 0, grid.shape.x))]}
            for use, grid in zip(uses, scenes.values(), strict=True)
        ]


def _index(scene: str | int, names: list[str]) -> int:
    if isinstance(scene, int) and 0 <= scene < len(names):
        return scene
    if scene not in names:
        raise ValueError(f"there is no scene {scene!r}: pass 0 to {len(names) - 1}, or of {names}")
    return names.index(str(scene))


#: GeoJSON as a mapping, an object that gives it (shapely, geopandas, odc-geo), or a file of it.
GeoSource: TypeAlias = "Mapping[str, Any] | str | PathLike[str] | Any"


@dataclass(frozen=True)
class Polygons:
    """Polygons for validation and for the test; what is more than a chip away is trained on.

    The polygons are burnt into pixels where chips are read, never as a whole raster. In a chip at
    the edge of a polygon the pixels outside have no truth.

    Attributes
    ----------
    val, test
        Polygons: GeoJSON as a mapping or a file, or an object with ``__geo_interface__``.
    train
        Where to train; None: everywhere else.
    crs
        The polygons' CRS. None: that of an object that knows its own, or of the scene;
        a GeoJSON file or mapping is in EPSG:4326 by its standard (RFC 7946), so say so.

    Examples
    --------
    >>> split = deepdem.Polygons(val="held_out.geojson", crs="EPSG:4326")
    """

    val: GeoSource
    test: GeoSource = None
    train: GeoSource = None
    crs: Any = None

    def parts(self, scenes: Mapping[str, GeoBox], guard_px: int) -> list[Parts]:
        """Return the parts of each scene; see `Split`."""
        return [self._cut(grid, guard_px) for grid in scenes.values()]

    def _cut(self, grid: GeoBox, guard: int) -> Parts:
        height, width = _shape(grid)
        scene = shapely.box(0, 0, width, height)
        val, test, train = (
            shapely.intersection(_in_pixels(source, self.crs, grid), scene)
            for source in (self.val, self.test, self.train)
        )
        # A disc that holds the square of a guard's half-width, and a pixel for those cut in two.
        reach = guard * np.sqrt(2) + 1
        test = shapely.difference(test, shapely.buffer(val, reach))
        free = scene if self.train is None else train
        free = shapely.difference(free, shapely.buffer(shapely.union(val, test), reach))
        whole = Box(0, height, 0, width)
        return {
            "train": [Part(whole, free)] if not free.is_empty else [],
            "val": [Part(_around(g, guard, whole), g) for g in _areas(val)],
            "test": [Part(_around(g, guard, whole), g) for g in _areas(test)],
        }


def _areas(shape: BaseGeometry) -> list[BaseGeometry]:
    return [g for g in shapely.get_parts(shape) if g.geom_type == "Polygon" and g.area > 0]


def _around(shape: BaseGeometry, least_px: int, whole: Box) -> Box:
    """Return the smallest box of pixels round a polygon, but a chip wide where there is room."""

    def side(lo: float, hi: float, begin: int, end: int) -> tuple[int, int]:
        first, last = int(np.floor(lo)), int(np.ceil(hi))
        missing = max(least_px - (last - first), 0)
        first = max(first - missing // 2, begin)
        last = min(max(last, first + least_px), end)
        return max(min(first, last - least_px), begin), last

    x0, y0, x1, y1 = shape.bounds
    return Box(*side(y0, y1, whole.y0, whole.y1), *side(x0, x1, whole.x0, whole.x1))


def _in_pixels(source: GeoSource, crs: Any, grid: GeoBox) -> BaseGeometry:
    """Return the union of the polygons in the pixels of a grid."""
    if source is None:
        return shapely.Polygon()
    own = getattr(source, "crs", None)
    if isinstance(source, str | PathLike):
        source = json.loads(Path(source).read_text(encoding="utf-8"))
    mapping = source if isinstance(source, Mapping) else getattr(source, "__geo_interface__", None)
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"polygons as {type(source).__name__} are not understood: pass GeoJSON as a mapping "
            "or a file, or an object with __geo_interface__"
        )
    if crs is None:
        crs = grid.crs if own is None else own
    pixels = [
        grid.project(Geometry(shapely.geometry.mapping(shape), crs)).geom
        for shape in _shapes(mapping)
    ]
    return shapely.union_all([shapely.make_valid(p) for p in pixels])


def _shapes(mapping: Mapping[str, Any]) -> list[BaseGeometry]:
    kind = mapping.get("type")
    if kind == "FeatureCollection":
        return [shape for feature in mapping["features"] for shape in _shapes(feature)]
    if kind == "Feature":
        return _shapes(mapping["geometry"])
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(
            f"a geometry of type {kind!r}: wanted Polygon or MultiPolygon, or a Feature or "
            "FeatureCollection of them"
        )
    return [shapely.geometry.shape(mapping)]

from __future__ import annotations

import json

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.geom import Geometry

import deepdem
from deepdem.blocks import Box
from deepdem.splits import Part, Polygons, Stripes, split_of, split_scene

GRID = GeoBox.from_bbox((500_000, 5_000_000, 500_300, 5_000_200), "EPSG:32631", resolution=1)


def _covered(parts, shape, size):
    """Return the pixels that chips of parts may touch and that count."""
    seen = np.zeros(shape, bool)
    for part in parts:
        if min(part.box.shape) >= size:
            inside = part.inside(part.box)
            seen[part.box.within(Box(0, shape[0], 0, shape[1]))] |= (
                True if inside is None else inside
            )
    return seen


@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.sampled_from(["left", "right", "top", "bottom"]),
    st.integers(1, 99), st.integers(0, 100),
)  # fmt: skip
def test_split_regions_are_a_guard_apart(shape, side, share, guard):
    train, val = split_scene(shape, f"{side} {share} %", guard)
    whole = Box(0, shape[0], 0, shape[1])
    for box in (train, val):
        assert box.intersect(whole) == box
    if not val.empty and not train.empty:
        gap = max(val.x0 - train.x1, train.x0 - val.x1, val.y0 - train.y1, train.y0 - val.y1)
        assert gap == guard


@pytest.mark.parametrize("split", ["middle 50 %", "left", "left 0 %", "left 100 %", "0.8"])
def test_a_split_that_is_none(split):
    with pytest.raises(ValueError, match="pass for example 'left 80 %'"):
        split_of(split)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_stripes_validate_and_test_each_place_once(axis):
    shape, guard = (200, 300), 16
    length = shape[1] if axis == "x" else shape[0]
    counts = {"val": np.zeros(length, int), "test": np.zeros(length, int)}
    for fold in range(5):
        (parts,) = Stripes(axis, fold).parts({"a": GRID}, guard)
        along = {}
        for use, some in parts.items():
            spans = [(p.box.x0, p.box.x1) if axis == "x" else (p.box.y0, p.box.y1) for p in some]
            along[use] = np.zeros(length, bool)
            for lo, hi in spans:
                along[use][lo:hi] = True
                if use != "train":
                    counts[use][lo:hi] += 1
        # Between pixels of different use there are at least as many as a guard.
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            a, b = np.flatnonzero(along[one]), np.flatnonzero(along[other])
            assert np.abs(a[:, None] - b).min() > guard
        assert along["val"].sum() == length // 5
        assert along["train"].sum() >= length * 3 // 5 - 4 * guard
    assert (counts["val"] == 1).all()
    assert (counts["test"] >= 0).all()
    assert (counts["test"] == 0).sum() == 4 * guard  # what it gives to the guard band


def test_scenes_and_their_names():
    split = deepdem.ByScene(val=["b"], test=[2])
    parts = split.parts({"a": GRID, "b": GRID, "c": GRID, "d": GRID}, 16)
    assert [list(p) for p in parts] == [["train"], ["val"], ["test"], ["train"]]
    assert parts[1]["val"][0].box == Box(0, 200, 0, 300)
    with pytest.raises(ValueError, match="no scene 'x': pass 0 to 0, or of \\['a'\\]"):
        deepdem.ByScene(val=["x"]).parts({"a": GRID}, 16)
    with pytest.raises(ValueError, match="for validation and for the test as well"):
        deepdem.ByScene(val=["a"], test=[0]).parts({"a": GRID}, 16)


def test_polygons_are_a_guard_away_from_training(tmp_path):
    """No chip with a training pixel holds one of a validation or test polygon."""
    guard = 24
    triangle = shapely.Polygon([(500_100, 5_000_150), (500_180, 5_000_150), (500_140, 5_000_090)])
    square = shapely.box(500_240, 5_000_020, 500_290, 5_000_070)
    split = Polygons(val=triangle, test=shapely.geometry.mapping(square))
    (parts,) = split.parts({"a": GRID}, guard)
    seen = {use: _covered(some, (200, 300), guard) for use, some in parts.items()}
    # Pixel centres: the first row is the northernmost.
    assert seen["val"].sum() == pytest.approx(triangle.area, rel=0.03)
    assert seen["test"].sum() == square.area
    assert seen["test"][130:180, 240:290].all()
    a = np.argwhere(seen["train"])
    for use in ("val", "test"):
        for y, x in np.argwhere(seen[use])[::7]:
            assert np.abs(a - (y, x)).max(axis=1).min() >= guard
    assert seen["train"][:60, :60].all()
    # The same from a file in degrees.
    feature = {
        "type": "Feature", "properties": {},
        "geometry": Geometry(shapely.geometry.mapping(square), "EPSG:32631").to_crs(4326).json,
    }  # fmt: skip
    path = tmp_path / "held.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    (again,) = Polygons(val=str(path), crs="EPSG:4326").parts({"a": GRID}, guard)
    assert again["val"][0].shape.area == pytest.approx(square.area, rel=1e-3)
    # Where to train may be said as well.
    (some,) = Polygons(val=square, train=triangle).parts({"a": GRID}, guard)
    trained = _covered(some["train"], (200, 300), guard).sum()
    assert trained == pytest.approx(triangle.area, rel=0.03)


def test_a_polygon_smaller_than_a_chip_has_one(scene):
    (parts,) = Polygons(val=shapely.box(500_000, 5_000_195, 500_004, 5_000_200)).parts(
        {"a": GRID}, 32
    )
    (part,) = parts["val"]
    assert part.box == Box(0, 32, 0, 32)
    assert part.inside(part.box).sum() == 20
    assert part.inside(Box(100, 110, 100, 110)).sum() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Stripes("z"), "axis='z'"),
        (lambda: Stripes(count=2), "3 stripes or more"),
        (lambda: Stripes(fold=5), "wanted 0 to 4"),
        (lambda: Polygons(val=3).parts({"a": GRID}, 8), "pass GeoJSON"),
        (
            lambda: Polygons(val={"type": "Point", "coordinates": [0, 0]}).parts({"a": GRID}, 8),
            "type 'Point'",
        ),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.filterwarnings("error")
def test_a_box_off_the_polygon_has_nothing_inside():
    part = Part(Box(0, 90, 0, 90), shapely.box(0, 50, 90, 90))
    assert not part.inside(Box(0, 40, 0, 40)).any()
    assert part.inside(Box(60, 80, 0, 40)) is None

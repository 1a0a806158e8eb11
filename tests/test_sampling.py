from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdem.blocks import Box
from deepdem.regions import Region, SceneReader
from deepdem.sampling import WEIGHTS, Places, Plan, Stream, fixed_chips, tiling
from deepdem.splits import Part

NAMES = ("dsm", "lidar_dsm")
PLAN = Plan(size=32, min_valid=0.5, seed=0, tile_px=64, open_tiles=3)


def _region(ds, box=None, *, held=False, scene=0):
    whole = Box(0, ds.sizes["y"], 0, ds.sizes["x"])
    region = Region(SceneReader(ds, NAMES), Part(box or whole), ["dsm"], "lidar_dsm", scene=scene)
    if held:
        region.hold(shared=False)
    return region


def _chips(regions, plan, n, *, epoch=0, number=0):
    stream = Stream(regions, plan, epoch=epoch, number=number)
    return [(opened.region.scene, chip) for opened, chip in stream.take(n)]


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)), st.integers(1, 40), st.integers(1, 90),
    st.booleans(),
)  # fmt: skip
def test_tiles_hold_each_place_once(shape, size, tile, jitter):
    box = Box(7, 7 + shape[0], 11, 11 + shape[1])
    places = Places(box, size, max(1, size // 2), tile)
    if min(shape) < size:
        assert places.count == places.tiles == 0
        return
    found, seen = [], np.zeros(shape, int)
    for k in range(places.tiles):
        tile_ = places.tile(k, jitter=jitter)
        assert tile_.box.intersect(box) == tile_.box
        found += list(zip(tile_.y.tolist(), tile_.x.tolist(), strict=True))
        assert (tile_.y_end > tile_.y).all()
        assert (tile_.x_end > tile_.x).all()
        assert tile_.y_end.max() - 1 + size == tile_.box.y1
        assert tile_.x.min() == tile_.box.x0
        seen[places.core(k).within(box)] += 1
    assert len(found) == len(set(found)) == places.count
    assert (seen == 1).all()


def test_an_epoch_has_each_place_once_and_anew(scene):
    region = _region(scene, held=True)
    plan = replace(PLAN, open_tiles=64)
    places = plan.places(region)
    chips = _chips([region], plan, places.count)
    assert len(set(chips)) == len(chips)
    steps = {(c.y0 // 16, c.x0 // 16) for _, c in chips}
    assert len(steps) == 17 * 15  # those at the far edges share theirs
    assert places.count == 18 * 16
    later = _chips([region], plan, places.count, epoch=1)
    assert chips == _chips([region], plan, places.count)
    assert set(later).isdisjoint(chips) or len(set(later) & set(chips)) < 0.1 * len(chips)
    offsets = np.array([(c.y0 % 16, c.x0 % 16) for _, c in chips])
    assert len(np.unique(offsets[:, 0])) == 16  # moved at random, not on a grid
    # More than there are: another round, elsewhere.
    assert len(set(_chips([region], plan, 2 * places.count))) > 1.8 * places.count


def test_held_or_read_the_same_chips_are_worth_having(scene):
    holes = scene.copy(deep=True)
    holes.lidar_dsm[:, 100:] = np.nan
    for held in (True, False):
        chips = _chips([_region(holes, held=held)], PLAN, 40)
        shares = [np.isfinite(holes.lidar_dsm.values[c.y0 : c.y1, c.x0 : c.x1]).mean()
                  for _, c in chips]  # fmt: skip
        assert min(shares) >= 0.5
        assert min(shares) < 0.8
    with pytest.raises(ValueError, match=r"no place of 32 px .* 60% of its pixels"):
        _chips([_region(holes, Box(0, 300, 120, 260))], replace(PLAN, min_valid=0.6), 1)


def test_what_has_no_chip_is_read_once(scene):
    asked = []

    class Spy(SceneReader):
        def read(self, names, box):
            asked.append(box)
            return super().read(names, box)

    holes = scene.copy(deep=True)
    holes.lidar_dsm[:, 80:] = np.nan  # where chips still begin, but are not half valid
    holes.lidar_dsm[200:] = np.nan
    # Of this part no pixel counts: it has no need to be read at all.
    part = Part(Box(0, 300, 0, 260), shapely.box(0, 150, 260, 300))
    for plan in (PLAN, replace(PLAN, min_valid=0.0), replace(PLAN, weight=WEIGHTS["error"])):
        region, fresh = (Region(Spy(holes, NAMES), part, ["dsm"], "lidar_dsm") for _ in range(2))
        region.watch(plan.size, shared=False)
        n, reads = plan.places(region).count, []
        for epoch in range(3):
            wanted = _chips([fresh], plan, n, epoch=epoch)
            asked.clear()
            # Whatever has been seen, the same chips come.
            assert _chips([region], plan, n, epoch=epoch) == wanted
            reads.append(set(asked))
        assert all(box.y1 > 150 for box in reads[0])
        hopeless = {b for b in reads[0] if not _usable(holes, b)}
        assert len(hopeless) >= 5
        for later in reads[1:]:
            assert later < reads[0]
            assert not later & hopeless
        assert fixed_chips([region], plan, None) == fixed_chips([fresh], plan, None)


def _usable(ds, box):
    return np.isfinite(ds.lidar_dsm.values[box.y0 : box.y1, box.x0 : box.x1]).any()


def test_streams_share_the_tiles_out(scene):
    plan, region = replace(PLAN, streams=4), _region(scene)
    per_stream = [
        {(c.y0 // 64, c.x0 // 64) for _, c in _chips([region], plan, 40, number=n)}
        for n in range(4)
    ]
    assert all(len(tiles) >= 3 for tiles in per_stream)
    every = [tile for tiles in per_stream for tile in tiles]
    assert len(every) == len(set(every))
    # No more of them are open at once than was said.
    stream = Stream([region], plan, epoch=0, number=0)
    for _ in range(10):
        opened = {id(o) for o, _ in stream.take(4)}
        assert len(opened) <= plan.open_tiles
        assert sum(map(len, stream._open)) <= plan.open_tiles


def test_scenes_count_by_area_or_evenly(scene):
    small = scene.isel(y=slice(0, 100), x=slice(0, 90))
    for held in (True, False):
        regions = [_region(scene, held=held), _region(small, scene=1, held=held)]
        places = [PLAN.places(r).count for r in regions]
        seen = [s for s, _ in _chips(regions, replace(PLAN, open_tiles=64), sum(places))]
        assert seen.count(1) == pytest.approx(places[1], abs=2)
        seen = [s for s, _ in _chips(regions, replace(PLAN, evenly=True), 100)]
        assert seen.count(1) == 50


def test_weights_draw_places_in_proportion(scene):
    sloped = scene.copy(deep=True)
    error = np.where(np.arange(260) < 130, 1.0, 3.0).astype(np.float32)
    sloped["dsm"] = sloped.lidar_dsm.fillna(0) + error
    sloped["lidar_dsm"] = sloped.lidar_dsm.fillna(0)
    plan = replace(PLAN, weight=WEIGHTS["error"], open_tiles=64)
    region = _region(sloped, held=True)
    chips = [c for e in range(4) for _, c in _chips([region], plan, 250, epoch=e)]
    left = sum(c.x1 <= 130 for c in chips) / 98  # a column of places is 16 wide
    right = sum(c.x0 >= 130 for c in chips) / (260 - 130 - 32)
    assert right / left == pytest.approx(3, rel=0.15)
    assert len(set(chips)) > 0.95 * len(chips)  # a place that comes twice is moved anew
    flat = np.zeros((8, 8), np.float32)
    assert WEIGHTS["terrain"](flat, flat) == 0
    assert WEIGHTS["terrain"](flat, np.arange(8, dtype=np.float32) + flat) == 1
    assert WEIGHTS["terrain"](flat, np.full((8, 8), np.nan, np.float32)) == 0


def test_chips_that_stand_still(scene):
    regions = [_region(scene), _region(scene.isel(x=slice(0, 100)), scene=1)]
    chips = fixed_chips(regions, PLAN, None)
    assert chips == fixed_chips(regions, replace(PLAN, seed=5), None)
    assert {c.region for c in chips} == {0, 1}
    assert len({(c.region, c.box) for c in chips}) == len(chips)
    assert all(c.box.intersect(c.tile) == c.box for c in chips)
    usable = np.isfinite(scene.dsm + scene.lidar_dsm).values
    assert len([c for c in chips if c.region == 0]) == sum(
        usable[y : y + 32, x : x + 32].mean() >= 0.5
        for y in [*range(0, 300 - 32, 32), 300 - 32]
        for x in [*range(0, 260 - 32, 32), 260 - 32]
    )
    few = fixed_chips(regions, PLAN, 10)
    assert len(few) == 10
    assert set(few) < set(chips)
    assert few == fixed_chips(regions, PLAN, 10)
    assert few != fixed_chips(regions, replace(PLAN, seed=1), 10)


def test_tiles_keep_to_the_limit():
    common = {"size": 256, "planes": 7, "streams": 4, "groups": 1}
    for limit in (470_000_000, 250_000_000, 118_000_000):
        wide, open_tiles = tiling(10**10, limit=limit, **common)
        assert (wide + 256) ** 2 * 7 * 4 * 4 * open_tiles <= limit
        assert wide % 256 == 0
        assert (wide, open_tiles) == tiling(10**10, limit=round(0.99 * limit), **common)
    assert (wide, open_tiles) == (256, 2)
    assert tiling(10**10, limit=500_000_000, **common) == (768, 4)
    assert tiling(10**10, limit=10**12, **common) == (2048, 4)
    assert tiling(1500**2, limit=10**12, **common) == (512, 4)
    assert tiling(10**10, limit=1, **common) == (256, 2)
    assert tiling(10**10, limit=10**12, **{**common, "groups": 9}) == (2048, 9)

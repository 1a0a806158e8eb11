from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from deepdem.blocks import (
    Box,
    Unread,
    chunks_of,
    made_with,
    map_regions,
    read_again,
    unzipped,
)


def _halo(shape, halo):
    return lambda b: Box(
        max(b.y0 - halo, 0), min(b.y1 + halo, shape[0]), max(b.x0 - halo, 0),
        min(b.x1 + halo, shape[1]),
    )  # fmt: skip


def _sum(arrays, *, out, region, factor):
    # The fake asserts its own contract: every input has the region's shape.
    assert all(a.shape == region.shape for a in arrays)
    return sum(a[out.within(region)] for a in arrays) * factor + arrays[0].mean() * 0


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 40), st.integers(0, 25),
)  # fmt: skip
def test_any_chunking_gives_every_kernel_its_region(shape, one, two, out, halo):
    a = np.arange(shape[0] * shape[1], dtype=np.float64).reshape(shape)
    lazy = map_regions(
        _sum, [da.from_array(a, chunks=one), da.from_array(2 * a, chunks=two)],
        chunks=chunks_of(shape, out), region=_halo(shape, halo), dtype=float, name="sum",
        common={"factor": 3},
    )  # fmt: skip
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), 9 * a)


def test_names_are_a_function_of_the_inputs():
    a = da.from_array(np.zeros((20, 20)), chunks=10)

    def name(**change):
        options = {"region": _halo((20, 20), 2), "dtype": float, "name": "n",
                   "common": {"factor": 1}, "chunks": chunks_of((20, 20), 10)}  # fmt: skip
        return map_regions(_sum, [a], **{**options, **change}).name

    assert name() == name()
    assert name() != name(region=_halo((20, 20), 3))
    assert name() != name(common={"factor": 2})
    assert name() != name(chunks=chunks_of((20, 20), 5))


def test_no_neighbour_is_kept_whole():
    """A task refers to whole blocks only where it needs them whole."""
    a = da.from_array(np.zeros((300, 300)), chunks=100)
    lazy = map_regions(
        _sum, [a], chunks=chunks_of((300, 300), 100), region=_halo((300, 300), 5), dtype=float,
        name="n", common={"factor": 1},
    )  # fmt: skip
    graph = dict(lazy.dask)
    centre = graph[(lazy.name, 1, 1)]
    whole = [k for k in centre.dependencies if isinstance(k, tuple) and k[0] == a.name]
    assert whole == [(a.name, 1, 1)]
    assert sum(str(k).startswith("('cut-") for k in centre.dependencies) == 8


def test_common_stands_once_in_the_graph():
    big = np.zeros(100_000)
    a = da.zeros((1000, 1000), chunks=100)
    lazy = map_regions(
        lambda arrays, *, out, region, big: arrays[0], [a], chunks=chunks_of((1000, 1000), 100),
        region=_halo((1000, 1000), 0), dtype=float, name="n", common={"big": big},
    )  # fmt: skip
    import cloudpickle

    assert len(cloudpickle.dumps(dict(lazy.dask))) < 2 * big.nbytes


def test_planes_and_empty_regions():
    a = da.ones((10, 10), chunks=4)
    planes = map_regions(
        lambda arrays, *, out, region: np.stack([arrays[0], -arrays[0]]), [a],
        chunks=chunks_of((10, 10), 3), region=_halo((10, 10), 0), dtype=float, name="p", planes=2,
    )  # fmt: skip
    assert planes.shape == (2, 10, 10)
    np.testing.assert_array_equal(planes.compute()[1], -np.ones((10, 10)))
    empty = map_regions(
        lambda arrays, *, out, region: np.full(out.shape, arrays[0].size), [a],
        chunks=chunks_of((6, 6), 3), region=lambda b: Box(0, 0, 0, 0), dtype=float, name="e",
    )  # fmt: skip
    np.testing.assert_array_equal(empty.compute(), np.zeros((6, 6)))


def test_graph_of_a_huge_raster_is_small():
    n = 40_000
    a = da.zeros((n, n), chunks=2048, dtype=np.float32)
    lazy = map_regions(
        _sum, [a], chunks=chunks_of((n, n), 2048), region=_halo((n, n), 128), dtype=np.float32,
        name="n", common={"factor": 1},
    )  # fmt: skip
    import cloudpickle

    own = dict(lazy.dask.layers[lazy.name])
    assert len(own) <= 10 * len(list(np.ndindex(*lazy.numblocks)))
    assert len(cloudpickle.dumps(own)) / len(own) < 2000
    with dask.config.set(scheduler="sync"):
        assert lazy[:3, :3].compute().tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("box", [Box(0, 0, 3, 5), Box(4, 2, 0, 1)])
def test_empty_boxes(box):
    assert box.empty


def test_read_again_gives_the_same_by_tasks_of_its_own():
    """Also behind a slice, where dask.graph_manipulation.clone does not reach."""
    reads: list[int] = []

    def read(block):
        reads.append(1)
        return block

    source = da.from_array(np.arange(100.0).reshape(10, 10), chunks=5)
    array = source.map_blocks(read, meta=np.empty((0, 0)))[2:, 1:] + 1
    again = read_again(array, seed="x")
    assert again.name == read_again(array, seed="x").name != array.name
    reads.clear()
    (total,) = dask.compute((array - again).sum(), scheduler="sync")
    assert total == 0
    assert len(reads) == 8


def test_slivers_of_a_sliced_raster_survive_every_optimisation():
    """Dask fuses chains of tasks; a clone that keeps its old tasks breaks that."""
    from dask.array.optimization import optimize

    a = da.from_array(np.random.default_rng(0).random((60, 60)), chunks=20)[5:, 3:] * 2
    lazy = map_regions(
        _sum, [a, a + 1], chunks=chunks_of(a.shape, 15), region=_halo(a.shape, 4), dtype=float,
        name="n", common={"factor": 1}, reread=True,
    )  # fmt: skip
    graph = optimize(lazy.dask, lazy.__dask_keys__())
    import dask.array.core

    again = dask.array.core.Array(graph, lazy.name, lazy.chunks, dtype=float)
    np.testing.assert_allclose(again.compute(scheduler="sync"), (2 * a + 1).compute())
    np.testing.assert_allclose(lazy.compute(scheduler="threads"), (2 * a + 1).compute())


def test_memory_does_not_grow_with_the_width():
    """With reread, blocks in memory at once depend on the chunk, not on the raster."""
    import weakref

    def most(n: int) -> int:
        alive: set[int] = set()
        peak = [0]

        def make(block, block_id=None):
            out = np.ones(block.shape)
            alive.add(id(out))
            weakref.finalize(out, alive.discard, id(out))
            peak[0] = max(peak[0], len(alive))
            return out

        side = n * 32
        a = da.zeros((side, side), chunks=32).map_blocks(make, meta=np.empty((0, 0)))
        lazy = map_regions(
            _sum, [a], chunks=chunks_of((side, side), 32), region=_halo((side, side), 2),
            dtype=float, name="n", common={"factor": 1}, reread=True,
        )  # fmt: skip
        da.store(lazy, _Sink(), scheduler="sync", compute=True, lock=False)
        return peak[0]

    assert most(16) <= most(4) + 4


class _Sink:
    """A store that keeps nothing."""

    def __setitem__(self, where, value):
        pass


def test_what_is_stored_is_read_region_by_region(tmp_path):
    """One task a chunk reads just its region of a Zarr array; nothing else is in memory."""

    class Stored:
        """Stands for a file: tells what was asked of it."""

        def __init__(self):
            self.shape, self.dtype, self.ndim = (90, 90), np.dtype(float), 2
            self.asked = []

        def __getitem__(self, where):
            self.asked.append(where)
            return np.arange(8100.0).reshape(90, 90)[where]

    stored = Stored()
    options = {
        "chunks": chunks_of((90, 90), 30), "region": _halo((90, 90), 4), "dtype": float,
        "name": "n", "common": {"factor": 1}, "direct": True, "reread": True,
    }  # fmt: skip
    a = da.from_array(stored, chunks=30)
    lazy = map_regions(_sum, [a], **options)
    assert sum(str(key).startswith("('cut-") for key in lazy.dask) == 0
    stored.asked.clear()  # Dask asks for an empty piece to learn the type
    computed = lazy.compute(scheduler="sync")
    assert (slice(26, 64), slice(26, 64)) in stored.asked
    assert len(stored.asked) == 9
    np.testing.assert_array_equal(computed, stored[:, :])

    xr.Dataset({"v": (("y", "x"), stored[:, :])}).to_zarr(tmp_path / "a.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "a.zarr", chunks=None, consolidated=False).v.chunk(40)
    read = map_regions(_sum, [opened.data], **options)
    assert sum(str(key).startswith("('cut-") for key in read.dask) == 0
    np.testing.assert_array_equal(read.compute(), stored[:, :])
    # A slice of it, or what is computed of it, is not what is stored.
    for other in (opened[2:].data, (opened + 1).data, opened.data.T):
        shape = other.shape
        change = {"chunks": chunks_of(shape, 30), "region": _halo(shape, 4)}
        lazy = map_regions(_sum, [other], **{**options, **change})
        assert any(str(key).startswith("('cut-") for key in lazy.dask)
        np.testing.assert_array_equal(lazy.compute(), other.compute())


def test_a_kernel_may_slice_what_is_stored_and_give_two_things(tmp_path):
    """It is read when it is sliced, and both things are computed at once."""
    values = np.arange(60 * 50, dtype=np.float32).reshape(60, 50)
    xr.Dataset({"a": (("y", "x"), values)}).to_zarr(tmp_path / "a.zarr", consolidated=False)
    stored = xr.open_zarr(tmp_path / "a.zarr", chunks=None, consolidated=False).a.chunk(20).data
    calls = []

    def kernel(arrays, *, out, region):
        calls.append(out)
        assert [type(array) for array in arrays] == [Unread, np.ndarray]
        assert {array.shape for array in arrays} == {region.shape}
        np.testing.assert_array_equal(arrays[0][:, 3:], arrays[1][:, 3:])
        rows = [arrays[0][y : y + 7, 0 : region.shape[1]] for y in range(0, region.shape[0], 7)]
        block = np.concatenate(rows)[out.within(region)]
        return block[None], np.array([[block.sum()]])

    both = map_regions(
        kernel, [stored, da.from_array(values, chunks=30) + 0], chunks=chunks_of((60, 50), 25),
        region=_halo((60, 50), 4), dtype=np.float32, name="both", direct=True, sliced=True,
    )  # fmt: skip
    block, number = unzipped(both, planes=1, dtypes=(np.float32, np.float64))
    assert (block.shape, number.shape) == ((1, 60, 50), (3, 2))
    one, other = dask.compute(block, number, scheduler="sync")
    assert len(calls) == 6
    np.testing.assert_array_equal(one[0], values)
    assert other.sum() == values.sum()
    assert made_with(number, block * 2)
    assert not made_with(number, block.persist(scheduler="sync"))

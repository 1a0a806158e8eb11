from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
import rasterio
import rasterio.shutil
import rioxarray
import xarray as xr
import zarr
from conftest import fitted
from typer.testing import CliRunner

import deepdem
from deepdem.cli import app
from deepdem.cog import write_cog
from deepdem.refine import _input_hash
from deepdem.write import LOG, write_zarr

HERE = Path(__file__).parent
#: The result that most tests write: 6 by 5 chunks, the last row and column smaller.
SHAPE, CHUNK, COUNT = (360, 310), 64, 30


def _hash(block: np.ndarray) -> np.ndarray:
    return _input_hash([block], out=None, region=None)


def _compute(block, block_id, notes, delay, limit):
    """A network that is slow, tells which chunk it is at, and may give out."""
    if notes is not None:
        if limit is not None and len(list(notes.iterdir())) >= limit:
            raise OSError("the power is gone")
        (notes / f"{block_id[0]}-{block_id[1]}-{uuid.uuid4().hex}").touch()
    time.sleep(delay)
    return np.where(block > 0.9, np.nan, block * 100).astype(np.float32)


def make(notes=None, *, delay=0.0, limit=None, pixels=None, chunk=CHUNK, **attrs) -> xr.DataArray:
    """A result as `refine` gives it, of random pixels, without a network."""
    pixels = np.random.default_rng(0).random(SHAPE, np.float32) if pixels is None else pixels
    base = pixels if isinstance(pixels, da.Array) else da.from_array(pixels, chunks=chunk)
    work = partial(_compute, notes=notes, delay=delay, limit=limit)
    ys, xs = 4e6 - np.arange(pixels.shape[0]) - 0.5, 5e5 + np.arange(pixels.shape[1]) + 0.5
    out = xr.DataArray(
        base.map_blocks(work, dtype=np.float32, meta=np.empty((0, 0), np.float32)),
        coords={"y": ys, "x": xs}, dims=("y", "x"), name="refined",
        attrs={"units": "m", "long_name": "refined surface", "deepdem_weights": "ab", **attrs},
    ).rio.write_crs("EPSG:32631")  # fmt: skip
    ones = tuple((1,) * len(sizes) for sizes in base.chunks)
    out.encoding["deepdem_inputs"] = base.map_blocks(_hash, chunks=ones, dtype=np.uint64)
    return out


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _times(notes: Path) -> Counter[str]:
    """Return how often each chunk was computed."""
    return Counter(path.name.rsplit("-", 1)[0] for path in notes.iterdir())


def _done(store: Path) -> int:
    return len(list((store / LOG / "hash" / "c").glob("*/*")))


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed") / "r.zarr"
    make().deepdem.to_zarr(store)
    return _files(store)


# --- what is written ------------------------------------------------------------------------------


def test_what_is_written_opens_as_a_scene(tmp_path):
    result = make()
    before = result.copy()
    result.deepdem.to_zarr(tmp_path / "r.zarr", group="a/b")
    back = deepdem.open_scene(tmp_path / "r.zarr", "a/b")
    assert list(back.data_vars) == ["refined"]
    assert back.attrs == {}
    assert back.refined.attrs == result.attrs
    assert back.refined.chunksizes == result.chunksizes
    assert back.rio.crs == result.rio.crs
    np.testing.assert_array_equal(back.refined, result)
    xr.testing.assert_identical(result, before)
    array = zarr.open_array(tmp_path / "r.zarr", path="a/b/refined")
    assert (array.chunks, array.shards) == ((64, 64), (64, 64))
    assert array.attrs["_CRS"]["wkt"].startswith("PROJCRS")
    hashes = zarr.open_array(tmp_path / "r.zarr", path=f"a/b/{LOG}/hash")[:]
    np.testing.assert_array_equal(hashes, result.encoding["deepdem_inputs"])


def test_all_that_refine_may_give_is_written_and_resumed(tmp_path):
    refined = make()
    ds = xr.Dataset({
        "refined": refined,
        "refined_std": (refined.dims, refined.data / 10),
        "filled": (refined.dims, refined.data > 50),
    })  # fmt: skip
    ds.deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    back = deepdem.open_scene(tmp_path / "r.zarr")
    for name in ds:
        np.testing.assert_array_equal(back[name], ds[name])
        assert back[name].dtype == ds[name].dtype
    ds.deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    with pytest.raises(ValueError, match=r"variables is .*refined_std.* there and .* here"):
        refined.deepdem.to_zarr(tmp_path / "r.zarr", resume=True)


@pytest.mark.parametrize(
    ("chunk", "inner", "shard"),
    [(128, 128, 128), (256, 256, 256), (199, 199, 199), (1000, 256, 512),
     ((300, 1000), (300, 256), (300, 512))],
)  # fmt: skip
def test_an_inner_chunk_divides_its_shard(tmp_path, chunk, inner, shard):
    make(chunk=chunk).deepdem.to_zarr(tmp_path / "r.zarr")
    array = zarr.open_array(tmp_path / "r.zarr", path="refined")
    both = [(v, v) if isinstance(v, int) else v for v in (inner, shard)]
    assert [array.chunks, array.shards] == both
    np.testing.assert_array_equal(deepdem.open_scene(tmp_path / "r.zarr").refined, make())


def test_a_real_network_from_the_scene_to_the_disk_and_on(tmp_path, scene):
    """Halves of two runs are one run, with torch as well."""
    model = fitted()
    ds = scene.isel(y=slice(0, 200), x=slice(0, 200))
    with dask.config.set(scheduler="sync"):
        ds.deepdem.refine(model, chunks=96, overlap=32).deepdem.to_zarr(tmp_path / "one.zarr")
    with dask.config.set(scheduler="threads", num_workers=2):
        ds.deepdem.refine(model, chunks=96, overlap=32).deepdem.to_zarr(tmp_path / "two.zarr")
        _forget(tmp_path / "two.zarr", ["0/1", "2/2"])
        ds.deepdem.refine(model, chunks=96, overlap=32).deepdem.to_zarr(
            tmp_path / "two.zarr", resume=True
        )
    assert _files(tmp_path / "one.zarr") == _files(tmp_path / "two.zarr")
    with pytest.raises(ValueError, match=r"deepdem_overlap_px is 32 there and 16 here"):
        ds.deepdem.refine(model, chunks=96, overlap=16).deepdem.to_zarr(
            tmp_path / "two.zarr", resume=True
        )
    changed = ds.copy(deep=True)
    changed.ndvi[150, 150] += 0.01
    with pytest.raises(ValueError, match=r"inputs of chunk \(1, 1\).*the scene changed"):
        changed.deepdem.refine(model, chunks=96, overlap=32).deepdem.to_zarr(
            tmp_path / "two.zarr", resume=True
        )


def _forget(store: Path, cells: list[str]) -> None:
    """Turn a finished store back into one that was killed: these chunks are not done."""
    group = zarr.open_group(store, mode="r+")
    group.attrs["deepdem_complete"] = False
    for cell in cells:
        (store / LOG / "hash" / "c" / cell).unlink()
        (store / "refined" / "c" / cell).write_bytes(b"torn")


@pytest.mark.parametrize(
    "kind",
    ["str", "path", "file url", "memory url", "MemoryStore", "dict", "LocalStore", "FsspecStore",
     "ObjectStore", "obstore", "icechunk store", "icechunk session"],
)  # fmt: skip
def test_every_store(kind, tmp_path, notes):
    store, back = _store(kind, tmp_path / "r.zarr")
    with pytest.raises(OSError, match="power"), dask.config.set(scheduler="sync"):
        make(notes, limit=10).deepdem.to_zarr(store, group="g")
    with pytest.raises(ValueError, match=r"half-written.*resume=True"):
        deepdem.open_scene(back(), "g")
    make(notes).deepdem.to_zarr(store, group="g", resume=True)
    assert set(_times(notes).values()) == {1}
    assert len(_times(notes)) == COUNT
    np.testing.assert_array_equal(deepdem.open_scene(back(), "g").refined, make())


def _store(kind: str, path: Path):
    """Return a store, and what opens it again."""
    if kind.startswith("icechunk"):
        icechunk = pytest.importorskip("icechunk")
        repository = icechunk.Repository.create(icechunk.in_memory_storage())
        session = repository.writable_session("main")
        return session if kind.endswith("session") else session.store, lambda: session.store
    if kind in ("ObjectStore", "obstore"):
        pytest.importorskip("obstore")
        from obstore.store import MemoryStore

        raw = MemoryStore()
        return raw if kind == "obstore" else zarr.storage.ObjectStore(raw), (
            lambda: zarr.storage.ObjectStore(raw)
        )
    url = f"memory://{uuid.uuid4().hex}/r.zarr"
    made = {
        "str": lambda: str(path),
        "path": lambda: path,
        "file url": path.as_uri,
        "memory url": lambda: url,
        "MemoryStore": zarr.storage.MemoryStore,
        "dict": dict,
        "LocalStore": lambda: zarr.storage.LocalStore(path),
        "FsspecStore": lambda: zarr.storage.FsspecStore.from_url(url),
    }[kind]()
    return made, lambda: made


# --- resuming -------------------------------------------------------------------------------------


def test_what_fails_is_resumed_chunk_by_chunk_and_no_trace_is_left(tmp_path, notes, undisturbed):
    for limit in (7, 8, 20, None):
        with dask.config.set(scheduler="sync"):
            result = make(notes, limit=limit)
            if limit is None:
                result.deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
                break
            with pytest.raises(OSError, match="power"):
                result.deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
            assert _done(tmp_path / "r.zarr") == limit
    assert set(_times(notes).values()) == {1}
    assert _files(tmp_path / "r.zarr") == undisturbed
    make(notes).deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    assert sum(_times(notes).values()) == COUNT  # there was nothing to do


def test_a_run_that_died_before_its_first_chunk_starts_anew(tmp_path, undisturbed):
    make().deepdem.to_zarr(tmp_path / "r.zarr")
    zarr.open_group(tmp_path / "r.zarr", mode="r+").attrs["deepdem_complete"] = False
    del zarr.open_group(tmp_path / "r.zarr" / LOG, mode="r+").attrs["token"]
    make().deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    assert _files(tmp_path / "r.zarr") == undisturbed
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    make().deepdem.to_zarr(tmp_path / "empty.zarr", resume=True)
    assert _files(tmp_path / "empty.zarr") == undisturbed


def test_what_a_killed_process_had_half_put_in_place_is_swept(tmp_path, undisturbed):
    make().deepdem.to_zarr(tmp_path / "r.zarr")
    _forget(tmp_path / "r.zarr", ["5/4"])
    for name in ("refined/c/5/4.0.partial", f"{LOG}/hash/c/5/4.1.partial", "zarr.2.partial"):
        (tmp_path / "r.zarr" / name).write_bytes(b"half")
    make().deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    assert _files(tmp_path / "r.zarr") == undisturbed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"deepdem_weights": "cd"}, "deepdem_weights is 'ab' there and 'cd' here"),
        ({"deepdem_tta": True}, "deepdem_tta is None there and True here"),
        ({"chunk": 128}, r"chunks is \[64, 64\] there and \[128, 128\] here"),
        ({"pixels": np.ones((360, 309), np.float32)}, r"shape is \[360, 310\] there.*; x is"),
    ],
)
def test_another_model_option_or_grid_is_refused(tmp_path, other, message):
    make().deepdem.to_zarr(tmp_path / "r.zarr")
    _forget(tmp_path / "r.zarr", ["5/4"])
    with pytest.raises(ValueError, match=message + ".*overwrite=True"):
        make(**other).deepdem.to_zarr(tmp_path / "r.zarr", resume=True)
    make(**other).deepdem.to_zarr(tmp_path / "r.zarr", overwrite=True)
    np.testing.assert_array_equal(deepdem.open_scene(tmp_path / "r.zarr").refined, make(**other))


def test_other_inputs_are_refused_without_computing_anything(tmp_path, notes):
    store, pixels = tmp_path / "r.zarr", np.random.default_rng(1).random((200, 200), np.float32)
    make(pixels=pixels, chunk=20).deepdem.to_zarr(store)
    _forget(store, ["9/9"])
    # Of the 99 chunks that are done 64 are looked at: every one of them, with every other asked.
    found = 0
    for n in (0, 1, 2, 98):
        changed = pixels.copy()
        changed[divmod(n, 10)[0] * 20, divmod(n, 10)[1] * 20] += 0.5
        result = make(notes, pixels=changed, chunk=20)
        with pytest.raises(ValueError, match=r"rows \d+ to \d+, columns \d+ to \d+.*changed"):
            result.deepdem.to_zarr(store, resume=True, verify="all")
        with dask.config.set(scheduler="sync"):
            try:
                _only_verify(result, store)
            except ValueError:
                found += 1
    assert found == 3
    assert not _times(notes)
    with pytest.raises(ValueError, match="verify='none': pass"):
        result.deepdem.to_zarr(store, resume=True, verify="none")


def _only_verify(result: xr.DataArray, store: Path) -> None:
    from deepdem.write import _verify

    there = zarr.open_array(store, path=f"{LOG}/hash", mode="r")[:]
    _verify(result.encoding["deepdem_inputs"], there, result.chunks, "sample")


def test_nothing_is_lost_by_mistake(tmp_path, scene):
    store = tmp_path / "r.zarr"
    make().deepdem.to_zarr(store)
    with pytest.raises(FileExistsError, match=r"finished scene or result.*overwrite=True"):
        make().deepdem.to_zarr(store)
    with pytest.raises(ValueError, match="pass one of them"):
        make().deepdem.to_zarr(store, resume=True, overwrite=True)
    _forget(store, ["0/0"])
    with pytest.raises(FileExistsError, match="half-written, 29 of 30 chunks: pass resume=True"):
        make().deepdem.to_zarr(store)
    scene.deepdem.to_zarr(tmp_path / "s.zarr", group="one")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"holds \['one'\], which would be lost"):
            make().deepdem.to_zarr(tmp_path / "s.zarr", **options)
    with pytest.raises(FileExistsError, match="no resumable run wrote"):
        make().deepdem.to_zarr(tmp_path / "s.zarr", group="one", resume=True)
    assert len(deepdem.open_scene(tmp_path / "s.zarr", "one").data_vars) == len(scene.data_vars)


def test_a_result_that_does_not_know_its_inputs_is_written_but_not_resumed(tmp_path):
    for n, result in enumerate((make() + 1, make().isel(y=slice(128, 300)), make().compute() + 1)):
        result.deepdem.to_zarr(tmp_path / f"{n}.zarr")
        np.testing.assert_array_equal(deepdem.open_scene(tmp_path / f"{n}.zarr").refined, result)
        with pytest.raises(ValueError, match=r"resume with what refine\(\) returned"):
            result.deepdem.to_zarr(tmp_path / f"{n}.zarr", resume=True)
    with pytest.raises(ValueError, match=r"along y are uneven.*refined.chunk"):
        make(chunk=((100, 150, 110), 310)).deepdem.to_zarr(tmp_path / "u.zarr")
    assert not (tmp_path / "u.zarr").exists()


def test_a_scene_is_written_as_a_scene(tmp_path, scene):
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    assert LOG not in zarr.open_group(tmp_path / "s.zarr")
    with pytest.raises(ValueError, match="only what refine"):
        scene.deepdem.to_zarr(tmp_path / "t.zarr", resume=True)
    mixed = make().to_dataset().assign(dsm=make())
    mixed.deepdem.to_zarr(tmp_path / "m.zarr")
    assert LOG not in zarr.open_group(tmp_path / "m.zarr")


# --- death ----------------------------------------------------------------------------------------

_RUN = """
import sys, pathlib
sys.path.insert(0, {here!r})
from test_write import make
if __name__ == "__main__":
    result = make(pathlib.Path({notes!r}), delay={delay})
    if {workers}:
        from distributed import Client, LocalCluster
        cluster = LocalCluster(n_workers={workers}, threads_per_worker=1, dashboard_address=None)
        client = Client(cluster)
    result.deepdem.to_zarr({store!r}, resume=True)
"""


def _start(store: Path, notes: Path, *, delay: float, workers: int = 0) -> subprocess.Popen:
    program = _RUN.format(
        here=str(HERE), notes=str(notes), store=str(store), delay=delay, workers=workers
    )
    return subprocess.Popen([sys.executable, "-c", program], start_new_session=True)  # noqa: S603


def _wait(condition, process=None, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        assert process is None or process.poll() is None, "it ended too soon"
        time.sleep(0.01)


def test_killed_twice_and_resumed_it_is_as_if_undisturbed(tmp_path, notes, undisturbed):
    store = tmp_path / "r.zarr"
    for done in (4, 12):
        process = _start(store, notes, delay=0.1)
        _wait(lambda done=done: _done(store) >= done, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ValueError, match="half-written"):
            deepdem.open_scene(store)
    finished, started = _done(store), sum(_times(notes).values())
    assert 12 <= finished < COUNT
    make(notes).deepdem.to_zarr(store, resume=True)
    assert sum(_times(notes).values()) - started == COUNT - finished
    assert _files(store) == undisturbed


def _workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the Dask workers among the children of a process: those whose parent is a child."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_three_workers_and_then_the_whole_cluster_are_killed(tmp_path, notes, undisturbed):
    store = tmp_path / "r.zarr"
    process = _start(store, notes, delay=0.3, workers=2)
    killed = []
    try:
        for done in (3, 7, 11):
            _wait(lambda done=done: _done(store) >= done, process)
            victim = _workers(process)[0]
            victim.kill()
            killed.append(victim.pid)
        _wait(lambda: _done(store) >= 16, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(set(killed)) == 3
    time.sleep(0.5)
    finished, started = _done(store), sum(_times(notes).values())
    assert 16 <= finished < COUNT
    make(notes).deepdem.to_zarr(store, resume=True)
    assert sum(_times(notes).values()) - started == COUNT - finished
    assert _files(store) == undisturbed
    # Only what was under way when something was killed was computed twice: one a worker.
    assert sum(_times(notes).values()) <= COUNT + 3 + 2, _times(notes)
    log = zarr.open_array(store, path=f"{LOG}/hash", mode="r")[:]
    assert np.count_nonzero(log) == COUNT


@pytest.mark.slow
def test_a_cluster_goes_on_by_itself_when_its_workers_are_killed(tmp_path, notes, undisturbed):
    from distributed import Client, LocalCluster

    store, killed = tmp_path / "r.zarr", []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):

        def killer() -> None:
            for done in (3, 8, 13):
                _wait(lambda: _done(store) >= done)  # noqa: B023  # it is called at once
                worker = next(iter(cluster.workers.values())).process
                killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
                _wait(lambda: worker.pid != killed[-1])  # noqa: B023

        thread = threading.Thread(target=killer)
        thread.start()
        make(notes, delay=0.2).deepdem.to_zarr(store)
        thread.join()
    assert len(set(killed)) == 3
    assert _files(store) == undisturbed
    assert sum(_times(notes).values()) <= COUNT + 3


def _cluster(folder: Path) -> tuple[Path, list[subprocess.Popen]]:
    """Start a scheduler and two workers, each a process of its own; the scheduler comes first."""
    file = folder / f"{uuid.uuid4().hex}.json"

    def run(*arguments: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(file),
                "--no-dashboard"]  # fmt: skip
        return subprocess.Popen(line, stderr=subprocess.DEVNULL)  # noqa: S603

    processes = [run("scheduler", "--host", "127.0.0.1", "--port", "0")]
    _wait(file.exists, processes[0])
    return file, [*processes, *(run("worker", "--nthreads", "1") for _ in range(2))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_scheduler_is_killed_and_a_real_refinement_goes_on_with_another(tmp_path, scene):
    """With the default centring: heights above the scene's local level."""
    from distributed import Client

    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    ds = deepdem.open_scene(tmp_path / "s.zarr")
    model, store = fitted(centering="local", chip_size=32), tmp_path / "r.zarr"

    def write(where: Path) -> None:
        ds.deepdem.refine(model, chunks=48).deepdem.to_zarr(where, resume=True)

    with dask.config.set(scheduler="threads", num_workers=2):
        write(tmp_path / "undisturbed.zarr")
    file, processes = _cluster(tmp_path)

    def killer() -> None:
        _wait(lambda: _done(store) >= 6)
        processes[0].kill()

    thread = threading.Thread(target=killer)
    # That is how long a client tries to find its scheduler again, as well.
    client = Client(scheduler_file=str(file), timeout=5)
    try:
        thread.start()
        with pytest.raises(CancelledError, match="lost the connection to the scheduler"):
            write(store)
    finally:
        thread.join()
        client.close(timeout=1)
        for process in processes:
            process.kill()
            process.wait()
    assert 6 <= _done(store) < 42
    with pytest.raises(ValueError, match="half-written"):
        deepdem.open_scene(store)
    with dask.config.set(scheduler="threads", num_workers=2):
        write(store)
    assert _files(store) == _files(tmp_path / "undisturbed.zarr")


def test_stores_that_workers_cannot_reach_are_refused(tmp_path):
    with dask.config.set(scheduler="processes"):
        for store in (zarr.storage.MemoryStore(), {}, "memory://x"):
            with pytest.raises(ValueError, match="in this process's memory"):
                make().deepdem.to_zarr(store)
        with pytest.raises(NotImplementedError, match="scheduler of processes"):
            make().deepdem.to_cog(tmp_path / "r.tif")
        icechunk = pytest.importorskip("icechunk")
        repository = icechunk.Repository.create(icechunk.in_memory_storage())
        with pytest.raises(NotImplementedError, match="Icechunk session on a cluster"):
            make().deepdem.to_zarr(repository.writable_session("main"))


@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_a_client_in_this_process(tmp_path, undisturbed):
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None):
        make().deepdem.to_zarr(tmp_path / "r.zarr", progress=True)
        assert _files(tmp_path / "r.zarr") == undisturbed
        make().deepdem.to_cog(tmp_path / "r.tif")
        with pytest.raises(ValueError, match="in this process's memory"):
            make().deepdem.to_zarr(zarr.storage.MemoryStore())
        url = f"memory://{uuid.uuid4().hex}"
        make().deepdem.to_zarr(url)
        np.testing.assert_array_equal(deepdem.open_scene(url).refined, make())
    with rasterio.open(tmp_path / "r.tif") as file:
        np.testing.assert_array_equal(file.read(1), make())


def test_writing_to_where_this_process_does_not_see_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("deepdem.write._write_chunk", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"30 of 30 chunks are not in.*all of them share"):
        make().deepdem.to_zarr(tmp_path / "r.zarr")


# --- COG ------------------------------------------------------------------------------------------


def _is_cog(path: Path) -> None:
    with rasterio.open(path) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.profile["tiled"]
    try:
        from rio_cogeo import cog_validate
    except ImportError:
        return
    assert cog_validate(path, strict=True) == (True, [], [])


@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw", "none"])
def test_a_cog_is_valid_and_whole(tmp_path, compress):
    pixels = np.random.default_rng(0).random((1100, 900), np.float32)
    result = make(pixels=pixels, chunk=((400, 99, 601), 333))
    result.deepdem.to_cog(tmp_path / "r.tif", compress=compress)
    assert [path.name for path in tmp_path.iterdir()] == ["r.tif"]
    _is_cog(tmp_path / "r.tif")
    with rasterio.open(tmp_path / "r.tif") as file:
        assert file.overviews(1) == [2, 4]
        assert np.isnan(file.nodata)
        assert file.tags()["deepdem_weights"] == "ab"
        assert (file.descriptions, file.units) == (("refined surface",), ("m",))
        assert (file.compression.value.lower() if file.compression else "none") == compress
    back = rioxarray.open_rasterio(tmp_path / "r.tif").squeeze("band", drop=True)
    np.testing.assert_array_equal(back, result)
    assert back.rio.crs == result.rio.crs
    xr.testing.assert_allclose(back.x, result.x)


def test_a_cog_of_several_bands_without_overviews(tmp_path):
    refined = make()
    ds = refined.to_dataset().assign(filled=(("y", "x"), refined.data > 50))
    ds.deepdem.to_cog(tmp_path / "r.tif", overviews=False)
    _is_cog(tmp_path / "r.tif")
    with rasterio.open(tmp_path / "r.tif") as file:
        assert file.overviews(1) == []
        assert file.descriptions == ("refined surface", "filled")
        np.testing.assert_array_equal(file.read(2), ds.filled)
        assert file.tags(1)["deepdem_weights"] == "ab"


def test_a_cog_that_fails_leaves_what_was_there(tmp_path, notes):
    target = tmp_path / "out" / "r.tif"
    target.parent.mkdir()
    target.write_text("of yesterday")
    with pytest.raises(OSError, match="power"):
        make(notes, limit=5).deepdem.to_cog(target)
    assert [path.name for path in target.parent.iterdir()] == ["r.tif"]
    assert target.read_text() == "of yesterday"
    with pytest.raises(ValueError, match="is a URL: write a local file"):
        make().deepdem.to_cog("s3://bucket/r.tif")
    with pytest.raises(ValueError, match="compress='jpeg': pass one of"):
        make().deepdem.to_cog(target, compress="jpeg")


_MEMORY = """
import sys
import dask, dask.array as da
sys.path.insert(0, {here!r})
from test_write import make

def write(n, path):
    line = da.arange(n, chunks=1024, dtype="float32")
    make(pixels=line[:, None] + line[None, :]).deepdem.{method}(path)

def peak():  # not ru_maxrss, which a process inherits
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

dask.config.set(num_workers=2)
write(1024, {path!r} + "0")
before = peak()
write({size}, {path!r} + "1")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")
@pytest.mark.parametrize(("method", "most"), [("to_cog", 300), ("to_zarr", 100)])
def test_memory_is_that_of_chunks_not_of_the_raster(tmp_path, method, most):
    """A raster of 604 MB; the bound is GDAL's 128 MB and some chunks of 4 MB."""
    program = _MEMORY.format(here=str(HERE), path=str(tmp_path / "r"), method=method, size=12288)
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < most


# --- progress -------------------------------------------------------------------------------------


def test_progress_in_a_terminal(tmp_path, capsys):
    make().deepdem.to_zarr(tmp_path / "0.zarr")  # pytest is neither terminal nor notebook
    assert capsys.readouterr().err == ""
    make().deepdem.to_zarr(tmp_path / "1.zarr", progress=True)
    assert "30/30 chunks" in (shown := capsys.readouterr().err)
    assert "Mpx/s" in shown
    make().deepdem.to_cog(tmp_path / "1.tif", progress=True)
    assert "30/30 chunks" in capsys.readouterr().err
    with pytest.raises(ValueError, match="progress='yes': pass"):
        make().deepdem.to_zarr(tmp_path / "2.zarr", progress="yes")


@pytest.mark.slow
def test_progress_in_a_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    source = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from test_write import make
make().deepdem.to_zarr({str(tmp_path / "r.zarr")!r})
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    shown = [o["data"]["text/html"] for o in notebook.cells[0].outputs if "data" in o]
    assert len(shown) == 1
    assert "value='30' max='30'" in shown[0]
    assert "Mpx/s" in shown[0]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_zarr_and_cog(tmp_path, scene, model):
    model.save(tmp_path / "m.safetensors")
    scene.deepdem.to_zarr(tmp_path / "s.zarr", group="scene")

    def refine(out: str, *options: str) -> None:
        line = ["refine", str(tmp_path / "s.zarr"), str(tmp_path / "m.safetensors"),
                str(tmp_path / out), "--group", "scene", "--chunks", "128", *options]  # fmt: skip
        CliRunner().invoke(app, line, catch_exceptions=False)

    refine("r.zarr", "--resume")
    refine("r.tif")
    _forget(tmp_path / "r.zarr", ["0/1"])
    refine("r.zarr", "--resume")
    back = deepdem.open_scene(tmp_path / "r.zarr").refined
    assert back.chunksizes["x"] == (128, 128, 4)
    _is_cog(tmp_path / "r.tif")
    with rasterio.open(tmp_path / "r.tif") as file:
        np.testing.assert_allclose(file.read(1), back, atol=1e-3)
    with pytest.raises(ValueError, match="cannot be resumed"):
        refine("r.tif", "--resume")
    with pytest.raises(ValueError, match=r"name it x.tif"):
        refine("r.png")


def test_functions_and_methods_are_the_same(tmp_path, undisturbed):
    write_zarr(make(), tmp_path / "r.zarr")
    assert _files(tmp_path / "r.zarr") == undisturbed
    write_cog(make(), tmp_path / "r.tif")
    make().deepdem.to_cog(tmp_path / "s.tif")
    assert (tmp_path / "r.tif").read_bytes() == (tmp_path / "s.tif").read_bytes()

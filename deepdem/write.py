"""Results straight to disk: a Zarr store that can be resumed.

One task writes one output chunk: its shard of each variable, and then, when they are there, its
own cell of a log beside them. No two tasks touch one file, none returns data, and each may be
done again. The log's cell is the hash of the chunk's inputs, so a run that goes on where another
stopped knows what is done and whether it was made of the same pixels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec.core
import numpy as np
import xarray as xr
import zarr
from dask.array.optimization import optimize
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, List, Task, TaskRef
from numpy.typing import NDArray
from zarr.core.sync import sync  # not public, but neither is another way to delete one shard

from deepdem._run import Key, active_scheduler, compute, progress_bar
from deepdem.blocks import Chunks, chunks_of, made_with
from deepdem.scene import check_scene
from deepdem.store import (
    COMPLETE,
    INNER_PX,
    SHARD_PX,
    as_stored,
    is_complete,
    mark_complete,
    scene_to_zarr,
)

__all__ = ["as_dataset", "dataset_to_zarr", "grid_of", "slices_of", "write_zarr"]

log = logging.getLogger(__name__)

#: What `refine` gives.
RESULTS = frozenset({"refined", "refined_std", "filled"})
#: The keys in ``refined.encoding`` of the hashes of each chunk's inputs: found by themselves, and
#: beside the chunk's own pixels.
INPUTS, STAMPS = "deepdem_inputs", "deepdem_stamps"
#: The group, beside the variables, of what is done and with which settings.
LOG = "deepdem_log"
_FORMAT = 1
_SAMPLE = 64
#: The cell of a chunk whose inputs are not known.
_WRITTEN = np.uint64(1)


@dataclass(frozen=True)
class _Target:
    """A group of a store, opened anew in each task: it may run in any process."""

    store: Any
    group: str | None

    def __str__(self) -> str:
        return f"{self.store}" + (f", group {self.group!r}" if self.group else "")

    def open(self, mode: str = "r+") -> Any:
        kind: Any = mode
        return zarr.open_group(self.store, path=self.group or "", mode=kind, use_consolidated=False)


def _write_chunk(
    target: _Target,
    names: Sequence[str],
    where: tuple[int, int],
    place: tuple[slice, slice],
    stamp: NDArray[np.uint64],
    blocks: Sequence[NDArray[Any]],
) -> None:
    """Write one chunk of each variable, and then its cell of the log."""
    group = target.open()
    done, cell = group[f"{LOG}/hash"], np.asarray(stamp).reshape(-1)[0]
    # A task that Dask runs again, since its worker was lost after the work, must not open a
    # finished shard for writing: not every store replaces an object at once.
    if done[where] == cell:
        return
    for name, block in zip(names, blocks, strict=True):
        array = group[name]
        # Into a shard that is there, and it may be torn, Zarr would merge.
        sync((array.store_path / array.metadata.encode_chunk_key(where)).delete())
        array[place] = block.astype(array.dtype, copy=False)
    done[where] = cell


def write_zarr(
    result: xr.DataArray | xr.Dataset,
    store: Any,
    *,
    group: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: str = "sample",
    progress: bool | str = "auto",
) -> None:
    """Write a refined surface to a Zarr store, chunk by chunk, so that it can be resumed; computes.

    The layout is that of scenes (`deepdem.open_scene` opens it), each Dask chunk is one shard.
    The group ``deepdem_log`` beside the variables records which chunks are done; the finished
    store keeps it. After the death of the process, a worker or the scheduler the same call with
    ``resume=True`` computes what is missing and nothing else; the store is that of a run that
    nothing disturbed, byte for byte where the network gives the same bytes twice.

    Parameters
    ----------
    result
        A lazy surface as `deepdem.refine.refine` gives it, or a Dataset of several on the same
        chunks. Chunks are of one width and one height, but for the last ones.
    store
        A path, a URL that fsspec knows, a Zarr, obstore or Icechunk store, or an Icechunk
        session. What is written to a session is there once you commit it.
    group
        The result's name in the store.
    resume
        Whether to go on with what is there. Nothing there is no error: then it starts.
    overwrite
        Whether what is there, finished or not, is replaced.
    verify
        On `resume` the hash of the inputs of chunks that are done is computed again and compared:
        ``"sample"``, of 64 chunks spread evenly, or ``"all"``. It needs no inference.
    progress
        A bar of finished chunks; ``"auto"``: in a notebook and in a terminal.

    Raises
    ------
    FileExistsError
        Something is there: pass ``resume=True`` or ``overwrite=True``, or choose another group.
    ValueError
        On `resume`: model, options, grid or inputs differ from those that the store was begun
        with, or `result` is not as `refine` made it. Chunks are uneven. The message has the cure.
    NotImplementedError
        An Icechunk session on a cluster.
    RuntimeError
        The workers wrote to a place that this process does not see.

    Examples
    --------
    >>> ds.deepdem.refine("baker.safetensors").deepdem.to_zarr("out.zarr", resume=True)
    """
    ds, chunks = _lazy(result)
    names, inputs = list(map(str, ds.data_vars)), _inputs(ds, chunks)
    if verify not in ("sample", "all"):
        raise ValueError(f"verify={verify!r}: pass 'sample' or 'all'")
    if resume and overwrite:
        raise ValueError("resume=True and overwrite=True: go on, or start anew; pass one of them")
    if resume and inputs is None:
        raise ValueError(
            "this result does not know its inputs, so it cannot be told whether what is there was "
            "made of the same: resume with what refine() returned, not with what was computed, "
            "rechunked or cut from it, or write it without resume=True"
        )
    target = _Target(_located(store), group)
    _check_reach(target.store)
    token = _token(ds, chunks)
    there = _resumable(target, token) if resume else None
    if there is None:
        _create(ds, chunks, target, token, overwrite)
        there = np.zeros((len(chunks[0]), len(chunks[1])), dtype=np.uint64)
    elif inputs is not None:
        _verify(inputs, there, chunks, verify)
        log.info("%s: %d of %d chunks are done", target, np.count_nonzero(there), there.size)
    if not there.all():
        _write_missing(ds, chunks, names, target, inputs, there, progress)
    if not is_complete(target.store, group):
        _sweep(target, [*map(str, ds.variables), LOG])
        mark_complete(target.store, group)


def dataset_to_zarr(ds: xr.Dataset, store: Any, **options: Any) -> None:
    """Write a result of `refine` with `write_zarr`, any other Dataset with `scene_to_zarr`.

    Raises
    ------
    ValueError
        ``resume=True`` for a Dataset that is not as `refine` made it.
    """
    ours = set(map(str, ds.data_vars)) <= RESULTS
    if ours and "refined" in ds and INPUTS in ds["refined"].encoding:
        write_zarr(ds, store, **options)
    elif options.pop("resume", False):
        raise ValueError(
            "only what refine() returned can be resumed, and this Dataset is a scene or was "
            "changed since: leave out resume=True, or write ds.deepdem.refine(model) by itself"
        )
    else:
        scene_to_zarr(ds, store, **options)


def as_dataset(result: xr.DataArray | xr.Dataset) -> xr.Dataset:
    """Return a surface as a Dataset of one variable; a Dataset as it is."""
    if isinstance(result, xr.Dataset):
        return result
    return result.to_dataset(name=str(result.name or "refined"))


def _lazy(result: xr.DataArray | xr.Dataset) -> tuple[xr.Dataset, Chunks]:
    """Return the result as a Dataset of Dask arrays of the same chunks, and these."""
    ds = as_dataset(result)
    box = check_scene(ds, map(str, ds.data_vars))
    found = {layer.chunks for layer in ds.data_vars.values() if layer.chunks is not None}
    if len(found) > 1:
        raise ValueError(
            f"the variables {sorted(map(str, ds.data_vars))} have different chunks: make them the "
            "same, ds.chunk(y=2048, x=2048)"
        )
    chunks: Chunks = found.pop() if found else chunks_of((box.shape.y, box.shape.x), SHARD_PX)  # type: ignore[assignment]  # 2-D
    return ds.chunk(dict(zip(("y", "x"), chunks, strict=True))), chunks


def grid_of(ds: xr.Dataset) -> Any:
    """Return the grid; odc-geo's types allow it to have no CRS, `check_scene` does not."""
    return check_scene(ds)


def _inputs(ds: xr.Dataset, chunks: Chunks) -> da.Array | None:
    """Return the lazy hashes of each chunk's inputs, if the result still has its chunks."""
    for layer in ds.data_vars.values():
        inputs = layer.encoding.get(INPUTS)
        if isinstance(inputs, da.Array) and inputs.shape == tuple(map(len, chunks)):
            return inputs
    return None


def _stamps(ds: xr.Dataset, inputs: da.Array) -> da.Array:
    """Return the same hashes without reading all inputs again, if pixels are to be computed.

    They are not where the result was persisted.
    """
    for layer in ds.data_vars.values():
        stamps = layer.encoding.get(STAMPS)
        if not isinstance(stamps, da.Array) or stamps.shape != inputs.shape:
            continue
        if made_with(stamps, layer.data):
            return stamps
    return inputs


def _located(store: Any) -> Any:
    """Return the store as any process can open it."""
    if isinstance(store, str) and store.startswith(("file:", "local:")):
        # Zarr's own local store replaces a file at once, fsspec's does not.
        store = fsspec.core.strip_protocol(store)
    if isinstance(store, Path) or (isinstance(store, str) and "://" not in store):
        return str(Path(store).absolute())
    package = type(store).__module__.split(".")[0]
    if package == "icechunk":
        return getattr(store, "store", store)  # of a session
    return zarr.storage.ObjectStore(store) if package == "obstore" else store


def _check_reach(store: Any) -> None:
    """Refuse a store that the active scheduler's tasks cannot write to."""
    schedule, client = active_scheduler()
    apart = getattr(schedule, "__module__", "") == "dask.multiprocessing"
    if client is None and not apart:
        return
    if type(store).__module__.split(".")[0] == "icechunk":
        raise NotImplementedError(
            "an Icechunk session on a cluster: its writes would have to be forked to each worker "
            "and merged here, and a lost worker's fork would be lost with what the log says is "
            "done; close the client or use dask.config.set(scheduler='threads')"
        )
    inproc = client is not None and client.scheduler.address.startswith("inproc")
    if isinstance(store, zarr.storage.MemoryStore | dict) or (
        isinstance(store, str) and store.startswith("memory:") and not inproc
    ):
        raise ValueError(
            f"{store!r} is in this process's memory, which the workers do not share: write to a "
            "directory or an object store, or use dask.config.set(scheduler='threads')"
        )


def _layout(chunks: Chunks) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the pixels (y, x) of an inner chunk and of a shard."""
    inner, shards = [], []
    for dim, sizes in zip("yx", chunks, strict=True):
        if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
            raise ValueError(
                f"chunks {sizes} along {dim} are uneven, and a shard has one size: refine with "
                "chunks=, or give the result others, refined.chunk(y=2048, x=2048)"
            )
        if len(sizes) == 1:
            inner.append(INNER_PX)
            shards.append(math.ceil(sizes[0] / INNER_PX) * INNER_PX)
            continue
        near = [n for n in range(INNER_PX // 2, INNER_PX * 2 + 1) if sizes[0] % n == 0]
        inner.append(min(near, key=lambda n: abs(math.log(n / INNER_PX)), default=sizes[0]))
        shards.append(sizes[0])
    return tuple(inner), tuple(shards)


def _token(ds: xr.Dataset, chunks: Chunks) -> dict[str, Any]:
    """Return all that must be the same for a run to go on, as JSON has it."""
    box, settings = grid_of(ds), dict(ds.attrs)
    for layer in ds.data_vars.values():
        settings.update(layer.attrs)
    token = {
        "format": _FORMAT,
        "variables": {str(name): str(layer.dtype) for name, layer in ds.data_vars.items()},
        "shape": [box.shape.y, box.shape.x],
        "chunks": [sizes[0] for sizes in chunks],
        "crs": box.crs.to_wkt(),
        **{dim: ds[dim].values[[0, -1]].tolist() for dim in ("y", "x")},
        **{k: v for k, v in settings.items() if str(k).startswith("deepdem_") and k != COMPLETE},
    }
    plain: dict[str, Any] = json.loads(json.dumps(token, default=str))
    return plain


def _begun(target: _Target) -> dict[str, Any] | None:
    """Return the token of the run that made this group; None if none got so far."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        token: dict[str, Any] = dict(target.open("r")[LOG].attrs)["token"]
        return token
    return None


def _resumable(target: _Target, token: Mapping[str, Any]) -> NDArray[np.uint64] | None:
    """Return the log of the run to go on with; None if there is none."""
    begun = _begun(target)
    if begun is None:
        if is_complete(target.store, target.group):
            raise FileExistsError(
                f"{target} holds a scene that no resumable run wrote: choose another group, or "
                "pass overwrite=True without resume=True"
            )
        return None
    differ = [
        f"{key} is {_short(begun.get(key))} there and {_short(token.get(key))} here"
        for key in sorted({*begun, *token})
        if begun.get(key) != token.get(key)
    ]
    if differ:
        raise ValueError(
            f"{target} was begun with other settings: {'; '.join(differ)}. Refine the same scene "
            "with the same model and options to go on, or start anew with overwrite=True"
        )
    done: NDArray[np.uint64] = target.open("r")[f"{LOG}/hash"][:]
    return done


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder="…")


def _create(
    ds: xr.Dataset, chunks: Chunks, target: _Target, token: dict[str, Any], overwrite: bool
) -> None:
    """Write everything but pixels. The token comes last: without it there is nothing to resume."""
    inner, shards = _layout(chunks)
    exists = _check_free(target, overwrite)
    empty = ds.copy()
    for name, layer in ds.data_vars.items():
        # Another array of the same form: xarray would build the whole graph only to drop it.
        shape: Any = da.zeros(layer.shape, dtype=layer.dtype, chunks=chunks)
        empty[name] = layer.copy(data=shape)
    out, encoding = as_stored(empty, inner=inner, shards=shards)
    out.to_zarr(
        target.store, group=target.group, mode="w" if exists else "w-", encoding=encoding,
        zarr_format=3, consolidated=False, compute=False,
    )  # fmt: skip
    about = target.open().create_group(LOG)
    about.create_array(
        "hash", shape=tuple(map(len, chunks)), chunks=(1, 1), dtype="uint64", fill_value=0,
        compressors=None, dimension_names=("row", "column"),
        attributes={"long_name": "hash of the inputs of each chunk that is written, else 0"},
    )  # fmt: skip
    about.attrs["token"] = token


def _check_free(target: _Target, overwrite: bool) -> bool:
    """Return whether there is a group of that name, which may go."""
    try:
        group = target.open("r")
    except FileNotFoundError:
        return False
    complete = is_complete(target.store, target.group)
    held = [name for name, _ in group.groups() if name != LOG]
    if complete is None:
        held += [name for name, _ in group.arrays()]
    if held:
        raise FileExistsError(
            f"{target} holds {sorted(held)}, which would be lost: choose another group"
        )
    if complete and not overwrite:
        raise FileExistsError(
            f"{target} holds a finished scene or result: choose another group, or pass "
            "overwrite=True"
        )
    if not overwrite and _begun(target) and (done := np.count_nonzero(group[f"{LOG}/hash"][:])):
        raise FileExistsError(
            f"{target} is half-written, {done} of {group[f'{LOG}/hash'].size} chunks: pass "
            "resume=True to go on, or overwrite=True to start anew"
        )
    return True


def _verify(inputs: da.Array, there: NDArray[np.uint64], chunks: Chunks, how: str) -> None:
    """Compute the hash of the inputs of finished chunks again, and compare."""
    places = np.argwhere(there)
    if how == "sample" and len(places) > _SAMPLE:
        places = places[np.linspace(0, len(places) - 1, _SAMPLE).round().astype(int)]
    wanted = [tuple(place) for place in places.tolist()]
    keys: list[Key] = [(inputs.name, *where) for where in wanted]
    tasks = optimize(inputs.dask, keys)
    for where, value in zip(wanted, active_scheduler()[0](tasks, keys), strict=True):
        if there[where] != np.asarray(value).reshape(-1)[0]:
            rows, columns = (along[n] for along, n in zip(slices_of(chunks), where, strict=True))
            raise ValueError(
                f"the inputs of chunk {where} (rows {rows.start} to {rows.stop - 1}, columns "
                f"{columns.start} to {columns.stop - 1}) are not those that it was written from: "
                "the scene changed; go on with the scene as it was, or start anew with "
                "overwrite=True"
            )


def slices_of(chunks: Chunks) -> tuple[list[slice], ...]:
    """Return the pixels of each row and each column of chunks."""
    return tuple(
        [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))] for sizes in chunks
    )


def _write_missing(
    ds: xr.Dataset,
    chunks: Chunks,
    names: list[str],
    target: _Target,
    inputs: da.Array | None,
    there: NDArray[np.uint64],
    progress: bool | str,
) -> None:
    arrays: list[Any] = [ds[name].data for name in names]
    if inputs is not None:
        inputs = _stamps(ds, inputs)
    known: list[Any] = [] if inputs is None else [inputs]
    name = f"write-{tokenize([a.name for a in [*arrays, *known]], str(target))}"
    graph: dict[Any, Any] = {f"{name}-to": DataNode(f"{name}-to", target)}
    sizes: dict[Key, int] = {}
    rows, columns = slices_of(chunks)
    for i, j in np.argwhere(there == 0).tolist():
        key, where, place = (name, i, j), (i, j), (rows[i], columns[j])
        stamp: Any = _WRITTEN if inputs is None else TaskRef((inputs.name, *where))
        blocks = List(*(TaskRef((array.name, *where)) for array in arrays))
        graph[key] = Task(
            key, _write_chunk, TaskRef(f"{name}-to"), names, where, place, stamp, blocks
        )
        sizes[key] = chunks[0][i] * chunks[1][j]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[*arrays, *known])
    with progress_bar(progress, "Writing", len(sizes)) as advance:
        for _ in compute(layers, sizes, advance, fetch=False):
            pass
    left = np.count_nonzero(target.open("r")[f"{LOG}/hash"][:] == 0)
    if left:
        raise RuntimeError(
            f"{left} of {there.size} chunks are not in {target} though their tasks have ended: "
            "the workers see another file system or memory than this process; write to a place "
            "that all of them share"
        )


def _sweep(target: _Target, names: Sequence[str]) -> None:
    """Remove what a killed process left of files that it was about to put in their place."""
    root = getattr(target.store, "root", target.store)
    if not isinstance(root, str | Path) or "://" in str(root):
        return
    folder = Path(root, target.group or "")
    for rest in (folder.glob("*.partial"), *((folder / n).rglob("*.partial") for n in names)):
        for path in rest:
            path.unlink(missing_ok=True)

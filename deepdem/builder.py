"""Many scenes into one Zarr store: once, lazily, in parallel, and again where it stopped."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.system
import dask.threaded
import pandas as pd
import xarray as xr
import zarr

from deepdem._run import active_scheduler
from deepdem.config import SceneConfig, read_config, token_of
from deepdem.derive import prepare
from deepdem.provenance import PROVENANCE, noted
from deepdem.scene import check_scene
from deepdem.statistics import stored_statistics
from deepdem.store import is_complete, open_scene, scene_to_zarr

__all__ = ["BuildReport", "SceneReport", "build"]

log = logging.getLogger(__name__)

# Python's record of warnings is one for the whole process.
_RECORDING = threading.Lock()
# Below this share of valid pixels it is worth a word.
_FEW = 0.05


@dataclass(frozen=True)
class SceneReport:
    """What became of one scene.

    Attributes
    ----------
    name, status
        ``built``; ``there``: it was finished before, of the same inputs and options; ``failed``.
    reason
        Why it failed.
    grid
        ``rows``, ``columns``, ``left``, ``bottom``, ``right``, ``top``, ``crs``, ``pixel_size``
        (in the CRS's units) and ``pixel_size_m``.
    statistics
        As `deepdem.statistics.plan_statistics` gives them.
    warnings
        What is odd about it.
    """

    name: str
    status: str
    reason: str = ""
    grid: Mapping[str, Any] | None = None
    statistics: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """What became of all scenes, in the configuration's order."""

    scenes: tuple[SceneReport, ...]

    @property
    def failed(self) -> dict[str, str]:
        """The scenes that failed, and why."""
        return {scene.name: scene.reason for scene in self.scenes if scene.status == "failed"}

    @property
    def table(self) -> pd.DataFrame:
        """One row a scene: status, extent, pixel size, valid share, warnings, reason."""
        rows = {
            scene.name: {
                "status": scene.status,
                **(scene.grid or {}),
                "valid": (scene.statistics or {}).get("valid"),
                "warnings": "; ".join(scene.warnings),
                "reason": scene.reason,
            }
            for scene in self.scenes
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("scene")

    @property
    def statistics(self) -> pd.DataFrame:
        """One row a scene and layer: share, mean, std, min, max and percentiles."""
        rows = {}
        for scene in self.scenes:
            for layer, found in (scene.statistics or {}).get("layers", {}).items():
                ranks = {f"p{rank}": value for rank, value in found.get("percentiles", {}).items()}
                plain = {key: value for key, value in found.items() if key != "percentiles"}
                rows[scene.name, layer] = plain | ranks
        index = pd.MultiIndex.from_tuples(rows, names=["scene", "layer"]) if rows else None
        return pd.DataFrame(list(rows.values()), index=index)

    @property
    def dsm_scales(self) -> pd.DataFrame:
        """One row a scene, one column a chip size: the DSM scale, metres."""
        rows = {
            scene.name: {int(k): v for k, v in scene.statistics.get("dsm_scale", {}).items()}
            for scene in self.scenes
            if scene.statistics is not None
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("scene")

    def __str__(self) -> str:
        return str(self.table.to_string())

    def _repr_html_(self) -> str:
        return str(self.table.to_html())


def build(
    config: str | Path | Mapping[str, Any],
    store: Any,
    *,
    overwrite: bool = False,
    at_once: int = 2,
    tell: Callable[[SceneReport], None] | None = None,
) -> BuildReport:
    """Return what became of each scene that a configuration lists; stacks and writes them all.

    Computes on the active Dask client, or else in threads; a scene is cut into chunks, so that one
    large scene keeps all workers busy as well as many small ones do. Of a scene that is being
    written memory depends on its chunks alone. A scene that fails does not lose the others.

    Parameters
    ----------
    config
        A YAML file, or what is in it (a mapping). See the notes.
    store
        The Zarr store: a path, a URL that fsspec knows, or any Zarr store. One group a scene.
    overwrite
        Whether scenes that were finished of other inputs or options are built anew. Without it
        they fail, and stay as they are. A finished scene of the same ones is never built again; a
        half-written one always.
    at_once
        How many scenes are under way at a time: while one waits for its last chunk, the next
        begins.
    tell
        Is called with each scene's report as soon as there is one.

    Returns
    -------
    BuildReport
        ``failed`` says which scenes failed and why, ``table``, ``statistics`` and ``dsm_scales``
        are pandas tables.

    Raises
    ------
    FileNotFoundError
        There is no such configuration.
    ValueError
        The configuration is wrong; the message names the scene, the key, what came and what was
        wanted. Nothing has been built then.

    Notes
    -----
    A configuration, all but ``scenes`` optional::

        stack: {crs: "EPSG:32610", resolution: 1.0}  # options of deepdem.stack
        prepare: {error_max_m: 10}                   # options of ds.deepdem.prepare
        write: {}                                    # options of ds.deepdem.to_zarr
        scenes:
          baker_2015:
            layers:
              dsm: baker/run-DEM.tif                 # paths start from the YAML's folder
              ortho_left: "baker/*_left_ortho.tif"   # a glob that matches one file
              lidar_dsm: {path: lidar.tif, band: 1}
            stack: {like: ortho_left}                # goes before what stands above
          glacier:
            asp: {folder: stereo/run7, dem: "*-DEM.tif"}   # as deepdem.open_asp; deepdem: as
            layers: {lidar_dsm: ../lidar.tif}              # open_deepdem; more layers beside
          "rainier_*":                               # one scene a folder, named by it
            folder: runs/*                           # paths start from there; without layers:
                                                     # files named like their layers (dsm.tif)

    Examples
    --------
    >>> report = deepdem.build("scenes.yaml", "scenes.zarr")
    >>> report.table[["status", "valid"]], report.failed
    """
    scenes = read_config(config)
    target = str(store) if isinstance(store, Path) else store
    zarr.open_group(target, mode="a")  # two scenes at once must not both make it
    reports: dict[str, SceneReport] = {}
    with _shared_threads(), ThreadPoolExecutor(max_workers=max(1, at_once)) as pool:
        pending = {pool.submit(_build_one, s, target, overwrite): s.name for s in scenes}
        try:
            for done in as_completed(pending):
                report = _report_of(pending[done], done)
                reports[report.name] = report
                if tell is not None:
                    tell(report)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return BuildReport(tuple(reports[scene.name] for scene in scenes))


@contextlib.contextmanager
def _shared_threads() -> Iterator[None]:
    """Let scenes that are under way together share one pool of Dask's threads."""
    schedule, client = active_scheduler()
    if client is not None or schedule is not dask.threaded.get or dask.config.get("pool", None):
        yield
        return
    workers = dask.config.get("num_workers", None) or dask.system.CPU_COUNT
    with ThreadPoolExecutor(workers) as pool, dask.config.set(pool=pool):
        yield


def _report_of(name: str, done: Future[SceneReport]) -> SceneReport:
    # Whatever went wrong is that scene's reason, and all of it goes to the log.
    error = done.exception()
    if error is None:
        return done.result()
    log.error("scene %r failed", name, exc_info=error)
    text = " ".join(str(error).split()) or "no message"
    known = isinstance(error, ValueError | FileNotFoundError | FileExistsError)
    return SceneReport(name, "failed", text if known else f"{type(error).__name__}: {text}")


def _build_one(scene: SceneConfig, store: Any, overwrite: bool) -> SceneReport:
    recipe = scene.recipe(scene.sources())
    if is_complete(store, scene.name):
        there = open_scene(store, scene.name)
        changed = _changed(there, recipe)
        if not changed:
            return _described(scene.name, "there", there, ())
        if not overwrite:
            raise FileExistsError(
                f"the finished scene {scene.name!r} was made of other inputs or options "
                f"({', '.join(changed)}): pass overwrite=True (--overwrite) to build it anew, or "
                "give it another name"
            )
    with _RECORDING, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        ds = prepare(scene.open(), **scene.prepare)
    ds = noted(ds, "build", token=token_of(recipe), recipe=recipe)
    scene_to_zarr(ds, store, group=scene.name, overwrite=overwrite, **scene.write)
    # Ours are plain ones; other libraries' are classes of their own.
    words = dict.fromkeys(str(w.message) for w in said if w.category is UserWarning)
    for other in (w for w in said if w.category is not UserWarning):
        log.debug("scene %r: %s", scene.name, other.message)
    return _described(scene.name, "built", open_scene(store, scene.name), tuple(words))


def _changed(there: xr.Dataset, recipe: Mapping[str, Any]) -> list[str]:
    """Return the words for what differs from the recipe of a finished scene."""
    before = there.attrs.get(PROVENANCE, {}).get("build", {})
    if before.get("token") == token_of(dict(recipe)):
        return []
    old = before.get("recipe")
    if not isinstance(old, Mapping):
        return ["it was not built from a configuration"]
    words = []
    for section, new in recipe.items():
        was = old.get(section, {})
        keys = [key for key in {**was, **new} if was.get(key) != new.get(key)]
        words += [f"{section}: {key}" for key in keys]
    return words or ["the way they are written"]


def _described(name: str, status: str, ds: xr.Dataset, said: Sequence[str]) -> SceneReport:
    grid: Any = check_scene(ds)
    extent = grid.boundingbox
    found = stored_statistics(ds)
    place = {
        "rows": grid.shape.y,
        "columns": grid.shape.x,
        **{side: getattr(extent, side) for side in ("left", "bottom", "right", "top")},
        "crs": _name(grid.crs.proj),
        "pixel_size": grid.resolution.x,
        "pixel_size_m": None if found is None else found["pixel_size_m"],
    }
    odd = [] if found is None else list(_odd(found))
    return SceneReport(name, status, "", place, found, (*said, *odd))


def _name(crs: Any) -> str:
    code = crs.to_authority(min_confidence=100)
    return ":".join(code) if code else str(crs.name)


def _odd(found: Mapping[str, Any]) -> Iterator[str]:
    """Give what is odd about a scene's statistics, in words."""
    for layer, values in found["layers"].items():
        if "mean" not in values:
            continue
        if values["share"] == 0:
            yield f"{layer} has no value anywhere"
        elif values["std"] == 0:
            yield f"{layer} is {values['mean']:g} everywhere"
    valid = found.get("valid")
    if valid is not None and valid < _FEW:
        yield f"{valid:.1%} of the pixels are valid" if valid else "no pixel is valid"
    if "dsm" in found["layers"] and not found.get("dsm_scale"):
        yield "no chip of 64 pixels or more is half valid: it cannot be trained on"

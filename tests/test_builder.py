"""Many scenes into one store: from real files, resumable, none lost by another's failure."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import yaml
import zarr
from dask.callbacks import Callback
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_zeros
from typer.testing import CliRunner

import deepdem
from deepdem.cli import app
from deepdem.config import read_config
from deepdem.provenance import PROVENANCE, json_safe
from deepdem.statistics import STATISTICS

RASTERS = ("dsm", "ortho_left", "ortho_right", "triangulation_error", "red", "nir", "lidar_dsm")


@pytest.fixture(scope="module")
def rasters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of GeoTIFFs, their layers on grids of their own."""
    base = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("north", "south")):
        scene = deepdem.synthetic_scene((150, 140), seed=seed).compute()
        (base / name).mkdir()
        for layer in RASTERS:
            part = scene[layer].isel(y=slice(3, None)) if layer == "dsm" else scene[layer]
            part.rio.to_raster(base / name / f"run-{layer}.tif", compress="deflate")
    return base


@pytest.fixture
def base(rasters: Path, tmp_path: Path) -> Path:
    shutil.copytree(rasters, tmp_path / "runs")  # with the times of change
    return tmp_path


def layers(folder: str) -> dict[str, str]:
    return {name: f"{folder}*-{name}.tif" for name in RASTERS}


def written(base: Path, config: dict[str, Any]) -> Path:
    path = base / "scenes.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def two(base: Path, **more: Any) -> Path:
    scenes = {name: {"layers": layers(f"runs/{name}/")} for name in ("north", "south")}
    config: dict[str, Any] = {"stack": {"like": "dsm", "chunks": 64}, "scenes": scenes}
    return written(base, {**config, **more})


def times(store: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}


# --- the work ------------------------------------------------------------------------------------


def test_the_command_builds_what_the_python_calls_would(base: Path) -> None:
    two(base, prepare={"add": ["slope"], "equalise_orthos": {"tile_px": 64}})
    store = base / "scenes.zarr"
    run = CliRunner().invoke(app, ["build", str(base / "scenes.yaml"), str(store)])
    assert run.exit_code == 0, run.output
    for word in ("north", "south", "built", "1 m", "valid", "std"):
        assert word in run.output
    tree = deepdem.open_scenes(store)
    assert list(tree.children) == ["north", "south"]
    for name in tree.children:
        scene = tree[name].to_dataset()
        files = {layer: base / "runs" / name / f"run-{layer}.tif" for layer in RASTERS}
        wanted = deepdem.stack(files, like="dsm").deepdem.prepare(
            add=["slope"], equalise_orthos={"tile_px": 64}
        )
        assert {str(n) for n in scene.data_vars} == {*RASTERS, "ndvi", "slope", "valid"}
        for layer in scene.data_vars:
            np.testing.assert_allclose(scene[layer], wanted[layer], atol=1e-5)
        assert scene.sizes == {"y": 147, "x": 140}


def test_a_scene_knows_where_it_comes_from(base: Path) -> None:
    report = deepdem.build(two(base), base / "s.zarr")
    ds = deepdem.open_scene(base / "s.zarr", "north")
    said = ds.attrs[PROVENANCE]
    assert json.loads(json.dumps(ds.attrs)) == ds.attrs
    assert said["deepdem"] == deepdem.__version__
    assert said["stack"]["layers"]["dsm"].endswith("run-dsm.tif")
    assert said["build"]["recipe"]["stack"] == {"like": "dsm", "chunks": 64}
    assert said["build"]["recipe"]["layers"]["dsm"][0] == "runs/north/run-dsm.tif"
    assert said["prepare"]["equalise_orthos"] is True
    found = ds.attrs[STATISTICS]
    row = report.statistics.loc["north", "dsm"]
    assert row["mean"] == found["layers"]["dsm"]["mean"] == pytest.approx(
        float(ds.dsm.mean()), rel=1e-5
    )  # fmt: skip
    assert report.dsm_scales.loc["north", 64] == pytest.approx(
        ds.deepdem.dsm_scale(size=64), rel=1e-4
    )
    table = report.table
    assert table.loc["south", "rows"] == 147
    assert table.loc["south", "pixel_size"] == 1.0
    assert table.loc["south", "top"] == float(ds.y[0]) + 0.5
    assert table.loc["south", "valid"] == pytest.approx(float(ds.valid.mean()), abs=0.2)
    assert "north" in str(report)
    assert "<table" in report._repr_html_()


def test_what_is_done_is_left_alone_and_the_rest_is_redone(base: Path) -> None:
    config, store = two(base), base / "s.zarr"
    deepdem.build(config, store)
    before = times(store)
    again = deepdem.build(config, store)
    assert [s.status for s in again.scenes] == ["there", "there"]
    assert times(store) == before
    assert again.scenes[0].statistics is not None
    # One is half-written: as a crash leaves it.
    group = zarr.open_group(store, path="north", mode="r+")
    group.attrs["deepdem_complete"] = False
    third = deepdem.build(config, store)
    assert [s.status for s in third.scenes] == ["built", "there"]
    after = times(store)
    assert all(after[p] == before[p] for p in before if "/south/" in p)
    assert any(after[p] != before[p] for p in before if "/north/" in p)


def test_a_changed_scene_is_refused_or_built_anew(base: Path) -> None:
    config, store = two(base), base / "s.zarr"
    deepdem.build(config, store)
    os.utime(base / "runs/north/run-dsm.tif", ns=(1, 1))
    before = times(store)
    refused = deepdem.build(config, store)
    assert [s.status for s in refused.scenes] == ["failed", "there"]
    assert "layers: dsm" in refused.failed["north"]
    assert "--overwrite" in refused.failed["north"]
    assert times(store) == before
    anew = deepdem.build(two(base, prepare={"add": ["slope"]}), store, overwrite=True)
    assert [s.status for s in anew.scenes] == ["built", "built"]
    assert "slope" in deepdem.open_scene(store, "south")
    moved = deepdem.build(two(base), store)
    assert "prepare: add" in moved.failed["south"]


def test_a_scene_that_fails_does_not_lose_the_others(base: Path) -> None:
    (base / "runs/north/run-dsm.tif").unlink()
    (base / "runs/south/run-red.tif").write_bytes(b"no raster")
    scenes = {
        "lost": {"layers": layers("runs/north/")},
        "broken": {"layers": layers("runs/south/")},
        "several": {"layers": {"dsm": "runs/south/*.tif"}},
        "good": {"layers": {"dsm": "runs/south/run-dsm.tif"}},
    }
    path = written(base, {"scenes": scenes})
    run = CliRunner().invoke(app, ["build", str(path), str(base / "s.zarr")])
    assert run.exit_code == 1
    output = " ".join(run.output.split())
    assert "3 of 4 scenes failed" in output
    report = deepdem.build(path, base / "s.zarr")
    assert list(report.failed) == ["lost", "broken", "several"]
    assert "nothing matches 'runs/north/*-dsm.tif'" in report.failed["lost"]
    assert "'red'" in report.failed["broken"]
    assert "matches 7 files" in report.failed["several"]
    assert [s.status for s in report.scenes] == ["failed"] * 3 + ["there"]
    assert list(deepdem.open_scenes(base / "s.zarr").children) == ["good"]


def test_a_failure_in_the_middle_of_writing_leaves_a_half_written_scene(base: Path) -> None:
    path, store = two(base), base / "s.zarr"
    whole = (base / "runs/north/run-lidar_dsm.tif").read_bytes()
    torn = base / "runs/north/run-lidar_dsm.tif"
    torn.write_bytes(whole[: len(whole) // 2] + b"\xff" * (len(whole) // 2))
    report = deepdem.build(path, store)
    assert [s.status for s in report.scenes] == ["failed", "built"]
    assert list(deepdem.open_scenes(store).children) == ["south"]
    torn.write_bytes(whole)
    report = deepdem.build(path, store)
    assert [s.status for s in report.scenes] == ["built", "there"]


def test_one_scene_a_folder_and_layers_by_their_files_names(base: Path) -> None:
    for file in base.glob("runs/*/run-*.tif"):
        file.rename(file.with_name(file.name.removeprefix("run-")))
    (base / "runs/notes").write_text("no folder")
    path = written(base, {"scenes": {"baker_*": {"folder": "runs/*"}}})
    report = deepdem.build(path, base / "s.zarr")
    assert report.failed == {}
    assert list(deepdem.open_scenes(base / "s.zarr").children) == ["baker_north", "baker_south"]
    starred = {"scenes": {"*": {"folder": "runs/*", "layers": {"dsm": "ds?.tif"}}}}
    (north, south) = read_config(written(base, starred))
    assert (north.name, south.name) == ("north", "south")
    assert north.sources() == {"dsm": str(base / "runs/north/dsm.tif")}


def test_stereo_runs_as_they_come(base: Path) -> None:
    run = base / "stereo"
    shutil.copytree(base / "runs/north", run)
    (run / "run-dsm.tif").rename(run / "run-DEM.tif")
    (run / "run-triangulation_error.tif").rename(run / "run-IntersectionErr.tif")
    old = base / "final"
    old.mkdir()
    for name, theirs in (("dsm", "asp_dsm"), ("ortho_left", "ortho_left")):
        shutil.copy(base / f"runs/south/run-{name}.tif", old / f"final_{theirs}.tif")
    scenes = {
        "asp": {"asp": "stereo", "layers": {"lidar_dsm": "run-lidar_dsm.tif"}},
        "old": {"deepdem": {"folder": "final", "equalised": False}},
    }
    config = written(base, {"stack": {"chunks": 64}, "scenes": scenes})
    report = deepdem.build(config, base / "s.zarr")
    assert report.failed == {}
    asp, old_scene = (deepdem.open_scene(base / "s.zarr", name) for name in scenes)
    assert {"dsm", "triangulation_error", "lidar_dsm", "valid"} <= set(asp.data_vars)
    assert asp.dsm.attrs["vertical_reference"] == "ellipsoid"
    assert "ortho_left" in old_scene
    assert old_scene.ortho_left.attrs["equalised"].startswith("clahe")
    assert [s.status for s in deepdem.build(config, base / "s.zarr").scenes] == ["there", "there"]
    scenes["old"] = {"deepdem": "final"}
    written(base, {"stack": {"chunks": 64}, "scenes": scenes})
    assert "folder: deepdem" in deepdem.build(config, base / "s.zarr").failed["old"]


@pytest.mark.parametrize("chunks", [64, 100])
def test_any_chunks_give_the_same_layers(base: Path, chunks: int) -> None:
    options = {"add": ["slope"], "equalise_orthos": {"tile_px": 48}}
    for size, store in ((chunks, "one.zarr"), (2048, "whole.zarr")):
        path = two(base, stack={"like": "dsm", "chunks": size}, prepare=options)
        assert deepdem.build(path, base / store).failed == {}
    for name in ("north", "south"):
        one, whole = (deepdem.open_scene(base / s, name) for s in ("one.zarr", "whole.zarr"))
        for layer in whole.data_vars:
            np.testing.assert_allclose(one[layer], whole[layer], rtol=0, atol=1e-5)


def test_odd_scenes_are_told_of(base: Path) -> None:
    scene = deepdem.synthetic_scene((80, 80), seed=3).compute()
    scene["dsm"].where(scene.x < scene.x[10]).rio.to_raster(base / "dsm.tif")
    (scene["ortho_left"] * 0 + 7).rio.to_raster(base / "ortho_left.tif")
    (scene["lidar_dsm"] * np.nan).rio.to_raster(base / "lidar_dsm.tif")
    config = {"scenes": {"odd": {"layers": {
        name: f"{name}.tif" for name in ("dsm", "ortho_left", "lidar_dsm")
    }}}}  # fmt: skip
    (report,) = deepdem.build(written(base, config), base / "s.zarr").scenes
    words = " | ".join(report.warnings)
    assert "lidar_dsm has no value anywhere" in words
    assert "ortho_left is 0 everywhere" in words
    assert "no chip of 64 pixels" in words


@pytest.mark.slow
def test_on_a_cluster_it_is_the_same_scene(base: Path) -> None:
    from distributed import Client, LocalCluster

    config = two(base)
    deepdem.build(config, base / "threads.zarr")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        report = deepdem.build(config, base / "cluster.zarr")
    assert report.failed == {}
    for name in ("north", "south"):
        one, other = (deepdem.open_scene(base / s, name) for s in ("threads.zarr", "cluster.zarr"))
        xr.testing.assert_equal(one, other)


def test_nothing_but_headers_is_read_before_a_scene_is_written(base: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    # What cannot be computed fails scene by scene, and only then.
    with dask.config.set(scheduler=refuse):
        report = deepdem.build(two(base), base / "s.zarr")
    assert set(report.failed.values()) == {"AssertionError: computed"}


class _Held(Callback):  # type: ignore[misc]  # Dask is in part untyped
    """The most bytes of arrays that Dask keeps between tasks."""

    peak = 0

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        held = [v.nbytes for v in state["cache"].values() if isinstance(v, np.ndarray)]
        self.peak = max(self.peak, sum(held))


def test_what_is_held_does_not_grow_with_the_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files on other grids, equalised, with valid: one chunk of all layers, and no more."""
    monkeypatch.setattr("deepdem.store.SHARD_PX", 256)
    chunk, peaks = 256 * 256 * 4, []
    for width in (512, 1536):
        scene = deepdem.synthetic_scene((64, 64), seed=4).compute()
        fine = GeoBox.from_bbox((580000, 5390000, 580000 + width, 5390000 + width),
                                crs=32610, resolution=1)  # fmt: skip
        for name in ("dsm", "ortho_left", "ortho_right", "red", "nir"):
            values = np.tile(scene[name].fillna(5).values, (width // 64, width // 64))
            box = fine.pad(16) if name == "dsm" else fine
            if name in ("red", "nir"):  # one block of them is under all of the scene
                values, box = values[::32, ::32], fine.zoom_out(32)
            values = np.pad(values, 16, "edge") if name == "dsm" else values
            xr_zeros(box, dtype="float32").copy(data=values).rio.to_raster(
                tmp_path / f"{name}.tif", tiled=True, blockxsize=128, blockysize=128
            )
        sources = {name: "*" + name + ".tif" for name in ("dsm", "ortho_left", "ortho_right",
                                                          "red", "nir")}  # fmt: skip
        config = {"scenes": {"a": {"layers": sources}}, "stack": {"like": "ortho_left",
                                                                  "chunks": 256}}  # fmt: skip
        with _Held() as held, dask.config.set(scheduler="sync"):
            report = deepdem.build(written(tmp_path, config), tmp_path / f"{width}.zarr")
        assert report.failed == {}
        peaks.append(held.peak / chunk)
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[1] < 10


# --- the configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "lists no scene"),
        ([], "the configuration: wanted keys and values"),
        ({"scene": {}}, "'scene' is not known: did you mean scenes"),
        ({"scenes": {"a": {"layer": {}}}}, "scene 'a': 'layer' is not known: did you mean layers"),
        ({"scenes": {"a": {}}}, "scene 'a': wanted layers"),
        ({"scenes": {"a": {"layers": {"dsm": 3}}}}, "scene 'a', layers: dsm: wanted a path"),
        ({"scenes": {"a": {"layers": {"dsm": {"path": "x", "band": "1"}}}}},
         "scene 'a', layers: dsm, band: wanted a whole number, got '1'"),
        ({"scenes": {"a": {"layers": {"dsm": "x"}, "stack": {"resoluton": 1}}}},
         "scene 'a', stack: 'resoluton' is not known: did you mean resolution"),
        ({"scenes": {"a": {"layers": {"dsm": "x"}, "stack": {"chunks": True}}}},
         "scene 'a', stack: chunks: wanted a whole number, got True"),
        ({"prepare": {"equalise_orthos": {"tiles": 3}}, "scenes": {"a": {"layers": {"dsm": "x"}}}},
         "prepare: equalise_orthos: 'tiles' is not known"),
        ({"scenes": {"a/b": {"layers": {"dsm": "x"}}}}, "no /"),
        ({"scenes": {"*": {"layers": {"dsm": "x"}}}}, "a folder's name: add folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_is_built(
    config: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r".") as caught:
        deepdem.build(path, tmp_path / "s.zarr")
    assert words in str(caught.value)
    assert not (tmp_path / "s.zarr").exists()


def test_yaml_that_is_none_or_says_a_thing_twice(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, words in (("a: [", "is no YAML"), ("scenes: {a: {}, a: {}}", "'a' stands twice"),
                        ("a: !!python/object/apply:os.system [x]", "is no YAML")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_config(path)
    with pytest.raises(FileNotFoundError, match="no such configuration"):
        read_config(tmp_path / "none.yaml")


def test_a_scene_s_options_go_before_those_of_all() -> None:
    scene = {"layers": {"dsm": "x.tif"}, "stack": {"chunks": 64, "bounds": [0, 0, 1, 1]}}
    (found,) = read_config({"stack": {"like": "dsm", "chunks": 32}, "scenes": {"a": scene}})
    assert found.stack == {"like": "dsm", "chunks": 64, "bounds": (0, 0, 1, 1)}


def test_json_safe_keeps_what_json_has() -> None:
    value = {
        "a": np.float32(1.5),
        2: (Path("x"), np.arange(2)),
        "n": float("nan"),
        "d": xr.Dataset(),
    }
    assert json_safe(value) == {"a": 1.5, "2": ["x", [0, 1]], "n": None, "d": "Dataset {}"}


def test_the_tutorial_s_configuration_runs_on_what_its_script_makes(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "tutorials" / "scenes"
    shutil.copy(folder / "scenes.yaml", tmp_path)
    runpy.run_path(str(folder / "make_rasters.py"))["main"](tmp_path / "rasters")
    report = deepdem.build(tmp_path / "scenes.yaml", tmp_path / "scenes.zarr")
    assert report.failed == {}
    assert [s.name for s in report.scenes] == ["valley", "plain_flat_1", "plain_flat_2"]
    assert [w for s in report.scenes for w in s.warnings] == []
    valley = deepdem.open_scene(tmp_path / "scenes.zarr", "valley")
    assert float(valley.valid.mean()) > 0.8
    assert float(valley.triangulation_error.max()) <= 5
    assert 0.2 < float(valley.ndvi.mean()) < 0.9
    assert float(valley.canopy_height.min()) > -1

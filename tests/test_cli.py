from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import rasterio
from typer.testing import CliRunner

import deepdem
from deepdem.cli import app
from deepdem.sources.folder import find_layers

run = CliRunner()


def _folder(scene, folder):
    folder.mkdir()
    for name in ("dsm", "ortho_left", "ortho_right", "triangulation_error", "lidar_dsm"):
        scene[name].rio.to_raster(folder / f"{name}.tif")
    (folder / "notes.txt").write_text("not a raster")
    scene.red.rio.to_raster(folder / "something_else.tif")
    return folder


def test_find_layers(scene, tmp_path):
    folder = _folder(scene, tmp_path / "in")
    assert list(find_layers(folder)) == [
        "dsm", "ortho_left", "ortho_right", "triangulation_error", "lidar_dsm"
    ]  # fmt: skip
    (folder / "dsm.tif").rename(folder / "dsm_initial.tif")
    assert find_layers(folder)["dsm"].endswith("dsm_initial.tif")
    (folder / "dsm_initial.tif").unlink()
    with pytest.raises(ValueError, match=r"holds no initial DSM: name it dsm.tif"):
        find_layers(folder)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_layers(tmp_path / "none")


@pytest.mark.slow
def test_the_demo_on_rasters_and_the_commands_on_what_it_leaves(tmp_path):
    """The whole path on files, short: everything that is promised is there and agrees."""
    scene = deepdem.synthetic_scene((160, 400), seed=2).compute()
    folder, out = _folder(scene, tmp_path / "in"), tmp_path / "out"
    options = ["--scene", str(folder), "--out", str(out), "--minutes", "0.1", "--workers", "1"]
    result = run.invoke(app, ["demo", *options, "--chip-size", "32"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for word in ("MAE", "NMAD", "LE90", "bias", "count", "dsm", "refined"):
        assert word in result.output
    names = {
        "scene.zarr",
        "model.safetensors",
        "refined.tif",
        "demo.png",
        "table.csv",
        "report.html",
    }
    assert {path.name for path in out.iterdir()} == names
    table = pd.read_csv(out / "table.csv", index_col=0)
    assert table.loc["refined", "MAE"] != table.loc["dsm", "MAE"]

    # The figures in the table are those of what was written, against the files that came in.
    unseen = deepdem.open_scene(out / "scene.zarr", "refined")
    assert unseen.x[0] == scene.x[260 + 32]  # 65 % of 400, and a guard of one chip
    surface = deepdem.stack({"refined": out / "refined.tif"}, like=unseen).refined
    truth = deepdem.stack({"dsm": scene.dsm, "lidar_dsm": scene.lidar_dsm}, like=unseen)
    again = truth.deepdem.evaluate(surface)
    assert again.loc["refined", "MAE"] == pytest.approx(table.loc["refined", "MAE"], abs=1e-4)
    with rasterio.open(out / "refined.tif") as file:
        assert file.crs == scene.rio.crs
        assert file.profile["tiled"]

    model, store = str(out / "model.safetensors"), str(out / "scene.zarr")
    shown = run.invoke(app, ["info", model], catch_exceptions=False).output
    assert "DSM scale" in shown
    assert "triangulation_error" in shown
    whole = str(tmp_path / "whole.tif")
    arguments = ["refine", store, model, whole, "--group", "scene"]
    assert run.invoke(app, arguments, catch_exceptions=False).exit_code == 0
    with rasterio.open(whole) as file:
        assert file.shape == (160, 400)
    both = str(tmp_path / "both.zarr")
    arguments = ["refine", store, model, both, "--group", "scene", "--workers", "1", "--tta",
                 "--uncertainty", "--fill-voids", "--precision", "float32", "--overlap",
                 "0.5"]  # fmt: skip
    assert run.invoke(app, arguments, catch_exceptions=False).exit_code == 0
    written = deepdem.open_scene(both)
    wanted = deepdem.open_scene(store, "scene").deepdem.refine(
        model, tta=True, uncertainty=True, fill_voids=True, precision="float32", overlap=0.5
    )
    for name in ("refined", "refined_std", "filled"):
        np.testing.assert_allclose(written[name], wanted[name], atol=1e-3)
    arguments = ["evaluate", store, whole, "--group", "scene", "--by", "slope"]
    printed = run.invoke(app, arguments, catch_exceptions=False).output
    assert "NMAD" in printed
    assert "all" in printed


def test_the_demo_says_what_is_missing(scene, tmp_path):
    folder = _folder(scene, tmp_path / "in")
    arguments = ["demo", "--scene", str(folder), "--out", str(tmp_path / "o"), "--chip-size", "128"]
    with pytest.raises(ValueError, match="too small for chips of 128 px"):
        run.invoke(app, arguments, catch_exceptions=False)
    (folder / "lidar_dsm.tif").unlink()
    with pytest.raises(ValueError, match=r"holds no lidar_dsm.tif: training needs the truth"):
        run.invoke(
            app, ["demo", "--scene", str(folder), "--out", str(tmp_path / "p")],
            catch_exceptions=False,
        )  # fmt: skip


def test_an_error_of_the_user_s_is_a_line_not_a_traceback(tmp_path, monkeypatch, capsys):
    from deepdem.cli import main

    monkeypatch.setattr("sys.argv", ["deepdem", "info", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "Error:" in capsys.readouterr().err

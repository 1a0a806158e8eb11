"""The report: one file with all in it, and nothing of a stranger's that a browser would run."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import deepdem
from deepdem.cli import app

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def scene():
    return deepdem.synthetic_scene((128, 160), seed=3).deepdem.prepare().compute()


@pytest.fixture(scope="module")
def refined(scene):
    better = (scene.dsm + scene.lidar_dsm) / 2
    return better.rename("refined").assign_attrs(deepdem_precision="float32")


def test_it_says_by_how_much_and_where_it_comes_from(scene, refined, tmp_path):
    path = scene.deepdem.report(refined, tmp_path / "report.html", title="Baker")
    text = path.read_text(encoding="utf-8")
    table = scene.deepdem.evaluate(refined)
    for surface in ("dsm", "refined"):
        assert f"{table.MAE[surface]:.3f}" in text
        assert f"{table.NMAD[surface]:.3f}" in text
    assert f"{table.MAE['dsm']:.2f} m before, {table.MAE['refined']:.2f} m after (50% less)" in text
    for by in ("slope", "ndvi", "canopy"):
        assert f"Errors by {by}" in text
    assert "<h1>Baker</h1>" in text
    assert "deepdem_precision" in text
    assert "128 by 160 pixels, EPSG:" in text
    assert not list(tmp_path.glob(".*"))


def test_it_needs_no_other_file_and_runs_nothing(scene, refined, tmp_path):
    strange = scene.assign_attrs({"title": HOSTILE, HOSTILE: HOSTILE})
    strange["dsm"] = strange.dsm.assign_attrs(source=HOSTILE)
    path = strange.deepdem.report({HOSTILE: refined}, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/png)", text)


def test_strata_without_layers_are_left_out(scene, refined, tmp_path):
    few = scene[["dsm", "lidar_dsm"]]
    text = few.deepdem.report(refined, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Errors by slope" in text
    assert "Errors by canopy" not in text
    assert "Errors by ndvi" not in text


def test_a_failed_report_leaves_the_old_one(scene, refined, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no layer 'lidar_x'"):
        scene.deepdem.report(refined, path, truth="lidar_x")
    assert path.read_text() == "old"


def test_from_a_shell(scene, refined, tmp_path):
    store, surface, out = (str(tmp_path / n) for n in ("s.zarr", "r.zarr", "report.html"))
    scene.deepdem.to_zarr(store, group="one")
    refined.to_dataset().assign_coords(spatial_ref=scene.spatial_ref).deepdem.to_zarr(surface)
    run = CliRunner().invoke(app, ["report", store, surface, out, "--group", "one"])
    assert run.exit_code == 0, run.output
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "50% less" in text

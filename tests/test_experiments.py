from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import deepdem
from deepdem.cli import app
from deepdem.experiments import SceneData, draw_comparison, read_sweep

TUTORIALS = Path(__file__).parents[1] / "tutorials" / "train"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:Checkpoint directory",
    "ignore:.*number of training batches", "ignore:.*is zero", "ignore:.*weights_only",
    "ignore:.*callbacks used to create", "ignore:.*eval mode at the start",
)  # fmt: skip
run = CliRunner()

CONFIG = """
model:
  layers: [dsm, ortho_left, ortho_right]
  architecture: resdepth
  options: {start_kernel: 4, depth: 2}
  chip_size: 32
data:
  scenes: [%s]
  unseen: right 40 %%
  batch_size: 8
  split: top 60 %%
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: pytorch_lightning.callbacks.EarlyStopping
      init_args: {monitor: val_loss, patience: 75, check_on_train_epoch_end: false}
"""


@pytest.fixture(scope="module")
def store(scene, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scenes") / "s.zarr"
    scene.deepdem.to_zarr(path, group="here")
    return f"{path}::here"


def _train(*arguments: object) -> str:
    result = run.invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_training_from_a_config_file(store, tmp_path):
    """A model, its table and its logs; overridden from the shell; and the card of the model."""
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(CONFIG % store)
    said = _train("--config", config, "--out", out, "--model.preset", "resdepth",
                  "--trainer.max_epochs", 2)  # fmt: skip
    assert "NMAD" in said
    model = deepdem.load_model(out / "model.safetensors")
    assert model.spec.training["recipe"]["learning_rate"] == 2e-4
    table = pd.read_csv(out / "table.csv", index_col=0)
    ds = deepdem.open_scene(*store.split("::"))
    # The unseen part: 40 % of 260 pixels; a guard of one chip lies before it.
    unseen = ds.isel(x=slice(156, None))
    again = unseen.deepdem.evaluate(unseen.deepdem.refine(model))
    assert again.loc["refined", "MAE"] == pytest.approx(table.loc["refined", "MAE"], abs=1e-4)
    (sheet,) = out.rglob("metrics.csv")
    assert "val_NMAD" in sheet.read_text().splitlines()[0]
    (kept,) = out.rglob("config.yaml")
    assert yaml.safe_load(kept.read_text())["model"]["preset"] == "resdepth"

    # A training that was stopped goes on, and one with more epochs too.
    _train("--config", kept, "--out", out, "--trainer.max_epochs", 3, "--ckpt_path",
           out / "checkpoints" / "last.ckpt")  # fmt: skip
    assert deepdem.load_model(out / "model.safetensors").spec.training["epochs"] == 3

    card = run.invoke(app, ["info", str(out / "model.safetensors")], catch_exceptions=False).output
    for word in ("initial stereo digital surface", "resdepth", "32 px, 32 m of ground", "bias",
                 "adam", "3 epochs", "parameters", "safetensors", "[m]"):  # fmt: skip
        assert word in card, card


LIGHTNING = """
model: {ema: 0.5}
trainer:
  max_epochs: 9
  precision: bf16-mixed
  accumulate_grad_batches: 2
  logger:
    - class_path: TensorBoardLogger
      init_args: {save_dir: %(out)s, name: board}
    - class_path: CSVLogger
      init_args: {save_dir: %(out)s, name: sheet}
  callbacks:
    - class_path: EarlyStopping
      init_args: {monitor: val_MAE, patience: 1, min_delta: 10}
    - class_path: LearningRateMonitor
    - class_path: ModelCheckpoint
      init_args: {dirpath: %(out)s/best, monitor: val_MAE, filename: "{epoch}"}
"""


@pytest.mark.slow
def test_callbacks_and_loggers_of_lightning_s_own(store, tmp_path):
    """Early stopping, checkpoints, loggers, precision and accumulation, all from YAML."""
    pytest.importorskip("tensorboard")
    config, more, out = tmp_path / "c.yaml", tmp_path / "more.yaml", tmp_path / "out"
    config.write_text(CONFIG % store)
    more.write_text(LIGHTNING % {"out": out})
    _train("--config", config, "--config", more, "--out", out)
    model = deepdem.load_model(out / "model.safetensors")
    assert model.spec.training["epochs"] == 2  # no epoch is ten metres better
    sheet = pd.read_csv(out / "sheet/version_0/metrics.csv")
    assert {"lr-AdamW", "train_MAE", "val_MAE"} <= set(sheet.columns)
    assert list((out / "board/version_0").glob("events*"))
    (best,) = (out / "best").iterdir()
    again = deepdem.DeepDEM.load_from_checkpoint(best)
    again.save(out / "best.safetensors")
    noted = deepdem.load_model(out / "best.safetensors").spec.training["validation"]
    assert noted["val_MAE"] == pytest.approx(sheet["val_MAE"].min(), rel=1e-5)
    with pytest.raises(ValueError, match=r"the checkpoint is for options=.*: pass options"):
        _train("--config", config, "--out", out, "--ckpt_path", best, "--model.options",
               "{start_kernel: 8, depth: 2}")  # fmt: skip


def test_a_validation_region_without_a_chip_is_told(store, tmp_path, caplog):
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG % store)
    _train("--config", config, "--out", tmp_path, "--data.split", "top 97 %")
    assert "no validation chip: the validation part of split is narrower" in caplog.text


@pytest.mark.slow
def test_a_sweep_is_resumed_run_by_run(store, tmp_path):
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    sweep = {"base": yaml.safe_load(CONFIG % store),
             "runs": [{"name": "both images"},
                      {"name": "one", "model": {"layers": ["dsm", "ortho_left"]}},
                      {"name": "ground", "model": {"target": "lidar_dtm"}}]}  # fmt: skip
    path.write_text(yaml.safe_dump(sweep))
    said = _train("--sweep", path, "--out", out, "--only", "one", "--limit", 0.1)
    assert "one: training" in said
    first = (out / "one" / "run.json").stat().st_mtime_ns
    assert len(pd.read_csv(out / "comparison.csv")) == 1
    said = " ".join(_train("--sweep", path, "--out", out, "--limit", 0.1).split())
    assert "one: done before" in said
    assert "both images: training" in said
    assert (out / "one" / "run.json").stat().st_mtime_ns == first
    table = pd.read_csv(out / "comparison.csv", index_col=0)
    assert list(table.index) == ["both images", "one", "ground"]
    assert table.loc["ground", "truth"] == "lidar_dtm"
    assert table.loc["ground", "initial MAE"] > table.loc["one", "initial MAE"]
    assert table.loc["one", "parameters"] < table.loc["both images", "parameters"]
    lines = (out / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("| run | truth | initial MAE | MAE |")
    assert len({line.count("|") for line in lines}) == 1
    assert (out / "comparison.png").stat().st_size > 10_000

    # One that was stopped in the middle goes on from its checkpoint; a changed one starts anew.
    (out / "one" / "run.json").unlink()
    assert "one: going on from" in " ".join(
        _train("--sweep", path, "--out", out, "--limit", 0.1).split()
    )
    sweep["runs"][1]["model"]["options"] = {"depth": 1}
    path.write_text(yaml.safe_dump(sweep))
    said = _train("--sweep", path, "--out", out, "--limit", 0.1, "--only", "one")
    assert "one: training" in said
    assert "going on" not in said


def test_the_configs_that_are_shipped_are_understood():
    """Each run of the sweep, and the quick one, is a model that can be built."""
    sweep = read_sweep(TUTORIALS / "experiments.yaml")
    assert list(sweep.runs) == [
        "chips of 128", "chips of 256", "chips of 512", "without NDVI", "ResDepth's U-Net",
        "ResNet-34", "ResNet-50", "DTM",
    ]  # fmt: skip
    quick = yaml.safe_load((TUTORIALS / "quick.yaml").read_text())
    for config in (*sweep.runs.values(), quick):
        model = dict(config["model"])
        assert "valid" in model["layers"] or config is quick
        if model.get("encoder") != "resnet50":  # as the others, and heavy
            deepdem.DeepDEM(
                **{k: float(v) if k == "learning_rate" else v for k, v in model.items()}
            )
    assert sweep.runs["without NDVI"]["data"] == sweep.runs["DTM"]["data"]
    assert "ndvi" not in sweep.runs["without NDVI"]["model"]["layers"]


def test_scenes_by_name(no_compute, store):
    with no_compute():
        data = SceneData(["synthetic:3:256x512", store], unseen="right 50 %", chip_size=64)
    assert [ds.sizes["x"] for ds in data.scenes] == [256 - 64, 130 - 64]
    assert [ds.sizes["x"] for ds in data.unseen] == [256, 130]
    assert SceneData(["synthetic:3:256x512"], unseen="left 50 %", guard_px=100).scenes[0].sizes[
        "x"
    ] == 156  # fmt: skip
    with pytest.raises(FileNotFoundError):
        SceneData(["nowhere.zarr"])


def test_what_is_wrong_with_a_sweep_is_said(tmp_path):
    path = tmp_path / "s.yaml"
    for text, match in (("- 1", "holds no list of runs"), ("runs: []", "holds no list of runs"),
                        ("runs: [{model: {}}]", "a name of its own, got None"),
                        ("runs: [{name: a}, {name: a}]", "got 'a'")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_sweep(path)
    path.write_text("runs: [{name: a}]")
    with pytest.raises(ValueError, match=r"\['b'\] are no runs: there are \['a'\]"):
        run.invoke(app, ["train", "--sweep", str(path), "--only", "b", "--out", str(tmp_path)],
                   catch_exceptions=False)  # fmt: skip
    with pytest.raises(ValueError, match="the file says all"):
        run.invoke(app, ["train", "--sweep", str(path), "--model.preset", "default"],
                   catch_exceptions=False)  # fmt: skip


def test_the_figure_of_a_comparison():
    table = pd.DataFrame(
        {"truth": ["lidar_dsm", "lidar_dtm"], "initial MAE": [1.5, 4.0], "MAE": [0.8, 1.2],
         "NMAD": [0.5, 0.9]}, index=["one", "ground"],
    )  # fmt: skip
    (ax,) = draw_comparison(table).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "ground (bare ground)"]
    assert {t.get_text() for t in ax.texts} == {"0.80", "1.20"}
    assert ax.get_xlim()[0] == 0
    assert ax.get_xlim()[1] > 4

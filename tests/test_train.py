from __future__ import annotations

import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import xarray as xr
from conftest import LAYERS

import deepdem
from deepdem.data import augmented

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:Checkpoint directory",
    "ignore:.*number of training batches", "ignore:.*is zero",
)  # fmt: skip


def _model(**options):
    torch.manual_seed(0)
    return deepdem.DeepDEM(
        LAYERS, architecture="resdepth", chip_size=32, options={"start_kernel": 8, "depth": 2},
        **{"learning_rate": 5e-3, **options},
    )  # fmt: skip


def _trainer(**options):
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **options})


def _data(scene, **options):
    return deepdem.ChipDataModule(scene, **{"chip_size": 32, "batch_size": 8, **options})


def test_it_trains_with_nothing_else_given_and_learns(scene, tmp_path):
    """Steps on half the scene take the error on the other half down, scale and all by itself."""
    model, data = _model(), _data(scene, split="left 50 %")
    _trainer(max_epochs=8).fit(model, data)
    assert model.dsm_scale == pytest.approx(
        scene.isel(x=slice(0, 130)).deepdem.dsm_scale(size=32), rel=1e-5
    )
    assert model.spec.pixel_size == pytest.approx(1.0, rel=1e-3)
    assert model.spec.training["scenes"] == ["Synthetic landscape with a simulated stereo DSM"]
    unseen = scene.isel(x=slice(170, None))
    table = unseen.deepdem.evaluate(unseen.deepdem.refine(model.eval()))
    assert table.loc["refined", "MAE"] < 0.9 * table.loc["dsm", "MAE"]
    model.save(tmp_path / "m.safetensors")
    again = unseen.deepdem.refine(tmp_path / "m.safetensors").compute()
    np.testing.assert_array_equal(again, unseen.deepdem.refine(model).compute())
    assert again.attrs["deepdem_target"] == "lidar_dsm"
    noted = deepdem.load_model(tmp_path / "m.safetensors").spec.training
    assert set(noted["validation"]) == {"val_MAE", "val_RMSE", "val_NMAD", "val_bias"}
    assert 0 < noted["bf16_rms_m"] < 1
    assert noted["augment"] == []


def test_the_same_seed_gives_the_same_chips_and_validation_is_never_changed(scene):
    def chips(seed, epoch=0):
        data = _data(scene, seed=seed, split="top 60 %", augment=("flip", "rotate"))
        trainer = _trainer(max_epochs=1, limit_train_batches=1)
        trainer.fit(_model(), data)
        train, val = data.train_dataloader(), data.val_dataloader()
        train.sampler.set_epoch(epoch)
        return [b["layers"] for b in train], [b["layers"] for b in val]

    one, val = chips(seed=1)
    same, val_same = chips(seed=1)
    other, val_other = chips(seed=2)
    later, _ = chips(seed=1, epoch=1)
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], other[0], equal_nan=True)
    assert not np.array_equal(one[0], later[0], equal_nan=True)
    for a, b, c in zip(val, val_same, val_other, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert val[0].shape[1:] == (6, 32, 32)  # the layers and the local level


def test_training_and_validation_never_share_a_pixel(scene):
    marked = scene.copy(deep=True)
    marked["dsm"] = marked.dsm * 0 + marked.x  # each chip says where it is
    marked["ndvi"] = marked.ndvi * 0 + marked.y
    data = _data(marked, split="left 60 %")
    _trainer(max_epochs=1, limit_train_batches=1).fit(_model(), data)
    edge = float(marked.x[156])
    seen = torch.cat([b["layers"][:, 0] for b in data.train_dataloader()])
    held = torch.cat([b["layers"][:, 0] for b in data.val_dataloader()])
    assert np.nanmax(seen) < edge
    assert np.nanmin(held) >= float(marked.x[156 + 32]) - 0.5


@pytest.mark.parametrize("cache", [True, False])
def test_chips_from_memory_and_from_zarr_are_the_same(scene, tmp_path, cache):
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    data = _data(deepdem.open_scene(tmp_path / "s.zarr"), cache=cache, split="left 50 %")
    _trainer(max_epochs=1, limit_train_batches=1).fit(_model(), data)
    total = sum(float(torch.nan_to_num(b["layers"]).double().sum()) for b in data.val_dataloader())
    reference = _data(scene, split="left 50 %")
    _trainer(max_epochs=1, limit_train_batches=1).fit(_model(), reference)
    wanted = sum(
        float(torch.nan_to_num(b["layers"]).double().sum()) for b in reference.val_dataloader()
    )
    assert total == wanted


def test_several_scenes_and_a_tree(scene):
    tree = xr.DataTree.from_dict({"a": scene, "b": scene.isel(y=slice(0, 150))})
    data = _data(tree)
    _trainer(max_epochs=1, limit_train_batches=1).fit(_model(), data)
    assert {region.scene for region in data.regions["train"]} == {0, 1}


def test_masked_pixels_do_not_count():
    model = _model(dsm_scale=2.0, centering="chip")
    from deepdem.data import Statistics

    model.fit_statistics(
        Statistics(9.0, 1.0, dict.fromkeys(LAYERS, 0.0), dict.fromkeys(LAYERS, 1.0), ("a",))
    )
    assert model.dsm_scale == 2.0  # the one that was given stays
    x, target = torch.randn(2, 5, 32, 32), torch.randn(2, 32, 32)
    target[:, :16] = torch.nan
    x[:, 0, 16:20] = torch.nan
    error, usable, _ = model._error({"layers": x, "target": target})
    assert usable.sum() == 2 * 12 * 32
    assert (error[~usable] == 0).all()
    model.log = lambda *_, **__: None
    loss = model.training_step({"layers": x, "target": target}, 0)
    assert torch.isfinite(loss)
    nothing = model.training_step({"layers": x, "target": target * torch.nan}, 0)
    assert nothing == 0
    nothing.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_predicted_scale_knows_where_the_errors_are(scene):
    """Its Laplace scale is larger where the errors are, in a part that training never saw."""
    model = _model(uncertainty=True)
    _trainer(max_epochs=10).fit(model, _data(scene, split="left 50 %"))
    unseen = scene.isel(x=slice(170, None))
    for tta in (True, False):
        both = unseen.deepdem.refine(model.eval(), uncertainty=True, tta=tta).compute()
        error = abs(both.refined - unseen.lidar_dsm).values.ravel()
        std = both.refined_std.values.ravel()
        assert both.refined_std.attrs["half_widths_from"] == "validation chips"
        for name, share, off in (("68", 0.68, 0.1), ("95", 0.95, 0.04)):
            half = both.refined_std.attrs[f"half_width_of_{name}_percent_interval"]
            inside = error[np.isfinite(error)] < half * std[np.isfinite(error)]
            assert inside.mean() == pytest.approx(share, abs=off)
    known = np.isfinite(error)
    assert (std[known] > 0).all()
    sure = std[known] < np.median(std[known])
    assert error[known][sure].mean() < 0.6 * error[known][~sure].mean()
    # Within two standard deviations lie most of them, and not all.
    assert 0.8 < np.mean(error[known] < 2 * std[known]) < 0.999


def test_forward_gives_heights():
    from conftest import fitted

    model = fitted()
    x = torch.randn(1, 5, 64, 64) + 100
    x[0, 0, 3, 4] = torch.nan
    with torch.no_grad():
        heights = model(x)
        np.testing.assert_allclose(heights, x[:, 0] + model.net(x))
    assert torch.isnan(heights).sum() == 1


def test_hyperparameters_are_plain_and_a_checkpoint_resumes(scene, tmp_path):
    model, data = _model(), _data(scene)
    trainer = _trainer(enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(model, data)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)  # no pickled class in it
    again = deepdem.DeepDEM.load_from_checkpoint(path)
    assert again.dsm_scale == model.dsm_scale
    resumed = _trainer(max_epochs=2)
    resumed.fit(_model(), _data(scene), ckpt_path=path)
    assert resumed.current_epoch == 2


def test_training_by_the_clock(scene):
    trainer = _trainer(max_epochs=-1, max_time=timedelta(seconds=4))
    model = _model()
    trainer.fit(model, _data(scene))
    assert trainer.global_step > 3
    assert model._progress() == pytest.approx(1, abs=0.1)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-3  # the schedule went by the clock


def test_a_preset_says_how_chips_are_changed(scene):
    """The recipe's optimizer, schedule and augmentation; what the data module was told stands."""
    model = _model(preset="deepdem2024")
    data, told = _data(scene), _data(scene, augment=["rotate"])
    trainer = _trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(model, data)
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)
    assert not isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert isinstance(
        trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    assert data.augment == ("flip", "swap")
    assert model.spec.training["augment"] == ["flip", "swap"]
    assert model.spec.training["recipe"]["optimizer"] == "adam"
    _trainer(max_epochs=1, limit_train_batches=1).fit(_model(preset="resdepth"), told)
    assert told.augment == ("rotate",)


def test_averaged_weights_are_validated_saved_and_resumed(scene, tmp_path):
    model = _model(ema=0.9)
    trainer = _trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, _data(scene, split="left 60 %"))
    (path,) = tmp_path.rglob("*.ckpt")
    content = torch.load(path, weights_only=True)
    name = "net.network.last_layer.weight"
    torch.testing.assert_close(content["state_dict"][name], model.state_dict()[name])
    assert not torch.equal(content["current_model_state"][name], content["state_dict"][name])
    resumed = _trainer(max_epochs=3)
    resumed.fit(_model(ema=0.9), _data(scene), ckpt_path=path)
    assert resumed.current_epoch == 3


@pytest.mark.parametrize(("encoder", "ema"), [("resnet34", 0.0), ("resnet18", 0.9)])
def test_a_training_of_a_dozen_steps_does_no_harm(scene, encoder, ema):
    """Statistics of normalisations that lag behind took a ResNet-34 tens of metres off."""
    torch.manual_seed(0)
    model = deepdem.DeepDEM(LAYERS, encoder=encoder, chip_size=64, ema=ema)
    lagging = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            lagging.update({n: b.clone() for n, b in module.named_buffers()})

    trainer = _trainer(max_steps=13, max_epochs=-1, callbacks=[Keep()])
    trainer.fit(model, _data(scene, chip_size=64, split="left 50 %", chips_per_epoch=104))
    unseen = scene.isel(x=slice(194, None))
    table = unseen.deepdem.evaluate(unseen.deepdem.refine(model.eval()))
    assert table.loc["refined", "MAE"] < 1.1 * table.loc["dsm", "MAE"]
    # Validation, which goes before the end of training, has seen the same network.
    noted = model.spec.training["validation"]["val_MAE"]
    assert noted == pytest.approx(table.loc["refined", "MAE"], rel=0.2)
    if not ema:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(lagging[name])
        spoilt = unseen.deepdem.evaluate(unseen.deepdem.refine(model))
        assert spoilt.loc["refined", "MAE"] > 2 * table.loc["refined", "MAE"]


def test_fine_tuning_keeps_scale_and_statistics(scene, tmp_path):
    model = _model()
    _trainer(max_epochs=1).fit(model, _data(scene, split="left 50 %"))
    path = tmp_path / "first.safetensors"
    model.save(path)
    tuned = deepdem.load_model(path, learning_rate=1e-2).freeze_encoder()
    before = {n: v.clone() for n, v in tuned.state_dict().items()}
    data = _data(scene.assign(dsm=scene.dsm + 500.0), split="right 50 %")
    _trainer(max_epochs=1).fit(tuned, data)
    assert tuned.spec.means == model.spec.means
    assert tuned.dsm_scale == model.dsm_scale
    assert tuned.spec.training["started_from"] == "first.safetensors"
    after = tuned.state_dict()
    same = {n for n in before if torch.equal(before[n], after[n])}
    # The encoder, its running statistics included, and nothing else.
    assert same == {n for n in before if n.startswith("net.network.encoder.")}
    again = _model(weights=str(path), frozen_encoder=True)
    assert again.spec.means == model.spec.means
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    trained = {n for n, p in again.unfreeze_encoder().named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in again.named_parameters()}
    with pytest.raises(ValueError, match=r"is for layers=\('dsm', 'ortho_left'"):
        deepdem.DeepDEM(["dsm"], architecture="resdepth", chip_size=32, weights=str(path))
    from test_models import Plain

    with pytest.raises(ValueError, match="has no part 'encoder'"):
        deepdem.DeepDEM(["dsm", "ndvi", "valid"], network=Plain(), chip_size=32).freeze_encoder()


def test_mixed_precision_and_what_is_refused(scene):
    model = _model()
    _trainer(max_epochs=1, precision="bf16-mixed").fit(model, _data(scene, split="left 60 %"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert np.isfinite(model.spec.training["validation"]["val_MAE"])
    with pytest.raises(ValueError, match="steps of metres at 1000 m: pass '16-mixed'"):
        _trainer(precision="bf16-true").fit(_model(), _data(scene))
    with pytest.raises(ValueError, match="chip_size=32, the data module 64"):
        _trainer().fit(_model(), _data(scene, chip_size=64))


def test_a_calibrated_scale_says_what_it_holds(scene, tmp_path):
    model = _model(uncertainty=True)
    model.net.spec = model.spec
    _trainer(max_epochs=6).fit(model, _data(scene, split="left 50 %"))
    noted = model.spec.training["calibration"]
    assert model.spec.temperature == noted["temperature"] != 1
    assert noted["laplace_68_holds"] == pytest.approx(0.68, abs=0.08)
    assert noted["laplace_95_holds"] == pytest.approx(0.95, abs=0.06)
    assert 0.3 < model.spec.intervals["68"] < 1.2 < model.spec.intervals["95"] < 4
    model.save(tmp_path / "m.safetensors")
    again = deepdem.load_model(tmp_path / "m.safetensors")
    assert again.spec.temperature == model.spec.temperature
    assert again.spec.intervals == model.spec.intervals
    # Eight views spread, and are wrong otherwise than one: they have intervals of their own.
    assert again.spec.tta_intervals == model.spec.tta_intervals
    assert 0.3 < model.spec.tta_intervals["68"] < 1.5 < model.spec.tta_intervals["95"] < 4
    assert model.spec.tta_intervals != model.spec.intervals
    low, high = noted["holds_68_in_chips"]
    assert 0.3 < low < 0.68 < high < 1
    part = scene.isel(x=slice(130, 200))
    said = {
        key: part.deepdem.refine(nets, uncertainty=True, tta=tta).refined_std.attrs
        for key, nets, tta in (("two", [model, again], False), ("views", model, True))
    }
    assert said["two"]["half_widths_from"].endswith("not fitted to the ensemble")
    name = "half_width_of_95_percent_interval"
    assert said["two"][name] == pytest.approx(model.spec.intervals["95"], abs=1e-4)
    assert said["views"][name] == pytest.approx(model.spec.tta_intervals["95"], abs=1e-4)
    for wrong in ({"uncertainty": True, "loss": "l1"}, {"loss": "laplace"}):
        with pytest.raises(ValueError, match="predicted scale"):
            _model(**wrong)


_DISTRIBUTED = """
import sys, warnings
import pytorch_lightning as pl, torch
import deepdem

warnings.simplefilter("ignore")
if __name__ == "__main__":
    scene = deepdem.synthetic_scene((160, 200), seed=1).deepdem.prepare().compute()
    torch.manual_seed(0)
    model = deepdem.DeepDEM(
        ["dsm", "ortho_left"], architecture="resdepth", options={"start_kernel": 4, "depth": 2},
        chip_size=32, uncertainty=True, ema=0.5,
    )
    data = deepdem.ChipDataModule(scene, chip_size=32, batch_size=4, split="left 50 %")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, data)
    weights = sum(float(p.double().sum()) for p in model.parameters())
    seen = model.spec.training["validation"]["val_NMAD"], model.spec.temperature, weights
    with open(f"{sys.argv[1]}/{trainer.global_rank}", "w") as file:
        print(*seen, file=file)
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Distributed: both end with the same weights, validation statistics and calibration."""
    script = tmp_path / "train.py"
    script.write_text(_DISTRIBUTED)
    run = subprocess.run(  # noqa: S603  # our own words
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    one, other = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert one == other
    assert len(one.split()) == 3


def test_loggers_get_metres_and_a_picture(scene, tmp_path):
    pytest.importorskip("tensorboard")
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, sheet = TensorBoardLogger(tmp_path, "b"), CSVLogger(tmp_path, "c")
    _trainer(logger=[board, sheet], log_every_n_steps=1).fit(
        _model(), _data(scene, split="left 60 %")
    )
    rows = (tmp_path / "c/version_0/metrics.csv").read_text().splitlines()
    assert {"val_MAE", "val_RMSE", "val_NMAD", "val_bias"} <= set(rows[0].split(","))
    events = EventAccumulator(board.log_dir).Reload()
    assert len(events.Scalars("val_MAE")) == 2
    (tag,) = events.Tags()["images"]
    assert len(events.Images(tag)) == 2  # one an epoch


def test_augmentation_turns_layers_and_target_alike():
    ramp = torch.arange(64.0).reshape(1, 8, 8)
    batch = {"layers": torch.stack([ramp, ramp + 100, ramp + 200], 1), "target": ramp}
    layers = ("dsm", "ortho_left", "ortho_right")
    seen = set()
    for seed in range(60):
        out = augmented(batch, layers, ("flip", "rotate", "swap"), np.random.default_rng(seed))
        np.testing.assert_array_equal(out["layers"][:, 0], out["target"])
        swapped = bool(out["layers"][0, 1].max() > 200)
        seen.add((tuple(out["target"].flatten().tolist()), swapped))
    assert len(seen) == 16  # the eight symmetries, swapped or not
    assert torch.equal(batch["target"], ramp)


def test_errors(scene):
    with pytest.raises(ValueError, match="augment=\\['shear'\\]"):
        _data(scene, augment=["shear"])
    with pytest.raises(ValueError, match="not understood"):
        _data(scene, split="half")
    with pytest.raises(ValueError, match="no scene"):
        _data([])
    with pytest.raises(ValueError, match=r"lacks the layers \['lidar_dsm'\]"):
        _trainer().fit(_model(), _data(scene.drop_vars("lidar_dsm")))
    empty = scene.copy(deep=True)
    empty.lidar_dsm[:] = np.nan
    with pytest.raises(ValueError, match="no training chip"):
        _trainer().fit(_model(), _data(empty))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader([0])
        with pytest.raises(ValueError, match="no data module to compute it from"):
            _trainer().fit(_model(), loader)

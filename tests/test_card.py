"""What holds on a CUDA card, on a machine that has one; the rest of the suite needs none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import dask
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import LAYERS, fitted

import deepdem
from deepdem.inference import for_inference
from deepdem.predict import Prediction, predict, resolve_device
from deepdem.refine import refine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def steep(**options):
    """Return a network of residuals of tens of metres: TF32 would be off by centimetres."""
    model = fitted(**options)
    with torch.no_grad():
        model.net.network.segmentation_head[0].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def local():
    return steep(centering="local")


@pytest.mark.parametrize("options", [{}, {"tta": True, "uncertainty": True}, {"fill_voids": True}])
@pytest.mark.parametrize("centering", ["local", "chip"])
def test_a_card_gives_the_surface_of_the_processor(scene, centering, options):
    with_hole = scene.copy()
    with_hole["dsm"] = scene["dsm"].where(abs(scene["x"] - scene["x"].mean()) > 20)
    model = steep(centering=centering)
    common = {"precision": "float32", "chunks": 256, **options}
    there = refine(with_hole, model, device="cpu", **common).compute()
    here = refine(with_hole, model, **common).compute()  # device="auto"
    if not options:
        there, here = there.to_dataset(), here.to_dataset()
    assert float(abs(there["refined"] - scene["dsm"]).max()) > 20
    for name in there:
        np.testing.assert_allclose(here[name], there[name], atol=1e-3, rtol=0, err_msg=str(name))


@pytest.mark.parametrize("options", [{}, {"tta": True, "uncertainty": True}, {"fill_voids": True}])
@pytest.mark.parametrize("centering", ["chip", "local"])
def test_threads_that_share_a_card_give_the_same_surface(scene, model, local, options, centering):
    """However many they are, and whatever the order of their chunks."""
    from deepdem._memory import _TURNS, _turns

    net = model if centering == "chip" else local
    holes = scene.copy(deep=True)
    holes.dsm[40:120, 60:90] = np.nan
    holes["valid"] = holes.valid & holes.dsm.notnull()
    options = {"precision": "float32", **options}
    wanted = refine(holes, net, device="cpu", **options).compute()
    with dask.config.set(scheduler="threads", num_workers=8):
        cut = holes.chunk(y=77, x=130)
        given = refine(cut, net, device="cuda", chunks=70, batch_size=3, **options).compute()
    assert {turns.qsize() for turns in _turns.values()} == {_TURNS}
    if not options.keys() - {"precision"}:
        wanted, given = wanted.to_dataset(), given.to_dataset()
    for name in wanted:
        np.testing.assert_allclose(
            given[name].astype(float), wanted[name].astype(float), atol=1e-3, rtol=0
        )


def test_an_ensemble_on_a_card_is_that_of_the_processor(scene, model):
    other = fitted(uncertainty=True)
    common = {"precision": "float32", "uncertainty": True}
    there = refine(scene, [model, other], device="cpu", **common).compute()
    here = refine(scene, [model, other], device="cuda", **common).compute()
    for name in there:
        np.testing.assert_allclose(here[name], there[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("chunks", "batch", "scheduler"), [(100, 1, "threads"), (77, 5, "threads"), (300, 64, "sync")]
)
def test_chunks_and_batches_do_not_matter_on_a_card(scene, local, chunks, batch, scheduler):
    common = {"precision": "float32", "device": "cuda"}
    wanted = refine(scene, local, **common).compute()
    cut = refine(scene.chunk(chunks), local, chunks=chunks, batch_size=batch, **common)
    np.testing.assert_allclose(cut.compute(scheduler=scheduler), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_same_again_is_the_same_to_the_last_bit(scene, local, precision):
    """So that what is resumed is equal to what was not disturbed."""
    refined = refine(scene, local, device="cuda", precision=precision, chunks=160)
    wanted = refined.compute(scheduler="sync")
    for scheduler in ("threads", "sync"):
        np.testing.assert_array_equal(refined.compute(scheduler=scheduler), wanted)


def test_bf16_on_a_card_is_near(scene, model):
    wanted = refine(scene, model, device="cpu", precision="float32").compute()
    refined = refine(scene, model, device="cuda", precision="bf16").compute()
    assert refined.attrs["deepdem_precision"] == "bf16"
    rms = float(np.sqrt(((refined - wanted) ** 2).mean()))
    assert 0 < rms < 0.05 * float((wanted - scene["dsm"]).std())


@pytest.mark.slow
def test_a_compiled_network_on_a_card_is_the_same(scene, local):
    pytest.importorskip("triton")
    common = {"precision": "float32", "device": "cuda"}
    wanted = refine(scene, local, **common).compute()
    compiled = refine(scene, local, compile=True, **common).compute()
    np.testing.assert_allclose(compiled, wanted, atol=1e-3, rtol=0)


def test_auto_is_the_card():
    assert resolve_device("auto") == "cuda:0"


# --- memory ---------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_the_card_is_halved(caplog):
    net = for_inference(fitted(chip_size=128).net.to("cuda"))
    torch.manual_seed(0)
    batch = torch.randn(96, len(LAYERS), 128, 128)
    how = Prediction(device="cuda:0")
    wanted = torch.cat([predict([net], part, how)[0] for part in batch.split(4)])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Room for a quarter of the batch and a bit: cuDNN does with less memory if it must.
    torch.cuda.reset_peak_memory_stats()
    predict([net], batch[:24], how)
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.2 * peak / whole)
    try:
        with caplog.at_level(logging.WARNING, "deepdem.predict"):
            given, _ = predict([net], batch, how)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "halving" in caplog.text
    assert float((given - wanted).abs().max()) < 1e-3


def test_another_error_on_a_card_is_raised(caplog):
    def moments(x):
        return x @ x.new_ones(3, 3), None

    broken = SimpleNamespace(spec=SimpleNamespace(uncertainty=False), moments=moments)
    with pytest.raises(RuntimeError, match="shape"):
        predict([broken], torch.zeros(4, 5, 64, 64), Prediction(device="cuda:0"))
    assert "halving" not in caplog.text


# --- clusters, training ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_share_a_card(scene, local):
    from dask.distributed import Client, LocalCluster

    wanted = refine(scene, local, device="cpu", precision="float32").compute()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        refined = refine(scene.chunk(100), local, precision="float32", chunks=100).compute()

        def held():
            from deepdem import predict

            return [key[1] for key in predict._nets]

        assert set(map(tuple, client.run(held).values())) == {("cuda:0",)}
    np.testing.assert_allclose(refined, wanted, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_a_card_has_trained_refines_anywhere(scene, tmp_path, precision):
    model = deepdem.DeepDEM(
        LAYERS, architecture="resdepth", chip_size=64, uncertainty=True,
        options={"start_kernel": 8, "depth": 3},
    )  # fmt: skip
    data = deepdem.ChipDataModule(scene, chip_size=64, batch_size=4, split="left 50 %")
    trainer = pl.Trainer(
        max_steps=12, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision=precision,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, data)
    assert np.isfinite(model.spec.training["validation"]["val_MAE"])
    assert model.spec.training["calibration"]["chips"] > 0
    assert model.spec.training["bf16_rms_m"] > 0
    model.save(tmp_path / "model.safetensors")
    common = {"precision": "float32", "uncertainty": True}
    here = refine(scene, tmp_path / "model.safetensors", device="cuda", **common).compute()
    there = refine(scene, tmp_path / "model.safetensors", device="cpu", **common).compute()
    for name in there:
        np.testing.assert_allclose(here[name], there[name], atol=1e-3, rtol=0)


def test_rewriting_for_a_card_is_not_refused():
    """Rounded to TF32, the rewritten network would look like another."""
    options = {"start_kernel": 8, "depth": 3}
    model = deepdem.DeepDEM(LAYERS, architecture="resdepth", chip_size=64, options=options)
    net = for_inference(model.net.eval().to("cuda"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.network.modules())

from __future__ import annotations

import copy
from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import LAYERS, fitted

import deepdem
from deepdem.refine import refine


def test_it_reads_and_computes_nothing(scene, model, no_compute):
    with no_compute():
        refined = scene.chunk(y=64, x=100).deepdem.refine(model)
    assert isinstance(refined.data, da.Array)
    assert (refined.name, refined.dtype, refined.shape) == ("refined", np.float32, scene.dsm.shape)
    assert refined.rio.crs == scene.rio.crs
    assert refined.attrs["units"] == "m"
    xr.testing.assert_equal(refined.x, scene.x)


def test_a_scene_opened_without_dask_is_not_read_either(scene, model, no_compute, tmp_path):
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    lazy = xr.open_zarr(tmp_path / "s.zarr", chunks=None, decode_coords="all")
    with no_compute():
        refined = lazy.deepdem.refine(model, chunks=100)
    assert not any(v._in_memory for k, v in lazy.variables.items() if k in scene.data_vars)
    xr.testing.assert_allclose(refined.compute(), scene.deepdem.refine(model).compute(), atol=1e-3)


@pytest.mark.parametrize(
    ("chunks", "out", "batch", "scheduler"),
    [(37, 90, 1, "sync"), (300, 64, 7, "threads"), ((64, 128), 1000, 16, "threads")],
)
def test_chunking_scheduler_and_batch_do_not_matter(scene, model, chunks, out, batch, scheduler):
    holes = scene.copy(deep=True)
    holes.dsm[40:120, 60:90] = np.nan
    whole = holes.deepdem.refine(model).compute(scheduler="sync")
    sizes = chunks if isinstance(chunks, tuple) else (chunks, chunks)
    other = holes.chunk(y=sizes[0], x=sizes[1]).deepdem.refine(model, chunks=out, batch_size=batch)
    with dask.config.set(scheduler=scheduler):
        computed = other.compute()
    assert float(abs(whole - holes.dsm).max()) > 1  # the network does something
    np.testing.assert_allclose(computed, whole, atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (50, 200), (300, 20), (1, 1), (65, 64)])
def test_scenes_smaller_than_a_window(scene, model, shape):
    small = scene.isel(y=slice(0, shape[0]), x=slice(0, shape[1]))
    refined = small.deepdem.refine(model).compute()
    assert refined.shape == shape
    assert (refined.notnull() == small.valid).all()


def test_nothing_leaks_out_of_a_hole(scene, model):
    """What stands under the mask, NaN or a wild value, changes no other pixel."""
    holes = scene.copy(deep=True)
    holes.dsm[50:90, 50:90] = np.nan
    holes["valid"] = holes.valid & holes.dsm.notnull()
    refined = holes.deepdem.refine(model).compute()
    assert (refined.notnull() == holes.valid).all()
    masked = scene.drop_vars("valid").copy(deep=True)
    masked.dsm[50:90, 50:90] = np.nan
    np.testing.assert_array_equal(masked.deepdem.refine(model).compute()[:40], refined[:40])


def test_windows_without_a_wanted_pixel_cost_nothing(scene, model, monkeypatch):
    seen = []
    one = deepdem.predict.Predictions._one

    def counted(predictions, batch):
        seen.append(len(batch))
        assert batch.height("dsm").isfinite().any(dim=(1, 2)).all()
        return one(predictions, batch)

    monkeypatch.setattr("deepdem.predict.Predictions._one", counted)
    half = scene.copy(deep=True)
    half.dsm[:, 100:] = np.nan
    refined = half.deepdem.refine(model, overlap=0).compute(scheduler="sync")
    assert sum(seen) == 5 * 2  # rows by the columns that reach pixel 99
    assert refined[:, 100:].isnull().all()
    seen.clear()
    nothing = scene.copy(deep=True)
    nothing.dsm[:] = np.nan
    assert nothing.deepdem.refine(model).compute().isnull().all()
    assert seen == []


def test_a_valid_layer_is_a_mask_and_may_be_an_input(scene):
    with_valid = fitted((*LAYERS, "valid"))
    masked = scene.assign(valid=scene.valid & (scene.x > float(scene.x[100])))
    refined = masked.deepdem.refine(with_valid).compute()
    assert (refined.notnull() == masked.valid).all()


def test_chunks_follow_the_scene_s_where_they_suit(scene, model):
    def chunk(*cut, **options):
        zeros = da.zeros((9000, 5000), chunks=cut, dtype=np.float32)
        big = deepdem.synthetic_scene((9000, 5000), chunks=5000)[[]]
        big = big.assign(dict.fromkeys(LAYERS, (("y", "x"), zeros)))
        return tuple(sizes[0] for sizes in big.deepdem.refine(model, **options).chunks)

    assert chunk(1100, 1100) == (4400, 2200)
    assert chunk(256, 3000) == (4096, 3000)
    assert chunk(100, 100) == (4080, 2064)  # 85 and 43 steps of 48 pixels
    assert chunk(9000, 5000) == (4080, 2064)  # one chunk
    assert chunk(1100, 1100, chunks=500) == (500, 500)


def test_sources_are_not_changed(scene, model):
    before = scene.copy(deep=True)
    scene.deepdem.refine(model).compute()
    xr.testing.assert_identical(scene, before)


def test_the_same_call_has_the_same_name_and_another_has_another(scene, model):
    def name(model=model, **options):
        return scene.chunk(y=100, x=100).deepdem.refine(model, **options).data.name

    assert name() == name()
    others = {name(), name(overlap=0.5), name(blend="linear"), name(chunks=99), name(fitted())}
    assert len(others) == 4  # a second model with the same weights is the same model
    changed = fitted()
    with torch.no_grad():
        next(changed.net.parameters()).add_(1e-3)
    assert name(changed) != name()


def test_a_saved_model_by_its_path_and_by_a_url(scene, model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    wanted = scene.deepdem.refine(model).compute()
    np.testing.assert_array_equal(
        scene.deepdem.refine(str(tmp_path / "m.safetensors")).compute(), wanted
    )
    url = (tmp_path / "m.safetensors").as_uri()
    np.testing.assert_array_equal(refine(scene, url).compute(), wanted)


def test_errors_name_what_is_wrong_and_the_cure(scene, model):
    with pytest.raises(ValueError, match=r"lacks the layers \['ndvi'\].*prepare"):
        scene.drop_vars("ndvi").deepdem.refine(model)
    with pytest.raises(ValueError, match="has no DSM scale"):
        scene.deepdem.refine(deepdem.DeepDEM(["dsm"], encoder="tu-mobilenetv3_small_050"))
    with pytest.raises(ValueError, match="is no model"):
        scene.deepdem.refine(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="precision='half'"):
        scene.deepdem.refine(model, precision="half")
    with pytest.raises(ValueError, match="window=128: the model is centred on chips of 64 px"):
        scene.deepdem.refine(model, window=128)
    coarse = deepdem.synthetic_scene((64, 64), pixel_size=2.0).deepdem.prepare()
    with pytest.raises(ValueError, match=r"pixels of 2 m.*trained on 1 m"):
        coarse.deepdem.refine(model)


# --- local centring: windows of any width ---------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    """A network of small reach that sees heights above the local level."""
    model = deepdem.DeepDEM(
        LAYERS, architecture="resdepth", options={"start_kernel": 4, "depth": 2}, chip_size=32,
        centering="local", dsm_scale=5.0,
    )  # fmt: skip
    names = model.spec.standardised
    model.net.spec = replace(
        model.spec, pixel_size=1.0, means=dict.fromkeys(names, 0.4), stds=dict.fromkeys(names, 0.3)
    )
    with torch.no_grad():
        model.net.network.last_layer.weight.mul_(30)
    return model.eval()


def test_the_presets_say_what_heights_are_relative_to():
    def centering(**options):
        return deepdem.DeepDEM(["dsm"], architecture="resdepth", **options).spec.centering

    assert centering() == "local"
    assert centering(centering="chip") == "chip"
    assert centering(preset="deepdem2024") == centering(preset="resdepth") == "chip"
    assert centering(preset="deepdem2024", centering="local") == "local"
    with pytest.raises(ValueError, match="centering='sun' is not known"):
        centering(centering="sun")


def test_an_ensemble_of_networks_of_small_reach(scene, local):
    other = deepdem.DeepDEM(
        LAYERS, architecture="resdepth", options={"start_kernel": 4, "depth": 3}, chip_size=32,
        centering="local", dsm_scale=5.0,
    )  # fmt: skip
    other.net.spec = replace(local.spec, options=other.spec.options, reach_px=23.0)
    singles = [scene.deepdem.refine(m).compute() for m in (local, other)]
    both = scene.chunk(y=90, x=111).deepdem.refine([local, other], uncertainty=True, chunks=100)
    np.testing.assert_allclose(both.refined, (singles[0] + singles[1]) / 2, atol=1e-3)
    np.testing.assert_allclose(
        scene.deepdem.refine([local, other], uncertainty=True).compute().refined_std,
        both.refined_std, atol=1e-3,
    )  # fmt: skip
    assert float(both.refined_std.max()) > 0.1


def test_beyond_the_reach_of_its_edges_a_window_is_as_good_as_any(scene, local):
    """Any width and overlap that leaves the edges out gives what one window round all gives."""
    holes = scene.copy(deep=True)
    holes.dsm[40:120, 60:90] = np.nan
    holes["valid"] = holes.valid & holes.dsm.notnull()
    assert local.spec.reach_px == 11
    one = holes.deepdem.refine(local, window=320).compute()
    assert float(abs(one - holes.dsm).max()) > 1
    for window, overlap in ((96, 64), (160, 0.5)):
        options = {"window": window, "overlap": overlap, "blend": _core}
        other = holes.deepdem.refine(local, **options).compute()
        np.testing.assert_allclose(other, one, atol=1e-3)


def _core(width: int) -> np.ndarray:
    line = np.full(width, 1e-6)
    line[16:-16] = 1.0
    return line


@pytest.mark.parametrize("options", [{}, {"window": 64, "overlap": 0.0, "blend": "none"},
                                     {"tta": True}, {"fill_voids": True}])  # fmt: skip
def test_local_windows_do_not_know_of_chunks(scene, local, options):
    holes = scene.copy(deep=True)
    holes.dsm[40:120, 60:90] = np.nan
    holes["valid"] = holes.valid & holes.dsm.notnull()
    whole = holes.deepdem.refine(local, **options).compute(scheduler="sync")
    cut = holes.chunk(y=77, x=130).deepdem.refine(local, chunks=90, batch_size=3, **options)
    if isinstance(whole, xr.Dataset):
        np.testing.assert_array_equal(cut.filled, whole.filled)
        assert whole.filled.any()
        cut, whole = cut.refined, whole.refined
    np.testing.assert_allclose(cut, whole, atol=1e-3)
    assert float(abs(whole - scene.dsm).max()) > 1


def test_training_sees_what_refine_sees(scene, local, monkeypatch):
    """The level of a training chip is the scene's, not that of its region, let alone its own."""
    import pytorch_lightning as pl

    data = deepdem.ChipDataModule(scene, chip_size=32, batch_size=4, split="left 50 %")
    data.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    data.trainer.strategy._lightning_module = local
    data.setup("fit")
    batches = [x["layers"].numpy() for x in data.val_dataloader()]
    seen = np.concatenate([batch[:, 0] - batch[:, -1] for batch in batches])

    whole = []
    one = deepdem.predict.Predictions._one

    def noted(predictions, batch):
        whole.append((batch.height("dsm") - batch.level())[0].numpy())
        return one(predictions, batch)

    monkeypatch.setattr("deepdem.predict.Predictions._one", noted)
    scene.deepdem.refine(local, window=320, device="cpu").compute(scheduler="sync")
    # The chips of the right half, less a guard band of one chip, row by row.
    left = 130 + 32
    y, x = range(0, 300 - 31, 32), range(left, 260 - 31, 32)
    wanted = [whole[0][i : i + 32, j : j + 32] for i in (*y, 300 - 32) for j in (*x, 260 - 32)]
    near = [min(float(np.nanmax(np.abs(chip - other))) for other in wanted) for chip in seen]
    assert max(near) < 1e-3


def test_a_far_void_has_no_level_and_is_not_filled(scene, local):
    holes = scene.copy(deep=True)
    holes.dsm[60:220, 40:200] = np.nan
    filled = holes.drop_vars("valid").drop_vars("triangulation_error")
    filled["triangulation_error"] = scene.triangulation_error.fillna(0.0)
    result = filled.deepdem.refine(local, fill_voids=True, window=320).compute()
    assert result.filled[70, 50]
    assert not result.filled[140, 120]
    assert result.refined.notnull().equals(holes.dsm.notnull() | result.filled)


def test_what_straddles_a_chunk_is_computed_no_further_than_needed(scene, local, monkeypatch):
    seen = []
    moments = deepdem.models.ResidualNet.moments_of

    def counted(net, z):
        seen.append(z[:, 0].numel())
        return moments(net, z)

    monkeypatch.setattr("deepdem.models.ResidualNet.moments_of", counted)
    square = scene.isel(y=slice(0, 256), x=slice(0, 256))
    square.deepdem.refine(local, window=256, chunks=128).compute(scheduler="sync")
    assert sum(seen) == 4 * 160**2  # of each a quarter, and its reach rounded up to a block


def test_windows_are_as_wide_as_the_network_allows(scene, local):
    assert scene.deepdem.refine(local, window=96).attrs["deepdem_window_px"] == 96
    attrs = scene.deepdem.refine(local).attrs
    assert attrs["deepdem_centering"] == "local"
    assert (attrs["deepdem_window_px"], attrs["deepdem_overlap_px"]) == (256, 32)
    far = copy.deepcopy(local)
    for chip, wide in ((32, 64), (96, 96)):  # it knows chips by their edges
        far.net.spec = replace(local.spec, chip_size=chip, reach_px=100.0)
        attrs = scene.deepdem.refine(far).attrs
        assert (attrs["deepdem_window_px"], attrs["deepdem_overlap_px"]) == (wide, 32)
    for window in (16, 100):
        with pytest.raises(ValueError, match=f"window={window}: pass a multiple of 32 px, 32 or"):
            scene.deepdem.refine(local, window=window)
    pooled = fitted(centering="local")  # its encoder pools over the window
    assert pooled.spec.reach_px == float("inf")
    with pytest.raises(ValueError, match="pools over all of a window"):
        scene.deepdem.refine(pooled, window=128)
    assert scene.deepdem.refine(pooled).attrs["deepdem_window_px"] == 64
    with pytest.raises(ValueError, match="differ in their centering"):
        scene.deepdem.refine([fitted(), pooled])
    with pytest.raises(ValueError, match="overlap='half': pass 'auto'"):
        scene.deepdem.refine(local, overlap="half")


@pytest.mark.slow
def test_a_cluster_gives_the_same_surface_and_gets_the_weights_once(scene, model):
    from distributed import Client, LocalCluster

    wanted = scene.deepdem.refine(model).compute()
    before = scene.chunk(y=90, x=90).deepdem.refine(model, chunks=96)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        after = scene.chunk(y=90, x=90).deepdem.refine(model, chunks=96)
        import cloudpickle

        weights = model.net.state_dict()
        size = sum(v.numel() * v.element_size() for v in weights.values())
        tasks = dict(after.data.dask.layers[after.data.name])
        assert len(cloudpickle.dumps(tasks)) < size / 2
        np.testing.assert_allclose(after.compute(), wanted, atol=1e-3)
        # A graph made before there was a client carries the weights itself.
        np.testing.assert_allclose(before.compute(), wanted, atol=1e-3)

        def copies() -> int:
            import deepdem.predict

            return len(deepdem.predict._nets)

        assert set(client.run(copies).values()) == {1}


# --- what a model offers beyond one look ----------------------------------------------------------


def test_precision_is_said_and_bf16_is_near(scene, model):
    exact = scene.deepdem.refine(model)
    rough = scene.deepdem.refine(model, precision="bf16")
    assert exact.attrs["deepdem_precision"] == "float32"  # untrained: nothing is known of bf16
    assert rough.attrs["deepdem_precision"] == "bf16"
    assert rough.dtype == np.float32
    assert exact.data.name != rough.data.name
    difference = float(np.sqrt(((exact - rough) ** 2).mean()))
    assert 0 < difference < 0.05 * float(abs(exact - scene.dsm).mean())


def test_auto_precision_goes_by_the_device_and_what_training_noted(scene, monkeypatch):
    model = fitted()
    monkeypatch.setattr("deepdem.predict.bf16_is_fast", lambda device: True)
    for noted, wanted in ((0.01, "bf16"), (0.03, "float32")):
        model.net.spec = replace(model.spec, training={"bf16_rms_m": noted})
        assert scene.deepdem.refine(model).attrs["deepdem_precision"] == wanted
    monkeypatch.setattr("deepdem.predict.bf16_is_fast", lambda device: False)
    assert scene.deepdem.refine(model).attrs["deepdem_precision"] == "float32"


def _turn(ds: xr.Dataset, turns: int, flip: bool) -> xr.Dataset:
    """Turn the pixels of a square scene and leave its coordinates."""

    def turned(layer: xr.DataArray) -> xr.DataArray:
        values = np.rot90(layer.values[:, ::-1] if flip else layer.values, turns)
        return layer.copy(data=values.copy())

    return ds.map(turned, keep_attrs=True)


def test_tta_does_not_know_up_from_down(scene, model):
    """A turned scene gives the turned surface: the mean over all symmetries has them all."""
    square = scene.isel(y=slice(0, 128), x=slice(0, 128))
    plain = square.deepdem.refine(model, overlap=0.5).compute()
    seen = square.deepdem.refine(model, tta=True, overlap=0.5).compute()
    assert float(abs(seen - plain).max()) > 0.01
    for turns, flip in ((1, False), (2, True)):
        other = _turn(square, turns, flip).deepdem.refine(model, tta=True, overlap=0.5).compute()
        back = _turn(seen.to_dataset(), turns, flip).refined
        np.testing.assert_allclose(other, back, atol=1e-3)


def test_tta_swaps_the_images_where_training_did(scene):
    model = fitted()
    square = scene.isel(y=slice(0, 64), x=slice(0, 64))
    swapped = square.assign(ortho_left=square.ortho_right, ortho_right=square.ortho_left)

    def differ() -> float:
        one, two = (s.deepdem.refine(model, tta=True).compute() for s in (square, swapped))
        return float(abs(one - two).max())

    assert differ() > 0.01
    model.net.spec = replace(model.spec, training={"augment": ["swap"]})
    assert differ() < 1e-3


def test_an_ensemble_is_the_mean_and_its_spread(scene):
    models = [fitted() for _ in range(3)]
    for n, model in enumerate(models):
        with torch.no_grad():
            model.net.network.segmentation_head[0].bias.fill_(0.1 * n)
    single = np.stack([scene.deepdem.refine(m).compute() for m in models])
    both = scene.deepdem.refine(models, uncertainty=True)
    assert isinstance(both, xr.Dataset)
    assert set(both.data_vars) == {"refined", "refined_std"}
    np.testing.assert_allclose(both.refined, single.mean(0), atol=1e-3)
    assert len(both.refined.attrs["deepdem_weights"]) == 3
    # The members differ by 0, 0.5 and 1 m everywhere; windows add their own disagreement.
    wanted = np.std([0.0, 0.5, 1.0])
    assert float(both.refined_std.min()) >= wanted - 1e-3
    one = scene.deepdem.refine(models, uncertainty=True, overlap=0)
    inner = one.refined_std[:192, :192]  # windows moved inward overlap beyond
    np.testing.assert_allclose(inner.values[np.isfinite(inner)], wanted, atol=2e-3)
    np.testing.assert_allclose(scene.deepdem.refine(models).compute(), single.mean(0), atol=1e-3)


def test_the_variance_of_a_mixture_is_its_definition():
    """Two networks of known residual and scale: the law of total variance, by hand."""
    from deepdem.predict import Prediction, predict

    class Known:
        def __init__(self, residual, scale):
            self.residual, self.scale = residual, scale
            self.spec = type("S", (), {"uncertainty": scale is not None})

        def moments(self, x):
            full = torch.full_like(x[:, 0], self.residual)
            return full, None if self.scale is None else torch.full_like(full, self.scale)

    x = torch.zeros(1, 2, 4, 4)
    mean, variance = predict([Known(1.0, 0.5), Known(3.0, None)], x, Prediction())
    assert torch.allclose(mean, torch.tensor(2.0))
    assert torch.allclose(variance, torch.tensor((2 * 0.5**2 + 0) / 2 + 1.0))
    mean, variance = predict([Known(1.0, None)], x, Prediction())
    assert variance is None


def test_voids_are_filled_where_the_images_are(scene, model):
    holes = scene.copy(deep=True)
    holes.dsm[100:112, 100:120] = np.nan
    holes.triangulation_error[100:112, 100:120] = np.nan
    holes["valid"] = holes.valid & holes.dsm.notnull()
    holes.dsm[200:210, 200:210] = np.nan
    holes.ortho_left[200:210, 200:210] = np.nan
    filled = holes.deepdem.refine(model, fill_voids=True).compute()
    assert filled.filled.dtype == bool
    assert filled.filled[100:112, 100:120].all()
    assert filled.refined[100:112, 100:120].notnull().all()
    assert not filled.filled[200:210, 200:210].any()
    assert filled.refined[200:210, 200:210].isnull().all()
    assert (filled.filled <= holes.dsm.isnull()).all()
    # What is filled joins on to what is round it: no cliff at the hole's edge.
    start = holes.dsm.interpolate_na("x")[100:112, 100:120]
    residual = (holes.deepdem.refine(model).compute() - holes.dsm)[90:122, 90:130]
    assert abs(float((filled.refined[100:112, 100:120] - start).mean())) < 3 + abs(
        float(residual.mean())
    )
    chunked = holes.chunk(y=50, x=61).deepdem.refine(model, fill_voids=True, chunks=70)
    np.testing.assert_allclose(chunked.refined, filled.refined, atol=1e-3)
    np.testing.assert_array_equal(chunked.filled, filled.filled)


def test_what_a_model_does_not_offer_is_refused(scene, model):
    with pytest.raises(ValueError, match="offers no uncertainty"):
        scene.deepdem.refine(model, uncertainty=True)
    with pytest.raises(ValueError, match="without a member"):
        scene.deepdem.refine([])
    with pytest.raises(ValueError, match="differ in their chip_size"):
        scene.deepdem.refine([model, fitted(chip_size=96)])


def test_inputs_are_hashed_chunk_by_chunk(scene, model):
    def hashes(ds):
        return ds.deepdem.refine(model, chunks=128).encoding["deepdem_inputs"].compute()

    one = hashes(scene)
    assert one.shape == (3, 3)
    np.testing.assert_array_equal(hashes(scene.chunk(y=60, x=77)), one)
    changed = scene.copy(deep=True)
    changed.ortho_left[130, 5] += 0.01
    differs = hashes(changed) != one
    assert differs[1, 0]
    assert differs.sum() == 1


def test_what_is_written_is_stamped_without_a_second_reading(scene, model, tmp_path, monkeypatch):
    """The pixels are read where they are computed, some rows at a time, and hashed there."""
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    stored = deepdem.open_scene(tmp_path / "s.zarr")
    refined = stored.deepdem.refine(model, chunks=128)
    wanted = refined.encoding["deepdem_inputs"].compute()
    monkeypatch.setattr("deepdem.refine._input_hash", None)  # is not called
    refined.deepdem.to_zarr(tmp_path / "r.zarr")
    log = xr.open_zarr(tmp_path / "r.zarr", group="deepdem_log", consolidated=False)
    np.testing.assert_array_equal(log["hash"], wanted)


def test_what_was_persisted_is_not_computed_again(scene, model, tmp_path, monkeypatch):
    refined = scene.deepdem.refine(model, chunks=128)
    wanted = refined.encoding["deepdem_inputs"].compute()
    held = refined.persist()
    monkeypatch.setattr("deepdem.refine.refine_block", None)  # is not called
    held.deepdem.to_zarr(tmp_path / "r.zarr")
    log = xr.open_zarr(tmp_path / "r.zarr", group="deepdem_log", consolidated=False)
    np.testing.assert_array_equal(log["hash"], wanted)


def test_rows_are_read_by_whole_blocks_of_what_is_stored(scene, tmp_path):
    from deepdem.refine import _rows_px

    assert _rows_px(scene, LAYERS) == 512  # in memory
    assert _rows_px(scene.chunk(y=100), LAYERS) == 600
    for chunks, rows in ((256, 512), (300, 600), (700, 700)):
        path = tmp_path / f"{chunks}.zarr"
        scene.chunk(y=300, x=260).to_zarr(
            path, encoding={name: {"chunks": (chunks, 64)} for name in LAYERS}, consolidated=False
        )
        assert _rows_px(xr.open_zarr(path, consolidated=False), LAYERS) == rows

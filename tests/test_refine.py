from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import LAYERS, fitted
from hypothesis import given
from hypothesis import strategies as st
from strategies import cuts, holey

import deepdem
from deepdem.blocks import Box, chunks_of, map_regions
from deepdem.refine import Job, Windows, refine, refine_block
from deepdem.windows import blend_weights, window_grid


def _fake(batch: np.ndarray) -> np.ndarray:
    """A residual that depends on all of a window: exact in float32, blind to where it stands."""
    assert batch.dtype == np.float32
    assert batch.shape[2] == batch.shape[3]
    filled = np.nan_to_num(batch[:, 0])
    return np.round(filled + filled.max(axis=(1, 2), keepdims=True)) / 8


def _naive(dsm: np.ndarray, window: int, stride: int, blend: str) -> np.ndarray:
    """The definition, in a plain loop over windows of a mirrored scene."""
    height, width = dsm.shape
    padded = np.pad(
        dsm, ((0, max(window - height, 0)), (0, max(window - width, 0))), mode="reflect"
    )
    line = blend_weights(blend, window)
    total = np.zeros(padded.shape, np.float64)
    norm = np.zeros(padded.shape, np.float64)

    def starts(n: int) -> list[int]:
        return sorted({*range(0, n - window, stride), n - window})

    for y in starts(padded.shape[0]):
        for x in starts(padded.shape[1]):
            part = padded[y : y + window, x : x + window]
            if not np.isfinite(part).any():
                continue
            there = slice(y, y + window), slice(x, x + window)
            total[there] += _fake(part[None, None])[0] * np.outer(line, line)
            norm[there] += np.outer(line, line)
    with np.errstate(invalid="ignore"):
        residual = (total / norm)[:height, :width]
    return np.where(np.isfinite(dsm), dsm + residual, np.nan)


def _blocked(dsm: np.ndarray, cut) -> np.ndarray:
    windows = Windows(
        window_grid(cut.shape, cut.window_px, cut.window_px - cut.overlap_px),
        tuple(map(float, blend_weights(cut.blend, cut.window_px))),
    )

    job = Job(windows, ("dsm",), batch_size=cut.batch)

    def kernel(arrays, *, out, region):
        return refine_block(
            arrays, lambda bs: ((_fake(b), None) for b in bs), job, out=out, region=region
        )[0]

    lazy = map_regions(
        kernel, [da.from_array(dsm, chunks=cut.chunks)], chunks=chunks_of(cut.shape, cut.out_px),
        region=lambda box: windows.region(box, cut.shape), dtype=np.float32, name="refine",
    )  # fmt: skip
    return lazy.compute(scheduler="sync")


@given(cuts())
def test_any_chunking_equals_a_plain_loop_over_windows(cut):
    dsm = holey(cut.shape, cut.seed)
    wanted = _naive(dsm, cut.window_px, cut.window_px - cut.overlap_px, cut.blend)
    np.testing.assert_allclose(_blocked(dsm, cut), wanted, atol=2e-4, rtol=1e-6)


@given(cuts(), st.floats(-5, 5, width=32))
def test_a_constant_residual_comes_out_constant(cut, value):
    dsm = holey(cut.shape, cut.seed)
    windows = Windows(
        window_grid(cut.shape, cut.window_px, cut.window_px - cut.overlap_px),
        tuple(map(float, blend_weights(cut.blend, cut.window_px))),
    )
    whole = Box(0, cut.shape[0], 0, cut.shape[1])
    (out,) = refine_block(
        [dsm], lambda bs: ((np.full(b[:, 0].shape, value, np.float32), None) for b in bs),
        Job(windows, ("dsm",), batch_size=3), out=whole, region=windows.region(whole, cut.shape),
    )  # fmt: skip
    np.testing.assert_allclose(out, dsm + np.float32(value), atol=1e-5, equal_nan=True)


def test_seams_are_gone_with_hann_and_there_without():
    """A network that returns its window's own mean: the worst case for a seam."""
    dsm = np.tile(np.linspace(0, 400, 400, dtype=np.float32), (200, 1))

    def jump(blend: str) -> float:
        windows = Windows(
            window_grid((200, 400), 64, 32), tuple(map(float, blend_weights(blend, 64)))
        )
        whole = Box(0, 200, 0, 400)
        (out,) = refine_block(
            [dsm],
            lambda bs: (
                (np.broadcast_to(b[:, 0].mean((1, 2), keepdims=True), b[:, 0].shape), None)
                for b in bs
            ),
            Job(windows, ("dsm",)), out=whole, region=whole,
        )  # fmt: skip
        steps = np.abs(np.diff(out - dsm, axis=1))[100, 64:336]
        return float(steps.max())

    # A ramp of 1 m a pixel: its residual cannot be flatter than 1 m a pixel on average.
    assert jump("none") > 25
    assert jump("hann") < 2


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
    predict = deepdem.predict.predict

    def counted(nets, batch, how):
        seen.append(len(batch))
        assert np.isfinite(batch[:, 0].numpy()).any(axis=(1, 2)).all()
        return predict(nets, batch, how)

    monkeypatch.setattr("deepdem.predict.predict", counted)
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
    def width(cut, **options):
        big = xr.concat([scene] * 8, "y").isel(x=slice(0, 200)).assign_coords(y=np.arange(2400.0))
        big = big.rio.write_crs(scene.rio.crs).assign_coords(x=scene.x[:200].values)
        return big.chunk(y=cut, x=cut).deepdem.refine(model, **options).chunks[0][0]

    assert width(1100) == 1100
    assert width(100) == 2064  # 43 steps of 48 pixels
    assert width(2400) == 2064  # one chunk
    assert width(1100, chunks=500) == 500


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
    from dataclasses import replace

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
    from dataclasses import replace

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


def test_filling_is_exact_on_a_plane_s_level_and_leaves_the_rest():
    from deepdem.refine import _fill

    window = np.full((1, 32, 32), 2000.25, np.float32)
    window[0, 10:14, 10:14] = np.nan
    _fill(window)
    np.testing.assert_array_equal(window, np.full((1, 32, 32), 2000.25, np.float32))
    empty = np.full((1, 8, 8), np.nan, np.float32)
    assert np.isnan(_fill(empty)).all()


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

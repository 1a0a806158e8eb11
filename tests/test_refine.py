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
from deepdem.refine import Windows, refine, refine_block
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

    def kernel(arrays, *, out, region):
        return refine_block(
            arrays, np.isfinite(arrays[0]), _fake, windows, out=out, region=region, dsm=0,
            batch_size=cut.batch,
        )  # fmt: skip

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
    out = refine_block(
        [dsm], np.isfinite(dsm), lambda b: np.full(b[:, 0].shape, value, np.float32), windows,
        out=whole, region=windows.region(whole, cut.shape), dsm=0, batch_size=3,
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
        out = refine_block(
            [dsm], np.ones(dsm.shape, bool),
            lambda b: np.broadcast_to(b[:, 0].mean((1, 2), keepdims=True), b[:, 0].shape),
            windows, out=whole, region=whole, dsm=0, batch_size=8,
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

    def counted(net, batch, **options):
        seen.append(len(batch))
        assert np.isfinite(batch[:, 0].numpy()).any(axis=(1, 2)).all()
        return predict(net, batch, **options)

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


def test_sources_are_not_changed(scene, model):
    before = scene.copy(deep=True)
    scene.deepdem.refine(model).compute()
    xr.testing.assert_identical(scene, before)


def test_the_same_call_has_the_same_name_and_another_has_another(scene, model):
    def name(model=model, **options):
        return scene.chunk(y=100, x=100).deepdem.refine(model, **options).data.name

    assert name() == name()
    others = {name(), name(overlap=0.25), name(blend="linear"), name(chunks=99), name(fitted())}
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

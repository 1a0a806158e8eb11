from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import obstore.store
import pytest
import torch
import xarray as xr
import zarr
from conftest import LAYERS
from test_train import _data, _model, _trainer

import deepdem
from deepdem.data import augmented

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:Checkpoint directory",
    "ignore:.*number of training batches", "ignore:.*callbacks used to create the checkpoint",
)  # fmt: skip


def _set_up(data):
    """Return the data module as a trainer sets it up."""
    data.trainer = SimpleNamespace(
        lightning_module=_model(), world_size=1, global_rank=0, current_epoch=0
    )
    data.setup()
    return data


def _copies(loader):
    return [{key: tensor.clone() for key, tensor in batch.items()} for batch in loader]


def _layers(loader):
    return torch.cat([batch["layers"] for batch in _copies(loader)])


def _stores(tmp_path):
    (tmp_path / "bucket").mkdir(exist_ok=True)
    return {
        "disk": tmp_path / "s.zarr",
        "memory": zarr.storage.MemoryStore(),
        "objects": zarr.storage.ObjectStore(obstore.store.LocalStore(str(tmp_path / "bucket"))),
        "fsspec": f"memory://{tmp_path.name}/s.zarr",
    }


@pytest.mark.parametrize("kind", ["disk", "memory", "objects", "fsspec"])
def test_chips_from_any_store_held_or_not(scene, tmp_path, kind):
    store = _stores(tmp_path)[kind]
    scene.deepdem.to_zarr(store)
    ds = deepdem.open_scene(store)
    found = {}
    for cache in (True, False):
        data = _set_up(_data(ds, cache=cache, num_workers=0, split="left 50 %"))
        assert data.regions["train"][0].reader.is_direct
        assert (data.regions["train"][0].held is not None) == cache
        val = _layers(data.val_dataloader())
        found[cache] = sorted(float(torch.nan_to_num(chip).double().sum()) for chip in val)
        train = _layers(data.train_dataloader())
        assert len(train) >= 80
        assert data.statistics().dsm_scale == pytest.approx(
            scene.isel(x=slice(0, 130)).deepdem.dsm_scale(size=32), rel=1e-5
        )
    assert found[True] == found[False]


def test_set_up_reads_nothing_of_what_is_not_held(scene, no_compute):
    """A scene of any size: neither its mask nor a chip is read before one is wanted."""
    lazy = scene.chunk(y=64, x=64)
    data = _data(lazy, cache=False)
    with no_compute():
        data = _set_up(data)
        loader = data.train_dataloader()
        assert len(loader) == data._places() // 8
        with pytest.raises(AssertionError, match="stayed lazy"):
            next(iter(loader))
    channels = len(LAYERS) + 1  # and the local level
    assert next(iter(loader))["layers"].shape == (8, channels, 32, 32)


def test_stripes_have_test_chips_and_share_no_pixel(scene):
    marked = scene.copy(deep=True)
    marked["dsm"] = marked.dsm * 0 + np.arange(300)[:, None]
    for fold in (0, 2, 4):
        data = _set_up(_data(marked, chip_size=16, split=deepdem.Stripes("y", fold=fold)))
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        rows = [set(np.unique(v[~torch.isnan(v)])) for v in
                (_layers(loader)[:, 0] for loader in loaders)]  # fmt: skip
        assert min(rows[1]) >= 60 * fold
        assert max(rows[1]) < 60 * (fold + 1)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not rows[a] & rows[b]
    assert _set_up(_data(scene)).test_dataloader() == []


def test_a_checkpoint_within_an_epoch_goes_on_with_the_next_batch(scene, tmp_path):
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint

    class Seen(Callback):
        def __init__(self):
            self.sums = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.sums.append(float(torch.nan_to_num(batch["layers"]).double().sum()))

    def run(**options):
        seen = Seen()
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        trainer = _trainer(
            max_epochs=2, enable_checkpointing=True, limit_val_batches=0, callbacks=[seen, keep],
        )  # fmt: skip
        trainer.fit(_model(), _data(scene, chips_per_epoch=48, split="left 60 %"), **options)
        return seen.sums

    whole = run()
    assert len(whole) == len(set(whole)) == 12
    assert run(ckpt_path=tmp_path / "step=4.ckpt") == whole[4:]
    assert run(ckpt_path=tmp_path / "step=8.ckpt") == whole[8:]


def test_validation_has_a_limit_and_a_seed(scene):
    def places(**more):
        return _set_up(_data(scene, split="left 40 %", **more)).val_dataloader().dataset.chips

    every = places(val_chips=None)
    few = places(val_chips=5)
    assert len(few) == 5
    assert set(few) < set(every)
    assert few == places(val_chips=5)
    assert sorted(map(str, every)) == sorted(map(str, places(val_chips=None, seed=3)))


def test_noise_and_voids_are_the_dsm_s_alone():
    draw = np.random.default_rng(0)
    layers = ("dsm", "ndvi")
    x, target = torch.randn(6, 2, 32, 32), torch.randn(6, 32, 32)
    batch = {"layers": x.clone(), "target": target.clone()}
    noisy = augmented(batch, layers, ("noise",), draw)
    voided = augmented(batch, layers, ("voids",), draw)
    for out in (noisy, voided):
        assert torch.equal(out["target"], target)
        assert torch.equal(out["layers"][:, 1], x[:, 1])
    assert torch.equal(batch["layers"], x)  # what came is as it was
    moved = noisy["layers"][:, 0] - x[:, 0]
    error = (x[:, 0] - target).abs().mean()
    assert (moved != 0).all()
    assert 0.01 * error < moved.std() < 0.3 * error
    # Half of it is smooth: neighbours go together.
    assert np.corrcoef(moved[:, 1:].flatten(), moved[:, :-1].flatten())[0, 1] > 0.2
    holes = torch.isnan(voided["layers"][:, 0])
    assert 0 < holes.float().mean() < 0.3
    assert torch.equal(voided["layers"][:, 0][~holes], x[:, 0][~holes])


def test_what_may_be_held(scene):
    planes = len(LAYERS) + 2  # the local level, and the truth
    needed = 4 * planes * 300 * 208  # the rest is narrower than a chip
    for cache, held in (("auto", True), (needed, True), (needed - 1, False), ("1 kB", False)):
        data = _set_up(_data(scene, cache=cache, num_workers=0))
        assert {r.held is not None for r in data.regions["train"]} == {held}
    data = _set_up(_data(scene, cache=True, num_workers=2))
    assert all(t.is_shared() for t in data.regions["train"][0].held.values())
    lazy = _set_up(_data(scene.chunk(), cache=False))
    assert lazy.train_dataloader().num_workers == 0  # it goes through Dask


def test_names_of_scenes(scene):
    tree = xr.DataTree.from_dict({"a": scene, "b/c": scene})
    assert _data(tree).names == ("a", "b/c")
    title = scene.attrs["title"]
    assert _data([scene, scene]).names == (title, f"{title} (1)")
    data = _set_up(_data(tree, split=deepdem.ByScene(val=["b/c"])))
    assert {r.scene for r in data.regions["val"]} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": ["shear"]}, r"augment=\['shear'\]: wanted of flip"),
        ({"balance": "size"}, "balance='size': wanted 'area' or 'scene'"),
        ({"weights": "slope"}, r"weights='slope' is not known: pass one of \['error', 'terrain'\]"),
        ({"num_workers": "all"}, "num_workers='all'"),
        ({"cache": "much"}, "much"),
        ({"split": "half"}, "not understood"),
    ],
)
def test_options_that_are_not_understood(scene, options, message):
    with pytest.raises(ValueError, match=message):
        _data(scene, **options)


def test_parts_without_a_chip(scene):
    trainer = partial(_trainer, max_epochs=1)
    with pytest.raises(ValueError, match=r"no part for training of .* is 32 px wide"):
        trainer().fit(_model(), _data(scene, split="left 5 %"))
    with pytest.raises(ValueError, match="is not set up"):
        _data(scene).train_dataloader()

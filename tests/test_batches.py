from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import deepdem
from deepdem.batches import FixedBatches, TrainBatches, fixed_loader, train_loader
from deepdem.blocks import Box
from deepdem.regions import Region, SceneReader
from deepdem.sampling import Plan, fixed_chips
from deepdem.splits import Part

NAMES = ("dsm", "ndvi", "lidar_dsm")
PLAN = Plan(size=32, min_valid=0.5, seed=0, tile_px=64, open_tiles=2, streams=4)


def _region(ds):
    whole = Box(0, ds.sizes["y"], 0, ds.sizes["x"])
    return Region(SceneReader(ds, NAMES), Part(whole), ("dsm", "ndvi"), "lidar_dsm")


def _all(loader):
    return [{key: tensor.clone() for key, tensor in batch.items()} for batch in loader]


def _same(one, other):
    for a, b in zip(one, other, strict=True):
        for key in ("layers", "target"):
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_is_what_the_scene_has(scene):
    marked = scene.copy(deep=True)
    marked["dsm"] = marked.dsm * 0 + np.arange(300)[:, None]
    marked["ndvi"] = marked.ndvi * 0 + np.arange(260)
    batches = TrainBatches([_region(marked)], PLAN, batch_size=5, chips=48)
    assert len(batches) == 9
    for number in (0, 7, 2):
        batch = batches[0, number]
        assert batch["layers"].shape == (5, 2, 32, 32)
        assert batch["layers"].dtype == batch["target"].dtype == torch.float32
        for layers, target in zip(batch["layers"], batch["target"], strict=True):
            y, x = int(np.nanmin(layers[0])), int(np.nanmin(layers[1]))
            wanted = scene.lidar_dsm.values
            there = np.isfinite(layers[0].numpy()).any(1), np.isfinite(layers[1].numpy()).any(0)
            y -= int(np.argmax(there[0]))
            x -= int(np.argmax(there[1]))
            np.testing.assert_array_equal(target, wanted[y : y + 32, x : x + 32])


def test_batches_can_be_asked_for_in_any_order(scene):
    in_order = TrainBatches([_region(scene)], PLAN, batch_size=5, chips=60)
    wanted = [{k: v.clone() for k, v in in_order[3, n].items()} for n in range(12)]
    jumps = TrainBatches([_region(scene)], PLAN, batch_size=5, chips=60)
    for number in (11, 0, 5, 4, 9, 9):
        _same([jumps[3, number]], [wanted[number]])


def test_memory_is_given_again_only_when_nobody_holds_it(scene):
    batches = TrainBatches([_region(scene)], PLAN, batch_size=5, chips=60)
    kept = [batches[0, n] for n in range(12)]
    copies = [{k: v.clone() for k, v in batch.items()} for batch in kept]
    view = batches[1, 0]["target"][1:3].numpy()
    copy = view.copy()
    places = {batches[1, n]["layers"].data_ptr() for n in range(12)}
    _same(kept, copies)
    np.testing.assert_array_equal(view, copy)
    assert len(places) <= 2


@pytest.mark.slow
def test_workers_give_the_same_chips_and_do_not_hang(scene, tmp_path):
    """In processes of their own, from a store that they open, after this one has computed."""
    scene.deepdem.to_zarr(tmp_path / "s.zarr")
    ds = deepdem.open_scene(tmp_path / "s.zarr")
    ds.dsm.mean().compute()  # threads run here now
    region = _region(ds)
    loaders = {
        workers: train_loader(
            TrainBatches([region], PLAN, batch_size=5, chips=60), workers=workers
        )
        for workers in (0, 2)
    }  # fmt: skip
    for epoch in range(2):
        for loader in loaders.values():
            loader.sampler.set_epoch(epoch)
        _same(_all(loaders[0]), _all(loaders[2]))
    assert len(loaders[2]) == 12


def test_an_epoch_is_resumed_where_it_stopped(scene):
    def loader(epoch):
        batches = TrainBatches([_region(scene)], PLAN, batch_size=5, chips=60)
        return train_loader(batches, workers=0, epoch=epoch)

    whole = _all(loader(4))
    stopped = loader(4)
    for n, _ in enumerate(stopped, 1):
        if n == 5:
            break
    state = stopped.state_dict()
    assert state == {"epoch": 4, "batch": 5}
    again = loader(4)
    again.load_state_dict(state)
    _same(_all(again), whole[5:])
    assert len(_all(again)) == 12  # and the next time all of it
    next_one = loader(5)
    next_one.load_state_dict(state)  # taken at the end of an epoch that was cut short
    assert len(_all(next_one)) == 12


def test_processes_of_one_training_share_the_batches_out(scene):
    batches = TrainBatches([_region(scene)], PLAN, batch_size=5, chips=65)
    whole = _all(train_loader(batches, workers=0))
    parts = [_all(train_loader(batches, workers=0, world=2, rank=rank)) for rank in (0, 1)]
    assert len(whole) == 13
    _same([b for pair in zip(*parts, strict=True) for b in pair], whole[:12])


def test_fixed_batches_hold_every_chip_once(scene):
    region = _region(scene)
    chips = fixed_chips([region], PLAN, None)
    batches = FixedBatches([region], chips, batch_size=4)
    assert sorted(batches.chips, key=str) == sorted(chips, key=str)
    found = _all(fixed_loader(batches, workers=0))
    assert sum(len(batch["target"]) for batch in found) == len(chips)
    targets = torch.cat([batch["target"] for batch in found])
    for chip, target in zip(batches.chips, targets, strict=True):
        there = scene.lidar_dsm.values[chip.box.within(Box(0, 0, 0, 0))]
        np.testing.assert_array_equal(target, there)


@pytest.mark.filterwarnings("ignore:.*no accelerator is found")
def test_a_card_is_given_the_same_batches_made_ahead_by_another_thread(scene, monkeypatch):
    """Pinned where there is a card; here torch only says that there is none."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    makers = []
    make = TrainBatches.__getitem__

    def watched(self, index):
        makers.append(threading.current_thread())
        if index == (1, 3):
            raise ValueError("a chip that cannot be read")
        return make(self, index)

    monkeypatch.setattr(TrainBatches, "__getitem__", watched)
    batches = TrainBatches([_region(scene)], PLAN, batch_size=4, chips=24)
    loaders = [train_loader(batches, workers=0, pin=pin) for pin in (False, True)]
    plain, ahead = (_all(loader) for loader in loaders)
    assert len(plain) == 6
    _same(plain, ahead)
    assert threading.main_thread() not in makers[6:]
    begun = iter(loaders[1])
    next(begun)
    assert len(makers) <= 14  # what was asked for, and the next
    assert loaders[1].state_dict()["batch"] == 1
    loaders[1].sampler.set_epoch(1)
    with pytest.raises(ValueError, match="cannot be read"):
        _all(loaders[1])

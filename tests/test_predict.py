from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from deepdem import predict as prediction
from deepdem.predict import Prediction, predict, resolve_device

# --- cards, without one ---------------------------------------------------------------------------


class _Card:
    """A network on a card that has room for so many windows, and tells what it was asked."""

    spec = SimpleNamespace(uncertainty=True)

    def __init__(self, room: int, error: type[Exception] = torch.cuda.OutOfMemoryError):
        self.room, self.error, self.asked = room, error, []

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(len(x))
        if len(x) > self.room:
            raise self.error("no room")
        return x[:, 0] * 2, x[:, 1]


# A device that is not "cpu" by name, and yet is there.
_ON_CARD = Prediction(device="cpu:0")


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    batch = torch.arange(11 * 2 * 3 * 3, dtype=torch.float32).reshape(11, 2, 3, 3)
    card = _Card(room=3)
    mean, variance = predict([card], batch, _ON_CARD)
    assert card.asked == [11, 5, 2, 3, 6, 3, 3]
    assert torch.equal(mean, batch[:, 0] * 2)
    assert torch.equal(variance, 2 * batch[:, 1].square())


def test_a_window_that_does_not_fit_and_any_other_error_are_raised():
    batch = torch.zeros(4, 2, 3, 3)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        predict([card := _Card(room=0)], batch, _ON_CARD)
    assert card.asked == [4, 2, 1]
    with pytest.raises(RuntimeError, match="no room"):
        predict([card := _Card(room=0, error=RuntimeError)], batch, _ON_CARD)
    assert card.asked == [4]
    # On a CPU there is nothing to be halved.
    with pytest.raises(torch.cuda.OutOfMemoryError):
        predict([card := _Card(room=3)], batch, Prediction(device="cpu"))
    assert card.asked == [4]


@pytest.mark.parametrize(
    ("name", "dask_cuda", "wanted"),
    [
        (None, False, "cuda:0"),  # no worker
        (0, False, "cuda:0"),
        (5, False, "cuda:1"),
        ("SLURMCluster-2-3", False, "cuda:3"),
        ("tcp://127.0.0.1:40865", False, "cuda:0"),
        # dask-cuda turns the list of cards so that each worker's own comes first.
        (2, True, "cuda:0"),
        (3, True, "cuda:0"),
    ],
)
def test_each_worker_has_its_own_card(monkeypatch, name, dask_cuda, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    worker = None if name is None else SimpleNamespace(name=name)
    monkeypatch.setattr(prediction, "_this_worker", lambda: worker)
    if dask_cuda:
        monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace())
    assert resolve_device("auto") == wanted
    assert resolve_device("cuda:1") == "cuda:1"


def test_without_a_card_it_is_the_next_best(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, wanted in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert resolve_device("auto") == wanted


def test_networks_run_on_one_torch_thread_each_and_leave_others_theirs():
    before = torch.get_num_threads()

    def own():
        torch.ones(1 << 20).add_(1)  # the first that asks for threads
        return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        executor, size = prediction._Pool().get()
        assert size == 3
        with executor:
            assert {executor.submit(own).result() for _ in range(6)} == {1}
        with ThreadPoolExecutor(1) as others:
            assert others.submit(own).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

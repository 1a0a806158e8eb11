from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepdem import predict as prediction
from deepdem.predict import Prediction, predict, predictions, resolve_device

# --- the allocator of a worker --------------------------------------------------------------------

_FAULTS = """
import ctypes, resource
from deepdem._worker import keep_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(2**23)
        libc.memset(block, 1, 2**23)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "65536"}, True),  # by Dask's nanny
        ({"MALLOC_TRIM_THRESHOLD_": "65537"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "65536", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, False),
    ],
)
def test_a_worker_keeps_its_memory_unless_the_user_said_otherwise(given, kept):
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _FAULTS], env={**ours, **given},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said, faults = run.stdout.split()
    assert said == str(kept)
    # Of 2048 pages each time, or the first time only (in huge pages, where there are any: 4 each).
    assert (int(faults) < 5000) == kept


@pytest.mark.slow
def test_the_workers_of_a_cluster_keep_theirs(scene, model):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        script = _FAULTS.replace("print(keep_memory(), faults())", "answer = faults()")

        def faults() -> int:
            names: dict[str, int] = {}
            exec(script, names)  # noqa: S102  # our own words
            return names["answer"]

        before = client.submit(faults, pure=False).result()
        scene.deepdem.refine(model).compute()
        after = client.submit(faults, pure=False).result()
    assert after < 5000 < before


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
    given = predictions([_Card(room=3)], [batch.numpy(), batch.numpy()[:1]], _ON_CARD)
    for (residual, _), wanted in zip(given, (batch, batch[:1]), strict=True):
        np.testing.assert_array_equal(residual, wanted[:, 0] * 2)


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

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deepdem import _memory

_FAULTS = """
import ctypes, resource
import distributed
from deepdem._memory import keep_memory

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
            # In a thread of its own, as networks run. The one of the tasks has imported torch: if
            # that has filled the last 64 MB that glibc has for a thread, more come and go at once.
            with ThreadPoolExecutor(1) as executor:
                executor.submit(exec, script, names).result()
            return names["answer"]

        before = client.submit(faults, pure=False).result()
        scene.deepdem.refine(model).compute()
        after = client.submit(faults, pure=False).result()
    assert after < 5000 < before


@pytest.mark.skipif(_memory._libc() is None, reason="another allocator, or the user's settings")
def test_freed_memory_is_given_back():
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    held = [np.ones(1000) for _ in range(20_000)]  # 160 MB, of which the last piece stays
    last = held[-1]
    held.clear()
    before = resident()
    _memory.give_back()
    assert before - resident() > 100e6
    assert last.sum() == 1000

"""What schedulers and workers cost, and whether they change a millimetre (measures 5, 7, 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
from common import (
    LAYERS,
    Result,
    folder,
    in_turn,
    options,
    ratio,
    report,
    saved,
    stored_scene,
    table,
    untrained,
)
from distributed import Client, LocalCluster

import deepdem
from deepdem.refine import refine

CORES = 2


@contextmanager
def cluster(workers: int, threads: int = 1) -> Iterator[None]:
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, dashboard_address=None,
            memory_limit=0,
        ) as local,
        Client(local),
    ):  # fmt: skip
        yield


def work(cache: Path, width: int, model: str, chunks: int) -> Callable[[], Any]:
    """Return a run of refine from Zarr to Zarr by whichever scheduler is active."""

    def run() -> None:
        refined = refine(deepdem.open_scene(cache / f"scene-{width}.zarr"), model, overlap=0.5,
                         precision="float32", chunks=chunks)  # fmt: skip
        refined.to_dataset().deepdem.to_zarr(cache / "refined.zarr", overwrite=True)

    return run


def timed(cache: Path, args: Any, encoder: str) -> list[Result]:
    width = {"small": 512, "medium": 2048, "full": 4096}[args.size]
    repeat = args.repeat or {"small": 1, "medium": 3, "full": 2}[args.size]
    stored_scene(cache, width)
    model = saved(untrained(LAYERS, encoder=encoder), cache / f"scaling-{args.size}.safetensors")
    run = work(cache, width, model, min(width // 2, 2048))
    times: dict[str, list[float]] = {}
    # Each is timed warm, as from the second scene on, and two workers also on their first one:
    # they import torch and the like then, a few seconds whatever the scene.
    for _ in range(repeat):
        with dask.config.set(scheduler="threads", num_workers=CORES):
            work(cache, 512, model, 256)()
            _add(times, in_turn({"threads": run}, 1))
        with cluster(2):
            _add(times, in_turn({"2 new workers": run, "2 workers": run}, 1))
        with cluster(1):
            work(cache, 512, model, 256)()
            _add(times, in_turn({"1 workers": run}, 1))
    new, note = ratio(times, "2 new workers", "threads")
    five, note5 = ratio(times, "2 workers", "threads")
    seven, note7 = ratio(times, "1 workers", "2 workers")
    return [
        Result("5. cluster of 2 workers / threaded scheduler", five, 1.2, note=note5),
        Result("5. the same, the workers' first scene", new, note=note),
        Result("7. 1 worker / 2 workers", seven, 1.75, at_least=True, note=note7),
    ]


def _add(times: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    for name, found in more.items():
        times.setdefault(name, []).extend(found)


def invariance(cache: Path, *, small: bool, encoder: str, centering: str) -> Result:
    """Return the largest difference between any two ways to compute one scene."""
    shape = (300, 340) if small else (900, 1100)
    scene = deepdem.synthetic_scene(shape, seed=4).deepdem.prepare().compute()
    net = untrained(LAYERS, window=64 if small else 128, encoder=encoder, centering=centering)
    model = saved(net, cache / f"invariance-{centering}.safetensors")
    found: dict[str, np.ndarray] = {}

    def add(name: str, given: int, **keywords: Any) -> None:
        surface = refine(scene.chunk({"y": given, "x": given}), model, precision="float32",
                         **keywords)  # fmt: skip
        found[name] = surface.values

    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            add(f"{scheduler}, whole", 2000, chunks=2000)
            for chunks in (97, 256) if not small else (170,):
                add(f"{scheduler}, chunks of {chunks}", chunks, chunks=chunks)
                add(f"{scheduler}, {chunks} in, 211 out", chunks, chunks=211, batch_size=7)
            add(f"{scheduler}, batches of 1", 512, chunks=512, batch_size=1)
            add(f"{scheduler}, batches of 16", 512, chunks=512, batch_size=16)
    for workers, threads in ((1, 1), (2, 1), (1, 2)) if not small else ((2, 1),):
        with cluster(workers, threads):
            add(f"{workers} workers of {threads}", 256, chunks=256)
    surfaces = list(found.values())
    known = np.isfinite(surfaces[0])
    assert all((np.isfinite(s) == known).all() for s in surfaces)
    spread = np.ptp([s[known] for s in surfaces], axis=0).max()
    rows = [(n, f"{1000 * np.abs(s - surfaces[0])[known].max():.4f}") for n, s in found.items()]
    table(("way", "to the first (mm)"), rows)
    residual = float(np.abs(surfaces[0] - scene["dsm"].values)[known].mean())
    return Result(
        f"9. largest difference of any two ways, {centering} centring", 1000 * float(spread), 1.0,
        unit="mm", note=f"{len(found)} ways, mean residual {residual:.2f} m",
    )  # fmt: skip


def main() -> None:
    args = options(__doc__, only={"choices": ["time", "invariance"], "help": "leave the other out"})
    small = args.size == "small"
    encoder = "tu-mobilenetv3_small_050" if small else "resnet18"
    torch.set_num_threads(CORES)
    with folder(args) as cache:
        stored_scene(cache, 512)
        results = []
        if args.only != "time":
            results += [
                invariance(cache, small=small, encoder=encoder, centering=centering)
                for centering in ("local", "chip")
            ]
        if args.only != "invariance":
            results += timed(cache, args, encoder)
    report(results)


if __name__ == "__main__":
    main()

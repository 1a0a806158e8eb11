"""What a CUDA card brings: the bare network on it, refine beside that, and refine on a CPU.

On a machine without a card it says so, and `--small` runs all of it on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
import xarray as xr
from common import (
    LAYERS,
    Result,
    folder,
    in_turn,
    options,
    ratio,
    report,
    saved,
    seconds,
    starts,
    stored_scene,
    table,
    untrained,
)
from torch import Tensor

import deepdem
from deepdem.inference import exact, for_inference
from deepdem.refine import refine
from deepdem.train import model_of

WINDOW = 256
PRECISIONS = ("float32", "bf16")
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"


def finished() -> None:
    """Wait for the card: what it is told to do is done later."""
    if CARD:
        torch.cuda.synchronize()


# --- the bare network ----------------------------------------------------------------------------


def passes(network: Any, windows: Tensor, count: int) -> Callable[[], None]:
    """Return a run of forward passes over `count` windows, the same ones over and over."""
    full, rest = divmod(count, len(windows))

    @torch.inference_mode()
    @exact()
    def run() -> None:
        for _ in range(full):
            network(windows)
        if rest:
            network(windows[:rest])
        finished()

    return run


def bare(
    model: deepdem.DeepDEM, some: Tensor, sizes: list[int], *, compiled: bool
) -> dict[str, Any]:
    """Return the fastest network and batch of each precision, and print them all."""
    net = model_of(model.net).net.to(DEVICE)
    rows, best = [], {}
    for precision in PRECISIONS:
        for way in (False, True) if compiled else (False,):
            fast = for_inference(net, bf16=precision == "bf16", compiled=way)
            z = fast.standardise(some.to(DEVICE)).to(fast.weights_dtype)
            z = z.contiguous(memory_format=torch.channels_last)
            count, times = max(sizes), {}
            for size in sizes:
                batch = z.repeat(-(-size // len(z)), 1, 1, 1)[:size]
                run = passes(fast.network, batch.contiguous(memory_format=torch.channels_last),
                             count)  # fmt: skip
                run()
                times[size] = min(seconds(run) for _ in range(3)) / count * 1000
                best.setdefault(precision, []).append((times[size], fast.network, batch))
            name = f"{precision}, compiled" if way else precision
            rows.append((name, *(f"{times[s]:.3f}" for s in sizes)))
    table(("the bare network, ms a window", *(f"batch {s}" for s in sizes)), rows)
    return {name: min(found, key=lambda one: one[0])[1:] for name, found in best.items()}


# --- the processor -------------------------------------------------------------------------------


def child(store: str, model: str, width: int, overlap: float) -> None:
    """Print how long the processor takes, as JSON."""
    part = deepdem.open_scene(store).isel(y=slice(width), x=slice(width))

    def run() -> None:
        refine(part, model, overlap=overlap, device="cpu", precision="float32").compute()

    refine(part.isel(y=slice(WINDOW), x=slice(WINDOW)), model, device="cpu").compute()
    print(json.dumps(seconds(run)))


def processor(threads: int, *job: Any) -> float:
    """Return the seconds of `child` with so many threads."""
    with_dask = {"OMP_NUM_THREADS": str(threads), "DASK_NUM_WORKERS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", *map(str, job)],
        env={**os.environ, **with_dask}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


# --- where the time goes -------------------------------------------------------------------------


def stages(ds: xr.Dataset, model: str, out: Path, **keywords: Any) -> list[tuple[str, str]]:
    """Return the seconds of reading alone, of refine in memory, and of writing alone."""
    held: dict[str, Any] = {}

    def read() -> None:
        held["scene"] = ds.compute()

    def made() -> None:
        chunked = held["scene"].chunk(y=2048, x=2048)
        held["refined"] = refine(chunked, model, device=DEVICE, **keywords).compute()
        finished()

    def wrote() -> None:
        plain = held["refined"].chunk(y=2048, x=2048).to_dataset()
        plain.deepdem.to_zarr(out, overwrite=True)

    works = {"read": read, "refine in memory": made, "write": wrote}
    return [(what, f"{seconds(work):.2f}") for what, work in works.items()]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        store, model, width, overlap = sys.argv[2:]
        child(store, model, int(width), float(overlap))
        return
    args = options(
        __doc__,
        compiled={"action": "store_true", "help": "torch.compile as well: a minute more"},
    )
    small = args.size == "small"
    if not CARD:
        print("No CUDA card here" + (": figures of the CPU.\n" if small else ", nothing to time."))
        if not small:
            return
    else:
        card = torch.cuda.get_device_properties(0)
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB\n")
    width = {"small": 300, "medium": 2048, "full": 4096}[args.size]
    repeat = args.repeat or {"small": 1, "medium": 3, "full": 3}[args.size]
    with folder(args) as cache:
        ds = stored_scene(cache, width)
        encoder = "tu-mobilenetv3_small_050" if small else "resnet18"
        model = untrained(LAYERS, window=WINDOW, encoder=encoder, centering="local")
        path = saved(model, cache / "model.safetensors")
        places = len(starts(width, WINDOW, WINDOW // 2)) ** 2
        some = np.stack([ds[n].values[:WINDOW, : 4 * WINDOW] for n in LAYERS], dtype=np.float32)
        some = torch.from_numpy(some).unfold(2, WINDOW, WINDOW).permute(2, 0, 1, 3)
        some = torch.cat([some, some[:, :1]], dim=1)  # a level, such as the heights themselves
        sizes = [1] if small else [8, 32, 64, 128]
        best = bare(model, some, sizes, compiled=args.compiled)
        works: dict[str, Callable[[], Any]] = {}
        for name, (network, batch) in best.items():
            works[f"bare {name}"] = passes(network, batch, places)
            for overlap in (0.5, "auto"):
                kind = "1/2" if overlap == 0.5 else "default"

                def run(precision: str = name, overlap: Any = overlap) -> None:
                    made = refine(ds, path, overlap=overlap, precision=precision, device=DEVICE)
                    made.to_dataset().deepdem.to_zarr(cache / "refined.zarr", overwrite=True)

                works[f"refine {kind} {name}"] = run
        peak = {}
        for name, work in works.items() if CARD else ():
            torch.cuda.reset_peak_memory_stats()
            work()  # the first takes memory, and makes cuDNN choose
            peak[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        times = in_turn(works, repeat)
        mpx = width**2 / 1e6
        table(
            ("what", "s", "Mpx/s", "peak memory of the card"),
            [(name, f"{min(t):.2f}", f"{mpx / min(t):.1f}", peak.get(name, ""))
             for name, t in times.items()],
        )  # fmt: skip
        for name in PRECISIONS:
            found = stages(ds, path, cache / "plain.zarr", overlap=0.5, precision=name)
            table((f"stages alone, overlap 1/2, {name}", "s"), found)
        report([*results(times), *others(times, cache, path, width, small=small)])


def results(times: dict[str, list[float]]) -> list[Result]:
    out = []
    for name in PRECISIONS:
        figure, spread = ratio(times, f"refine 1/2 {name}", f"bare {name}")
        out.append(Result(f"refine, overlap 1/2 / bare passes, {name}", figure, 1.15, note=spread))
    figure, spread = ratio(times, "refine 1/2 float32", "refine 1/2 bf16")
    out.append(Result("float32 / bf16, overlap 1/2", figure, note=spread))
    return out


def others(
    times: dict[str, list[float]], cache: Path, model: str, width: int, *, small: bool
) -> list[Result]:
    """Return how many times as long the processor takes for a pixel, with few threads and all."""
    part = min(width, 1024)
    out = []
    for threads in sorted({2, os.cpu_count() or 2}) if not small else (1,):
        taken = processor(threads, cache / f"scene-{width}.zarr", model, part, 0.5)
        figure = taken / part**2 / (min(times["refine 1/2 float32"]) / width**2)
        out.append(Result(f"CPU, {threads} thread(s) / card, a pixel, overlap 1/2, float32", figure,
                          note=f"CPU: {part**2 / 1e6 / taken:.2f} Mpx/s"))  # fmt: skip
    return [one for one in out if math.isfinite(one.figure)]


if __name__ == "__main__":
    dask.config.set(scheduler="threads")
    main()

"""How fast refine is: beside the bare network, its predecessor and MONAI (measures 1 to 4).

Ours is timed from Zarr to Zarr, the predecessor from GeoTIFF to GeoTIFF, MONAI from memory to
memory. Whether the defaults are as good as the predecessor's result,
which measure 3 takes for granted, is what choices.py shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import rasterio
import rasterio.merge
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
from rasterio.windows import Window
from torch import Tensor

import deepdem
from deepdem._memory import keep_memory
from deepdem.inference import for_inference
from deepdem.predict import bf16_is_fast
from deepdem.refine import refine

WINDOW, CORES = 256, 2
Batches = list[Tensor]


def places(shape: tuple[int, int], stride: int = WINDOW // 2) -> list[tuple[int, int]]:
    return [(y, x) for y in starts(shape[0], WINDOW, stride)
            for x in starts(shape[1], WINDOW, stride)]  # fmt: skip


# --- the bare network ----------------------------------------------------------------------------


def forward_all(network: Any, batches: Batches, threads: int) -> None:
    """Run forward passes: with all cores each, or as many side by side as there are cores."""

    def one(batch: Tensor) -> None:
        with torch.inference_mode():
            network(batch)

    if threads == 1:
        for batch in batches:
            one(batch)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(one, batches))
    torch.set_num_threads(CORES)


def repeated(windows: Tensor, batch_size: int, count: int) -> Batches:
    """Return batches of `count` windows in all, made of a few windows over and over."""
    sizes = [batch_size] * (count // batch_size)
    sizes += [count % batch_size] * (count % batch_size > 0)
    like = windows.repeat(-(-batch_size // len(windows)), 1, 1, 1)
    full = like[:batch_size].contiguous(memory_format=torch.channels_last)
    return [full[:size] for size in sizes]


def fastest(network: Any, windows: Tensor, sizes: list[int]) -> tuple[int, int]:
    """Return the best number of threads and batch size, and print them all."""
    found: dict[tuple[int, int], float] = {}
    count = CORES * max(sizes)  # no thread has more of them than another
    for _ in range(2):
        for threads in (1, CORES):
            for size in sizes:
                batches = repeated(windows, size, count)
                time = seconds(lambda b=batches, t=threads: forward_all(network, b, t))
                found[threads, size] = min(found.get((threads, size), math.inf), time)
    each = 1000 / count
    table(
        ("the bare network, ms a window", *(f"batch {s}" for s in sizes)),
        [
            (f"{t} thread(s) of {CORES // t}", *(f"{found[t, s] * each:.1f}" for s in sizes))
            for t in (1, CORES)
        ],
    )
    return min(found, key=lambda key: found[key])


# --- the others ----------------------------------------------------------------------------------


def rasters(ds: xr.Dataset, out: Path) -> list[Path]:
    """Return the scene as the predecessor has it, a GeoTIFF a layer."""
    out.mkdir(exist_ok=True)
    profile = {
        "driver": "GTiff", "count": 1, "dtype": "float32", "nodata": np.nan, "tiled": True,
        "crs": ds.rio.crs, "transform": ds.rio.transform(), "height": ds.sizes["y"],
        "width": ds.sizes["x"],
    }  # fmt: skip
    paths = [out / f"{name}.tif" for name in LAYERS]
    for name, path in zip(LAYERS, paths, strict=True):
        with rasterio.open(path, "w", **profile) as file:
            file.write(ds[name].values.astype(np.float32), 1)
    return paths


def sample(layers: Sequence[Path], y: int, x: int) -> np.ndarray:
    """Return the layers of one window, each file opened for it, as a raster dataset does."""
    parts = []
    for path in layers:
        with rasterio.open(path) as file:
            parts.append(file.read(1, window=Window(x, y, WINDOW, WINDOW)))
    return np.stack(parts)


def predecessor(net: Any, layers: Sequence[Path], out: Path) -> None:
    """Refine as the predecessor did: autograd on, a GeoTIFF a tile, merged, the first wins."""
    with rasterio.open(layers[0]) as file:
        transform, shape, profile = file.transform, file.shape, file.profile
    out.mkdir(exist_ok=True)
    paths, dsm = [], net.spec.layers.index("dsm")
    todo = places(shape)
    for k in range(0, len(todo), 24):
        part = todo[k : k + 24]
        batch = torch.from_numpy(np.stack([sample(layers, y, x) for y, x in part]))
        heights = (net(batch) + batch[:, dsm]).detach().numpy()
        for (y, x), tile in zip(part, heights, strict=True):
            path = out / f"{y}_{x}.tif"
            place = transform * transform.translation(x, y)
            own = {**profile, "height": WINDOW, "width": WINDOW, "transform": place}
            with rasterio.open(path, "w", **own) as file:
                file.write(tile, 1)
            paths.append(path)
    merged, place = rasterio.merge.merge(paths)
    with rasterio.open(out / "merged.tif", "w", **{**profile, "transform": place}) as file:
        file.write(merged)


def monai(net: Any, stack: Tensor) -> Callable[[], Any] | None:
    """Return a run of MONAI's sliding windows, None where MONAI is not installed."""
    try:
        from monai.inferers import SlidingWindowInferer
    except ImportError:
        return None
    inferer = SlidingWindowInferer(
        roi_size=(WINDOW, WINDOW), sw_batch_size=24, overlap=0.5, mode="gaussian"
    )

    def run() -> Any:
        with torch.inference_mode():
            residual = inferer(stack[None], lambda batch: net(batch)[:, None])
            return (residual[0, 0] + stack[net.spec.layers.index("dsm")]).numpy()

    return run


def main() -> None:
    args = options(
        __doc__, bf16={"action": "store_true", "help": "time bf16 even where the CPU lacks it"},
        only={"nargs": "+", "help": "of what is timed, such as bare 'refine 1/2'"},
    )  # fmt: skip
    width = {"small": 512, "medium": 2048, "full": 4096}[args.size]
    repeat = args.repeat or {"small": 1, "medium": 3, "full": 2}[args.size]
    torch.set_num_threads(CORES)
    keep_memory()  # as refine does: the bare network is to have it too
    dask.config.set(scheduler="threads", num_workers=CORES)
    with folder(args) as cache:
        ds = stored_scene(cache, width)
        small = {"encoder": "tu-mobilenetv3_small_050"} if args.size == "small" else {}
        model = untrained(LAYERS, window=WINDOW, **small)
        path = saved(model, cache / f"untrained-{args.size}.safetensors")
        # The same network as it comes by default; the others must take the predecessor's windows.
        local = untrained(LAYERS, window=WINDOW, centering="local", **small)
        default = saved(local, cache / f"untrained-local-{args.size}.safetensors")
        stack = torch.from_numpy(np.stack([ds[n].values.astype(np.float32) for n in LAYERS]))

        layers = rasters(ds, cache / f"rasters-{width}")

        def ours(model: str = path, **keywords: Any) -> Callable[[], Any]:
            keywords = {"precision": "float32", **keywords}
            # The others have their network in memory before the clock starts: so does ours.
            refine(ds.isel(y=slice(WINDOW), x=slice(WINDOW)), model, **keywords).compute()

            def run() -> None:
                refined = refine(ds, model, **keywords)
                refined.to_dataset().deepdem.to_zarr(cache / "refined.zarr", overwrite=True)

            return run

        net = deepdem.load_model(path).net.eval()
        bare = for_inference(deepdem.load_model(path).net.eval())
        todo = places((width, width))
        some = torch.stack([stack[:, y : y + WINDOW, x : x + WINDOW] for y, x in todo[:24]])
        some = bare.standardise(some).contiguous(memory_format=torch.channels_last)
        sizes = [1, 2] if args.size == "small" else [1, 2, 4, 8, 16, 24]
        threads, size = fastest(bare.network, some, sizes)
        batches = repeated(some, size, len(todo))

        def old() -> None:
            predecessor(net.requires_grad_(True), layers, cache / f"tiles-{width}")

        works = {
            "bare": lambda: forward_all(bare.network, batches, threads),
            "refine 1/2": ours(overlap=0.5),
            "refine": ours(default),
            "predecessor": old,
        }
        if (run := monai(net, stack)) is not None:
            works["MONAI"] = run
        if args.bf16 or bf16_is_fast("cpu"):
            works["refine 1/2 bf16"] = ours(overlap=0.5, precision="bf16")
            works["refine bf16"] = ours(default, precision="bf16")
        if args.only:
            works = {name: work for name, work in works.items() if name in args.only}
        times = in_turn(works, repeat)
    report(results(times, f"{len(todo)} windows, bare: batch {size}, {threads} thread(s)"))


def results(times: dict[str, list[float]], note: str) -> list[Result]:
    print(f"{note}\n")
    wanted = [
        ("1. refine, overlap 1/2 / bare forward passes", "refine 1/2", "bare", 1.15, False),
        ("2. predecessor / refine, overlap 1/2, float32", "predecessor", "refine 1/2", 2.2, True),
        ("2. predecessor / refine, overlap 1/2, bf16", "predecessor", "refine 1/2 bf16", 4, True),
        ("3. predecessor / refine, defaults, float32", "predecessor", "refine", 5, True),
        ("3. predecessor / refine, defaults, bf16", "predecessor", "refine bf16", 5, True),
        ("4. MONAI / refine, overlap 1/2, float32", "MONAI", "refine 1/2", 1.6, True),
    ]
    out = []
    for measure, one, other, bar, at_least in wanted:
        if one in times and other in times:
            figure, spread = ratio(times, one, other)
            out.append(Result(measure, figure, bar, at_least, note=spread))
        else:
            missing = " and ".join(name for name in (one, other) if name not in times)
            out.append(Result(measure, math.nan, note=f"{missing} not timed"))
    return out


if __name__ == "__main__":
    main()

"""How fast chips reach the network: over the predecessor's dataset, torchgeo and plain NumPy.

Chips are 256 pixels wide and have 7 layers, the truth among them. Each loader runs in a process of
its own, in turn; what is timed is from the opened scene to the last batch of an epoch, the reading
of what is held in memory included, imports left out.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import xarray as xr
from common import LAYERS, Result, folder, options, report, table

import deepdem

TRUTH, SIZE, BATCH, CORES = "lidar_dsm", 256, 8, 2
NAMES = (*LAYERS, TRUTH)


# --- the scene, as Zarr and as GeoTIFFs ----------------------------------------------------------


def prepare(cache: Path, width: int) -> tuple[Path, Path]:
    """Return a scene of mirrored copies of a synthetic one, in Zarr and as a GeoTIFF a layer."""
    store, tiffs = cache / f"chips-{width}.zarr", cache / f"chips-{width}"
    if tiffs.exists():
        return store, tiffs
    tile = min(width // 2, 1024)
    part = deepdem.synthetic_scene((tile, tile), seed=0).deepdem.prepare()[list(NAMES)].compute()
    times = width // (2 * tile)

    def mirrored(values: np.ndarray) -> np.ndarray:
        row = np.hstack([values, values[:, ::-1]])
        return np.tile(np.vstack([row, row[::-1]]), (times, times))

    y0, x0 = float(part.y[0]), float(part.x[0])
    steps = np.arange(width, dtype=float)
    scene = xr.Dataset(
        {n: (("y", "x"), mirrored(part[n].values), part[n].attrs) for n in NAMES},
        coords={"y": y0 - steps, "x": x0 + steps},
    ).rio.write_crs(part.rio.crs)
    scene.deepdem.to_zarr(store, overwrite=True)
    tiffs.mkdir()
    for name in NAMES:  # as the Ames Stereo Pipeline writes them
        scene[name].astype("float32").rio.to_raster(
            tiffs / f"{name}.tif", tiled=True, blockxsize=256, blockysize=256, compress="lzw"
        )
    return store, tiffs


# --- the loaders ---------------------------------------------------------------------------------


def module(store: str, **more: object) -> deepdem.ChipDataModule:
    """Return our chips of all of a scene but a strip, without a trainer."""
    spec = deepdem.DeepDEM(LAYERS, TRUTH, architecture="resdepth", chip_size=SIZE).spec
    data = deepdem.ChipDataModule(
        deepdem.open_scene(store), **{"chip_size": SIZE, "batch_size": BATCH, **more}
    )
    data.augment = ()
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(spec=spec), world_size=1, global_rank=0, current_epoch=0
    )
    return data


def ours(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    data = module(store, split="top 99 %", cache="auto" if cache == "auto" else int(cache))
    began = time.perf_counter()
    data.setup()
    loader = data.train_dataloader()
    seen = [(len(batch["target"]), time.perf_counter() - began) for batch in loader]
    total = sum(n for n, _ in seen)
    first_n, first = seen[0]
    return {"rate": total / seen[-1][1], "chips": total, "first": first,
            "steady": (total - first_n) / (seen[-1][1] - first),
            "held": float(data.regions["train"][0].held is not None)}  # fmt: skip


class Predecessor:
    """A dataset as the predecessor's: each layer opened and read by a window for every chip."""

    def __init__(self, tiffs: str, chips: int):
        import rasterio

        self.paths = [f"{tiffs}/{name}.tif" for name in NAMES]
        with rasterio.open(self.paths[0]) as file:
            height, width = file.shape
        draw = np.random.default_rng(0)
        self.places = draw.integers(0, (height - SIZE, width - SIZE), (chips, 2))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int):
        import rasterio
        import torch
        from rasterio.windows import Window

        y, x = map(int, self.places[index])
        layers = []
        for path in self.paths:
            with rasterio.open(path) as file:
                layers.append(file.read(1, window=Window(x, y, SIZE, SIZE)))
        return torch.from_numpy(np.stack(layers))


def predecessor(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    from torch.utils.data import DataLoader

    began = time.perf_counter()
    loader = DataLoader(Predecessor(tiffs, chips), batch_size=BATCH, num_workers=CORES)
    total = sum(len(batch) for batch in loader)
    return {"rate": total / (time.perf_counter() - began), "chips": total}


def torchgeo(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    class Scene(RasterDataset):
        filename_glob, filename_regex = "dsm.tif", r"(?P<band>[a-z_]+)\.tif"
        all_bands, separate_files = NAMES, True

    whole = Scene(tiffs)
    sampler = RandomGeoSampler(whole, size=SIZE, length=chips)
    loader = DataLoader(
        whole, batch_size=BATCH, sampler=sampler, num_workers=CORES, collate_fn=stack_samples
    )
    began = time.perf_counter()
    total = 0
    for batch in loader:
        assert batch["image"].shape[1:] == (len(NAMES), SIZE, SIZE), batch["image"].shape
        total += len(batch["image"])
    return {"rate": total / (time.perf_counter() - began), "chips": total}


def memory(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    """Chips of a held scene, and random crops of a preloaded array into one buffer, in turn.

    Neither waits for anything: processor time says the same on a busy machine.
    """

    def clock() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()])

    data = module(store, split="top 99 %", cache=True, chips_per_epoch=chips)
    data.setup()
    loader = data.train_dataloader()
    region = data.regions["train"][0]
    array = np.stack([region.held[name].numpy() for name in NAMES])
    buffer = np.empty((BATCH, len(NAMES), SIZE, SIZE), np.float32)
    draw = np.random.default_rng(0)

    def plain() -> np.ndarray:
        began = clock()
        for _ in range(chips // BATCH):
            places = draw.integers(0, np.array(array.shape[1:]) - SIZE, (BATCH, 2))
            for k, (y, x) in enumerate(places):
                buffer[k] = array[:, y : y + SIZE, x : x + SIZE]
        return chips / (clock() - began)

    def loaded(epoch: int) -> np.ndarray:
        loader.sampler.set_epoch(epoch)
        began = clock()
        total = sum(len(batch["target"]) for batch in loader)
        return total / (clock() - began)

    plain(), loaded(0)
    rates = [(loaded(k), plain()) for k in range(1, 6)]
    (one, one_wall), (other, other_wall) = np.median(rates, axis=0)
    return {"rate": one, "plain": other, "rate by the wall": one_wall,
            "plain by the wall": other_wall}  # fmt: skip


class Resident(threading.Thread):
    """The most memory that this process holds, in MiB beyond what it held at the beginning."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        gc.collect()
        self.process, self.done = psutil.Process(), threading.Event()
        self.began = self.most = self.process.memory_info().rss

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)

    def __enter__(self) -> Resident:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()
        self.most = max(self.most, self.process.memory_info().rss)

    @property
    def mib(self) -> float:
        return (self.most - self.began) / 2**20


def endless(path: str, store: str, width: int) -> None:
    """Write a scene of `width` pixels: one shard of another, under the names of all shards.

    Half of the rows have no data, as at the side of a real scene.
    """
    import zarr

    small = deepdem.open_scene(store)
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for name in NAMES:
        array = group.create_array(
            name, shape=(width, width), dtype=small[name].dtype, chunks=(256, 256),
            shards=(2048, 2048), dimension_names=("y", "x"),
            fill_value=False if name == "valid" else np.nan,
            attributes={"grid_mapping": "spatial_ref"},
        )  # fmt: skip
        block = small[name][:2048, :2048].values
        array[: block.shape[0], : block.shape[1]] = block
        first = Path(path) / name / "c/0/0"
        for i, j in product(range(-(-width // 4096)), range(-(-width // 2048))):
            other = Path(path) / name / f"c/{i}/{j}"
            other.parent.mkdir(exist_ok=True)
            if (i, j) != (0, 0):
                other.hardlink_to(first)
    axis = np.arange(width, dtype=float)
    xr.Dataset(coords={"y": 5e6 - axis, "x": 5e5 + axis}).rio.write_crs(small.rio.crs).to_zarr(
        path, mode="a", consolidated=False
    )


def vast(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    """Set up chips of a lazy scene that is `chips` pixels wide, then choose and read some.

    Memory is what the process holds at most beyond what it held once the scene was open.
    """
    path = f"{cache}/vast-{chips}-half.zarr"
    if not Path(path).exists():
        endless(path, store, chips)
    data = module(path, num_workers=0, cache="256 MiB")
    with Resident() as setting_up:
        began = time.perf_counter()
        data.setup()
        loader = data.train_dataloader()
        generator = data.scenes[0].deepdem.chips(size=SIZE, overlap=SIZE // 2)
        took = time.perf_counter() - began
    with Resident() as choosing:
        began = time.perf_counter()
        fixed = data.val_dataloader()
        chose = time.perf_counter() - began
    with Resident() as reading:
        began = time.perf_counter()
        next(iter(loader))
        read = time.perf_counter() - began
    return {"seconds": took, "mib": setting_up.mib, "chips": len(generator),
            "val seconds": chose, "val mib": choosing.mib, "val chips": len(fixed.dataset.chips),
            "first seconds": read, "first mib": reading.mib}  # fmt: skip


def waiting(store: str, tiffs: str, chips: int, cache: str) -> dict[str, float]:
    """Train, and say which share of a step goes by until its batch is there."""
    import pytorch_lightning as pl
    import torch

    torch.set_num_threads(CORES)
    steps = chips

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_train_batch_start(self, *_: object) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_end(self, *_: object) -> None:
            now = time.perf_counter()
            self.times.append((self.begun, now))

    clock = Clock()
    model = deepdem.DeepDEM(LAYERS, TRUTH, encoder="resnet18", chip_size=SIZE)
    data = deepdem.ChipDataModule(
        deepdem.open_scene(store), chip_size=SIZE, batch_size=BATCH, split="top 99 %",
        chips_per_epoch=steps * BATCH, cache="auto" if cache == "auto" else int(cache),
    )  # fmt: skip
    pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock], accelerator="cpu", limit_val_batches=0,
    ).fit(model, data)  # fmt: skip
    # From the end of one step to the begin of the next; the first has no step before it.
    waits = [b[0] - a[1] for a, b in zip(clock.times, clock.times[1:], strict=False)]
    whole = clock.times[-1][1] - clock.times[0][1]
    return {"share": sum(waits) / whole, "step": whole / len(waits)}


KINDS = {f.__name__: f for f in (ours, predecessor, torchgeo, memory, vast, waiting)}


def child(kind: str, *arguments: object) -> dict[str, float]:
    """Return what a loader gives in a process of its own."""
    # The other loaders' worker threads are one each as well.
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if kind != "waiting" else str(CORES)}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", kind, *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{kind}: {run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    print(kind, *arguments[2:], {k: round(v, 4) for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, store, tiffs, chips, cache = sys.argv[2:]
        print(json.dumps(KINDS[kind](store, tiffs, int(chips), cache)))
        return
    args = options(
        __doc__, only={"nargs": "*", "choices": sorted(KINDS), "help": "some of the measures"}
    )
    width = {"small": 1024, "medium": 4096, "full": 8192}[args.size]
    only = set(args.only or KINDS)
    repeat = args.repeat or {"small": 1, "medium": 2, "full": 2}[args.size]
    few = {"small": 64, "medium": 400, "full": 400}[args.size]
    quarter = width**2 * 4 * len(NAMES) // 4
    results: list[Result] = []
    with folder(args) as cache:
        store, tiffs = prepare(cache, width)
        rates: dict[str, list[float]] = {}
        with_torchgeo = importlib.util.find_spec("torchgeo") is not None and "torchgeo" in only
        if "torchgeo" in only and not with_torchgeo:
            print("torchgeo is not installed: that measure is left out")
        for _ in range(repeat):
            if "ours" in only:
                for name, limit in (("auto", "auto"), ("25 %", quarter)):
                    rates.setdefault(name, []).append(child("ours", store, tiffs, 0, limit)["rate"])
            if "predecessor" in only:
                rates.setdefault("predecessor", []).append(
                    child("predecessor", store, tiffs, few, "-")["rate"]
                )
            if with_torchgeo:
                rates.setdefault("torchgeo", []).append(
                    child("torchgeo", store, tiffs, 2 * few, "-")["rate"]
                )
        best = {name: float(np.median(r)) for name, r in rates.items()}
        if best:
            table(("loader", "chips a second"), [(n, f"{r:.0f}") for n, r in best.items()])
        for name, over, bar in (
            ("auto", "predecessor", 8.0), ("auto", "torchgeo", 2.0), ("25 %", "predecessor", 4.0),
        ):  # fmt: skip
            if name in best and over in best:
                measure = f"chips a second, cache {name}, over {over}"
                results.append(Result(measure, best[name] / best[over], bar, at_least=True))
        if "memory" in only:
            found = child("memory", store, tiffs, 8 * few, "-")
            by_wall = found["rate by the wall"] / found["plain by the wall"]
            results.append(
                Result("chips from memory over plain NumPy crops", found["rate"] / found["plain"],
                       0.6, at_least=True, note=f"processor time; by the wall {by_wall:.3f}")
            )  # fmt: skip
        if "vast" in only:
            side = 100_000 if args.size != "small" else 20_000
            found = child("vast", store, tiffs, side, cache)
            note = (
                f"{found['val chips']:.0f} validation chips chosen: {found['val seconds']:.1f} s, "
                f"{found['val mib']:.0f} MiB; first batch: {found['first seconds']:.1f} s, "
                f"{found['first mib']:.0f} MiB, of which tiles may have 256"
            )
            results.append(Result(f"set-up, {side} px wide", found["seconds"], 5, unit="s"))
            results.append(
                Result(f"set-up, {side} px wide", found["mib"], 500, unit="MiB", note=note)
            )
        if "waiting" in only and args.size != "small":
            for name, limit in (("auto", "auto"), ("25 %", quarter)):
                found = child("waiting", store, tiffs, 24, limit)
                note = f"{found['step']:.2f} s a step"
                results.append(
                    Result(f"share of a step spent waiting, cache {name}", found["share"], 0.03,
                           note=note)
                )  # fmt: skip
    report(results)


if __name__ == "__main__":
    main()

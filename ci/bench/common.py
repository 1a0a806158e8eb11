"""What the benchmarks share: options, scenes, models, clocks and the table of results.

A measure is a ratio of two things timed in turn within one run (A B A B), so that it says the
same on a fast machine and on a busy one. A bar that is missed is printed, not raised.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import deepdem

LAYERS = ("dsm", "ortho_left", "ortho_right", "triangulation_error", "ndvi", "valid")

warnings.filterwarnings("ignore", ".*CUDA.*")
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One measure: its bar is met if the figure is at most, or at least, `bar`; None: no bar."""

    measure: str
    figure: float
    bar: float | None = None
    at_least: bool = False
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        met = self.figure >= self.bar if self.at_least else self.figure <= self.bar
        return "PASS" if met else "FAIL"

    def row(self) -> tuple[str, ...]:
        sign = ">=" if self.at_least else "<="
        bar = "" if self.bar is None else f"{sign} {self.bar:g}"
        return self.measure, bar, f"{self.figure:.4g} {self.unit}".strip(), self.verdict, self.note


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(str(row[n])) for row in (heads, *rows)) for n in range(len(heads))]
    for row in (heads, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def report(results: Sequence[Result]) -> None:
    """Print the measures, their bars and whether they are met."""
    table(("measure", "bar", "figure", "", "note"), [r.row() for r in results])


# --- options -------------------------------------------------------------------------------------


def options(description: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Return the command line's options; `size` is "small", "medium" or "full"."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    group = parser.add_mutually_exclusive_group()
    for size, text in (("small", "seconds: whether it runs"), ("medium", "a quarter of the area")):
        group.add_argument(
            f"--{size}", dest="size", action="store_const", const=size, help=text, default="full"
        )
    parser.add_argument(
        "--cache", type=Path, help="a folder for scenes and trained models; default: temporary"
    )
    parser.add_argument("--repeat", type=int, default=None, help="how often each thing is timed")
    for name, keywords in more.items():
        parser.add_argument(f"--{name}", **keywords)
    args = parser.parse_args()
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda",
                 "distributed"):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{Path(sys.argv[0]).name}: {args.size}, {machine()}\n", flush=True)
    return args


def machine() -> str:
    import torch

    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}{load}"
    )


@contextmanager
def folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give the cache folder, or one that is gone afterwards."""
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
        yield args.cache
        return
    with tempfile.TemporaryDirectory(prefix="deepdem-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


# --- clocks --------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(works: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each piece of work, timed in turn `repeat` times."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            times[name].append(seconds(work))
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> tuple[float, str]:
    """Return the median of the rounds' ratios, and their range in words."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    spread = f"{min(ratios):.3g} to {max(ratios):.3g} in {len(ratios)} rounds"
    return statistics.median(ratios), spread


# --- scenes --------------------------------------------------------------------------------------


def stored_scene(cache: Path, width: int) -> xr.Dataset:
    """Return a square scene of six layers from Zarr: a synthetic tile, mirrored over and over.

    Only its size matters to the clock; a scene of 16384 would take an hour to draw.
    """
    store = cache / f"scene-{width}.zarr"
    if not (store / "zarr.json").exists():
        import dask.array as da

        tile_px = min(1024, width)
        tile = deepdem.synthetic_scene((tile_px, tile_px), seed=5).deepdem.prepare()
        tile = tile[[*LAYERS]].compute()
        times = -(-width // tile_px)
        empty = deepdem.synthetic_scene((width, width), seed=5)
        scene = empty[[]].assign_attrs(title="benchmark")
        for name, layer in tile.data_vars.items():
            rows = [
                [da.from_array(layer.data[:: 1 - 2 * (i % 2), :: 1 - 2 * (j % 2)], chunks=-1)
                 for j in range(times)]
                for i in range(times)
            ]  # fmt: skip
            mosaic = da.block(rows)[:width, :width].rechunk(2048)
            scene[name] = (("y", "x"), mosaic, layer.attrs)
        scene.deepdem.to_zarr(store, overwrite=True)
    return deepdem.open_scene(store)


def data_folder() -> Path | None:
    """Return the folder of real data (DEEPDEM_DATA, or shared/data beside the project)."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("DEEPDEM_DATA", beside))
    return path if path.is_dir() else None


# --- models --------------------------------------------------------------------------------------


def untrained(
    layers: Sequence[str] = LAYERS,
    *,
    window: int = 256,
    encoder: str = "resnet18",
    head: float = 30.0,
    **keywords: Any,
) -> deepdem.DeepDEM:
    """Return a network of random weights that gives residuals of metres.

    Centred on chips, unless `keywords` say otherwise: what others are measured against takes
    windows of that width.
    """
    import torch

    torch.manual_seed(0)
    model = deepdem.DeepDEM(
        list(layers),
        encoder=encoder,
        chip_size=window,
        dsm_scale=5.0,
        **{"centering": "chip", **keywords},
    )
    spec, names = model.spec, model.spec.standardised
    means = {n: 1000.0 if n.startswith("ortho") else 0.4 for n in names}
    stds = {n: 500.0 if n.startswith("ortho") else 0.3 for n in names}
    model.net.spec = replace(spec, pixel_size=1.0, means=means, stds=stds)
    last = [m for m in model.net.network.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(head)
    return model.eval()


def saved(model: deepdem.DeepDEM, path: Path) -> str:
    model.save(path)
    return str(path)


@dataclass(frozen=True)
class Trained:
    """A trained model and the part of its scene that it has not seen, in memory."""

    name: str
    path: str
    unseen: xr.Dataset
    target: str = "lidar_dsm"


def trained(
    cache: Path, name: str, scene: xr.Dataset, *, chip_size: int, minutes: float, centering: str
) -> Trained:
    """Return a model trained as ``deepdem demo`` does it, on the left 65 % of a prepared scene."""
    from deepdem.layers import describe

    edge = round(scene.sizes["x"] * 0.65)
    path = cache / f"{name}-{chip_size}-{centering}-{minutes:g}min.safetensors"
    if not path.exists():
        import pytorch_lightning as pl

        roles = ("height", "image", "error", "index")
        layers = [str(n) for n in scene.data_vars if describe(str(n)).role in roles]
        layers.sort(key=lambda n: (n != "dsm", n))
        pl.seed_everything(0, verbose=False)
        model = deepdem.DeepDEM(
            layers, "lidar_dsm", architecture="resdepth",
            options={"start_kernel": 24, "depth": 3}, chip_size=chip_size, learning_rate=2e-3,
            centering=centering,
        )  # fmt: skip
        data = deepdem.ChipDataModule(
            scene.isel(x=slice(0, edge)), chip_size=chip_size,
            batch_size=max(1, 4 * 64**2 // chip_size**2), split="top 80 %", seed=0,
        )  # fmt: skip
        trainer = pl.Trainer(
            max_time=timedelta(minutes=minutes), max_epochs=-1, devices=1, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data)
        model.save(path)
    unseen = scene.isel(x=slice(edge + chip_size, None)).compute()
    return Trained(f"{name}, window {chip_size}", str(path), unseen)


def synthetic_model(
    cache: Path, *, small: bool, chip_size: int = 64, centering: str = "local"
) -> Trained:
    """Return a model of the synthetic scene of the demo."""
    shape, minutes = ((256, 768), 0.03) if small else ((1024, 2048), 2.0)
    store = cache / f"demo-{shape[0]}.zarr"
    if not (store / "zarr.json").exists():
        scene = deepdem.synthetic_scene(shape, seed=0, chunks=512).drop_vars("lidar_dtm")
        scene.deepdem.prepare().deepdem.to_zarr(store, overwrite=True)
    return trained(
        cache, f"synthetic-{shape[0]}", deepdem.open_scene(store), chip_size=chip_size,
        minutes=minutes, centering=centering,
    )  # fmt: skip


def quarry_model(
    cache: Path, data: Path, *, small: bool, chip_size: int = 64, centering: str = "local"
) -> Trained:
    """Return a model of the real quarry, its DSM levelled by the training part's median."""
    from deepdem.sources.folder import find_layers

    scene = deepdem.stack(find_layers(data / "stereo_marseille_quarry"), like="dsm", chunks=512)
    left = scene.isel(x=slice(0, round(scene.sizes["x"] * 0.65)))
    offset = float((left["dsm"] - left["lidar_dsm"]).compute().median())
    with xr.set_options(keep_attrs=True):
        scene = scene.assign(dsm=scene["dsm"] - np.float32(offset))
    scene = scene.deepdem.prepare().compute()
    return trained(
        cache, "quarry", scene, chip_size=chip_size, minutes=0.03 if small else 2.0,
        centering=centering,
    )  # fmt: skip


# --- the predecessor, and what is left at windows' edges -----------------------------------------


def starts(length: int, width: int, stride: int) -> list[int]:
    """Return the first pixels of windows: every stride, the last one moved inward."""
    last = max(length - width, 0)
    return [*range(0, last, stride), last]


def first_wins(model: str, ds: xr.Dataset, stride: int) -> np.ndarray:
    """Return the surface of the predecessor's merge: of the tiles at a pixel the first stands."""
    import torch

    net = deepdem.load_model(model).net.eval()
    width = net.spec.chip_size
    stack = np.stack([ds[n].values.astype(np.float32) for n in net.spec.layers])
    out = np.full(stack.shape[1:], np.nan, dtype=np.float32)
    dsm = stack[net.spec.layers.index("dsm")]
    for y in starts(out.shape[0], width, stride):
        for x in starts(out.shape[1], width, stride):
            there = slice(y, y + width), slice(x, x + width)
            with torch.inference_mode():
                tile = net(torch.from_numpy(stack[:, *there][None]))[0].numpy() + dsm[there]
            out[there] = np.where(np.isnan(out[there]), tile, out[there])
    return out


def edges(length: int, width: int, stride: int) -> np.ndarray:
    """Return the lines between pixels i - 1 and i at which some window starts or ends."""
    begin = starts(length, width, stride)
    lines = {*begin, *(s + width for s in begin)}
    return np.array(sorted(i for i in lines if 2 <= i <= length - 2), dtype=int)


def seam(correction: np.ndarray, width: int, stride: int) -> float:
    """Return the mean jump at window edges beyond what is usual elsewhere, metres.

    The jump at a line is what is left of the step across it when the slopes of both sides are
    taken off (half a third difference): 0 on a smooth surface, J where a step of J is. The mean
    of its absolute value where no window ends, the surface's own roughness, is subtracted. A
    network that halves its input three times has a texture of eight pixels: lines are compared
    with lines of the same place in it.
    """
    jumps, usual = [], []
    for array in (correction, correction.T):
        jump = np.abs(
            array[2:-1] - array[1:-2]
            - 0.5 * ((array[1:-2] - array[:-3]) + (array[3:] - array[2:-1]))
        )  # fmt: skip
        lines = np.arange(2, len(array) - 1)
        at = np.isin(lines, edges(len(array), width, stride))
        jumps.append(jump[at].ravel())
        usual.append(jump[~at & np.isin(lines % 8, lines[at] % 8)].ravel())
    if not sum(j.size for j in jumps):
        return 0.0
    return float(np.nanmean(np.concatenate(jumps)) - np.nanmean(np.concatenate(usual)))

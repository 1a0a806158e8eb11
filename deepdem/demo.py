"""The main job from end to end, as ``deepdem demo`` runs it: build, train, refine, evaluate."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from deepdem.layers import describe, truths
from deepdem.scene import stack
from deepdem.store import open_scene, scene_to_zarr

if TYPE_CHECKING:
    import pandas as pd

    from deepdem.train import DeepDEM

__all__ = ["DemoSettings", "run_demo"]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes
    ----------
    out
        The folder for all that it writes.
    scene
        A folder of rasters (see `deepdem.sources.folder.find_layers`); None: the synthetic scene.
    target
        The truth.
    minutes
        How long training takes.
    chip_size
        Pixels; a small chip suits a small scene.
    train_share
        The share of the scene's width that training may see, in percent; the demo refines and
        evaluates the rest, less a guard band of one chip.
    seed
        Of the synthetic scene, the chips and the network.
    workers
        Of the local Dask cluster; one thread each.
    """

    out: Path = Path("deepdem-demo")
    scene: Path | None = None
    target: str = "lidar_dsm"
    minutes: float = 2.0
    chip_size: int = 64
    train_share: float = 65.0
    seed: int = 0
    workers: int = 2
    shape: tuple[int, int] = (1024, 2048)


Tell = Callable[[str], None]


def run_demo(settings: DemoSettings, tell: Tell, callbacks: list[Any]) -> pd.DataFrame:
    """Run the demo and return the table: initial and refined against the truth, unseen region.

    Parameters
    ----------
    settings
        What to do.
    tell
        Is told each step in a line.
    callbacks
        Lightning callbacks, such as a progress bar.

    Raises
    ------
    ValueError
        The rasters lack the DSM or the truth, or the scene is too small for the chips.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    store = settings.out / "scene.zarr"
    began = time.monotonic()
    scene = _build(settings, store, tell)
    train, unseen = _parts(scene, settings)
    model = _train(train, settings, callbacks)
    path = settings.out / "model.safetensors"
    model.save(path)
    tell(f"Model: {path}")
    table = _refine(unseen, path, settings, store, tell)
    table.to_csv(settings.out / "table.csv")
    tell(f"Done in {time.monotonic() - began:.0f} s; everything is in {settings.out}/")
    return table


def _build(settings: DemoSettings, store: Path, tell: Tell) -> xr.Dataset:
    if settings.scene is None:
        from deepdem.sources.synthetic import synthetic_scene

        tell(f"Building a synthetic scene of {settings.shape[0]} by {settings.shape[1]} pixels")
        scene = synthetic_scene(settings.shape, seed=settings.seed, chunks=512)
    else:
        from deepdem.sources.folder import find_layers

        layers = find_layers(settings.scene)
        if settings.target not in layers:
            raise ValueError(
                f"{settings.scene} holds no {settings.target}.tif: training needs the truth"
            )
        tell("Stacking " + ", ".join(f"{n} ({Path(f).name})" for n, f in layers.items()))
        scene = _level(stack(layers, like="dsm", chunks=512), settings, tell)
    others = [name for name in truths(map(str, scene.data_vars)) if name != settings.target]
    scene = scene.drop_vars(others)
    from deepdem.derive import prepare

    scene_to_zarr(prepare(scene), store, group="scene", overwrite=True)
    tell(f"Scene: {store}, group 'scene'")
    return open_scene(store, "scene")


def _level(scene: xr.Dataset, settings: DemoSettings, tell: Tell) -> xr.Dataset:
    """Return the scene with its DSM at the truth's level.

    A constant offset (a pointing bias, another vertical datum) is for co-registration to remove;
    a network that learns it would be praised for that. It is taken from the training part only.
    """
    train, _ = _parts(scene, settings)
    offset = float((train["dsm"] - train[settings.target]).compute().median())
    if not np.isfinite(offset):
        raise ValueError(
            f"dsm and {settings.target} share no pixel in the left {settings.train_share:.0f} % "
            "of the scene, which is trained on"
        )
    tell(f"The DSM lies {offset:+.2f} m off the truth (median, training part): removed")
    with xr.set_options(keep_attrs=True):
        return scene.assign(dsm=scene["dsm"] - np.float32(offset))


def _parts(scene: xr.Dataset, settings: DemoSettings) -> tuple[xr.Dataset, xr.Dataset]:
    """Return what training may see, and what is refined; a chip's width apart."""
    edge = round(scene.sizes["x"] * settings.train_share / 100)
    start = edge + settings.chip_size
    if min(edge, scene.sizes["x"] - start, scene.sizes["y"]) < settings.chip_size:
        raise ValueError(
            f"a scene of {dict(scene.sizes)} is too small for chips of {settings.chip_size} px "
            "and an unseen region: pass a smaller --chip-size"
        )
    return scene.isel(x=slice(0, edge)), scene.isel(x=slice(start, None))


def _train(train: xr.Dataset, settings: DemoSettings, callbacks: list[Any]) -> DeepDEM:
    import pytorch_lightning as pl

    from deepdem.data import ChipDataModule
    from deepdem.train import DeepDEM

    roles = ("height", "image", "error", "index")
    layers = [str(n) for n in train.data_vars if describe(str(n)).role in roles]
    layers.sort(key=lambda n: (n != "dsm", n))
    pl.seed_everything(settings.seed, verbose=False)
    model = DeepDEM(
        layers,
        settings.target,
        architecture="resdepth",
        options={"start_kernel": 24, "depth": 3},
        chip_size=settings.chip_size,
        learning_rate=2e-3,
    )
    data = ChipDataModule(
        train, chip_size=settings.chip_size, batch_size=4, split="top 80 %", seed=settings.seed
    )
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = pl.Trainer(
        max_time=timedelta(minutes=settings.minutes),
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1,
        callbacks=callbacks,
    )
    with warnings.catch_warnings():
        # The chips lie in memory; the advice to start loader processes does not hold here.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.fit(model, data)
    return model


def _refine(
    unseen: xr.Dataset, model: Path, settings: DemoSettings, store: Path, tell: Tell
) -> pd.DataFrame:
    from dask.distributed import Client, LocalCluster

    from deepdem.cog import write_cog
    from deepdem.evaluate import evaluate
    from deepdem.plot import compare
    from deepdem.refine import refine
    from deepdem.report import write_report
    from deepdem.write import write_zarr

    height, width = unseen.sizes["y"], unseen.sizes["x"]
    tell(f"Refining {height} by {width} unseen pixels on {settings.workers} Dask workers")
    with (
        LocalCluster(
            n_workers=settings.workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster),
    ):
        write_zarr(refine(unseen, model, chunks=512), store, group="refined", overwrite=True)
    refined = open_scene(store, "refined")["refined"]
    tell(f"Refined: {store}, group 'refined'")
    path = settings.out / "refined.tif"
    write_cog(refined, path, progress=False)
    tell(f"GeoTIFF, cloud-optimised: {path}")
    table = evaluate(unseen, refined, truth=settings.target)
    figure = compare(unseen, refined, truth=settings.target)
    figure.savefig(settings.out / "demo.png", dpi=130)
    tell(f"Figure: {settings.out / 'demo.png'}")
    path = write_report(unseen, refined, settings.out / "report.html", truth=settings.target)
    tell(f"Report: {path}")
    return table

"""Training from a config file, and comparisons of several: what ``deepdem train`` runs.

A config is what `LightningCLI` takes: ``model`` (of `DeepDEM`), ``data`` (of `SceneData`) and
``trainer``. A sweep is a list of them over a common base; each run has a folder of its own, a run
that is done is not done again, and one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from deepdem.data import ChipDataModule
from deepdem.derive import prepare
from deepdem.evaluate import evaluate
from deepdem.modelfile import read_model
from deepdem.refine import refine
from deepdem.sources.synthetic import synthetic_scene
from deepdem.splits import split_scene
from deepdem.store import open_scene
from deepdem.train import DeepDEM

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "SceneData",
    "Sweep",
    "comparison",
    "draw_comparison",
    "read_sweep",
    "run_sweep",
    "train",
]

Tell = Callable[[str], None]
_STORED = "run.json"
# What fits two cores and a few minutes: as many pixels in a batch as two chips of 256 have.
_LIMITED_PX = 2 * 256**2


class SceneData(ChipDataModule):
    """Chips of scenes that are named in a config file.

    Parameters
    ----------
    scenes
        Each a Zarr store (``scenes.zarr``), a group in one (``scenes.zarr::baker_2015``), or
        ``synthetic``, ``synthetic:SEED`` or ``synthetic:SEED:ROWSxCOLUMNS``, a prepared scene of
        1024 by 2048 pixels at 1 m or of the size that is said.
    unseen
        A part of each scene that is kept out of training and validation, such as
        ``"right 35 %"``: what is refined and evaluated in the end.
    guard_px
        The width of the band between it and the rest, which is not used; None: a chip.
    options
        As `ChipDataModule` takes them.
    """

    def __init__(
        self,
        scenes: list[str],
        *,
        unseen: str | None = None,
        guard_px: int | None = None,
        **options: Any,
    ):
        whole = [_open(name) for name in scenes]
        guard = int(options.get("chip_size", 256)) if guard_px is None else guard_px
        cut = [(ds, None) if unseen is None else _cut(ds, unseen, guard) for ds in whole]
        self.unseen = [part for _, part in cut if part is not None]
        super().__init__([part for part, _ in cut], **options)


def _open(name: str) -> xr.Dataset:
    if match := re.fullmatch(r"synthetic(?::(\d+))?(?::(\d+)x(\d+))?", name):
        shape = int(match[2] or 1024), int(match[3] or 2048)
        return prepare(synthetic_scene(shape, seed=int(match[1] or 0), chunks=512))
    store, _, group = name.partition("::")
    return open_scene(store, group or None)


def _cut(ds: xr.Dataset, unseen: str, guard: int) -> tuple[xr.Dataset, xr.Dataset]:
    """Return what training may see of a scene, and the part that it may not."""
    shape = ds.sizes["y"], ds.sizes["x"]
    kept, rest = (
        ds.isel(y=slice(box.y0, box.y1), x=slice(box.x0, box.x1))
        for box in split_scene(shape, unseen, guard)
    )
    return rest, kept


# --- one training --------------------------------------------------------------------------------


class TrainingCLI(LightningCLI):
    """Lightning's command line, with what this package needs set."""

    def __init__(self, args: Any, out: Path):
        self.out = out
        with warnings.catch_warnings():
            # It takes `deepdem train` itself for arguments that were meant for it.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().__init__(
                DeepDEM, SceneData, args=args, run=False, seed_everything_default=0,
                save_config_kwargs={"overwrite": True}, auto_configure_optimizers=False,
                parser_kwargs={"prog": "deepdem train"},
            )  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what model and data share, and add what a training leaves behind."""
        parser.link_arguments("model.chip_size", "data.chip_size")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "trainer.max_epochs": 20, "trainer.log_every_n_steps": 10,
                "trainer.default_root_dir": str(self.out), "checkpoint.save_last": True,
                "checkpoint.dirpath": str(self.out / "checkpoints"),
            }
        )  # fmt: skip
        parser.add_argument(
            "--ckpt_path", type=str, default=None, help="A checkpoint to go on from."
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Return the trainer, by default with a table of metrics and, if it is there, TensorBoard.

        Heights are metres in both.
        """
        logger = self._get(self.config_init, "trainer")["logger"]
        if "logger" not in kwargs and logger in (None, True):
            sheet = CSVLogger(self.out, "logs")
            loggers: list[Logger] = [sheet]
            if importlib.util.find_spec("tensorboard"):  # the extra deepdem[tensorboard]
                loggers.append(TensorBoardLogger(self.out, "logs", version=sheet.version))
            kwargs["logger"] = loggers
        return super().instantiate_trainer(**kwargs)


def train(
    args: Any, out: Path, *, minutes: float | None = None, tell: Tell = print
) -> pd.DataFrame:
    """Return the errors in the unseen parts after a training; empty if no part is kept unseen.

    Parameters
    ----------
    args
        Lightning's arguments: a list as from a shell, or a mapping as from a config file.
    out
        The folder for the model, its config, checkpoints, logs and the table.
    minutes
        Train no longer than this, with batches that fit a laptop.
    tell
        Is told each step in a line.
    """
    import pandas as pd

    out.mkdir(parents=True, exist_ok=True)
    # jsonargparse writes into what it is given.
    cli = TrainingCLI(copy.deepcopy(args), out)
    if minutes is not None:
        _limit(cli, minutes)
    began = time.monotonic()
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config["ckpt_path"])
    model: DeepDEM = cli.model.eval()
    path = out / "model.safetensors"
    if not cli.trainer.is_global_zero:
        return pd.DataFrame()
    model.save(path)
    tell(f"Model: {path}, {cli.trainer.global_step} steps, {time.monotonic() - began:.0f} s")
    tables = []
    for ds in cli.datamodule.unseen:
        refined = refine(ds, str(path)).compute()
        tables.append(evaluate(ds, refined, truth=model.spec.target))
    if not tables:
        return pd.DataFrame()
    table = _weighted(tables)
    table.to_csv(out / "table.csv")
    return table


def _limit(cli: TrainingCLI, minutes: float) -> None:
    from pytorch_lightning.callbacks import Timer

    cli.trainer.callbacks.append(Timer(timedelta(minutes=minutes)))  # type: ignore[attr-defined]  # untyped there
    data = cli.datamodule
    data.batch_size = max(1, min(data.batch_size, _LIMITED_PX // data.chip_size**2))


def _weighted(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of several scenes' tables, weighted by their pixels."""
    if len(tables) == 1:
        return tables[0]
    total = sum(table["count"] for table in tables)
    mean = sum(table.mul(table["count"], axis=0) for table in tables).div(total, axis=0)
    return mean.assign(count=total)


# --- several -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Named configs of trainings that are to be compared, in order."""

    runs: Mapping[str, Mapping[str, Any]]


def read_sweep(path: Path) -> Sweep:
    """Return the sweep of a YAML file: ``base``, a config, and ``runs``, a list of what differs.

    Each run has a ``name``, and entries of a config that replace or add to those of the base.

    Raises
    ------
    ValueError
        There are no runs, or two of one name, or a run without one.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"{path} holds no list of runs: wanted 'base' and 'runs', a list")
    merged: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        name = run.get("name") if isinstance(run, dict) else None
        if not isinstance(name, str) or name in merged:
            raise ValueError(f"{path}: each run needs a name of its own, got {name!r}")
        changes = {key: value for key, value in run.items() if key != "name"}
        merged[name] = _merged(content.get("base") or {}, changes)
    return Sweep(merged)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    minutes: float | None = None,
    only: Sequence[str] = (),
    tell: Tell = print,
) -> pd.DataFrame:
    """Return the comparison of all runs that are done; those that are not are run first.

    It is written to ``comparison.csv``, ``comparison.md`` and ``comparison.png`` in `out` after
    each run.

    Parameters
    ----------
    sweep
        The runs.
    out
        The folder; each run has its own in it.
    minutes
        How long each may train at most.
    only
        Names of the runs to do now; none: all.
    tell
        Is told each step in a line.

    Raises
    ------
    ValueError
        A name in `only` is no run.
    """
    import pandas as pd

    if unknown := set(only) - set(sweep.runs):
        raise ValueError(f"{sorted(unknown)} are no runs: there are {list(sweep.runs)}")
    table = pd.DataFrame()
    for name, config in sweep.runs.items():
        folder = out / re.sub(r"[^\w.-]+", "-", name)
        token = hashlib.sha256(json.dumps([config, minutes], sort_keys=True).encode()).hexdigest()
        if _done(folder, token) is not None:
            tell(f"{name}: done before")
        elif not only or name in only:
            tell(f"{name}: training")
            _one(name, config, folder, token, minutes, tell)
        else:
            continue
        table = comparison(sweep, out)
        table.to_csv(out / "comparison.csv")
        (out / "comparison.md").write_text(_markdown(table), encoding="utf-8")
        draw_comparison(table).savefig(out / "comparison.png", dpi=150)
    return table


def _one(
    name: str,
    config: Mapping[str, Any],
    folder: Path,
    token: str,
    minutes: float | None,
    tell: Tell,
) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    begun = folder / "begun"
    resumed = last.exists() and begun.exists() and begun.read_text() == token
    folder.mkdir(parents=True, exist_ok=True)
    if not resumed:
        last.unlink(missing_ok=True)
        begun.write_text(token)
    else:
        tell(f"{name}: going on from {last}")
    began = time.monotonic()
    args = {**config, **({"ckpt_path": str(last)} if resumed else {})}
    table = train(args, folder, minutes=minutes, tell=tell)
    if getattr(rank_zero_only, "rank", 0):
        return  # another process of a distributed training keeps the books
    if table.empty:
        raise ValueError(f"{name}: data.unseen names no part to compare in: 'right 35 %', say")
    net = _told(folder / "model.safetensors")
    found = {
        "token": token, "minutes": (time.monotonic() - began) / 60, **net,
        "rows": {str(k): row for k, row in table.to_dict(orient="index").items()},
    }  # fmt: skip
    part = folder / f".{_STORED}.part"
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.replace(folder / _STORED)


def _told(path: Path) -> dict[str, Any]:
    """Return what a comparison says of a model file besides its errors."""
    net = read_model(path)
    return {
        "target": net.spec.target,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": net.spec.training.get("steps"),
    }


def _done(folder: Path, token: str | None = None) -> dict[str, Any] | None:
    path = folder / _STORED
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if token in (None, found["token"]) else None


def comparison(sweep: Sweep, out: Path) -> pd.DataFrame:
    """Return one row for each run that is done: errors in the unseen parts, metres, and size."""
    import pandas as pd

    rows = {}
    for name in sweep.runs:
        found = _done(out / re.sub(r"[^\w.-]+", "-", name))
        if found is None:
            continue
        before, after = found["rows"]["dsm"], found["rows"]["refined"]
        rows[name] = {
            "truth": found["target"],
            "initial MAE": before["MAE"],
            **{metric: after[metric] for metric in ("MAE", "RMSE", "NMAD", "LE90", "bias")},
            "parameters": found["parameters"], "steps": found["steps"],
            "minutes": found["minutes"],
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "run"
    return table


def _markdown(table: pd.DataFrame) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int | np.integer) else str(value)

    heads = ["run", *map(str, table.columns)]
    lines = [heads, ["---"] * len(heads)]
    lines += [
        [str(name), *map(text, row)]
        for name, row in zip(table.index, table.to_numpy(dtype=object), strict=True)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw_comparison(table: pd.DataFrame) -> Figure:
    """Return the comparison as a figure: each run's MAE and NMAD, and the MAE it began with."""
    from matplotlib.figure import Figure

    height = 1.1 + 0.34 * len(table)
    fig = Figure(figsize=(7.2, height), layout="constrained")
    ax = fig.add_subplot()
    y = np.arange(len(table))
    ax.hlines(y, table["MAE"], table["initial MAE"], color="0.8", lw=2, zorder=1)
    ax.scatter(table["initial MAE"], y, s=34, color="0.55", label="initial MAE", zorder=2)
    ax.scatter(table["NMAD"], y, s=34, facecolors="white", edgecolors="#1f6f8b", label="NMAD",
               zorder=3)  # fmt: skip
    ax.scatter(table["MAE"], y, s=44, color="#1f6f8b", label="MAE", zorder=4)
    for at, mae in zip(y, table["MAE"], strict=True):
        shown = min(mae, 1.25 * table["initial MAE"].max())
        ax.annotate(f"{mae:.2f}", (shown, at), xytext=(0, 6), textcoords="offset points",
                    ha="center", fontsize=8, color="#1f6f8b")  # fmt: skip
    names = [n if t == "lidar_dsm" else f"{n} (bare ground)"
             for n, t in zip(table.index, table["truth"], strict=True)]  # fmt: skip
    ax.set_yticks(y, names)
    ax.set_ylim(len(table) - 0.4, -0.7)
    # A run that was stopped after a few steps may be kilometres off: it is not to hide the others.
    ax.set_xlim(0, 1.3 * max(table["initial MAE"].max(), table["MAE"].median()))
    ax.set_xlabel("error in the unseen region, metres")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    fig.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return fig

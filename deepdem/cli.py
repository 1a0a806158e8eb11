"""The command line: each command is a few lines over what the package offers in Python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepdem.cli_fetch import fetch

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Better elevation models out of satellite stereo.",
)
app.add_typer(fetch, name="fetch")
console = Console()

Store = Annotated[str, typer.Argument(help="The Zarr store with the scene.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an x.zarr where it stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an x.zarr that is there.")]
Group = Annotated[str | None, typer.Option(help="The scene's name in the store.")]


def _print_table(table: pd.DataFrame, title: str) -> None:
    """Print statistics down and surfaces across: it fits a terminal of 80 columns."""
    strata = table.index.get_level_values(0).unique() if table.index.nlevels > 1 else [None]
    for stratum in strata:
        part = table if stratum is None else table.loc[stratum]
        heading = title if stratum is None else f"{title}, {table.index.names[0]} {stratum}"
        shown = Table(title=heading, title_justify="left")
        shown.add_column("")
        for surface in part.index:
            shown.add_column(str(surface), justify="right")
        for column in part.columns:
            whole = column == "count"
            cells = [f"{v:,.0f}" if whole else f"{v:.3f}" for v in part[column]]
            shown.add_row(str(column), *cells)
        console.print(shown)


def _print_scenes(report: Any) -> None:
    """Print each scene's grid and statistics, and at the end what failed."""
    for scene in report.scenes:
        if scene.grid is None:
            continue
        grid, found = scene.grid, scene.statistics or {}
        valid = found.get("valid")
        heading = (
            f"{scene.name}: {grid['rows']} x {grid['columns']} pixels of {grid['pixel_size']:g}, "
            f"{grid['pixel_size_m']:.4g} m, {grid['crs']}, "
            f"x {grid['left']:.10g} to {grid['right']:.10g}, "
            f"y {grid['bottom']:.10g} to {grid['top']:.10g}"
            + ("" if valid is None else f", {valid:.1%} valid")
        )
        shown = Table(title=escape(heading), title_justify="left")
        shown.add_column("")
        for head in ("share", "mean", "std", "p5", "p50", "p95"):
            shown.add_column(head, justify="right")
        for layer, values in found.get("layers", {}).items():
            ranks = values.get("percentiles", {})
            numbers = [values.get("mean"), values.get("std"), *(ranks.get(p) for p in _RANKS)]
            cells = ["" if v is None else f"{v:.5g}" for v in numbers]
            shown.add_row(escape(layer), f"{values['share']:.1%}", *cells)
        console.print(shown)
        scales = ", ".join(f"{k} px {v:.3g} m" for k, v in found.get("dsm_scale", {}).items())
        if scales:
            console.print(f"DSM scale: {scales}", highlight=False)
        for warning in scene.warnings:
            console.print(f"[yellow]Warning:[/yellow] {escape(warning)}", highlight=False)
    for name, reason in report.failed.items():
        console.print(f"[red]Failed:[/red] {escape(name)}: {escape(reason)}", highlight=False)
    if report.failed:
        console.print(f"{len(report.failed)} of {len(report.scenes)} scenes failed")


_RANKS = ("5", "50", "95")


def _clock_bar(minutes: float) -> Any:
    """Return a Lightning callback that shows training against the clock."""
    import pytorch_lightning as pl
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    class ClockBar(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.bar = Progress(
                TextColumn("Training"), BarColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=minutes * 60, note="")
            self.start = time.monotonic()
            self.bar.start()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen = trainer.callback_metrics
            note = f"step {trainer.global_step}"
            for key, label in (("train_MAE", "MAE"), ("val_MAE", "validation MAE")):
                if key in seen:
                    note += f"  {label} {float(seen[key]):.2f} m"
            self.bar.update(self.task, completed=time.monotonic() - self.start, note=note)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.bar.update(self.task, completed=minutes * 60)
            self.bar.stop()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            self.bar.stop()

    return ClockBar()


@app.command()
def demo(
    scene: Annotated[
        Path | None,
        typer.Option(
            help="A folder of rasters named like their layers (dsm.tif, ortho_left.tif, "
            "lidar_dsm.tif, …); without it a synthetic scene."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("deepdem-demo"),
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 2.0,
    chip_size: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 64,
    target: Annotated[str, typer.Option(help="The truth: lidar_dsm or lidar_dtm.")] = "lidar_dsm",
    workers: Annotated[int, typer.Option(help="Workers of the local Dask cluster.")] = 2,
    seed: Annotated[int, typer.Option(help="Of scene, chips and network.")] = 0,
) -> None:
    """Build a scene, train on one part, refine another, and show by how much it got better."""
    from deepdem.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=out, scene=scene, target=target, minutes=minutes, chip_size=chip_size, seed=seed,
        workers=workers,
    )  # fmt: skip
    table = run_demo(settings, console.print, [_clock_bar(minutes)])
    _print_table(table, f"Errors against {target} in the unseen region, metres")
    before, after = (float(table["MAE"].iloc[i]) for i in (0, 1))
    console.print(f"MAE {before:.2f} m before, {after:.2f} m after: {1 - after / before:.0%} less")


@app.command()
def build(
    config: Annotated[Path, typer.Argument(help="A YAML that lists scenes and their layers.")],
    store: Annotated[str, typer.Argument(help="The Zarr store: a path or URL.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Build anew what was built of other inputs.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
) -> None:
    """Stack and prepare many scenes into one Zarr store; goes on where it stopped."""
    import dask

    import deepdem

    def tell(scene: Any) -> None:
        colour = "red" if scene.status == "failed" else "green"
        console.print(f"[{colour}]{scene.status:>6}[/{colour}] {escape(scene.name)}")

    with dask.config.set({"num_workers": workers} if workers else {}):
        report = deepdem.build(config, store, overwrite=overwrite, tell=tell)
    _print_scenes(report)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def refine(
    store: Store,
    model: Annotated[str, typer.Argument(help="A saved model: path or URL.")],
    out: Annotated[
        str, typer.Argument(help="What to write: x.tif, a COG, or x.zarr, a path or URL.")
    ],
    group: Group = None,
    member: Annotated[
        list[str] | None, typer.Option(help="A further model of an ensemble; may be repeated.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Width of windows, pixels. Default: what suits the model.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share of a window, or pixels. Default: as --window.")
    ] = None,
    blend: Annotated[str, typer.Option(help="hann, linear, gaussian or none.")] = "hann",
    precision: Annotated[str, typer.Option(help="auto, float32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    tta: Annotated[
        bool, typer.Option("--tta", help="See each window in its eight symmetries.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Write the standard deviation too.")
    ] = False,
    fill_voids: Annotated[
        bool, typer.Option("--fill-voids", help="Predict where the DSM is void; mark it.")
    ] = False,
    chunks: Annotated[int | None, typer.Option(help="Width of the result's chunks.")] = None,
    workers: Annotated[
        int, typer.Option(help="Processes of a local Dask cluster. 0: threads of this one.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="The address of a Dask cluster that is there already.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Refine a scene's DSM and write it as a COG, or as Zarr, which can be resumed."""
    import deepdem

    tif = out.lower().endswith((".tif", ".tiff"))
    if not (tif or out.rstrip("/").lower().endswith(".zarr")):
        raise ValueError(f"{out}: name it x.tif for a GeoTIFF or x.zarr for a Zarr store")
    if tif and resume:
        raise ValueError(f"{out}: a GeoTIFF cannot be resumed, write x.zarr")
    ds = deepdem.open_scene(store, group)
    with _cluster(workers, scheduler):
        refined = ds.deepdem.refine(
            [model, *member] if member else model, window=window,
            overlap="auto" if overlap is None else overlap, blend=blend, precision=precision,
            device=device, tta=tta, uncertainty=uncertainty, fill_voids=fill_voids,
            chunks=chunks or "auto",
        )  # fmt: skip
        if tif:
            refined.deepdem.to_cog(out)
        else:
            refined.deepdem.to_zarr(out, resume=resume, overwrite=overwrite)
    console.print(out)


@contextmanager
def _cluster(workers: int, scheduler: str | None) -> Iterator[None]:
    """Compute on a cluster that is there, or on local processes, or else on threads."""
    if not workers and scheduler is None:
        yield
        return
    if workers and scheduler is not None:
        raise ValueError("pass --workers or --scheduler, not both")
    from dask.distributed import Client, LocalCluster

    with ExitStack() as stack:
        address: Any = scheduler
        if scheduler is None:
            address = stack.enter_context(LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None
            ))  # fmt: skip
        stack.enter_context(Client(address))
        yield


@app.command()
def evaluate(
    store: Store,
    surface: Annotated[str, typer.Argument(help="The refined surface: a raster, or x.zarr.")],
    group: Group = None,
    truth: Annotated[str, typer.Option(help="The layer that is the truth.")] = "lidar_dsm",
    by: Annotated[str | None, typer.Option(help="Strata: slope, ndvi or canopy.")] = None,
) -> None:
    """Print the error statistics of the initial and a refined surface against the truth."""
    import deepdem

    ds = deepdem.open_scene(store, group)
    table = ds.deepdem.evaluate(_surface(ds, surface), truth=truth, by=by)
    _print_table(table, f"Errors against {truth}, m")


def _surface(ds: xr.Dataset, path: str) -> xr.Dataset:
    """Return the dataset with ``refined`` that a Zarr store or a raster holds."""
    import deepdem

    if path.rstrip("/").lower().endswith(".zarr"):
        return deepdem.open_scene(path)
    return deepdem.stack({"refined": path}, like=ds)


@app.command()
def report(
    store: Store,
    surface: Annotated[str, typer.Argument(help="The refined surface: a raster, or x.zarr.")],
    out: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    group: Group = None,
    truth: Annotated[str, typer.Option(help="The layer that is the truth.")] = "lidar_dsm",
    title: Annotated[str | None, typer.Option(help="The heading.")] = None,
) -> None:
    """Write figure, statistics and provenance as one HTML file that needs no other."""
    import deepdem

    ds = deepdem.open_scene(store, group)
    refined = _surface(ds, surface)
    console.print(str(ds.deepdem.report(refined, out, truth=truth, title=title)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    sweep: Annotated[
        Path | None, typer.Option(help="A YAML file with a list of runs to compare.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder for models, logs, checkpoints and tables.")
    ] = Path("deepdem-train"),
    limit: Annotated[
        float | None,
        typer.Option(help="Minutes a training may take at most, with batches for a laptop."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A run of the sweep to do now; may be repeated.")
    ] = None,
) -> None:
    """Train as config files say, or a sweep of them, and compare.

    Takes all that a LightningCLI takes: `deepdem train --config x.yaml --trainer.max_epochs 5
    --model.encoder resnet34`. `deepdem train --print_config` prints all there is, with defaults;
    `--model.help` and `--data.help` explain it. A training that was stopped goes on with
    `--ckpt_path deepdem-train/checkpoints/last.ckpt`; a sweep by itself.
    """
    from deepdem import experiments

    if sweep is None:
        table = experiments.train(context.args, out, minutes=limit, tell=console.print)
        if not table.empty:
            _print_table(table, "Errors in the unseen part, metres")
        return
    if context.args:
        raise ValueError(f"{context.args} are for one training: with --sweep, the file says all")
    table = experiments.run_sweep(
        experiments.read_sweep(sweep), out, minutes=limit, only=only or (), tell=console.print
    )
    _print_table(table[["initial MAE", "MAE", "RMSE", "NMAD", "bias"]].T, "Unseen region, metres")
    console.print(f"{out}/comparison.csv, .md and .png")


@app.command()
def info(model: Annotated[str, typer.Argument(help="A saved model: path or URL.")]) -> None:
    """Print a saved model's card: what it sees, what it gives, where it comes from."""
    from deepdem.modelfile import model_card, read_model

    console.print(model, soft_wrap=True)
    card = Table(show_header=False, pad_edge=False)
    card.add_column(style="bold", no_wrap=True)
    card.add_column(overflow="fold")
    for section, entries in model_card(read_model(model)).items():
        card.add_section()
        card.add_row(f"[cyan]{section}[/cyan]", "")
        for name, value in entries.items():
            card.add_row(name, escape(value))
    console.print(card, highlight=False)


def main() -> None:
    """Run the command line; an error of the user's is a line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {error}", highlight=False)
        raise SystemExit(2) from None

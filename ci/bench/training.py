"""Presets, calibration and what each choice of the recipe is worth (issue 5, last measures).

Each training has the same number of steps on the same number of chips; its error is that of
`refine` in a part of the scene that it has not seen. The scenes: the synthetic one, and one whose
truth is real lidar (DEEPDEM_DATA) under simulated stereo.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from common import Result, data_folder, folder, options, report, table

import deepdem

LAYERS = ["dsm", "ortho_left", "ortho_right", "triangulation_error", "ndvi"]
SHORT = ["dsm", "ortho_left", "ortho_right"]  # what the quarry has as well
SHARE = 0.6  # of a scene's width is trained on

NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"architecture": "resdepth", "options": {"start_kernel": 16, "depth": 3}},
    "resnet18": {"encoder": "resnet18"},
    "resnet34": {"encoder": "resnet34"},
}

#: What the ablation changes of the default preset.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "loss l1": {"loss": "l1"},
    "loss huber": {"loss": "huber"},
    "schedule cosine": {"schedule": "cosine"},
    "schedule constant": {"schedule": "constant"},
    "average of weights, 0.98": {"ema": 0.98},
    "schedule constant, average 0.98": {"ema": 0.98, "schedule": "constant"},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 8e-3": {"learning_rate": 8e-3},
    "optimizer adam, no decay": {"optimizer": "adam", "weight_decay": 0.0},
    "flips": {"augment": ("flip",)},
    "flips, turns, swap": {"augment": ("flip", "rotate", "swap")},
    "flips, turns, swap; TTA": {"augment": ("flip", "rotate", "swap"), "tta": True},
    "TTA": {"tta": True},
    "a predicted scale": {"uncertainty": True},
    "a predicted scale, loss laplace": {"uncertainty": True, "loss": "laplace"},
    "preset deepdem2024": {"preset": "deepdem2024"},
    "preset resdepth": {"preset": "resdepth"},
}


@dataclass(frozen=True)
class Case:
    """A scene in memory, cut in two, and how long its networks are trained."""

    name: str
    scene: xr.Dataset
    chip_size: int
    steps: int
    layers: Sequence[str] = tuple(LAYERS)
    more: tuple[xr.Dataset, ...] = ()  # further scenes to train on

    @property
    def edge(self) -> int:
        return round(self.scene.sizes["x"] * SHARE)

    @property
    def unseen(self) -> xr.Dataset:
        return self.scene.isel(x=slice(self.edge + self.chip_size, None))

    def train(
        self, cache: Path, seed: int, augment: Any = None, network: str = "small", **model: Any
    ) -> deepdem.DeepDEM:
        """Return a model trained so; one that lies in the cache is not trained again."""
        how = {"augment": augment, **({} if network == "small" else {"network": network}), **model}
        words = "-".join(f"{k}={Path(str(v)).name}" for k, v in sorted(how.items()))
        path = cache / f"{self.name}-{self.steps}-{seed}-{words}.safetensors".replace(" ", "_")
        if path.exists():
            return deepdem.load_model(path)
        trained = self.fit(seed, augment, network, **model)
        trained.save(path)
        return trained

    def fit(
        self,
        seed: int,
        augment: Any = None,
        network: str = "small",
        callbacks: Sequence[Any] = (),
        **model: Any,
    ) -> deepdem.DeepDEM:
        import pytorch_lightning as pl

        pl.seed_everything(seed, verbose=False)
        made = deepdem.DeepDEM(
            list(self.layers), chip_size=self.chip_size, **NETWORKS[network], **model
        )
        data = deepdem.ChipDataModule(
            [self.scene.isel(x=slice(0, self.edge)), *self.more], chip_size=self.chip_size,
            batch_size=8 * 64**2 // self.chip_size**2,
            split="top 70 %", seed=seed, augment=augment,
        )  # fmt: skip
        trainer = pl.Trainer(
            max_steps=self.steps, max_epochs=-1, accelerator="auto", devices=1, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            num_sanity_val_steps=0, check_val_every_n_epoch=5, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(made, data)
        return made.eval()

    def error(self, model: deepdem.DeepDEM, *, tta: bool = False) -> float:
        ds = self.unseen
        refined = ds.deepdem.refine(model, tta=tta).compute()
        return float(np.abs(refined - ds.lidar_dsm).mean())

    def initial(self) -> float:
        return float(np.abs(self.unseen.dsm - self.unseen.lidar_dsm).mean())


def cases(*, small: bool, steps: int, chip_size: int) -> list[Case]:
    shape = (256, 320) if small else (512, 1024)
    made = deepdem.synthetic_scene(shape, seed=0, chunks=512).deepdem.prepare().compute()
    found = [Case("synthetic", made, chip_size, steps)]
    data = data_folder()
    if data is None:
        print("no real data (DEEPDEM_DATA): the lidar scene is left out\n")
        return found
    # 286 by 286 pixels: chips of 64 would leave no validation region.
    return [*found, Case("lidar", lidar_made(data), 32, steps)]


def lidar_made(data: Path, pixel_m: float | None = None) -> xr.Dataset:
    """Return a real forest under simulated stereo, in memory; of the lidar's own pixels, or so."""
    grid: dict[str, Any] = {"like": "lidar_dsm"}
    if pixel_m is not None:
        grid = {"crs": "EPSG:2949", "resolution": pixel_m}
    lidar = deepdem.stack(
        {n: data / "lidar_topography" / f"{f}.tif" for n, f in
         (("lidar_dsm", "dsm_p95_filled"), ("lidar_dtm", "dtm"), ("shine", "intensity"))},
        **grid,
    )  # fmt: skip
    lidar["shine"] = (lidar.shine * (0.45 / float(lidar.shine.quantile(0.98)))).clip(0, 1)
    scene = deepdem.simulate_stereo(lidar, albedo="shine").drop_vars(["shine", "lidar_dtm"])
    return scene.deepdem.prepare().compute()


def presets(case: Case, cache: Path, seeds: int) -> Result:
    """Default over deepdem2024, each the mean over seeds."""
    means = {}
    for preset in ("default", "deepdem2024"):
        errors = [case.error(case.train(cache, seed, preset=preset)) for seed in range(seeds)]
        means[preset] = statistics.mean(errors)
        print(f"{case.name}, {preset}: {', '.join(f'{e:.3f}' for e in errors)} m", flush=True)
    note = (
        f"{means['default']:.3f} m / {means['deepdem2024']:.3f} m, initial {case.initial():.3f} m"
    )
    ratio = means["default"] / means["deepdem2024"]
    return Result(
        f"MAE: default / deepdem2024 ({case.name}, {seeds} seeds)", ratio, 0.85, note=note
    )


def calibration(case: Case, cache: Path) -> list[Result]:
    """Shares of true errors inside what `refine(uncertainty=True)` says.

    In the unseen part, and without a bar in the part whose chips the intervals were fitted to:
    what lies between the two is what ground unlike the validation region costs.
    """
    model = case.train(cache, 0, uncertainty=True)
    noted = model.spec.training["calibration"]
    print(f"{case.name}, on its validation chips: {noted}", flush=True)
    below = round(case.scene.sizes["y"] * 0.7) + case.chip_size
    fitted = case.scene.isel(x=slice(0, case.edge), y=slice(below, None))
    results = []
    for where, ds, tta in (
        ("unseen", case.unseen, False),
        ("unseen, tta", case.unseen, True),
        ("validation", fitted, False),
        ("validation, tta", fitted, True),
    ):
        both = ds.deepdem.refine(model, uncertainty=True, tta=tta).compute()
        error = np.abs(both.refined - ds.lidar_dsm).values
        known = np.isfinite(error)
        ratio = error[known] / both.refined_std.values[known]
        for name, low, high in (("68", 0.63, 0.73), ("95", 0.92, 0.97)):
            half = both.refined_std.attrs[f"half_width_of_{name}_percent_interval"]
            share = float((ratio <= half).mean())
            what = f"inside the {name} % interval ({case.name}, {where})"
            note = f"{int(known.sum())} pixels, MAE {error[known].mean():.3f} m"
            if where == "unseen":
                results.append(Result(what, share, low, at_least=True, note=note))
                results.append(Result(what, share, high, note=note))
            else:
                results.append(Result(what, share, note=note))
    return results


def settling(case: Case) -> list[Result]:
    """Normalisations settled over running statistics: the same weights, a dozen steps and more."""
    import pytorch_lightning as pl

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == trainer.max_steps:
                self.state = {n: v.clone() for n, v in module.state_dict().items()}

    results = []
    for network, steps, bar in (("resnet34", 13, 1.0), ("small", case.steps, 1.01)):
        keep = Keep()
        model = replace(case, steps=steps).fit(0, network=network, callbacks=[keep])
        settled = case.error(model)
        model.load_state_dict(keep.state)
        lagging = case.error(model)
        results.append(Result(
            f"MAE: settled / running statistics ({case.name}, {network}, {steps} steps)",
            settled / lagging, bar, note=f"{settled:.3f} m / {lagging:.3f} m, initial "
            f"{case.initial():.3f} m",
        ))  # fmt: skip
    return results


def ablation(case: Case, cache: Path, seeds: int, words: str) -> None:
    """Print what each choice is worth: MAE over that of the default, the same seeds."""
    rows, base = [], 0.0
    for name, changes in VARIANTS.items():
        if words not in name and name != "default":
            continue
        how = dict(changes)
        tta = how.pop("tta", False)
        errors = [case.error(case.train(cache, s, **how), tta=tta) for s in range(seeds)]
        mean = statistics.mean(errors)
        base = base or mean
        rows.append((name, f"{mean:.3f}", f"{mean / base:.3f}", f"{max(errors) - min(errors):.3f}"))
        print("  ".join(rows[-1]), flush=True)
    print(f"\n{case.name}: {case.steps} steps, {seeds} seeds, initial MAE {case.initial():.3f} m")
    table(("recipe", "MAE (m)", "over default", "spread over seeds (m)"), rows)


def quarry(data: Path, chip_size: int, steps: int) -> Case:
    """The real quarry, levelled by the part that is trained on."""
    from deepdem.sources.folder import find_layers

    names = {"ortho_1": "ortho_left", "ortho_2": "ortho_right"}
    scene = deepdem.stack(find_layers(data / "stereo_marseille_quarry"), like="dsm").compute()
    scene = scene.rename(names)[[*SHORT, "lidar_dsm"]]
    left = scene.isel(x=slice(0, round(scene.sizes["x"] * SHARE)))
    offset = np.float32((left.dsm - left.lidar_dsm).median())
    with xr.set_options(keep_attrs=True):
        scene = scene.assign(dsm=scene.dsm - offset)
    return Case("quarry", scene.deepdem.prepare().compute(), chip_size, steps, SHORT)


def pretraining(case: Case, cache: Path, seeds: int, *, small: bool) -> None:
    """Print what it is worth to train on synthetic and lidar-made scenes of its pixels first."""
    shape = (256, 320) if small else (768, 1024)
    made = deepdem.synthetic_scene(shape, seed=0, pixel_size=0.5, chunks=512)
    data = data_folder()
    assert data is not None
    first = Case("half-metre", made.deepdem.prepare().compute(), case.chip_size, case.steps, SHORT,
                 more=(lidar_made(data, 0.5),))  # fmt: skip
    rows = []
    for seed in range(seeds):
        start = first.train(cache, seed)
        path = cache / f"start-{seed}.safetensors"
        start.save(path)
        rows.append((
            str(seed), f"{case.initial():.3f}", f"{case.error(case.train(cache, seed)):.3f}",
            f"{case.error(start):.3f}",
            f"{case.error(case.train(cache, seed, weights=str(path), learning_rate=1e-3)):.3f}",
        ))  # fmt: skip
    print(f"{case.name}: {case.steps} steps each, MAE (m) in the unseen part")
    table(("seed", "initial", "from scratch", "others only", "others, then here"), rows)


def main() -> None:
    args = options(
        __doc__,
        steps={"type": int, "default": None, "help": "training steps; default 500"},
        seeds={"type": int, "default": 3, "help": "trainings of each preset"},
        chip={"type": int, "default": 64, "help": "chip size"},
        variants={"default": "", "help": "of the ablation, all those whose names hold this"},
        cases={"default": "synthetic,lidar", "help": "scenes"},
        only={
            "default": "presets,calibration",
            "help": "of presets, calibration, settling, ablation, pretraining",
        },
    )
    small, wanted = args.size == "small", args.only.split(",")
    steps = args.steps or (4 if small else 500)
    seeds = 1 if small else args.seeds
    results = []
    with folder(args) as cache:
        for case in cases(small=small, steps=steps, chip_size=32 if small else args.chip):
            if case.name not in args.cases.split(","):
                continue
            if "presets" in wanted:
                results.append(presets(case, cache, seeds))
            if "calibration" in wanted:
                results += calibration(case, cache)
            if "settling" in wanted:
                results += settling(case)
            if "ablation" in wanted:
                ablation(case, cache, seeds, args.variants)
        data = data_folder()
        if "pretraining" in wanted and data is not None:
            pretraining(quarry(data, 64, steps), cache, seeds, small=small)
    if results:
        report(results)


if __name__ == "__main__":
    main()

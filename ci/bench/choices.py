"""Centring, window, overlap and blend: what each costs, and how near the truth it comes.

On trained networks, on the part of their scene that they have not seen: the synthetic scene of the
demo, and the real quarry where the data are there (measures 3 and 6). The passes a pixel are
counted, not computed: windows at the scene's edges are in them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from common import (
    Result,
    Trained,
    data_folder,
    first_wins,
    folder,
    options,
    quarry_model,
    report,
    seam,
    synthetic_model,
    table,
)

import deepdem
from deepdem.models import ResidualNet
from deepdem.refine import refine

#: Overlap and blend of a model centred on chips; window, overlap and blend of one with local
#: centring. `{}` is what refine does by itself.
CHIP: tuple[dict[str, Any], ...] = (
    {}, {"overlap": 0.125}, {"overlap": 0.5}, {"overlap": 0.5, "blend": "none"},
    {"overlap": 0.25, "blend": "linear"}, {"overlap": 0.25, "blend": "gaussian"},
    {"overlap": 0.25, "blend": "none"},
)  # fmt: skip
LOCAL: tuple[dict[str, Any], ...] = (
    {}, {"overlap": 0.25}, {"overlap": 0.5}, {"overlap": 0.5, "blend": "none"},
    {"overlap": 0.0, "blend": "none"}, {"window": 128, "overlap": 32}, {"window": 512},
    {"window": 512, "overlap": 32},
)  # fmt: skip
FEW: tuple[dict[str, Any], ...] = ({}, {"overlap": 0.5, "blend": "none"})
DENSE = 0.875
Row = dict[str, Any]


class Counted:
    """Counts the pixels that pass through networks while it is entered."""

    def __enter__(self) -> Counted:
        self.pixels, self.moments = 0, ResidualNet.moments_of

        def counted(net: ResidualNet, seen: torch.Tensor) -> Any:
            self.pixels += seen.shape[0] * seen.shape[2] * seen.shape[3]
            return self.moments(net, seen)

        ResidualNet.moments_of = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ResidualNet.moments_of = self.moments  # type: ignore[method-assign]


class Judge:
    """Runs refine on the unseen part of a scene, and says how it went."""

    def __init__(self, case: Trained):
        self.case, self.ds = case, case.unseen
        self.dsm, self.truth = self.ds["dsm"].values, self.ds[case.target].values
        self.known = np.isfinite(self.truth) & np.isfinite(self.dsm)
        self.references: dict[int, np.ndarray] = {}

    def run(self, **how: Any) -> tuple[xr.DataArray, float]:
        """Return the surface and the passes a pixel."""
        with Counted() as count:
            refined = refine(self.ds, self.case.path, precision="float32", **how).compute()
        return refined, count.pixels / self.dsm.size

    def numbers(self, surface: np.ndarray, width: int, stride: int, dense: np.ndarray) -> Row:
        known = self.known & np.isfinite(surface)
        error = (surface - self.truth)[known]
        return {
            "MAE": np.abs(error).mean(),
            "RMSE": np.sqrt(np.square(error).mean()),
            "NMAD": 1.4826 * np.median(np.abs(error - np.median(error))),
            "dense": np.abs(surface - dense)[known].mean(),
            # Of what is not in the reference: few edges lie on some houses and not on others.
            "seam": seam(surface - dense, width, stride),
        }

    def dense(self, width: int, overlap: float) -> np.ndarray:
        """Return the reference for windows of `width`: hann, 64 windows at a pixel."""
        if width not in self.references:
            self.references[width] = self.run(overlap=overlap, **self.of(width))[0].values
        return self.references[width]

    def of(self, width: int) -> dict[str, int]:
        spec = deepdem.load_model(self.case.path).spec
        return {"window": width} if spec.window_step else {}

    def choice(self, how: dict[str, Any], overlap: float) -> Row:
        refined, passes = self.run(**how)
        width = refined.attrs["deepdem_window_px"]
        stride = width - refined.attrs["deepdem_overlap_px"]
        found = self.numbers(refined.values, width, stride, self.dense(width, overlap))
        return {"centring": refined.attrs["deepdem_centering"], "window": width,
                "overlap": width - stride, "blend": how.get("blend", "hann"), "passes": passes,
                "default": not how, **found}  # fmt: skip

    def predecessor(self, overlap: float) -> Row:
        width = deepdem.load_model(self.case.path).spec.chip_size
        old = first_wins(self.case.path, self.ds, width // 2)
        found = self.numbers(old, width, width // 2, self.dense(width, overlap))
        return {"centring": "chip", "window": width, "overlap": width // 2,
                "blend": "first wins", "passes": 4.0, "default": False, **found}  # fmt: skip

    def left_of_a_bump(self, wide: int, tall: float = 3.0) -> float:
        """Return how much is left of a smooth bump that is added to the initial DSM."""
        height, width = self.dsm.shape
        y, x = np.mgrid[:height, :width]
        away = np.hypot(y - height / 2, x - width / 2) / wide
        bump = np.where(away < 0.5, tall * np.cos(np.pi * away) ** 2, 0).astype(np.float32)
        before = self.run()[0].values
        after = refine(self.ds.assign(dsm=self.ds["dsm"] + bump), self.case.path,
                       precision="float32").values  # fmt: skip
        known = np.isfinite(before) & (bump > 0)
        return float(((after - before) * bump)[known].sum() / np.square(bump)[known].sum())


def choices(made: Callable[[str], Trained], *, small: bool) -> list[Result]:
    """Print the table of one scene, and return the measures that follow from it."""
    overlap = 0.75 if small else DENSE
    rows: list[Row] = []
    bumps = []
    for centering in ("chip", "local"):
        judge = Judge(made(centering))
        every = CHIP if centering == "chip" else LOCAL
        rows += [judge.choice(how, overlap) for how in (FEW if small else every)]
        if centering == "chip":
            rows.append(judge.predecessor(overlap))
        widths = (40, 150) if small else (40, 75, 150, 300)
        left = [f"{judge.left_of_a_bump(wide):.2f}" for wide in widths]
        bumps.append((centering, *left))
    initial = float(np.abs(judge.dsm - judge.truth)[judge.known].mean())
    name = judge.case.name.split(",")[0]
    print(f"{judge.case.name}: initial MAE {initial:.4f} m, {judge.known.sum()} pixels; * defaults")
    heads = ("centring", "window", "overlap", "blend", "passes a pixel", "MAE (m)", "RMSE (m)",
             "NMAD (m)", "to dense (m)", "seam (m)")  # fmt: skip
    table(heads, [_words(row) for row in rows])
    print("what is left of a smooth bump of 3 m in the initial DSM, by its width")
    table(("centring", *(f"{wide} px" for wide in widths)), bumps)
    return _results(rows, name)


def _results(rows: list[Row], name: str) -> list[Result]:
    chosen = deepdem.DeepDEM(["dsm"], architecture="resdepth").spec.centering
    ours = next(r for r in rows if r["default"] and r["centring"] == chosen)
    chip = next(r for r in rows if r["default"] and r["centring"] == "chip")
    plain = next(r for r in rows if r["centring"] == chosen and r["blend"] == "none"
                 and r["overlap"] * 2 == r["window"])  # fmt: skip
    old = next(r for r in rows if r["blend"] == "first wins")

    def over(what: str, other: Row, bar: float | None, title: str) -> Result:
        return Result(f"{title} ({name})", ours[what] / other[what], bar,
                      note=f"{ours[what]:.4f} / {other[what]:.4f}")  # fmt: skip

    return [
        over("dense", plain, 0.5, "6. to dense: defaults / overlap 1/2 without blending"),
        over("passes", plain, 1.0, "6. passes a pixel: defaults / overlap 1/2"),
        over("MAE", old, 1.0, "3. MAE: defaults / predecessor's first wins"),
        over("seam", old, 1.0, "3. seam: defaults / predecessor's first wins"),
        over("MAE", chip, 1.0, "MAE: defaults / centred on chips, its defaults"),
        over("passes", chip, 1.0, "passes a pixel: defaults / centred on chips, its defaults"),
    ]


def _words(row: Row) -> tuple[str, ...]:
    star = "*" if row["default"] else ""
    numbers = (f"{row[k]:.4f}" for k in ("MAE", "RMSE", "NMAD", "dense"))
    return (row["centring"] + star, str(row["window"]), str(row["overlap"]), row["blend"],
            f"{row['passes']:.2f}", *numbers, f"{row['seam']:.5f}")  # fmt: skip


def main() -> None:
    args = options(
        __doc__, chips={"default": "64", "help": "chip sizes to train with, such as 64,128"}
    )
    small, data = args.size == "small", data_folder()
    results = []

    def scenes(cache: Path, size: int) -> list[Callable[[str], Trained]]:
        made = [lambda c: synthetic_model(cache, small=small, chip_size=size, centering=c)]
        if data is not None:
            made.append(
                lambda c: quarry_model(cache, data, small=small, chip_size=size, centering=c)
            )
        elif not small:
            print("no real data (DEEPDEM_DATA): the quarry is left out\n")
        return made

    with folder(args) as cache:
        for chip_size in map(int, args.chips.split(",")):
            for made in scenes(cache, chip_size):
                results += choices(made, small=small)
    report(results)


if __name__ == "__main__":
    main()

"""Overlap and blend: what each choice costs, and how near the truth it comes (measures 6, 12).

On a trained network, on the part of its scene that it has not seen: the synthetic scene of the
demo, and the real quarry where the data are there.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
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
from deepdem.refine import refine
from deepdem.windows import BLENDS, overlap_px

OVERLAPS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
DENSE = 0.875


def default(name: str) -> Any:
    return inspect.signature(refine).parameters[name].default


def choices(case: Trained, *, small: bool) -> list[Result]:
    """Print the table of one trained model, and return the measures that follow from it."""
    ds, width = case.unseen, deepdem.load_model(case.path).spec.chip_size
    dsm, truth = ds["dsm"].values, ds[case.target].values

    def run(overlap: float, blend: str) -> np.ndarray:
        surface: np.ndarray = refine(ds, case.path, overlap=overlap, blend=blend).values
        return surface

    dense = run(0.75 if small else DENSE, "hann")
    known = np.isfinite(truth) & np.isfinite(dense)

    def judge(surface: np.ndarray, overlap: float) -> dict[str, float]:
        stride = width - overlap_px(overlap, width)
        return {
            "passes": (width / stride) ** 2,
            "MAE": float(np.abs(surface - truth)[known].mean()),
            "RMSE": float(np.sqrt(np.square(surface - truth)[known].mean())),
            "dense": float(np.abs(surface - dense)[known].mean()),
            "seam": seam(surface - dsm, width, stride),
        }

    found: dict[tuple[float, str], dict[str, float]] = {}
    wanted = {(default("overlap"), default("blend")), (0.5, "none"), (0.5, "hann")}
    if not small:
        wanted |= {(o, b) for o in OVERLAPS for b in BLENDS if o > 0 or b == "none"}
    for overlap, blend in sorted(wanted):
        found[overlap, blend] = judge(run(overlap, blend), overlap)
    old = judge(first_wins(case.path, ds, width // 2), 0.5)
    rows = [(f"{o:g}", b, *_numbers(f)) for (o, b), f in found.items()]
    rows.append(("0.5", "first wins", *_numbers(old)))
    rows.append(
        (f"{0.75 if small else DENSE}", "hann", *_numbers(judge(dense, 0.75 if small else DENSE)))
    )
    initial = float(np.abs(dsm - truth)[known].mean())
    print(f"{case.name}: initial MAE {initial:.4f} m, {known.sum()} pixels")
    table(("overlap", "blend", "passes a pixel", "MAE (m)", "RMSE (m)", "to dense (m)", "seam (m)"),
          rows)  # fmt: skip
    ours, plain = found[default("overlap"), default("blend")], found[0.5, "none"]
    name = case.name.split(",")[0]
    return [
        Result(f"6. to dense: defaults / overlap 1/2 without blending ({name})",
               ours["dense"] / plain["dense"], 0.5,
               note=f"{ours['dense']:.4f} m / {plain['dense']:.4f} m"),
        Result(f"6. passes a pixel: defaults / overlap 1/2 ({name})",
               ours["passes"] / plain["passes"], 1.0),
        Result(f"3. MAE: defaults / predecessor's first wins ({name})", ours["MAE"] / old["MAE"],
               1.0, note=f"{ours['MAE']:.4f} m / {old['MAE']:.4f} m"),
        Result(f"3. seam: defaults / predecessor's first wins ({name})", ours["seam"] / old["seam"],
               1.0, note=f"{ours['seam']:.5f} m / {old['seam']:.5f} m"),
    ]  # fmt: skip


def _numbers(found: dict[str, float]) -> tuple[str, ...]:
    return (f"{found['passes']:.2f}", *(f"{found[k]:.4f}" for k in ("MAE", "RMSE", "dense")),
            f"{found['seam']:.5f}")  # fmt: skip


def main() -> None:
    args = options(
        __doc__, chips={"default": "64", "help": "chip sizes to train with, such as 64,128"}
    )
    small, data = args.size == "small", data_folder()
    results = []
    with folder(args) as cache:
        for chip_size in map(int, args.chips.split(",")):
            results += choices(synthetic_model(cache, small=small, chip_size=chip_size),
                               small=small)  # fmt: skip
            if data is not None:
                results += choices(quarry_model(cache, data, small=small, chip_size=chip_size),
                                   small=small)  # fmt: skip
            elif not small:
                print("no real data (DEEPDEM_DATA): the quarry is left out\n")
    report(results)


if __name__ == "__main__":
    main()

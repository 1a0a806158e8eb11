"""How near co-registration comes: known offsets put into surfaces, and pairs whose answer is known.

The offsets are made by a spline of the fifth order, not by the warper that takes them off again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from common import Result, data_folder, options, report
from scipy.ndimage import distance_transform_edt, shift

import deepdem

#: Pixels east, pixels north, metres up.
OFFSETS = ((3.4, -1.7, 0.8), (-0.3, 0.45, -6.0), (11.6, 8.2, 2.5))
#: Pairs of the data folder: what moves, what stays, and the shift in pixels east, north and in
#: metres up that others found (xdem 0.2.3 by itself; demcompare).
PAIRS = {
    "two stereo pipelines, Réunion": (
        "stereo_reunion/dsm_s2p.tif", "stereo_reunion/dsm_initial.tif", (-0.430, 0.604, -0.027)
    ),
    "SRTM, shifted and blurred": (
        "dem_pair_srtm_shifted/srtm_blurred_and_shifted.tif", "dem_pair_srtm_shifted/srtm_ref.tif",
        (3.0, -5.0, -0.018),
    ),
}  # fmt: skip


def put_off(layer: xr.DataArray, offset: tuple[float, float, float]) -> xr.DataArray:
    """Return the surface moved by the offset; NaN moves with it."""
    z, (east, north, up) = layer.values.astype(float), offset
    holes = np.isnan(z)
    nearest = distance_transform_edt(holes, return_distances=False, return_indices=True)
    moved = shift(z[tuple(nearest)], (-north, east), order=5, mode="nearest") + up
    gone = shift(holes.astype(float), (-north, east), order=1, cval=1.0) > 0.01
    return layer.copy(data=np.where(gone, np.nan, moved).astype(np.float32)).rename("dsm")


def found(ds: xr.Dataset) -> tuple[tuple[float, float, float], str]:
    record = ds.deepdem.coregister(max_shift_m=None).attrs["coregistration"]
    a, b = record["before"], record["after"]
    note = (
        f"median {a['median']:.2f} to {b['median']:.2f} m, NMAD {a['nmad']:.2f} to "
        f"{b['nmad']:.2f} m on {b['count']} px"
    )
    px = record["shift_columns_px"], -record["shift_rows_px"], record["shift_z_m"]
    return px, note


def surfaces(data: Path | None, *, small: bool) -> dict[str, xr.DataArray]:
    size = 256 if small else 1024
    made = deepdem.synthetic_scene((size, size), seed=2)
    out = {f"synthetic {n}": made[n].compute() for n in ("lidar_dsm", "lidar_dtm")}
    names = ("stereo_reunion/dsm_initial", "lidar_topography/dtm",
             "lidar_topography/dsm_p95_filled", "lidar_ign_river/dsm_max",
             "dem_pair_srtm_shifted/srtm_ref")  # fmt: skip
    for name in names if data is not None else ():
        out[name] = deepdem.stack({"lidar_dsm": data / f"{name}.tif"})["lidar_dsm"].compute()
    return out


def main() -> None:
    args = options(__doc__)
    data, small = data_folder(), args.size == "small"
    results = []
    for name, truth in surfaces(data, small=small).items():
        for offset in OFFSETS[: 1 if small else None]:
            scene = truth.rename("lidar_dsm").to_dataset().assign(dsm=put_off(truth, offset))
            px, note = found(scene)
            east, north, up = (p + o for p, o in zip(px, offset, strict=True))
            results.append(Result(
                f"{name}, put off by {offset}: what is left", float(np.hypot(east, north)), 0.1,
                unit="px", note=f"{up:+.3f} m up; {note}",
            ))  # fmt: skip
    for name, (moves, stays, answer) in PAIRS.items() if data is not None else ():
        scene = deepdem.stack({"dsm": data / moves, "lidar_dsm": data / stays}, like="lidar_dsm")
        px, note = found(scene)
        east, north, up = (p - a for p, a in zip(px, answer, strict=True))
        results.append(Result(
            f"{name}: from the answer of others", float(np.hypot(east, north)), 0.1, unit="px",
            note=f"{up:+.3f} m up; {note}",
        ))  # fmt: skip
    report(results)


if __name__ == "__main__":
    main()

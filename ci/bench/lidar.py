"""Lidar: speed against bare decoding, memory, bytes by HTTP, and rasters that others made.

The clouds of the last two are those of shared/data; without them they are left out.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from common import Result, data_folder, folder, in_turn, options, ratio, report, seconds, table
from memory import peak_mib
from odc.geo.geobox import GeoBox

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from clouds import write_ept, write_las  # a tree's writer is not worth a second copy
from served import served

import deepdem
from deepdem.sources.lidar import grid_points

LEFT, TOP, DENSITY = 500_000.0, 5_000_000.0, 10


def square(width: int) -> GeoBox:
    return GeoBox((width, width), Affine(1, 0, LEFT, 0, -1, TOP), "EPSG:32610")


def points(width: int, *, lines: bool, seed: int = 0) -> dict[str, Any]:
    """Return ten points a square metre, in the order of flight lines or in none."""
    rng = np.random.default_rng(seed)
    n = DENSITY * width**2
    x, y = rng.uniform(0, width, (2, n))
    if lines:
        y.sort()
    z = 100 + 20 * np.sin(x / 70) + 15 * np.cos(y / 90) + rng.normal(0, 0.05, n)
    veg = rng.random(n) < 0.4
    z[veg] += rng.uniform(0, 20, veg.sum())
    second = veg & (rng.random(n) < 0.5)
    return {
        "x": LEFT + x, "y": TOP - y, "z": z, "intensity": rng.integers(0, 3000, n),
        "classification": np.where(veg, 5, 2), "return_number": np.where(second, 2, 1),
        "number_of_returns": np.where(veg, 2, 1), "gps_time": np.sort(rng.uniform(0, 1000, n)),
    }  # fmt: skip


def cloud(cache: Path, width: int, *, lines: bool = True) -> str:
    path = cache / f"points-{width}-{'lines' if lines else 'any'}.laz"
    if not path.exists():
        write_las(path, points(width, lines=lines))
    return str(path)


# --- speed ---------------------------------------------------------------------------------------


def speed(cache: Path, width: int, repeat: int) -> list[Result]:
    """Grid on two workers, and decode with laspy (its own threads, as it comes), in turn."""
    import laspy
    from distributed import Client

    results = []
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        client.run(_warm)
        for lines in (True, False):
            path = cloud(cache, width, lines=lines)
            works = {
                "laspy": lambda p=path: laspy.read(p),
                "surface": lambda p=path: grid_points(p, square(width)).compute(),
                "ground": lambda p=path: grid_points(p, square(width), "lidar_dtm").compute(),
            }
            times = in_turn(works, repeat)
            order = "flight lines" if lines else "no order"
            for name, bar in (("surface", 0.4), ("ground", None)):
                figure, spread = ratio(times, "laspy", name)
                rate = DENSITY * width**2 / min(times[name]) / 1e6
                results.append(Result(
                    f"points/s of the {name} / of bare laspy, {order}", figure, bar, at_least=True,
                    note=f"{rate:.2f} M points/s; {spread}",
                ))  # fmt: skip
    return results


def _warm() -> None:
    import deepdem.sources.lidar  # noqa: F401  # seconds of imports are not the gridding's


# --- memory --------------------------------------------------------------------------------------


def child(path: str, width: str, out: str, chunks: str) -> None:
    import dask

    with dask.config.set(scheduler="threads", num_workers=2):
        layer = grid_points(path, square(int(width)), "lidar_dtm", chunks=int(chunks))
        layer.deepdem.to_zarr(out, overwrite=True)
    print(peak_mib())


def memory(cache: Path, widths: tuple[int, int]) -> list[Result]:
    peaks, (small, large) = [], widths
    chunks = small // 2  # four of them, and sixteen: both threads have one
    for width in widths:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--child", cloud(cache, width),
             str(width), str(cache / "out.zarr"), str(chunks)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        peaks.append(float(done.stdout.split()[-1]))
    return [Result(
        f"peak memory of the ground, {large} / {small} m wide, chunks of {chunks}",
        peaks[1] / peaks[0], 1.2, note=f"{peaks[1]:.0f} MiB / {peaks[0]:.0f} MiB",
    )]  # fmt: skip


# --- by HTTP -------------------------------------------------------------------------------------


def by_http(cache: Path, width: int) -> list[Result]:
    """A tenth of a tree that is as deep as its points are many, at places drawn at random."""
    tree = cache / f"tree-{width}"
    if not tree.exists():
        write_ept(tree, points(width, lines=False), levels=3 + round(math.log2(width / 125)))
    every = sum(f.stat().st_size for f in tree.rglob("*.laz"))
    side, rng, shares = round(width * math.sqrt(0.1)), np.random.default_rng(0), []
    with served(tree) as server:
        for _ in range(8):
            server.sent.clear()
            y, x = rng.integers(0, width - side, 2)
            box = square(width)[y : y + side, x : x + side]
            grid_points(f"{server.url}/ept.json", box).compute()
            shares.append(server.total / every)
    nodes = sum(1 for _ in tree.rglob("*.laz"))
    note = f"{min(shares):.2f} to {max(shares):.2f} in 8 places; {nodes} nodes"
    return [Result("bytes for a tenth of a tree / all its points", float(np.median(shares)), 0.25,
                   note=note)]  # fmt: skip


def real_trees(data: Path) -> list[Result]:
    """Served, the same as the whole file read from disk; and what a tenth of them costs."""
    tree, copc = data / "ept_ign_urban_3857", data / "copc_lone_star/lone-star.copc.laz"
    star = GeoBox((88, 88), Affine(0.5, 0, 515_363, 0, -0.5, 4_918_383), "EPSG:26912")
    results = []
    with served(data) as server:
        whole = grid_points(copc, star, crs="EPSG:26912").compute()
        for name, url in (("COPC", copc.relative_to(data)),
                          ("EPT", "ept_lone_star/lone-star-laszip/ept.json")):  # fmt: skip
            found = grid_points(f"{server.url}/{url}", star, crs="EPSG:26912", chunks=64).compute()
            assert (np.isnan(found) == np.isnan(whole)).all()
            worst = float(np.nanmax(np.abs(found - whole)))
            results.append(Result(f"{name} by HTTP - whole file, at most", worst, 1e-3, unit="m"))
        every = sum(f.stat().st_size for f in tree.rglob("*.laz"))
        about = json.loads((tree / "ept.json").read_text())["boundsConforming"]
        (left, bottom), (right, top) = about[:2], about[3:5]
        wide, high = ((b - a) * math.sqrt(0.1) for a, b in ((left, right), (bottom, top)))
        rng, shares = np.random.default_rng(0), []
        places = [(left + u * (right - left - wide), bottom + v * (top - bottom - high))
                  for u, v in rng.random((20, 2))]  # fmt: skip
        for x, y in [(431_115.0, 5_402_749.0), *places]:
            server.sent.clear()
            box = GeoBox.from_bbox((x, y, x + wide, y + high), "EPSG:3857", resolution=1)
            grid_points(f"{server.url}/{tree.name}", box).compute()
            shares.append(server.total / every)
        results.append(Result(
            "bytes for a tenth of the IGN tree, where few of its 74 nodes meet", shares[0], 0.25,
            note=f"median of 20 places {np.median(shares[1:]):.2f}: so shallow a tree's upper "
            "levels are 29 % of it",
        ))  # fmt: skip
        for name, spacing in (("to the level of 0.35 m", 0.35), ("all points", None)):
            server.sent.clear()
            url = f"{server.url}/{copc.relative_to(data)}"
            grid_points(url, star[30:58, 38:66], crs="EPSG:26912", spacing=spacing).compute()
            share = server.total / copc.stat().st_size
            results.append(Result(
                f"bytes for a tenth of the lone star's COPC, {name}", share,
                0.25 if spacing else None,
                note="" if spacing else "13 nodes: a statue of 44 m, no tree in breadth",
            ))  # fmt: skip
    return results


# --- what others made ----------------------------------------------------------------------------


def against_others(data: Path) -> list[Result]:
    rows, results = [], []
    cases: tuple[tuple[str, str, dict[str, Any], str], ...] = (
        ("dsm_max", "lidar_dsm", {"method": "max"}, "theirs is rounded to 1/256 m"),
        ("dsm_p95_filled", "lidar_dsm", {"percentile": 95},
         "theirs is the next higher point, ours between two; as theirs: 2 mm at most"),
        ("dtm", "lidar_dtm", {"water": True, "max_gap": 500},
         "one vertex a pixel here, every point there"),
        ("dtm", "lidar_dtm", {"method": "idw", "water": True}, "another interpolation"),
        ("dtm", "lidar_dtm", {"ground": "smrf"}, "ground found by shape, classes not looked at"),
        ("density", "density", {}, "per m² of ground here, of the projection there"),
        ("intensity", "intensity", {}, "theirs is whole numbers"),
    )  # fmt: skip
    for place in ("lidar_topography", "lidar_autzen"):
        (path,) = (data / place / "points").glob("*.laz")
        for raster, kind, how, why in cases:
            theirs = deepdem.stack({"dsm": data / place / f"{raster}.tif"}, like="dsm")["dsm"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the unit of heights
                error = (grid_points(path, theirs, kind, **how) - theirs).values
            error = error[np.isfinite(error)]
            median = float(np.median(error))
            nmad = 1.4826 * float(np.median(np.abs(error - median)))
            options_ = ", ".join(f"{k}={v}" for k, v in how.items())
            rows.append((place, raster, f"{kind} {options_}", f"{error.size}", f"{median:+.4f}",
                         f"{nmad:.4f}", f"{np.abs(error).max():.2f}", why))  # fmt: skip
            if raster == "dsm_max" or how.get("max_gap"):
                results.append(Result(f"{place}: NMAD against {raster}", nmad, 0.01, unit="m",
                                      note=f"median {median:+.4f} m"))  # fmt: skip
    table(("cloud", "their raster", "ours", "cells", "median", "NMAD", "at most", "why"), rows)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:6])
        return
    args = options(__doc__, only={"choices": ("speed", "memory", "http", "others")})
    width = {"small": 100, "medium": 500, "full": 1000}[args.size]
    results = []
    with folder(args) as cache:
        if args.only in (None, "speed"):
            results += speed(cache, width, args.repeat or (1 if args.size == "small" else 3))
        if args.only in (None, "memory"):
            took = seconds(lambda: results.extend(memory(cache, (width // 2, width))))
            print(f"memory: {took:.0f} s", file=sys.stderr)
        data = data_folder()
        if args.only in (None, "http"):
            results += by_http(cache, width // 2) + (real_trees(data) if data else [])
        if args.only in (None, "others") and data:
            results += against_others(data)
    report(results)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

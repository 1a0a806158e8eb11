"""Peak memory of refine over scenes of different sizes, same chunks (measure 8)."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from common import (
    LAYERS,
    Result,
    folder,
    options,
    report,
    saved,
    seconds,
    stored_scene,
    table,
    untrained,
)

CORES = 2
WAYS = ("threads", "cluster")


def child(way: str, scene: str, model: str, out: str) -> None:
    """Refine a scene from Zarr to Zarr and print the peak of the process that most has, MiB."""
    import dask
    import torch
    from distributed import Client, LocalCluster

    import deepdem
    from deepdem.refine import refine

    def run() -> None:
        refined = refine(deepdem.open_scene(scene), model, precision="float32", chunks=2048)
        refined.to_dataset().deepdem.to_zarr(out, overwrite=True)

    if way == "threads":
        torch.set_num_threads(CORES)
        with dask.config.set(scheduler="threads", num_workers=CORES):
            took = seconds(run)
        print(peak_mib(), took)
        return
    with (
        LocalCluster(
            n_workers=CORES, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        took = seconds(run)
        print(max(peak_mib(), *client.run(peak_mib).values()), took)


def peak_mib() -> float:
    """Return the most memory this process has had, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had when it forked
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:6])
        return
    args = options(__doc__, only={"choices": WAYS, "help": "leave the other out"})
    widths = {"small": (512, 1024), "medium": (4096, 8192), "full": (4096, 16384)}[args.size]
    rows, results = [], []
    with folder(args) as cache:
        tiny = untrained(LAYERS, architecture="resdepth", window=256, head=1.0, centering="local",
                         options={"start_kernel": 4, "depth": 1})  # fmt: skip
        model = saved(tiny, cache / "tiny.safetensors")
        for way in [args.only] if args.only else WAYS:
            peaks = {}
            for width in widths:
                stored_scene(cache, width)
                done = subprocess.run(
                    [sys.executable, str(Path(__file__).resolve()), "--child", way,
                     str(cache / f"scene-{width}.zarr"), model, str(cache / "refined.zarr")],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise RuntimeError(done.stderr[-2000:])
                peaks[width], took = map(float, done.stdout.split())
                rows.append((way, str(width), f"{peaks[width]:.0f}", f"{took:.0f}"))
            small, large = (peaks[width] for width in widths)
            results.append(
                Result(f"8. peak memory, {widths[1]} / {widths[0]} wide, {way}", large / small, 1.2)
            )
    table(("scheduler", "width", "peak of a process (MiB)", "seconds"), rows)
    report(results)


if __name__ == "__main__":
    main()

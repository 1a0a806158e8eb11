"""Peak memory of refine over scenes of different sizes, same chunks (measure 8)."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from common import LAYERS, Result, folder, options, report, saved, seconds, stored_scene, untrained

CORES = 2


def child(scene: str, model: str, out: str) -> None:
    """Refine a scene from Zarr to Zarr in this process, and print its peak in MiB."""
    import dask
    import torch

    import deepdem
    from deepdem.refine import refine

    torch.set_num_threads(CORES)
    with dask.config.set(scheduler="threads", num_workers=CORES):
        refined = refine(deepdem.open_scene(scene), model, precision="float32", chunks=2048)
        before = peak_mib()
        took = seconds(lambda: refined.to_dataset().deepdem.to_zarr(out, overwrite=True))
    print(before, peak_mib(), took)


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
        child(*sys.argv[2:5])
        return
    args = options(__doc__)
    widths = {"small": (512, 1024), "medium": (4096, 8192), "full": (4096, 16384)}[args.size]
    peaks = {}
    with folder(args) as cache:
        tiny = untrained(LAYERS, architecture="resdepth", window=256, head=1.0,
                         options={"start_kernel": 4, "depth": 1})  # fmt: skip
        model = saved(tiny, cache / "tiny.safetensors")
        for width in widths:
            stored_scene(cache, width)
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--child",
                 str(cache / f"scene-{width}.zarr"), model, str(cache / "refined.zarr")],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            before, peak, took = map(float, done.stdout.split())
            peaks[width] = peak
            print(f"{width}: {before:.0f} MiB before, peak {peak:.0f} MiB, {took:.0f} s")
    small, large = widths
    print()
    report([Result(f"8. peak memory, {large} / {small} wide", peaks[large] / peaks[small], 1.2,
                   note=f"{peaks[large]:.0f} MiB / {peaks[small]:.0f} MiB")])  # fmt: skip


if __name__ == "__main__":
    main()

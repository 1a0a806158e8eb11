"""What the graph of a huge scene weighs before anything is computed (measure 10)."""

from __future__ import annotations

import itertools
import math
import resource
import subprocess
import sys
from pathlib import Path

from common import LAYERS, Result, options, report, seconds, table, untrained


def child(width: int) -> None:
    """Print of a scene so wide: seconds to build, tasks, pickled bytes, MiB."""
    import cloudpickle
    import dask.array as da
    import xarray as xr

    import deepdem
    from deepdem.refine import refine

    model = untrained(LAYERS)
    refine(deepdem.synthetic_scene((512, 512)).deepdem.prepare(), model)  # imports, hashes
    corner = deepdem.synthetic_scene((width, width), chunks=8192)[[]]
    zeros = {
        name: (("y", "x"), da.zeros((width, width), chunks=2048,
                                    dtype=bool if name == "valid" else "float32"))
        for name in LAYERS
    }  # fmt: skip
    ds: xr.Dataset = corner.assign(zeros)
    before, made = _mib(), []
    build = seconds(lambda: made.append(refine(ds, model)))
    graph = dict(made[0].__dask_graph__())
    after = _mib()
    # Tasks one by one, as a scheduler sends them. The model stands once, in a task of its own.
    some = itertools.islice(graph.items(), 0, None, max(1, len(graph) // 20_000))
    sizes = sorted(len(cloudpickle.dumps(task)) for _, task in some)
    light = [s for s in sizes if s < 1_000_000]
    print(build, len(graph), sum(light) / len(light), light[-1], after - before)


def _mib() -> float:
    """Return what this process has in memory now, MiB; its peak where that cannot be seen."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]))
        return
    args = options(
        __doc__, million={"action": "store_true", "help": "1 000 000 wide: minutes, many GB"}
    )
    widths = {"small": [20_000], "medium": [50_000, 100_000, 200_000],
              "full": [50_000, 100_000, 200_000, 400_000]}[args.size]  # fmt: skip
    widths += [1_000_000] * args.million
    rows, results = [], []
    for width in widths:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--child", str(width)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            rows.append((f"{width}", f"failed: {done.stderr[-200:]!r}", *[""] * 5))
            continue
        build, tasks, mean, most, mib = map(float, done.stdout.split())
        chunks = math.ceil(width / 2048) ** 2
        rows.append((f"{width}", f"{build:.2f}", f"{tasks:.0f}", f"{1e6 * build / chunks:.0f}",
                     f"{mean:.0f}", f"{most:.0f}", f"{mib:.0f}"))  # fmt: skip
        if width == 100_000 or args.size == "small":
            results = [
                Result(f"10. seconds to build the graph of {width} wide", build, 5, unit="s"),
                Result(
                    "10. pickled bytes a task", mean, 2000, unit="B", note=f"at most {most:.0f}"
                ),
            ]
    table(("width", "seconds", "tasks", "microseconds a chunk of 2048", "bytes a task", "at most",
           "MiB, all tasks"), rows)  # fmt: skip
    report(results)


if __name__ == "__main__":
    main()

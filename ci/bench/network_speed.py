"""The bare U-Net on a CPU: threads, batch size, memory format, allocator, precision.

No bars: it shows what refine has to choose from. Each row is a fresh process, because an
allocator's settings last as long as its process.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import options, seconds, table, untrained

#: Of malloc.h (glibc): names, numbers and values.
MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, (1 << 31) - 1),
    "M_TOP_PAD": (-2, 1 << 26),
}
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}


def child(job: dict[str, Any]) -> None:
    """Print the seconds a window of one configuration, as JSON."""
    accepted = {}
    if job["allocator"] == "mallopt":
        libc = ctypes.CDLL(None)
        accepted = {n: libc.mallopt(k, v) for n, (k, v) in MALLOPT.items()}
    import torch
    from refine_speed import CORES, forward_all, repeated

    torch.set_num_threads(CORES)
    net = untrained(encoder=job["encoder"]).net.eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # As made, these are 0 and 1, which bfloat16 has exactly: weights in bfloat16 and
            # autocast would be one and the same.
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.6, 1.6)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.uniform_(-0.2, 0.2)
    torch.manual_seed(0)
    windows = net.standardise(torch.randn(job["batch"], 6, 256, 256) * 10)
    batches = repeated(windows, job["batch"], max(job["windows"], job["batch"] * job["threads"]))
    network: Any = net.network
    if job["format"] == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    else:
        batches = [batch.contiguous() for batch in batches]
    with torch.inference_mode():
        exact = network(batches[0])
    if job["precision"] == "bf16 weights":
        network, batches = network.bfloat16(), [batch.bfloat16() for batch in batches]
    if job["precision"] == "bf16 autocast":
        plain = network

        def network(batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result: torch.Tensor = plain(batch)
                return result

    with torch.inference_mode():
        rms = float((network(batches[0]).float() - exact).square().mean().sqrt() / exact.std())
    count = sum(map(len, batches))
    each = [
        seconds(lambda: forward_all(network, batches, job["threads"])) / count
        for _ in range(job["repeat"])
    ]
    print(json.dumps({"ms": 1000 * min(each), "rms": rms,
                      "accepted": accepted}))  # fmt: skip


def run(**job: Any) -> dict[str, Any]:
    job = {"format": "channels_last", "precision": "float32", "allocator": "as it is", **job}
    env = {**os.environ, **(ENVIRONMENT if job["allocator"] == "environment" else {})}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
        return
    args = options(__doc__)
    small = args.size == "small"
    common: dict[str, Any] = {
        "encoder": "tu-mobilenetv3_small_050" if small else "resnet18",
        "windows": 2 if small else 24, "repeat": 1 if small else args.repeat or 2,
    }  # fmt: skip
    sizes = [1] if small else [1, 2, 4, 8, 16, 24]
    arrangements = [2] if small else [1, 2]
    names = {1: "1 thread of 2", 2: "2 threads of 1"}
    rows = []
    for allocator in ("as it is", "environment", "mallopt"):
        for threads in arrangements:
            found = [run(threads=threads, batch=b, allocator=allocator, **common) for b in sizes]
            rows.append((names[threads], allocator, *(f"{f['ms']:.1f}" for f in found)))
    table(("ms a window", "allocator", *(f"batch {b}" for b in sizes)), rows)
    print(f"mallopt accepted (1) or not (0): {found[-1]['accepted']}\n")
    best = {"threads": 2, "batch": sizes[min(1, len(sizes) - 1)]}
    rows = []
    for form in ("channels_last", "NCHW"):
        for precision in ("float32", "bf16 autocast", "bf16 weights")[: 1 if small else 3]:
            if (form, precision[:4]) != ("NCHW", "bf16"):
                row = run(format=form, precision=precision, **best, **common)
                rows.append((form, precision, f"{row['ms']:.1f}", f"{row['rms'] * 100:.2f}"))
    table(("format", "precision", "ms a window", "rms to float32 (% of the output's)"), rows)


if __name__ == "__main__":
    main()

"""Seams at windows' edges with networks whose answer is known (measure 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from common import Result, options, report, seam
from torch import Tensor

from deepdem.blocks import Box
from deepdem.mosaic import Batch, Job, Windows, refine_block
from deepdem.windows import blend_weights, overlap_px, window_grid

CONSTANT_M = 3.0


@dataclass(frozen=True)
class Known:
    """A network whose residual is a known function of the heights of its windows (n, y, x)."""

    residual: Callable[[Tensor], Tensor]
    depths: Sequence[int] = ()

    def prepare(
        self, layers: Sequence[Tensor], level: Tensor | None, into: Sequence[Tensor]
    ) -> None:
        """There is nothing but the initial DSM."""

    def __call__(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, None]]:
        for batch in batches:
            yield self.residual(batch.height("dsm")), None


def constant(heights: Tensor) -> Tensor:
    return torch.full_like(heights, CONSTANT_M)


def own_mean(heights: Tensor) -> Tensor:
    return heights.mean(dim=(1, 2), keepdim=True).expand_as(heights)


def correction(
    surface: np.ndarray, predictor: Known, blend: str, overlap: float, width: int
) -> np.ndarray:
    """Return refined minus initial."""
    stride = width - overlap_px(overlap, width)
    line = tuple(map(float, blend_weights(blend, width)))
    windows = Windows(window_grid(surface.shape, width, stride), line)
    whole = Box(0, surface.shape[0], 0, surface.shape[1])
    job = Job(windows=windows, layers=("dsm",), batch_size=8)
    refined: np.ndarray = refine_block([surface], predictor, job, out=whole, region=whole)[0]
    return refined - surface


def rough(size: int) -> np.ndarray:
    """Return a surface that is rough at every scale, metres: the steps of a random walk, summed."""
    rng = np.random.default_rng(0)
    ground = sum(np.cumsum(rng.normal(size=(size, size)), axis=axis) for axis in (0, 1))
    return (0.5 * ground + rng.normal(size=(size, size))).astype(np.float32)


def main() -> None:
    args = options(__doc__)
    size, width = (400, 64) if args.size == "small" else (2000, 256)
    surface = rough(size)
    flat = correction(surface, Known(constant), "hann", 0.25, width)
    ulp = float(np.spacing(np.abs(surface).max() + CONSTANT_M))
    results = [
        Result("11. a constant residual: largest deviation, in the surface's float32 steps",
               float(np.abs(flat - CONSTANT_M).max()) / ulp, 1.0,
               note=f"one step is {1e6 * ulp:.1f} micrometres"),
    ]  # fmt: skip
    # What refine chooses for networks centred on the local level, for those centred on chips, and
    # what the predecessor took.
    for overlap in (0.125, 0.25, 0.5):
        stride = width - overlap_px(overlap, width)
        jumps = {
            blend: seam(correction(surface, Known(own_mean), blend, overlap, width), width, stride)
            for blend in ("hann", "none")
        }
        name = f"11. the window's mean, overlap {overlap:g}: jumps at edges, hann / none"
        note = f"{jumps['hann']:.5f} m / {jumps['none']:.3f} m"
        results.append(Result(name, jumps["hann"] / jumps["none"], 0.05, note=note))
    report(results)


if __name__ == "__main__":
    main()

"""What is seen of a training: statistics of validation errors, and one chip as a picture.

Kernels: torch and NumPy arrays in, numbers and arrays out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepdem.terrain import shade

__all__ = ["ErrorStatistics", "picture"]

_SAMPLE = 1 << 14


@dataclass
class ErrorStatistics:
    """Statistics of errors that come in batches, whatever their number.

    The sums are exact. Medians are of a sample: every n-th pixel, 16 384 of a batch at
    most.
    """

    count: int = 0
    total: float = 0.0
    absolute: float = 0.0
    square: float = 0.0
    loss: float = 0.0
    errors: list[Tensor] = field(default_factory=list)

    def add(self, error: Tensor, usable: Tensor, loss: float) -> None:
        """Take in a batch: errors in metres, where they count."""
        known = error[usable].float()
        if not len(known):
            return
        every = -(-len(known) // _SAMPLE)
        self.count += len(known)
        self.total += float(known.sum())
        self.absolute += float(known.abs().sum())
        self.square += float(known.square().sum())
        self.loss += loss * len(known)
        self.errors.append(known[::every].cpu())

    def merge(self, other: ErrorStatistics) -> None:
        """Take in what another process has seen."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def everyones(self) -> ErrorStatistics:
        """Return what all processes of a distributed training have seen."""
        spread = torch.distributed
        if not (spread.is_available() and spread.is_initialized()):
            return self
        parts: list[Any] = [None] * spread.get_world_size()
        spread.all_gather_object(parts, self)
        together = ErrorStatistics()
        for part in parts:
            together.merge(part)
        return together

    def metrics(self) -> dict[str, float]:
        """Return MAE, RMSE, NMAD and bias in metres, and the mean loss; nothing of no error."""
        if not self.count:
            return {}
        errors = torch.cat(self.errors)
        nmad = 1.4826 * (errors - errors.median()).abs().median()
        return {
            "val_MAE": self.absolute / self.count,
            "val_RMSE": (self.square / self.count) ** 0.5,
            "val_NMAD": float(nmad),
            "val_bias": self.total / self.count,
            "val_loss": self.loss / self.count,
        }


def picture(
    dsm: NDArray[np.float32],
    refined: NDArray[np.float32],
    truth: NDArray[np.float32],
    pixel_m: float,
) -> NDArray[np.float32]:
    """Return a chip as a row of pictures, RGB of 0 to 1, shape (y, 5 x + 4 gaps, 3).

    The relief of the initial DSM, the refined surface and the truth, lit from the north-west; the
    error before and after, blue where too low, red where too high, white at 0 and full at three
    times the median of the initial error's absolute value. No data is grey.
    """
    step = pixel_m if np.isfinite(pixel_m) else 1.0
    before, after = dsm - truth, refined - truth
    known = np.isfinite(before)
    full = 3 * float(np.median(np.abs(before[known]))) if known.any() else 1.0
    reliefs = [
        np.repeat(_grey(shade(z, step_y=-step, step_x=step, azimuth=315, altitude=45,
                              z_factor=1.0))[..., None], 3, axis=-1)
        for z in (dsm, refined, truth)
    ]  # fmt: skip
    gap = np.ones((len(dsm), 4, 3), dtype=np.float32)
    row = [*reliefs, *(_colours(e, max(full, 1e-3)) for e in (before, after))]
    out: NDArray[np.float32] = np.concatenate([part for p in row for part in (p, gap)][:-1], axis=1)
    return out


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isfinite(values), values, np.float32(0.5))


def _colours(error: NDArray[np.float32], full: float) -> NDArray[np.float32]:
    share = np.clip(error / full, -1, 1)
    high, low = np.maximum(share, 0), np.maximum(-share, 0)
    rgb = np.stack([1 - low, 1 - high - low, 1 - high], axis=-1)
    return np.where(np.isfinite(error)[..., None], rgb, 0.5).astype(np.float32)

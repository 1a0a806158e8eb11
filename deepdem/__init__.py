"""Better elevation models out of satellite stereo: deep learning on xarray, Dask and Zarr.

``import deepdem`` registers the ``.deepdem`` accessor on xarray objects and loads neither torch
nor dask.distributed: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepdem import accessor as _accessor  # noqa: F401  # registers Dataset.deepdem and DataArray.deepdem

if TYPE_CHECKING:
    from deepdem.builder import build
    from deepdem.data import ChipDataModule
    from deepdem.legacy import import_checkpoint
    from deepdem.runs import open_asp, open_deepdem
    from deepdem.scene import stack
    from deepdem.sources.lidar import find_collections, grid_points
    from deepdem.sources.simulated import simulate_stereo
    from deepdem.sources.stac import hls_ndvi, lidar_3dep
    from deepdem.sources.synthetic import synthetic_scene
    from deepdem.splits import ByScene, Polygons, Stripes
    from deepdem.store import open_scene, open_scenes
    from deepdem.train import DeepDEM, load_model

__version__ = "0.1.0"

_HOME = {
    "ByScene": "deepdem.splits",
    "ChipDataModule": "deepdem.data",
    "DeepDEM": "deepdem.train",
    "Polygons": "deepdem.splits",
    "Stripes": "deepdem.splits",
    "build": "deepdem.builder",
    "find_collections": "deepdem.sources.lidar",
    "grid_points": "deepdem.sources.lidar",
    "hls_ndvi": "deepdem.sources.stac",
    "import_checkpoint": "deepdem.legacy",
    "lidar_3dep": "deepdem.sources.stac",
    "load_model": "deepdem.train",
    "open_asp": "deepdem.runs",
    "open_deepdem": "deepdem.runs",
    "open_scene": "deepdem.store",
    "open_scenes": "deepdem.store",
    "simulate_stereo": "deepdem.sources.simulated",
    "stack": "deepdem.scene",
    "synthetic_scene": "deepdem.sources.synthetic",
}

__all__ = [
    "ByScene",
    "ChipDataModule",
    "DeepDEM",
    "Polygons",
    "Stripes",
    "__version__",
    "build",
    "find_collections",
    "grid_points",
    "hls_ndvi",
    "import_checkpoint",
    "lidar_3dep",
    "load_model",
    "open_asp",
    "open_deepdem",
    "open_scene",
    "open_scenes",
    "simulate_stereo",
    "stack",
    "synthetic_scene",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deepdem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"_accessor"})

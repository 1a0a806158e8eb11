"""Scenes and models small enough for a unit test, and a scheduler that must not be called."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

# Before torch starts its threads; a user's own setting stands. Networks as small as these gain
# nothing from a second thread, and on a busy machine threads that wait for each other by spinning
# take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import dask
import pytest
import xarray as xr
from hypothesis import HealthCheck, settings

settings.register_profile(
    "deepdem", deadline=None, derandomize=True, max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("deepdem")

LAYERS = ("dsm", "ortho_left", "ortho_right", "triangulation_error", "ndvi")


@pytest.fixture
def no_compute() -> Callable[[], AbstractContextManager[None]]:
    """A context in which any Dask computation is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed that should have stayed lazy")

    return lambda: dask.config.set(scheduler=refuse)


@pytest.fixture(scope="session")
def scene() -> xr.Dataset:
    """A prepared synthetic scene in memory, 300 by 260 pixels."""
    import deepdem

    return deepdem.synthetic_scene((300, 260), seed=1).deepdem.prepare().compute()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data beside the project; tests that need it are skipped without."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data beside the project (../shared/data)")
    return folder


def fitted(layers: tuple[str, ...] = LAYERS, chip_size: int = 64, **options: object):
    """Return an untrained DeepDEM that knows a scale, so that it can refine; centred on chips."""
    import torch

    from deepdem import DeepDEM

    torch.manual_seed(0)
    model = DeepDEM(
        layers, encoder="tu-mobilenetv3_small_050", chip_size=chip_size, dsm_scale=5.0,
        options={"decoder_channels": [16, 16, 8, 8, 8]}, **{"centering": "chip", **options},
    )  # fmt: skip
    names = model.spec.standardised
    model.net.spec = replace(
        model.spec, pixel_size=1.0, means=dict.fromkeys(names, 0.4), stds=dict.fromkeys(names, 0.3)
    )
    with torch.no_grad():  # a residual of metres, so that a difference would be seen
        model.net.network.segmentation_head[0].weight.mul_(30)
    return model.eval()


@pytest.fixture(scope="session")
def model():
    """An untrained network of windows of 64 pixels that knows a scale."""
    return fitted()

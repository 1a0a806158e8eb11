"""The ``.deepdem`` accessor: one-liners over the rooms of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import xbatcher
    from matplotlib.figure import Figure

__all__ = ["DeepDEMArrayAccessor", "DeepDEMDatasetAccessor"]


@xr.register_dataset_accessor("deepdem")
class DeepDEMDatasetAccessor:
    """What a scene can do. Every method is lazy unless its own docstring says otherwise."""

    def __init__(self, ds: xr.Dataset):
        self._ds = ds

    def prepare(self, **options: Any) -> xr.Dataset:
        """Return the scene with its derived layers; see `deepdem.derive.prepare`."""
        from deepdem.derive import prepare

        return prepare(self._ds, **options)

    def to_zarr(self, store: Any, **options: Any) -> None:
        """Write the scene, or what `refine` returned; computes.

        A scene is written by `deepdem.store.scene_to_zarr`; a Dataset that `refine` returned
        (``refined`` with ``refined_std`` or ``filled``) by `deepdem.write.write_zarr`, which can
        ``resume=True``.
        """
        from deepdem.write import dataset_to_zarr

        dataset_to_zarr(self._ds, store, **options)

    def to_cog(self, path: Any, **options: Any) -> None:
        """Write a GeoTIFF, a band a layer; computes. See `deepdem.cog.write_cog`."""
        from deepdem.cog import write_cog

        write_cog(self._ds, path, **options)

    def chips(self, **options: Any) -> xbatcher.BatchGenerator:
        """Return a generator of chips; see `deepdem.chips.chip_generator`."""
        from deepdem.chips import chip_generator

        return chip_generator(self._ds, **options)

    def dsm_scale(self, **options: Any) -> float:
        """Return the DSM scale in metres; computes. See `deepdem.chips.dsm_scale`."""
        from deepdem.chips import dsm_scale

        return dsm_scale(self._ds, **options)

    def coregister(self, **options: Any) -> xr.Dataset:
        """Return the scene moved onto a reference; see `deepdem.coregister.coregister`.

        Reads a sample of the scene at once to estimate the shift; the layers are moved lazily.
        """
        from deepdem.coregister import coregister

        return coregister(self._ds, **options)

    def refine(self, model: Any, **options: Any) -> xr.DataArray | xr.Dataset:
        """Return the refined surface; see `deepdem.refine.refine`."""
        from deepdem.refine import refine

        return refine(self._ds, model, **options)

    def evaluate(self, refined: Any, **options: Any) -> pd.DataFrame:
        """Return error statistics; computes once. See `deepdem.evaluate.evaluate`."""
        from deepdem.evaluate import evaluate

        return evaluate(self._ds, refined, **options)

    def hillshade(self, layer: str = "dsm", **options: Any) -> xr.DataArray:
        """Return a layer's hillshade; see `deepdem.plot.hillshade`."""
        from deepdem.plot import hillshade
        from deepdem.scene import check_scene

        check_scene(self._ds, [layer])
        return hillshade(self._ds[layer], **options)

    def summary(self) -> Any:
        """Return a description with pictures; computes few pixels. See `deepdem.summary`."""
        from deepdem.summary import summary

        return summary(self._ds)

    def plot(self, **options: Any) -> Figure:
        """Return an overview figure; computes what is shown. See `deepdem.plot.plot`."""
        from deepdem.plot import plot

        return plot(self._ds, **options)

    def compare(self, refined: xr.DataArray, **options: Any) -> Figure:
        """Return the before-and-after figure; computes. See `deepdem.plot.compare`."""
        from deepdem.plot import compare

        return compare(self._ds, refined, **options)

    def report(self, refined: Any, path: Any, **options: Any) -> Path:
        """Return the path of an HTML report; computes. See `deepdem.report.write_report`."""
        from deepdem.report import write_report

        return write_report(self._ds, refined, path, **options)


@xr.register_dataarray_accessor("deepdem")
class DeepDEMArrayAccessor:
    """What a single surface can do."""

    def __init__(self, array: xr.DataArray):
        self._array = array

    def hillshade(self, **options: Any) -> xr.DataArray:
        """Return the surface's hillshade; see `deepdem.plot.hillshade`."""
        from deepdem.plot import hillshade

        return hillshade(self._array, **options)

    def to_zarr(self, store: Any, **options: Any) -> None:
        """Write the surface, resumable; computes. See `deepdem.write.write_zarr`."""
        from deepdem.write import write_zarr

        write_zarr(self._array, store, **options)

    def to_cog(self, path: Any, **options: Any) -> None:
        """Write the surface as a GeoTIFF; computes. See `deepdem.cog.write_cog`."""
        from deepdem.cog import write_cog

        write_cog(self._array, path, **options)

"""Refinement: overlapping windows over a scene of any size, as one lazy DataArray.

The kernel, `refine_block`, is NumPy but for the network that it calls; the glue below it chooses
blocks and does no arithmetic. What a window sees depends on its place on the scene's window grid
alone, never on a chunk: that is why any chunking gives the same surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from deepdem.blocks import Box, chunks_of, map_regions
from deepdem.layers import describe
from deepdem.scene import check_scene, dask_layer, pixel_size
from deepdem.windows import Blend, Grid, blend_weights, overlap_px, window_grid

__all__ = ["Windows", "refine", "refine_block"]

#: Gives the residual (n, y, x) in metres of windows (n, layer, y, x) of raw layers.
Predictor: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Windows:
    """How a scene is cut into windows: the grid, and the weights along one axis of a window."""

    grid: Grid
    weights: tuple[float, ...]

    @property
    def width(self) -> int:
        """A window's width in pixels."""
        return self.grid.y.window_px

    def region(self, out: Box, shape: tuple[int, int]) -> Box:
        """Return the pixels of a scene of `shape` that the windows touching `out` need."""
        y0, y1 = self.grid.y.span(out.y0, out.y1)
        x0, x1 = self.grid.x.span(out.x0, out.x1)
        return Box(y0, min(y1, shape[0]), x0, min(x1, shape[1]))


def refine_block(
    layers: Sequence[NDArray[Any]],
    usable: NDArray[np.bool_],
    predictor: Predictor,
    windows: Windows,
    *,
    out: Box,
    region: Box,
    dsm: int,
    batch_size: int,
) -> NDArray[np.float32]:
    """Return the refined heights of one output box.

    Parameters
    ----------
    layers
        One array a layer, each of the region's shape, raw units, NaN for no data.
    usable
        Where a result is wanted, the region's shape. Windows without such a pixel in the output
        box are not computed.
    predictor
        Gives the residual of a batch of windows.
    windows
        Their grid and weights; `out` and `region` are pixels of the same scene.
    dsm
        The index of the initial DSM among the layers.
    batch_size
        Windows in one call of the predictor.

    Returns
    -------
    ndarray
        ``out.shape``, float32, metres: the initial DSM plus the weighted mean of the residuals;
        NaN where `usable` is False.
    """
    inside = out.within(region)
    surface = np.where(usable[inside], layers[dsm][inside], np.nan).astype(np.float32)
    places = [
        (int(y), int(x))
        for y in windows.grid.y.starts(out.y0, out.y1)
        for x in windows.grid.x.starts(out.x0, out.x1)
        if usable[_overlap(int(y), int(x), windows.width, out).within(region)].any()
    ]
    if not places:
        return surface
    line = np.array(windows.weights, dtype=np.float32)
    weight = np.outer(line, line)
    total = np.zeros(out.shape, dtype=np.float32)
    norm = np.zeros(out.shape, dtype=np.float32)
    for k in range(0, len(places), batch_size):
        part = places[k : k + batch_size]
        residuals = predictor(_batch(layers, part, windows.width, region))
        for (y, x), residual in zip(part, residuals, strict=True):
            box = _overlap(y, x, windows.width, out)
            window = Box(y, y + windows.width, x, x + windows.width)
            there, here = box.within(out), box.within(window)
            total[there] += residual[here] * weight[here]
            norm[there] += weight[here]
    # A pixel that is wanted has at least one window, so its norm is positive.
    surface += np.divide(total, norm, out=total, where=norm > 0)
    return surface


def _overlap(y: int, x: int, width: int, out: Box) -> Box:
    return Box(y, y + width, x, x + width).intersect(out)


def _batch(
    layers: Sequence[NDArray[Any]], places: Sequence[tuple[int, int]], width: int, region: Box
) -> NDArray[np.float32]:
    """Return windows (n, layer, y, x); beyond the far edge of a small scene it is mirrored."""
    batch = np.empty((len(places), len(layers), width, width), dtype=np.float32)
    for n, (y, x) in enumerate(places):
        box = Box(y, y + width, x, x + width).intersect(region)
        there = box.within(region)
        height, breadth = box.shape
        for m, layer in enumerate(layers):
            part = layer[there]
            if part.shape != (width, width):
                part = np.pad(part, ((0, width - height), (0, width - breadth)), mode="reflect")
            batch[n, m] = part
    return batch


def _refine_chunk(
    arrays: list[NDArray[Any]],
    *,
    out: Box,
    region: Box,
    model: Any,
    windows: Windows,
    batch_size: int,
    device: str,
    bf16: bool,
    mask: bool,
) -> NDArray[np.float32]:
    """Return one output chunk: find the network in this process and call the kernel."""
    import torch

    from deepdem.predict import predict, resolve_device, threads

    here = resolve_device(device)
    net = model.net(here)
    layers = arrays[:-1] if mask else arrays
    usable = np.ones(region.shape, dtype=bool)
    for layer in arrays:
        usable &= np.isfinite(layer) if layer.dtype.kind == "f" else layer.astype(bool)

    def predictor(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        residual = predict(net, torch.from_numpy(batch), device=here, bf16=bf16)
        array: NDArray[np.float32] = residual.numpy()
        return array

    with threads.task():
        return refine_block(
            layers, usable, predictor, windows, out=out, region=region,
            dsm=net.spec.layers.index("dsm"), batch_size=batch_size,
        )  # fmt: skip


def refine(
    ds: xr.Dataset,
    model: Any,
    *,
    overlap: float = 0.5,
    blend: str | Blend = "hann",
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "auto",
    chunks: int | str = "auto",
) -> xr.DataArray:
    """Return the refined surface, lazy.

    Calling it reads no pixel. Each output chunk is computed by one task from its own pixels and
    a halo. Any chunking of the scene, scheduler, number of workers or batch size gives the same
    surface to 1 mm.

    Parameters
    ----------
    ds
        The scene, with the model's layers.
    model
        A `DeepDEM`, or the path or URL of a saved one.
    overlap
        Of neighbouring windows: a fraction of a window, or pixels.
    blend
        A name from `deepdem.windows.BLENDS`, or a callable that takes the width of a window and
        gives positive weights along one axis. Weights are normalised by their sum at each pixel.
    batch_size
        Windows in one forward pass; ``"auto"``: 8 on a CPU, 32 on a card.
    device
        ``"auto"`` (CUDA, else MPS, else CPU), or a torch device.
    precision
        ``"auto"`` and ``"float32"`` compute in float32, ``"bf16"`` convolves in bfloat16; heights
        are float32 in any case.
    chunks
        The width of the result's chunks; ``"auto"``: about 2048 pixels, a multiple of the step
        from window to window. Windows that straddle two chunks are computed for both: with the
        defaults 13 % of them on a large scene.

    Returns
    -------
    DataArray
        Named ``refined``, (y, x), float32, metres, on the scene's own grid with its CRS; NaN
        where a layer that the model needs, or ``valid`` if the scene has it, has no data.

    Raises
    ------
    ValueError
        A layer of the model is missing, the model was not trained, the scene's pixel size is off
        by more than 1.5 times, or an option is not understood.

    Examples
    --------
    >>> refined = ds.deepdem.refine("baker.safetensors")
    >>> refined.rio.to_raster("refined.tif")
    """
    from deepdem.predict import ModelRef, ship

    ref = ModelRef(_network(model))
    ship(ref)
    spec = ref.spec
    box = check_scene(ds, spec.layers)
    _check_pixel_size(pixel_size(ds), spec.pixel_size)
    shape = (box.shape.y, box.shape.x)
    width = spec.chip_size
    stride = width - overlap_px(overlap, width)
    windows = Windows(
        window_grid(shape, width, stride), tuple(map(float, blend_weights(blend, width)))
    )
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision={precision!r}: pass 'auto', 'float32' or 'bf16'")
    names = [*spec.layers, *(["valid"] if "valid" in ds and "valid" not in spec.layers else [])]
    data = map_regions(
        _refine_chunk,
        [dask_layer(ds, name) for name in names],
        chunks=chunks_of(shape, _chunk_px(chunks, shape, stride)),
        region=_Region(windows, shape),
        dtype=np.float32,
        name="refined",
        reread=True,  # a network is a hundred times dearer than reading its layers
        common={
            "model": ref,
            "windows": windows,
            "batch_size": _batch_size(batch_size, device),
            "device": device,
            "bf16": precision == "bf16",
            "mask": len(names) > len(spec.layers),
        },
    )
    return _result(ds, data, spec, blend=blend, overlap=width - stride, precision=precision,
                   weights=ref.hash)  # fmt: skip


@dataclass(frozen=True)
class _Region:
    """Which pixels of the scene an output box needs."""

    windows: Windows
    shape: tuple[int, int]

    def __call__(self, out: Box) -> Box:
        return self.windows.region(out, self.shape)


def _network(model: Any) -> Any:
    from deepdem.models import ResidualNet, read_model

    net = read_model(model) if isinstance(model, str | PathLike) else getattr(model, "net", model)
    if not isinstance(net, ResidualNet):
        raise ValueError(
            f"model={type(model).__name__} is no model: pass a DeepDEM, or the path or URL of a "
            "saved one"
        )
    if not net.spec.is_fitted:
        raise ValueError(
            "the model has no DSM scale or lacks the layers' statistics: train it first, "
            "trainer.fit(model, deepdem.ChipDataModule(...))"
        )
    return net


def _check_pixel_size(scene_m: float, model_m: float) -> None:
    ratio = scene_m / model_m
    if np.isfinite(ratio) and not 1 / 1.5 <= ratio <= 1.5:
        raise ValueError(
            f"the scene has pixels of {scene_m:.3g} m, the model was trained on {model_m:.3g} m: "
            "what it knows of crowns and roofs does not hold there; stack the scene with "
            f"resolution={model_m:.3g}, or train a model at {scene_m:.3g} m"
        )


def _chunk_px(chunks: int | str, shape: tuple[int, int], stride: int) -> int:
    if chunks == "auto":
        # A small scene in smaller chunks, so that there is work for several workers.
        wanted = 2048 if min(shape) >= 4096 else 1024
        return max(round(wanted / stride), 1) * stride
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: pass 'auto' or a width in pixels")
    return chunks


def _batch_size(batch_size: int | str, device: str) -> int:
    if batch_size == "auto":
        return 8 if device in ("auto", "cpu") else 32
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: pass 'auto' or a positive number")
    return batch_size


def _result(
    ds: xr.Dataset, data: da.Array, spec: Any, *, blend: Any, overlap: int, precision: str,
    weights: str,
) -> xr.DataArray:  # fmt: skip
    from deepdem import __version__

    out = xr.DataArray(
        data, coords={name: ds.coords[name] for name in ("y", "x", "spatial_ref")
                      if name in ds.coords}, dims=("y", "x"), name="refined",
    )  # fmt: skip
    out.attrs = {
        "long_name": f"refined surface ({describe(spec.target).long_name} estimated)",
        "units": "m",
        "deepdem_version": __version__,
        "deepdem_target": spec.target,
        "deepdem_weights": weights,
        "deepdem_window_px": spec.chip_size,
        "deepdem_overlap_px": overlap,
        "deepdem_blend": blend if isinstance(blend, str) else repr(blend),
        "deepdem_precision": precision,
    }
    if vertical := ds["dsm"].attrs.get("vertical_reference"):
        out.attrs["vertical_reference"] = vertical
    out.encoding = {"grid_mapping": "spatial_ref"}
    return out

"""Refinement: overlapping windows over a scene of any size, as one lazy DataArray.

The kernel, `refine_block`, is NumPy but for the network that it calls; the glue below it chooses
blocks and does no arithmetic. What a window sees depends on its place on the scene's window grid
alone, never on a chunk: that is why any chunking gives the same surface.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.fill import fillnodata

from deepdem.blocks import Box, Chunks, chunks_of, map_regions
from deepdem.layers import describe
from deepdem.scene import check_scene, dask_layer, pixel_size
from deepdem.windows import Blend, Grid, blend_weights, overlap_px, window_grid

__all__ = ["Job", "Windows", "refine", "refine_block"]

# Raised for windows, which have no place on the ground when their voids are filled.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.fill")

#: Takes batches of windows (n, layer, y, x) of raw layers, gives of each, in order, the residual
#: (n, y, x) in metres and its variance, or None for the latter.
Predictor: TypeAlias = Callable[
    [Iterator[NDArray[np.float32]]],
    Iterable[tuple[NDArray[np.float32], NDArray[np.float32] | None]],
]


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


@dataclass(frozen=True)
class Job:
    """What a block of the result is made of, besides the layers and the networks.

    Attributes
    ----------
    windows
        Their grid and weights.
    layers
        The layers' names, in the order of the arrays.
    mask
        The name of a further array, not seen by the network, of pixels that may be used.
    batch_size
        Windows in one call of the predictor; None: what suits the device.
    fill_voids
        Whether voids of the initial DSM are filled.
    uncertainty
        Whether a plane of standard deviations is made.
    """

    windows: Windows
    layers: tuple[str, ...]
    mask: str | None = None
    batch_size: int | None = None
    fill_voids: bool = False
    uncertainty: bool = False

    @property
    def planes(self) -> tuple[str, ...]:
        """The names of what is made, in order."""
        extra = (("refined_std", self.uncertainty), ("filled", self.fill_voids))
        return ("refined", *(name for name, wanted in extra if wanted))

    @property
    def dsm(self) -> int:
        """The index of the initial DSM among the arrays."""
        return self.layers.index("dsm")

    def usable(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Return where a result is wanted: where every layer, and the mask, has data.

        With `fill_voids` also where the DSM is void, if all is there that does not itself come
        of matching: the triangulation error is void where the DSM is, and so is ``valid``.
        """
        there = [np.isfinite(a) if a.dtype.kind == "f" else a.astype(bool) for a in arrays]
        usable = np.logical_and.reduce(there)
        if self.fill_voids:
            names = [*self.layers, *([self.mask] if self.mask else [])]
            of_matching = ("height", "error", "mask")
            others = [t for n, t in zip(names, there, strict=True)
                      if describe(n).role not in of_matching]  # fmt: skip
            void = ~there[self.dsm]
            usable |= np.logical_and.reduce([void, *others])
        result: NDArray[np.bool_] = usable
        return result


def refine_block(
    arrays: Sequence[NDArray[Any]], predictor: Predictor, job: Job, *, out: Box, region: Box
) -> NDArray[np.float32]:
    """Return the planes of one output box.

    Parameters
    ----------
    arrays
        One a layer of the job, and the mask if it has one; each of the region's shape, raw
        units, NaN for no data. They are not changed.
    predictor
        Gives the residuals of batches of windows, and their variances, in order.
    job
        Windows, layers, what is wanted.
    out, region
        Pixels of the scene: what is made, and what the arrays cover.

    Returns
    -------
    ndarray
        (plane, *out.shape), float32. ``refined``, metres: the initial DSM plus the weighted mean
        of the windows' residuals; NaN where no result is wanted. ``refined_std``, metres: the
        windows are a mixture by their weights, so the variance is the weighted mean of their
        variances plus the weighted variance of their residuals. ``filled``: 1 or 0.
    """
    windows, inside = job.windows, out.within(region)
    wanted = job.usable(arrays)[inside]
    layers = arrays[: len(job.layers)]
    dsm = layers[job.dsm][inside].astype(np.float32)
    void = wanted & ~np.isfinite(dsm)
    whole = Box(0, out.shape[0], 0, out.shape[1])
    places = [
        (y, x)
        for y in windows.grid.y.starts(out.y0, out.y1).tolist()
        for x in windows.grid.x.starts(out.x0, out.x1).tolist()
        if _worth(y, x, wanted, layers[job.dsm], windows.width, out, region)
    ]
    line = np.array(windows.weights, dtype=np.float32)
    weight = np.outer(line, line)
    norm, mean, square = (np.zeros(whole.shape, dtype=np.float32) for _ in range(3))
    size = job.batch_size or _auto_batch("cpu", windows.width)
    parts = [places[k : k + size] for k in range(0, len(places), size)]
    starts: deque[NDArray[np.float32]] = deque()

    def batches() -> Iterator[NDArray[np.float32]]:
        for part in parts:
            batch = _batch(layers, part, windows.width, region)
            if job.fill_voids:
                starts.append(_fill(batch[:, job.dsm]))
            yield batch

    for part, (residuals, variances) in zip(parts, predictor(batches()), strict=True):
        start = starts.popleft() if job.fill_voids else None
        for n, (y, x) in enumerate(part):
            window = Box(y, y + windows.width, x, x + windows.width)
            box = window.intersect(out)
            there, here = box.within(out), box.within(window)
            w, residual = weight[here], residuals[n][here]
            if start is not None:
                # In a void each window has an initial DSM of its own, interpolated from what
                # it sees: what it adds to zero, the void's value below, is its height.
                residual = residual + np.where(void[there], start[n][here], 0)
            norm[there] += w
            mean[there] += w * residual
            if job.uncertainty:
                assert variances is not None
                square[there] += w * (variances[n][here] + residual * residual)
    done = wanted & (norm > 0)
    np.divide(mean, norm, out=mean, where=done)
    planes = [np.where(done, np.where(void, 0, dsm) + mean, np.float32(np.nan))]
    if job.uncertainty:
        np.divide(square, norm, out=square, where=done)
        spread = np.sqrt(np.maximum(square - mean * mean, 0))
        planes.append(np.where(done, spread, np.float32(np.nan)))
    if job.fill_voids:
        planes.append((void & done).astype(np.float32))
    return np.stack(planes).astype(np.float32, copy=False)


def _worth(
    y: int, x: int, wanted: NDArray[np.bool_], dsm: NDArray[Any], width: int, out: Box, region: Box
) -> bool:
    """Return whether a window has a wanted pixel in the output box, and any height at all."""
    window = Box(y, y + width, x, x + width)
    if not wanted[window.intersect(out).within(out)].any():
        return False
    return bool(np.isfinite(dsm[window.intersect(region).within(region)]).any())


def _fill(heights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill the NaN of each window's heights in place, from the window alone; return the heights.

    By inverse distance from the nearest pixels in eight directions (GDAL's FillNodata), over
    heights above the window's lowest: at 2000 m a float32 would lose the decimetres.
    """
    for window in heights:
        finite = np.isfinite(window)
        if not finite.all() and finite.any():
            low = window[finite].min()
            above = np.where(finite, window - low, 0)
            window[:] = low + fillnodata(above, finite, max_search_distance=2.0 * len(window))
    return heights


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
    models: tuple[Any, ...],
    job: Job,
    how: Any,
) -> NDArray[np.float32]:
    """Return one output chunk: find the networks in this process and call the kernel."""
    from deepdem.predict import predictions, resolve_device

    here = replace(how, device=resolve_device(how.device))
    nets = [model.net(here.device, bf16=here.bf16, compiled=here.compiled) for model in models]
    if job.batch_size is None:
        job = replace(job, batch_size=_auto_batch(here.device, job.windows.width))
    return refine_block(
        arrays, lambda batches: predictions(nets, batches, here), job, out=out, region=region
    )


def _input_hash(arrays: list[NDArray[Any]], *, out: Box, region: Box) -> NDArray[np.uint64]:
    """Return a hash of the region's pixels, never 0, shape (1, 1)."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(str((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.array([[int.from_bytes(digest.digest(), "little") or 1]], dtype=np.uint64)


def refine(
    ds: xr.Dataset,
    model: Any,
    *,
    window: int | None = None,
    overlap: float = 0.25,
    blend: str | Blend = "hann",
    batch_size: int | str = "auto",
    device: str = "auto",
    precision: str = "auto",
    tta: bool = False,
    uncertainty: bool = False,
    fill_voids: bool = False,
    compile: bool = False,  # noqa: A002  # torch's word for it
    chunks: int | str = "auto",
) -> xr.DataArray | xr.Dataset:
    """Return the refined surface, lazy.

    Calling it reads no pixel. Each output chunk is computed by one task from its own pixels and
    a halo. Any chunking of the scene, scheduler, number of workers or batch size gives the same
    surface to 1 mm (in float32).

    Parameters
    ----------
    ds
        The scene, with the model's layers.
    model
        A `DeepDEM`, the path or URL of a saved one, or a list of them: an ensemble, whose mean is
        the result. Members must have the same layers, chip size and target.
    window
        The width of windows in pixels; None: the model's chip size. Another width is refused: the
        network sees heights relative to the mean of a chip of that size.
    overlap
        Of neighbouring windows: a fraction of a window, or pixels. A quarter is 1.8 forward
        passes a pixel; on the synthetic scene of the demo it was 0.3 % worse in MAE than a half
        (4 passes) and 2 % better than a half without blending.
    blend
        A name from `deepdem.windows.BLENDS`, or a callable that takes the width of a window and
        gives positive weights along one axis. Weights are normalised by their sum at each pixel.
    batch_size
        Windows in one forward pass; ``"auto"``: of 256 pixels 2 on a CPU, where passes run side
        by side, and 32 on a card.
    device
        ``"auto"`` (CUDA, else MPS, else CPU), or a torch device.
    precision
        ``"float32"``; ``"bf16"`` convolves in bfloat16; ``"auto"`` does so where the device has
        instructions for it and where the model, on its own validation chips when it was
        trained, stayed within 2 cm rms of float32. Heights are float32 in any case; ``attrs``
        say which it is.
    tta
        Whether each window is seen in its eight symmetries (and, where the model was trained so,
        with left and right image swapped) and the mean is taken: 8 (16) times the work. Worth
        trying with models that were trained with flips and turns; others know one direction of
        light and parallax only.
    uncertainty
        Whether the standard deviation is given too. It is that of a mixture of all that the
        model offers: its own predicted scale, the members of an ensemble, the symmetries.
    fill_voids
        Whether the model also predicts where the initial DSM is void but the images are there,
        from heights interpolated within each window. Filled pixels are marked.
    compile
        Whether the network goes through `torch.compile`: half a minute at first in each process.
    chunks
        The width of the result's chunks; ``"auto"``: those of the scene's DSM, if they are square
        and 1024 to 4096 wide; else about 2048 pixels, a multiple of the step from window to
        window. A scene smaller than that is one task: it has all cores of its process, but a
        cluster wants smaller chunks. Chunks that lie on the scene's need the least memory.
        Windows that straddle two chunks are computed for both: with windows of 256 at a quarter
        of overlap 27 % more on a large scene in chunks of 2048, 13 % in chunks of 4096.

    Returns
    -------
    DataArray or Dataset
        ``refined``, (y, x), float32, metres, on the scene's own grid with its CRS; NaN
        where a layer that the model needs, or ``valid`` if the scene has it, has no data. With
        `uncertainty` or `fill_voids` a Dataset of it and ``refined_std`` (float32, metres) or
        ``filled`` (bool).

    Raises
    ------
    ValueError
        A layer of the model is missing, the model was not trained, the scene's pixel size is off
        by more than 1.5 times, the model offers no uncertainty, or an option is not understood.

    Examples
    --------
    >>> refined = ds.deepdem.refine("baker.safetensors")
    >>> refined.rio.to_raster("refined.tif")
    """
    from deepdem.predict import ModelRef, ship

    refs = tuple(ModelRef(net) for net in _networks(model))
    for ref in refs:
        ship(ref)
    spec = refs[0].spec
    box = check_scene(ds, spec.layers)
    _check_pixel_size(pixel_size(ds), spec.pixel_size)
    offers = tta or len(refs) > 1 or any(ref.spec.uncertainty for ref in refs)
    if uncertainty and not offers:
        raise ValueError(
            "the model offers no uncertainty: train it with uncertainty=True, pass a list of "
            "models, or pass tta=True"
        )
    shape = (box.shape.y, box.shape.x)
    windows = _windows(shape, spec.chip_size, window, overlap, blend)
    stride = windows.grid.y.stride_px
    job = Job(
        windows=windows,
        layers=spec.layers,
        mask="valid" if "valid" in ds and "valid" not in spec.layers else None,
        batch_size=_batch_size(batch_size),
        fill_voids=fill_voids,
        uncertainty=uncertainty,
    )
    cut = chunks_of(shape, _chunk_px(chunks, ds, stride))
    arrays = [dask_layer(ds, name) for name in (*job.layers, *([job.mask] if job.mask else []))]
    how = _how([ref.spec for ref in refs], device, precision, tta=tta, compiled=compile)
    data = map_regions(
        _refine_chunk,
        arrays,
        chunks=cut,
        region=_Region(job.windows, shape),
        dtype=np.float32,
        name="refined",
        planes=len(job.planes),
        # A network is a hundred times dearer than reading its layers.
        direct=True,
        reread=True,
        common={"models": refs, "job": job, "how": how},
    )
    # A callable has no name that another process would know it by, but its weights.
    name = blend if isinstance(blend, str) else f"custom-{tokenize(windows.weights)}"
    attrs = _provenance(ds, [ref.spec for ref in refs], how, overlap=spec.chip_size - stride)
    attrs |= {"deepdem_weights": [ref.hash for ref in refs], "deepdem_blend": name}
    return _result(ds, data, job, attrs, _hashes(arrays, cut))


def _windows(
    shape: tuple[int, int], chip_px: int, window: int | None, overlap: float, blend: str | Blend
) -> Windows:
    if window not in (None, chip_px):
        raise ValueError(
            f"window={window}: the model is centred on chips of {chip_px} px, so its windows must "
            f"be that wide; leave window= out, or train with chip_size={window}"
        )
    stride = chip_px - overlap_px(overlap, chip_px)
    line = tuple(map(float, blend_weights(blend, chip_px)))
    return Windows(window_grid(shape, chip_px, stride), line)


@dataclass(frozen=True)
class _Region:
    """Which pixels of the scene an output box needs."""

    windows: Windows
    shape: tuple[int, int]

    def __call__(self, out: Box) -> Box:
        return self.windows.region(out, self.shape)


def _networks(model: Any) -> list[Any]:
    """Return the networks that are meant, checked against each other."""
    from deepdem.modelfile import read_model
    from deepdem.models import ResidualNet

    nets = []
    for one in model if isinstance(model, list | tuple) else [model]:
        net = read_model(one) if isinstance(one, str | PathLike) else getattr(one, "net", one)
        if not isinstance(net, ResidualNet):
            raise ValueError(
                f"model={type(one).__name__} is no model: pass a DeepDEM, or the path or URL of a "
                "saved one"
            )
        if not net.spec.is_fitted:
            raise ValueError(
                "the model has no DSM scale or lacks the layers' statistics: train it first, "
                "trainer.fit(model, deepdem.ChipDataModule(...))"
            )
        nets.append(net)
    if not nets:
        raise ValueError("model=[] is an ensemble without a member: pass at least one model")
    for name in ("layers", "chip_size", "target"):
        values = {getattr(net.spec, name) for net in nets}
        if len(values) > 1:
            raise ValueError(f"the members of the ensemble differ in their {name}: {values}")
    return nets


def _check_pixel_size(scene_m: float, model_m: float) -> None:
    ratio = scene_m / model_m
    if np.isfinite(ratio) and not 1 / 1.5 <= ratio <= 1.5:
        raise ValueError(
            f"the scene has pixels of {scene_m:.3g} m, the model was trained on {model_m:.3g} m: "
            "what it knows of crowns and roofs does not hold there; stack the scene with "
            f"resolution={model_m:.3g}, or train a model at {scene_m:.3g} m"
        )


def _chunk_px(chunks: int | str, ds: xr.Dataset, stride: int) -> int:
    if chunks == "auto":
        own = ds["dsm"].chunks
        sizes = {sizes[0] for sizes in own if len(sizes) > 1} if own else set()
        if len(sizes) == 1 and 1024 <= min(sizes) <= 4096:
            return int(min(sizes))
        return max(round(2048 / stride), 1) * stride
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: pass 'auto' or a width in pixels")
    return chunks


def _batch_size(wanted: int | str) -> int | None:
    if wanted == "auto":
        return None
    if not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"batch_size={wanted!r}: pass 'auto' or a positive number")
    return wanted


def _auto_batch(device: str, width: int) -> int:
    # Two windows of 256 on a CPU: what the allocator keeps between layers (see predict.py).
    pixels = 2 * 256**2 if device == "cpu" else 32 * 256**2
    return max(1, min(pixels // width**2, 64))


def _how(specs: Sequence[Any], device: str, precision: str, *, tta: bool, compiled: bool) -> Any:
    """Return how batches are predicted; which precision ``"auto"`` is, is decided here for all."""
    from deepdem.predict import Prediction, bf16_is_fast

    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision={precision!r}: pass 'auto', 'float32' or 'bf16'")
    bf16 = precision == "bf16"
    if precision == "auto" and bf16_is_fast(device):
        known = [spec.training.get("bf16_rms_m", np.inf) for spec in specs]
        bf16 = max(known) <= 0.02
    swapped = all("swap" in spec.training.get("augment", ()) for spec in specs)
    layers = specs[0].layers
    pair = ("ortho_left", "ortho_right")
    swap = (layers.index(pair[0]), layers.index(pair[1])) if set(pair) <= set(layers) else None
    return Prediction(device, bf16, tta, swap if swapped else None, compiled)


def _hashes(arrays: Sequence[da.Array], cut: Chunks) -> da.Array:
    """Return a lazy array with the hash of each output chunk's own inputs, for `deepdem.write`."""
    edges = [np.cumsum((0, *sizes)).tolist() for sizes in cut]

    def own(out: Box) -> Box:
        return Box(edges[0][out.y0], edges[0][out.y1], edges[1][out.x0], edges[1][out.x1])

    return map_regions(
        _input_hash, arrays, chunks=chunks_of((len(cut[0]), len(cut[1])), 1), region=own,
        dtype=np.uint64, name="input-hash", direct=True,
    )  # fmt: skip


def _provenance(ds: xr.Dataset, specs: Sequence[Any], how: Any, *, overlap: int) -> dict[str, Any]:
    from deepdem import __version__

    vertical = ds["dsm"].attrs.get("vertical_reference")
    return {
        "deepdem_version": __version__,
        "deepdem_target": specs[0].target,
        "deepdem_window_px": specs[0].chip_size,
        "deepdem_overlap_px": overlap,
        "deepdem_precision": "bf16" if how.bf16 else "float32",
        "deepdem_tta": how.tta,
        **({"vertical_reference": vertical} if vertical else {}),
    }


def _result(
    ds: xr.Dataset, data: da.Array, job: Job, attrs: dict[str, Any], hashes: da.Array
) -> xr.DataArray | xr.Dataset:
    coords = {n: ds.coords[n] for n in ("y", "x", "spatial_ref") if n in ds.coords}
    target = describe(attrs["deepdem_target"]).long_name
    words = {
        "refined": {"long_name": f"refined surface ({target} estimated)", "units": "m"},
        "refined_std": {"long_name": "standard deviation of the refined surface", "units": "m"},
        "filled": {"long_name": "void of the initial DSM, filled", "units": "1"},
    }
    planes = {}
    for n, name in enumerate(job.planes):
        plane = data[n] if name != "filled" else data[n].astype(bool)
        array = xr.DataArray(plane, coords=coords, dims=("y", "x"), name=name)
        array.attrs = {**words[name], **attrs}
        array.encoding = {"grid_mapping": "spatial_ref"}
        planes[name] = array
    # Not written anywhere: what `deepdem.write` needs to know whether inputs have changed.
    planes["refined"].encoding["deepdem_inputs"] = hashes
    return planes["refined"] if len(planes) == 1 else xr.Dataset(planes)

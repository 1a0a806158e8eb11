"""Refinement: overlapping windows over a scene of any size, as one lazy DataArray.

The glue: it chooses windows and blocks, and does no arithmetic. The kernel is `refine_block` in
`deepdem.mosaic`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import dask.array as da
import google_crc32c
import numpy as np
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray

from deepdem._memory import give_back
from deepdem.blocks import Box, Chunks, chunks_of, map_regions, unzipped
from deepdem.layers import describe
from deepdem.mosaic import Array, Job, Windows, auto_batch, refine_block
from deepdem.scene import check_scene, dask_layer, pixel_size
from deepdem.windows import Blend, blend_weights, overlap_px, window_grid

__all__ = ["refine"]

# The width of windows where the model leaves it open. Wider ones cost as many passes a pixel at
# the same share of overlap, and more of them are computed for two chunks.
_WINDOW_PX = 256
# Height and width of a chunk. It is worked through from top to bottom in bands of rows: what a
# higher one needs more is for heights, the level and the sums over windows.
_CHUNK_PX = 4096, 2048
# Rows that are read at once.
_ROWS_PX = 512
# The narrowest chunks of a scene that the result's follow.
_SMALLEST_PX = 256


def _refine_chunk(
    arrays: list[Array],
    *,
    out: Box,
    region: Box,
    models: tuple[Any, ...],
    job: Job,
    how: Any,
) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    """Return one output chunk, and the hash of its own inputs.

    It finds the networks in this process and calls the kernel.
    """
    from deepdem.predict import Predictions, in_one_thread, resolve_device

    here = replace(how, device=resolve_device(how.device))
    nets = [model.net(here.device, bf16=here.bf16, compiled=here.compiled) for model in models]
    if job.batch_size is None:
        job = replace(job, batch_size=auto_batch(here.device, job.windows.width))
    digest = _Digest(len(arrays))
    work = partial(
        refine_block, arrays, Predictions(nets, here), job, out=out, region=region,
        device=here.device, note=digest.add,
    )  # fmt: skip
    block = in_one_thread(work) if here.device == "cpu" else work()
    give_back()
    return block, digest.number()


class _Digest:
    """A hash of several arrays that come some rows at a time.

    Of each a CRC-32C, which processors have an instruction for: a cryptographic hash takes half
    a millisecond a window. One change of four thousand million goes unseen.
    """

    def __init__(self, count: int):
        self.sums = [0] * count
        self.kinds: list[str] = []

    def add(self, rows: Sequence[NDArray[Any]]) -> None:
        """Add rows of each array."""
        self.kinds = [str((array.dtype.str, array.shape[1:])) for array in rows]
        for n, array in enumerate(rows):
            plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            plain.flags.writeable = False
            self.sums[n] = google_crc32c.extend(self.sums[n], plain)

    def number(self) -> NDArray[np.uint64]:
        """Return it as a number, never 0, shape (1, 1)."""
        digest = hashlib.blake2b(str((self.kinds, self.sums)).encode(), digest_size=8).digest()
        return np.array([[int.from_bytes(digest, "little") or 1]], dtype=np.uint64)


def _input_hash(arrays: list[NDArray[Any]], *, out: Box, region: Box) -> NDArray[np.uint64]:
    """Return a hash of the region's pixels, never 0, shape (1, 1)."""
    digest = _Digest(len(arrays))
    digest.add(arrays)
    return digest.number()


def refine(
    ds: xr.Dataset,
    model: Any,
    *,
    window: int | None = None,
    overlap: float | str = "auto",
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
        The width of windows in pixels; None: 256, or a chip's width where that is more or where
        the network feels further than its chips were wide (``model.spec.reach_px``): it has always
        seen their edges, and is up to a tenth worse without them. A model that is centred on
        chips, or whose network pools over the window, allows its chips' width only
        (``model.spec.window_step``).
    overlap
        Of neighbouring windows: a fraction of a window, or pixels. ``"auto"``: an eighth, 1.3
        forward passes a pixel; a quarter (1.8) where windows are as wide as chips must be. With
        the networks of the demo and an eighth, results were 2 to 3 mm from those of windows at
        every 32 pixels, and with chips and a quarter, 5 to 6 cm (``ci/bench/choices.py``).
    blend
        A name from `deepdem.windows.BLENDS`, or a callable that takes the width of a window and
        gives positive weights along one axis. Weights are normalised by their sum at each pixel.
    batch_size
        Windows in one forward pass; ``"auto"``: of 256 pixels 4 on a CPU, where passes run side
        by side, and on a CUDA card one for each GiB that it has, up to 64.
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
        model offers: its own predicted scale, the members of an ensemble, the symmetries. Errors
        are not normally distributed: its attributes ``half_width_of_68_percent_interval`` and
        ``half_width_of_95_percent_interval`` say how many of it hold that share of the errors, as
        fitted to the model's validation chips, with `tta` as they are seen then; 0.81 and 2.12,
        those of a Laplace distribution, where the model was not calibrated. ``half_widths_from``
        says which: nothing was fitted to an ensemble, which has the mean of its members'. In
        ground unlike the validation region they hold less, or more.
    fill_voids
        Whether the model also predicts where the initial DSM is void but the images are there,
        from heights interpolated within each window. Filled pixels are marked.
    compile
        Whether the network goes through `torch.compile`: half a minute at first in each process.
    chunks
        The width of the result's square chunks; ``"auto"``: about 4096 pixels high and 2048 wide,
        a multiple of the chunks of the scene's DSM (if they are 256 to 4096 pixels wide) or of
        the step from window to window. A scene smaller than that is one task: it has all cores
        of its process, but a cluster wants smaller chunks. A chunk is read and computed from top
        to bottom: a higher one needs 25 bytes a pixel more, not all layers more.
        Windows that straddle two chunks are computed for both, with local centring no further
        than the network's reach: with windows of 256, 5 % more for a network of small reach and
        14 % for a ResNet-18 (11 % centred on chips); in square chunks of 2048 7, 19 and 15 %.

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
    specs = [ref.spec for ref in refs]
    windows = _windows(shape, specs, window, overlap, blend, whole=fill_voids)
    job = Job(
        windows=windows,
        layers=spec.layers,
        mask="valid" if "valid" in ds and "valid" not in spec.layers else None,
        batch_size=_batch_size(batch_size),
        fill_voids=fill_voids,
        uncertainty=uncertainty,
        rows_px=_rows_px(ds, spec.layers),
    )
    cut = chunks_of(shape, _chunk_px(chunks, ds, windows.grid.y.stride_px))
    arrays = [dask_layer(ds, name) for name in (*job.layers, *([job.mask] if job.mask else []))]
    how = _how(specs, device, precision, tta=tta, compiled=compile)
    both = map_regions(
        _refine_chunk, arrays, chunks=cut, region=windows.needs, dtype=np.float32, name="refined",
        # A network is a hundred times dearer than reading its layers.
        direct=True, sliced=True, reread=True,
        common={"models": refs, "job": job, "how": how},
    )  # fmt: skip
    data, stamps = unzipped(both, planes=len(job.planes), dtypes=(np.float32, np.uint64))
    # A callable has no name that another process would know it by, but its weights.
    name = blend if isinstance(blend, str) else f"custom-{tokenize(windows.weights)}"
    attrs = _provenance(ds, specs, how, windows)
    attrs |= {"deepdem_weights": [ref.hash for ref in refs], "deepdem_blend": name}
    return _result(ds, data, job, attrs, (_hashes(arrays, cut), stamps), specs)


def _windows(
    shape: tuple[int, int],
    specs: Sequence[Any],
    window: int | None,
    overlap: float | str,
    blend: str | Blend,
    *,
    whole: bool,
) -> Windows:
    """Return the windows that are meant, or what suits the networks.

    `whole`: none is computed in part. A void is filled from all that a window sees.
    """
    spec = specs[0]
    step = min(one.window_step for one in specs)
    width = _window_px(spec, window, step)
    if isinstance(overlap, str):
        if overlap != "auto":
            raise ValueError(f"overlap={overlap!r}: pass 'auto', a fraction or pixels")
        overlap = _auto_overlap(specs, width)
    stride = width - overlap_px(overlap, width)
    if step:
        # Windows stand where the networks' own grid of pooling does: an overlap is never less
        # than what was asked for, unless nothing would be left of the step.
        stride = max(stride // step, 1) * step
    line = tuple(map(float, blend_weights(blend, width)))
    return Windows(
        window_grid(shape, width, stride, step),
        line,
        max(one.reach_px for one in specs) if step and not whole else math.inf,
        spec.chip_size if spec.centering == "local" else None,
    )


def _window_px(spec: Any, window: int | None, step: int) -> int:
    chip: int = spec.chip_size
    if window is None:
        if not step:
            return chip
        # A network that feels further than its chips has learned what their edges look like. Two
        # steps at least: windows of one could not overlap.
        least = _WINDOW_PX // step * step if spec.reach_px <= chip else 2 * step
        return max(chip, least)
    if not step and window != chip:
        why = (
            f"the model is centred on chips of {chip} px"
            if spec.centering == "chip"
            else f"the network, trained on chips of {chip} px, pools over all of a window"
        )
        raise ValueError(
            f"window={window}: {why}, so its windows must be that wide; leave window= out, or "
            f"train with chip_size={window}"
            + (" or centering='local'" * (spec.centering == "chip"))
        )
    if window < chip or (step and window % step):
        raise ValueError(
            f"window={window}: pass a multiple of {step} px, {chip} or more (the width of the "
            "chips that the model was trained on)"
        )
    return window


def _auto_overlap(specs: Sequence[Any], width: int) -> float:
    return width // 8 if all(spec.is_local for spec in specs) else width // 4


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
    for name in ("layers", "chip_size", "centering", "target"):
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


def _chunk_px(chunks: int | str, ds: xr.Dataset, stride: int) -> tuple[int, int]:
    if chunks == "auto":
        own = ds["dsm"].chunks or ((), ())
        sizes = (along[0] if len(along) > 1 else 0 for along in own)
        # Of a multiple of the step, where the scene's chunks are so small that reading does not
        # care, or so large.
        steps = [size if _SMALLEST_PX <= size <= _CHUNK_PX[0] else stride for size in sizes]
        height, width = (
            max(round(most / step), 1) * step for most, step in zip(_CHUNK_PX, steps, strict=True)
        )
        return height, width
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: pass 'auto' or a width in pixels")
    return chunks, chunks


def _rows_px(ds: xr.Dataset, names: Sequence[str]) -> int:
    """Return how many rows are best read at once: some, of whole blocks of what is stored."""
    blocks = {1}
    for name in names:
        encoding, own = ds[name].encoding, ds[name].chunks
        stored = encoding.get("chunks") or encoding.get("chunksizes") or own or (1, 1)
        height = stored[-2]
        blocks.add(height if isinstance(height, int) else height[0])
    block = math.lcm(*blocks)
    # Blocks of many heights, or of the whole scene: what is read is all that a chunk needs.
    return -(-_ROWS_PX // block) * block


def _batch_size(wanted: int | str) -> int | None:
    if wanted == "auto":
        return None
    if not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"batch_size={wanted!r}: pass 'auto' or a positive number")
    return wanted


def _how(specs: Sequence[Any], device: str, precision: str, *, tta: bool, compiled: bool) -> Any:
    """Return how batches are predicted; which precision ``"auto"`` is, is decided here for all."""
    from deepdem.predict import Prediction, bf16_is_fast, swapped_layers

    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision={precision!r}: pass 'auto', 'float32' or 'bf16'")
    bf16 = precision == "bf16"
    if precision == "auto" and bf16_is_fast(device):
        known = [spec.training.get("bf16_rms_m", np.inf) for spec in specs]
        bf16 = max(known) <= 0.02
    return Prediction(device, bf16, tta, swapped_layers(specs), compiled)


def _hashes(arrays: Sequence[da.Array], cut: Chunks) -> da.Array:
    """Return a lazy array with the hash of each output chunk's own inputs, for `deepdem.write`."""
    edges = [np.cumsum((0, *sizes)).tolist() for sizes in cut]

    def own(out: Box) -> Box:
        return Box(edges[0][out.y0], edges[0][out.y1], edges[1][out.x0], edges[1][out.x1])

    return map_regions(
        _input_hash, arrays, chunks=chunks_of((len(cut[0]), len(cut[1])), 1), region=own,
        dtype=np.uint64, name="input-hash", direct=True,
    )  # fmt: skip


def _provenance(ds: xr.Dataset, specs: Sequence[Any], how: Any, windows: Windows) -> dict[str, Any]:
    from deepdem import __version__

    vertical = ds["dsm"].attrs.get("vertical_reference")
    return {
        "deepdem_version": __version__,
        "deepdem_target": specs[0].target,
        "deepdem_centering": specs[0].centering,
        "deepdem_window_px": windows.width,
        "deepdem_overlap_px": windows.width - windows.grid.y.stride_px,
        "deepdem_precision": "bf16" if how.bf16 else "float32",
        "deepdem_tta": how.tta,
        **({"vertical_reference": vertical} if vertical else {}),
    }


def _half_widths(specs: Sequence[Any], *, tta: bool) -> tuple[dict[str, float], str]:
    """Return how many standard deviations hold 68 % and 95 % of the errors, and says who."""
    said = [spec.tta_intervals if tta and spec.tta_intervals else spec.intervals for spec in specs]
    halves = {n: sum(one[n] for one in said) / len(said) for n in ("68", "95")}
    if not all("calibration" in spec.training for spec in specs):
        return halves, "a Laplace distribution, not fitted"
    if len(specs) > 1:
        return halves, "the mean of the members', not fitted to the ensemble"
    if tta and not specs[0].tta_intervals:
        return halves, "validation chips without tta"
    return halves, "validation chips"


def _result(
    ds: xr.Dataset, data: da.Array, job: Job, attrs: dict[str, Any],
    hashes: tuple[da.Array, da.Array], specs: Sequence[Any],
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    halves, fitted = _half_widths(specs, tta=attrs["deepdem_tta"])
    coords = {n: ds.coords[n] for n in ("y", "x", "spatial_ref") if n in ds.coords}
    target = describe(attrs["deepdem_target"]).long_name
    words: dict[str, dict[str, Any]] = {
        "refined": {"long_name": f"refined surface ({target} estimated)", "units": "m"},
        "refined_std": {
            "long_name": "standard deviation of the refined surface",
            "units": "m",
            **{f"half_width_of_{k}_percent_interval": round(v, 4) for k, v in halves.items()},
            "half_widths_from": fitted,
        },
        "filled": {"long_name": "void of the initial DSM, filled", "units": "1"},
    }
    planes = {}
    for n, name in enumerate(job.planes):
        plane = data[n] if name != "filled" else data[n].astype(bool)
        array = xr.DataArray(plane, coords=coords, dims=("y", "x"), name=name)
        array.attrs = {**words[name], **attrs}
        array.encoding = {"grid_mapping": "spatial_ref"}
        planes[name] = array
    # Not written anywhere: what `deepdem.write` needs to know whether inputs have changed, without
    # inference, and with it at no cost.
    planes["refined"].encoding |= {"deepdem_inputs": hashes[0], "deepdem_stamps": hashes[1]}
    return planes["refined"] if len(planes) == 1 else xr.Dataset(planes)

"""Co-registration: the stereo side of a scene moved onto a reference surface.

The shift is estimated by xdem on a sample of the scene that is read once; it is applied lazily, to
all layers of the stereo side alike.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import dask.array as da
import numpy as np
import rasterio.crs
import xarray as xr
from affine import Affine
from dask.base import compute
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from deepdem.blocks import Box, map_regions
from deepdem.derive import ndvi
from deepdem.grid import ground_steps, regrid
from deepdem.layers import describe
from deepdem.scene import check_scene, dask_layer
from deepdem.terrain import slope_kernel

__all__ = ["METHODS", "StableGround", "coregister"]

Array = NDArray[Any]

#: What `method` may be made of.
METHODS = ("nuth_kaab", "vertical_shift", "deramp")
# A scene of at most so many pixels is its own sample. Larger ones are sampled by tiles of the width
# that Zarr reads at once; so many are kept at most, each with so much stable ground at least.
_WHOLE_PX, _TILE_PX, _TILES, _SHARE = 2048**2, 256, 64, 0.05
# Read in one go. A constant: what is in the sample must not depend on who computes it.
_BATCH = 8
_LEAST_PX = 1000
# Differences beyond so many NMAD of the median are blunders, and say nothing of a shift.
_BLUNDER_NMAD = 5.0
# A move after which the surfaces differ by so much more (and a centimetre) has found nothing.
_WORSE = 1.05
# Of Nuth and Kääb; xdem's ten do not suffice for ten pixels on gentle ground.
_ITERATIONS = 40
# The sample's grid counts pixels, in any projected CRS. It does not begin at the origin: GDAL takes
# a transform of ones and zeros for none.
_PIXELS, _ANY_CRS = Affine(1, 0, 1000, 0, -1, 0), "EPSG:32631"


@dataclass(frozen=True)
class StableGround:
    """Where the two surfaces may be compared.

    Attributes
    ----------
    max_slope
        Degrees, of the reference: walls and cliffs are out.
    max_ndvi
        Vegetation is out, where the scene has ``ndvi``, or ``red`` and ``nir``; so is a pixel
        whose index is not known. None: the index is not asked.
    mask
        A bool layer of the scene that is True on stable ground (off a glacier, say).
    """

    max_slope: float = 45.0
    max_ndvi: float | None = 0.4
    mask: str | None = None


@dataclass(frozen=True)
class _Move:
    """By how much a surface is moved: in pixels along the axes, and upwards in metres.

    `ramp` holds the coefficients of u**i v**j, where u (columns) and v (rows) go from -1 to 1 over
    the scene.
    """

    columns: float = 0.0
    rows: float = 0.0
    up: float = 0.0
    ramp: Array = field(default_factory=lambda: np.zeros((1, 1)))

    @property
    def flat(self) -> bool:
        return not self.ramp.any()


@dataclass(frozen=True)
class _Sample:
    """Tiles of both surfaces side by side, NaN between them, and where each pixel is from."""

    reference: Array
    surface: Array
    stable: NDArray[np.bool_]
    u: Array
    v: Array
    step: tuple[float, float]
    tiles: int
    words: str


# --- kernels: NumPy only -------------------------------------------------------------------------


def _stable(
    reference: Array, surface: Array, index: Array | None, mask: Array | None, *,
    ground: StableGround, step: tuple[float, float],
) -> NDArray[np.bool_]:  # fmt: skip
    steepness = slope_kernel(reference, step_y=step[0], step_x=step[1])
    stable: NDArray[np.bool_] = np.isfinite(surface) & (steepness <= ground.max_slope)
    if index is not None:
        stable &= index <= ground.max_ndvi
    if mask is not None:
        stable &= mask == 1
    return stable


def _statistics(difference: Array) -> dict[str, float]:
    """Return median, NMAD and count of what is finite."""
    e = difference[np.isfinite(difference)].astype(np.float64)
    if not e.size:
        return {"median": math.nan, "nmad": math.nan, "count": 0}
    median = float(np.median(e))
    nmad = 1.4826 * float(np.median(np.abs(e - median)))
    return {"median": median, "nmad": nmad, "count": int(e.size)}


def _lift(arrays: list[Array], *, out: Box, region: Box, shape: tuple[int, int], up: float,
          ramp: Array) -> NDArray[np.float32]:  # fmt: skip
    u, v = _unit(out.x0, out.x1, shape[1]), _unit(out.y0, out.y1, shape[0])
    added = up + np.polynomial.polynomial.polygrid2d(u, v, ramp).T
    lifted: NDArray[np.float32] = (arrays[0] + added).astype(np.float32)
    return lifted


def _unit(start: int, stop: int, length: int) -> Array:
    """Return the pixels' places, from -1 to 1 over the scene."""
    return (2 * np.arange(start, stop) + 1) / length - 1


def _spread_out(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Give every tile once; any beginning of the sequence is spread evenly over the scene.

    The R2 sequence (Roberts 2018): multiples of the powers of the plastic number, modulo one.
    """
    plastic = 1.32471795724474602596
    seen = set()
    for n in range(4 * rows * columns):
        tile = (
            int((0.5 + n / plastic) % 1 * rows),
            int((0.5 + n / plastic**2) % 1 * columns),
        )
        if tile not in seen:
            seen.add(tile)
            yield tile
    rest = ((i, j) for i in range(rows) for j in range(columns))
    yield from (tile for tile in rest if tile not in seen)


# --- the sample ----------------------------------------------------------------------------------


def _boxes(shape: tuple[int, int]) -> Iterator[Box]:
    if shape[0] * shape[1] <= _WHOLE_PX:
        yield Box(0, shape[0], 0, shape[1])
        return
    for i, j in _spread_out(*(-(-n // _TILE_PX) for n in shape)):
        y, x = i * _TILE_PX, j * _TILE_PX
        yield Box(y, min(y + _TILE_PX, shape[0]), x, min(x + _TILE_PX, shape[1]))


def _collect(
    layers: Mapping[str, da.Array], ground: StableGround, *, sample_px: int, gap_px: int,
    step: tuple[float, float],
) -> _Sample:  # fmt: skip
    """Return the sample; reads the layers' pixels, batch by batch until there are enough."""
    shape: tuple[int, int] = layers["surface"].shape
    boxes = list(_boxes(shape))
    kept: list[tuple[Box, dict[str, Array]]] = []
    found = looked = overlap = 0
    for first in range(0, len(boxes), _BATCH):
        batch = boxes[first : first + _BATCH]
        tiles = compute(*(
            {name: layer[box.y0 : box.y1, box.x0 : box.x1] for name, layer in layers.items()}
            for box in batch
        ))  # fmt: skip
        for box, tile in zip(batch, tiles, strict=True):
            looked += 1
            reference, surface = tile["reference"], tile["surface"]
            overlap += int((np.isfinite(reference) & np.isfinite(surface)).sum())
            tile["stable"] = _stable(
                reference, surface, tile.get("ndvi"), tile.get("mask"), ground=ground, step=step
            )
            count = int(tile["stable"].sum())
            if len(kept) < _TILES and (len(boxes) == 1 or count >= _SHARE * tile["stable"].size):
                kept.append((box, tile))
                found += count
        if found >= sample_px or len(kept) >= _TILES:
            break
    if found < _LEAST_PX:
        raise ValueError(
            f"only {found} pixels of stable ground, wanted {_LEAST_PX} or more: {overlap} pixels "
            f"have both surfaces (in {looked} of {len(boxes)} tiles), the rest of them is steeper "
            f"than max_slope={ground.max_slope:g} degrees, greener than max_ndvi={ground.max_ndvi} "
            f"or outside the mask {ground.mask!r}: pass others, or a reference that covers more"
        )
    return _side_by_side(kept, shape, gap_px, step, looked, len(boxes))


def _side_by_side(
    kept: list[tuple[Box, dict[str, Array]]], shape: tuple[int, int], gap_px: int,
    step: tuple[float, float], looked: int, of: int,
) -> _Sample:  # fmt: skip
    height, width = (max(box.shape[n] for box, _ in kept) for n in (0, 1))
    across = math.ceil(math.sqrt(len(kept)))
    down = -(-len(kept) // across)
    size = down * (height + gap_px) - gap_px, across * (width + gap_px) - gap_px
    planes = {name: np.full(size, np.nan, np.float32) for name in ("reference", "surface")}
    u, v, stable = np.zeros(size), np.zeros(size), np.zeros(size, dtype=bool)
    for n, (box, tile) in enumerate(kept):
        y, x = n // across * (height + gap_px), n % across * (width + gap_px)
        place = slice(y, y + box.shape[0]), slice(x, x + box.shape[1])
        for name, plane in planes.items():
            plane[place] = tile[name]
        stable[place] = tile["stable"]
        u[place] = _unit(box.x0, box.x1, shape[1])
        v[place] = _unit(box.y0, box.y1, shape[0])[:, None]
    words = (
        "all pixels" if of == 1
        else f"{len(kept)} tiles of {_TILE_PX} px, spread evenly ({looked} of {of} read)"
    )  # fmt: skip
    return _Sample(**planes, stable=stable, u=u, v=v, step=step, tiles=len(kept), words=words)


def _moved(sample: _Sample, move: _Move, resampling: str) -> Array:
    """Return the sample's surface after the move, as the scene's own layer will be moved."""
    grid = GeoBox(sample.surface.shape, _PIXELS, _ANY_CRS)
    flat = _translated(da.from_array(sample.surface, chunks=-1), "dsm", grid, move)
    shifted = regrid(flat, grid, resampling=resampling, chunks=max(grid.shape))
    surface: Array = shifted.data.compute(scheduler="synchronous")
    ramp = np.polynomial.polynomial.polyval2d(sample.u, sample.v, move.ramp)
    return (surface + move.up + ramp).astype(np.float32)


def _translated(data: da.Array, name: str, grid: GeoBox, move: _Move) -> xr.DataArray:
    transform = grid.transform * Affine.translation(move.columns, move.rows)
    coords = xr_coords(GeoBox(grid.shape, transform, grid.crs), always_yx=True)
    return xr.DataArray(data, coords=coords, dims=("y", "x"), name=name)


# --- the estimate --------------------------------------------------------------------------------


def _steps_of(method: str | Iterable[str]) -> tuple[str, ...]:
    names = method.split("+") if isinstance(method, str) else list(method)
    steps = tuple(str(name).strip() for name in names)
    if unknown := [name for name in steps if name not in METHODS]:
        raise ValueError(
            f"method={method!r}: {unknown} not known; pass one of {', '.join(METHODS)}, or several "
            "in their order, as a list or joined by '+'. Methods that rotate are not offered: the "
            "orthoimages could not follow"
        )
    if not steps:
        raise ValueError(f"method={method!r} names nothing to do: pass one of {', '.join(METHODS)}")
    return steps


def _xdem() -> Any:
    try:
        return importlib.import_module("xdem")
    except ImportError as error:
        raise ImportError(
            "co-registration needs xdem: pip install 'deepdem[coregister]'"
        ) from error


def _estimate(
    sample: _Sample, steps: tuple[str, ...], *, ramp_order: int, resampling: str, names: str
) -> _Move:
    """Return the move that takes the sample's surface onto its reference, by xdem."""
    xdem = _xdem()
    crs = rasterio.crs.CRS.from_string(_ANY_CRS)
    move = _Move()
    for step in steps:
        surface = _moved(sample, move, resampling)
        e = np.where(sample.stable, surface - sample.reference, np.nan)
        known = _statistics(e)
        with np.errstate(invalid="ignore"):
            inliers = np.abs(e - known["median"]) <= _BLUNDER_NMAD * max(known["nmad"], 1e-6)
        method = {
            "nuth_kaab": lambda: xdem.coreg.NuthKaab(max_iterations=_ITERATIONS),
            "vertical_shift": xdem.coreg.VerticalShift,
            # xdem.coreg.Deramp counts pixels of the array it is given, here of tiles side by side.
            "deramp": lambda: xdem.coreg.BiasCorr(
                "fit", xdem.fit.polynomial_2d, bias_var_names=["u", "v"]
            ),
        }[step]()
        more = {} if step != "deramp" else {
            "bias_vars": {"u": sample.u, "v": sample.v}, "p0": np.zeros((ramp_order + 1) ** 2)
        }  # fmt: skip
        try:
            # Pixels, not metres: right on grids of degrees and feet too.
            method.fit(
                sample.reference, surface, inlier_mask=inliers, subsample=1, crs=crs,
                transform=_PIXELS, area_or_point="Area", **more,
            )  # fmt: skip
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{step} found no shift between {names} on {int(inliers.sum())} pixels of stable "
                f"ground ({error}): flat ground says nothing of a horizontal shift (then pass "
                "method='vertical_shift'); otherwise check that both show the same place"
            ) from error
        used = int(method.meta["outputs"]["random"]["subsample_final"])
        if used < _LEAST_PX:
            raise ValueError(
                f"{step} could use {used} pixels only, wanted {_LEAST_PX} or more, since a pixel "
                f"needs all its neighbours: {names} have too many holes in common; fill those of "
                "the reference (grid it coarser, or interpolate), or pass method='vertical_shift'"
            )
        move = _after(move, method.meta["outputs"], step, ramp_order)
    return move


def _after(move: _Move, outputs: Mapping[str, Any], step: str, ramp_order: int) -> _Move:
    if step == "deramp":
        ramp = np.zeros((ramp_order + 1, ramp_order + 1))
        ramp += np.reshape(outputs["fitorbin"]["fit_params"], ramp.shape)
        ramp[: move.ramp.shape[0], : move.ramp.shape[1]] += move.ramp
        return replace(move, ramp=ramp)
    found = outputs["affine"]
    # xdem's y points north, rows run south.
    return replace(
        move,
        columns=move.columns + float(found.get("shift_x", 0.0)),
        rows=move.rows - float(found.get("shift_y", 0.0)),
        up=move.up + float(found["shift_z"]),
    )


def _rise(move: _Move) -> tuple[float, float]:
    """Return the vertical shift in the scene's middle, and the largest there and at corners."""
    ends = np.array([-1.0, 0.0, 1.0])
    rise = move.up + np.polynomial.polynomial.polygrid2d(ends, ends, move.ramp)
    return float(rise[1, 1]), float(np.abs(rise).max())


# --- public --------------------------------------------------------------------------------------


def coregister(
    ds: xr.Dataset,
    *,
    reference: str = "lidar_dsm",
    method: str | Iterable[str] = "nuth_kaab",
    layers: Iterable[str] | None = None,
    max_slope: float = 45.0,
    max_ndvi: float | None = 0.4,
    stable: str | None = None,
    max_shift_m: float | None = 20.0,
    ramp_order: int = 1,
    sample_px: int = 1_000_000,
    resampling: Mapping[str, str] | str | None = None,
) -> xr.Dataset:
    """Return the scene with its stereo side moved onto a reference; reads a sample at once.

    The shift is estimated at once, by xdem, from `reference` and ``dsm``; the layers are moved
    lazily. ``dsm``, the orthoimages, the triangulation error and ``valid`` move together; truths,
    bands and ``ndvi`` stay where they are. Co-register before `prepare` where you can: equalised
    orthoimages and ``valid`` are then made of the moved layers.

    Parameters
    ----------
    ds
        A scene with ``dsm`` and the reference. It is not changed.
    reference
        The layer that is right.
    method
        ``"nuth_kaab"`` (x, y and z), ``"vertical_shift"`` (the median), ``"deramp"`` (a polynomial
        in x and y that is added to ``dsm``), or several in their order: a list, or joined by
        ``"+"``. A strong tilt hides a part of the shift: name ``"nuth_kaab+deramp"`` twice over.
    layers
        What moves with ``dsm``. Default: the orthoimages, the triangulation error and ``valid``.
        Name other layers of the stereo run (a confidence, a mask) too, beside these.
    max_slope, max_ndvi, stable
        Stable ground, see `StableGround`; `stable` names its mask layer.
    max_shift_m
        The farthest that is believed, on the ground and in height, metres. None: any.
    ramp_order
        Of the polynomial of ``"deramp"``: 1 is a tilt (and a twist), 2 a dome.
    sample_px
        Pixels of stable ground that are enough.
    resampling
        As in `deepdem.stack`; default bilinear, masks nearest.

    Returns
    -------
    Dataset
        The layers on the same grid, float32, NaN where a moved layer has no data (along the edge
        it came from too). ``attrs["coregistration"]`` of the scene and of each moved layer says
        what was done: ``shift_x_m`` east, ``shift_y_m`` north, ``shift_z_m`` up (in the middle of
        the scene): **what was added to the place and the height of the stereo layers**, metres on
        the ground; the same in pixels; the ramp's coefficients; and median, NMAD (metres) and
        count of ``dsm - reference`` on stable ground before and after.

    Raises
    ------
    ValueError
        A layer is missing, there is too little stable ground, the shift exceeds `max_shift_m`, or
        NMAD is larger after it than before; the message has the cure.
    ImportError
        xdem is missing: ``pip install 'deepdem[coregister]'``.

    Notes
    -----
    The sample: a scene of up to 2048 by 2048 pixels whole. Of a larger one, tiles of 256 pixels
    on a grid anchored at its origin, at full resolution, are read in an order that is spread evenly
    over the scene (the R2 sequence) until those with stable ground (5 % of a tile at least) hold
    `sample_px` of it, or are 64. So the estimate does not depend on the chunks, and memory not on
    the scene. Differences beyond 5 NMAD of the median are left out of it.

    A horizontal shift is estimated in pixels: any CRS will do. What the methods of a list found is
    added up, and the layers are resampled once.

    References
    ----------
    Nuth and Kääb (2011), Co-registration and bias corrections of satellite elevation data sets for
    quantifying glacier thickness change, The Cryosphere 5, 271-290.

    Examples
    --------
    >>> scene = deepdem.synthetic_scene((128, 128)).compute()
    >>> off = scene.assign(dsm=scene["lidar_dsm"] + 2.5)
    >>> moved = coregister(off, method="vertical_shift", max_ndvi=None)
    >>> round(moved.attrs["coregistration"]["shift_z_m"], 3)
    -2.5
    """
    steps = _steps_of(method)
    grid = check_scene(ds, ["dsm", reference, *([stable] if stable else [])])
    if describe(reference).role not in ("truth", "height", "other") or reference == "dsm":
        raise ValueError(f"reference={reference!r} is no other surface than the dsm: pass a truth")
    names, methods = _movers(ds, layers, reference), _methods(resampling)
    ground = StableGround(max_slope=max_slope, max_ndvi=max_ndvi, mask=stable)
    step = _ground_step(grid)
    bound_px = 0.0 if max_shift_m is None else max_shift_m / min(map(abs, step))
    sample = _collect(
        _sampled(ds, reference, ground), ground, sample_px=sample_px, step=step,
        gap_px=min(max(32, math.ceil(bound_px) + 8), _TILE_PX),
    )  # fmt: skip
    how = methods("dsm")
    move = _estimate(
        sample, steps, ramp_order=ramp_order, resampling=how, names=f"'dsm' and {reference!r}"
    )
    record = _record(sample, move, steps, reference, ground, how)
    _check_bound(record, _rise(move)[1], max_shift_m)
    _check_gain(record)
    if "coregistration" in ds.attrs:
        record["previous"] = ds.attrs["coregistration"]
    moved = {name: _apply(ds, name, grid, move, methods(name), record) for name in names}
    return ds.assign(moved).assign_attrs(coregistration=record)


def _movers(ds: xr.Dataset, layers: Iterable[str] | None, reference: str) -> list[str]:
    if layers is None:
        roles = ("height", "image", "error")
        chosen = [str(n) for n in ds.data_vars if describe(str(n)).role in roles or n == "valid"]
        return [n for n in chosen if n != reference]
    named = [layers] if isinstance(layers, str) else [str(name) for name in layers]
    check_scene(ds, named)
    if reference in named:
        raise ValueError(f"layers= names the reference {reference!r}, which stays: leave it out")
    return list(dict.fromkeys(["dsm", *named]))


def _methods(resampling: Mapping[str, str] | str | None) -> Any:
    def method(name: str) -> str:
        if isinstance(resampling, str) and describe(name).role != "mask":
            return resampling
        chosen = resampling if isinstance(resampling, Mapping) else {}
        return chosen.get(name, describe(name).resampling)

    return method


def _ground_step(grid: GeoBox) -> tuple[float, float]:
    """Return the steps along rows and columns in metres, in the middle of the grid."""
    assert grid.crs is not None  # check_scene has seen to it
    x, y = grid.transform * (grid.shape.x / 2, grid.shape.y / 2)
    return ground_steps(grid.crs.proj, at=(y, x), step=(grid.transform.e, grid.transform.a))


def _sampled(ds: xr.Dataset, reference: str, ground: StableGround) -> dict[str, da.Array]:
    layers = {"surface": dask_layer(ds, "dsm"), "reference": dask_layer(ds, reference)}
    if ground.mask is not None:
        layers["mask"] = dask_layer(ds, ground.mask)
    if ground.max_ndvi is not None:
        if "ndvi" in ds:
            layers["ndvi"] = dask_layer(ds, "ndvi")
        elif {"red", "nir"} <= set(ds):
            layers["ndvi"] = dask_layer(ndvi(ds["red"], ds["nir"]).to_dataset(), "ndvi")
    return layers


def _record(
    sample: _Sample, move: _Move, steps: tuple[str, ...], reference: str, ground: StableGround,
    resampling: str,
) -> dict[str, Any]:  # fmt: skip
    """Return what was done, of JSON's types."""
    step_y, step_x = sample.step
    after = _moved(sample, move, resampling)
    on_stable = {
        key: _statistics(np.where(sample.stable, surface - sample.reference, np.nan))
        for key, surface in (("before", sample.surface), ("after", after))
    }
    return {
        "reference": reference,
        "method": "+".join(steps),
        "shift_x_m": move.columns * step_x,
        "shift_y_m": move.rows * step_y,
        "shift_z_m": _rise(move)[0],
        "shift_columns_px": move.columns,
        "shift_rows_px": move.rows,
        "ramp": move.ramp.tolist(),
        "sample": sample.words,
        "stable_ground": f"slope <= {ground.max_slope:g} degrees, ndvi <= {ground.max_ndvi}, "
        f"mask {ground.mask}",
        **on_stable,
    }


def _check_bound(record: Mapping[str, Any], rise: float, bound: float | None) -> None:
    far = math.hypot(record["shift_x_m"], record["shift_y_m"])
    if bound is None or max(far, rise) <= bound:
        return
    words = ", ".join(f"{record[f'shift_{a}_m']:+.2f} m {d}" for a, d in
                      (("x", "east"), ("y", "north"), ("z", "up")))  # fmt: skip
    raise ValueError(
        f"the shift onto {record['reference']!r} is {words}, more than max_shift_m={bound:g}: "
        + ("heights above the ellipsoid and above a geoid differ by tens of metres, so bring both "
           "to one vertical datum; " if rise > bound else "check the CRS of both; ")
        + "if the shift is right, pass a larger max_shift_m, or None"
    )  # fmt: skip


def _check_gain(record: Mapping[str, Any]) -> None:
    before, after = record["before"]["nmad"], record["after"]["nmad"]
    if not after <= _WORSE * before + 0.01:
        raise ValueError(
            f"{record['method']} made it worse: NMAD against {record['reference']!r} on stable "
            f"ground {before:.3f} m before, {after:.3f} m after. Pass other stable ground "
            "(max_slope=, max_ndvi=, stable=), or method='vertical_shift'"
        )


def _apply(
    ds: xr.Dataset, name: str, grid: GeoBox, move: _Move, resampling: str, record: dict[str, Any]
) -> xr.DataArray:
    data = dask_layer(ds, name)
    shifted = regrid(
        _translated(data.astype(np.float32), name, grid, move), grid, resampling=resampling,
        chunks=int(data.chunksize[0]),
    )  # fmt: skip
    if name == "dsm":
        shifted = shifted.copy(data=map_regions(
            _lift, [shifted.data], chunks=shifted.data.chunks, region=lambda out: out,
            dtype=np.float32, name="lift",
            common={"shape": shifted.shape, "up": move.up, "ramp": move.ramp},
        ))  # fmt: skip
    if ds[name].dtype == np.bool_:
        shifted = shifted == 1  # NaN, from beyond the edge, is not usable
    shifted.attrs = {**ds[name].attrs, "coregistration": record}
    return shifted.assign_coords(ds.coords).rename(name)

"""A stereo scene made from a real surface: what a satellite pair would have made of it.

The light, the views and the errors are those of the synthetic scene (`deepdem.sources._stereo`);
the surface is the lidar's.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage

from deepdem.blocks import Box, map_regions
from deepdem.layers import describe
from deepdem.scene import check_scene, dask_layer, pixel_size
from deepdem.sources._landscape import Surface
from deepdem.sources._lattice import Floats, Frame, World, smooth_noise
from deepdem.sources._stereo import observe, surroundings

__all__ = ["simulate_stereo"]

_MADE = ("dsm", "ortho_left", "ortho_right", "triangulation_error", "red", "nir")
# Voids of the lidar are filled from this far, in metres: finer detail from nearer.
_FILL_M = (1.5, 6.0, 20.0)
_OBJECT_M = 2.0  # what stands higher above the ground is a tree or a house


# --- kernels: NumPy and SciPy only ---------------------------------------------------------------


def _gauss(a: Floats, sigma_px: float) -> Floats:
    out: Floats = ndimage.gaussian_filter(a, sigma_px, mode="nearest", truncate=2.5)
    return out


def filled(heights: Floats, pixel_m: float) -> Floats:
    """Return the heights with their voids filled from what is near; NaN further in.

    Normalised convolution (Knutsson and Westin, 1993) with wider and wider Gaussians. Its reach is
    bounded, so that a raster may be filled in parts.
    """
    out = heights.copy()
    for sigma in _FILL_M:
        known = np.isfinite(heights)
        if known.all():
            break
        weight = _gauss(known.astype(np.float32), sigma / pixel_m)
        # From a level near the heights: a float32 of 2000 m has steps of a tenth of a millimetre.
        level = np.float32(np.floor(np.nanmin(heights)) if known.any() else 0)
        total = _gauss(np.where(known, heights - level, 0), sigma / pixel_m)
        near = ~np.isfinite(out) & (weight > 1e-3)
        out[near] = level + total[near] / weight[near]
    return out


def surface_of(
    world: World, frame: Frame, top: Floats, ground: Floats, albedo: Floats | None
) -> Surface:
    """Return what the stereo model must know of a surface without voids, on a frame.

    Objects higher than 2 m are trees where they are rough and houses where they are not; without
    an albedo each has one of its own, with a mottle.
    """
    px = frame.pixel_m
    above = np.maximum(top - ground, 0)
    bend = np.abs(top - _gauss(top - ground, 1.5 / px) - ground)
    rough = _gauss(bend, 2.0 / px) > 0.25
    tree = (above > _OBJECT_M) & rough
    house = (above > _OBJECT_M) & ~rough
    mottle = np.float32(0.035) * smooth_noise(world, "rough", 9.0, frame)
    mottle += np.float32(0.02) * smooth_noise(world, "grain", 1.1, frame)
    if albedo is None:
        bare = np.clip(smooth_noise(world, "bare", 60.0, frame), 0, 1)
        albedo = np.float32(0.26) + np.float32(0.12) * bare + (1 - np.float32(0.7) * bare) * mottle
        albedo = np.where(tree, np.float32(0.17) + np.float32(0.7) * mottle, albedo)
        albedo = np.where(house, np.float32(0.4) + np.float32(0.2) * mottle, albedo)
        plain = np.where(tree, 0, np.maximum(bare > 0.4, house)).astype(np.float32)
    else:
        albedo = np.where(np.isfinite(albedo), albedo, np.float32(0.26))
        mean = _gauss(albedo, 3.0 / px)
        contrast = np.sqrt(np.maximum(_gauss(albedo * albedo, 3.0 / px) - mean * mean, 0))
        plain = np.clip(2 - contrast / (np.float32(0.03) * mean), 0, 1).astype(np.float32)
    green = np.where(tree, np.float32(1.0), np.where(house, np.float32(0), np.float32(0.6)))
    level = np.float32(0.3)
    return Surface(
        ground=ground, top=np.maximum(top, ground), albedo=np.maximum(albedo, np.float32(0.03)),
        red=np.float32(0.22) - np.float32(0.18) * green + np.float32(0.1) * (albedo - level),
        nir=np.float32(0.20) + np.float32(0.25) * green + np.float32(0.3) * (albedo - level),
        plain=plain, canopy=np.where(tree, above, np.float32(0)),
    )  # fmt: skip


def _simulate(
    arrays: list[NDArray[Any]], *, out: Box, region: Box, world: World
) -> NDArray[np.float32]:
    """Return the made layers of one output box, NaN where there is no surface to make them of."""
    frame = Frame(out.y0, out.x0, *out.shape, world.pixel_m)
    wide = surroundings(frame)
    outer = wide.grow(_fill_margin_m())
    # Beyond the scene its edge goes on.
    before = region.y0 - outer.y0, region.x0 - outer.x0
    after = (outer.y0 + outer.height - region.y1, outer.x0 + outer.width - region.x1)
    pads = tuple(zip(before, after, strict=True))
    padded = [np.pad(a.astype(np.float32, copy=False), pads, mode="edge") for a in arrays]
    cut = wide.inside(outer)
    heights = [filled(a, world.pixel_m)[cut] for a in padded[:2]]
    unknown = ~np.isfinite(heights[0]) | ~np.isfinite(heights[1])
    top, ground = (np.where(unknown, np.float32(0), a) for a in heights)
    albedo = padded[2][cut] if len(padded) > 2 else None
    layers = observe(world, frame, surface_of(world, wide, top, ground, albedo))
    # A matching window that touches the unknown knows nothing either.
    reach = math.ceil(14.0 / world.pixel_m)
    blind = ndimage.maximum_filter(unknown, 2 * reach + 1)[frame.inside(wide)]
    return np.stack([np.where(blind, np.float32(np.nan), layers[name]) for name in _MADE])


def _fill_margin_m() -> float:
    return 2.5 * max(_FILL_M)


# --- Dask and xarray: no arithmetic on pixels ----------------------------------------------------


class _Reach:
    """The region that an output box needs: itself, its surroundings, what fills their voids."""

    def __init__(self, shape: tuple[int, int], pixel_m: float):
        self.shape, self.pixel_m = shape, pixel_m

    def __call__(self, out: Box) -> Box:
        frame = surroundings(Frame(out.y0, out.x0, *out.shape, self.pixel_m)).grow(_fill_margin_m())
        return Box(
            max(frame.y0, 0), min(frame.y0 + frame.height, self.shape[0]),
            max(frame.x0, 0), min(frame.x0 + frame.width, self.shape[1]),
        )  # fmt: skip


def simulate_stereo(ds: xr.Dataset, *, seed: int = 0, albedo: str | None = None) -> xr.Dataset:
    """Return a scene of lidar with the stereo layers that a satellite pair would give of it, lazy.

    Lidar without stereo becomes a scene to train on, or to test on: the truth is real, with
    real crowns, roofs and slopes, and the errors are those of `synthetic_scene` (see there what is
    modelled and what is not), laid over it.

    Parameters
    ----------
    ds
        A scene with ``lidar_dsm``, metres, at 0.5 to 2 m pixels, north up. ``lidar_dtm`` tells
        trees and houses from the ground; without it the ground is taken to be flat under them, 0
        m below, and nothing is a tree. Voids up to about 40 m wide are filled for what is seen
        past them; ``lidar_dsm`` itself stays as it is.
    seed
        Of noise, blunders and holes.
    albedo
        The name of a layer of `ds` with the panchromatic reflectance, 0 to 1, such as a scaled
        lidar intensity; None: it is made from the surface, and mottled.

    Returns
    -------
    xarray.Dataset
        `ds` with ``dsm``, ``triangulation_error`` (metres), ``ortho_left``, ``ortho_right`` (whole
        digital numbers, 1 to 2047) and, where it had none, ``red`` and ``nir`` (reflectance), all
        float32; NaN in the holes of the stereo, and where there is no lidar near. Chunks are those
        of ``lidar_dsm``; each is made with a margin of some 120 m.

    Raises
    ------
    ValueError
        `ds` lacks ``lidar_dsm`` or the layer `albedo`, or `seed` is not an integer.

    Examples
    --------
    >>> lidar = deepdem.stack({"lidar_dsm": "dsm.tif", "lidar_dtm": "dtm.tif"}, like="lidar_dsm")
    >>> scene = deepdem.simulate_stereo(lidar).deepdem.prepare()
    """
    names = ["lidar_dsm", "lidar_dtm" if "lidar_dtm" in ds else "lidar_dsm"]
    names += [] if albedo is None else [albedo]
    box = check_scene(ds, names)
    try:
        world = World(operator.index(seed), pixel_size(ds))
    except TypeError:
        raise ValueError(f"seed: got {seed!r}, wanted an integer: pass, for example, 0") from None
    arrays = [dask_layer(ds, name) for name in names]
    shape = (box.shape.y, box.shape.x)
    made: da.Array = map_regions(
        _simulate, arrays, chunks=arrays[0].chunks, region=_Reach(shape, world.pixel_m),
        dtype=np.float32, name="simulate-stereo", common={"world": world}, planes=len(_MADE),
    )  # fmt: skip
    wanted = [n for n in _MADE if n not in ("red", "nir") or not {"ndvi", n} & set(ds.data_vars)]
    layers = {}
    for name in wanted:
        layer = describe(name)
        attrs = {"long_name": layer.long_name, "units": layer.units}
        layers[name] = (("y", "x"), made[_MADE.index(name)], attrs)
    return ds.assign(layers).assign_attrs(
        title=f"{ds.attrs.get('title', 'Lidar')}, with simulated stereo", stereo_seed=world.seed
    )

"""The words: every standard layer's name, units, role and how it is resampled.

A newcomer adds an input layer here, in `LAYERS`, and, if it is derived from others, its kernel in
`deepdem.derive`. All the rest of the package asks this module what a layer is; nobody decides by
position or by parsing a name a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "height", "image", "error", "band", "index", "mask", "truth", "stratum", "other"
]  # fmt: skip

__all__ = ["LAYERS", "Layer", "Role", "describe", "truths"]


@dataclass(frozen=True)
class Layer:
    """What the package knows of a layer by its name.

    Attributes
    ----------
    name
        The variable's name in a scene.
    long_name, units
        Written to the variable's ``attrs``.
    role
        ``height`` and ``truth`` are heights in metres: the network sees heights minus the chip's
        mean, divided by the DSM scale. A ``truth`` is never an input of the network and never
        counts in ``valid``; nor is a ``stratum``, which is made of truths. ``image``, ``error``,
        ``band``, ``index`` and ``other`` are standardised by their own mean and standard
        deviation. A ``mask`` is 1.0 or 0.0.
    resampling
        What `deepdem.stack` uses unless it is told otherwise: a name known to rasterio.
    valid_range
        Values outside it are no data. ``None``: any finite value is valid.
    """

    name: str
    long_name: str
    units: str
    role: Role
    resampling: str = "bilinear"
    valid_range: tuple[float, float] | None = None

    @property
    def is_height(self) -> bool:
        """Whether the values are heights in metres (an input surface or a truth)."""
        return self.role in ("height", "truth")


_STANDARD = (
    Layer("dsm", "initial stereo digital surface model", "m", "height"),
    Layer("ortho_left", "left orthorectified panchromatic image", "1", "image"),
    Layer("ortho_right", "right orthorectified panchromatic image", "1", "image"),
    Layer("triangulation_error", "ray intersection error of the stereo solution", "m", "error",
          valid_range=(0.0, float("inf"))),
    Layer("red", "red reflectance", "1", "band"),
    Layer("nir", "near-infrared reflectance", "1", "band"),
    Layer("ndvi", "normalised difference vegetation index", "1", "index",
          valid_range=(-1.0, 1.0)),
    Layer("valid", "every layer the model needs is valid here", "1", "mask",
          resampling="nearest"),
    Layer("lidar_dsm", "lidar first-return surface", "m", "truth"),
    Layer("lidar_dtm", "lidar bare ground", "m", "truth"),
    Layer("intensity", "lidar return intensity", "1", "other"),
    Layer("density", "lidar points per area of ground", "m-2", "other"),
    Layer("slope", "slope of the initial surface", "degree", "other"),
    Layer("canopy_height", "height of trees and buildings above the lidar's bare ground", "m",
          "stratum"),
)  # fmt: skip

#: The standard layers by name. ``ortho_1`` … ``ortho_n`` are known to `describe` as well.
LAYERS: dict[str, Layer] = {layer.name: layer for layer in _STANDARD}

_NUMBERED_ORTHO = re.compile(r"ortho_([1-9][0-9]*)")


def describe(name: str) -> Layer:
    """Return what is known of the layer called `name`.

    Parameters
    ----------
    name
        A standard name, ``ortho_1`` … ``ortho_n``, or a name of the user's own, which gets the
        role ``other`` (or ``mask`` where it ends in ``_mask``).

    Examples
    --------
    >>> describe("ortho_3").role
    'image'
    >>> describe("my_coherence").role
    'other'
    """
    if name in LAYERS:
        return LAYERS[name]
    if match := _NUMBERED_ORTHO.fullmatch(name):
        return Layer(name, f"orthorectified panchromatic image of view {match[1]}", "1", "image")
    if name.endswith("_mask"):
        return Layer(name, name.replace("_", " "), "1", "mask", resampling="nearest")
    return Layer(name, name.replace("_", " "), "1", "other")


def truths(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are truths or made of them: no input, not in ``valid``."""
    return [name for name in names if describe(name).role in ("truth", "stratum")]

"""A folder of rasters as the layers of one scene: which file is which layer."""

from __future__ import annotations

import re
from pathlib import Path

from deepdem.layers import LAYERS

__all__ = ["find_layers"]

# What others call our layers. The first name that is there wins.
_ALIASES = {
    "dsm": ("dsm_initial", "initial_dsm", "stereo_dsm"),
    "triangulation_error": ("intersection_error", "ortho_mismatch_m"),
    "lidar_dsm": ("reference", "reference_dsm", "truth"),
    "lidar_dtm": ("reference_dtm", "dtm"),
}
_RASTER = (".tif", ".tiff", ".vrt")


def find_layers(folder: str | Path) -> dict[str, str]:
    """Return the layers that a folder holds: their names and their files.

    A raster whose stem is a standard layer's name (``dsm.tif``, ``ortho_left.tif``,
    ``ortho_1.tif``, …) is that layer; a few other programs' names are known too
    (``dsm_initial.tif``, ``reference.tif``). Other rasters are left out.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        There is no ``dsm`` in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    stems = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in _RASTER}
    found = {}
    for name in LAYERS:
        for stem in (name, *_ALIASES.get(name, ())):
            if stem in stems:
                found[name] = str(stems[stem])
                break
    found |= {s: str(f) for s, f in stems.items() if re.fullmatch(r"ortho_[1-9][0-9]*", s)}
    if "dsm" not in found:
        raise ValueError(f"{path} holds no initial DSM: name it dsm.tif (found: {sorted(stems)})")
    return found

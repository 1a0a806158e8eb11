"""A folder of rasters as the layers of one scene: which file is which layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import rasterio
from rasterio.errors import NotGeoreferencedWarning

from deepdem.layers import LAYERS

__all__ = ["find_asp", "find_deepdem", "find_layers"]

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


# --- Ames Stereo Pipeline ------------------------------------------------------------------------

# What ASP's mapproject writes into every image that it makes, whatever the file is called.
_MAPPROJECT_TAGS = {"INPUT_IMAGE_FILE", "CAMERA_FILE", "DEM_FILE"}
_MAPPROJECTED = re.compile(r"([._-]map|mapproj|[._-]ortho|[._-]proj)(?=[._-]|$)", re.IGNORECASE)
_SIDE = {
    "ortho_left": re.compile(r"(^|[._-])(left|l)(?=[._-]|$)", re.IGNORECASE),
    "ortho_right": re.compile(r"(^|[._-])(right|r)(?=[._-]|$)", re.IGNORECASE),
}


def find_asp(folder: str | Path, *, dem: str = "*-DEM.tif") -> dict[str, str]:
    """Return the layers that a run of the Ames Stereo Pipeline left: their names and their files.

    Parameters
    ----------
    folder
        Where ``point2dem`` wrote, or the folder above it.
    dem
        Which file is the DEM, where there are several.

    Returns
    -------
    dict
        ``dsm``; ``triangulation_error`` (``*-IntersectionErr.tif``, 1 or 3 bands); the
        orthoimages: what ``mapproject`` made, in `folder` or beside the DEM, as ``ortho_left`` and
        ``ortho_right`` if the names say so, as ``ortho_1`` … ``ortho_n`` (by name) if not;
        otherwise ``*-L.tif`` and ``*-R.tif`` if they are georeferenced, as they are where stereo
        was run on mapprojected images; otherwise ``*-DRG.tif`` as ``ortho_left``, from which
        point2dem makes it.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no DEM in it.
    ValueError
        Several files could be the DEM or the error.
    """
    top = Path(folder)
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is no folder")
    found = sorted(top.glob(dem)) or sorted(top.glob(f"*/{dem}"))
    if not found:
        raise FileNotFoundError(
            f"{top} holds no {dem}: run point2dem (--errorimage, --orthoimage), or name the file "
            "with dem='…'"
        )
    surface = _only(found, "DEM", "dem='…'")
    prefix = surface.name.split("-DEM")[0]
    layers = {"dsm": str(surface)}
    if errors := _made(surface.parent, prefix, "IntersectionErr"):
        layers["triangulation_error"] = str(
            _only(errors, "triangulation error", "layers={'triangulation_error': '…'}")
        )
    return layers | {name: str(path) for name, path in _orthos(top, surface, prefix).items()}


def _made(folder: Path, prefix: str, what: str) -> list[Path]:
    """Return the run's files of one kind: of the DEM's own prefix, or else of any."""
    for pattern in (f"{prefix}-{what}.tif", f"{prefix}-{what}*.tif", f"*-{what}.tif"):
        if paths := sorted(folder.glob(pattern)):
            return paths
    return []


def _only(paths: Sequence[Path], what: str, cure: str) -> Path:
    if len(paths) > 1:
        raise ValueError(
            f"{[path.name for path in paths]} may each be the {what}: say which with {cure}"
        )
    return paths[0]


def _orthos(top: Path, surface: Path, prefix: str) -> dict[str, Path]:
    here = {path.resolve(): path for folder in (top, surface.parent)
            for path in sorted(folder.iterdir()) if path.suffix.lower() in _RASTER}  # fmt: skip
    own = re.compile(r"-(DEM|DRG|IntersectionErr)(?![A-Za-z])|(-[LR]|_sub)$")
    images = [p for p in here.values() if not own.search(p.stem) and _is_mapprojected(p)]
    sides = {name: [p for p in images if pattern.search(p.stem)] for name, pattern in _SIDE.items()}
    if len(images) == 2 and all(len(paths) == 1 for paths in sides.values()):
        return {name: paths[0] for name, paths in sides.items()}
    if len(images) == 1:
        return {"ortho_left": images[0]}
    if images:
        return {f"ortho_{n}": path for n, path in enumerate(sorted(images), 1)}
    pair = {"ortho_left": _made(surface.parent, prefix, "L"),
            "ortho_right": _made(surface.parent, prefix, "R")}  # fmt: skip
    there = {name: paths[0] for name, paths in pair.items()
             if len(paths) == 1 and _georeferenced(paths[0])}  # fmt: skip
    if len(there) == 2:
        return there
    drg = _made(surface.parent, prefix, "DRG")
    return {"ortho_left": drg[0]} if drg else there


def _is_mapprojected(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            tagged = file.tags().keys() >= _MAPPROJECT_TAGS
            placed = file.crs is not None and not file.transform.is_identity
            return placed and (tagged or bool(_MAPPROJECTED.search(path.stem)))


def _georeferenced(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            return file.crs is not None and not file.transform.is_identity


# --- the predecessor -----------------------------------------------------------------------------

#: DeepDEM's names (``final_<name>.tif``) and ours. Its ``nodata_mask`` is 1 where there is data.
DEEPDEM_NAMES = {
    "asp_dsm": "dsm",
    "ortho_channel1": "ortho_left",
    "ortho_channel2": "ortho_right",
    "ortho_left": "ortho_left",
    "ortho_right": "ortho_right",
    "triangulation_error": "triangulation_error",
    "ndvi": "ndvi",
    "hls_red": "red",
    "hls_nir": "nir",
    "nodata_mask": "valid",
    "lidar_data": "lidar_dsm",
    "lidar_dtm_data": "lidar_dtm",
    "canopy_height_model": "canopy_height",
}


def find_deepdem(folder: str | Path) -> dict[str, str]:
    """Return the layers of a folder that DeepDEM's preprocessing wrote: their names and files.

    ``final_<name>.tif`` is the layer that `DEEPDEM_NAMES` says; a name of the user's own is kept.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no ``final_asp_dsm.tif`` in it.
    ValueError
        Two files are the same layer (``final_ortho_left.tif``, ``final_ortho_channel1.tif``).
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    found: dict[str, str] = {}
    for file in sorted(path.glob("final_*.tif")):
        theirs = file.stem.removeprefix("final_")
        name = DEEPDEM_NAMES.get(theirs, theirs)
        if name in found:
            raise ValueError(
                f"{Path(found[name]).name} and {file.name} are both the layer {name!r}: move one "
                "of them out of the folder"
            )
        found[name] = str(file)
    if "dsm" not in found:
        raise FileNotFoundError(
            f"{path} holds no final_asp_dsm.tif (found: {sorted(f.name for f in path.iterdir())}): "
            "pass the folder that DeepDEM's preprocessing wrote"
        )
    return found

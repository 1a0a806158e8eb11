"""What a scene was made of, by which steps and options: kept with it, as JSON has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np
import xarray as xr

from deepdem import __version__

__all__ = ["PROVENANCE", "json_safe", "noted"]

#: The attribute of a scene: ``{"deepdem": version, step: options, ...}``, in the steps' order.
PROVENANCE = "deepdem_provenance"


def noted(ds: xr.Dataset, step: str, **options: Any) -> xr.Dataset:
    """Return the scene with one more step in its provenance; an earlier one of that name goes.

    There is no time and no host in it: the same inputs and options give the same attrs.
    """
    before = ds.attrs.get(PROVENANCE)
    kept = dict(before) if isinstance(before, Mapping) else {}
    kept.pop(step, None)
    said = {key: value for key, value in options.items() if value is not None}
    return ds.assign_attrs({PROVENANCE: {**kept, "deepdem": __version__, step: json_safe(said)}})


def json_safe(value: Any) -> Any:
    """Return a value that JSON, and with it Zarr, can hold.

    NumPy scalars and arrays become Python's, NaN and infinity None, keys and all else text.
    """
    if isinstance(value, xr.DataArray | xr.Dataset):  # its repr would show its values
        return f"{type(value).__name__} {dict(value.sizes)}"
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_safe(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return json_safe(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, PathLike):
        return fspath(value)
    return json.loads(json.dumps(value, default=str))

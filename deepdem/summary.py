"""A scene described by itself: layers, units, statistics, pictures, where it comes from."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dask.base
import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.image import imsave
from numpy.typing import NDArray

from deepdem.grid import pixel_size_m
from deepdem.layers import describe
from deepdem.provenance import PROVENANCE
from deepdem.scene import check_scene
from deepdem.statistics import Histogram, stored_statistics
from deepdem.terrain import shade, steps_m

__all__ = ["SceneSummary", "summary"]

Array = NDArray[Any]

_PICTURE_PX = 128
_COLOURS = {"error": "magma", "index": "BrBG", "stratum": "YlGn", "other": "viridis"}


@dataclass(frozen=True)
class LayerRow:
    """What is said of one layer; the figures None where there is no value."""

    name: str
    long_name: str
    units: str
    dtype: str
    above: str
    share: float | None
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    source: str
    picture: bytes


@dataclass(frozen=True)
class SceneSummary:
    """A scene's description; a notebook shows it with pictures, a terminal without.

    Attributes
    ----------
    facts
        Words and values: size, extent, CRS, pixel size, valid share, DSM scale.
    rows
        One a layer.
    sample
        What the statistics are of: ``all pixels``, or one in so many.
    provenance
        The steps and options it was made by.
    """

    facts: Mapping[str, str]
    rows: tuple[LayerRow, ...]
    sample: str
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        wide = max((len(row.name) for row in self.rows), default=0)
        lines = ["<deepdem scene>"]
        lines += [f"  {_plain(key)}: {_plain(value)}" for key, value in self.facts.items()]
        lines.append(f"  Layers (statistics of {self.sample}):")
        for row in self.rows:
            units = "" if row.units == "1" else f" {row.units}"
            words = [f"{row.name:<{wide}}", f"{_percent(row.share):>6}"]
            if row.mean is not None:
                words.append(
                    f"{_figure(row.mean)} ± {_figure(row.std)}{units}, "
                    f"5 to 95 %: {_figure(row.low)} to {_figure(row.high)}"
                )
            words += [f"above {row.above}"] if row.above else []
            lines.append("    " + _plain("  ".join(words)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = "".join(
            f"<div><b>{_safe(key)}</b> {_safe(value)}</div>" for key, value in self.facts.items()
        )
        heads = ("", "layer", "values", "mean ± std", "5 to 95 %", "units", "source")
        rows = "".join(self._row(row) for row in self.rows)
        said = _safe(json.dumps(self.provenance, indent=1, default=str, ensure_ascii=False))
        steps = (
            f"<details><summary>Made by</summary><pre>{said}</pre></details>"
            if self.provenance
            else ""
        )
        return (
            f"<div class='deepdem-scene'><style>{_STYLE}</style>"
            f"<div class='facts'>{facts}</div><table><thead><tr>"
            + "".join(f"<th>{head}</th>" for head in heads)
            + f"</tr></thead><tbody>{rows}</tbody></table>"
            f"<div class='note'>Statistics of {_safe(self.sample)}.</div>{steps}</div>"
        )

    @staticmethod
    def _row(row: LayerRow) -> str:
        picture = base64.b64encode(row.picture).decode("ascii")
        kind = row.dtype + (f", above {row.above}" if row.above else "")
        spread = "" if row.mean is None else f"{_figure(row.mean)} ± {_figure(row.std)}"
        span = "" if row.low is None else f"{_figure(row.low)} to {_figure(row.high)}"
        units = "" if row.units == "1" else row.units
        cells = (
            f"<td><img src='data:image/png;base64,{picture}' alt=''></td>",
            f"<td><b>{_safe(row.name)}</b><br>{_safe(row.long_name)}<br><i>{_safe(kind)}</i></td>",
            *(f"<td>{_safe(text)}</td>" for text in (_percent(row.share), spread, span, units)),
            f"<td class='source'>{_safe(row.source)}</td>",
        )
        return f"<tr>{''.join(cells)}</tr>"


_STYLE = """
.deepdem-scene {font-size: 13px; line-height: 1.35; max-width: 1000px}
.deepdem-scene .facts {display: flex; flex-wrap: wrap; gap: 2px 24px; margin-bottom: 6px}
.deepdem-scene table {border-collapse: collapse; width: 100%}
.deepdem-scene th, .deepdem-scene td {text-align: left; vertical-align: middle; padding: 3px 10px 3px 0;
 border-top: 1px solid rgba(128, 128, 128, .3); background: none}
.deepdem-scene th {border-top: none; font-weight: normal; opacity: .7}
.deepdem-scene img {height: 72px; max-width: 128px; image-rendering: auto; display: block}
.deepdem-scene td i, .deepdem-scene .note {opacity: .7}
.deepdem-scene td.source {overflow-wrap: anywhere; max-width: 260px; font-size: 11px; opacity: .8}
.deepdem-scene pre {white-space: pre-wrap; overflow-wrap: anywhere; font-size: 11px}
"""  # noqa: E501  # as one reads CSS


def _safe(text: Any) -> str:
    """What came with somebody's data must not be markup here."""
    return html.escape(_plain(text, keep="\n"), quote=True)


def _plain(text: Any, keep: str = "") -> str:
    """Nor must it steer a terminal, or reverse what is read."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}"
                   for c in str(text))  # fmt: skip


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


# --- what is looked at ---------------------------------------------------------------------------


def summary(ds: xr.Dataset) -> SceneSummary:
    """Return a description of the scene that a notebook shows with a picture of each layer.

    Computes evenly spaced pixels, at most 128 a side, of all layers in one pass (a chunked source
    still reads the chunks that they are in). Statistics are those that the scene carries, of all
    pixels (see `deepdem.statistics`); one that carries none is described by the pixels of the
    pictures. Heights are shaded. Names and attrs are shown as text, whatever is in them.

    Raises
    ------
    ValueError
        The Dataset is no scene: the message says what it lacks.

    Examples
    --------
    >>> deepdem.open_scene("scenes.zarr", "baker_2015").deepdem.summary()
    """
    grid: Any = check_scene(ds)
    names = [str(n) for n in ds.data_vars if ds[n].dims == ("y", "x")]
    step = max(1, math.ceil(max(grid.shape) / _PICTURE_PX))
    part = ds[names].isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step))
    (part,) = dask.base.compute(part)
    found = stored_statistics(ds)
    sample = "all pixels" if found or step == 1 else f"one pixel in {step} x {step}"
    known = found["layers"] if found else {}
    metres = steps_m(ds) if min(grid.shape) > 1 else (-1.0, 1.0)
    scale = step * metres[0], step * metres[1]
    sources = ds.attrs.get(PROVENANCE, {})
    rows = tuple(_layer(name, ds[name], part[name].values, known.get(name), scale)
                 for name in names)  # fmt: skip
    facts = _facts(ds, grid, found)
    provenance = sources if isinstance(sources, Mapping) else {"said": str(sources)}
    return SceneSummary(facts, rows, sample, provenance)


def _facts(ds: xr.Dataset, grid: Any, found: Mapping[str, Any] | None) -> dict[str, str]:
    extent, crs = grid.boundingbox, grid.crs.proj
    code = crs.to_authority(min_confidence=100)
    facts = {
        "Size": f"{grid.shape.y} x {grid.shape.x} pixels",
        "Pixel": f"{pixel_size_m(grid):.4g} m",
        "CRS": f"{crs.name} ({':'.join(code)})" if code else str(crs.name),
        "x": f"{extent.left:.10g} to {extent.right:.10g}",
        "y": f"{extent.bottom:.10g} to {extent.top:.10g}",
        "In memory": f"{ds.nbytes / 2**20:,.0f} MiB",
    }
    if ds.chunks:
        facts["Chunks"] = " x ".join(str(max(ds.chunksizes[dim])) for dim in ("y", "x"))
    said = found or {}
    if _number(said.get("valid")) is not None:
        facts["Valid"] = _percent(said["valid"])
    if said.get("dsm_scale") and isinstance(said["dsm_scale"], Mapping):
        scales = [f"{k} px {_figure(_number(v))} m" for k, v in said["dsm_scale"].items()]
        facts["DSM scale"] = ", ".join(scales)
    return facts


def _layer(
    name: str, layer: xr.DataArray, part: Array, known: Mapping[str, Any] | None,
    step_m: tuple[float, float],
) -> LayerRow:  # fmt: skip
    words = describe(name)
    mask = words.role == "mask" or part.dtype == bool
    values = part.astype(np.float32)
    if known is None:
        known = _statistics(values, mask=mask)
    ranks = known.get("percentiles")
    ranks = ranks if isinstance(ranks, Mapping) else {}
    figures = [known.get("share"), known.get("mean"), known.get("std"), ranks.get("5"),
               ranks.get("95")]  # fmt: skip
    share, mean, std, low, high = (_number(value) for value in figures)
    return LayerRow(
        name=name,
        long_name=str(layer.attrs.get("long_name", words.long_name)),
        units=str(layer.attrs.get("units", words.units)),
        dtype=str(layer.dtype),
        above=str(layer.attrs.get("vertical_reference", "")),
        share=share, mean=mean, std=std, low=low, high=high,
        source=str(layer.attrs.get("source", "")),
        picture=_picture(values, words.role if not mask else "mask", step_m),
    )  # fmt: skip


def _number(value: Any) -> float | None:
    """Attrs may hold anything."""
    return float(value) if isinstance(value, int | float) else None


def _statistics(values: Array, *, mask: bool) -> dict[str, Any]:
    if mask:
        return {"share": float(np.mean(values == 1))}
    finite = values[np.isfinite(values)]
    found: dict[str, Any] = {"share": finite.size / max(values.size, 1)}
    if finite.size:
        low, high = Histogram.of(finite).quantiles([0.05, 0.95]).tolist()
        wide = finite.astype(np.float64)
        found |= {"mean": float(wide.mean()), "std": float(wide.std()),
                  "percentiles": {"5": low, "95": high}}  # fmt: skip
    return found


def _picture(values: Array, role: str, step_m: tuple[float, float]) -> bytes:
    """Return a PNG: heights shaded, images grey, errors, indices and masks in colours."""
    known = np.isfinite(values)
    if role in ("height", "truth"):
        sun = {"azimuth": 315.0, "altitude": 45.0, "z_factor": 1.0}
        tone = shade(values, step_y=step_m[0], step_x=step_m[1], **sun)
        low, high, colours = 0.0, 1.0, "gray"
    else:
        tone, colours = values, _COLOURS.get(role, "gray")
        finite = values[known]
        low, high = np.percentile(finite, [2, 98]).tolist() if finite.size else (0.0, 1.0)
        if role == "index":
            high = max(abs(low), abs(high))
            low = -high
        elif role == "error":
            low = 0.0
        elif role == "mask":
            low, high = -0.6, 1.6  # neither black nor white
    with np.errstate(invalid="ignore"):
        level = np.clip((tone - low) / ((high - low) or 1.0), 0, 1)
    rgba = mpl.colormaps[colours](np.nan_to_num(level))
    rgba[~known, 3] = 0
    file = io.BytesIO()
    imsave(file, rgba, format="png")
    return file.getvalue()

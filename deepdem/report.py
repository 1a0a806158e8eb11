"""The report: one HTML file with all that says how much better the refined surface is."""

from __future__ import annotations

import base64
import html
import io
from os import PathLike
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import xarray as xr

from deepdem.evaluate import STRATA, Plan, Refined, plan_evaluation, surfaces_of
from deepdem.plot import compare

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { font-size: 1.15rem; } .quiet { color: #666; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
thead th { border-bottom: 1px solid #888; } tbody th { text-align: left; font-weight: 500; }
img { width: 100%; height: auto; } td.text { text-align: left; overflow-wrap: anywhere; }
"""


def write_report(
    ds: xr.Dataset,
    refined: Refined,
    path: str | PathLike[str],
    *,
    truth: str = "lidar_dsm",
    baseline: str = "dsm",
    mask: str | None = "valid",
    title: str | None = None,
) -> Path:
    """Return the path of a report, one HTML file that needs no other; computes.

    It holds the figure of `deepdem.plot.compare`, the statistics of `deepdem.evaluate.evaluate`
    over all pixels and by each stratification that the scene has layers for, and where scene and
    surface come from (their attrs). The file appears whole or not at all.

    Parameters
    ----------
    ds, refined, truth, baseline, mask
        As for `deepdem.evaluate.evaluate`.
    path
        The file to write, replaced if it is there.
    title
        Its heading; by default the scene's own title.

    Raises
    ------
    ValueError
        As `deepdem.evaluate.evaluate`.

    Examples
    --------
    >>> ds.deepdem.report(refined, "report.html")
    """
    plans = [
        plan_evaluation(ds, refined, truth=truth, baseline=baseline, mask=mask, by=by)
        for by in (None, *_strata(ds))
    ]
    tables = [
        plan.table(strata)
        for plan, strata in zip(plans, dask.base.compute(*(p.strata for p in plans)), strict=True)
    ]
    figure = compare(ds, refined, truth=truth, baseline=baseline, mask=mask)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    heading = title or str(ds.attrs.get("title") or ds.attrs.get("name") or "Refined surface")
    body = [
        f"<h1>{html.escape(heading)}</h1>",
        f'<p class="quiet">{html.escape(_extent(ds))}</p>',
        f'<p class="lead">{html.escape(_gain(tables[0], baseline, truth))}</p>',
        _image(picture.getvalue(), "Initial, refined and truth, and their errors"),
        *_sections(plans, tables),
        "<h2>Where it comes from</h2>",
        *(_attributes(name, surface.attrs) for name, surface in surfaces_of(refined).items()),
        _attributes("scene", ds.attrs),
    ]
    return _write(Path(path), heading, "\n".join(body))


def _strata(ds: xr.Dataset) -> list[str]:
    """Return the stratifications that the scene has the layers for."""
    needs = {"slope": (), "canopy": ("lidar_dsm", "lidar_dtm")}  # the truth has a slope
    return [name for name in STRATA if all(need in ds for need in needs.get(name, (name,)))]


def _extent(ds: xr.Dataset) -> str:
    crs = ds.rio.crs
    size = f"{ds.sizes['y']} by {ds.sizes['x']} pixels"
    if crs is None:
        return size
    code = crs.to_epsg()
    return f"{size}, {crs.to_wkt().split(chr(34))[1] if code is None else f'EPSG:{code}'}"


def _gain(table: pd.DataFrame, baseline: str, truth: str) -> str:
    before, count = table["MAE"].loc[baseline], int(table["count"].iloc[0])
    if not count:
        return f"No pixel has a value in {truth} and in every surface: nothing can be compared."
    gains = [
        f"{name}: mean absolute error {before:.2f} m before, {after:.2f} m after "
        f"({abs(1 - after / before):.0%} {'less' if after <= before else 'more'})"
        for name, after in table["MAE"].drop(baseline).items()
    ]
    return f"{'; '.join(gains)}. Against {truth}, over {count:,} pixels."


def _sections(plans: list[Plan], tables: list[pd.DataFrame]) -> list[str]:
    parts = ["<h2>Errors, metres</h2>", _table(tables[0])]
    for plan, table in zip(plans[1:], tables[1:], strict=True):
        parts += [f"<h2>Errors by {html.escape(str(plan.settings['by']))}, metres</h2>"]
        parts += [_table(table.drop("all", level=0))]
    parts.append(
        '<p class="quiet">The error is surface minus truth: positive is too high. All surfaces are '
        "compared on the same pixels; coverage is the share of those with truth that each has. "
        "NMAD: 1.4826 times the median absolute deviation; LE90, LE95: percentiles of the absolute "
        "error.</p>"
    )
    return parts


def _table(table: pd.DataFrame) -> str:
    known = table[table["count"] > 0]
    formats = {"count": "{:,.0f}".format, "coverage": "{:.1%}".format}
    text: str = known.to_html(
        formatters=formats, float_format="{:.3f}".format, border=0, justify="right"
    )
    return text


def _attributes(name: str, attrs: Any) -> str:
    rows = "".join(
        f'<tr><th>{html.escape(str(key))}</th><td class="text">{html.escape(str(value))}</td></tr>'
        for key, value in attrs.items()
    )
    return f"<h3>{html.escape(name)}</h3><table><tbody>{rows}</tbody></table>" if rows else ""


def _image(png: bytes, words: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def _write(path: Path, title: str, body: str) -> Path:
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path

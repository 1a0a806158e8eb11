"""The figures: a scene at a glance, and before against after.

Figures read strided slices, compute in one pass and are returned, never shown.
"""

# Over 400 lines with its docstrings: both figures draw with the same small tools and one style.

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import dask.base
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from deepdem.evaluate import (
    METRICS,
    Refined,
    Summary,
    layer_of,
    on_grid_of,
    plan_evaluation,
    surfaces_of,
)
from deepdem.layers import LAYERS, Role, describe
from deepdem.terrain import hillshade, shade, steps, steps_m

__all__ = ["compare", "hillshade", "plot"]

Array = NDArray[Any]
Window = tuple[slice, slice]

_NO_DATA = "#e9e9ec"
_FRAME = "#d1495b"
_SURFACES = ("#7d7d7d", "#00798c", "#d1811f", "#6a4c93")  # the baseline first
# Soft hypsometric tints: no blue, which reads as water, and no white, which reads as no data.
_TINTS = LinearSegmentedColormap.from_list(
    "deepdem_tints", ["#6f9a8d", "#a3b98a", "#dfd5a2", "#d9b184", "#c2957f", "#a98694"]
)
_MASK = ListedColormap([_NO_DATA, "#4f8a8b"])
_STYLE: Any = {
    "font.size": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip


# --- a scene at a glance -------------------------------------------------------------------------


def plot(ds: xr.Dataset, *, layers: Sequence[str] | None = None, max_px: int = 800) -> Figure:
    """Return a figure of the scene with one map for each layer.

    Heights are shaded and tinted on one scale, images are grey between their 2nd and 98th
    percentile, masks have two colours. Every layer is thinned to at most `max_px` pixels a side by
    strided slicing before anything is read, and all are computed in one pass: of a huge scene
    little is kept (a chunked source still reads the chunks that the slices touch).

    Parameters
    ----------
    ds
        The scene, dims (y, x).
    layers
        Names in the order of the maps; by default all layers on (y, x).
    max_px
        Pixels a side that are kept at most.

    Raises
    ------
    ValueError
        A layer is not in the scene, or none is left to draw.

    Examples
    --------
    >>> z = xr.DataArray(np.eye(3), {"y": [2.0, 1, 0], "x": [0.0, 1, 2]}, ("y", "x"))
    >>> figure = plot(xr.Dataset({"dsm": z}))
    >>> figure.axes[0].get_title(loc="left")
    'Initial stereo digital surface model'
    """
    names = [n for n in ds.data_vars if set(ds[n].dims) == {"y", "x"}] if layers is None else layers
    if not names:
        raise ValueError(f"nothing to plot: no layer on (y, x) in {sorted(map(str, ds.data_vars))}")
    pictures = {str(n): layer_of(ds, str(n), "layers")[_thin(ds, max_px)] for n in names}
    (pictures,) = dask.base.compute(pictures)
    heights = [p for n, p in pictures.items() if describe(n).is_height]
    limits = _limits(heights)
    rows = math.ceil(len(pictures) / (4 if len(pictures) > 6 else 3))
    columns = math.ceil(len(pictures) / rows)
    pixel_m, step = steps_m(ds), steps(ds)
    tall = abs(ds.sizes["y"] * pixel_m[0] / (ds.sizes["x"] * pixel_m[1]))
    size = (2.95 * columns + 0.4, (2.6 * min(max(tall, 0.3), 2) + 0.36) * rows + 0.3)
    with _styled():
        figure = plt.figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for ax, (name, picture) in zip(grid.flat, pictures.items(), strict=False):
            _map(ax, name, picture, limits)
        for ax in grid.flat[len(pictures) :]:
            ax.remove()
        for i, ax in enumerate(grid.flat[: len(pictures)]):
            _map_axes(ax, ds, left=i % columns == 0, bottom=i + columns >= len(pictures))
            ax.set_aspect(abs(pixel_m[0] / step[0] / (pixel_m[1] / step[1])))
    return figure


def _map(ax: Axes, name: str, picture: xr.DataArray, heights: tuple[float, float]) -> None:
    layer = describe(name)
    # Of a standard name the words are known; attrs may be inherited from what it was made of.
    title = layer.long_name if name in LAYERS else picture.attrs.get("long_name", layer.long_name)
    units = str(picture.attrs.get("units", layer.units))
    mappable: ScalarMappable
    if layer.is_height:
        _relief(ax, picture, heights)
        mappable = ScalarMappable(Normalize(*heights), _TINTS)
    elif layer.role == "mask" or picture.dtype == bool:
        share = float((picture == 1).mean())
        title = f"{textwrap.shorten(title, 60, placeholder=' …')} ({share:.0%})"
        mappable = _image(ax, (picture == 1).astype(np.float32), _MASK, (0, 1))
    else:
        low, high = _limits([picture])
        if layer.role == "error":
            low = 0.0
        if layer.role == "index":
            high = max(abs(low), abs(high))
            low = -high
        mappable = _image(ax, picture, plt.get_cmap(_COLORMAPS.get(layer.role)), (low, high))
    # 40 characters are as wide as a map with its colour bar.
    lines = textwrap.wrap(title[:1].upper() + title[1:], 40, max_lines=2, placeholder=" …")
    ax.set_title("\n".join(lines), loc="left")
    if layer.role != "mask" and picture.dtype != bool:
        bar = ax.figure.colorbar(mappable, ax=ax, fraction=0.045, pad=0.02, extend="both")
        bar.outline.set_linewidth(0.4)
        bar.set_label("" if units == "1" else units)


_COLORMAPS: dict[Role, str] = {
    "image": "gray", "band": "gray", "error": "magma", "index": "BrBG", "stratum": "YlGn",
}  # fmt: skip


def _map_axes(ax: Axes, ds: xr.Dataset, *, left: bool, bottom: bool) -> None:
    """Label the outer axes with the map's coordinates, in kilometres where the scene is large."""
    span = max(abs(float(ds[d][-1] - ds[d][0])) for d in ("y", "x"))
    unit = str(ds["x"].attrs.get("units", "m")).replace("metre", "m")
    names, scale = ("Easting", "Northing"), 1.0
    if unit.startswith("degree"):
        names, unit = ("Longitude", "Latitude"), "°"
    elif unit == "m" and span > 2000:
        unit, scale = "km", 1000.0
    for axis, name, shown in ((ax.xaxis, names[0], bottom), (ax.yaxis, names[1], left)):
        low, high = sorted(axis.get_view_interval())
        margin = 0.1 * (high - low)  # labels near a corner would run into the other axis's
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        axis.set_ticks([t for t in ticks if low + margin < t < high - margin])
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / scale:.10g}"))
        if shown:
            axis.set_label_text(f"{name} [{unit}]")
    ax.tick_params(length=2.5, labelleft=left, labelbottom=bottom)
    for label in ax.get_yticklabels():
        label.set(rotation=90, verticalalignment="center")


# --- before against after ------------------------------------------------------------------------


def compare(
    ds: xr.Dataset,
    refined: Refined,
    *,
    truth: str = "lidar_dsm",
    baseline: str = "dsm",
    mask: str | None = "valid",
    max_px: int = 1000,
    window: Window | None = None,
) -> Figure:
    """Return a figure that sets the refined surface beside the initial DSM and the truth.

    Top: an orthoimage (where the scene has one) and shaded relief of initial, refined and truth
    under one sun and one height scale; below, where the scene is larger than 400 pixels or a
    window is given, the same zoomed in. Bottom: a second orthoimage (of more, the first two are
    shown), the errors (surface - truth, metres) on one symmetric scale, and their histograms; the
    table stands in the first column where that is free, else below all. Statistics are those of
    `deepdem.evaluate.evaluate`, of every pixel and not of the thinned picture.

    Parameters
    ----------
    ds, refined, truth, baseline, mask
        As for `deepdem.evaluate.evaluate`.
    max_px
        Pixels a side that are kept at most of the overview (strided slicing).
    window
        (y-slice, x-slice) in pixels for the zoom; by default 256 pixels a side where the truth has
        roofs or crowns on open ground, found in a thinned truth that is read first. All else is
        computed in one pass.

    Raises
    ------
    ValueError
        As `deepdem.evaluate.evaluate`, or `window` holds fewer than 2 by 2 pixels of the scene.

    Examples
    --------
    >>> z = xr.DataArray(np.eye(3), {"y": [2.0, 1, 0], "x": [0.0, 1, 2]}, ("y", "x"))
    >>> figure = compare(xr.Dataset({"dsm": z + 1, "lidar_dsm": z}), z + 0.5)
    >>> [ax.get_title(loc="left") for ax in figure.axes[:3]]
    ['Initial DSM', 'Refined', 'Truth']
    """
    plan = plan_evaluation(ds, refined, truth=truth, baseline=baseline, mask=mask)
    layers = _columns(ds, refined, truth=truth, baseline=baseline)
    usable = xr.ones_like(layers[truth], bool)
    if plan.settings["mask"]:
        usable = _bare_coordinates(ds, ds[plan.settings["mask"]])
    if window is None and max(ds.sizes["y"], ds.sizes["x"]) > 400:
        window = _liveliest(layers[truth])
    zoom = {} if window is None else {name: layer[window] for name, layer in layers.items()}
    beside = next(iter(_images(ds)[1:]), None)
    if any(min(layer.shape) < 2 for layer in zoom.values()):
        raise ValueError(f"window={window} holds fewer than 2 x 2 pixels of {dict(ds.sizes)}")
    thin = _thin(ds, max_px)
    overview = {name: layer[thin] for name, layer in layers.items()}
    strata, overview, zoom, usable = dask.base.compute(plan.strata, overview, zoom, usable[thin])
    summaries = plan.total(strata)
    with _styled():
        return _Sheet(
            overview, zoom, usable == 1, summaries, truth, steps_m(ds), steps(ds), beside
        ).draw()


def _columns(
    ds: xr.Dataset, refined: Refined, *, truth: str, baseline: str
) -> dict[str, xr.DataArray]:
    """Return the pictures, left to right, on the very coordinates of the scene."""
    layers = {name: layer_of(ds, name, "image") for name in _images(ds)}
    layers[baseline] = layer_of(ds, baseline, "baseline")
    layers |= {n: on_grid_of(ds, s, n) for n, s in surfaces_of(refined).items()}
    layers[truth] = layer_of(ds, truth, "truth")
    return {name: _bare_coordinates(ds, layer) for name, layer in layers.items()}


def _images(ds: xr.Dataset) -> list[str]:
    """Return the names of the first two orthoimages: left and right, or views 1 and 2."""
    names = [str(n) for n in ds.data_vars if describe(str(n)).role == "image"]
    return sorted(names, key=lambda name: (len(name), name))[:2]  # view 2 comes before view 10


def _bare_coordinates(ds: xr.Dataset, layer: xr.DataArray) -> xr.DataArray:
    """Return `layer` on the very coordinates of the scene: rounding must not misalign pictures."""
    bare = layer.transpose("y", "x").drop_vars(list(layer.coords))
    return bare.assign_coords({c: ds[c] for c in ("y", "x", "spatial_ref") if c in ds.coords})


def _liveliest(truth: xr.DataArray, size: int = 256) -> Window:
    """Return the window of `size` pixels with the best mixture of edges and calm, few holes.

    Where a fifth of all neighbours differ by more than 1.5 m there are roofs or crowns with open
    ground between them; closed forest has more, fields and water have none.
    """
    step = max(1, max(truth.shape) // 1024)
    z = truth[::step, ::step].to_numpy()
    edge = [min(max(size // step, 2), n) for n in z.shape]
    best, window = -1.0, (slice(0, size), slice(0, size))
    for y in range(0, z.shape[0] - edge[0] + 1, max(edge[0] // 4, 1)):
        for x in range(0, z.shape[1] - edge[1] + 1, max(edge[1] // 4, 1)):
            part = z[y : y + edge[0], x : x + edge[1]]
            jumps = np.abs(np.concatenate([np.diff(part, axis=a).ravel() for a in (0, 1)]))
            steep = float((jumps > 1.5).mean())
            score = float(np.isfinite(part).mean()) * (1 - abs(steep - 0.2))
            if score > best:
                top, left = y * step, x * step
                best, window = score, (slice(top, top + size), slice(left, left + size))
    return window


@dataclass
class _Sheet:
    """The figure of `compare`: panels are placed in inches, so that columns line up exactly."""

    overview: dict[str, xr.DataArray]
    zoom: dict[str, xr.DataArray]
    usable: xr.DataArray
    summaries: dict[str, Summary]
    truth: str
    pixel_m: tuple[float, float]
    step: tuple[float, float]
    beside: str | None
    """The second orthoimage: it has no column of its own, but the free cell below the first's."""

    WIDTH, GAP, LEFT, RIGHT, LINE = 2.55, 0.1, 0.12, 0.62, 0.185

    def draw(self) -> Figure:
        self.names = [name for name in self.overview if name != self.beside]
        tall = [self._tallness(p) for p in (self.overview, self.zoom) if p]
        heights = [self.WIDTH * t for t in tall]
        below = max(heights[0], 1.5)
        total = 0.3 + sum(heights) + self.GAP * (len(heights) - 1) + 0.5 + below + 0.62
        columns = len(self.names)
        first = self.names.index(next(iter(self.summaries)))
        strip = 0.0 if first and not self.beside else self.LINE * (len(self.summaries) + 1) + 0.25
        total += strip
        width = self.LEFT + columns * self.WIDTH + (columns - 1) * self.GAP + self.RIGHT
        self.figure = plt.figure(figsize=(width, total))
        top = total - 0.3
        for pictures, height in zip((self.overview, self.zoom), heights, strict=False):
            self._relief_row(pictures, top, height)
            top -= height + self.GAP
        top += self.GAP - 0.5
        self._error_row(top, heights[0], below, first)
        span = columns * (self.WIDTH + self.GAP) - self.GAP
        place = (strip - 0.08, strip - 0.08, span) if strip else (top, below)
        self._table(self._axes(0, *place), wide=strip > 0)
        if self.beside:
            self._panel(self._axes(0, top, heights[0]), self.beside, self.overview)
        return self.figure

    def _tallness(self, pictures: Mapping[str, xr.DataArray]) -> float:
        rows, columns = next(iter(pictures.values())).shape
        return abs(rows * self.pixel_m[0] / (columns * self.pixel_m[1]))

    def _axes(self, column: float, top: float, height: float, width: float | None = None) -> Axes:
        w, h = self.figure.get_size_inches()
        left = self.LEFT + column * (self.WIDTH + self.GAP)
        return self.figure.add_axes(
            (left / w, (top - height) / h, (width or self.WIDTH) / w, height / h)
        )

    def _relief_row(self, pictures: dict[str, xr.DataArray], top: float, height: float) -> None:
        limits = _limits([pictures[n] for n in [*self.summaries, self.truth]])
        for column, name in enumerate(self.names):
            ax = self._axes(column, top, height)
            self._panel(ax, name, pictures, limits)
            if column == 0:
                self._scale_bar(ax)
        bar = self.figure.colorbar(
            ScalarMappable(Normalize(*limits), _TINTS), extend="both", ticks=MaxNLocator(5),
            cax=self._axes(len(self.names), top - 0.1 * height, 0.8 * height, 0.09),
        )  # fmt: skip
        bar.set_label("height [m]", labelpad=2)

    def _panel(
        self, ax: Axes, name: str, pictures: dict[str, xr.DataArray],
        heights: tuple[float, float] = (0.0, 1.0),
    ) -> None:  # fmt: skip
        """Draw one picture; an overview has a title, and a mark where the zoom is."""
        if name in self.summaries or name == self.truth:
            _relief(ax, pictures[name], heights)
        else:
            _image(ax, pictures[name], plt.get_cmap("gray"), _limits([pictures[name]]))
        _bare(ax, _FRAME if pictures is self.zoom else "0.3")
        if pictures is self.overview:
            ax.set_title(self._title(name), loc="left", pad=4)
            if self.zoom:
                left, right, bottom, top = _extent(next(iter(self.zoom.values())), self.step)
                size = (right - left, top - bottom)
                ax.add_patch(Rectangle((left, bottom), *size, fill=False, ec=_FRAME, lw=1.1))

    def _error_row(self, top: float, height: float, below: float, first: int) -> None:
        limit = _nice(max(s.quantile(0.95, np.abs) for s in self.summaries.values()))
        truth = self.overview[self.truth]
        mappable = ScalarMappable(Normalize(-limit, limit), plt.get_cmap("RdBu_r"))
        for column, (name, summary) in enumerate(self.summaries.items(), first):
            ax = self._axes(column, top, height)
            error = (self.overview[name] - truth).where(self.usable)
            mappable = _image(ax, error, plt.get_cmap("RdBu_r"), (-limit, limit))
            _bare(ax, "0.3")
            ax.set_title(
                f"{self._title(name)} − truth\n{_digits(summary, 'MAE', 'RMSE')}",
                loc="left", pad=4,
            )  # fmt: skip
        span = len(self.summaries) * (self.WIDTH + self.GAP) - self.GAP
        bar = self.figure.colorbar(
            mappable, orientation="horizontal", extend="both", extendfrac=0.02,
            ticks=np.linspace(-limit, limit, 5), format="%g",
            cax=self._axes(first, top - height - 0.1, 0.09, span),
        )  # fmt: skip
        bar.set_label(f"error: surface − {self.truth} [m]", labelpad=2)
        self._histogram(self._axes(len(self.names) - 0.83, top, below, 0.86 * self.WIDTH), limit)

    def _histogram(self, ax: Axes, limit: float) -> None:
        edges = np.linspace(-limit, limit, 82)  # an odd number of bins: one is centred on zero
        for i, (name, s) in enumerate(self.summaries.items()):
            share = np.histogram(s.errors, edges, weights=100 * s.counts / max(s.count, 1))[0]
            color = _color(i)
            ax.stairs(share, edges, fill=True, color=color, alpha=0.25, lw=0)
            label = f"{self._title(name)}: {_digits(s, 'MAE', 'NMAD')}"
            ax.stairs(share, edges, color=color, lw=1.2, label=label)
        ax.axvline(0, color="0.3", lw=0.6, zorder=0)
        ax.set(xlim=(-limit, limit), ylim=(0, ax.get_ylim()[1] * 1.02), xlabel="error [m]")
        ax.set_ylabel("% of pixels", labelpad=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.set_xticks(np.linspace(-limit, limit, 5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.legend(
            loc="lower left", bbox_to_anchor=(-0.12, 1.0), frameon=False, handlelength=1.2,
            borderpad=0.1, borderaxespad=0.1, labelspacing=0.25,
        )  # fmt: skip

    def _table(self, ax: Axes, *, wide: bool) -> None:
        """Draw the statistics: a line a surface where `wide`, else a line a metric."""
        width, height = ax.get_position().size * self.figure.get_size_inches()
        surfaces, count = [self._title(n) for n in self.summaries], len(self.summaries)
        two = count > 2 and not wide  # lines of heading: the columns are narrow
        n = f"{next(iter(self.summaries.values())).count:,}".replace(",", "\u2009")
        caption = f"Statistics of the same {n} pixels"
        rows = [[caption if wide else "", *(name.replace(" ", "\n", two) for name in surfaces)]]
        for metric in [m for m in METRICS if m not in ("count", "MedAE", "LE95")]:
            values = [METRICS[metric](s) for s in self.summaries.values()]
            if metric == "coverage":
                rows.append([metric, *(f"{v:.1%}" for v in values)])
            else:  # adding zero turns a rounded -0.0 into 0.0
                rows.append([f"{metric} [m]", *(f"{round(v, 2) + 0.0:.2f}" for v in values)])
        cells = np.array(rows).T if wide else np.array(rows)
        each = (width - 2.5) / (len(rows) - 1) if wide else width * min(0.31, 0.72 / count)
        right = width * (1.0 if wide else 0.98)
        rule = height - self.LINE * ((1.1 if wide else 1.35) + two)
        for (line, column), text in np.ndenumerate(cells):
            surface = (line if wide else column) - 1
            named = surface >= 0 and (column if wide else line) == 0
            ax.text(
                right - each * (cells.shape[1] - 1 - column) if column else 0,
                rule - self.LINE * (line - 0.6) if line else rule + 0.25 * self.LINE, text,
                ha="right" if column else "left", va="top" if line else "bottom",
                color=_color(surface) if named else "black", weight="bold" if named else "normal",
            )  # fmt: skip
        ax.plot([0, right], [rule] * 2, color="0.3", lw=0.6)
        ax.set(xlim=(0, width), ylim=(0, height))
        ax.set_axis_off()
        if not wide:
            ax.set_title(caption, loc="left", pad=4)

    def _title(self, name: str) -> str:
        if name == self.truth:
            return "Truth"
        if name == "dsm":
            return "Initial DSM"
        if describe(name).role == "image":
            view = name.removeprefix("ortho_")
            if self.beside is None:
                return "Orthoimage"
            return f"Orthoimage {view}" if view.isdigit() else f"{view.capitalize()} orthoimage"
        return name[:1].upper() + name[1:].replace("_", " ")

    def _scale_bar(self, ax: Axes) -> None:
        left, right = ax.get_xlim()
        bottom, top = ax.get_ylim()
        to_map = abs(self.step[1] / self.pixel_m[1])
        length_m = _nice((right - left) / to_map / 4, down=True)
        x, y = left + 0.05 * (right - left), bottom + 0.06 * (top - bottom)
        for color, lw in (("white", 4.0), ("black", 1.8)):
            ax.plot([x, x + length_m * to_map], [y, y], color=color, lw=lw, solid_capstyle="butt")
        text = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
        box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
        ax.annotate(
            text, (x, y), (0, 4), textcoords="offset points", fontsize=7, va="bottom", bbox=box
        )
        ax.set(xlim=(left, right), ylim=(bottom, top))


# --- what the figures share ----------------------------------------------------------------------


def _styled() -> AbstractContextManager[None]:
    """Return a context in which figures have the style of this module."""
    # A notebook's backend turns interactive drawing on when it is first needed. Were that inside
    # the context, leaving it would turn it off again, and no later figure would be shown.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]  # Matplotlib's own stub lacks types
    return plt.rc_context(_STYLE)


def _color(surface: int) -> str:
    return _SURFACES[surface % len(_SURFACES)]


def _thin(ds: xr.Dataset, max_px: int) -> Window:
    if max_px < 2:
        raise ValueError(f"max_px={max_px}: a picture needs at least 2 pixels a side")
    step = math.ceil(max(ds.sizes["y"], ds.sizes["x"]) / max_px)
    # Of a long strip two rows must be left, or there would be no gradient and no pixel size.
    every = slice(None, None, max(min(step, min(ds.sizes["y"], ds.sizes["x"]) // 2), 1))
    return every, every


def _limits(pictures: Sequence[xr.DataArray]) -> tuple[float, float]:
    """Return the 2nd and 98th percentile of all `pictures`, apart in any case."""
    values = [np.asarray(p, np.float64).ravel() for p in pictures]
    together = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    if not together.size:
        return 0.0, 1.0
    low, high = np.percentile(together, [2, 98])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _nice(value: float, *, down: bool = False) -> float:
    """Return a round number above `value`, or 1, 2 or 5 times a power of ten below it."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    if down:
        return power * max(n for n in (1, 2, 5) if n * power <= value * (1 + 1e-9))
    return power * min(n for n in (1, 1.5, 2, 3, 4, 6, 8, 10) if n * power >= value * (1 - 1e-9))


def _digits(summary: Summary, *metrics: str) -> str:
    return ", ".join(f"{m} {METRICS[m](summary):.2f}" for m in metrics) + " m"


def _extent(picture: xr.DataArray, step: tuple[float, float]) -> tuple[float, float, float, float]:
    """Return left, right, bottom, top: the outer edges of the pixels, not their centres."""
    y, x = picture["y"].to_numpy(), picture["x"].to_numpy()
    half_y, half_x = abs(step[0]) / 2, abs(step[1]) / 2
    return x.min() - half_x, x.max() + half_x, y.min() - half_y, y.max() + half_y


def _image(
    ax: Axes, picture: xr.DataArray, cmap: Colormap, limits: tuple[float, float]
) -> AxesImage:
    north_up = picture.sortby("y", ascending=False).sortby("x")
    ax.set_facecolor(_NO_DATA)
    return ax.imshow(
        np.ma.masked_invalid(north_up.to_numpy().astype(np.float32)),
        cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest",
        extent=_extent(picture, steps(picture)),
    )  # fmt: skip


def _relief(ax: Axes, picture: xr.DataArray, limits: tuple[float, float]) -> AxesImage:
    """Draw heights as tints under the sun in the north-west."""
    step_y, step_x = steps_m(picture)
    north_up = picture.sortby("y", ascending=False).sortby("x")
    lit = shade(
        north_up.to_numpy(), step_y=-abs(step_y), step_x=abs(step_x),
        azimuth=315, altitude=45, z_factor=1,
    )  # fmt: skip
    rgba = _TINTS(Normalize(*limits)(north_up.to_numpy()))
    # 0.71 is level ground: it keeps the tint's own lightness.
    rgba[..., :3] = np.clip(rgba[..., :3] * (0.25 + 1.06 * lit[..., None]), 0, 1)
    rgba[np.isnan(lit)] = (0, 0, 0, 0)
    ax.set_facecolor(_NO_DATA)
    return ax.imshow(rgba, interpolation="nearest", extent=_extent(picture, steps(picture)))


def _bare(ax: Axes, color: str) -> None:
    ax.set(xticks=[], yticks=[], aspect="auto")
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=1.0 if color == _FRAME else 0.6)

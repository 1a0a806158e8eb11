"""Error statistics of surfaces against a truth, mergeable over chunks.

Each chunk becomes one small `Summary` per surface and stratum (NumPy only), summaries merge in a
tree, and a metric is a function of the merged summary. A newcomer adds a metric in `METRICS` and
a named stratification in `STRATA`; nothing else knows their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from deepdem.terrain import slope

__all__ = ["METRICS", "STRATA", "Summary", "evaluate", "slope"]

Array = NDArray[Any]
Refined = xr.DataArray | xr.Dataset | Mapping[str, xr.DataArray]
By = str | xr.DataArray | tuple[str | xr.DataArray, Sequence[float]] | None

# Errors are counted in bins of equal width in asinh(e / 20 m): 0.4 mm wide at zero, 0.6 mm at
# 20 m, then growing with |e|. One formula, symmetric, zero is a bin's centre, no outlier is out of
# range; bins that nothing falls into are not stored, so the fine width costs little.
_KNEE_M = 20.0
_STEP = 2e-5
_TILE = 4  # a task merges the summaries of so many by so many chunks
_UNCLASSIFIED = -1


# --- kernels: NumPy only -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """All that the metrics need to know of the errors in some pixels; summaries merge.

    Attributes
    ----------
    wanted, covered, count
        Pixels with truth and mask; those of them where this surface has a value; those where
        every surface of the comparison has one, to which all that follows refers.
    mean, m2, mean_abs
        Mean of e, sum of squares of e about its mean (m²), mean of ``abs(e)``; NaN for none.
    bins, counts
        Histogram of e: the occupied bins, ascending, and the pixels in each.
    """

    wanted: int
    covered: int
    count: int
    mean: float
    m2: float
    mean_abs: float
    bins: NDArray[np.int32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, errors: Array, *, wanted: int, covered: int) -> Summary:
        """Return the summary of finite `errors`, float64 in metres."""
        if not errors.size:
            none = np.empty(0, np.int64)
            return cls(wanted, covered, 0, np.nan, np.nan, np.nan, none.astype(np.int32), none)
        mean = float(errors.mean())
        bins = np.rint(np.arcsinh(errors / _KNEE_M) / _STEP).astype(np.int32)
        return cls(
            wanted,
            covered,
            errors.size,
            mean,
            float(np.square(errors - mean).sum()),
            float(np.abs(errors).mean()),
            *np.unique(bins, return_counts=True),
        )

    @classmethod
    def merge(cls, parts: Iterable[Summary]) -> Summary:
        """Return the summary of the union; moments by Chan, Golub & LeVeque (1979), eq. 2.1."""
        parts = list(parts)
        wanted, covered = sum(p.wanted for p in parts), sum(p.covered for p in parts)
        parts = [p for p in parts if p.count]
        if not parts:
            return cls.of(np.empty(0), wanted=wanted, covered=covered)
        n = np.array([p.count for p in parts], np.float64)
        means = np.array([p.mean for p in parts])
        mean = float(n @ means / n.sum())
        bins, where = np.unique(np.concatenate([p.bins for p in parts]), return_inverse=True)
        counts = np.zeros(bins.size, np.int64)
        np.add.at(counts, where, np.concatenate([p.counts for p in parts]))
        return cls(
            wanted,
            covered,
            sum(p.count for p in parts),
            mean,
            float(sum(p.m2 for p in parts) + n @ np.square(means - mean)),
            float(n @ np.array([p.mean_abs for p in parts]) / n.sum()),
            bins,
            counts,
        )

    @property
    def errors(self) -> NDArray[np.float64]:
        """The bins' centres in metres: within ``0.2 mm * sqrt(1 + (e / 20 m)**2)`` of each e."""
        centres: NDArray[np.float64] = _KNEE_M * np.sinh(self.bins * _STEP)
        return centres

    def quantile(self, q: float, transform: Callable[[Array], Array] | None = None) -> float:
        """Return the `q` quantile of ``transform(e)``, as NumPy's method "linear" has it."""
        if not self.count:
            return math.nan
        values = self.errors if transform is None else transform(self.errors)
        order = np.argsort(values, kind="stable")
        values, last = values[order], np.cumsum(self.counts[order])
        rank = q * (self.count - 1)
        low, high = values[np.searchsorted(last, [math.floor(rank), math.ceil(rank)], "right")]
        return float(low + (high - low) * (rank - math.floor(rank)))


def _rmse(s: Summary) -> float:
    return math.sqrt(s.m2 / s.count + s.mean**2) if s.count else math.nan


def _nmad(s: Summary) -> float:
    # Höhle & Höhle (2009), table 2.
    middle = s.quantile(0.5)
    return 1.4826 * s.quantile(0.5, lambda e: np.abs(e - middle))


#: The columns of the table in their order: each a function of the merged `Summary`.
METRICS: dict[str, Callable[[Summary], float]] = {
    "count": lambda s: s.count,
    "bias": lambda s: s.mean,
    "median": lambda s: s.quantile(0.5),
    "MAE": lambda s: s.mean_abs,
    "RMSE": _rmse,
    "MedAE": lambda s: s.quantile(0.5, np.abs),
    "NMAD": _nmad,
    "LE90": lambda s: s.quantile(0.9, np.abs),
    "LE95": lambda s: s.quantile(0.95, np.abs),
    "coverage": lambda s: s.covered / s.wanted if s.wanted else math.nan,
}

#: One summary for each surface, by stratum.
ByStratum = dict[int, tuple[Summary, ...]]


def summarise(
    truth: Array,
    mask: Array,
    stratum: Array,
    *surfaces: Array,
    edges: tuple[float, ...] | None = None,
) -> ByStratum:
    """Return each stratum's summary of every surface's errors; arrays of one shape, NaN no data."""
    wanted = np.isfinite(truth) & (mask == 1)
    reference = truth[wanted].astype(np.float64)
    errors = [surface[wanted] - reference for surface in surfaces]
    has_value = [np.isfinite(e) for e in errors]
    compared = np.logical_and.reduce(has_value)
    codes = _codes(stratum[wanted], edges)
    found: ByStratum = {}
    for code in np.unique(codes).tolist():
        here = codes == code
        found[code] = tuple(
            Summary.of(e[here & compared], wanted=int(here.sum()), covered=int((here & has).sum()))
            for e, has in zip(errors, has_value, strict=True)
        )
    return found


def _codes(values: Array, edges: tuple[float, ...] | None) -> NDArray[np.int64]:
    if edges is None:
        return values.astype(np.int64)
    codes = np.digitize(values, edges) - 1
    codes[values == edges[-1]] = len(edges) - 2  # the last stratum is closed above
    codes[~((values >= edges[0]) & (values <= edges[-1]))] = _UNCLASSIFIED
    return codes.astype(np.int64)


def merge_strata(parts: Sequence[ByStratum]) -> ByStratum:
    """Return the strata of the union of `parts`."""
    return {
        code: tuple(map(Summary.merge, zip(*(p[code] for p in parts if code in p), strict=True)))
        for code in sorted(set().union(*parts))
    }


# --- Dask and xarray: no arithmetic on pixels ----------------------------------------------------


def evaluate(
    ds: xr.Dataset,
    refined: Refined,
    *,
    truth: str = "lidar_dsm",
    baseline: str | None = "dsm",
    by: By = None,
    mask: str | None = "valid",
) -> pd.DataFrame:
    """Return a table of error statistics, one row a surface (or a stratum and a surface), metres.

    The error is e = surface - truth: positive is too high. All surfaces are compared on the same
    pixels, those where the truth, the mask and *every* surface have a value, so that none wins by
    leaving out what is hard; ``coverage`` says what share of the pixels with truth and mask each
    has. Computes once, in one pass over the chunks; memory depends on the chunk: three of them at
    a time on one thread. With ``by="slope"`` a halo ties chunks together, and Dask keeps up to
    eight rows of chunks of the truth (measured on 8, 16 and 32 rows).

    Parameters
    ----------
    ds
        The scene, dims (y, x).
    refined
        A surface, a Dataset with the variable ``refined``, or a mapping of names to surfaces.
        Dims (y, x), metres, NaN no data, on the scene's grid to 1/1000 pixel.
    truth, baseline
        Layers of `ds`; the baseline is the first row (``None``: no such row).
    by
        ``"slope"`` (of the truth, degrees), ``"ndvi"`` or ``"canopy"`` (lidar_dsm - lidar_dtm,
        metres); a bool or integer layer's name or array (categories); or ``(name or array,
        edges)`` for strata [edge, next edge). Pixels in no stratum are ``unclassified``.
    mask
        A layer, usable where it is True (or 1); ``"valid"`` is ignored where it is missing.

    Returns
    -------
    pandas.DataFrame
        Index ``surface``, or ``stratum`` (``all`` first) and ``surface``. Columns: those of
        `METRICS`. ``count``, ``bias``, ``MAE``, ``RMSE`` and ``coverage`` are exact in float64.
        ``median``, ``MedAE``, ``LE90``, ``LE95`` come from a histogram: exact to 0.3 mm and
        ``NMAD`` (Höhle & Höhle 2009, table 2) to 0.9 mm where abs(e) <= 20 m, beyond it to
        1e-5 and 3e-5 of abs(e). No pixels: count 0, NaN. ``attrs``: settings and pixel counts.

    Raises
    ------
    ValueError
        A layer is missing, a surface is on another grid, or `by` has floats but no edges: the
        message names it and says what to do.

    Examples
    --------
    >>> z = xr.DataArray([[1.0, 2.0]], coords={"y": [0.0], "x": [0.0, 1.0]}, dims=("y", "x"))
    >>> scene = xr.Dataset({"dsm": z + 2, "lidar_dsm": z})
    >>> evaluate(scene, z + 1)["MAE"].to_dict()
    {'dsm': 2.0, 'refined': 1.0}
    """
    plan = plan_evaluation(ds, refined, truth=truth, baseline=baseline, by=by, mask=mask)
    return plan.table(plan.strata.compute())


@dataclass(frozen=True)
class Plan:
    """An evaluation that has not been computed.

    `strata` is a Dask array whose one block is a `ByStratum`: as an array, and not as a Delayed, it
    is optimised together with whatever it is computed with, so that no chunk is made twice.
    """

    strata: Any
    surfaces: tuple[str, ...]
    labels: dict[int, str] | None
    settings: dict[str, Any]

    def total(self, strata: ByStratum) -> dict[str, Summary]:
        """Return the summary of each surface over all strata."""
        parts = zip(*strata.values(), strict=True) if strata else [()] * len(self.surfaces)
        return dict(zip(self.surfaces, map(Summary.merge, parts), strict=True))

    def table(self, strata: ByStratum) -> pd.DataFrame:
        """Return the table of computed `strata`."""
        total = self.total(strata)
        rows = {("all", name): s for name, s in total.items()}
        if self.settings["by"] is not None:
            labels = self.labels or {code: str(code) for code in strata}
            if self.labels is not None and _UNCLASSIFIED in strata:
                labels = labels | {_UNCLASSIFIED: "unclassified"}
            for code, label in labels.items():
                here = {code: strata[code]} if code in strata else {}
                rows |= {(label, name): s for name, s in self.total(here).items()}
        table = pd.DataFrame(
            {metric: [f(s) for s in rows.values()] for metric, f in METRICS.items()},
            index=pd.MultiIndex.from_tuples(rows, names=["stratum", "surface"]),
        )
        if self.settings["by"] is None:
            table = table.droplevel("stratum")
        any_surface = next(iter(total.values()))
        table.attrs = self.settings | {
            "truth_pixels": any_surface.wanted,
            "compared_pixels": any_surface.count,
        }
        return table


def plan_evaluation(
    ds: xr.Dataset,
    refined: Refined,
    *,
    truth: str = "lidar_dsm",
    baseline: str | None = "dsm",
    by: By = None,
    mask: str | None = "valid",
) -> Plan:
    """Return what `evaluate` computes, not yet computed: figures join it to their own one pass."""
    reference = layer_of(ds, truth, "truth")
    surfaces = {} if baseline is None else {baseline: layer_of(ds, baseline, "baseline")}
    for key, surface in surfaces_of(refined).items():
        if key in surfaces:
            raise ValueError(f"two surfaces are called {key!r}: pass a mapping of other names")
        surfaces[key] = on_grid_of(ds, surface, key)
    if mask == "valid" and mask not in ds:
        mask = None
    name, stratum, edges = _stratification(ds, by, truth)
    usable = xr.ones_like(reference, bool) if mask is None else layer_of(ds, mask, "mask")
    first, *others = _chunked_alike([reference, usable, stratum, *surfaces.values()])
    # The blocks are summaries, not arrays: they are only ever used as the tasks behind them.
    blocks = first.map_blocks(summarise, *others, edges=edges, dtype=object, meta=np.empty((0, 0)))
    tasks = blocks.to_delayed(optimize_graph=False)
    # Merged in square tiles and not row by row: Dask then finishes one region before the next, and
    # of the truth, which the slope needs with a halo, it keeps a front and not half the raster.
    merge = delayed(merge_strata, pure=True)
    while tasks.size > 1:
        tasks = np.array([
            [
                merge(tasks[y : y + _TILE, x : x + _TILE].ravel().tolist())
                for x in range(0, tasks.shape[1], _TILE)
            ]
            for y in range(0, tasks.shape[0], _TILE)
        ], dtype=object)  # fmt: skip
    settings = {"truth": truth, "baseline": baseline, "mask": mask, "by": name, "units": "m"}
    labels = None if edges is None else dict(enumerate(_labels(edges)))
    if labels is None and stratum.dtype.kind == "b":
        labels = {0: "False", 1: "True"}
    strata = da.from_delayed(tasks[0, 0], shape=(), dtype=object, meta=np.empty((), object))
    return Plan(strata, tuple(surfaces), labels, settings | {"pixels": reference.size})


def layer_of(ds: xr.Dataset, name: str, role: str) -> xr.DataArray:
    """Return the layer `name` of `ds` with dims (y, x), or raise a ValueError that names it."""
    if name not in ds.data_vars:
        raise ValueError(
            f"the scene has no layer {name!r} (asked for as {role}); it has "
            f"{sorted(map(str, ds.data_vars))}: pass {role}= one of them"
        )
    return ds[name].transpose("y", "x")


def surfaces_of(refined: Refined) -> dict[str, xr.DataArray]:
    """Return the surfaces in `refined` by their names."""
    if isinstance(refined, xr.Dataset):
        return {"refined": layer_of(refined, "refined", "refined surface")}
    if isinstance(refined, xr.DataArray):
        return {str(refined.name or "refined"): refined}
    if isinstance(refined, Mapping) and refined:
        return {str(name): surface for name, surface in refined.items()}
    raise ValueError(
        f"refined must be a DataArray, a Dataset with `refined` or a mapping of names to "
        f"DataArrays, got {type(refined).__name__}"
    )


def on_grid_of(ds: xr.Dataset, surface: xr.DataArray, name: str) -> xr.DataArray:
    """Return `surface` with dims (y, x), or raise a ValueError where it is not on the grid of `ds`.

    xarray would align by the intersection of equal coordinates and drop the rest in silence.
    """
    cure = "; bring it onto the scene's grid first, e.g. with deepdem.stack(..., like=scene)"
    if set(surface.dims) != {"y", "x"} or any(surface.sizes[d] != ds.sizes[d] for d in ("y", "x")):
        raise ValueError(
            f"{name!r} has sizes {dict(surface.sizes)}, the scene has "
            f"{{'y': {ds.sizes['y']}, 'x': {ds.sizes['x']}}}{cure}"
        )
    for dim in ("y", "x"):
        want, got = ds[dim].to_numpy(), surface[dim].to_numpy()
        pixel = abs(want[-1] - want[0]) / max(want.size - 1, 1) or 1.0
        off = float(np.max(np.abs(got - want)) / pixel)
        if not off <= 1e-3:
            raise ValueError(
                f"{name!r} is {off:.3g} pixels off the scene along {dim!r}: it starts at {got[0]}, "
                f"the scene at {want[0]} (wanted within 0.001 pixel){cure}"
            )
    return surface.transpose("y", "x")


def _chunked_alike(layers: Sequence[xr.DataArray]) -> list[Any]:
    """Return the layers as Dask arrays of the same chunks."""
    lazy = [a if a.chunks is not None else a.chunk({"y": 2048, "x": 2048}) for a in layers]
    return [a.data for a in xr.unify_chunks(*lazy)]


# --- strata --------------------------------------------------------------------------------------


def _canopy(ds: xr.Dataset, _truth: str) -> xr.DataArray:
    top, ground = (layer_of(ds, name, "canopy") for name in ("lidar_dsm", "lidar_dtm"))
    return top - ground


#: Stratifications by name: the edges, and what makes the values where the scene has no such layer.
#: Canopy is open below: lidar surfaces dip a few centimetres under their own ground.
STRATA: dict[str, tuple[tuple[float, ...], Callable[[xr.Dataset, str], xr.DataArray]]] = {
    "slope": ((0, 5, 10, 20, 40, 90), lambda ds, truth: slope(layer_of(ds, truth, "truth"))),
    "ndvi": ((-1, 0.2, 0.4, 0.6, 1), lambda ds, _: layer_of(ds, "ndvi", "by")),
    "canopy": ((-math.inf, 2, 10, 20, math.inf), _canopy),
}


def _stratification(
    ds: xr.Dataset, by: By, truth: str
) -> tuple[str | None, xr.DataArray, tuple[float, ...] | None]:
    """Return the name, the values and the edges (None: categories) of `by`."""
    if by is None:
        return None, xr.zeros_like(layer_of(ds, truth, "truth"), np.int8), None
    source, edges = by if isinstance(by, tuple) else (by, None)
    if isinstance(source, xr.DataArray):
        name = str(source.name or "by")
        values = on_grid_of(ds, source, name)
    else:
        name = source
        # A layer `slope` is that of the initial surface; errors are grouped by the truth's.
        if name in STRATA and (name not in ds or (name == "slope" and edges is None)):
            values = STRATA[name][1](ds, truth)
        else:
            values = layer_of(ds, name, "by")
        if edges is None and name in STRATA:
            edges = STRATA[name][0]
    if edges is None and values.dtype.kind not in "bui":
        raise ValueError(
            f"by={name!r} has dtype {values.dtype}: strata of a continuous layer need edges, e.g. "
            f"by=({name!r}, [0, 10, 20]); categories must be bool or integer"
        )
    limits = None if edges is None else tuple(float(e) for e in edges)
    if limits is not None and (len(limits) < 2 or any(np.diff(limits) <= 0)):
        raise ValueError(f"edges of by={name!r} must be two or more and ascend, got {edges}")
    return name, values, limits


def _labels(edges: tuple[float, ...]) -> list[str]:
    def label(low: float, high: float) -> str:
        if math.isinf(low):
            return "any" if math.isinf(high) else f"below {high:g}"
        return f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"

    return [label(low, high) for low, high in pairwise(edges)]

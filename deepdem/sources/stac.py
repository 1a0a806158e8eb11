"""Layers from STAC catalogues on a scene's grid: vegetation from HLS, 3DEP lidar surfaces.

Items are found by pystac-client, and stackstac makes of them one lazy array of time, band, y, x.
"""

# Of stackstac's defaults none will do here: corners for pixel centres, bounds moved to multiples of
# the resolution, a 404 that becomes no data in silence, metadata that no Zarr attribute can hold,
# a missing asset that is passed over, a transformer between CRSs good to an eighth of a pixel.

from __future__ import annotations

import datetime as dt
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from affine import Affine
from dask._task_spec import convert_legacy_graph  # not public, but its tasks are
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.local import get_sync
from dask.task_spec import DataNode
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from odc.geo.xr import xr_coords

from deepdem.derive import hls_bands
from deepdem.derive import hls_ndvi as ndvi_of_bands
from deepdem.grid import flat, grid_from, pixel_size_m, regrid
from deepdem.layers import describe
from deepdem.sources._assets import AssetReader, Reading, packed

__all__ = [
    "FMASK_BITS",
    "PLANETARY_COMPUTER",
    "clear_sky",
    "hls_ndvi",
    "lidar_3dep",
    "load_items",
    "reduce_time",
    "search_items",
]

Array = NDArray[Any]

PLANETARY_COMPUTER = "https://planetarycomputer.microsoft.com/api/stac/v1"
#: The bits of HLS's ``Fmask`` (HLS User Guide 2.0, table 9). Bits 6 and 7 are the aerosol level.
FMASK_BITS = {"cirrus": 0, "cloud": 1, "adjacent": 2, "shadow": 3, "snow": 4, "water": 5}
_FMASK_FILL, _HLS_FILL, _HLS_PIXEL_M = 255, -9999, 30.0
# A task reads all times of one band: 100 of them are 26 MB.
_HLS_CHUNK_PX = 256
# Of the many tiles of a survey that one task may hold, bytes.
_MOSAIC_BYTES = 128e6
_HLS_COLLECTIONS = {"L30": "hls2-l30", "S30": "hls2-s30"}
#: How `reduce_time` makes one of several.
REDUCTIONS = ("median", "mean", "first", "best")


# --- kernels: NumPy only -------------------------------------------------------------------------


def clear_sky(fmask: Array, hide: Iterable[str] = ("cloud", "adjacent", "shadow", "snow")) -> Array:
    """Return where an HLS ``Fmask`` has none of the bits named in `hide`; bool, False for no data.

    Parameters
    ----------
    fmask
        The codes, integers or floats; NaN and 255 are no data.
    hide
        Names of `FMASK_BITS`.

    Raises
    ------
    ValueError
        A name is not known.

    Examples
    --------
    >>> clear_sky(np.array([0b00000000, 0b00000010, 0b11000000, 255]))
    array([ True, False,  True, False])
    """
    names = list(hide)
    if unknown := [name for name in names if name not in FMASK_BITS]:
        raise ValueError(f"Fmask has no bits {unknown}: pass some of {', '.join(FMASK_BITS)}")
    known = np.isfinite(fmask) & (np.asarray(fmask) != _FMASK_FILL)
    codes = np.where(known, fmask, 0).astype(np.uint8)
    bits = sum(1 << FMASK_BITS[name] for name in set(names))
    clear: Array = known & ((codes & np.uint8(bits)) == 0)
    return clear


def _first(stack: Array) -> Array:
    """Return along the first axis the first value that is known."""
    out: Array = stack[0].copy()
    for plane in stack[1:]:
        out = np.where(np.isnan(out), plane, out)
    return out


def _reduced(stack: Array, *, groups: tuple[tuple[int, ...], ...], how: str) -> Array:
    mosaics = np.stack([_first(stack[list(group)]) for group in groups])
    if how in ("first", "best"):
        return _first(mosaics)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty slice")
        reduced: Array = (np.nanmedian if how == "median" else np.nanmean)(mosaics, axis=0)
    return reduced.astype(np.float32)


# --- items ---------------------------------------------------------------------------------------


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"STAC catalogues need {name}: pip install 'deepdem[stac]'") from error


def search_items(
    catalog: Any,
    like: GeoBox | xr.Dataset | xr.DataArray,
    collections: Sequence[str],
    *,
    datetime: str | None = None,
    max_cloud: float | None = None,
    **options: Any,
) -> list[Any]:
    """Return the items of a STAC catalogue over a grid, the oldest first; asks the catalogue.

    Parameters
    ----------
    catalog
        The URL of a STAC API, or a `pystac_client.Client`.
    like
        A scene, a DataArray or a GeoBox: the place.
    collections
        Their ids.
    datetime
        As pystac-client has it: ``"2023-06-01/2023-09-30"``, ``"2023"``.
    max_cloud
        Percent: items whose ``eo:cloud_cover`` is more are left out. Looked at here, since not
        every catalogue can.
    options
        More for `pystac_client.Client.search`.

    Returns
    -------
    list of pystac.Item

    Raises
    ------
    ValueError
        There is none; the message says where and when.
    ImportError
        ``pip install 'deepdem[stac]'``.
    """
    client = catalog
    if isinstance(catalog, str):
        client = _extra("pystac_client").Client.open(catalog)
    box = flat(grid_from(like)).footprint("EPSG:4326").boundingbox
    found = client.search(
        collections=list(collections), bbox=list(box.bbox), datetime=datetime, **options
    )
    items = {(item.collection_id, item.id): item for item in found.items()}
    clear = [
        item for item in items.values()
        if max_cloud is None or item.properties.get("eo:cloud_cover", 0) <= max_cloud
    ]  # fmt: skip
    if not clear:
        raise ValueError(
            f"no item in {', '.join(collections)} of {catalog} over {_pretty(box)}, "
            f"datetime={datetime!r}: {len(items)} are there, those with more cloud than "
            f"max_cloud={max_cloud} left out; pass other dates or collections, or more cloud"
        )
    return sorted(clear, key=lambda item: (_when(item), item.id))


def _pretty(box: BoundingBox) -> str:
    return (
        f"longitude {box.left:.4f} to {box.right:.4f}, latitude {box.bottom:.4f} to {box.top:.4f}"
    )


def _when(item: Any) -> str:
    """Return an item's time as UTC without a zone; of a span its end."""
    spans = [item.properties.get(key) for key in ("end_datetime", "start_datetime")]
    text = next((t for t in spans if t), None)
    moment = item.datetime or (text and dt.datetime.fromisoformat(text))
    if moment is None:
        raise ValueError(f"item {item.id!r} has no time: it needs datetime or end_datetime")
    if moment.tzinfo is not None:
        moment = moment.astimezone(dt.UTC).replace(tzinfo=None)
    return str(moment.isoformat())


def load_items(
    items: Sequence[Any],
    like: GeoBox | xr.Dataset | xr.DataArray,
    assets: Sequence[str],
    *,
    resampling: str | Mapping[str, str] = "bilinear",
    nodata: float | Mapping[str, float] | None = None,
    rescale: bool = True,
    chunks: int | tuple[int, int, int, int] = 2048,
    sign: Callable[[str], str] | None = None,
    errors: str = "raise",
    tries: int = 5,
    backoff_s: float = 0.5,
    gdal: Mapping[str, str] | None = None,
) -> xr.DataArray:
    """Return assets of STAC items on the grid of `like`, lazy: no pixel is read.

    Pixels are brought onto the grid as `deepdem.stack` does it, whatever the chunks.

    Parameters
    ----------
    items
        As `search_items` gives them.
    like
        A scene, a DataArray or a GeoBox: the grid, which is kept to the bit.
    assets
        Their keys; each has one band.
    resampling
        One for all, or one an asset (nearest for codes); names of `rasterio.enums.Resampling`.
    nodata
        What is no data beside what the file itself says, for all or by asset.
    rescale
        Whether ``raster:bands`` scales and offsets in the items are applied.
    chunks
        The width of the result's chunks, one item and one asset each; or the sizes (time, band,
        y, x), -1 for all. Of chunks of one item Dask reads many before it uses any: for a result
        larger than memory pass all times in one chunk.
    sign
        Takes a URL, gives one that can be read now (for example
        ``planetary_computer.sign_url``). It is asked at every read and every try: what expires
        in mid-job is signed again. It should keep a token while that is good.
    errors
        ``"raise"``, or ``"nan"``: what cannot be read in `tries` becomes no data, with a
        warning that counts.
    tries, backoff_s
        How often a read is tried; seconds before the second try, doubled for each further one.
    gdal
        Options for GDAL, for example ``{"GDAL_HTTP_HEADERS": "Authorization: Bearer …"}``.

    Returns
    -------
    DataArray
        Dims (time, band, y, x), float32, NaN for no data.
        Coordinates: ``time`` (UTC), ``id``, ``band``, and y, x (pixel centres) and
        ``spatial_ref`` of the grid.

    Raises
    ------
    ValueError
        There is no item, an item lacks an asset, or none overlaps the grid.
    OSError
        When computed: a read that failed; the message names the item.
    ImportError
        ``pip install 'deepdem[stac]'``.
    """
    stackstac, grid = _extra("stackstac"), grid_from(like)
    if not items:
        raise ValueError("no item: pass those that search_items gives")
    reading = Reading(
        grid=flat(grid), sign=sign, errors=errors, tries=tries, backoff_s=backoff_s,  # type: ignore[arg-type]  # checked there
        gdal=dict(gdal or {}),
    )  # fmt: skip
    how = partial(_plain, assets=list(assets), grid=flat(grid), resampling=resampling,
                  nodata=nodata, rescale=rescale)  # fmt: skip
    plain = [how(item) for item in items]
    left, bottom, right, top = grid.boundingbox.bbox
    if not any(_overlap(item["properties"]["proj:bbox"], grid) for item in plain):
        raise ValueError(f"none of {len(plain)} items overlaps the grid {grid.boundingbox}")
    stacked = stackstac.stack(
        plain, assets=list(assets), epsg=_EPSG, bounds=(left, bottom, right, top),
        resolution=(abs(grid.resolution.x), abs(grid.resolution.y)), snap_bounds=False,
        chunksize=chunks, dtype=np.dtype(np.float32), fill_value=np.float32(np.nan),
        rescale=False, sortby_date=False, xy_coords=False, properties=False, band_coords=False,
        errors_as_nodata=(), reader=partial(AssetReader, reading),
    )  # fmt: skip
    assert stacked.shape[2:] == tuple(grid.shape), (stacked.shape, grid.shape)
    stacked = stacked.copy(data=_with_readers(stacked.data))
    kept: xr.DataArray = stacked.drop_vars("epsg").assign_coords(xr_coords(grid, always_yx=True))
    kept.attrs = {}
    kept.encoding = {"grid_mapping": "spatial_ref"}
    kept.name = None
    return kept


def _with_readers(data: da.Array) -> da.Array:
    """Return the array of `stackstac.stack`, its readers made and held by the tasks that read.

    Where one task makes the readers of all chunks, Dask reads every chunk before it goes on with
    the first: memory would grow with the scene. A reader holds a URL and settings, nothing open.
    """
    graph = convert_legacy_graph(dict(data.__dask_graph__()))
    keys = [key for key in graph if isinstance(key, tuple) and key[0] == data.name]
    makers = sorted({maker for key in keys for maker in graph[key].dependencies})
    readers = {m: DataNode(m, r) for m, r in zip(makers, get_sync(graph, makers), strict=True)}
    layer: dict[Any, Any] = {key: graph[key].substitute(readers) for key in keys}
    high = HighLevelGraph.from_collections(data.name, layer, dependencies=[])
    return da.Array(high, data.name, data.chunks, dtype=data.dtype)


# stackstac wants a code and asks no more of it than that items have the same. So grids whose CRS
# has none are served too; what the pixels' CRS is, the reader knows.
_EPSG = 3857


def _plain(
    item: Any, *, assets: Sequence[str], grid: GeoBox, resampling: str | Mapping[str, str],
    nodata: float | Mapping[str, float] | None, rescale: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return what stackstac needs of an item, its place given in the grid's CRS."""
    if missing := [key for key in assets if key not in item.assets]:
        raise ValueError(
            f"item {item.id!r} lacks the assets {missing}: it has {sorted(item.assets)}"
        )
    plain = {}
    for key in assets:
        asset = item.assets[key]
        bands = asset.extra_fields.get("raster:bands") or [{}]
        plain[key] = {"href": packed(
            asset.get_absolute_href() or asset.href, item=item.id, asset=key,
            resampling=resampling if isinstance(resampling, str) else resampling[key],
            nodata=nodata.get(key) if isinstance(nodata, Mapping) else nodata,
            scale=float(bands[0].get("scale", 1.0)) if rescale else 1.0,
            offset=float(bands[0].get("offset", 0.0)) if rescale else 0.0,
        )}  # fmt: skip
    west, south, east, north = _two_d(item.bbox)
    crs: Any = grid.crs
    place = BoundingBox(west, south, east, north, crs="EPSG:4326").to_crs(crs)
    # An item's box is rounded, and a straight line of one CRS is none in another.
    margin = 0.02 * max(place.right - place.left, place.top - place.bottom)
    place = place.buffered(margin + 2 * abs(grid.resolution.x))
    return {
        "id": item.id, "bbox": list(item.bbox), "assets": plain,
        "properties": {"datetime": _when(item), "proj:epsg": _EPSG, "proj:bbox": place.bbox},
    }  # fmt: skip


def _two_d(bbox: Sequence[float]) -> Sequence[float]:
    return bbox if len(bbox) == 4 else [bbox[0], bbox[1], bbox[3], bbox[4]]


def _overlap(place: Sequence[float], grid: GeoBox) -> bool:
    box = grid.boundingbox
    return bool(place[0] < box.right and box.left < place[2]
                and place[1] < box.top and box.bottom < place[3])  # fmt: skip


def reduce_time(
    stack: xr.DataArray, how: str = "median", *, cloud: Mapping[str, float] | None = None
) -> xr.DataArray:
    """Return one layer of several times, lazy: items of one day are first made one mosaic.

    Parameters
    ----------
    stack
        Dims (time, y, x), with the coordinates ``time`` and ``id``; NaN no data.
    how
        ``"median"`` or ``"mean"`` of the days; ``"first"``: at each pixel the first day that
        has something; ``"best"``: the same, the day with the least cloud first.
    cloud
        For ``"best"``: percent by item id.

    Returns
    -------
    DataArray
        Dims (y, x), float32, NaN where there is nothing at any time.

    Raises
    ------
    ValueError
        `how` is not known.
    """
    if how not in REDUCTIONS:
        raise ValueError(f"reduce={how!r}: pass one of {', '.join(REDUCTIONS)}")
    days: dict[str, list[int]] = {}
    for n, moment in enumerate(stack["time"].values):
        days.setdefault(np.datetime_as_string(moment, unit="D"), []).append(n)
    groups = [tuple(days[day]) for day in sorted(days)]
    if how == "best":
        percent = cloud or {}
        ids = [str(i) for i in stack["id"].values]
        groups.sort(key=lambda g: (float(np.mean([percent.get(ids[n], 0.0) for n in g])), g))
    whole = stack.transpose("time", "y", "x")
    data = (whole if whole.chunks is not None else whole.chunk()).data.rechunk({0: -1})
    out = stack.isel(time=0, drop=True).transpose("y", "x")
    reduced = data.map_blocks(
        _reduced, drop_axis=0, groups=tuple(groups), how=how, dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
    )  # fmt: skip
    return out.copy(data=reduced)


# --- layers --------------------------------------------------------------------------------------


def hls_ndvi(
    like: GeoBox | xr.Dataset | xr.DataArray,
    datetime: str,
    *,
    catalog: Any = PLANETARY_COMPUTER,
    products: Mapping[str, str] | Sequence[str] = ("L30", "S30"),
    max_cloud: float | None = 50.0,
    hide: Sequence[str] = ("cloud", "adjacent", "shadow", "snow"),
    reduce: str = "median",
    chunks: int = 2048,
    **options: Any,
) -> xr.DataArray:
    """Return the vegetation index of a season from HLS on the grid of `like`, lazy.

    The catalogue is asked when it is called; pixels are read when it is computed. HLS has pixels
    of 30 m: clouds are taken out and times reduced on a grid of about that size whose pixels are
    whole numbers of those of `like`, and the one layer that is left is brought onto `like`.

    Parameters
    ----------
    like
        A scene, a DataArray or a GeoBox: the grid.
    datetime
        For example ``"2023-06-01/2023-09-30"``.
    catalog
        The URL of a STAC API or a `pystac_client.Client`. The Planetary Computer wants
        ``sign=planetary_computer.sign_url``; NASA's ``https://cmr.earthdata.nasa.gov/stac/LPCLOUD``
        the products ``{"L30": "HLSL30_2.0", "S30": "HLSS30_2.0"}`` and a token in ``gdal=``.
    products
        ``"L30"`` (Landsat: B04 and B05), ``"S30"`` (Sentinel-2: B04 and B8A), or both; or a
        mapping of them to the catalogue's collections.
    max_cloud
        Percent, of an item.
    hide
        Names of `FMASK_BITS`: pixels with one of these bits count as no data.
    reduce
        ``"median"``, ``"mean"``, ``"first"`` or ``"best"``, see `reduce_time`.
    chunks
        The width of the result's chunks.
    options
        `sign`, `errors`, `tries`, `backoff_s`, `gdal` of `load_items`.

    Returns
    -------
    DataArray
        ``ndvi``, dims (y, x), float32, units 1, NaN where no time is clear. ``attrs`` say which
        items it is made of.

    Raises
    ------
    ValueError
        There is no item, or a product, bit or reduction is not known.
    OSError
        When computed: a read that failed; the message names the item.

    Examples
    --------
    >>> ds = ds.assign(ndvi=hls_ndvi(ds, "2015-07", sign=planetary_computer.sign_url))
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: pass one of {', '.join(REDUCTIONS)}")
    clear_sky(np.zeros(1), hide)  # an unknown name is said before the catalogue is asked
    grid = grid_from(like)
    coarse = _coarser(grid, _HLS_PIXEL_M)
    named = products if isinstance(products, Mapping) else {
        product: _HLS_COLLECTIONS.get(product, product) for product in products
    }  # fmt: skip
    of = {collection: hls_bands(product) for product, collection in named.items()}
    items = search_items(catalog, coarse, list(of), datetime=datetime, max_cloud=max_cloud)
    series = [
        _hls_series([i for i in items if i.collection_id == collection], coarse, bands, hide,
                    options)
        for collection, bands in of.items()
        if any(i.collection_id == collection for i in items)
    ]  # fmt: skip
    stack = xr.concat(series, dim="time").sortby(["time", "id"])
    cloud = {item.id: float(item.properties.get("eo:cloud_cover", 0)) for item in items}
    one = reduce_time(stack, reduce, cloud=cloud).rename("ndvi")
    # Joining the products has lost the CRS, which is in the attributes of a coordinate.
    one = one.assign_coords(xr_coords(coarse, always_yx=True))
    layer = regrid(one, grid, resampling="bilinear", chunks=chunks)
    return _dressed(layer, "ndvi", "HLS", items, {
        "deepdem_datetime": datetime, "deepdem_reduce": reduce, "deepdem_hidden": list(hide),
    })  # fmt: skip


def _hls_series(
    items: Sequence[Any], grid: GeoBox, bands: tuple[str, str], hide: Sequence[str],
    options: Mapping[str, Any],
) -> xr.DataArray:  # fmt: skip
    red, nir = bands
    loaded = load_items(
        items, grid, [red, nir, "Fmask"], rescale=False,  # hls_ndvi scales digital numbers
        resampling={red: "bilinear", nir: "bilinear", "Fmask": "nearest"},
        nodata={red: _HLS_FILL, nir: _HLS_FILL, "Fmask": _FMASK_FILL},
        chunks=(-1, 1, _HLS_CHUNK_PX, _HLS_CHUNK_PX), **options,
    )  # fmt: skip
    by_band = {key: loaded.sel(band=key, drop=True) for key in (red, nir, "Fmask")}
    clear = xr.apply_ufunc(
        clear_sky, by_band["Fmask"], kwargs={"hide": tuple(hide)}, dask="parallelized",
        output_dtypes=[np.bool_],
    )  # fmt: skip
    return ndvi_of_bands(by_band[red], by_band[nir]).where(clear)


def _coarser(grid: GeoBox, pixel_m: float) -> GeoBox:
    """Return a grid of pixels of at most `pixel_m` that are whole numbers of the grid's.

    It is a pixel wider all round, so that what is interpolated from it has neighbours.
    """
    # A nominal ten metres may be 10.004 on the ground, and goes into thirty all the same.
    factor = max(1, math.floor(1.01 * pixel_m / pixel_size_m(grid)))
    rows, columns = (-(-n // factor) + 2 for n in (grid.shape.y, grid.shape.x))
    transform = grid.transform * Affine.translation(-factor, -factor) * Affine.scale(factor)
    return GeoBox((rows, columns), transform, grid.crs)


def lidar_3dep(
    like: GeoBox | xr.Dataset | xr.DataArray,
    kind: str = "dsm",
    *,
    catalog: Any = PLANETARY_COMPUTER,
    collection: str | None = None,
    asset: str = "data",
    datetime: str | None = None,
    resampling: str = "bilinear",
    chunks: int = 2048,
    **options: Any,
) -> xr.DataArray:
    """Return the USGS 3DEP lidar surface or ground, as rasters, on the grid of `like`, lazy.

    The catalogue is asked when it is called; pixels are read when it is computed. Where several
    items cover a pixel the newest that has something there counts. From points themselves:
    `deepdem.grid_points`.

    Parameters
    ----------
    like
        A scene, a DataArray or a GeoBox: the grid.
    kind
        ``"dsm"`` (first returns) or ``"dtm"`` (bare ground).
    catalog, datetime, options
        As in `hls_ndvi`.
    collection, asset
        Default: ``3dep-lidar-dsm`` or ``3dep-lidar-dtm`` and ``data``, as the Planetary Computer
        has them.
    resampling
        A name of `rasterio.enums.Resampling`.
    chunks
        The width of the result's chunks at most: less where there are many items, each of which
        a task may hold.

    Returns
    -------
    DataArray
        ``lidar_dsm`` or ``lidar_dtm``, dims (y, x), float32, metres above the vertical datum of
        the rasters, NaN no data. ``attrs`` say which items it is made of.

    Raises
    ------
    ValueError
        `kind` is neither, or there is no item.
    OSError
        When computed: a read that failed; the message names the item.

    Examples
    --------
    >>> ds = ds.assign(lidar_dsm=lidar_3dep(ds, "dsm", sign=planetary_computer.sign_url))
    """
    name = {"dsm": "lidar_dsm", "dtm": "lidar_dtm"}.get(kind.removeprefix("lidar_"))
    if name is None:
        raise ValueError(f"kind={kind!r}: pass 'dsm' or 'dtm'")
    grid = grid_from(like)
    where = collection or f"3dep-lidar-{name.removeprefix('lidar_')}"
    items = search_items(catalog, grid, [where], datetime=datetime)[::-1]
    width = 256 * max(1, math.floor(math.sqrt(_MOSAIC_BYTES / (4 * len(items))) / 256))
    cut = (-1, 1, min(chunks, width), min(chunks, width))
    loaded = load_items(items, grid, [asset], resampling=resampling, chunks=cut, **options)
    tiles = loaded.sel(band=asset, drop=True)
    newest = tiles.isel(time=0, drop=True).rename(name)
    newest = newest.copy(data=tiles.data.map_blocks(
        _first, drop_axis=0, dtype=np.float32, meta=np.empty((0, 0), np.float32)
    ))  # fmt: skip
    return _dressed(newest, name, "3DEP", items, {
        "deepdem_collection": where, "deepdem_resampling": resampling,
    })  # fmt: skip


def _dressed(
    layer: xr.DataArray, name: str, source: str, items: Sequence[Any], more: Mapping[str, Any]
) -> xr.DataArray:
    """Return the layer with what it is and what it was made of; a run is resumed by the latter."""
    assert isinstance(layer.data, da.Array)
    word = describe(name)
    layer.attrs = {
        "long_name": word.long_name, "units": word.units, "deepdem_source": source,
        "deepdem_items": [item.id for item in items], **more,
    }  # fmt: skip
    # Not written anywhere: what `deepdem.write` needs to know whether the items have changed.
    made_of = [(i.collection_id, i.id, i.properties.get("updated"), sorted(
        (key, asset.href.split("?")[0]) for key, asset in i.assets.items()
    )) for i in items]  # fmt: skip
    stamp = np.frombuffer(bytes.fromhex(tokenize(name, made_of)), dtype=np.uint64, count=1)
    layer.encoding = {
        "grid_mapping": "spatial_ref",
        "deepdem_inputs": da.full(layer.data.numblocks, stamp[0] | 1, np.uint64, chunks=1),
    }
    return layer

"""The commands of ``deepdem fetch``: a layer from elsewhere onto a grid, each resumable."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["fetch"]

fetch = typer.Typer(no_args_is_help=True, help="Bring a layer from elsewhere onto a grid.")
console = Console()

Like = Annotated[str | None, typer.Option(help="The grid: a scene, x.zarr, or a raster.")]
Group = Annotated[str | None, typer.Option(help="The scene's name in the store of --like.")]
Bounds = Annotated[
    tuple[float, float, float, float] | None,
    typer.Option(help="Instead of --like: left bottom right top, in --crs."),
]
Resolution = Annotated[float | None, typer.Option(help="With --bounds: of a pixel, in --crs.")]
Crs = Annotated[str | None, typer.Option(help="With --bounds: for example EPSG:32610.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@fetch.command()
def lidar(
    source: Annotated[
        str,
        typer.Argument(
            help="A LAS, LAZ or COPC file, a pattern of them, an ept.json, by path or URL; or "
            "3dep: the public collections over the place."
        ),
    ],
    out: Annotated[str, typer.Argument(help="What to write: x.tif, a COG, or x.zarr.")],
    kind: Annotated[
        str, typer.Option(help="lidar_dsm, lidar_dtm, intensity or density.")
    ] = "lidar_dsm",
    like: Like = None,
    group: Group = None,
    bounds: Bounds = None,
    resolution: Resolution = None,
    crs: Crs = None,
    method: Annotated[
        str | None, typer.Option(help="percentile, max, mean, idw; of ground tin or idw.")
    ] = None,
    percentile: Annotated[float, typer.Option(help="In a pixel.")] = 98.0,
    max_gap: Annotated[float | None, typer.Option(help="Metres that are interpolated.")] = None,
    ground: Annotated[str, typer.Option(help="auto, classes or smrf.")] = "auto",
    water: Annotated[bool, typer.Option("--water", help="Class 9 is ground, too.")] = False,
    zscore: Annotated[float | None, typer.Option(help="Leave out outliers beyond it.")] = None,
    points_crs: Annotated[str | None, typer.Option(help="Instead of the files' own.")] = None,
    vertical_unit: Annotated[str | None, typer.Option(help="m, ft or us-ft.")] = None,
    index: Annotated[
        str | None, typer.Option(help="Of 3dep: another index, a path or URL of a GeoJSON.")
    ] = None,
    order: Annotated[str, typer.Option(help="Of 3dep: newest or densest first.")] = "newest",
    overwrite: Overwrite = False,
) -> None:
    """Grid lidar points. The same command goes on where it stopped."""
    from deepdem.fetch import target_grid, write_layer
    from deepdem.sources.lidar import USGS_3DEP, find_collections, grid_points

    grid = target_grid(like, group=group, bounds=bounds, resolution=resolution, crs=crs)
    points: Any = source
    if source == "3dep":
        points = find_collections(grid, index=index or USGS_3DEP, order=order)
        for c in points:
            year = c.year or "year unknown"
            console.print(f"{c.name} ({year}): {c.density:.1f} points/m², {c.covers:.0%} covered")
    layer = grid_points(
        points, grid, kind, method=method, percentile=percentile, max_gap=max_gap, ground=ground,
        water=water, zscore=zscore, crs=points_crs, vertical_unit=vertical_unit,
    )  # fmt: skip
    write_layer(layer, out, overwrite=overwrite)
    console.print(out)


Catalog = Annotated[str | None, typer.Option(help="The URL of a STAC API.")]
Sign = Annotated[
    str | None,
    typer.Option(
        help="A function that signs URLs, module:function; planetary_computer:sign_url for the "
        "default catalogue."
    ),
]
Errors = Annotated[
    str, typer.Option(help="raise, or nan: go without what cannot be read, and warn.")
]


def _stac_options(sign: str | None, errors: str, catalog: str | None) -> dict[str, Any]:
    import importlib

    options: dict[str, Any] = {"errors": errors}
    if catalog is not None:
        options["catalog"] = catalog
    if sign is not None:
        module, _, function = sign.partition(":")
        try:
            options["sign"] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"--sign {sign}: {error}; name it module:function, and install the module"
            ) from error
    return options


@fetch.command()
def hls(
    out: Annotated[str, typer.Argument(help="What to write: x.tif, a COG, or x.zarr.")],
    datetime: Annotated[str, typer.Option(help="For example 2023-06-01/2023-09-30.")],
    like: Like = None,
    group: Group = None,
    bounds: Bounds = None,
    resolution: Resolution = None,
    crs: Crs = None,
    catalog: Catalog = None,
    sign: Sign = None,
    product: Annotated[
        list[str] | None, typer.Option(help="L30, S30, or L30=collection; may be repeated.")
    ] = None,
    max_cloud: Annotated[float, typer.Option(help="Percent, of an item.")] = 50.0,
    reduce: Annotated[str, typer.Option(help="median, mean, first or best.")] = "median",
    errors: Errors = "raise",
    overwrite: Overwrite = False,
) -> None:
    """Make a vegetation index from HLS. The same command goes on where it stopped."""
    from deepdem.fetch import target_grid, write_layer
    from deepdem.sources.stac import hls_ndvi

    grid = target_grid(like, group=group, bounds=bounds, resolution=resolution, crs=crs)
    options = _stac_options(sign, errors, catalog)
    if product:
        named = {key: collection for key, _, collection in (p.partition("=") for p in product)}
        options["products"] = named if all(named.values()) else product
    layer = hls_ndvi(grid, datetime, max_cloud=max_cloud, reduce=reduce, **options)
    console.print(f"{len(layer.attrs['deepdem_items'])} items")
    write_layer(layer, out, overwrite=overwrite)
    console.print(out)


@fetch.command(name="lidar-3dep")
def lidar_rasters(
    out: Annotated[str, typer.Argument(help="What to write: x.tif, a COG, or x.zarr.")],
    kind: Annotated[str, typer.Option(help="dsm or dtm.")] = "dsm",
    like: Like = None,
    group: Group = None,
    bounds: Bounds = None,
    resolution: Resolution = None,
    crs: Crs = None,
    catalog: Catalog = None,
    sign: Sign = None,
    datetime: Annotated[str | None, typer.Option(help="Of the survey.")] = None,
    collection: Annotated[str | None, typer.Option(help="Instead of 3dep-lidar-dsm.")] = None,
    asset: Annotated[str, typer.Option(help="The key of the raster in an item.")] = "data",
    errors: Errors = "raise",
    overwrite: Overwrite = False,
) -> None:
    """Fetch 3DEP lidar surfaces that are rasters. The same command goes on where it stopped."""
    from deepdem.fetch import target_grid, write_layer
    from deepdem.sources.stac import lidar_3dep

    grid = target_grid(like, group=group, bounds=bounds, resolution=resolution, crs=crs)
    layer = lidar_3dep(
        grid, kind, datetime=datetime, collection=collection, asset=asset,
        **_stac_options(sign, errors, catalog),
    )  # fmt: skip
    console.print(f"{len(layer.attrs['deepdem_items'])} items")
    write_layer(layer, out, overwrite=overwrite)
    console.print(out)

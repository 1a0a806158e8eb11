"""Point clouds: LAS and LAZ files, COPC and EPT trees, read in part, from disk or by HTTP ranges.

What is read when: opening reads a header (and of EPT ``ept.json``); a tree's hierarchy is read
page by page as places are asked for, and kept by the process; points are read when they are
computed. laspy decodes.
"""

from __future__ import annotations

import copy
import glob
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import numpy as np
from numpy.typing import NDArray

from deepdem.sources._bytes import Options, beside, fetch, local, modified
from deepdem.sources._las_crs import Frame, frame_of, header_crs, named_crs

__all__ = ["Cloud", "CopcTree", "EptTree", "LasFile", "Raw", "open_clouds"]

#: (left, bottom, right, top) in a cloud's CRS.
Extent: TypeAlias = "tuple[float, float, float, float]"

# Points that are decoded at a time: ten LAZ chunks of the usual size, some 100 MB with all that
# is made of them.
_PIECE_POINTS = 500_000
_REQUESTS = 8


@dataclass(frozen=True)
class Raw:
    """Points as a file has them: coordinates in its CRS, and what decides which are used."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    z: NDArray[np.float64]
    intensity: NDArray[np.uint16]
    classes: NDArray[np.uint8]
    returns: NDArray[np.uint8]
    of_returns: NDArray[np.uint8]
    withheld: NDArray[np.bool_]

    @staticmethod
    def of(points: Any) -> Raw:
        """Take what is needed of laspy's points."""
        x, y, z = (np.asarray(getattr(points, axis), dtype=np.float64) for axis in "xyz")
        return Raw(
            x, y, z, np.asarray(points.intensity), np.asarray(points.classification, np.uint8),
            np.asarray(points.return_number), np.asarray(points.number_of_returns),
            np.asarray(points.withheld, dtype=bool),
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Raw]) -> Raw:
        """Return several in one, in order; without any, one without points."""
        if not parts:
            kinds = (float, float, float, np.uint16, np.uint8, np.uint8, np.uint8, bool)
            return Raw(*(np.empty(0, dtype=kind) for kind in kinds))
        names = [one.name for one in fields(Raw)]
        return Raw(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Cloud:
    """What a header says: enough to plan, nothing of the points.

    Attributes
    ----------
    url
        A path or URL.
    frame
        Its CRS, and what heights are.
    extent
        (left, bottom, right, top) in its CRS.
    count
        Points.
    version
        Differs if the file's content does.
    options
        For fsspec.
    """

    url: str
    frame: Frame
    extent: Extent
    count: int
    version: str
    options: Options = field(default=Options(), repr=False)


def laspy_module() -> Any:
    """Return laspy, with lazrs.

    Raises
    ------
    ImportError
        They are not installed: ``pip install "deepdem[lidar]"``.
    """
    try:
        import laspy
        import lazrs  # noqa: F401  # laspy looks for it when it is imported
    except ImportError as error:
        raise ImportError(
            'point clouds need laspy and lazrs: pip install "deepdem[lidar]"'
        ) from error
    return laspy


def _needed(laspy: Any) -> Any:
    """Return the layers of LAZ that `Raw` is made of; formats 0 to 5 have no layers to leave out.

    Without GPS times, scan angles and colours a point takes four fifths of the time.
    """
    layers = laspy.DecompressionSelection
    return (
        layers.XY_RETURNS_CHANNEL | layers.Z | layers.CLASSIFICATION | layers.FLAGS
        | layers.INTENSITY
    )  # fmt: skip


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Say of what cannot be decoded which file it is."""
    laspy = laspy_module()
    import lazrs

    try:
        yield
    except (laspy.LaspyException, lazrs.LazrsError) as error:
        raise ValueError(
            f"{url} is damaged or cut off ({error}): fetch it again, or leave it out"
        ) from error


# --- LAS and LAZ ---------------------------------------------------------------------------------


class LasFile(Cloud):
    """A file whose points are in any order: read from end to end, in pieces."""

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Give first and last point (exclusive) of each piece."""
        for start in range(0, self.count, _PIECE_POINTS):
            yield start, min(start + _PIECE_POINTS, self.count)

    def read(self, start: int, stop: int) -> Raw:
        """Return the points [start, stop)."""
        laspy = laspy_module()
        # Dask has a task for every core already: laspy's own threads would get in their way.
        with (
            _named(self.url),
            fsspec.open(self.url, "rb", **self.options) as file,
            laspy.open(
                file,
                laz_backend=laspy.LazBackend.Lazrs,
                closefd=False,
                decompression_selection=_needed(laspy),
            ) as reader,
        ):
            reader.seek(start)
            return Raw.of(reader.read_points(stop - start))

    def sample(self) -> Raw:
        """Return some points of the beginning, the middle and the end."""
        width = min(10_000, self.count)
        starts = np.linspace(0, self.count - width, 5).astype(int)
        return Raw.joined([self.read(start, start + width) for start in starts])


# --- trees ---------------------------------------------------------------------------------------


class _Stream:
    """What laspy's COPC reader needs of a file, by ranges that it asks for exactly."""

    # Header and VLRs of nearly every file, in one request.
    _HEAD = 8192

    def __init__(self, url: str, options: Mapping[str, Any]):
        self.url, self.options, self.at = url, options, 0
        self.held: dict[int, bytes] = {}

    def prefetch(self, ranges: list[tuple[int, int]]) -> None:
        """Fetch (offset, bytes) at once what will be read one after the other."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            parts = pool.map(lambda r: fetch(self.url, self.options, r[0], r[0] + r[1]), ranges)
            self.held.update(zip((offset for offset, _ in ranges), parts, strict=True))

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        assert whence == io.SEEK_SET
        self.at = at
        return at

    def tell(self) -> int:
        """Return the byte that comes next."""
        return self.at

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        start, self.at = self.at, self.at + size
        held = self.held.get(start)
        if held is not None and len(held) == size:
            return held
        if start + size > self._HEAD:
            return fetch(self.url, self.options, start, start + size)
        if -1 not in self.held:
            self.held[-1] = fetch(self.url, self.options, 0, self._HEAD)
        return self.held[-1][start : start + size]

    def close(self) -> None:
        """Let go of what was fetched."""
        self.held.clear()


@lru_cache(maxsize=32)
def _copc_reader(url: str, version: str, options: Options) -> Any:
    laspy = laspy_module()
    reader = laspy.CopcReader(_Stream(url, options), decompression_selection=_needed(laspy))
    reader.source.close()
    return reader


class CopcTree(Cloud):
    """A COPC file: the LAZ chunks are the nodes of an octree."""

    def read(self, extent: Extent, spacing: float | None) -> Raw:
        """Return at least the points within `extent` on the levels down to `spacing`."""
        laspy = laspy_module()
        # The pages of the hierarchy are the process's, the place in the file is the thread's.
        reader = copy.copy(_copc_reader(self.url, self.version, self.options))
        reader.source = _Stream(self.url, self.options)
        info, mins, maxs = reader.copc_info, reader.header.mins, reader.header.maxs
        clipped = _clip(extent, self.extent)
        # Not laspy's cut at the bounds, which rounds, but whole nodes.
        bounds = laspy.copc.Bounds(
            mins=np.array([clipped[0], clipped[1], mins[2]]),
            maxs=np.array([clipped[2], clipped[3], maxs[2]]),
        )
        levels = None if spacing is None else range(_depth(info.spacing, spacing) + 1)
        nodes = laspy.copc.load_octree_for_query(
            reader.source, info, reader.root_page, bounds, levels
        )
        ranges = _joined([(n.offset, n.byte_size) for n in nodes if n.point_count])
        reader.source.prefetch(ranges)
        with _named(self.url):
            return Raw.of(reader.query(bounds, level=levels))

    def sample(self) -> Raw:
        """Return the points of the root, which are spread over all of it."""
        return self.read(self.extent, math.inf)


def _depth(root: float, spacing: float) -> int:
    """Return the first level whose points are no farther apart than `spacing`."""
    return max(0, math.ceil(math.log2(root / spacing) - 1e-9)) if math.isfinite(spacing) else 0


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (offset, bytes) with those that follow each other joined, as laspy joins them."""
    out: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if out and sum(out[-1]) == offset:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((offset, size))
    return out


def _clip(extent: Extent, to: Extent) -> Extent:
    left, bottom, right, top = extent
    return max(left, to[0]), max(bottom, to[1]), min(right, to[2]), min(top, to[3])


@lru_cache(maxsize=4096)
def _ept_page(url: str, version: str, node: str, options: Options) -> dict[str, int]:
    page: dict[str, int] = json.loads(fetch(beside(url, f"ept-hierarchy/{node}.json"), options))
    return page


@dataclass(frozen=True)
class EptTree(Cloud):
    """An Entwine point tile tree: ``ept.json``, and a file for each node of an octree."""

    about: str = field(default="", repr=False)

    def nodes(self, extent: Extent, spacing: float | None) -> list[tuple[int, int, int, int]]:
        """Return the nodes (level, x, y, z) with points that may lie in `extent`."""
        about = json.loads(self.about)
        west, south, _, east = about["bounds"][:4]
        side = east - west
        deepest = math.inf if spacing is None else _depth(side / about["span"], spacing)
        left, bottom, right, top = extent
        found, todo = [], [((0, 0, 0, 0), "0-0-0-0")]
        while todo:
            (level, x, y, z), page = todo.pop()
            width = side / 2**level
            # A pixel holds its left and its upper edge, not the others.
            if (west + x * width >= right or west + (x + 1) * width < left
                    or south + y * width > top or south + (y + 1) * width <= bottom):  # fmt: skip
                continue
            key = f"{level}-{x}-{y}-{z}"
            count = _ept_page(self.url, self.version, page, self.options).get(key, 0)
            if count == -1:
                page = key
                count = _ept_page(self.url, self.version, page, self.options)[key]
            if count > 0:
                found.append((level, x, y, z))
            if count > 0 and level < deepest:
                todo += [
                    ((level + 1, 2 * x + i, 2 * y + j, 2 * z + k), page)
                    for i in (0, 1) for j in (0, 1) for k in (0, 1)
                ]  # fmt: skip
        return sorted(found)

    def read(self, extent: Extent, spacing: float | None) -> Raw:
        """Return at least the points within `extent` on the levels down to `spacing`."""
        about = json.loads(self.about)
        kind, ending = about["dataType"], {"laszip": "laz", "binary": "bin", "zstandard": "zst"}
        nodes = self.nodes(extent, spacing)
        names = ("-".join(map(str, node)) for node in nodes)
        urls = [beside(self.url, f"ept-data/{name}.{ending[kind]}") for name in names]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            files = list(pool.map(lambda url: fetch(url, self.options), urls))
        decode = _decode_laz if kind == "laszip" else _decode_binary
        with _named(self.url):
            return Raw.joined([decode(file, about) for file in files])

    def sample(self) -> Raw:
        """Return the points of the root, which are spread over all of it."""
        return self.read(self.extent, math.inf)


def _decode_laz(data: bytes, about: Mapping[str, Any]) -> Raw:
    laspy = laspy_module()
    with laspy.open(
        io.BytesIO(data), laz_backend=laspy.LazBackend.Lazrs,
        decompression_selection=_needed(laspy),
    ) as reader:  # fmt: skip
        return Raw.of(reader.read())


def _decode_binary(data: bytes, about: Mapping[str, Any]) -> Raw:
    if about["dataType"] == "zstandard":
        from numcodecs import Zstd  # type: ignore[import-untyped]  # Zarr brings it

        data = bytes(Zstd().decode(data))
    letters = {"signed": "i", "unsigned": "u", "float": "f"}
    schema = {d["name"]: d for d in about["schema"]}
    kind = np.dtype([(n, f"<{letters[d['type']]}{d['size']}") for n, d in schema.items()])
    points = np.frombuffer(data, dtype=kind)

    def dimension(name: str, dtype: Any, default: int = 0) -> NDArray[Any]:
        if name not in schema:
            return np.full(len(points), default, dtype=dtype)
        scale, offset = (schema[name].get(k, d) for k, d in (("scale", 1), ("offset", 0)))
        values = points[name]
        return (values * scale + offset if (scale, offset) != (1, 0) else values).astype(dtype)

    return Raw(
        dimension("X", np.float64), dimension("Y", np.float64), dimension("Z", np.float64),
        dimension("Intensity", np.uint16), dimension("Classification", np.uint8),
        dimension("ReturnNumber", np.uint8, 1), dimension("NumberOfReturns", np.uint8, 1),
        dimension("Withheld", bool),
    )  # fmt: skip


# --- opening -------------------------------------------------------------------------------------


def open_clouds(
    source: Any, *, crs: Any = None, vertical_unit: Any = None, options: Mapping[str, Any]
) -> list[Cloud]:
    """Return the clouds of a source, in a fixed order; only headers are read.

    Parameters
    ----------
    source
        A path or URL of a LAS, LAZ or COPC file, of an ``ept.json`` or the folder that holds it,
        a pattern of local files, or several of all these.
    crs, vertical_unit
        Instead of what the files say; see `deepdem.sources.lidar.grid_points`.
    options
        For fsspec.

    Raises
    ------
    FileNotFoundError
        There is no such file, or none that the pattern fits.
    ValueError
        A file is no point cloud, or says no CRS, or one without a map.
    """
    several = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not several:
        raise ValueError("source= is empty: pass a path, a URL, a pattern or several of them")
    urls = [url for one in several for url in _expanded(os.fspath(one))]
    return [_open(url, crs, vertical_unit, Options(options)) for url in urls]


def _expanded(url: str) -> list[str]:
    url = url.removeprefix("ept://")
    if not local(url):
        file = url.partition("?")[0].endswith((".laz", ".las", ".json"))
        return [url if file else beside(f"{url.rstrip('/')}/", "ept.json")]
    if glob.has_magic(url) and not Path(url).exists():
        found = sorted(glob.glob(url, recursive=True))  # noqa: PTH207  # of absolute patterns too
        if not found:
            raise FileNotFoundError(f"no file fits {url}: check the pattern")
        return [str(Path(path).absolute()) for path in found]
    path = Path(url).absolute()
    if path.is_dir():
        if not (path / "ept.json").exists():
            raise FileNotFoundError(
                f"{url} is a folder without ept.json: pass a pattern, {url}/*.laz, or the tree's "
                "own folder"
            )
        path /= "ept.json"
    if not path.exists():
        raise FileNotFoundError(f"{url}: there is no such point cloud: check the path")
    return [path.as_posix()]


def _open(url: str, crs: Any, unit: Any, options: Options) -> Cloud:
    if url.partition("?")[0].endswith(".json"):
        return _open_ept(url, crs, unit, options)
    laspy = laspy_module()
    stream = _Stream(url, options)
    if stream.read(4) != b"LASF":
        raise ValueError(f"{url} is no LAS or LAZ file: pass .las, .laz, .copc.laz or an ept.json")
    stream.seek(0)
    with _named(url):
        header = laspy.LasHeader.read_from(stream)
    copc = any(isinstance(vlr, laspy.copc.CopcInfoVlr) for vlr in header.vlrs)
    said = named_crs(crs, url) if crs is not None else header_crs(header, url)
    frame = frame_of(said, unit, header, url)
    (left, bottom), (right, top) = map(float, header.mins[:2]), map(float, header.maxs[:2])
    version = modified(url, options)
    kind = CopcTree if copc else LasFile
    extent = (left, bottom, right, top)
    return kind(url, frame, extent, header.point_count, version, options)


def _open_ept(url: str, crs: Any, unit: Any, options: Options) -> Cloud:
    about = json.loads(fetch(url, options))
    wanted = {"bounds", "dataType", "schema", "span"} - set(about)
    if wanted or about["dataType"] not in ("laszip", "binary", "zstandard"):
        raise ValueError(
            f"{url} is no Entwine point tile tree of a kind that is known: it lacks "
            f"{sorted(wanted)} or its dataType is none of laszip, binary, zstandard"
        )
    srs = about.get("srs") or {}
    said = srs.get("wkt")
    if srs.get("authority") and srs.get("horizontal"):
        said = f"{srs['authority']}:{srs['horizontal']}"
        said += f"+{srs['vertical']}" if srs.get("vertical") else ""
    if crs is None and not said:
        raise ValueError(f"{url} says no CRS: pass crs=, for example crs='EPSG:26910'")
    frame = frame_of(named_crs(said if crs is None else crs, url), unit, None, url)
    west, south, _, east, north, _ = about.get("boundsConforming") or about["bounds"]
    return EptTree(
        url, frame, (west, south, east, north), int(about.get("points", 0)),
        json.dumps(about, sort_keys=True), options, json.dumps(about),
    )  # fmt: skip

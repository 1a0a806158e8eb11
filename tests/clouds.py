"""Small point clouds, made up: LAS, LAZ and EPT."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pyproj

LEFT, TOP = 500_000.0, 5_000_000.0
_MOST = 2**14  # nodes along an axis


def draw_points(count: int = 6000, seed: int = 0, width: float = 60.0) -> dict[str, Any]:
    """Return points over a square: a hill, a house, trees, some noise; centimetres."""
    rng = np.random.default_rng(seed)
    x, y = (np.round(rng.uniform(0, width, count), 2) for _ in range(2))
    ground = 100 + 5 * np.sin(x / 15) + 0.1 * y
    classes = np.full(count, 2, dtype=np.uint8)
    z = ground + rng.normal(0, 0.02, count)
    house = (x > 20) & (x < 32) & (y > 20) & (y < 30)
    z[house], classes[house] = 115.0, 6
    tree = ~house & (rng.random(count) < 0.2)
    z[tree] += rng.uniform(1, 8, tree.sum())
    classes[tree] = 5
    of_returns = np.where(tree, 2, 1).astype(np.uint8)
    returns = np.where(tree & (rng.random(count) < 0.5), 2, 1).astype(np.uint8)
    noise = rng.random(count) < 0.01
    z[noise], classes[noise] = 150.0, 18
    return {
        "x": LEFT + x, "y": TOP - y, "z": np.round(z, 3), "classification": classes,
        "return_number": returns, "number_of_returns": of_returns,
        "intensity": rng.integers(1, 3000, count).astype(np.uint16),
    }  # fmt: skip


def write_las(
    path: Path | io.BytesIO, points: dict[str, Any], *, crs: Any = "EPSG:32610",
    point_format: int = 6, vlrs: list[Any] = (), compress: bool = True,
) -> Any:  # fmt: skip
    header = laspy.LasHeader(point_format=point_format, version="1.4")
    header.scales = [0.001, 0.001, 0.001]
    header.offsets = [np.floor(points[a].min()) if len(points[a]) else 0.0 for a in "xyz"]
    if crs is not None:
        header.add_crs(pyproj.CRS.from_user_input(crs))
    header.vlrs.extend(vlrs)
    las = laspy.LasData(header)
    for name, values in points.items():
        setattr(las, name, values)
    if isinstance(path, io.BytesIO):
        las.write(path, do_compress=compress)
    else:
        las.write(path)
    return path


def write_ept(
    folder: Path, points: dict[str, Any], *, kind: str = "laszip",
    srs: dict[str, str] | None = None, levels: int = 3,
) -> Path:  # fmt: skip
    """Write a tree; from the third level on the hierarchy is in files of the third's nodes."""
    (folder / "ept-data").mkdir(parents=True)
    (folder / "ept-hierarchy").mkdir()
    low = np.array([np.floor(points[a].min()) for a in "xyz"])
    side = float(np.ceil(max(points[a].max() - low[n] for n, a in enumerate("xyz")) + 1))
    # Four times as many on each level as on the one above: a surface, not a volume.
    shares = np.cumsum(4.0 ** np.arange(levels))
    level = np.searchsorted(shares / shares[-1], np.random.default_rng(1).random(len(points["x"])))
    xyz = np.stack([points[a] for a in "xyz"])

    def keys_of(level: np.ndarray) -> np.ndarray:
        """Return level, x, y and z of each point's node in one number."""
        cell = np.floor((xyz - low[:, None]) / side * 2.0**level).astype(np.int64)
        return ((level * _MOST + cell[0]) * _MOST + cell[1]) * _MOST + cell[2]

    for n in range(levels - 1, 0, -1):  # no node without a parent
        above = keys_of(np.minimum(level, n - 1))
        level[(level == n) & ~np.isin(above, above[level == n - 1])] = n - 1
    keys = keys_of(level)
    pages: dict[str, dict[str, int]] = {"0-0-0-0": {}}
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    for key, mine in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        n, *at = (key // _MOST**power % _MOST for power in (3, 2, 1, 0))
        name = "-".join(map(str, (n, *at)))
        page = pages["0-0-0-0"]
        if n >= 2:
            top = "-".join(map(str, (2, *(a >> (n - 2) for a in at))))
            page[top] = -1
            page = pages.setdefault(top, {})
        page[name] = len(mine)
        ending, data = _node({key: values[mine] for key, values in points.items()}, kind, low)
        (folder / "ept-data" / f"{name}.{ending}").write_bytes(data)
    for name, page in pages.items():
        (folder / "ept-hierarchy" / f"{name}.json").write_text(json.dumps(page))
    about = {
        "bounds": [*low, *(low + side)], "dataType": kind, "hierarchyType": "json",
        "boundsConforming": [*xyz.min(axis=1), *xyz.max(axis=1)], "points": len(points["x"]),
        "schema": _schema(low), "span": 16, "version": "1.0.0",
        "srs": srs if srs is not None else {"authority": "EPSG", "horizontal": "32610"},
    }  # fmt: skip
    (folder / "ept.json").write_text(json.dumps(about))
    return folder


def _schema(low: np.ndarray) -> list[dict[str, Any]]:
    places = [
        {"name": n, "type": "signed", "size": 4, "scale": 0.001, "offset": float(o)}
        for n, o in zip("XYZ", low, strict=True)
    ]
    rest = [("Intensity", 2), ("ReturnNumber", 1), ("NumberOfReturns", 1), ("Classification", 1)]
    return [*places, *({"name": n, "type": "unsigned", "size": s} for n, s in rest)]


def _node(points: dict[str, Any], kind: str, low: np.ndarray) -> tuple[str, bytes]:
    if kind == "laszip":
        buffer = write_las(io.BytesIO(), points, crs=None)
        return "laz", buffer.getvalue()
    names = [*"xyz", "intensity", "return_number", "number_of_returns", "classification"]
    table = np.empty(len(points["x"]), dtype="<i4,<i4,<i4,<u2,u1,u1,u1")
    for field, name in zip(table.dtype.names, names, strict=True):
        values = points[name]
        if name in "xyz":
            values = np.round((values - low["xyz".index(name)]) / 0.001)
        table[field] = values
    if kind == "binary":
        return "bin", table.tobytes()
    from numcodecs import Zstd

    return "zst", bytes(Zstd().encode(table.tobytes()))

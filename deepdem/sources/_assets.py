"""The pixels of one STAC asset on a grid: its URL signed for each read, and tried again."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.windows import Window

from deepdem.blocks import Box
from deepdem.grid import bring, odc_crs

__all__ = ["AssetReader", "AssetWarning", "Reading", "packed"]

# GDAL remembers what a URL once answered, a refusal too: nothing is kept between two tries. It
# also has retries of its own, which would ask with the same token again.
_GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": "0",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_LOW_SPEED_TIME": "60",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/",
}


class _NoQueries(logging.Filter):
    """Takes the queries out of URLs: GDAL logs those that were refused, tokens and all."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?\S+", "?…", record.getMessage()), None
        return True


logging.getLogger("rasterio._env").addFilter(_NoQueries())


class AssetWarning(UserWarning):
    """Reads that failed have become NaN; the message counts those of this process."""


@dataclass(frozen=True)
class Reading:
    """How assets are read.

    Attributes
    ----------
    grid
        The target.
    sign
        Takes a URL, gives one that may be read now; asked for every try. None: URLs as they are.
    errors
        ``"raise"``, or ``"nan"``: what cannot be read is no data, with an `AssetWarning`.
    tries
        How often a read is tried before that.
    backoff_s
        Seconds before the second try; twice as many before each further one.
    gdal
        Options for GDAL, such as ``GDAL_HTTP_HEADERS``.
    """

    grid: GeoBox
    sign: Callable[[str], str] | None = None
    errors: Literal["raise", "nan"] = "raise"
    tries: int = 5
    backoff_s: float = 0.5
    gdal: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.errors not in ("raise", "nan"):
            raise ValueError(f"errors={self.errors!r}: pass 'raise' or 'nan'")
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: pass 1 or more")


def packed(
    href: str, *, item: str, asset: str, resampling: str, nodata: float | None, scale: float,
    offset: float,
) -> str:  # fmt: skip
    """Return all that a reader must know of its asset as one string.

    stackstac tells a reader the URL alone.
    """
    return json.dumps({"href": href, "item": item, "asset": asset, "resampling": resampling,
                       "nodata": nodata, "scale": scale, "offset": offset})  # fmt: skip


class _Failures:
    """How many reads have failed in this process."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    def one_more(self) -> int:
        with self._lock:
            self.count += 1
            return self.count


_failures = _Failures()


class AssetReader:
    """One asset, as a reader of stackstac: opened for each read, so that nothing of it expires.

    Parameters
    ----------
    reading
        How it is read.
    url
        What `packed` gave.
    options
        What else stackstac passes. Its spec is `reading.grid`, and errors are never no data but
        by `reading.errors`.
    """

    def __init__(self, reading: Reading, *, url: str, **options: Any) -> None:
        self.reading = reading
        self.asset: dict[str, Any] = json.loads(url)

    def read(self, window: Window, **options: Any) -> NDArray[np.float32]:
        """Return the pixels of a window of the grid, float32, NaN no data."""
        (y0, y1), (x0, x1) = window.toranges()
        out = Box(int(y0), int(y1), int(x0), int(x1))
        for attempt in range(self.reading.tries):
            if attempt:
                time.sleep(self.reading.backoff_s * 2 ** (attempt - 1))
            try:
                return self._read(out)
            except RasterioError as error:
                # Without the query: it may hold a token. So may the error itself, which is not
                # chained for that.
                reason = f"{type(error).__name__}: {error.__cause__ or error}".split("?")[0]
        return self._failed(out, reason)

    def close(self) -> None:
        """Do nothing: nothing is kept open."""

    def _read(self, out: Box) -> NDArray[np.float32]:
        href, sign = self.asset["href"], self.reading.sign
        with (
            rasterio.Env(**{**_GDAL, **self.reading.gdal}),
            rasterio.open(href if sign is None else sign(href)) as raster,
        ):
            if raster.count != 1 or raster.crs is None:
                raise ValueError(
                    f"{self._name} has {raster.count} bands and the CRS {raster.crs}: wanted one "
                    "band and a CRS; choose another asset"
                )
            source = GeoBox(raster.shape, raster.transform, odc_crs(raster.crs.to_wkt()))
            return bring(
                lambda box: self._pixels(raster, box), source, self.reading.grid, out,
                resampling=self.asset["resampling"],
            )  # fmt: skip

    def _pixels(self, raster: Any, box: Box) -> NDArray[np.float32]:
        window = Window.from_slices((box.y0, box.y1), (box.x0, box.x1))
        pixels = raster.read(1, window=window, masked=True)
        values: NDArray[np.float32] = pixels.astype(np.float32).filled(np.nan)
        if self.asset["nodata"] is not None:
            values[pixels.data == self.asset["nodata"]] = np.nan
        if (self.asset["scale"], self.asset["offset"]) != (1.0, 0.0):
            values = values * np.float32(self.asset["scale"]) + np.float32(self.asset["offset"])
        return values

    @property
    def _name(self) -> str:
        return (
            f"asset {self.asset['asset']!r} of item {self.asset['item']!r} "
            f"({self.asset['href'].split('?')[0]})"
        )

    def _failed(self, out: Box, reason: str) -> NDArray[np.float32]:
        if self.reading.errors == "raise":
            raise OSError(
                f"{self._name} could not be read in {self.reading.tries} tries: {reason}. Pass "
                "sign= if it needs a token, a larger tries= or backoff_s= if the server is busy, "
                "or errors='nan' to do without it"
            )
        warnings.warn(
            f"{_failures.one_more()} reads failed so far and are NaN; now {self._name}: {reason}",
            AssetWarning, stacklevel=2,
        )  # fmt: skip
        return np.full(out.shape, np.nan, dtype=np.float32)

"""Bytes of a file or a URL, in part, tried again when a server fails."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import fsspec.core

__all__ = ["Options", "beside", "fetch", "local", "modified"]

_TRIES, _WAIT_S = 4, 0.25


def local(url: str) -> bool:
    """Return whether `url` is a path."""
    return "://" not in url


class Options(dict[str, Any]):
    """Options for fsspec (headers, tokens), hashable so that what is opened can be kept."""

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return hash(repr(sorted(self.items())))


def beside(url: str, name: str) -> str:
    """Return the URL of another file of the same folder; a query, as of a signature, stays."""
    head, mark, query = url.partition("?") if not local(url) else (url, "", "")
    return f"{head.rsplit('/', 1)[0]}/{name}{mark}{query}"


def _errors() -> tuple[type[Exception], ...]:
    """Return what a server or the way to it raises."""
    try:
        import aiohttp
    except ImportError:
        return (OSError,)
    return (OSError, aiohttp.ClientError)


def fetch(
    url: str, options: Mapping[str, Any], start: int | None = None, stop: int | None = None
) -> bytes:
    """Return the bytes [start, stop) of a file or URL, or all; past its end, what there is.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    OSError
        The server still fails at the fourth attempt, or it does not know ranges.
    ImportError
        The URL needs a package: the message names it.
    """
    fs, path = fsspec.core.url_to_fs(url, **options)
    for attempt in range(_TRIES):
        try:
            data: bytes = fs.cat_file(path, start=start, end=stop)
        except (FileNotFoundError, PermissionError):
            raise
        except _errors() as error:
            status = getattr(error, "status", 500)
            # What the client did wrong will be as wrong the next time; 408 and 429 ask for it.
            final = 400 <= status < 500 and status not in (408, 429)
            if final or attempt == _TRIES - 1:
                raise OSError(
                    f"{url}, bytes {start} to {stop}: {error!r} after {attempt + 1} attempts: try "
                    "later, or download it and pass the path"
                ) from error
            time.sleep(_WAIT_S * 4**attempt)
            continue
        if start is not None and stop is not None and len(data) > stop - start:
            raise OSError(
                f"{url}: the server answers a request for a range with all of the file: download "
                "it and pass the path"
            )
        return data
    raise AssertionError("unreachable")


def modified(url: str, options: Mapping[str, Any]) -> str:
    """Return what changes when the file does: size and date, or ETag; "" if none is known."""
    fs, path = fsspec.core.url_to_fs(url, **options)
    info = fs.info(path)
    known = [info.get(k) for k in ("size", "mtime", "ETag", "LastModified", "last_modified")]
    return repr([k for k in known if k is not None])

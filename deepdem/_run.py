"""A graph computed by whichever scheduler is active, told of chunk by chunk in a bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeAlias

import dask.threaded
from dask.array.optimization import optimize
from dask.base import get_scheduler
from dask.callbacks import Callback
from dask.highlevelgraph import HighLevelGraph

__all__ = ["Key", "active_scheduler", "compute", "progress_bar"]

Key: TypeAlias = "tuple[str | int, ...]"
#: Takes the number of pixels of a chunk that is done.
Advance: TypeAlias = Callable[[int], None]
_RETRIES = 3


def active_scheduler() -> tuple[Callable[..., Any], Any]:
    """Return the active scheduler, and the client if it is one of a cluster."""
    schedule = get_scheduler() or dask.threaded.get
    owner = getattr(schedule, "__self__", None)
    if owner is not None and "distributed" in sys.modules:
        from distributed import Client

        return schedule, owner if isinstance(owner, Client) else None
    return schedule, None


def compute(
    graph: HighLevelGraph, sizes: Mapping[Key, int], advance: Advance, *, fetch: bool = True
) -> Iterator[tuple[Key, Any]]:
    """Compute the tasks of the keys of `sizes`; on a cluster give what each returns as it ends.

    Without `fetch` nothing is brought from the workers. What a lost worker had finished would be
    computed again for no more than a None.
    """
    schedule, client = active_scheduler()
    tasks = optimize(graph, list(sizes))
    if client is None:

        def ended(key: Any, *_: Any) -> None:
            if key in sizes:
                advance(sizes[key])

        with Callback(posttask=ended):
            schedule(tasks, list(sizes))
        return
    from distributed import as_completed

    futures = client.get(tasks, list(sizes), sync=False, retries=_RETRIES)
    try:
        for future in as_completed(futures):
            key, value = (
                future.key,
                future.result() if fetch or future.status != "finished" else None,
            )
            future.release()  # at once, for the same reason
            yield key, value
            advance(sizes[key])
    finally:
        client.cancel([future for future in futures if not future.done()])


@contextlib.contextmanager
def progress_bar(wanted: bool | str, title: str, chunks: int) -> Iterator[Advance]:
    """Give a function that is told the pixels of each finished chunk, and shows how far it is."""
    if wanted not in (True, False, "auto"):
        raise ValueError(f"progress={wanted!r}: pass 'auto', True or False")
    shell = sys.modules.get("IPython")
    notebook = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    if not (notebook or sys.stderr.isatty() if wanted == "auto" else wanted):
        yield lambda _: None
        return
    start, seen, pixels = time.monotonic(), 0, 0
    with (_notebook_bar if notebook else _terminal_bar)(title, chunks) as show:

        def advance(px: int) -> None:
            nonlocal seen, pixels
            seen, pixels = seen + 1, pixels + px
            seconds = max(time.monotonic() - start, 1e-3)
            left = timedelta(seconds=round(seconds / seen * (chunks - seen)))
            show(seen, f"{seen}/{chunks} chunks, {pixels / 1e6 / seconds:.2f} Mpx/s, {left} left")

        yield advance


@contextlib.contextmanager
def _terminal_bar(title: str, chunks: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn(title), BarColumn(), TextColumn("{task.fields[status]}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=chunks, status=f"{chunks} chunks")
        yield lambda seen, status: bar.update(task, completed=seen, status=status)


@contextlib.contextmanager
def _notebook_bar(title: str, chunks: int) -> Iterator[Callable[[int, str], None]]:
    # rich needs ipywidgets for this; a handle to what is displayed needs nothing.
    ipython = import_module("IPython.display")

    def html(seen: int, status: str) -> Any:
        return ipython.HTML(f"{title} <progress value='{seen}' max='{chunks}'></progress> {status}")

    shown = ipython.display(html(0, f"{chunks} chunks"), display_id=True)
    yield lambda seen, status: shown.update(html(seen, status))

"""A folder served over HTTP on loopback, by ranges, with a count of the bytes that were sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """What a server does, and what it has done."""

    url: str = ""
    #: Bytes of bodies sent, by path.
    sent: dict[str, int] = field(default_factory=dict)
    #: How many of the next requests are answered with 503.
    failures: int = 0
    ranges: bool = True

    @property
    def total(self) -> int:
        return sum(self.sent.values())


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Give a server of `folder` that counts."""
    state, lock = Served(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = folder / self.path.lstrip("/").partition("?")[0]
            with lock:
                failing = body and state.failures > 0
                state.failures -= failing
            if failing or not path.is_file():
                self.send_response(503 if failing else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size, asked = path.stat().st_size, self.headers.get("Range")
            first, last = 0, size - 1
            if asked and state.ranges:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            self.send_response(206 if asked and state.ranges else 200)
            if asked and state.ranges:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Accept-Ranges", "bytes" if state.ranges else "none")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if body:
                with path.open("rb") as file:
                    file.seek(first)
                    data = file.read(last - first + 1)
                self.wfile.write(data)
                with lock:
                    state.sent[self.path] = state.sent.get(self.path, 0) + len(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

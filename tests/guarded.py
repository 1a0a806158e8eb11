"""A folder over HTTP ranges in a process of its own, that can be busy or want fresh tokens.

GDAL asks for some bytes while it holds Python's lock: a server in the same process would never
answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Guarded:
    """What can be told to the server, and what it says."""

    def __init__(self, url: str):
        self.url = url

    def tell(self, **rules: Any) -> dict[str, Any]:
        """Set how many of the next requests get 503, and how many a token ``sig`` is good for."""
        query = urllib.parse.quote(json.dumps(rules))
        with urllib.request.urlopen(f"{self.url}/_state?{query}") as answer:  # noqa: S310
            said: dict[str, Any] = json.loads(answer.read())
        return said

    @property
    def total(self) -> int:
        return int(self.tell()["sent"])


@contextmanager
def guarded(folder: Path) -> Iterator[Guarded]:
    """Give a server of `folder`."""
    process = subprocess.Popen(  # noqa: S603  # our own words
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield Guarded(f"http://127.0.0.1:{process.stdout.readline().strip()}")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def serve(folder: Path) -> None:
    rules: dict[str, Any] = {"failures": 0, "uses": None, "sent": 0}
    used: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Else each answer waits 40 ms: its head and its body are two packets.
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def refused(self, path: Path, query: str) -> int:
            with lock:
                if rules["failures"] > 0:
                    rules["failures"] -= 1
                    return 503
                if rules["uses"] is not None:
                    token = urllib.parse.parse_qs(query).get("sig", [""])[0]
                    used[token] += 1
                    if not token or used[token] > rules["uses"]:
                        return 403
            return 0 if path.is_file() else 404

        def send(self, status: int, data: bytes, *, body: bool, more: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Accept-Ranges": "bytes", **more}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def answer(self, *, body: bool) -> None:
            place, _, query = self.path.partition("?")
            if place == "/_state":
                with lock:
                    rules.update(json.loads(urllib.parse.unquote(query)))
                    said = json.dumps(rules).encode()
                self.send(200, said, body=body, more={})
                return
            path = folder / place.lstrip("/")
            if status := self.refused(path, query):
                self.send(status, b"", body=body, more={})
                return
            data, more, asked = path.read_bytes(), {}, self.headers.get("Range")
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or len(data)), len(data) - 1)
                more = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                data = data[first : last + 1]
            self.send(206 if asked else 200, data, body=body, more=more)
            with lock:
                rules["sent"] += len(data) if body else 0

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

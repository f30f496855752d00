"""A server on this machine that answers as bad servers do."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from corpus import good_jpeg


class _Handler(BaseHTTPRequestHandler):
    files: Mapping[str, bytes]
    seen: set[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        good = re.fullmatch(r"/good/(\d+)\.jpg", path)
        status = re.fullmatch(r"/status/(\d+)", path)
        if good:
            self._answer(good_jpeg(int(good[1])))
        elif status:
            self._answer(b"", int(status[1]))
        elif path in self.files:
            self._answer(self.files[path])
        else:
            getattr(self, f"_{path.strip('/').replace('-', '_')}", self._nothing)()

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _nothing(self) -> None:
        self._answer(b"", 404)

    def _short(self) -> None:
        self._answer(good_jpeg(850)[:300], Content_Length="9000")

    def _loop(self) -> None:
        self._answer(b"", 302, Location="/loop")

    def _to_file(self) -> None:
        self._answer(b"", 302, Location="file:///etc/passwd")

    def _elsewhere(self) -> None:
        self._answer(b"", 302, Location="/good/851.jpg")

    def _silent(self) -> None:
        time.sleep(1.6)

    def _drip(self) -> None:
        body = good_jpeg(852)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for start in range(0, len(body), len(body) // 6):
                self.wfile.write(body[start : start + len(body) // 6])
                time.sleep(0.3)
        except OSError:  # whoever asked has lost patience
            pass

    def _html(self) -> None:
        self._answer(b"<html>Sorry</html>", Content_Type="image/jpeg")

    def _empty(self) -> None:
        self._answer(b"")

    def _noai(self) -> None:
        self._answer(good_jpeg(853), X_Robots_Tag="noai")

    def _flaky(self) -> None:
        is_first = "/flaky" not in self.seen
        self.seen.add("/flaky")
        self._answer(b"" if is_first else good_jpeg(854), 503 if is_first else 200)


@contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[str]:
    """Address of a server that has these files beside its odd answers."""
    handler = type("Handler", (_Handler,), {"files": files, "seen": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A web server of this machine that counts what it is asked for."""

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path, served on loopback.

    Attributes:
        files: path -> bytes, or an address to redirect to.
        asked: path -> how many times it was asked for.
        sent: bytes of bodies sent.
        delay_seconds: before each answer.
        ranges: whether parts of files are served.
        held: paths that are answered once `released` is set.
    """

    def __init__(self, ranges=False):
        self.files, self.asked, self.sent = {}, Counter(), 0
        self.delay_seconds, self.ranges = 0.0, ranges
        self.cut_at = None
        self.held, self.released = set(), threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self, with_body=True)

            def do_HEAD(self):
                site.answer(self, with_body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, request, with_body):
        path = request.path
        if with_body:
            self.asked[path] += 1
        time.sleep(self.delay_seconds)
        if path in self.held:
            self.released.wait(60)
        content = self.files.get(path)
        if content is None:
            request.send_error(404)
            return
        if isinstance(content, str):
            request.send_response(302)
            request.send_header("Location", content)
            request.end_headers()
            return
        start, size = 0, len(content)
        wanted = request.headers.get("Range", "")
        if self.ranges and wanted.startswith("bytes="):
            first, _, last = wanted[6:].partition("-")
            start, end = int(first), min(int(last or size - 1), size - 1)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            content = content[start : end + 1]
        else:
            request.send_response(200)
        if self.ranges:
            request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if with_body:
            if self.cut_at is not None and start < self.cut_at:
                content = content[: self.cut_at - start]
            self.sent += len(content)
            request.wfile.write(content)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

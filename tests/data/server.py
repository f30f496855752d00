"""A web server of this machine that counts what it is asked for."""

import hashlib
import json
import ssl
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Site:
    """Files by path, served on loopback.

    Attributes:
        files: path -> bytes, or an address to redirect to.
        asked: path -> how many times it was asked for.
        sent: bytes of bodies sent.
        delay_seconds: before each answer.
        ranges: whether parts of files are served.
        held: paths that are answered once `released` is set.
        endless: path of a redirect -> what its body has a hundred times, and seconds after each.
    """

    def __init__(self, ranges=False, certificate=None):
        self.files, self.asked, self.sent = {}, Counter(), 0
        self.delay_seconds, self.ranges = 0.0, ranges
        self.cut_at = None
        self.held, self.released, self.endless = set(), threading.Event(), {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self, with_body=True)

            def do_HEAD(self):
                site.answer(self, with_body=False)

            def do_POST(self):
                site.answer(self, with_body=True)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.address = f"{scheme}://127.0.0.1:{self.server.server_port}"
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
            block, seconds = self.endless.get(path, (b"", 0))
            with suppress(OSError):  # until the client has had enough; or tests would not end
                for _ in range(100 if block else 0):
                    request.wfile.write(block)
                    time.sleep(seconds)
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


class Hub(Site):
    """A data set of a hub of Hugging Face's: its files, listed and served as the hub's API does it.

    Attributes:
        name: owner and name of the data set.
    """

    def __init__(self, name):
        super().__init__(ranges=True)
        self.name = name
        self.tree = {}

    def put(self, path, data):
        """Add a file to the data set."""
        self.tree[path] = data
        self.files[f"/datasets/{self.name}/resolve/main/{path}"] = data

    def answer(self, request, with_body):
        """What the API says of the data set; anything else is a file."""
        path, api = urlsplit(request.path).path, f"/api/datasets/{self.name}"
        if path == api:
            about = {"id": self.name, "sha": "0" * 40, "private": False, "tags": []}
        elif path.startswith(f"{api}/tree/main"):
            about = self._listed(unquote(path.removeprefix(f"{api}/tree/main").strip("/")))
        elif path == f"{api}/paths-info/main":
            body = request.rfile.read(int(request.headers["Content-Length"])).decode()
            asked = json.loads(body)["paths"] if body[0] == "{" else parse_qs(body)["paths"]
            about = [each for one in asked for each in self._listed("") if each["path"] == one]
        else:
            super().answer(request, with_body)
            return
        body = json.dumps(about).encode()
        request.send_response(200 if about else 404)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _listed(self, folder):
        folders = {path.rpartition("/")[0] for path in self.tree} - {"", folder}
        rows = [{"type": "directory", "oid": "1" * 40, "size": 0, "path": each} for each in folders]
        for path, data in self.tree.items():
            oid = hashlib.sha1(data).hexdigest()
            rows.append({"type": "file", "oid": oid, "size": len(data), "path": path})
        return [row for row in rows if not folder or row["path"].startswith(f"{folder}/")]

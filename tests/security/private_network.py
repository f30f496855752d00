"""A network of its own for attacks by address: run by test_addresses.py inside `unshare`, where it is alone.

There is one web server, at an address of the open internet and at several of the inside, and a name server that
answers `rebind` with the first and then with the second. Nothing here stands in for anything: the kernel, libc's
resolver, img2dataset and aiohttp are the real ones. Prints as JSON what came, and what was asked for inside.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

OUTSIDE, INSIDE = "93.184.216.34", "10.0.0.5"
ADDRESSES = (OUTSIDE, INSIDE, "169.254.169.254", "100.64.0.1")
SIX_TO_FOUR = ("2002:7f00:1::", "2002:a00:5::")  # 127.0.0.1 and the inside, as a relay leads there
HIDDEN = b"key,secret\n1,of the inside\n"

_asked_inside: list[str] = []
_answers: Counter[str] = Counter()


class Site(BaseHTTPRequestHandler):
    """Redirects to what its path says, or answers."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """As GET."""
        self.do_GET()

    def do_GET(self) -> None:
        """The answer."""
        here = self.connection.getsockname()[0].removeprefix("::ffff:")
        if here != OUTSIDE:
            _asked_inside.append(f"{here}{self.path}")
            return self._send(HIDDEN if self.path.endswith(".csv") else PICTURE.read_bytes())
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", "http://" + unquote(self.path.removeprefix("/to/")))
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            return self.end_headers()
        return self._send(b"key,open\n" if self.path.endswith(".csv") else PICTURE.read_bytes())

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")  # or the next name would use the same connection
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """On all addresses of both families."""

    address_family = socket.AF_INET6
    daemon_threads = True


def _serve_names() -> None:
    """`rebind*` is outside when it is asked for the first time, and inside from then on."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    ready.set()
    while True:
        query, client = server.recvfrom(512)
        labels, place = [], 12
        while query[place]:
            labels.append(query[place + 1 : place + 1 + query[place]].decode())
            place += 1 + query[place]
        name, kind = labels[0], struct.unpack(">H", query[place + 1 : place + 3])[0]
        question = query[12 : place + 5]
        answers = []
        if kind == 1:
            _answers[name] += 1
            is_later = name.startswith("rebind") and _answers[name] > 1
            address = INSIDE if is_later or name.startswith("inside") else OUTSIDE
            answers = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(address)]
        head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(answers), 0, 0)
        server.sendto(head + question + b"".join(answers), client)


def _set_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in (*ADDRESSES, *SIX_TO_FOUR):
        subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True)
    resolver = Path(sys.argv[1]) / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:2 attempts:1\n")
    subprocess.run(["mount", "--bind", resolver, "/etc/resolv.conf"], check=True)
    threading.Thread(target=_serve_names, daemon=True).start()
    ready.wait(10)
    threading.Thread(target=Server(("::", 80), Site).serve_forever, daemon=True).start()


def fetched(urls: list[str], folder: Path) -> list[tuple[str, str]]:
    """What the download of a table of URLs says of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipgraft.data.download import download
    from clipgraft.data.outcomes import read_outcomes
    from clipgraft.sources import UrlSource

    folder.mkdir()
    pq.write_table(pa.table({"url": urls, "caption": urls}), folder / "t.parquet")
    settings = {"table": str(folder / "t.parquet"), "min_success": 0, "retries": 0}
    download(UrlSource(kind="urls", **settings), folder, 1)
    rows = {each.key: each for each in read_outcomes(folder / "outcomes.parquet")}
    return [(rows[key].status, rows[key].message) for key in sorted(rows)]


def read(url: str) -> str:
    """What an address that a setting names holds."""
    from clipgraft.config import ConfigError
    from clipgraft.data.remote import open_file

    try:
        with open_file(url) as file:
            return str(file.read().decode())
    except ConfigError as error:
        return f"error: {error}"


if __name__ == "__main__":
    ready = threading.Event()
    work = Path(sys.argv[1])
    PICTURE = work / "picture.jpg"
    _set_up()
    asked = json.loads((work / "asked.json").read_text())
    told = {
        "fetched": fetched(asked["fetch"], work / "out") if asked["fetch"] else [],
        "read": [read(url) for url in asked["read"]],
        "inside": _asked_inside,
        "answers": dict(_answers),
    }
    (work / "told.json").write_text(json.dumps(told))
    os._exit(0)

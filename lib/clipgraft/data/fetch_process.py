"""The program that fetches: img2dataset in a process of its own, with a guard on what it may connect to.

`python -m clipgraft.data.fetch_process FLAGS` runs img2dataset. Its workers are spawned, and a spawned process imports
the main module before its work, so that the guard holds in each of them. It is at the socket, where the address
is known: names that resolve to private addresses and redirects to them are refused as well.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import math
import multiprocessing.pool
import os
import socket
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from clipgraft.orphan import leave_with

PRIVATE = "CLIPGRAFT_ALLOW_PRIVATE_ADDRESSES"
FILES = "CLIPGRAFT_ALLOW_LOCAL_FILES"
PARENT = "CLIPGRAFT_FETCH_PARENT"
SECONDS = "CLIPGRAFT_SECONDS_PER_IMAGE"

MAX_BYTES = 64 * 2**20  # of one answer
_CHUNK = 2**18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6, the only one that is handed out
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")  # which Python takes for global

REFUSED = (
    "refused: the address is loopback, private or link-local (allow_private_addresses: true lets "
    "such addresses through)"
)


def is_public(host: str) -> bool:
    """Whether an IP address is one of the open internet, seen through IPv6 wrappings of IPv4."""
    address = ipaddress.ip_address(host.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None:
            return address in _UNICAST and address.is_global
        address = inner
    return address.is_global and not address.is_multicast and address not in _PROTOCOLS


def addresses_of(host: str, port: int | None = None) -> set[str]:
    """All addresses that a name has now."""
    return {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}


def _proxies() -> set[tuple[str, int]]:
    """Addresses of the proxies of the environment: whoever set them wants them reached."""
    found = set()
    for scheme, url in urllib.request.getproxies().items():
        parts = urlsplit(url if "://" in url else f"//{url}")
        if scheme == "no" or not parts.hostname:
            continue
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found |= {(each, port) for each in addresses_of(parts.hostname, port)}
        except OSError:
            continue
    return found


def _guard_sockets() -> None:
    proxies = _proxies()

    def check(family: int, address: Any) -> None:
        if family not in (socket.AF_INET, socket.AF_INET6):
            return
        host, port = str(address[0]), int(address[1])
        try:
            is_allowed = is_public(host) or (host, port) in proxies
        except ValueError:  # a name, which may mean another address when the kernel is given it
            is_allowed = False
        if not is_allowed:
            raise PermissionError(REFUSED)

    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, _checked(getattr(socket.socket, name), check))


def _checked(original: Callable[..., Any], check: Callable[[int, Any], None]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        check(self.family, address)
        return original(self, address)

    return connect


def _guard_urls(schemes: set[str], allow_private: bool, seconds: float) -> None:
    """Check each URL that is opened, redirects too, and bound the size of each answer and its time."""
    original = urllib.request.OpenerDirector.open
    read = http.client.HTTPResponse.read
    receive = socket.SocketIO.readinto
    due = threading.local()  # when the answer that a thread waits for must be there
    has_proxy = bool(urllib.request.getproxies().keys() - {"no"})

    def open_checked(self: Any, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        request = (
            fullurl
            if isinstance(fullurl, urllib.request.Request)
            else urllib.request.Request(fullurl)
        )
        if request.type not in schemes:
            raise URLError(f"{request.type}: URLs are refused")
        if has_proxy and not allow_private:
            _check_behind_proxy(urlsplit(request.full_url).hostname or "")
        due.at = time.monotonic() + seconds
        response = original(self, request, data, timeout)
        if not isinstance(response, http.client.HTTPResponse):
            response.read = functools.partial(_read_file, response.read)
        return response

    def read_bounded(self: http.client.HTTPResponse, amt: int | None = None) -> bytes:
        return _read(self) if amt is None else read(self, amt)

    def receive_in_time(self: socket.SocketIO, buffer: Any) -> int | None:
        if time.monotonic() > getattr(due, "at", math.inf):
            raise TimeoutError(f"the image took more than {seconds:g} s")
        return receive(self, buffer)

    # Of the socket: the timeout begins anew with each byte, those of headers too.
    socket.SocketIO.readinto = receive_in_time  # type: ignore[assignment,method-assign]
    urllib.request.OpenerDirector.open = open_checked  # type: ignore[method-assign]
    # Of the class: what answers with a redirect is read by urllib itself, before the next URL is opened.
    http.client.HTTPResponse.read = read_bounded  # type: ignore[method-assign]


def _check_behind_proxy(host: str) -> None:
    """The proxy will connect, not this process; names that only the proxy knows are its affair."""
    try:
        addresses = addresses_of(host)
    except OSError:
        return
    if not all(map(is_public, addresses)):
        raise PermissionError(REFUSED)


def _read(response: http.client.HTTPResponse) -> bytes:
    parts, size = [], 0
    while part := response.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise OSError(f"refused: more than {MAX_BYTES // 2**20} MB")
    if response.length:  # read1 does not mind that the connection ended early
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _read_file(read: Callable[[int], bytes]) -> bytes:
    """What a `file://` URL names, which may have no end (`/dev/zero`)."""
    data = read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(f"refused: more than {MAX_BYTES // 2**20} MB")
    return data


def _end_with_a_killed_worker() -> None:
    """A pool of multiprocessing replaces a worker that was killed, and then waits for its task for ever."""
    join = multiprocessing.pool.Pool._join_exited_workers  # type: ignore[attr-defined]

    def checked(workers: list[Any]) -> Any:
        before = list(workers)
        joined = join(workers)  # first: one may end while it looks, and is replaced
        for worker in before:
            if (worker.exitcode or 0) < 0:
                print(f"worker {worker.pid} was killed by signal {-worker.exitcode}", flush=True)
                os._exit(1)
        return joined

    multiprocessing.pool.Pool._join_exited_workers = staticmethod(checked)  # type: ignore[attr-defined]


def _skip_idle_imports() -> None:
    """What img2dataset imports and does not use here; torch alone would cost each process five seconds.

    albumentations would also ask the package index for news.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset can do without
    for module in ("wandb", "albumentations"):
        sys.modules[module] = types.ModuleType(module)


def _set_up() -> None:
    allow_private = os.environ[PRIVATE] == "1"
    schemes = {"http", "https", "file"} if os.environ[FILES] == "1" else {"http", "https"}
    leave_with([int(os.environ[PARENT])], lambda: os._exit(1))
    os.environ[PARENT] = str(
        os.getpid()
    )  # of what is spawned here; who loses its parent early is given another one
    _skip_idle_imports()
    if not allow_private:
        _guard_sockets()
    _guard_urls(schemes, allow_private, float(os.environ[SECONDS]))


if __name__ in ("__main__", "__mp_main__"):
    _set_up()

if __name__ == "__main__":
    from img2dataset import main

    _end_with_a_killed_worker()
    main()

"""Put on PYTHONPATH by the tests: this process and its children may connect to loopback only."""

import ipaddress
import os
import socket


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket
    host = str(address[0])
    try:
        return host in ("localhost", "") or ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _guard(name: str) -> None:
    original = getattr(socket.socket, name)

    def connect(self: socket.socket, address: object) -> object:
        if not _is_local(address):
            raise OSError(f"tests run without a network, but something connects to {address}")
        return original(self, address)

    setattr(socket.socket, name, connect)


def _guard_lookup() -> None:
    original = socket.getaddrinfo

    def getaddrinfo(host: object, *rest: object, **named: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", "localhost", socket.gethostname()) and not _is_local((name,)):
            raise socket.gaierror(f"tests run without a network, but something looks up {name!r}")
        return original(host, *rest, **named)

    socket.getaddrinfo = getaddrinfo


if os.environ.get("CLIPGRAFT_NO_NETWORK") == "1":
    _guard("connect")
    _guard("connect_ex")
    _guard_lookup()

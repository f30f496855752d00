"""Files by name or address: local paths, and what fsspec reads (`s3://`, `https://`, `hf://`, `memory://`).

Copies of large remote files are made once: a finished one has a marker, an unfinished one goes on where it was.
S3 is read with pyarrow, which takes keys, region and endpoint from the usual `AWS_` variables.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs as arrow_fs

from clipgraft.config import ConfigError
from clipgraft.data import fetch_process
from clipgraft.data.parallel import Progress
from clipgraft.data.unpacked import Unpacked
from clipgraft.disk import is_of_the_disk
from clipgraft.local_files import local_files, spelled_out
from clipgraft.sources import Patterns

log = logging.getLogger(__name__)

_CHUNK = 4 * 2**20
_COPIES_AT_ONCE = 8
_TRIES = 3


def is_remote(name: str) -> bool:
    """Whether a name is an address, not a path."""
    return "://" in name


def expand(patterns: Patterns) -> list[str]:
    """All files that paths, addresses, globs and braces name: absolute paths and addresses, in order.

    Raises:
        ConfigError: if one of them matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not is_remote(pattern):
            found |= dict.fromkeys(str(path.absolute()) for path in local_files(pattern))
            continue
        for url in spelled_out(pattern):
            found |= dict.fromkeys(_glob(url) if "*" in url else [url])
    return list(found)


def open_file(name: str, packing: str | None = None) -> Any:
    """Open a path or an address for reading bytes.

    Args:
        name: path or address.
        packing: how it is packed, as fsspec calls it; it is unpacked as it is read.

    Raises:
        ConfigError: if it is not there or cannot be read, also while it is read if it unpacks to too much.
    """
    file = _told_plainly(name, lambda: _open(name))
    if packing is None:
        return file
    return io.BufferedReader(_told_plainly(name, lambda: Unpacked(file, packing, name)))


def identity_of(name: str) -> str:
    """8 hex digits that are others once a path or an address holds another file.

    Raises:
        ConfigError: if it is not there or cannot be read.
    """

    def look() -> str:
        system, path = _system(name)
        return _identity(system.info(path))

    return str(_told_plainly(name, look))


def copy_all(
    urls: Sequence[str],
    folder: Path,
    check: Callable[[Path], object],
    suffix: str = "",
) -> list[Path]:
    """Copy addresses into a folder, several at once.

    Args:
        urls: what to copy.
        folder: made if need be; finished copies in it are kept.
        check: called with each fresh copy; raises ConfigError if it is not whole.
        suffix: that the names of copies end in, also where an address does not.

    Returns:
        Paths, in the order of `urls`.

    Raises:
        ConfigError: if one cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(urls, suffix)
    progress = _Megabytes(len(urls))
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        futures = [
            pool.submit(_copy, url, folder / name, check, progress)
            for url, name in zip(urls, names, strict=True)
        ]
        try:
            paths = [future.result() for future in futures]
        except BaseException:
            progress.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.done()
    return paths


class _Megabytes:
    """Progress of several copies; lines from any thread."""

    def __init__(self, num_files: int) -> None:
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.progress = Progress("copied", 0, unit="MB")
        self.num_files, self.bytes, self.finished, self.kept = num_files, 0, 0, 0

    def expect(self, size: int) -> None:
        with self.lock:
            self.progress.total += size // 1_000_000

    def add(self, size: int) -> None:
        with self.lock:
            self.bytes += size
            more = self.bytes // 1_000_000 - self.progress.count
            self.progress.add(more, f"   {self.finished} of {self.num_files} files")

    def file_done(self, kept: bool) -> None:
        with self.lock:
            self.finished += 1
            self.kept += kept

    def done(self) -> None:
        self.progress.done(f"   {self.finished} files, {self.kept} of them copied before")


def _copy(url: str, target: Path, check: Callable[[Path], object], progress: _Megabytes) -> Path:
    marker = target.with_name(f"{target.name}.done")
    if marker.is_file() and target.is_file() and target.stat().st_size == int(marker.read_text()):
        progress.file_done(kept=True)
        return target
    part = _told_plainly(url, lambda: _copy_part(url, target, progress))
    try:
        check(part)
    except ConfigError as error:
        part.unlink()
        raise ConfigError(f"{url}: {str(error).replace(str(part), target.name)}") from None
    size = part.stat().st_size
    os.replace(part, target)
    marker.write_text(str(size))
    progress.file_done(kept=False)
    return target


def _copy_part(url: str, target: Path, progress: _Megabytes) -> Path:
    """Copy, or go on copying, to a name that tells which version of the remote file it is of."""
    system, path = _system(url)
    about = system.info(path)
    size = about.get("size")
    part = target.with_name(f"{target.name}.{_identity(about)}.part")
    for other in target.parent.glob(f"{target.name}.*.part"):
        if other != part:
            other.unlink()  # of a version that is no longer there
    if size:
        progress.expect(size)
        progress.add(part.stat().st_size if part.is_file() else 0)
    for attempt in range(1, _TRIES + 1):
        try:
            _append(system, path, part, progress)
            break
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each file system raises its own
            if attempt == _TRIES or progress.stopped.is_set() or is_of_the_disk(error):
                raise
            log.warning("%s: %s; trying again", url, str(error)[:200])
            time.sleep(attempt)
    if size is not None and part.stat().st_size != size:
        raise OSError(f"it has {size:,} bytes, and {part.stat().st_size:,} came")
    return part


def _identity(about: Mapping[str, Any]) -> str:
    """8 hex digits that change with a file, as far as its file system tells."""
    told = [about.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified", "blob_id")]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def _append(system: Any, path: str, part: Path, progress: _Megabytes) -> None:
    with part.open("ab") as file:
        try:
            with system.open(path, "rb", block_size=_CHUNK) as source:
                if file.tell():
                    source.seek(file.tell())
                _write(source, file, progress)
        except (
            ValueError
        ):  # a server that sends whole files only; fsspec may find out at the second block
            progress.add(-file.tell())
            file.truncate(0)
            with system.open(path, "rb", block_size=0) as source:  # as it comes
                _write(source, file, progress)
        file.flush()
        os.fsync(file.fileno())


def _write(source: Any, file: BinaryIO, progress: _Megabytes) -> None:
    while data := source.read(_CHUNK):
        if progress.stopped.is_set():
            raise InterruptedError("another copy failed")
        file.write(data)
        progress.add(len(data))


def _names(urls: Sequence[str], suffix: str) -> list[str]:
    """A file name for each address: its last part, the whole path where others have that, else with a hash before it."""
    parts = [urlsplit(url.removesuffix("/")) for url in urls]
    paths = [(part.netloc + part.path).removesuffix(suffix) + suffix for part in parts]
    names = [path.rsplit("/", 1)[-1] for path in paths]
    hashes = [hashlib.sha256(url.encode()).hexdigest()[:16] for url in urls]
    for others in (
        [path.replace("/", "-") for path in paths],
        [f"{digest}-{name}" for digest, name in zip(hashes, names, strict=True)],
    ):
        times = Counter(names)
        names = [
            name if times[name] == 1 else other for name, other in zip(names, others, strict=True)
        ]
    return names


def _glob(url: str) -> list[str]:
    system, path = _system(url)
    protocol = url.split("://")[0]
    found = _told_plainly(url, lambda: sorted(map(str, system.glob(path))))
    if not found:
        raise ConfigError(f"nothing matches {url}. Hint: look at the address and the pattern")
    return [each if is_remote(each) else f"{protocol}://{each.lstrip('/')}" for each in found]


def _open(name: str) -> Any:
    if not is_remote(name):
        return fsspec.open(name, "rb", compression=None).open()
    system, path = _system(name)
    if name.startswith(("http://", "https://")) and not _sends_parts(system, path):
        whole = tempfile.TemporaryFile()
        with system.open(path, "rb", block_size=0) as source:  # as it comes
            shutil.copyfileobj(source, whole, _CHUNK)
        whole.seek(0)
        return whole
    return system.open(path, "rb")


def _sends_parts(system: Any, path: str) -> bool:
    """Whether a web server sends the part of a file that is asked for; fsspec seeks anywhere, and then cannot read."""
    with system.open(path, "rb", block_size=1, cache_type="none") as file:
        try:
            file.seek(1)
            file.read(1)
        except ValueError:
            return False
    return True


def _system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    protocol, _, rest = url.partition("://")
    if protocol in ("s3", "s3a"):
        return _s3(rest.split("/")[0]), rest
    options: dict[str, Any] = {}
    if protocol in ("http", "https") and _is_outside(urlsplit(url).hostname or ""):
        options["get_client"] = _client_for_outside
    system, path = _told_plainly(url, lambda: fsspec.core.url_to_fs(url, **options))
    return system, path


@functools.cache
def _is_outside(host: str) -> bool:
    """Whether a host that the user names is on the open internet; one of this site may lead anywhere on it."""
    try:
        return any(map(fetch_process.is_public, fetch_process.addresses_of(host)))
    except OSError:  # its name may be known the next time it is asked for
        return True


async def _client_for_outside(**options: Any) -> Any:
    """A client for hosts outside, whose redirects and later names must not lead inside."""
    import aiohttp  # half a second, for copies from the web alone

    connector = aiohttp.TCPConnector(socket_factory=_public_socket)
    return aiohttp.ClientSession(connector=connector, **options)


def _public_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, (host, *_) = address
    if not fetch_process.is_public(host):
        why = f"refused: it leads to {host}, a loopback, private or link-local address"
        raise PermissionError(errno.EACCES, why)
    return socket.socket(family, kind, protocol)


def _s3(bucket: str) -> Any:
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    elif not region:
        region = _told_plainly(f"s3://{bucket}", lambda: arrow_fs.resolve_s3_region(bucket))
    if environment.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"):
        options["anonymous"] = True
    return ArrowFSWrapper(arrow_fs.S3FileSystem(region=region or "us-east-1", **options))


def _told_plainly(url: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{url} needs another package: {error}") from None
    except Exception as error:  # each file system raises its own
        if is_of_the_disk(error):  # what is written here
            raise
        # fsspec says of whatever goes wrong on the web that a file is not there, and keeps the cause.
        cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) == 404:
            raise ConfigError(f"{url} does not exist. Hint: look at the address") from None
        raise ConfigError(
            f"{url} cannot be read: {type(cause).__name__}: {str(cause)[:300]}. Hint: look at the "
            "address, and whether this machine may read it"
        ) from None

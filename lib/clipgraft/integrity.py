"""Integrity: what a job reads is what was written.

Sizes of all inputs are checked before a job begins, and so are the checksums of small files. Those of large ones are
computed beside its work, and the job's outputs do not appear before all are known. Files that would take too long to
read once more check themselves as they are read: images of shards (a checksum each, `data/shards.py`) and weights
(`check_file`, which holds for the base of an expert and for what is read outside of jobs as well).
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from clipgraft.config import ConfigError
from clipgraft.provenance import MANIFEST, check_outputs, content_id, read_manifest, sha256
from clipgraft.versions import deciding, version_of

log = logging.getLogger(__name__)

CHECKED_WHEN_READ = {
    "shard": ("*.tar", "images.npy"),
    "download": ("*.tar",),  # but by `index`, which takes their checksums
    "*": ("model.safetensors",),
}
PAGES = ("report", "scaling")  # show a few rows of large files
BYTES_BEFORE = 64 * 2**20  # so much is read before the job begins: a tenth of a second
LATENCY_SECONDS = float(os.environ.get("CLIPGRAFT_LATENCY_SECONDS", "5"))
_VERSION = re.compile("[0-9a-f]{8}")


class Inputs:
    """The files that a job reads, and whether they are whole."""

    def __init__(self, folders: Iterable[Path], stage: str) -> None:
        """Check manifests, sizes and small files; begin with the others.

        Args:
            folders: of finished jobs.
            stage: of the job that reads them.

        Raises:
            ConfigError: names the first file that is missing or not as it was written.
        """
        files = [file for folder in dict.fromkeys(folders) for file in _files(folder, stage)]
        files.sort(key=lambda file: file[1]["bytes"])
        self._damage: ConfigError | None = None
        size = 0
        while files and size + files[0][1]["bytes"] <= BYTES_BEFORE:
            path, about = files.pop(0)
            size += about["bytes"]
            _check(path, about)
        left = [] if stage in PAGES else files
        self._thread = threading.Thread(target=self._check_all, args=(left,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all files are checked.

        Raises:
            ConfigError: names the first file that is not as it was written.
        """
        if self._thread.is_alive():
            log.info("waiting for the checksums of the inputs")
        self._thread.join()
        if self._damage is not None:
            raise self._damage

    def _check_all(self, files: list[tuple[Path, Mapping[str, Any]]]) -> None:
        try:
            for path, about in files:
                _check(path, about)
        except ConfigError as error:
            self._damage = error
        except OSError as error:
            self._damage = ConfigError(f"{error.filename} cannot be read: {error}")


def check_file(path: Path) -> None:
    """Check a file against the manifest of the job that wrote it; without a manifest there is nothing to compare.

    Raises:
        ConfigError: if it is not as it was written.
    """
    path = Path(path).resolve()
    for folder in (path.parent, path.parent.parent):  # a job's folder may have one below it
        with suppress(ConfigError):  # no manifest, or not one of ours
            outputs = read_manifest(folder)["outputs"]
            if (about := outputs.get(str(path.relative_to(folder)))) is not None:
                break
    else:
        return
    _check(path, about)


def to_the_present(folders: Iterable[Path]) -> None:
    """Manifests from the future, when the clock has gone back, are of now: Snakemake refuses to have older outputs.

    Nothing else goes by modification times; whether an input has changed is decided by its content.
    """
    for folder in folders:
        path = folder / MANIFEST
        with suppress(OSError):  # gone, or not ours to touch
            if path.stat().st_mtime > time.time():  # noqa: TID251, what it says now is asked
                os.utime(path)


def _files(folder: Path, stage: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    manifest = _visible_manifest(folder)
    _check_belongs(folder, manifest)
    patterns = CHECKED_WHEN_READ["*"]
    if stage != "index":
        patterns += CHECKED_WHEN_READ.get(manifest["stage"], ())
    for name, about in manifest["outputs"].items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            yield folder / name, about


def _visible_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a job whose files are all there; a network file system may show them a little late."""
    deadline = time.monotonic() + LATENCY_SECONDS
    while True:
        try:
            manifest = read_manifest(folder)
            check_outputs(folder, manifest)
            return manifest
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _check_belongs(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that a manifest is as it was written, and of this folder."""
    stage, settings = manifest["stage"], manifest["settings"]
    if content_id(stage, settings, manifest["outputs"]) != manifest["id"]:
        raise ConfigError(
            f"{folder / MANIFEST} was changed after it was written. Hint: delete it and run snakemake again"
        )
    settings, inputs = deciding(settings, manifest["inputs"])
    versions = {name: Path(about["manifest"]).parent.name for name, about in inputs.items()}
    if not all(map(_VERSION.fullmatch, (folder.name, *versions.values()))):
        return  # replayed by hand, somewhere else
    version = version_of(stage, settings, versions)
    if folder.name != version:  # in a folder of any name: stages may be links to other disks
        raise ConfigError(
            f"{folder / MANIFEST} does not belong here: it is of {stage}/{version}. "
            "Hint: delete it and run snakemake again"
        )


def _check(path: Path, about: Mapping[str, Any]) -> None:
    if (found := sha256(path)) != about["sha256"]:
        raise ConfigError(
            f"{path} is damaged: its sha256 is {found[:12]}..., not {about['sha256'][:12]}... as when it was written. "
            f"Hint: delete {MANIFEST} of its job and run snakemake again"
        )

"""Provenance: what a manifest says of how its files were made, and the check that they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from clipgraft.config import ConfigError

MANIFEST = "manifest.json"
PACKAGES = (
    "clipgraft",
    "torch",
    "open_clip_torch",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "img2dataset",
)


class _Manifest(dict[str, Any]):
    """A manifest that names its file where a key is missing."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self.path} has no `{key}`. Hint: delete it and run snakemake again")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read `manifest.json` (or the one in a folder).

    Raises:
        ConfigError: if there is none, or it is not one; also later, where a key is read that it lacks.
    """
    path = Path(path)
    path = path if path.name == MANIFEST else path / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        manifest["stage"]
        for name in manifest["outputs"]:  # files of these names are replaced and deleted
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise ValueError(f"its output {name!r} leads out of its folder")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist: the job that writes it has not finished"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a manifest ({error}). Hint: delete it and run snakemake again"
        ) from None
    named = _Manifest(manifest)
    named.path = path
    return named


def check_outputs(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that all files a manifest lists are there with the recorded size.

    Raises:
        ConfigError: names the first file that is missing or has another size.
    """
    for name, about in manifest["outputs"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != about["bytes"]:
            state = (
                "is missing"
                if size is None
                else f"has {size:,} bytes instead of {about['bytes']:,}"
            )
            raise ConfigError(
                f"{path} {state}, so {folder} is not whole. Hint: delete {folder / MANIFEST} and run snakemake again"
            )


def describe_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_id(stage: str, settings: Mapping[str, Any], outputs: Mapping[str, Any]) -> str:
    """Identity of a finished job by what it produced: 16 hex digits."""
    hashes = {name: about["sha256"] for name, about in outputs.items()}
    return hashlib.sha256(
        json.dumps([stage, settings, hashes], sort_keys=True).encode()
    ).hexdigest()[:16]


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout, with `+` if files differ from it; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + (
            "+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, and devices (asked of torch only if it is loaded)."""
    import sys

    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        about["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

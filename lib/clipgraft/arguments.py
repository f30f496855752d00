"""Arguments: the command line of every script, and a change of the settings that it hands over."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clipgraft.config import ConfigError
from clipgraft.versions import MEMORY


def parse(doc: str) -> argparse.Namespace:
    """Read the command line; `doc` is what `--help` says."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifest", nargs="?", type=Path, help="replay this finished job (its manifest.json)"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=MANIFEST",
        help="manifest of the job an input comes from",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", help="what log lines begin with (default: the script's name)")
    parser.add_argument("--log", type=Path, help="also log to this file")
    return parser.parse_args()


def with_change(settings: Mapping[str, Any], key: str, value: str) -> dict[str, Any]:
    """Settings with one value changed; `key` is a dotted path, or its last part where that is unique.

    Raises:
        ConfigError: if there is no such setting, or several, or if the value cannot be read.
    """
    if key in (*MEMORY, "precision"):  # not always among the settings that a job is handed
        return {**settings, key: _value(key, value)}
    paths = [path for path in _paths(settings) if path == key or path.endswith(f".{key}")]
    exact = [path for path in paths if path == key] or paths
    if len(exact) != 1:
        found = (
            f"is ambiguous: {', '.join(exact)}"
            if exact
            else f"is none of {', '.join(_paths(settings))}"
        )
        raise ConfigError(f"--set {key}={value}: {key} {found}")
    changed = json.loads(json.dumps(settings))
    *parents, leaf = exact[0].split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[leaf] = _value(key, value)
    return dict(changed)


def _value(key: str, text: str) -> Any:
    try:
        return json.loads(text)  # as rules write it; YAML reads 1e-4 as text, and takes emoji apart
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}={text}: the value is not YAML: {error}") from None


def _paths(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in settings.items():
        paths.append(prefix + key)
        if isinstance(value, Mapping):
            paths += _paths(value, f"{prefix}{key}.")
    return paths

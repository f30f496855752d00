"""The config: reading and validating it, with errors that name the key, the value and a hint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clipgraft.recipes import hint
from clipgraft.settings import RunSettings, S
from clipgraft.sources import SOURCE_KINDS


class ConfigError(ValueError):
    """What a user wrote cannot work. The message says what, where, which value, and a hint."""


def load_config(raw: Mapping[str, Any]) -> dict[str, RunSettings]:
    """Validate a config as read from YAML and return the settings of each run.

    Args:
        raw: the mapping of `config.yaml`; `runs` holds overlays by run name (default: one run `main`).

    Raises:
        ConfigError: names the key, the value and a hint; also says in which run an overlay is wrong.
    """
    shared = {key: value for key, value in raw.items() if key != "runs"}
    overlays = raw.get("runs") or {"main": {}}
    if not isinstance(overlays, Mapping):
        raise ConfigError(
            f"runs must map names to overlays, got {type(overlays).__name__} {overlays!r}"
        )
    runs = {}
    for name, overlay in overlays.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise ConfigError(f"run name {name!r}: use letters, digits, - and _ only")
        if overlay is not None and not isinstance(overlay, Mapping):
            raise ConfigError(f"runs.{name} must be a mapping of settings, got {overlay!r}")
        where = f"run {name!r}: " if overlay else ""
        runs[str(name)] = validate(RunSettings, merge(shared, overlay or {}), where)
    return runs


def read_config(*paths: str | Path) -> dict[str, RunSettings]:
    """Read YAML files, later ones laid over earlier ones, and validate the result."""
    raw: dict[str, Any] = {}
    for path in paths:
        try:
            layer = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
        raw = merge(raw, layer or {})
    return load_config(raw)


def merge(base: Any, overlay: Any) -> Any:
    """Lay one nested mapping over another; lists and scalars are replaced."""
    if not isinstance(base, Mapping) or not isinstance(overlay, Mapping):
        return overlay
    kind = overlay.get("kind", base.get("kind"))
    if kind != base.get("kind"):
        return overlay  # another kind of source has other keys
    return {**base, **{key: merge(base.get(key), value) for key, value in overlay.items()}}


def validate(model: type[S], raw: Any, where: str = "") -> S:
    """Validate `raw` as `model`, turning pydantic's report into one clear message.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        # A misspelt key is the cause, the missing one its consequence: name it first.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        lines = [where + _explain(model, problem) for problem in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def schema() -> dict[str, Any]:
    """The JSON schema of `config.yaml`, for editors; written to workflow/schemas by `make schema`."""
    run = RunSettings.model_json_schema()
    overlay = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
    run["properties"]["runs"] = {"description": "Named overlays on the shared settings.", **overlay}
    run["title"] = "clipgraft config"
    return run


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = _file_path(problem["loc"])
    where = ".".join(str(part) for part in path)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        parent = ".".join(str(part) for part in path[:-1])
        known = list(_known_keys(model, problem["loc"][:-1]))
        inside = f" in {parent}" if parent else ""
        return f"unknown key `{path[-1]}`{inside}{hint(str(path[-1]), known)}"
    if problem["type"] == "missing":
        return f"missing key `{where}`"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {_short(value)}: {message[0].lower()}{message[1:]}"


def _file_path(path: tuple[Any, ...]) -> list[Any]:
    """Without the kinds of sources, which stand in pydantic's path but not in the file."""
    return [
        part
        for before, part in zip((None, *path), path, strict=False)
        if part not in SOURCE_KINDS or before == "download"
    ]


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> Iterator[str]:
    """Keys that would have been right beside the wrong one, by walking the JSON schema."""
    root = model.model_json_schema()
    node: Any = root
    for part in path:
        node = _deref(root, node)
        if part in SOURCE_KINDS and "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            patterns = list(node.get("patternProperties", {}).values())
            node = node.get("properties", {}).get(part) or next(
                iter(patterns), node.get("additionalProperties", {})
            )
    yield from _deref(root, node).get("properties", {})


def _deref(root: Mapping[str, Any], node: Any) -> Any:
    while isinstance(node, Mapping) and "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node if isinstance(node, Mapping) else {}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))

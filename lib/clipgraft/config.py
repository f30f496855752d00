"""The config: reading and validating it, with errors that name the key, the value and a hint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clipgraft.reductions import REDUCTION_KINDS, TEXT_MASKS
from clipgraft.run_settings import RunSettings
from clipgraft.sources import SOURCE_KINDS
from clipgraft.spelling import hint

S = TypeVar("S", bound=BaseModel)


class ConfigError(ValueError):
    """What a user wrote cannot work. The message says what, where, which value, and a hint."""


def local_path(name: str) -> Path:
    """A path as written: `$NAME` from the environment, `~` the home folder.

    Raises:
        ConfigError: if nobody knows that home folder.
    """
    try:
        return Path(os.path.expandvars(name)).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{name!r}: there is no such home folder. Hint: the path without ~"
        ) from None


def load_config(raw: Mapping[str, Any]) -> dict[str, RunSettings]:
    """Validate a config as read from YAML and return the settings of each run.

    Args:
        raw: the mapping of `config.yaml`; `runs` holds overlays by run name, `sweep` overlays by axis and
            point. With neither there is one run, `main`.

    Raises:
        ConfigError: names the key, the value and a hint; also says in which run an overlay is wrong.
    """
    return {name: validate(RunSettings, merged, where) for name, where, merged in _merged(raw)}


def raw_runs(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each run as they were written, overlays laid over what is shared.

    Raises:
        ConfigError: if an overlay cannot be laid over it.
    """
    return {name: merged for name, _, merged in _merged(raw)}


def _merged(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name of each run, what its errors begin with, and its settings."""
    shared = {key: value for key, value in raw.items() if key not in ("runs", "sweep")}
    axes = _axes(raw)
    layers = {
        run: [axes[axis][name] for axis, name in point.items()]
        for run, point in sweep_points(raw).items()
    }
    for name, overlay in _overlays(
        "runs", raw.get("runs") or ({} if axes else {"main": {}})
    ).items():
        if name in layers or name == "sweep":
            raise ConfigError(f"runs.{name}: the sweep has that name. Hint: call the run otherwise")
        layers[name] = [overlay]
    for name, overlays in layers.items():
        where = f"run {name!r}: " if any(overlays) else ""
        if any("slurm" in overlay for overlay in overlays):
            raise ConfigError(
                f"{where}`slurm` is of the site, which all runs share. Hint: move it to the top"
            )
        try:
            yield name, where, reduce(merge, overlays, shared)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None


def sweep_points(raw: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The runs of `sweep`, all points of an axis with all points of the others: run to axis to point.

    Raises:
        ConfigError: if an axis is no mapping of names to overlays.
    """
    axes = _axes(raw)
    points = product(*axes.values()) if axes else ()
    return {"-".join(point): dict(zip(axes, point, strict=True)) for point in points}


def _axes(raw: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    sweep = _overlays("sweep", raw.get("sweep") or {})
    axes = {axis: _overlays(f"sweep.{axis}", points) for axis, points in sweep.items()}
    for axis, points in axes.items():
        if not points:
            raise ConfigError(
                f"sweep.{axis} has no points. Hint: map names to overlays, or leave it out"
            )
        for name, overlay in points.items():
            if "-" in name:
                raise ConfigError(
                    f"sweep.{axis}: point {name!r}: `-` joins the points of a run's name. Hint: _"
                )
            if "scaling" in overlay:
                raise ConfigError(
                    f"sweep.{axis}.{name} sets `scaling`, which all runs share. Hint: move it to the top"
                )
    return axes


def _overlays(where: str, given: Any) -> dict[str, Mapping[str, Any]]:
    """Overlays by name, checked; nothing stands for an empty one."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{where} must map names to overlays, got {type(given).__name__} {given!r}"
        )
    for name, overlay in given.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise ConfigError(f"{where}: name {name!r}: use letters, digits, - and _ only")
        if overlay is not None and not isinstance(overlay, Mapping):
            raise ConfigError(f"{where}.{name} must be a mapping of settings, got {overlay!r}")
    return {str(name): overlay or {} for name, overlay in given.items()}


def read_config(*paths: str | Path) -> dict[str, RunSettings]:
    """Read YAML files, later ones laid over earlier ones, and validate the result."""
    return load_config(read_layers(*paths))


def read_layers(*paths: str | Path) -> dict[str, Any]:
    """YAML files, later ones laid over earlier ones.

    Raises:
        ConfigError: if one cannot be read.
    """
    raw: dict[str, Any] = {}
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                layer = _Loader(file).get_single_data()
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from None
        if layer is not None and not isinstance(layer, Mapping):
            raise ConfigError(
                f"config file {path} is no mapping, but a {type(layer).__name__}. Hint: sections, as in config.yaml"
            )
        raw = merge(raw, layer or {})
    return raw


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: by itself it keeps the last one, and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                raise ConfigError(
                    f"`{name}` stands twice in one section, in line {lines[name]} and in line {line}. Hint: remove one"
                )
            lines[name] = line
        return node


def with_nulls(given: Any) -> Any:
    """What `--config` said, where Snakemake leaves `null` a word."""
    if isinstance(given, Mapping):
        return {key: with_nulls(value) for key, value in given.items()}
    if isinstance(given, list):
        return [with_nulls(value) for value in given]
    return None if given == "null" else given


def merge(base: Any, overlay: Any, where: str = "") -> Any:
    """Lay one nested mapping over another; lists and scalars are replaced.

    A mapping over a list whose items have names, such as `pretrain`, is laid over the items of its keys. A source or
    a reduction of another kind replaces the one that was there, since it has other keys.

    Raises:
        ConfigError: if the list has no item of that name, or an item without one; `where` is its path.
    """
    if not isinstance(overlay, Mapping):
        return overlay
    names = _names(base)
    if names:
        if len(names) < len(base):
            raise ConfigError(
                f"{where}: {len(base) - len(names)} of {len(base)} items have no `name` ({', '.join(names)} have), and an "
                "overlay maps names. Hint: name each"
            )
        for name in overlay:
            if name not in names:
                raise ConfigError(f"unknown name `{name}` in {where}{hint(str(name), names)}")
        items = zip(names, base, strict=True)
        return [merge(item, overlay.get(name, {}), f"{where}.{name}") for name, item in items]
    if not isinstance(base, Mapping):
        return overlay
    kind = overlay.get("kind", base.get("kind"))
    if kind != base.get("kind") and _is_replaced(where, kind):
        return overlay
    inner = {
        key: merge(base.get(key), value, f"{where}.{key}" if where else str(key))
        for key, value in overlay.items()
    }
    return {**base, **inner}


def _is_replaced(where: str, kind: Any) -> bool:
    """Whether another kind has other keys: of sources and reductions, not of losses or baselines."""
    is_reduction = where.rsplit(".", 1)[-1] in (*REDUCTION_KINDS, *TEXT_MASKS)
    return is_reduction or (isinstance(kind, str) and kind in SOURCE_KINDS)


def _names(items: Any) -> list[str]:
    """Names of the items of a list, or nothing where it has others."""
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        return []
    return [str(item["name"]) for item in items if "name" in item]


def validate(model: type[S], raw: Any, where: str = "") -> S:
    """Validate `raw` as `model`, turning pydantic's report into one clear message.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        # A misspelt key is the cause, the missing one its consequence: name it first.
        problems = sorted(
            _chosen(error.errors()), key=lambda problem: problem["type"] != "extra_forbidden"
        )
        lines = [where + _explain(model, problem) for problem in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def schema() -> dict[str, Any]:
    """The JSON schema of `config.yaml`, for editors; written to workflow/schemas by `make schema`."""
    run = RunSettings.model_json_schema()
    overlays = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
    about = (
        "Named overlays on the shared settings; in them, in those of `sweep` and in later config files `pretrain` may "
        "map phases to what changes."
    )
    run["properties"]["runs"] = {"description": about, **overlays}
    about = (
        "Axes: each maps its points to overlays; all combinations are runs, named by their points."
    )
    run["properties"]["sweep"] = {
        "description": about,
        "type": "object",
        "additionalProperties": overlays,
    }
    run["title"] = "clipgraft config"
    return run


def _chosen(problems: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Of a setting that may be a value or a list: what is wrong with the one that it is. Pydantic tells of both."""
    paths = [problem["loc"] for problem in problems]
    either = {path[:i] for path in paths for i, part in enumerate(path) if "list[" in str(part)}
    for problem, path in zip(problems, paths, strict=True):
        place = next((i for i in range(len(path)) if path[:i] in either), None)
        if place is None:
            yield problem
        elif (
            isinstance(problem["input"], list) == ("list[" in path[place]) or len(path) > place + 1
        ):
            yield {**problem, "loc": path[:place] + path[place + 1 :]}


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
    if problem["type"] == "union_tag_not_found":
        return f"missing key `{where}.kind`"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        message = "input should be a mapping"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if problem["type"] == "list_type" and where == "pretrain" and isinstance(value, Mapping):
        message += (
            ". Hint: a list; names stand for its items in what is laid over one: `runs`, `sweep`, later config files "
            "and --config"
        )
    elif problem["type"] == "list_type":
        message += (
            f". Hint: [{'...' if isinstance(value, Mapping) else json.dumps(value, default=str)}]"
        )
    power = re.fullmatch(r"\d+(\.\d*)?e\+?\d{1,2}", str(value))
    if problem["type"] == "int_parsing" and power and float(power[0]).is_integer():
        message += f". Hint: {float(power[0]):.0f}, since YAML takes this for a text"
    return f"{where} = {_short(value)}: {message[0].lower()}{message[1:]}"


def _file_path(path: tuple[Any, ...]) -> list[Any]:
    """Without the kinds of sources and reductions, which stand in pydantic's path but not in the file."""
    before = (None, None, *path)
    return [
        part
        for part, parent, grandparent in zip(path, before[1:], before, strict=False)
        if not (
            part in SOURCE_KINDS and (grandparent in ("download", "sources") or parent == "source")
        )
        and part not in REDUCTION_KINDS.get(str(parent), ())
    ]


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> Iterator[str]:
    """Keys that would have been right beside the wrong one, by walking the JSON schema."""
    root = model.model_json_schema()
    node: Any = root
    for part in path:
        node = _deref(root, node)
        kinds = [each["discriminator"] for each in _choices(node) if "discriminator" in each]
        if kinds and part in kinds[0]["mapping"]:
            node = {"$ref": kinds[0]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            patterns = list(node.get("patternProperties", {}).values())
            node = node.get("properties", {}).get(part) or next(
                iter(patterns), node.get("additionalProperties", {})
            )
    yield from _deref(root, node).get("properties", {})


def _choices(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A node, and what else it may be: the mapping of a setting that may also be a name."""
    return [node, *node.get("anyOf", [])]


def _deref(root: Mapping[str, Any], node: Any) -> Any:
    optional = node.get("anyOf", []) if isinstance(node, Mapping) else []
    node = next((each for each in optional if "$ref" in each), node)  # a section, or null
    while isinstance(node, Mapping) and "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node if isinstance(node, Mapping) else {}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))

"""Versions: what a job is called on disk, what tells that its local files have changed, and what code it uses.

A job's version is a hash of its stage, its settings and the versions of its inputs, so a changed setting makes a
new folder beside the old one, and runs that share a prefix share its files. Code is not part of the version: each
job records a fingerprint of the code it reaches, and an edit re-runs it in place.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from clipgraft import settings as cfg
from clipgraft.architectures import our_file
from clipgraft.aside import written_aside
from clipgraft.config import ConfigError, local_path, validate
from clipgraft.evalset_tasks import data_folder
from clipgraft.local_files import identity, listing, local_files, sampled
from clipgraft.loss_settings import ReferenceSettings
from clipgraft.sources import Settings, UrlSource

FAILURES = ".failures"  # of a job's folder: one line for each time that its task has failed
T = TypeVar("T")

LIBRARY = Path(__file__).resolve().parent
WATCHED = "watched"  # the input that has the samples of `watch`
# Settings of a training that change its memory or its speed, not its result, and their defaults.
MEMORY = {"parallel": "ddp", "grad_checkpointing": False, "compile": False, "cuda_graphs": False}
# Settings that came after there were versions, by their path (`loss.beta`), and the value that is as if there were none:
# left out, so that what was trained before keeps its name.
LATER: dict[str, Any] = {"precision": None}
# Setting of a source of URLs that decides whether its download fails, not what it gives: versions are made as if it
# were at its default.
MIN_SUCCESS = "min_success"
_MEMO = LIBRARY / "__pycache__" / "fingerprints.json"

# Floor 0 and the launcher move settings and bytes, never values: editing them re-runs nothing.
PLUMBING = {
    "clipgraft",
    *(
        f"clipgraft.{name}"
        for name in (
            "settings",
            "sources",
            "loss_settings",
            "moe_settings",
            "evaluation_settings",
            "baseline_settings",
            "model_settings",
            "spelling",
            "aside",
            "recipes",
            "resource_settings",
            "config",
            "versions",
            "planning",
            "job",
            "lock",
            "orphan",
            "integrity",
            "provenance",
            "log",
            "runs",
            "compare",
            "launch",
            "architectures",
            "plan",
            "footprint",
            "scale",
        )
    ),
    "clipgraft.evaluation.watch",  # changes no weights: an edit of the evaluation trains nothing again
}


@dataclass(frozen=True)
class PlannedJob:
    """One node of the DAG.

    Attributes:
        stage: the rule and script.
        name: for people, unique in a run: `pretrain/short`, `finetune_expert/2`, `evaluate/base/renders`.
        settings: what the script is handed, JSON-able, complete; hashed, but for a `watch` that changes nothing.
        inputs: input name to the jobs it comes from.
        sources: local files outside `results/` that a download or an index reads.
    """

    stage: str
    name: str
    settings: dict[str, Any]
    inputs: dict[str, PlannedJob]
    sources: tuple[str, ...] = ()

    @cached_property
    def version(self) -> str:
        """8 hex digits."""
        settings, inputs = deciding(self.settings, self.inputs)
        return version_of(self.stage, settings, {name: of.version for name, of in inputs.items()})

    @property
    def folder(self) -> str:
        """Where its outputs are, relative to the results folder."""
        return f"{self.stage}/{self.version}"


def version_of(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """8 hex digits that name a job by its stage, the settings that decide and the versions of its inputs."""
    return _short_hash(json.dumps([stage, settings, inputs], sort_keys=True))


def num_failures(folder: Path) -> int:
    """How often the task of a job has failed so far (`evaluation/failure.py`)."""
    file = folder / FAILURES
    return len(file.read_text().splitlines()) if file.exists() else 0


def deciding(
    settings: Mapping[str, Any], inputs: Mapping[str, T]
) -> tuple[dict[str, Any], dict[str, T]]:
    """The settings and inputs that results depend on.

    All but how a training fits into memory and is compiled, later settings at the value that changes nothing, when a
    download fails, and what watches a training, unless its best model is kept.
    """
    settings = {name: value for name, value in settings.items() if name not in MEMORY}
    for path, value in LATER.items():
        settings = _left_out(settings, path.split("."), value)
    source = settings.get("source", {})
    if MIN_SUCCESS in source:
        default = UrlSource.model_fields[MIN_SUCCESS].default
        settings = {**settings, "source": {**source, MIN_SUCCESS: default}}
    watch = settings.get("watch")
    if watch is None or watch.get("best"):
        return settings, dict(inputs)
    others = {name: of for name, of in inputs.items() if name != WATCHED}
    return {**settings, "watch": None}, others


def _left_out(settings: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Settings without the one at a path, if it has this value."""
    first, *rest = path
    inner = settings.get(first, value)
    if rest and isinstance(inner, Mapping):
        return {**settings, first: _left_out(inner, rest, value)}
    if rest or inner != value:
        return dict(settings)
    return {name: each for name, each in settings.items() if name != first}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def seed_for(seed: int, *words: object) -> int:
    """A seed of its own for every stochastic job: the run's seed mixed with the job's name."""
    return int(_short_hash(json.dumps([seed, *map(str, words)])), 16) % 2**31


# --- local files that a job reads ---------------------------------------------------------------------------


def sources_of(settings: Settings, is_start: bool = True) -> Iterator[str]:
    """What tells that the local files of a job have changed: their names, sizes and some of their content.

    A changed file re-runs the job that reads it, a touched one does not.

    Args:
        settings: of the job.
        is_start: whether its model starts anew; a later phase does not read the weights that the first one did.
    """
    if isinstance(settings, cfg.IndexJob) and settings.wordpiece is not None:
        yield from map(identity, _matching(settings.wordpiece))
    if isinstance(settings, cfg.PretrainJob) and (path := our_file(settings.model)):
        yield identity(path)
    if isinstance(settings, cfg.PretrainJob) and is_start and settings.model.pretrained:
        if (path := local_path(settings.model.pretrained)).is_file():
            yield sampled(path)
    if isinstance(settings, cfg.ReferenceJob):
        yield from map(sampled, _weights(settings))
    if isinstance(settings, cfg.EvalsetJob):
        yield listing(str(data_folder(local_path(settings.folder), settings.evalset)))
    if isinstance(settings, cfg.PretrainJob):
        for reference in settings.references:
            yield from map(sampled, _weights(reference))
    if not isinstance(settings, cfg.DownloadJob):
        return
    for key in ("folder", "images"):
        if (name := getattr(settings.source, key, None)) is not None:
            yield listing(name)
    for key in ("tars", "table", "files", "classes", "annotations"):
        given = getattr(settings.source, key, None)
        for pattern in [given] if isinstance(given, str) else given or []:
            if "://" not in pattern:  # what is remote is taken at its name
                yield from map(identity, _matching(pattern))


def _matching(pattern: str) -> list[Path]:
    """`local_files`, also of what is no pattern to pathlib: here, since an edit there downloads everything again."""
    try:
        return local_files(pattern)
    except ConfigError:
        raise
    except (IndexError, ValueError):
        raise ConfigError(
            f"{pattern!r} names no files. Hint: 'folder/*.tar'; with those in its folders 'folder/**/*.tar'"
        ) from None


def weights_of(stage: str, settings: Mapping[str, Any], is_start: bool) -> list[str]:
    """`sources_of` a job that reads local weights beside its inputs, from its settings as it is handed them.

    Args:
        stage: of the job.
        settings: JSON-able.
        is_start: as in `sources_of`.
    """
    if stage == "pretrain":
        return list(sources_of(validate(cfg.PretrainJob, settings), is_start))
    if stage == "embed" and "model" in settings:
        return list(sources_of(validate(cfg.ReferenceJob, settings)))
    return []


def _weights(reference: ReferenceSettings | cfg.ReferenceJob) -> list[Path]:
    """The local files of a reference; none if it is public."""
    if reference.pretrained is None:
        folder = local_path(reference.model)
        files = [folder / name for name in ("model.json", "model.safetensors")]
    else:
        files = [local_path(reference.pretrained)]
    return [path for path in files if path.is_file()]


# --- code ---------------------------------------------------------------------------------------------------


def fingerprint(script: Path) -> str:
    """Hash of the code that a script can reach: itself and, through imports, modules of the library.

    Comments, docstrings and formatting do not count, nor does the plumbing of floor 0.

    Args:
        script: a file of `scripts/`.
    Returns:
        12 hex digits.
    """
    digest, imports = _parsed(script)
    digests, todo = {"": digest}, list(imports)
    while todo:
        module = todo.pop()
        path = _module_path(module)
        if module in digests or module in PLUMBING or path is None:
            continue
        digests[module], imports = _parsed(path)
        todo += imports
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:12]


@cache
def _parsed(path: Path) -> tuple[str, list[str]]:
    """Digest of a file's tree, and the modules of the library that it imports anywhere.

    Remembered beside compiled Python until the file or this one changes: parsing is a tenth of a dry run.
    """
    stamp = [[file.stat().st_mtime_ns, file.stat().st_size] for file in (path, Path(__file__))]
    known = _memo().get(str(path))
    if known is None or known[0] != stamp:
        tree = ast.parse(path.read_text(), str(path))
        words: list[str] = []
        _write_words(tree, words)
        digest = hashlib.sha256("\0".join(words).encode()).hexdigest()
        known = _memo()[str(path)] = [stamp, digest, _imports(tree, path)]
        with suppress(OSError):  # a library that is not ours to write
            _MEMO.parent.mkdir(exist_ok=True)
            with written_aside(_MEMO, is_shared=True) as aside:
                aside.write_text(json.dumps(_memo()))
    return known[1], known[2]


@cache
def _memo() -> dict[str, list[Any]]:
    try:
        return dict(json.loads(_MEMO.read_text()))
    except (OSError, ValueError):
        return {}


def _write_words(node: Any, words: list[str]) -> None:
    """The tree as words: empty fields, positions and docstrings left out (same on every Python)."""
    if isinstance(node, list):
        words.append("[")
        for item in node:
            _write_words(item, words)
        words.append("]")
    elif isinstance(node, ast.AST):
        words.append(type(node).__name__)
        fields = node.__dict__
        for name in node._fields:
            value = fields.get(name)
            if name == "body" and _has_docstring(node):
                value = fields["body"][1:]
            if value is not None and value != []:
                words.append(name)
                _write_words(value, words)
        words.append(";")
    else:
        words.append(repr(node))


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = node.body[0] if node.body else None
    is_constant = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return is_constant and isinstance(first.value.value, str)  # type: ignore[union-attr]


def _imports(tree: ast.Module, path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(LIBRARY.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return sorted({name for name in found if name.split(".")[0] == "clipgraft"})


def _module_path(module: str) -> Path | None:
    path = LIBRARY.parent.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None

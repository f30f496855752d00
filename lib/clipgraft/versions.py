"""Versions: which jobs a run consists of, what each is called on disk, and what code it uses.

A job's version is a hash of its stage, its settings and the versions of its inputs, so a changed setting makes a
new folder beside the old one, and runs that share a prefix share its files. Code is not part of the version: each
job records a fingerprint of the code it reaches, and an edit re-runs it in place.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clipgraft import config as cfg

LIBRARY = Path(__file__).resolve().parent
SCRIPTS = LIBRARY.parent.parent / "scripts"

# Floor 0 and the launcher move settings and bytes, never values: editing them re-runs nothing.
PLUMBING = {"clipgraft", *(f"clipgraft.{name}" for name in ("config", "versions", "job", "provenance", "log", "launch"))}


@dataclass(frozen=True)
class PlannedJob:
    """One node of the DAG.

    Attributes:
        stage: the rule and script.
        name: for people, unique in a run: `pretrain/short`, `finetune_expert/2`, `evaluate/base/renders`.
        settings: what the script is handed, JSON-able, complete; hashed.
        inputs: input name to the jobs it comes from.
        sources: local files outside `results/` that a download reads.
    """

    stage: str
    name: str
    settings: dict[str, Any]
    inputs: dict[str, PlannedJob]
    sources: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """8 hex digits."""
        return _version(self)

    @property
    def folder(self) -> str:
        """Where its outputs are, relative to the results folder."""
        return f"{self.stage}/{self.version}"


@cache
def _version_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _version(job: PlannedJob) -> str:
    known = job.__dict__.get("_known_version")
    if known is None:
        inputs = {name: of.version for name, of in job.inputs.items()}
        known = _version_of(json.dumps([job.stage, job.settings, inputs], sort_keys=True))
        job.__dict__["_known_version"] = known  # frozen, so it cannot go stale
    return known


def plan_run(name: str, run: cfg.RunSettings) -> list[PlannedJob]:
    """All jobs of a run, inputs before users.

    Args:
        name: the run's name; only the report depends on it.
        run: validated settings.
    """
    jobs: dict[str, PlannedJob] = {}

    def add(stage: str, key: str, settings: cfg.Settings, inputs: Mapping[str, PlannedJob | None]) -> PlannedJob:
        job = PlannedJob(
            stage,
            f"{stage}/{key}" if key else stage,
            settings.model_dump(mode="json"),
            {slot: of for slot, of in inputs.items() if of is not None},
            tuple(_sources(settings)),
        )
        return jobs.setdefault(job.name, job)

    seed = {"seed": run.seed}
    indexes = {}
    for data, source in run.download.items():
        download = add("download", data, source, {})
        tokenize = data == "train"
        indexes[data] = add("index", data, cfg.IndexJob(**dict(run.index), tokenize=tokenize), {"download": download})
    index = indexes["train"]

    model = None
    for phase in run.pretrain:
        shard = add("shard", phase.name, cfg.ShardJob(**dict(run.shard), image_size=phase.image_size), {"index": index})
        settings = cfg.PretrainJob(**dict(phase), model=run.model, **seed)
        model = add("pretrain", phase.name, settings, {"init": model, "index": index, "shard": shard})
    assert model is not None
    base, data = model, {"index": index, "shard": shard}

    experts, labels = [base], None
    tune = {key: value for key, value in dict(run.finetune_expert).items() if key not in ("init", "controls")}
    for k in range(1, run.moe.num_experts):
        embed = add("embed", str(k - 1), run.embed, {"model": experts[-1], **data})
        labels = add("cluster", str(k), cfg.ClusterJob(**dict(run.cluster), **seed), {"embed": embed, "previous": labels})
        init = experts[-1] if run.finetune_expert.init == "previous" else base
        settings = cfg.ExpertJob(**tune, batches="homogeneous", **seed)
        experts.append(add("finetune_expert", str(k), settings, {"init": init, "labels": labels, **data}))
    controls = {}
    for control, times in run.finetune_expert.controls.items():
        settings = cfg.ExpertJob(**{**tune, "samples_seen": tune["samples_seen"] * times}, batches="ordinary", **seed)
        controls[control] = add("finetune_expert", control, settings, {"init": base, **data})

    slots = {f"expert_{k}": expert for k, expert in enumerate(experts)}
    upcycled = add("assemble", "", cfg.AssembleJob(**dict(run.moe), **seed), slots)
    routed = add("finetune_router", "", cfg.RouterJob(**dict(run.finetune_router), **seed), {"init": upcycled, **data})

    models = {"base": base, **{f"expert_{k}": expert for k, expert in enumerate(experts) if k}, **controls}
    models |= {"upcycled": upcycled, "moe": routed}
    if len(run.pretrain) > 1:
        models = {run.pretrain[0].name: jobs[f"pretrain/{run.pretrain[0].name}"], **models}
    for key, of in models.items():
        for task, settings in run.evaluate.tasks.items():
            job = cfg.EvaluateJob(**dict(settings))
            add("evaluate", f"{key}/{task}", job, {"model": of, "index": indexes[settings.data]})
    add("report", "", cfg.ReportJob(**dict(run.report), run=name), dict(jobs))
    return list(jobs.values())


def _sources(settings: cfg.Settings) -> Iterator[str]:
    """Names and sizes of the local files a source reads: a changed file re-runs its download, a touch does not."""
    if isinstance(settings, cfg.TarSource):
        yield from (f"{path.name}:{path.stat().st_size}" for path in local_files(settings.tars))
    elif isinstance(settings, cfg.UrlSource):
        yield from (f"{path.name}:{path.stat().st_size}" for path in local_files(settings.table))


def local_files(pattern: str) -> list[Path]:
    """Files that a glob matches, sorted; `$NAME` is read from the environment.

    Raises:
        ConfigError: if a variable is not set, or nothing matches.
    """
    expanded = os.path.expanduser(os.path.expandvars(pattern))
    if "$" in expanded:
        raise cfg.ConfigError(f"{pattern}: an environment variable in it is not set. Hint: export it")
    path = Path(expanded)
    root, tail = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (Path(), path)
    files = sorted(found for found in root.glob(str(tail)) if found.is_file())
    if not files:
        raise cfg.ConfigError(
            f"no file matches {pattern!r} (looked in {path.parent.resolve()}). Hint: paths are relative to the "
            "folder in which snakemake runs"
        )
    return files


# --- code ---------------------------------------------------------------------------------------------------


def fingerprint(script: Path) -> str:
    """Hash of the code that a script can reach: itself and, through imports, modules of the library.

    Comments, docstrings and formatting do not count, nor does the plumbing of floor 0.

    Args:
        script: a file of `scripts/`.
    Returns:
        12 hex digits.
    """
    digests, todo = {"": _digest(script)}, list(_imports(script))
    while todo:
        module = todo.pop()
        path = _module_path(module)
        if module in digests or module in PLUMBING or path is None:
            continue
        digests[module] = _digest(path)
        todo += _imports(path)
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:12]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(repr(_canonical(_tree(path))).encode()).hexdigest()


def _canonical(node: Any) -> Any:
    """The tree as nested tuples: empty fields, positions and docstrings left out (same on every Python)."""
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            fields["body"] = node.body[1:]
    return (type(node).__name__, *((name, _canonical(value)) for name, value in fields.items()))


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Modules of the library that a file imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(sorted({name for name in found if name.split(".")[0] == "clipgraft"}))


def _module_path(module: str) -> Path | None:
    path = LIBRARY.parent.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None

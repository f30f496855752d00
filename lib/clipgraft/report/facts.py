"""The facts of a page: what was run, where, with what; and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipgraft.compare import human
from clipgraft.report.evalset import EVALSET
from clipgraft.report.page_tables import Cell, Table
from clipgraft.report.read import Run, read_metrics, tokens_of
from clipgraft.report.sections import Section
from clipgraft.report.tables import to_csv

_OF_EVALSET = f"/{EVALSET}/"  # in the name of a job
_MAX_FILES = 4  # of a job, whose hashes are shown


def write_figures(sections: Sequence[Section], folder: Path) -> None:
    """Every figure as SVG, with its numbers as CSV."""
    folder.mkdir(exist_ok=True)
    for figure in (figure for section in sections for figure in section.figures):
        (folder / f"{figure.name}.svg").write_text(figure.svg)
        (folder / f"{figure.name}.csv").write_text(to_csv(figure.rows))


def subtitle(run: Run, seed: int | None = None) -> str:
    """Commit and hardware, each as often as they differ, and the seed of the run if there is one."""
    commits = dict.fromkeys(m["git"] for m in run.manifests.values() if m.get("git"))
    parts = [f"commit {', '.join(commits)}"] if commits else []
    parts += [" / ".join(machines(run))] if machines(run) else []
    parts += [] if seed is None else [f"seed {seed}"]
    return " \N{MIDDLE DOT} ".join(parts)


def machines(run: Run) -> list[str]:
    """What jobs ran on, each once."""
    manifests = run.manifests.values()
    return list(dict.fromkeys(_machine(m["hardware"]) for m in manifests if m.get("hardware")))


def _machine(hardware: Mapping[str, Any]) -> str:
    devices = hardware.get("devices") or []
    names = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)]
    return " + ".join(names) or f"{hardware['cores']} cores, {hardware['processor']}"


def provenance(run: Run) -> str:
    """Packages of all jobs, with their versions; two where jobs differ."""
    packages: dict[str, dict[str, None]] = {}
    for manifest in run.manifests.values():
        for name, version in (manifest.get("packages") or {}).items():
            packages.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' / '.join(versions)}" for name, versions in packages.items())


def run_section(run: Run) -> Section:
    """What was run and on what: costs, speed, versions, settings and hashes."""
    section = Section("run", "What was run")
    section.text = f"Packages: {provenance(run)}."
    section.tables = [_cost_table(run), *_speed_table(run), _jobs_table(run), _hashes_table(run)]
    return section


def _cost_table(run: Run) -> Table:
    """Time, devices, samples and disk of each stage."""
    by_stage: dict[str, dict[Path, dict[str, Any]]] = {}
    for name, manifest in run.manifests.items():  # a job that has two names counts once
        by_stage.setdefault(manifest["stage"], {})[run.folders[name].resolve()] = manifest
    rows = []
    for stage, jobs in by_stage.items():
        rows.append([Cell(stage), *_cost_cells(list(jobs.values()))])
    every = [manifest for jobs in by_stage.values() for manifest in jobs.values()]
    rows.append([Cell("all", is_best=True), *_cost_cells(every)])
    head = ["stage", "jobs", "minutes", "device hours", "samples seen", "memory, MB", "written, MB"]
    caption = (
        "Minutes are the sum over jobs, device hours those times the GPUs that each had (a machine without any counts as one "
        "device); memory is the most that one job took. Bad: evaluation or data preparation that costs more than training."
    )
    return Table("What it cost", head, rows, caption)


def _cost_cells(manifests: Sequence[Mapping[str, Any]]) -> list[Cell]:
    seconds = sum(m.get("seconds") or 0.0 for m in manifests)
    devices = sum((m.get("seconds") or 0.0) * _num_devices(m) for m in manifests) / 3600
    seen = sum(m.get("samples_seen") or 0 for m in manifests)
    memory = max((m.get("peak_memory_mb") or 0 for m in manifests), default=0)
    written = sum(each["bytes"] for m in manifests for each in m.get("outputs", {}).values())
    texts = [
        f"{len(manifests)}",
        f"{seconds / 60:,.1f}",
        f"{devices:,.3f}" if devices < 1 else f"{devices:,.1f}",
        human(seen) if seen else "-",
        f"{memory:,.0f}" if memory else "-",
        f"{written / 2**20:,.1f}",
    ]
    return [Cell(text) for text in texts]


def _num_devices(manifest: Mapping[str, Any]) -> int:
    """What a job ran on: its processes, one per device; the hardware is that of one of its nodes."""
    devices = len((manifest.get("hardware") or {}).get("devices") or [])
    return int(manifest.get("num_processes") or devices) if devices else 1


def _speed_table(run: Run) -> list[Table]:
    """Tokens and speed of every training; nothing if none trained."""
    rows = []
    for name, manifest in run.manifests.items():
        metrics = read_metrics(run.folders[name])
        if metrics and "image_tokens" in manifest:
            rate = float(np.median([row["samples_per_second"] for row in metrics]))
            wait = float(np.mean([row.get("data_wait", 0.0) for row in metrics]))
            texts = [
                f"{manifest['image_tokens']} + {manifest['text_tokens']}",
                f"{manifest['settings']['batch_size']:,}",
                f"{rate:,.0f}",
                f"{rate * tokens_of(manifest):,.0f}",
                f"{100 * wait:.1f} %",
                f"{metrics[-1]['seconds'] / 60:,.1f}",
                manifest.get("precision") or "-",
            ]
            rows.append([Cell(name), *map(Cell, texts)])
    if not rows:
        return []
    head = ["job", "image + text tokens", "batch", "samples a second", "tokens a second"]
    head += ["waited for data", "minutes", "precision"]
    caption = (
        "Medians over the training. Shorter sequences should give more samples a second and about as many tokens. Bad: fewer "
        "tokens a second with shorter sequences, or more than a few per cent of waiting."
    )
    return [Table("How fast it trained", head, rows, caption)]


def _jobs_table(run: Run) -> Table:
    """What each job was, took and was told."""
    rows = []
    for name, manifest in run.manifests.items():
        if _is_of_evalset(name):
            continue
        seen, memory = manifest.get("samples_seen"), manifest.get("peak_memory_mb")
        texts = [
            run.folders[name].resolve().name,
            f"{manifest.get('seconds') or 0:,.1f}",
            f"{memory:,}" if memory else "-",
            f"{seen:,}" if seen else "-",
        ]
        told = Cell(_settings_text(manifest["settings"]), is_code=True)
        rows.append([Cell(name), *map(Cell, texts), told])
    for title, jobs in _evalset_jobs(run).items():
        seconds = sum(run.manifests[job].get("seconds") or 0 for job in jobs)
        memory = max(run.manifests[job].get("peak_memory_mb") or 0 for job in jobs)
        texts = ["-", f"{seconds:,.1f}", f"{memory:,}" if memory else "-", "-"]
        told = Cell(f"folder: {run.manifests[jobs[0]]['settings']['folder']}", is_code=True)
        rows.append([Cell(f"{title}: {len(jobs)} tasks"), *map(Cell, texts), told])
    head = ["job", "version", "seconds", "memory, MB", "samples seen", "settings"]
    title = f"{len(run.manifests)} jobs: versions, costs and settings"
    return Table(title, head, rows, "", text_columns=(1, 5), long_columns=(5,), is_folded=True)


def _evalset_jobs(run: Run) -> dict[str, list[str]]:
    """Jobs of the evaluation folder by model: a line for each task of each is too many."""
    by_model: dict[str, list[str]] = {}
    for name in filter(_is_of_evalset, run.manifests):
        by_model.setdefault(name.rpartition(_OF_EVALSET)[0] + _OF_EVALSET[:-1], []).append(name)
    return by_model


def _is_of_evalset(job: str) -> bool:
    return _OF_EVALSET in job


def _hashes_table(run: Run) -> Table:
    """What came in and out, by content: for whoever wants to know whether two runs are the same."""
    rows = []
    for name, manifest in run.manifests.items():
        if _is_of_evalset(name):
            continue
        files = manifest.get("outputs", {})
        largest = sorted(files, key=lambda file: -files[file]["bytes"])[:_MAX_FILES]
        said = [f"{file} {files[file]['sha256'][:16]}" for file in largest]
        said += [f"and {len(files) - len(largest)} more"] if len(files) > len(largest) else []
        inputs = [f"{slot} {about['id']}" for slot, about in manifest["inputs"].items()]
        texts = [manifest["id"], manifest.get("code") or "-", manifest.get("git") or "-"]
        cells = [Cell(", ".join(each), is_code=True) for each in (inputs, said)]
        rows.append([Cell(name), *(Cell(text, is_code=True) for text in texts), *cells])
    head = ["job", "content", "code", "commit", "inputs", "largest files, sha256"]
    caption = (
        "Content is the hash of all files of a job, code that of the modules that it used; manifest.json in the folder of "
        "each job has all in full; those of tasks of an evaluation folder are not shown."
    )
    places, several = (1, 2, 3, 4, 5), (4, 5)
    return Table(
        "Hashes", head, rows, caption, text_columns=places, long_columns=several, is_folded=True
    )


def _settings_text(settings: dict[str, Any]) -> str:
    """Settings on one line, as JSON without the outer braces."""
    return json.dumps(settings, sort_keys=False)[1:-1].replace('"', "")

"""The facts of a page: what was run, where, with what; and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipgraft.report.read import Run
from clipgraft.report.sections import Section
from clipgraft.report.tables import to_csv


def write_figures(sections: Sequence[Section], folder: Path) -> None:
    """Every figure as SVG, with its numbers as CSV."""
    folder.mkdir(exist_ok=True)
    for figure in (figure for section in sections for figure in section.figures):
        (folder / f"{figure.name}.svg").write_text(figure.svg)
        (folder / f"{figure.name}.csv").write_text(to_csv(figure.rows))


def subtitle(run: Run) -> str:
    """Commit, hardware and seed, each as often as they differ."""
    manifests = run.manifests.values()
    commits = dict.fromkeys(m["git"] for m in manifests if m.get("git"))
    seeds = dict.fromkeys(m["settings"]["seed"] for m in manifests if "seed" in m["settings"])
    parts = [f"commit {', '.join(commits)}"] if commits else []
    parts += [" / ".join(machines(run))] if machines(run) else []
    parts += [f"seed {', '.join(map(str, seeds))}"] if seeds else []
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
    """Packages of all jobs, with their versions."""
    packages: dict[str, dict[str, None]] = {}
    for manifest in run.manifests.values():
        for name, version in (manifest.get("packages") or {}).items():
            packages.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' / '.join(versions)}" for name, versions in packages.items())


def job_rows(run: Run) -> list[dict[str, str]]:
    """What each job was, cost and was told."""
    rows = []
    for name, manifest in run.manifests.items():
        seen, memory = manifest.get("samples_seen"), manifest.get("peak_memory_mb")
        rows.append(
            {
                "name": name,
                "version": run.folders[name].resolve().name,
                "seconds": f"{manifest.get('seconds') or 0:,.1f}",
                "memory": f"{memory:,}" if memory else "-",
                "samples_seen": f"{seen:,}" if seen else "-",
                "settings": _settings_text(manifest["settings"]),
            }
        )
    return rows


def _settings_text(settings: dict[str, Any]) -> str:
    """Settings on one line, as JSON without the outer braces."""
    return json.dumps(settings, sort_keys=False)[1:-1].replace('"', "")

"""Stage `report`: everything a run has to show, on one page, with the numbers as files.

Writes `report.html` (self-contained), `results.csv` (all metrics), `results.txt` (the main ones, for the
terminal), `figures/` (every figure as SVG, with its numbers as CSV) and, of an evaluation folder, `evalset/` (of each
model `eval_results.jsonl` and `aggregate.json`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipgraft.compare import human
from clipgraft.report.attributes import attributes_section
from clipgraft.report.choices import choices_figures
from clipgraft.report.evalset import EVALSET, write_evalset
from clipgraft.report.facts import run_section, subtitle, write_figures
from clipgraft.report.figures_results import noise_of, shares_of
from clipgraft.report.page import render
from clipgraft.report.page_tables import failures_table
from clipgraft.report.read import UNTRAINED, Model, Run
from clipgraft.report.sections import (
    TRAIN,
    data_section,
    experts_section,
    moe_section,
    pretraining_section,
    results_section,
)
from clipgraft.report.tables import (
    GIVEN,
    KNN,
    PROBE,
    Column,
    columns_of,
    displayed,
    lead_column,
    results_csv,
    results_text,
)
from clipgraft.settings import ReportJob

log = logging.getLogger(__name__)

MAX_BYTES = 10_000_000


def report(settings: ReportJob, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the report of a run.

    Args:
        settings: title, name of the run, number of pictures.
        inputs: name of each job of the run to its folder, as planned: `pretrain/short`,
            `evaluate/base/renders` and so on.
        out: folder to write.
    Returns:
        Facts for the manifest.
    """
    run = Run.open(inputs)
    probed = run.models()
    learnt = columns_of(probed)
    models = [model for model in probed if model.key != UNTRAINED]
    columns = [column for column in learnt if column.group not in (PROBE, KNN, GIVEN)]
    samples = run.samples(TRAIN)
    moe = moe_section(run)
    moe.figures += choices_figures(run, models)
    results = results_section(run, models, columns)
    failed = failures_table(probed)
    results.tables += [] if failed is None else [failed]
    sections = [
        run_section(run),
        data_section(run, samples, settings.num_pictures),
        pretraining_section(run),
        experts_section(run, samples, models),
        moe,
        attributes_section(probed, learnt),
        results,
    ]
    sections = [section for section in sections if not section.is_empty]
    write_figures(sections, out / "figures")
    text = results_text(models, columns)
    (out / "results.txt").write_text(text)
    (out / "results.csv").write_text(results_csv(probed, learnt))
    write_evalset(models, out / EVALSET)
    page = render(
        {
            "title": settings.title,
            "run": settings.run,
            "subtitle": subtitle(run, settings.seed),
            "headline": _headline(models, columns),
            "tiles": _tiles(run, models, columns, len(samples)),
            "sections": sections,
        }
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    for line in text.splitlines():
        log.info("%s", line)
    if len(page) > MAX_BYTES:
        log.warning(
            "report.html has %.1f MB, more than %.0f, which phones and mail do not like. Hint: a lower report.num_pictures",
            len(page) / 1e6,
            MAX_BYTES / 1e6,
        )
    return {
        "num_models": len(models),
        "num_figures": sum(len(section.figures) for section in sections),
        "html_bytes": len(page.encode()),
        "run_seconds": round(run.seconds, 1),
    }


def _headline(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """The outcome in one sentence; a loss is said as plainly as a gain."""
    if not columns:
        return ""
    lead, final = lead_column(columns), models[-1]
    titles = {model.key: model.title for model in models}
    if final.key not in lead.values:
        return ""
    others = {key: value for key, value in lead.values.items() if key != final.key}
    compared = [
        f"{titles[key]} {displayed(value):.1f} %"
        for key, value in others.items()
        if not key.startswith("expert_")
    ]
    compared += [] if math.isnan(lead.chance) else [f"chance {displayed(lead.chance):.1f} %"]
    text = (
        f"On {lead.task}, {final.title} reaches {displayed(lead.values[final.key]):.1f} % {lead.short} "
        f"({', '.join(compared)})."
    )
    if not others:
        return text
    best = max(others, key=lambda key: others[key])
    return f"{text} {_verdict(lead, final, best, titles[best])}"


def _verdict(lead: Column, final: Model, best: str, title: str) -> str:
    points = 100 * (lead.values[final.key] - lead.values[best])
    if abs(points) < 0.05:
        return f"{title.capitalize()} is as good."
    rank = f"{title}, the next best" if points > 0 else f"{title}, the best model of the run"
    noise = noise_of(shares_of(final, lead))
    text = f"That is {abs(points):.1f} points {'above' if points > 0 else 'below'} {rank}"
    if abs(points) < noise:
        return f"{text}; with so few images, differences below {noise:.1f} points mean little."
    return f"{text}."


def _tiles(
    run: Run, models: Sequence[Model], columns: Sequence[Column], num_samples: int
) -> list[dict[str, str]]:
    minutes = run.seconds / 60
    tiles = []
    if columns and models[-1].key in lead_column(columns).values:
        lead, final = lead_column(columns), models[-1]
        text = f"{lead.short} of {final.title} on {lead.task}"
        tiles.append({"value": f"{displayed(lead.values[final.key]):.1f} %", "text": text})
    tiles.append({"value": human(num_samples), "text": "training samples"})
    if models:
        seen = human(models[-1].cost.samples_seen)
        tiles.append({"value": seen, "text": "samples seen in all training of the final model"})
    value = f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    tiles.append({"value": value, "text": f"in {len(run.folders)} jobs, one after the other"})
    return tiles

"""The section on what experts have learnt: do they learn different things?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clipgraft.report.figures_attributes import plot_gains, plot_given, plot_probes
from clipgraft.report.page_tables import Cell, Table, score_cell
from clipgraft.report.read import UNTRAINED, Model
from clipgraft.report.sections import Section
from clipgraft.report.tables import GIVEN, KNN, PROBE, Column, displayed


def attributes_section(models: Sequence[Model], columns: Sequence[Column]) -> Section:
    """Probes, what they have gained over the base, and retrieval among candidates that agree.

    Args:
        models: all, the untrained one included.
        columns: all metrics.
    """
    has_experts = any(model.key.startswith("expert_") for model in models)
    title = "Do experts learn different things?" if has_experts else "What was learnt"
    section = Section("attributes", title)
    probes = [column for column in columns if column.group == PROBE]
    given = [column for column in columns if column.group == GIVEN]
    if probes:
        section.tables += [_probe_table(task, models, of) for task, of in _by_task(probes)]
        section.figures.append(plot_probes(models, probes))
        others = [model for model in models if model.key not in (UNTRAINED, "base")]
        compared = [
            column
            for column in probes
            if "base" in column.values and any(model.key in column.values for model in others)
        ]
        if compared:
            section.figures.append(plot_gains(others, compared))
    neighbours = [column for column in columns if column.group == KNN]
    section.tables += [_neighbour_table(task, models, of) for task, of in _by_task(neighbours)]
    if given:
        tasks = {column.task for column in given}
        plain = [column for column in columns if column.key == "mean_R@1" and column.task in tasks]
        whole = [replace(column, title="all", short="all") for column in plain]
        shown = [each for column in whole for each in (column, *_of_task(given, column.task))]
        section.tables += [_given_table(task, models, of) for task, of in _by_task(shown)]
        section.figures.append(plot_given(models, shown))
    return section


def _by_task(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    tasks = dict.fromkeys(column.task for column in columns)
    return [(task, _of_task(columns, task)) for task in tasks]


def _of_task(columns: Sequence[Column], task: str) -> list[Column]:
    return [column for column in columns if column.task == task]


def _probe_table(task: str, models: Sequence[Model], columns: Sequence[Column]) -> Table:
    found = _found(task, models, columns)
    caption = (
        "Accuracy of logistic regression on frozen image embeddings, per cent, mean of several halvings of "
        f"{found[0]['num_samples']:,} samples and their standard deviation: one half trains it and chooses its regulariser, "
        "the other is judged. Bold is best, the shade shows how far from chance to best. Bad: differences between models "
        "within the spread, which mean nothing, or numbers near those of the untrained network, which were never learnt."
    )
    title = f"{task}: attributes that a linear probe reads off image embeddings"
    return _accuracies(title, task, models, columns, caption)


def _neighbour_table(task: str, models: Sequence[Model], columns: Sequence[Column]) -> Table:
    found = _found(task, models, columns)
    caption = (
        f"Accuracy of a vote of the {found[0]['num_neighbours']} nearest images, per cent, mean of several halvings of "
        f"{found[0]['num_samples']:,} samples and their standard deviation: one half votes, the other is judged. Bad: far "
        "below the linear probe, where a label is there but other things are nearer; or no better than untrained."
    )
    title = f"{task}: attributes that the nearest images tell"
    return _accuracies(title, task, models, columns, caption)


def _found(task: str, models: Sequence[Model], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """What the first column stands for, of all models that have it, those of most samples first."""
    column = columns[0]
    found = [m.results[task][column.group][column.title] for m in models if m.key in column.values]
    return sorted(found, key=lambda about: -about["num_samples"])


def _accuracies(
    title: str, task: str, models: Sequence[Model], columns: Sequence[Column], caption: str
) -> Table:
    shown = [model for model in models if any(model.key in column.values for column in columns)]
    rows = [[Cell("chance"), *(Cell(f"{displayed(column.chance):.1f}") for column in columns)]]
    for model in shown:
        cells = [Cell(model.title, colour=model.colour)]
        for column in columns:
            about = model.results[task][column.group].get(column.title)
            cells.append(
                Cell("-") if about is None else _probe_cell(column, model, about["spread"])
            )
        rows.append(cells)
    head = ["model", *(column.title for column in columns)]
    return Table(title, head, rows, caption, first_is_chance=True)


def _probe_cell(column: Column, model: Model, spread: float) -> Cell:
    text = f"{displayed(column.values[model.key]):.1f} \N{PLUS-MINUS SIGN} {displayed(spread):.1f}"
    return replace(score_cell(column, model.key), text=text)


def _given_table(task: str, models: Sequence[Model], columns: Sequence[Column]) -> Table:
    shown = [model for model in models if any(model.key in column.values for column in columns)]
    rows = [[Cell("chance"), *(Cell(f"{displayed(column.chance):.1f}") for column in columns)]]
    for model in shown:
        scores = (score_cell(column, model.key) for column in columns)
        rows.append([Cell(model.title, colour=model.colour), *scores])
    sizes = ", ".join(
        f"{names}: {about['median_images']:.0f}"
        for names, about in shown[0].results[task]["given"].items()
    )
    caption = (
        f"Mean R@1, per cent, among candidates that agree with the query on these labels (median images in a group: {sizes}). "
        "Bad: models below the base wherever labels are given, or groups so small that chance is near 100 %."
    )
    head = ["model", *(column.title for column in columns)]
    title = f"{task}: retrieval where labels are given"
    return Table(title, head, rows, caption, first_is_chance=True)

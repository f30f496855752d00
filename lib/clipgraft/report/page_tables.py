"""Tables of the page: heads, cells and what to say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from clipgraft.report.evalset import EACH_TASK, EVALSET, rows_of, size_of_evalset
from clipgraft.report.figures_results import noise_of, shares_of
from clipgraft.report.read import Model, Run, read_json, sides_of
from clipgraft.report.tables import (
    Column,
    best_expert,
    cost_columns,
    displayed,
    num_images_of,
    size_of_task,
)

_HOW_TO_READ = (
    "Per cent; bold is best of its column, the shade shows how far from chance to best. Equal captions count as hits, "
    "equal scores as a coin would decide. results.csv has all digits, top 5 and recall per class."
)
_COST_CAPTION = (
    " After the base: samples of its training, and FLOPs of training and of embedding samples for clusters; k-means "
    "is left out. A frozen weight costs two products instead of three, and nothing where no gradient has to pass; so "
    "training MLPs costs less than training all, and training routers still costs most of it. FLOP a pair: of "
    "encoding a picture and a caption. The best expert is chosen on this very table, which flatters it. Bad: a "
    "baseline above the MoE that costs no more."
)
NOT_SHOWN = ("top 5", "recall per class", EACH_TASK)  # groups that stand elsewhere


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and how it looks."""

    text: str
    is_best: bool = False
    shade: float = 0.0
    colour: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        head: of each column.
        rows: cells of each row.
        caption: below it.
        groups: names above the head, with the number of columns of each.
        first_is_chance: whether the first row is what guessing gives.
        text_columns: columns that are set to the left, beside the first.
        long_columns: those of them whose text may take several lines.
        is_folded: whether it is shown at a click.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    caption: str
    groups: list[tuple[str, int]] = field(default_factory=list)
    first_is_chance: bool = False
    text_columns: tuple[int, ...] = ()
    long_columns: tuple[int, ...] = ()
    is_folded: bool = False

    @property
    def group_starts(self) -> list[int]:
        """First column of each group but the first."""
        spans = [span for _, span in self.groups]
        return [sum(spans[:number]) for number in range(1, len(spans))]


def data_table(run: Run) -> Table:
    """What was asked for, what came, what was kept, per data set."""
    rows = []
    for data, folder in run.of_stage("index").items():
        about = read_json(folder / "samples.json")
        labels = ", ".join(f"{name} {len(c)}" for name, c in about["label_names"].items())
        rejected = pq.read_metadata(folder / "rejects.parquet").num_rows
        counts = [rejected, about["num_samples"], about["num_captions"]]
        texts = [data, *_download_cells(run, data), *(f"{n:,}" for n in counts), labels or "none"]
        rows.append([Cell(text) for text in texts])
    head = ["data set", "source", "asked for", "came", "rejected", "samples", "captions", "labels"]
    caption = "Labels with their number of classes. Bad: far fewer samples than were asked for."
    return Table("Data sets", head, rows, caption, text_columns=(1, 7))


def rounds_table(rounds: Mapping[str, Mapping[str, Any]]) -> Table:
    """Numbers of clusters and labels of each round.

    Args:
        rounds: round to the content of `clusters.json`.
    """
    rows = []
    for name, about in rounds.items():
        agreement = about["agreement"] or {}
        nmi = [agreement.get(side) for side in ("image", "text", "joint")]
        sides = " x ".join(f"{about[side]['num_clusters']:,} {side}" for side in sides_of(about))
        counts = [about["num_labels"], min(about["sizes"]), max(about["sizes"])]
        texts = [name, sides, *(f"{n:,}" for n in counts)]
        texts += ["-" if value is None else f"{value:.2f}" for value in nmi]
        rows.append([Cell(text) for text in texts])
    groups = [("", 2), ("accumulated labels", 3), ("NMI with round before", 3)]
    head = ["round", "clusters", "labels", "smallest", "largest", "image", "text", "joint"]
    caption = (
        "Each round clusters the embeddings of the expert before; the labels are all combinations of "
        "clusters of all rounds so far. NMI near 1 means that a round found again what the round "
        "before had found."
    )
    return Table("Rounds of clustering", head, rows, caption, groups, text_columns=(1,))


def results_table(
    task: str, models: Sequence[Model], columns: Sequence[Column], *, is_first: bool
) -> Table:
    """All models on one task.

    Args:
        task: name of the task.
        models: in pipeline order.
        columns: of this task.
        is_first: the first of several such tables says how to read them.
    """
    shown = [column for column in columns if column.group not in NOT_SHOWN]
    measured = [model for model in models if task in model.results]
    tried = [model for model in models if task in model.results or task in model.failed]
    spent, best = cost_columns(tried), best_expert(models, columns)
    chances = [Cell(_percent(column.chance)) for column in shown]
    rows = [[Cell("chance"), *[Cell("")] * len(spent), *chances]]
    for model in tried:
        title = f"{model.title} (best expert)" if model.key == best else model.title
        blank = "failed" if task in model.failed else "-"
        scores = (score_cell(column, model.key, blank) for column in shown)
        costs = (Cell(each.cells[model.key]) for each in spent)
        rows.append([Cell(title, colour=model.colour), *costs, *scores])
    result = max((model.results[task] for model in measured), key=num_images_of)
    caption = _noise_text(measured, shown)
    if is_first:
        caption = f"{_HOW_TO_READ} {caption}" + (_COST_CAPTION if len(spent) > 2 else "")
    head = ["model", *(each.title for each in spent), *(column.title for column in shown)]
    groups = [("", 3), *_groups(each.group for each in spent[2:])]
    groups += Counter(column.group for column in shown).items()
    title = f"{task}: {size_of_task(result)}"
    return Table(title, head, rows, caption, groups, first_is_chance=True)


def evalset_table(models: Sequence[Model]) -> Table | None:
    """All models on each task of an evaluation folder; None without one."""
    measured = [model for model in models if EVALSET in model.results]
    if not measured:
        return None
    rows = []
    for row in rows_of({model.key: model.results[EVALSET]["tasks"] for model in measured}):
        shown = {displayed(value) for value in row.values.values()}
        best = max(shown) if len(shown) > 1 else None  # of equal ones none is best
        scores = [
            Cell(row.failed[model.key])
            if model.key in row.failed
            else Cell(_percent(value), displayed(value) == best)
            if (value := row.values.get(model.key)) is not None
            else Cell("-")
            for model in measured
        ]
        chance = "-" if row.chance is None else _percent(row.chance)
        rows.append(
            [
                Cell(row.name),
                Cell(row.metric),
                Cell(row.size),
                Cell(chance),
                *scores,
                Cell(row.notes),
            ]
        )
    head = ["task", "metric", "images", "chance", *(model.title for model in measured), "notes"]
    caption = (
        "Main metrics in per cent, as DataComp defines them; bold is best of its line. FairFace and UTKFace have several "
        "metrics and no main one. Bad: notes of partial data, whose numbers compare with nobody's, and a line at chance. "
        f"{size_of_evalset(measured[0].results[EVALSET], with_names=True)}."
    )
    title, notes = "Evaluation folder, task by task", len(head) - 1
    return Table(title, head, rows, caption, text_columns=(1, notes), long_columns=(notes,))


def failures_table(models: Sequence[Model]) -> Table | None:
    """What could not be measured, and why; None if all was."""
    rows = [
        [Cell(model.title, colour=model.colour), Cell(task), Cell(why)]
        for model in models
        for task, why in model.failed.items()
    ]
    if not rows:
        return None
    caption = "These have no numbers above. Mend the cause and run snakemake again: it measures them alone."
    head = ["model", "task", "why"]
    return Table("Tasks that failed", head, rows, caption, text_columns=(1, 2), long_columns=(2,))


def _groups(names: Iterable[str]) -> list[tuple[str, int]]:
    """Neighbours of one name, with how many they are."""
    return [(name, len(list(those))) for name, those in groupby(names)]


def _download_cells(run: Run, data: str) -> list[str]:
    """Kinds of sources, number of samples asked for, number that came; of all parts of a mixed data set."""
    parts = {
        name: folder
        for name, folder in run.of_stage("download").items()
        if name.split("/")[0] == data
    }
    if not parts:
        return ["-", "-", "-"]
    paths = [folder / "outcomes.parquet" for folder in parts.values()]
    asked = sum(pq.read_metadata(path).num_rows for path in paths)
    came = sum(dataset(path).count_rows(filter=pc.field("status") == "ok") for path in paths)
    kinds = [run.manifest("download", name)["settings"]["source"]["kind"] for name in parts]
    return [", ".join(dict.fromkeys(kinds)), f"{asked:,}", f"{came:,}"]


def _noise_text(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """Which differences mean little, told apart where columns rest upon different numbers of images."""
    noises: dict[str, list[str]] = {}
    for column in columns:
        model = next(model for model in models if model.key in column.values)
        even = [(0.5, num) for _, num in shares_of(model, column)]
        noises.setdefault(f"{noise_of(even):.1f}", []).append(column.title)
    said = list(noises)
    if len(noises) > 1:
        said = [f"{noise} ({', '.join(titles)})" for noise, titles in noises.items()]
    text = f"Differences below about {', '.join(said)} points are within two standard errors of a number near 50 %"
    if any(column.parts for column in columns):
        text += ", each metric taken for a share of the images of its task"
    return f"{text}."


def score_cell(column: Column, model: str, blank: str = "-") -> Cell:
    """A value in per cent, the best in bold, in a shade that says how far from chance to the best it is."""
    if model not in column.values:
        return Cell(blank)
    value, best = column.values[model], max(column.values.values())
    span = best - column.chance
    share = max(0.0, (value - column.chance) / span) if span > 0 else 0.0
    return Cell(_percent(value), column.is_best(model), round(0.22 * share, 3))


def _percent(value: float) -> str:
    return f"{displayed(value):.1f}"

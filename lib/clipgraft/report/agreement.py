"""Agreement, from the folders of a run: of clusters with known labels, of models with one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import normalized_mutual_info_score

from clipgraft.data.samples import Samples
from clipgraft.report.figures_agreement import Answers, plot_agreement_of_models
from clipgraft.report.read import Model, Run, read_json, sides_of
from clipgraft.report.style import Figure

_RIGHT = "_right"


def agreement_figure(run: Run, models: Sequence[Model]) -> Figure | None:
    """Whether base, experts and mixture give the same answers on the first task; None if that is not known."""
    several = [m for m in models if m.key in ("base", "moe") or m.key.startswith("expert_")]
    if sum(model.key.startswith("expert_") for model in several) == 0:
        return None
    for task in several[0].results:
        asked = [model.key for model in several if task in model.results]
        found = {key: _answers(run, f"{key}/{task}") for key in asked}
        answers = {key: of for key, of in found.items() if of}
        if len(answers) > 2:
            titles = {model.key: model.title for model in several}
            return plot_agreement_of_models(task, answers, titles)
    return None


def _answers(run: Run, name: str) -> Answers:
    """What a model said to questions that have a right answer; nothing if it was not asked."""
    folder = run.folders.get(f"evaluate/{name}")
    if folder is None or not (folder / "answers.parquet").exists():
        return {}
    table = pq.read_table(folder / "answers.parquet")
    answers = {}
    for column in table.column_names:
        if column.endswith(_RIGHT):
            question = column.removesuffix(_RIGHT)
            is_asked_Q = table[column].is_valid().to_numpy()
            right_Q = table[column].fill_null(False).to_numpy()
            answers[question] = (table[question].to_numpy()[is_asked_Q], right_Q[is_asked_Q])
    return {question: of for question, of in answers.items() if len(of[0])}


def cluster_rows(run: Run, samples: Samples) -> list[dict[str, Any]]:
    """Normalised mutual information of the clusters of each round with each known label."""
    known = {name: samples.labels(name) for name in samples.label_names}
    known = {
        name: label_N
        for name, label_N in known.items()
        if len(np.unique(label_N[label_N >= 0])) > 1
    }
    rows = []
    for name, folder in run.of_stage("cluster").items() if known else []:
        sides = sides_of(read_json(folder / "clusters.json"))
        clusters_NS = np.load(folder / "clusters.npy")
        columns = dict(zip(sides, clusters_NS.T, strict=True))
        if len(sides) > 1:  # a sample's digit of this round
            columns["both"] = np.unique(clusters_NS, axis=0, return_inverse=True)[1].reshape(-1)
        columns["all labels"] = np.load(folder / "labels.npy")
        for side, found_N in columns.items():
            for attribute, label_N in known.items():
                has = label_N >= 0
                nmi = float(normalized_mutual_info_score(label_N[has], found_N[has]))
                rows.append({"round": name, "clusters": side, "attribute": attribute, "nmi": nmi})
    return rows

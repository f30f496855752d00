"""The sections of the page: which figures, tables and pictures, from the folders of a run.

What a run does not have is left out, and a section without anything in it as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipgraft.data.samples import Samples
from clipgraft.loss_settings import DistillationSettings, LossSettings
from clipgraft.report import figures, figures_experts, figures_results, figures_training
from clipgraft.report.agreement import agreement_figure, cluster_rows
from clipgraft.report.evalset import EVALSET
from clipgraft.report.figures_robustness import plot_robustness
from clipgraft.report.figures_rounds import flow_rows, mean_splits, plot_label_flow
from clipgraft.report.figures_watch import plot_looks
from clipgraft.report.page_tables import (
    Table,
    data_table,
    evalset_table,
    results_table,
    rounds_table,
)
from clipgraft.report.pictures import (
    Picture,
    Reject,
    cluster_sheets,
    rejects_sheet,
    retrieval_pictures,
    sample_sheet,
)
from clipgraft.report.read import (
    Model,
    Run,
    read_json,
    read_looks,
    read_metrics,
    sides_of,
    tokens_of,
)
from clipgraft.report.style import BLUE, ORANGE, Figure
from clipgraft.report.tables import Column, lead_column

TRAIN = "train"
MAX_REASONS = 8


@dataclass
class Section:
    """One numbered section."""

    id: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    sheet: list[Picture] = field(default_factory=list)
    sheet_title: str = ""
    sheet_caption: str = ""
    rejects: list[Reject] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    examples: dict[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.sheet or self.figures or self.rounds or self.examples)


def data_section(run: Run, samples: Samples, num_pictures: int) -> Section:
    """1 Data: what came, what was left out, what it looks like."""
    section = Section("data", "Data", sheet_title="A look at the training set")
    section.tables.append(data_table(run))
    section.sheet = sample_sheet(samples, num_pictures)
    section.sheet_caption = (
        "Samples evenly spread over the training set, each with its first caption. Bad: captions "
        "that do not tell what is in the picture, the same picture over and over, logos and text."
    )
    folder = run.folders[f"index/{TRAIN}"]
    phases = {name: run.manifest("pretrain", name)["settings"] for name in run.of_stage("pretrain")}
    lengths, unit = _caption_lengths(run, samples)
    limits = (
        {name: about["text_length"] for name, about in phases.items()} if unit == "tokens" else {}
    )
    section.figures.append(figures.plot_caption_lengths(lengths, unit, limits))
    table = pq.read_table(folder / "samples.parquet", columns=["width", "height"])
    width, height = table["width"].to_numpy(), table["height"].to_numpy()
    largest = max((about["image_size"] for about in phases.values()), default=224)
    if len(np.unique(np.stack([width, height], 1), axis=0)) > 1:
        section.figures.append(figures.plot_image_sizes(width, height, largest))
    else:
        section.text = f"All training images are {width[0]} x {height[0]} pixels. "
    rejected = _rejects(run)
    if rejected:
        section.figures.append(figures.plot_rejects(rejected))
    else:
        section.text += "No image was lost or rejected."
    section.rejects = rejects_sheet(folder, samples.download, num_pictures)
    return section


def pretraining_section(run: Run) -> Section:
    """2 Pretraining: the curves of all phases, one after the other."""
    section = Section("pretraining", "Pretraining")
    rows: list[dict[str, Any]] = []
    spans: dict[str, dict[str, tuple[float, float]]] = {}
    looks: dict[str, list[dict[str, Any]]] = {}
    candidates: dict[str, int] = {}
    seen, hours = 0, 0.0
    for phase, folder in run.of_stage("pretrain").items():
        manifest = run.manifest("pretrain", phase)
        looks[phase] = [
            {**look, "samples_seen": seen + look["samples_seen"]} for look in read_looks(folder)
        ]
        mine = [
            {
                **row,
                "phase": phase,
                "samples_seen": seen + row["samples_seen"],
                "hours": hours + row["seconds"] / 3600,
                "tokens_per_second": row["samples_per_second"] * tokens_of(manifest),
            }
            for row in read_metrics(folder)
        ]
        if mine:
            ends = {"samples_seen": seen + manifest["samples_seen"], "hours": mine[-1]["hours"]}
            spans[phase] = {
                "samples_seen": (seen, ends["samples_seen"]),
                "hours": (hours, ends["hours"]),
            }
            seen, hours = ends["samples_seen"], ends["hours"]
            if _guesses_by_batch(manifest["settings"]):
                candidates[phase] = manifest["settings"]["batch_size"]
        rows += mine
    if rows:
        curves = figures_training.plot_pretraining(_same_keys(rows), spans, candidates)
        section.figures.append(curves)
        parts = figures_training.plot_loss_parts(rows, spans)
        section.figures += [] if parts is None else [parts]
    _add_looks(section, "pretraining_watch", looks, dict.fromkeys(looks, BLUE))
    return section


def experts_section(run: Run, samples: Samples, models: Sequence[Model]) -> Section:
    """3 Experts: what the clusters of each round are, and what was learnt from them."""
    section = Section("experts", "Experts")
    rounds = {name: read_json(f / "clusters.json") for name, f in run.of_stage("cluster").items()}
    tuned = run.of_stage("finetune_expert")
    if rounds:
        section.tables.append(rounds_table(rounds))
        trained = [run.manifest("finetune_expert", name)["settings"] for name in tuned]
        batch = max((settings["batch_size"] for settings in trained), default=1)
        # Baselines are trained on ordinary batches, whatever the order of the experts'.
        loses_small = any(settings["batch_order"] == "round_robin" for settings in trained)
        section.figures.append(
            figures_experts.plot_cluster_sizes(rounds, batch, loses_small=loses_small)
        )
        if len(rounds) > 1:
            labels = {
                name: np.load(f / "labels.npy") for name, f in run.of_stage("cluster").items()
            }
            flow = plot_label_flow(flow_rows(labels), mean_splits(labels), _label_names(rounds))
            section.figures.append(flow)
        known = cluster_rows(run, samples)
        if known:
            section.figures.append(figures_experts.plot_agreement(known))
    keys = {name: _expert_key(name) for name in tuned}
    by_name = {keys[name]: read_metrics(folder) for name, folder in tuned.items()}
    shown = {m.key: m for m in models}
    series = {key: rows for key, rows in by_name.items() if rows and key in shown}
    if series:
        titles = {key: shown[key].title for key in series}
        colours = {key: shown[key].colour for key in series}
        section.figures.append(figures_training.plot_expert_losses(series, titles, colours))
    looks = {key: read_looks(tuned[name]) for name, key in keys.items() if key in shown}
    _add_looks(section, "experts_watch", looks, {key: shown[key].colour for key in looks})
    agreement = agreement_figure(run, models)
    section.figures += [] if agreement is None else [agreement]
    embeddings = run.of_stage("embed")
    for name, folder in run.of_stage("cluster").items():
        before = str(int(name) - 1)
        if before in embeddings:
            side = sides_of(rounds[name])[0]
            file = "text.npy" if side == "text" else "image.npy"  # of joint vectors the first half
            features_ND = np.load(embeddings[before] / file, mmap_mode="r")
            centroids = np.load(folder / f"{side}_centroids.npy")[:, : features_ND.shape[1]]
            clusters = np.load(folder / "clusters.npy")[:, 0]
            sheets = cluster_sheets(samples, features_ND, centroids, clusters)
            caption = "" if section.rounds else _ROUND_CAPTION
            section.rounds.append(
                {"name": name, "side": side, "sheets": sheets, "caption": caption}
            )
    return section


def moe_section(run: Run) -> Section:
    """4 MoE: how the routers learnt, and whom they send what."""
    section = Section("moe", "MoE")
    folder = run.of_stage("finetune_router").get("moe")
    rows = read_metrics(folder) if folder else []
    if not rows or folder is None:
        return section
    about = read_json(folder / "model.json")["moe"]
    loads = {
        name.removeprefix("load_"): load
        for name, load in rows[-1].items()
        if name.startswith("load_")
    }
    layers = {tower: _layers(about, tower, len(load)) for tower, load in loads.items()}
    experts, choices = about["num_experts"], about["top_k"]
    figure = figures_experts.plot_router(_same_keys(rows), experts, choices)
    section.figures += [figure] if figure else []
    if loads:
        bounds = run.manifest("finetune_router", "moe")["healthy_loads"]
        section.figures.append(figures_experts.plot_router_layers(rows, layers, bounds))
        section.figures.append(figures_experts.plot_expert_load(loads, layers))
    _add_looks(section, "moe_watch", {"moe": read_looks(folder)}, {"moe": ORANGE})
    return section


def results_section(run: Run, models: Sequence[Model], columns: Sequence[Column]) -> Section:
    """5 Results: tables, figures, confusion and examples of the final model."""
    section = Section("results", "Results")
    tasks = list(dict.fromkeys(column.task for column in columns))
    section.tables = [
        results_table(
            task, models, [c for c in columns if c.task == task], is_first=task == tasks[0]
        )
        for task in tasks
    ]
    by_task = evalset_table(models)
    section.tables += [] if by_task is None else [by_task]
    if not columns:
        return section
    main = [column for column in columns if column.is_main]
    section.figures.append(figures_results.plot_metrics(models, main))
    section.figures.append(figures_results.plot_cost(models, lead_column(columns)))
    curves = plot_robustness(models)
    if curves is not None:
        section.figures.append(curves)
    final = models[-1]
    folder = [task for task in final.results if task == EVALSET]
    own = [task for task in final.results if task != EVALSET]
    confusions = (figures_results.plot_confusions(task, final) for task in own)
    worst = (figures_results.plot_worst_classes(task, final) for task in own)
    of_folder = (figures_results.plot_worst_classes(task, final) for task in folder)
    for drawn in (confusions, worst, of_folder):
        section.figures += list(filter(None, drawn))[:1]
    section.examples = _examples(run, final)
    return section


# --- numbers --------------------------------------------------------------------------------------


def _add_looks(
    section: Section,
    name: str,
    looks: Mapping[str, list[dict[str, Any]]],
    colours: Mapping[str, str],
) -> None:
    """The figure of the trainings that were watched, if there is one."""
    series = {key: rows for key, rows in looks.items() if rows}
    if series:
        titles = {key: key.replace("_", " ") for key in series}
        section.figures.append(plot_looks(name, series, titles, colours))


def _guesses_by_batch(settings: Mapping[str, Any]) -> bool:
    """Whether the loss of a phase, its whole sum, is the log of the batch size where all pairs look alike."""
    loss = LossSettings.model_validate(settings["loss"])
    taught = DistillationSettings.model_validate(settings["distillation"])
    return loss.kind == "contrastive" and loss.weight == 1 and not taught.is_on


def _caption_lengths(run: Run, samples: Samples) -> tuple[np.ndarray, str]:
    tokens = run.folders[f"index/{TRAIN}"] / "tokens"
    if tokens.exists():
        has_end = read_json(tokens / "tokens.json")["end_id"] is not None  # WordPiece has none
        offsets = np.load(tokens / "caption_offsets.npy")
        return np.diff(offsets) + 1 + has_end, "tokens"
    return np.array(
        [len(text.split()) for texts in samples.all_captions() for text in texts]
    ), "words"


def _rejects(run: Run) -> list[dict[str, Any]]:
    rows = []
    downloads = run.of_stage("download")
    for data, folder in sorted(run.of_stage("index").items(), key=lambda each: each[0] != TRAIN):
        rejects = pq.read_table(folder / "rejects.parquet", columns=["reason"])
        reasons = Counter(_counts(rejects["reason"]))
        # A mixed data set has a download for each of its parts.
        for part in (name for name in downloads if name.split("/")[0] == data):
            path = downloads[part] / "outcomes.parquet"  # millions of rows, nearly all of them ok
            failed = pq.read_table(path, columns=["message"], filters=[("status", "!=", "ok")])
            messages = _counts(pc.utf8_slice_codeunits(failed["message"], 0, 60))
            for why, count in messages.items():
                reasons[f"not downloaded: {why or '?'}"] += count
        for reason, count in reasons.most_common(MAX_REASONS):
            rows.append({"data": data, "reason": reason, "samples": count})
        others = sum(count for _, count in reasons.most_common()[MAX_REASONS:])
        if others:
            rows.append({"data": data, "reason": "other reasons", "samples": others})
    return rows


def _counts(column: pa.ChunkedArray) -> dict[Any, int]:
    """How often each value occurs, in the order in which they come."""
    return {each["values"]: each["counts"] for each in column.value_counts().to_pylist()}


def _examples(run: Run, model: Model) -> dict[str, Any] | None:
    for task, examples in model.examples.items():
        data = run.manifest("evaluate", f"{model.key}/{task}")["settings"]["data"]
        if examples.get("image_to_text") and f"index/{data}" in run.folders:
            pictures = retrieval_pictures(run.samples(data), examples)
            return {
                **pictures,
                "title": f"What {model.title} retrieves on {task}",
                "caption": _EXAMPLES_CAPTION,
            }
    return None


def _layers(about: dict[str, Any], tower: str, num: int) -> list[int]:
    layers = about.get(f"{tower}_layers")
    return list(layers) if isinstance(layers, list) and len(layers) == num else list(range(num))


def _label_names(rounds: dict[str, Any]) -> dict[int, str]:
    """Labels of the first round by the clusters that they are made of, where that was recorded."""
    about = next(iter(rounds.values()))
    digits = (entry[-1] for entry in about.get("digits", []))
    return {label: " x ".join(map(str, digit)) for label, digit in enumerate(digits)}


def _expert_key(name: str) -> str:
    return f"expert_{name}" if name.isdigit() else name


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the numbers that all of them have."""
    keys = [
        key
        for key, value in rows[0].items()
        if not isinstance(value, list | dict) and all(key in row for row in rows)
    ]
    return [{key: row[key] for key in keys} for row in rows]


_ROUND_CAPTION = (
    "With each cluster: caption words that set it apart, with the share of its captions that have them. Look "
    "for what the pictures of a line have in common, and whether rounds differ in it. Bad: lines that "
    "look alike, or one line that holds nearly all samples."
)
_EXAMPLES_CAPTION = (
    "Queries evenly spread over the data set, not chosen; the five best answers of the "
    "whole set, best first. Blue and a tick mark right ones. Look at what is wrong in the wrong ones. Bad: "
    "the same answer to different queries."
)
